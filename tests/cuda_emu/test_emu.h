/* test_emu.h - the table of cases that the emulator is tested with.
 *
 * Job:        what a case is; helpers for its host code.
 * Input:      -
 * Output:     test_kernels.cpp and test_host.cpp each fill one list; test_emu.cpp runs them.
 * Invariants: run(planted) yields 0 right, 1 wrong, 2 refused with the expected error; a case has no state of its own.
 */
#ifndef TEST_EMU_H
#define TEST_EMU_H

#include <stdio.h>
#include <stdlib.h>
#include <vector>

#include "cuda_emu.h"

enum { right = 0, wrong = 1, refused = 2 };

struct Case {
    const char *name;
    int (*run)(bool planted);
    const char *message; /* alternatives with | between them; null: the case has no planted fault */
    const char *async;   /* QVL_EMU_ASYNC; null: random */
    const char *expect[3]; /* the least in fast, check, asan: named, wrong (in every seed), order (in some), silent */
};
extern const std::vector<Case> kernel_cases, host_cases;

#define OK(call)                                                                          \
    do {                                                                                  \
        auto error_ = (call);                                                             \
        if (error_) {                                                                     \
            fprintf(stderr, "%s:%d: %s gave %d\n", __FILE__, __LINE__, #call, (int)error_); \
            exit(wrong);                                                                  \
        }                                                                                 \
    } while (0)

/* n numbers on the device, copied from or to a host vector. */
template <class T> struct Array {
    T *p = nullptr;
    size_t n;
    explicit Array(size_t count) : n(count) { OK(cudaMalloc((void **)&p, n * sizeof(T))); }
    explicit Array(const std::vector<T> &from) : Array(from.size()) { OK(cudaMemcpy(p, from.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    std::vector<T> get() const {
        std::vector<T> h(n);
        OK(cudaMemcpy(h.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return h;
    }
    Array(const Array &) = delete;
};

inline std::vector<float> counting(size_t n) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) v[i] = (float)i;
    return v;
}
inline int same(const std::vector<float> &a, const std::vector<float> &b) { return a == b ? right : wrong; }

#endif
