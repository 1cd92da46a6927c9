/* placeholder until the mount table lands */
#include "common.h"
PyMethodDef fm_mounts_methods[] = {{NULL, NULL, 0, NULL}};
