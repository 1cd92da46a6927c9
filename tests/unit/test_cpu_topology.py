"""Topologies from recorded trees: sockets, caches, siblings, holes, limits; placements; and their pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.cpu.placements import find_placement, placements, thread_counts
from flatmount.cpu.schedule import plan_bench, relation
from flatmount.cpu.topology import format_list, parse_list, read_topology
from flatmount.errors import FlatmountError, UsageError
from flatmount.report.cpu import topology_page
from flatmount.report.cpu_text import topology_text
from tests.unit.sysfs_trees import NAMES, grow, recorded

# sockets, nodes, level-3 caches, cores, processors
SHAPES = {
    "vm": (1, 1, 1, 2, 2),
    "r5-metal": (2, 2, 2, 48, 96),
    "genoa": (1, 1, 12, 96, 96),
    "sapphire-rapids": (1, 1, 1, 48, 96),
    "sapphire-rapids-snc4": (1, 4, 1, 48, 96),
    "graviton": (1, 1, 1, 62, 62),
}


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_recorded_machines(name: str) -> None:
    found = recorded(name)
    shape = tuple(map(len, (found.packages, found.nodes, found.l3_domains, found.cores, found.cpus)))
    assert shape == SHAPES[name]


def test_core_ids_with_holes_number_cores_without() -> None:
    found = recorded("r5-metal")
    ids = {cpu.core_id for cpu in found.cpus}
    assert max(ids) >= len(ids) and 6 not in ids
    assert sorted({cpu.core for cpu in found.cpus}) == list(range(48))
    # The same core_id on both sockets is two cores.
    assert found.cpu(0).core_id == found.cpu(24).core_id and found.cpu(0).core != found.cpu(24).core
    assert found.cores[found.cpu(0).core] == (0, 48)


def test_order_puts_neighbours_beside_each_other() -> None:
    found = recorded("r5-metal")
    order = found.in_order
    assert order[:2] == (0, 1) and set(order[:48]) == set(found.packages[0])
    assert order.index(48) == 24


def test_distances_and_nodes_of_sub_numa_clustering() -> None:
    found = recorded("sapphire-rapids-snc4")
    assert found.nodes[2].distances == (12, 12, 10, 12)
    assert found.cpu(24).node == 2 and found.cpu(72).node == 2


def test_offline_cgroup_and_quota() -> None:
    found = recorded("graviton")
    assert found.offline == (62, 63)
    assert found.allowed == tuple(range(32))
    assert found.quota_cpus == 16.0
    assert any("no level-3 cache is described" in line for line in found.hidden)


def test_what_a_hypervisor_hides_is_said() -> None:
    vm = recorded("vm")
    metal = recorded("r5-metal")
    assert vm.hypervisor and any("may share a core" in line for line in vm.hidden)
    assert metal.hypervisor is None and metal.hidden == ()
    assert recorded("genoa").hypervisor == "Amazon EC2"


def test_no_sysfs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FlatmountError, match="tells of no processor") as caught:
        read_topology(str(tmp_path))
    assert "recorded tree" in caught.value.hint


def test_without_sysfs_the_rest_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmount.cpu.topology._CPUS", "sys/nowhere")
    found = read_topology()
    assert {cpu.number for cpu in found.cpus} == os.sched_getaffinity(0) == set(found.allowed)
    assert any("there is no sysfs" in line for line in found.hidden)
    assert "there is no sysfs" in topology_text(found).replace("\n  ", " ")


def test_masks_do_where_an_older_kernel_has_no_lists(tmp_path: Path) -> None:
    grow("r5-metal", tmp_path)
    expected = read_topology(str(tmp_path))
    for path in [*tmp_path.rglob("*list"), *tmp_path.rglob("online")]:
        if path.parent.name in ("cpu", "node") or path.name == "online":
            path.unlink()
            continue
        number = sum(1 << n for n in parse_list(path.read_text()))
        words = [f"{number >> 32 * i & 0xFFFFFFFF:08x}" for i in reversed(range(3))]
        name = {"cpulist": "cpumap", "shared_cpu_list": "shared_cpu_map"}.get(path.name, path.name[: -len("_list")])
        path.with_name(name).write_text(",".join(words) + "\n")
        path.unlink()
    found = read_topology(str(tmp_path))
    assert (found.packages, found.nodes, found.cores) == (expected.packages, expected.nodes, expected.cores)
    assert found.l3_domains == expected.l3_domains and found.cpus == expected.cpus


def test_this_machine_is_read_too() -> None:
    found = read_topology()
    assert found.cpus and set(found.allowed) <= {cpu.number for cpu in found.cpus}


@given(st.sets(st.integers(0, 500)))
def test_lists_come_back_as_they_went(numbers: set[int]) -> None:
    assert set(parse_list(format_list(numbers))) == numbers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vm", {"one-l3": 2}),
        ("r5-metal", {"smt-pair": 2, "one-l3": 24, "one-per-l3": 2, "socket-smt": 48, "all": 48, "all-smt": 96}),
        ("genoa", {"one-l3": 8, "one-per-l3": 12, "socket": 96}),
        ("sapphire-rapids", {"smt-pair": 2, "one-l3": 48, "socket-smt": 96}),
        ("graviton", {"one-l3": 32}),
    ],
)
def test_placements_are_distinct_sets(name: str, expected: dict[str, int]) -> None:
    found = placements(recorded(name))
    assert {p.name: len(p.cpus) for p in found} == expected
    assert len({frozenset(p.cpus) for p in found}) == len(found)


def test_a_socket_without_siblings_has_a_thread_on_each_core() -> None:
    found = recorded("r5-metal")
    one_l3 = find_placement("one-l3", found)
    assert one_l3.distinct_cores == len(one_l3.cpus) == 24
    assert find_placement("socket-smt", found).distinct_cores == 24
    assert find_placement("one-per-l3", found).cpus == (0, 24)
    assert thread_counts(one_l3) == (1, 2, 4, 8, 16, 24)


def test_an_affinity_mask_of_one_processor(tmp_path: Path) -> None:
    grow("r5-metal", tmp_path)
    found = read_topology(str(tmp_path), allowed=[3])
    assert found.allowed == (3,)
    assert [p.cpus for p in placements(found)] == [(3,)]
    plan = plan_bench(found, 30, bursts=False)
    assert any("one processor" in line for line in plan.left_out) and plan.pairs == ()


def test_relations_of_pairs() -> None:
    r5 = recorded("r5-metal")
    assert [relation(r5, 0, other) for other in (48, 1, 24)] == ["sibling", "same L3", "other socket"]
    assert relation(recorded("genoa"), 0, 8) == "same socket"


def test_an_unknown_placement_names_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        find_placement("socket", recorded("vm"))
    assert "one-l3" in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_every_processor(name: str) -> None:
    found = recorded(name)
    text, html = topology_text(found), topology_page(found)
    words = set(text.replace("[", " ").replace("]", " ").replace("|", " ").split())
    for cpu in found.cpus:
        assert str(cpu.number) in words
        assert f">{cpu.number}</text>" in html
    assert max(map(len, text.splitlines())) <= 120
    assert "://" not in html and "<script" not in html
