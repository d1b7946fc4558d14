"""What is registered: reading it, moving aliases, deleting."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cel_dist.description import DESCRIPTION_FILE, read_description
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation import evaluate
from cel_dist.evaluation.embed import Progress
from cel_dist.evaluation.trials import Trials
from cel_dist.model import SpeakerModel
from cel_dist.tracking.connection import mlflow_errors, redacted, resolve_uri
from cel_dist.tracking.registration import CHAMPION
from cel_dist.tracking.registry import (
    all_pages,
    fetch_model,
    looking_up,
    model_entry,
    stored_id,
    version_entries,
    version_entry,
    version_numbers,
)

_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/:@]+)(?:@(?P<alias>[^/:@]+)|/(?P<version>\d+))?$")
_AGAIN = "try again"


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: of the registered model.
        version: its number.
        aliases: that it holds, sorted.
        created: UTC, ISO 8601.
        run_id: of the MLflow run that it is from; None for a model that was registered by hand.
        model_id: of the stored model; None for what was not logged as one.
        tags: as `facts_as_tags` makes them; of models of others what they have.
        card: its description, in Markdown.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    created: str
    run_id: str | None
    model_id: str | None
    tags: Mapping[str, str]
    card: str

    @property
    def uri(self) -> str:
        """What every command takes as a MODEL."""
        return f"models:/{self.name}/{self.version}"

    def summary(self) -> dict[str, Any]:
        """All but the card, as JSON values."""
        values = {name: getattr(self, name) for name in ("name", "version", "created", "run_id", "model_id")}
        return {**values, "aliases": list(self.aliases), "uri": self.uri, "tags": dict(self.tags)}


@dataclass(frozen=True)
class Promotion:
    """What a promotion has done.

    Attributes:
        alias: that was asked for.
        version: the candidate.
        former: version that held the alias before; None for nobody.
        eer: of the candidate on the list, a fraction; None if nothing was measured.
        former_eer: of `former`.
    """

    alias: str
    version: int
    former: int | None
    eer: float | None = None
    former_eer: float | None = None


def list_versions(tracking_uri: str | None = None, name: str | None = None) -> list[Version]:
    """All versions of all registered models, or of one: models by name, newest versions first.

    Raises:
        CelError: the server does not answer, there is no such database, or no model of that name.
    """
    where = resolve_uri(tracking_uri)
    with looking_up(f"models:/{name}" if name else "models", where) as client:
        models = (
            [model_entry(client, name)]
            if name
            else all_pages(lambda token: client.search_registered_models(page_token=token))
        )
        found = [_version(client, entry, model) for model in models for entry in version_entries(client, model.name)]
    return sorted(found, key=lambda version: (version.name, -version.version))


def find_version(reference: str, tracking_uri: str | None = None) -> Version:
    """A version by `NAME@alias` or `NAME/3`, with or without `models:/`; by `NAME` the champion, else the newest.

    Raises:
        CelError: as `list_versions`, or there is no such version.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise CelError(f"'{reference}' names no registered model; write NAME, NAME@alias or NAME/3")
    name, alias, number = match["name"], match["alias"], match["version"]
    with looking_up(reference, resolve_uri(tracking_uri)) as client:
        model = model_entry(client, name)
        if not (alias or number):
            alias = CHAMPION if CHAMPION in model.aliases else None
            numbers = version_numbers(client, name)
            if not (alias or numbers):
                raise CelError(f"'{name}' has no version; register one with 'cel models register MODEL --name {name}'")
            number = str(numbers[-1]) if numbers else None
        return _version(client, version_entry(client, name, alias=alias, version=number), model)


