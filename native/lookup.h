/* Files of a root file system that nobody may be trusted with. */
#ifndef FLATMOUNT_LOOKUP_H
#define FLATMOUNT_LOOKUP_H

/*
 * Opens the regular file `path` for reading, looked up inside the directory `root` whatever its links say; nothing
 * else is opened. Returns a descriptor that is the caller's, or -1 with errno (EINVAL for what is no regular file).
 * Kernel: 5.6 (openat2). No Python.
 */
int fm_open_file_in_root(int root, const char *path);

#endif
