#include "committer.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* The little of SQLite's interface that is used, which is stable since 3.5. */
enum { SQLITE_OK = 0, SQLITE_ROW = 100, SQLITE_DONE = 101 };
enum { OPEN_READWRITE = 2, OPEN_NOMUTEX = 0x8000 };

struct sqlite3;
struct sqlite3_stmt;

static struct {
	int (*open_v2)(const char *, struct sqlite3 **, int, const char *);
	int (*close)(struct sqlite3 *);
	int (*exec)(struct sqlite3 *, const char *, void *, void *, void *);
	int (*prepare_v2)(struct sqlite3 *, const char *, int, struct sqlite3_stmt **, const char **);
	int (*bind_text)(struct sqlite3_stmt *, int, const char *, int, void (*)(void *));
	int (*bind_null)(struct sqlite3_stmt *, int);
	int (*step)(struct sqlite3_stmt *);
	int (*reset)(struct sqlite3_stmt *);
	int (*finalize)(struct sqlite3_stmt *);
	const char *(*errmsg)(struct sqlite3 *);
} sqlite;

struct fm_committer {
	pthread_t thread;
	struct sqlite3 *book;
	struct sqlite3_stmt *statement;
	int data, ready;

	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t changed;
	struct fm_batch batch;
	bool has_batch, done, stopping, ended;
	char *why;
};

static bool load_sqlite(void)
{
	static const struct {
		const char *name;
		void **place;
	} wanted[] = {
		{"sqlite3_open_v2", (void **)&sqlite.open_v2},	   {"sqlite3_close", (void **)&sqlite.close},
		{"sqlite3_exec", (void **)&sqlite.exec},	   {"sqlite3_prepare_v2", (void **)&sqlite.prepare_v2},
		{"sqlite3_bind_text", (void **)&sqlite.bind_text}, {"sqlite3_bind_null", (void **)&sqlite.bind_null},
		{"sqlite3_step", (void **)&sqlite.step},	   {"sqlite3_reset", (void **)&sqlite.reset},
		{"sqlite3_finalize", (void **)&sqlite.finalize},   {"sqlite3_errmsg", (void **)&sqlite.errmsg},
	};
	/* Only if it is there: the handle is kept, so that it stays. */
	void *library = dlopen("libsqlite3.so.0", RTLD_NOW | RTLD_NOLOAD);

	if (!library)
		return false;
	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (!(*wanted[i].place = dlsym(library, wanted[i].name)))
			return false;
	return true;
}

void fm_batch_free(struct fm_batch *batch)
{
	free(batch->uppers);
	for (size_t i = 0; i < FM_PARAMETERS; i++)
		free(batch->parameters[i]);
	*batch = (struct fm_batch){0};
}

static char *written(const char *format, const char *what)
{
	char *text;

	return asprintf(&text, format, what) < 0 ? NULL : text;
}

/* Returns NULL, or why it was not done. */
static char *commit(struct fm_committer *committer, const struct fm_batch *batch)
{
	for (size_t i = 0; i < batch->count; i++) {
		int error = fm_make_upper(committer->data, &batch->uppers[i]);

		if (error)
			return written("make directories: %s", strerror(error));
	}
	for (int i = 0; i < FM_PARAMETERS; i++) {
		const char *text = batch->parameters[i];
		/* NULL as destructor: it stays until the statement is reset. */
		int failed = text ? sqlite.bind_text(committer->statement, i + 1, text, -1, NULL)
				  : sqlite.bind_null(committer->statement, i + 1);

		if (failed)
			return written("%s", sqlite.errmsg(committer->book));
	}
	int code = sqlite.step(committer->statement);
	char *why = code == SQLITE_DONE ? NULL : written("%s", sqlite.errmsg(committer->book));

	if (sqlite.reset(committer->statement) != SQLITE_OK && !why)
		why = written("%s", sqlite.errmsg(committer->book));
	return why;
}

