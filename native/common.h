/* What every file of the extension shares: the limited Python API and the kernel's newer constants. */
#ifndef FLATMOUNT_COMMON_H
#define FLATMOUNT_COMMON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "uapi.h"

/* Each file adds its functions through one table; module.c joins them. */
extern PyMethodDef fm_program_methods[];
extern PyMethodDef fm_namespaces_methods[];
extern PyMethodDef fm_mounts_methods[];
extern PyMethodDef fm_tree_methods[];
extern PyMethodDef fm_start_methods[];
extern PyMethodDef fm_locks_methods[];
extern PyMethodDef fm_lookup_methods[];
extern PyMethodDef fm_uppers_methods[];
extern PyType_Spec fm_program_spec;

#endif
