/* Two committers and kept answers under as many hands as they are made for: for a build with -fsanitize=thread.
 *   front_threads DIRECTORY     an empty one, for a book and directories
 */
#include "front/committer.h"
#include "front/kept.h"

#include <dlfcn.h>
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define AHEAD 3000
#define KEYS 50
#define TURNS 5000

static struct fm_kept *kept;
static bool over;

static size_t key_of(char *text, unsigned number)
{
	return (size_t)sprintf(text, "key %u", number);
}

static void *ask(void *ignored)
{
	while (!__atomic_load_n(&over, __ATOMIC_RELAXED))
		for (unsigned i = 0; i < KEYS; i++) {
			char key[16];
			size_t bytes = key_of(key, i);
			struct fm_reply *reply = fm_kept_find(kept, (struct fm_text){key, bytes}, 1);

			if (reply && memcmp(reply->frame + 5, key, bytes))
				errx(1, "another key's answer");
			free(reply);
		}
	return NULL;
}

static void keep_and_forget(unsigned seed)
{
	pthread_t thread;

	if (!(kept = fm_kept_new()) || fm_thread_start(&thread, ask, NULL))
		err(1, "kept answers");
	for (unsigned turn = 0; turn < TURNS; turn++) {
		char key[16];
		struct fm_text text = {key, key_of(key, (unsigned)rand_r(&seed) % KEYS)};

		if (turn % 500 == 0)
			fm_kept_forget_all(kept);
		else if (turn % 3)
			fm_kept_put(kept, text, text);
		else
			fm_kept_forget(kept, text);
	}
	__atomic_store_n(&over, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	fm_kept_free(kept);
}

static struct fm_batch batch_of(long long number)
{
	struct fm_batch batch = {.count = 1, .uppers = calloc(1, sizeof(*batch.uppers)), .texts = strdup("text")};

	batch.uppers[0] = (struct fm_upper){.number = number, .work = 1, .mode = 0755};
	batch.rows[0] = (struct fm_rows){calloc(2, sizeof(struct fm_value)), 1, 2};
	batch.rows[0].values[0] = (struct fm_value){.kind = FM_NUMBER, .number = number};
	batch.rows[0].values[1] = (struct fm_value){.kind = FM_TEXT, .bytes = 4};
	return batch;
}

static struct fm_committer *start(int data)
{
	static char *setup[] = {"PRAGMA busy_timeout = 10000", "PRAGMA journal_mode = WAL",
				"CREATE TABLE IF NOT EXISTS rows (number UNIQUE, text)"};
	static char *statements[] = {"INSERT INTO rows VALUES (?, ?)"};
	char *why;
	struct fm_committer *committer = fm_committer_start("book", data, setup, 3, statements, 1, &why);

	if (!committer)
		errx(1, "%s", why ? why : "no memory");
	return committer;
}

/* More are asked for while the thread makes one, and batches come between. */
static void make_ahead(struct fm_committer *committer, unsigned seed)
{
	long long last = 0, numbers[40];
	size_t made = 0, batches = 0;
	bool writing = false;

	while (made < (size_t)last || last < AHEAD || writing) {
		size_t count = last < AHEAD ? (size_t)rand_r(&seed) % 40 : 0;

		for (size_t i = 0; i < count; i++)
			numbers[i] = ++last;
		if (count && !fm_committer_ahead(committer, numbers, count))
			errx(1, "no memory");
		if (!writing && last < AHEAD)
			writing = fm_committer_submit(committer, batch_of(1000000 + (long long)++batches));
		struct pollfd ready = {.fd = fm_committer_ready(committer), .events = POLLIN};

		poll(&ready, 1, last < AHEAD ? 0 : 10000);
		struct fm_done done = fm_committer_take(committer);

		if (done.failed || done.ahead_error || (made += done.ahead) > (size_t)last)
			errx(1, "%zu made of %lld, %s", made, last, done.why ? done.why : strerror(done.ahead_error));
		writing = writing && !done.batch;
	}
	for (long long number = 1; number <= last; number++) {
		char path[64];

		sprintf(path, "snapshots/%lld/work", number);
		if (access(path, F_OK))
			err(1, "%s", path);
	}
}

int main(int count, char **arguments)
{
	/* As the interpreter has it loaded. */
	if (count != 2 || !dlopen("libsqlite3.so.0", RTLD_NOW | RTLD_GLOBAL) || chdir(arguments[1]) ||
	    mkdir("snapshots", 0700) || close(creat("book", 0600)))
		err(1, "%s", count == 2 ? arguments[1] : "what directory");
	int data = open(".", O_RDONLY | O_DIRECTORY);
	struct fm_committer *first = start(data);

	fm_committer_submit(first, batch_of(2000000));
	struct fm_committer *second = start(data);

	make_ahead(second, 1);
	if (!fm_committer_stop(first, 10000) || !fm_committer_stop(second, 10000))
		errx(1, "a thread does not end");
	keep_and_forget(1);
	return 0;
}