def promote(
    name: str,
    version: int,
    alias: str = CHAMPION,
    tracking_uri: str | None = None,
    *,
    trials: Path | None = None,
    root: Path = Path(),
    progress: Progress | None = None,
) -> Promotion:
    """Give an alias to a version; with a list of trials, only if its EER there is lower than that of the holder.

    Args:
        name: of the registered model.
        version: the candidate.
        alias: that it is to hold.
        tracking_uri: server or database. Default: as `resolve_uri`.
        trials: list that both are measured on, if the alias is held by another version.
        root: folder to which its paths are relative.
        progress: told after each utterance.

    Raises:
        CelError: there is no such version, the registry takes no such alias, or the list or its audio cannot be used.
        RunError: the candidate is not better, or MLflow failed. Nothing is changed then.
    """
    _check_alias(alias)
    # Read although there may be nobody to compare with: a list that is not there is a mistake in any case.
    listed = None if trials is None else Trials.read(trials)
    where = resolve_uri(tracking_uri)
    with looking_up(f"models:/{name}/{version}", where) as client:
        former = _holder(client, name, alias)
        version_entry(client, name, version=str(version))
    measured: list[float] = []
    if listed is not None and former not in (None, version):
        for number in (version, former):
            folder = fetch_model(f"models:/{name}/{number}", tracking_uri)
            measured.append(evaluate(SpeakerModel.load_folder(folder), listed, root, progress=progress).eer)
        if not measured[0] < measured[1]:
            raise RunError(
                f"models:/{name}/{version} has an EER of {measured[0]:.2%} on {trials}, models:/{name}/{former} of "
                f"{measured[1]:.2%}: '{alias}' stays with version {former}; leave out --if-better-on to move it anyhow"
            )
    if former != version:
        with mlflow_errors(RunError, f"cannot promote models:/{name}/{version} at {redacted(where)}", _AGAIN):
            if _holder(client, name, alias) != former:
                raise RunError(f"somebody else moved '{alias}' meanwhile, nothing was changed")
            client.set_registered_model_alias(name, alias, str(version))
    eer, former_eer = measured or (None, None)
    return Promotion(alias, version, former, eer, former_eer)


def delete_version(name: str, version: int, tracking_uri: str | None = None, *, force: bool = False) -> list[int]:
    """Take a version out of the registry; the stored model stays, under its id, in the run that made it.

    Args:
        name: of the registered model. With its last version it is removed, too.
        version: to delete.
        tracking_uri: server or database. Default: as `resolve_uri`.
        force: delete it even if it holds an alias.

    Returns:
        The versions that are left.

    Raises:
        CelError: there is no such version, or it holds an alias.
        RunError: MLflow failed.
    """
    where = resolve_uri(tracking_uri)
    found = find_version(f"{name}/{version}", tracking_uri)
    if found.aliases and not force:
        raise CelError(
            f"{found.uri} is '{found.aliases[0]}', which others may use; promote another version first, or add --force"
        )
    with looking_up(found.uri, where) as client:
        pass
    with mlflow_errors(RunError, f"cannot delete {found.uri} at {redacted(where)}", _AGAIN):
        client.delete_model_version(name, str(version))
        left = version_numbers(client, name)
        if not left:
            client.delete_registered_model(name)
    return left


def stored_description(version: Version, tracking_uri: str | None = None) -> dict[str, Any] | None:
    """`model.json` of a version; None for a model that is not of this project, or whose files cannot be had."""
    with suppress(CelError, RunError):
        folder = fetch_model(version.uri, tracking_uri)
        return read_description(folder / DESCRIPTION_FILE).model_dump(mode="json")
    return None


def _check_alias(alias: str) -> None:
    # What MLflow refuses as well, but only when everything has been measured.
    if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"[vV]\d+|latest", alias, re.IGNORECASE):
        raise CelError(
            f"'{alias[:255]}' cannot be an alias; give one of letters, digits, '_' and '-', but neither 'latest' nor "
            "a number like 'v3'"
        )


def _holder(client: Any, name: str, alias: str) -> int | None:
    aliases = model_entry(client, name).aliases
    return int(aliases[alias]) if alias in aliases else None


def _version(client: Any, entry: Any, model: Any) -> Version:
    number = int(entry.version)
    return Version(
        name=entry.name,
        version=number,
        # A search leaves them out.
        aliases=tuple(sorted(alias for alias, held in model.aliases.items() if int(held) == number)),
        created=datetime.fromtimestamp(entry.creation_timestamp / 1000, timezone.utc).isoformat(timespec="seconds"),
        run_id=entry.run_id or None,
        model_id=stored_id(client, entry),
        tags=dict(entry.tags),
        card=entry.description or "",
    )
