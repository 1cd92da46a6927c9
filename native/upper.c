#include "upper.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define PLAIN_MODE 0755

int fm_make_upper(int data, const struct fm_upper *upper)
{
	char path[48];
	int top = snprintf(path, sizeof(path), "snapshots/%lld", upper->number);

	if (!upper->made && mkdirat(data, path, 0700) < 0)
		return errno;
	snprintf(path + top, sizeof(path) - (size_t)top, "/fs");
	if (!upper->made && mkdirat(data, path, PLAIN_MODE) < 0)
		return errno;
	if ((upper->uid || upper->gid) && fchownat(data, path, upper->uid, upper->gid, AT_SYMLINK_NOFOLLOW) < 0)
		return errno;
	/* Whatever the umask took away. */
	if ((!upper->made || upper->mode != PLAIN_MODE) && fchmodat(data, path, upper->mode, 0) < 0)
		return errno;
	snprintf(path + top, sizeof(path) - (size_t)top, "/work");
	if (!upper->made && upper->work && mkdirat(data, path, 0711) < 0)
		return errno;
	snprintf(path + top, sizeof(path) - (size_t)top, "/none");
	if (upper->none && mkdirat(data, path, PLAIN_MODE) < 0)
		return errno;
	return 0;
}
