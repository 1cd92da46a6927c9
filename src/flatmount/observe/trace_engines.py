"""Engines to trace: each starts one container of an image and removes it, with state of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from flatmount.errors import FlatmountError, MissingFeature, UsageError
from flatmount.observe.tiny_image import NAME, PROGRAM, exiting_program, write_tiny_image
from flatmount.observe.trace import trace
from flatmount.observe.trace_results import Absent, TraceRun
from flatmount.runtime.daemons import end_program, start_program, wait_for
from flatmount.store import Store
from flatmount.strategies import STRATEGIES

_OURS = "flatmount"
_FLAT_S = 60.0
_HELPER_TURNS = 5
_COMMAND_S = 300.0
_POOL = "1048576:16777216"
_RANGE = "0:1048576:65536"

Tracer = Callable[[int], TraceRun]  # layers -> one container's life


@dataclass(frozen=True, slots=True)
class Engine:
    """`open` is given a directory to work in and OCI layouts by number of layers, and yields a Tracer."""

    name: str
    open: Callable[[str, Callable[[int], str]], AbstractContextManager[Tracer]]


def engine_names() -> tuple[str, ...]:
    """All names that `trace_engines` takes."""
    return (*_ENGINES, *(f"{_OURS}:{strategy}" for strategy in STRATEGIES if strategy != "chown"))


def trace_engines(
    names: Sequence[str], layers: Sequence[int], place: str, progress: Callable[[str], None]
) -> tuple[tuple[TraceRun, ...], tuple[Absent, ...]]:
    """Trace one container for each engine and number of layers, started in the calling thread's mount namespace.

    Args:
        place: an empty directory for images and the engines' state; whoever gave it removes it.

    Returns the runs, and the engines that are not on this machine or cannot work here.
    Raises: UsageError for a name that is not known; MissingFeature where nothing can be traced.
    """
    known = engine_names()
    for name in names:
        if name not in known:
            raise UsageError(f"no engine is called {name!r}", hint=f"there are {', '.join(known)}")
    images: dict[int, str] = {}

    def image(count: int) -> str:
        if count not in images:
            images[count] = f"{place}/image-{count}"
            write_tiny_image(images[count], count)
        return images[count]

    runs: list[TraceRun] = []
    absent: list[Absent] = []
    for number, name in enumerate(names):
        work = f"{place}/{number}"
        os.mkdir(work, 0o711)
        engine = _ENGINES.get(name) or Engine(name, _flatmount(name.partition(":")[2]))
        try:
            with engine.open(work, image) as one:
                for count in layers:
                    progress(f"{name} with {count} layers")
                    runs.append(one(count))
        except (FlatmountError, OSError) as error:
            absent.append(Absent(name, error.line() if isinstance(error, FlatmountError) else str(error)))
    return tuple(runs), tuple(absent)


@contextmanager
def _containerd(work: str, image: Callable[[int], str]) -> Iterator[Tracer]:
    """A daemon of our own; `ctr run` asks it for one container with its overlay snapshotter."""
    daemon, ctr = _program("containerd"), _program("ctr")
    socket = f"{work}/sock"
    with open(f"{work}/config.toml", "w", encoding="utf-8") as file:
        file.write(
            f'version = 2\nroot = "{work}/root"\nstate = "{work}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{socket}"\n'
        )
    process = start_program([daemon, "--config", f"{work}/config.toml"], f"{work}/log")
    try:
        wait_for(lambda: os.path.exists(socket), process, f"{work}/log")

        def one(layers: int) -> TraceRun:
            archive, name = f"{work}/image.tar", f"{NAME}-{layers}"
            _call("tar", "-C", image(layers), "-cf", archive, ".")
            _call(ctr, "-a", socket, "images", "import", "--snapshotter", "overlayfs", "--index-name", name, archive)
            os.unlink(archive)
            command = (ctr, "-a", socket, "run", "--rm", "--snapshotter", "overlayfs", NAME, f"tiny-{layers}", PROGRAM)
            return trace(command, subject="containerd", layers=layers, also=(process.pid,), quiet=True)

        yield one
    finally:
        end_program(process)


def _containerd_in_range(form: str) -> Callable[[str, Callable[[int], str]], AbstractContextManager[Tracer]]:
    """containerd's start of a container in a user range: with our snapshotter in a form, or with "" its overlayfs.

    FLATMOUNT_CONTAINERD names a directory with another containerd than PATH's. The image's flat tree is there when the
    counting begins, and the range has no other container.
    """

    @contextmanager
    def opened(work: str, image: Callable[[int], str]) -> Iterator[Tracer]:
        from flatmount.snapshotter.engine import running_engine  # its packages come with flatmount[snapshotter]

        snapshotter = "flatmount" if form else "overlayfs"
        programs = os.environ.get("FLATMOUNT_CONTAINERD", "")
        with running_engine(work, form=form or "auto", programs=programs) as engine:
            if not form and engine.version.startswith("1."):
                raise MissingFeature(
                    f"containerd {engine.version} copies the image for a user range", hint="2.0 and later map it"
                )

            def one(layers: int) -> TraceRun:
                archive = f"{work}/image.tar"
                _call("tar", "-C", image(layers), "-cf", archive, ".")
                engine.take_image(archive, NAME, snapshotter=snapshotter)
                os.unlink(archive)
                # The next image shares its lower layers, which containerd would collect while it unpacks that one.
                engine.ctr("images", "tag", NAME, f"localhost/kept-{layers}:latest")
                run = ["run", "--rm", "--snapshotter", snapshotter]
                run += ["--uidmap", _RANGE, "--gidmap", _RANGE, "--remap-labels"]
                engine.ctr(*run, NAME, f"first-{layers}", PROGRAM)  # the first start has the flat tree made
                if form:
                    _wait_for_flat(lambda: engine.has_flat(layers))
                subject = f"containerd {engine.version}, own range, {form or 'overlayfs'}"
                also = (engine.process, engine.service)
                runs = []
                # containerd's shim may lose a helper's exit status to its own reaper (ECHILD), and mounts once more.
                for turn in range(_HELPER_TURNS if form == "helper" else 1):
                    command = engine.command(*run, NAME, f"tiny-{layers}-{turn}", PROGRAM)
                    runs.append(trace(command, subject=subject, layers=layers, also=also, quiet=True))
                return min(runs, key=lambda one: (one.exit_code, one.operations))

            yield one

    return opened


def _wait_for_flat(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _FLAT_S
    while not there():
        if time.monotonic() > deadline:
            raise FlatmountError("the image's flat tree is not made", hint="see the snapshotter's log")
        time.sleep(0.05)


@contextmanager
def _podman(work: str, image: Callable[[int], str]) -> Iterator[Tracer]:
    podman = _program("podman")
    own = [podman, "--root", f"{work}/root", "--runroot", f"{work}/run", "--storage-driver", "overlay"]
    # Its own defaults ask for more than root without CAP_SYS_RESOURCE may give.
    limits = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
    own += ["--cgroup-manager", "cgroupfs", "--events-backend", "none"]

    def one(layers: int) -> TraceRun:
        _call(*own, "pull", "-q", f"oci:{image(layers)}")
        listed = _call(*own, "images", "-q", "--no-trunc").split()
        command = (*own, "run", "--rm", "--network", "none", *limits, listed[0], PROGRAM)
        run = trace(command, subject="podman", layers=layers, quiet=True)
        _call(*own, "rmi", "-f", listed[0])
        return run

    try:
        yield one
    finally:
        subprocess.run([*own, "system", "reset", "-f"], capture_output=True, check=False, timeout=_COMMAND_S)


@contextmanager
def _runc(work: str, image: Callable[[int], str]) -> Iterator[Tracer]:
    """The runtime alone, on a plain directory: what is left when assembling costs nothing."""
    runc = _program("runc")
    bundle = f"{work}/bundle"
    for directory in ("dev", "proc", "sys"):
        os.makedirs(f"{bundle}/rootfs/{directory}")
    with open(f"{bundle}/rootfs{PROGRAM}", "wb") as file:
        file.write(exiting_program(os.uname().machine))
    os.chmod(f"{bundle}/rootfs{PROGRAM}", 0o755)
    _call(runc, "spec", "-b", bundle)
    with open(f"{bundle}/config.json", encoding="utf-8") as config_file:
        config = json.load(config_file)
    config["process"] |= {"terminal": False, "args": [PROGRAM]}
    with open(f"{bundle}/config.json", "w", encoding="utf-8") as config_file:
        json.dump(config, config_file)

    def one(layers: int) -> TraceRun:
        command = (runc, "--root", f"{work}/state", "run", "-b", bundle, f"trace-{os.getpid()}-{layers}")
        return trace(command, subject="runc", layers=layers, quiet=True)

    yield one


def _flatmount(strategy: str) -> Callable[[str, Callable[[int], str]], AbstractContextManager[Tracer]]:
    """Ours: a root file system from its assembly to its undoing, what is shared by all containers made before."""

    @contextmanager
    def opened(work: str, image: Callable[[int], str]) -> Iterator[Tracer]:
        root = f"{work}/store"

        def one(layers: int) -> TraceRun:
            name = f"tiny-{layers}"
            with Store.open(root, create=True) as store:
                store.import_image(image(layers), name=name)
            command = [sys.executable, "-P", "-m", "flatmount.observe.one_container", str(os.getpid())]
            command += [root, name, strategy or "auto", f"{work}/{layers}"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdin and process.stdout
                took = process.stdout.readline().strip()
                if not took:
                    raise FlatmountError(f"assembling with {strategy or 'auto'} did not work", hint="see above")

                def go() -> int:
                    process.communicate("\n", timeout=_COMMAND_S)
                    return process.returncode

                shown = f"{_OURS} ({took})"
                return trace(
                    (_OURS, "assemble and undo", took), subject=shown, layers=layers, also=(process.pid,), work=go
                )

        yield one

    return opened


def _flatmount_run(attach: str) -> Callable[[str, Callable[[int], str]], AbstractContextManager[Tracer]]:
    """Ours as a person calls it: a container by `flatmount run`, with what the command itself tries and mounts."""

    @contextmanager
    def opened(work: str, image: Callable[[int], str]) -> Iterator[Tracer]:
        root, subject = f"{work}/store", f"{_OURS} run --attach {attach}"
        own = ["env", f"FLATMOUNT_RUN={work}/run", sys.executable, "-P", "-m", "flatmount", "run", "--rm"]
        own += ["--attach", attach, "--root", root, "--pool", _POOL]

        def one(layers: int) -> TraceRun:
            name = f"tiny-{layers}"
            with Store.open(root, create=True) as store:
                store.import_image(image(layers), name=name)
            _call(*own, name)  # the first container of an image makes its flat tree
            return trace([*own, name], subject=subject, layers=layers, quiet=True)

        yield one

    return opened


_ENGINES = {
    "containerd": Engine("containerd", _containerd),
    "containerd:range": Engine("containerd:range", _containerd_in_range("")),
    **{
        f"containerd:{form}": Engine(f"containerd:{form}", _containerd_in_range(form))
        for form in ("overlay", "bind", "helper")
    },
    "podman": Engine("podman", _podman),
    "runc": Engine("runc", _runc),
    _OURS: Engine(_OURS, _flatmount("")),
    f"{_OURS}:run": Engine(f"{_OURS}:run", _flatmount_run("private")),
    f"{_OURS}:run-host": Engine(f"{_OURS}:run-host", _flatmount_run("host")),
}


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MissingFeature(f"{name} is not installed", hint="install it to compare")
    return path


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_S)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FlatmountError(f"{os.path.basename(command[0])} said: {said[-1] if said else done.returncode}")
    return done.stdout
