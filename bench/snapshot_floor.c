/*
 * The floor under a snapshot service: one on libnghttp2 that answers and does nothing.
 *
 *   snapshot_floor SOCKET
 *
 * Every call ends with status OK: Remove with an empty message, all others with one bind mount. One thread; a turn of
 * its loop sends all that a connection is to be told at once. Runs until it is killed.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/un.h>
#include <unistd.h>

#include "peer.h"

#define MOST_CONNECTIONS 64
#define STREAMS 10000

struct answer {
	const char *message;
	size_t length;
};

/* Each begins with what gRPC wants before a message: not compressed, and its length. */
static const char mounts[] = "\0\0\0\0\x16"
			     "\x0a\x14"
			     "\x0a\x04"
			     "bind"
			     "\x12\x01/"
			     "\x22\x02rw"
			     "\x22\x05rbind";
static const char nothing[] = "\0\0\0\0\0";
static const struct answer of_mounts = {mounts, sizeof(mounts) - 1}, of_nothing = {nothing, sizeof(nothing) - 1};

/* fd -1: nobody */
static struct peer connections[MOST_CONNECTIONS];

static void die(const char *what, const char *why)
{
	fprintf(stderr, "snapshot_floor: %s: %s\n", what, why);
	exit(1);
}

static ssize_t read_answer(nghttp2_session *session, int32_t stream, uint8_t *to, size_t room, uint32_t *flags,
			   nghttp2_data_source *source, void *unused)
{
	static const nghttp2_nv trailers[] = {HEADER("grpc-status", "0")};
	const struct answer *answer = source->ptr;

	/* It goes whole: a client with a window narrower than this is refused. */
	if (room < answer->length)
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	memcpy(to, answer->message, answer->length);
	*flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
	if (nghttp2_submit_trailer(session, stream, trailers, 1))
		return NGHTTP2_ERR_CALLBACK_FAILURE;
	return (ssize_t)answer->length;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
		     const uint8_t *value, size_t length, uint8_t flags, void *unused)
{
	if (strcmp((const char *)name, ":path"))
		return 0;
	const char *method = strrchr((const char *)value, '/');
	const struct answer *answer = method && !strcmp(method, "/Remove") ? &of_nothing : &of_mounts;
	return nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, (void *)answer);
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *unused)
{
	static const nghttp2_nv headers[] = {HEADER(":status", "200"), HEADER("content-type", "application/grpc")};

	if (!(frame->hd.flags & NGHTTP2_FLAG_END_STREAM) ||
	    (frame->hd.type != NGHTTP2_DATA && frame->hd.type != NGHTTP2_HEADERS))
		return 0;
	nghttp2_data_provider body = {
		.source.ptr = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id),
		.read_callback = read_answer,
	};
	return nghttp2_submit_response(session, frame->hd.stream_id, headers, 2, &body);
}

static void greet(int listener)
{
	static const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, STREAMS}};
	struct peer *connection = connections;
	nghttp2_session_callbacks *callbacks;

	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0)
		return;
	while (connection < connections + MOST_CONNECTIONS && connection->fd >= 0)
		connection++;
	if (connection == connections + MOST_CONNECTIONS) {
		close(fd);
		return;
	}
	if (nghttp2_session_callbacks_new(&callbacks))
		die("accept", "out of memory");
	nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
	nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
	if (nghttp2_session_server_new(&connection->session, callbacks, NULL) ||
	    nghttp2_submit_settings(connection->session, NGHTTP2_FLAG_NONE, settings, 1))
		die("accept", "out of memory");
	nghttp2_session_callbacks_del(callbacks);
	connection->fd = fd;
	connection->begun = connection->ended = 0;
}

static void leave(struct peer *connection)
{
	nghttp2_session_del(connection->session);
	close(connection->fd);
	connection->fd = -1;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct pollfd waiting[1 + MOST_CONNECTIONS];

	if (argc != 2 || strlen(argv[1]) >= sizeof(address.sun_path)) {
		fprintf(stderr, "usage: snapshot_floor SOCKET\n");
		return 2;
	}
	strcpy(address.sun_path, argv[1]);
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 64))
		die(argv[1], strerror(errno));
	for (int i = 0; i < MOST_CONNECTIONS; i++)
		connections[i].fd = -1;

	for (;;) {
		waiting[0] = (struct pollfd){.fd = listener, .events = POLLIN};
		for (int i = 0; i < MOST_CONNECTIONS; i++) {
			struct peer *connection = &connections[i];
			if (connection->fd >= 0 && peer_say(connection))
				leave(connection);
			waiting[1 + i].fd = connection->fd;
			waiting[1 + i].events = connection->ended ? POLLIN | POLLOUT : POLLIN;
			waiting[1 + i].revents = 0;
		}
		if (poll(waiting, 1 + MOST_CONNECTIONS, -1) < 0 && errno != EINTR)
			die("poll", strerror(errno));
		for (int i = 0; i < MOST_CONNECTIONS; i++)
			if (waiting[1 + i].revents & ~POLLOUT && peer_listen(&connections[i]))
				leave(&connections[i]);
		if (waiting[0].revents)
			greet(listener);
	}
}
