#include "front.h"

#include "kept.h"

#include <errno.h>
#include <fcntl.h>
#include <nghttp2/nghttp2.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST_CLIENTS 1024
#define PLACES (2 * MOST_CLIENTS) /* a power of two: the low bits of a client's serial are its place */
#define MOST_STREAMS 4096
#define READ_BYTES (64 << 10)
#define WRITE_BYTES (64 << 10)
#define STREAM_WINDOW (1 << 20)
#define CLIENT_WINDOW (16 << 20)
#define FRAME_HEAD 5
#define MOST_TOLD 4096
#define LOOK_MS 50    /* how exactly deadlines are kept */
#define LEAVE_MS 1000 /* for a client to go that was asked to */

const uint64_t fm_bounds_ns[FM_BOUNDS] = {1000000,   2500000,   5000000,    10000000,	25000000,   50000000,  100000000,
					  250000000, 500000000, 1000000000, 2500000000, 5000000000, 10000000000};

struct stream {
	struct stream *next, **place; /* among its client's */
	int32_t id;
	int method; /* -1: no such path */
	bool asked; /* somebody is working on it */
	bool answered, finished;
	bool waits; /* its data source has nothing more for now */
	bool grpc, post;
	uint64_t deadline_ns, begun_ns;
	unsigned char *body;
	size_t body_bytes, room;
	struct fm_reply *first, *last; /* messages still to be sent */
	bool sent; /* so is its end */
	int status;
	char *told;
	size_t told_bytes;
};

struct client {
	int fd;
	uint32_t serial;
	uint64_t used;	   /* the front's count of uses when it was last heard or answered */
	uint64_t asked_ns; /* when it was asked to go; 0: it stays */
	nghttp2_session *session;
	struct fm_front *front;
	unsigned char *out;
	size_t out_begin, out_end;
	bool blocked; /* the socket takes no more for now */
	bool dirty;   /* in the list of those to be sent to */
	struct client *next_dirty;
	struct stream *streams;
};

struct fm_front {
	pthread_t thread;
	int listening, epoll, wake, ready;
	struct fm_path *paths;
	size_t path_count, most_bytes;
	uint64_t most_ns, look_ns; /* when deadlines were last looked at */
	nghttp2_session_callbacks *callbacks;
	struct client *clients[PLACES];
	uint32_t generation;
	uint64_t uses;
	struct fm_kept *kept;
	size_t staying, leaving;
	struct client *dirty;
	unsigned char *read_buffer;
	/* The front's own until it hands them over, once a turn. */
	struct fm_request *new_first, *new_last;

	pthread_mutex_t lock; /* guards what follows */
	struct fm_request *first, *last;
	struct fm_reply *reply_first, *reply_last;
	struct fm_counts *counts;
	size_t running;
	bool ready_told, woken, stopping;
	int grace_ms;
};

uint64_t fm_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Values that are handed over. */

void fm_request_free(struct fm_request *request)
{
	free(request->body);
	free(request);
}

struct fm_reply *fm_reply_new(uint64_t call, const void *message, size_t bytes)
{
	struct fm_reply *reply = malloc(sizeof(*reply) + FRAME_HEAD + bytes);

	if (!reply)
		return NULL;
	*reply = (struct fm_reply){.call = call, .has_message = message != NULL};
	if (message) {
		reply->frame[0] = 0;
		for (int i = 0; i < 4; i++)
			reply->frame[1 + i] = (unsigned char)(bytes >> (24 - 8 * i));
		memcpy(reply->frame + FRAME_HEAD, message, bytes);
		reply->bytes = FRAME_HEAD + bytes;
	}
	return reply;
}

static void free_reply(struct fm_reply *reply)
{
	free(reply->told);
	free(reply);
}

/* Streams. */

static void free_stream(struct stream *stream)
{
	while (stream->first) {
		struct fm_reply *next = stream->first->next;

		free_reply(stream->first);
		stream->first = next;
	}
	*stream->place = stream->next;
	if (stream->next)
		stream->next->place = stream->place;
	free(stream->told);
	free(stream->body);
	free(stream);
}

static uint64_t call_of(const struct client *client, int32_t stream)
{
	return (uint64_t)client->serial << 32 | (uint32_t)stream;
}

