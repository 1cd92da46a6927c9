/*
 * The plan executor: runs an encoded plan (flatmount.plan.encode writes it) from first to last operation with the
 * interpreter's lock released once.
 *
 *   operation          system call                    strings            descriptors         numbers
 *   MKDIR              mkdir, chmod                   path                                   x mode
 *   RMDIR              rmdir                          path
 *   CHOWN              lchown                         path                                   x uid, y gid, or RUN_IDS
 *   UTIMES             utimensat                      path                                   y ns since the epoch
 *   READ_FILE          open, openat2, read .. close   root, path in it
 *   OPEN               open(O_PATH|O_DIRECTORY)       path               out
 *   OPEN_TREE          open_tree(CLONE)               path               out, a directory    x more flags
 *   MOUNT_SETATTR      mount_setattr                                     a tree, b userns    x more flags, y attributes
 *   MOVE_MOUNT         move_mount                     target             a tree
 *   FSOPEN             fsopen                         type               out
 *   FSCONFIG_FLAG      fsconfig(SET_FLAG)             key                a context
 *   FSCONFIG_STRING    fsconfig(SET_STRING)           key, value         a context
 *   FSCONFIG_FD        fsconfig(SET_FD)               key                a context, b value
 *   FSCONFIG_CREATE    fsconfig(CMD_CREATE)                              a context
 *   FSMOUNT            fsmount                                           out, a context      y attributes
 *   MOUNT              mount                          source, target, data                   x the type's place, y flags
 *   UMOUNT             umount2                        target                                 x flags
 *   FCHDIR             fchdir                                            a directory
 *   CHDIR              chdir                          path
 *   SETNS              setns(CLONE_NEWNS)                                a namespace
 *   ASSUME_IDS         setfsuid, setfsgid, capset                                            (from the run)
 *   CLOSE              close                                             a
 *
 * A program is checked once, when it is made: every slot, string and parameter it names exists, so that running it
 * only meets the kernel's errors. Slots from `lent` on belong to the run: all are closed when it ends, but those that
 * are named as outputs and handed over after success.
 *
 * Working directory, file-system ids and mount namespace belong to a task. Operations that change them run on a
 * thread of our own unless the calling thread was adopted (adopt_thread); SETNS always does.
 */
#include "common.h"
#include "lookup.h"
#include "program.h"

#include <errno.h>
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum code {
	MKDIR, RMDIR, CHOWN, UTIMES, READ_FILE, OPEN, OPEN_TREE, MOUNT_SETATTR, MOVE_MOUNT, FSOPEN, FSCONFIG_FLAG,
	FSCONFIG_STRING, FSCONFIG_FD, FSCONFIG_CREATE, FSMOUNT, MOUNT, UMOUNT, FCHDIR, CHDIR, SETNS, ASSUME_IDS, CLOSE,
	CODES
};

enum {
	TOLERATE = 1,  /* an error of this operation is expected and does not stop the run */
	COUNTS = 2,    /* attaches or detaches a mount in a mount namespace */
	RUN_IDS = 4,   /* ids come from the run, not from the record */
};

enum { KEEP_GOING = 1 }; /* of a program: go on after an error (an undo does); the first one is reported */

#define NO_STRING UINT32_MAX
#define PARAMETER '\x01' /* in a string: the next byte, less '0', is the parameter's place */
#define MOST_SLOTS 64
#define MOST_PARAMETERS 16
#define ARENA_BYTES 16384 /* expanded strings of one operation; mount(2) itself takes 4,095 bytes of options */
#define MESSAGE_BYTES 512
#define READ_BYTES 65536

struct record {
	uint8_t code;
	uint8_t flags;
	int16_t out, a, b;
	uint32_t s1, s2, s3, x;
	uint64_t y;
};
_Static_assert(sizeof(struct record) == 32, "flatmount.plan.encode packs 32 bytes");

