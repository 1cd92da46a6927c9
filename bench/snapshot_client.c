/*
 * A client of a snapshot service that itself takes next to nothing: gRPC over a unix socket, on libnghttp2.
 *
 *   snapshot_client SOCKET IN_FLIGHT CYCLES PARENT SNAPSHOTTER plain|mapped [closed|burst [CONNECTIONS]]
 *
 * A cycle is Prepare, Mounts and Remove of a key of its own, as containerd calls them for a container; `mapped` asks
 * for a user range. `closed` keeps IN_FLIGHT cycles under way until CYCLES have ended. `burst` begins IN_FLIGHT at
 * once, waits for the last of them and PAUSE_MS more, and so on until CYCLES have ended, a multiple of IN_FLIGHT. One
 * thread; a turn of its loop sends all that a connection has to say at once. The clock runs from when every connection
 * has the service's SETTINGS, and not in pauses; a call lasts from when it is handed to the library to its last byte.
 *
 * Prints one JSON object: calls_per_second; p50, p99 and max of a cycle and of each of its calls in ms; microseconds of
 * processor time that this process took for a call, the kernel's for its reads and writes included. Exits 1 with a line
 * that names the call when one is not answered as it should be, or when all is not done after DEADLINE_S; what was made
 * until then stays. Exits 2 for words it does not know.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "peer.h"

#define SERVICE "/containerd.services.snapshots.v1.Snapshots/"
#define CALLS 3
#define MOST_IN_FLIGHT 10000
#define MOST_CYCLES 1000000
#define MOST_CONNECTIONS 64
#define MOST_REFUSALS 100
#define PAUSE_MS 100
#ifndef DEADLINE_S
#define DEADLINE_S 60
#endif
#define REQUEST_BYTES 2048
#define PREFIX_BYTES 5	       /* of a message in gRPC: compressed or not, and its length */
#define WINDOW_BYTES (1 << 22) /* wide, so that answers do not wait for us */
#define MOUNTS_TAG 0x0a	       /* field 1 of MountsResponse: a message */

struct connection {
	struct peer peer;
	int greeted;
};

struct cycle {
	struct connection *connection;
	int number;
	int call;
	int refusals;
	uint64_t times_ns[CALLS + 1];
	char key[64];
	uint8_t request[REQUEST_BYTES];
	size_t length, sent;
	/* the answer */
	int http_status, grpc_status, is_grpc;
	char message[256];
	uint8_t head[PREFIX_BYTES + 1];
	size_t received;
};

static const char *const names[CALLS] = {"Prepare", "Mounts", "Remove"};
static const char *parent, *snapshotter;
static int mapped;
static struct connection *connections;
static int connection_count;
static struct cycle *slots;
static uint64_t deadline_ns;
static int next_number, limit, running;
/* nanoseconds: of each cycle, and behind them of each of its calls */
static uint64_t *took[1 + CALLS];
static int ended_cycles;

