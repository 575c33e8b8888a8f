"""test_errors - everything that can be wrong with an input ends in a qvl.Error of the right code whose message names the thing.

Each case runs while a request is in flight in an engine; afterwards that request, and a new one on the same model, must give
the answer they give without the bad input.
"""
import base64
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest

import qvl
import support
from support import drain, image_path, user

CASES = []


def bad(name, pattern):
    """The decorated function f(w, tmp) must raise qvl.Error of this name; the message must match the pattern."""
    def add(f):
        CASES.append(pytest.param(name, pattern, f, id=f.__name__))
        return f
    return add


class World:
    """A model, an engine of it, and a question whose answer is known."""

    def __init__(self, model):
        self.model = model
        self.engine = qvl.Engine(model, max_requests=2, max_context=256, max_batched_tokens=32)
        self.messages = user(image_path("tiny_10x10.png"), "What is this?")
        self.options = dict(temperature=0, max_tokens=6, ignore_eos=True)
        self.prompt = model.prompt(self.messages)
        self.text = model.prompt(user("Hello"))
        self.want = model.chat(self.messages, **self.options).tokens

    def ask(self, content, **options):
        return self.model.prompt([{"role": "user", "content": content}], **options)


@pytest.fixture(scope="module")
def world(load):
    return World(load("tied", dtype="f32"))


@pytest.mark.parametrize("name,pattern,call", CASES)
def test_bad_input(world, tmp_path, name, pattern, call):
    request = world.engine.submit(world.prompt, **world.options)
    early = [e.token for e in world.engine.step(timeout=0)]
    try:
        with pytest.raises(qvl.Error) as caught:
            call(world, tmp_path)
    finally:
        answer = early + drain(world.engine, {request})[request].tokens
    error = caught.value
    assert re.fullmatch(name, error.name), error
    assert re.search(pattern, error.message), error
    assert error.code < 0 and "\n" not in error.message and error.message in str(error)
    assert answer == world.want
    assert world.model.chat(world.messages, **world.options).tokens == world.want
    stats = world.engine.stats
    assert stats["kv"]["blocks_used"] == 0 and stats["requests"]["running"] == stats["requests"]["waiting"] == 0


# -------------------------------------------------------------------------------------------------------------- images

def png(width, height, colour=2, depth=8, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))


def photo():
    return image_path("photo_320x240.jpg").read_bytes()


def uri(data, kind="image/jpeg"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


@bad("QVL_EFORMAT", r"truncated\.jpg.*JPEG")
def image_truncated_jpeg(w, tmp): qvl.Image(image_path("bad/truncated.jpg"))


@bad("QVL_EFORMAT", r"truncated\.png.*PNG")
def image_truncated_png(w, tmp): qvl.Image(image_path("bad/truncated.png"))


@bad("QVL_EFORMAT", r"WebP")
def image_truncated_webp(w, tmp): qvl.Image(image_path("extra/lossy.webp").read_bytes()[:-200])


@bad("QVL_EFORMAT", r"zero_width\.png")
def image_of_no_width(w, tmp): qvl.Image(image_path("bad/zero_width.png"))


@bad("QVL_EFORMAT", r"empty\.png.*empty")
def image_empty_file(w, tmp): qvl.Image(image_path("bad/empty.png"))


@bad("QVL_EFORMAT", r"empty")
def image_no_bytes(w, tmp): qvl.Image(b"")


@bad("QVL_EFORMAT", r"not_an_image\.png.*JPEG, PNG")
def image_wrong_magic(w, tmp): qvl.Image(image_path("bad/not_an_image.png"))


@bad("QVL_EUNSUPPORTED", r"JPEG, PNG")
def image_gif(w, tmp): qvl.Image(b"GIF89a" + bytes(100))


@bad("QVL_EFORMAT", r"PNG")
def image_png_of_noise(w, tmp): qvl.Image(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))


@bad("QVL_EFORMAT", r"JPEG")
def image_jpeg_header_only(w, tmp): qvl.Image(photo()[:300])


