/* The Python face of the directories of new snapshots: many in one go, the interpreter's lock let go. */
#include "common.h"
#include "read_uppers.h"

#include <stdlib.h>

static PyObject *make_uppers(PyObject *module, PyObject *args)
{
	int data;
	PyObject *list, *answer = NULL;
	struct fm_upper *uppers;
	size_t count;

	if (!PyArg_ParseTuple(args, "iO!:make_uppers", &data, &PyList_Type, &list))
		return NULL;
	int *errors = NULL;

	if (fm_read_uppers(list, &uppers, &count) && !(errors = calloc(count + 1, sizeof(*errors))))
		PyErr_NoMemory();
	if (errors) {
		Py_BEGIN_ALLOW_THREADS
		for (size_t i = 0; i < count; i++)
			errors[i] = fm_make_upper(data, &uppers[i]);
		Py_END_ALLOW_THREADS
		answer = PyList_New((Py_ssize_t)count);
	}
	for (size_t i = 0; answer && i < count; i++) {
		PyObject *error = PyLong_FromLong(errors[i]);

		if (!error || PyList_SetItem(answer, (Py_ssize_t)i, error) < 0)
			Py_CLEAR(answer);
	}
	free(errors);
	free(uppers);
	return answer;
}

PyMethodDef fm_uppers_methods[] = {
	{"make_uppers", make_uppers, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};
