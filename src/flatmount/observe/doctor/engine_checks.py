"""Versions of engines and runtimes against what is known of them, and what their images cost.

containerd: core/mount and the overlay snapshotter of each release, measured with `flatmount trace` (docs/observe.md).
runc: opencontainers/runc 3925 and pull request 3931.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from flatmount.observe.doctor import snapshotters
from flatmount.observe.doctor.findings import Finding, ImageCost, Severity
from flatmount.observe.doctor.state import Engine, Image, NodeState
from flatmount.observe.owners import Owner

Version = tuple[int, int, int]
Check = Callable[[Engine, NodeState], Iterator[Finding]]

TABLE_PARSE_MATTERS = 1_000
_RUNC_OPERATIONS = 43  # of runc itself for one container
# podman 4.3.1, runc 1.1.5, 5 layers: `flatmount trace -- podman run --rm --uidmap 0:200000:65536 ...`. Of 30 layers it
# made one id-mapped mount as well.
_PODMAN_OPERATIONS = 48
_STORAGE_SINCE: dict[str, Version] = {"podman": (4, 1, 0), "crio": (1, 25, 0)}
_LAYERS_AT_RISK = 390  # long snapshot paths end there, short ones at 500


def containerd_generation(version: Version) -> str:
    """How a containerd id-maps layers: `copy` (it does not), `per-layer`, `parent`, or `parent-parse`.

    `parent-parse` id-maps the common parent, and reads the whole mount table at each assembly.
    """
    if version < (2, 0, 0):
        return "copy"
    if version < (2, 0, 7) or (2, 1, 0) <= version < (2, 1, 5):
        return "per-layer"
    return "parent" if version < (2, 3, 0) else "parent-parse"


def storage_generation(engine: Engine) -> str:
    """How podman or CRI-O shifts the ids of an image's layers: `copy`, or `parent` (one id-mapped mount of all layers).

    containers/storage id-maps overlayfs layers from podman 4.1 and CRI-O 1.25 on (containers/storage 1180).
    """
    return "copy" if engine.version < _STORAGE_SINCE[engine.name] else "parent"


def start_operations(engine: Engine, layers: int) -> int | None:
    """Mount operations of one container with a user namespace of its own; None where it copies or is not known."""
    if engine.name == "containerd":
        return {
            "per-layer": 4 * layers + 5 + _RUNC_OPERATIONS,
            "parent": 57,
            "parent-parse": 51,
            "copy": None,
        }[containerd_generation(engine.version)]
    if engine.name in _STORAGE_SINCE:
        return _PODMAN_OPERATIONS if storage_generation(engine) == "parent" else None
    return None


def image_costs(state: NodeState) -> tuple[ImageCost, ...]:
    """What a start of each image costs with the engine whose it is, the dearest and then the deepest first."""
    costs = []
    for image in state.images:
        engine = _engine_of(image, state)
        operations = None if engine is None else start_operations(engine, image.layers)
        costs.append(ImageCost(image.engine, image.name, image.layers, operations, _how(engine, operations)))
    return tuple(sorted(costs, key=lambda cost: (-(cost.operations or 0), -cost.layers, cost.name)))


def _engine_of(image: Image, state: NodeState) -> Engine | None:
    """The engine that starts an image: podman and CRI-O share a store, and the one that runs is meant."""
    names = tuple(_STORAGE_SINCE) if image.engine == Owner.PODMAN else (image.engine,)
    found = [engine for engine in state.engines if engine.name in names]
    return max(found, key=lambda engine: engine.running, default=None)


def _how(engine: Engine | None, operations: int | None) -> str:
    if engine is None:
        return "its engine is not here"
    said = f"{engine.name} {_text(engine.version)}"
    if operations is None:
        return f"{said} copies it for each user range"
    per_layer = engine.name == "containerd" and containerd_generation(engine.version) == "per-layer"
    return f"{said}: {'four for each layer' if per_layer else 'the same for any number of layers'}"


def engines(state: NodeState) -> Iterator[Finding]:
    """What the versions on this node are known for."""
    for engine in state.engines:
        check = _CHECKS.get(engine.name)
        if check is not None:
            yield from check(engine, state)
    containerd = next((engine for engine in state.engines if engine.name == "containerd"), None)
    if state.snapshotter is not None and containerd is not None:
        yield from snapshotters.check(state.snapshotter, containerd.version)
    yield from _images(state)


def _containerd(engine: Engine, state: NodeState) -> Iterator[Finding]:
    generation = containerd_generation(engine.version)
    said = f"{engine.path}: {engine.said}"
    if generation == "per-layer":
        deep = max((image for image in state.images if image.engine == "containerd"), key=_layers, default=None)
        cost: tuple[str, ...] = ()
        if deep is not None:
            cost = (f"{deep.name} has {deep.layers} layers: {start_operations(engine, deep.layers):,} for each start",)
        yield Finding(
            "containerd-per-layer",
            Severity.WARNING,
            f"containerd {_text(engine.version)} id-maps each layer of an image by itself",
            (said, *cost, "temporary mounts whose removal fails are not tried again, and stay"),
            "containerd",
            "update to 2.0.7, 2.1.5 or 2.2 or later",
            False,
        )
    elif generation == "parent-parse":
        long = state.table.mounts >= TABLE_PARSE_MATTERS
        yield Finding(
            "containerd-table-parse",
            Severity.WARNING if long else Severity.NOTE,
            f"containerd {_text(engine.version)} reads the whole mount table at each assembly",
            (said, f"the table has {state.table.mounts:,} mounts"),
            "containerd",
            "keep the host's table short: `flatmount doctor` shows whose its mounts are",
            long,
        )
    elif generation == "copy":
        yield Finding(
            "containerd-copies",
            Severity.NOTE,
            f"containerd {_text(engine.version)} copies images for containers with user namespaces",
            (said, "it cannot id-map overlayfs layers: each user range gets a copy with its owners changed"),
            "containerd",
            "update to 2.2 or later before using user namespaces",
            False,
        )


def _runc(engine: Engine, state: NodeState) -> Iterator[Finding]:
    if engine.version >= (1, 2, 0):
        return
    serious = state.table.mounts >= TABLE_PARSE_MATTERS
    yield Finding(
        "runc-self-bind",
        Severity.WARNING if serious else Severity.NOTE,
        f"runc {_text(engine.version)} mounts itself in the host's table at each start and each exec",
        (f"{engine.path}: {engine.said}", "every health check by exec wakes all watchers of the table three times"),
        "runc",
        "update to 1.2 or later",
        False,
    )


def _storage(least: Version) -> Check:
    def check(engine: Engine, state: NodeState) -> Iterator[Finding]:
        if engine.version < least:
            yield Finding(
                "storage-copies",
                Severity.NOTE,
                f"{engine.name} {_text(engine.version)} copies images for containers with user namespaces",
                (f"{engine.path}: {engine.said}",),
                engine.name,
                f"update to {_text(least)} or later",
                False,
            )

    return check


def _images(state: NodeState) -> Iterator[Finding]:
    for image in state.images:
        if image.layers >= _LAYERS_AT_RISK:
            yield Finding(
                "layer-limit",
                Severity.WARNING,
                f"{image.name} has {image.layers} layers",
                ("overlayfs takes 500 lowers, and mount options end at 4,095 bytes: long paths end it sooner",),
                "whoever builds the image",
                "build it with fewer layers, or start it from a flat tree (`flatmount image`)",
                False,
            )


def _layers(image: Image) -> int:
    return image.layers


def _text(version: Version) -> str:
    return ".".join(map(str, version))


_CHECKS: dict[str, Check] = {
    "containerd": _containerd,
    "runc": _runc,
    **{name: _storage(least) for name, least in _STORAGE_SINCE.items()},
}
