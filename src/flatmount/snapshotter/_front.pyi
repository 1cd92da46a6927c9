"""A gRPC server on a unix socket that hands whole calls over, many at a time (native/front)."""

class Front:
    """Serves `listening`, a listening stream socket that is its own from now on, on a thread of its own.

    `paths` are the calls there are; others are answered with UNIMPLEMENTED, and a request longer than `most_bytes` with
    RESOURCE_EXHAUSTED. Belongs to one thread. Raises OSError where the thread cannot be made.
    """

    def __new__(cls, listening: int, paths: tuple[str, ...], most_bytes: int) -> Front: ...
    def fileno(self) -> int:
        """A descriptor that is readable while there is something to take. Stays the front's."""

    def take(self) -> list[tuple[int, int, float, bytes]]:
        """What came since: call, the place of its path, seconds that its client gives it (negative: it does not say)
        and its message. A path of -1 says that the client of that call has left. Never waits."""

    def send(self, call: int, message: bytes, ends: bool) -> None:
        """Answer a call with a message, and with OK where that `ends` it. A call that has ended is no error."""

    def end(self, call: int, status: int, told: str) -> None:
        """End a call with a status code of gRPC's and what is told of it."""

    def flush(self) -> None:
        """Send what was answered since the last flush."""

    def close(self, grace_ms: int) -> None:
        """Take no more clients, send what was answered to whoever reads it for so long, and let everybody go."""
