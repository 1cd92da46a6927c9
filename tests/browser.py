"""Chromium without a network, driven through its debugging pipe: what a page asks for, says and looks like."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_DEADLINE_S, _END_S = 60.0, 20.0


@dataclass
class Seen:
    """What a page did while it was loaded: its requests, and whatever it said on the console or as an error."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Browser:
    """One browser with one tab. Use `browser()` to have it ended."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._rest = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """A method of the DevTools protocol, in the tab."""
        return self._call(method, session=self._session, **parameters)

    def open(self, path: Path, *, width: int = 1100, dark: bool = False) -> Seen:
        """Load a file and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        seen = Seen()
        for event in self._events:
            about = event.get("params", {})
            match event["method"]:
                case "Network.requestWillBeSent":
                    seen.requests.append(about["request"]["url"])
                case "Runtime.consoleAPICalled":
                    seen.complaints.append(f"console.{about['type']}: {about['args']}")
                case "Runtime.exceptionThrown":
                    seen.complaints.append(str(about["exceptionDetails"]))
                case "Log.entryAdded":
                    seen.complaints.append(f"{about['entry']['level']}: {about['entry']['text']}")
        return seen

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return done["result"].get("value")

    def screenshot(self, *, height: int = 900, top: int = 0) -> bytes:
        """So much of the page as PNG."""
        width = self.run("window.innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        done = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(done["data"])

    def printed(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def _call(self, method: str, session: str = "", **parameters: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self._events.append(answer)

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + _DEADLINE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._back, 1 << 20) if ready else b""
            assert chunk, "the browser ended or says nothing"
            self._rest += chunk
        first, _, self._rest = self._rest.partition(b"\0")
        value: dict[str, Any] = json.loads(first)
        return value


@contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """A browser whose files are below `home`; as root in a network namespace of its own, in which nothing is."""
    program = shutil.which("chromium")
    assert program, "tools/setup --tests installs chromium"
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={home}/profile"]
    command += ["--remote-debugging-pipe", "about:blank"]
    if os.geteuid() == 0:
        command = ["unshare", "--net", *command]
    to_read, to_write = _pipe()
    back_read, back_write = _pipe()
    # It reads 3 and writes 4.
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        (os.POSIX_SPAWN_DUP2, to_read, 3),
        (os.POSIX_SPAWN_DUP2, back_write, 4),
    ]
    environment = {**os.environ, "HOME": str(home)}
    pid = os.posix_spawnp(command[0], command, environment, file_actions=actions, setsid=True)
    os.close(to_read)
    os.close(back_write)
    try:
        yield Browser(to_write, back_read)
    finally:
        os.close(to_write)  # it ends when its pipe does
        until = time.monotonic() + _END_S
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.05)
        os.close(back_read)


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of the low ones that the browser expects."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]
