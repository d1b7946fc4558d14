"""The store of enrolled people: one SQLite file with names and embeddings, and no audio.

    meta         format version, fingerprint of the model, embedding size, a random id, a counter of changes
    recordings   a row an enrolled recording: name, unit embedding (float32 [D], little-endian), seconds

Embeddings of recordings are kept apart, so that a person can get more of them; durations are kept because calibrations
may ask for them. SQLite locks the file: several processes may read and write one store at a time, and what is
half-written is undone by whoever opens it next. What is removed is overwritten with zeros.
"""

import errno
import os
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError, RunError
from cel_dist.model import mean_embedding

_FORMAT = "1"
_APPLICATION_ID = 0x43454C53
"""What marks the file as a store of this project, in the header that SQLite has for that: CELS."""
_BUSY_SECONDS = 20.0
_MAX_NAME_CHARACTERS = 100
_WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR}


class StoreFaultError(CelError):
    """A file that is no store, is damaged, or is of another model."""


class OtherModelError(StoreFaultError):
    """A store whose embeddings are of another model."""


class NameFaultError(CelError):
    """A name that nobody can be enrolled under."""


class UnknownPersonError(CelError):
    """Nobody of this name is enrolled."""


class StoreFullError(CelError):
    """The store holds as many recordings as it may."""


@dataclass(frozen=True)
class Person:
    """Somebody who is enrolled: name, number of recordings, seconds of all of them."""

    name: str
    recordings: int
    seconds: float


