"""The limit of open descriptors, raised to what a storm needs before it begins."""

from __future__ import annotations

import resource
from typing import Final

from flatmount.errors import FlatmountError

# A range is its user namespace and its pinned parent. A start in flight has the upper's directory, the overlay's
# context and mount, and what the check inside opens. The rest is the store, the probe, watchers and Python itself.
_EACH_RANGE: Final = 2
_EACH_START: Final = 8
_AND_SOME: Final = 128


def needed_descriptors(containers: int, concurrency: int) -> int:
    """How many descriptors `containers` that stand at once hold while `concurrency` of them are being started."""
    return _EACH_RANGE * containers + _EACH_START * min(concurrency, containers) + _AND_SOME


def allow_descriptors(containers: int, concurrency: int, *, layers: int = 0) -> None:
    """Raise this process's soft limit of open descriptors (RLIMIT_NOFILE) to what is needed, never lower it.

    The limit also leaves room for one descriptor for each of `layers` and start, which strategies that clone every
    layer take, as far as the hard limit goes. Children inherit it. Raises: FlatmountError where even the hard limit is
    below what is needed. See: getrlimit(2).
    """
    needed = needed_descriptors(containers, concurrency)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FlatmountError(
            f"{containers} containers need {needed} open descriptors, and the hard limit is {hard}",
            hint=f"raise it (ulimit -Hn {needed}, LimitNOFILE= of a unit), or ask for fewer --containers",
        )
    wanted = needed + layers * min(concurrency, containers)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