struct program {
	PyObject_HEAD
	struct record *records;
	char *strings;
	uint32_t count, strings_bytes;
	int slots, lent, parameters, flags;
	int outputs[MOST_SLOTS], output_count;
	int own_fs, own_ns;
};

struct run {
	const struct program *program;
	int slots[MOST_SLOTS];
	const char *parameters[MOST_PARAMETERS];
	size_t parameter_bytes[MOST_PARAMETERS];
	unsigned int fsuid, fsgid, uid, gid;
	uint32_t *nanoseconds;
	uint32_t done, failed_at, counted;
	int error, changed_directory, assumed_ids;
	struct __user_cap_data_struct capabilities[2];
	char message[MESSAGE_BYTES];
	char *arena;
	size_t arena_used;
};

static _Thread_local int thread_is_ours;

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The string at `offset` with its parameters put in; NULL and ENAMETOOLONG where the arena is full. */
static const char *expand(struct run *run, uint32_t offset)
{
	if (offset == NO_STRING)
		return NULL;

	const char *from = run->program->strings + offset;
	if (!strchr(from, PARAMETER))
		return from;

	char *start = run->arena + run->arena_used, *to = start, *end = run->arena + ARENA_BYTES;
	for (; *from; from++) {
		if (*from != PARAMETER) {
			if (to + 1 >= end)
				goto too_long;
			*to++ = *from;
			continue;
		}
		int which = *++from - '0';
		size_t bytes = run->parameter_bytes[which];
		if (to + bytes + 1 >= end)
			goto too_long;
		memcpy(to, run->parameters[which], bytes);
		to += bytes;
	}
	*to++ = '\0';
	run->arena_used = (size_t)(to - run->arena);
	return start;

too_long:
	errno = ENAMETOOLONG;
	return NULL;
}

static int descriptor(const struct run *run, int16_t slot)
{
	return slot < 0 ? AT_FDCWD : run->slots[slot];
}

/* Takes the ids of the container's root for files it makes, and keeps the capabilities that leaving 0 drops. */
static int assume_ids(struct run *run)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};

	if (syscall(SYS_capget, &header, run->capabilities) < 0)
		return -1;
	run->assumed_ids = 1;
	setfsgid(run->fsgid);
	setfsuid(run->fsuid);
	if ((unsigned int)setfsuid(-1) != run->fsuid || (unsigned int)setfsgid(-1) != run->fsgid) {
		errno = EPERM;
		return -1;
	}
	return (int)syscall(SYS_capset, &header, run->capabilities);
}

static void restore_ids(struct run *run)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};

	setfsuid(geteuid());
	setfsgid(getegid());
	syscall(SYS_capset, &header, run->capabilities);
}

static int read_file(const char *root, const char *path)
{
	char buffer[4096];
	ssize_t got, sum = 0;
	int inside = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (inside < 0)
		return -1;
	int fd = fm_open_file_in_root(inside, path), error = errno;
	close(inside);
	if (fd < 0) {
		errno = error;
		return -1;
	}
	while (sum < READ_BYTES && (got = read(fd, buffer, sizeof(buffer))) > 0)
		sum += got;
	close(fd);
	return 0;
}

static int make_directory(const char *path, mode_t mode)
{
	if (mkdir(path, mode) < 0)
		return -1;
	/* The umask belongs to the process; only a mode that it could have cut needs the second call. */
	return (mode & 07077) ? chmod(path, mode) : 0;
}