/* Queue for whoever takes requests. Returns -1 where there is no memory. */
static int hand_over(struct client *client, struct stream *stream, int method)
{
	struct fm_front *front = client->front;
	struct fm_request *request = malloc(sizeof(*request));

	if (!request)
		return -1;
	*request = (struct fm_request){.call = call_of(client, stream->id), .method = method};
	if (method != FM_GONE) {
		request->deadline_ns = stream->deadline_ns;
		request->body = stream->body;
		request->body_bytes = stream->body_bytes;
		stream->body = NULL;
		stream->asked = true;
		pthread_mutex_lock(&front->lock);
		front->running++;
		pthread_mutex_unlock(&front->lock);
	}
	if (front->new_last)
		front->new_last->next = request;
	else
		front->new_first = request;
	front->new_last = request;
	return 0;
}

/* grpc-message is percent-encoded: what is not printable, and the sign itself. Returns the length. What is too long is
 * cut, and not within a character: some clients take nothing else for text. */
static size_t encode_told(const char *told, size_t told_bytes, char *to)
{
	static const char digits[] = "0123456789ABCDEF";
	const unsigned char *end = (const unsigned char *)told + told_bytes;
	size_t bytes = 0, whole = 0;

	for (const unsigned char *at = (const unsigned char *)told; at < end; at++) {
		if ((*at & 0xc0) != 0x80)
			whole = bytes;
		if (bytes + 3 > MOST_TOLD)
			return whole;
		if (*at >= 0x20 && *at < 0x7f && *at != '%') {
			to[bytes++] = (char)*at;
			continue;
		}
		to[bytes++] = '%';
		to[bytes++] = digits[*at >> 4];
		to[bytes++] = digits[*at & 15];
	}
	return bytes;
}

#define FIELD(n, v, bytes, flags) \
	((nghttp2_nv){(uint8_t *)(n), (uint8_t *)(v), sizeof(n) - 1, (bytes), NGHTTP2_NV_FLAG_NO_COPY_NAME | (flags)})
#define CONSTANT(n, v) FIELD(n, v, sizeof(v) - 1, NGHTTP2_NV_FLAG_NO_COPY_VALUE)

/* The fields that end a call, at `fields`; how many there are. `number` and `message` are room for their values. */
static size_t ending(const struct stream *stream, nghttp2_nv *fields, char *number, char *message)
{
	size_t count = 0;
	int bytes = sprintf(number, "%d", stream->status);

	fields[count++] = FIELD("grpc-status", number, (size_t)bytes, 0);
	if (stream->told_bytes)
		fields[count++] = FIELD("grpc-message", message,
					encode_told(stream->told, stream->told_bytes, message), 0);
	return count;
}

static ssize_t read_answer(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *flags,
			   nghttp2_data_source *source, void *user)
{
	struct stream *stream = source->ptr;
	size_t done = 0;

	while (stream->first && done < room) {
		struct fm_reply *reply = stream->first;
		size_t part = reply->bytes - reply->sent;

		if (part > room - done)
			part = room - done;
		memcpy(buffer + done, reply->frame + reply->sent, part);
		done += part;
		reply->sent += part;
		if (reply->sent < reply->bytes)
			break;
		stream->first = reply->next;
		if (!stream->first)
			stream->last = NULL;
		free_reply(reply);
	}
	if (!stream->first && stream->finished) {
		nghttp2_nv fields[2];
		char number[16], message[MOST_TOLD];

		*flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
		if (nghttp2_submit_trailer(session, id, fields, ending(stream, fields, number, message)))
			return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
		stream->sent = true;
	} else if (!done) {
		stream->waits = true;
		return NGHTTP2_ERR_DEFERRED;
	}
	return (ssize_t)done;
}

static int answer(struct client *client, struct stream *stream)
{
	nghttp2_nv fields[4] = {CONSTANT(":status", "200"), CONSTANT("content-type", "application/grpc")};
	nghttp2_data_provider data = {.source.ptr = stream, .read_callback = read_answer};
	char number[16], message[MOST_TOLD];

	if (stream->answered) {
		if (!stream->waits)
			return 0;
		stream->waits = false;
		return nghttp2_session_resume_data(client->session, stream->id);
	}
	if (!stream->first && !stream->finished)
		return 0;
	stream->answered = true;
	if (stream->first)
		return nghttp2_submit_response(client->session, stream->id, fields, 2, &data);
	stream->sent = true;
	size_t more = ending(stream, fields + 2, number, message);
	return nghttp2_submit_response(client->session, stream->id, fields, 2 + more, NULL);
}

