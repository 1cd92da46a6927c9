/* Reading directories, and removing trees without ever leaving them. */
#include "tree.h"

#include <linux/fs.h>

#define BATCH 32768

int fm_entries_open(struct fm_entries *entries, int fd)
{
	*entries = (struct fm_entries){.fd = fd, .buffer = malloc(BATCH)};
	return entries->buffer ? 0 : -1;
}

void fm_entries_close(struct fm_entries *entries)
{
	free(entries->buffer);
	entries->buffer = NULL;
}

int fm_entries_next(struct fm_entries *entries, const char **name, unsigned char *type)
{
	for (;;) {
		if (entries->position == entries->length) {
			entries->length = syscall(SYS_getdents64, entries->fd, entries->buffer, BATCH);
			entries->position = 0;
			if (entries->length <= 0) {
				long end = entries->length;

				entries->length = 0;
				return end ? -1 : 0;
			}
		}
		struct fm_dirent *entry = (struct fm_dirent *)(entries->buffer + entries->position);

		entries->position += entry->d_reclen;
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		*name = entry->d_name;
		*type = entry->d_type;
		if (*type == DT_UNKNOWN) {
			struct stat st;

			if (fstatat(entries->fd, *name, &st, AT_SYMLINK_NOFOLLOW))
				return -1;
			*type = IFTODT(st.st_mode);
		}
		return 1;
	}
}

int fm_tree_fail(struct fm_tree_error *error, const char *path)
{
	if (!error->number) {
		error->number = errno ? errno : EIO;
		snprintf(error->path, sizeof(error->path), "%s", *path ? path : ".");
	}
	return -1;
}

size_t fm_path_push(char *path, size_t length, const char *name)
{
	size_t more = strlen(name) + (length ? 1 : 0);

	if (length + more >= sizeof(((struct fm_tree_error *)0)->path)) {
		errno = ENAMETOOLONG;
		return 0;
	}
	if (length)
		path[length] = '/';
	strcpy(path + length + (length ? 1 : 0), name);
	return length + more;
}

int fm_open_child(int parent, const char *name, uint64_t resolve)
{
	struct fm_open_how how = {
		.flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC,
		.resolve = resolve | FM_RESOLVE_BENEATH | FM_RESOLVE_NO_SYMLINKS,
	};

	return (int)syscall(SYS_openat2, parent, name, &how, sizeof(how));
}

/*
 * A container can make directories deeper than any limit on open files. Below this level a directory is renamed to the
 * top of the tree that is going away, and removed from there.
 */
#define REMOVE_DEPTH 64
#define REMOVE_ROUNDS 1000

struct removal {
	int top;
	unsigned long lifted;
	struct fm_removed_counts *counts;
	struct fm_tree_error *error;
	char path[4096];
};

static int remove_content(struct removal *removal, int fd, unsigned depth, size_t length);

static int lift(struct removal *removal, int fd, const char *name)
{
	char higher[64];

	do {
		snprintf(higher, sizeof(higher), ".deep-%d-%lu", (int)getpid(), removal->lifted++);
		if (!syscall(SYS_renameat2, fd, name, removal->top, higher, RENAME_NOREPLACE))
			return 0;
	} while (errno == EEXIST);
	return -1;
}

static int remove_directory(struct removal *removal, int fd, const char *name, unsigned depth, size_t length)
{
	if (depth >= REMOVE_DEPTH)
		return lift(removal, fd, name);

	int child = fm_open_child(fd, name, FM_RESOLVE_NO_XDEV);
	if (child < 0)
		return -1;
	int failed = remove_content(removal, child, depth + 1, length);
	int number = errno;

	close(child);
	errno = number;
	if (failed)
		return -1;
	if (unlinkat(fd, name, AT_REMOVEDIR))
		return -1;
	removal->counts->entries++;
	return 0;
}

static int remove_other(struct removal *removal, int fd, const char *name)
{
	struct stat st;

	if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) || unlinkat(fd, name, 0))
		return -1;
	removal->counts->entries++;
	if (st.st_nlink == 1)
		removal->counts->bytes += (uint64_t)st.st_blocks * 512;
	return 0;
}

static int remove_batch(struct removal *removal, int fd, unsigned depth, size_t length, bool *found)
{
	struct fm_entries entries;
	const char *name;
	unsigned char type;
	int more;

	if (lseek(fd, 0, SEEK_SET) < 0 || fm_entries_open(&entries, fd))
		return fm_tree_fail(removal->error, removal->path);
	*found = false;
	while ((more = fm_entries_next(&entries, &name, &type)) > 0) {
		*found = true;
		size_t inner = fm_path_push(removal->path, length, name);
		/* The path is only for the message: one too long for it is still removed. */
		int failed = type == DT_DIR ? remove_directory(removal, fd, name, depth, inner ? inner : length)
					    : remove_other(removal, fd, name);

		if (failed)
			fm_tree_fail(removal->error, removal->path);
		removal->path[length] = 0;
		if (failed) {
			more = -1;
			break;
		}
	}
	if (more < 0)
		fm_tree_fail(removal->error, removal->path);
	fm_entries_close(&entries);
	return more;
}

/* Names may appear behind the reading position (lifted directories do), so a directory is read until it is empty. */
static int remove_content(struct removal *removal, int fd, unsigned depth, size_t length)
{
	bool found = true;

	for (int round = 0; found; round++) {
		if (round == REMOVE_ROUNDS && fd != removal->top) {
			errno = ENOTEMPTY;
			return fm_tree_fail(removal->error, removal->path);
		}
		if (remove_batch(removal, fd, depth, length, &found))
			return -1;
	}
	return 0;
}

int fm_remove_tree(int parent, const char *name, struct fm_removed_counts *counts, struct fm_tree_error *error)
{
	struct removal removal = {.counts = counts, .error = error};

	removal.top = fm_open_child(parent, name, FM_RESOLVE_NO_XDEV);
	if (removal.top < 0) {
		if ((errno == ENOTDIR || errno == ELOOP) && !remove_other(&removal, parent, name))
			return 0;
		return fm_tree_fail(error, name);
	}
	int failed = remove_content(&removal, removal.top, 0, 0);

	close(removal.top);
	if (!failed && (failed = unlinkat(parent, name, AT_REMOVEDIR)))
		fm_tree_fail(error, name);
	if (!failed)
		counts->entries++;
	return failed;
}
