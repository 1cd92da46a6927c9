/*
 * Program.burst: many runs of one program started at the same moment on threads of their own, each with the mount
 * namespace copies that starting a container makes, and the time at which each was done. No Python in between: a
 * merged root file system takes 40 us, and handing the interpreter's lock around takes more.
 */
#include "program.h"
#include "task.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOST_RUNS 100000
#define MOST_CREW 4096
#define STACK_BYTES (256 * 1024)

struct burst {
	struct fm_run **runs;
	uint64_t *done_ns;
	int *copy_errors;
	size_t count, next;
	int copies, template;
	uint64_t started_ns, woken_ns; /* woken_ns: when the first of the crew ran, 0 before */
	unsigned int ready;
	int gate; /* futex: 0 closed, 1 open, 2 go home */
	int error;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static long futex(int *word, int operation, int value)
{
	return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* A container's first task, as far as the mount table is concerned; it leaves its last copy when it ends. */
static int copy_namespace(void *argument)
{
	const struct burst *burst = argument;

	if (burst->template >= 0 && setns(burst->template, CLONE_NEWNS) < 0)
		return errno;
	for (int i = 0; i < burst->copies; i++)
		if (unshare(CLONE_NEWNS) < 0)
			return errno;
	return 0;
}

static int start_container(struct burst *burst)
{
	struct fm_task task;

	if (fm_task_start(&task, CLONE_VFORK, copy_namespace, burst) < 0)
		return errno;
	int code = fm_task_end(&task, 0);
	return code < 0 ? EINTR : code;
}

static void *work(void *argument)
{
	struct burst *burst = argument;

	if (unshare(CLONE_FS) < 0)
		__atomic_store_n(&burst->error, errno, __ATOMIC_RELAXED);
	__atomic_add_fetch(&burst->ready, 1, __ATOMIC_RELEASE);
	while (!__atomic_load_n(&burst->gate, __ATOMIC_ACQUIRE))
		futex(&burst->gate, FUTEX_WAIT, 0);
	if (burst->gate > 1)
		return NULL;

	uint64_t none = 0;
	__atomic_compare_exchange_n(&burst->woken_ns, &none, now_ns(), 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);

	size_t i;
	while ((i = __atomic_fetch_add(&burst->next, 1, __ATOMIC_RELAXED)) < burst->count) {
		fm_run_perform(burst->runs[i]);
		if (burst->copies)
			burst->copy_errors[i] = start_container(burst);
		burst->done_ns[i] = now_ns() - burst->started_ns;
	}
	return NULL;
}

/* Starts the crew, opens the gate when all wait at it, and comes back when the last has gone home. */
static void run_burst(struct burst *burst, pthread_t *threads, int crew)
{
	pthread_attr_t attributes;
	int made = 0;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	for (; made < crew && !burst->error; made++) {
		int error = pthread_create(&threads[made], &attributes, work, burst);
		if (error) {
			burst->error = error;
			break;
		}
	}
	pthread_attr_destroy(&attributes);
	while (__atomic_load_n(&burst->ready, __ATOMIC_ACQUIRE) < (unsigned int)made)
		usleep(200);
	/* The last ones are between counting themselves and sleeping. */
	usleep(500);

	burst->started_ns = now_ns();
	__atomic_store_n(&burst->gate, burst->error ? 2 : 1, __ATOMIC_RELEASE);
	futex(&burst->gate, FUTEX_WAKE, MOST_CREW);
	for (int i = 0; i < made; i++)
		pthread_join(threads[i], NULL);
}

static PyObject *results(const struct burst *burst)
{
	PyObject *ended = PyTuple_New((Py_ssize_t)burst->count), *outcomes = PyTuple_New((Py_ssize_t)burst->count);

	for (size_t i = 0; ended && outcomes && i < burst->count; i++) {
		PyObject *ns = PyLong_FromUnsignedLongLong(burst->done_ns[i]);
		PyObject *outcome = Py_BuildValue("(Ni)", fm_run_result(burst->runs[i]), burst->copy_errors[i]);
		if (ns)
			PyTuple_SetItem(ended, (Py_ssize_t)i, ns);
		if (outcome)
			PyTuple_SetItem(outcomes, (Py_ssize_t)i, outcome);
	}
	if (PyErr_Occurred()) {
		Py_XDECREF(ended);
		Py_XDECREF(outcomes);
		return NULL;
	}
	return Py_BuildValue("(KNN)", (unsigned long long)(burst->woken_ns - burst->started_ns), ended, outcomes);
}

PyObject *fm_program_burst(PyObject *program, PyObject *arguments)
{
	struct burst burst = {0};
	PyObject *runs, *result = NULL;
	int crew;

	if (!PyArg_ParseTuple(arguments, "O!iii:burst", &PyTuple_Type, &runs, &crew, &burst.copies, &burst.template))
		return NULL;
	Py_ssize_t count = PyTuple_Size(runs);
	if (count < 1 || count > MOST_RUNS || crew < 1 || crew > MOST_CREW || burst.copies < 0) {
		PyErr_SetString(PyExc_ValueError, "a burst has 1 to 100000 runs on 1 to 4096 threads");
		return NULL;
	}
	pthread_t *threads = PyMem_Calloc((size_t)crew, sizeof(*threads));
	burst.runs = PyMem_Calloc((size_t)count, sizeof(*burst.runs));
	burst.done_ns = PyMem_Calloc((size_t)count, sizeof(*burst.done_ns));
	burst.copy_errors = PyMem_Calloc((size_t)count, sizeof(*burst.copy_errors));
	if (!threads || !burst.runs || !burst.done_ns || !burst.copy_errors) {
		PyErr_NoMemory();
		goto out;
	}
	for (; burst.count < (size_t)count; burst.count++) {
		burst.runs[burst.count] = fm_run_prepare(program, PyTuple_GetItem(runs, (Py_ssize_t)burst.count));
		if (!burst.runs[burst.count])
			goto out;
	}

	Py_BEGIN_ALLOW_THREADS run_burst(&burst, threads, crew);
	Py_END_ALLOW_THREADS if (burst.error)
	{
		errno = burst.error;
		PyErr_SetFromErrno(PyExc_OSError);
	}
	else
	{
		result = results(&burst);
	}
out:
	for (size_t i = 0; i < burst.count; i++)
		fm_run_free(burst.runs[i]);
	PyMem_Free(burst.copy_errors);
	PyMem_Free(burst.done_ns);
	PyMem_Free(burst.runs);
	PyMem_Free(threads);
	return result;
}
