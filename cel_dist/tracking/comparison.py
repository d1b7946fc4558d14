"""Two models beside each other."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cel_dist.config_file import flat
from cel_dist.data.files import sha256_of
from cel_dist.description import DESCRIPTION_FILE, read_description
from cel_dist.model import load_published
from cel_dist.model_folder import BACK_END_FILE, WEIGHTS_FILE, model_folder_of


@dataclass(frozen=True)
class Comparison:
    """What two models differ in.

    Attributes:
        differing: values of the first and the second under their dotted names in `model.json`; None where one of them
            has none.
        same_weights: whether the encoders have the same weights.
        same_back_end: whether mean and cohort of the back ends are the same; of two models without any they are.
    """

    differing: dict[str, tuple[Any, Any]]
    same_weights: bool
    same_back_end: bool


def compare_models(first: str, second: str, tracking_uri: str | None = None) -> Comparison:
    """Compare any two MODELs.

    Args:
        first: as for `load_model`.
        second: the other one.
        tracking_uri: where MLflow URIs are looked up. Default: as `cel_dist.tracking.resolve_uri`.

    Raises:
        CelError: one of them cannot be read.
    """
    (values, *digests), (others, *other_digests) = (_content(source, tracking_uri) for source in (first, second))
    paths = [*values, *(path for path in others if path not in values)]
    differing = {path: (values.get(path), others.get(path)) for path in paths if values.get(path) != others.get(path)}
    same_weights, same_back_end = (one == other for one, other in zip(digests, other_digests, strict=True))
    return Comparison(differing, same_weights, same_back_end)


def _content(source: str, tracking_uri: str | None) -> tuple[dict[str, Any], str | None, str | None]:
    """Values by name, and the digests of weights and back end."""
    with tempfile.TemporaryDirectory(prefix="cel-model-") as scratch:
        folder = model_folder_of(source, tracking_uri)
        if folder is None:
            folder = Path(scratch, "model")
            load_published(source, "cpu").save(folder)
        files = [folder / name for name in (WEIGHTS_FILE, BACK_END_FILE)]
        weights, back_end = (sha256_of(file) if file.is_file() else None for file in files)
        values = dict(flat(read_description(folder / DESCRIPTION_FILE).model_dump(mode="json")))
        return values, weights, back_end
