/*
 * Merging the layers of a chain into one tree of hard links.
 *
 * Layers are walked one after the other, topmost first, and each into the same new tree: the first layer to have a name
 * decides it. A table in memory holds what is decided, so that a layer costs its own entries and nothing else, and the
 * number of layers has no limit.
 *
 *   in the layer              name not decided yet           decided as a directory       decided otherwise
 *   directory                 mkdirat, attributes, descend   descend unless closed        hidden
 *   char 0:0 (whiteout)       decided as absent              closed: lower ones hidden    hidden
 *   anything else             linkat                         closed                       hidden
 *
 * A directory with trusted.overlay.opaque=y is closed once its own layer has been walked.
 */
#include "tree.h"

#include <sys/sysmacros.h>
#include <sys/xattr.h>

enum { ABSENT, DIRECTORY, OTHER };

struct node {
	struct node *parent, *next_directory;
	struct timespec times[2];
	uint32_t hash;
	uint8_t kind;
	bool closed;
	char name[];
};

#define ARENA_BYTES (1 << 20)

struct arena {
	struct arena *next;
	size_t used;
	char bytes[];
};

struct merge {
	int top;
	bool last;
	long layer, root_source;
	struct node root, *directories;
	struct node **table;
	size_t used, slots;
	struct arena *arena;
	struct fm_flat_counts *counts;
	struct fm_tree_error *error;
	char path[4096];
};

static uint32_t hash_of(const struct node *parent, const char *name)
{
	uint64_t hash = 0xcbf29ce484222325ull ^ ((uint64_t)(uintptr_t)parent >> 4);

	while (*name)
		hash = (hash ^ (uint8_t)*name++) * 0x100000001b3ull;
	return (uint32_t)(hash ^ hash >> 32);
}

static struct node **slot_of(struct merge *merge, const struct node *parent, const char *name, uint32_t hash)
{
	size_t at = hash & (merge->slots - 1);

	while (merge->table[at] && (merge->table[at]->hash != hash || merge->table[at]->parent != parent ||
				    strcmp(merge->table[at]->name, name)))
		at = (at + 1) & (merge->slots - 1);
	return &merge->table[at];
}

static int grow(struct merge *merge)
{
	size_t slots = merge->slots ? 2 * merge->slots : 4096, old = merge->slots;
	struct node **table = calloc(slots, sizeof(*table)), **before = merge->table;

	if (!table)
		return -1;
	merge->table = table;
	merge->slots = slots;
	for (size_t i = 0; i < old; i++)
		if (before[i])
			*slot_of(merge, before[i]->parent, before[i]->name, before[i]->hash) = before[i];
	free(before);
	return 0;
}

static struct node *allocate(struct merge *merge, size_t bytes)
{
	bytes = (bytes + 15) & ~(size_t)15;
	if (!merge->arena || merge->arena->used + bytes > ARENA_BYTES) {
		struct arena *arena = malloc(sizeof(*arena) + ARENA_BYTES);

		if (!arena)
			return NULL;
		*arena = (struct arena){.next = merge->arena};
		merge->arena = arena;
	}
	struct node *node = (struct node *)(merge->arena->bytes + merge->arena->used);

	merge->arena->used += bytes;
	return node;
}

static struct node *find(struct merge *merge, const struct node *parent, const char *name)
{
	return merge->slots ? *slot_of(merge, parent, name, hash_of(parent, name)) : NULL;
}

static struct node *decide(struct merge *merge, struct node *parent, const char *name, int kind)
{
	if (2 * merge->used >= merge->slots && grow(merge))
		return NULL;
	struct node *node = allocate(merge, sizeof(*node) + strlen(name) + 1);

	if (!node)
		return NULL;
	*node = (struct node){.parent = parent, .hash = hash_of(parent, name), .kind = (uint8_t)kind};
	strcpy(node->name, name);
	*slot_of(merge, parent, name, node->hash) = node;
	merge->used++;
	if (kind == DIRECTORY) {
		node->next_directory = merge->directories;
		merge->directories = node;
	}
	return node;
}

static int is_whiteout(int fd, const char *name, unsigned char type)
{
	struct stat st;

	if (type != DT_CHR)
		return 0;
	if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW))
		return -1;
	return S_ISCHR(st.st_mode) && st.st_rdev == makedev(0, 0);
}

static bool is_opaque(int fd)
{
	char value[2];

	return fgetxattr(fd, "trusted.overlay.opaque", value, sizeof(value)) == 1 && value[0] == 'y';
}

/* A file system allows so many links to one inode (65,000 on ext4); past that this one name gets a file of its own. */
static int link_entry(struct merge *merge, int from, int to, const char *name)
{
	struct stat st;

	if (!linkat(from, name, to, name, 0)) {
		merge->counts->links++;
		return 0;
	}
	if (errno != EMLINK)
		return -1;
	merge->counts->copies++;
	return fstatat(from, name, &st, AT_SYMLINK_NOFOLLOW) || fm_copy_entry(from, name, to, &st, NULL) ? -1 : 0;
}

static int merge_other(struct merge *merge, int from, int to, struct node *parent, struct node *node, const char *name,
		       unsigned char type)
{
	if (node) {
		node->closed = true;
		return 0;
	}
	int whiteout = is_whiteout(from, name, type);

	if (whiteout < 0 || (!whiteout && link_entry(merge, from, to, name)))
		return -1;
	if (!merge->last && !decide(merge, parent, name, whiteout ? ABSENT : OTHER))
		return -1;
	return 0;
}

