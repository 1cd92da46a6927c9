/* What the files that work on whole directory trees share. None of this touches Python; all of it runs without the GIL. */
#ifndef FLATMOUNT_TREE_H
#define FLATMOUNT_TREE_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uapi.h"

/*
 * Two descriptors are open for each level of a walk, so that this many levels stay below the usual limit of 1,024 open
 * files. The unpacker refuses deeper layers; trees that containers wrote may be deeper, and only remove meets those.
 */
#define FM_TREE_DEPTH 256

/* The first failure of a walk: errno, and the path from the walk's root for the person who reads about it. */
struct fm_tree_error {
	int number;
	char path[4096];
};

struct fm_id_range {
	uint32_t container, host, size;
};

/* Owners of a copy. NULL where a pointer to it is taken: owners stay as they are. */
struct fm_owner_map {
	const struct fm_id_range *uids, *gids;
	size_t uid_count, gid_count;
};

/* Entries of one directory, in batches. A directory that changes meanwhile is read as getdents64 gives it. */
struct fm_entries {
	int fd;
	long length, position;
	char *buffer;
};

struct fm_dirent {
	uint64_t d_ino;
	int64_t d_off;
	unsigned short d_reclen;
	unsigned char d_type;
	char d_name[];
};

int fm_entries_open(struct fm_entries *entries, int fd);
void fm_entries_close(struct fm_entries *entries);
/* The next name but "." and "..": 1, 0 at the end, -1 with errno. `d_type` is always known. */
int fm_entries_next(struct fm_entries *entries, const char **name, unsigned char *type);

int fm_tree_fail(struct fm_tree_error *error, const char *path);
/* Append "/name" to a path of `length` bytes: the new length, or 0 with ENAMETOOLONG. */
size_t fm_path_push(char *path, size_t length, const char *name);

int fm_open_child(int parent, const char *name, uint64_t resolve);

/* One file, link, node or pipe, with data, owner, mode, attributes and times. */
int fm_copy_entry(int from, const char *name, int to, const struct stat *st, const struct fm_owner_map *map);
/* Owner, mode and attributes of a directory onto an empty one; its times are the caller's, after the content. */
int fm_copy_directory_attributes(int from, int to, const struct stat *st, const struct fm_owner_map *map);
int fm_copy_tree(int from, int to, const struct fm_owner_map *map, uint64_t *entries, struct fm_tree_error *error);

/* What a new file is to be, beside its content. */
struct fm_new_file {
	uid_t uid;
	gid_t gid;
	mode_t mode;
	struct timespec mtime;
};

/* Make `name` in `directory`, where it must not exist. A failure leaves what is there by then. */
int fm_create_file(int directory, const char *name, const char *data, size_t size, const struct fm_new_file *file);

struct fm_flat_counts {
	uint64_t directories, links, copies;
};

int fm_flatten(int root, const char *const *sources, size_t count, long root_source, const char *target,
	       struct fm_flat_counts *counts, struct fm_tree_error *error);

struct fm_removed_counts {
	uint64_t entries, bytes;
};

int fm_remove_tree(int parent, const char *name, struct fm_removed_counts *counts, struct fm_tree_error *error);

#endif
