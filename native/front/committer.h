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

#define FM_PARAMETERS 3

/* What is to be written; the committer's from submit on. A parameter that is NULL is one for SQLite. */
struct fm_batch {
	struct fm_upper *uppers;
	size_t count;
	char *parameters[FM_PARAMETERS];
};

struct fm_committer;

/* Open the book at `path` for good, run the statements of `setup`, and prepare `statement`. `data` is borrowed, and is
 * to outlive the committer. Returns NULL with what is wrong in `why` (malloc'ed, or NULL). */
struct fm_committer *fm_committer_start(const char *path, int data, char *const *setup, size_t count,
					const char *statement, char **why);
/* A descriptor that is readable when a batch is done. Stays the committer's. */
int fm_committer_ready(const struct fm_committer *committer);
/* Returns false while another one is being written. */
bool fm_committer_submit(struct fm_committer *committer, struct fm_batch batch);
/* Whether the batch is done; `why` (malloc'ed) says then why it was not written, NULL that it was. */
bool fm_committer_take(struct fm_committer *committer, char **why);
/* End it, once its batch is done. Where that takes longer than `limit_ms`, the thread is left behind with all it has:
 * returns false then. */
bool fm_committer_stop(struct fm_committer *committer, int limit_ms);
void fm_batch_free(struct fm_batch *batch);

#endif
