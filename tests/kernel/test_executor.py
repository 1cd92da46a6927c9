"""The executor on real mounts: what it does, what it says when the kernel refuses, what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flatmount.errors import OperationFailed
from flatmount.kernel import _native
from flatmount.kernel.executor import Executable, adopt_thread, run_once
from flatmount.kernel.mounts import MountEvents, mount_count
from flatmount.kernel.namespaces import empty_mount_namespace, own_mount_namespace
from flatmount.plan import MountPlan, Parameter, Slot
from flatmount.plan import operations as op

CONTEXT = Slot("context")
TREE = Slot("tree")


def test_runs_every_operation_and_times_it(ram: Path) -> None:
    target: op.Text = (Parameter.TARGET,)
    plan = MountPlan((op.Mkdir(target), op.Mount("x", target, "tmpfs"), op.Unmount(target), op.Rmdir(target)))
    with MountEvents() as events:
        outcome = run_once(plan, {}, {Parameter.TARGET: str(ram / "here")})
        counted = events.counts()
    assert (outcome.done, outcome.mount_operations) == (4, 2)
    assert (counted.attached, counted.detached) == (1, 1)
    assert len(outcome.nanoseconds) == 4
    assert all(outcome.nanoseconds)


def test_a_failure_is_undone_and_names_the_operation_and_the_kernels_word(ram: Path) -> None:
    here = str(ram / "here")
    plan = MountPlan(
        (
            op.Mkdir(here),
            op.Mount("x", here, "tmpfs"),
            op.FsOpen(CONTEXT, "overlay"),
            op.FsConfigString(CONTEXT, "lowerdir+", here),
            op.FsConfigString(CONTEXT, "xino", "nonsense"),
        )
    )
    before = mount_count()
    with pytest.raises(OperationFailed) as refusal:
        run_once(plan)
    assert mount_count() == before
    assert not os.path.exists(here)
    failure = refusal.value
    assert failure.operation.startswith("fsconfig")
    assert "of 5" in str(failure)
    assert failure.kernel_message == "overlay: Bad value for 'xino'"
    assert failure.kernel_message in str(failure)


def test_the_kernels_message_is_that_of_the_failure(ram: Path) -> None:
    with pytest.raises(OperationFailed, match="bogus") as refusal:
        run_once(MountPlan((op.FsOpen(CONTEXT, "overlay"), op.FsConfigFlag(CONTEXT, "bogus"))))
    assert refusal.value.position == 1


@pytest.mark.parametrize("succeeds", [True, False])
def test_every_slot_is_closed_but_outputs(ram: Path, succeeds: bool) -> None:
    before = set(os.listdir("/proc/self/fd"))
    target = str(ram) if succeeds else "/does/not/exist"
    plan = MountPlan((op.OpenTree(TREE, str(ram)), op.Open(Slot("other"), target)), outputs=(TREE,))
    if succeeds:
        outcome = run_once(plan)
        assert len(set(os.listdir("/proc/self/fd")) - before) == 1
        os.close(outcome.outputs[0])
    else:
        with pytest.raises(OperationFailed):
            run_once(plan)
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_undoing_goes_on_and_reports_its_first_failure(ram: Path) -> None:
    (ram / "a").mkdir()
    plan = MountPlan(
        (op.Unmount(str(ram / "a")), op.Rmdir(str(ram / "missing")), op.Rmdir(str(ram / "a"))), keep_going=True
    )
    outcome = run_once(plan)
    assert outcome.failure is not None
    assert outcome.failure.operation == "umount2"
    assert outcome.done == 1
    assert not (ram / "a").exists()


def test_relative_strings_do_not_move_the_callers_directory(ram: Path) -> None:
    (ram / "inner").mkdir()
    plan = Executable(MountPlan((op.Open(TREE, str(ram)), op.Fchdir(TREE), op.Mkdir("made"), op.Rmdir("made"))))
    here = os.getcwd()
    assert plan.run({}, {}).done == 4
    assert os.getcwd() == here

    seen: list[object] = []

    def adopted() -> None:
        adopt_thread()
        seen.append(plan.run({}, {}).done)
        seen.append(os.getcwd())

    thread = threading.Thread(target=adopted)
    thread.start()
    thread.join()
    assert seen == [4, "/"]
    assert os.getcwd() == here


def test_a_target_that_is_a_symbolic_link_is_not_followed(ram: Path) -> None:
    (ram / "real").mkdir()
    (ram / "link").symlink_to("real")
    with pytest.raises(OperationFailed, match="EINVAL") as refusal:
        run_once(MountPlan((op.OpenTree(TREE, str(ram / "real")), op.MoveMount(TREE, str(ram / "link")))))
    assert "symbolic link" in refusal.value.hint


def test_options_that_mount_would_cut_are_refused(ram: Path) -> None:
    long = "lowerdir=" + ":".join(str(ram) for _ in range(600))
    with pytest.raises(OperationFailed, match="E2BIG"):
        run_once(MountPlan((op.Mount("x", str(ram), "overlay", data=long),)))


def test_a_string_longer_than_the_arena_is_an_error_not_an_overrun() -> None:
    plan = MountPlan((op.Mkdir((Parameter.TARGET, "/x")),))
    with pytest.raises(OperationFailed, match="ENAMETOOLONG"):
        run_once(plan, {}, {Parameter.TARGET: "/" + "a" * 40000})


RECORD = 32


@pytest.mark.parametrize(
    "arguments",
    [
        (b"x" * 31, b"\0", 0, 0, 0, 0, ()),
        (b"\xff" * RECORD, b"\0", 0, 0, 0, 0, ()),
        (b"\0" * RECORD, b"no end", 0, 0, 0, 0, ()),
        (b"", b"\0", 100, 0, 0, 0, ()),
        (b"", b"\0", 1, 2, 0, 0, ()),
        (b"", b"\0", 1, 1, 0, 0, (0,)),
        (b"\x11\0" + b"\x05\0" * 3 + b"\0" * 24, b"\0", 1, 0, 0, 0, ()),
    ],
)
def test_a_program_that_is_not_well_formed_is_refused(
    arguments: tuple[bytes, bytes, int, int, int, int, tuple[int, ...]],
) -> None:
    with pytest.raises(ValueError, match=r"well-formed|slot of its own"):
        _native.Program(*arguments)


def test_many_threads_run_one_program_at_once(ram: Path) -> None:
    plan = Executable(MountPlan((op.Mkdir((Parameter.TARGET,)), op.Rmdir((Parameter.TARGET,)))))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(200):
                plan.run({}, {Parameter.TARGET: f"{ram}/{number}-{i}"})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not os.listdir(ram)


def test_what_was_done_in_a_helper_namespace_is_undone_there_and_not_at_home(ram: Path) -> None:
    place = ram / "place"
    place.mkdir()
    run_once(MountPlan((op.Mount("ours", str(place), "tmpfs"),)))
    parents = [str(parent) for parent in reversed(place.parents)][1:]
    plan = MountPlan(
        (
            op.Setns(op.HELPER),
            *(op.Mkdir(path) for path in (*parents, str(place))),
            op.Mount("helper", str(place), "tmpfs"),
            op.Rmdir("/missing"),
            op.Setns(op.HOME),
        )
    )
    helper, home = empty_mount_namespace(), own_mount_namespace()
    before = mount_count(), mount_count(namespace_fd=helper.fileno())
    with pytest.raises(OperationFailed, match="rmdir /missing") as refusal:
        run_once(plan, {op.HELPER: helper.fileno(), op.HOME: home.fileno()})
    assert not refusal.value.not_undone
    assert (mount_count(), mount_count(namespace_fd=helper.fileno())) == before
    assert place.is_mount()


def test_one_job_that_cannot_be_undone_does_not_hide_what_the_others_did(ram: Path) -> None:
    for name in ("good", "bad", "real", "gone"):
        (ram / name).mkdir()
    (ram / "link").symlink_to("real")
    target: op.Text = (Parameter.TARGET,)
    many = Executable(MountPlan((op.Mount("x", target, "tmpfs"), op.Rmdir((Parameter.UPPER,)))))
    # The mount follows the link, its undoing does not.
    wanted = [("bad", "missing"), ("link", "missing"), ("good", "gone")]
    jobs = [many.job({}, {Parameter.TARGET: f"{ram}/{a}", Parameter.UPPER: f"{ram}/{b}"}) for a, b in wanted]
    bad, stuck, good = many.run_many(jobs, at_once=1)
    assert good.failure is None and (ram / "good").is_mount()
    assert bad.failure is not None and not bad.failure.not_undone and not (ram / "bad").is_mount()
    assert stuck.failure is not None and stuck.failure.operation == "rmdir"
    assert "umount2" in stuck.failure.not_undone and "undoing failed: umount2" in str(stuck.failure)
    run_once(MountPlan((op.Unmount(f"{ram}/good"), op.Unmount(f"{ram}/real"))))


def test_the_user_database_is_read_inside_the_root_alone(ram: Path) -> None:
    """What is read has a new access time, or less in it; what is not keeps both."""
    root, host = ram / "root", ram / "host"
    (root / "etc").mkdir(parents=True)
    host.mkdir()
    for path in (host / "passwd", root / "etc/real"):
        path.write_text("root:x:0:0::/:/bin/sh\n")
        os.utime(path, (1, 2))
    (root / "etc/inside").symlink_to("/etc/real")
    (root / "etc/outside").symlink_to(f"../../../../../../../../../..{host}/passwd")
    (root / "up").symlink_to(host)
    os.mkfifo(root / "etc/fifo")
    fifo = os.open(root / "etc/fifo", os.O_RDWR | os.O_NONBLOCK)
    os.write(fifo, b"still here")
    names = ("/etc/outside", "/up/passwd", "/etc/fifo", "/etc/missing", "/etc")
    run_once(MountPlan(tuple(op.ReadFile(str(root), name) for name in names)))
    assert (host / "passwd").stat().st_atime == 1
    assert os.read(fifo, 100) == b"still here"
    os.close(fifo)
    run_once(MountPlan((op.ReadFile(str(root), "/etc/inside"),)))
    assert (root / "etc/real").stat().st_atime != 1


REFUSING = """
import ctypes, os, struct
from flatmount.errors import OperationFailed
from flatmount.kernel.executor import Executable
from flatmount.kernel.namespaces import empty_mount_namespace, own_mount_namespace
from flatmount.plan import MountPlan, operations as op

