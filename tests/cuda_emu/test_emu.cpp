/* test_emu.cpp - the emulator against itself.
 *
 * Job:        runs every case in child processes: without its fault it must be right, with it it must be caught.
 * Input:      the cases; QVL_EMU_TEST_SEEDS orders for each (default 8); argument: a file for the rows of the table.
 * Output:     exit status; rows "case<TAB>outcome" for table.sh.
 * Invariants: an outcome is that of the worst order: named in all, else wrong results in all, in some (order), in none
 *             (silent); it must be at least as good as the case expects of this build.
 */
#include <signal.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

#include "test_emu.h"

#ifdef __SANITIZE_ADDRESS__
extern "C" __attribute__((visibility("default"))) const char *__asan_default_options() { return "detect_leaks=0"; }
#endif

static const char *const grades[] = {"silent", "order", "wrong", "named"};

static int grade_of(const char *name) {
    for (int i = 0; i < 4; i++)
        if (std::string(grades[i]) == name) return i;
    abort();
}

static bool has_one_of(const std::string &text, const std::string &alternatives) {
    for (size_t at = 0, end; at <= alternatives.size(); at = end + 1) {
        end = std::min(alternatives.find('|', at), alternatives.size());
        if (text.find(alternatives.substr(at, end - at)) != std::string::npos) return true;
    }
    return false;
}

/* Runs the case in a child; its exit status as of exit(), -1 for a signal; and what it said. */
static int run(const Case &c, bool planted, int seed, std::string *said) {
    int fd[2];
    if (pipe(fd)) abort();
    fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
        dup2(fd[1], 2);
        close(fd[0]);
        close(fd[1]);
        setenv("QVL_EMU_SEED", std::to_string(seed).c_str(), 1);
        setenv("QVL_EMU_ASYNC", c.async ? c.async : "random", 1);
        setenv("QVL_EMU_DEVICES", "2", 1);
        setenv("QVL_EMU_MEMORY", "0x4000000", 1);
        setenv("QVL_EMU_DEADLOCK_MS", "300", 1);
        alarm(60);
        exit(c.run(planted));
    }
    close(fd[1]);
    char text[4096];
    said->clear();
    for (ssize_t n; (n = read(fd[0], text, sizeof text)) > 0;) said->append(text, (size_t)n);
    close(fd[0]);
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(int argc, char **argv) {
    const char *seeds_text = getenv("QVL_EMU_TEST_SEEDS"), *only = argc > 2 ? argv[2] : nullptr;
    int seeds = seeds_text ? atoi(seeds_text) : 8, build = EMU_KIND[0] == 'f' ? 0 : EMU_KIND[0] == 'c' ? 1 : 2, failures = 0, count = 0;
    FILE *table = argc > 1 ? fopen(argv[1], "w") : nullptr;
    std::vector<Case> cases = kernel_cases;
    cases.insert(cases.end(), host_cases.begin(), host_cases.end());
    for (const Case &c : cases) {
        if (only && std::string(c.name).find(only) == std::string::npos) continue;
        count++;
        std::string said, silent_said;
        bool passed = true;
        for (int seed = 1; seed <= seeds && passed; seed++)
            if (run(c, false, seed, &said) != right) {
                printf("FAIL %s: \"%s\" without a fault, order %d: %s\n", EMU_KIND, c.name, seed, said.c_str());
                passed = false;
            }
        if (c.message && passed) {
            int named = 0, caught = 0;
            for (int seed = 1; seed <= seeds; seed++) {
                int status = run(c, true, seed, &said);
                bool is_named = status == refused || has_one_of(said, c.message);
                named += is_named;
                caught += is_named || status == wrong;
                if (status != right && status != wrong && !is_named) {
                    printf("FAIL %s: \"%s\", order %d ended with %d and an unexpected message: %s\n", EMU_KIND, c.name, seed, status, said.c_str());
                    passed = false;
                }
                if (!is_named) silent_said = said;
                if (seed == 1 && only) printf("%s: %s\n", c.name, said.c_str());
            }
            int grade = named == seeds ? 3 : caught == seeds ? 2 : caught ? 1 : 0;
            if (table) fprintf(table, "%s\t%s\n", c.name, grades[grade]);
            if (grade < grade_of(c.expect[build])) {
                printf("FAIL %s: \"%s\" is %s (%d of %d orders named, %d caught), expected: %s. %s\n", EMU_KIND, c.name, grades[grade], named, seeds, caught, c.expect[build], silent_said.c_str());
                passed = false;
            }
        }
        failures += !passed;
    }
    if (table) fclose(table);
    printf("test_emu (%s): %d cases, %d orders each, %d failed\n", EMU_KIND, count, seeds, failures);
    return failures != 0;
}
