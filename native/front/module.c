/* flatmount.snapshotter._front: the Python face of the front, and the table of contents. */
#include "module.h"

#include "front.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Which fields of a path's messages are wanted; without any the message itself is. */
struct shape {
	struct fm_field *fields;
	size_t count;
};

typedef struct {
	PyObject_HEAD
	struct fm_front *front;
	struct shape *shapes; /* for each path */
	size_t paths;
	/* What was answered since the last flush. */
	struct fm_reply *first, *last;
} Front;

static void free_shapes(struct shape *shapes, size_t count)
{
	for (size_t i = 0; shapes && i < count; i++)
		free(shapes[i].fields);
	free(shapes);
}

/* As "1s 4m": the numbers of strings and of maps. */
static bool read_shape(const char *text, struct shape *shape)
{
	shape->fields = calloc(strlen(text) / 2 + 1, sizeof(*shape->fields));
	if (!shape->fields) {
		PyErr_NoMemory();
		return false;
	}
	while (*text) {
		char *end;
		struct fm_field field = {.number = strtoull(text, &end, 10)};

		if (end == text || !field.number || (*end != 's' && *end != 'm')) {
			PyErr_Format(PyExc_ValueError, "%s is no list of fields", text);
			return false;
		}
		field.is_map = *end++ == 'm';
		shape->fields[shape->count++] = field;
		text = end + (*end == ' ');
	}
	return true;
}

/* A path is its text alone, or with its fields (None: the whole message), whether it may take any time, and the number
 * of the field that answers are kept by (0: none). */
static bool read_path(PyObject *item, struct fm_path *path, struct shape *shape)
{
	const char *text, *fields = NULL;
	int endless = 0;
	unsigned kept_by = 0;

	if (PyUnicode_Check(item)) {
		text = PyUnicode_AsUTF8AndSize(item, NULL);
	} else if (!PyTuple_Check(item)) {
		PyErr_SetString(PyExc_TypeError, "a path is a str, or a tuple of three or four");
		return false;
	} else if (!PyArg_ParseTuple(item, "szp|I:Front", &text, &fields, &endless, &kept_by)) {
		return false;
	}
	if (!text)
		return false;
	*path = (struct fm_path){(char *)text, endless, kept_by}; /* lives as long as the tuple */
	return !fields || read_shape(fields, shape);
}

static PyObject *new_front(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
	static char *names[] = {"listening", "paths", "most_bytes", "most_s", NULL};
	int listening;
	PyObject *paths;
	Py_ssize_t most_bytes;
	double most_s = 0;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "iO!n|d:Front", names, &listening, &PyTuple_Type, &paths,
					 &most_bytes, &most_s))
		return NULL;
	size_t count = (size_t)PyTuple_Size(paths), got = 0;
	struct fm_path *texts = calloc(count + 1, sizeof(*texts));
	struct shape *shapes = calloc(count + 1, sizeof(*shapes));
	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	Front *self = NULL;

	if (!texts || !shapes)
		PyErr_NoMemory();
	else
		while (got < count && read_path(PyTuple_GetItem(paths, (Py_ssize_t)got), &texts[got], &shapes[got]))
			got++;
	if (!PyErr_Occurred() && (self = (Front *)allocate(type, 0))) {
		self->shapes = shapes;
		self->paths = count;
		shapes = NULL;
		self->front = fm_front_start(listening, texts, count, (size_t)most_bytes, (uint64_t)(most_s * 1e9));
		if (!self->front) {
			PyErr_SetFromErrno(PyExc_OSError);
			Py_DECREF(self);
			self = NULL;
		}
	}
	free(texts);
	free_shapes(shapes, count);
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

/* Put one field into the tuple of them. Returns false with an exception set, or for what is no text. */
static bool take_field(void *user, size_t place, struct fm_text first, struct fm_text second)
{
	PyObject *values = user, *known = PyTuple_GetItem(values, (Py_ssize_t)place);
	PyObject *text = PyUnicode_DecodeUTF8(first.at, (Py_ssize_t)first.bytes, NULL);

	if (!text)
		return false;
	if (!PyDict_Check(known))
		return PyTuple_SetItem(values, (Py_ssize_t)place, text) == 0;
	PyObject *value = PyUnicode_DecodeUTF8(second.at, (Py_ssize_t)second.bytes, NULL);
	bool done = value && PyDict_SetItem(known, text, value) == 0;

	Py_XDECREF(value);
	Py_DECREF(text);
	return done;
}

