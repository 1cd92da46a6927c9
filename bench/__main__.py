"""Run the named sections, or all of them."""

from __future__ import annotations

import os
import subprocess
import sys

from bench.measure import machine
from flatmount.storm.limits import allow_descriptors

SECTIONS = ("assemble", "storms", "unpack", "flat", "starts", "ways", "looking", "snapshotter")
_MOST_AT_ONCE = 1000


def main() -> int:
    """Each section in a process of its own: it moves into a mount namespace of its own."""
    wanted = sys.argv[1:] or list(SECTIONS)
    unknown = [name for name in wanted if name.partition(":")[0] not in SECTIONS]
    if unknown:
        print(f"bench: there is no section {unknown[0]!r}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: makes mounts; run it as root", file=sys.stderr)
        return 1
    # Bursts hold two descriptors for each range; the sections are our children and have what we have.
    allow_descriptors(_MOST_AT_ONCE, _MOST_AT_ONCE)
    print(machine(), flush=True)
    print(flush=True)
    failed = 0
    for name in wanted:
        section, _, part = name.partition(":")  # a section may have parts of its own: starts:layers
        code = f"from bench.{section} import run; run({repr(part) if part else ''})"
        failed |= subprocess.run([sys.executable, "-c", code], check=False).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
