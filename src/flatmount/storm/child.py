"""A measuring process beside a storm: started, waited for, stopped, and never left behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time

from flatmount.errors import FlatmountError

_START_S = 20.0
_STOP_S = 10.0
_POLL_S = 0.002


class Child:
    """One `python -m MODULE` in the calling thread's mount namespace, writing lines to a file in memory.

    A file and not a pipe: nobody has to read along, and a full pipe can never make the process wait for its
    reader. The process ends when its standard input says so, and the kernel kills it when the *thread* that
    made it ends; so make it in a thread that outlives it.
    """

    __slots__ = ("_module", "_offset", "_output", "_process", "_rest")

    def __init__(self, module: str) -> None:
        self._module = module
        self._offset = 0
        self._rest = b""
        self._output = os.memfd_create(module, os.MFD_CLOEXEC)
        # A memfd has no position of its own for each write: without this, two threads would overwrite each other.
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)
        try:
            # -P: what lies in the current directory is not imported. A group of its own: Ctrl-C is for the
            # storm, which then ends its children in order.
            command = [sys.executable, "-P", "-m", module, str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._output, process_group=0)
        except BaseException:
            os.close(self._output)
            raise

    def wait_for_output(self, deadline_s: float = _START_S) -> None:
        """Return as soon as anything unread was written.

        Raises: FlatmountError when the process ends or writes nothing for so long.
        """
        deadline = time.monotonic() + deadline_s
        while os.fstat(self._output).st_size == self._offset:
            if self._process.poll() is not None:
                raise FlatmountError(
                    f"{self._module} ended with {self._process.returncode}", hint="its own message is above"
                )
            if time.monotonic() > deadline:
                raise FlatmountError(
                    f"{self._module} wrote nothing for {deadline_s:g} s",
                    hint="the machine is overloaded: try fewer containers or a lower concurrency",
                )
            time.sleep(_POLL_S)

    def new_lines(self) -> list[str]:
        """Whole lines written since the last call."""
        chunk = os.pread(self._output, os.fstat(self._output).st_size - self._offset, self._offset)
        self._offset += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode() for line in lines]

    def stop(self) -> list[str]:
        """End the process, by force if need be, and return the whole lines that were not read yet."""
        assert self._process.stdin is not None
        try:
            # A byte, and the end: somebody may have inherited our side of the pipe, which would keep it open.
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self.new_lines()

    def close(self) -> None:
        """Kill the process if it still runs, and free its output. Closing twice is fine."""
        if self._output < 0:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        os.close(self._output)
        self._output = -1