static long perform(struct run *run, const struct record *r, const char *s1, const char *s2, const char *s3)
{
	switch ((enum code)r->code) {
	case MKDIR:
		return make_directory(s1, r->x);
	case RMDIR:
		return rmdir(s1);
	case CHOWN:
		return r->flags & RUN_IDS ? lchown(s1, run->uid, run->gid) : lchown(s1, r->x, (gid_t)r->y);
	case UTIMES: {
		int64_t ns = (int64_t)r->y;
		int64_t rest = ((ns % 1000000000) + 1000000000) % 1000000000;
		struct timespec both[2];
		both[0].tv_nsec = both[1].tv_nsec = rest;
		both[0].tv_sec = both[1].tv_sec = (ns - rest) / 1000000000;
		return utimensat(AT_FDCWD, s1, both, AT_SYMLINK_NOFOLLOW);
	}
	case READ_FILE:
		return read_file(s1, s2);
	case OPEN:
		return openat(descriptor(run, r->a), s1, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	case OPEN_TREE:
		return syscall(SYS_open_tree, descriptor(run, r->a), s1, FM_OPEN_TREE_CLONE | FM_OPEN_TREE_CLOEXEC | r->x);
	case MOUNT_SETATTR: {
		struct fm_mount_attr attr = {.attr_set = r->y};
		if (r->b >= 0) {
			attr.attr_set |= FM_MOUNT_ATTR_IDMAP;
			attr.userns_fd = (__u64)run->slots[r->b];
		}
		return syscall(SYS_mount_setattr, run->slots[r->a], "", FM_AT_EMPTY_PATH | r->x, &attr,
			       sizeof(attr));
	}
	case MOVE_MOUNT:
		return syscall(SYS_move_mount, run->slots[r->a], "", AT_FDCWD, s1, FM_MOVE_MOUNT_F_EMPTY_PATH);
	case FSOPEN:
		return syscall(SYS_fsopen, s1, FM_FSOPEN_CLOEXEC);
	case FSCONFIG_FLAG:
		return syscall(SYS_fsconfig, run->slots[r->a], FM_FSCONFIG_SET_FLAG, s1, NULL, 0);
	case FSCONFIG_STRING:
		return syscall(SYS_fsconfig, run->slots[r->a], FM_FSCONFIG_SET_STRING, s1, s2, 0);
	case FSCONFIG_FD:
		return syscall(SYS_fsconfig, run->slots[r->a], FM_FSCONFIG_SET_FD, s1, NULL, run->slots[r->b]);
	case FSCONFIG_CREATE:
		return syscall(SYS_fsconfig, run->slots[r->a], FM_FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	case FSMOUNT:
		return syscall(SYS_fsmount, run->slots[r->a], FM_FSMOUNT_CLOEXEC, (unsigned int)r->y);
	case MOUNT: {
		/* mount(2) cuts its options in silence at 4,095 bytes: a shorter lowerdir would be another image. */
		if (s3 && strlen(s3) > 4095) {
			errno = E2BIG;
			return -1;
		}
		const char *type = r->x == NO_STRING ? NULL : run->program->strings + r->x;
		return mount(s1, s2, type, (unsigned long)r->y, s3);
	}
	case UMOUNT:
		return umount2(s1, (int)r->x);
	case FCHDIR:
		run->changed_directory = 1;
		return fchdir(run->slots[r->a]);
	case CHDIR:
		run->changed_directory = 1;
		return chdir(s1);
	case SETNS:
		return setns(run->slots[r->a], CLONE_NEWNS);
	case ASSUME_IDS:
		return assume_ids(run);
	case CLOSE: {
		int fd = run->slots[r->a];
		run->slots[r->a] = -1;
		return close(fd);
	}
	case CODES:
		break;
	}
	errno = EINVAL;
	return -1;
}

/* What the kernel wrote to the file-system context: the last error line, without its "e " or "w " mark. */
static void read_message(struct run *run, int fd)
{
	char line[MESSAGE_BYTES];
	ssize_t got;

	for (int lines = 0; lines < 16 && (got = read(fd, line, sizeof(line) - 1)) > 0; lines++) {
		line[got] = '\0';
		if (line[0] != 'i')
			strcpy(run->message, got > 2 && line[1] == ' ' ? line + 2 : line);
	}
	run->message[strcspn(run->message, "\n")] = '\0';
}

static int is_context_call(uint8_t code)
{
	return code >= FSCONFIG_FLAG && code <= FSMOUNT;
}

/* What failed is no operation of the plan: its place is behind the last one, and the message is the call's name. */
static void fail_outside(struct run *run, const char *call, int error)
{
	run->error = error;
	run->failed_at = run->program->count;
	snprintf(run->message, sizeof(run->message), "%s", call);
}

static void *run_all(void *argument)
{
	struct run *run = argument;
	const struct program *program = run->program;
	uint64_t before = now_ns();

	for (uint32_t i = 0; i < program->count; i++) {
		const struct record *r = &program->records[i];
		long result = -1;

		run->arena_used = 0;
		errno = 0;
		const char *s1 = expand(run, r->s1), *s2 = errno ? NULL : expand(run, r->s2);
		const char *s3 = errno ? NULL : expand(run, r->s3);
		if (!errno)
			result = perform(run, r, s1, s2, s3);
		int error = result < 0 ? errno : 0;

		uint64_t after = now_ns();
		run->nanoseconds[i] = after - before > UINT32_MAX ? UINT32_MAX : (uint32_t)(after - before);
		before = after;

		if (!error) {
			if (r->out >= 0)
				run->slots[r->out] = (int)result;
			run->counted += (r->flags & COUNTS) != 0;
			run->done++;
			continue;
		}
		if (r->flags & TOLERATE) {
			run->done++;
			continue;
		}
		if (!run->error) {
			run->error = error;
			run->failed_at = i;
			if (is_context_call(r->code) && run->slots[r->a] >= 0)
				read_message(run, run->slots[r->a]);
		}
		if (!(program->flags & KEEP_GOING))
			break;
	}
	if (run->assumed_ids)
		restore_ids(run);
	/* A working directory in a detached mount would keep it alive, and busy. */
	if (run->changed_directory && chdir("/") < 0 && !run->error)
		fail_outside(run, "chdir", errno);
	return NULL;
}

static void *run_on_own_thread(void *argument)
{
	struct run *run = argument;

	if (unshare(CLONE_FS) < 0)
		fail_outside(run, "unshare", errno);
	else
		run_all(run);
	return NULL;
}

static int start_run(struct run *run)
{
	const struct program *program = run->program;
	pthread_t thread;

	if (!program->own_ns && (!program->own_fs || thread_is_ours)) {
		run_all(run);
		return 0;
	}
	int error = pthread_create(&thread, NULL, run_on_own_thread, run);
	if (!error)
		pthread_join(thread, NULL);
	return error;
}

static int64_t as_number(PyObject *tuple, Py_ssize_t i)
{
	return PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
}

static int take_arguments(struct run *run, PyObject *lent, PyObject *parameters, PyObject *ids)
{
	const struct program *program = run->program;

	if (PyTuple_Size(lent) != program->lent || PyTuple_Size(parameters) != program->parameters ||
	    PyTuple_Size(ids) != 4) {
		PyErr_Format(PyExc_ValueError, "this program takes %d descriptors, %d strings and 4 ids", program->lent,
			     program->parameters);
		return -1;
	}
	for (int i = 0; i < program->slots; i++)
		run->slots[i] = i < program->lent ? (int)as_number(lent, i) : -1;
	for (int i = 0; i < program->parameters; i++) {
		char *text;
		Py_ssize_t bytes;
		if (PyBytes_AsStringAndSize(PyTuple_GetItem(parameters, i), &text, &bytes) < 0)
			return -1;
		if (memchr(text, '\0', (size_t)bytes)) {
			PyErr_SetString(PyExc_ValueError, "a string holds a NUL byte");
			return -1;
		}
		run->parameters[i] = text;
		run->parameter_bytes[i] = (size_t)bytes;
	}
	run->fsuid = (unsigned int)as_number(ids, 0);
	run->fsgid = (unsigned int)as_number(ids, 1);
	run->uid = (unsigned int)as_number(ids, 2);
	run->gid = (unsigned int)as_number(ids, 3);
	return PyErr_Occurred() ? -1 : 0;
}

static PyObject *outcome(struct run *run, PyObject *nanoseconds)
{
	const struct program *program = run->program;
	PyObject *outputs = PyTuple_New(run->error ? 0 : program->output_count);

	if (!outputs)
		return NULL;
	for (int i = 0; !run->error && i < program->output_count; i++) {
		int slot = program->outputs[i];
		PyObject *fd = PyLong_FromLong(run->slots[slot]);
		if (!fd) {
			Py_DECREF(outputs);
			return NULL;
		}
		run->slots[slot] = -1;
		PyTuple_SetItem(outputs, i, fd);
	}
	return Py_BuildValue("(IIIiNNN)", run->done, run->counted, run->failed_at, run->error,
			     PyUnicode_DecodeFSDefault(run->message), outputs, nanoseconds);
}

/* Closing a detached mount waits for a grace period: not under the interpreter's lock. */
static void close_slots(struct run *run)
{
	for (int i = run->program->lent; i < run->program->slots; i++)
		if (run->slots[i] >= 0)
			close(run->slots[i]);
}

/* After a good run its outputs stay open: they are in the outcome by the time the others are closed. */
static void close_all_but_outputs(struct run *run)
{
	const struct program *program = run->program;
	int kept[MOST_SLOTS];

	for (int i = 0; !run->error && i < program->output_count; i++) {
		kept[i] = run->slots[program->outputs[i]];
		run->slots[program->outputs[i]] = -1;
	}
	close_slots(run);
	for (int i = program->lent; i < program->slots; i++)
		run->slots[i] = -1;
	for (int i = 0; !run->error && i < program->output_count; i++)
		run->slots[program->outputs[i]] = kept[i];
}

/* The buffer for nanoseconds belongs to the bytes object that is returned. */
static PyObject *timed_by(struct run *run)
{
	PyObject *nanoseconds = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(run->program->count * sizeof(uint32_t)));

	if (nanoseconds) {
		run->nanoseconds = (uint32_t *)PyBytes_AsString(nanoseconds);
		memset(run->nanoseconds, 0, run->program->count * sizeof(uint32_t));
	}
	return nanoseconds;
}

static PyObject *program_run(PyObject *self, PyObject *arguments)
{
	struct run run = {.program = (const struct program *)self};
	PyObject *lent, *parameters, *ids, *nanoseconds, *result = NULL;
	char arena[ARENA_BYTES];

	if (!PyArg_ParseTuple(arguments, "O!O!O!:run", &PyTuple_Type, &lent, &PyTuple_Type, &parameters, &PyTuple_Type,
			      &ids) ||
	    take_arguments(&run, lent, parameters, ids) < 0 || !(nanoseconds = timed_by(&run)))
		return NULL;
	run.arena = arena;

	int error;
	Py_BEGIN_ALLOW_THREADS
	error = start_run(&run);
	close_all_but_outputs(&run);
	Py_END_ALLOW_THREADS

	if (error) {
		errno = error;
		PyErr_SetFromErrno(PyExc_OSError);
		Py_DECREF(nanoseconds);
	} else {
		result = outcome(&run, nanoseconds);
	}
	return result;
}

struct crew {
	struct run *runs;
	Py_ssize_t count, next;
	const char *failed; /* the call that a thread could not go on without, and its error */
	int error;
};

static void tell_failure(struct crew *crew, const char *call, int error)
{
	__atomic_store_n(&crew->error, error, __ATOMIC_RELAXED);
	__atomic_store_n(&crew->failed, call, __ATOMIC_RELAXED);
}

/* One of several threads that take one run after the other. */
static void *run_many_on_own_thread(void *argument)
{
	struct crew *crew = argument;
	const struct program *program = crew->runs[0].program;
	char arena[ARENA_BYTES];
	int home = -1;

	if (unshare(CLONE_FS) < 0) {
		tell_failure(crew, "unshare", errno);
		return NULL;
	}
	if (program->own_ns && (home = open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC)) < 0) {
		tell_failure(crew, "open", errno);
		return NULL;
	}
	for (;;) {
		Py_ssize_t i = __atomic_fetch_add(&crew->next, 1, __ATOMIC_RELAXED);
		if (i >= crew->count)
			break;
		struct run *run = &crew->runs[i];
		run->arena = arena;
		run_all(run);
		close_all_but_outputs(run);
		/* A run that failed half-way may have left this thread in the helper namespace. */
		if (run->error && home >= 0 && setns(home, CLONE_NEWNS) < 0) {
			tell_failure(crew, "setns", errno);
			break;
		}
	}
	if (home >= 0)
		close(home);
	return NULL;
}

