"""The OCI runtime: found, called, and its errors told in our words and its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from flatmount.errors import FlatmountError

DEFAULT: Final = "runc"
LOG: Final = "runtime.log"
CONSOLE: Final = "@console"  # the shim puts the socket's path there, which a socket's address has room for
_SECONDS: Final = 30
_PLAIN: Final = ("runc", "crun")

# Words of runtimes for what people know as 127 and 126.
_NOT_FOUND: Final = ("executable file not found", "no such file or directory", "no such file")
_NOT_EXECUTABLE: Final = ("permission denied", "is a directory", "exec format error", "not a directory")


class ContainerError(FlatmountError):
    """flatmount or the runtime could not start or find what was asked for."""

    exit_code = 125


class NotExecutable(ContainerError):
    """The command is in the container and cannot be executed."""

    exit_code = 126


class NotFound(ContainerError):
    """The command is not in the container."""

    exit_code = 127


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime by its absolute path, with its state below `root`."""

    path: str
    root: str

    @classmethod
    def find(cls, name: str, run: str) -> Runtime:
        """The runtime `name`, a path or to be found on PATH. Raises: ContainerError."""
        path = shutil.which(name)
        if path is None:
            raise ContainerError(
                f"the runtime {name!r} is not there or cannot be executed",
                hint="install runc, or name another one with --runtime",
            )
        return cls(os.path.realpath(path), os.path.join(run, "runtime"))

    def run(self, container_id: str, directory: str, *, terminal: bool) -> tuple[str, ...]:
        """The call that makes and starts the container from `directory`/bundle, and leaves it running."""
        words = ["run", "--detach", "--bundle", f"{directory}/bundle", *self._common(directory, terminal)]
        return (*self._begin(directory), *words, container_id)

    def execute(self, container_id: str, directory: str, *, terminal: bool) -> tuple[str, ...]:
        """The call that starts one more process, as `directory`/process.json says, and leaves it running."""
        words = ["exec", "--detach", "--process", f"{directory}/process.json", *self._common(directory, terminal)]
        return (*self._begin(directory), *words, container_id)

    def delete(self, container_id: str) -> None:
        """Have a container killed and forgotten that we cannot: one whose processes are not in our control groups.

        runc and crun leave nothing but control groups and a directory, which go without asking: their own `delete`
        reads the mount table several times, 0.8 s beside 10,000 mounts. One the runtime does not know is no error.
        """
        if os.path.basename(self.path) in _PLAIN or not os.path.lexists(os.path.join(self.root, container_id)):
            return
        call = [self.path, "--root", self.root, "delete", "--force", container_id]
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False)

    def _begin(self, directory: str) -> tuple[str, ...]:
        return (self.path, "--root", self.root, "--log", f"{directory}/{LOG}", "--log-format", "json")

    def _common(self, directory: str, terminal: bool) -> list[str]:
        console = ["--console-socket", CONSOLE] if terminal else []
        return ["--pid-file", f"{directory}/pid", *console]


def refused(directory: str, command: str, runtime: Runtime) -> ContainerError:
    """Why the runtime did not start `command`, from its log: our line, its words, and the exit code people know."""
    words = last_words(os.path.join(directory, LOG))
    lowered = words.lower()
    # Only what is said about executing: a missing mount source is "no such file" as well.
    about_command = "exec:" in lowered or "exec " in lowered or "executable" in lowered
    if about_command and any(text in lowered for text in _NOT_FOUND):
        return NotFound(f"the command {command!r} is not in the container ({words})")
    if about_command and any(text in lowered for text in _NOT_EXECUTABLE):
        return NotExecutable(f"the command {command!r} cannot be executed in the container ({words})")
    name = os.path.basename(runtime.path)
    return ContainerError(f"{name} did not start the container: {words or 'it said nothing'}", hint=_hint(lowered))


def unexecuted(command: str, code: int) -> ContainerError:
    """A command that was found and could not be executed; the runtime's own words went to the error output."""
    if code == NotFound.exit_code:
        return NotFound(
            f"the command {command!r} is in the container and what executes it is not",
            hint="look at the interpreter in its first line, or at the loader that it was linked for",
        )
    return NotExecutable(
        f"the command {command!r} cannot be executed in the container",
        hint="look whether it is a program for this machine",
    )


def last_words(path: str) -> str:
    """The last error in a runtime's log, or "" where there is none."""
    words = ""
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, AttributeError):
                entry = json.loads(line)
                if entry.get("level") in ("error", "fatal"):
                    words = " ".join(str(entry.get("msg", "")).split())
    return words


def _hint(words: str) -> str:
    if "cgroup" in words:
        return "it needs control groups that it may change: run it as root, outside of containers, or delegate some"
    if "flag provided but not defined" in words or "unknown" in words:
        return "the runtime may be too old; runc 1.1 or later is known to do"
    return ""


def signal_number(text: str, default: int = signal.SIGTERM) -> int:
    """A signal by name, with or without SIG, or by number; "" is the default. Raises: ContainerError."""
    if not text:
        return default
    name = text.upper().removeprefix("SIG")
    if name.isascii() and name.isdigit() and 0 < int(name) < signal.NSIG:
        return int(name)
    if name.startswith("RTMIN+") and name[6:].isdigit() and signal.SIGRTMIN + int(name[6:]) <= signal.SIGRTMAX:
        return signal.SIGRTMIN + int(name[6:])
    known = signal.Signals.__members__.get(f"SIG{name}")
    if known is None:
        raise ContainerError(f"there is no signal {text[:40]!r}", hint="as in TERM or 15")
    return int(known)
