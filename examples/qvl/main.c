/* main.c - the command-line tool: picks the command.
 *
 * Job:        qvl COMMAND ...; qvl help; qvl --version.
 * Input:      argv.
 * Output:     the command's exit code.
 * Invariants: nothing is loaded before the whole command line was understood.
 */
#include <string.h>

#include "tool.h"

static const tool_command *const commands[] = {&tool_describe, &tool_chat, &tool_info, &tool_tokenize, &tool_quantize, &tool_bench};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void overview(FILE *f) {
    fprintf(f, "qvl %s - Qwen3-VL on your own machine\n\nusage: qvl COMMAND [OPTION]... [ARGUMENT]...\n\n", qvl_version());
    for (int i = 0; i < N_COMMANDS; i++) fprintf(f, "  %-10s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(f, "\nqvl help COMMAND, or qvl COMMAND --help, tells the rest; qvl help options lists the library's options.\n"
               "Without -m MODEL the bundled qvl-tiny answers: drawn shapes, colours and numbers are all it knows.\n"
               "Exit codes: 0 done, 1 failed, 2 called wrongly, 130 stopped by Ctrl-C.\n");
}

static const tool_command *find(const char *name) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i]->name, name) == 0) return commands[i];
    return NULL;
}

static int unknown(const char *name) {
    fprintf(stderr, "qvl: there is no command \"%s\"; \"qvl help\" lists them\n", name);
    return TOOL_USAGE;
}

static int help(int argc, char **argv) {
    if (argc == 2) {
        overview(stdout);
        return tool_finish_stdout();
    }
    bool markdown = argc == 4 && strcmp(argv[3], "--markdown") == 0;
    if (strcmp(argv[2], "options") == 0 && (argc == 3 || markdown)) {
        tool_help_options(stdout, markdown);
        return tool_finish_stdout();
    }
    const tool_command *c = find(argv[2]);
    if (!c) return unknown(argv[2]);
    if (argc > 3) {
        fprintf(stderr, "usage: qvl help [COMMAND] | qvl help options [--markdown]\n");
        return TOOL_USAGE;
    }
    tool_help_command(stdout, c);
    return tool_finish_stdout();
}

/* The library's warnings; it prints nothing itself. */
static void log_line(void *ud, int level, const char *line) {
    (void)ud;
    if (level <= QVL_LOG_WARN) fprintf(stderr, "qvl: %s: %s\n", level == QVL_LOG_ERROR ? "error" : "warning", line);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        overview(stderr);
        return TOOL_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) return help(argc, argv);
    if (strcmp(name, "--version") == 0 || strcmp(name, "-V") == 0 || strcmp(name, "version") == 0) {
        printf("qvl %s\n", qvl_version());
        return tool_finish_stdout();
    }
    const tool_command *c = find(name);
    if (!c) return unknown(name);

    for (int i = 2; c == &tool_bench && i < argc; i++) /* a mode with options of its own */
        if (strcmp(argv[i], "--serve") == 0) c = &tool_bench_serve;

    tool_args a;
    int code;
    if (tool_args_parse(&a, c, argc, argv, 2, &code) == 0) {
        qvl_set_log(log_line, NULL);
        tool_catch_interrupts();
        code = c->run(&a);
        if (code == TOOL_OK) code = tool_finish_stdout();
    }
    tool_args_free(&a);
    return code;
}