/* The wanted fields of a message as a tuple; NULL without an exception where it cannot be read. */
static PyObject *fields_of(const unsigned char *message, size_t bytes, const struct shape *shape)
{
	PyObject *values = PyTuple_New((Py_ssize_t)shape->count);

	for (size_t i = 0; values && i < shape->count; i++) {
		PyObject *empty = shape->fields[i].is_map ? PyDict_New() : PyUnicode_FromStringAndSize("", 0);

		if (!empty || PyTuple_SetItem(values, (Py_ssize_t)i, empty) < 0)
			Py_CLEAR(values);
	}
	if (values && !fm_read_fields(message, bytes, shape->fields, shape->count, take_field, values)) {
		Py_CLEAR(values);
		if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError))
			PyErr_Clear();
	}
	return values;
}

static PyObject *message_of(Front *self, const struct fm_request *request)
{
	const unsigned char *message = request->body_bytes ? request->body + 5 : (const unsigned char *)"";
	size_t bytes = request->body_bytes ? request->body_bytes - 5 : 0;

	if (request->method >= 0 && self->shapes[request->method].fields)
		return fields_of(message, bytes, &self->shapes[request->method]);
	return PyBytes_FromStringAndSize((const char *)message, (Py_ssize_t)bytes);
}

static PyObject *add(Front *self, struct fm_reply *reply);

/* Answered here: nobody behind could make more of it. */
static bool refuse_unreadable(Front *self, uint64_t call)
{
	struct fm_reply *reply = fm_reply_new(call, NULL, 0);

	if (reply) {
		reply->ends = true;
		reply->status = FM_INTERNAL;
		reply->told = strdup("the request cannot be read");
		reply->told_bytes = reply->told ? strlen(reply->told) : 0;
	}
	PyObject *added = add(self, reply);

	Py_XDECREF(added);
	return added != NULL;
}

/* Append what Python is told of a request. */
static bool append_entry(Front *self, PyObject *found, const struct fm_request *request, uint64_t now_ns)
{
	double left_s = -1;
	PyObject *message = message_of(self, request);

	if (!message)
		return !PyErr_Occurred() && refuse_unreadable(self, request->call);
	if (request->deadline_ns)
		left_s = request->deadline_ns > now_ns ? (double)(request->deadline_ns - now_ns) / 1e9 : 0;
	PyObject *entry = Py_BuildValue("KidN", (unsigned long long)request->call, request->method, left_s, message);
	bool done = entry && PyList_Append(found, entry) == 0;

	Py_XDECREF(entry);
	return done;
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

		if (found && !append_entry(self, found, request, now_ns))
			Py_CLEAR(found);
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
	PyObject *told;

	if (!PyArg_ParseTuple(args, "KiU:end", &call, &status, &told) || !is_open(self))
		return NULL;
	/* What is told may have the name of a file in it, which need not be text. */
	PyObject *encoded = PyUnicode_AsEncodedString(told, "utf-8", "backslashreplace");

	if (!encoded)
		return NULL;
	struct fm_reply *reply = fm_reply_new(call, NULL, 0);
	size_t bytes = (size_t)PyBytes_Size(encoded);

	if (reply) {
		reply->ends = true;
		reply->status = status;
		reply->told = malloc(bytes + 1);
		if (reply->told) {
			memcpy(reply->told, PyBytes_AsString(encoded), bytes);
			reply->told_bytes = bytes;
		}
	}
	Py_DECREF(encoded);
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

static PyObject *front_keep(PyObject *object, PyObject *args)
{
	Front *self = (Front *)object;
	const char *key, *message;
	Py_ssize_t key_bytes, bytes;

	if (!PyArg_ParseTuple(args, "s#y#:keep", &key, &key_bytes, &message, &bytes) || !is_open(self))
		return NULL;
	fm_front_keep(self->front, (struct fm_text){key, (size_t)key_bytes}, (struct fm_text){message, (size_t)bytes});
	Py_RETURN_NONE;
}

static PyObject *front_forget(PyObject *object, PyObject *args)
{
	Front *self = (Front *)object;
	const char *key = NULL;
	Py_ssize_t bytes = 0;

	if (!PyArg_ParseTuple(args, "|s#:forget", &key, &bytes) || !is_open(self))
		return NULL;
	if (key)
		fm_front_forget(self->front, (struct fm_text){key, (size_t)bytes});
	else
		fm_front_forget_all(self->front);
	Py_RETURN_NONE;
}

static PyObject *numbers_of(const uint64_t *values, size_t count)
{
	PyObject *tuple = PyTuple_New((Py_ssize_t)count);

	for (size_t i = 0; tuple && i < count; i++) {
		PyObject *value = PyLong_FromUnsignedLongLong(values[i]);

		if (!value || PyTuple_SetItem(tuple, (Py_ssize_t)i, value) < 0)
			Py_CLEAR(tuple);
	}
	return tuple;
}

static PyObject *front_counts(PyObject *object, PyObject *args)
{
	Front *self = (Front *)object;
	Py_ssize_t place;

	if (!PyArg_ParseTuple(args, "n:counts", &place) || !is_open(self))
		return NULL;
	if (place < 0 || (size_t)place >= self->paths) {
		PyErr_SetString(PyExc_IndexError, "there is no such path");
		return NULL;
	}
	struct fm_counts counts = fm_front_counts(self->front, (size_t)place);

	return Py_BuildValue("NNd", numbers_of(counts.by_code, FM_CODES), numbers_of(counts.within, FM_BOUNDS + 1),
			     (double)counts.spent_ns / 1e9);
}

static PyObject *front_running(PyObject *object, PyObject *ignored)
{
	Front *self = (Front *)object;

	return is_open(self) ? PyLong_FromSize_t(fm_front_running(self->front)) : NULL;
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
	free_shapes(((Front *)object)->shapes, ((Front *)object)->paths);
	release(object);
	Py_DECREF(type);
}

static bool read_text(PyObject *object, struct fm_text *text)
{
	Py_ssize_t bytes;

	text->at = PyUnicode_AsUTF8AndSize(object, &bytes);
	text->bytes = text->at ? (size_t)bytes : 0;
	return text->at != NULL;
}

/* Fields of MountsResponse and of Mount (wire/snapshots.proto). */
enum { MOUNT = 1, TYPE = 1, SOURCE = 2, OPTION = 4, MOST_OPTIONS = 64 };

/* MountsResponse with one Mount, in a tenth of the time that building the messages takes. */
static PyObject *mounts_response(PyObject *module, PyObject *args)
{
	PyObject *type, *source, *options;
	struct fm_text texts[2 + MOST_OPTIONS];

	if (!PyArg_ParseTuple(args, "UUO!:mounts_response", &type, &source, &PyTuple_Type, &options))
		return NULL;
	size_t count = (size_t)PyTuple_Size(options), bytes = 0;

	if (count > MOST_OPTIONS) {
		PyErr_SetString(PyExc_ValueError, "there are too many options");
		return NULL;
	}
	if (!read_text(type, &texts[0]) || !read_text(source, &texts[1]))
		return NULL;
	for (size_t i = 0; i < count; i++)
		if (!read_text(PyTuple_GetItem(options, (Py_ssize_t)i), &texts[2 + i]))
			return NULL;
	for (size_t i = 0; i < 2 + count; i++)
		bytes += fm_string_bytes(texts[i].bytes);
	PyObject *message = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)fm_string_bytes(bytes));

	if (!message)
		return NULL;
	unsigned char *at = fm_put_tag((unsigned char *)PyBytes_AsString(message), MOUNT, bytes);

	at = fm_put_string(at, TYPE, texts[0]);
	at = fm_put_string(at, SOURCE, texts[1]);
	for (size_t i = 0; i < count; i++)
		at = fm_put_string(at, OPTION, texts[2 + i]);
	return message;
}

