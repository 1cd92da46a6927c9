/* flatmount.kernel._native: the extension's table of contents. Each file documents its own functions. */
#include "common.h"

static int add_functions(PyObject *module)
{
	PyMethodDef *tables[] = {fm_program_methods, fm_namespaces_methods, fm_mounts_methods,
				 fm_tree_methods, fm_start_methods, fm_locks_methods, fm_lookup_methods,
				 fm_uppers_methods};

	for (size_t i = 0; i < sizeof(tables) / sizeof(tables[0]); i++)
		if (PyModule_AddFunctions(module, tables[i]) < 0)
			return -1;

	PyObject *program = PyType_FromModuleAndSpec(module, &fm_program_spec, NULL);
	if (!program)
		return -1;
	int failed = PyModule_AddObjectRef(module, "Program", program);
	Py_DECREF(program);
	return failed;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_functions}, {0, NULL}};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "flatmount.kernel._native",
	.m_doc = "The kernel's mount API, user namespaces, the mount table, and work on whole directory trees.",
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
	return PyModuleDef_Init(&definition);
}
