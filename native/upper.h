/* The directories of a snapshot store's new snapshots. Which there are and why is written in
 * flatmount/snapshotter/trees.py. */
#ifndef FLATMOUNT_UPPER_H
#define FLATMOUNT_UPPER_H

struct fm_upper {
	long long number;
	int made, work, none; /* made: snapshots/NUMBER/{fs,work} are there, with mode 0755 and owner 0 */
	unsigned mode, uid, gid;
};

/* Make what one lacks below the directory `data`. Returns an errno, or 0; what a failure leaves is the caller's. */
int fm_make_upper(int data, const struct fm_upper *upper);

#endif
