/* toolcall.h - the streaming parser of tool calls in Hermes form, which Qwen's chat template asks for:
 *     <tool_call>
 *     {"name": "get_weather", "arguments": {"city": "Delft"}}
 *     </tool_call>
 *
 * Job:        split an answer into content and calls while it is being generated.
 * Input:      the answer after its reasoning part (reasoning.h), in pieces of any size.
 * Output:     events; joined, they are the same for every way of cutting the text into pieces.
 * Invariants: content is held back only while it may still become a tag or white space before one;
 *             a call starts when its name and the first byte of its arguments are known, and is then never taken back;
 *             what turns out not to be a call before that is content, tags included: nothing is lost;
 *             at most TOOLCALL_HELD bytes are held.
 */
#ifndef SERVE_TOOLCALL_H
#define SERVE_TOOLCALL_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "buf.h"
#include "id.h"

#define TOOLCALL_HELD (64 << 10)

enum {
    TOOLCALL_CONTENT = 1, /* text, n */
    TOOLCALL_START,       /* index, id, name */
    TOOLCALL_ARGUMENTS,   /* index, text, n: the next bytes of the arguments' JSON text */
    TOOLCALL_END          /* index, whole: false when the answer stopped or broke off inside the arguments */
};

typedef struct {
    int type;
    int index;        /* of the call, from 0 */
    const char *id;   /* call_... */
    const char *name; /* of the function */
    const char *text; /* not terminated; n bytes */
    size_t n;
    bool whole;
} toolcall_event; /* pointers are borrowed until the function returns */

typedef void (*toolcall_fn)(void *ud, const toolcall_event *e);

typedef struct toolcall toolcall;

/* NULL when out of memory. */
toolcall *toolcall_new(toolcall_fn fn, void *ud);
void toolcall_free(toolcall *t);
/* The next n bytes. 0, or -1 when out of memory. */
int toolcall_feed(toolcall *t, const char *text, size_t n);
/* The answer has ended: what was held is content, an open call ends. 0 or -1. */
int toolcall_finish(toolcall *t);
/* Calls started so far. */
int toolcall_count(const toolcall *t);

/* The receiver for answers that are not streamed: pass toolcall_collect and a zeroed toolcall_result to toolcall_new. */
typedef struct {
    buf content;
    json_t *calls; /* NULL or [{"id", "type": "function", "function": {"name", "arguments": "..."}}] */
    buf arguments; /* of the call being read */
    bool failed;   /* out of memory somewhere */
} toolcall_result;
void toolcall_collect(void *result, const toolcall_event *e);
void toolcall_result_free(toolcall_result *r);

#endif
