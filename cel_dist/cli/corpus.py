"""`cel corpus`: corpora to work on."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cel_dist.cli.app import JsonOption, corpus_app, emit
from cel_dist.cli.progress import progress_bar
from cel_dist.errors import CelError


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


@corpus_app.command(
    "download",
    epilog="Examples: cel corpus download --list; cel corpus download librispeech:train-clean-100 --out corpora; "
    "cel corpus download librispeech:dev-clean --out corpora --mirror https://us.openslr.org/resources/12",
)
def download(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A corpus, or a part of one; see --list.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write into; several corpora may share it. An interrupted download goes on where it stopped."
        ),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Print the names, sizes and what to do next.")] = False,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Folder that has the archive under its published name: a mirror, a proxy, or "
            "file:///PATH for what was copied by hand. The checksum must be the published one all the same.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the archive with the checksum that torchaudio has.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Download a public corpus that needs no account, check it, and unpack it.

    The archive is removed when it is unpacked; for that time, both take space.
    """
    from cel_dist.corpus.catalogue import CORPORA, find_corpus

    if show_list or name is None:
        rows = [
            {
                "name": corpus.name,
                "megabytes": corpus.megabytes,
                "title": corpus.title,
                "page": corpus.page,
                "next": corpus.next_command.format(out="DIR"),
            }
            for corpus in CORPORA.values()
        ]
        text = [
            f"{row['name']:<28}{_size(int(str(row['megabytes']))):>8}  {row['title']}\n{'':38}next: {row['next']}"
            for row in rows
        ]
        text.append("next: cel corpus download NAME --out DIR")
        emit({"corpora": rows}, "\n".join(text), as_json=as_json)
        return
    corpus = find_corpus(name)
    if out is None:
        raise CelError(
            f"there is nowhere to write to; give --out FOLDER, with about {_size(2 * corpus.megabytes)} free"
        )
    from cel_dist.corpus.download import download_corpus

    with progress_bar("downloading (MB)") as progress:
        result = download_corpus(corpus, out, mirror=mirror, verify=verify, progress=progress)
    following = corpus.next_command.format(out=shlex.quote(str(out)))
    what = ", ".join(map(str, result.files)) or f"{result.path}: {result.utterances} utterances"
    emit(
        {
            "name": corpus.name,
            "path": str(result.path),
            "files": [str(path) for path in result.files],
            "utterances": result.utterances,
            "reused": result.reused,
            "next": following,
        },
        f"{'already there' if result.reused else 'downloaded'}: {what}\nterms of use: {corpus.page}\nnext: {following}",
        as_json=as_json,
    )


SeedOption = Annotated[int, typer.Option(min=0, help="The same files and seed give the same lists.")]
LabelsOption = Annotated[
    Path | None,
    typer.Option(help="Lines 'path speaker', paths relative to ROOT; default: ROOT/SPEAKER/[SESSION/]... names them."),
]
RootArgument = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of recordings, SPEAKER/... below it.")]


@corpus_app.command(
    "split",
    epilog="Examples: cel corpus split recordings --out lists; cel corpus split labelled --out lists --no-training",
)
def split(
    root: RootArgument,
    out: Annotated[Path, typer.Option(help="Folder for train.txt, validation_trials.txt and test_trials.txt.")],
    training: Annotated[
        bool,
        typer.Option(
            "--training/--no-training",
            help="Without: all speakers are held out, half for validation and half for the test.",
        ),
    ] = True,
    seed: SeedOption = 0,
    labels: LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Divide own recordings by speakers: a list to train on, and trials of speakers who are not in it.

    Of the speakers with two recordings or more, 8 % are for validation, which chooses the model, and 16 % for the test,
    which reports on it; at least two each.
    """
    from cel_dist.corpus.split import Split, hold_out_all, split_by_speaker

    made = (split_by_speaker if training else hold_out_all)(root, out, seed, labels)
    place, shards = shlex.quote(str(root)), "SHARDS"
    summary: dict[str, Any] = {}
    text, following = [], []
    if isinstance(made, Split):
        summary = {"train_list": str(made.train_list), "train_files": _lines(made.train_list)}
        text.append(f"{made.train_list}: {summary['train_files']} files")
        shards = "shards"
        following.append(f"cel prepare {place} --list {shlex.quote(str(made.train_list))} --out {shards}")
    for name, path in (("validation_trials", made.validation_trials), ("test_trials", made.test_trials)):
        summary |= {name: str(path), f"num_{name}": _lines(path)}
        text.append(f"{path}: {_lines(path)} trials")
    validation, test = (shlex.quote(str(path)) for path in (made.validation_trials, made.test_trials))
    following += [
        f"cel train CONFIG data.shards={shards} eval.trials={validation} eval.root={place}",
        f"cel evaluate --model RUN --trials {test} --root {place}",
    ]
    lines = "\n".join([*text, *(f"next: {line}" for line in following)])
    emit({**summary, "next": following}, lines, as_json=as_json)


@corpus_app.command("trials", epilog="Example: cel corpus trials LibriSpeech/test-clean --out trials.txt --seed 1")
def trials(
    root: RootArgument,
    out: Annotated[Path, typer.Option(help="File to write: a line 'label enrol test' for each trial.")],
    targets: Annotated[
        int | None, typer.Option(min=1, help="Trials of one speaker.", show_default="all there are, up to 2000")
    ] = None,
    nontargets: Annotated[
        int | None, typer.Option(min=1, help="Trials of two speakers.", show_default="all there are, up to 2000")
    ] = None,
    seed: SeedOption = 0,
    labels: LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw verification trials from all recordings of a folder: none of them should be in the training data.

    The two recordings of a target trial are of different sessions if every speaker has two of them.
    """
    from cel_dist.corpus.split import trials_of_tree

    drawn = trials_of_tree(root, out, num_target=targets, num_nontarget=nontargets, seed=seed, labels=labels)
    following = f"cel evaluate --model MODEL --trials {shlex.quote(str(out))} --root {shlex.quote(str(root))}"
    emit(
        {"trials": str(out), "targets": drawn[1], "nontargets": drawn[0], "next": following},
        f"{out}: {drawn[1]} target and {drawn[0]} non-target trials\nnext: {following}",
        as_json=as_json,
    )


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _size(megabytes: int) -> str:
    return f"{megabytes / 1000:.3g} GB" if megabytes >= 1000 else f"{megabytes} MB"
