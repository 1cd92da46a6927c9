/* What the files of the extension flatmount.snapshotter._front share. */
#ifndef FLATMOUNT_FRONT_MODULE_H
#define FLATMOUNT_FRONT_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyType_Spec fm_committer_spec;

#endif
