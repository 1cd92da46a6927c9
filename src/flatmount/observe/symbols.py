"""Which lock a kernel stack waits for or spins on, told from the names of its functions.

Tables of names, not addresses: most kernels keep the symbols of their data to themselves. A stack is leaf first. Lock
functions are skipped from the leaf, and the first other function says whose lock it was; for grace periods any function
of the stack does. Checked on stacks recorded with the addresses of their locks on Linux 6.1, 6.12 and 6.18
(tests/data/stacks, made by tools/record_stacks.py).

See: fs/namespace.c, fs/pnode.c, kernel/locking/, kernel/rcu/tree_exp.h of Linux 5.15 to 7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum


class Lock(StrEnum):
    """What was waited for. The first two are the mount locks; grace periods are no lock, and none of their time is."""

    NAMESPACE_SEM = "namespace_sem"
    MOUNT_LOCK = "mount_lock"
    GRACE_PERIOD = "RCU grace period"
    INODE_HASH = "inode hash"
    SUPERBLOCK = "superblocks"
    DIRECTORY = "inodes and directories"
    FILE_SYSTEM = "file system and disk"
    MEMORY = "memory"
    SCHEDULER = "scheduler and timers"
    CGROUP = "cgroups"
    PROCESS = "processes and signals"
    NETWORK = "network and pipes"
    DRIVER = "virtual machines and drivers"
    UNKNOWN = "unclassified"


MOUNT_LOCKS = (Lock.NAMESPACE_SEM, Lock.MOUNT_LOCK)

_SUFFIX = re.compile(r"(?:\.(?:isra|part|constprop|cold|llvm|lto_priv)(?:\.\d+)*)*(?:\+0x[0-9a-f]+(?:/0x[0-9a-f]+)?)?$")

_SPIN = re.compile(
    r"_*(?:native_|pv_|__pv_)?queued_(?:spin|read|write)_lock_slowpath|_*raw_(?:spin|read|write)_(?:try)?lock\w*|"
    r"_*raw_spin_rq_lock\w*|do_raw_spin_lock|pv_wait\w*|kvm_wait|native_queued_\w+|lockref_get\w*|lockref_put\w*|"
    r"raw_spin_rq_lock_nested|_atomic_dec_and_lock\w*|refcount_dec_and_lock\w*|task_rq_lock|__task_rq_lock"
)
_SLEEP = re.compile(
    r"rwsem_\w+|downgrade_write|_*(?:down|up)_(?:read|write)\w*|osq_\w+|_*mutex_\w+|_*percpu_(?:down|up|rwsem)_\w+|ww_mutex\w*|"
    r"rt_mutex\w*|_*rt_\w*lock\w*|_*schedule\w*|io_schedule\w*|schedule_\w+|_*sched_switch\w*|preempt_schedule\w*|"
    r"__cond_resched|bit_wait\w*|__wait_on_bit\w*|out_of_line_wait_on_bit\w*|wait_for_completion\w*|"
    r"__wait_for_common|do_wait_for_common|percpu_rwsem_wait\w*|down|__down\w*|down_interruptible|down_killable"
)
_SLEEP_LOCK = re.compile(r"rwsem_|_*down_|downgrade_|_*up_(?:read|write)|_*mutex_|osq_|_*percpu_down|ww_mutex")
_TRACING = re.compile(r"_*trace(?:iter|_)\w*|_*probestub_\w+|perf_\w+|bpf_\w+|__bpf_\w+|trace_\w+")

_GRACE = re.compile(
    r"exp_funnel_lock|synchronize_(?:s?rcu\w*|sched)|_*wait_rcu_\w*|rcu_barrier\w*|sync_rcu_\w+|rcu_exp_\w+|"
    r"sync_exp_\w+|cond_synchronize_rcu\w*|__synchronize_srcu|synchronize_net|_*sync_sched_exp\w*"
)

# Who takes namespace_sem: for writing whoever changes a table, for reading whoever clones privately or reads one.
_NAMESPACE_SEM = frozenset(
    (
        *("namespace_lock", "namespace_unlock", "do_lock_mount", "lock_mount", "lock_mount_exact", "path_umount"),
        *("do_umount", "ksys_umount", "__x64_sys_umount", "__do_sys_umount", "do_loopback", "__do_loopback"),
        *("vfs_open_tree", "open_detached_copy", "__do_sys_open_tree", "__x64_sys_open_tree", "do_change_type"),
        *("copy_mnt_ns", "put_mnt_ns", "free_mnt_ns", "dissolve_on_fput", "attach_recursive_mnt", "do_set_group"),
        *("do_move_mount", "do_move_mount_old", "do_add_mount", "do_new_mount", "do_new_mount_fc", "path_pivot_root"),
        *("__do_sys_pivot_root", "__x64_sys_pivot_root", "clone_private_mount", "collect_mounts", "collect_paths"),
        *("drop_collected_mounts", "drop_collected_paths", "is_path_reachable", "path_is_under", "our_mnt"),
        *("m_start", "m_stop", "mnt_warn_timestamp_expiry", "do_statmount", "__do_sys_statmount", "do_listmount"),
        *("__do_sys_listmount", "__x64_sys_statmount", "__x64_sys_listmount", "mark_mounts_for_expiry"),
        *("finish_automount", "mnt_set_expiry", "__detach_mounts", "detach_mounts", "current_chrooted"),
        *("mnt_already_visible", "mount_too_revealing", "mntns_install", "__legitimize_mnt_ns", "umount_mnt"),
        *(
            "__unlock_mount",
            "unlock_mount",
            "may_umount_tree",
            "may_umount",
            "vfs_statmount",
            "create_new_namespace",
            "fsmount_namespace",
        ),
        *("mount_setattr_commit", "__do_sys_mount_setattr", "do_mount_setattr", "__do_sys_move_mount"),
        # rmdir and the like ask whether somebody is mounted there; do_change_type is often inlined into path_mount.
        *("__is_local_mountpoint", "mnt_cursor_del", "path_mount"),
    )
)
_MOUNT_LOCK = frozenset(
    (
        *("lock_mount_hash", "mntput_no_expire", "mntput_no_expire_slowpath", "mntput", "path_umount", "do_umount"),
        *("umount_tree", "attach_recursive_mnt", "do_lock_mount", "lock_mount", "clone_mnt", "setup_mnt", "copy_tree"),
        *("do_mount_setattr", "dissolve_on_fput", "put_mnt_ns", "vfs_create_mount", "namespace_unlock", "copy_mnt_ns"),
        *("do_move_mount", "do_change_type", "path_pivot_root", "commit_tree", "do_add_mount", "do_loopback"),
        *("mount_setattr_commit", "mount_setattr_prepare", "mnt_set_mountpoint", "mnt_clear_expiry", "kern_unmount"),
        *("kern_unmount_array", "sb_prepare_remount_readonly", "mnt_make_readonly", "do_reconfigure_mnt", "do_remount"),
        *("mark_mounts_for_expiry", "__detach_mounts", "drop_collected_mounts", "drop_collected_paths", "mnt_release"),
        *(
            "is_path_reachable",
            "m_show",
            "__unlock_mount",
            "unlock_mount",
            "open_detached_copy",
            "vfs_open_tree",
            "clone_private_mount",
            "cleanup_mnt",
        ),
        *("__is_local_mountpoint", "lock_mount_exact", "vfs_kern_mount", "fc_mount", "mnt_add_count", "free_mnt_ns"),
        *("set_mount_attributes", "do_set_group", "mount_too_revealing", "mnt_already_visible", "get_mountpoint"),
        # A path that is printed again and again takes it at last; so does a look-up that meets a mount on its way out.
        *("prepend_path", "__legitimize_mnt", "current_chrooted"),
    )
)

# Everything else by what the function or its surroundings are called: the first of a few functions that any matches.
_ELSE = {
    Lock.INODE_HASH: (
        r"ovl_get_trap_inode|iget5?_locked\w*|inode_insert5|ilookup5\w*|find_inode\w*|"
        r"insert_inode_locked\w*|inode_hash\w*|__(?:insert|remove)_inode_hash|inode_sb_list\w*|"
        r"new_inode\w*|evict|iput\w*|clear_inode"
    ),
    Lock.SUPERBLOCK: (
        r"sget\w*|super_lock\w*|grab_super\w*|deactivate_\w*super\w*|alloc_super|destroy_super\w*|"
        r"vfs_get_super|(?:get|free)_anon_bdev|kill_\w*super|generic_shutdown_super|iterate_supers\w*|"
        r"super_cache_\w+|\w*_sb"
    ),
    Lock.FILE_SYSTEM: (
        r"ext4_\w+|jbd2_\w+|xfs_\w+|btrfs_\w+|blk_\w+|\w*writeback\w*|wb_\w+|submit_bio\w*|mpage_\w+|"
        r"dio_\w+|virtblk_\w+|virtqueue_\w+|scsi_\w+|nvme_\w+|iomap_\w+|fsync\w*|vfs_fsync\w*|"
        r"folio_wait_\w+|shmem_\w+|simple_\w+|tmpfs_\w+|kernfs_\w+|sysfs_\w+|proc_\w+|overlay\w*|ovl_\w+|"
        r"fuse_\w+|nfs_\w+|erofs_\w+|loop_\w+"
    ),
    Lock.CGROUP: (r"cgroup_\w+|css_\w+|cpuset_\w+|mem_cgroup_\w+|memcg_\w+|pids_\w+|\w*cgrp\w*|blkcg_\w+|rstat_\w+"),
    Lock.DIRECTORY: (
        r"walk_component|lookup_\w+|__?lookup_slow|path_\w*(?:lookup|open|parent)\w*|do_filp_open|"
        r"filename_\w+|link_path_walk\w*|open_last_lookups|"
        r"do_(?:unlink|mkdir|rmdir|rename|link|symlink|mknod)\w*|vfs_\w+|iterate_dir|d_\w+|__d_\w+|dput\w*|"
        r"dget\w*|dentry_\w+|shrink_d\w+|__dentry_kill|simple_xattr\w*|notify_change|fput\w*|__fput|"
        r"complete_walk|try_to_unlazy\w*|legitimize_\w+|step_into\w*|pick_link|file_\w+|alloc_fd|fd_\w+|"
        r"locks_\w+|fsnotify\w*"
    ),
    Lock.MEMORY: (
        r"mmap_\w+|do_user_addr_fault|handle_mm_fault|exit_mm\w*|dup_mm\w*|unmap_\w+|do_mmap|do_mprotect\w*|mprotect\w*|"
        r"(?:do_)?madvise\w*|\w*alloc_pages\w*|get_page_from_freelist|rmqueue\w*|free_\w*(?:page|pcp)\w*|lru_\w+|"
        r"folio_\w+|\w*slab\w*|kmem_\w+|kmalloc\w*|kfree\w*|vmalloc\w*|vfree\w*|alloc_vmap\w*|purge_\w+|"
        r"tlb_\w+|flush_tlb\w*|lock_vma\w*|vma_\w+|\w*_vma|zap_\w+|__handle_mm_fault|"
        r"do_\w*(?:fault|anonymous_page|wp_page|munmap|brk|swap_page)\w*|shrink_\w+|reclaim_\w+|"
        r"anon_vma_\w+|pte_\w+|__pte_\w+|swap_\w+|percpu_\w+|pcpu_\w+|free_percpu|damon_\w+|kdamond\w*|"
        r"khugepaged\w*|drain_\w+|\w*_batch_\w+|exc_page_fault|_*vm_\w+"
    ),
    Lock.SCHEDULER: (
        r"try_to_wake_up|ttwu_\w+|sched_\w+|scheduler_\w+|update_\w+|\w*balance\w*|task_\w*(?:tick|rq)\w*|"
        r"wake_up\w*|swake_\w+|hrtimer_\w+|timer_\w+|tick_\w+|run_timer\w*|rcu_\w+|__rcu\w*|"
        r"note_gp_changes|call_rcu\w*|\w*workqueue\w*|queue_\w*work\w*|process_one_work|worker_\w+|"
        r"kthread\w*|pick_next_task\w*|newidle\w*|dequeue_\w+|enqueue_\w+|__mod_timer|mod_timer|idle_\w+|"
        r"irq_\w+|handle_irq\w*|stop_one_cpu\w*|cpu_stop\w*|migration_\w+|set_cpus\w*|wq_\w+|"
        r"prepare_to_wait\w*|finish_wait|add_wait\w*|_*schedule\w*|__cond_resched"
    ),
    Lock.PROCESS: (
        r"copy_process|release_task|do_exit|do_wait\w*|wait_\w+|exit_\w+|do_group_exit|kernel_clone|"
        r"send_sig\w*|\w*sigprocmask|do_send_\w+|futex\w*|\w*signal\w*|\w*sigaction\w*|ptrace_\w+|alloc_pid|free_pid\w*|"
        r"put_pid\w*|begin_new_exec|exec_\w+|get_signal|__lock_task\w*|create_user_ns|\w*ucount\w*|"
        r"user_\w+|put_cred\w*|key_\w+|\w*keyring\w*|free_uid|alloc_uid|prlimit\w*|set_\w*ids?|proc_id_\w+|"
        r"ns_\w+|\w*_ns|free_nsproxy|create_new_namespaces|switch_task_namespaces|do_prlimit|nsproxy\w*|"
        r"idr_\w+|ida_\w+|seq_\w+"
    ),
    Lock.NETWORK: (
        r"sock_\w+|tcp_\w+|ip_\w+|inet\w*|net\w*|unix_\w+|pipe_\w+|anon_pipe\w*|eventfd_\w+|ep_\w+|"
        r"\w*epoll\w*|\w*poll\w*|skb_\w+|vsock_\w+|virtio_\w+|tty_\w+|n_tty\w*|rtnl_\w+|dev_\w+|vhost_\w+|"
        r"splice_\w+"
    ),
    Lock.DRIVER: (
        r"kvm_\w+|vcpu_\w+|vmx_\w+|svm_\w+|xfer_to_guest\w*|x86_\w+|apic_\w+|pci_\w+|printk\w*|console_\w+|"
        r"vprintk\w*|ktime_\w+|clocksource\w*|module_\w+|text_poke\w*|jump_label\w*|static_key\w*|"
        r"ftrace_\w+|event_\w+|ring_buffer\w*|tracing_\w+|smp_\w+|on_each_cpu\w*"
    ),
}
_ELSE_COMPILED = tuple((lock, re.compile(pattern)) for lock, pattern in _ELSE.items())
_SURROUNDINGS = 6

# Work that is done under a mount lock: time there is time for which the others wait.
_UNDER_LOCKS = frozenset(
    (
        *("copy_tree", "clone_mnt", "umount_tree", "attach_recursive_mnt", "propagate_mnt", "propagate_umount"),
        *("commit_tree", "is_subdir", "has_locked_children", "namespace_unlock", "mnt_get_count", "copy_mnt_ns"),
        *("put_mnt_ns", "dissolve_on_fput", "bulk_make_private", "change_mnt_propagation", "m_show", "m_start"),
        *("mnt_notify_add", "notify_mnt_list", "alloc_vfsmnt", "has_children", "mnt_set_mountpoint", "trim_one"),
    )
)
# Leaves that read mount_lock's sequence and turn round while somebody writes.
_SEQUENCE_READERS = frozenset(
    ("path_init", "__legitimize_mnt", "lookup_mnt", "__lookup_mnt", "legitimize_path", "choose_mountpoint")
)


class Work(StrEnum):
    """What a processor was doing, as far as mounts go."""

    SPINNING = "spinning on a mount lock"
    UNDER_LOCK = "working under a mount lock"
    GRACE_PERIOD = "grace periods"
    ELSE = "else"


def normal(name: str) -> str:
    """A symbol without what compilers and printers append: offsets, `.isra.0`, `.part.0`, `.constprop.0`, `.cold`."""
    return _SUFFIX.sub("", name)


def waited_for(stack: Sequence[str], *, spins: bool) -> Lock:
    """The lock that a contended wait with this stack was for.

    Args:
        stack: symbols, leaf first, as printed.
        spins: whether the event said that it is a spinning lock; else a semaphore, a mutex or the scheduler.
    """
    names = [normal(name) for name in stack]
    if any(_GRACE.fullmatch(name) for name in names) and not spins:
        return Lock.GRACE_PERIOD
    rest = [name for name in names if not _is_lock_function(name, spins)]
    if not rest:
        return Lock.UNKNOWN
    if spins and _SLEEP_LOCK.match(rest[0]):
        # The little lock inside of a semaphore or a mutex: waiting for it is waiting for the semaphore.
        return waited_for(stack, spins=False)
    table = _MOUNT_LOCK if spins else _NAMESPACE_SEM
    if rest[0] in table:
        return Lock.MOUNT_LOCK if spins else Lock.NAMESPACE_SEM
    for name in rest[:_SURROUNDINGS]:
        for lock, pattern in _ELSE_COMPILED:
            if pattern.fullmatch(name):
                return lock
    return Lock.UNKNOWN


def working_on(stack: Sequence[str]) -> Work:
    """What a processor sample with this stack was doing."""
    names = [normal(name) for name in stack]
    if not names:
        return Work.ELSE
    if names[0] in _SEQUENCE_READERS:
        return Work.SPINNING
    if _SPIN.fullmatch(names[0]) and waited_for(stack, spins=True) is Lock.MOUNT_LOCK:
        return Work.SPINNING
    if _SLEEP_LOCK.match(names[0]) and waited_for(stack, spins=False) is Lock.NAMESPACE_SEM:
        return Work.SPINNING
    if any(_GRACE.fullmatch(name) for name in names):
        return Work.GRACE_PERIOD
    return Work.UNDER_LOCK if any(name in _UNDER_LOCKS for name in names) else Work.ELSE


def _is_lock_function(name: str, spins: bool) -> bool:
    # A spinning lock that the scheduler takes is its own, whatever made the task sleep.
    patterns = (_SPIN, _TRACING) if spins else (_SPIN, _SLEEP, _TRACING)
    return any(pattern.fullmatch(name) for pattern in patterns)
