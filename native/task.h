/* Short-lived tasks that share our memory: what the user namespaces and the start check are made with. */
#ifndef FLATMOUNT_TASK_H
#define FLATMOUNT_TASK_H

#include <signal.h>
#include <stddef.h>
#include <sys/types.h>

#define FM_TASK_STACK_BYTES (64 * 1024)

struct fm_task {
	void *stack;
	pid_t pid;
	sigset_t signals;
};

/*
 * Starts `function(argument)` in a task made by clone(CLONE_VM | CLONE_FILES | flags): no page table and no
 * descriptor table is copied, so the cost does not grow with the process, and no descriptor of a mount is held a
 * second time (which would make its umount fail with EBUSY). The child sends no signal when it ends and runs with every
 * signal blocked (our handlers must not run there). It may only make system calls. It outlives the calling thread
 * unless `function` sets PR_SET_PDEATHSIG.
 * Returns 0, or -1 with errno.
 */
int fm_task_start(struct fm_task *task, int flags, int (*function)(void *), void *argument);

/* Waits for its end (after SIGKILL where `kill_it`) and frees it. Returns the exit code, or -1 if it was killed. */
int fm_task_end(struct fm_task *task, int kill_it);

#endif
