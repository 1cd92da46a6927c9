/* The Python face of the committer. */
#include "module.h"

#include "committer.h"

#include <stdlib.h>
#include <string.h>

#define DROPPED_MS 1000 /* for one that nobody has closed */

typedef struct {
	PyObject_HEAD
	struct fm_committer *committer;
} Committer;

static PyObject *new_committer(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = {"book", "data_fd", "setup", "statement", NULL};
	PyObject *book, *setup;
	int data;
	const char *statement;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&iO!s:Committer", names, PyUnicode_FSConverter, &book, &data,
					 &PyTuple_Type, &setup, &statement))
		return NULL;
	size_t count = (size_t)PyTuple_Size(setup), got = 0;
	char **texts = calloc(count + 1, sizeof(*texts)), *why = NULL;
	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	Committer *self = texts ? (Committer *)allocate(type, 0) : (Committer *)PyErr_NoMemory();

	/* They live as long as the tuple. */
	while (self && got < count && (texts[got] = (char *)PyUnicode_AsUTF8AndSize(PyTuple_GetItem(setup, (Py_ssize_t)got), NULL)))
		got++;
	if (self && got == count) {
		self->committer = fm_committer_start(PyBytes_AsString(book), data, texts, count, statement, &why);
		if (!self->committer)
			PyErr_Format(PyExc_RuntimeError, "%s", why ? why : "no memory");
	}
	if (PyErr_Occurred())
		Py_CLEAR(self);
	free(why);
	free(texts);
	Py_DECREF(book);
	return (PyObject *)self;
}

static bool is_open(Committer *self)
{
	if (!self->committer)
		PyErr_SetString(PyExc_ValueError, "the committer is closed");
	return self->committer != NULL;
}

static PyObject *committer_fileno(PyObject *object, PyObject *ignored)
{
	Committer *self = (Committer *)object;

	return is_open(self) ? PyLong_FromLong(fm_committer_ready(self->committer)) : NULL;
}

static bool read_uppers(PyObject *list, struct fm_batch *batch)
{
	batch->count = (size_t)PyList_Size(list);
	batch->uppers = calloc(batch->count + 1, sizeof(*batch->uppers));
	if (!batch->uppers) {
		PyErr_NoMemory();
		return false;
	}
	for (size_t i = 0; i < batch->count; i++) {
		struct fm_upper *one = &batch->uppers[i];

		if (!PyArg_ParseTuple(PyList_GetItem(list, (Py_ssize_t)i), "LpppIII:submit", &one->number, &one->made,
				      &one->work, &one->none, &one->mode, &one->uid, &one->gid))
			return false;
	}
	return true;
}

static PyObject *committer_submit(PyObject *object, PyObject *args)
{
	Committer *self = (Committer *)object;
	struct fm_batch batch = {0};
	PyObject *uppers;
	const char *texts[FM_PARAMETERS];

	if (!PyArg_ParseTuple(args, "O!(zzz):submit", &PyList_Type, &uppers, &texts[0], &texts[1], &texts[2]) ||
	    !is_open(self))
		return NULL;
	bool ready = read_uppers(uppers, &batch);

	for (size_t i = 0; ready && i < FM_PARAMETERS; i++)
		if (texts[i] && !(batch.parameters[i] = strdup(texts[i]))) {
			PyErr_NoMemory();
			ready = false;
		}
	if (ready && fm_committer_submit(self->committer, batch))
		Py_RETURN_NONE;
	fm_batch_free(&batch);
	if (!PyErr_Occurred())
		PyErr_SetString(PyExc_ValueError, "another batch is being written");
	return NULL;
}

static PyObject *committer_take(PyObject *object, PyObject *ignored)
{
	Committer *self = (Committer *)object;
	char *why;

	if (!is_open(self))
		return NULL;
	bool done = fm_committer_take(self->committer, &why);
	PyObject *answer = Py_BuildValue("Nz", PyBool_FromLong(done), why);

	free(why);
	return answer;
}

static PyObject *committer_close(PyObject *object, PyObject *args)
{
	Committer *self = (Committer *)object;
	struct fm_committer *committer = self->committer;
	int limit_ms;
	bool ended = true;

	if (!PyArg_ParseTuple(args, "i:close", &limit_ms))
		return NULL;
	self->committer = NULL;
	if (committer) {
		Py_BEGIN_ALLOW_THREADS
		ended = fm_committer_stop(committer, limit_ms);
		Py_END_ALLOW_THREADS
	}
	return PyBool_FromLong(ended);
}

static void dealloc(PyObject *object)
{
	Committer *self = (Committer *)object;
	PyTypeObject *type = Py_TYPE(object);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
	struct fm_committer *committer = self->committer;

	if (committer) {
		Py_BEGIN_ALLOW_THREADS
		fm_committer_stop(committer, DROPPED_MS);
		Py_END_ALLOW_THREADS
	}
	release(object);
	Py_DECREF(type);
}

static PyMethodDef methods[] = {
	{"fileno", committer_fileno, METH_NOARGS, NULL},
	{"submit", committer_submit, METH_VARARGS, NULL},
	{"take", committer_take, METH_NOARGS, NULL},
	{"close", committer_close, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
	{Py_tp_new, new_committer}, {Py_tp_dealloc, dealloc}, {Py_tp_methods, methods}, {0, NULL}};

PyType_Spec fm_committer_spec = {
	.name = "flatmount.snapshotter._front.Committer",
	.basicsize = sizeof(Committer),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};
