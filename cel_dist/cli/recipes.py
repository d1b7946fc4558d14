"""What `cel prepare --recipe NAME --dry-run` prints: a public corpus, and what is there of it."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cel_dist.cli.app import emit

if TYPE_CHECKING:
    from cel_dist.data.survey import Survey


def survey_of(name: str, source: Path) -> "Survey":
    """What `source` holds of the public corpus of this name."""
    from cel_dist.data.recipes import find_recipe
    from cel_dist.data.survey import survey

    return survey(find_recipe(name), source)


def report(survey: "Survey", *, as_json: bool) -> None:
    """Print what a dry run found; exit 1 unless it is as published."""
    recipe = survey.recipe
    summary = {
        "recipe": recipe.title,
        "page": recipe.page,
        "download": recipe.download,
        "layout": recipe.layout,
        "ok": survey.is_as_published,
        "others": survey.others,
        "parts": [
            {
                "part": found.part.name,
                "use": found.part.use,
                "speakers": found.num_speakers,
                "published_speakers": found.part.speakers,
                "files": len(found.paths),
                "published_files": found.part.files,
                "difference": found.difference,
            }
            for found in survey.parts
        ],
    }
    emit(summary, "\n".join(_report_lines(survey)), as_json=as_json)
    if not survey.is_as_published:
        raise typer.Exit(code=1)


def _report_lines(survey: "Survey") -> list[str]:
    recipe = survey.recipe
    rows = [("part", "use", "speakers", "published", "files", "published", "difference")]
    for found in survey.parts:
        published = ["-" if number is None else str(number) for number in (found.part.speakers, found.part.files)]
        speakers = str(found.num_speakers) if found.part.use in ("train", "held out") else "-"
        rows.append(
            (
                found.part.name,
                found.part.use,
                speakers,
                published[0],
                str(len(found.paths)),
                published[1],
                found.difference,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = [f"{recipe.title}: {recipe.page}", "download:", *(f"  {line}" for line in recipe.download)]
    lines += ["layout:", *(f"  {line}" for line in recipe.layout), f"found in {survey.source}:"]
    lines += [f"  {line}" for line in table]
    if survey.others:
        lines.append(f"other audio files, which are left out: {survey.others}")
    return lines
