/*
 * The lock benchmark: pinned threads on one lock for a fixed time, and one cache line sent to and fro between two
 * processors. All waiting and counting is here, all judging in Python (flatmount.cpu.bench).
 *
 *   kind       how one waits
 *   TAS        exchanges until the lock was free
 *   TTAS       reads until it looks free, pausing, and exchanges then
 *   TICKET     takes a number and reads until it is served
 *   MCS        queues a node of its own and spins on that
 *   MUTEX      as pthread_mutex_t does
 *   RWLOCK     on a futex; one section in eight writes, the others read
 *   SEQLOCK    the first thread writes, the others read and try again: a path walk beside a mount
 *
 * A section that excludes others counts itself and marks its owner, on a line that the lock guards.
 * Sections are counted only between the end of the pre-heating and the end of the run. Where `sample` is not 0, every
 * sample-th section is timed from asking for the lock to having left it; a run that samples is not one for throughput.
 */
#include "common.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum kind { TAS, TTAS, TICKET, MCS, MUTEX, RWLOCK, SEQLOCK, KINDS };
enum phase { PREHEAT = 1, COUNT, STOP };

#define LINE 128 /* two lines: the neighbour is fetched along with the one asked for */
#define MOST_CPUS 1024
#define MOST_SAMPLES 8192
#define STACK_BYTES (256 * 1024)
#define READS_FOR_A_WRITE 8
#define WRITER 0x80000000u
#define WRITER_RESTS 20 /* pauses between two writes of the seqlock's writer */

struct node {
	struct node *next;
	int locked;
} __attribute__((aligned(LINE)));

struct locks {
	uint32_t tas __attribute__((aligned(LINE)));
	uint32_t ticket __attribute__((aligned(LINE)));
	uint32_t serving __attribute__((aligned(LINE)));
	struct node *tail __attribute__((aligned(LINE)));
	pthread_mutex_t mutex __attribute__((aligned(LINE)));
	struct {
		uint32_t word; /* WRITER, or how many read */
		uint32_t waiting;
	} rw __attribute__((aligned(LINE)));
	uint32_t sequence __attribute__((aligned(LINE)));
	struct {
		uint64_t sections;
		int owner;
	} guarded __attribute__((aligned(LINE)));
	int phase __attribute__((aligned(LINE)));
	unsigned int ready;
};

struct worker {
	struct node node;
	pthread_t thread;
	struct locks *locks;
	enum kind kind;
	int cpu, place, error, moved;
	unsigned int sample;
	uint64_t sections, hand_offs, retries, elapsed_ns;
	uint64_t excluding; /* sections from the first to the last, counted or not */
	uint32_t *samples;
	unsigned int sampled;
} __attribute__((aligned(LINE)));

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("isb" ::: "memory");
#else
	__asm__ volatile("" ::: "memory");
#endif
}

static int pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return sched_setaffinity(0, sizeof(set), &set) < 0 ? errno : 0;
}