/*
 * Returns an errno where nothing ran at all. Otherwise each run has its outcome; those for which no thread was left
 * have failed before their first operation.
 */
static int run_crew(struct crew *crew, int threads)
{
	pthread_t *workers = calloc((size_t)threads, sizeof(*workers));
	int started = 0, error = workers ? 0 : ENOMEM;

	while (!error && started < threads)
		if (!(error = pthread_create(&workers[started], NULL, run_many_on_own_thread, crew)))
			started++;
	for (int i = 0; i < started; i++)
		pthread_join(workers[i], NULL);
	free(workers);
	if (!crew->next)
		return crew->error ? crew->error : error;
	/* Fewer threads than asked for do the work all the same. */
	for (Py_ssize_t i = crew->next; i < crew->count; i++)
		fail_outside(&crew->runs[i], crew->failed, crew->error);
	return 0;
}

static int take_jobs(struct crew *crew, const struct program *program, PyObject *jobs, PyObject *times)
{
	for (Py_ssize_t i = 0; i < crew->count; i++) {
		PyObject *lent, *parameters, *ids, *nanoseconds;
		struct run *run = &crew->runs[i];

		run->program = program;
		if (!PyArg_ParseTuple(PyList_GetItem(jobs, i), "O!O!O!", &PyTuple_Type, &lent, &PyTuple_Type, &parameters,
				      &PyTuple_Type, &ids) ||
		    take_arguments(run, lent, parameters, ids) < 0 || !(nanoseconds = timed_by(run)))
			return -1;
		PyList_SetItem(times, i, nanoseconds);
	}
	return 0;
}