static PyMethodDef functions[] = {
	{"mounts_response", mounts_response, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyMethodDef methods[] = {
	{"fileno", front_fileno, METH_NOARGS, NULL}, {"take", front_take, METH_NOARGS, NULL},
	{"send", front_send, METH_VARARGS, NULL},    {"end", front_end, METH_VARARGS, NULL},
	{"flush", front_flush, METH_NOARGS, NULL},   {"close", front_close, METH_VARARGS, NULL},
	{"keep", front_keep, METH_VARARGS, NULL},    {"forget", front_forget, METH_VARARGS, NULL},
	{"counts", front_counts, METH_VARARGS, NULL}, {"running", front_running, METH_NOARGS, NULL},
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

static int add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
	PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
	int failed = type ? PyModule_AddObjectRef(module, name, type) : -1;

	Py_XDECREF(type);
	return failed;
}

static int fill(PyObject *module)
{
	if (add_type(module, "Front", &spec) || add_type(module, "Committer", &fm_committer_spec))
		return -1;
	PyObject *bounds = PyTuple_New(FM_BOUNDS);

	for (Py_ssize_t i = 0; bounds && i < FM_BOUNDS; i++) {
		PyObject *value = PyFloat_FromDouble((double)fm_bounds_ns[i] / 1e9);

		if (!value || PyTuple_SetItem(bounds, i, value) < 0)
			Py_CLEAR(bounds);
	}
	int failed = bounds ? PyModule_AddObjectRef(module, "BOUNDS_S", bounds) : -1;

	Py_XDECREF(bounds);
	return failed;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "flatmount.snapshotter._front",
	.m_doc = "What a burst of calls goes through without the interpreter: the front that speaks gRPC, and the committer.",
	.m_methods = functions,
	.m_slots = slots,
};

PyMODINIT_FUNC PyInit__front(void)
{
	return PyModuleDef_Init(&definition);
}
