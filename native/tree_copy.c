/* Copies that keep everything a file has, with owners moved into a container's range where that is asked for. */
#include "tree.h"

#include <endian.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#define XATTR_BYTES 65536

static bool map_id(const struct fm_id_range *ranges, size_t count, uint32_t *id)
{
	for (size_t i = 0; i < count; i++) {
		if (*id >= ranges[i].container && *id - ranges[i].container < ranges[i].size) {
			*id = ranges[i].host + (*id - ranges[i].container);
			return true;
		}
	}
	errno = EOVERFLOW;
	return false;
}

static int owners(const struct stat *st, const struct fm_owner_map *map, uint32_t *uid, uint32_t *gid)
{
	*uid = st->st_uid;
	*gid = st->st_gid;
	if (!map)
		return 0;
	return map_id(map->uids, map->uid_count, uid) && map_id(map->gids, map->gid_count, gid) ? 0 : -1;
}

/* linux/posix_acl_xattr.h: a version, then entries of tag, permissions and id, all little-endian. */
static int map_acl(uint8_t *value, ssize_t size, const struct fm_owner_map *map)
{
	for (ssize_t at = 4; at + 8 <= size; at += 8) {
		uint16_t tag;
		uint32_t id;

		memcpy(&tag, value + at, sizeof(tag));
		memcpy(&id, value + at + 4, sizeof(id));
		tag = le16toh(tag);
		id = le32toh(id);
		if (tag == 0x02 ? !map_id(map->uids, map->uid_count, &id)
				: tag == 0x08 && !map_id(map->gids, map->gid_count, &id))
			return -1;
		id = htole32(id);
		memcpy(value + at + 4, &id, sizeof(id));
	}
	return 0;
}

/*
 * A capability of version 2 belongs to the host's root, and the kernel ignores it in a user namespace whose root is
 * another; version 3 names the root it belongs to (capabilities(7), since Linux 4.14).
 */
static ssize_t map_capability(uint8_t *value, ssize_t size, const struct fm_owner_map *map)
{
	uint32_t magic, root = 0;

	if (size < (ssize_t)XATTR_CAPS_SZ_2)
		return size;
	memcpy(&magic, value, sizeof(magic));
	magic = le32toh(magic);
	if ((magic & VFS_CAP_REVISION_MASK) == VFS_CAP_REVISION_3 && size >= (ssize_t)XATTR_CAPS_SZ_3) {
		memcpy(&root, value + XATTR_CAPS_SZ_2, sizeof(root));
		root = le32toh(root);
	} else if ((magic & VFS_CAP_REVISION_MASK) != VFS_CAP_REVISION_2) {
		return size;
	}
	if (!map_id(map->uids, map->uid_count, &root))
		return -1;
	magic = htole32(VFS_CAP_REVISION_3 | (magic & VFS_CAP_FLAGS_MASK));
	root = htole32(root);
	memcpy(value, &magic, sizeof(magic));
	memcpy(value + XATTR_CAPS_SZ_2, &root, sizeof(root));
	return XATTR_CAPS_SZ_3;
}

static bool overlay_attribute(const char *name)
{
	return !strncmp(name, "trusted.overlay.", 16) || !strncmp(name, "user.overlay.", 13);
}

/* Links and nodes have no descriptor that takes attributes, hence paths through /proc/self/fd. */
static int copy_attributes(int from_fd, int to_fd, const char *entry, const struct fm_owner_map *map)
{
	char names_buffer[1024], *names = names_buffer, from[NAME_MAX + 32], to[NAME_MAX + 32];

	snprintf(from, sizeof(from), "/proc/self/fd/%d/%s", from_fd, entry);
	snprintf(to, sizeof(to), "/proc/self/fd/%d/%s", to_fd, entry);
	uint8_t *value = NULL;
	int failed = 0;
	ssize_t length = llistxattr(from, names, sizeof(names_buffer));

	if (length < 0 && errno == ERANGE) {
		names = malloc(XATTR_BYTES);
		length = names ? llistxattr(from, names, XATTR_BYTES) : -1;
	}
	if (length < 0)
		failed = errno == EOPNOTSUPP ? 0 : -1;
	for (char *name = names; !failed && length > 0 && name < names + length; name += strlen(name) + 1) {
		if (overlay_attribute(name))
			continue;
		if (!value && !(value = malloc(XATTR_BYTES + XATTR_CAPS_SZ_3)))
			failed = -1;
		ssize_t size = failed ? -1 : lgetxattr(from, name, value, XATTR_BYTES);

		if (size >= 0 && map && !strncmp(name, "system.posix_acl_", 17) && map_acl(value, size, map))
			size = -1;
		if (size >= 0 && map && !strcmp(name, "security.capability"))
			size = map_capability(value, size, map);
		failed = size < 0 ? -1 : lsetxattr(to, name, value, (size_t)size, 0);
	}
	int number = errno;

	free(value);
	if (names != names_buffer)
		free(names);
	errno = number;
	return failed;
}

