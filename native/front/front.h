/*
 * The front of a gRPC service on a unix socket: one thread that speaks HTTP/2 (libnghttp2) with any number of clients
 * and hands whole calls to somebody else, many at a time, whose answers it takes back the same way.
 *
 * See: the gRPC protocol over HTTP/2 (PROTOCOL-HTTP2.md of gRPC), RFC 9113.
 */
#ifndef FLATMOUNT_FRONT_H
#define FLATMOUNT_FRONT_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FM_GONE (-1)

/* Status codes that the front itself answers with. */
enum { FM_OK = 0, FM_CANCELLED = 1, FM_DEADLINE_EXCEEDED = 4, FM_RESOURCE_EXHAUSTED = 8, FM_UNIMPLEMENTED = 12, FM_INTERNAL = 13 };

/* What a client asks for: `method` is the place of its path among the front's, or FM_GONE for a call whose client has
 * left before it was answered. */
struct fm_request {
	struct fm_request *next;
	uint64_t call;
	int method;
	uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: the client names none */
	unsigned char *body;  /* a gRPC frame: five bytes and the message */
	size_t body_bytes;
};

/* A part of an answer: a message, the end with its status, or both. */
struct fm_reply {
	struct fm_reply *next;
	uint64_t call;
	bool has_message, ends;
	int status;
	char *told; /* UTF-8, or NULL */
	size_t told_bytes;
	size_t bytes, sent;
	unsigned char frame[]; /* five bytes and the message */
};

/* A field of a message: a string, or a map from strings to strings. */
struct fm_field {
	uint64_t number;
	bool is_map;
};

struct fm_text {
	const char *at;
	size_t bytes;
};

/* Tell `found` of each of `fields` that a message has, in its order: the last of a string counts, and all of a map, of
 * which `first` is the key. Returns false where the message is none, or `found` does. */
bool fm_read_fields(const unsigned char *message, size_t bytes, const struct fm_field *fields, size_t count,
		    bool (*found)(void *user, size_t place, struct fm_text first, struct fm_text second), void *user);

/* How much a string of so many bytes takes as a field with a number up to 15. */
size_t fm_string_bytes(size_t bytes);
/* Write the head of such a field, or all of it; returns where the next one goes. */
unsigned char *fm_put_tag(unsigned char *at, unsigned number, size_t bytes);
unsigned char *fm_put_string(unsigned char *at, unsigned number, struct fm_text text);

/* What was answered on one path. `within[i]` took at most fm_bounds_ns[i], the last of them any time. */
#define FM_CODES 17
#define FM_BOUNDS 13

extern const uint64_t fm_bounds_ns[FM_BOUNDS];

struct fm_counts {
	uint64_t by_code[FM_CODES];
	uint64_t within[FM_BOUNDS + 1];
	uint64_t spent_ns;
};

struct fm_path {
	char *text;
	bool endless;	 /* no time is too long for it */
	unsigned kept_by; /* the string of its message that is the key of answers that are kept; 0: none are */
};

struct fm_front;

/* Begin to serve on `listening`, which is the front's from now on unless this fails. `paths` are copied. A call that is
 * not answered after `most_ns`, or its client's own time if that is less, is told so by the front; 0: by nobody. Returns
 * NULL with errno. */
struct fm_front *fm_front_start(int listening, const struct fm_path *paths, size_t count, size_t most_bytes,
				uint64_t most_ns);
/* What was answered until now on the path at `place`. */
struct fm_counts fm_front_counts(struct fm_front *front, size_t place);
/* How many calls somebody works on, and nobody has been told the end of. */
size_t fm_front_running(struct fm_front *front);
/* A descriptor that is readable while there are requests. Stays the front's. */
int fm_front_ready(const struct fm_front *front);
/* All requests there are, oldest first; the caller frees each with fm_request_free. */
struct fm_request *fm_front_take(struct fm_front *front);
void fm_request_free(struct fm_request *request);
/* A reply with room for a message; NULL where there is no memory. */
struct fm_reply *fm_reply_new(uint64_t call, const void *message, size_t bytes);
/* Hand replies over, in the order of the list. They go out with the next flush. */
void fm_front_reply(struct fm_front *front, struct fm_reply *first, struct fm_reply *last);
void fm_front_flush(struct fm_front *front);
/* Accept nobody more, send what was handed over for at most `grace_ms`, and let go of everything. */
void fm_front_stop(struct fm_front *front, int grace_ms);

/* Answer calls for `key`, on the path that has answers kept, with `message` until it is forgotten. */
void fm_front_keep(struct fm_front *front, struct fm_text key, struct fm_text message);
/* When this returns nobody is answered with it any more, but for calls that came before. */
void fm_front_forget(struct fm_front *front, struct fm_text key);
void fm_front_forget_all(struct fm_front *front);

uint64_t fm_now_ns(void);
/* As pthread_create, for a thread that takes no signal: these are for the threads of whoever starts us. */
int fm_thread_start(pthread_t *thread, void *(*run)(void *), void *argument);

#endif
