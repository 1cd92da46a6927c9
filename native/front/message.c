/* Protobuf messages, as far as somebody wants them: reading strings and maps from strings to strings, writing strings. */
#include "front.h"

#include <stdlib.h>
#include <string.h>

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

struct reader {
	const unsigned char *at, *end;
};

static bool varint(struct reader *reader, uint64_t *value)
{
	*value = 0;
	for (unsigned shift = 0; shift < 64 && reader->at < reader->end; shift += 7) {
		unsigned char byte = *reader->at++;

		*value |= (uint64_t)(byte & 127) << shift;
		if (!(byte & 128))
			return true;
	}
	return false;
}

/* The next field: its number, its type, and for BYTES its content. What is of no interest is passed over. */
static bool next_field(struct reader *reader, uint64_t *number, unsigned *type, struct fm_text *content)
{
	uint64_t tag, value;

	if (!varint(reader, &tag))
		return false;
	*number = tag >> 3;
	*type = tag & 7;
	if (*type == VARINT)
		return varint(reader, &value);
	if (*type == BYTES && !varint(reader, &value))
		return false;
	if (*type == FIXED64)
		value = 8;
	else if (*type == FIXED32)
		value = 4;
	else if (*type != BYTES)
		return false;
	if (value > (uint64_t)(reader->end - reader->at))
		return false;
	*content = (struct fm_text){(const char *)reader->at, (size_t)value};
	reader->at += value;
	return *number != 0;
}

bool fm_read_fields(const unsigned char *message, size_t bytes, const struct fm_field *fields, size_t count,
		    bool (*found)(void *user, size_t place, struct fm_text first, struct fm_text second), void *user)
{
	struct reader reader = {message, message + bytes};

	while (reader.at < reader.end) {
		struct fm_text content, key = {"", 0}, value = {"", 0};
		uint64_t number;
		unsigned type;
		size_t place = 0;

		if (!next_field(&reader, &number, &type, &content))
			return false;
		while (place < count && fields[place].number != number)
			place++;
		if (place == count || type != BYTES)
			continue;
		if (!fields[place].is_map) {
			if (!found(user, place, content, value))
				return false;
			continue;
		}
		struct reader entry = {(const unsigned char *)content.at, (const unsigned char *)content.at + content.bytes};

		while (entry.at < entry.end) {
			struct fm_text part;

			if (!next_field(&entry, &number, &type, &part))
				return false;
			if (type == BYTES && number == 1)
				key = part;
			else if (type == BYTES && number == 2)
				value = part;
		}
		if (!found(user, place, key, value))
			return false;
	}
	return true;
}

static size_t varint_bytes(size_t value)
{
	size_t bytes = 1;

	while (value >>= 7)
		bytes++;
	return bytes;
}

static unsigned char *put_varint(unsigned char *at, size_t value)
{
	for (; value > 127; value >>= 7)
		*at++ = (unsigned char)(value | 128);
	*at++ = (unsigned char)value;
	return at;
}

size_t fm_string_bytes(size_t bytes)
{
	return 1 + varint_bytes(bytes) + bytes;
}

unsigned char *fm_put_tag(unsigned char *at, unsigned number, size_t bytes)
{
	*at++ = (unsigned char)(number << 3 | BYTES);
	return put_varint(at, bytes);
}

unsigned char *fm_put_string(unsigned char *at, unsigned number, struct fm_text text)
{
	at = fm_put_tag(at, number, text.bytes);
	memcpy(at, text.at, text.bytes);
	return at + text.bytes;
}