static PyObject *program_run_many(PyObject *self, PyObject *arguments)
{
	PyObject *jobs, *results = NULL;
	struct crew crew = {0};
	int threads;

	if (!PyArg_ParseTuple(arguments, "O!i:run_many", &PyList_Type, &jobs, &threads))
		return NULL;
	crew.count = PyList_Size(jobs);
	if (threads < 1 || threads > 4096) {
		PyErr_SetString(PyExc_ValueError, "from 1 to 4096 threads");
		return NULL;
	}
	if (!crew.count)
		return PyList_New(0);
	crew.runs = PyMem_Calloc((size_t)crew.count, sizeof(*crew.runs));
	PyObject *times = PyList_New(crew.count);
	if (!crew.runs || !times) {
		PyErr_NoMemory();
		goto out;
	}
	if (take_jobs(&crew, (const struct program *)self, jobs, times) < 0)
		goto out;

	int error;
	Py_BEGIN_ALLOW_THREADS
	error = run_crew(&crew, threads < crew.count ? threads : (int)crew.count);
	Py_END_ALLOW_THREADS
	if (error) {
		errno = error;
		PyErr_SetFromErrno(PyExc_OSError);
		goto out;
	}

	results = PyList_New(crew.count);
	for (Py_ssize_t i = 0; results && i < crew.count; i++) {
		PyObject *one = outcome(&crew.runs[i], Py_NewRef(PyList_GetItem(times, i)));
		if (!one) {
			Py_DECREF(results);
			results = NULL;
			break;
		}
		PyList_SetItem(results, i, one);
	}
out:
	Py_XDECREF(times);
	PyMem_Free(crew.runs);
	return results;
}

