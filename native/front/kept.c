#include "kept.h"

#include <stdlib.h>
#include <string.h>

#define CHAINS (1 << 14) /* a power of two */
#define MOST (4 * CHAINS)

struct entry {
	struct entry *next;
	uint64_t hash;
	size_t key_bytes, bytes;
	char text[]; /* the key and the message */
};

struct fm_kept {
	pthread_mutex_t lock; /* guards what follows */
	struct entry *chains[CHAINS];
	size_t count;
};

struct fm_kept *fm_kept_new(void)
{
	struct fm_kept *kept = calloc(1, sizeof(*kept));

	if (kept)
		pthread_mutex_init(&kept->lock, NULL);
	return kept;
}

void fm_kept_free(struct fm_kept *kept)
{
	if (!kept)
		return;
	fm_kept_forget_all(kept);
	pthread_mutex_destroy(&kept->lock);
	free(kept);
}

/* FNV-1a. Only root can ask, so nobody is to be kept from choosing keys of one chain. */
static uint64_t hash_of(struct fm_text key)
{
	uint64_t hash = 14695981039346656037u;

	for (size_t i = 0; i < key.bytes; i++)
		hash = (hash ^ (unsigned char)key.at[i]) * 1099511628211u;
	return hash ^ hash >> 32;
}

/* Where the entry of a key hangs, or would: at the end of its chain. */
static struct entry **place_of(struct fm_kept *kept, struct fm_text key, uint64_t hash)
{
	struct entry **place = &kept->chains[hash & (CHAINS - 1)];

	while (*place && ((*place)->hash != hash || (*place)->key_bytes != key.bytes ||
			  memcmp((*place)->text, key.at, key.bytes)))
		place = &(*place)->next;
	return place;
}

static void drop(struct fm_kept *kept, struct entry **place)
{
	struct entry *entry = *place;

	*place = entry->next;
	kept->count--;
	free(entry);
}

void fm_kept_put(struct fm_kept *kept, struct fm_text key, struct fm_text message)
{
	struct entry *entry = malloc(sizeof(*entry) + key.bytes + message.bytes);
	uint64_t hash = hash_of(key);

	if (entry) {
		*entry = (struct entry){.hash = hash, .key_bytes = key.bytes, .bytes = message.bytes};
		memcpy(entry->text, key.at, key.bytes);
		memcpy(entry->text + key.bytes, message.at, message.bytes);
	}
	pthread_mutex_lock(&kept->lock);
	struct entry **place = place_of(kept, key, hash);

	if (*place)
		drop(kept, place);
	if (entry && kept->count < MOST) {
		entry->next = kept->chains[hash & (CHAINS - 1)];
		kept->chains[hash & (CHAINS - 1)] = entry;
		kept->count++;
		entry = NULL;
	}
	pthread_mutex_unlock(&kept->lock);
	free(entry);
}

void fm_kept_forget(struct fm_kept *kept, struct fm_text key)
{
	uint64_t hash = hash_of(key);

	pthread_mutex_lock(&kept->lock);
	struct entry **place = place_of(kept, key, hash);

	if (*place)
		drop(kept, place);
	pthread_mutex_unlock(&kept->lock);
}

void fm_kept_forget_all(struct fm_kept *kept)
{
	pthread_mutex_lock(&kept->lock);
	for (size_t i = 0; i < CHAINS && kept->count; i++)
		while (kept->chains[i])
			drop(kept, &kept->chains[i]);
	pthread_mutex_unlock(&kept->lock);
}

struct fm_reply *fm_kept_find(struct fm_kept *kept, struct fm_text key, uint64_t call)
{
	uint64_t hash = hash_of(key);
	struct fm_reply *reply = NULL;

	pthread_mutex_lock(&kept->lock);
	struct entry *entry = *place_of(kept, key, hash);

	if (entry)
		reply = fm_reply_new(call, entry->text + entry->key_bytes, entry->bytes);
	pthread_mutex_unlock(&kept->lock);
	if (reply)
		reply->ends = true;
	return reply;
}
