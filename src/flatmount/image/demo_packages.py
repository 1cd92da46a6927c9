"""Debian packages for the demo image: what to take, in which order, and the archives of their files.

apt decides and fetches, from the machine's ordinary sources; nothing of the machine's own package state is read or
changed: an empty status file makes apt answer as for a new system, and lists and packages go to a cache of our own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flatmount.errors import FlatmountError
from flatmount.image.scratch import scratch_directory

Progress = Callable[[str, int, int], None]  # what is done, how many of it are, of how many

# A system with Python and a shell (55 packages on Debian 12), then more of what people have in their images.
_CORE = ("base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "libc-bin", "python3", "sed")
_MORE = (
    *("bzip2", "ca-certificates", "diffutils", "file", "gzip", "hostname", "less", "ncurses-base", "ncurses-bin"),
    *("netbase", "openssl", "tzdata", "xz-utils"),
)
_MOST = ("iproute2", "procps", "util-linux")

_RESOLVE_SECONDS = 120
_FETCH_SECONDS = 900
_URI_LINE = re.compile(r"'[^']*' (?P<file>[A-Za-z0-9.+~%_:-]+\.deb) \d+ SHA256:(?P<sha256>[0-9a-f]{64})")


class PackagesUnavailable(FlatmountError):
    """There is no apt here, or it cannot say what to take or fetch it."""


@dataclass(frozen=True, slots=True)
class Package:
    """One package of the closure as apt names it; `file` is its name in the cache."""

    name: str
    version: str
    file: str
    sha256: str


def goals(layers: int) -> tuple[str, ...]:
    """The packages to ask for, so that their closure is near a number of layers; 106 packages at most on Debian 12."""
    if layers < 65:
        return _CORE
    return _CORE + _MORE if layers < 90 else _CORE + _MORE + _MOST


def fetch_packages(wanted: Sequence[str], cache: str, progress: Progress) -> tuple[Package, ...]:
    """Bring the closure of `wanted` into `CACHE/packages`, each file checked against apt's SHA-256.

    What is there already is not fetched again. Where the machine's package lists are missing or too old to be of
    use, current ones are fetched into the cache.

    Returns: the closure in apt's order of unpacking, `base-files` first: it brings the links of a merged /usr.
    Raises: PackagesUnavailable.
    """
    for tool in ("apt-get", "dpkg-deb", "dpkg"):
        if shutil.which(tool) is None:
            raise PackagesUnavailable(f"there is no {tool} on this machine")
    with _locked(cache):
        try:
            return _fetch_closure(_Apt(cache), wanted, cache, progress)
        except PackagesUnavailable as with_the_lists_here:
            reason = str(with_the_lists_here)
        try:
            apt = _Apt(cache, own_lists=True)
            progress("package lists", 0, 1)
            apt.run(["update"], _FETCH_SECONDS)
            progress("package lists", 1, 1)
            return _fetch_closure(apt, wanted, cache, progress)
        except PackagesUnavailable as with_new_lists:
            raise PackagesUnavailable(f"{reason}; after apt-get update: {with_new_lists}") from None


def read_archive(cache: str, package: Package) -> bytes:
    """The package's data archive, decompressed, as it is in the package. Raises: PackagesUnavailable."""
    path = os.path.join(cache, "packages", package.file)
    return _run(["dpkg-deb", "--fsys-tarfile", path], _RESOLVE_SECONDS).stdout


def architecture() -> str:
    """Debian's name of the architecture that apt installs. Raises: PackagesUnavailable."""
    return _run(["dpkg", "--print-architecture"], _RESOLVE_SECONDS).stdout.decode().strip()


def parse_uris(text: str) -> tuple[Package, ...]:
    """Read the output of `apt-get --print-uris install`: names, versions and digests, and no addresses.

    Raises: PackagesUnavailable, where a package comes without a SHA-256.
    """
    packages = []
    for line in text.splitlines():
        if not line.startswith("'"):
            continue
        match = _URI_LINE.fullmatch(line.strip())
        if match is None:
            raise PackagesUnavailable("apt gave no SHA-256 for a package")
        name, version, _ = match["file"].removesuffix(".deb").split("_")
        version = re.sub("%3a", ":", version, flags=re.IGNORECASE)
        packages.append(Package(name, version, match["file"], match["sha256"]))
    return tuple(sorted(packages, key=lambda package: package.name != "base-files"))


