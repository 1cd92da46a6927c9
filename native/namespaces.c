/* Namespaces: made without forking the interpreter. */
#include "common.h"
#include "task.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/* Only lives to hold its user namespace until a descriptor of it is open. */
static int hold_namespace(void *argument)
{
	pid_t parent = *(pid_t *)argument;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		return 1;
	for (;;)
		pause();
}

static int write_map(pid_t pid, const char *file, const char *map, size_t bytes)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t written = write(fd, map, bytes);
	int error = errno;
	close(fd);
	errno = error;
	return written == (ssize_t)bytes ? 0 : -1;
}

static int open_namespace(pid_t pid, const char *kind)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/ns/%s", pid, kind);
	return open(path, O_RDONLY | O_CLOEXEC);
}

static int make_user_namespace(const char *uids, size_t uid_bytes, const char *gids, size_t gid_bytes)
{
	struct fm_task task;
	pid_t parent = getpid();
	int fd = -1;

	if (fm_task_start(&task, CLONE_NEWUSER, hold_namespace, &parent) < 0)
		return -1;
	if (write_map(task.pid, "uid_map", uids, uid_bytes) == 0 && write_map(task.pid, "gid_map", gids, gid_bytes) == 0)
		fd = open_namespace(task.pid, "user");
	int error = errno;
	fm_task_end(&task, 1);
	errno = error;
	return fd;
}

struct wanted {
	const char *uids, *gids;
	Py_ssize_t uid_bytes, gid_bytes;
	int fd, error;
};

struct order {
	struct wanted *wanted;
	Py_ssize_t count, next;
};

static void *make_ordered(void *argument)
{
	struct order *order = argument;

	for (;;) {
		Py_ssize_t i = __atomic_fetch_add(&order->next, 1, __ATOMIC_RELAXED);
		if (i >= order->count)
			return NULL;
		struct wanted *w = &order->wanted[i];
		w->fd = make_user_namespace(w->uids, (size_t)w->uid_bytes, w->gids, (size_t)w->gid_bytes);
		w->error = w->fd < 0 ? errno : 0;
	}
}

/* On `threads` threads, the calling one among them: where no further one can be had, it does the work alone. */
static void make_all(struct order *order, int threads)
{
	pthread_t *workers = calloc((size_t)threads, sizeof(*workers));
	int started = 0;

	while (workers && started < threads - 1 && !pthread_create(&workers[started], NULL, make_ordered, order))
		started++;
	make_ordered(order);
	for (int i = 0; i < started; i++)
		pthread_join(workers[i], NULL);
	free(workers);
}

static PyObject *user_namespaces(PyObject *module, PyObject *arguments)
{
	PyObject *maps, *result = NULL;
	struct order order = {0};
	int threads, error = 0;

	if (!PyArg_ParseTuple(arguments, "O!i:user_namespaces", &PyList_Type, &maps, &threads))
		return NULL;
	order.count = PyList_Size(maps);
	order.wanted = PyMem_Calloc((size_t)order.count + 1, sizeof(*order.wanted));
	if (!order.wanted)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < order.count; i++) {
		struct wanted *w = &order.wanted[i];
		if (!PyArg_ParseTuple(PyList_GetItem(maps, i), "y#y#", &w->uids, &w->uid_bytes, &w->gids, &w->gid_bytes))
			goto out;
	}

	Py_BEGIN_ALLOW_THREADS
	make_all(&order, threads);
	for (Py_ssize_t i = 0; i < order.count && !error; i++)
		error = order.wanted[i].error;
	for (Py_ssize_t i = 0; i < order.count && error; i++)
		if (order.wanted[i].fd >= 0)
			close(order.wanted[i].fd);
	Py_END_ALLOW_THREADS

	if (error) {
		errno = error;
		PyErr_SetFromErrno(PyExc_OSError);
		goto out;
	}
	result = PyList_New(order.count);
	for (Py_ssize_t i = 0; result && i < order.count; i++)
		PyList_SetItem(result, i, PyLong_FromLong(order.wanted[i].fd));
out:
	PyMem_Free(order.wanted);
	return result;
}