/* A call has come to its end: nothing more is taken for it. */
static void finish(struct fm_front *front, struct stream *stream, int status)
{
	uint64_t spent_ns = fm_now_ns() - stream->begun_ns;
	size_t place = 0;

	stream->finished = true;
	stream->status = status;
	pthread_mutex_lock(&front->lock);
	front->running -= stream->asked;
	if (stream->method >= 0) {
		struct fm_counts *counts = &front->counts[stream->method];

		while (place < FM_BOUNDS && spent_ns > fm_bounds_ns[place])
			place++;
		counts->by_code[status >= 0 && status < FM_CODES ? status : 2]++;
		counts->within[place]++;
		counts->spent_ns += spent_ns;
	}
	pthread_mutex_unlock(&front->lock);
}

static int refuse(struct client *client, struct stream *stream, int status, const char *why)
{
	finish(client->front, stream, status);
	stream->told = strdup(why);
	stream->told_bytes = stream->told ? strlen(why) : 0;
	/* What else comes of it is not kept, and neither is what came. */
	free(stream->body);
	stream->body = NULL;
	return answer(client, stream);
}

static void mark_dirty(struct fm_front *front, struct client *client)
{
	if (client->dirty)
		return;
	client->dirty = true;
	client->next_dirty = front->dirty;
	front->dirty = client;
}

static void give(struct client *client, struct stream *stream, struct fm_reply *reply)
{
	if (reply->ends) {
		finish(client->front, stream, reply->status);
		stream->told = reply->told;
		stream->told_bytes = reply->told_bytes;
		reply->told = NULL;
	}
	if (reply->has_message) {
		reply->next = NULL;
		if (stream->last)
			stream->last->next = reply;
		else
			stream->first = reply;
		stream->last = reply;
	} else {
		free_reply(reply);
	}
	mark_dirty(client->front, client);
	answer(client, stream);
}

static void take_reply(struct fm_front *front, struct fm_reply *reply)
{
	struct client *client = front->clients[reply->call >> 32 & (PLACES - 1)];
	struct stream *stream = NULL;

	if (client && client->serial == reply->call >> 32)
		stream = nghttp2_session_get_stream_user_data(client->session, (int32_t)(uint32_t)reply->call);
	if (!stream || stream->finished) {
		free_reply(reply); /* whoever asked has gone */
		return;
	}
	give(client, stream, reply);
}

/* What clients say. */

static int on_begin(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
		return 0;
	struct client *client = user;
	struct stream *stream = calloc(1, sizeof(*stream));

	if (!stream)
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	stream->id = frame->hd.stream_id;
	stream->method = -1;
	stream->begun_ns = fm_now_ns();
	if (nghttp2_session_set_stream_user_data(session, stream->id, stream)) {
		free(stream);
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	}
	stream->place = &client->streams;
	stream->next = client->streams;
	if (stream->next)
		stream->next->place = &stream->next;
	client->streams = stream;
	return 0;
}

/* A time as grpc-timeout has it: at most eight digits and a unit. 0 for what is none. */
static uint64_t deadline_of(const uint8_t *value, size_t bytes)
{
	static const struct {
		char letter;
		uint64_t ns;
	} units[] = {{'H', 3600000000000u}, {'M', 60000000000u}, {'S', 1000000000u}, {'m', 1000000}, {'u', 1000}, {'n', 1}};
	uint64_t count = 0;

	if (bytes < 2 || bytes > 9)
		return 0;
	for (size_t i = 0; i + 1 < bytes; i++) {
		if (value[i] < '0' || value[i] > '9')
			return 0;
		count = count * 10 + (uint64_t)(value[i] - '0');
	}
	for (size_t i = 0; i < sizeof(units) / sizeof(units[0]); i++)
		if (value[bytes - 1] == (uint8_t)units[i].letter) {
			/* Longer than a century is as good as none. */
			uint64_t span = count > 3155760000000000000u / units[i].ns ? 0 : count * units[i].ns;

			return span ? fm_now_ns() + span : count ? 0 : fm_now_ns();
		}
	return 0;
}