struct fm_run {
	struct run run;
	uint32_t nanoseconds[]; /* one for each operation, then the arena */
};

struct fm_run *fm_run_prepare(PyObject *self, PyObject *arguments)
{
	const struct program *program = (const struct program *)self;
	PyObject *lent, *parameters, *ids;

	if (!PyArg_ParseTuple(arguments, "O!O!O!:burst", &PyTuple_Type, &lent, &PyTuple_Type, &parameters, &PyTuple_Type,
			      &ids))
		return NULL;
	size_t timing = program->count * sizeof(uint32_t);
	struct fm_run *prepared = PyMem_Calloc(1, sizeof(*prepared) + timing + ARENA_BYTES);
	if (!prepared) {
		PyErr_NoMemory();
		return NULL;
	}
	prepared->run.program = program;
	prepared->run.nanoseconds = prepared->nanoseconds;
	prepared->run.arena = (char *)prepared->nanoseconds + timing;
	if (take_arguments(&prepared->run, lent, parameters, ids) < 0) {
		PyMem_Free(prepared);
		return NULL;
	}
	return prepared;
}

void fm_run_perform(struct fm_run *prepared)
{
	struct run *run = &prepared->run;

	run_all(run);
	close_slots(run);
}

PyObject *fm_run_result(const struct fm_run *prepared)
{
	const struct run *run = &prepared->run;

	return Py_BuildValue("(IIIiN)", run->done, run->counted, run->failed_at, run->error,
			     PyUnicode_DecodeFSDefault(run->message));
}

