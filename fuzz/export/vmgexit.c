#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The GHCB page. Source: 56421, GHCB layout. */
enum { GHCB_BYTES = 4096, GHCB_VALID_BITMAP = 0x3f0 };

static inline void ghcb_put(uint8_t *page, size_t offset, size_t width, uint64_t value)
{
	for (size_t byte = 0; byte < width; byte++)
		page[offset + byte] = (uint8_t)(value >> 8 * byte);
}

/* Store a field and mark it valid. */
static inline void ghcb_set(uint8_t *page, size_t offset, size_t width, uint64_t value)
{
	ghcb_put(page, offset, width, value);
	page[GHCB_VALID_BITMAP + offset / 64] |= (uint8_t)(1u << offset / 8 % 8);
}

/* Store bytes as they are. */
static inline void ghcb_raw(uint8_t *page, size_t offset, const void *bytes, size_t length)
{
	memcpy(page + offset, bytes, length);
}