CALLS = {"unshare": {"x86_64": 272, "aarch64": 97}, "setns": {"x86_64": 308, "aarch64": 268}}

def refuse(call, argument):
    # Every such call with that first argument fails with EPERM from now on, in all threads to come as well.
    rules = [
        (0x20, 0, 0, 0), (0x15, 0, 3, CALLS[call][os.uname().machine]), (0x20, 0, 0, 16), (0x15, 0, 1, argument),
        (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("H6xQ", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, ctypes.c_ulong(2), program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")

def descriptors():
    return len(os.listdir("/proc/self/fd"))

helper, home = empty_mount_namespace(), own_mount_namespace()
lent = {op.HELPER: helper.fileno(), op.HOME: home.fileno()}
"""

UNSHARE = """
refuse("unshare", 0x200)
plan = Executable(MountPlan((op.Mkdir("/never"), op.Chdir("/"))))
try:
    plan.run({}, {})
except OperationFailed as failure:
    assert (failure.operation, failure.position) == ("unshare", 2), (str(failure), failure.position)
    assert "mkdir" not in str(failure) and "EPERM" in str(failure), str(failure)
else:
    raise AssertionError("it ran")
before = descriptors()
many = Executable(MountPlan((op.Setns(op.HELPER), op.Setns(op.HOME))))
try:
    many.run_many([many.job(lent, {})] * 3, at_once=2)
except PermissionError:
    assert descriptors() == before, (before, descriptors())
else:
    raise AssertionError("it ran")
"""

SETNS = """
first_free = os.dup(0)
os.close(first_free)
refuse("setns", first_free)
many = Executable(MountPlan((op.Setns(op.HELPER), op.Rmdir("/missing"))))
outcomes = many.run_many([many.job({op.HELPER: helper.fileno()}, {})] * 3, at_once=1)
assert [one.failure.operation for one in outcomes] == ["rmdir", "setns", "setns"], outcomes
assert [one.done for one in outcomes] == [1, 0, 0], outcomes
"""


@pytest.mark.parametrize("script", [UNSHARE, SETNS], ids=["no thread begins", "a thread is lost half-way"])
def test_threads_that_the_kernel_refuses_are_named_and_take_nothing_with_them(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", REFUSING + script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
