/* The directories of a snapshot store's new snapshots, many in one go: what stands between a burst of starts and its
 * root file systems. Which there are and why is written in flatmount/snapshotter/trees.py. */
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define PLAIN_MODE 0755

struct upper {
	long long number;
	int made, work, none;
	unsigned mode, uid, gid;
	int error;
};

static int make_one(int data, const struct upper *upper)
{
	char path[48];
	int top = snprintf(path, sizeof(path), "snapshots/%lld", upper->number);

	if (!upper->made && mkdirat(data, path, 0700) < 0)
		return errno;
	snprintf(path + top, sizeof(path) - (size_t)top, "/fs");
	if (!upper->made && mkdirat(data, path, PLAIN_MODE) < 0)
		return errno;
	if ((upper->uid || upper->gid) && fchownat(data, path, upper->uid, upper->gid, AT_SYMLINK_NOFOLLOW) < 0)
		return errno;
	/* Whatever the umask took away. */
	if ((!upper->made || upper->mode != PLAIN_MODE) && fchmodat(data, path, upper->mode, 0) < 0)
		return errno;
	snprintf(path + top, sizeof(path) - (size_t)top, "/work");
	if (!upper->made && upper->work && mkdirat(data, path, 0711) < 0)
		return errno;
	snprintf(path + top, sizeof(path) - (size_t)top, "/none");
	if (upper->none && mkdirat(data, path, PLAIN_MODE) < 0)
		return errno;
	return 0;
}

static PyObject *make_uppers(PyObject *module, PyObject *args)
{
	int data;
	PyObject *sequence;

	if (!PyArg_ParseTuple(args, "iO!:make_uppers", &data, &PyList_Type, &sequence))
		return NULL;
	Py_ssize_t count = PyList_Size(sequence);
	struct upper *uppers = calloc(count ? (size_t)count : 1, sizeof(*uppers));

	if (!uppers)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < count; i++) {
		struct upper *one = &uppers[i];

		if (!PyArg_ParseTuple(PyList_GetItem(sequence, i), "LpppIII:make_uppers", &one->number, &one->made,
				      &one->work, &one->none, &one->mode, &one->uid, &one->gid)) {
			free(uppers);
			return NULL;
		}
	}
	Py_BEGIN_ALLOW_THREADS
	for (Py_ssize_t i = 0; i < count; i++)
		uppers[i].error = make_one(data, &uppers[i]);
	Py_END_ALLOW_THREADS
	PyObject *errors = PyList_New(count);

	for (Py_ssize_t i = 0; errors && i < count; i++) {
		PyObject *error = PyLong_FromLong(uppers[i].error);

		if (!error || PyList_SetItem(errors, i, error) < 0)
			Py_CLEAR(errors);
	}
	free(uppers);
	return errors;
}

PyMethodDef fm_uppers_methods[] = {
	{"make_uppers", make_uppers, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};
