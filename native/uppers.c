/* The Python face of the directories of new snapshots: many in one go, the interpreter's lock let go. */
#include "common.h"
#include "upper.h"

#include <stdlib.h>

struct job {
	struct fm_upper upper;
	int error;
};

static PyObject *make_uppers(PyObject *module, PyObject *args)
{
	int data;
	PyObject *sequence;

	if (!PyArg_ParseTuple(args, "iO!:make_uppers", &data, &PyList_Type, &sequence))
		return NULL;
	Py_ssize_t count = PyList_Size(sequence);
	struct job *jobs = calloc(count ? (size_t)count : 1, sizeof(*jobs));

	if (!jobs)
		return PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < count; i++) {
		struct fm_upper *one = &jobs[i].upper;

		if (!PyArg_ParseTuple(PyList_GetItem(sequence, i), "LpppIII:make_uppers", &one->number, &one->made,
				      &one->work, &one->none, &one->mode, &one->uid, &one->gid)) {
			free(jobs);
			return NULL;
		}
	}
	Py_BEGIN_ALLOW_THREADS
	for (Py_ssize_t i = 0; i < count; i++)
		jobs[i].error = fm_make_upper(data, &jobs[i].upper);
	Py_END_ALLOW_THREADS
	PyObject *errors = PyList_New(count);

	for (Py_ssize_t i = 0; errors && i < count; i++) {
		PyObject *error = PyLong_FromLong(jobs[i].error);

		if (!error || PyList_SetItem(errors, i, error) < 0)
			Py_CLEAR(errors);
	}
	free(jobs);
	return errors;
}

PyMethodDef fm_uppers_methods[] = {
	{"make_uppers", make_uppers, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};
