/* The terminal's way from the runtime to us: a descriptor over a socket. */
#include "shim.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int shim_console_listen(int directory)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	/* Through the descriptor: the directory's own path may be longer than a socket's may be. */
	snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d/console", directory);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 1) < 0)
		return -1;
	return fd;
}

int shim_console_accept(int listener)
{
	char data[4096], control[CMSG_SPACE(sizeof(int))];
	struct iovec part = {data, sizeof(data)};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC), terminal = -1;

	if (connection < 0)
		return -1;
	if (recvmsg(connection, &message, MSG_CMSG_CLOEXEC) > 0) {
		struct cmsghdr *part_of = CMSG_FIRSTHDR(&message);
		if (part_of && part_of->cmsg_level == SOL_SOCKET && part_of->cmsg_type == SCM_RIGHTS)
			memcpy(&terminal, CMSG_DATA(part_of), sizeof(int));
	}
	close(connection);
	return terminal;
}
