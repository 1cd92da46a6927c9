/* User namespaces for a mapping, and what else belongs to a process: made without forking the interpreter. */
#include "common.h"
#include "task.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
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

static int open_user_namespace(pid_t pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/ns/user", pid);
	return open(path, O_RDONLY | O_CLOEXEC);
}

static PyObject *user_namespace(PyObject *module, PyObject *arguments)
{
	const char *uids, *gids;
	Py_ssize_t uid_bytes, gid_bytes;
	int fd = -1, error = 0;

	if (!PyArg_ParseTuple(arguments, "y#y#:user_namespace", &uids, &uid_bytes, &gids, &gid_bytes))
		return NULL;

	Py_BEGIN_ALLOW_THREADS
	struct fm_task task;
	pid_t parent = getpid();
	if (fm_task_start(&task, CLONE_NEWUSER, hold_namespace, &parent) < 0) {
		error = errno;
	} else {
		if (write_map(task.pid, "uid_map", uids, (size_t)uid_bytes) < 0 ||
		    write_map(task.pid, "gid_map", gids, (size_t)gid_bytes) < 0 ||
		    (fd = open_user_namespace(task.pid)) < 0)
			error = errno;
		fm_task_end(&task, 1);
	}
	Py_END_ALLOW_THREADS

	if (fd >= 0)
		return PyLong_FromLong(fd);
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
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

PyMethodDef fm_userns_methods[] = {
	{"user_namespace", user_namespace, METH_VARARGS, "user_namespace(uid_map, gid_map) -> descriptor"},
	{"unshare_mounts", unshare_mounts, METH_NOARGS, "Move this thread into a copy of its mount namespace."},
	{NULL, NULL, 0, NULL},
};