class _Apt:
    """apt with the machine's configuration and the state of a new system."""

    def __init__(self, cache: str, *, own_lists: bool = False) -> None:
        state = os.path.join(cache, "apt")
        lists = os.path.join(state, "lists")
        for directory in ("archives/partial", "lists/partial"):
            os.makedirs(os.path.join(state, directory), exist_ok=True)
        status, config = os.path.join(state, "status"), os.path.join(state, "apt.conf")
        # Hooks of the machine's configuration are for its own lists and archives; only a file can clear them.
        for path, text in ((status, ""), (config, "#clear APT::Update;\n#clear DPkg::Post-Invoke;\n")):
            if not os.path.exists(path):  # a newer status file would make apt's cached answer stale
                with open(path, "w", encoding="ascii") as file:
                    file.write(text)
        options = {
            "Dir::State::status": status,
            "Dir::Cache": state,
            "Dir::Cache::archives": "archives",
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "APT::Sandbox::User": "root",  # the cache may be where apt's own user cannot go
            "Acquire::ForceHash": "SHA256",
            "Acquire::Retries": "1",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
        }
        if own_lists:
            options["Dir::State::lists"] = lists
        pairs = [f"--option={name}={value}" for name, value in options.items()]
        self._prefix = ["apt-get", f"--config-file={config}", *pairs, "--quiet=2", "--assume-yes"]

    def run(
        self,
        arguments: Sequence[str],
        seconds: float,
        *,
        cwd: str | None = None,
        watch: Callable[[], None] | None = None,
    ) -> str:
        """Run apt-get and return what it printed. Raises: PackagesUnavailable."""
        return _run([*self._prefix, *arguments], seconds, cwd=cwd, watch=watch).stdout.decode(errors="replace")


def _fetch_closure(apt: _Apt, wanted: Sequence[str], cache: str, progress: Progress) -> tuple[Package, ...]:
    progress("package closure", 0, 1)
    closure = parse_uris(apt.run(["install", "--print-uris", *wanted], _RESOLVE_SECONDS))
    progress("package closure", 1, 1)
    if not {"base-files", "python3"} <= {package.name for package in closure}:
        raise PackagesUnavailable("apt knows no closure of python3")
    kept = os.path.join(cache, "packages")
    os.makedirs(kept, exist_ok=True)
    missing = [package for package in closure if not _is_whole(os.path.join(kept, package.file), package)]
    if not missing:
        return closure
    with scratch_directory(cache, "fetch") as scratch:
        total = len(missing)

        def watch() -> None:
            progress("packages fetched", sum(name.endswith(".deb") for name in os.listdir(scratch)), total)

        apt.run(["download", *(f"{p.name}={p.version}" for p in missing)], _FETCH_SECONDS, cwd=scratch, watch=watch)
        for package in missing:
            fetched = os.path.join(scratch, package.file)
            if not _is_whole(fetched, package):
                raise PackagesUnavailable(f"package {package.file} is not what apt's lists say")
            os.replace(fetched, os.path.join(kept, package.file))
    progress("packages fetched", total, total)
    return closure


def _is_whole(path: str, package: Package) -> bool:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256
    except FileNotFoundError:
        return False


@contextmanager
def _locked(cache: str) -> Iterator[None]:
    os.makedirs(cache, exist_ok=True)
    fd = os.open(os.path.join(cache, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _run(
    command: Sequence[str], seconds: float, *, cwd: str | None = None, watch: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[bytes]:
    deadline = time.monotonic() + seconds
    try:
        with subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        ) as process:
            try:
                output, errors = _communicate(process, deadline, watch)
            except BaseException:
                process.kill()
                raise
    except subprocess.TimeoutExpired:
        raise PackagesUnavailable(f"{command[0]} did not finish within {seconds:.0f} s") from None
    except OSError as error:
        raise PackagesUnavailable(f"{command[0]} cannot be started: {error.strerror}") from error
    if process.returncode != 0:
        said = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
        last = next((line for line in reversed(said) if line.startswith("E:")), said[-1] if said else "no word")
        raise PackagesUnavailable(f"{command[0]} failed: {last.removeprefix('E:').strip()}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _communicate(
    process: subprocess.Popen[bytes], deadline: float, watch: Callable[[], None] | None
) -> tuple[bytes, bytes]:
    # Without somebody to tell there is no reason to wake up before the end.
    step = 0.2 if watch else deadline - time.monotonic()
    while True:
        try:
            return process.communicate(timeout=step)
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise
            if watch:
                watch()
