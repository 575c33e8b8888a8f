// qvl.hpp - libqvl for C++17: handles that free themselves, errors as exceptions. Header only, over qvl.h.
//
//     qvl::model m("examples/models/qvl-tiny");
//     qvl::media media;
//     media.add(qvl::image::from_file("cat.jpg"));
//     std::cout << m.chat(R"([{"role":"user","content":[{"type":"image"},{"type":"text","text":"What is this?"}]}])", &media);
//
// Job:        qvl.h's types as move-only classes, its buffers as std containers, its codes as qvl::error.
// Input:      what qvl.h says; see there for options, JSON forms and which thread may call what.
// Output:     values that own themselves.
// Invariants: every class holds exactly one handle and nothing else; get() lends it to qvl.h, so that a call that is
//             missing here is no obstacle; a moved-from object may only be assigned to or destroyed;
//             an exception thrown by a callback comes out of the call that ran it.
#ifndef QVL_HPP
#define QVL_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qvl.h>

namespace qvl {

class error : public std::runtime_error {
public:
    error(int code, const std::string &message) : std::runtime_error(message), code_(code) {}
    int code() const noexcept { return code_; } // QVL_EINVAL ...
    const char *name() const noexcept { return qvl_error_name(code_); }

private:
    int code_;
};

// Throws the thread's last error when rc is negative; else gives rc back.
inline int check(int rc) {
    if (rc < 0) throw error(rc, qvl_last_error());
    return rc;
}

inline std::string version() { return qvl_version(); }

namespace detail {

struct deleter {
    void operator()(qvl_options *p) const noexcept { qvl_options_free(p); }
    void operator()(qvl_model *p) const noexcept { qvl_model_free(p); }
    void operator()(qvl_tokenizer *p) const noexcept { qvl_tokenizer_free(p); }
    void operator()(qvl_image *p) const noexcept { qvl_image_free(p); }
    void operator()(qvl_media *p) const noexcept { qvl_media_free(p); }
    void operator()(qvl_embedding *p) const noexcept { qvl_embedding_free(p); }
    void operator()(qvl_prompt *p) const noexcept { qvl_prompt_free(p); }
    void operator()(qvl_engine *p) const noexcept { qvl_engine_free(p); }
};
struct buffer_deleter {
    void operator()(void *p) const noexcept { qvl_free(p); }
};
template <class T> using buffer = std::unique_ptr<T, buffer_deleter>;

inline std::string take_string(char *p) {
    buffer<char> own(p);
    return std::string(own.get());
}

// What all handle classes share.
template <class T> class handle {
public:
    T *get() const noexcept { return p_.get(); }
    explicit operator bool() const noexcept { return static_cast<bool>(p_); }

protected:
    handle() = default;
    explicit handle(T *p) noexcept : p_(p) {}
    std::unique_ptr<T, deleter> p_;
};

template <class T> T *raw(const handle<T> *h) noexcept { return h ? h->get() : nullptr; }

} // namespace detail

// Named options: options().set("temperature", 0.7).set("stop", R"(["END"])"). Wherever a function takes const options *,
// nullptr means the defaults.
class options : public detail::handle<qvl_options> {
public:
    options() {
        qvl_options *p = nullptr;
        check(qvl_options_new(&p));
        p_.reset(p);
    }
    options &set(const char *name, const char *value) { return check(qvl_options_set(get(), name, value)), *this; }
    options &set(const char *name, const std::string &value) { return set(name, value.c_str()); }
    options &set(const char *name, bool value) { return check(qvl_options_set_i64(get(), name, value)), *this; }
    options &set(const char *name, int value) { return set(name, static_cast<std::int64_t>(value)); }
    options &set(const char *name, std::int64_t value) { return check(qvl_options_set_i64(get(), name, value)), *this; }
    options &set(const char *name, double value) { return check(qvl_options_set_f64(get(), name, value)), *this; }
};

struct option_info {
    const char *name, *type, *scope, *range, *default_value, *help; // static
};
inline std::vector<option_info> all_options() {
    std::vector<option_info> list;
    option_info o;
    for (int i = 0; qvl_option_info(i, &o.name, &o.type, &o.scope, &o.range, &o.default_value, &o.help) == QVL_OK; i++) list.push_back(o);
    return list;
}

class image : public detail::handle<qvl_image> {
public:
    static image from_file(const std::string &path, const options *o = nullptr) {
        qvl_image *p = nullptr;
        check(qvl_image_from_file(&p, path.c_str(), detail::raw(o)));
        return image(p);
    }
    static image from_data_uri(const std::string &uri, const options *o = nullptr) {
        qvl_image *p = nullptr;
        check(qvl_image_from_data_uri(&p, uri.data(), uri.size(), detail::raw(o)));
        return image(p);
    }
    static image from_bytes(const void *data, std::size_t size, const options *o = nullptr) {
        qvl_image *p = nullptr;
        check(qvl_image_from_bytes(&p, data, size, detail::raw(o)));
        return image(p);
    }
    static image from_pixels(const void *rgb, int width, int height, std::size_t row_bytes = 0) {
        qvl_image *p = nullptr;
        check(qvl_image_from_pixels(&p, rgb, width, height, row_bytes));
        return image(p);
    }
    int width() const noexcept { return qvl_image_width(get()); }
    int height() const noexcept { return qvl_image_height(get()); }
    const std::uint8_t *pixels() const noexcept { return qvl_image_pixels(get()); } // height x width x 3, as long as this lives

private:
    explicit image(qvl_image *p) : handle(p) {}
};

class model;

class embedding : public detail::handle<qvl_embedding> {
public:
    struct view { // float[layers][tokens][hidden], as long as the embedding lives
        const float *data;
        int layers, tokens, hidden;
    };
    view data() const {
        view v{};
        check(qvl_embedding_data(get(), &v.data, &v.layers, &v.tokens, &v.hidden));
        return v;
    }
    std::vector<std::uint8_t> to_bytes() const {
        void *data = nullptr;
        std::size_t size = 0;
        check(qvl_embedding_to_bytes(get(), &data, &size));
        detail::buffer<std::uint8_t> own(static_cast<std::uint8_t *>(data));
        return std::vector<std::uint8_t>(own.get(), own.get() + size);
    }
    static embedding from_bytes(const model &m, const void *data, std::size_t size);

private:
    friend class model;
    explicit embedding(qvl_embedding *p) : handle(p) {}
};

// What fills image and video parts of messages, in order. Things added are shared: they may be destroyed right after.
class media : public detail::handle<qvl_media> {
public:
    media() {
        qvl_media *p = nullptr;
        check(qvl_media_new(&p));
        p_.reset(p);
    }
    media &add(const image &im) { return check(qvl_media_add_image(get(), im.get())), *this; }
    media &add(const embedding &e) { return check(qvl_media_add_embedding(get(), e.get())), *this; }
    media &add_video(const std::vector<image> &frames, double fps, bool sample_frames = true) {
        std::vector<const qvl_image *> list;
        for (const image &f : frames) list.push_back(f.get());
        return check(qvl_media_add_video(get(), list.data(), list.size(), fps, sample_frames)), *this;
    }
};

namespace detail {

inline std::vector<std::int32_t> tokenize(const qvl_tokenizer *t, std::string_view text, bool parse_special) {
    std::int32_t *ids = nullptr;
    std::size_t n = 0;
    check(qvl_tokenize(t, text.data(), text.size(), parse_special, &ids, &n));
    buffer<std::int32_t> own(ids);
    return std::vector<std::int32_t>(ids, ids + n);
}
inline std::string detokenize(const qvl_tokenizer *t, const std::vector<std::int32_t> &ids, bool skip_special) {
    char *text = nullptr;
    std::size_t len = 0;
    check(qvl_detokenize(t, ids.data(), ids.size(), skip_special, &text, &len));
    buffer<char> own(text);
    return std::string(text, len);
}

} // namespace detail

// A tokenizer without weights; a model has its own.
class tokenizer : public detail::handle<qvl_tokenizer> {
public:
    explicit tokenizer(const std::string &dir) {
        qvl_tokenizer *p = nullptr;
        check(qvl_tokenizer_load(&p, dir.c_str()));
        p_.reset(p);
    }
    std::vector<std::int32_t> encode(std::string_view text, bool parse_special = false) const { return detail::tokenize(get(), text, parse_special); }
    std::string decode(const std::vector<std::int32_t> &ids, bool skip_special = false) const { return detail::detokenize(get(), ids, skip_special); }
};

class prompt : public detail::handle<qvl_prompt> {
public:
    prompt(const model &m, const std::string &messages, const media *l = nullptr, const options *o = nullptr, const char *tools = nullptr);
    prompt(const model &m, const std::vector<std::int32_t> &tokens);
    std::vector<std::int32_t> tokens() const {
        const std::int32_t *ids = nullptr;
        std::size_t n = 0;
        check(qvl_prompt_tokens(get(), &ids, &n));
        return std::vector<std::int32_t>(ids, ids + n);
    }
    std::vector<std::int32_t> positions() const { // [3][n]
        const std::int32_t *p = nullptr;
        std::size_t n = 0;
        check(qvl_prompt_positions(get(), &p, &n));
        return std::vector<std::int32_t>(p, p + 3 * n);
    }
    std::string text() const { return qvl_prompt_text(get()); }
};

// Done of total bytes; false gives up.
using progress_fn = std::function<bool(std::uint64_t done, std::uint64_t total)>;
// A piece of the answer; false stops it.
using text_fn = std::function<bool(std::string_view piece)>;

// Writes the directory out with the model's weights as option dtype asks, laid out so that loading maps them; the report,
// a JSON object.
inline std::string quantize(const std::string &path, const std::string &out, const options *o = nullptr) {
    char *json = nullptr;
    check(qvl_quantize(path.c_str(), out.c_str(), detail::raw(o), &json));
    return detail::take_string(json);
}

// The CPU's kernels against the machine's limits, a JSON object.
inline std::string bench_kernels(const options *o = nullptr) {
    char *json = nullptr;
    check(qvl_bench_kernels(detail::raw(o), &json));
    return detail::take_string(json);
}

class model : public detail::handle<qvl_model> {
public:
    explicit model(const std::string &path, const options *o = nullptr) { load(path, detail::raw(o)); }
    // o is needed to carry the callback; it is left without one.
    model(const std::string &path, options &o, const progress_fn &progress) {
        callback<progress_fn> c{&progress, nullptr};
        check(qvl_options_set_progress(o.get(), on_progress, &c));
        int rc = try_load(path, o.get());
        qvl_options_set_progress(o.get(), nullptr, nullptr);
        if (c.thrown) std::rethrow_exception(c.thrown);
        check(rc);
    }

