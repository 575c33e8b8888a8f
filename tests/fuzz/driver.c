/* driver.c - runs a fuzz target without a fuzzing engine: every seed file as it is, then random changes of it.
 *
 * usage: fuzz_X [-n CHANGES] [-s SEED] FILE...
 * The same targets link with clang's libFuzzer (make fuzz), which finds more; this keeps them honest in every test run
 * and under the sanitizers with gcc.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state;
static uint64_t rnd(void) { /* SplitMix64 */
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Changes some bytes, cuts, doubles or swaps a piece. */
static size_t change(uint8_t *p, size_t n, size_t cap) {
    for (int k = 1 + (int)(rnd() % 4); k > 0 && n > 0; k--) {
        size_t at = rnd() % n, len = 1 + rnd() % 16;
        if (at + len > n) len = n - at;
        switch (rnd() % 6) {
        case 0: p[at] = (uint8_t)rnd(); break;
        case 1: p[at] ^= (uint8_t)(1u << rnd() % 8); break;
        case 2: memset(p + at, rnd() % 2 ? 0xFF : 0, len); break;
        case 3: n = at; break;
        case 4:
            if (n + len <= cap) {
                memmove(p + at + len, p + at, n - at);
                n += len;
            }
            break;
        default: memmove(p + at, p + rnd() % (n - len + 1), len); break;
        }
    }
    return n;
}

int main(int argc, char **argv) {
    int changes = 100, files = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-n") == 0 && i + 1 < argc) changes = atoi(argv[++i]);
        else if (strcmp(argv[i], "-s") == 0 && i + 1 < argc) state = strtoull(argv[++i], NULL, 10);
        else {
            FILE *f = fopen(argv[i], "rb");
            if (!f) {
                perror(argv[i]);
                return 1;
            }
            static uint8_t seed[1 << 20], work[2 << 20];
            size_t n = fread(seed, 1, sizeof seed, f);
            fclose(f);
            files++;
            LLVMFuzzerTestOneInput(seed, n);
            for (int k = 0; k < changes; k++) {
                memcpy(work, seed, n);
                size_t m = change(work, n, sizeof work);
                uint8_t *exact = malloc(m ? m : 1); /* its end is the end of its memory, so that reads past it are seen */
                if (!exact) return 1;
                memcpy(exact, work, m);
                LLVMFuzzerTestOneInput(exact, m);
                free(exact);
            }
        }
    }
    printf("%s: %d seeds, %d changes of each: no crash\n", argv[0], files, changes);
    return files ? 0 : 2;
}
