"""What the service writes on the wire by itself is what the messages of the interface would be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatmount.snapshotter.model import Mount
from flatmount.snapshotter.service import _mounts
from flatmount.snapshotter.wire import snapshots_pb2 as wire

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=300)


@given(TEXTS, TEXTS, st.lists(TEXTS, max_size=8))
def test_a_mount_is_written_as_the_interface_has_it(kind: str, source: str, options: list[str]) -> None:
    read = wire.MountsResponse.FromString(_mounts(Mount(kind, source, tuple(options))))
    assert read == wire.MountsResponse(mounts=[wire.Mount(type=kind, source=source, options=options)])


def test_a_long_one_too() -> None:
    options = tuple("x" * length for length in (0, 127, 128, 16383, 16384, 70000))
    (mount,) = wire.MountsResponse.FromString(_mounts(Mount("overlay", "overlay", options))).mounts
    assert tuple(mount.options) == options
