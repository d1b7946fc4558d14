"""What statistics of data mean for training, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cel_dist.data.statistics import Statistics

# Shares from which something is worth a line.
_MANY_CLIP, _MANY_QUIET, _MANY_OFFSET, _MANY_PADDED, _MANY_SHORT = 0.05, 0.1, 0.05, 0.05, 0.1
_MUCH_SILENCE, _MANY_TWICE, _MIXED_BAND, _MANY_FALSE = 0.4, 0.002, 0.05, 0.01
_FEW_BATCHES = 10


@dataclass(frozen=True)
class Advice:
    """Something to act on.

    Attributes:
        about: one of `unreadable`, `batch`, `short`, `false_negatives`, `duplicates`, `similar`, `clipping`, `quiet`,
            `silence`, `padding`, `bandwidth`, `offset`.
        found: what was found, with its number.
        remedy: what to do.
    """

    about: str
    found: str
    remedy: str


def advice_on(found: "Statistics") -> Iterator[Advice]:
    """What to do about a folder of shards, the gravest first."""
    yield from _on_batches(found)
    yield from _on_copies(found)
    yield from _on_audio(found)


def _on_batches(found: "Statistics") -> Iterator[Advice]:
    drawn = found.drawn
    if found.unreadable:
        yield Advice(
            "unreadable",
            f"{found.unreadable} of {found.sampled} measured utterances cannot be read",
            "run 'cel check' on the folder, which names every fault",
        )
    if drawn.batches_per_epoch < _FEW_BATCHES:
        if drawn.batches_per_epoch == 0:
            remedy = "lower train.batch_size, prepare more audio, or set data.short=overlap or repeat"
        else:
            remedy = "lower train.batch_size, so that the batches of an epoch differ more, or prepare more audio"
        yield Advice(
            "batch",
            f"batches of {drawn.batch_size} over {drawn.usable} utterances that are long enough: "
            f"{drawn.batches_per_epoch or 'no'} {'batch' if drawn.batches_per_epoch == 1 else 'batches'} an epoch",
            remedy,
        )
    if drawn.short_utterances > _MANY_SHORT * found.utterances:
        becomes = f"{drawn.dropped} are left out" if drawn.dropped else "none is left out"
        remedy = (
            "data.short=overlap or repeat keeps more of them, and a lower data.segment_frames makes them long enough"
        )
        if not drawn.dropped:
            remedy = "a lower data.segment_frames makes their segments differ more"
        yield Advice(
            "short",
            f"{drawn.short_utterances / found.utterances:.0%} of the utterances are shorter than the "
            f"{drawn.needed_seconds:.2f} s of their segments; {becomes} (data.short={drawn.short})",
            remedy,
        )
    if found.negatives is not None and found.negatives.pair_rate > _MANY_FALSE:
        yield Advice(
            "false_negatives",
            f"{found.negatives.pair_rate:.1%} of the pairs that are pushed apart are of one speaker, and "
            f"{found.negatives.anchor_rate:.0%} of the rows of a batch have such a pair",
            "prepare audio of more speakers; a smaller train.batch_size has fewer such pairs, not a smaller share",
        )


def _on_copies(found: "Statistics") -> Iterator[Advice]:
    duplicates, read = found.duplicates, max(found.sampled - found.unreadable, 1)
    without = "prepare again with a --list without them: copies are pushed apart as if they were of others"
    if duplicates.exact > _MANY_TWICE * read:
        yield Advice(
            "duplicates", f"{duplicates.exact} of {read} measured utterances repeat another one exactly", without
        )
    if duplicates.similar > _MANY_TWICE * read:
        yield Advice(
            "similar", f"{duplicates.similar} pairs of utterances sound the same", f"listen to some, and {without}"
        )


def _on_audio(found: "Statistics") -> Iterator[Advice]:
    levels = found.levels
    if levels is None:
        return
    if levels.clipped > _MANY_CLIP:
        yield Advice(
            "clipping",
            f"{levels.clipped:.0%} of the utterances clip",
            "prepare from recordings at a lower level if there are such; what is cut off cannot be put back",
        )
    if levels.quiet > _MANY_QUIET:
        yield Advice(
            "quiet",
            f"{levels.quiet:.0%} of the utterances are below -45 dB of full scale",
            "raise the level before 'cel prepare', from originals of more than 16 bit: the last bits are rounding",
        )
    if levels.silence_of_all > _MUCH_SILENCE:
        yield Advice(
            "silence",
            f"{levels.silence_of_all:.0%} of the audio is silence",
            "cut recordings where nobody speaks before 'cel prepare'; segments of silence teach nothing of a voice",
        )
    if levels.padded > _MANY_PADDED:
        yield Advice(
            "padding",
            f"{levels.padded:.0%} of the utterances begin or end with zeros for a tenth of their length or more",
            "remove what was padded before 'cel prepare'",
        )
    if _MIXED_BAND < levels.narrow < 1 - _MIXED_BAND:
        yield Advice(
            "bandwidth",
            f"{levels.narrow:.0%} of the utterances have nothing above 4 kHz, as from a telephone, the others have",
            "negatives can be told by their bandwidth: train on one kind, or pass all of it through 8 kHz beforehand",
        )
    elif levels.narrow >= 1 - _MIXED_BAND:
        yield Advice(
            "bandwidth",
            f"{levels.narrow:.0%} of the utterances have nothing above 4 kHz, as from a telephone",
            "use the model on telephone audio only, and validate on such",
        )
    if levels.offset > _MANY_OFFSET:
        yield Advice(
            "offset",
            f"{levels.offset:.0%} of the utterances have a DC offset of 1 % of full scale or more",
            "pass them through a high-pass filter before 'cel prepare'",
        )
