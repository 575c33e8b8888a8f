/* toolcall.c - tool calls out of generated text, byte by byte.
 *
 * Job:        see toolcall.h.
 * Input:      one buffer of bytes that are not given out yet: [start, pos) is held, [pos, len) is to be read.
 * Output:     events.
 * Invariants: every decision depends on the bytes up to the one decided about, never on where pieces end: where the next
 *             bytes could change it, the loop stops (WAIT) and goes on there when more has come;
 *             before a call has started its text stays in the buffer, so that giving it back is going back to start;
 *             after a start nothing goes back: what follows the arguments and does not fit is content.
 */
#include "toolcall.h"

#include <stdlib.h>
#include <string.h>

static const char open_tag[] = "<tool_call>", close_tag[] = "</tool_call>";
enum { OPEN_LEN = sizeof open_tag - 1, CLOSE_LEN = sizeof close_tag - 1, SPACE_HELD = 256 };

typedef enum {
    TEXT,        /* content */
    OBJECT,      /* after <tool_call>: { */
    KEY,         /* a member's name or } */
    IN_KEY,
    COLON,
    VALUE,
    IN_NAME,
    IN_ARGUMENTS,        /* an object, as it stands */
    IN_ARGUMENTS_STRING, /* a string that holds the JSON text: its escapes are undone */
    IN_OTHER,            /* a member that is neither */
    NEXT,                /* , or } */
    CLOSE                /* after the object: </tool_call> */
} call_state;

struct toolcall {
    toolcall_fn fn;
    void *ud;
    buf in;
    size_t start, pos, tag; /* tag: where the present call's <tool_call> is, [start, tag) is white space before it */
    call_state state;
    bool final;    /* no more bytes will come */
    bool unclosed; /* a call was left before its </tool_call>: the next one is not content */
    int count;
    /* the present call */
    bool started, ended, seen_arguments;
    char id[ID_SIZE];
    buf key, name, arguments; /* arguments: not given out yet */
    /* the value being scanned */
    int depth;
    bool in_string, escaped;
};

typedef enum { STEP, WAIT } step_result;

toolcall *toolcall_new(toolcall_fn fn, void *ud) {
    toolcall *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    t->fn = fn;
    t->ud = ud;
    return t;
}

void toolcall_free(toolcall *t) {
    if (!t) return;
    buf_free(&t->in);
    buf_free(&t->key);
    buf_free(&t->name);
    buf_free(&t->arguments);
    free(t);
}

int toolcall_count(const toolcall *t) {
    return t->count;
}

