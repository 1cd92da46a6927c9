"""The store's book: which images, layers and trees there are.

SQLite in WAL mode; a commit is on disk when it returns, but for a connection that was opened to write `lazily`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from flatmount.errors import StoreError
from flatmount.store.reserve import Reserve

_BUSY_S: Final = 60.0
_LOG_BYTES: Final = 4 << 20  # what a log that has grown longer is cut to
_FREE_SPACE: Final = "free space or inodes on its file system and try again"
_NOTHING_CHANGED: Final = f"{_FREE_SPACE}; nothing was changed"
# For how long the log's other users are waited for when it must be emptied.
_EMPTY_BUSY_MS: Final = 1000

# One script for each version. A number names a tree for ever: `numbers` only counts up, so that a path that
# somebody remembers never means another tree. `parent_chain` is set for a layer whose tree depends on what
# lies beneath it.
_MIGRATIONS: Final = (
    """
    CREATE TABLE numbers (last INTEGER NOT NULL);
    INSERT INTO numbers VALUES (0);
    CREATE TABLE layers (
        number INTEGER PRIMARY KEY,
        diff_id TEXT NOT NULL,
        parent_chain TEXT,
        entries INTEGER NOT NULL,
        files INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        dropped_xattrs INTEGER NOT NULL,
        owners TEXT NOT NULL,
        root TEXT
    );
    CREATE UNIQUE INDEX layers_by_content ON layers (diff_id, ifnull(parent_chain, 'any'));
    CREATE TABLE documents (digest TEXT PRIMARY KEY, content BLOB NOT NULL);
    CREATE TABLE images (
        digest TEXT PRIMARY KEY REFERENCES documents (digest),
        config_digest TEXT NOT NULL REFERENCES documents (digest),
        chain_id TEXT NOT NULL,
        imported_ns INTEGER NOT NULL
    );
    CREATE INDEX images_by_chain ON images (chain_id);
    CREATE TABLE image_layers (
        image TEXT NOT NULL REFERENCES images (digest) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        layer INTEGER NOT NULL REFERENCES layers (number),
        PRIMARY KEY (image, position)
    ) WITHOUT ROWID;
    CREATE INDEX image_layers_by_layer ON image_layers (layer);
    CREATE TABLE names (
        name TEXT PRIMARY KEY,
        image TEXT NOT NULL REFERENCES images (digest) ON DELETE CASCADE
    );
    CREATE INDEX names_by_image ON names (image);
    CREATE TABLE flats (
        number INTEGER PRIMARY KEY,
        chain_id TEXT NOT NULL UNIQUE,
        directories INTEGER NOT NULL,
        links INTEGER NOT NULL,
        copies INTEGER NOT NULL
    );
    CREATE TABLE shifted (
        number INTEGER PRIMARY KEY,
        chain_id TEXT NOT NULL,
        mapping TEXT NOT NULL,
        UNIQUE (chain_id, mapping)
    );
    CREATE TABLE leases (
        holder TEXT NOT NULL,
        image TEXT NOT NULL REFERENCES images (digest),
        since_ns INTEGER NOT NULL,
        PRIMARY KEY (holder, image)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE ranges (
        holder TEXT NOT NULL,
        first INTEGER NOT NULL,
        size INTEGER NOT NULL,
        PRIMARY KEY (first, size)
    ) WITHOUT ROWID;
    CREATE INDEX ranges_by_holder ON ranges (holder);
    """,
    # The snapshot service's; see flatmount.snapshotter.book.
    """
    CREATE TABLE snapshots (
        number INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        kind INTEGER NOT NULL,
        parent INTEGER REFERENCES snapshots (number),
        created_ns INTEGER NOT NULL,
        updated_ns INTEGER NOT NULL,
        labels TEXT NOT NULL,
        reference TEXT,
        uid_map TEXT,
        gid_map TEXT,
        form TEXT NOT NULL,
        host_ids INTEGER NOT NULL,
        remapped INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL DEFAULT 0,
        inodes INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX snapshots_by_parent ON snapshots (parent);
    CREATE INDEX snapshots_by_reference ON snapshots (reference) WHERE reference IS NOT NULL;
    """,
    # Registries that images were pulled from.
    """
    CREATE TABLE origins (
        image TEXT NOT NULL REFERENCES images (digest) ON DELETE CASCADE,
        reference TEXT NOT NULL,
        seen_ns INTEGER NOT NULL,
        PRIMARY KEY (image, reference)
    ) WITHOUT ROWID;
    """,
    # The second form of flat trees, and roots for layers that have none of their own; see flatmount.store.trees.
    """
    CREATE TABLE erofs (
        number INTEGER PRIMARY KEY,
        chain_id TEXT NOT NULL UNIQUE,
        directories INTEGER NOT NULL,
        inodes INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        digest TEXT NOT NULL,
        preferred INTEGER NOT NULL
    );
    CREATE TABLE roots (
        number INTEGER PRIMARY KEY,
        chain_id TEXT NOT NULL UNIQUE
    );
    """,
)
SCHEMA: Final = len(_MIGRATIONS)
# How a connection is to behave.
_AT_ONCE: Final = ("PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON")
LAZILY: Final = (
    f"PRAGMA busy_timeout = {_BUSY_S * 1000:.0f}",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA wal_autocheckpoint = 0",
    f"PRAGMA journal_size_limit = {_LOG_BYTES}",
)
# The trees, by the directory that they are in.
_TABLES: Final = {"layers": "layers", "flat": "flats", "shifted": "shifted", "erofs": "erofs", "roots": "roots"}


class Database:
    """One connection, for any number of threads one after the other."""

    def __init__(self, path: str, *, reserve: Reserve | None = None, lazily: bool = False) -> None:
        """Open the book at `path`. On a full disk it gives `reserve` back, and without one can only be read.

        Written `lazily`, a commit survives the end of every process, and a loss of power only after `sync`; what is
        lost then is the latest commits, whole ones. Such a connection leaves checkpoints to whoever syncs.
        """
        self.path = path
        self._lazily = lazily
        self._lock = threading.RLock()
        self._reserve = reserve
        self._reserve_taken = False
        self._only_read: str | None = None
        # A descriptor of the log, which is told of every write that fails from now on, and its inode; whether one may
        # have failed that the log still needs.
        self._log_fd, self._log_inode = -1, 0
        self._in_doubt = False
        self.schema = SCHEMA
        try:
            self._connection = self._open_book()
            found = self._version()
            if found > SCHEMA:
                self.schema = found
                self._connection.close()
                self._connection = self._connect_reading()
            elif found < SCHEMA:
                self._migrate()
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be opened: {error}", hint="is it the state of a store?") from error
        self._keep_reserve()

    @classmethod
    def create(cls, path: str, *, reserve: Reserve | None = None) -> Database:
        """Make the file, readable for its owner only, where there is none, and open it."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return cls(path, reserve=reserve)

    def close(self) -> None:
        """Close the connection, and set the reserve aside again that was given back."""
        with self._lock:
            self._connection.close()
            self._close_log()
        if self._reserve is not None and self._reserve_taken:
            self._reserve.keep(again=True)
        else:
            self._keep_reserve()

    @property
    def newer(self) -> bool:
        """Whether a newer flatmount wrote this store, which is then read and never written."""
        return self.schema > SCHEMA

    @property
    def writable(self) -> bool:
        """Whether it can be written: it is not a newer one, and its disk is not so full that it can only be read."""
        return not self.newer and self._only_read is None

    @contextmanager
    def transaction(self, *, growing: bool = False) -> Iterator[sqlite3.Connection]:
        """Write: all of it, on disk when the block is left, or nothing. Raises: StoreError.

        On a disk as good as full the reserve is given back first; not for what is `growing`, which would only eat it.
        """
        self._check_writable(growing)
        with self._lock, self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def write(
        self, statements: Sequence[str], rows: Sequence[Sequence[Sequence[str | int | None]]], *, growing: bool = False
    ) -> None:
        """Run each of the statements for each of its rows: all of them as one transaction, like `transaction`."""
        with self.transaction(growing=growing) as db:
            for statement, each in zip(statements, rows, strict=True):
                db.executemany(statement, each)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read one state of the store, whatever others commit meanwhile. Raises: StoreError."""
        with self._lock, self._told():
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.execute("ROLLBACK")

    def sync(self) -> None:
        """Every commit until now, of any connection, is on disk when this returns. Raises: StoreError.

        The kernel tells of a write that failed once only. From then on, until that has succeeded, everything in the log
        is moved into the book and the log emptied.
        """
        with self._lock:
            if self._in_doubt:
                self._empty_log()
                return
            try:
                if self._open_log():
                    os.fdatasync(self._log_fd)
            except OSError as error:
                self._in_doubt = True
                raise self._not_on_disk(str(error)) from error

    def log_bytes(self) -> int:
        """How long the log is that `sync` has seen, which is cut when it is begun anew."""
        try:
            return os.fstat(self._log_fd).st_size if self._log_fd >= 0 else 0
        except OSError:
            return 0

    def _open_log(self) -> bool:
        """Have a descriptor of the log that is there now, which the last one to close the book takes away."""
        # Of all files of a database this is the only one that may be opened beside SQLite: no lock is on it, which
        # closing a second descriptor would let go of.
        try:
            if os.stat(f"{self.path}-wal").st_ino == self._log_inode:
                return True
            self._close_log()
            self._log_fd = os.open(f"{self.path}-wal", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._log_inode = os.fstat(self._log_fd).st_ino
        return True

    def _close_log(self) -> None:
        if self._log_fd >= 0:
            os.close(self._log_fd)
        self._log_fd, self._log_inode = -1, 0

    def _empty_log(self) -> None:
        # What stands behind a frame that is lost would be lost with it, and what stands before it would be taken for
        # the latest: so nothing of this log may be left.
        try:
            self._connection.execute(f"PRAGMA busy_timeout = {_EMPTY_BUSY_MS}")
            try:
                (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_S * 1000)}")
            if busy:
                raise self._not_on_disk("another process reads it")
            if self._open_log():
                os.fsync(self._log_fd)
        except (sqlite3.Error, OSError) as error:
            raise self._not_on_disk(str(error)) from error
        self._in_doubt = False

    def _not_on_disk(self, reason: str) -> StoreError:
        return StoreError(
            f"write {self.path} to disk: {reason}",
            hint="see the kernel's log; a loss of power may undo what was changed last",
        )

    def checkpoint(self) -> bool:
        """Move what was committed from the log into the book, as far as nobody has to wait. Raises: StoreError.

        Returns whether that was all, and is on disk: the log is begun anew by the next commit then.
        """
        with self._lock, self._told(_FREE_SPACE):
            try:
                busy, logged, moved = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error:
                self._in_doubt = True
                raise
        return not busy and logged == moved

    def next_numbers(self, count: int) -> range:
        """Numbers that no tree of this store has had or will have."""
        with self.transaction(growing=True) as db:
            (last,) = db.execute("UPDATE numbers SET last = last + ? RETURNING last", (count,)).fetchone()
        return range(int(last) - count + 1, int(last) + 1)

    def known_trees(self) -> dict[str, set[int]]:
        """The numbers of all trees, by the directory that they are in."""
        with self.reading() as db:
            return {
                kind: {row[0] for row in db.execute(f"SELECT number FROM {table}")} for kind, table in _TABLES.items()
            }

    def unbooked(self, kind: str, numbers: Iterable[int]) -> tuple[int, ...]:
        """Those of `numbers` that the book has no tree of: what an undoing may delete.

        An interrupt can come when a commit is done and before anybody knows of it. Where the book cannot be asked, none
        of them: the next sweep takes what it does not know.
        """
        try:
            known = self.known_trees()[kind]
        except StoreError:
            return ()
        return tuple(number for number in numbers if number not in known)

    def _check_writable(self, growing: bool) -> None:
        if self.newer:
            raise StoreError(
                f"the store was written by a newer flatmount (schema {self.schema}, this one knows {SCHEMA})",
                hint="it can be read but not changed; use the newer flatmount",
            )
        if self._only_read is not None:
            raise StoreError(f"{self.path} can only be read: {self._only_read}", hint=_NOTHING_CHANGED)
        if not growing:
            self._give_reserve_if_low()

    @contextmanager
    def _told(self, room: str = _NOTHING_CHANGED) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = room if _wants_room(error) else "another process may hold it"
            raise StoreError(f"{self.path}: {error}", hint=hint) from error

    def _open_book(self) -> sqlite3.Connection:
        if not os.access(self.path, os.W_OK):
            return self._connect_reading()
        self._give_reserve_if_low()
        try:
            return self._connect("mode=rw")
        except sqlite3.OperationalError as error:
            if not _wants_room(error):
                raise
            if self.release_reserve():
                with suppress(sqlite3.OperationalError):
                    return self._connect("mode=rw")
            connection = self._connect_reading()
            self._only_read = str(error)
            return connection

    def release_reserve(self) -> bool:
        """Give the reserve back, until `close`; whether there was any. For who was refused room."""
        released = self._reserve is not None and self._reserve.release()
        self._reserve_taken |= released
        return released

    def _give_reserve_if_low(self) -> None:
        if self._reserve is not None and self._reserve.release_if_low():
            self._reserve_taken = True

    def _keep_reserve(self) -> None:
        if self._reserve is not None and self.writable and os.access(self.path, os.W_OK):
            self._reserve.keep()

    def _connect_reading(self) -> sqlite3.Connection:
        try:
            return self._connect("mode=ro")
        except sqlite3.OperationalError:
            # A read-only or a full file system: readers of a WAL database want to make its -shm file, unless they are
            # told that nobody writes. Without anything in a -wal file everything is in the database itself.
            if self._log_bytes():
                raise
            return self._connect("mode=ro&immutable=1")

    def _connect(self, how: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{_quoted(self.path)}?{how}",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            if how == "mode=rw":
                connection.execute("PRAGMA journal_mode = WAL")
            for statement in LAZILY if self._lazily else _AT_ONCE:
                connection.execute(statement)
            connection.execute("PRAGMA user_version")
        except BaseException:
            connection.close()
            raise
        return connection

    def _log_bytes(self) -> int:
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0

    def _version(self) -> int:
        row: tuple[Any] = self._connection.execute("PRAGMA user_version").fetchone()
        return int(row[0])

    def _migrate(self) -> None:
        with self.transaction() as db:
            for version in range(self._version(), SCHEMA):
                for statement in filter(str.strip, _MIGRATIONS[version].split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")


def is_booked(db: sqlite3.Connection, tree: str) -> bool:
    """Whether the book has a tree, named as KIND/NUMBER."""
    kind, _, number = tree.partition("/")
    return db.execute(f"SELECT 1 FROM {_TABLES[kind]} WHERE number = ?", (int(number),)).fetchone() is not None


def refused_room(error: StoreError) -> bool:
    """Whether a database told this of a disk that may be full."""
    return isinstance(error.__cause__, sqlite3.Error) and _wants_room(error.__cause__)


def _wants_room(error: sqlite3.Error) -> bool:
    """Whether SQLite says so of a disk without blocks (its files cannot grow) or inodes (they cannot be made)."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