    std::string info() const { // a JSON object
        char *json = nullptr;
        check(qvl_model_info(get(), &json));
        return detail::take_string(json);
    }
    std::vector<std::int32_t> encode_text(std::string_view text, bool parse_special = false) const {
        return detail::tokenize(qvl_model_tokenizer(get()), text, parse_special);
    }
    std::string decode_tokens(const std::vector<std::int32_t> &ids, bool skip_special = false) const {
        return detail::detokenize(qvl_model_tokenizer(get()), ids, skip_special);
    }
    std::string render_chat(const std::string &messages, const char *tools = nullptr, const options *o = nullptr) const {
        char *text = nullptr;
        check(qvl_render_chat(get(), messages.c_str(), tools, detail::raw(o), &text));
        return detail::take_string(text);
    }
    embedding encode_image(const image &im, const options *o = nullptr) const {
        qvl_embedding *e = nullptr;
        check(qvl_encode_image(get(), im.get(), detail::raw(o), &e));
        return embedding(e);
    }
    struct patch_grid {
        std::vector<float> rows; // [n][1536]
        std::int32_t t, h, w;    // n = t * h * w
    };
    patch_grid patches(const image &im, const options *o = nullptr) const {
        float *rows = nullptr;
        std::int32_t thw[3] = {0, 0, 0};
        check(qvl_patches(get(), im.get(), detail::raw(o), &rows, thw));
        detail::buffer<float> own(rows);
        std::size_t n = static_cast<std::size_t>(thw[0]) * static_cast<std::size_t>(thw[1]) * static_cast<std::size_t>(thw[2]);
        return patch_grid{std::vector<float>(rows, rows + n * 1536), thw[0], thw[1], thw[2]};
    }
    // float[n][vocab_size]; vocab_size is in info().
    std::vector<float> logits(const prompt &p, std::size_t vocab_size) const {
        std::size_t n = 0;
        check(qvl_prompt_tokens(p.get(), nullptr, &n));
        std::vector<float> out(n * vocab_size);
        check(qvl_logits(get(), p.get(), out.data(), out.size()));
        return out;
    }
    // The whole answer; on_text sees it as it comes.
    std::string chat(const std::string &messages, const media *l = nullptr, const options *o = nullptr, const text_fn &on_text = nullptr) {
        callback<text_fn> c{&on_text, nullptr};
        char *text = nullptr;
        int rc = qvl_chat(get(), messages.c_str(), detail::raw(l), detail::raw(o), on_text ? on_piece : nullptr, &c, &text);
        if (c.thrown) std::rethrow_exception(c.thrown);
        check(rc);
        return detail::take_string(text);
    }

private:
    template <class F> struct callback {
        const F *fn;
        std::exception_ptr thrown; // an exception must not unwind through C
    };
    static int on_progress(void *ud, std::uint64_t done, std::uint64_t total) noexcept {
        auto *c = static_cast<callback<progress_fn> *>(ud);
        try {
            return (*c->fn)(done, total) ? 0 : 1;
        } catch (...) {
            c->thrown = std::current_exception();
            return 1;
        }
    }
    static int on_piece(void *ud, const char *piece, std::size_t len) noexcept {
        auto *c = static_cast<callback<text_fn> *>(ud);
        try {
            return (*c->fn)(std::string_view(piece, len)) ? 0 : 1;
        } catch (...) {
            c->thrown = std::current_exception();
            return 1;
        }
    }
    int try_load(const std::string &path, const qvl_options *o) {
        qvl_model *p = nullptr;
        int rc = qvl_model_load(&p, path.c_str(), o);
        p_.reset(p);
        return rc;
    }
    void load(const std::string &path, const qvl_options *o) { check(try_load(path, o)); }
};

inline embedding embedding::from_bytes(const model &m, const void *data, std::size_t size) {
    qvl_embedding *p = nullptr;
    check(qvl_embedding_from_bytes(&p, m.get(), data, size));
    return embedding(p);
}

inline prompt::prompt(const model &m, const std::string &messages, const media *l, const options *o, const char *tools) {
    qvl_prompt *p = nullptr;
    check(qvl_prompt_new(&p, m.get(), messages.c_str(), tools, detail::raw(l), detail::raw(o)));
    p_.reset(p);
}
inline prompt::prompt(const model &m, const std::vector<std::int32_t> &tokens) {
    qvl_prompt *p = nullptr;
    check(qvl_prompt_from_tokens(&p, m.get(), tokens.data(), tokens.size()));
    p_.reset(p);
}

// One event of a step; valid until the engine's next step.
class event {
public:
    explicit event(const qvl_event *v) noexcept : v_(v) {}
    const qvl_event *get() const noexcept { return v_; }
    bool is_token() const noexcept { return qvl_event_type(v_) == QVL_EVENT_TOKEN; }
    bool is_finished() const noexcept { return qvl_event_type(v_) == QVL_EVENT_FINISHED; }
    bool is_error() const noexcept { return qvl_event_type(v_) == QVL_EVENT_ERROR; }
    bool is_prompt() const noexcept { return qvl_event_type(v_) == QVL_EVENT_PROMPT; }
    std::uint64_t request() const noexcept { return qvl_event_request(v_); }
    int choice() const noexcept { return qvl_event_choice(v_); }
    std::int32_t token() const noexcept { return qvl_event_token(v_); } // -1: none
    std::string_view text() const noexcept {
        std::size_t n = 0;
        const char *s = qvl_event_text(v_, &n);
        return std::string_view(s, n);
    }
    const char *finish_reason() const noexcept { return qvl_event_finish_reason(v_); }
    qvl::error failure() const { // of an error event
        const char *why = "";
        int code = qvl_event_error(v_, &why);
        return qvl::error(code, why);
    }
    float logprob() const noexcept { return qvl_event_logprob(v_); }
    std::vector<std::pair<std::int32_t, float>> top_logprobs() const {
        const std::int32_t *ids = nullptr;
        const float *values = nullptr;
        std::vector<std::pair<std::int32_t, float>> list;
        for (int i = 0, n = qvl_event_top_logprobs(v_, &ids, &values); i < n; i++) list.emplace_back(ids[i], values[i]);
        return list;
    }
    std::pair<const float *, std::size_t> logits() const noexcept {
        std::size_t n = 0;
        const float *f = qvl_event_logits(v_, &n);
        return {f, n};
    }
    double usage(int what) const noexcept { return qvl_event_usage(v_, what); } // QVL_USAGE_*

private:
    const qvl_event *v_;
};

class engine : public detail::handle<qvl_engine> {
public:
    explicit engine(model &m, const options *o = nullptr) {
        qvl_engine *p = nullptr;
        check(qvl_engine_new(&p, m.get(), detail::raw(o)));
        p_.reset(p);
    }
    std::uint64_t submit(const prompt &p, const options *o = nullptr) {
        std::uint64_t request = 0;
        check(qvl_engine_submit(get(), p.get(), detail::raw(o), &request));
        return request;
    }
    std::string check_request(const prompt &p, const options *o = nullptr) { // what submit would say and take: a JSON object
        char *json = nullptr;
        check(qvl_engine_check(get(), p.get(), detail::raw(o), &json));
        return detail::take_string(json);
    }
    bool cancel(std::uint64_t request) { return check(qvl_engine_cancel(get(), request)) != 0; }
    void wake() { check(qvl_engine_wake(get())); }
    // One step; its events, valid until the next one.
    std::vector<event> step(int timeout_ms = -1) {
        std::vector<event> events;
        for (int i = 0, n = check(qvl_engine_step(get(), timeout_ms)); i < n; i++) events.emplace_back(qvl_engine_event(get(), i));
        return events;
    }
    void configure(const options &o) { check(qvl_engine_configure(get(), o.get())); }
    static std::string plan(const model &m, const options *o = nullptr) { // a JSON object
        char *json = nullptr;
        check(qvl_engine_plan(m.get(), detail::raw(o), &json));
        return detail::take_string(json);
    }
    std::string stats() const { // a JSON object
        char *json = nullptr;
        check(qvl_engine_stats(get(), &json));
        return detail::take_string(json);
    }
};

} // namespace qvl
#endif
