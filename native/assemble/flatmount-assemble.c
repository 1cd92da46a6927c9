/*
 * flatmount-assemble PLAN TARGET [-o OPTIONS]
 *
 * Assembles one container's root file system and attaches it to TARGET with one mount operation. containerd runs it for
 * mounts of type fuse3.flatmount-assemble, by way of mount.fuse3 and a shell, so it stands alone: no Python, no library
 * but libc, and nothing of it stays behind.
 *
 * PLAN is a file of root's, one word and its value a line (src/flatmount/snapshotter/forms.py writes it):
 *
 *   data PATH              the store's data directory
 *   lower PATH             relative to it, topmost first, one line for each
 *   upper PATH, work PATH  relative to it
 *   uid C H N, gid C H N   the container's range, as in /proc/PID/uid_map; none for a container without one
 *   ids container|host     in whose ids the upper is kept
 *   layers detached|attached   whether this kernel's overlayfs takes lowers of a detached mount (6.15)
 *
 *   operation                          system calls
 *   user namespace of the range        fork, unshare, write of the maps, open of /proc/PID/ns/user
 *   the store as the range sees it     open_tree(OPEN_TREE_CLONE), mount_setattr(MOUNT_ATTR_IDMAP)
 *   where lowers must be attached      unshare(CLONE_NEWNS), move_mount over `data` in there, setns back
 *   overlay                            fchdir, fsopen, fsconfig, fsmount
 *   attach                             move_mount
 *
 * Options from containerd change nothing but `ro`. Exit 0, or 1 with one line on stderr.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#include "../uapi.h"

#define MOST_LOWERS 500
#define MAP_BYTES 16384
#define PLAN_BYTES (1 << 20)

struct plan {
	const char *data, *upper, *work;
	const char *lowers[MOST_LOWERS];
	int lower_count, host_ids, attached;
	char uid_map[MAP_BYTES], gid_map[MAP_BYTES];
	unsigned int root_uid, root_gid;
};

static int context = -1;

/* Says what failed, with the kernel's own words where a file-system context has some, and ends. */
static __attribute__((noreturn, format(printf, 1, 2))) void die(const char *format, ...)
{
	int error = errno;
	char line[512];
	va_list arguments;

	fputs("flatmount-assemble: ", stderr);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	if (error)
		fprintf(stderr, ": %s", strerror(error));
	for (ssize_t got; context >= 0 && (got = read(context, line, sizeof(line) - 1)) > 0;) {
		line[got] = '\0';
		fprintf(stderr, "; the kernel: %s", line + (got > 2 && line[1] == ' ' ? 2 : 0));
	}
	fputc('\n', stderr);
	exit(1);
}

static void append_map(char *map, const char *value, unsigned int *root)
{
	unsigned int container, host, size;
	size_t used = strlen(map);

	errno = 0;
	if (sscanf(value, "%u %u %u", &container, &host, &size) != 3 || !size)
		die("the plan's range '%s' is none", value);
	if (!used)
		*root = host;
	if (used + strlen(value) + 2 > MAP_BYTES)
		die("the plan has too many ranges");
	sprintf(map + used, "%u %u %u\n", container, host, size);
}

/* The words of the plan point into its text, which stays. */
static void read_plan(const char *path, struct plan *plan)
{
	struct stat status;
	char *text, *line, *rest;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);

	if (fd < 0 || fstat(fd, &status) < 0)
		die("open the plan %s", path);
	errno = 0;
	if (!S_ISREG(status.st_mode) || status.st_uid != geteuid() || (status.st_mode & 022))
		die("the plan %s is not a file that only its owner can write", path);
	if (status.st_size >= PLAN_BYTES || !(text = calloc(1, (size_t)status.st_size + 1)))
		die("the plan %s is too large", path);
	if (read(fd, text, (size_t)status.st_size) != status.st_size)
		die("read the plan %s", path);
	close(fd);

	for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		char *value = strchr(line, ' ');

		errno = 0;
		if (!value)
			die("the plan %s has a line without a value: %s", path, line);
		*value++ = '\0';
		if (!strcmp(line, "data")) {
			plan->data = value;
		} else if (!strcmp(line, "upper")) {
			plan->upper = value;
		} else if (!strcmp(line, "work")) {
			plan->work = value;
		} else if (!strcmp(line, "lower")) {
			if (plan->lower_count == MOST_LOWERS)
				die("the plan %s has more than %d lowers", path, MOST_LOWERS);
			plan->lowers[plan->lower_count++] = value;
		} else if (!strcmp(line, "uid")) {
			append_map(plan->uid_map, value, &plan->root_uid);
		} else if (!strcmp(line, "gid")) {
			append_map(plan->gid_map, value, &plan->root_gid);
		} else if (!strcmp(line, "ids")) {
			plan->host_ids = !strcmp(value, "host");
		} else if (!strcmp(line, "layers")) {
			plan->attached = !strcmp(value, "attached");
		} else {
			die("the plan %s has an unknown word: %s", path, line);
		}
	}
	errno = 0;
	if (!plan->data || !plan->upper || !plan->work || !plan->lower_count)
		die("the plan %s is not complete", path);
	if (!*plan->uid_map != !*plan->gid_map)
		die("the plan %s has half a mapping", path);
}

static void write_map(pid_t pid, const char *name, const char *map)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, map, strlen(map)) != (ssize_t)strlen(map))
		die("write %s", path);
	close(fd);
}

