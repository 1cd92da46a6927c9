/*
 * One new file from a buffer: what an unpacker does for each of a layer's small files, in one go.
 *
 * openat (O_EXCL, one component), write, fchown, fchmod, futimens, close.
 */
#include "tree.h"

static int write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(fd, data, size);

		if (done < 0) {
			if (errno == EINTR)
				continue;
			return -1;
		}
		data += done;
		size -= (size_t)done;
	}
	return 0;
}

static int fill(int fd, const char *data, size_t size, const struct fm_new_file *file)
{
	const struct timespec times[2] = {file->mtime, file->mtime};
	struct stat st;

	if (write_all(fd, data, size) || fstat(fd, &st))
		return -1;
	/* The owner before the mode: changing the owner takes setuid and setgid away. */
	if ((st.st_uid != file->uid || st.st_gid != file->gid) && fchown(fd, file->uid, file->gid))
		return -1;
	if ((st.st_mode & 07777) != file->mode && fchmod(fd, file->mode))
		return -1;
	return futimens(fd, times);
}

int fm_create_file(int directory, const char *name, const char *data, size_t size, const struct fm_new_file *file)
{
	/* One component and nothing else, so that no name leads out of the directory, whoever made it up. */
	if (!*name || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, "..")) {
		errno = EINVAL;
		return -1;
	}
	int fd = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

	if (fd < 0)
		return -1;
	if (fill(fd, data, size, file)) {
		int number = errno;

		close(fd);
		errno = number;
		return -1;
	}
	return close(fd);
}
