"""Requests, documents, ranges, records and a runtime's words: everything about containers that is plain data."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmount.errors import FlatmountError, InUse, MissingFeature, UsageError
from flatmount.image import ImageConfig
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import Mount, MoveMount, OpenTree, Setns
from flatmount.runtime import bundle, seccomp, subids, template
from flatmount.runtime.oci import ContainerError, NotExecutable, NotFound, Runtime, refused, signal_number
from flatmount.runtime.records import Containers, Exit, Record, State
from flatmount.runtime.request import Attachment, Limits, Network, Request, Volume, parse_cpus, parse_env, parse_memory
from flatmount.runtime.users import User
from flatmount.store.database import Database
from flatmount.store.ranges import HostIds, Ranges

IMAGE = ImageConfig(
    architecture="amd64", os="linux", variant="", user="", env=("A=1", "PATH=/x"), entrypoint=("/entry",),
    cmd=("one", "two"), workdir="/work", stop_signal="", labels=(), diff_ids=(), created="",
)  # fmt: skip
ROOT = User(0, 0, (), "/root")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(), ("/entry", "one", "two")),
        (Request(command=("three",)), ("/entry", "three")),
        (Request(entrypoint=("/other",)), ("/other",)),
        (Request(entrypoint=("/other",), command=("x",)), ("/other", "x")),
    ],
)
def test_which_words_are_executed(request_: Request, expected: tuple[str, ...]) -> None:
    assert bundle.arguments_of(request_, IMAGE) == expected


def test_the_environment_has_each_name_once_and_the_callers_word_last() -> None:
    process = bundle.process_of(Request(env=("A=2", "HOME=/h")), IMAGE, ROOT, "box")
    assert dict(text.split("=", 1) for text in process.env) == {
        "PATH": "/x", "A": "2", "HOSTNAME": "box", "HOME": "/h",
    }  # fmt: skip
    assert process.cwd == "/work"
    assert len(process.env) == 4


def document(request: Request, *, unified: bool = False) -> dict[str, object]:
    process = bundle.process_of(request, IMAGE, ROOT, "box")
    mapping = Mapping.single(100000)
    return bundle.specification(
        container_id="c", bundle="/b", process=process, user=ROOT, mapping=mapping, request=request, unified=unified
    )


def test_the_document_says_what_was_asked_for() -> None:
    limits = Limits(memory_bytes=1 << 26, cpus=1.5, pids=7)
    volumes = (Volume("/src", "/dst", read_only=True), Volume("/other", "/raw", id_mapped=False))
    made = json.loads(json.dumps(document(Request(limits=limits, volumes=volumes, read_only=True, terminal=True))))
    linux = made["linux"]
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 65536}] == linux["gidMappings"]
    assert linux["resources"]["memory"] == {"limit": 1 << 26}
    assert linux["resources"]["cpu"] == {"quota": 150000, "period": 100000}
    assert linux["resources"]["pids"] == {"limit": 7}
    assert linux["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert made["root"] == {"path": "rootfs", "readonly": True}
    assert made["process"]["terminal"] is True
    mounts = {entry["destination"]: entry for entry in made["mounts"]}
    assert mounts["/dst"]["source"] == "/b/volumes/0" and "ro" in mounts["/dst"]["options"]
    assert mounts["/raw"]["source"] == "/b/volumes/1" and "rw" in mounts["/raw"]["options"]


def test_the_hosts_network_comes_with_the_hosts_sysfs() -> None:
    for network, kind in ((Network.HOST, "bind"), (Network.NONE, "sysfs")):
        made = json.loads(json.dumps(document(Request(network=network))))
        assert ({"type": "network"} in made["linux"]["namespaces"]) is (network is Network.NONE)
        assert next(entry["type"] for entry in made["mounts"] if entry["destination"] == "/sys") == kind


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "s390x", "never-heard-of"])
def test_the_filter_names_each_call_in_one_rule_without_conditions(machine: str) -> None:
    profile = seccomp.profile((), machine)
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = [
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    ]
    assert len(allowed) == len(set(allowed)) > 250
    assert {"read", "execve", "openat2", "futex"} <= set(allowed)
    ruled = "socket personality clone clone3"
    refused = "mount bpf kexec_load init_module io_uring_setup userfaultfd keyctl add_key syslog setns unshare"
    assert not {*ruled.split(), *refused.split()} & set(allowed)
    mask = next(rule["args"][0] for rule in profile["syscalls"] if rule["names"] == ["clone"])
    assert mask["index"] == (1 if machine == "s390x" else 0)


def test_a_capability_brings_its_calls() -> None:
    named = {name for rule in seccomp.profile(["CAP_SYS_ADMIN"], "x86_64")["syscalls"] for name in rule["names"]}
    assert {"mount", "clone", "clone3", "setns"} <= named


@pytest.mark.parametrize(
    ("text", "expected"), [("6m", 6 << 20), ("1G", 1 << 30), ("512MiB", 512 << 20), ("10485760", 10 << 20)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "1", "-5m", "5x", "1.5g", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory(text)


def test_processors_and_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_cpus("1.5") == 1.5
    for text in ("0", "x", "-1", "1.2345", "0.001", "nan"):
        with pytest.raises(UsageError):
            parse_cpus(text)
    monkeypatch.setenv("FROM_HERE", "value")
    assert parse_env("FROM_HERE") == "FROM_HERE=value"
    assert parse_env("A=b=c") == "A=b=c"
    with pytest.raises(UsageError):
        parse_env("=x")


def test_volumes(tmp_path: Path) -> None:
    assert Volume.parse(f"{tmp_path}:/data:ro:noidmap") == Volume(str(tmp_path.resolve()), "/data", True, False)
    for text in (
        f"{tmp_path}",
        f"{tmp_path}:data",
        f"{tmp_path}:/",
        f"{tmp_path}:/a/../..",
        f"{tmp_path}:/a:no",
        f"{tmp_path}/x:/a",
        "",
    ):
        with pytest.raises(UsageError):
            Volume.parse(text)
    with pytest.raises(UsageError, match="two volumes"):
        Request(volumes=(Volume("/a", "/x"), Volume("/b", "/x")))


def test_signals() -> None:
    assert signal_number("") == signal.SIGTERM
    assert signal_number("SIGINT") == signal_number("int") == signal_number("2") == signal.SIGINT
    assert signal_number("SIGRTMIN+3") == signal.SIGRTMIN + 3
    for text in ("0", "65", "SIGNOTHING", "SIG", "RTMIN+99"):
        with pytest.raises(ContainerError):
            signal_number(text)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ('unable to start container process: exec: "x": executable file not found in $PATH', NotFound),
        ('exec: "/x": stat /x: no such file or directory', NotFound),
        ('exec: "/x": permission denied', NotExecutable),
        ("error mounting /a to rootfs: no such file or directory", ContainerError),
        ("cgroup: permission denied", ContainerError),
    ],
)
def test_the_runtimes_words_become_codes(tmp_path: Path, words: str, kind: type[ContainerError]) -> None:
    (tmp_path / "runtime.log").write_text(
        f'{{"level":"warning","msg":"no"}}\nnot json\n{json.dumps({"level": "error", "msg": words})}\n'
    )
    error = refused(str(tmp_path), "x", Runtime("/usr/bin/runc", "/r"))
    assert type(error) is kind
    assert words in str(error)


def test_every_mount_of_a_template_is_private_before_anything_is_attached_to_it() -> None:
    operations = template.plan(("/", "/proc", "/sys")).operations
    kinds = [type(operation) for operation in operations]
    assert kinds == [*[OpenTree] * 3, Setns, MoveMount, Setns, *[Mount, MoveMount] * 2, Mount, Setns]
    assert template.plan(("/", "/proc", "/sys")).outputs == ()


def test_what_a_template_needs_is_little_and_parents_come_first() -> None:
    paths = template.needed(("/proc/self", "/usr/bin/env"))
    assert paths[0] == "/" and len(paths) == len(set(paths)) < template.MOST_MOUNTS
    for path in paths[1:]:
        nearest = max((other for other in paths if path.startswith(other.rstrip("/") + "/") and other != path), key=len)
        assert paths.index(nearest) < paths.index(path)


def test_subordinate_ids_are_those_that_root_has_for_users_and_groups(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text("# ids\nuser:1:5\nroot:100000:200000\n0:500000:10\nroot:x:1\nroot:7:0\n")
    (tmp_path / "subgid").write_text("root:200000:400000\n")
    assert subids.pool(None, directory=str(tmp_path)) == (HostIds(200000, 100000), HostIds(500000, 10))
    (tmp_path / "subgid").write_text("")
    with pytest.raises(MissingFeature, match="root has no ids"):
        subids.pool(None, directory=str(tmp_path))
    assert subids.pool("5:10,100:7") == (HostIds(5, 10), HostIds(100, 7))
    for text in ("5", "5:0", "a:b", "4294967295:1", "5:4294967295", ":", ","):
        with pytest.raises(UsageError):
            subids.pool(text)


def test_the_hosts_ids_of_a_mapping_are_merged() -> None:
    mapping = Mapping.parse("0:1000:10,10:1010:5", "0:1005:20")
    assert subids.host_ids(mapping) == (HostIds(1000, 25),)


@pytest.fixture
def ranges(tmp_path: Path) -> Ranges:
    return Ranges(Database.create(str(tmp_path / "state.db")))


def test_ranges_are_taken_lowest_first_and_given_back(ranges: Ranges) -> None:
    pool = (HostIds(0, 25), HostIds(100, 10))
    assert [ranges.take_free(name, pool, 10).first for name in "abc"] == [0, 10, 100]
    with pytest.raises(MissingFeature, match="no 10 consecutive ids"):
        ranges.take_free("d", pool, 10)
    ranges.release("a")
    with pytest.raises(InUse, match="which b has"):
        ranges.take("d", (HostIds(5, 6),))
    ranges.take("d", (HostIds(5, 5),))
    assert ranges.take_free("e", pool, 5).first == 0
    assert ranges.holders() == {"b", "c", "d", "e"}
    assert ranges.take_free("f", (HostIds(0, 1000),), 10, also_taken=[HostIds(110, 90)]).first == 20


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=12), st.integers(1, 40))
def test_a_free_range_is_the_lowest_that_overlaps_nothing(taken: list[tuple[int, int]], size: int) -> None:
    from flatmount.store.ranges import _first_free

    part = HostIds(20, 150)
    others = sorted(HostIds(*one) for one in taken)
    expected = next(
        (at for at in range(20, 171 - size) if not any(HostIds(at, size).overlaps(one) for one in others)), None
    )
    found = _first_free(part, others, size)
    assert (found.first if found else None) == expected


def a_record(name: str = "box") -> Record:
    return Record(
        id=name, root="/store", holder="container:box.1-1", image="sha256:0", image_name="tiny", command=("sh",),
        created_ns=5, attachment=Attachment.PRIVATE, strategy="flat", map="0:1000:10", gid_map="0:1000:10",
        runtime="/usr/bin/runc", remove=False, terminal=False, stop_signal="",
    )  # fmt: skip


def test_a_containers_state_is_what_lock_and_files_say(tmp_path: Path) -> None:
    containers = Containers(str(tmp_path / "run"))
    record = a_record()
    lock = containers.add(record)
    assert containers.state(record) is State.CREATING
    assert containers.get("bo") == record == containers.all()[0]
    with pytest.raises(UsageError, match="already"):
        containers.add(record)
    with pytest.raises(InUse, match="runs"), containers.locked(record):
        pass
    Path(containers.directory("box"), "pid").write_text("77")
    assert containers.state(record) is State.RUNNING and containers.unattended() == ()
    os.close(lock)
    assert containers.state(record) is State.LOST and containers.unattended() == (record,)
    containers.set_exit(record, Exit(7, 8))
    assert containers.state(record) is State.EXITED and containers.exit(record) == Exit(7, 8)
    with containers.locked(record), pytest.raises(InUse), containers.locked(record):
        pass
    containers.forget(record)
    assert containers.all() == () and os.listdir(containers.base) == []
    with pytest.raises(UsageError, match="no container"):
        containers.get("box")


def test_drafts_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    containers = Containers(str(tmp_path / "run"))
    os.close(containers.add(a_record()))
    for name in (".draft-a.999999999-1", ".gone-b.999999999-1", ".draft-c.1-1000000"):
        Path(containers.base, name).mkdir()
    containers.sweep()
    assert sorted(os.listdir(containers.base)) == ["box"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    containers = Containers(str(tmp_path / "run"))
    os.close(containers.add(a_record()))
    Path(containers.directory("box"), "record.json").write_text("{")
    with pytest.raises(FlatmountError, match="damaged"):
        containers.all()