static bool is(const uint8_t *value, size_t bytes, const char *text)
{
	return bytes == strlen(text) && !memcmp(value, text, bytes);
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_bytes,
		     const uint8_t *value, size_t bytes, uint8_t flags, void *user)
{
	struct client *client = user;
	struct stream *stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);

	if (!stream || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
		return 0;
	if (is(name, name_bytes, ":path")) {
		for (size_t i = 0; i < client->front->path_count; i++)
			if (is(value, bytes, client->front->paths[i].text))
				stream->method = (int)i;
	} else if (is(name, name_bytes, ":method")) {
		stream->post = is(value, bytes, "POST");
	} else if (is(name, name_bytes, "content-type")) {
		stream->grpc = bytes >= 16 && !memcmp(value, "application/grpc", 16);
	} else if (is(name, name_bytes, "grpc-timeout")) {
		stream->deadline_ns = deadline_of(value, bytes);
	}
	return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t bytes, void *user)
{
	struct client *client = user;
	struct stream *stream = nghttp2_session_get_stream_user_data(session, id);

	if (!stream || stream->asked || stream->finished)
		return 0;
	if (stream->body_bytes + bytes > client->front->most_bytes + FRAME_HEAD)
		return refuse(client, stream, FM_RESOURCE_EXHAUSTED, "the request is too long");
	if (stream->body_bytes + bytes > stream->room) {
		size_t room = 2 * (stream->body_bytes + bytes);
		unsigned char *body = realloc(stream->body, room);

		if (!body)
			return refuse(client, stream, FM_RESOURCE_EXHAUSTED, "the service is out of memory");
		stream->body = body;
		stream->room = room;
	}
	memcpy(stream->body + stream->body_bytes, data, bytes);
	stream->body_bytes += bytes;
	return 0;
}

static bool take_key(void *key, size_t place, struct fm_text first, struct fm_text second)
{
	*(struct fm_text *)key = first;
	return true;
}

/* Returns whether the answer was known. */
static bool give_kept(struct client *client, struct stream *stream)
{
	const struct fm_field field = {.number = client->front->paths[stream->method].kept_by};
	struct fm_text key = {"", 0};

	if (!field.number || !fm_read_fields(stream->body + FRAME_HEAD, stream->body_bytes - FRAME_HEAD, &field, 1,
					     take_key, &key))
		return false;
	struct fm_reply *reply = fm_kept_find(client->front->kept, key, call_of(client, stream->id));

	if (reply)
		give(client, stream, reply);
	return reply;
}

static int whole_request(struct client *client, struct stream *stream)
{
	const unsigned char *body = stream->body;

	if (!stream->post || !stream->grpc) {
		static const nghttp2_nv fields[] = {CONSTANT(":status", "415")};

		stream->method = -1;
		stream->answered = stream->sent = true;
		finish(client->front, stream, FM_UNIMPLEMENTED);
		return nghttp2_submit_response(client->session, stream->id, fields, 1, NULL);
	}
	if (stream->method < 0)
		return refuse(client, stream, FM_UNIMPLEMENTED, "there is no such call here");
	if (stream->body_bytes >= FRAME_HEAD && body[0])
		return refuse(client, stream, FM_UNIMPLEMENTED, "compressed requests are not taken");
	if (stream->body_bytes < FRAME_HEAD ||
	    ((size_t)body[1] << 24 | (size_t)body[2] << 16 | (size_t)body[3] << 8 | body[4]) !=
		    stream->body_bytes - FRAME_HEAD)
		return refuse(client, stream, FM_INTERNAL, "a request is one message, and this is not");
	if (give_kept(client, stream))
		return 0;
	const struct fm_front *front = client->front;

	if (front->paths[stream->method].endless)
		stream->deadline_ns = 0;
	else if (front->most_ns && (!stream->deadline_ns || stream->deadline_ns > stream->begun_ns + front->most_ns))
		stream->deadline_ns = stream->begun_ns + front->most_ns;
	if (hand_over(client, stream, stream->method))
		return refuse(client, stream, FM_RESOURCE_EXHAUSTED, "the service is out of memory");
	return 0;
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	if ((frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) ||
	    !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
		return 0;
	struct stream *stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);

	return stream && !stream->asked && !stream->finished ? whole_request(user, stream) : 0;
}

static void end_stream(struct client *client, struct stream *stream)
{
	if (stream->asked && !stream->finished) {
		hand_over(client, stream, FM_GONE);
		finish(client->front, stream, FM_CANCELLED);
	}
	client->used = ++client->front->uses;
	free_stream(stream);
}

static int on_close(nghttp2_session *session, int32_t id, uint32_t error, void *user)
{
	struct stream *stream = nghttp2_session_get_stream_user_data(session, id);

	if (stream)
		end_stream(user, stream);
	return 0;
}

/* Clients. */

/* Whether it has no call under way, and nothing of an answer's is still to be sent. */
static bool is_silent(const struct client *client)
{
	return !client->streams && client->out_begin == client->out_end;
}

