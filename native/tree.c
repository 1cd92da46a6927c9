/* Work on whole directory trees, outside the interpreter's lock. */
#include "common.h"

PyMethodDef fm_tree_methods[] = {{NULL, NULL, 0, NULL}};
