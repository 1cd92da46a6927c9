/*
 * Constants and structures of the mount API that are newer than the headers of the oldest distribution we build on.
 * The numbers are the kernel's (include/uapi/linux/mount.h, asm-generic/unistd.h); calls from 424 on have one number
 * on every architecture but alpha.
 */
#ifndef FLATMOUNT_UAPI_H
#define FLATMOUNT_UAPI_H

#include <fcntl.h>
#include <linux/types.h>
#include <sys/syscall.h>

#ifndef SYS_open_tree
#define SYS_open_tree 428
#define SYS_move_mount 429
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_statmount
#define SYS_statmount 457
#define SYS_listmount 458
#endif
#ifndef SYS_open_tree_attr
#define SYS_open_tree_attr 467
#endif

#define FM_OPEN_TREE_CLONE 1
#define FM_OPEN_TREE_CLOEXEC O_CLOEXEC
#define FM_AT_EMPTY_PATH 0x1000
#define FM_AT_RECURSIVE 0x8000

#define FM_MOVE_MOUNT_F_EMPTY_PATH 0x4

#define FM_FSOPEN_CLOEXEC 1
#define FM_FSMOUNT_CLOEXEC 1
#define FM_FSCONFIG_SET_FLAG 0
#define FM_FSCONFIG_SET_STRING 1
#define FM_FSCONFIG_SET_PATH 3
#define FM_FSCONFIG_SET_FD 5
#define FM_FSCONFIG_CMD_CREATE 6

#define FM_MOUNT_ATTR_RDONLY 0x1
#define FM_MOUNT_ATTR_IDMAP 0x00100000

#define FM_RESOLVE_NO_XDEV 0x01
#define FM_RESOLVE_NO_MAGICLINKS 0x02
#define FM_RESOLVE_NO_SYMLINKS 0x04
#define FM_RESOLVE_BENEATH 0x08
#define FM_RESOLVE_IN_ROOT 0x10

struct fm_open_how {
	__u64 flags;
	__u64 mode;
	__u64 resolve;
};

struct fm_mount_attr {
	__u64 attr_set;
	__u64 attr_clr;
	__u64 propagation;
	__u64 userns_fd;
};

#endif
