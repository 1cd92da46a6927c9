"""Which lock a stack waits for: on stacks recorded with the addresses of their locks on three kernels, and by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from flatmount.observe.symbols import MOUNT_LOCKS, Lock, Work, normal, waited_for, working_on

RECORDED = Path(__file__).parents[1] / "data" / "stacks"
BY_SYMBOL = ("6.1.0", "6.12.107")  # kernels that tell the addresses of their data
WRITE, READ = "rwsem_down_write_slowpath down_write", "rwsem_down_read_slowpath down_read"
SPIN, NATIVE = "__pv_queued_spin_lock_slowpath _raw_spin_lock", "native_queued_spin_lock_slowpath _raw_spin_lock"


@pytest.mark.parametrize(
    ("spins", "stack", "lock"),
    [
        # 6.18, recorded with perf
        (False, f"{READ} clone_private_mount ovl_fill_super do_syscall_64", Lock.NAMESPACE_SEM),
        (False, f"{WRITE} vfs_open_tree __x64_sys_open_tree do_syscall_64", Lock.NAMESPACE_SEM),
        (
            False,
            "__mutex_lock.constprop.0 exp_funnel_lock synchronize_rcu_expedited namespace_unlock path_umount",
            Lock.GRACE_PERIOD,
        ),
        (True, f"{SPIN} mntput_no_expire namespace_unlock path_umount do_syscall_64", Lock.MOUNT_LOCK),
        (True, f"{SPIN} __unlock_mount do_move_mount.isra.0 do_syscall_64", Lock.MOUNT_LOCK),
        (True, f"{SPIN} evict ovl_free_fs generic_shutdown_super do_syscall_64", Lock.INODE_HASH),
        (True, f"{SPIN} ilookup5_nowait ilookup5 ovl_lookup_trap_inode", Lock.INODE_HASH),
        (True, f"{SPIN} __schedule schedule exp_funnel_lock namespace_unlock", Lock.SCHEDULER),
        (
            True,
            "__pv_queued_spin_lock_slowpath _raw_spin_lock_irqsave downgrade_write namespace_unlock path_umount",
            Lock.NAMESPACE_SEM,
        ),
        (
            False,
            "rwsem_down_write_slowpath down_write_killable __vm_munmap __x64_sys_munmap do_syscall_64",
            Lock.MEMORY,
        ),
        (
            True,
            "__pv_queued_spin_lock_slowpath _raw_spin_lock_irqsave try_to_wake_up swake_up_one rcu_core",
            Lock.SCHEDULER,
        ),
        # 5.15 and 6.1: names of fs/namespace.c
        (False, f"{WRITE} namespace_lock do_umount path_umount do_syscall_64", Lock.NAMESPACE_SEM),
        (False, f"{WRITE} lock_mount do_add_mount path_mount do_syscall_64", Lock.NAMESPACE_SEM),
        (False, f"{WRITE} copy_mnt_ns create_new_namespaces copy_process", Lock.NAMESPACE_SEM),
        (False, "rwsem_down_read_slowpath m_start seq_read_iter vfs_read ksys_read", Lock.NAMESPACE_SEM),
        (True, f"{NATIVE} attach_recursive_mnt graft_tree do_syscall_64", Lock.MOUNT_LOCK),
        (
            True,
            "native_queued_spin_lock_slowpath.part.0 _raw_spin_lock clone_mnt copy_tree copy_mnt_ns",
            Lock.MOUNT_LOCK,
        ),
        # a superblock's own semaphore under umount is not the namespace's
        (False, f"{WRITE} deactivate_super cleanup_mnt task_work_run", Lock.SUPERBLOCK),
        (False, f"{WRITE} vfs_rename do_renameat2", Lock.DIRECTORY),
        (False, "", Lock.UNKNOWN),
        (False, f"{WRITE}", Lock.UNKNOWN),
        (True, f"{NATIVE} zzz_nobody_knows", Lock.UNKNOWN),
    ],
)
def test_waits(spins: bool, stack: str, lock: Lock) -> None:
    assert waited_for(stack.split(), spins=spins) is lock


@pytest.mark.parametrize(
    ("stack", "work"),
    [
        ("__legitimize_mnt try_to_unlazy walk_component", Work.SPINNING),
        ("path_init path_openat do_filp_open", Work.SPINNING),
        ("native_queued_spin_lock_slowpath _raw_spin_lock mntput_no_expire", Work.SPINNING),
        ("rwsem_spin_on_owner rwsem_optimistic_spin rwsem_down_write_slowpath down_write do_lock_mount", Work.SPINNING),
        ("osq_lock rwsem_optimistic_spin rwsem_down_write_slowpath down_write vfs_rename", Work.ELSE),
        ("clone_mnt.isra.0 copy_tree copy_mnt_ns create_new_namespaces", Work.UNDER_LOCK),
        ("is_subdir has_locked_children clone_private_mount", Work.UNDER_LOCK),
        ("smp_call_function_single sync_rcu_exp_select_node_cpus process_one_work", Work.GRACE_PERIOD),
        ("clear_page_erms get_page_from_freelist", Work.ELSE),
        ("", Work.ELSE),
    ],
)
def test_work_on_processors(stack: str, work: Work) -> None:
    assert working_on(stack.split()) is work


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("do_move_mount.isra.0", "do_move_mount"),
        ("mntput_no_expire.part.0.isra.0+0x1b", "mntput_no_expire"),
        ("__mutex_lock.constprop.0", "__mutex_lock"),
        ("umount_tree+0x12/0x340", "umount_tree"),
        ("copy_tree.cold", "copy_tree"),
        ("plain", "plain"),
    ],
)
def test_names_without_what_is_appended(printed: str, name: str) -> None:
    assert normal(printed) == name


class Waited(NamedTuple):
    count: int
    us: int
    spins: bool
    by_address: str
    stack: tuple[str, ...]

    @property
    def lock(self) -> Lock:
        return waited_for(self.stack, spins=self.spins)


def recorded(kernel: str, *, switches: bool = False) -> list[Waited]:
    found = []
    for line in (RECORDED / f"{kernel}.txt").read_text().splitlines():
        if not line.startswith("#"):
            count, us, event, address, *stack = line.split()
            if (event == "switch") is switches:
                found.append(Waited(int(count), int(us), event == "spin", address, tuple(stack)))
    assert found
    return found


@pytest.mark.parametrize("kernel", BY_SYMBOL)
def test_the_functions_of_a_stack_say_what_the_address_of_its_lock_says(kernel: str) -> None:
    names = [str(lock) for lock in MOUNT_LOCKS]
    waits = recorded(kernel)
    assert sum(one.us for one in waits if one.by_address == "namespace_sem") > 1_000_000
    for one in waits:
        said = str(one.lock) if one.lock in MOUNT_LOCKS else "another"
        assert said == (one.by_address if one.by_address in names else "another"), one


@pytest.mark.parametrize("kernel", [*BY_SYMBOL, "6.18.44"])
def test_one_address_is_one_lock_and_little_is_unclassified(kernel: str) -> None:
    """Where the kernel keeps its addresses' names to itself, they still tell locks apart."""
    by_address: dict[str, Counter[Lock]] = {}
    waits = recorded(kernel)
    for one in waits:
        by_address.setdefault(one.by_address, Counter())[one.lock] += one.us
    for address, locks in by_address.items():
        # Memory of a process's own may be used again for another lock, mount locks and grace periods' may not.
        if any(lock in locks for lock in (*MOUNT_LOCKS, Lock.GRACE_PERIOD)) and address != "-":
            assert len(locks) == 1 or locks.keys() <= {Lock.NAMESPACE_SEM, Lock.PROCESS}, (address, locks)
    by_lock: Counter[Lock] = Counter()
    for one in waits:
        by_lock[one.lock] += one.us
    assert by_lock[Lock.NAMESPACE_SEM] and by_lock[Lock.GRACE_PERIOD]
    locks_us = sum(us for lock, us in by_lock.items() if lock is not Lock.GRACE_PERIOD)
    assert by_lock[Lock.UNKNOWN] < 0.001 * locks_us


@pytest.mark.parametrize("kernel", [*BY_SYMBOL, "6.18.44"])
def test_grace_periods_are_never_a_lock(kernel: str) -> None:
    waits = [one for one in recorded(kernel) if any("synchronize_rcu" in name for name in one.stack) and not one.spins]
    assert waits and {one.lock for one in waits} == {Lock.GRACE_PERIOD}
    asleep = [one for one in recorded(kernel, switches=True) if one.lock is Lock.GRACE_PERIOD]
    assert asleep