static int merge_content(struct merge *merge, int from, int to, struct node *parent, bool fresh, unsigned depth,
			 size_t length);

static int take_attributes(struct merge *merge, int from, int to, struct node *node)
{
	struct stat st;

	if (fstat(from, &st) || fm_copy_directory_attributes(from, to, &st, NULL))
		return -1;
	node->times[0] = st.st_atim;
	node->times[1] = st.st_mtim;
	merge->counts->directories++;
	return 0;
}

static int merge_directory(struct merge *merge, int from, int to, struct node *parent, struct node *node,
			   const char *name, unsigned depth, size_t length)
{
	bool fresh = !node;

	if (node && (node->kind != DIRECTORY || node->closed))
		return 0;
	if (depth >= FM_TREE_DEPTH) {
		errno = ENAMETOOLONG;
		return -1;
	}
	if (fresh && (mkdirat(to, name, 0700) || !(node = decide(merge, parent, name, DIRECTORY))))
		return -1;

	int in = fm_open_child(from, name, FM_RESOLVE_NO_XDEV);
	int out = in < 0 ? -1 : fm_open_child(to, name, FM_RESOLVE_NO_XDEV);
	int failed = out < 0 || (fresh && take_attributes(merge, in, out, node)) ||
		     merge_content(merge, in, out, node, fresh, depth + 1, length);

	if (!failed && !merge->last && is_opaque(in))
		node->closed = true;

	int number = errno;

	if (in >= 0)
		close(in);
	if (out >= 0)
		close(out);
	errno = number;
	return failed ? -1 : 0;
}

static int merge_content(struct merge *merge, int from, int to, struct node *parent, bool fresh, unsigned depth,
			 size_t length)
{
	struct fm_entries entries;
	const char *name;
	unsigned char type;
	int more;

	if (fm_entries_open(&entries, from))
		return fm_tree_fail(merge->error, merge->path);
	while ((more = fm_entries_next(&entries, &name, &type)) > 0) {
		size_t inner = fm_path_push(merge->path, length, name);
		struct node *node = inner && !fresh ? find(merge, parent, name) : NULL;
		int failed = !inner			? -1
			     : type == DT_DIR ? merge_directory(merge, from, to, parent, node, name, depth, inner)
						: merge_other(merge, from, to, parent, node, name, type);

		if (failed)
			fm_tree_fail(merge->error, merge->path);
		merge->path[length] = 0;
		if (failed)
			break;
	}
	if (more < 0)
		fm_tree_fail(merge->error, merge->path);
	fm_entries_close(&entries);
	return merge->error->number ? -1 : 0;
}

static size_t path_of(const struct node *node, char *path, size_t room)
{
	if (!node->parent)
		return 0;
	size_t length = path_of(node->parent, path, room), name = strlen(node->name);

	if (length + name + 2 > room)
		return 0;
	if (length)
		path[length++] = '/';
	strcpy(path + length, node->name);
	return length + name;
}

/* Times come last: every name that a lower layer adds to a directory changes them. */
static int set_times(struct merge *merge)
{
	for (struct node *node = merge->directories; node; node = node->next_directory) {
		if (!path_of(node, merge->path, sizeof(merge->path)))
			errno = ENAMETOOLONG;
		else if (!utimensat(merge->top, merge->path, node->times, AT_SYMLINK_NOFOLLOW))
			continue;
		return fm_tree_fail(merge->error, merge->path);
	}
	merge->path[0] = 0;
	return futimens(merge->top, merge->root.times) ? fm_tree_fail(merge->error, "") : 0;
}

static int merge_layer(struct merge *merge, int root, const char *source)
{
	int from = fm_open_child(root, source, 0);

	if (from < 0)
		return fm_tree_fail(merge->error, source);
	int failed = merge->layer == merge->root_source ? take_attributes(merge, from, merge->top, &merge->root) : 0;

	if (failed)
		fm_tree_fail(merge->error, source);
	else if (!merge->root.closed)
		failed = merge_content(merge, from, merge->top, &merge->root, merge->layer == 0, 0, 0);
	if (!failed && is_opaque(from))
		merge->root.closed = true;
	close(from);
	return failed;
}

int fm_flatten(int root, const char *const *sources, size_t count, long root_source, const char *target,
	       struct fm_flat_counts *counts, struct fm_tree_error *error)
{
	struct merge merge = {.root_source = root_source, .root = {.kind = DIRECTORY}, .counts = counts, .error = error};
	int failed = -1;

	if (mkdirat(root, target, 0755) || (merge.top = fm_open_child(root, target, 0)) < 0)
		return fm_tree_fail(error, target);
	if (fchmod(merge.top, 0755))
		fm_tree_fail(error, target);
	else
		failed = 0;
	for (size_t i = 0; !failed && i < count; i++) {
		merge.layer = (long)i;
		merge.last = i + 1 == count;
		failed = merge_layer(&merge, root, sources[i]);
	}
	if (!failed)
		failed = set_times(&merge);
	close(merge.top);
	free(merge.table);
	while (merge.arena) {
		struct arena *next = merge.arena->next;

		free(merge.arena);
		merge.arena = next;
	}
	return failed;
}