struct emptying {
	pid_t parent;
	int source, ready, error;
};

static int empty_and_hold(void *argument)
{
	struct emptying *e = argument;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/*
	 * The tmpfs lies over the root, and a root's ".." is whatever lies over it: no directory is needed, nor made, in
	 * file systems that are the host's.
	 */
	if (getppid() != e->parent || (e->source >= 0 && setns(e->source, CLONE_NEWNS) < 0) || unshare(CLONE_NEWNS) < 0 ||
	    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    mount("flatmount", "/", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700,size=1m") < 0 ||
	    chdir("/..") < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0)
		__atomic_store_n(&e->error, errno ? errno : ESRCH, __ATOMIC_RELEASE);
	__atomic_store_n(&e->ready, 1, __ATOMIC_RELEASE);
	syscall(SYS_futex, &e->ready, FUTEX_WAKE, 1, NULL, NULL, 0);
	for (;;)
		pause();
}

/* A futex may wake for nothing: only `ready` itself and the end of the time count. Returns 0 or an errno. */
static int wait_until(int *ready, int seconds)
{
	struct timespec end;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += seconds;
	while (!__atomic_load_n(ready, __ATOMIC_ACQUIRE))
		if (syscall(SYS_futex, ready, FUTEX_WAIT_BITSET, 0, &end, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
		    errno != EAGAIN && errno != EINTR)
			return __atomic_load_n(ready, __ATOMIC_ACQUIRE) ? 0 : errno;
	return 0;
}

static PyObject *empty_mount_namespace(PyObject *module, PyObject *arguments)
{
	int fd = -1, error = 0, source;

	if (!PyArg_ParseTuple(arguments, "i:empty_mount_namespace", &source))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	struct emptying e = {.parent = getpid(), .source = source};
	struct fm_task task;
	if (fm_task_start(&task, 0, empty_and_hold, &e) < 0) {
		error = errno;
	} else {
		error = wait_until(&e.ready, 10);
		if (!error)
			error = __atomic_load_n(&e.error, __ATOMIC_ACQUIRE);
		if (!error && (fd = open_namespace(task.pid, "mnt")) < 0)
			error = errno;
		fm_task_end(&task, 1);
	}
	Py_END_ALLOW_THREADS

	if (fd >= 0)
		return PyLong_FromLong(fd);
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *try_open_tree_attr(PyObject *module, PyObject *unused)
{
	struct fm_mount_attr attr = {0};
	long result = syscall(SYS_open_tree_attr, -1, "", FM_AT_EMPTY_PATH, &attr, sizeof(attr));

	return PyLong_FromLong(result < 0 ? errno : 0);
}

static PyObject *enter_mounts(PyObject *module, PyObject *arguments)
{
	int fd, result;

	if (!PyArg_ParseTuple(arguments, "i:enter_mounts", &fd))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	/* Who shares its working directory with other threads cannot leave its mount namespace. */
	result = unshare(CLONE_FS) < 0 ? -1 : setns(fd, CLONE_NEWNS);
	Py_END_ALLOW_THREADS
	if (result < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *unshare_mounts(PyObject *module, PyObject *unused)
{
	int result;

	Py_BEGIN_ALLOW_THREADS
	result = unshare(CLONE_NEWNS);
	Py_END_ALLOW_THREADS
	if (result < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

PyMethodDef fm_namespaces_methods[] = {
	{"user_namespaces", user_namespaces, METH_VARARGS, "user_namespaces([(uid_map, gid_map)], threads) -> [descriptor]"},
	{"empty_mount_namespace", empty_mount_namespace, METH_VARARGS, "empty_mount_namespace(source or -1) -> descriptor"},
	{"enter_mounts", enter_mounts, METH_VARARGS, "enter_mounts(descriptor): move this thread into a mount namespace."},
	{"try_open_tree_attr", try_open_tree_attr, METH_NOARGS, "try_open_tree_attr() -> errno"},
	{"unshare_mounts", unshare_mounts, METH_NOARGS, "Move this thread into a copy of its mount namespace."},
	{NULL, NULL, 0, NULL},
};