static long futex(uint32_t *word, int operation, uint32_t value)
{
	return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static void mcs_lock(struct locks *locks, struct node *mine)
{
	mine->next = NULL;
	mine->locked = 1;
	struct node *before = __atomic_exchange_n(&locks->tail, mine, __ATOMIC_ACQ_REL);
	if (!before)
		return;
	__atomic_store_n(&before->next, mine, __ATOMIC_RELEASE);
	while (__atomic_load_n(&mine->locked, __ATOMIC_ACQUIRE))
		relax();
}

static void mcs_unlock(struct locks *locks, struct node *mine)
{
	struct node *next = __atomic_load_n(&mine->next, __ATOMIC_ACQUIRE), *expected = mine;

	if (!next) {
		if (__atomic_compare_exchange_n(&locks->tail, &expected, NULL, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return;
		while (!(next = __atomic_load_n(&mine->next, __ATOMIC_ACQUIRE)))
			relax();
	}
	__atomic_store_n(&next->locked, 0, __ATOMIC_RELEASE);
}

static void wait_for_rw(struct locks *l, uint32_t seen)
{
	__atomic_add_fetch(&l->rw.waiting, 1, __ATOMIC_SEQ_CST);
	futex(&l->rw.word, FUTEX_WAIT, seen);
	__atomic_sub_fetch(&l->rw.waiting, 1, __ATOMIC_SEQ_CST);
}

static void read_lock(struct locks *l)
{
	for (;;) {
		uint32_t seen = __atomic_load_n(&l->rw.word, __ATOMIC_RELAXED);
		if (seen & WRITER)
			wait_for_rw(l, seen);
		else if (__atomic_compare_exchange_n(&l->rw.word, &seen, seen + 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
			return;
	}
}

static void read_unlock(struct locks *l)
{
	if (__atomic_sub_fetch(&l->rw.word, 1, __ATOMIC_SEQ_CST) == 0 &&
	    __atomic_load_n(&l->rw.waiting, __ATOMIC_SEQ_CST))
		futex(&l->rw.word, FUTEX_WAKE, 1);
}

static void write_lock(struct locks *l)
{
	uint32_t seen = 0;

	while (!__atomic_compare_exchange_n(&l->rw.word, &seen, WRITER, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
		wait_for_rw(l, seen);
		seen = 0;
	}
}

static void write_unlock(struct locks *l)
{
	__atomic_store_n(&l->rw.word, 0, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&l->rw.waiting, __ATOMIC_SEQ_CST))
		futex(&l->rw.word, FUTEX_WAKE, INT32_MAX);
}

static void lock(struct worker *w)
{
	struct locks *l = w->locks;

	switch (w->kind) {
	case TAS:
		while (__atomic_exchange_n(&l->tas, 1, __ATOMIC_ACQUIRE))
			;
		break;
	case TTAS:
		while (__atomic_exchange_n(&l->tas, 1, __ATOMIC_ACQUIRE))
			while (__atomic_load_n(&l->tas, __ATOMIC_RELAXED))
				relax();
		break;
	case TICKET: {
		uint32_t mine = __atomic_fetch_add(&l->ticket, 1, __ATOMIC_RELAXED);
		while (__atomic_load_n(&l->serving, __ATOMIC_ACQUIRE) != mine)
			relax();
		break;
	}
	case MCS:
		mcs_lock(l, &w->node);
		break;
	case MUTEX:
		pthread_mutex_lock(&l->mutex);
		break;
	default:
		write_lock(l);
	}
}

static void unlock(struct worker *w)
{
	struct locks *l = w->locks;

	switch (w->kind) {
	case TAS:
	case TTAS:
		__atomic_store_n(&l->tas, 0, __ATOMIC_RELEASE);
		break;
	case TICKET:
		__atomic_store_n(&l->serving, l->serving + 1, __ATOMIC_RELEASE);
		break;
	case MCS:
		mcs_unlock(l, &w->node);
		break;
	case MUTEX:
		pthread_mutex_unlock(&l->mutex);
		break;
	default:
		write_unlock(l);
	}
}

/* One section that has the lock to itself; tells whether the one before was another processor's. */
static int exclusive_section(struct worker *w)
{
	struct locks *l = w->locks;

	lock(w);
	int handed_off = l->guarded.owner != w->place;
	l->guarded.owner = w->place;
	l->guarded.sections++;
	w->excluding++;
	unlock(w);
	return handed_off;
}

static void shared_section(struct worker *w)
{
	struct locks *l = w->locks;

	read_lock(l);
	(void)__atomic_load_n(&l->guarded.sections, __ATOMIC_RELAXED);
	read_unlock(l);
}

static void sequence_write(struct worker *w)
{
	struct locks *l = w->locks;

	__atomic_store_n(&l->sequence, l->sequence + 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	l->guarded.sections++;
	w->excluding++;
	__atomic_store_n(&l->sequence, l->sequence + 1, __ATOMIC_RELEASE);
	for (int i = 0; i < WRITER_RESTS; i++)
		relax();
}

/* Returns how often it had to try again. It gives up when the run is over: the writer may have left half-way. */
static unsigned int sequence_read(struct worker *w)
{
	struct locks *l = w->locks;

	for (unsigned int retries = 0;; retries++) {
		uint32_t before = __atomic_load_n(&l->sequence, __ATOMIC_ACQUIRE);
		(void)__atomic_load_n(&l->guarded.sections, __ATOMIC_RELAXED);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (!(before & 1) && __atomic_load_n(&l->sequence, __ATOMIC_RELAXED) == before)
			return retries;
		if (__atomic_load_n(&l->phase, __ATOMIC_RELAXED) == STOP)
			return retries;
		relax();
	}
}

static void one_section(struct worker *w, uint64_t turn)
{
	if (w->kind == SEQLOCK && w->place == 0)
		sequence_write(w);
	else if (w->kind == SEQLOCK)
		w->retries += sequence_read(w);
	else if (w->kind == RWLOCK && turn % READS_FOR_A_WRITE)
		shared_section(w);
	else
		w->hand_offs += exclusive_section(w);
}

static void *contend(void *argument)
{
	struct worker *w = argument;
	struct locks *l = w->locks;
	uint64_t turn = 0, started = 0;
	int counting = 0, phase;

	w->error = pin(w->cpu);
	__atomic_add_fetch(&l->ready, 1, __ATOMIC_RELEASE);
	while (!(phase = __atomic_load_n(&l->phase, __ATOMIC_ACQUIRE)))
		sched_yield();
	for (; !w->error && phase != STOP; phase = __atomic_load_n(&l->phase, __ATOMIC_RELAXED)) {
		if (phase == COUNT && !counting) {
			counting = 1;
			w->sections = w->hand_offs = w->retries = 0;
			started = now_ns();
		}
		turn++;
		if (counting && w->sample && turn % w->sample == 0 && w->sampled < MOST_SAMPLES) {
			uint64_t before = now_ns();
			one_section(w, turn);
			uint64_t took = now_ns() - before;
			w->samples[w->sampled++] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
		} else {
			one_section(w, turn);
		}
		w->sections++;
	}
	if (counting)
		w->elapsed_ns = now_ns() - started;
	else
		w->sections = 0;
	w->moved = !w->error && sched_getcpu() != w->cpu;
	return NULL;
}

static void sleep_ns(uint64_t ns)
{
	struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

	while (nanosleep(&t, &t) < 0 && errno == EINTR)
		;
}

static int contend_all(struct locks *locks, struct worker *workers, int count, uint64_t preheat_ns, uint64_t run_ns)
{
	pthread_attr_t attributes;
	int made = 0, error = 0;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	for (; made < count && !error; made += !error)
		error = pthread_create(&workers[made].thread, &attributes, contend, &workers[made]);
	pthread_attr_destroy(&attributes);
	while (__atomic_load_n(&locks->ready, __ATOMIC_ACQUIRE) < (unsigned int)made)
		sleep_ns(100000);
	if (!error) {
		__atomic_store_n(&locks->phase, PREHEAT, __ATOMIC_RELEASE);
		sleep_ns(preheat_ns);
		__atomic_store_n(&locks->phase, COUNT, __ATOMIC_RELEASE);
		sleep_ns(run_ns);
	}
	__atomic_store_n(&locks->phase, STOP, __ATOMIC_RELEASE);
	for (int i = 0; i < made; i++)
		pthread_join(workers[i].thread, NULL);
	for (int i = 0; i < made && !error; i++)
		error = workers[i].error;
	return error;
}

static PyObject *worker_result(const struct worker *w)
{
	return Py_BuildValue("(KKKKiy#)", (unsigned long long)w->sections, (unsigned long long)w->hand_offs,
			     (unsigned long long)w->retries, (unsigned long long)w->elapsed_ns, w->moved,
			     (const char *)w->samples, (Py_ssize_t)(w->sampled * sizeof(uint32_t)));
}

/* The threads' results, and how many exclusive sections are missing from the guarded count: none, if the lock excludes. */
static PyObject *all_results(const struct worker *workers, int count)
{
	PyObject *results = PyTuple_New(count);
	uint64_t excluding = 0;

	for (int i = 0; results && i < count; i++) {
		PyObject *one = worker_result(&workers[i]);
		if (!one) {
			Py_DECREF(results);
			return NULL;
		}
		PyTuple_SetItem(results, i, one);
		excluding += workers[i].excluding;
	}
	return Py_BuildValue("(NK)", results, (unsigned long long)(excluding - workers[0].locks->guarded.sections));
}

static int read_cpus(PyObject *tuple, int *cpus)
{
	Py_ssize_t count = PyTuple_Size(tuple);

	if (count < 1 || count > MOST_CPUS) {
		PyErr_Format(PyExc_ValueError, "1 to %d processors", MOST_CPUS);
		return -1;
	}
	for (Py_ssize_t i = 0; i < count; i++) {
		cpus[i] = (int)PyLong_AsLong(PyTuple_GetItem(tuple, i));
		if (!PyErr_Occurred() && (cpus[i] < 0 || cpus[i] >= CPU_SETSIZE))
			PyErr_Format(PyExc_ValueError, "there is no processor %d", cpus[i]);
		if (PyErr_Occurred())
			return -1;
	}
	return (int)count;
}

static PyObject *contend_for_lock(PyObject *module, PyObject *arguments)
{
	int cpus[MOST_CPUS], kind, error;
	unsigned long long preheat_ns, run_ns;
	unsigned int sample;
	PyObject *tuple, *result = NULL;

	if (!PyArg_ParseTuple(arguments, "iO!KKI:contend_for_lock", &kind, &PyTuple_Type, &tuple, &preheat_ns, &run_ns,
			      &sample))
		return NULL;
	int count = read_cpus(tuple, cpus);
	if (count < 0)
		return NULL;
	if (kind < 0 || kind >= KINDS) {
		PyErr_SetString(PyExc_ValueError, "there is no lock of that kind");
		return NULL;
	}

	size_t bytes = sizeof(struct locks) + (size_t)count * (sizeof(struct worker) + MOST_SAMPLES * sizeof(uint32_t));
	char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return PyErr_SetFromErrno(PyExc_OSError);
	struct locks *locks = (struct locks *)memory;
	struct worker *workers = (struct worker *)(locks + 1);
	uint32_t *samples = (uint32_t *)(workers + count);
	pthread_mutex_init(&locks->mutex, NULL);
	locks->guarded.owner = -1;
	for (int i = 0; i < count; i++) {
		workers[i].locks = locks;
		workers[i].kind = (enum kind)kind;
		workers[i].cpu = cpus[i];
		workers[i].place = i;
		workers[i].sample = sample;
		workers[i].samples = samples + (size_t)i * MOST_SAMPLES;
	}

	Py_BEGIN_ALLOW_THREADS
	error = contend_all(locks, workers, count, preheat_ns, run_ns);
	Py_END_ALLOW_THREADS

	if (error) {
		errno = error;
		PyErr_SetFromErrno(PyExc_OSError);
	} else {
		result = all_results(workers, count);
	}
	pthread_mutex_destroy(&locks->mutex);
	munmap(memory, bytes);
	return result;
}

struct rally {
	uint32_t *ball;
	int cpu, error, moved;
	uint32_t first, rounds, batches;
	uint64_t deadline_ns;
	int *over;
	uint64_t *marks; /* of the player that serves: the clock at the end of each batch */
};

/* Waits for an odd or even number and sends the next; gives up at the deadline, so that no partner is waited for for ever. */
static void *play(void *argument)
{
	struct rally *r = argument;
	uint64_t total = (uint64_t)r->rounds * r->batches;

	r->error = pin(r->cpu);
	if (r->error)
		__atomic_store_n(r->over, 1, __ATOMIC_RELEASE);
	if (r->marks)
		r->marks[0] = now_ns();
	for (uint64_t i = 0; i < total; i++) {
		uint32_t awaited = (uint32_t)(2 * i) + r->first;
		for (unsigned int spins = 1; __atomic_load_n(r->ball, __ATOMIC_ACQUIRE) != awaited; spins++) {
			if ((spins & 0xffff) == 0 &&
			    (__atomic_load_n(r->over, __ATOMIC_ACQUIRE) || now_ns() > r->deadline_ns)) {
				__atomic_store_n(r->over, 1, __ATOMIC_RELEASE);
				return NULL;
			}
		}
		__atomic_store_n(r->ball, awaited + 1, __ATOMIC_RELEASE);
		if (r->marks && (i + 1) % r->rounds == 0)
			r->marks[(i + 1) / r->rounds] = now_ns();
	}
	r->moved = sched_getcpu() != r->cpu;
	return NULL;
}

static void *touch(void *argument)
{
	struct rally *r = argument;

	r->error = pin(r->cpu);
	if (!r->error)
		memset(r->ball, 0, (size_t)sysconf(_SC_PAGESIZE));
	return NULL;
}

/* The NUMA node a page lives on; -1 where the kernel does not tell. */
static int node_of(void *page)
{
	int status = -1;

	return syscall(SYS_move_pages, 0, 1UL, &page, NULL, &status, 0) < 0 || status < 0 ? -1 : status;
}

static int rally(struct rally *players, void *page, int home)
{
	struct rally toucher = {.ball = page, .cpu = home};
	pthread_t threads[2];
	int error = pthread_create(&threads[0], NULL, touch, &toucher);

	if (error)
		return error;
	pthread_join(threads[0], NULL);
	if (toucher.error)
		return toucher.error;
	error = pthread_create(&threads[0], NULL, play, &players[0]);
	if (error)
		return error;
	error = pthread_create(&threads[1], NULL, play, &players[1]);
	if (error)
		__atomic_store_n(players[0].over, 1, __ATOMIC_RELEASE);
	pthread_join(threads[0], NULL);
	if (!error)
		pthread_join(threads[1], NULL);
	return error ? error : players[0].error ? players[0].error : players[1].error;
}

static PyObject *ping_pong(PyObject *module, PyObject *arguments)
{
	int a, b, home, error, over = 0, node = -1;
	unsigned int batches, rounds;
	unsigned long long limit_ns;

	if (!PyArg_ParseTuple(arguments, "iiiIIK:ping_pong", &a, &b, &home, &batches, &rounds, &limit_ns))
		return NULL;
	if (a < 0 || b < 0 || home < 0 || a >= CPU_SETSIZE || b >= CPU_SETSIZE || home >= CPU_SETSIZE || a == b ||
	    batches < 1 || batches > 100000 || rounds < 1 || rounds > 10000000 / batches) {
		PyErr_SetString(PyExc_ValueError, "two processors, and at most ten million rounds");
		return NULL;
	}
	uint64_t *marks = PyMem_Calloc(batches + 1, sizeof(*marks));
	if (!marks)
		return PyErr_NoMemory();
	size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
	void *page = mmap(NULL, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED) {
		PyMem_Free(marks);
		return PyErr_SetFromErrno(PyExc_OSError);
	}

	struct rally players[2] = {
		{.ball = page, .cpu = a, .first = 0, .rounds = rounds, .batches = batches, .over = &over, .marks = marks},
		{.ball = page, .cpu = b, .first = 1, .rounds = rounds, .batches = batches, .over = &over},
	};
	Py_BEGIN_ALLOW_THREADS
	players[0].deadline_ns = players[1].deadline_ns = now_ns() + limit_ns;
	error = rally(players, page, home);
	if (!error)
		node = node_of(page);
	Py_END_ALLOW_THREADS

	PyObject *result = NULL, *list = PyList_New(0);
	for (unsigned int i = 1; list && !error && i <= batches && marks[i]; i++) {
		PyObject *ns = PyFloat_FromDouble((double)(marks[i] - marks[i - 1]) / (2.0 * rounds));
		if (!ns || PyList_Append(list, ns) < 0)
			Py_CLEAR(list);
		Py_XDECREF(ns);
	}
	if (error) {
		errno = error;
		PyErr_SetFromErrno(PyExc_OSError);
	} else if (list) {
		result = Py_BuildValue("(Oii)", list, node, players[0].moved || players[1].moved);
	}
	Py_XDECREF(list);
	munmap(page, page_bytes);
	PyMem_Free(marks);
	return result;
}

static PyObject *pause_ns(PyObject *module, PyObject *unused)
{
	enum { PAUSES = 20000 };
	uint64_t best = UINT64_MAX;

	Py_BEGIN_ALLOW_THREADS
	for (int attempt = 0; attempt < 5; attempt++) {
		uint64_t before = now_ns();
		for (int i = 0; i < PAUSES; i++)
			relax();
		uint64_t took = now_ns() - before;
		best = took < best ? took : best;
	}
	Py_END_ALLOW_THREADS
	return PyFloat_FromDouble((double)best / PAUSES);
}

PyMethodDef fm_locks_methods[] = {
	{"contend_for_lock", contend_for_lock, METH_VARARGS,
	 "contend_for_lock(kind, cpus, preheat_ns, run_ns, sample) -> (a result for each thread, sections lost)"},
	{"ping_pong", ping_pong, METH_VARARGS,
	 "ping_pong(cpu, other, home, batches, rounds, limit_ns) -> (one-way ns of each batch, node, moved)"},
	{"pause_ns", pause_ns, METH_NOARGS, "pause_ns() -> what one spin-wait hint takes, best of five"},
	{NULL, NULL, 0, NULL},
};
