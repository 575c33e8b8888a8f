/* cuda.h - the state of an opened GPU, and what the files of the backend share.
 *
 * Job:        one stream, one arena, pinned staging, failures; which of several GPUs it is.
 * Input:      -
 * Output:     -
 * Invariants: every op takes the lock, so threads may share a device; work is only enqueued, in order, on one stream;
 *             the arena belongs to the op that is being enqueued, which stream order makes safe;
 *             the first failure is kept, and sync reports it.
 */
#ifndef QVL__CUDA_H
#define QVL__CUDA_H

#include <atomic>
#include <cublasLt.h>
#include <mutex>

extern "C" {
#include "../plugin.h"
}
#include "divide.h"
#include "kernels/layout.cuh"

#define ARENA_BYTES ((size_t)96 << 20)  /* rounded rows, sums on their way to an epilogue, pieces of attention */
#define LT_BYTES ((size_t)32 << 20)     /* workspace of cuBLASLt, as its documentation asks for on Hopper */
#define STAGES 4                        /* parts of the staging memory, reused in turn */
#define STAGE_BYTES ((size_t)8 << 20)
#define GATHER_BYTES ((size_t)32 << 20) /* parts of several GPUs on their way together */
#define ROUNDED_ROWS 64                 /* from so many rows on, sums over GPUs may be sent in bf16 */
#define GRAPHS 64                       /* recorded steps that are kept */
#define LT_PLANS 256                    /* remembered choices of cuBLASLt */

/* The integer matrix that is being filled: the CPU rounds it, and it is uploaded when its last feature has come. */
struct filling {
    const void *data; /* of the GPU's matrix; NULL: none */
    qvl__matrix host;
    int features;
};

struct lt_plan {
    uint64_t key; /* 0: none */
    cublasLtMatmulAlgo_t algo;
    bool none; /* cuBLASLt has no product of this kind */
};

struct graph {
    uint64_t key[4], used;
    cudaGraphExec_t exec;
};

struct cuda {
    qvl__device device; /* first: a qvl__device * is a cuda * */
    const qvl__host *host;
    qvl__device *cpu;
    std::recursive_mutex *lock;
    int gpu, processors; /* processors: streaming multiprocessors */
    int rank, ranks;     /* this is number rank of the ranks GPUs that share a model (divide.h) */
    void *comm;          /* sums.cu; NULL with one GPU */
    float *gather;       /* GATHER_BYTES, with several */
    std::atomic<bool> *broken; /* with several: one of them has failed, nobody may wait for it any more */
    bool deterministic, first; /* first: of the devices over this GPU; its work goes before that of the one beside it */
    double memory;
    char isa[48], failure[256];
    int failed; /* QVL_E*, 0 while all is well */
    cudaStream_t stream;
    cublasLtHandle_t lt;
    char *arena, *lt_work;
    char *pinned; /* STAGES * STAGE_BYTES */
    cudaEvent_t staged[STAGES];
    int stage;
    size_t stage_at;
    filling fill;
    lt_plan plans[LT_PLANS];
    graph graphs[GRAPHS];
    uint64_t clock;
    graph *recording; /* NULL: none */
};

static inline cuda *of(qvl__device *d) { return reinterpret_cast<cuda *>(d); }
static inline int div_up(int a, int b) { return a / b + (a % b != 0); }
static inline int padded(int k) { return div_up(k, 32) * 32; }

/* Holds the device for one op. */
struct entered {
    cuda *c;
    explicit entered(qvl__device *d) : c(of(d)) {
        c->lock->lock();
        cudaSetDevice(c->gpu);
    }
    ~entered() { c->lock->unlock(); }
    cuda *operator->() const { return c; }
    operator cuda *() const { return c; }
    entered(const entered &) = delete;
};

/* Keeps the first failure, for sync. */
void cuda_failed(cuda *c, int code, const char *what, const char *why);
/* The same for a call of the runtime; true when it succeeded. */
bool cuda_ok(cuda *c, cudaError_t e, const char *what);

