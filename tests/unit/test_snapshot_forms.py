"""What containerd is told to mount, for each kind of snapshot and each form: always one mount."""

from __future__ import annotations

import pytest

from flatmount.errors import MappingError
from flatmount.plan.mapping import Mapping
from flatmount.snapshotter.forms import (
    OVERLAY_OPTIONS,
    form_for,
    helper_answer,
    helper_plan,
    keeps_host_ids,
    lowers_of,
    mapping_of,
    plain_answer,
)
from flatmount.snapshotter.model import GID_LABEL, REF_LABEL, UID_LABEL, Form, Info, InvalidRequest, Kind, Snapshot
from flatmount.snapshotter.ranges import range_name
from flatmount.snapshotter.trees import inverted

RANGE = Mapping.single(100000)


def snapshot(kind: Kind, *, parent: str = "", mapping: Mapping | None = None) -> Snapshot:
    return Snapshot(9, Info("key", parent, kind, 0, 0), mapping, Form.OVERLAY, False, False)


def test_lowers_end_at_the_first_flat_chain() -> None:
    assert lowers_of((5, 4, 3, 2), set()) == tuple(f"snapshots/{n}/fs" for n in (5, 4, 3, 2))
    assert lowers_of((5, 4, 3, 2), {3}) == ("snapshots/5/fs", "snapshots/4/fs", "snapshots/3/flat")
    assert lowers_of((5, 4, 3, 2), {5, 3}) == ("snapshots/5/flat",)
    assert lowers_of((), {5}) == ()


@pytest.mark.parametrize(("kind", "writable"), [(Kind.ACTIVE, "rw"), (Kind.VIEW, "ro")])
def test_without_a_parent_it_is_a_bind_of_its_own_files(kind: Kind, writable: str) -> None:
    mount = plain_answer(snapshot(kind), (), data="/d", tree="/r")
    assert (mount.type, mount.source, mount.options) == ("bind", "/r/snapshots/9/fs", (writable, "rbind"))


def test_a_container_gets_an_overlay_whose_upper_is_not_in_the_mapped_tree() -> None:
    mount = plain_answer(snapshot(Kind.ACTIVE, parent="p"), ("snapshots/5/flat",), data="/d", tree="/r")
    assert mount.type == "overlay"
    assert mount.options == (
        "workdir=/d/snapshots/9/work",
        "upperdir=/d/snapshots/9/fs",
        "lowerdir=/r/snapshots/5/flat",
        *OVERLAY_OPTIONS,
    )


def test_a_view_of_one_lower_is_one_read_only_bind() -> None:
    mount = plain_answer(snapshot(Kind.VIEW, parent="p"), ("snapshots/5/flat",), data="/d", tree="/r")
    assert (mount.type, mount.source, mount.options) == ("bind", "/r/snapshots/5/flat", ("ro", "rbind"))
    two = plain_answer(snapshot(Kind.VIEW, parent="p"), ("snapshots/5/fs", "snapshots/4/fs"), data="/d", tree="/r")
    assert "ro" in two.options
    assert "lowerdir=/r/snapshots/5/fs:/r/snapshots/4/fs" in two.options
    assert not any(option.startswith("upperdir") for option in two.options)


@pytest.mark.parametrize("configured", list(Form))
def test_only_containers_take_the_configured_form(configured: Form) -> None:
    assert form_for(Info("k", "p", Kind.ACTIVE, 0, 0), configured) is configured
    assert form_for(Info("k", "", Kind.ACTIVE, 0, 0), configured) is Form.OVERLAY
    assert form_for(Info("k", "p", Kind.VIEW, 0, 0), configured) is Form.OVERLAY
    assert form_for(Info("k", "p", Kind.ACTIVE, 0, 0, {REF_LABEL: "sha256:x"}), configured) is Form.OVERLAY


def test_in_whose_ids_a_container_writes() -> None:
    container = Info("k", "p", Kind.ACTIVE, 0, 0)
    assert not keeps_host_ids(container, None, Form.OVERLAY, idmapped_upper=True)
    assert keeps_host_ids(container, RANGE, Form.OVERLAY, idmapped_upper=True)
    assert not keeps_host_ids(container, RANGE, Form.BIND, idmapped_upper=True)
    assert keeps_host_ids(container, RANGE, Form.HELPER, idmapped_upper=False)
    assert not keeps_host_ids(Info("k", "", Kind.ACTIVE, 0, 0), RANGE, Form.OVERLAY, idmapped_upper=True)


def test_the_helper_is_named_by_path_and_told_everything_in_a_file() -> None:
    mount = helper_answer("/lib/flatmount-assemble", "/run/plans/9")
    assert (mount.type, mount.source) == ("fuse3./lib/flatmount-assemble", "/run/plans/9")
    mapping = Mapping.parse("0:1000:1,1:100000:65535")
    text = helper_plan(snapshot(Kind.ACTIVE, parent="p", mapping=mapping), ("a/fs", "b/fs"), data="/d", detached=False)
    assert text.splitlines() == [
        "data /d",
        "lower a/fs",
        "lower b/fs",
        "upper snapshots/9/fs",
        "work snapshots/9/work",
        "uid 0 1000 1",
        "uid 1 100000 65535",
        "gid 0 1000 1",
        "gid 1 100000 65535",
        "ids container",
        "layers attached",
    ]


def test_mappings_come_in_two_labels() -> None:
    assert mapping_of({}) is None
    assert mapping_of({UID_LABEL: "0:100000:65536", GID_LABEL: "0:100000:65536"}) == RANGE
    several = {UID_LABEL: "0:1000:1,1:100000:65535", GID_LABEL: "0:100000:65536"}
    assert mapping_of(several) == Mapping.parse(several[UID_LABEL], several[GID_LABEL])
    for half in (UID_LABEL, GID_LABEL):
        with pytest.raises(InvalidRequest):
            mapping_of({half: "0:100000:65536"})
    with pytest.raises(MappingError):
        mapping_of({UID_LABEL: "nonsense", GID_LABEL: "0:1:1"})


def test_ranges_have_names_of_their_own() -> None:
    assert range_name(RANGE) == "100000-65536"
    others = [Mapping.parse("0:1000:1,1:100000:65535"), Mapping.parse("0:100000:65536", "0:200000:65536")]
    others.append(Mapping.parse("5:100000:65536"))
    assert len({range_name(mapping) for mapping in (RANGE, *others)}) == 4


def test_host_ids_lead_back_to_the_containers() -> None:
    back = inverted(Mapping.parse("0:1000:1,1:100000:65535"))
    assert [back.host_uid(uid) for uid in (0, 1000, 100000, 100006)] == [0, 0, 1, 7]
    assert inverted(Mapping.single(0)).host_uid(5) == 5
