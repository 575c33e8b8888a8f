/* asset.h - the page and its parts, linked into the binary.
 *
 * Job:        the table that tools/assets.sh writes.
 * Input:      -
 * Output:     assets, by URL path.
 * Invariants: bytes are static; an ETag changes with them.
 */
#ifndef SERVE_ASSET_H
#define SERVE_ASSET_H

#include <stddef.h>

typedef struct asset {
    const char *path, *type, *etag; /* etag with its quotes */
    const unsigned char *plain, *packed; /* packed: gzip, NULL when it does not pay */
    size_t plain_n, packed_n;
} asset;
extern const asset assets[];
extern const size_t assets_count;

#endif
