/* Runs of a program that are prepared with the interpreter's lock held and performed without it, many at once. */
#ifndef FLATMOUNT_PROGRAM_H
#define FLATMOUNT_PROGRAM_H

#include "common.h"

struct fm_run;

/*
 * A run of `program` with (lent, parameters, ids) as Program.run takes them. It borrows their strings: they must
 * outlive it. Returns NULL with an exception set.
 */
struct fm_run *fm_run_prepare(PyObject *program, PyObject *arguments);

/* Performs it, and closes its own descriptors. For a thread that has a working directory of its own. No Python. */
void fm_run_perform(struct fm_run *run);

/* (operations done, mount operations done, place of the failure, errno, the kernel's message) */
PyObject *fm_run_result(const struct fm_run *run);

void fm_run_free(struct fm_run *run);

/* Program.burst, in burst.c. */
PyObject *fm_program_burst(PyObject *program, PyObject *arguments);

#endif
