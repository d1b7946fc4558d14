"""What the site of the documentation has beyond the folder docs/, for `mkdocs.yml`.

Pages of the checkout that lie elsewhere are taken in where they are linked; the references of commands and settings
are written from the code; equations become MathML, which browsers draw without a script.
"""

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).resolve().parent.parent
_OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/results/*.md", "benchmarks/results/*.png")
_LINK = re.compile(r"(\]\()([^)\s]+?)(#[^)\s]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw blocks of ```math, as GitHub does."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": equation}]
    }
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from outside of docs/, at the paths that they have in the checkout, and the references."""
    for path in (path for pattern in _OUTSIDE for path in sorted(CHECKOUT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(CHECKOUT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "reference/commands.md", content="\n".join(commands())))
    files.append(File.generated(config, "reference/settings.md", content="\n".join(settings())))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between docs/ and the rest of the checkout lead to where the pages are on the site."""
    uri = page.file.src_uri
    is_outside = not (Path(config.docs_dir) / uri).exists()
    here = posixpath.dirname(uri if is_outside else posixpath.join("docs", uri))

    def to_site(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if "://" in target or target.startswith(("#", "/", "mailto:")):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(here, target))
        place = wanted.removeprefix("docs/")
        if files.get_file_from_path(place) is None:
            return match[0]
        return f"{before}{posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor or ''}{after}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(to_site, part) for part in parts)


def equation(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX as MathML."""
    from latex2mathml.converter import convert

    drawn: str = convert(source, display="block")
    return f'<div class="math">{drawn}</div>'


def commands() -> Iterator[str]:
    """The reference of the commands: what `--help` says of each."""
    import importlib

    import typer

    from cel_dist.cli import app as application

    for name in application._COMMAND_MODULES:
        importlib.import_module(f"cel_dist.cli.{name}")
    yield "# Commands\n"
    yield "What `cel COMMAND --help` says. All take `--json`, which prints one JSON object and nothing else.\n"
    yield from _helps(typer.main.get_command(application.app), "cel", None)


def _helps(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = type(command).context_class(command, info_name=name.split()[-1], parent=parent, terminal_width=80)
    inner = getattr(command, "commands", None)
    if not inner:
        yield f"## {name}\n"
        yield f"```text\n{command.get_help(context)}\n```\n"
        return
    for word in sorted(inner):
        yield from _helps(inner[word], f"{name} {word}", context)


def settings() -> Iterator[str]:
    """The reference of the settings: name, type, default and description of each."""
    from cel_dist.config import Config
    from cel_dist.sweep.section import SweepSection

    yield "# Settings\n"
    yield (
        "What may stand in a configuration, and after `cel train CONFIG` as `section.name=value`. A file holds what "
        "differs from the defaults. What does not fit together is refused with the names of the settings.\n"
    )
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for name, section in {**sections, "sweep": SweepSection}.items():
        yield f"## {name}\n"
        yield f"{_prose(section.__doc__ or '')}\n"
        yield "| setting | type | default | |\n| --- | --- | --- | --- |"
        for key, field in section.model_fields.items():
            default = "needed" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
            yield f"| `{name}.{key}` | {_type(field.annotation)} | {default} | {_prose(field.description or '')} |"
        yield ""


def _prose(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _type(annotation: Any) -> str:
    """For people: `a \\| b` of choices, otherwise the names of the types."""
    arguments = get_args(annotation)
    if not arguments:
        return "null" if annotation is type(None) else html.escape(getattr(annotation, "__name__", str(annotation)))
    if all(isinstance(each, str) for each in arguments):
        return " \\| ".join(f"`{each}`" for each in arguments)
    origin = getattr(annotation, "__origin__", None)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[1])} by name"
    return " or ".join(_type(each) for each in arguments)
