/*
 * The mount table of a mount namespace, its changes, and a reader that follows it as an init system does.
 *
 *	count_mounts, list_mounts	listmount
 *	stat_mounts, statmount_fields	listmount, statmount
 *	mount_namespace_id		ioctl(NS_GET_MNTNS_ID)
 *	open_mount_events		fanotify_init(FAN_REPORT_MNT), fanotify_mark(FAN_MARK_MNTNS)
 *	drain_mount_events		read
 *	follow_mountinfo		open, poll, read of /proc/self/mountinfo
 *	die_with_parent			prctl(PR_SET_PDEATHSIG)
 *
 * listmount and statmount take a namespace by its 64-bit id; 0 is the calling thread's.
 */
#include "common.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

#define FM_NS_GET_MNTNS_ID _IOR(0xb7, 0x5, __u64)
#define FM_LSMT_ROOT 0xffffffffffffffffULL

#define FM_STATMOUNT_SB_BASIC 0x1u
#define FM_STATMOUNT_MNT_BASIC 0x2u
#define FM_STATMOUNT_MNT_ROOT 0x8u
#define FM_STATMOUNT_MNT_POINT 0x10u
#define FM_STATMOUNT_FS_TYPE 0x20u
#define FM_STATMOUNT_MNT_OPTS 0x80u
#define FM_STATMOUNT_FS_SUBTYPE 0x100u
#define FM_STATMOUNT_SB_SOURCE 0x200u
#define FM_STATMOUNT_WANTED                                                                                \
	(FM_STATMOUNT_SB_BASIC | FM_STATMOUNT_MNT_BASIC | FM_STATMOUNT_MNT_ROOT | FM_STATMOUNT_MNT_POINT | \
	 FM_STATMOUNT_FS_TYPE | FM_STATMOUNT_MNT_OPTS | FM_STATMOUNT_FS_SUBTYPE | FM_STATMOUNT_SB_SOURCE)

#define FM_FAN_REPORT_MNT 0x00004000u
#define FM_FAN_MARK_MNTNS 0x00000110u
#define FM_FAN_MNT_ATTACH 0x01000000u
#define FM_FAN_MNT_DETACH 0x02000000u

/* struct mnt_id_req. Kernels before 6.11 know the first 24 bytes and refuse more unless they are zero. */
struct fm_mnt_id_req {
	__u32 size;
	__u32 mnt_ns_fd;
	__u64 mnt_id;
	__u64 param;
	__u64 mnt_ns_id;
};
_Static_assert(sizeof(struct fm_mnt_id_req) == 32, "MNT_ID_REQ_SIZE_VER1");

/* struct statmount as of 6.15. The kernel writes 512 bytes, then the strings; offsets count from `str`. */
struct fm_statmount {
	__u32 size;
	__u32 mnt_opts;
	__u64 mask;
	__u32 sb_dev_major;
	__u32 sb_dev_minor;
	__u64 sb_magic;
	__u32 sb_flags;
	__u32 fs_type;
	__u64 mnt_id;
	__u64 mnt_parent_id;
	__u32 mnt_id_old;
	__u32 mnt_parent_id_old;
	__u64 mnt_attr;
	__u64 mnt_propagation;
	__u64 mnt_peer_group;
	__u64 mnt_master;
	__u64 propagate_from;
	__u32 mnt_root;
	__u32 mnt_point;
	__u64 mnt_ns_id;
	__u32 fs_subtype;
	__u32 sb_source;
	__u64 later[48];
	char str[];
};
_Static_assert(sizeof(struct fm_statmount) == 512, "the fixed part of struct statmount");

enum { FM_BATCH = 512 };

static struct fm_mnt_id_req request_for(__u64 mnt_id, __u64 param, __u64 ns_id)
{
	return (struct fm_mnt_id_req){
		.size = ns_id ? 32 : 24,
		.mnt_id = mnt_id,
		.param = param,
		.mnt_ns_id = ns_id,
	};
}

/* The next mounts after `last` in the order they were made; 0 at the end, -1 with errno. */
static long list_after(__u64 last, __u64 ns_id, __u64 ids[FM_BATCH])
{
	struct fm_mnt_id_req request = request_for(FM_LSMT_ROOT, last, ns_id);

	return syscall(SYS_listmount, &request, ids, (size_t)FM_BATCH, 0u);
}

