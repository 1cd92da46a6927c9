/* See task.h. */
#include "task.h"

#include <errno.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

int fm_task_start(struct fm_task *task, int flags, int (*function)(void *), void *argument)
{
	sigset_t all;

	task->stack = mmap(NULL, FM_TASK_STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (task->stack == MAP_FAILED)
		return -1;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &task->signals);
	task->pid = clone(function, (char *)task->stack + FM_TASK_STACK_BYTES, CLONE_VM | CLONE_FILES | flags, argument);
	if (task->pid >= 0)
		return 0;

	int error = errno;
	pthread_sigmask(SIG_SETMASK, &task->signals, NULL);
	munmap(task->stack, FM_TASK_STACK_BYTES);
	errno = error;
	return -1;
}

int fm_task_end(struct fm_task *task, int kill_it)
{
	int status = 0, got;

	if (kill_it)
		kill(task->pid, SIGKILL);
	do
		got = waitpid(task->pid, &status, __WCLONE);
	while (got < 0 && errno == EINTR);
	pthread_sigmask(SIG_SETMASK, &task->signals, NULL);
	munmap(task->stack, FM_TASK_STACK_BYTES);
	return got >= 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
