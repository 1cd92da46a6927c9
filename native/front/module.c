/* flatmount.snapshotter._front: the Python face of the front. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "front.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
	PyObject_HEAD
	struct fm_front *front;
	/* What was answered since the last flush. */
	struct fm_reply *first, *last;
} Front;

static PyObject *new_front(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = {"listening", "paths", "most_bytes", NULL};
	int listening;
	PyObject *paths;
	Py_ssize_t most_bytes;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "iO!n:Front", names, &listening, &PyTuple_Type, &paths,
					 &most_bytes))
		return NULL;
	Py_ssize_t count = PyTuple_Size(paths), got = 0;
	char **texts = calloc((size_t)count + 1, sizeof(*texts));

	if (!texts)
		return PyErr_NoMemory();
	for (; got < count; got++) {
		const char *text = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(paths, got), NULL);

		if (!text || !(texts[got] = strdup(text)))
			break;
	}
	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	Front *self = got == count ? (Front *)allocate(type, 0) : NULL;

	if (self && !(self->front = fm_front_start(listening, texts, (size_t)count, (size_t)most_bytes))) {
		PyErr_SetFromErrno(PyExc_OSError);
		Py_DECREF(self);
		self = NULL;
	} else if (!self && !PyErr_Occurred()) {
		PyErr_NoMemory();
	}
	for (Py_ssize_t i = 0; i < got; i++)
		free(texts[i]);
	free(texts);
	return (PyObject *)self;
}

static bool is_open(Front *self)
{
	if (!self->front)
		PyErr_SetString(PyExc_ValueError, "the front is closed");
	return self->front != NULL;
}

static PyObject *front_fileno(PyObject *object, PyObject *ignored)
{
	Front *self = (Front *)object;

	return is_open(self) ? PyLong_FromLong(fm_front_ready(self->front)) : NULL;
}

static PyObject *entry_of(const struct fm_request *request, uint64_t now_ns)
{
	double left_s = -1;

	if (request->deadline_ns)
		left_s = request->deadline_ns > now_ns ? (double)(request->deadline_ns - now_ns) / 1e9 : 0;
	return Py_BuildValue("Kidy#", (unsigned long long)request->call, request->method, left_s,
			     request->body_bytes ? (const char *)request->body + 5 : "",
			     request->body_bytes ? (Py_ssize_t)request->body_bytes - 5 : (Py_ssize_t)0);
}

static PyObject *front_take(PyObject *object, PyObject *ignored)
{
	Front *self = (Front *)object;

	if (!is_open(self))
		return NULL;
	PyObject *found = PyList_New(0);
	struct fm_request *request = found ? fm_front_take(self->front) : NULL;
	uint64_t now_ns = fm_now_ns();

	while (request) {
		struct fm_request *next = request->next;
		PyObject *entry = found ? entry_of(request, now_ns) : NULL;

		if (!entry || PyList_Append(found, entry) < 0)
			Py_CLEAR(found);
		Py_XDECREF(entry);
		fm_request_free(request);
		request = next;
	}
	return found;
}

static PyObject *add(Front *self, struct fm_reply *reply)
{
	if (!reply)
		return PyErr_NoMemory();
	if (self->last)
		self->last->next = reply;
	else
		self->first = reply;
	self->last = reply;
	Py_RETURN_NONE;
}

static PyObject *front_send(PyObject *object, PyObject *args)
{
	Front *self = (Front *)object;
	unsigned long long call;
	const char *message;
	Py_ssize_t bytes;
	int ends;

	if (!PyArg_ParseTuple(args, "Ky#p:send", &call, &message, &bytes, &ends) || !is_open(self))
		return NULL;
	struct fm_reply *reply = fm_reply_new(call, message, (size_t)bytes);

	if (reply)
		reply->ends = ends;
	return add(self, reply);
}

static PyObject *front_end(PyObject *object, PyObject *args)
{
	Front *self = (Front *)object;
	unsigned long long call;
	int status;
	const char *told;

	if (!PyArg_ParseTuple(args, "Kis:end", &call, &status, &told) || !is_open(self))
		return NULL;
	struct fm_reply *reply = fm_reply_new(call, NULL, 0);

	if (reply) {
		reply->ends = true;
		reply->status = status;
		reply->told = strdup(told);
	}
	return add(self, reply);
}

static PyObject *front_flush(PyObject *object, PyObject *ignored)
{
	Front *self = (Front *)object;

	if (!is_open(self))
		return NULL;
	if (self->first) {
		fm_front_reply(self->front, self->first, self->last);
		self->first = self->last = NULL;
		fm_front_flush(self->front);
	}
	Py_RETURN_NONE;
}

static void stop(Front *self, int grace_ms)
{
	struct fm_front *front = self->front;

	self->front = NULL;
	if (!front)
		return;
	if (self->first)
		fm_front_reply(front, self->first, self->last);
	self->first = self->last = NULL;
	Py_BEGIN_ALLOW_THREADS
	fm_front_stop(front, grace_ms);
	Py_END_ALLOW_THREADS
}

static PyObject *front_close(PyObject *object, PyObject *args)
{
	int grace_ms;

	if (!PyArg_ParseTuple(args, "i:close", &grace_ms))
		return NULL;
	stop((Front *)object, grace_ms);
	Py_RETURN_NONE;
}

static void dealloc(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	stop((Front *)object, 0);
	release(object);
	Py_DECREF(type);
}

static PyMethodDef methods[] = {
	{"fileno", front_fileno, METH_NOARGS, NULL}, {"take", front_take, METH_NOARGS, NULL},
	{"send", front_send, METH_VARARGS, NULL},    {"end", front_end, METH_VARARGS, NULL},
	{"flush", front_flush, METH_NOARGS, NULL},   {"close", front_close, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
	{Py_tp_new, new_front}, {Py_tp_dealloc, dealloc}, {Py_tp_methods, methods}, {0, NULL}};

static PyType_Spec spec = {
	.name = "flatmount.snapshotter._front.Front",
	.basicsize = sizeof(Front),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = type_slots,
};

static int add_type(PyObject *module)
{
	PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
	int failed = type ? PyModule_AddObjectRef(module, "Front", type) : -1;

	Py_XDECREF(type);
	return failed;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_type}, {0, NULL}};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "flatmount.snapshotter._front",
	.m_doc = "A gRPC server on a unix socket that hands whole calls over, many at a time.",
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__front(void)
{
	return PyModuleDef_Init(&definition);
}
