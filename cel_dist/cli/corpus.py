"""`cel corpus`: corpora to work on."""

from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, corpus_app, emit
from cel_dist.cli.progress import progress_bar


@corpus_app.command("synth", epilog="Example: cel corpus synth --out corpus --speakers 100 --utterances 20 --seed 0")
def synth(
    out: Annotated[Path, typer.Option(help="Folder to make; reused if it holds the same corpus already.")],
    speakers: Annotated[int, typer.Option(help="Speakers in all; a fifth of them is held out.")] = 100,
    utterances: Annotated[int, typer.Option(help="Utterances of each speaker, over two sessions.")] = 20,
    seed: Annotated[int, typer.Option(help="The same numbers and seed give the same files.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="one a core")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the embedded corpus: synthetic speakers, trials, noises and rooms."""
    from cel_dist.corpus.synth import synthesise_corpus

    with progress_bar("synthesising") as progress:
        result = synthesise_corpus(
            out, speakers=speakers, utterances=utterances, seed=seed, workers=workers, progress=progress
        )
    emit(
        {
            "out": str(result.out),
            "speakers": result.speakers,
            "utterances": result.utterances,
            "seconds_audio": result.seconds_audio,
            "train_list": str(result.train_list),
            "validation_trials": str(result.validation_trials),
            "test_trials": str(result.test_trials),
            "root": str(result.root),
        },
        f"{'reused' if result.reused else 'made'} {result.out}: {result.speakers} speakers, "
        f"{result.utterances} utterances, {result.seconds_audio / 3600:.1f} hours\n"
        f"next: cel prepare {result.root} --list {result.train_list} --out {result.out.parent / 'shards'}",
        as_json=as_json,
    )
