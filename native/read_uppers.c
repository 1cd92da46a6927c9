#include "read_uppers.h"

#include <stdlib.h>

bool fm_read_uppers(PyObject *list, struct fm_upper **uppers, size_t *count)
{
	*count = (size_t)PyList_Size(list);
	*uppers = calloc(*count + 1, sizeof(**uppers));
	if (!*uppers) {
		PyErr_NoMemory();
		return false;
	}
	for (size_t i = 0; i < *count; i++) {
		struct fm_upper *one = *uppers + i;

		if (!PyArg_ParseTuple(PyList_GetItem(list, (Py_ssize_t)i), "LpppIII", &one->number, &one->made,
				      &one->work, &one->none, &one->mode, &one->uid, &one->gid))
			return false;
	}
	return true;
}
