"""The lists of a synthetic corpus: training lists, trials, manifest, speakers and a README."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from cel_dist.corpus import SAMPLE_RATE_HZ
from cel_dist.corpus.recording import Recording, Speaker
from cel_dist.corpus.trials import Utterance, count_target_pairs, draw_trials, write_trials
from cel_dist.corpus.voices import Voice

_MAX_TARGETS = 3_000

_README = """\
An artificial speech corpus, made by `cel corpus synth` with espeak-ng. Nobody real speaks here.

speech/SPEAKER/SESSION/*.flac  16 kHz mono 16-bit; every session has a channel of its own: equaliser, room, noise
train.txt                      training utterances without labels; paths are relative to speech/
train_labelled.txt             the same with `path speaker`
validation_trials.txt          `label enrol test` over the validation speakers: for choosing a model
test_trials.txt                `label enrol test` over the test speakers: for the final figure only
manifest.tsv                   path, speaker, session, split and seconds of every utterance
speakers.tsv                   split and voice parameters of every speaker
bank/noise/noise               synthetic noises
bank/noise/speech              single voices and babble, from speakers who are in none of the splits
bank/noise/music               synthetic music
bank/rir                       simulated room impulse responses, T60 0.15 to 1.0 s
corpus.json                    the parameters it was made with; `cel corpus synth` makes the same again from them

The splits share no speaker. The two utterances of a trial are always from different sessions.
"""


def write_lists(folder: Path, speakers: Sequence[Speaker], recordings: Sequence[Recording], *, seed: int) -> None:
    """Write all text files of a corpus but its marker.

    The numbers of target and non-target trials are equal: as many as there are target pairs, at most 3 000 each.
    """
    train = [recording for recording in recordings if recording.split == "train"]
    _write(folder / "train.txt", (recording.path for recording in train))
    _write(folder / "train_labelled.txt", (f"{recording.path} {recording.speaker}" for recording in train))
    for split in ("validation", "test"):
        utterances = [Utterance(r.path, r.speaker, r.session) for r in recordings if r.split == split]
        count = min(count_target_pairs(utterances), _MAX_TARGETS)
        trials = draw_trials(utterances, num_target=count, num_nontarget=count, seed=seed)
        write_trials(folder / f"{split}_trials.txt", trials)
    _write_table(
        folder / "manifest.tsv",
        ["path", "speaker", "session", "split", "seconds"],
        ([r.path, r.speaker, r.session, r.split, f"{r.num_samples / SAMPLE_RATE_HZ:.3f}"] for r in recordings),
    )
    _write_table(
        folder / "speakers.tsv",
        ["speaker", "split", *(field.name for field in fields(Voice))],
        ([speaker.name, speaker.split, *map(str, asdict(speaker.voice).values())] for speaker in speakers),
    )
    (folder / "README.txt").write_text(_README, encoding="utf-8")


def _write_table(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    _write(path, ("\t".join(row) for row in itertools.chain([header], rows)))


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
