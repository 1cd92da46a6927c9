/* Files of a root file system that nobody may be trusted with: looked up inside it, whatever its links say. */
#include "common.h"
#include "lookup.h"

#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST_RACES 128

/* The kernel answers EAGAIN where a rename meanwhile made it unsure that ".." stayed inside. */
static int resolve(int root, const char *path)
{
	struct fm_open_how how = {
		.flags = O_PATH | O_CLOEXEC,
		.resolve = FM_RESOLVE_IN_ROOT | FM_RESOLVE_NO_MAGICLINKS,
	};

	for (int i = 0; i < MOST_RACES; i++) {
		int fd = (int)syscall(SYS_openat2, root, path, &how, sizeof(how));
		if (fd >= 0 || errno != EAGAIN)
			return fd;
	}
	return -1;
}

int fm_open_file_in_root(int root, const char *path)
{
	char self[64];
	struct stat st;
	int fd = -1, error;
	int place = resolve(root, path);

	if (place < 0)
		return -1;
	/* A fifo would wait and a device would act on being opened: looked at first, by a descriptor that does neither. */
	if (fstat(place, &st) == 0) {
		if (S_ISREG(st.st_mode)) {
			snprintf(self, sizeof(self), "/proc/self/fd/%d", place);
			fd = open(self, O_RDONLY | O_CLOEXEC);
		} else {
			errno = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
		}
	}
	error = errno;
	close(place);
	errno = error;
	return fd;
}

static PyObject *open_file_in_root(PyObject *module, PyObject *arguments)
{
	const char *path;
	int root, fd;

	if (!PyArg_ParseTuple(arguments, "iy:open_file_in_root", &root, &path))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	fd = fm_open_file_in_root(root, path);
	Py_END_ALLOW_THREADS
	if (fd < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromLong(fd);
}

PyMethodDef fm_lookup_methods[] = {
	{"open_file_in_root", open_file_in_root, METH_VARARGS, "open_file_in_root(root, path) -> descriptor"},
	{NULL, NULL, 0, NULL},
};
