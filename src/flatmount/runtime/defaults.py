"""What every container gets that nobody said anything about: the defaults that people know from containerd."""

from __future__ import annotations

from typing import Any, Final

PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES: Final = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)

MASKED_PATHS: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)

READ_ONLY_PATHS: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def mounts(*, host_network: bool) -> list[dict[str, Any]]:
    """The file systems of every container, in the order in which they are mounted."""
    nothing = ["nosuid", "noexec", "nodev"]
    # A network namespace that the container's user namespace does not own gives no right to mount its sysfs.
    sysfs = _mount("/sys", "bind", "/sys", ["rbind", *nothing, "ro"]) if host_network else None
    return [
        _mount("/proc", "proc", "proc", nothing),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        _mount("/dev/shm", "tmpfs", "shm", [*nothing, "mode=1777", "size=65536k"]),
        _mount("/dev/mqueue", "mqueue", "mqueue", nothing),
        sysfs or _mount("/sys", "sysfs", "sysfs", [*nothing, "ro"]),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*nothing, "relatime", "ro"]),
    ]


def devices() -> list[dict[str, Any]]:
    """Which devices the container's cgroup lets through: what every program expects in `/dev`, and terminals."""
    allowed: tuple[tuple[int, int | None], ...] = (
        (1, 3),  # null
        (1, 8),  # random
        (1, 7),  # full
        (5, 0),  # tty
        (1, 5),  # zero
        (1, 9),  # urandom
        (5, 1),  # console
        (136, None),  # pts
        (5, 2),  # ptmx
    )
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    # Making a node is harmless (a user namespace refuses it); opening one is what is ruled.
    rules += ({"allow": True, "type": kind, "access": "m"} for kind in "cb")
    for major, minor in allowed:
        rule: dict[str, Any] = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        rules.append(rule if minor is None else rule | {"minor": minor})
    return rules


def _mount(destination: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": options}