void fm_run_free(struct fm_run *prepared)
{
	PyMem_Free(prepared);
}

/* A string is good when it starts inside the table and names only parameters that will be there. */
static int good_string(const struct program *program, uint32_t offset)
{
	if (offset == NO_STRING)
		return 1;
	if (offset >= program->strings_bytes)
		return 0;
	for (const char *at = program->strings + offset; *at; at++)
		if (*at == PARAMETER && (*++at < '0' || *at >= '0' + program->parameters))
			return 0;
	return 1;
}

static int good_slot(const struct program *program, int16_t slot, int needed)
{
	return slot < 0 ? !needed : slot < program->slots;
}

static const struct needs { uint8_t strings, out, a, b; } needs[CODES] = {
	[MKDIR] = {1}, [RMDIR] = {1}, [CHOWN] = {1}, [UTIMES] = {1}, [READ_FILE] = {2},
	[OPEN] = {1, 1}, [OPEN_TREE] = {1, 1}, [MOUNT_SETATTR] = {0, 0, 1}, [MOVE_MOUNT] = {1, 0, 1},
	[FSOPEN] = {1, 1}, [FSCONFIG_FLAG] = {1, 0, 1}, [FSCONFIG_STRING] = {2, 0, 1}, [FSCONFIG_FD] = {1, 0, 1, 1},
	[FSCONFIG_CREATE] = {0, 0, 1}, [FSMOUNT] = {0, 1, 1}, [MOUNT] = {2}, [UMOUNT] = {1}, [FCHDIR] = {0, 0, 1},
	[CHDIR] = {1}, [SETNS] = {0, 0, 1}, [ASSUME_IDS] = {0}, [CLOSE] = {0, 0, 1},
};

static int check(struct program *program)
{
	for (uint32_t i = 0; i < program->count; i++) {
		const struct record *r = &program->records[i];
		if (r->code >= CODES)
			goto bad;
		const struct needs *n = &needs[r->code];
		if (!good_slot(program, r->out, n->out) || !good_slot(program, r->a, n->a) ||
		    !good_slot(program, r->b, n->b) || !good_string(program, r->s1) || !good_string(program, r->s2) ||
		    !good_string(program, r->s3) || (r->code == MOUNT && !good_string(program, r->x)) || (n->strings > 0 && r->s1 == NO_STRING) ||
		    (n->strings > 1 && r->s2 == NO_STRING) || (r->out >= 0 && r->out < program->lent) ||
		    (r->code == CLOSE && r->a < program->lent))
			goto bad;
		program->own_fs |= r->code == FCHDIR || r->code == CHDIR || r->code == ASSUME_IDS;
		program->own_ns |= r->code == SETNS;
		continue;
bad:
		PyErr_Format(PyExc_ValueError, "operation %u of the plan is not well-formed", i);
		return -1;
	}
	return 0;
}