static bool is_space(char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

/* ---- events ---- */

static void give_content(toolcall *t, size_t end) {
    if (end > t->start)
        t->fn(t->ud, &(toolcall_event){.type = TOOLCALL_CONTENT, .text = t->in.data + t->start, .n = end - t->start});
    t->start = end;
}

static void give_start(toolcall *t) {
    id_new(t->id, "call_"); /* without random numbers it is still an id, and calls of one answer differ by index */
    t->started = true;
    t->fn(t->ud, &(toolcall_event){.type = TOOLCALL_START, .index = t->count, .id = t->id, .name = t->name.data});
    t->count++;
}

static void give_arguments(toolcall *t) {
    if (t->started && !t->ended && t->arguments.len)
        t->fn(t->ud, &(toolcall_event){.type = TOOLCALL_ARGUMENTS, .index = t->count - 1, .text = t->arguments.data, .n = t->arguments.len});
    if (t->started) buf_clear(&t->arguments);
}

static void give_end(toolcall *t, bool whole) {
    give_arguments(t);
    t->ended = true;
    t->fn(t->ud, &(toolcall_event){.type = TOOLCALL_END, .index = t->count - 1, .whole = whole});
}

/* ---- leaving a call ---- */

static void leave(toolcall *t, size_t pos) {
    t->pos = t->start = pos;
    t->state = TEXT;
}

/* The bytes at pos do not belong to a call. */
static void broken(toolcall *t) {
    if (t->started) {
        t->unclosed = true;
        leave(t, t->start);
        return;
    }
    size_t after = t->tag + OPEN_LEN;
    give_content(t, after);
    leave(t, after);
}

/* 1: tag is at s; 0: it is not; -1: it may be once more bytes have come. */
static int match(const toolcall *t, size_t at, const char *tag, size_t len) {
    size_t left = t->in.len - at;
    if (left >= len) return memcmp(t->in.data + at, tag, len) == 0;
    return !t->final && memcmp(t->in.data + at, tag, left) == 0 ? -1 : 0;
}

/* ---- content ---- */

/* end without the white space before it: what may be the separator of a call. */
static size_t trimmed(const toolcall *t, size_t end) {
    size_t low = end - t->start > SPACE_HELD ? end - SPACE_HELD : t->start;
    while (end > low && is_space(t->in.data[end - 1])) end--;
    return end;
}

static step_result step_text(toolcall *t) {
    const char *lt = memchr(t->in.data + t->pos, '<', t->in.len - t->pos);
    size_t at = lt ? (size_t)(lt - t->in.data) : t->in.len;
    give_content(t, trimmed(t, at));
    t->pos = at;
    if (!lt) return WAIT;
    int open = match(t, at, open_tag, OPEN_LEN), close = t->unclosed ? match(t, at, close_tag, CLOSE_LEN) : 0;
    if (open > 0) {
        t->tag = at;
        t->pos = at + OPEN_LEN;
        t->state = OBJECT;
        t->started = t->ended = t->seen_arguments = t->unclosed = false;
        buf_clear(&t->name);
        buf_clear(&t->arguments);
        return STEP;
    }
    if (close > 0) {
        give_content(t, at);
        leave(t, at + CLOSE_LEN);
        t->unclosed = false;
        return STEP;
    }
    if (open < 0 || close < 0) return WAIT;
    t->pos++;
    return STEP;
}

/* ---- strings ---- */

static int hex4(const char *s) {
    int v = 0;
    for (int i = 0; i < 4; i++) {
        char c = s[i];
        int d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (d < 0) return -1;
        v = v * 16 + d;
    }
    return v;
}

static void add_utf8(buf *b, unsigned c) {
    char u[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    if (n == 1) u[0] = (char)c;
    else {
        for (size_t i = n - 1; i; i--, c >>= 6) u[i] = (char)(0x80 | (c & 0x3F));
        u[0] = (char)((0xF00 >> n & 0xFF) | c);
    }
    buf_add(b, u, n);
}

/* Undoes the escape at pos and adds it to out. Returns its length, 0 when it is none, -1 when more bytes are needed. */
static int escape(const toolcall *t, buf *out) {
    const char *s = t->in.data + t->pos;
    size_t left = t->in.len - t->pos;
    if (left < 2) return t->final ? 0 : -1;
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *simple = memchr(from, s[1], sizeof from - 1);
    if (simple) {
        buf_add(out, &to[simple - from], 1);
        return 2;
    }
    if (s[1] != 'u') return 0;
    if (left < 6) return t->final ? 0 : -1;
    int c = hex4(s + 2);
    if (c < 0) return 0;
    if (c >= 0xD800 && c < 0xDC00) { /* half of a pair: the other half decides */
        static const char second[] = "\\u";
        for (size_t i = 6; i < 8; i++) {
            if (i >= left && !t->final) return -1;
            if (i >= left || s[i] != second[i - 6]) {
                add_utf8(out, 0xFFFD);
                return 6;
            }
        }
        if (left < 12 && !t->final) return -1;
        int d = left < 12 ? -1 : hex4(s + 8);
        if (d >= 0xDC00 && d < 0xE000) {
            add_utf8(out, 0x10000 + (((unsigned)c - 0xD800) << 10) + ((unsigned)d - 0xDC00));
            return 12;
        }
        c = 0xFFFD;
    }
    add_utf8(out, c >= 0xDC00 && c < 0xE000 ? 0xFFFD : (unsigned)c);
    return 6;
}

/* One character of a short string (key, name). *done at its closing quote. */
static step_result step_string(toolcall *t, buf *out, bool *done) {
    char c = t->in.data[t->pos];
    if (c == '\\') {
        int n = escape(t, out);
        if (n < 0) return WAIT;
        if (n) t->pos += (size_t)n;
        else broken(t);
    } else if ((unsigned char)c < 0x20) {
        broken(t);
    } else {
        if (c == '"') *done = true;
        else buf_add(out, &c, 1);
        t->pos++;
    }
    return STEP;
}

/* ---- members ---- */

static void object_end(toolcall *t) {
    t->pos++;
    if (!t->started) {
        if (!t->name.len || t->seen_arguments) { /* arguments without a name never started */
            broken(t);
            return;
        }
        give_start(t); /* a call without arguments: {"name": "now"} */
        buf_puts(&t->arguments, "{}");
        give_end(t, true);
    }
    t->start = t->pos;
    t->state = CLOSE;
}

static void arguments_end(toolcall *t) {
    t->state = NEXT;
    if (!t->started) return;
    give_end(t, true);
    t->start = t->pos;
}

static void name_end(toolcall *t) {
    if (!t->name.len || memchr(t->name.data, 0, t->name.len)) {
        buf_clear(&t->name);
        broken(t);
        return;
    }
    t->state = NEXT;
    if (!t->seen_arguments) return;
    give_start(t); /* the arguments came first */
    arguments_end(t);
}

static step_result step_value(toolcall *t) {
    char c = t->in.data[t->pos];
    bool is_name = !strcmp(t->key.data, "name") && !t->name.len && !t->started;
    bool is_arguments = !strcmp(t->key.data, "arguments") && !t->seen_arguments && !t->started;
    t->depth = 0;
    t->in_string = t->escaped = false;
    if (is_name) {
        if (c != '"') broken(t);
        else {
            t->pos++;
            t->state = IN_NAME;
        }
        return STEP;
    }
    if (!is_arguments) {
        t->state = IN_OTHER;
        return STEP;
    }
    int null = match(t, t->pos, "null", 4);
    if (null < 0) return WAIT;
    if (c != '{' && c != '"' && !null) {
        broken(t);
        return STEP;
    }
    t->seen_arguments = true;
    if (t->name.len) give_start(t);
    if (null) {
        t->pos += 4;
        buf_puts(&t->arguments, "{}");
        arguments_end(t);
    } else if (c == '"') {
        t->pos++;
        t->state = IN_ARGUMENTS_STRING;
    } else {
        t->state = IN_ARGUMENTS;
    }
    return STEP;
}

/* Follows strings and brackets. True when c ended an object, a list or a string. */
static bool scan(toolcall *t, char c) {
    if (t->in_string) {
        if (t->escaped) t->escaped = false;
        else if (c == '\\') t->escaped = true;
        else if (c == '"') {
            t->in_string = false;
            return t->depth == 0;
        }
        return false;
    }
    if (c == '"') t->in_string = true;
    if (c == '{' || c == '[') t->depth++;
    return (c == '}' || c == ']') && --t->depth == 0;
}

static step_result step_other(toolcall *t) {
    char c = t->in.data[t->pos];
    if (!t->in_string && t->depth == 0) {
        bool scalar = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || c == 'E' || c == '-' || c == '+' || c == '.';
        if (c == ',' || c == '}' || is_space(c)) {
            t->state = NEXT;
            return STEP;
        }
        if (!scalar && c != '"' && c != '{' && c != '[') {
            broken(t);
            return STEP;
        }
    } else if (!t->in_string && c == '<') { /* never JSON: perhaps another call */
        broken(t);
        return STEP;
    }
    t->pos++;
    if (scan(t, c)) t->state = NEXT;
    return STEP;
}

/* Arguments go on until they close, or until </tool_call> where no JSON can have it: outside a string, or inside one
 * after a newline that is not escaped. */
static step_result step_arguments(toolcall *t, bool string) {
    char c = t->in.data[t->pos];
    bool inside = string || t->in_string;
    int close = 0;
    if (inside && c == '\n') {
        close = t->pos + 1 == t->in.len ? (t->final ? 0 : -1) : match(t, t->pos + 1, close_tag, CLOSE_LEN);
    } else if (!inside && c == '<') {
        close = match(t, t->pos, close_tag, CLOSE_LEN);
    }
    if (close < 0) return WAIT;
    if (close > 0) {
        if (!t->started) {
            broken(t);
        } else {
            give_end(t, false);
            leave(t, t->pos + (c == '\n') + CLOSE_LEN);
        }
        return STEP;
    }
    if (string && c == '\\') {
        int n = escape(t, &t->arguments);
        if (n < 0) return WAIT;
        if (n) {
            t->pos += (size_t)n;
            return STEP;
        }
    }
    t->pos++;
    if (string && c == '"') {
        arguments_end(t);
        return STEP;
    }
    buf_add(&t->arguments, &c, 1);
    if (!string && scan(t, c)) arguments_end(t);
    return STEP;
}

/* Between members, and after the object. */
static step_result step_next(toolcall *t) {
    char c = t->in.data[t->pos];
    if (c == ',' && t->state == NEXT) {
        t->pos++;
        t->state = KEY;
        return STEP;
    }
    if (c == '}') {
        if (t->state == NEXT) object_end(t);
        else t->start = ++t->pos; /* one bracket too many, a common slip */
        return STEP;
    }
    int close = c == '<' && t->started ? match(t, t->pos, close_tag, CLOSE_LEN) : 0;
    if (close < 0) return WAIT;
    if (close > 0) leave(t, t->pos + CLOSE_LEN);
    else broken(t);
    return STEP;
}

static step_result step_call(toolcall *t) {
    char c = t->in.data[t->pos];
    bool done = false;
    step_result r = STEP;
    /* Held text is bounded; a call that has started holds only what comes after its arguments. */
    bool holding = !t->started || t->ended;
    if (holding && t->pos - (t->started ? t->start : t->tag) >= TOOLCALL_HELD) {
        broken(t);
        return STEP;
    }
    switch (t->state) {
    case IN_KEY:
        r = step_string(t, &t->key, &done);
        if (done) t->state = COLON;
        return r;
    case IN_NAME:
        r = step_string(t, &t->name, &done);
        if (done) name_end(t);
        return r;
    case IN_ARGUMENTS: return step_arguments(t, false);
    case IN_ARGUMENTS_STRING: return step_arguments(t, true);
    case IN_OTHER: return step_other(t);
    default: break;
    }
    if (is_space(c)) {
        t->pos++;
        return STEP;
    }
    switch (t->state) {
    case OBJECT:
        if (c != '{') broken(t);
        else {
            t->pos++;
            t->state = KEY;
        }
        return STEP;
    case KEY:
        if (c == '}') object_end(t);
        else if (c != '"') broken(t);
        else {
            t->pos++;
            buf_clear(&t->key);
            buf_add(&t->key, "", 0);
            t->state = IN_KEY;
        }
        return STEP;
    case COLON:
        if (c != ':') broken(t);
        else {
            t->pos++;
            t->state = VALUE;
        }
        return STEP;
    case VALUE: return step_value(t);
    default: return step_next(t);
    }
}

static bool failed(const toolcall *t) {
    return t->in.failed || t->key.failed || t->name.failed || t->arguments.failed;
}

/* Reads what there is. 0, or -1 when out of memory. */
static int run(toolcall *t) {
    while (t->pos < t->in.len && !failed(t)) {
        step_result r = t->state == TEXT ? step_text(t) : step_call(t);
        if (r == WAIT) break;
    }
    bool streaming = t->state == IN_ARGUMENTS || t->state == IN_ARGUMENTS_STRING;
    if (streaming && t->started) {
        give_arguments(t);
        t->start = t->pos;
    }
    return failed(t) ? -1 : 0;
}

int toolcall_feed(toolcall *t, const char *text, size_t n) {
    buf_add(&t->in, text, n);
    int rc = run(t);
    buf_drop(&t->in, t->start);
    t->pos -= t->start;
    t->tag -= t->state == TEXT || t->started ? t->tag : t->start;
    t->start = 0;
    return rc;
}

int toolcall_finish(toolcall *t) {
    t->final = true;
    int rc = run(t);
    while (!rc && t->state != TEXT) {
        if (t->started && !t->ended) {
            give_end(t, false);
            leave(t, t->in.len);
        } else if (t->started && (t->state == NEXT || t->state == CLOSE)) {
            leave(t, t->in.len); /* white space */
        } else {
            broken(t);
            rc = run(t);
        }
    }
    if (!rc && t->in.len) give_content(t, t->count ? trimmed(t, t->in.len) : t->in.len);
    buf_clear(&t->in);
    t->pos = t->start = 0;
    return rc;
}

/* ---- whole results ---- */

void toolcall_collect(void *result, const toolcall_event *e) {
    toolcall_result *r = result;
    switch (e->type) {
    case TOOLCALL_CONTENT: buf_add(&r->content, e->text, e->n); break;
    case TOOLCALL_START: {
        if (!r->calls) r->calls = json_array();
        json_t *call = json_pack("{s:s, s:s, s:{s:s}}", "id", e->id, "type", "function", "function", "name", e->name);
        if (!r->calls || !call || json_array_append_new(r->calls, call) < 0) r->failed = true;
        buf_clear(&r->arguments);
        break;
    }
    case TOOLCALL_ARGUMENTS: buf_add(&r->arguments, e->text, e->n); break;
    default: {
        json_t *call = json_array_get(r->calls, (size_t)e->index);
        json_t *text = json_stringn(r->arguments.len ? r->arguments.data : "", r->arguments.len);
        if (!call || !text || json_object_set_new(json_object_get(call, "function"), "arguments", text) < 0) r->failed = true;
    }
    }
    if (r->content.failed || r->arguments.failed) r->failed = true;
}

void toolcall_result_free(toolcall_result *r) {
    buf_free(&r->content);
    buf_free(&r->arguments);
    json_decref(r->calls);
    *r = (toolcall_result){0};
}
