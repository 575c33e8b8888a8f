// hpp.cpp - qvl.hpp does what it says: every class, errors with codes, exceptions through callbacks, moves.
// Usage: hpp MODEL PICTURE; exit code 0 and "ok" when all holds.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "qvl.hpp"

#define CHECK(x)                                                       \
    do {                                                               \
        if (!(x)) {                                                    \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); \
            std::exit(1);                                              \
        }                                                              \
    } while (0)

template <class F> static int code_of(F f) {
    try {
        f();
    } catch (const qvl::error &e) {
        CHECK(*e.what());
        CHECK(std::string(e.name()).rfind("QVL_E", 0) == 0);
        return e.code();
    }
    return 0;
}

static_assert(std::is_nothrow_move_constructible<qvl::model>::value && !std::is_copy_constructible<qvl::model>::value, "move only");
static_assert(std::is_nothrow_move_assignable<qvl::image>::value && !std::is_copy_assignable<qvl::image>::value, "move only");
static_assert(sizeof(qvl::engine) == sizeof(void *), "a handle and nothing else");

static const char messages[] = R"([{"role":"user","content":[{"type":"image"},{"type":"text","text":"Describe this image."}]}])";

static std::string by_engine(qvl::model &m, const qvl::media &media) {
    qvl::options o;
    o.set("max_requests", 2).set("max_context", 512).set("logprobs", 2);
    qvl::engine e(m, &o);
    qvl::prompt p(m, messages, &media);
    CHECK(p.positions().size() == 3 * p.tokens().size() && !p.text().empty());
    std::uint64_t first = e.submit(p, &o), second = e.submit(p, &o);
    CHECK(second > first && e.cancel(second) && !e.cancel(second + 1));
    e.wake();
    std::string text;
    for (int ended = 0; ended < 2;)
        for (const qvl::event &v : e.step()) {
            CHECK(!v.is_error());
            if (v.request() == first) text += v.text();
            if (v.is_token()) CHECK(v.token() >= 0 && v.logprob() <= 0 && v.top_logprobs().size() == 2);
            if (v.is_finished()) {
                ended++;
                CHECK(std::string(v.finish_reason()) == (v.request() == first ? "stop" : "cancelled"));
                CHECK(v.request() != first || v.usage(QVL_USAGE_PROMPT_TOKENS) == static_cast<double>(p.tokens().size()));
            }
        }
    CHECK(e.stats().find("\"finished\": 1") != std::string::npos);
    return text;
}

static void callbacks(qvl::model &m, const qvl::media &media, const std::string &want, const std::string &path) {
    std::string streamed;
    CHECK(m.chat(messages, &media, nullptr, [&](std::string_view s) { return streamed += s, true; }) == want && streamed == want);
    CHECK(code_of([&] { m.chat(messages, &media, nullptr, [](std::string_view) { return false; }); }) == QVL_ECANCELLED);
    bool caught = false;
    try {
        m.chat(messages, &media, nullptr, [](std::string_view) -> bool { throw std::logic_error("mine"); });
    } catch (const std::logic_error &e) {
        caught = std::string(e.what()) == "mine";
    }
    CHECK(caught);
    qvl::options o;
    std::uint64_t last = 0, all = 0;
    qvl::model again(path, o, [&](std::uint64_t done, std::uint64_t total) { return last = done, all = total, true; });
    CHECK(all > 0 && last == all);
    CHECK(code_of([&] { qvl::model(path, o, [](std::uint64_t, std::uint64_t) { return false; }); }) == QVL_ECANCELLED);
}

int main(int argc, char **argv) {
    CHECK(argc == 3 && qvl::version() == QVL_VERSION && qvl::all_options().size() > 20);
    qvl::options o;
    CHECK(code_of([&] { o.set("no_such_option", 1); }) == QVL_EINVAL);
    CHECK(code_of([&] { o.set("temperature", 1e9); }) == QVL_EINVAL);
    o.set("temperature", 0.5).set("ignore_eos", true).set("stop", std::string("[\"END\"]")).set("seed", std::int64_t(7));
    CHECK(code_of([] { qvl::model("no/such/directory"); }) < 0);

    qvl::model loaded(argv[1]), m = std::move(loaded);
    CHECK(m && !loaded);
    CHECK(m.info().find("\"vocab_size\"") != std::string::npos);
    auto ids = m.encode_text("Hello, world");
    CHECK(m.decode_tokens(ids) == "Hello, world" && qvl::tokenizer(argv[1]).encode("Hello, world") == ids);
    CHECK(m.render_chat(messages).find("Describe") != std::string::npos);
    qvl::prompt text_only(m, ids);
    CHECK(text_only.tokens() == ids && text_only.text().empty());

    qvl::image im = qvl::image::from_file(argv[2]);
    CHECK(qvl::image::from_pixels(im.pixels(), im.width(), im.height()).width() == im.width());
    auto grid = m.patches(im);
    CHECK(grid.t == 1 && grid.rows.size() == static_cast<std::size_t>(grid.h * grid.w) * 1536);
    qvl::embedding e = m.encode_image(im);
    auto bytes = e.to_bytes();
    CHECK(qvl::embedding::from_bytes(m, bytes.data(), bytes.size()).data().tokens == e.data().tokens);
    bytes[bytes.size() / 2] ^= 1;
    CHECK(code_of([&] { qvl::embedding::from_bytes(m, bytes.data(), bytes.size()); }) == QVL_EFORMAT);

    qvl::media by_image, by_embedding;
    by_image.add(im);
    by_embedding.add(e);
    std::string want = m.chat(messages, &by_image);
    CHECK(!want.empty() && m.chat(messages, &by_embedding) == want);
    CHECK(by_engine(m, by_embedding) == want);
    callbacks(m, by_image, want, argv[1]);
    std::puts("ok");
    return 0;
}
