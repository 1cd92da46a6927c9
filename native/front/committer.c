#include "committer.h"

#include "front.h"

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
	int (*bind_int64)(struct sqlite3_stmt *, int, long long);
	int (*bind_null)(struct sqlite3_stmt *, int);
	int (*step)(struct sqlite3_stmt *);
	int (*reset)(struct sqlite3_stmt *);
	int (*clear_bindings)(struct sqlite3_stmt *);
	int (*finalize)(struct sqlite3_stmt *);
	const char *(*errmsg)(struct sqlite3 *);
} sqlite;

struct fm_committer {
	pthread_t thread;
	struct sqlite3 *book;
	struct sqlite3_stmt *begin, *commit, *rollback, *statements[FM_MOST_STATEMENTS];
	size_t count;
	int data, ready;

	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t changed;
	struct fm_batch batch;
	bool has_batch, stopping, ended;
	long long *ahead; /* the numbers of what is to be made, from `ahead_next` to `ahead_end` */
	size_t ahead_next, ahead_end;
	struct fm_done done;
};

/* One thread at a time: the interpreter's lock sees to that. */
static bool load_sqlite(void)
{
	static const struct {
		const char *name;
		void **place;
	} wanted[] = {
		{"sqlite3_open_v2", (void **)&sqlite.open_v2},	   {"sqlite3_close", (void **)&sqlite.close},
		{"sqlite3_exec", (void **)&sqlite.exec},	   {"sqlite3_prepare_v2", (void **)&sqlite.prepare_v2},
		{"sqlite3_bind_text", (void **)&sqlite.bind_text}, {"sqlite3_bind_null", (void **)&sqlite.bind_null},
		{"sqlite3_bind_int64", (void **)&sqlite.bind_int64},
		{"sqlite3_step", (void **)&sqlite.step},	   {"sqlite3_reset", (void **)&sqlite.reset},
		{"sqlite3_clear_bindings", (void **)&sqlite.clear_bindings},
		{"sqlite3_finalize", (void **)&sqlite.finalize},   {"sqlite3_errmsg", (void **)&sqlite.errmsg},
	};
	static bool loaded;

	/* The thread of another committer may be reading them. */
	if (loaded)
		return true;
	/* Only if it is there: the handle is kept, so that it stays. */
	void *library = dlopen("libsqlite3.so.0", RTLD_NOW | RTLD_NOLOAD);

	if (!library)
		return false;
	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++)
		if (!(*wanted[i].place = dlsym(library, wanted[i].name)))
			return false;
	loaded = true;
	return true;
}

void fm_batch_free(struct fm_batch *batch)
{
	free(batch->uppers);
	for (size_t i = 0; i < FM_MOST_STATEMENTS; i++)
		free(batch->rows[i].values);
	free(batch->texts);
	*batch = (struct fm_batch){0};
}

static char *written(const char *format, const char *what)
{
	char *text;

	return asprintf(&text, format, what) < 0 ? NULL : text;
}

/* What SQLite says, or that it says nothing. */
static char *said(const struct fm_committer *committer)
{
	return written("%s", sqlite.errmsg(committer->book));
}

static int bind(struct sqlite3_stmt *statement, int place, const struct fm_value *value, const char *texts)
{
	switch (value->kind) {
	case FM_NUMBER:
		return sqlite.bind_int64(statement, place, value->number);
	case FM_TEXT:
		/* NULL as destructor: it stays until nothing is bound any more. */
		return sqlite.bind_text(statement, place, texts + value->at, value->bytes, NULL);
	case FM_NULL:
		break;
	}
	return sqlite.bind_null(statement, place);
}

/* Returns whether it was run to its end. */
static bool run(struct sqlite3_stmt *statement)
{
	int code;

	do
		code = sqlite.step(statement);
	while (code == SQLITE_ROW);
	return sqlite.reset(statement) == SQLITE_OK && code == SQLITE_DONE;
}

static bool write_rows(struct sqlite3_stmt *statement, const struct fm_rows *rows, const char *texts)
{
	const struct fm_value *value = rows->values;
	bool done = true;

	for (size_t row = 0; done && row < rows->rows; row++) {
		for (size_t i = 0; done && i < rows->columns; i++)
			done = bind(statement, (int)i + 1, value++, texts) == SQLITE_OK;
		done = done && run(statement);
	}
	/* A reset leaves bound what was, and the texts go with their batch. */
	if (rows->rows)
		sqlite.clear_bindings(statement);
	return done;
}

/* Returns whether it was done; `why` is left NULL where there is no memory to tell why not. */
static bool commit(struct fm_committer *committer, const struct fm_batch *batch, char **why)
{
	for (size_t i = 0; i < batch->count; i++) {
		int error = fm_make_upper(committer->data, &batch->uppers[i]);

		if (error) {
			*why = written("make directories: %s", strerror(error));
			return false;
		}
	}
	bool done = run(committer->begin);

	for (size_t i = 0; done && i < committer->count; i++)
		done = write_rows(committer->statements[i], &batch->rows[i], batch->texts);
	if (done && run(committer->commit))
		return true;
	*why = said(committer);
	/* Also where the BEGIN was refused: a transaction that stood open would shut everybody else out for good. Where
	 * there is none, or SQLite has rolled back by itself, this is refused and nothing is the matter. */
	run(committer->rollback);
	return false;
}