static void drop_client(struct client *client)
{
	struct fm_front *front = client->front;

	for (struct client **at = &front->dirty; *at; at = &(*at)->next_dirty)
		if (*at == client) {
			*at = client->next_dirty;
			break;
		}
	front->clients[client->serial & (PLACES - 1)] = NULL;
	if (client->asked_ns)
		front->leaving--;
	else
		front->staying--;
	nghttp2_session_del(client->session);
	while (client->streams)
		end_stream(client, client->streams);
	close(client->fd);
	free(client->out);
	free(client);
}

/* The one that has been silent longest and has no call under way, of those who stay or of those who were asked to go;
 * NULL where all are busy. */
static struct client *longest_silent(const struct fm_front *front, bool leaving)
{
	struct client *found = NULL;

	for (size_t i = 0; i < PLACES; i++) {
		struct client *client = front->clients[i];

		if (client && !client->asked_ns == !leaving && is_silent(client) &&
		    (!found || client->used < found->used))
			found = client;
	}
	return found;
}

/* Those who say nothing keep nobody out. A call that crosses with this is still answered: gRPC's clients close when
 * they have read it and all their calls have ended, and connect again with the next one. Closing at once would fail
 * such a call in clients that write before they read. Returns whether there was one to ask. */
static bool ask_to_go(struct fm_front *front)
{
	struct client *client = longest_silent(front, false);

	if (!client)
		return false;
	client->asked_ns = fm_now_ns();
	front->staying--;
	front->leaving++;
	nghttp2_submit_shutdown_notice(client->session);
	mark_dirty(front, client);
	return true;
}

/* Returns PLACES where there is none. */
static uint32_t place_for_one_more(struct fm_front *front)
{
	uint32_t place = 0;

	if (front->staying == MOST_CLIENTS && !ask_to_go(front))
		return PLACES;
	while (place < PLACES && front->clients[place])
		place++;
	if (place < PLACES)
		return place;
	struct client *slow = longest_silent(front, true);

	if (!slow)
		return PLACES;
	place = slow->serial & (PLACES - 1);
	drop_client(slow);
	return place;
}