static PyObject *count_mounts(PyObject *self, PyObject *args)
{
	unsigned long long ns_id;
	__u64 ids[FM_BATCH], last = 0;
	long found;
	unsigned long total = 0;

	if (!PyArg_ParseTuple(args, "K:count_mounts", &ns_id))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	while ((found = list_after(last, ns_id, ids)) > 0) {
		total += (unsigned long)found;
		last = ids[found - 1];
		if (found < FM_BATCH)
			break;
	}
	Py_END_ALLOW_THREADS
	if (found < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromUnsignedLong(total);
}

static PyObject *list_mounts(PyObject *self, PyObject *args)
{
	unsigned long long ns_id;
	__u64 ids[FM_BATCH], last = 0;
	long found;

	if (!PyArg_ParseTuple(args, "K:list_mounts", &ns_id))
		return NULL;
	PyObject *all = PyList_New(0);
	while (all) {
		Py_BEGIN_ALLOW_THREADS
		found = list_after(last, ns_id, ids);
		Py_END_ALLOW_THREADS
		if (found < 0) {
			PyErr_SetFromErrno(PyExc_OSError);
			Py_CLEAR(all);
		}
		if (found <= 0)
			break;
		for (long i = 0; i < found && all; i++) {
			PyObject *id = PyLong_FromUnsignedLongLong(ids[i]);

			if (!id || PyList_Append(all, id) < 0)
				Py_CLEAR(all);
			Py_XDECREF(id);
		}
		last = ids[found - 1];
	}
	return all;
}

/* Records of one batch, one behind the other, each as the kernel wrote it. */
struct records {
	char *bytes;
	size_t size;
	size_t room;
};

/* Appends one mount's record. 0, also for a mount that went away meanwhile; -1 with errno. */
static int stat_one(struct records *records, __u64 id, __u64 ns_id)
{
	struct fm_mnt_id_req request = request_for(id, FM_STATMOUNT_WANTED, ns_id);

	for (;;) {
		struct fm_statmount *record = (void *)(records->bytes + records->size);
		size_t room = records->room - records->size;

		if (room > sizeof(*record)) {
			if (syscall(SYS_statmount, &request, record, room, 0u) == 0) {
				/* The next record starts aligned. */
				records->size += (record->size + 7u) & ~(size_t)7;
				return 0;
			}
			/* Gone since it was listed, or moved out of the reader's sight. */
			if (errno == ENOENT || errno == EPERM)
				return 0;
			if (errno != EOVERFLOW)
				return -1;
		}

		char *grown = realloc(records->bytes, records->room * 2);
		if (!grown)
			return -1;
		records->bytes = grown;
		records->room *= 2;
	}
}

static const char *text(const struct fm_statmount *record, __u64 field, __u32 offset)
{
	return record->mask & field ? record->str + offset : "";
}

static PyObject *record_as_tuple(const struct fm_statmount *record)
{
	return Py_BuildValue(
		"KKIIKKKKIIyyyyyy", (unsigned long long)record->mnt_id, (unsigned long long)record->mnt_parent_id,
		record->mnt_id_old, record->mnt_parent_id_old, (unsigned long long)record->mnt_attr,
		(unsigned long long)record->mnt_propagation, (unsigned long long)record->mnt_peer_group,
		(unsigned long long)record->mnt_master, record->sb_dev_major, record->sb_dev_minor,
		text(record, FM_STATMOUNT_MNT_ROOT, record->mnt_root),
		text(record, FM_STATMOUNT_MNT_POINT, record->mnt_point),
		text(record, FM_STATMOUNT_FS_TYPE, record->fs_type),
		text(record, FM_STATMOUNT_FS_SUBTYPE, record->fs_subtype),
		text(record, FM_STATMOUNT_SB_SOURCE, record->sb_source),
		text(record, FM_STATMOUNT_MNT_OPTS, record->mnt_opts));
}

static int append_records(PyObject *all, const struct records *records)
{
	for (size_t at = 0; at < records->size;) {
		const struct fm_statmount *record = (const void *)(records->bytes + at);
		PyObject *entry = record_as_tuple(record);

		if (!entry)
			return -1;
		int failed = PyList_Append(all, entry);
		Py_DECREF(entry);
		if (failed)
			return -1;
		at += (record->size + 7u) & ~(size_t)7;
	}
	return 0;
}

static PyObject *stat_mounts(PyObject *self, PyObject *args)
{
	unsigned long long ns_id;
	__u64 ids[FM_BATCH], last = 0;
	struct records records = {.room = 1 << 20};
	long found;
	int failed = 0;

	if (!PyArg_ParseTuple(args, "K:stat_mounts", &ns_id))
		return NULL;
	records.bytes = malloc(records.room);
	if (!records.bytes)
		return PyErr_NoMemory();
	PyObject *all = PyList_New(0);
	while (all) {
		records.size = 0;
		Py_BEGIN_ALLOW_THREADS
		found = list_after(last, ns_id, ids);
		for (long i = 0; i < found && !failed; i++)
			failed = stat_one(&records, ids[i], ns_id);
		Py_END_ALLOW_THREADS
		if (found < 0 || failed) {
			PyErr_SetFromErrno(PyExc_OSError);
			Py_CLEAR(all);
		} else if (append_records(all, &records) < 0) {
			Py_CLEAR(all);
		}
		if (found <= 0)
			break;
		last = ids[found - 1];
	}
	free(records.bytes);
	return all;
}

static PyObject *statmount_fields(PyObject *self, PyObject *unused)
{
	__u64 ids[FM_BATCH];
	struct records records = {.room = 1 << 16};
	unsigned long mask = 0;

	long found = list_after(0, 0, ids);
	if (found < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	records.bytes = malloc(records.room);
	if (!records.bytes)
		return PyErr_NoMemory();
	for (long i = 0; i < found && !records.size; i++)
		if (stat_one(&records, ids[i], 0) < 0) {
			PyErr_SetFromErrno(PyExc_OSError);
			free(records.bytes);
			return NULL;
		}
	if (records.size)
		mask = (unsigned long)((const struct fm_statmount *)(const void *)records.bytes)->mask;
	free(records.bytes);
	return PyLong_FromUnsignedLong(mask);
}

static PyObject *mount_namespace_id(PyObject *self, PyObject *args)
{
	int fd;
	__u64 id = 0;

	if (!PyArg_ParseTuple(args, "i:mount_namespace_id", &fd))
		return NULL;
	if (ioctl(fd, FM_NS_GET_MNTNS_ID, &id) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromUnsignedLongLong(id);
}

static PyObject *open_mount_events(PyObject *self, PyObject *args)
{
	int namespace_fd, failed = 0;

	if (!PyArg_ParseTuple(args, "i:open_mount_events", &namespace_fd))
		return NULL;
	int queue = fanotify_init(
		FM_FAN_REPORT_MNT | FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE, O_RDONLY);
	if (queue < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_BEGIN_ALLOW_THREADS
	failed = fanotify_mark(queue, FAN_MARK_ADD | FM_FAN_MARK_MNTNS, FM_FAN_MNT_ATTACH | FM_FAN_MNT_DETACH,
			       namespace_fd, NULL);
	Py_END_ALLOW_THREADS
	if (failed) {
		PyErr_SetFromErrno(PyExc_OSError);
		close(queue);
		return NULL;
	}
	return PyLong_FromLong(queue);
}

static PyObject *drain_mount_events(PyObject *self, PyObject *args)
{
	_Alignas(struct fanotify_event_metadata) char buffer[1 << 15];
	unsigned long attached = 0, detached = 0;
	bool overflow = false;
	ssize_t length;
	int queue;

	if (!PyArg_ParseTuple(args, "i:drain_mount_events", &queue))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	while ((length = read(queue, buffer, sizeof(buffer))) > 0) {
		const struct fanotify_event_metadata *event = (const void *)buffer;

		for (; FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length)) {
			attached += !!(event->mask & FM_FAN_MNT_ATTACH);
			detached += !!(event->mask & FM_FAN_MNT_DETACH);
			overflow |= !!(event->mask & FAN_Q_OVERFLOW);
		}
	}
	Py_END_ALLOW_THREADS
	if (length < 0 && errno != EAGAIN)
		return PyErr_SetFromErrno(PyExc_OSError);
	if (overflow) {
		errno = EOVERFLOW;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return Py_BuildValue("kk", attached, detached);
}

/* One line of mountinfo as libmount keeps it: every field a string of its own, octal escapes undone. */
struct watched {
	struct watched *next;
	unsigned id, parent, major, minor;
	char *fields[7]; /* root, target, options, optional fields, type, source, options of the file system */
};

static void forget(struct watched *table)
{
	while (table) {
		struct watched *next = table->next;

		for (size_t i = 0; i < sizeof(table->fields) / sizeof(table->fields[0]); i++)
			free(table->fields[i]);
		free(table);
		table = next;
	}
}

static char *unescaped(const char *from, size_t length)
{
	char *copy = malloc(length + 1), *to = copy;

	for (size_t i = 0; copy && i < length; i++) {
		if (from[i] == '\\' && i + 3 < length && from[i + 1] >= '0' && from[i + 1] <= '3') {
			*to++ = (char)((from[i + 1] - '0') << 6 | (from[i + 2] - '0') << 3 | (from[i + 3] - '0'));
			i += 3;
		} else {
			*to++ = from[i];
		}
	}
	if (copy)
		*to = '\0';
	return copy;
}

/* Cuts the next word of a line; NULL where memory or the line ends. */
static char *next_word(const char **at)
{
	const char *start = *at;
	size_t length = strcspn(start, " ");

	*at = start + length + (start[length] == ' ');
	return length ? unescaped(start, length) : NULL;
}

static struct watched *parse_line(const char *line)
{
	struct watched *entry = calloc(1, sizeof(*entry));
	int used = 0;

	if (!entry ||
	    sscanf(line, "%u %u %u:%u %n", &entry->id, &entry->parent, &entry->major, &entry->minor, &used) < 4) {
		free(entry);
		return NULL;
	}
	line += used;
	for (int i = 0; i < 3; i++)
		entry->fields[i] = next_word(&line);
	const char *separator = strncmp(line, "- ", 2) ? strstr(line, " - ") : line - 1;
	if (separator) {
		if (separator > line)
			entry->fields[3] = unescaped(line, (size_t)(separator - line));
		line = separator + 3;
		for (int i = 4; i < 7; i++)
			entry->fields[i] = next_word(&line);
	}
	return entry;
}

struct following {
	char *text;
	size_t room;
	struct watched *table;
	unsigned long long rereads, bytes, entries;
};

/* Reads and parses the whole table and drops the one before. 0, or -1 with errno. */
static int reread(struct following *state, int fd)
{
	size_t length = 0;

	if (lseek(fd, 0, SEEK_SET) < 0)
		return -1;
	for (;;) {
		if (length + 1 == state->room) {
			char *grown = realloc(state->text, state->room * 2);

			if (!grown)
				return -1;
			state->text = grown;
			state->room *= 2;
		}
		ssize_t got = read(fd, state->text + length, state->room - length - 1);
		if (got < 0)
			return -1;
		if (got == 0)
			break;
		length += (size_t)got;
	}
	state->text[length] = '\0';
	state->bytes += length;

	forget(state->table);
	state->table = NULL;
	for (char *line = state->text, *end; *line && (end = strchr(line, '\n')); line = end + 1) {
		*end = '\0';
		struct watched *entry = parse_line(line);
		if (entry) {
			entry->next = state->table;
			state->table = entry;
			state->entries++;
		}
	}
	return 0;
}

/* Until `stop` has something to read or is hung up; poll tells of changes since the open. 0, or -1 with errno. */
static int follow(struct following *state, int mountinfo, int stop)
{
	struct pollfd events[] = {{.fd = mountinfo, .events = POLLPRI}, {.fd = stop, .events = POLLIN}};

	for (;;) {
		if (poll(events, 2, -1) < 0) {
			if (errno == EINTR)
				continue;
			return -1;
		}
		if (events[1].revents)
			return 0;
		if (events[0].revents & (POLLERR | POLLPRI)) {
			if (reread(state, mountinfo) < 0)
				return -1;
			state->rereads++;
		}
	}
}

static PyObject *follow_mountinfo(PyObject *self, PyObject *args)
{
	struct following state = {.room = 1 << 16};
	int mountinfo, stop, failed, error;

	if (!PyArg_ParseTuple(args, "ii:follow_mountinfo", &mountinfo, &stop))
		return NULL;
	state.text = malloc(state.room);
	if (!state.text)
		return PyErr_NoMemory();
	Py_BEGIN_ALLOW_THREADS
	failed = follow(&state, mountinfo, stop);
	error = errno;
	forget(state.table);
	free(state.text);
	Py_END_ALLOW_THREADS
	if (failed) {
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return Py_BuildValue("KKK", state.rereads, state.entries, state.bytes);
}

static PyObject *die_with_parent(PyObject *self, PyObject *args)
{
	int parent;

	if (!PyArg_ParseTuple(args, "i:die_with_parent", &parent))
		return NULL;
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	/* A parent that was gone before the call sends no signal any more. */
	if (getppid() != parent)
		kill(getpid(), SIGKILL);
	Py_RETURN_NONE;
}

PyMethodDef fm_mounts_methods[] = {
	{"count_mounts", count_mounts, METH_VARARGS, NULL},
	{"list_mounts", list_mounts, METH_VARARGS, NULL},
	{"stat_mounts", stat_mounts, METH_VARARGS, NULL},
	{"statmount_fields", statmount_fields, METH_NOARGS, NULL},
	{"mount_namespace_id", mount_namespace_id, METH_VARARGS, NULL},
	{"open_mount_events", open_mount_events, METH_VARARGS, NULL},
	{"drain_mount_events", drain_mount_events, METH_VARARGS, NULL},
	{"follow_mountinfo", follow_mountinfo, METH_VARARGS, NULL},
	{"die_with_parent", die_with_parent, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};
