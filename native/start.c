/* The first steps of a container, as far as a root file system is concerned: what the storm's start check does. */
#include "common.h"
#include "task.h"

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

struct check {
	int user_namespace, root, copies;
	const char *read_path, *write_path;
	char *buffer;
	size_t buffer_bytes;
	/* answers */
	ssize_t got;
	const char *step;
	int error;
	uid_t uid;
	gid_t gid;
	uid_t written_uid;
};

static int fail(struct check *check, const char *step)
{
	check->step = step;
	check->error = errno;
	return 1;
}

/* Runs while the calling thread is suspended (CLONE_VFORK), so that errno and the answers have one writer. */
static int enter_and_check(void *argument)
{
	struct check *check = argument;
	struct stat st;

	for (int i = 0; i < check->copies; i++)
		if (unshare(CLONE_NEWNS) < 0)
			return fail(check, "unshare(CLONE_NEWNS)");
	if (fchdir(check->root) < 0 || chroot(".") < 0)
		return fail(check, "chroot");
	if (setns(check->user_namespace, CLONE_NEWUSER) < 0)
		return fail(check, "setns(CLONE_NEWUSER)");
	/* The bare calls: the library's would change every thread of the interpreter. */
	if (syscall(SYS_setresgid, 0, 0, 0) < 0 || syscall(SYS_setresuid, 0, 0, 0) < 0)
		return fail(check, "setresuid");

	int fd = open(check->read_path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0 || fstat(fd, &st) < 0)
		return fail(check, "open the probe file");
	check->uid = st.st_uid;
	check->gid = st.st_gid;
	check->got = read(fd, check->buffer, check->buffer_bytes);
	int error = errno;
	close(fd);
	errno = error;
	if (check->got < 0)
		return fail(check, "read the probe file");

	fd = open(check->write_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
	if (fd < 0)
		return fail(check, "create a file");
	ssize_t put = write(fd, "started\n", 8);
	error = errno;
	if (put == 8 && fstat(fd, &st) < 0) {
		error = errno;
		put = -1;
	}
	close(fd);
	errno = error;
	if (put != 8)
		return fail(check, "write a file");
	check->written_uid = st.st_uid;
	return 0;
}

static PyObject *check_start(PyObject *module, PyObject *arguments)
{
	struct check check = {0};
	Py_ssize_t most;
	int code = -1, error = 0;

	if (!PyArg_ParseTuple(arguments, "iiyyni:check_start", &check.user_namespace, &check.root, &check.read_path,
			      &check.write_path, &most, &check.copies))
		return NULL;
	PyObject *content = PyBytes_FromStringAndSize(NULL, most);
	if (!content)
		return NULL;
	check.buffer = PyBytes_AsString(content);
	check.buffer_bytes = (size_t)most;

	Py_BEGIN_ALLOW_THREADS
	struct fm_task task;
	if (fm_task_start(&task, CLONE_VFORK, enter_and_check, &check) < 0)
		error = errno;
	else
		code = fm_task_end(&task, 0);
	Py_END_ALLOW_THREADS

	if (error) {
		Py_DECREF(content);
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	if (code != 0) {
		Py_DECREF(content);
		return Py_BuildValue("(siiiiy#)", check.step ? check.step : "was killed", check.error, 0, 0, 0, "", (Py_ssize_t)0);
	}
	PyObject *result = Py_BuildValue("(siiiiy#)", "", 0, (int)check.uid, (int)check.gid, (int)check.written_uid,
					 check.buffer, (Py_ssize_t)check.got);
	Py_DECREF(content);
	return result;
}

PyMethodDef fm_start_methods[] = {
	{"check_start", check_start, METH_VARARGS,
	 "check_start(userns, root, read_path, write_path, most, copies) -> (step, errno, uid, gid, written_uid, content)"},
	{NULL, NULL, 0, NULL},
};