static PyObject *program_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
	const char *records, *strings;
	Py_ssize_t records_bytes, strings_bytes;
	int slots, lent, parameters, flags;
	PyObject *outputs;

	if (!PyArg_ParseTuple(arguments, "y#y#iiiiO!:Program", &records, &records_bytes, &strings, &strings_bytes, &slots,
			      &lent, &parameters, &flags, &PyTuple_Type, &outputs))
		return NULL;
	if (records_bytes % (Py_ssize_t)sizeof(struct record) || records_bytes > (1 << 24) || strings_bytes < 1 ||
	    strings_bytes > (1 << 24) || strings[strings_bytes - 1] || slots < 0 || slots > MOST_SLOTS || lent < 0 ||
	    lent > slots || parameters < 0 || parameters > MOST_PARAMETERS || PyTuple_Size(outputs) > MOST_SLOTS) {
		PyErr_SetString(PyExc_ValueError, "the plan is not well-formed");
		return NULL;
	}

	allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
	struct program *program = (struct program *)allocate(type, 0);
	if (!program)
		return NULL;
	program->records = PyMem_Malloc((size_t)records_bytes + 1);
	program->strings = PyMem_Malloc((size_t)strings_bytes);
	if (!program->records || !program->strings) {
		Py_DECREF((PyObject *)program);
		return PyErr_NoMemory();
	}
	memcpy(program->records, records, (size_t)records_bytes);
	memcpy(program->strings, strings, (size_t)strings_bytes);
	program->count = (uint32_t)(records_bytes / (Py_ssize_t)sizeof(struct record));
	program->strings_bytes = (uint32_t)strings_bytes;
	program->slots = slots;
	program->lent = lent;
	program->parameters = parameters;
	program->flags = flags;
	program->output_count = (int)PyTuple_Size(outputs);
	for (int i = 0; i < program->output_count; i++) {
		program->outputs[i] = (int)as_number(outputs, i);
		if (!PyErr_Occurred() && (program->outputs[i] < lent || program->outputs[i] >= slots))
			PyErr_SetString(PyExc_ValueError, "an output of the plan is not a slot of its own");
	}
	if (PyErr_Occurred() || check(program) < 0) {
		Py_DECREF((PyObject *)program);
		return NULL;
	}
	return (PyObject *)program;
}

static void program_dealloc(PyObject *self)
{
	struct program *program = (struct program *)self;
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	PyMem_Free(program->records);
	PyMem_Free(program->strings);
	release(self);
	Py_DECREF(type);
}

static PyMethodDef program_methods[] = {
	{"run", program_run, METH_VARARGS, "run(lent, parameters, ids) -> outcome"},
	{"run_many", program_run_many, METH_VARARGS, "run_many([(lent, parameters, ids)], threads) -> [outcome]"},
	{"burst", fm_program_burst, METH_VARARGS, "burst(runs, crew, copies, template) -> (nanoseconds, ended, results)"},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot program_slots[] = {
	{Py_tp_new, program_new},
	{Py_tp_dealloc, program_dealloc},
	{Py_tp_methods, program_methods},
	{Py_tp_doc, "A checked plan, ready to run any number of times, on any number of threads at once."},
	{0, NULL},
};

PyType_Spec fm_program_spec = {
	.name = "flatmount.kernel._native.Program",
	.basicsize = sizeof(struct program),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = program_slots,
};

static PyObject *adopt_thread(PyObject *module, PyObject *unused)
{
	if (!thread_is_ours && unshare(CLONE_FS) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	thread_is_ours = 1;
	Py_RETURN_NONE;
}

PyMethodDef fm_program_methods[] = {
	{"adopt_thread", adopt_thread, METH_NOARGS, "Give this thread a working directory of its own, for good."},
	{NULL, NULL, 0, NULL},
};
