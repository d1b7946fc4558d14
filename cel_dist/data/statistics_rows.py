"""What statistics of shards say, as rows of (what, how much), for a terminal and for the report."""

from cel_dist.data.statistics import Statistics

Row = tuple[str, str]


def rows_of(found: Statistics) -> list[Row]:
    """All of it but the histogram, the examples of duplicates and the advice."""
    low, _, median, _, high = found.duration_seconds
    copies = found.duplicates
    return [
        ("duration", f"median {median:.1f} s, 5 % below {low:.1f} s, 5 % above {high:.1f} s"),
        *_of_batches(found),
        *_of_audio(found),
        ("duplicates", f"{copies.exact} exact; {copies.similar} pairs that sound the same"),
    ]


def _of_batches(found: Statistics) -> list[Row]:
    drawn, negatives = found.drawn, found.negatives
    rows = [
        ("batches", f"{drawn.batches_per_epoch} of {drawn.batch_size} an epoch, from {drawn.usable} utterances"),
        (
            "short",
            f"{drawn.short_utterances} shorter than {drawn.needed_seconds:.2f} s (all segments), "
            f"{drawn.shorter_than_a_segment} than {drawn.segment_seconds:.2f} s (one); {drawn.dropped} left out "
            f"(data.short={drawn.short})",
        ),
    ]
    if negatives is None:
        return [*rows, ("false negatives", "not known; 'cel data stats' tells with --speakers N, or --use-labels")]
    return [
        *rows,
        (
            "false negatives",
            f"{negatives.pair_rate:.3%} of the pairs of a batch, {negatives.pairs_per_batch:.1f} pairs; "
            f"{negatives.anchor_rate:.1%} of the rows have one (from {negatives.source})",
        ),
    ]


def _of_audio(found: Statistics) -> list[Row]:
    levels = found.levels
    rows = [("measured", f"{found.sampled} utterances, {found.unreadable} of them unreadable")]
    if levels is None:
        return rows
    return [
        *rows,
        (
            "level",
            f"median {levels.rms_db[2]:.1f} dBFS ({levels.rms_db[0]:.1f} to {levels.rms_db[4]:.1f}), "
            f"peak {levels.peak_db[2]:.1f} dBFS; {levels.quiet:.1%} quiet",
        ),
        ("clipping", f"{levels.clipped:.1%} of the utterances"),
        ("silence", f"{levels.silence_of_all:.1%} of the audio"),
        ("padding", f"{levels.padding_of_all:.1%} of the audio, {levels.padded:.1%} of the utterances"),
        ("nothing over 4 kHz", f"{levels.narrow:.1%} of the utterances"),
        ("DC offset", f"{levels.offset:.1%} of the utterances"),
    ]