static void *work(void *argument)
{
	struct fm_committer *committer = argument;

	pthread_mutex_lock(&committer->lock);
	for (;;) {
		while (!committer->has_batch && !committer->stopping)
			pthread_cond_wait(&committer->changed, &committer->lock);
		if (!committer->has_batch)
			break;
		pthread_mutex_unlock(&committer->lock);
		/* The batch is left alone by everybody else until it is done. */
		char *why = commit(committer, &committer->batch);

		fm_batch_free(&committer->batch);
		pthread_mutex_lock(&committer->lock);
		committer->has_batch = false;
		committer->done = true;
		committer->why = why;
		eventfd_write(committer->ready, 1);
	}
	committer->ended = true;
	pthread_cond_broadcast(&committer->changed);
	pthread_mutex_unlock(&committer->lock);
	return NULL;
}

static void let_go(struct fm_committer *committer)
{
	if (committer->statement)
		sqlite.finalize(committer->statement);
	if (committer->book)
		sqlite.close(committer->book);
	if (committer->ready >= 0)
		close(committer->ready);
	free(committer->why);
	pthread_cond_destroy(&committer->changed);
	pthread_mutex_destroy(&committer->lock);
	free(committer);
}

static char *open_book(struct fm_committer *committer, const char *path, char *const *setup, size_t count,
		       const char *statement)
{
	if (!load_sqlite())
		return written("%s", "the interpreter's SQLite is not a library of its own");
	if (sqlite.open_v2(path, &committer->book, OPEN_READWRITE | OPEN_NOMUTEX, NULL))
		return written("%s", committer->book ? sqlite.errmsg(committer->book) : "no memory");
	for (size_t i = 0; i < count; i++)
		if (sqlite.exec(committer->book, setup[i], NULL, NULL, NULL))
			return written("%s", sqlite.errmsg(committer->book));
	if (sqlite.prepare_v2(committer->book, statement, -1, &committer->statement, NULL))
		return written("%s", sqlite.errmsg(committer->book));
	committer->ready = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int error = committer->ready < 0 ? errno : pthread_create(&committer->thread, NULL, work, committer);

	return error ? written("%s", strerror(error)) : NULL;
}

struct fm_committer *fm_committer_start(const char *path, int data, char *const *setup, size_t count,
					const char *statement, char **why)
{
	struct fm_committer *committer = calloc(1, sizeof(*committer));
	pthread_condattr_t attributes;

	*why = NULL;
	if (!committer)
		return NULL;
	committer->data = data;
	committer->ready = -1;
	pthread_mutex_init(&committer->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&committer->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	*why = open_book(committer, path, setup, count, statement);
	if (!*why)
		return committer;
	let_go(committer);
	return NULL;
}

int fm_committer_ready(const struct fm_committer *committer)
{
	return committer->ready;
}

bool fm_committer_submit(struct fm_committer *committer, struct fm_batch batch)
{
	pthread_mutex_lock(&committer->lock);
	bool free_now = !committer->has_batch && !committer->done;

	if (free_now) {
		committer->batch = batch;
		committer->has_batch = true;
		pthread_cond_broadcast(&committer->changed);
	}
	pthread_mutex_unlock(&committer->lock);
	return free_now;
}

bool fm_committer_take(struct fm_committer *committer, char **why)
{
	eventfd_t ignored;

	eventfd_read(committer->ready, &ignored);
	pthread_mutex_lock(&committer->lock);
	bool done = committer->done;

	*why = committer->why;
	committer->why = NULL;
	committer->done = false;
	pthread_mutex_unlock(&committer->lock);
	return done;
}

bool fm_committer_stop(struct fm_committer *committer, int limit_ms)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += limit_ms / 1000;
	until.tv_nsec += limit_ms % 1000 * 1000000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000L;
	}
	pthread_mutex_lock(&committer->lock);
	committer->stopping = true;
	pthread_cond_broadcast(&committer->changed);
	while (!committer->ended &&
	       pthread_cond_timedwait(&committer->changed, &committer->lock, &until) != ETIMEDOUT)
		;
	bool ended = committer->ended;

	pthread_mutex_unlock(&committer->lock);
	if (!ended) {
		pthread_detach(committer->thread);
		return false;
	}
	pthread_join(committer->thread, NULL);
	let_go(committer);
	return true;
}
