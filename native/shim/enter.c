/* From a child of the shim to the runtime: only system calls, since it shares our memory. */
#include "shim.h"

#include "../uapi.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void give_up(struct shim_entry *entry, const char *step)
{
	entry->step = step;
	entry->error = errno;
	_exit(1);
}

static void enter(struct shim_entry *entry)
{
	sigset_t none;

	if (entry->copy_mounts && unshare(CLONE_NEWNS) < 0)
		give_up(entry, "copy the template namespace");
	for (int i = 0; i < entry->tree_count; i++)
		if (syscall(SYS_move_mount, entry->trees[i].fd, "", AT_FDCWD, entry->trees[i].target,
			    FM_MOVE_MOUNT_F_EMPTY_PATH) < 0)
			give_up(entry, "move_mount");
	for (int i = 0; i < 3; i++)
		if (entry->standard[i] != i && dup2(entry->standard[i], i) < 0)
			give_up(entry, "dup2");
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	execve(entry->command[0], entry->command, environ);
	give_up(entry, "execve");
}

pid_t shim_enter(struct shim_entry *entry)
{
	entry->step = NULL;
	entry->error = 0;
	pid_t pid = vfork();
	if (pid == 0)
		enter(entry);
	if (pid < 0) {
		entry->step = "vfork";
		entry->error = errno;
	}
	if (!entry->step)
		return pid;
	if (pid > 0)
		waitpid(pid, NULL, 0);
	return -1;
}
