/* embedding.c - the public face of embeddings: checked arguments, then encode/embedding.c.
 *
 * Job:        qvl_embedding_free, _data, _to_bytes (qvl_embedding_from_bytes needs a model: see qvl.c).
 * Input:      handles from callers.
 * Output:     as qvl.h says.
 * Invariants: an embedding is never changed here, so every call is safe from any thread.
 */
#include "../encode/encode.h"

void qvl_embedding_free(qvl_embedding *e) { qvl__embedding_free(e); }

int qvl_embedding_data(const qvl_embedding *e, const float **data, int *layers, int *tokens, int *hidden) {
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_embedding_data: e is NULL");
    if (data) *data = e->data;
    if (layers) *layers = e->layers;
    if (tokens) *tokens = e->tokens;
    if (hidden) *hidden = e->hidden;
    return 0;
}

int qvl_embedding_to_bytes(const qvl_embedding *e, void **data, size_t *size) {
    if (!data || !size) return qvl__fail(QVL_EINVAL, "qvl_embedding_to_bytes: data or size is NULL");
    *data = NULL;
    *size = 0;
    if (!e) return qvl__fail(QVL_EINVAL, "qvl_embedding_to_bytes: e is NULL");
    return qvl__embedding_to_bytes(e, data, size);
}
