/*
 * The floor under `flat`: the kernel operations of one container, from a bare C loop. What the bench holds us against.
 *
 *   floor DATA FLAT ROOTS CONTAINERS THREADS fresh|ahead TAG
 *
 * Makes CONTAINERS root file systems in the calling mount namespace, THREADS at a time: directories, an overlay of the
 * tree DATA/FLAT with an id-mapped upper below DATA/uppers, attached below ROOTS. `fresh` makes each user namespace and
 * each range's pinned parent within the timed loop, `ahead` before it. Prints nanoseconds of wall time, then undoes all.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../native/uapi.h"

#define MOST 100000

static const char *data, *flat, *roots, *tag;
static int containers, threads, ahead;
static int user_namespaces[MOST], parents[MOST];
static int next_container;
static pthread_barrier_t barrier;

static void die(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

#define MUST(call) ({ long result_ = (long)(call); if (result_ < 0) die(#call); result_; })

static int wait_to_be_killed(void *unused)
{
	for (;;)
		pause();
	return 0;
}

static unsigned int first_id(int i)
{
	return (1u << 20) + (unsigned int)i * 65536u;
}

static void write_file(const char *path, const char *text)
{
	int fd = (int)MUST(open(path, O_WRONLY | O_CLOEXEC));
	MUST(write(fd, text, strlen(text)));
	close(fd);
}

static void make_range(int i, char *stack)
{
	char path[64], map[64];
	struct fm_mount_attr attr = {.attr_set = FM_MOUNT_ATTR_IDMAP};
	int status;

	pid_t pid = (pid_t)MUST(clone(wait_to_be_killed, stack, CLONE_NEWUSER | CLONE_VM | CLONE_FILES, NULL));
	snprintf(map, sizeof(map), "0 %u 65536\n", first_id(i));
	snprintf(path, sizeof(path), "/proc/%d/uid_map", pid);
	write_file(path, map);
	snprintf(path, sizeof(path), "/proc/%d/gid_map", pid);
	write_file(path, map);
	snprintf(path, sizeof(path), "/proc/%d/ns/user", pid);
	user_namespaces[i] = (int)MUST(open(path, O_RDONLY | O_CLOEXEC));
	kill(pid, SIGKILL);
	MUST(waitpid(pid, &status, __WCLONE));

	parents[i] = (int)MUST(syscall(SYS_open_tree, AT_FDCWD, data, FM_OPEN_TREE_CLONE | FM_OPEN_TREE_CLOEXEC));
	attr.userns_fd = (__u64)user_namespaces[i];
	MUST(syscall(SYS_mount_setattr, parents[i], "", FM_AT_EMPTY_PATH, &attr, sizeof(attr)));
}

static void set_string(int context, const char *key, const char *value)
{
	MUST(syscall(SYS_fsconfig, context, FM_FSCONFIG_SET_STRING, key, value, 0));
}

static void assemble(int i)
{
	char upper[256], path[320], target[320];
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct caps[2];
	struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};

	snprintf(upper, sizeof(upper), "%s/uppers/%s-%d", data, tag, i);
	MUST(mkdir(upper, 0700));
	snprintf(path, sizeof(path), "%s/fs", upper);
	MUST(mkdir(path, 0755));
	MUST(chmod(path, 0755));
	snprintf(target, sizeof(target), "%s/work", upper);
	MUST(mkdir(target, 0700));
	MUST(utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW));
	snprintf(target, sizeof(target), "%s/%s-%d", roots, tag, i);
	MUST(mkdir(target, 0700));

	MUST(syscall(SYS_capget, &header, caps));
	setfsgid(first_id(i));
	setfsuid(first_id(i));
	MUST(syscall(SYS_capset, &header, caps));

	int context = (int)MUST(syscall(SYS_fsopen, "overlay", FM_FSOPEN_CLOEXEC));
	snprintf(path, sizeof(path), "flatmount-%s-%d", tag, i);
	set_string(context, "source", path);
	MUST(fchdir(parents[i]));
	set_string(context, "lowerdir", flat);
	snprintf(path, sizeof(path), "uppers/%s-%d/fs", tag, i);
	set_string(context, "upperdir", path);
	snprintf(path, sizeof(path), "uppers/%s-%d/work", tag, i);
	set_string(context, "workdir", path);
	set_string(context, "redirect_dir", "off");
	set_string(context, "metacopy", "off");
	set_string(context, "index", "off");
	MUST(syscall(SYS_fsconfig, context, FM_FSCONFIG_CMD_CREATE, NULL, NULL, 0));
	int root = (int)MUST(syscall(SYS_fsmount, context, FM_FSMOUNT_CLOEXEC, 0));
	MUST(syscall(SYS_move_mount, root, "", AT_FDCWD, target, FM_MOVE_MOUNT_F_EMPTY_PATH));

	setfsuid(0);
	setfsgid(0);
	MUST(syscall(SYS_capset, &header, caps));
	MUST(chdir("/"));
	close(context);
	close(root);
}

static void *work(void *unused)
{
	char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);

	MUST(unshare(CLONE_FS));
	pthread_barrier_wait(&barrier);
	for (;;) {
		int i = __atomic_fetch_add(&next_container, 1, __ATOMIC_RELAXED);
		if (i >= containers)
			break;
		if (!ahead)
			make_range(i, stack + 65536);
		assemble(i);
	}
	munmap(stack, 65536);
	return NULL;
}

static void undo(int i)
{
	char target[256];

	snprintf(target, sizeof(target), "%s/%s-%d", roots, tag, i);
	MUST(umount2(target, UMOUNT_NOFOLLOW));
	MUST(rmdir(target));
	close(parents[i]);
	close(user_namespaces[i]);
}

int main(int argc, char **argv)
{
	struct timespec begun, ended;

	if (argc != 8) {
		fprintf(stderr, "usage: floor DATA FLAT ROOTS CONTAINERS THREADS fresh|ahead TAG\n");
		return 2;
	}
	data = argv[1];
	flat = argv[2];
	roots = argv[3];
	containers = atoi(argv[4]);
	threads = atoi(argv[5]);
	ahead = !strcmp(argv[6], "ahead");
	tag = argv[7];
	if (containers < 1 || containers > MOST || threads < 1 || threads > 1024) {
		fprintf(stderr, "floor: containers from 1 to %d, threads from 1 to 1024\n", MOST);
		return 2;
	}

	if (ahead) {
		char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
		for (int i = 0; i < containers; i++)
			make_range(i, stack + 65536);
	}
	pthread_t *workers = calloc((size_t)threads, sizeof(*workers));
	pthread_barrier_init(&barrier, NULL, (unsigned int)threads + 1);
	for (int i = 0; i < threads; i++)
		pthread_create(&workers[i], NULL, work, NULL);
	pthread_barrier_wait(&barrier);
	clock_gettime(CLOCK_MONOTONIC, &begun);
	for (int i = 0; i < threads; i++)
		pthread_join(workers[i], NULL);
	clock_gettime(CLOCK_MONOTONIC, &ended);
	printf("%lld\n", (ended.tv_sec - begun.tv_sec) * 1000000000ll + ended.tv_nsec - begun.tv_nsec);
	for (int i = 0; i < containers; i++)
		undo(i);
	return 0;
}
