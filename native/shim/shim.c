/*
 * flatmount-shim: stands between a container and whoever started it.
 *
 *   flatmount-shim run OPTION... -- RUNTIME ARGUMENT...
 *     --state DIR        the container's directory; `pid`, `exit`, `log` and `console` are there
 *     --report FD        told what happens, one line each: "error ERRNO STEP", "failed CODE", "started PID", "exited CODE",
 *                        or "exited CODE unexecuted" where the container never became its command
 *     --template FD      a mount namespace; the runtime starts in a copy of it
 *     --tree FD:PATH     a detached mount that is attached at PATH in that copy; may be repeated
 *     --owner UID:GID    who owns the pipes that the container writes to, so that it can open them again
 *     --log BYTES        keep its output in `log`, and in `log.1` what came before the last so many bytes
 *     --forward          write its output to our own standard output and error as well
 *     --bound            the container ends with whoever reads the report
 *     --console          the container has a terminal: serve `console`, and move what is typed and shown; the runtime's
 *                        argument "@console" becomes a path of that socket, which is short at any depth
 *     --after ARGUMENT... ;   execute this when all is over
 *
 *   flatmount-shim first FIFO NAME wait|end
 *     say that a container runs (flatmount storm)
 *
 * The runtime starts the container and ends; the container's first process is then a child of ours, since we are a
 * subreaper. We pass signals on to it, write down how it ended, and end with it.
 */
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { OUTPUT, ERRORS, STREAMS };

struct stream {
	const char *name;
	int read_end, write_end, forward;
};

struct shim {
	int state, report, template, forward, bound, console, listener, terminal, input, signals;
	uid_t uid;
	gid_t gid;
	size_t log_bytes;
	char **after;
	char console_path[64];
	struct shim_entry entry;
	struct shim_log log;
	struct stream streams[STREAMS];
	pid_t runtime, container;
	int runtime_status, status, over, unexecuted, pending_signal;
	char said[256]; /* the beginning of its output */
	size_t said_bytes;
};

static void tell(struct shim *shim, const char *word, int number, const char *more)
{
	char line[256];
	int bytes = snprintf(line, sizeof(line), "%s %d%s%s\n", word, number, *more ? " " : "", more);

	if (shim->report >= 0)
		shim_write_all(shim->report, line, (size_t)bytes);
}

__attribute__((noreturn)) static void fail(struct shim *shim, const char *step, int error)
{
	tell(shim, "error", error, step);
	exit(125);
}

