"""A recording of a storm whose mount operations the executor counts itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flatmount.kernel.mounts import read_table
from flatmount.observe.mount_calls import Effect
from flatmount.observe.profile import Recorder
from flatmount.observe.profile_results import Profile, lock_totals, unclassified_share
from flatmount.observe.symbols import MOUNT_LOCKS, Lock
from flatmount.observe.tiny_image import write_tiny_image
from flatmount.store import Store

CONTAINERS, LAYERS = 40, 50
# Assemble and undo on eight threads, and print how many mount operations the executor says that took.
PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from flatmount.kernel.executor import adopt_thread
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import choose_for, probe_store, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import Store
from flatmount.strategies import Upper
import os
root, strategy, place, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
with Store.open(root) as store:
    image = store.image("tiny")
    facts = probe_store(store).facts
    choice = choose_for(strategy, store, image, facts)
    os.makedirs(place + "/uppers")
    spec = specification(store, image, choice, upper=Upper.ELSEWHERE, make_target=True, scratch=place + "/s-")
    pool = RangePool(store.data, facts)
    assembler = Assembler(spec, choice.name, pool, uppers=place + "/uppers", scratch=place + "/s-", ephemeral=True)
    def one(i):
        rootfs = assembler.assemble(Mapping.single((1 << 20) + (i << 16)), f"c{i}", f"{place}/r{i}")
        return rootfs.outcome.mount_operations + rootfs.undo().mount_operations
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(8, initializer=adopt_thread) as threads:
        print(sum(threads.map(one, range(count))) + pool.mount_operations)
"""


@pytest.fixture(scope="module", autouse=True)
def perf() -> None:
    assert shutil.which("perf"), "tools/setup --tests installs perf"


def recorded(ram: Path, strategy: str) -> tuple[Profile, int]:
    image, root = str(ram / "image"), str(ram / "store")
    if not os.path.isdir(image):
        write_tiny_image(image, LAYERS)
        with Store.open(root, create=True) as store:
            stored = store.import_image(image, name="tiny")
            store.ensure_flat(stored)
    command = [sys.executable, "-c", PROGRAM, root, strategy, str(ram / strategy), str(CONTAINERS)]
    pipe = subprocess.PIPE
    with Recorder(command) as recorder, subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        recorder.start()
        out, _ = process.communicate("\n")
        return recorder.stop(root_process=process.pid, exit_code=process.returncode), int(out)


def operations(profile: Profile) -> int:
    effects = (Effect.ATTACH, Effect.DETACH)
    calls = [call for one in profile.operations if one.of_command for call in one.calls]
    return sum(call.done for call in calls if call.effect in effects)


def test_waits_belong_to_the_mount_locks_and_counts_are_the_executors_own(ram: Path) -> None:
    tables = {entry.mount_point for entry in read_table()}
    profile, counted = recorded(ram, "per-layer")
    assert profile.exit_code == 0 and profile.missing == () and profile.lost == 0
    assert operations(profile) == counted
    totals = lock_totals(profile.waits, command_only=True)
    assert unclassified_share(totals) < 0.1
    by_lock = {one.lock: one for one in totals}
    # An umount waits for a grace period; this storm makes 102 of them for each container.
    assert by_lock[Lock.GRACE_PERIOD].waits > CONTAINERS
    # Who is alone on one processor seldom holds a lock while another asks for it.
    assert len(os.sched_getaffinity(0)) == 1 or any(lock in by_lock for lock in MOUNT_LOCKS)
    assert any("synchronize_rcu" in stack.folded for stack in profile.wait_stacks if stack.lock is Lock.GRACE_PERIOD)
    assert not any("synchronize_rcu" in one.folded for one in profile.wait_stacks if one.lock is Lock.MOUNT_LOCK)
    assert any(stack.samples for stack in profile.cpu)
    assert profile.moments[0].mounts
    assert profile.cost_cpu_s > 0
    flat, flat_counted = recorded(ram, "flat")
    assert operations(flat) == flat_counted == 2 * CONTAINERS
    assert {entry.mount_point for entry in read_table()} == tables


def test_what_is_missing_is_named_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with Recorder() as recorder:
        recorder.start()
        profile = recorder.stop()
    assert any("perf is not installed" in what for what in profile.missing)
    assert profile.moments[0].mounts
    assert profile.waits == ()