/* With the lock, which is let go meanwhile. */
static void make_ahead(struct fm_committer *committer)
{
	struct fm_upper upper = {.number = committer->ahead[committer->ahead_next], .work = true, .mode = 0755};

	pthread_mutex_unlock(&committer->lock);
	int error = fm_make_upper(committer->data, &upper);

	pthread_mutex_lock(&committer->lock);
	committer->ahead_next++;
	if (error) {
		committer->done.ahead_error = error;
		committer->ahead_next = committer->ahead_end;
	} else {
		committer->done.ahead++;
	}
	if (committer->ahead_next == committer->ahead_end)
		eventfd_write(committer->ready, 1);
}

/* With the lock, which is let go meanwhile. */
static void write_batch(struct fm_committer *committer)
{
	pthread_mutex_unlock(&committer->lock);
	/* The batch is left alone by everybody else until it is done. */
	char *why = NULL;
	bool done = commit(committer, &committer->batch, &why);

	fm_batch_free(&committer->batch);
	pthread_mutex_lock(&committer->lock);
	committer->has_batch = false;
	committer->done.batch = true;
	committer->done.failed = !done;
	committer->done.why = why;
	eventfd_write(committer->ready, 1);
}

static void *work(void *argument)
{
	struct fm_committer *committer = argument;

	pthread_mutex_lock(&committer->lock);
	for (;;) {
		if (committer->has_batch)
			write_batch(committer);
		else if (committer->stopping)
			break;
		else if (committer->ahead_next < committer->ahead_end)
			make_ahead(committer);
		else
			pthread_cond_wait(&committer->changed, &committer->lock);
	}
	committer->ended = true;
	pthread_cond_broadcast(&committer->changed);
	pthread_mutex_unlock(&committer->lock);
	return NULL;
}

static void let_go(struct fm_committer *committer)
{
	struct sqlite3_stmt *const ends[] = {committer->begin, committer->commit, committer->rollback};

	for (size_t i = 0; i < committer->count; i++)
		if (committer->statements[i])
			sqlite.finalize(committer->statements[i]);
	for (size_t i = 0; i < 3; i++)
		if (ends[i])
			sqlite.finalize(ends[i]);
	if (committer->book)
		sqlite.close(committer->book);
	if (committer->ready >= 0)
		close(committer->ready);
	free(committer->done.why);
	free(committer->ahead);
	pthread_cond_destroy(&committer->changed);
	pthread_mutex_destroy(&committer->lock);
	free(committer);
}

/* Returns whether it was done; `why` is left NULL where there is no memory to tell why not. */
static bool open_book(struct fm_committer *committer, const char *path, char *const *setup, size_t setup_count,
		      char *const *statements, char **why)
{
	if (!load_sqlite()) {
		*why = written("%s", "the interpreter's SQLite is not a library of its own");
		return false;
	}
	if (sqlite.open_v2(path, &committer->book, OPEN_READWRITE | OPEN_NOMUTEX, NULL)) {
		*why = committer->book ? said(committer) : NULL;
		return false;
	}
	bool done = true;

	for (size_t i = 0; done && i < setup_count; i++)
		done = !sqlite.exec(committer->book, setup[i], NULL, NULL, NULL);
	done = done && !sqlite.prepare_v2(committer->book, "BEGIN IMMEDIATE", -1, &committer->begin, NULL) &&
	       !sqlite.prepare_v2(committer->book, "COMMIT", -1, &committer->commit, NULL) &&
	       !sqlite.prepare_v2(committer->book, "ROLLBACK", -1, &committer->rollback, NULL);
	for (size_t i = 0; done && i < committer->count; i++)
		done = !sqlite.prepare_v2(committer->book, statements[i], -1, &committer->statements[i], NULL);
	if (!done) {
		*why = said(committer);
		return false;
	}
	committer->ready = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int error = committer->ready < 0 ? errno : fm_thread_start(&committer->thread, work, committer);

	if (error)
		*why = written("%s", strerror(error));
	return !error;
}

struct fm_committer *fm_committer_start(const char *path, int data, char *const *setup, size_t setup_count,
					char *const *statements, size_t count, char **why)
{
	struct fm_committer *committer = calloc(1, sizeof(*committer));
	pthread_condattr_t attributes;

	*why = NULL;
	if (!committer)
		return NULL;
	committer->count = count;
	committer->data = data;
	committer->ready = -1;
	pthread_mutex_init(&committer->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&committer->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	if (open_book(committer, path, setup, setup_count, statements, why))
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
	bool free_now = !committer->has_batch && !committer->done.batch;

	if (free_now) {
		committer->batch = batch;
		committer->has_batch = true;
		pthread_cond_broadcast(&committer->changed);
	}
	pthread_mutex_unlock(&committer->lock);
	return free_now;
}

bool fm_committer_ahead(struct fm_committer *committer, const long long *numbers, size_t count)
{
	pthread_mutex_lock(&committer->lock);
	size_t left = committer->ahead_end - committer->ahead_next;
	long long *all = malloc((left + count) * sizeof(*all));

	if (all) {
		if (left)
			memcpy(all, committer->ahead + committer->ahead_next, left * sizeof(*all));
		memcpy(all + left, numbers, count * sizeof(*all));
		free(committer->ahead);
		committer->ahead = all;
		committer->ahead_next = 0;
		committer->ahead_end = left + count;
		pthread_cond_broadcast(&committer->changed);
	}
	pthread_mutex_unlock(&committer->lock);
	return all;
}

struct fm_done fm_committer_take(struct fm_committer *committer)
{
	eventfd_t ignored;

	eventfd_read(committer->ready, &ignored);
	pthread_mutex_lock(&committer->lock);
	struct fm_done done = committer->done;

	committer->done = (struct fm_done){0};
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