static void die(const char *format, ...)
{
	va_list values;

	va_start(values, format);
	fputs("snapshot_client: ", stderr);
	vfprintf(stderr, format, values);
	fputc('\n', stderr);
	va_end(values);
	exit(1);
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

/* Protocol Buffers: a field that is a string or a message. An empty string is not written. */
static size_t put(uint8_t *at, int field, const void *bytes, size_t length)
{
	size_t used = 0;

	if (!length)
		return 0;
	at[used++] = (uint8_t)(field << 3 | 2);
	for (size_t rest = length;; rest >>= 7) {
		at[used++] = (uint8_t)((rest & 127) | (rest > 127 ? 128 : 0));
		if (rest <= 127)
			break;
	}
	memcpy(at + used, bytes, length);
	return used + length;
}

static size_t put_text(uint8_t *at, int field, const char *text)
{
	return put(at, field, text, strlen(text));
}

static size_t put_label(uint8_t *at, const char *key, const char *value)
{
	uint8_t entry[128];
	size_t length = put_text(entry, 1, key);

	length += put_text(entry + length, 2, value);
	return put(at, 4, entry, length);
}

/* CreateRequest for Prepare, KeyRequest for the others, behind the prefix that gRPC wants. */
static void write_request(struct cycle *cycle)
{
	uint8_t *at = cycle->request;
	size_t length = PREFIX_BYTES;

	length += put_text(at + length, 1, snapshotter);
	length += put_text(at + length, 2, cycle->key);
	if (cycle->call == 0) {
		length += put_text(at + length, 3, parent);
		if (mapped) {
			length += put_label(at + length, "containerd.io/snapshot/uidmapping", "0:1048576:65536");
			length += put_label(at + length, "containerd.io/snapshot/gidmapping", "0:1048576:65536");
		}
		/* containerd would collect it while we use it */
		length += put_label(at + length, "containerd.io/gc.root", "bench");
	}
	size_t body = length - PREFIX_BYTES;
	at[0] = 0;
	for (int i = 0; i < 4; i++)
		at[1 + i] = (uint8_t)(body >> (24 - 8 * i));
	cycle->length = length;
	cycle->sent = 0;
}

static ssize_t read_request(nghttp2_session *session, int32_t stream, uint8_t *to, size_t room, uint32_t *flags,
			    nghttp2_data_source *source, void *unused)
{
	struct cycle *cycle = source->ptr;
	size_t count = cycle->length - cycle->sent;

	if (count > room)
		count = room;
	memcpy(to, cycle->request + cycle->sent, count);
	cycle->sent += count;
	if (cycle->sent == cycle->length)
		*flags |= NGHTTP2_DATA_FLAG_EOF;
	return (ssize_t)count;
}

#define HEADERS(call)                                                                                                  \
	{                                                                                                              \
		HEADER(":method", "POST"),                                                                             \
		HEADER(":scheme", "http"),                                                                             \
		HEADER(":path", SERVICE call),                                                                         \
		HEADER(":authority", "localhost"),                                                                     \
		HEADER("content-type", "application/grpc"),                                                            \
		HEADER("user-agent", "flatmount-bench"),                                                               \
		HEADER("te", "trailers"),                                                                              \
		HEADER("containerd-namespace", "default"),                                                             \
	}
#define HEADER_COUNT 8

static const nghttp2_nv headers[CALLS][HEADER_COUNT] = {HEADERS("Prepare"), HEADERS("Mounts"), HEADERS("Remove")};

static void call_next(struct cycle *cycle)
{
	nghttp2_data_provider body = {.source.ptr = cycle, .read_callback = read_request};

	write_request(cycle);
	cycle->http_status = cycle->is_grpc = 0;
	cycle->grpc_status = -1;
	cycle->message[0] = 0;
	cycle->received = 0;
	int stream = nghttp2_submit_request(cycle->connection->peer.session, NULL, headers[cycle->call], HEADER_COUNT,
					    &body, cycle);
	if (stream < 0)
		die("%s of %s: %s", names[cycle->call], cycle->key, nghttp2_strerror(stream));
}

static void begin(struct cycle *cycle)
{
	cycle->number = next_number++;
	cycle->call = cycle->refusals = 0;
	snprintf(cycle->key, sizeof(cycle->key), "bench-%d-%d", (int)getpid(), cycle->number);
	running++;
	cycle->times_ns[0] = now_ns();
	call_next(cycle);
}

/* Ends the process where an answer is not one message with status OK. */
static void check_answer(const struct cycle *cycle, uint32_t error)
{
	const char *call = names[cycle->call];
	const uint8_t *head = cycle->head;

	if (error)
		die("%s of %s: stream ended: %s", call, cycle->key, nghttp2_http2_strerror(error));
	if (cycle->http_status != 200)
		die("%s of %s: HTTP status %d", call, cycle->key, cycle->http_status);
	if (!cycle->is_grpc)
		die("%s of %s: the answer is not application/grpc", call, cycle->key);
	if (cycle->grpc_status < 0)
		die("%s of %s: no grpc-status", call, cycle->key);
	if (cycle->grpc_status)
		die("%s of %s: grpc-status %d: %s", call, cycle->key, cycle->grpc_status, cycle->message);
	if (cycle->received < PREFIX_BYTES || head[0])
		die("%s of %s: no message, or a compressed one", call, cycle->key);
	size_t told = (size_t)head[1] << 24 | (size_t)head[2] << 16 | (size_t)head[3] << 8 | head[4];
	if (told != cycle->received - PREFIX_BYTES)
		die("%s of %s: a message of %zu bytes in %zu", call, cycle->key, told, cycle->received - PREFIX_BYTES);
	if (cycle->call < 2 && (!told || head[PREFIX_BYTES] != MOUNTS_TAG))
		die("%s of %s: no mounts", call, cycle->key);
}

static int on_close(nghttp2_session *session, int32_t stream, uint32_t error, void *unused)
{
	struct cycle *cycle = nghttp2_session_get_stream_user_data(session, stream);

	if (!cycle)
		return 0;
	/* Nothing was done, and every client of gRPC asks again: some services count a stream that they have ended. */
	if (error == NGHTTP2_REFUSED_STREAM && cycle->refusals++ < MOST_REFUSALS) {
		call_next(cycle);
		return 0;
	}
	check_answer(cycle, error);
	cycle->times_ns[++cycle->call] = now_ns();
	if (cycle->call < CALLS) {
		call_next(cycle);
		return 0;
	}
	took[0][ended_cycles] = cycle->times_ns[CALLS] - cycle->times_ns[0];
	for (int i = 0; i < CALLS; i++)
		took[1 + i][ended_cycles] = cycle->times_ns[i + 1] - cycle->times_ns[i];
	ended_cycles++;
	running--;
	if (next_number < limit)
		begin(cycle);
	return 0;
}

/* gRPC writes what is not printable ASCII, and the percent sign, as %XX. */
static void take_message(char *to, size_t room, const char *from, size_t length)
{
	size_t used = 0;

	for (size_t i = 0; i < length && used + 1 < room; i++) {
		char digits[3] = {0};
		char *end = digits;
		if (from[i] == '%' && i + 2 < length) {
			memcpy(digits, from + i + 1, 2);
			long byte = strtol(digits, &end, 16);
			if (end == digits + 2) {
				to[used++] = (char)byte;
				i += 2;
				continue;
			}
		}
		to[used++] = from[i];
	}
	to[used] = 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
		     const uint8_t *value, size_t length, uint8_t flags, void *unused)
{
	struct cycle *cycle = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
	static const char grpc[] = "application/grpc";

	if (!cycle)
		return 0;
	/* The library ends names and values with a zero. */
	if (!strcmp((const char *)name, ":status"))
		cycle->http_status = atoi((const char *)value);
	else if (!strcmp((const char *)name, "content-type"))
		cycle->is_grpc = !strncmp((const char *)value, grpc, sizeof(grpc) - 1);
	else if (!strcmp((const char *)name, "grpc-status"))
		cycle->grpc_status = atoi((const char *)value);
	else if (!strcmp((const char *)name, "grpc-message"))
		take_message(cycle->message, sizeof(cycle->message), (const char *)value, length);
	return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *bytes, size_t length,
		   void *unused)
{
	struct cycle *cycle = nghttp2_session_get_stream_user_data(session, stream);

	if (!cycle)
		return 0;
	for (size_t i = 0; i < length && cycle->received + i < sizeof(cycle->head); i++)
		cycle->head[cycle->received + i] = bytes[i];
	cycle->received += length;
	return 0;
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *connection)
{
	if (frame->hd.type == NGHTTP2_SETTINGS && !(frame->hd.flags & NGHTTP2_FLAG_ACK))
		((struct connection *)connection)->greeted = 1;
	if (frame->hd.type == NGHTTP2_GOAWAY)
		die("the service says goodbye: %s: %.*s", nghttp2_http2_strerror(frame->goaway.error_code),
		    (int)frame->goaway.opaque_data_len, (const char *)frame->goaway.opaque_data);
	return 0;
}

static int on_invalid(nghttp2_session *session, const nghttp2_frame *frame, int error, void *unused)
{
	die("the service sends a frame (type %d) that is not HTTP/2: %s", frame->hd.type, nghttp2_strerror(error));
	return 0;
}

static int on_not_sent(nghttp2_session *session, const nghttp2_frame *frame, int error, void *unused)
{
	die("a frame (type %d) could not be sent: %s", frame->hd.type, nghttp2_strerror(error));
	return 0;
}

static void connect_to(struct connection *connection, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	static const nghttp2_settings_entry settings[] = {
		{NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
		{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW_BYTES},
	};
	nghttp2_session_callbacks *callbacks;

	if (strlen(path) >= sizeof(address.sun_path))
		die("%s: too long for a socket's name", path);
	strcpy(address.sun_path, path);
	connection->peer.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (connection->peer.fd < 0 || connect(connection->peer.fd, (struct sockaddr *)&address, sizeof(address)))
		die("connect to %s: %s", path, strerror(errno));

	if (nghttp2_session_callbacks_new(&callbacks))
		die("out of memory");
	nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
	nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
	nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
	nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(callbacks, on_invalid);
	nghttp2_session_callbacks_set_on_frame_not_send_callback(callbacks, on_not_sent);
	if (nghttp2_session_client_new(&connection->peer.session, callbacks, connection))
		die("out of memory");
	nghttp2_session_callbacks_del(callbacks);
	if (nghttp2_submit_settings(connection->peer.session, NGHTTP2_FLAG_NONE, settings, 2) ||
	    nghttp2_session_set_local_window_size(connection->peer.session, NGHTTP2_FLAG_NONE, 0, WINDOW_BYTES))
		die("out of memory");
}

static void heed(const char *problem)
{
	if (problem)
		die("the connection: %s", problem);
}

/* One turn: say what there is to say, wait for `until_ns` at the longest, and take what came. */
static void turn(uint64_t until_ns)
{
	struct pollfd waiting[MOST_CONNECTIONS];
	uint64_t now = now_ns();

	if (now >= deadline_ns)
		die("%d s have passed: %d cycles have ended and %d have not", DEADLINE_S, ended_cycles, running);
	if (until_ns > deadline_ns)
		until_ns = deadline_ns;
	for (int i = 0; i < connection_count; i++) {
		heed(peer_say(&connections[i].peer));
		waiting[i].fd = connections[i].peer.fd;
		waiting[i].events = connections[i].peer.ended ? POLLIN | POLLOUT : POLLIN;
	}
	int wait_ms = until_ns > now ? (int)((until_ns - now + 999999) / 1000000) : 0;
	int count = poll(waiting, (nfds_t)connection_count, wait_ms);
	if (count < 0 && errno != EINTR)
		die("poll: %s", strerror(errno));
	for (int i = 0; count > 0 && i < connection_count; i++)
		if (waiting[i].revents & ~POLLOUT)
			heed(peer_listen(&connections[i].peer));
}

static int by_size(const void *one, const void *other)
{
	uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;

	return a < b ? -1 : a > b;
}

/* A list with the value at `share` of each of `count` rows; rows are sorted. */
static void print_shares(const char *name, uint64_t *const *rows, int count, double share)
{
	printf(", \"%s\": ", name);
	for (int i = 0; i < count; i++)
		printf("%s%.4f",
		       count == 1 ? ""
		       : i	  ? ", "
				  : "[",
		       (double)rows[i][(int)((ended_cycles - 1) * share)] / 1e6);
	printf("%s", count == 1 ? "" : "]");
}

static void print_figures(uint64_t busy_ns, uint64_t spent_ns)
{
	static const struct {
		const char *of_cycle, *of_calls;
		double share;
	} shares[] = {{"p50_ms", "each_p50_ms", 0.5}, {"p99_ms", "each_p99_ms", 0.99}, {"max_ms", "each_max_ms", 1}};
	int calls = CALLS * ended_cycles;

	for (int i = 0; i < 1 + CALLS; i++)
		qsort(took[i], (size_t)ended_cycles, sizeof(took[i][0]), by_size);
	printf("{\"calls_per_second\": %.1f", calls / ((double)busy_ns / 1e9));
	for (size_t i = 0; i < sizeof(shares) / sizeof(shares[0]); i++) {
		print_shares(shares[i].of_cycle, took, 1, shares[i].share);
		print_shares(shares[i].of_calls, took + 1, CALLS, shares[i].share);
	}
	printf(", \"cpu_us_per_call\": %.2f}\n", (double)spent_ns / 1e3 / calls);
}

static int number(const char *word, int most)
{
	char *end;
	long value = strtol(word, &end, 10);

	return *word && !*end && value >= 1 && value <= most ? (int)value : 0;
}

int main(int argc, char **argv)
{
	int in_flight = argc > 2 ? number(argv[2], MOST_IN_FLIGHT) : 0;
	int cycles = argc > 3 ? number(argv[3], MOST_CYCLES) : 0;
	const char *way = argc > 7 ? argv[7] : "closed";
	int burst = !strcmp(way, "burst");
	uint64_t busy_ns = 0;

	connection_count = argc > 8 ? number(argv[8], MOST_CONNECTIONS) : 1;
	if (argc < 7 || argc > 9 || !in_flight || !cycles || !connection_count ||
	    (strcmp(argv[6], "plain") && strcmp(argv[6], "mapped")) || (!burst && strcmp(way, "closed")) ||
	    (burst && cycles % in_flight) || strlen(argv[4]) + strlen(argv[5]) > REQUEST_BYTES / 2) {
		fprintf(stderr,
			"usage: snapshot_client SOCKET IN_FLIGHT CYCLES PARENT SNAPSHOTTER plain|mapped "
			"[closed|burst [CONNECTIONS]]\n"
			"IN_FLIGHT is up to %d, CYCLES up to %d and in bursts a multiple of IN_FLIGHT, "
			"CONNECTIONS up to %d\n",
			MOST_IN_FLIGHT, MOST_CYCLES, MOST_CONNECTIONS);
		return 2;
	}
	parent = argv[4];
	snapshotter = argv[5];
	mapped = !strcmp(argv[6], "mapped");
	if (in_flight > cycles)
		in_flight = cycles;

	connections = calloc((size_t)connection_count, sizeof(*connections));
	slots = calloc((size_t)in_flight, sizeof(*slots));
	if (!connections || !slots)
		die("out of memory");
	for (int i = 0; i < 1 + CALLS; i++)
		if (!(took[i] = calloc((size_t)cycles, sizeof(took[i][0]))))
			die("out of memory");
	deadline_ns = now_ns() + DEADLINE_S * 1000000000ull;
	for (int i = 0; i < connection_count; i++)
		connect_to(&connections[i], argv[1]);
	for (int i = 0; i < connection_count; i++)
		while (!connections[i].greeted)
			turn(deadline_ns);

	uint64_t spent_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
	while (ended_cycles < cycles) {
		for (uint64_t until_ns = now_ns() + PAUSE_MS * 1000000ull; ended_cycles && now_ns() < until_ns;)
			turn(until_ns);
		limit = burst ? next_number + in_flight : cycles;
		uint64_t begun_ns = now_ns();
		for (int i = 0; i < in_flight; i++) {
			slots[i].connection = &connections[i % connection_count];
			begin(&slots[i]);
		}
		while (running)
			turn(deadline_ns);
		busy_ns += now_ns() - begun_ns;
	}
	print_figures(busy_ns, clock_ns(CLOCK_PROCESS_CPUTIME_ID) - spent_ns);
	for (int i = 0; i < connection_count; i++) {
		nghttp2_session_del(connections[i].peer.session);
		close(connections[i].peer.fd);
	}
	for (int i = 0; i < 1 + CALLS; i++)
		free(took[i]);
	free(connections);
	free(slots);
	return 0;
}
