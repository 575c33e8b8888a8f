/* emu.h - what the parts of the emulator tell each other: the blocks of core.cpp, the streams of runtime.cpp.
 *
 * Job:        one lock, the work that is waiting, how a fault is named.
 * Input:      -
 * Output:     -
 * Invariants: a fault ends the process with its name on stderr: whatever it would have computed does not count.
 */
#ifndef EMU_H
#define EMU_H

#include <string>
#include <vector>

#include "cuda_emu.h"

namespace emu {

/* Prints "cuda_emu: ..." and aborts. */
[[noreturn]] void fault(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

uint32_t random_below(uint32_t n); /* of QVL_EMU_SEED */

/* core.cpp: runs every block of a grid now. */
void run_grid(const char *name, dim3 grid, dim3 block, size_t smem, const std::function<void()> &body);

/* runtime.cpp: puts work behind what the stream has already. Device memory may be touched while it runs. name is for faults. */
void enqueue(cudaStream_t s, const char *name, std::function<void()> work);
/* runtime.cpp: which allocation holds [p, p + n), a fault when none does. what: who asks. */
void check_device(const void *p, size_t n, const char *what);

} // namespace emu

#endif
