/* emu.h - between the emulator's parts: not for kernels or host code under test.
 *
 * Job:        the running block as core, runtime and checker see it; enqueuing; memory; failure.
 * Input:      environment: QVL_EMU_SEED, QVL_EMU_ASYNC, QVL_EMU_DEVICES, QVL_EMU_MEMORY, QVL_EMU_NO_DEVICE.
 * Output:     declarations only.
 * Invariants: one mutex guards everything (Api); one block runs at a time; all names are hidden, so that two
 *             emulators may live in one process.
 */
#ifndef EMU_H
#define EMU_H

#include <stdarg.h>
#include <stdint.h>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_emu.h"

#pragma GCC visibility push(hidden)
namespace qvl_emu {

/* A misuse: prints "qvl-emu: ..." with kernel, block and thread where there is one, and aborts. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

uint64_t random64(); /* one stream of random numbers for all choices of order, from QVL_EMU_SEED */
inline unsigned random_below(unsigned n) { return (unsigned)((random64() & 0xffffffffu) * n >> 32); }
long env(const char *name, long otherwise);

/* ---- core ---- */

enum : int { warp_lanes = 32, max_threads = 1024 };
constexpr size_t max_shared = 227 << 10, default_shared = 48 << 10, stack_bytes = 256 << 10;

/* The range that the running kernel's stacks take: whoever's frame is inside is kernel code. */
struct Running {
    const char *kernel = nullptr; /* null: no block runs */
    uint3 block{};
    uint32_t block_number = 0;
    int threads = 0, thread = 0, device = 0; /* thread: the one that runs */
    char *stacks = nullptr, *shared = nullptr;
    size_t shared_bytes = 0;
    const void *args = nullptr;
    size_t args_bytes = 0;
};
extern Running running;
std::string thread_name(int thread); /* "(x,y,z)" of a thread of the running block */
char *shared_window();               /* start of the mapping in which shared memory is, with its guards */
size_t shared_window_bytes();

void run_kernel(const Kernel &k, dim3 grid, dim3 block, size_t shared_bytes, int device);
void install_fault_handler();

/* ---- devices and memory (emu_memory.cpp) ---- */

struct Allocation {
    char *start;
    size_t bytes, room; /* room: with the zone after it, up to the next allocation */
    int device;
    bool live;
};
const Allocation *find_allocation(const void *p); /* device memory, the zone after it and freed memory included */
bool in_device_memory(const void *p);             /* somewhere in a device's address range */
int address_range(const void *p, char **start, size_t *bytes); /* of the device that p belongs to; its number, -1: none */
bool is_pinned(const void *p, size_t bytes);
std::string describe(const void *p);
/* Stops with a name unless [p, p + bytes) is live memory of the device (-1: of any), or pinned host memory. */
void need_device_memory(const void *p, size_t bytes, int device, const char *who, const char *what);
void open_memory(int device); /* lets this process reach the device's memory, and no other device's; -1: all */
void close_memory();
void check_zones(int device, const char *who); /* has anything been written after the end of an allocation? */
size_t shared_limit(const void *function, int device);
int device_count();
cudaError_t no_device(); /* cudaSuccess where there is one */

/* ---- streams (emu_rt.cpp) ---- */

struct Api { /* held by every public function: the mutex; closes device memory to the host when the last one leaves */
    Api();
    ~Api();
};
cudaError_t result(cudaError_t e); /* remembers e for cudaGetLastError */
#define QVL_EMU_API                                        \
    Api api_;                                              \
    if (cudaError_t none_ = no_device()) return result(none_)

struct Stream;
struct Done { /* the end of one operation */
    bool happened = false;
    double when_ms = 0;
    uint32_t lane = 0, number = 0; /* its place in the order of its stream, for the checker */
    std::vector<uint32_t> before;  /* for each lane: the newest operation that ends before this one starts */
};
using Mark = std::shared_ptr<Done>;
struct Work { /* what a stream or a graph node does */
    std::string name;
    int device = 0; /* whose memory it may reach; -1: all */
    std::function<void()> run;
    bool host = false; /* runs with device memory closed and the mutex open */
    bool writes_host = false;
    /* A collective: called at each launch, yields what runs and whether it may yet. */
    std::function<void(Stream *, Mark, std::function<bool()> *may, std::function<void()> *run)> enter;
};
cudaError_t enqueue(Stream *s, Work work);
cudaError_t find_stream(cudaStream_t handle, Stream **out);
bool at_head(Stream *s, const Mark &m); /* is m the next operation of s, with all that it depends on done? */
int stream_device(const Stream *s);
bool is_capturing(const Stream *s);
bool host_writes_pending();
int current_device();
cudaError_t wait_for(const Mark &m); /* on the host */
Mark last_mark(Stream *s);
void drain(int device); /* runs all that is queued for a device */
/* For calls that might synchronise: an error, and the end of the capture, while this thread or (global mode) any captures. */
cudaError_t unsafe_in_capture();
/* Gives the mutex to other threads until something was enqueued; false after the time in which a deadlock is assumed. */
bool wait_for_others();
void something_changed();

/* ---- checker: empty in the fast and asan builds ---- */

#ifdef QVL_EMU_CHECK
void check_block_start();
void check_block_barrier();
void check_warp_sync(int warp, unsigned lanes);
void check_access(const void *p, size_t bytes, bool write, int thread);
void check_atomic(void *p, size_t bytes);
void check_async_issue(const void *shared, int thread);
void check_async_land(const void *shared, int thread);
void check_range(const void *p, size_t bytes, bool write); /* by a copy or a library call */
void check_operation(const Done *op, const char *name);   /* the operation that runs from here on; null: none */
void check_allocated(const Allocation *a); /* or freed */
/* emu_count.cpp: a launch begins and ends; one lane's part of a request, code: where it is made; a block's barriers and its end */
void count_launch(const Kernel &k, dim3 grid);
void count_end();
void count_access(const void *code, const void *p, size_t bytes, bool write, int thread);
void count_barrier();
#else
inline void check_block_start() {}
inline void check_block_barrier() {}
inline void check_warp_sync(int, unsigned) {}
inline void check_access(const void *, size_t, bool, int) {}
inline void check_atomic(void *, size_t) {}
inline void check_async_issue(const void *, int) {}
inline void check_async_land(const void *, int) {}
inline void check_range(const void *, size_t, bool) {}
inline void check_operation(const Done *, const char *) {}
inline void check_allocated(const Allocation *) {}
inline void count_access(const void *, const void *, size_t, bool, int) {}
inline void count_launch(const Kernel &, dim3) {}
inline void count_end() {}
inline void count_barrier() {}
#endif

#ifdef __SANITIZE_ADDRESS__
extern "C" __attribute__((visibility("default"))) void __asan_poison_memory_region(void const volatile *, size_t);
extern "C" __attribute__((visibility("default"))) void __asan_unpoison_memory_region(void const volatile *, size_t);
inline void poison(const void *p, size_t n) { __asan_poison_memory_region(p, n); }
inline void unpoison(const void *p, size_t n) { __asan_unpoison_memory_region(p, n); }
#else
inline void poison(const void *, size_t) {}
inline void unpoison(const void *, size_t) {}
#endif

} // namespace qvl_emu
#pragma GCC visibility pop
#endif
