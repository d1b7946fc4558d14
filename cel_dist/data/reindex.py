"""A new index, and where there is none a manifest, for tars that lie in a folder."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from cel_dist.data.archive import ShardFaultError, entries, opened_tar
from cel_dist.data.audio import SAMPLE_RATE, AudioFormat
from cel_dist.data.files import sha256_of, sole_writer, writing_into
from cel_dist.data.index import INDEX_NAME, Index, ShardRows
from cel_dist.data.pool import run_jobs
from cel_dist.data.progress import Progress
from cel_dist.data.shards import MANIFEST_NAME, Manifest, ShardRecord, index_rows, shard_paths
from cel_dist.errors import CelError


def rebuild_index(folder: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> Manifest:
    """Write `index.npz` from the headers and JSON members of the tars; no audio is decoded.

    A folder without a manifest, such as of WebDataset tars from elsewhere, gets one. With a manifest, the tars must be
    the ones that it names.

    Args:
        folder: of tars with members `KEY.json`, which states `seconds`, and `KEY.wav` or `KEY.flac`.
        workers: processes; default: the cores that this process may use.
        progress: called with the number of shards done and in all.

    Returns:
        The manifest.

    Raises:
        CelError: there is no tar, or one is damaged or not the one that the manifest names.
        RunError: the disk is full, or another run is writing the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CelError(f"there is no folder {folder}; give one that holds shards")
    with writing_into(folder), sole_writer(folder, "cel check --index"):
        manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
        paths = shard_paths(folder) if manifest is None else [folder / record.name for record in manifest.shards]
        if not paths:
            raise CelError(f"there is no .tar in {folder}; give the folder that holds the shards")
        scanned: list[tuple[ShardRecord, ShardRows, AudioFormat]] = []
        with closing(run_jobs(_scan, paths, len(paths), workers)) as results:
            for done, result in enumerate(results, 1):
                scanned.append(result)
                if progress is not None:
                    progress(done, len(paths))
        records = tuple(record for record, _, _ in scanned)
        if manifest is not None:
            _require_same(folder, manifest, records)
        index = Index.from_shards([rows for _, rows, _ in scanned])
        index.save(folder)
        written = Manifest(
            seed=0 if manifest is None else manifest.seed,
            sample_rate=SAMPLE_RATE,
            audio_format=_one_format(folder, [audio_format for _, _, audio_format in scanned]),
            samples=len(index),
            seconds=int(index.samples.sum()) / SAMPLE_RATE,
            rejected=0 if manifest is None else manifest.rejected,
            index_sha256=sha256_of(folder / INDEX_NAME),
            shards=records,
        )
        written.save(folder)
    return written


def _scan(path: Path) -> tuple[ShardRecord, ShardRows, AudioFormat]:
    try:
        with opened_tar(path) as descriptor:
            found = list(entries(descriptor))
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise CelError(f"cannot read shard {path}: {str(error.strerror).lower()}; put it back") from None
    except ShardFaultError as fault:
        raise CelError(f"shard {path}: {fault}; replace it, or move it out of the folder") from None
    if not found:
        raise CelError(f"shard {path} holds no sample; move it out of the folder")
    rows = index_rows(found)
    record = ShardRecord(
        name=path.name, samples=len(found), bytes=size, seconds=int(rows.samples.sum()) / SAMPLE_RATE, sha256=sha256
    )
    return record, rows, _one_format(path, [entry.audio_format for entry in found])


def _one_format(where: Path, formats: Sequence[str]) -> AudioFormat:
    if len(set(formats)) > 1:
        raise CelError(f"{where} holds both WAV and FLAC; keep them in folders of their own")
    return "wav" if formats[0] == "wav" else "flac"


def _require_same(folder: Path, manifest: Manifest, found: Sequence[ShardRecord]) -> None:
    for stated, record in zip(manifest.shards, found, strict=True):
        if stated.sha256 != record.sha256:
            raise CelError(
                f"shard {folder / record.name} is not the one that the manifest names (its sha256 differs); put that "
                f"one back, or delete {MANIFEST_NAME} to take the tars as they are"
            )
