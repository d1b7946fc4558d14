"""Embeddings of many files, each once, shared out over the ranks."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cel_dist.data.audio import header_seconds
from cel_dist.data.files import atomic_write
from cel_dist.data.sources import find_audio
from cel_dist.distributed import World
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation.batches import PieceBatches, Room
from cel_dist.evaluation.cutting import WHOLE, Cutting
from cel_dist.evaluation.side_by_side import SideBySide
from cel_dist.evaluation.trials import Trials
from cel_dist.features import SAMPLE_RATE
from cel_dist.model import SpeakerModel, mean_embedding
from cel_dist.utterance import Excerpt, name_of

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the utterances done and to do, both of this rank."""

# Utterances of a group, and groups of a list at least, so that ranks finish together.
_GROUP_FILES = 32
_MIN_GROUPS = 64
_HEADERS_AT_ONCE = 8


def embed_files(
    model: SpeakerModel,
    root: str | os.PathLike[str],
    files: Sequence[str | Excerpt],
    *,
    cutting: Cutting = WHOLE,
    world: World | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Unit embeddings of `files`, the same on every rank and the same for every number of ranks.

    Every utterance is embedded by one rank. They are dealt out in groups that depend on the list alone, the longest
    first, so that ranks finish together; pieces of a group that have equally many frames share a pass of the encoder.
    Threads take the groups of a rank, as many as torch has here: one decodes while others encode. Memory does not grow
    with the length of a file.

    With more than one rank the default process group must be running, and every rank must call this.

    Args:
        model: on this rank's device.
        root: folder to which `files` are relative.
        files: unique paths, or parts of files.
        cutting: whole utterances, segments or windows.
        world: this rank's place in the job. Default: one process.
        progress: told after each utterance.

    Returns:
        float32 [N, D], or [N, windows, D] for windows that are kept, in the order of `files`.

    Raises:
        CelError: files are missing (how many and the first), or one cannot be embedded. All
            ranks raise.
        RunError: the encoder's output is not finite, or another rank failed while running. All ranks raise.
    """
    world = world or World()
    excerpts = [Excerpt(file) if isinstance(file, str) else file for file in files]
    with raised_together(world):
        sizes = file_sizes(root, [excerpt.path for excerpt in excerpts])
    order = np.arange(len(excerpts))
    if world.is_main:
        order = np.argsort(-_lengths(root, excerpts, sizes), kind="stable")
    if world.size > 1:
        # Nodes may hold differently encoded copies; only one order must count.
        order = _from_main(order, model.device)
    groups = _groups(order)
    mine = _dealt(groups, world.rank, world.size)
    dimension = model.description.encoder.embedding_dim
    shape = (cutting.windows, dimension) if cutting.keeps_windows else (dimension,)
    # The first rank has most; equal shapes let one collective carry all of them.
    rows = np.zeros((len(_dealt(groups, 0, world.size)), *shape), np.float32)
    with raised_together(world):
        done = 0
        room = Room(cutting.batch_seconds)

        def embedded(group: NDArray[np.int64]) -> list[NDArray[np.float32]]:
            return _embed_group(model, [excerpts[index].below(root) for index in group], cutting, room)

        share = groups[world.rank :: world.size]
        with closing(SideBySide.plan(model.device, len(share)).map(embedded, share)) as found:
            for group in found:
                for embedding in group:
                    rows[done] = embedding
                    done += 1
                    if progress:
                        progress(done, len(mine))
    dealt = rows[None] if world.size == 1 else _from_all(rows, world, model.device)
    embeddings = np.empty((len(excerpts), *shape), np.float32)
    for rank in range(world.size):
        places = _dealt(groups, rank, world.size)
        embeddings[places] = dealt[rank, : len(places)]
    return embeddings


def embed_trials(
    model: SpeakerModel,
    root: str | os.PathLike[str],
    trials: Trials,
    *,
    cutting: Cutting = WHOLE,
    world: World | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Unit embeddings of the utterances of `trials`: what `embed_files` returns, row i for `trials.files[i]`.

    A model of several files, or parts of files, is the mean of their unit embeddings, again of unit length. Arguments,
    ranks and errors are those of `embed_files`.

    Raises:
        CelError: also if there are such models and windows are kept, whose scores have no mean over files.
    """
    recordings = trials.recordings
    several = [name for name, excerpts in zip(trials.files, recordings, strict=True) if len(excerpts) > 1]
    if several and cutting.keeps_windows:
        raise CelError(
            f"{len(several)} models are made of several files (first {several[0]}), and windows are scored one by one; "
            "score the mean of the windows with windows_as=embedding (--windows-as embedding), or whole utterances"
        )
    numbers: dict[Excerpt, int] = {}
    for excerpts in recordings:
        for excerpt in excerpts:
            numbers.setdefault(excerpt, len(numbers))
    rows = embed_files(model, root, list(numbers), cutting=cutting, world=world, progress=progress)
    embeddings = rows[[numbers[excerpts[0]] for excerpts in recordings]]
    for place, excerpts in enumerate(recordings):
        if len(excerpts) > 1:
            embeddings[place] = mean_embedding(rows[[numbers[excerpt] for excerpt in excerpts]])
    return embeddings


def write_embeddings(
    model: SpeakerModel,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> list[str]:
    """Embed audio files and all audio below folders, and write `names` [N] and `embeddings` float32 [N, D] as NPZ.

    Args:
        model: any model.
        paths: audio files and folders. Names are paths as given; for a folder, it joined with what lies below, sorted.
        out: the NPZ file, written in one step.
        progress: told after each utterance.

    Returns:
        The names, in the order of the rows.

    Raises:
        CelError: a path is missing, a folder holds no audio, a file cannot be embedded, or `out` is a folder.
        RunError: `out` cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise CelError(f"{out} is a folder; give the name of a file to write, such as {out / 'embeddings.npz'}")
    if not out.parent.is_dir():
        raise CelError(f"the folder {out.parent} for {out.name} does not exist; create it first")
    names = list(dict.fromkeys(name for path in paths for name in _audio_below(Path(path))))
    embeddings = embed_files(model, "", names, progress=progress)
    try:
        with atomic_write(out) as stream:
            np.savez(stream, names=np.array(names), embeddings=embeddings)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; check space and permissions") from error
    return names


@contextmanager
def raised_together(world: World) -> Iterator[None]:
    """Make a failure inside the block the failure of every rank, so that none waits for one that is gone.

    The block must not hold collectives. A rank that succeeded raises what the first failing rank raised: a CelError
    with its message, or a RunError that names the rank.
    """
    if world.size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = None if failure is None else (isinstance(failure, CelError), f"{failure}" or type(failure).__name__)
    outcomes: list[tuple[bool, str] | None] = [None] * world.size
    dist.all_gather_object(outcomes, told)
    if failure is not None:
        raise failure
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            is_input, message = outcome
            raise CelError(message) if is_input else RunError(f"rank {rank} failed: {message}", said_by=rank)


def file_sizes(root: str | os.PathLike[str], files: Sequence[str]) -> NDArray[np.int64]:
    """Bytes of each of `files` below `root`, int64 [N].

    Raises:
        CelError: files are missing; says how many, and the first.
    """
    sizes = np.zeros(len(files), np.int64)
    missing = []
    for index, name in enumerate(files):
        try:
            sizes[index] = Path(root, name).stat().st_size
        except OSError:
            missing.append(name)
    if missing:
        raise CelError(
            f"{len(missing)} of {len(files)} audio files are missing under {root}, the first is {missing[0]}; check "
            "the root folder and the list"
        )
    return sizes


def _lengths(
    root: str | os.PathLike[str], excerpts: Sequence[Excerpt], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What orders utterances by their length, float64 [N]: the bytes of files, as far as they are as long as they are
    large, else those that they would have as WAV. Only utterances that are neighbours in it can share a pass."""
    lengths = sizes.astype(np.float64)
    packed = [place for place, excerpt in enumerate(excerpts) if Path(excerpt.path).suffix.lower() != ".wav"]
    # On a remote file system a header takes as long as it takes to ask for it.
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        found = pool.map(lambda place: header_seconds(Path(root, excerpts[place].path)), packed)
        for place, seconds in zip(packed, found, strict=True):
            if seconds is not None:
                lengths[place] = 2 * SAMPLE_RATE * seconds
    return lengths


def _groups(order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Utterances that may share passes of the encoder: some of about the same size, of a long list only.

    They must not depend on the number of ranks: which utterances share a pass changes the last bits of an embedding.
    """
    number = min(_GROUP_FILES, max(1, len(order) // _MIN_GROUPS))
    return [order[first : first + number] for first in range(0, len(order), number)]


def _dealt(groups: list[NDArray[np.int64]], rank: int, num_ranks: int) -> NDArray[np.int64]:
    share = groups[rank::num_ranks]
    return np.concatenate(share) if share else np.zeros(0, np.int64)


def _embed_group(
    model: SpeakerModel, excerpts: list[Excerpt], cutting: Cutting, room: Room
) -> list[NDArray[np.float32]]:
    batches = PieceBatches(model, SideBySide.pass_seconds(model.device, cutting.batch_seconds), room)
    for number, excerpt in enumerate(excerpts):
        for piece in cutting.pieces(excerpt):
            batches.add(number, name_of(excerpt), piece)
    embedded = batches.take()
    return [cutting.joined(embedded[number]) for number in range(len(excerpts))]


def _audio_below(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    return [str(path / name) for name in find_audio(path)]


def _from_main(order: NDArray[np.int64], device: torch.device) -> NDArray[np.int64]:
    shared = torch.from_numpy(order).to(device)
    dist.broadcast(shared, src=0)
    result: NDArray[np.int64] = shared.cpu().numpy()
    return result


def _from_all(rows: NDArray[np.float32], world: World, device: torch.device) -> NDArray[np.float32]:
    mine = torch.from_numpy(rows).to(device)
    gathered = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered).cpu().numpy()
