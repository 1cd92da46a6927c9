"""python -m fuzz NEW KNOWN [libFuzzer options]: new inputs are kept in the directory NEW; see Makefile."""

from __future__ import annotations

import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["flatmount.image", "flatmount.store"]):
    from fuzz.layer import Arena, with_checksums


def main() -> None:
    """Hand over to libFuzzer, which ends the process."""
    with tempfile.TemporaryDirectory(prefix="flatmount-fuzz-", dir="/dev/shm") as place:
        arena = Arena(place)

        def one(data: bytes) -> None:
            arena.try_layer(with_checksums(data))

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


main()