/* A child holds the namespace until its maps are written and a descriptor of it is open. */
static int user_namespace(const struct plan *plan)
{
	int ready[2], fd;
	char path[64], byte;
	pid_t child;

	if (pipe2(ready, O_CLOEXEC) < 0 || (child = fork()) < 0)
		die("start the holder of a user namespace");
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (unshare(CLONE_NEWUSER) < 0 || write(ready[1], "", 1) != 1)
			_exit(errno);
		close(ready[1]);
		for (;;)
			pause();
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1) {
		int status = 0;

		waitpid(child, &status, 0);
		errno = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
		die("make a user namespace");
	}
	close(ready[0]);
	write_map(child, "uid_map", plan->uid_map);
	write_map(child, "gid_map", plan->gid_map);
	snprintf(path, sizeof(path), "/proc/%d/ns/user", (int)child);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		die("open %s", path);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	return fd;
}

static int clone_tree(const char *path)
{
	int fd = (int)syscall(SYS_open_tree, AT_FDCWD, path, FM_OPEN_TREE_CLONE | FM_OPEN_TREE_CLOEXEC);

	if (fd < 0)
		die("open_tree %s", path);
	return fd;
}

static void map_tree(int tree, int userns)
{
	struct fm_mount_attr attributes = {.attr_set = FM_MOUNT_ATTR_IDMAP, .userns_fd = (__u64)userns};

	if (syscall(SYS_mount_setattr, tree, "", FM_AT_EMPTY_PATH, &attributes, sizeof(attributes)) < 0)
		die("mount_setattr: id-map the store");
}

static void set_string(const char *key, const char *value)
{
	if (syscall(SYS_fsconfig, context, FM_FSCONFIG_SET_STRING, key, value, 0) < 0)
		die("fsconfig %s=%s", key, value);
}

/* overlayfs makes files with its mounter's ids, and the host's root has none in the range. Capabilities are kept. */
static void assume_ids(const struct plan *plan)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct capabilities[2];

	if (syscall(SYS_capget, &header, capabilities) < 0)
		die("capget");
	setfsgid(plan->root_gid);
	setfsuid(plan->root_uid);
	if (syscall(SYS_capset, &header, capabilities) < 0)
		die("capset");
}

static void enter(int directory, const char *what)
{
	if (fchdir(directory) < 0)
		die("fchdir %s", what);
}

/* In a namespace of our own the trees can be attached, which overlayfs wants of its layers before 6.15. */
static int attach_privately(int tree, const char *data)
{
	if (syscall(SYS_move_mount, tree, "", AT_FDCWD, data, FM_MOVE_MOUNT_F_EMPTY_PATH) < 0)
		die("move_mount in a namespace of our own over %s", data);
	close(tree);
	tree = open(data, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (tree < 0)
		die("open %s", data);
	return tree;
}

static int overlay(const struct plan *plan, int read_only)
{
	int mapped = *plan->uid_map != '\0', plain = -1, layers = clone_tree(plan->data), root;
	int assume = mapped && !plan->host_ids;

	if (mapped && plan->host_ids)
		plain = clone_tree(plan->data);
	if (mapped)
		map_tree(layers, user_namespace(plan));
	if (plan->attached) {
		if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
			die("enter a mount namespace of our own");
		if (plain >= 0)
			plain = attach_privately(plain, plan->data);
		layers = attach_privately(layers, plan->data);
	}
	if (assume)
		assume_ids(plan);
	context = (int)syscall(SYS_fsopen, "overlay", FM_FSOPEN_CLOEXEC);
	if (context < 0)
		die("fsopen overlay");
	set_string("source", "flatmount");
	enter(layers, "to the layers");
	if (plan->lower_count == 1)
		set_string("lowerdir", plan->lowers[0]);
	else
		for (int i = 0; i < plan->lower_count; i++)
			set_string("lowerdir+", plan->lowers[i]);
	if (plain >= 0)
		enter(plain, "to the uppers");
	set_string("upperdir", plan->upper);
	set_string("workdir", plan->work);
	set_string("redirect_dir", "off");
	set_string("metacopy", "off");
	set_string("index", "off");
	if (syscall(SYS_fsconfig, context, FM_FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		die("fsconfig: make the overlay");
	root = (int)syscall(SYS_fsmount, context, FM_FSMOUNT_CLOEXEC, read_only ? FM_MOUNT_ATTR_RDONLY : 0);
	if (root < 0)
		die("fsmount");
	return root;
}

static int has_option(int argc, char **argv, const char *wanted)
{
	for (int i = 3; i < argc; i++) {
		char *rest, *word = strtok_r(strdup(argv[i]), ",", &rest);

		for (; word; word = strtok_r(NULL, ",", &rest))
			if (!strcmp(word, wanted))
				return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	static struct plan plan;
	int home, root;

	if (argc < 3) {
		fputs("usage: flatmount-assemble PLAN TARGET [-o OPTIONS]\n", stderr);
		return 2;
	}
	home = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
	if (home < 0)
		die("open /proc/self/ns/mnt");
	read_plan(argv[1], &plan);
	root = overlay(&plan, has_option(argc, argv, "ro"));
	if (plan.attached && setns(home, CLONE_NEWNS) < 0)
		die("go back to the mount namespace of the caller");
	if (syscall(SYS_move_mount, root, "", AT_FDCWD, argv[2], FM_MOVE_MOUNT_F_EMPTY_PATH) < 0)
		die("move_mount to %s", argv[2]);
	return 0;
}
