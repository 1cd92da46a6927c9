"""What the doctor concludes from states of nodes, and from recorded output of engines and journals."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from flatmount.cli.main import main
from flatmount.errors import EXIT_USAGE
from flatmount.observe.causes import Calls
from flatmount.observe.doctor import checks, engine_checks, snapshotters, software
from flatmount.observe.doctor.checks import diagnose
from flatmount.observe.doctor.findings import Diagnosis, Finding, Severity, verdict
from flatmount.observe.doctor.gather import causes_of
from flatmount.observe.doctor.pages import PAGES
from flatmount.observe.doctor.software import classify_time_outs, content_images, parse_version, storage_images
from flatmount.observe.doctor.state import (
    Cause,
    Engine,
    Image,
    LayerStore,
    NodeState,
    System,
    Table,
    TimeOut,
    Watcher,
)
from flatmount.observe.leak_results import Holder, Kind, Leak
from flatmount.observe.owners import Owner, owner_of, temporary_owner
from flatmount.observe.processes import place_of
from flatmount.report.doctor import npd_line, render_diagnosis

SYSTEM = System("6.18.0", 8, 1, 2, 1, 2000, 1 << 20, 96365, 96365, 3.0, 0.0, 0.1)
TABLE = Table(60, 100_000, 0.5, 0.0, ((Owner.SYSTEM, 40), (Owner.KUBELET, 20)), 1, "/")
HEALTHY = NodeState(
    table=TABLE,
    init_name="systemd",
    init_cpu_share=0.01,
    watchers=(Watcher(1, "systemd", "/init.scope", 0.01), Watcher(700, "udisksd", "/system.slice/udisks2", 0.0)),
    causes=(Cause(900, "containerd", "/system.slice/containerd.service", 12.0, 6.0, 1.0, 1.0),),
    engines=(
        Engine("containerd", (2, 2, 1), "containerd v2.2.1", "/usr/bin/containerd", True),
        Engine("runc", (1, 3, 0), "runc version 1.3.0", "/usr/bin/runc", False),
    ),
    images=(Image("containerd", "image abc", 60),),
    stores=(LayerStore("containerd", "/var/lib/containerd/x", "ext4", ""),),
    system=SYSTEM,
    time_outs=(TimeOut("a deadline was exceeded", 1, "once"),),
    leaks=(),
    unseen=(),
)


def ids(state: NodeState) -> dict[str, Severity]:
    return {finding.id: finding.severity for finding in diagnose(state)}


def only(state: NodeState) -> Finding:
    (finding,) = diagnose(state)
    return finding


def leak(number: int, *, here: bool = True) -> Leak:
    holder = Holder("mount namespace", 77, "sleeper", 4026532000, 1)
    point = f"/tmp/ovl-idmapped{number}"
    return Leak(Kind.TEMPORARY, Owner.CONTAINERD, number, point, "8:1", "/layer", here, False, (holder,))


def engine(name: str, *version: int) -> NodeState:
    one = Engine(name, (version[0], version[1], version[2]), f"{name} said", f"/usr/bin/{name}", True)
    return replace(HEALTHY, engines=(one,))


def test_a_healthy_node_has_nothing() -> None:
    assert diagnose(HEALTHY) == ()
    assert verdict((), ()) == "Nothing points to mounts as this node's trouble."
    assert "as far as could be seen" in verdict((), ("descriptors",))


def test_a_per_layer_storm_is_told_from_a_constant_one() -> None:
    per_layer = Cause(10, "containerd", "/system.slice/containerd.service", 2000.0, 1000.0, 980.0, 20.0)
    constant = Cause(11, "flatmount", "/", 2000.0, 1000.0, 900.0, 900.0)
    finding = only(replace(HEALTHY, causes=(per_layer,)))
    assert (finding.id, finding.severity) == ("per-layer-assembly", Severity.CRITICAL)
    assert finding.owner == "containerd in /system.slice/containerd.service"
    assert "49 id-mapped mounts for each root file system" in finding.evidence[1]
    assert "2.0.7" in finding.remedy
    assert only(replace(HEALTHY, causes=(constant,))).id == "mount-storm"


def test_many_small_causes_are_a_storm_together() -> None:
    causes = tuple(Cause(0, "runc", "", 40.0, 20.0, 0.0, 10.0) for _ in range(3))
    finding = only(replace(HEALTHY, causes=causes))
    assert finding.id == "mount-storm"
    assert finding.evidence[0] == "runc (processes that ended): 40 a second"


def test_leaks_are_named_with_owner_holder_and_where() -> None:
    finding = only(replace(HEALTHY, leaks=tuple(leak(i) for i in range(50))))
    assert (finding.id, finding.severity, finding.owner) == ("leaked-mounts", Severity.WARNING, "containerd")
    assert "sleeper [77] (50)" in finding.evidence[1]
    assert "leaks --clean" in finding.remedy
    foreign = only(replace(HEALTHY, leaks=(leak(1, here=False),)))
    assert "whose namespaces hold them" in foreign.remedy
    assert "restart containerd" in only(replace(HEALTHY, leaks=(replace(leak(1), kind=Kind.LAYER_WORK),))).remedy
    assert only(replace(HEALTHY, leaks=tuple(leak(i) for i in range(1000)))).severity is Severity.CRITICAL


@pytest.mark.parametrize(
    ("mounts", "limit", "found"),
    [
        (4_999, 100_000, {}),
        (5_000, 100_000, {"table-large": Severity.WARNING}),
        (20_000, 100_000, {"table-large": Severity.CRITICAL}),
        (4_000, 5_000, {"mount-max": Severity.WARNING}),
        (4_600, 5_000, {"mount-max": Severity.CRITICAL}),
    ],
)
def test_table_lengths(mounts: int, limit: int, found: dict[str, Severity]) -> None:
    table = replace(TABLE, mounts=mounts, limit=limit, owners=((Owner.KUBELET, mounts - 10), (Owner.SYSTEM, 10)))
    state = replace(HEALTHY, table=table)
    assert ids(state) == found
    if "table-large" in found:
        assert diagnose(state)[0].owner == "kubelet"


def test_watchers_loops_limits_and_shape() -> None:
    watcher = Watcher(700, "udisksd", "/system.slice/udisks2", 0.6)
    assert only(replace(HEALTHY, watchers=(watcher,))).owner == "udisksd in /system.slice/udisks2"
    assert only(replace(HEALTHY, init_cpu_share=0.4)).owner == "systemd"
    assert only(replace(HEALTHY, table=replace(TABLE, peers=9, peers_at="/data"))).id == "propagation-loop"
    assert ids(replace(HEALTHY, system=replace(SYSTEM, open_files=900_000))) == {"open-files": Severity.WARNING}
    assert ids(replace(HEALTHY, system=replace(SYSTEM, user_namespaces_limit=0))) == {
        "user-namespaces-off": Severity.WARNING
    }
    assert ids(replace(HEALTHY, system=replace(SYSTEM, sockets=2, cache_domains=2))) == {"topology": Severity.NOTE}
    assert ids(replace(HEALTHY, system=replace(SYSTEM, cpu_pressure=80.0))) == {"pressure": Severity.NOTE}
    assert ids(replace(HEALTHY, system=replace(SYSTEM, mount_namespaces_limit=100))) == {
        "few-mount-namespaces": Severity.NOTE
    }
    nfs = LayerStore("containerd", "/x", "nfs4", "mount_setattr: Invalid argument [EINVAL]")
    assert only(replace(HEALTHY, stores=(nfs,))).id == "no-idmapped-mounts"
    assert diagnose(replace(HEALTHY, stores=(replace(nfs, idmap=None),))) == ()
    assert only(replace(HEALTHY, time_outs=(TimeOut("PLEG is not healthy", 3, "line"),))).id == "time-outs"
    assert only(replace(HEALTHY, images=(Image("containerd", "deep", 400),))).id == "layer-limit"


@pytest.mark.parametrize(
    ("version", "generation", "found"),
    [
        ((1, 6, 20), "copy", {"containerd-copies": Severity.NOTE}),
        ((1, 7, 29), "copy", {"containerd-copies": Severity.NOTE}),
        ((2, 0, 0), "per-layer", {"containerd-per-layer": Severity.WARNING}),
        ((2, 0, 6), "per-layer", {"containerd-per-layer": Severity.WARNING}),
        ((2, 0, 7), "parent", {}),
        ((2, 1, 4), "per-layer", {"containerd-per-layer": Severity.WARNING}),
        ((2, 1, 5), "parent", {}),
        ((2, 2, 0), "parent", {}),
        ((2, 3, 0), "parent-parse", {"containerd-table-parse": Severity.NOTE}),
    ],
)
def test_generations_of_containerd(version: tuple[int, int, int], generation: str, found: dict[str, Severity]) -> None:
    assert engine_checks.containerd_generation(version) == generation
    assert ids(engine("containerd", *version)) == found


def test_what_a_start_costs_is_said_for_the_deepest_image() -> None:
    finding = only(engine("containerd", 2, 0, 5))
    assert "image abc has 60 layers: 288 for each start" in finding.evidence
    parse = replace(engine("containerd", 2, 3, 1), table=replace(TABLE, mounts=1_500))
    assert ids(parse) == {"containerd-table-parse": Severity.WARNING}


def test_what_a_start_of_each_image_costs_by_engine_and_store() -> None:
    images = (
        Image("containerd", "deep", 60),
        Image("containerd", "flat", 2),
        Image("podman or CRI-O", "shop", 30),
        Image("docker", "other", 3),
    )
    old = Engine("containerd", (2, 0, 5), "said", "/usr/bin/containerd", True)
    podman = Engine("podman", (4, 3, 1), "said", "/usr/bin/podman", False)
    crio = Engine("crio", (1, 24, 0), "said", "/usr/bin/crio", True)

    def costs(*engines: Engine) -> dict[str, int | None]:
        state = replace(HEALTHY, engines=engines, images=images)
        return {cost.name: cost.operations for cost in engine_checks.image_costs(state)}

    constant = engine_checks.start_operations(podman, 1)
    assert constant == engine_checks.start_operations(podman, 100)
    assert costs(old, podman) == {"deep": 288, "flat": 56, "shop": constant, "other": None}
    assert costs(replace(old, version=(2, 2, 0))) == {"deep": 57, "flat": 57, "shop": None, "other": None}
    assert costs(podman, crio)["shop"] is None, "the one that runs is meant, and copies"
    said = engine_checks.image_costs(replace(HEALTHY, engines=(old, podman), images=images))
    assert said[0].name == "deep"
    assert said[0].how == "containerd 2.0.5: four for each layer"
    assert said[-1].how == "its engine is not here"
    shown = Diagnosis("2026-01-31T12:00:00Z", "6.18", 1.5, 60, "fine", (), (), said)
    text = render_diagnosis(shown, width=100)
    assert "288  deep, 60 layers (containerd 2.0.5: four for each layer)" in text
    assert Diagnosis.from_json(json.loads(json.dumps(shown.to_json()))) == shown


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("runc", (1, 1, 5), {"runc-self-bind": Severity.NOTE}),
        ("runc", (1, 2, 0), {}),
        ("podman", (4, 0, 3), {"storage-copies": Severity.NOTE}),
        ("podman", (4, 3, 1), {}),
        ("crio", (1, 24, 0), {"storage-copies": Severity.NOTE}),
        ("crun", (0, 1, 0), {}),
    ],
)
def test_other_engines(name: str, version: tuple[int, int, int], found: dict[str, Severity]) -> None:
    assert ids(engine(name, *version)) == found


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3", (1, 6, 20)),
        ("containerd github.com/containerd/containerd/v2 v2.0.5 fb4c30d4ede3", (2, 0, 5)),
        ("runc version 1.1.5+ds1", (1, 1, 5)),
        ("runc version 1.2.0-rc.1", (1, 2, 0)),
        ("podman version 4.3.1", (4, 3, 1)),
        ("crio version 1.28.1", (1, 28, 1)),
        ("Docker version 28.0, build x", (28, 0, 0)),
        ("no version", None),
    ],
)
def test_versions_as_programs_say_them(said: str, version: tuple[int, int, int] | None) -> None:
    assert parse_version(said) == version


def test_engines_are_asked_and_broken_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("containerd", "containerd containerd.io v2.1.4 x"), ("runc", "broken"), ("crio", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(software, "_PROGRAMS", ("containerd", "runc", "crio"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (found,) = software.engines(())
    assert (found.name, found.version, found.running) == ("containerd", (2, 1, 4), False)


def test_layers_of_images_are_read_from_stores(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(json.dumps({"rootfs": {"diff_ids": ["sha256:1", "sha256:2"]}}))
    (tmp_path / "b").write_text('{"diff_ids"')
    (tmp_path / "c").write_bytes(b"\x1f\x8b")
    assert [image.layers for image in content_images(str(tmp_path), time.monotonic() + 60)] == [2]
    assert content_images(str(tmp_path / "none"), time.monotonic() + 60) == ()
    for directory in ("overlay-images", "overlay-layers"):
        (tmp_path / directory).mkdir()
    images = [{"id": "i" * 64, "layer": "3", "names": ["demo:1"]}, {"id": "j" * 64, "layer": "9"}]
    (tmp_path / "overlay-images/images.json").write_text(json.dumps(images))
    layers = [{"id": "1"}, {"id": "2", "parent": "1"}, {"id": "3", "parent": "2"}, {"id": "9", "parent": "9"}]
    (tmp_path / "overlay-layers/layers.json").write_text(json.dumps(layers))
    assert [(image.name, image.layers) for image in storage_images(str(tmp_path))] == [
        ("demo:1", 3),
        ("image jjjjjjjjjjjj", 1),
    ]


def test_time_outs_in_a_journal() -> None:
    lines = [
        "E0101 kubelet.go:1 PLEG is not healthy: pleg was last seen active 3m0s ago",
        'level=error msg="CreateContainer failed" error="failed to reserve container name x: reserved for y"',
        'E0101 "CreatePodSandbox for pod failed" err="code = DeadlineExceeded desc = context deadline exceeded"',
        'E0101 "StartContainer from runtime service failed" err="rpc error: code = DeadlineExceeded"',
        'level=info msg="fine"',
    ]
    found = {one.what: one.count for one in classify_time_outs(lines)}
    assert found == {
        "PLEG is not healthy": 1,
        "a container name is still reserved": 1,
        "a pod sandbox was not made in time": 1,
        "a container was not made in time": 1,
    }


def test_what_the_configuration_says_is_found_for_the_containerd_that_is_here() -> None:
    ours = snapshotters.Snapshotter("flatmount", "/etc/containerd/config.toml", 3, "/run/x.sock", True, ours=True)
    assert only(replace(HEALTHY, snapshotter=ours)).id == "snapshotter-not-unpacked"
    old = engine("containerd", 1, 7, 29)
    assert ids(replace(old, snapshotter=ours)) == ids(old)


def test_every_finding_has_a_page_and_no_page_is_left_over(capsys: pytest.CaptureFixture[str]) -> None:
    source = "".join(Path(module.__file__).read_text() for module in (checks, engine_checks, snapshotters))
    assert all(f'"{name}",' in source for name in PAGES)
    assert source.count("Finding(\n") == len(PAGES)
    assert main(["doctor", "--explain", "leaked-mounts"]) == 0
    assert "umount" in capsys.readouterr().out
    assert main(["doctor", "--explain", "nonsense"]) == EXIT_USAGE


def diagnosis(*findings: Finding) -> Diagnosis:
    return Diagnosis("2026-01-31T12:00:00Z", "6.18", 1.5, 60, verdict(findings, ()), findings, ("descriptors",))


def test_what_is_shown() -> None:
    seen = diagnosis(*diagnose(replace(HEALTHY, leaks=(leak(1),), system=replace(SYSTEM, cpu_pressure=80.0))))
    assert not seen.healthy
    assert Diagnosis.from_json(json.loads(json.dumps(seen.to_json()))) == seen
    text = render_diagnosis(seen, width=60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert text.startswith("Mounts are hurting this node: 1 temporary mounts of")
    assert "\x1b[" not in text and "\x1b[33m" in render_diagnosis(seen, colour=True)
    assert "not seen: descriptors" in text


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_line_for_node_problem_detector_is_short(count: int) -> None:
    title = "a very long title that goes on and on " * 4
    findings = tuple(Finding("x", Severity.WARNING, title, (), "o", "r", True) for _ in range(count))
    line = npd_line(diagnosis(*findings))
    assert len(line) <= 80 and "\n" not in line
    assert ("(+2)" in line) == (count == 3)


@pytest.mark.parametrize(
    ("point", "owner", "temporary"),
    [
        ("/tmp/ovl-idmapped123", Owner.CONTAINERD, True),
        ("/var/lib/containerd/tmpmounts/containerd-mount42", Owner.CONTAINERD, False),
        ("/tmp/containerd-mount42/dev", Owner.CONTAINERD, False),
        ("/var/lib/containers/storage/overlay/ab/mapped/0", Owner.PODMAN, True),
        ("/run/containerd/runc/k8s.io/cfd7/runc.9xc3s6", Owner.RUNC, True),
        ("/run/containerd/io.containerd.runtime.v2.task/k8s.io/x/rootfs", Owner.CONTAINERD, False),
        ("/var/lib/kubelet/pods/u/volumes/v", Owner.KUBELET, False),
        ("/var/lib/docker/overlay2/x/merged", Owner.DOCKER, False),
        ("/home", Owner.SYSTEM, False),
    ],
)
def test_owners(point: str, owner: Owner, temporary: bool) -> None:
    assert owner_of(point) is owner
    assert (temporary_owner(point) is not None) == temporary


ID = "0123456789abcdef" * 4
POD = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.mark.parametrize(
    ("content", "container", "pod"),
    [
        (f"0::/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/cri-containerd-{ID}.scope\n", ID, POD),
        (f"5:pids:/kubepods/burstable/pod{POD}/{ID}\n1:name=systemd:/x\n0::/\n", ID, POD),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", ID, ""),
        (f"0::/system.slice/docker-{ID}.scope\n", ID, ""),
        ("0::/system.slice/containerd.service\n", "", ""),
        ("", "", ""),
    ],
)
def test_containers_and_pods_by_cgroup(content: str, container: str, pod: str) -> None:
    place = place_of(content)
    assert (place.container, place.pod) == (container, pod)


def test_calls_of_processes_that_ended_count_under_their_name() -> None:
    calls = Calls()
    gone = (1 << 22) + 5
    for thread in (gone, gone + 1):
        calls.take(f"  runc-{thread} ( {thread}) [000] 1.000000: sys_mount(dev_name: 0, dir_name: 1, flags: 0x1000)")
        calls.take(f"  runc-{thread} ( {thread}) [000] 1.000000: sys_mount(dev_name: 0, dir_name: 1, flags: 0x44000)")
        calls.take(f"  runc-{thread} ( {thread}) [000] 1.000000: sys_umount(name: 0x5, flags: 2)")
    assert calls.counts == Counter({(thread, call): 1 for thread in (gone, gone + 1) for call in ("mount", "umount")})
    (cause,) = causes_of(calls.drain(), calls.names, 2.0)
    assert (cause.pid, cause.name, cause.operations, cause.attaches) == (0, "runc", 2.0, 1.0)
    assert not calls.counts
