/* flatmount-shim: see shim.c. What its files share. */
#ifndef FLATMOUNT_SHIM_H
#define FLATMOUNT_SHIM_H

#include <stddef.h>
#include <sys/types.h>

#define SHIM_MOST_TREES 64

struct shim_tree {
	int fd;
	const char *target;
};

struct shim_entry {
	int copy_mounts;
	struct shim_tree trees[SHIM_MOST_TREES];
	int tree_count;
	int standard[3];
	char **command;
	/* Answers of the child, which writes them while we are suspended. */
	const char *step;
	int error;
};

/*
 * Starts `entry->command` in a child that shares our memory until it executes: it copies its mount namespace where
 * `copy_mounts`, attaches the trees there, takes on `standard` as descriptors 0 to 2 and executes. Returns its pid, or
 * -1 with `step` and `error` set; the child is gone then.
 */
pid_t shim_enter(struct shim_entry *entry);

/* One stream of a container's output: to the log, line by line, and to a descriptor of ours where there is one. */
struct shim_log {
	int directory, fd;
	size_t bytes, limit;
};

/* Opens DIRECTORY/log for appending. Past `limit` bytes it becomes log.1, in place of an older one. */
int shim_log_open(struct shim_log *log, int directory, size_t limit);
void shim_log_write(struct shim_log *log, const char *stream, const char *data, size_t bytes);

/* Listens at DIRECTORY/console; accepts one connection and takes the terminal's descriptor out of it. */
int shim_console_listen(int directory);
int shim_console_accept(int listener);

/* Writes all of it; gives up where the reader is gone. */
int shim_write_all(int fd, const char *data, size_t bytes);

/* `first`: what a measured container runs. Writes the monotonic clock and its name into a fifo, and waits to be ended. */
int shim_first(int count, char **arguments);

#endif