static int copy_range(int from, int to, off_t start, off_t end)
{
	while (start < end) {
		off_t in = start, out = start;
		ssize_t done = copy_file_range(from, &in, to, &out, (size_t)(end - start), 0);

		if (done < 0 && (errno == EXDEV || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP)) {
			char buffer[65536];
			size_t want = end - start < (off_t)sizeof(buffer) ? (size_t)(end - start) : sizeof(buffer);

			done = pread(from, buffer, want, start);
			if (done > 0)
				done = pwrite(to, buffer, (size_t)done, start);
		}
		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -1;
		if (!done) {
			errno = EIO;
			return -1;
		}
		start += done;
	}
	return 0;
}

static int copy_data(int from, int to, off_t size)
{
	if (!size || !ioctl(to, FICLONE, from))
		return 0;
	if (ftruncate(to, size))
		return -1;
	for (off_t at = 0; at < size;) {
		off_t data = lseek(from, at, SEEK_DATA);

		if (data < 0)
			return errno == ENXIO ? 0 : -1;
		off_t hole = lseek(from, data, SEEK_HOLE);

		if (hole < 0 || copy_range(from, to, data, hole))
			return -1;
		at = hole;
	}
	return 0;
}

static int copy_file(int from, const char *name, int to, const struct stat *st, uint32_t uid, uint32_t gid,
		     const struct fm_owner_map *map)
{
	const struct timespec times[2] = {st->st_atim, st->st_mtim};
	int failed = -1, out = -1;
	int in = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

	if (in >= 0)
		out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	/* Owner before mode and capability: changing the owner clears both. */
	if (out >= 0)
		failed = copy_data(in, out, st->st_size) || fchown(out, uid, gid) || fchmod(out, st->st_mode & 07777) ||
			 copy_attributes(from, to, name, map) || futimens(out, times);
	int number = errno;

	if (in >= 0)
		close(in);
	if (out >= 0)
		close(out);
	errno = number;
	return failed ? -1 : 0;
}