@dataclass(frozen=True)
class Gallery:
    """All enrolled people, P of them, in the order of their names.

    Attributes:
        names: P of them.
        embeddings: float32 [P, D], of unit length: the mean of each person's recordings.
        seconds: float64 [P], of all recordings of a person.
        recordings: int64 [P], their number.
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]
    seconds: NDArray[np.float64]
    recordings: NDArray[np.int64]

    def place(self, name: str) -> int:
        """The row of a person.

        Raises:
            UnknownPersonError: nobody of this name is enrolled.
        """
        try:
            return self.names.index(name)
        except ValueError:
            raise UnknownPersonError(
                f"nobody called '{name}' is enrolled; enrol them first, or check the name"
            ) from None


def checked_name(name: str) -> str:
    """A name as it is stored: in one of the ways that Unicode has to write it.

    Raises:
        NameFaultError: it is empty or longer than 100 characters, begins or ends with a blank, or has a slash, a
            backslash or a character that cannot be shown; or it is `.` or `..`.
    """
    composed = unicodedata.normalize("NFC", name)
    if (
        not composed.isprintable()
        or composed != composed.strip()
        or set(composed) & {"/", "\\"}
        or composed in ("", ".", "..")
        or len(composed) > _MAX_NAME_CHARACTERS
    ):
        raise NameFaultError(
            f"{name[:_MAX_NAME_CHARACTERS]!r} is no name to enrol under; give 1 to {_MAX_NAME_CHARACTERS} characters "
            "that can be shown, no slash or backslash, and no blank at either end"
        )
    return composed


class SpeakerStore:
    """A store of embeddings of one model. Objects may be used by several threads.

    Args:
        path: the file.
        fingerprint: of the model, see `cel_dist.service.fingerprint`. None: any, for listing and removing.
        embedding_dim: of the model; needed to make a store.
        create: make the file where there is none; and let a store without recordings become one of this model.

    Raises:
        StoreFaultError: there is no such file, it is no store, or its embeddings are of another model.
        RunError: the file cannot be read or made.
    """

    def __init__(
        self, path: Path, fingerprint: str | None = None, embedding_dim: int = 0, *, create: bool = False
    ) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._dimension = embedding_dim
        self._cached: tuple[tuple[str, str], Gallery] | None = None
        self._lock = threading.Lock()
        if create and fingerprint is not None:
            self._create(fingerprint)
        self.check()

    def check(self) -> None:
        """Raise as the constructor does if the store is not usable any more."""
        with self._open():
            pass

    def add(
        self,
        name: str,
        embeddings: NDArray[np.float32],
        seconds: Sequence[float],
        max_recordings: int | None = None,
    ) -> Person:
        """Enrol somebody, or give somebody who is enrolled more recordings; all of these, or none.

        Args:
            name: of the person.
            embeddings: of unit length, [n, D].
            seconds: duration of each recording.
            max_recordings: that the store may hold in all.

        Raises:
            NameFaultError: see `checked_name`.
            StoreFullError: the store would hold more than `max_recordings`.
            StoreFaultError: embeddings of another size; or as the constructor.
            RunError: the store cannot be written.
        """
        name = checked_name(name)
        rows = np.ascontiguousarray(embeddings, dtype="<f4")
        with self._open(writing=True) as database:
            if rows.shape != (len(seconds), self._dimension) or not np.isfinite(rows).all():
                raise StoreFaultError(
                    f"embeddings of shape {list(rows.shape)} for {self.path}, which holds finite ones of size "
                    f"{self._dimension}; use the model it was made with"
                )
            (held,) = database.execute("SELECT count(*) FROM recordings").fetchone()
            if max_recordings is not None and held + len(rows) > max_recordings:
                raise StoreFullError(
                    f"the store holds {held} of at most {max_recordings} recordings; remove people, or raise the limit"
                )
            database.executemany(
                "INSERT INTO recordings (name, embedding, seconds) VALUES (?, ?, ?)",
                [(name, row.tobytes(), float(length)) for row, length in zip(rows, seconds, strict=True)],
            )
            _changed(database)
            query = "SELECT count(*), sum(seconds) FROM recordings WHERE name = ?"
            return Person(name, *database.execute(query, (name,)).fetchone())

    def remove(self, name: str) -> int:
        """Forget somebody; the number of recordings that were removed.

        Raises:
            UnknownPersonError: nobody of this name is enrolled.
            StoreFaultError: as the constructor.
            RunError: the store cannot be written.
        """
        # Half characters, which a command line may have, are none for SQLite; and nobody's name has a backslash.
        name = unicodedata.normalize("NFC", name).encode(errors="backslashreplace").decode()
        with self._open(writing=True) as database:
            removed = database.execute("DELETE FROM recordings WHERE name = ?", (name,)).rowcount
            if not removed:
                raise UnknownPersonError(f"nobody called '{name}' is enrolled; list the names first")
            _changed(database)
        return removed

    def people(self) -> list[Person]:
        """Who is enrolled, by name. Raises as the constructor."""
        query = "SELECT name, count(*), sum(seconds) FROM recordings GROUP BY name ORDER BY name"
        with self._open() as database:
            return [Person(*row) for row in database.execute(query)]

    def gallery(self) -> Gallery:
        """Everybody's embedding; read anew only if the store has changed. Raises as the constructor."""
        with self._lock, self._open() as database:
            meta = dict(database.execute("SELECT key, value FROM meta"))
            version = (meta["id"], meta["changes"])
            if self._cached is None or self._cached[0] != version:
                self._cached = (version, self._read_gallery(database))
            return self._cached[1]

    def _read_gallery(self, database: sqlite3.Connection) -> Gallery:
        held: dict[str, list[NDArray[np.float32]]] = {}
        seconds: dict[str, float] = {}
        for name, data, length in database.execute("SELECT name, embedding, seconds FROM recordings ORDER BY name, id"):
            row = np.frombuffer(data, "<f4")
            if row.shape != (self._dimension,):
                raise StoreFaultError(
                    f"{self.path} is damaged: an embedding of '{name}' has another size; enrol them anew"
                )
            held.setdefault(name, []).append(row)
            seconds[name] = seconds.get(name, 0.0) + length
        rows = [mean_embedding(np.stack(recordings)) for recordings in held.values()]
        return Gallery(
            tuple(held),
            np.stack(rows) if rows else np.empty((0, self._dimension), np.float32),
            np.array([seconds[name] for name in held], np.float64),
            np.array([len(recordings) for recordings in held.values()], np.int64),
        )

    def _create(self, fingerprint: str) -> None:
        """Make the file if there is none; a store without recordings becomes one of this model."""
        with self._translated():
            if self.path.exists() and self.path.stat().st_size:
                self._adopt_if_empty(fingerprint)
                return
            # Voices are personal data: nobody else may read the file.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            with self._connection() as database, _transaction(database, "IMMEDIATE"):
                # Another process may have made it meanwhile.
                if database.execute("PRAGMA schema_version").fetchone() != (0,):
                    return
                database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                database.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                database.execute(
                    "CREATE TABLE recordings (id INTEGER PRIMARY KEY, name TEXT NOT NULL, embedding BLOB NOT NULL, "
                    "seconds REAL NOT NULL)"
                )
                database.execute("CREATE INDEX recordings_name ON recordings (name)")
                meta = {
                    "format": _FORMAT,
                    "fingerprint": fingerprint,
                    "embedding_dim": str(self._dimension),
                    "id": secrets.token_hex(8),
                    "changes": "0",
                }
                database.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    def _adopt_if_empty(self, fingerprint: str) -> None:
        # An enrolment that fails on its first recording leaves an empty store, and so does the last removal: that is
        # no reason to refuse another model.
        dimension = self._dimension
        try:
            self.check()
        except OtherModelError:
            query = "SELECT NOT EXISTS (SELECT 1 FROM recordings)"
            with self._connection() as database, _transaction(database, "IMMEDIATE"):
                if database.execute(query).fetchone() == (1,):
                    meta = {"fingerprint": fingerprint, "embedding_dim": str(dimension), "id": secrets.token_hex(8)}
                    database.executemany(
                        "UPDATE meta SET value = ? WHERE key = ?", [(value, key) for key, value in meta.items()]
                    )

    @contextmanager
    def _open(self, *, writing: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection and a transaction that is committed when the block ends, and undone if it raises."""
        with self._translated():
            if self.path.is_dir():
                raise StoreFaultError(f"{self.path} is a folder; give a file")
            if not self.path.is_file():
                raise StoreFaultError(
                    f"there is no store {self.path}; make one with 'cel enrol NAME FILE --store {self.path}'"
                )
        kind = "IMMEDIATE" if writing else "DEFERRED"
        with self._translated(), self._connection() as database, _transaction(database, kind):
            self._require_own_format(database)
            yield database

    def _require_own_format(self, database: sqlite3.Connection) -> None:
        if database.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
            raise StoreFaultError(f"{self.path} is no store of enrolled people; give another file")
        meta = dict(database.execute("SELECT key, value FROM meta"))
        if meta["format"] != _FORMAT:
            raise StoreFaultError(
                f"{self.path} has format {meta['format']}, this cel_dist reads {_FORMAT}; update cel_dist"
            )
        self._dimension = int(meta["embedding_dim"])
        if self._fingerprint not in (None, meta["fingerprint"]):
            raise OtherModelError(
                f"the embeddings in {self.path} are of another model (fingerprint {meta['fingerprint'][:12]}, this "
                f"one has {str(self._fingerprint)[:12]}); give the model they were made with, or enrol into a new store"
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # As a URI: `rw` makes no file where there is none.
        uri = self.path.resolve().as_uri() + "?mode=rw"
        database = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            database.execute("PRAGMA secure_delete = ON")
            yield database
        finally:
            database.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Failures of SQLite and the system as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise RunError(
                f"cannot use the store {self.path}: {error}; check space, permissions, and whether another process "
                "holds it for long"
            ) from None
        except (sqlite3.DatabaseError, KeyError, ValueError) as error:
            raise StoreFaultError(
                f"{self.path} is no store of enrolled people, or damaged ({error}); give another"
            ) from None
        except OSError as error:
            fault: type[Exception] = StoreFaultError if error.errno in _WRONG_PATH else RunError
            raise fault(f"cannot open the store {self.path}: {error.strerror}; check the path") from None


@contextmanager
def _transaction(database: sqlite3.Connection, kind: str) -> Iterator[None]:
    database.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        # Some failures, a full disk among them, have undone it already.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _changed(database: sqlite3.Connection) -> None:
    database.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'changes'")
