"""The card of a model: what `model.json` says, for people."""

import json
from collections.abc import Iterator
from typing import Any

from cel_dist.config_file import flat, parse_config
from cel_dist.description import ModelDescription, Provenance

_SCORES = {
    "negative_euclidean": "minus the Euclidean distance of two unit embeddings, from -2 to 0",
    "cosine": "the cosine of two embeddings, from -1 to 1",
}
# They say where a run was, not what the model is.
_OF_THE_RUN = ("run.", "tracking.")


def model_card(description: ModelDescription, name: str) -> str:
    """What a model is, how it scores, where it comes from, what was measured and what to be careful of, in Markdown.

    Args:
        description: of the model.
        name: its heading.
    """
    return "\n".join(
        [
            f"# {name}",
            "",
            "A speaker encoder: speech at 16 kHz in, a unit embedding out. Made with cel_dist.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {what} | {value} |" for what, value in _facts(description).items()),
            "",
            "## Measured",
            "",
            *_measured(description),
            "",
            "## Be careful",
            "",
            "- Threshold and probabilities hold for recordings like those of the list that they are from. For others, "
            "fit them on a list of your own: `cel evaluate --calibrate DIR`.",
            "- An embedding identifies a person. Where the law protects biometric data, it protects embeddings.",
            *_settings(description.training),
            "",
        ]
    )


def shortened(card: str, limit: int) -> str:
    """The card in at most `limit` characters, cut at the end of a line, with a last line that says so.

    >>> shortened("one\\ntwo\\nthree\\n", 100)
    'one\\ntwo\\nthree\\n'
    """
    if len(card) <= limit:
        return card
    rest = "\n... (the whole card is model_card.md of the model)\n"
    return card[: card.rfind("\n", 0, limit - len(rest))] + rest


def facts_as_tags(description: ModelDescription) -> dict[str, str]:
    """What a list of models shows and a search looks for, as the tags of a version: `cel.encoder`, `cel.eer`, ..."""
    training = description.training
    values: dict[str, Any] = {
        "encoder": description.encoder.name,
        "embedding_dim": description.encoder.embedding_dim,
        "num_mels": description.features.num_mels,
        "scoring": description.scoring,
        "score_norm": description.back_end.score_norm if description.back_end else None,
        "threshold": description.threshold,
        "calibrated_on": description.calibration.trials if description.calibration else None,
        "step": training.step,
        "code": training.code,
        "trials": training.measured_on.trials if training.measured_on else None,
        **training.metrics,
        **{f"{name}_interval": f"{low} {high}" for name, (low, high) in training.intervals.items()},
        **{f"{name}_sha256": digest for name, digest in training.data_sha256.items()},
    }
    return {f"cel.{name}": str(value) for name, value in values.items() if value is not None}


def _facts(description: ModelDescription) -> dict[str, str]:
    encoder, features, training = description.encoder, description.features, description.training
    pooling = "" if encoder.pooling == "default" else f", pooling {encoder.pooling}"
    facts = {
        "encoder": f"{encoder.name}{pooling}, {encoder.embedding_dim} dimensions",
        "features": f"{features.num_mels} log-mel bands, {features.low_hz:g} to {features.high_hz:g} Hz, "
        f"{features.normalisation} norm",
        "score": _SCORES[description.scoring] + _back_end(description),
        "threshold": "none" if description.threshold is None else f"{description.threshold:.4f}",
        "calibration": "none",
        "from": training.source,
    }
    if calibration := description.calibration:
        by_duration = ", knows durations" if calibration.quality else ""
        facts["calibration"] = f"fitted on {calibration.trials or 'an unknown list'}{by_duration}"
    if training.step is not None:
        seen = "" if training.utterances is None else f", {training.utterances} utterances"
        epoch = "" if training.epoch is None else f", epoch {training.epoch:.1f}"
        facts["trained"] = f"{training.step} steps{epoch}{seen}"
    facts |= {f"data, {name}": f"sha256 {digest}" for name, digest in training.data_sha256.items()}
    facts["code"] = training.code or "unknown"
    if training.versions:
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in training.versions.items())
    return facts


def _back_end(description: ModelDescription) -> str:
    parts = description.back_end
    if parts is None:
        return ""
    mean = ["the mean of the cohort taken off"] if parts.mean_subtracted else []
    norm = [f"{parts.score_norm}-norm"] if parts.score_norm else []
    return f"; {', '.join([*mean, *norm])} (cohort {parts.cohort or 'unknown'})"


def _measured(description: ModelDescription) -> Iterator[str]:
    training = description.training
    if not training.metrics:
        yield "Nothing."
        return
    for name, value in training.metrics.items():
        scale, digits, unit = (100, 2, " %") if name == "eer" else (1, 4, "")
        low, high = training.intervals.get(name, (None, None))
        between = "" if low is None or high is None else f" ({scale * low:.{digits}f} to {scale * high:.{digits}f})"
        shown = {"eer": "EER", "min_dcf": "minDCF(0.05)"}.get(name, name)
        yield f"- {shown} {scale * value:.{digits}f}{unit}{between}"
    if (on := training.measured_on) is not None:
        intervals = (
            f" In brackets 95 % intervals over {on.speakers} speakers, drawn {on.replicates} times."
            if on.speakers
            else ""
        )
        yield ""
        yield f"{on.num_trials} trials of `{on.trials}` (sha256 {on.trials_sha256}).{intervals}"
    if description.back_end is not None:
        yield "These are of the embeddings as they are, without mean and norm of the cohort."
    yield "The list chose this model among those of its run; expect a little more on another one."


def _settings(training: Provenance) -> Iterator[str]:
    """The settings that are not the defaults."""
    if not training.config:
        return
    defaults = parse_config({"data": {"shards": "none", "bank": "none"}}, "defaults").model_dump(mode="json")
    # Without a bank there is no configuration with the default profile; that none is given is the default all the same.
    usual = {**dict(flat(defaults)), "data.bank": None}
    yield from ("", "## Settings", "", "All others are the defaults.", "")
    for path, value in flat(training.config):
        if not path.startswith(_OF_THE_RUN) and usual.get(path) != value:
            yield f"    {path}={value if isinstance(value, str) else json.dumps(value)}"