static int make_link(int from, const char *name, int to)
{
	char target[4096];
	ssize_t length = readlinkat(from, name, target, sizeof(target));

	if (length < 0)
		return -1;
	if (length == sizeof(target)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	target[length] = 0;
	return symlinkat(target, to, name);
}

int fm_copy_entry(int from, const char *name, int to, const struct stat *st, const struct fm_owner_map *map)
{
	const struct timespec times[2] = {st->st_atim, st->st_mtim};
	uint32_t uid, gid;

	if (owners(st, map, &uid, &gid))
		return -1;
	if (S_ISREG(st->st_mode))
		return copy_file(from, name, to, st, uid, gid, map);

	bool link = S_ISLNK(st->st_mode);
	int failed = link ? make_link(from, name, to) : mknodat(to, name, (st->st_mode & S_IFMT) | 0600, st->st_rdev);

	return failed || fchownat(to, name, uid, gid, AT_SYMLINK_NOFOLLOW) ||
			       (!link && fchmodat(to, name, st->st_mode & 07777, 0)) ||
			       copy_attributes(from, to, name, map) ||
			       utimensat(to, name, times, AT_SYMLINK_NOFOLLOW)
		       ? -1
		       : 0;
}

int fm_copy_directory_attributes(int from, int to, const struct stat *st, const struct fm_owner_map *map)
{
	uint32_t uid, gid;

	if (owners(st, map, &uid, &gid))
		return -1;
	return fchown(to, uid, gid) || fchmod(to, st->st_mode & 07777) || copy_attributes(from, to, ".", map) ? -1 : 0;
}

/* Where the first name of a file with several names was copied to, so that the others become links to it. */
struct first_name {
	ino_t inode;
	char *path;
};

struct copying {
	int top;
	const struct fm_owner_map *map;
	struct first_name *names;
	size_t used, slots;
	uint64_t *entries;
	struct fm_tree_error *error;
	char path[4096];
};

static struct first_name *slot_of(struct first_name *names, size_t slots, ino_t inode)
{
	size_t at = (size_t)(inode * 0x9E3779B97F4A7C15ull >> 20) & (slots - 1);

	while (names[at].path && names[at].inode != inode)
		at = (at + 1) & (slots - 1);
	return &names[at];
}

static int remember(struct copying *copying, ino_t inode)
{
	if (2 * copying->used >= copying->slots) {
		size_t slots = copying->slots ? 2 * copying->slots : 1024;
		struct first_name *names = calloc(slots, sizeof(*names));

		if (!names)
			return -1;
		for (size_t i = 0; i < copying->slots; i++)
			if (copying->names[i].path)
				*slot_of(names, slots, copying->names[i].inode) = copying->names[i];
		free(copying->names);
		copying->names = names;
		copying->slots = slots;
	}
	struct first_name *slot = slot_of(copying->names, copying->slots, inode);

	if (!slot->path) {
		slot->inode = inode;
		slot->path = strdup(copying->path);
		copying->used++;
	}
	return slot->path ? 0 : -1;
}

static int copy_other(struct copying *copying, int from, int to, const char *name)
{
	struct stat st;

	if (fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW))
		return -1;
	if (st.st_nlink > 1 && copying->slots) {
		struct first_name *first = slot_of(copying->names, copying->slots, st.st_ino);

		if (first->path && !linkat(copying->top, first->path, to, name, 0))
			return 0;
		if (first->path && errno != EMLINK)
			return -1;
	}
	if (fm_copy_entry(from, name, to, &st, copying->map))
		return -1;
	return st.st_nlink > 1 ? remember(copying, st.st_ino) : 0;
}

static int copy_directory(struct copying *copying, int from, int to, unsigned depth, size_t length);

static int copy_child(struct copying *copying, int from, int to, const char *name, unsigned depth, size_t length)
{
	if (depth >= FM_TREE_DEPTH) {
		errno = ENAMETOOLONG;
		return -1;
	}
	if (mkdirat(to, name, 0700))
		return -1;
	int in = fm_open_child(from, name, FM_RESOLVE_NO_XDEV);
	int out = in < 0 ? -1 : fm_open_child(to, name, FM_RESOLVE_NO_XDEV);
	int failed = out < 0 ? -1 : copy_directory(copying, in, out, depth + 1, length);
	int number = errno;

	if (in >= 0)
		close(in);
	if (out >= 0)
		close(out);
	errno = number;
	return failed;
}

static int copy_directory(struct copying *copying, int from, int to, unsigned depth, size_t length)
{
	struct fm_entries entries;
	struct stat st;
	const char *name;
	unsigned char type;
	int more;

	if (fstat(from, &st) || fm_copy_directory_attributes(from, to, &st, copying->map) || fm_entries_open(&entries, from))
		return fm_tree_fail(copying->error, copying->path);
	while ((more = fm_entries_next(&entries, &name, &type)) > 0) {
		size_t inner = fm_path_push(copying->path, length, name);
		int failed = !inner			? -1
			     : type == DT_DIR ? copy_child(copying, from, to, name, depth, inner)
						: copy_other(copying, from, to, name);

		if (failed)
			fm_tree_fail(copying->error, copying->path);
		copying->path[length] = 0;
		if (failed)
			break;
		++*copying->entries;
	}
	fm_entries_close(&entries);

	const struct timespec times[2] = {st.st_atim, st.st_mtim};

	if (more < 0 || (!more && futimens(to, times)))
		fm_tree_fail(copying->error, copying->path);
	return copying->error->number ? -1 : 0;
}

int fm_copy_tree(int from, int to, const struct fm_owner_map *map, uint64_t *entries, struct fm_tree_error *error)
{
	struct copying copying = {.top = to, .map = map, .entries = entries, .error = error};
	int failed = copy_directory(&copying, from, to, 0, 0);

	for (size_t i = 0; i < copying.slots; i++)
		free(copying.names[i].path);
	free(copying.names);
	return failed;
}
