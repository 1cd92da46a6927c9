"""Root file systems by every strategy, seen from inside their user namespace."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path

import pytest

from flatmount.errors import FlatmountError, InUse, OperationFailed
from flatmount.kernel.mounts import MountEvents, mount_count
from flatmount.kernel.namespaces import user_namespace
from flatmount.kernel.start import check_start
from flatmount.plan.facts import HostFacts
from flatmount.plan.mapping import Mapping
from flatmount.plan.operations import UPPERS
from flatmount.rootfs.assembler import Assembler, Request, Rootfs
from flatmount.rootfs.ranges import RangePool
from flatmount.strategies import Attach, RootDirectory, RootfsSpec, Upper
from tests.conftest import CANNOT

MAPPING = Mapping.single(200000)
STRATEGIES = ("per-layer", "common-parent", "detached", "flat")


def specification(**changes: object) -> RootfsSpec:
    base = RootfsSpec(("layers/1", "layers/2", "layers/3"), flat="flat/1", make_target=True)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def assembler(data: Path, facts: HostFacts, strategy: str, **changes: object) -> Assembler:
    need(strategy, facts)
    spec = specification(**changes)
    uppers = data / "uppers" if spec.upper is not Upper.ELSEWHERE else data.parent / "elsewhere"
    uppers.mkdir(exist_ok=True)
    pool = RangePool(str(data), facts)
    return Assembler(spec, strategy, pool, uppers=str(uppers), scratch=f"{data.parent}/tmp/ovl-", ephemeral=True)


def tree(path: Path) -> dict[str, tuple[int, int, int, bytes | None]]:
    found = {}
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            here = Path(directory, name)
            seen = here.lstat()
            content = here.read_bytes() if name in files else None
            found[str(here.relative_to(path))] = (seen.st_mode, seen.st_uid, seen.st_gid, content)
    return found


@pytest.fixture(params=["as it is", "without detached layers"])
def either(request: pytest.FixtureRequest, facts: HostFacts) -> HostFacts:
    """This kernel, and as if its overlayfs took no detached layers (before Linux 6.15)."""
    return facts if request.param == "as it is" else dataclasses.replace(facts, detached_layers=False)


def need(strategy: str, facts: HostFacts) -> None:
    """A strategy that this kernel truly has not is named, and left out."""
    if strategy == "detached" and not facts.lowerdir_append:
        pytest.skip(f"{CANNOT}overlayfs of this kernel does not know lowerdir+ (6.7)")


@pytest.mark.parametrize("upper", [Upper.STORE, Upper.ELSEWHERE])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_container_sees_its_image_and_writes_only_to_its_upper(
    data: Path, either: HostFacts, strategy: str, upper: Upper
) -> None:
    before = tree(data / "layers"), tree(data / "flat")
    target = data.parent / "targets/one"
    made = assembler(data, either, strategy, upper=upper)
    rootfs = made.assemble(MAPPING, "one", str(target))
    namespace = user_namespace(MAPPING)
    seen = check_start(namespace, str(target), "/bin/tool", "/etc/new", most_bytes=64)
    assert (seen.uid, seen.gid, seen.content, seen.written_uid) == (7, 8, b"tool\n", 0)
    assert (target / "bin/tool").stat().st_uid == 200007
    written = Path(made.uppers, "one/fs/etc/new").stat()
    assert written.st_uid == (0 if made.ids.value == "container" else 200000)
    assert (tree(data / "layers"), tree(data / "flat")) == before
    rootfs.undo()
    assert not target.exists()
    assert not os.listdir(made.uppers)
    assert not os.listdir(data.parent / "tmp")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_planned_executed_and_the_kernels_own_account_agree(data: Path, either: HostFacts, strategy: str) -> None:
    made = assembler(data, either, strategy)
    if not either.mount_events:
        pytest.skip(f"{CANNOT}this kernel has no mount events (6.15)")
    targets = [data.parent / f"targets/{i}" for i in range(10)]
    with MountEvents() as events:
        live = [made.assemble(Mapping.single(200000 + 65536 * i), f"c{i}", str(t)) for i, t in enumerate(targets)]
        assembled = events.counts()
        for rootfs in live:
            rootfs.undo()
        undone = events.counts()
    planned = {"per-layer": 2 * (1 + 2 * 3) + 1, "common-parent": 7, "detached": 1, "flat": 1}[strategy]
    assert made.plan.mount_operations == planned
    assert [rootfs.outcome.mount_operations for rootfs in live] == [planned] * 10
    assert assembled.attached + assembled.detached == planned * 10
    assert undone.attached + undone.detached - assembled.attached - assembled.detached == 10


@pytest.mark.parametrize("strategy", ["detached", "flat"])
def test_the_hosts_table_holds_the_containers_mount_and_nothing_else(
    data: Path, either: HostFacts, strategy: str
) -> None:
    before = mount_count()
    made = assembler(data, either, strategy)
    with made.assemble(MAPPING, "one", str(data.parent / "targets/one")):
        assert mount_count() == before + 1
    assert mount_count() == before


@pytest.mark.parametrize("strategy", ["detached", "flat"])
def test_attached_nowhere_it_is_a_descriptor_for_the_caller(data: Path, either: HostFacts, strategy: str) -> None:
    before = mount_count()
    made = assembler(data, either, strategy, attach=Attach.NONE)
    rootfs = made.assemble(MAPPING, "one")
    assert mount_count() == before
    assert rootfs.descriptor is not None
    assert sorted(os.listdir(f"/proc/self/fd/{rootfs.descriptor}")) == ["bin", "etc"]
    assert os.stat("bin/tool", dir_fd=rootfs.descriptor).st_uid == 200007
    rootfs.undo()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_read_only_takes_no_upper_and_no_writing(data: Path, facts: HostFacts, strategy: str) -> None:
    made = assembler(data, facts, strategy, upper=Upper.NONE)
    target = data.parent / "targets/one"
    with made.assemble(MAPPING, "one", str(target)):
        assert (target / "bin/tool").stat().st_uid == 200007
        if strategy in ("detached", "flat"):
            with pytest.raises(FlatmountError, match="Read-only"):
                check_start(user_namespace(MAPPING), str(target), "/bin/tool", "/new")
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").write_text("")
    assert not os.listdir(data / "uppers")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_upper_takes_on_the_root_directorys_attributes(data: Path, facts: HostFacts, strategy: str) -> None:
    root = RootDirectory(mode=0o1751, uid=5, gid=6, mtime_ns=1_500_000_000_123_456_789)
    target = data.parent / "targets/one"
    with assembler(data, facts, strategy, root=root).assemble(MAPPING, "one", str(target)):
        seen = target.stat()
        assert (seen.st_mode & 0o7777, seen.st_uid, seen.st_gid) == (0o1751, 200005, 200006)
        assert seen.st_mtime_ns == root.mtime_ns


@pytest.mark.parametrize("upper", [Upper.STORE, Upper.NONE])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_of_one_layer(data: Path, facts: HostFacts, strategy: str, upper: Upper) -> None:
    target = data.parent / "targets/one"
    made = assembler(data, facts, strategy, layers=("layers/3",), flat="layers/3", upper=upper)
    with made.assemble(MAPPING, "one", str(target)) as rootfs:
        assert (target / "bin/tool").stat().st_uid == 200007
        assert rootfs.outcome.mount_operations == made.plan.mount_operations
        if upper is Upper.NONE:
            with pytest.raises(OSError, match="Read-only"):
                (target / "new").write_text("")
    assert not os.listdir(data.parent / "tmp")


@pytest.mark.parametrize("newer", [True, False], ids=["as it is", "without lowerdir+"])
@pytest.mark.parametrize("upper", [Upper.STORE, Upper.ELSEWHERE])
def test_a_copy_is_found_below_any_path(data: Path, facts: HostFacts, upper: Upper, newer: bool) -> None:
    facts = dataclasses.replace(facts, lowerdir_append=facts.lowerdir_append and newer)
    # An upper elsewhere is named by its whole path where the kernel cannot be told otherwise.
    place = data.parent / ("a:b" if upper is Upper.ELSEWHERE and not facts.lowerdir_append else "a:b," + "x" * 240)
    place.mkdir()
    data = data.rename(place / "data")
    target = data.parent / "root"
    made = assembler(data, facts, "chown", shifted="flat/1", upper=upper)
    with made.assemble(MAPPING, "one", str(target)):
        assert (target / "bin/tool").read_text() == "tool\n"
        (target / "new").write_text("")
        assert (Path(made.uppers) / "one/fs/new").exists()


def test_a_namespace_that_was_closed_is_made_anew() -> None:
    first = user_namespace(MAPPING)
    first.close()
    second = user_namespace(MAPPING)
    assert second is not first
    assert os.readlink(f"/proc/self/fd/{second.fileno()}").startswith("user:")
    assert user_namespace(MAPPING) is second
    with pytest.raises(ValueError, match="closed"):
        first.fileno()


def test_closing_a_pool_leaves_what_was_lent(data: Path, facts: HostFacts) -> None:
    made = assembler(data, facts, "flat", upper=Upper.ELSEWHERE)
    lent = made._lend(made._pool.get(MAPPING))
    assert UPPERS in made._executable.needs or not facts.detached_layers
    upper = lent[-1]
    made._pool.close()
    assert os.fstat(upper).st_ino == os.stat(made.uppers).st_ino
    with made.assemble(MAPPING, "one", str(data.parent / "targets/one")):
        pass


def test_two_maps_in_one_mapping(data: Path, facts: HostFacts) -> None:
    mapping = Mapping.parse("0:300000:5,5:400000:100", "0:500000:65536")
    target = data.parent / "targets/one"
    with assembler(data, facts, "flat").assemble(mapping, "one", str(target)):
        seen = (target / "bin/tool").stat()
        assert (seen.st_uid, seen.st_gid) == (400002, 500008)


def test_a_range_is_made_once_and_goes_when_nobody_holds_it(data: Path, facts: HostFacts) -> None:
    made = assembler(data, facts, "flat")
    first = made.assemble(MAPPING, "a", str(data.parent / "targets/a"))
    second = made.assemble(MAPPING, "b", str(data.parent / "targets/b"))
    assert first.range is second.range
    assert user_namespace(MAPPING) is first.range.namespace
    number = first.range.namespace.fileno()
    first.undo()
    second.undo()
    made._pool.close()
    del first, second, made
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failure_leaves_nothing(data: Path, facts: HostFacts, strategy: str) -> None:
    (data.parent / "targets/taken").mkdir()
    before = mount_count()
    made = assembler(data, facts, strategy)
    with pytest.raises(OperationFailed, match="mkdir"):
        made.assemble(MAPPING, "one", str(data.parent / "targets/taken"))
    missing = assembler(data, facts, strategy, layers=("layers/1", "layers/9"), flat="flat/9")
    with pytest.raises(OperationFailed, match="No such file"):
        missing.assemble(MAPPING, "two", str(data.parent / "targets/two"))
    assert mount_count() == before
    assert os.listdir(data.parent / "targets") == ["taken"]
    assert not os.listdir(data / "uppers")
    assert not os.listdir(data.parent / "tmp")


def test_somebody_elses_upper_survives_a_name_that_is_taken(data: Path, facts: HostFacts) -> None:
    (data / "uppers/one/fs").mkdir(parents=True)
    (data / "uppers/one/fs/precious").write_text("mine")
    with pytest.raises(OperationFailed, match="EEXIST"):
        assembler(data, facts, "flat").assemble(MAPPING, "one", str(data.parent / "targets/one"))
    assert (data / "uppers/one/fs/precious").read_text() == "mine"


def test_what_is_in_use_is_not_taken_apart(data: Path, facts: HostFacts) -> None:
    target = data.parent / "targets/one"
    rootfs = assembler(data, facts, "flat").assemble(MAPPING, "one", str(target))
    held = os.open(target / "etc/passwd", os.O_RDONLY)
    with pytest.raises(InUse, match="EBUSY"):
        rootfs.undo()
    assert (data / "uppers/one").exists()
    assert (target / "etc/passwd").exists()
    os.close(held)
    rootfs.undo()
    assert not (data / "uppers/one").exists()


def test_hundreds_of_layers(data: Path, facts: HostFacts) -> None:
    names = []
    for i in range(500):
        (data / f"layers/n{i}").mkdir()
        (data / f"layers/n{i}/file{i}").write_text(str(i))
        names.append(f"layers/n{i}")
    for strategy in ("per-layer", "common-parent", *(["detached"] if facts.lowerdir_append else [])):
        made = assembler(data, facts, strategy, layers=tuple(names))
        target = data.parent / "targets/one"
        with made.assemble(MAPPING, "one", str(target)):
            assert len(os.listdir(target)) == 500, strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_at_once_and_the_one_that_fails_is_undone_alone(data: Path, either: HostFacts, strategy: str) -> None:
    made = assembler(data, either, strategy)
    targets = data.parent / "targets"
    (targets / "c7").mkdir()
    requests = [Request(Mapping.single(200000 + 65536 * i), f"c{i}", f"{targets}/c{i}") for i in range(20)]
    before = mount_count()
    answers = made.assemble_many(requests, at_once=4)
    failed = [i for i, answer in enumerate(answers) if isinstance(answer, FlatmountError)]
    assert failed == [7]
    assert "mkdir" in str(answers[7])
    assert mount_count() == before + 19
    assert len(os.listdir(data / "uppers")) == 19
    for i, answer in enumerate(answers):
        if isinstance(answer, Rootfs):
            assert (targets / f"c{i}/bin/tool").stat().st_uid == 200007 + 65536 * i
            answer.undo()
    assert os.listdir(targets) == ["c7"]
    assert not os.listdir(data / "uppers")


def test_a_failure_in_a_helper_namespace_does_not_strand_the_next_run(data: Path, facts: HostFacts) -> None:
    old = dataclasses.replace(facts, detached_layers=False)
    made = assembler(data, old, "flat", make_target=False)
    targets = data.parent / "targets"
    for i in range(6):
        if i % 2:
            (targets / f"c{i}").mkdir()
    requests = [Request(MAPPING, f"c{i}", f"{targets}/c{i}") for i in range(6)]
    answers = made.assemble_many(requests, at_once=1)
    assert [isinstance(answer, Rootfs) for answer in answers] == [False, True] * 3
    for answer in answers:
        if isinstance(answer, Rootfs):
            answer.undo()


def test_no_requests_make_nothing(data: Path, facts: HostFacts) -> None:
    assert assembler(data, facts, "flat").assemble_many([], at_once=2) == []
