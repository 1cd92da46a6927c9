/*
 * Answers that are known before anybody asks: by a key that is a string of the request, until they are forgotten. The
 * front gives them itself. For any thread.
 */
#ifndef FLATMOUNT_KEPT_H
#define FLATMOUNT_KEPT_H

#include "front.h"

struct fm_kept;

struct fm_kept *fm_kept_new(void);
void fm_kept_free(struct fm_kept *kept);
/* Keep an answer, in the place of another one. Without memory, or when there are too many, it is not kept. */
void fm_kept_put(struct fm_kept *kept, struct fm_text key, struct fm_text message);
void fm_kept_forget(struct fm_kept *kept, struct fm_text key);
void fm_kept_forget_all(struct fm_kept *kept);
/* The answer to be sent for `call`; NULL where none is kept. The caller's. */
struct fm_reply *fm_kept_find(struct fm_kept *kept, struct fm_text key, uint64_t call);

#endif
