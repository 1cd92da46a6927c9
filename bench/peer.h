/*
 * One end of an HTTP/2 connection over a socket that does not block, and how it says what it has to say: as much as
 * there is in one send.
 */
#ifndef BENCH_PEER_H
#define BENCH_PEER_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#include <nghttp2/nghttp2.h>

#define PEER_OUT_BYTES (1 << 18)
#define PEER_IN_BYTES (1 << 18)
#define PEER_FRAME_BYTES (9 + (1 << 14)) /* the longest that the library hands out at once */

/* One header of constant strings; nothing is copied. */
#define HEADER(name, value)                                                                                            \
	{(uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1,                                   \
	 NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}

struct peer {
	int fd;
	nghttp2_session *session;
	size_t begun, ended; /* what of `out` is not sent yet; both 0 when all is */
	uint8_t out[PEER_OUT_BYTES];
};

/* Send what there is, as far as the socket takes it. Returns NULL, or why it cannot be. */
static inline const char *peer_say(struct peer *peer)
{
	for (;;) {
		while (PEER_OUT_BYTES - peer->ended >= PEER_FRAME_BYTES) {
			const uint8_t *bytes;
			ssize_t length = nghttp2_session_mem_send(peer->session, &bytes);
			if (length < 0)
				return nghttp2_strerror((int)length);
			if (!length)
				break;
			memcpy(peer->out + peer->ended, bytes, (size_t)length);
			peer->ended += (size_t)length;
		}
		if (peer->begun == peer->ended)
			return NULL;
		ssize_t sent = send(peer->fd, peer->out + peer->begun, peer->ended - peer->begun, MSG_NOSIGNAL);
		if (sent < 0)
			return errno == EAGAIN || errno == EINTR ? NULL : strerror(errno);
		peer->begun += (size_t)sent;
		if (peer->begun == peer->ended)
			peer->begun = peer->ended = 0;
	}
}

/* Take what came. Returns NULL, or why the connection is at its end. */
static inline const char *peer_listen(struct peer *peer)
{
	static uint8_t in[PEER_IN_BYTES];
	ssize_t length = recv(peer->fd, in, sizeof(in), 0);

	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? NULL : strerror(errno);
	if (!length)
		return "closed by the other end";
	ssize_t read = nghttp2_session_mem_recv(peer->session, in, (size_t)length);
	return read < 0 ? nghttp2_strerror((int)read) : NULL;
}

#endif
