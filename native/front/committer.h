/*
 * A thread that writes what a burst of calls has decided: directories, then rows, as one transaction of the store's
 * book. It takes one batch at a time, and needs nothing of the interpreter meanwhile.
 *
 * SQLite is the one that the interpreter has loaded, and no second copy: two in a process would let go of each other's
 * locks on the file (POSIX locks belong to the process).
 */
#ifndef FLATMOUNT_COMMITTER_H
#define FLATMOUNT_COMMITTER_H

#include "upper.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FM_MOST_STATEMENTS 8

/* What a parameter of a statement is bound to; a text is at `at` of the batch's texts. */
struct fm_value {
	enum { FM_NULL, FM_NUMBER, FM_TEXT } kind;
	int bytes;
	union {
		int64_t number;
		size_t at;
	};
};

/* What one statement is run with: `rows` times `columns` values, row by row. */
struct fm_rows {
	struct fm_value *values;
	size_t rows, columns;
};

/* What is to be written; the committer's from submit on. */
struct fm_batch {
	struct fm_upper *uppers;
	size_t count;
	struct fm_rows rows[FM_MOST_STATEMENTS]; /* for each statement */
	char *texts;
};

struct fm_committer;

/* Open the book at `path` for good, run those of `setup`, and prepare `statements` (at most FM_MOST_STATEMENTS).
 * `data` is borrowed, and is to outlive the committer. Returns NULL with what is wrong in `why` (malloc'ed, or NULL). */
struct fm_committer *fm_committer_start(const char *path, int data, char *const *setup, size_t setup_count,
					char *const *statements, size_t count, char **why);
/* A descriptor that is readable when a batch is done, or all that was to be made ahead. Stays the committer's. */
int fm_committer_ready(const struct fm_committer *committer);
/* Returns false while another one is being written. */
bool fm_committer_submit(struct fm_committer *committer, struct fm_batch batch);
/* Make the directories of active snapshots to come, one after the other while there is no batch. Returns false where
 * there is no memory. */
bool fm_committer_ahead(struct fm_committer *committer, const long long *numbers, size_t count);

struct fm_done {
	bool batch;	 /* one is done, */
	bool failed;	 /* and was not written; */
	char *why;	 /* why not: malloc'ed, or NULL without memory for it */
	size_t ahead;	 /* so many more of those ahead are made, in their order, */
	int ahead_error; /* and the others will not be */
};

/* What was done since the last time. */
struct fm_done fm_committer_take(struct fm_committer *committer);
/* End it, once its batch is done; what is not made ahead by then is not made. Where that takes longer than `limit_ms`,
 * the thread is left behind with all it has: returns false then. */
bool fm_committer_stop(struct fm_committer *committer, int limit_ms);
void fm_batch_free(struct fm_batch *batch);

#endif