@bad("QVL_EFORMAT", r"PNG")
def image_png_bad_checksum(w, tmp):
    data = bytearray(image_path("rgb_256x256.png").read_bytes())
    data[len(data) // 2] ^= 0x55
    qvl.Image(bytes(data))


@bad("QVL_EIO", r"no_such\.jpg")
def image_no_file(w, tmp): qvl.Image(tmp / "no_such.jpg")


@bad("QVL_EIO", r"directory")
def image_directory(w, tmp): qvl.Image(tmp)


@bad("QVL_ELIMIT", r"60000 x 60000.*max_image_pixels")
def image_bomb(w, tmp): qvl.Image(png(60000, 60000, body=b"\0" * 100))


@bad("QVL_ELIMIT", r"320 x 240.*max_image_pixels")
def image_over_pixel_limit(w, tmp): qvl.Image(image_path("photo_320x240.jpg"), max_image_pixels=320 * 240 - 1)


@bad("QVL_ELIMIT", r"photo_320x240\.jpg.*18618 bytes.*1000")
def image_over_byte_limit(w, tmp): qvl.Image(image_path("photo_320x240.jpg"), max_image_bytes=1000)


@bad("QVL_ELIMIT", r"messages\[0\]\.content\[0\].*max_image_pixels")
def image_over_limit_in_prompt(w, tmp): w.ask([{"type": "image", "image": image_path("photo_320x240.jpg")}], max_image_pixels=100)


@bad("QVL_EINVAL", r"option max_image_pixels.*range")
def image_option_out_of_range(w, tmp): qvl.Image(photo(), max_image_pixels=0)


@bad("QVL_EINVAL", r"uint8\[height, width, 3\].*float64")
def image_float_array(w, tmp): qvl.Image(np.zeros((4, 4, 3)))


@bad("QVL_EINVAL", r"uint8\[height, width, 3\].*\[4, 4, 4\]")
def image_four_channels(w, tmp): qvl.Image(np.zeros((4, 4, 4), np.uint8))


@bad("QVL_EINVAL", r"both sides must be at least 1")
def image_empty_array(w, tmp): qvl.Image(np.zeros((0, 4, 3), np.uint8))


@bad("QVL_EINVAL", r"path, bytes or a uint8 array.*int")
def image_of_a_number(w, tmp): qvl.Image(42)


@bad("QVL_ELIMIT", r"201.*200")
def image_aspect_patches(w, tmp): w.model.patches(image_path("bad/ratio_201x1.png"))


@bad("QVL_ELIMIT", r"messages\[0\]\.content\[1\].*200")
def image_aspect_prompt(w, tmp): w.model.prompt(user("x", image_path("bad/ratio_201x1.png")))


@bad("QVL_EINVAL", r"min_pixels.*max_pixels")
def image_pixels_crossed(w, tmp): w.model.patches(image_path("tiny_10x10.png"), min_pixels=100000, max_pixels=5000)


# ------------------------------------------------------------------------------------------------ messages and their data

@bad("QVL_EFORMAT", r"messages: .*line 1")
def messages_not_json(w, tmp): w.model.prompt('[{"role": "user", "content": ')


@bad("QVL_EFORMAT", r"messages")
def messages_empty_text(w, tmp): w.model.prompt("")


@bad("QVL_EFORMAT", r"messages")
def messages_duplicate_depth(w, tmp): w.model.prompt("[" * 100000)


@bad("QVL_EINVAL", r"messages: is empty")
def messages_none(w, tmp): w.model.prompt([])


@bad("QVL_EINVAL", r"messages: must be an array")
def messages_object(w, tmp): w.model.prompt({"role": "user", "content": "x"})


@bad("QVL_EINVAL", r"messages\[1\]: must be an object")
def messages_of_strings(w, tmp): w.model.prompt([{"role": "user", "content": "x"}, "hello"])


@bad("QVL_EINVAL", r"messages\[0\]\.role")
def messages_no_role(w, tmp): w.model.prompt([{"content": "x"}])


@bad("QVL_EINVAL", r"messages\[0\]\.content")
def messages_number_content(w, tmp): w.ask(7)


@bad("QVL_EINVAL", r"messages\[0\]\.content\[0\].*audio")
def messages_unknown_part(w, tmp): w.ask([{"type": "audio", "audio": "x"}])


@bad("QVL_EINVAL", r"messages\[0\]\.content\[0\]")
def messages_text_without_text(w, tmp): w.ask([{"type": "text"}])


@bad("QVL_EINVAL", r"messages: .*(cannot stand|serializable)")
def messages_of_objects(w, tmp): w.ask(object())


@bad("QVL_EINVAL", r"messages: .*(NaN|JSON compliant)")
def messages_with_nan(w, tmp): w.model.prompt([{"role": "user", "content": "x", "weight": float("nan")}])


@bad("QVL_EINVAL", r"messages: .*[Cc]ircular")
def messages_circular(w, tmp):
    message = {"role": "user", "content": "x"}
    message["self"] = message
    w.model.prompt([message])


@bad("QVL_EINVAL", r"messages.*leaves all of them out")
def messages_all_dropped(w, tmp): w.model.prompt([{"role": "developer", "content": "x"}], add_generation_prompt=False)


@bad("QVL_EFORMAT", r"messages")
def messages_lone_surrogate(w, tmp): w.ask("\ud800")


@bad("QVL_EINVAL", r"tools: must be an array")
def tools_object(w, tmp): w.model.prompt(user("x"), tools={"name": "f"})


@bad("QVL_EINVAL", r"1 image.*0 entries")
def media_missing(w, tmp): w.ask([{"type": "image"}, {"type": "text", "text": "x"}])


@bad("QVL_EINVAL", r"0 image.*1 entr")
def media_left_over(w, tmp): w.model.prompt(user("x"), images=[photo()])


@bad("QVL_EINVAL", r"1 image.*2 entries")
def media_one_too_many(w, tmp): w.model.prompt([{"role": "user", "content": [{"type": "image"}]}], images=[photo(), photo()])


@bad("QVL_EINVAL", r"messages\[0\]\.content\[0\]: the part is a video")
def media_wrong_kind(w, tmp): w.model.prompt([{"role": "user", "content": [{"type": "video", "fps": 1}]}], images=[photo()])


@bad("QVL_EUNSUPPORTED", r"messages\[0\]\.content\[0\]: .*http://example\.com/cat\.png.*not a data URI")
def url_http(w, tmp): w.ask([{"type": "image_url", "image_url": {"url": "http://example.com/cat.png"}}])


@bad("QVL_EUNSUPPORTED", r"https://example\.com")
def url_https_as_image(w, tmp): w.ask([{"type": "image", "image": "https://example.com/cat.png"}])


@bad("QVL_EUNSUPPORTED", r"file:///etc")
def url_file(w, tmp): w.ask([{"type": "image_url", "image_url": "file:///etc/hostname"}])


@bad("QVL_EUNSUPPORTED", r"not a data URI")
def url_local_path(w, tmp): w.ask([{"type": "image_url", "image_url": {"url": str(image_path("photo_320x240.jpg"))}}])


@bad("QVL_EUNSUPPORTED", r"not a data URI")
def url_local_path_in_json(w, tmp):
    w.model.prompt(json.dumps([{"role": "user", "content": [{"type": "image", "image": str(image_path("photo_320x240.jpg"))}]}]))


@bad("QVL_EINVAL", r"messages\[0\]\.content\[0\].*url")
def url_missing(w, tmp): w.ask([{"type": "image_url", "image_url": {}}])


@bad("QVL_EFORMAT", r"messages\[0\]\.content\[0\].*base64")
def data_uri_bad_base64(w, tmp): w.ask([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@@"}}])


@bad("QVL_E(FORMAT|UNSUPPORTED)", r"messages\[0\]\.content\[0\].*base64")
def data_uri_not_base64(w, tmp): w.ask([{"type": "image", "image": "data:image/png,abc"}])


@bad("QVL_EFORMAT", r"messages\[0\]\.content\[0\]")
def data_uri_empty(w, tmp): w.ask([{"type": "image", "image": "data:image/png;base64,"}])


@bad("QVL_EFORMAT", r"messages\[0\]\.content\[1\].*JPEG")
def data_uri_truncated_jpeg(w, tmp): w.ask([{"type": "text", "text": "x"}, {"type": "image", "image": uri(photo()[:3000])}])


@bad("QVL_E(FORMAT|UNSUPPORTED)", r"messages\[0\]\.content.*JPEG, PNG")
def data_uri_markdown_no_image(w, tmp): w.ask("look ![a](" + uri(b"hello, this is no image at all", "image/png") + ")")


@bad("QVL_EINVAL", r"messages\[0\]\.content\[0\]: .*fps")
def video_without_fps(w, tmp): w.ask([{"type": "video", "video": support.frames("v1")}])


@bad("QVL_EINVAL", r"fps")
def video_zero_fps(w, tmp): w.ask([{"type": "video", "video": support.frames("v1"), "fps": 0}])


@bad("QVL_EINVAL", r"video must be an array of at least one")
def video_no_frames(w, tmp): w.ask([{"type": "video", "video": [], "fps": 1}])


@bad("QVL_EINVAL", r"video\[1\].*64 x 80.*96 x 64")
def video_frames_of_two_sizes(w, tmp):
    w.ask([{"type": "video", "video": [support.frames("v1")[0], support.frames("v2")[0]], "fps": 1, "do_sample_frames": False}])


@bad("QVL_EFORMAT", r"messages\[0\]\.content\[0\]: video\[1\]: .*truncated\.png")
def video_damaged_frame(w, tmp):
    w.ask([{"type": "video", "video": [support.frames("v1")[0], image_path("bad/truncated.png")], "fps": 1}])


@bad("QVL_EUNSUPPORTED", r"video files are not decoded")
def video_file(w, tmp): w.ask([{"type": "video", "video": "film.mp4", "fps": 1}])


# ------------------------------------------------------------------------------------------------------------- options

@bad("QVL_EINVAL", r'unknown option "temprature"')
def option_unknown(w, tmp): w.engine.submit(w.text, temprature=1)


@bad("QVL_EINVAL", r'unknown option "colour"')
def option_unknown_of_unknown_type(w, tmp): w.model.chat(user("x"), colour=object())


@bad("QVL_EINVAL", r"option temperature.*-0?\.1.*0\.\.100")
def option_temperature_range(w, tmp): w.engine.submit(w.text, temperature=-0.1)


@bad("QVL_EINVAL", r"option temperature")
def option_temperature_nan(w, tmp): w.engine.submit(w.text, temperature=float("nan"))


@bad("QVL_EINVAL", r"option top_p.*1\.5.*range")
def option_top_p_range(w, tmp): w.engine.submit(w.text, top_p=1.5)


@bad("QVL_EINVAL", r"option max_tokens.*range")
def option_max_tokens_zero(w, tmp): w.engine.submit(w.text, max_tokens=0)


@bad("QVL_EINVAL", r'option max_tokens: "many" is not an int')
def option_max_tokens_text(w, tmp): w.engine.submit(w.text, max_tokens="many")


@bad("QVL_EINVAL", r"option max_tokens")
def option_max_tokens_fraction(w, tmp): w.engine.submit(w.text, max_tokens=2.5)


@bad("QVL_EINVAL", r"option seed")
def option_seed_too_large(w, tmp): w.engine.submit(w.text, seed=2**64)


@bad("QVL_EINVAL", r"option stop.*17 strings")
def option_stop_too_many(w, tmp): w.engine.submit(w.text, stop=[str(i) for i in range(17)])


@bad("QVL_EINVAL", r"option stop.*empty")
def option_stop_empty(w, tmp): w.engine.submit(w.text, stop=[""])


@bad("QVL_EINVAL", r"option stop.*not a string")
def option_stop_number(w, tmp): w.engine.submit(w.text, stop=[1])


@bad("QVL_EINVAL", r"option stop_token_ids.*entry 1")
def option_stop_ids_range(w, tmp): w.engine.submit(w.text, stop_token_ids=[1, 10**6])


@bad("QVL_EINVAL", r"logit_bias.*999999")
def option_bias_range(w, tmp): w.engine.submit(w.text, logit_bias={999999: 1})


@bad("QVL_EINVAL", r"logit_bias")
def option_bias_text(w, tmp): w.engine.submit(w.text, logit_bias={"abc": 1})


@bad("QVL_EINVAL", r"option logprobs.*range")
def option_logprobs_range(w, tmp): w.engine.submit(w.text, logprobs=65)


@bad("QVL_EINVAL", r"option dtype.*int3")
def option_dtype(w, tmp): qvl.Model(support.CHECKPOINTS["tied"], dtype="int3")


@bad("QVL_EINVAL", r"option device.*quantum")
def option_device(w, tmp): qvl.Model(support.CHECKPOINTS["tied"], device="quantum")


@bad("QVL_EINVAL", r"option kv_dtype.*int2")
def option_kv_dtype(w, tmp): qvl.Engine(w.model, kv_dtype="int2")


@bad("QVL_EINVAL", r"option max_context.*max_position_embeddings")
def option_context_beyond_model(w, tmp): qvl.Engine(w.model, max_context=1 << 20)


@bad("QVL_EINVAL", r"option video_layout.*other")
def option_video_layout(w, tmp): w.ask("x", video_layout="other")


# ------------------------------------------------------------------------------------------------ tokens, context, handles

@bad("QVL_EINVAL", r"token 1 is 4096")
def tokens_out_of_range(w, tmp): w.model.prompt_from_tokens([1, 4096])


@bad("QVL_EINVAL", r"token 0 is -1")
def tokens_negative(w, tmp): w.model.logits([-1])


@bad("QVL_EINVAL", r"tokens: .*32 bits")
def tokens_huge(w, tmp): w.model.prompt_from_tokens([2**40])


@bad("QVL_EINVAL", r"tokens: .*integers.*float")
def tokens_float(w, tmp): w.model.prompt_from_tokens([1.5])


@bad("QVL_EINVAL", r"at least one token")
def tokens_none(w, tmp): w.model.prompt_from_tokens([])


@bad("QVL_EINVAL", r"token 2 is <\|image_pad\|>")
def tokens_image_pad(w, tmp): w.model.prompt_from_tokens([1, 2] + w.model.encode_text("<|image_pad|>", parse_special=True))


@bad("QVL_EINVAL", r"token 0 is <\|video_pad\|>")
def tokens_video_pad(w, tmp): w.engine.submit(w.model.encode_text("<|video_pad|>", parse_special=True))


@bad("QVL_EINVAL", r"\b99999\b")
def decode_out_of_range(w, tmp): w.model.decode_tokens([1, 99999])


@bad("QVL_ECONTEXT", r"300 tokens.*max_context is 256")
def context_prompt_too_long(w, tmp): w.engine.submit([1] * 300)


@bad("QVL_ECONTEXT", r"200 tokens.*max_tokens 100.*max_context 256")
def context_answer_too_long(w, tmp): w.engine.submit([1] * 200, max_tokens=100)


@bad("QVL_ECONTEXT", r"kv_blocks")
def context_kv_blocks(w, tmp): qvl.Engine(w.model, max_context=256, kv_blocks=2).submit([1] * 50, max_tokens=50)


@bad("QVL_ECONTEXT", r"messages\[0\].*tokens.*max_pixels")
def context_too_many_pictures(w, tmp):
    tiny = qvl.Model(support.CHECKPOINTS["qvl-tiny"], threads=1)
    picture = qvl.Image(np.zeros((256, 256, 3), np.uint8))
    tiny.prompt([{"role": "user", "content": [{"type": "image"}] * 70}], images=[picture] * 70)


@bad("QVL_EINVAL", r"another model")
def prompt_of_another_model(w, tmp):
    other = qvl.Model(support.CHECKPOINTS["qvl-tiny"], threads=1)
    w.engine.submit(other.prompt(user("x")))


@bad("QVL_EINVAL", r"another model")
def logits_of_another_model(w, tmp):
    other = qvl.Model(support.CHECKPOINTS["untied"], threads=1)
    w.model.logits(other.prompt(user("x")))


@bad("QVL_EMISUSE", r"Image is closed")
def closed_image(w, tmp):
    im = qvl.Image(photo())
    im.close()
    im.to_numpy()


@bad("QVL_EMISUSE", r"Engine is closed")
def closed_engine(w, tmp):
    with qvl.Engine(w.model, max_context=64) as engine:
        pass
    engine.submit(w.text)


# ---------------------------------------------------------------------------------------------------------- embeddings

def embedding(w):
    return w.model.encode_image(image_path("tiny_10x10.png")).to_bytes()


@bad("QVL_EFORMAT", r"other weights")
def embedding_of_another_model(w, tmp):
    other = qvl.Model(support.CHECKPOINTS["untied"], threads=1)
    qvl.Embedding.from_bytes(w.model, other.encode_image(image_path("tiny_10x10.png")).to_bytes())


@bad("QVL_EINVAL", r"messages\[0\]\.content\[0\].*model")
def embedding_of_another_model_in_prompt(w, tmp):
    other = qvl.Model(support.CHECKPOINTS["untied"], threads=1)
    w.model.prompt(user(other.encode_image(image_path("tiny_10x10.png")), "x"))


@bad("QVL_EFORMAT", r"checksum")
def embedding_flipped_bit(w, tmp):
    data = bytearray(embedding(w))
    data[len(data) // 2] ^= 1
    qvl.Embedding.from_bytes(w.model, data)


@bad("QVL_EFORMAT", r"embedding")
def embedding_flipped_header(w, tmp):
    data = bytearray(embedding(w))
    data[20] ^= 0xFF
    qvl.Embedding.from_bytes(w.model, data)


@bad("QVL_EFORMAT", r"cut off or damaged")
def embedding_cut(w, tmp): qvl.Embedding.from_bytes(w.model, embedding(w)[:-1])


@bad("QVL_EFORMAT", r"embedding")
def embedding_longer(w, tmp): qvl.Embedding.from_bytes(w.model, embedding(w) + b"\0")


@bad("QVL_EFORMAT", r"0 bytes")
def embedding_empty(w, tmp): qvl.Embedding.from_bytes(w.model, b"")


@bad("QVL_EFORMAT", r"header")
def embedding_noise(w, tmp): qvl.Embedding.from_bytes(w.model, bytes(1000))


@bad("QVL_EINVAL", r"embedding cannot be a frame")
def embedding_as_frame(w, tmp):
    e = w.model.encode_image(image_path("tiny_10x10.png"))
    w.ask([{"type": "video", "video": [e, e], "fps": 1}])


# ---------------------------------------------------------------------------------------------------------- checkpoints

def copy(tmp, name="tied"):
    """A copy whose files can be damaged one by one: links until then."""
    out = tmp / "checkpoint"
    out.mkdir()
    for f in support.CHECKPOINTS[name].iterdir():
        if f.is_file():
            (out / f.name).symlink_to(f.resolve())
    return out


def replace(path, data):
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def edit(path, change):
    """change(parsed JSON) changes it in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    replace(path, json.dumps(value))


def edit_weights(path, change):
    tensors = support.raw_safetensors(path)
    change(tensors)
    path.unlink()
    support.write_safetensors(path, tensors)


def damage(name, pattern, file, change, checkpoint="tied", **options):
    """A case that damages one file: change(path), or change(parsed JSON) for .json files of the configuration."""
    def add_case(ident):
        def call(w, tmp):
            folder = copy(tmp, checkpoint)
            change(folder / file)
            qvl.Model(folder, threads=1, **options)
        call.__name__ = ident
        bad(name, pattern)(call)
    return add_case


def config(name, ident, pattern, change, file="config.json", **options):
    damage(name, pattern, file, lambda path: edit(path, change), **options)("config_" + ident)


def text(**values): return lambda c: c["text_config"].update(values)
def vision(**values): return lambda c: c["vision_config"].update(values)
def rope(**values): return lambda c: c["text_config"]["rope_scaling"].update(values)


@bad("QVL_EIO", r"no_such_model.*config\.json")
def checkpoint_no_directory(w, tmp): qvl.Model(tmp / "no_such_model")


@bad("QVL_EIO", r"model\.safetensors")
def checkpoint_no_weights(w, tmp):
    folder = copy(tmp)
    (folder / "model.safetensors").unlink()
    qvl.Model(folder)


@bad("QVL_EIO", r"(tokenizer|vocab)\.json")
def checkpoint_no_tokenizer(w, tmp):
    folder = copy(tmp)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    qvl.Model(folder)


config("QVL_EUNSUPPORTED", "older_model", r"Qwen2_5_VLForConditionalGeneration",
       lambda c: c.update(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl"))
config("QVL_EUNSUPPORTED", "half_moe", r"model_type",
       lambda c: c.update(architectures=["Qwen3VLMoeForConditionalGeneration"], model_type="qwen3_vl_moe"))
config("QVL_EUNSUPPORTED", "llama", r"llama", lambda c: c.update(architectures=["LlamaForCausalLM"], model_type="llama"))
config("QVL_EUNSUPPORTED", "quantised", r"quantization_config: quant_method gptq is not supported", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
config("QVL_EUNSUPPORTED", "rope_type", r'rope_type is "longrope"', rope(rope_type="longrope"))
config("QVL_EFORMAT", "yarn_length", r"original_max_position_embeddings is missing", rope(rope_type="yarn", factor=2.0))
config("QVL_EFORMAT", "yarn_factor", r"factor is not a number from 1 to", rope(rope_type="yarn", factor=0.5, original_max_position_embeddings=4096))
config("QVL_EUNSUPPORTED", "rope_sectioned", r"mrope_interleaved", rope(mrope_interleaved=False))
config("QVL_EFORMAT", "rope_section_sum", r"mrope_section adds up to 63", rope(mrope_section=[24, 20, 19]))
config("QVL_EFORMAT", "rope_section_negative", r"mrope_section", rope(mrope_section=[104, -20, -20]))
config("QVL_EUNSUPPORTED", "activation", r'hidden_act is "gelu"', text(hidden_act="gelu"))
config("QVL_EUNSUPPORTED", "patch_size", r"patch_size is 14", vision(patch_size=14))
config("QVL_EFORMAT", "no_hidden_size", r"text_config\.hidden_size is missing", lambda c: c["text_config"].pop("hidden_size"))
config("QVL_EFORMAT", "huge_layers", r"num_hidden_layers is 1000000000000", text(num_hidden_layers=10**12))
config("QVL_EFORMAT", "text_layers", r"num_hidden_layers is not an integer", text(num_hidden_layers="4"))
config("QVL_EFORMAT", "more_layers", r"layers\.4\..* is missing", text(num_hidden_layers=5))
config("QVL_EUNSUPPORTED", "fewer_layers", r"layers\.3\.", text(num_hidden_layers=3))
config("QVL_EFORMAT", "other_width", r"tensor model\.language_model\.\S+ has shape", text(intermediate_size=320))
config("QVL_EFORMAT", "heads", r"num_attention_heads 4 .* num_key_value_heads 3", text(num_key_value_heads=3))
config("QVL_EFORMAT", "zero_heads", r"num_attention_heads is 0", text(num_attention_heads=0))
config("QVL_EFORMAT", "deepstack", r"deepstack_visual_indexes", vision(deepstack_visual_indexes=[1, 2, 99]))
config("QVL_EFORMAT", "positions", r"num_position_embeddings 2300", vision(num_position_embeddings=2300))
config("QVL_EFORMAT", "image_token", r"image_token_id is 999999", lambda c: c.update(image_token_id=999999))
config("QVL_EFORMAT", "no_vision", r"vision_config", lambda c: c.pop("vision_config"))
config("QVL_EFORMAT", "small_vocabulary", r"ids up to 4095.*vocab_size is 4090", text(vocab_size=4090))
config("QVL_EFORMAT", "temperature", r"generation_config\.json.*temperature", lambda g: g.update(temperature=-1, do_sample=True),
       file="generation_config.json")
config("QVL_EFORMAT", "eos", r"generation_config\.json.*eos_token_id", lambda g: g.update(eos_token_id=10**6),
       file="generation_config.json")
config("QVL_EFORMAT", "processor", r"preprocessor_config\.json.*above", lambda p: p["size"].update(shortest_edge=10**9),
       file="preprocessor_config.json")



@bad("QVL_EUNSUPPORTED", r"chat template.*chat_template=")
def config_template(w, tmp):
    """Tokens, logits and embeddings need no template; a chat does."""
    folder = copy(tmp)
    edit(folder / "chat_template.json", lambda c: c.update(chat_template="{{ messages[0].content }}"))
    model = qvl.Model(folder, threads=1, dtype="f32")
    assert model.logits([1, 2]).tobytes() == w.model.logits([1, 2]).tobytes()
    assert qvl.Model(folder, threads=1, chat_template="instruct").render_chat(user("x")) == w.model.render_chat(user("x"))
    model.chat(user("x"))


damage("QVL_EFORMAT", r"config\.json.*line", "config.json", lambda p: replace(p, '{"model_type": "qwen3_vl",}'))("config_not_json")
damage("QVL_EFORMAT", r"config\.json", "config.json", lambda p: replace(p, b""))("config_empty")
damage("QVL_EFORMAT", r"config\.json", "config.json", lambda p: replace(p, b"\xff\xfe{}"))("config_not_utf8")
damage("QVL_EFORMAT", r"config\.json", "config.json", lambda p: replace(p, "[1, 2]"))("config_array")

WEIGHTS = "model.safetensors"
NORM = "model.language_model.layers.1.input_layernorm.weight"
EMBED = "model.language_model.embed_tokens.weight"

damage("QVL_EFORMAT", rf"tensor {NORM} is missing", WEIGHTS,
       lambda p: edit_weights(p, lambda t: t.pop(NORM)))("weights_missing_tensor")
damage("QVL_EUNSUPPORTED", r"tensor model\.extra", WEIGHTS,
       lambda p: edit_weights(p, lambda t: t.update({"model.extra": ("F32", [2], bytes(8))})))("weights_extra_tensor")
damage("QVL_EFORMAT", rf"tensor {NORM} has shape 127", WEIGHTS,
       lambda p: edit_weights(p, lambda t: t.update({NORM: (t[NORM][0], [127], t[NORM][2][:254])})))("weights_wrong_shape")
damage("QVL_EFORMAT", rf"{NORM}.*254 bytes", WEIGHTS,
       lambda p: edit_weights(p, lambda t: t.update({NORM: (t[NORM][0], [128], t[NORM][2][:254])})))("weights_too_few_bytes")
damage("QVL_EUNSUPPORTED", rf"{NORM}.*I16", WEIGHTS,
       lambda p: edit_weights(p, lambda t: t.update({NORM: ("I16",) + t[NORM][1:]})))("weights_integer_type")
damage("QVL_EUNSUPPORTED", rf"{NORM}.*F4", WEIGHTS,
       lambda p: edit_weights(p, lambda t: t.update({NORM: ("F4",) + t[NORM][1:]})))("weights_unknown_type")
damage("QVL_EFORMAT", r"model\.safetensors.*truncated", WEIGHTS,
       lambda p: replace(p, p.read_bytes()[:-1000]))("weights_truncated")
damage("QVL_EFORMAT", r"model\.safetensors.*truncated", WEIGHTS,
       lambda p: replace(p, p.read_bytes()[:500]))("weights_header_truncated")
damage("QVL_EFORMAT", r"model\.safetensors.*too short", WEIGHTS, lambda p: replace(p, b"abc"))("weights_three_bytes")
damage("QVL_EFORMAT", r"model\.safetensors", WEIGHTS, lambda p: replace(p, b"\xff" * 4096))("weights_noise")
damage("QVL_EFORMAT", r"10 bytes follow", WEIGHTS, lambda p: replace(p, p.read_bytes() + bytes(10)))("weights_tail")


def overlap(path):
    data = path.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 2, end - 2]
    text = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(text)) + text + data[8 + size:])


damage("QVL_EFORMAT", r"overlaps another one or leaves a gap", WEIGHTS, overlap)("weights_overlap")

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
damage("QVL_EIO", r"model-00009", INDEX, lambda p: edit(p, lambda i: i["weight_map"].update(x="model-00009.safetensors")),
       checkpoint="untied")("index_no_such_shard")
damage("QVL_EFORMAT", r"outside", INDEX, lambda p: edit(p, lambda i: i["weight_map"].update(x="../../etc/passwd")),
       checkpoint="untied")("index_path_escapes")
damage("QVL_EFORMAT", r"weight_map", INDEX, lambda p: replace(p, "{}"), checkpoint="untied")("index_empty")
damage("QVL_EFORMAT", r"index\.json", INDEX, lambda p: replace(p, "{"), checkpoint="untied")("index_not_json")
damage("QVL_EIO", SHARD, SHARD, lambda p: p.unlink(), checkpoint="untied")("shard_missing")
damage("QVL_EFORMAT", SHARD + ".*truncated", SHARD, lambda p: replace(p, p.read_bytes()[:-64]),
       checkpoint="untied")("shard_truncated")
damage("QVL_EFORMAT", r"stored twice", SHARD, lambda p: replace(p, (p.parent / "model-00001-of-00003.safetensors").read_bytes()),
       checkpoint="untied")("shard_twice")

TOKENIZER = "tokenizer.json"
damage("QVL_EFORMAT", r"tokenizer\.json", TOKENIZER, lambda p: replace(p, p.read_bytes()[:20000]))("tokenizer_truncated")
damage("QVL_EUNSUPPORTED", r"tokenizer\.json.*WordPiece", TOKENIZER,
       lambda p: edit(p, lambda t: t["model"].update(type="WordPiece")))("tokenizer_wordpiece")
damage("QVL_EUNSUPPORTED", r"tokenizer\.json.*NFKC", TOKENIZER,
       lambda p: edit(p, lambda t: t["normalizer"].update(type="NFKC")))("tokenizer_nfkc")
damage("QVL_EFORMAT", r"merge 0", TOKENIZER,
       lambda p: edit(p, lambda t: t["model"]["merges"].insert(0, ["zzzz", "qqqq"])))("tokenizer_merge_of_nothing")
damage("QVL_EFORMAT", r"same id", TOKENIZER,
       lambda p: edit(p, lambda t: t["model"]["vocab"].update(zzzz=7)))("tokenizer_id_twice")
damage("QVL_EFORMAT", r"zzzz", TOKENIZER,
       lambda p: edit(p, lambda t: t["model"]["vocab"].update(zzzz=-7)))("tokenizer_negative_id")
damage("QVL_EUNSUPPORTED", r"rstrip", TOKENIZER,
       lambda p: edit(p, lambda t: t["added_tokens"][0].update(rstrip=True)))("tokenizer_rstrip")


@bad("QVL_EFORMAT", r"vocab|ids")
def tokenizer_of_another_model(w, tmp):
    folder = copy(tmp, "qvl-tiny")  # a vocabulary of fewer tokens in the model than in this tokenizer
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        replace(folder / name, (support.CHECKPOINTS["tied"] / name).read_bytes())
    qvl.Model(folder, threads=1)


def poison(value):
    """The final norm's weights, all of one value."""
    def change(tensors):
        dtype, shape, raw = tensors["model.language_model.norm.weight"]
        tensors["model.language_model.norm.weight"] = ("F32", shape, np.full(shape, value, np.float32).tobytes())
    return change


@bad("QVL_ENUMERIC", r"not a finite number")
def weights_of_nan(w, tmp):
    folder = copy(tmp)
    edit_weights(folder / WEIGHTS, poison(np.nan))
    qvl.Model(folder, threads=1).chat(user("Hello"), temperature=0, max_tokens=4)


@bad("QVL_ECANCELLED", r"cancelled")
def load_cancelled_by_library_code(w, tmp):
    """The C contract itself: a callback that returns non-zero."""
    import ctypes
    from qvl import _lib
    callback = _lib._PROGRESS(lambda ud, done, total: 1)
    out = ctypes.c_void_p()
    with _lib.Options({}) as o:
        _lib.check(_lib.lib.qvl_options_set_progress(o, ctypes.cast(callback, ctypes.c_void_p), None))
        _lib.check(_lib.lib.qvl_model_load(ctypes.byref(out), os.fsencode(support.CHECKPOINTS["tied"]), o))


def test_number_of_cases(say):
    say(f"{len(CASES)} bad inputs")
    assert len(CASES) >= 40


# ------------------------------------------------------------------------------------------------- failures inside an engine

def test_failed_request_leaves_the_others(load, tmp_path):
    """Non-finite logits end their request with an error event; the engine goes on."""
    folder = copy(tmp_path)
    edit_weights(folder / WEIGHTS, poison(np.inf))
    engine = qvl.Engine(qvl.Model(folder, threads=1), max_requests=2, max_context=64)
    numbers = [engine.submit([1, 2, 3], temperature=0, max_tokens=4) for _ in range(3)]
    events = []
    while engine.active:
        events += engine.step(timeout=10)
    assert [e.type for e in events] == ["error"] * 3 and sorted(e.request for e in events) == numbers
    for e in events:
        assert e.error.code == -11 and e.error.message and e.token is None and e.finish_reason is None
    assert engine.stats["requests"]["failed"] == 3 and engine.stats["kv"]["blocks_used"] == 0


def test_every_image_cut_anywhere(say):
    """Each kind of image, cut at many places: an Error of a known code, or (where only a trailer is lost) the right pixels."""
    errors = good = 0
    for name in ("photo_320x240.jpg", "progressive_300x225.jpg", "rgba_160x120.png", "interlaced_rgb_133x97.png",
                 "extra/lossy.webp", "extra/lossless_alpha.webp"):
        data = image_path(name).read_bytes()
        whole = qvl.Image(data).to_numpy()
        for end in range(0, len(data), max(1, len(data) // 60)):
            try:
                assert np.array_equal(qvl.Image(data[:end]).to_numpy(), whole), (name, end)
                good += 1
            except qvl.Error as e:
                assert e.name in ("QVL_EFORMAT", "QVL_EUNSUPPORTED") and e.message, (name, end, e)
                errors += 1
    say(f"{errors} cut images refused, {good} read whole")
    assert errors > 300


def test_flipped_bytes():
    """Damage anywhere: an error or some pixels of the right shape, never a crash."""
    random = np.random.default_rng(1)
    for name in ("photo_320x240.jpg", "palette256_180x160.png", "extra/lossless.webp"):
        data = np.frombuffer(image_path(name).read_bytes(), np.uint8)
        for _ in range(60):
            hurt = data.copy()
            at = random.integers(0, len(hurt), 4)
            hurt[at] ^= random.integers(1, 256, 4).astype(np.uint8)
            try:
                im = qvl.Image(hurt.tobytes(), max_image_pixels=1 << 20)
                assert im.to_numpy().shape == (im.height, im.width, 3)
            except qvl.Error as e:
                assert e.name in ("QVL_EFORMAT", "QVL_EUNSUPPORTED", "QVL_ELIMIT"), e
