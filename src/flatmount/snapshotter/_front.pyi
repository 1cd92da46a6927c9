"""What a burst of calls goes through without the interpreter (native/front)."""

from typing import Any

class Front:
    """Serves `listening`, a listening stream socket that is its own from now on, on a thread of its own.

    `paths` are the calls there are: each a path alone, or (path, fields, endless, kept_by). Of a message with `fields`,
    as in "1s 4m", only those are read: strings by number, and maps from strings to strings. A call that is not
    `endless` is told DEADLINE_EXCEEDED after `most_s` seconds (0: never), or its client's own time if that is less, to
    within 50 ms. Calls of a path with `kept_by` are answered by the front itself where `keep` was told the answer for
    the string of that number. What is no such call is answered with UNIMPLEMENTED, a request longer than `most_bytes`
    with RESOURCE_EXHAUSTED, and one that cannot be read with INTERNAL. Belongs to one thread. Raises OSError where its
    own cannot be made.
    """

    def __new__(
        cls,
        listening: int,
        paths: tuple[str | tuple[str, str | None, bool] | tuple[str, str | None, bool, int], ...],
        most_bytes: int,
        most_s: float = 0,
    ) -> Front: ...
    def fileno(self) -> int:
        """A descriptor that is readable while there is something to take. Stays the front's."""

    def take(self) -> list[tuple[int, int, float, Any]]:
        """What came since: call, the place of its path, seconds that it has (negative: any number) and its message, or
        the tuple of its fields. A path of -1 says that the client of that call has left. Never waits."""

    def send(self, call: int, message: bytes, ends: bool) -> None:
        """Answer a call with a message, and with OK where that `ends` it. A call that has ended is no error."""

    def end(self, call: int, status: int, told: str) -> None:
        """End a call with a status code of gRPC's and what is told of it."""

    def flush(self) -> None:
        """Send what was answered since the last flush."""

    def keep(self, key: str, message: bytes) -> None:
        """Answer calls for `key`, on paths that have answers kept, with `message` from now on; at most 65,536 keys."""

    def forget(self, key: str = ...) -> None:
        """Answer calls for `key` with nothing that was kept, or for any key; calls that came before may have been."""

    def running(self) -> int:
        """How many calls were handed over whose clients have not been told the end of."""

    def counts(self, place: int) -> tuple[tuple[int, ...], tuple[int, ...], float]:
        """What was answered on a path: by status code, by how long it took (BOUNDS_S, and longer), all seconds."""

    def close(self, grace_ms: int) -> None:
        """Take no more clients, send what was answered to whoever reads it for so long, and let everybody go."""

class Committer:
    """Writes batches into the store's book on a thread of its own: directories first, then rows in one transaction.

    Opens the book at `book`, runs the statements of `setup` and prepares `statements`, at most 8 of them. `data_fd` is
    borrowed and must outlive it. Uses the SQLite that the interpreter has loaded. Belongs to one thread. Raises
    RuntimeError where that is not a library of its own, and what SQLite says.
    """

    def __new__(cls, book: str, data_fd: int, setup: tuple[str, ...], statements: tuple[str, ...]) -> Committer: ...
    def fileno(self) -> int:
        """A descriptor that is readable when a batch is done, or all of those ahead. Stays the committer's."""

    def submit(
        self,
        uppers: list[tuple[int, bool, bool, bool, int, int, int]],
        rows: tuple[list[tuple[str | int | None, ...]], ...],
    ) -> None:
        """Begin to write a batch; `uppers` as flatmount.kernel.tree.make_uppers has them, made only if all can be.

        `rows` are those of each statement, in its order, which it is run with one after the other. Raises ValueError
        while another batch is being written, or was written and not taken.
        """

    def ahead(self, numbers: list[int]) -> None:
        """Make the directories of active snapshots to come, one after the other while there is no batch."""

    def take(self) -> tuple[bool, str | None, int, int]:
        """What was done since the last time.

        Whether a batch is done, and why nothing of it is in the book where that is so; how many more of those ahead are
        made, in their order, and the errno for which the others will not be, or 0.
        """

    def close(self, limit_ms: int) -> bool:
        """End it when its batch is done. Returns whether that was so within the limit; else it is left behind."""

def mounts_response(type: str, source: str, options: tuple[str, ...]) -> bytes:
    """MountsResponse with one Mount on the wire. Raises ValueError for more than 64 options."""

BOUNDS_S: tuple[float, ...]
