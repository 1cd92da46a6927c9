"""What a strategy is given: what to build, and what this host can do. Plain data; no kernel is called here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from flatmount.errors import MissingFeature, TooManyLayers, UsageError
from flatmount.plan.facts import HostFacts

MOST_LOWERS = 500  # OVL_MAX_STACK in fs/overlayfs/params.h


class Attach(Enum):
    """Where the root file system goes."""

    HOST = "host"  # a directory of the calling thread's mount namespace
    NONE = "none"  # nowhere: a descriptor for the caller


class Upper(Enum):
    """Where a container's changes go, and in whose ids they are kept."""

    NONE = "none"  # nowhere: the root file system is read-only
    STORE = "store"  # below the store's data directory
    ELSEWHERE = "elsewhere"  # in a directory that the caller names, on any file system overlayfs can write to


class Ids(Enum):
    """In whose ids the files of an upper are kept."""

    CONTAINER = "container"  # a commit is right as it is, and another range can use it
    HOST = "host"  # what older kernels and the usual code do


@dataclass(frozen=True, slots=True)
class RootDirectory:
    """Attributes of the image's root directory, in the container's ids; a fresh upper takes them on."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class RootfsSpec:
    """One root file system, but for what differs between two containers of the same image.

    `layers` are directories below the store's data directory, lowest first; `flat` the flat tree of the same chain,
    `erofs` an EROFS image of it, which is taken before `flat`, and `shifted` a copy of it with changed owners, where
    they exist. `top` is an empty directory with the attributes of the image's root, where the topmost layer's own root
    has others: overlayfs without an upper shows those of its topmost lower. `uppers` is the directory below it that
    holds the uppers of Upper.STORE; a fresh upper is made by the plan, all of it or (`upper_made`) what goes into its
    directory. `scratch_bytes` is the length of the temporary names that the run will use: the usual code changes its
    form by the length of mount options.
    """

    layers: tuple[str, ...]
    flat: str | None = None
    erofs: str | None = None
    top: str | None = None
    shifted: str | None = None
    upper: Upper = Upper.STORE
    uppers: str = "uppers"
    fresh_upper: bool = True
    upper_made: bool = False
    root: RootDirectory = field(default_factory=RootDirectory)
    attach: Attach = Attach.HOST
    make_target: bool = False
    scratch_bytes: int = 48


def require_idmapped_layers(facts: HostFacts, strategy: str) -> None:
    """Refuse, in one line, a host whose kernel or file system cannot id-map layers."""
    if not facts.idmapped_mounts:
        raise MissingFeature(
            f"strategy {strategy} needs id-mapped mounts, which the store's file system does not take",
            hint="put the store on ext4, xfs, btrfs or (Linux 6.3) tmpfs, or ask for --strategy chown",
        )
    if not facts.idmapped_layers:
        raise MissingFeature(
            f"strategy {strategy} needs overlayfs over id-mapped layers (Linux 5.19), which this kernel refuses",
            hint="`flatmount probe` shows what it has; --strategy chown copies instead",
        )


def lowers_of(spec: RootfsSpec, strategy: str) -> tuple[str, ...]:
    """The layers, topmost first as overlayfs lists them, for a strategy that hands each of them over."""
    if not spec.layers:
        raise UsageError("the image has no layers", hint="strategy flat takes it: its flat tree is an empty directory")
    if len(spec.layers) > MOST_LOWERS:
        raise TooManyLayers(
            f"strategy {strategy} hands all {len(spec.layers)} layers to overlayfs, whose limit is {MOST_LOWERS}",
            hint="--strategy flat has no such limit",
        )
    return spec.layers[::-1]