static int exit_code(int status)
{
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/*
 * runc says that it started a container before the last execve, whose failure it writes to the container's own error
 * output, and ends with 1 (255 from 1.2 on). People know that as 127 and 126.
 */
static int final_code(const struct shim *shim)
{
	if (!shim->unexecuted)
		return exit_code(shim->status);
	return strstr(shim->said, "no such file or directory") ? 127 : 126;
}

/* Whether a process that ended and was not waited for yet still has the name that runc gives it before the execve. */
static int is_unexecuted(pid_t pid)
{
	char path[64], name[32] = "";

	snprintf(path, sizeof(path), "/proc/%d/comm", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t got = read(fd, name, sizeof(name) - 1);
	close(fd);
	return got > 0 && !strncmp(name, "runc:[2:INIT]", strlen("runc:[2:INIT]"));
}

/* What a later command reads: written whole or not at all. */
static void record_exit(struct shim *shim)
{
	char text[64];
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	int bytes = snprintf(text, sizeof(text), "%d %lld\n", final_code(shim),
			     now.tv_sec * 1000000000LL + now.tv_nsec);
	int fd = openat(shim->state, "exit.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return;
	if (shim_write_all(fd, text, (size_t)bytes) == 0)
		renameat(shim->state, "exit.new", shim->state, "exit");
	close(fd);
}

static pid_t read_pid(struct shim *shim)
{
	char text[32] = "";
	int fd = openat(shim->state, "pid", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);

	if (fd < 0)
		return -1;
	ssize_t got = read(fd, text, sizeof(text) - 1);
	close(fd);
	return got > 0 ? (pid_t)atol(text) : -1;
}

static void read_arguments(struct shim *shim, int count, char **arguments)
{
	int i = 0;

	for (; i < count && strcmp(arguments[i], "--") != 0; i++) {
		const char *option = arguments[i];
		if (!strcmp(option, "--forward")) {
			shim->forward = 1;
		} else if (!strcmp(option, "--bound")) {
			shim->bound = 1;
		} else if (!strcmp(option, "--console")) {
			shim->console = 1;
		} else if (!strcmp(option, "--after")) {
			shim->after = &arguments[i + 1];
			while (i < count && strcmp(arguments[i], ";") != 0)
				i++;
			arguments[i] = NULL;
		} else if (++i >= count) {
			fail(shim, option, EINVAL);
		} else if (!strcmp(option, "--state")) {
			shim->state = open(arguments[i], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
			if (shim->state < 0)
				fail(shim, "open the container's directory", errno);
		} else if (!strcmp(option, "--report")) {
			shim->report = atoi(arguments[i]);
		} else if (!strcmp(option, "--template")) {
			shim->template = atoi(arguments[i]);
		} else if (!strcmp(option, "--tree")) {
			char *path = strchr(arguments[i], ':');
			if (!path || shim->entry.tree_count == SHIM_MOST_TREES)
				fail(shim, "--tree", EINVAL);
			shim->entry.trees[shim->entry.tree_count++] = (struct shim_tree){atoi(arguments[i]), path + 1};
		} else if (!strcmp(option, "--owner")) {
			char *group = strchr(arguments[i], ':');
			if (!group)
				fail(shim, option, EINVAL);
			shim->uid = (uid_t)strtoul(arguments[i], NULL, 10);
			shim->gid = (gid_t)strtoul(group + 1, NULL, 10);
		} else if (!strcmp(option, "--log")) {
			shim->log_bytes = strtoull(arguments[i], NULL, 10);
		} else {
			fail(shim, option, EINVAL);
		}
	}
	if (i + 1 >= count || shim->state < 0)
		fail(shim, "usage", EINVAL);
	shim->entry.command = &arguments[i + 1];
}

static void block_signals(struct shim *shim)
{
	sigset_t all;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	signal(SIGPIPE, SIG_IGN);
	shim->signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	if (shim->signals < 0)
		fail(shim, "signalfd", errno);
}

static void make_streams(struct shim *shim)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null < 0)
		fail(shim, "open /dev/null", errno);
	shim->input = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
	shim->entry.standard[0] = shim->console ? null : STDIN_FILENO;
	for (int i = 0; i < STREAMS; i++) {
		int ends[2];
		if (pipe2(ends, O_CLOEXEC) < 0 || fcntl(ends[0], F_SETFL, O_NONBLOCK) < 0 ||
		    fchown(ends[1], shim->uid, shim->gid) < 0)
			fail(shim, "make a pipe", errno);
		shim->streams[i] = (struct stream){
			.name = i == OUTPUT ? "stdout" : "stderr",
			.read_end = ends[0],
			.write_end = ends[1],
			.forward = shim->forward ? fcntl(i + 1, F_DUPFD_CLOEXEC, 3) : -1,
		};
		shim->entry.standard[i + 1] = ends[1];
	}
	if (shim->console && (shim->listener = shim_console_listen(shim->state)) < 0)
		fail(shim, "listen for the terminal", errno);
	snprintf(shim->console_path, sizeof(shim->console_path), "/proc/%d/fd/%d/console", getpid(), shim->state);
	for (char **word = shim->entry.command; *word; word++)
		if (!strcmp(*word, "@console"))
			*word = shim->console_path;
	shim->log.fd = -1;
	if (shim->log_bytes && shim_log_open(&shim->log, shim->state, shim->log_bytes) < 0)
		fail(shim, "open the log", errno);
}

static void let_go_of_standard(void)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	for (int i = 0; i < 3 && null >= 0; i++)
		dup2(null, i);
}

static void start_runtime(struct shim *shim)
{
	int home = -1;

	if (shim->template >= 0) {
		/* The wait for the container is done at home: a template that we held would outlive whoever made it. */
		home = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
		if (home < 0 || setns(shim->template, CLONE_NEWNS) < 0)
			fail(shim, "setns to the template namespace", errno);
		shim->entry.copy_mounts = 1;
	}
	shim->runtime = shim_enter(&shim->entry);
	if (shim->runtime < 0)
		fail(shim, shim->entry.step, shim->entry.error);
	if (shim->template >= 0) {
		if (setns(home, CLONE_NEWNS) < 0)
			fail(shim, "setns back", errno);
		close(home);
		close(shim->template);
	}
	for (int i = 0; i < shim->entry.tree_count; i++)
		close(shim->entry.trees[i].fd);
	for (int i = 0; i < STREAMS; i++)
		close(shim->streams[i].write_end);
	let_go_of_standard();
}

/* Returns 0 when there is nothing to read now, -1 when there never will be. */
static int move_some(struct shim *shim, int from, const char *name, int forward)
{
	char data[16384];
	ssize_t got = read(from, data, sizeof(data));

	if (got < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -1;
	if (got == 0)
		return -1;
	size_t room = sizeof(shim->said) - 1 - shim->said_bytes, kept = (size_t)got < room ? (size_t)got : room;
	memcpy(shim->said + shim->said_bytes, data, kept);
	shim->said_bytes += kept;
	shim_log_write(&shim->log, name, data, (size_t)got);
	if (forward >= 0)
		shim_write_all(forward, data, (size_t)got);
	return 1;
}

static void move_stream(struct shim *shim, struct stream *stream)
{
	if (stream->read_end >= 0 && move_some(shim, stream->read_end, stream->name, stream->forward) < 0) {
		close(stream->read_end);
		stream->read_end = -1;
	}
}

static void move_typed(struct shim *shim)
{
	char data[4096];
	ssize_t got = read(shim->input, data, sizeof(data));

	if (got > 0 && shim_write_all(shim->terminal, data, (size_t)got) == 0)
		return;
	close(shim->input);
	shim->input = -1;
}

/* The terminal takes on the size of the one that we were given. */
static void pass_size_on(struct shim *shim)
{
	struct winsize size;

	if (shim->terminal >= 0 && shim->input >= 0 && ioctl(shim->input, TIOCGWINSZ, &size) == 0)
		ioctl(shim->terminal, TIOCSWINSZ, &size);
}

static void runtime_ended(struct shim *shim, int status)
{
	shim->runtime = 0;
	if (status != 0) {
		tell(shim, "failed", exit_code(status), "");
		exit(125);
	}
	shim->container = read_pid(shim);
	if (shim->container <= 0)
		fail(shim, "read the container's pid", EPROTO);
	/* One that the runtime itself waited for, or gave to somebody else, would be waited for in vain. */
	siginfo_t unused;
	if (waitid(P_PID, (id_t)shim->container, &unused, WEXITED | WNOHANG | WNOWAIT) < 0)
		fail(shim, "wait for the container", errno);
	tell(shim, "started", shim->container, "");
	if (shim->pending_signal)
		kill(shim->container, shim->pending_signal);
}

static void reap(struct shim *shim)
{
	pid_t pid;
	int status;

	/* The runtime first: until it has ended, nobody knows which of the others is the container. */
	while (shim->runtime > 0) {
		pid = waitpid(shim->runtime, &status, WNOHANG);
		if (pid == 0 || (pid < 0 && errno != EINTR))
			return;
		if (pid > 0)
			runtime_ended(shim, status);
	}
	/* Looked at before it is waited for, whenever it ends: its name goes with that. */
	for (;;) {
		siginfo_t ended = {0};
		if (waitid(P_ALL, 0, &ended, WEXITED | WNOHANG | WNOWAIT) < 0 || ended.si_pid == 0)
			return;
		if (ended.si_pid == shim->container && ended.si_code == CLD_EXITED && ended.si_status != 0)
			shim->unexecuted = is_unexecuted(ended.si_pid);
		if (waitpid(ended.si_pid, &status, WNOHANG) == ended.si_pid && ended.si_pid == shim->container) {
			shim->status = status;
			shim->over = 1;
		}
	}
}

static void take_signals(struct shim *shim)
{
	struct signalfd_siginfo info;

	while (read(shim->signals, &info, sizeof(info)) == sizeof(info)) {
		int number = (int)info.ssi_signo;
		if (number == SIGCHLD)
			reap(shim);
		else if (number == SIGWINCH)
			pass_size_on(shim);
		else if (number == SIGPIPE || info.ssi_code == SI_KERNEL)
			continue;
		else if (shim->container > 0)
			kill(shim->container, number);
		else if (number == SIGTERM && shim->pending_signal == SIGTERM)
			kill(shim->runtime, SIGKILL); /* asked twice: whoever asks does not wait any more */
		else
			shim->pending_signal = number;
	}
}

static void wait_for_events(struct shim *shim)
{
	/* What the runtime itself says goes the same way as the container's output: nothing moves until it has ended. */
	int moving = shim->container > 0;
	struct pollfd events[] = {
		{shim->signals, POLLIN, 0},
		{moving ? shim->streams[OUTPUT].read_end : -1, POLLIN, 0},
		{moving ? shim->streams[ERRORS].read_end : -1, POLLIN, 0},
		{shim->listener, POLLIN, 0},
		{moving ? shim->terminal : -1, POLLIN, 0},
		{moving && shim->terminal >= 0 ? shim->input : -1, POLLIN, 0},
		{shim->bound ? shim->report : -1, 0, 0}, /* POLLERR: nobody reads it any more */
	};

	if (poll(events, sizeof(events) / sizeof(events[0]), -1) < 0)
		return;
	if (events[1].revents)
		move_stream(shim, &shim->streams[OUTPUT]);
	if (events[2].revents)
		move_stream(shim, &shim->streams[ERRORS]);
	if (events[3].revents) {
		shim->terminal = shim_console_accept(shim->listener);
		close(shim->listener);
		shim->listener = -1;
		if (shim->terminal < 0)
			fail(shim, "take the terminal", EPROTO);
		unlinkat(shim->state, "console", 0);
		pass_size_on(shim);
	}
	/* EIO: nobody has the other side open, for the moment or for good; the container's end tells. */
	if (events[4].revents && move_some(shim, shim->terminal, "stdout", shim->streams[OUTPUT].forward) < 0) {
		close(shim->terminal);
		shim->terminal = -1;
	}
	if (events[5].revents)
		move_typed(shim);
	if (events[6].revents) {
		shim->bound = 0;
		kill(moving ? shim->container : shim->runtime, SIGKILL);
	}
	if (events[0].revents)
		take_signals(shim);
}

/* What was written before the end; a process that it left behind may hold the pipes open, and is not waited for. */
static void drain(struct shim *shim)
{
	for (int i = 0; i < STREAMS; i++) {
		struct stream *stream = &shim->streams[i];
		while (stream->read_end >= 0 && move_some(shim, stream->read_end, stream->name, stream->forward) > 0)
			;
	}
	if (shim->terminal >= 0) {
		fcntl(shim->terminal, F_SETFL, O_NONBLOCK);
		while (move_some(shim, shim->terminal, "stdout", shim->streams[OUTPUT].forward) > 0)
			;
	}
}

static int run(int count, char **arguments)
{
	struct shim shim = {
		.state = -1, .report = -1, .template = -1, .listener = -1, .terminal = -1, .input = -1, .uid = (uid_t)-1,
		.gid = (gid_t)-1,
	};

	/* Whatever we were given stays ours: a lock is held by being open, and nothing may reach the container. */
	if (syscall(SYS_close_range, 3U, ~0U, CLOSE_RANGE_CLOEXEC) < 0)
		fail(&shim, "close_range", errno);
	read_arguments(&shim, count, arguments);
	setsid();
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	block_signals(&shim);
	make_streams(&shim);
	start_runtime(&shim);
	while (!shim.over)
		wait_for_events(&shim);
	drain(&shim);
	record_exit(&shim);
	tell(&shim, "exited", final_code(&shim), shim.unexecuted ? "unexecuted" : "");
	if (shim.after) {
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		execv(shim.after[0], shim.after);
		return 125;
	}
	return 0;
}

int main(int count, char **arguments)
{
	if (count > 1 && !strcmp(arguments[1], "run"))
		return run(count - 2, arguments + 2);
	if (count > 1 && !strcmp(arguments[1], "first"))
		return shim_first(count - 2, arguments + 2);
	fprintf(stderr, "usage: flatmount-shim run OPTION... -- RUNTIME ARGUMENT...\n"
			"       flatmount-shim first FIFO NAME wait|end\n");
	return 2;
}