static void accept_client(struct fm_front *front)
{
	int fd = accept4(front->listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0) {
		int error = errno;

		if (error == EMFILE && !front->leaving)
			ask_to_go(front);
		/* Without descriptors or memory it goes on waiting, and this thread is not to spin on it. */
		if (error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOBUFS)
			usleep(10000);
		return;
	}
	uint32_t place = place_for_one_more(front);
	struct client *client = place < PLACES ? calloc(1, sizeof(*client)) : NULL;

	if (!client || !(client->out = malloc(WRITE_BYTES)) ||
	    nghttp2_session_server_new(&client->session, front->callbacks, client)) {
		close(fd);
		if (client)
			free(client->out);
		free(client);
		return;
	}
	client->fd = fd;
	client->front = front;
	client->used = ++front->uses;
	client->serial = ++front->generation * PLACES | place;
	front->clients[place] = client;
	front->staying++;

	nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, MOST_STREAMS},
					     {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW}};
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = client};

	nghttp2_submit_settings(client->session, NGHTTP2_FLAG_NONE, settings, 2);
	nghttp2_session_set_local_window_size(client->session, NGHTTP2_FLAG_NONE, 0, CLIENT_WINDOW);
	if (epoll_ctl(front->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
		drop_client(client);
}

/* Send what there is until the socket takes no more. Returns -1 where the client has gone or is to go. */
static int send_to(struct client *client)
{
	for (;;) {
		while (!client->blocked && client->out_begin < client->out_end) {
			ssize_t sent = send(client->fd, client->out + client->out_begin,
					    client->out_end - client->out_begin, MSG_NOSIGNAL | MSG_DONTWAIT);

			if (sent >= 0)
				client->out_begin += (size_t)sent;
			else if (errno == EAGAIN)
				client->blocked = true;
			else if (errno != EINTR)
				return -1;
		}
		if (client->blocked)
			return 0;
		client->out_begin = client->out_end = 0;
		/* A chunk may be as long as the largest frame, and is to be taken whole. */
		while (client->out_end < WRITE_BYTES - (16 << 10) - 16) {
			const uint8_t *chunk;
			ssize_t bytes = nghttp2_session_mem_send(client->session, &chunk);

			if (bytes < 0 || (size_t)bytes > WRITE_BYTES - client->out_end)
				return -1;
			if (!bytes)
				break;
			memcpy(client->out + client->out_end, chunk, (size_t)bytes);
			client->out_end += (size_t)bytes;
		}
		if (!client->out_end)
			break;
	}
	return nghttp2_session_want_read(client->session) || nghttp2_session_want_write(client->session) ? 0 : -1;
}

/* Returns -1 where the client has gone or is to go. */
static int send_goaway(struct client *client)
{
	nghttp2_submit_goaway(client->session, NGHTTP2_FLAG_NONE,
			      nghttp2_session_get_last_proc_stream_id(client->session), NGHTTP2_NO_ERROR, NULL, 0);
	return send_to(client);
}

/* Returns -1 where the client has gone or is to go. `hung_up`: nothing more will come. */
static int hear(struct client *client, bool hung_up)
{
	struct fm_front *front = client->front;

	for (;;) {
		ssize_t bytes = recv(client->fd, front->read_buffer, READ_BYTES, MSG_DONTWAIT);

		if (bytes < 0 && errno == EINTR)
			continue;
		if (bytes < 0)
			return errno == EAGAIN ? 0 : -1;
		client->used = ++front->uses;
		if (!bytes || nghttp2_session_mem_recv(client->session, front->read_buffer, (size_t)bytes) < 0)
			return -1;
		if (bytes < READ_BYTES && !hung_up)
			return 0; /* edges: a socket that was emptied tells of the next bytes */
	}
}

/* The thread. */

static void tell_ready(struct fm_front *front)
{
	if (!front->new_first)
		return;
	pthread_mutex_lock(&front->lock);
	if (front->last)
		front->last->next = front->new_first;
	else
		front->first = front->new_first;
	front->last = front->new_last;
	bool tell = !front->ready_told;
	front->ready_told = true;
	pthread_mutex_unlock(&front->lock);
	front->new_first = front->new_last = NULL;
	if (tell)
		eventfd_write(front->ready, 1);
}

static void send_dirty(struct fm_front *front)
{
	while (front->dirty) {
		struct client *client = front->dirty;

		front->dirty = client->next_dirty;
		client->dirty = false;
		if (send_to(client))
			drop_client(client);
	}
}

static void take_replies(struct fm_front *front)
{
	pthread_mutex_lock(&front->lock);
	struct fm_reply *reply = front->reply_first;
	front->reply_first = front->reply_last = NULL;
	front->woken = false;
	pthread_mutex_unlock(&front->lock);
	while (reply) {
		struct fm_reply *next = reply->next;

		take_reply(front, reply);
		reply = next;
	}
	send_dirty(front);
}

/* Tell those whose time is up. What they asked for goes on. Who was asked to go and did not is let go. */
static void look_at_deadlines(struct fm_front *front)
{
	uint64_t now_ns = fm_now_ns();

	if ((!front->most_ns && !front->leaving) || now_ns - front->look_ns < LOOK_MS * 1000000u)
		return;
	front->look_ns = now_ns;
	for (size_t i = 0; i < PLACES; i++) {
		struct client *client = front->clients[i];

		if (client && client->asked_ns && now_ns - client->asked_ns >= LEAVE_MS * 1000000u &&
		    is_silent(client)) {
			send_goaway(client);
			drop_client(client);
			continue;
		}
		if (!front->most_ns)
			continue;
		for (struct stream *stream = client ? client->streams : NULL; stream; stream = stream->next) {
			char told[256];

			if (!stream->asked || stream->finished || !stream->deadline_ns || stream->deadline_ns > now_ns)
				continue;
			const char *path = front->paths[stream->method].text, *name = strrchr(path, '/');

			snprintf(told, sizeof(told),
				 "%s has taken %.1f s; it goes on; see whether the store's disk answers",
				 name ? name + 1 : path, (double)(stream->deadline_ns - stream->begun_ns) / 1e9);
			refuse(client, stream, FM_DEADLINE_EXCEEDED, told);
			mark_dirty(front, client);
		}
	}
}

/* Returns whether the client is still there. */
static bool attend(struct client *client, uint32_t events)
{
	if (events & EPOLLOUT)
		client->blocked = false;
	if (!hear(client, events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) && !send_to(client))
		return true;
	drop_client(client);
	return false;
}

/* Whether something that was handed over is still to be sent. */
static bool owes(const struct client *client)
{
	if (client->out_begin < client->out_end)
		return true;
	for (const struct stream *stream = client->streams; stream; stream = stream->next)
		if (!stream->sent && (stream->first || stream->finished))
			return true;
	return false;
}

/* Nobody else is accepted; what was handed over is sent to whoever reads. */
static void say_goodbye(struct fm_front *front)
{
	uint64_t deadline_ns = fm_now_ns() + (uint64_t)front->grace_ms * 1000000u;
	struct epoll_event events[64];
	size_t owed = 0;

	epoll_ctl(front->epoll, EPOLL_CTL_DEL, front->listening, NULL);
	for (size_t i = 0; i < PLACES; i++) {
		struct client *client = front->clients[i];

		if (!client)
			continue;
		if (send_goaway(client) || !owes(client))
			drop_client(client);
		else
			owed++;
	}
	while (owed) {
		uint64_t now_ns = fm_now_ns();

		if (now_ns >= deadline_ns)
			break;
		/* Seldom is it as long as this: a turn that nothing came of looks at the time again. */
		uint64_t left_ms = (deadline_ns - now_ns) / 1000000u + 1;
		int count = epoll_wait(front->epoll, events, 64, left_ms < 1000 ? (int)left_ms : 1000);

		for (int i = 0; i < count; i++) {
			struct client *client = events[i].data.ptr;
			eventfd_t ignored;

			if (events[i].data.ptr == &front->wake) {
				eventfd_read(front->wake, &ignored);
				continue;
			}
			bool stays = attend(client, events[i].events);

			if (stays && !owes(client)) {
				drop_client(client);
				stays = false;
			}
			owed -= !stays;
		}
	}
	for (size_t i = 0; i < PLACES; i++)
		if (front->clients[i])
			drop_client(front->clients[i]);
}

static void *serve(void *argument)
{
	struct fm_front *front = argument;
	struct epoll_event events[64];

	for (;;) {
		bool looks = front->leaving || (front->most_ns && fm_front_running(front));
		int count = epoll_wait(front->epoll, events, 64, looks ? LOOK_MS : -1);
		bool woken = false, knocked = false;

		for (int i = 0; i < count; i++) {
			struct client *client = events[i].data.ptr;

			if (events[i].data.ptr == &front->listening) {
				knocked = true;
			} else if (events[i].data.ptr == &front->wake) {
				woken = true;
			} else {
				attend(client, events[i].events);
			}
		}
		/* Not among the others, of whom one may be dropped for it that has an event as well. */
		if (knocked)
			accept_client(front);
		look_at_deadlines(front);
		send_dirty(front);
		tell_ready(front);
		if (!woken)
			continue;
		eventfd_t ignored;

		eventfd_read(front->wake, &ignored);
		take_replies(front);
		tell_ready(front);
		pthread_mutex_lock(&front->lock);
		bool stopping = front->stopping;
		pthread_mutex_unlock(&front->lock);
		if (stopping) {
			say_goodbye(front);
			tell_ready(front);
			return NULL;
		}
	}
}

/* Life. */

static void let_go(struct fm_front *front)
{
	for (size_t i = 0; i < front->path_count; i++)
		free(front->paths[i].text);
	free(front->paths);
	free(front->counts);
	free(front->read_buffer);
	fm_kept_free(front->kept);
	if (front->callbacks)
		nghttp2_session_callbacks_del(front->callbacks);
	int fds[] = {front->epoll, front->wake, front->ready};

	for (size_t i = 0; i < 3; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	pthread_mutex_destroy(&front->lock);
	free(front);
}

static int prepare(struct fm_front *front, const struct fm_path *paths, size_t count)
{
	front->paths = calloc(count + 1, sizeof(*front->paths));
	front->counts = calloc(count + 1, sizeof(*front->counts));
	front->read_buffer = malloc(READ_BYTES);
	front->kept = fm_kept_new();
	if (!front->paths || !front->counts || !front->read_buffer || !front->kept || nghttp2_session_callbacks_new(&front->callbacks))
		return -1;
	for (; front->path_count < count; front->path_count++) {
		struct fm_path *path = &front->paths[front->path_count];

		path->endless = paths[front->path_count].endless;
		path->kept_by = paths[front->path_count].kept_by;
		if (!(path->text = strdup(paths[front->path_count].text)))
			return -1;
	}
	nghttp2_session_callbacks_set_on_begin_headers_callback(front->callbacks, on_begin);
	nghttp2_session_callbacks_set_on_header_callback(front->callbacks, on_header);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(front->callbacks, on_data);
	nghttp2_session_callbacks_set_on_frame_recv_callback(front->callbacks, on_frame);
	nghttp2_session_callbacks_set_on_stream_close_callback(front->callbacks, on_close);

	front->epoll = epoll_create1(EPOLL_CLOEXEC);
	front->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	front->ready = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (front->epoll < 0 || front->wake < 0 || front->ready < 0)
		return -1;
	/* Who else has the socket may take a connection before us, and nobody is to wait here for the next one. */
	int flags = fcntl(front->listening, F_GETFL);

	if (flags < 0 || fcntl(front->listening, F_SETFL, flags | O_NONBLOCK) < 0)
		return -1;
	struct epoll_event listening = {.events = EPOLLIN, .data.ptr = &front->listening};
	struct epoll_event wake = {.events = EPOLLIN, .data.ptr = &front->wake};

	if (epoll_ctl(front->epoll, EPOLL_CTL_ADD, front->listening, &listening) < 0 ||
	    epoll_ctl(front->epoll, EPOLL_CTL_ADD, front->wake, &wake) < 0)
		return -1;
	return 0;
}

int fm_thread_start(pthread_t *thread, void *(*run)(void *), void *argument)
{
	sigset_t all, before;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = pthread_create(thread, NULL, run, argument);

	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return error;
}

struct fm_front *fm_front_start(int listening, const struct fm_path *paths, size_t count, size_t most_bytes,
				uint64_t most_ns)
{
	struct fm_front *front = calloc(1, sizeof(*front));

	if (!front)
		return NULL;
	front->listening = listening;
	front->epoll = front->wake = front->ready = -1;
	front->most_bytes = most_bytes;
	front->most_ns = most_ns;
	pthread_mutex_init(&front->lock, NULL);
	errno = ENOMEM;
	int error = prepare(front, paths, count) ? errno : fm_thread_start(&front->thread, serve, front);

	if (error) {
		let_go(front);
		errno = error;
		return NULL;
	}
	return front;
}

void fm_front_keep(struct fm_front *front, struct fm_text key, struct fm_text message)
{
	fm_kept_put(front->kept, key, message);
}

void fm_front_forget(struct fm_front *front, struct fm_text key)
{
	fm_kept_forget(front->kept, key);
}

void fm_front_forget_all(struct fm_front *front)
{
	fm_kept_forget_all(front->kept);
}

int fm_front_ready(const struct fm_front *front)
{
	return front->ready;
}

struct fm_counts fm_front_counts(struct fm_front *front, size_t place)
{
	pthread_mutex_lock(&front->lock);
	struct fm_counts counts = front->counts[place];
	pthread_mutex_unlock(&front->lock);
	return counts;
}

size_t fm_front_running(struct fm_front *front)
{
	pthread_mutex_lock(&front->lock);
	size_t running = front->running;
	pthread_mutex_unlock(&front->lock);
	return running;
}

struct fm_request *fm_front_take(struct fm_front *front)
{
	eventfd_t ignored;

	eventfd_read(front->ready, &ignored);
	pthread_mutex_lock(&front->lock);
	struct fm_request *first = front->first;
	front->first = front->last = NULL;
	front->ready_told = false;
	pthread_mutex_unlock(&front->lock);
	return first;
}

void fm_front_reply(struct fm_front *front, struct fm_reply *first, struct fm_reply *last)
{
	pthread_mutex_lock(&front->lock);
	if (front->reply_last)
		front->reply_last->next = first;
	else
		front->reply_first = first;
	front->reply_last = last;
	pthread_mutex_unlock(&front->lock);
}

void fm_front_flush(struct fm_front *front)
{
	pthread_mutex_lock(&front->lock);
	bool wake = !front->woken;
	front->woken = true;
	pthread_mutex_unlock(&front->lock);
	if (wake)
		eventfd_write(front->wake, 1);
}

void fm_front_stop(struct fm_front *front, int grace_ms)
{
	pthread_mutex_lock(&front->lock);
	front->stopping = true;
	front->grace_ms = grace_ms;
	pthread_mutex_unlock(&front->lock);
	fm_front_flush(front);
	pthread_join(front->thread, NULL);
	close(front->listening);
	while (front->first) {
		struct fm_request *next = front->first->next;

		fm_request_free(front->first);
		front->first = next;
	}
	while (front->reply_first) {
		struct fm_reply *next = front->reply_first->next;

		free_reply(front->reply_first);
		front->reply_first = next;
	}
	let_go(front);
}
