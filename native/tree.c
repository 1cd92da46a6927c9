/* The Python face of the work on whole directory trees: arguments in, the GIL released, counts or an OSError out. */
#include "common.h"
#include "tree.h"

static PyObject *raise_error(const struct fm_tree_error *error)
{
	PyObject *path = PyUnicode_DecodeFSDefault(error->path);

	if (!path)
		return NULL;
	errno = error->number;
	PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
	Py_DECREF(path);
	return NULL;
}

static void free_strings(char **strings, Py_ssize_t count)
{
	for (Py_ssize_t i = 0; i < count; i++)
		free(strings[i]);
	free(strings);
}

static char **strings_of(PyObject *sequence, Py_ssize_t *count)
{
	*count = PySequence_Size(sequence);
	if (*count < 0)
		return NULL;
	char **strings = calloc(*count ? (size_t)*count : 1, sizeof(*strings));

	if (!strings) {
		PyErr_NoMemory();
		return NULL;
	}
	for (Py_ssize_t i = 0; i < *count; i++) {
		PyObject *item = PySequence_GetItem(sequence, i), *bytes = NULL;
		bool ok = item && PyUnicode_FSConverter(item, &bytes);

		Py_XDECREF(item);
		if (ok && !(strings[i] = strdup(PyBytes_AsString(bytes)))) {
			PyErr_NoMemory();
			ok = false;
		}
		Py_XDECREF(bytes);
		if (!ok) {
			free_strings(strings, i);
			return NULL;
		}
	}
	return strings;
}

static PyObject *flatten(PyObject *self, PyObject *args)
{
	int root, failed;
	PyObject *sequence, *target;
	long root_source;
	Py_ssize_t count;
	struct fm_flat_counts counts = {0};
	struct fm_tree_error error = {0};

	if (!PyArg_ParseTuple(args, "iOO&l:flatten", &root, &sequence, PyUnicode_FSConverter, &target, &root_source))
		return NULL;
	char **sources = strings_of(sequence, &count);
	if (!sources) {
		Py_DECREF(target);
		return NULL;
	}
	const char *into = PyBytes_AsString(target);

	Py_BEGIN_ALLOW_THREADS
	failed = fm_flatten(root, (const char *const *)sources, (size_t)count, root_source, into, &counts, &error);
	Py_END_ALLOW_THREADS
	free_strings(sources, count);
	Py_DECREF(target);
	if (failed)
		return raise_error(&error);
	return Py_BuildValue("KKK", (unsigned long long)counts.directories, (unsigned long long)counts.links,
			     (unsigned long long)counts.copies);
}

static PyObject *remove_tree(PyObject *self, PyObject *args)
{
	int parent, failed;
	PyObject *name;
	struct fm_removed_counts counts = {0};
	struct fm_tree_error error = {0};

	if (!PyArg_ParseTuple(args, "iO&:remove_tree", &parent, PyUnicode_FSConverter, &name))
		return NULL;
	const char *text = PyBytes_AsString(name);

	Py_BEGIN_ALLOW_THREADS
	failed = fm_remove_tree(parent, text, &counts, &error);
	Py_END_ALLOW_THREADS
	Py_DECREF(name);
	if (failed)
		return raise_error(&error);
	return Py_BuildValue("KK", (unsigned long long)counts.entries, (unsigned long long)counts.bytes);
}

static struct fm_id_range *ranges_of(PyObject *sequence, size_t *count)
{
	Py_ssize_t size = PySequence_Size(sequence);

	if (size < 0)
		return NULL;
	struct fm_id_range *ranges = calloc(size ? (size_t)size : 1, sizeof(*ranges));
	if (!ranges)
		return (void *)PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < size; i++) {
		PyObject *item = PySequence_GetItem(sequence, i);
		bool ok = item && PyArg_ParseTuple(item, "III", &ranges[i].container, &ranges[i].host, &ranges[i].size);

		Py_XDECREF(item);
		if (!ok) {
			free(ranges);
			return NULL;
		}
	}
	*count = (size_t)size;
	return ranges;
}

static PyObject *copy_tree(PyObject *self, PyObject *args)
{
	int from, to, failed;
	PyObject *uids, *gids;
	struct fm_owner_map map = {0};
	struct fm_tree_error error = {0};
	uint64_t entries = 0;

	if (!PyArg_ParseTuple(args, "iiOO:copy_tree", &from, &to, &uids, &gids))
		return NULL;
	map.uids = ranges_of(uids, &map.uid_count);
	if (!map.uids)
		return NULL;
	map.gids = ranges_of(gids, &map.gid_count);
	if (!map.gids) {
		free((void *)map.uids);
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS
	failed = fm_copy_tree(from, to, &map, &entries, &error);
	Py_END_ALLOW_THREADS
	free((void *)map.uids);
	free((void *)map.gids);
	if (failed)
		return raise_error(&error);
	return PyLong_FromUnsignedLongLong(entries);
}

static PyObject *create_file(PyObject *self, PyObject *args)
{
	int directory, failed;
	unsigned int uid, gid, mode;
	long long seconds;
	long nanoseconds;
	const char *name;
	Py_buffer data;

	if (!PyArg_ParseTuple(args, "iyy*IIILl:create_file", &directory, &name, &data, &uid, &gid, &mode, &seconds,
			      &nanoseconds))
		return NULL;
	const struct fm_new_file file = {uid, gid, mode & 07777, {seconds, nanoseconds}};

	Py_BEGIN_ALLOW_THREADS
	failed = fm_create_file(directory, name, data.buf, (size_t)data.len, &file);
	Py_END_ALLOW_THREADS
	int number = errno;

	PyBuffer_Release(&data);
	if (!failed)
		Py_RETURN_NONE;
	errno = number;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *sync_filesystem(PyObject *self, PyObject *arg)
{
	int fd = (int)PyLong_AsLong(arg), failed;

	if (fd == -1 && PyErr_Occurred())
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	failed = syncfs(fd);
	Py_END_ALLOW_THREADS
	if (failed)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

PyMethodDef fm_tree_methods[] = {
	{"flatten", flatten, METH_VARARGS,
	 "flatten(root_fd, sources, target, root_source) -> (directories, links, copies)\n\nSee flatmount.kernel.tree."},
	{"remove_tree", remove_tree, METH_VARARGS,
	 "remove_tree(parent_fd, name) -> (entries, bytes)\n\nSee flatmount.kernel.tree."},
	{"copy_tree", copy_tree, METH_VARARGS,
	 "copy_tree(from_fd, to_fd, uids, gids) -> entries\n\nSee flatmount.kernel.tree."},
	{"create_file", create_file, METH_VARARGS,
	 "create_file(directory_fd, name, data, uid, gid, mode, seconds, nanoseconds) -> None\n\nSee flatmount.kernel.tree."},
	{"sync_filesystem", sync_filesystem, METH_O, "sync_filesystem(fd) -> None\n\nsyncfs(2)."},
	{NULL, NULL, 0, NULL},
};
