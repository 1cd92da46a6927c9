/* The Python face of the committer. */
#include "module.h"

#include "committer.h"
#include "read_uppers.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define DROPPED_MS 1000 /* for one that nobody has closed */

typedef struct {
	PyObject_HEAD
	struct fm_committer *committer;
	size_t statements;
} Committer;

/* The texts of a tuple, which live as long as it does; NULL with an exception. */
static char **texts_of(PyObject *tuple)
{
	Py_ssize_t count = PyTuple_Size(tuple);
	char **texts = calloc((size_t)count + 1, sizeof(*texts));

	if (!texts)
		PyErr_NoMemory();
	for (Py_ssize_t i = 0; texts && i < count; i++) {
		texts[i] = (char *)PyUnicode_AsUTF8AndSize(PyTuple_GetItem(tuple, i), NULL);
		if (!texts[i]) {
			free(texts);
			return NULL;
		}
	}
	return texts;
}

static PyObject *new_committer(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = {"book", "data_fd", "setup", "statements", NULL};
	PyObject *book, *setup, *statements;
	int data;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&iO!O!:Committer", names, PyUnicode_FSConverter, &book,
					 &data, &PyTuple_Type, &setup, &PyTuple_Type, &statements))
		return NULL;
	size_t count = (size_t)PyTuple_Size(statements);
	char **first = texts_of(setup), **all = first ? texts_of(statements) : NULL, *why = NULL;
	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	Committer *self = NULL;

	if (all && count > FM_MOST_STATEMENTS)
		PyErr_SetString(PyExc_ValueError, "there are too many statements");
	else if (all && (self = (Committer *)allocate(type, 0))) {
		self->statements = count;
		self->committer = fm_committer_start(PyBytes_AsString(book), data, first,
						     (size_t)PyTuple_Size(setup), all, count, &why);
		if (!self->committer)
			PyErr_Format(PyExc_RuntimeError, "%s", why ? why : "no memory");
	}
	if (PyErr_Occurred())
		Py_CLEAR(self);
	free(why);
	free(first);
	free(all);
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

struct texts {
	char *at;
	size_t bytes, room;
};

static bool add_text(struct texts *texts, const char *text, size_t bytes)
{
	if (!texts->at || texts->bytes + bytes > texts->room) {
		size_t room = 2 * (texts->bytes + bytes) + 4096;
		char *more = realloc(texts->at, room);

		if (!more) {
			PyErr_NoMemory();
			return false;
		}
		texts->at = more;
		texts->room = room;
	}
	memcpy(texts->at + texts->bytes, text, bytes);
	texts->bytes += bytes;
	return true;
}

static bool read_value(PyObject *object, struct fm_value *value, struct texts *texts)
{
	Py_ssize_t bytes;
	const char *text;

	if (object == Py_None) {
		value->kind = FM_NULL;
		return true;
	}
	if (PyLong_Check(object)) {
		value->kind = FM_NUMBER;
		value->number = PyLong_AsLongLong(object);
		return value->number != -1 || !PyErr_Occurred();
	}
	value->kind = FM_TEXT;
	value->at = texts->bytes;
	if (!(text = PyUnicode_AsUTF8AndSize(object, &bytes)))
		return false;
	if (bytes > INT_MAX) {
		PyErr_SetString(PyExc_OverflowError, "a text is too long");
		return false;
	}
	value->bytes = (int)bytes;
	return add_text(texts, text, (size_t)bytes);
}

/* A list of tuples of one size. */
static bool read_rows(PyObject *list, struct fm_rows *rows, struct texts *texts)
{
	if (!PyList_Check(list)) {
		PyErr_SetString(PyExc_TypeError, "the rows of a statement are a list");
		return false;
	}
	rows->rows = (size_t)PyList_Size(list);
	if (!rows->rows)
		return true;
	PyObject *first = PyList_GetItem(list, 0);

	rows->columns = PyTuple_Check(first) ? (size_t)PyTuple_Size(first) : 0;
	rows->values = calloc(rows->rows * rows->columns + 1, sizeof(*rows->values));
	if (!rows->values) {
		PyErr_NoMemory();
		return false;
	}
	struct fm_value *value = rows->values;

	for (size_t row = 0; row < rows->rows; row++) {
		PyObject *tuple = PyList_GetItem(list, (Py_ssize_t)row);

		if (!PyTuple_Check(tuple) || (size_t)PyTuple_Size(tuple) != rows->columns) {
			PyErr_SetString(PyExc_ValueError, "the rows of a statement are tuples of one size");
			return false;
		}
		for (size_t i = 0; i < rows->columns; i++)
			if (!read_value(PyTuple_GetItem(tuple, (Py_ssize_t)i), value++, texts))
				return false;
	}
	return true;
}

static bool read_batch(PyObject *uppers, PyObject *rows, size_t statements, struct fm_batch *batch)
{
	struct texts texts = {0};
	bool done = fm_read_uppers(uppers, &batch->uppers, &batch->count);

	if (done && (size_t)PyTuple_Size(rows) != statements) {
		PyErr_SetString(PyExc_ValueError, "there are rows for each statement");
		done = false;
	}
	for (size_t i = 0; done && i < statements; i++)
		done = read_rows(PyTuple_GetItem(rows, (Py_ssize_t)i), &batch->rows[i], &texts);
	batch->texts = texts.at;
	return done;
}

static PyObject *committer_submit(PyObject *object, PyObject *args)
{
	Committer *self = (Committer *)object;
	struct fm_batch batch = {0};
	PyObject *uppers, *rows;

	if (!PyArg_ParseTuple(args, "O!O!:submit", &PyList_Type, &uppers, &PyTuple_Type, &rows) || !is_open(self))
		return NULL;
	if (read_batch(uppers, rows, self->statements, &batch) && fm_committer_submit(self->committer, batch))
		Py_RETURN_NONE;
	fm_batch_free(&batch);
	if (!PyErr_Occurred())
		PyErr_SetString(PyExc_ValueError, "another batch is being written");
	return NULL;
}

static PyObject *committer_ahead(PyObject *object, PyObject *args)
{
	Committer *self = (Committer *)object;
	PyObject *list;

	if (!PyArg_ParseTuple(args, "O!:ahead", &PyList_Type, &list) || !is_open(self))
		return NULL;
	Py_ssize_t count = PyList_Size(list);
	long long *numbers = calloc((size_t)count + 1, sizeof(*numbers));

	for (Py_ssize_t i = 0; numbers && i < count && !PyErr_Occurred(); i++)
		numbers[i] = PyLong_AsLongLong(PyList_GetItem(list, i));
	if (!PyErr_Occurred() && !(numbers && fm_committer_ahead(self->committer, numbers, (size_t)count)))
		PyErr_NoMemory();
	free(numbers);
	return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *committer_take(PyObject *object, PyObject *ignored)
{
	Committer *self = (Committer *)object;

	if (!is_open(self))
		return NULL;
	struct fm_done done = fm_committer_take(self->committer);
	const char *why = !done.failed ? NULL : done.why ? done.why : "no memory";
	PyObject *answer =
		Py_BuildValue("Nzni", PyBool_FromLong(done.batch), why, (Py_ssize_t)done.ahead, done.ahead_error);

	free(done.why);
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
	{"ahead", committer_ahead, METH_VARARGS, NULL},
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
