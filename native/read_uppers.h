/* Reading from Python what `fm_make_upper` takes. */
#ifndef FLATMOUNT_READ_UPPERS_H
#define FLATMOUNT_READ_UPPERS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "upper.h"

#include <stdbool.h>

/* A list of tuples (number, made, work, none, mode, uid, gid) as an array to free. Returns false with an exception; the
 * array is to be freed then too. */
bool fm_read_uppers(PyObject *list, struct fm_upper **uppers, size_t *count);

#endif