#define LAUNCH(c, kernel, grid, block, smem, ...)                              \
    do {                                                                       \
        QVL_LAUNCH(kernel, (grid), (block), (smem), (c)->stream, __VA_ARGS__); \
        cuda_ok((c), cudaGetLastError(), #kernel);                             \
    } while (0)

/* Allows a kernel more than 48 KiB of shared memory. */
template <typename K> static void allow_shared(cuda *c, K kernel, size_t bytes) {
    if (bytes > (48 << 10)) cuda_ok(c, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), "shared memory");
}

/* Bytes of a matrix's rows, rounded up so that scales behind them begin on 16 bytes. */
static inline size_t rows_bytes(qvl__type type, int n, int k) {
    size_t numbers = (size_t)n * (size_t)padded(k);
    size_t bytes = type == QVL__F32 ? 4 * numbers : type == QVL__Q8 || type == QVL__F8 ? numbers : type == QVL__Q4 ? numbers / 2 : 2 * numbers;
    return (bytes + 15) / 16 * 16;
}
/* This GPU's part of a matrix. */
static inline part part_of(const cuda *c, const qvl__matrix *m) { return part_of(m->n, m->k, &m->role, c->rank, c->ranks); }
static inline rows_of view(const cuda *c, const qvl__matrix *m) {
    part p = part_of(c, m);
    return rows_of{m->type, p.n, p.k, padded(p.k), m->data, (const uint16_t *)((const char *)m->data + rows_bytes(m->type, p.n, p.k))};
}
/* Of so many heads, this GPU's. */
static inline run heads_of(const cuda *c, int heads) { return cut_heads(heads, c->rank, c->ranks); }

/* plugin.cu */
/* first: false for a device beside another one over the same GPU. */
int cuda_open(cuda **out, qvl__device *cpu, const qvl__device_options *o, const qvl__host *host, int rank, bool first);
void cuda_close(cuda *c);
/* Waits for what was recorded into e, or with NULL for all of the stream. False after a failure, of another GPU too. */
bool cuda_wait(cuda *c, cudaEvent_t e);
void cuda_put(qvl__device *d, void *dst, const void *host, size_t size);
void *cuda_alloc(qvl__device *d, size_t size);
void cuda_free(qvl__device *d, void *p, size_t size);
/* sums.cu: among the GPUs that share a model; nothing with one. */
int cuda_join(cuda **gpus, int count, const qvl__host *host);
void cuda_leave(cuda *c);
bool cuda_lost(cuda *c); /* whether a GPU has failed; then this one waits for no other any more */
/* x[count] = the sum of x over all GPUs; the same bits on each. */
void cuda_sum(cuda *c, float *x, size_t count);
/* y[count] = (with add: +=) the sum of part over all GPUs, sent in bf16; rounded: room for as many bf16. */
void cuda_sum_rounded(cuda *c, float *y, const float *part, bf16 *rounded, int rows, int n, bool add);
/* Most rows of cuda_gather at once, where the largest part has `each` columns. */
int cuda_gather_rows(const cuda *c, int each);
/* Where this GPU's part [rows][each] of rows that are brought together goes. */
float *cuda_gather_part(const cuda *c, int rows, int each);
/* y[rows][n]: the parts of all, side by side. */
void cuda_gather(cuda *c, float *y, int rows, int each, int n);
/* parallel.cu: a device over several GPUs. */
int parallel_open(qvl__device **out, qvl__device *cpu, const qvl__device_options *o, const qvl__host *host);
/* Each fills in its part of the op table. */
void cuda_weights(qvl__device *d);   /* weights.cu */
void cuda_rows(qvl__device *d);      /* ops.cu */
void cuda_products(qvl__device *d);  /* gemm.cu */
void cuda_attention(qvl__device *d); /* attention.cu */
void cuda_moe(qvl__device *d);       /* moe.cu */
void cuda_draw(qvl__device *d);      /* draw.cu */

#endif
