/* The log: one line for each line of output, "TIME STREAM F TEXT"; P where the line goes on in the next entry. */
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

int shim_write_all(int fd, const char *data, size_t bytes)
{
	while (bytes > 0) {
		ssize_t put = write(fd, data, bytes);
		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0)
			return -1;
		data += put;
		bytes -= (size_t)put;
	}
	return 0;
}

int shim_log_open(struct shim_log *log, int directory, size_t limit)
{
	struct stat st;

	log->directory = directory;
	log->limit = limit;
	log->fd = openat(directory, "log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (log->fd < 0 || fstat(log->fd, &st) < 0)
		return -1;
	log->bytes = (size_t)st.st_size;
	return 0;
}

static void write_entry(struct shim_log *log, const char *head, int head_bytes, const char *text, size_t bytes)
{
	struct iovec parts[] = {{(void *)head, (size_t)head_bytes}, {(void *)text, bytes}, {(void *)"\n", 1}};
	size_t all = (size_t)head_bytes + bytes + 1;

	if (log->bytes + all > log->limit && log->bytes > 0) {
		close(log->fd);
		renameat(log->directory, "log", log->directory, "log.1");
		if (shim_log_open(log, log->directory, log->limit) < 0)
			log->fd = -1;
	}
	/* A full disk must not stop the container: what cannot be written is lost. */
	if (log->fd >= 0 && writev(log->fd, parts, 3) > 0)
		log->bytes += all;
}

void shim_log_write(struct shim_log *log, const char *stream, const char *data, size_t bytes)
{
	struct timespec now;
	struct tm utc;
	char stamp[32], head[64];

	if (log->fd < 0)
		return;
	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &utc);
	strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
	while (bytes > 0) {
		const char *end = memchr(data, '\n', bytes);
		size_t text = end ? (size_t)(end - data) : bytes;
		int head_bytes = snprintf(head, sizeof(head), "%s.%09ldZ %s %c ", stamp, now.tv_nsec, stream, end ? 'F' : 'P');
		write_entry(log, head, head_bytes, data, text);
		data += text + (end != NULL);
		bytes -= text + (end != NULL);
	}
}
