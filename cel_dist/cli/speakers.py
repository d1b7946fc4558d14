"""`cel enrol`, `cel identify`, `cel speakers`: people whose embeddings are in a store."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit, speakers_app
from cel_dist.cli.evaluate import NO_THRESHOLD, ModelOption
from cel_dist.cli.progress import progress_bar

StoreOption = Annotated[Path, typer.Option(help="Store of enrolled people: one file with names and embeddings.")]


@app.command(epilog="Example: cel enrol Ann ann1.wav ann2.wav --store people.db --model models:/cel@champion")
def enrol(
    name: Annotated[str, typer.Argument(help="Who speaks.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Audio of this person.")],
    store: StoreOption,
    model: ModelOption,
    as_json: JsonOption = False,
) -> None:
    """Enrol a person from one or more recordings; somebody who is enrolled gets more of them.

    The store keeps names, embeddings and durations, no audio. It is made where there is none, and belongs to one model.
    """
    from cel_dist.model import load_model
    from cel_dist.service.speakers import Speakers
    from cel_dist.service.store import checked_name

    # Before the model is loaded, which takes a while.
    checked_name(name)
    speakers = Speakers(load_model(model), store, create=True)
    with progress_bar("Enrolling") as progress:
        person = speakers.enrol(name, files, progress=progress)
    emit(
        {**asdict(person), "store": str(store)},
        f"{person.name}: {_recordings(person.recordings)}, {person.seconds:.1f} s, in {store}",
        as_json=as_json,
    )


@app.command(epilog="Example: cel identify unknown.wav --store people.db --model models:/cel@champion")
def identify(
    file: Annotated[Path, typer.Argument(help="Audio of the speaker in question.")],
    store: StoreOption,
    model: ModelOption,
    top: Annotated[int, typer.Option(help="Most similar people to show; 1 or more.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Tell who of those enrolled is speaking, if anybody: the most similar ones, and if they reach the threshold."""
    from cel_dist.model import load_model
    from cel_dist.service.speakers import Speakers

    result = Speakers(load_model(model), store).identify(file, top)
    lines = []
    for candidate in result.candidates:
        line = f"{candidate.name}: score {candidate.score:.4f}"
        if candidate.probability is not None:
            line += f", probability of the same speaker {candidate.probability:.1%}"
        lines.append(line)
    if not result.candidates:
        lines = ["nobody is enrolled"]
    elif result.candidates[0].same is None:
        lines.append(NO_THRESHOLD)
    else:
        lines.append(f"identified: {'nobody' if result.identified is None else result.identified}")
    emit(asdict(result), "\n".join(lines), as_json=as_json)


@speakers_app.command("list", epilog="Example: cel speakers list --store people.db")
def list_speakers(store: StoreOption, as_json: JsonOption = False) -> None:
    """List who is enrolled."""
    from cel_dist.service.store import SpeakerStore

    people = SpeakerStore(store).people()
    lines = [f"{person.name}: {_recordings(person.recordings)}, {person.seconds:.1f} s" for person in people]
    emit(
        {"store": str(store), "speakers": [asdict(person) for person in people]},
        "\n".join(lines or ["nobody is enrolled"]),
        as_json=as_json,
    )


@speakers_app.command("remove", epilog="Example: cel speakers remove Ann --store people.db")
def remove_speaker(
    name: Annotated[str, typer.Argument(help="Who is to be forgotten.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Remove a person and all their embeddings, which are overwritten in the file."""
    from cel_dist.service.store import SpeakerStore

    removed = SpeakerStore(store).remove(name)
    emit({"name": name, "removed": removed}, f"removed {name}: {_recordings(removed)}", as_json=as_json)


def _recordings(number: int) -> str:
    return f"{number} recording{'s' * (number != 1)}"
