"""model - a loaded model: tokenizer, templates, pictures, prompts, logits, answers.

Job:        Model, Tokenizer, Prompt, Completion and the one-call chat over an engine of its own.
Input:      a checkpoint directory; messages; pictures.
Output:     ids, text, numpy arrays, Completion.
Invariants: a Model is immutable and may be used from any thread; everything made from it keeps it alive.
"""
from __future__ import annotations

import ctypes as C
import json
import os
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ._lib import (Error, Handle, Options, check, copy_array, lib, take_array, take_bytes, take_text, text_bytes, to_json,
                   token_array)
from .engine import Engine, Event, ReasoningSplitter
from .image import Embedding, to_image
from .messages import bare, split


class Tokenizer(Handle):
    """A tokenizer, from a directory with tokenizer.json or with vocab.json and merges.txt. Immutable, any thread."""

    __slots__ = ("_model",)
    _model: "Model"

    def __init__(self, directory: Union[str, os.PathLike]) -> None:
        out = C.c_void_p()
        check(lib.qvl_tokenizer_load(C.byref(out), _path(directory)))
        self._own(out, lib.qvl_tokenizer_free)

    @classmethod
    def _borrow(cls, model: "Model") -> "Tokenizer":
        self = cls.__new__(cls)
        self._model = model  # whose tokenizer it is
        self._own(C.c_void_p(lib.qvl_model_tokenizer(model)), lambda _: None)
        return self

    def encode_text(self, text: str, parse_special: bool = False) -> List[int]:
        """Token ids of text. parse_special=False: everything is ordinary text, "<|im_end|>" too; True: added tokens become
        their ids. Lone surrogates count as U+FFFD."""
        data = text.encode("utf-8", "surrogatepass")
        ids, n = C.c_void_p(), C.c_size_t()
        check(lib.qvl_tokenize(self, data, len(data), int(parse_special), C.byref(ids), C.byref(n)))
        return take_array(ids, (n.value,), np.int32).tolist()

    def decode_tokens(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises Error QVL_EINVAL for an id out of range."""
        given = token_array(ids)
        text, size = C.c_void_p(), C.c_size_t()
        check(lib.qvl_detokenize(self, given.ctypes.data, given.size, int(skip_special), C.byref(text), C.byref(size)))
        return take_bytes(text, size.value).decode("utf-8", "replace")


class Prompt(Handle):
    """What the model reads: tokens, their positions, pixels. Made by Model.prompt. Immutable, any thread."""

    __slots__ = ()

    def __init__(self) -> None:
        raise TypeError("prompts come from Model.prompt and Model.prompt_from_tokens")

    @classmethod
    def _adopt(cls, pointer: C.c_void_p) -> "Prompt":
        self = cls.__new__(cls)
        self._own(pointer, lib.qvl_prompt_free)
        return self

    @property
    def tokens(self) -> List[int]:
        """Token ids; an image or a frame pair is a run of pad tokens."""
        ids, n = C.c_void_p(), C.c_size_t()
        check(lib.qvl_prompt_tokens(self, C.byref(ids), C.byref(n)))
        return copy_array(ids.value, (n.value,), np.int32).tolist()

    @property
    def positions(self) -> np.ndarray:
        """int32[3, n]: position of every token in time, height and width (M-RoPE)."""
        data, n = C.c_void_p(), C.c_size_t()
        check(lib.qvl_prompt_positions(self, C.byref(data), C.byref(n)))
        return copy_array(data.value, (3, n.value), np.int32)

    @property
    def text(self) -> str:
        """The rendered chat template, placeholders not expanded; "" for a prompt made from tokens."""
        return lib.qvl_prompt_text(self).decode("utf-8", "replace")

    def __len__(self) -> int:
        n = C.c_size_t()
        check(lib.qvl_prompt_tokens(self, None, C.byref(n)))
        return n.value

    def __repr__(self) -> str:
        return f"<qvl.Prompt, {len(self)} tokens>" if not self.closed else "<qvl.Prompt, closed>"


class TokenLogprob(NamedTuple):
    """A generated token, its log-probability and the most likely tokens at its place as (token, logprob), best first."""
    token: int
    logprob: float
    top: List[Tuple[int, float]]


class Completion(NamedTuple):
    """A whole answer."""
    text: str                                # without the end token, stop string and reasoning
    reasoning: Optional[str]                 # what a thinking model wrote before "</think>"; None for other models
    tokens: List[int]                        # all that were generated, an end token included
    finish_reason: str                       # "stop" or "length"
    usage: Dict[str, int]                    # prompt_tokens, completion_tokens, total_tokens, image_tokens
    logprobs: Optional[List[TokenLogprob]]   # one for each token, with option logprobs
    timings: Dict[str, Optional[float]]      # milliseconds: queue_ms, vision_ms, prefill_ms, decode_ms, ttft_ms, total_ms
    logits: Optional[np.ndarray] = None      # float32[tokens, vocab], with option return_logits
    prompt_logprobs: Optional[List[Optional[TokenLogprob]]] = None  # of every prompt token but the first (None)


class Stream(Iterator[Event]):
    """The events of one answer as they come (Model.chat with stream=True). After the last one, `completion` holds the
    whole answer; until then it is None. Leaving early (close, with-block, exception, garbage collection) ends the request."""

    def __init__(self, engine: Engine, request: int, thinking: bool) -> None:
        self._engine: Optional[Engine] = engine
        self._request = request
        self._splitter = ReasoningSplitter(thinking)
        self._thinking = thinking
        self._ready: List[Event] = []
        self._text: List[str] = []
        self._reasoning: List[str] = []
        self._tokens: List[int] = []
        self._logprobs: List[TokenLogprob] = []
        self._logits: List[np.ndarray] = []
        self._prompt: List[Optional[TokenLogprob]] = []
        self.completion: Optional[Completion] = None

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Event:
        try:
            while not self._ready:
                if self._engine is None:
                    raise StopIteration
                self._ready = self._engine.step()
            return self._take(self._ready.pop(0))
        except BaseException:  # KeyboardInterrupt too: the request ends with its engine
            self.close()
            raise

    def _take(self, event: Event) -> Event:
        if event.error is not None:
            raise Error(*event.error)
        if event.type == "prompt":
            known = event.logprob is not None
            self._prompt.append(TokenLogprob(event.token, event.logprob, event.top_logprobs or []) if known else None)
            return event
        reasoning, text = self._splitter.feed(event.text)
        if event.type == "finished":
            more = self._splitter.end()
            reasoning, text = reasoning + more[0], text + more[1]
        self._reasoning.append(reasoning)
        self._text.append(text)
        if event.token is not None:
            self._tokens.append(event.token)
            if event.logprob is not None:
                self._logprobs.append(TokenLogprob(event.token, event.logprob, event.top_logprobs or []))
            if event.logits is not None:
                self._logits.append(event.logits)
        if event.type == "finished":
            self._finish(event)
        return event._replace(text=text, reasoning=reasoning)

    def _finish(self, event: Event) -> None:
        figures = event.usage or {}
        usage = {k: figures[k] for k in ("prompt_tokens", "completion_tokens", "image_tokens")}
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        self.completion = Completion(
            "".join(self._text), "".join(self._reasoning) if self._thinking else None, self._tokens, event.finish_reason or "",
            usage, self._logprobs or None, {k: v for k, v in figures.items() if k.endswith("_ms")},
            np.stack(self._logits) if self._logits else None, self._prompt or None)
        self.close()

    def close(self) -> None:
        """Ends the request if it is still running."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@lru_cache(maxsize=None)
def _default_max_tokens() -> int:
    from ._lib import options
    return int(next(o["default"] for o in options() if o["name"] == "max_tokens"))


def _path(path: Union[str, os.PathLike]) -> bytes:
    given = os.fspath(path)
    return text_bytes(given, "path") if isinstance(given, str) else given


def _report(given: Dict[str, Any], progress: Optional[Callable[[int, int], Any]], call: Callable[..., int]) -> Dict[str, Any]:
    """What call(options, out) reports as JSON; an exception of progress stops it."""
    text = C.c_void_p()
    with Options(given, progress or (lambda done, total: None)) as o:
        rc = call(o, C.byref(text))
        if o.failure is not None:
            if rc >= 0:
                take_text(text)
            raise o.failure
        check(rc)
    return json.loads(take_text(text))


def quantize(path: Union[str, os.PathLike], out: Union[str, os.PathLike], dtype: Optional[str] = None, threads: int = 0,
             progress: Optional[Callable[[int, int], Any]] = None, bits: float = 0, calibration: Optional[list] = None, **options: Any) -> Dict[str, Any]:
    """Writes the directory out: the model at path with weights of dtype ("int4", the default, "int8", "bf16", "f32" or "auto": as
    stored), laid out so that Model(out) only maps them. With bits, a mean for each weight, every matrix becomes int4, int8 or bf16, where
    they are worth most to the model's answers to calibration (conversations; None: some of the library's own). Returns
    the report: dtype, bytes, bits, and for each of the matrices its name, weights, bytes and relative error.
    `progress(done, total)` as for Model. Raises Error."""
    given: Dict[str, Any] = {"threads": threads, **options}
    if bits:
        given["bits"] = bits
    if dtype is not None or not bits:
        given["dtype"] = dtype or "int4"
    if calibration is not None:
        given["calibration"] = calibration
    return _report(given, progress, lambda o, text: lib.qvl_quantize(_path(path), _path(out), o, text))


def bench_kernels(dtype: str = "auto", threads: int = 0, progress: Optional[Callable[[int, int], Any]] = None) -> Dict[str, Any]:
    """Times the CPU's kernels one by one, about ten seconds: device, isa, threads, limits (GB/s read, GOP/s for each type) and
    kernels, each with its kernel, type, rows, ms, gb_s, gop_s, bound ("memory" or "arithmetic") and percent of that limit."""
    return _report({"dtype": dtype, "threads": threads}, progress, lib.qvl_bench_kernels)


class Model(Handle):
    """A Qwen3-VL checkpoint, loaded from a Hugging Face directory.

    device: "auto" (a GPU if there is one), "cpu" or "cuda". dtype: "auto" (as stored), "f32" (exact arithmetic on the
    stored weights), "bf16", "int8" or "int4" (rounded while loading; quantize() does that once and for all).
    threads: 0 for one per processor. Other options: chat_template. `progress(done, total)` is called with bytes while the
    weights load; an exception in it stops the load.
    Raises Error: QVL_EIO, QVL_EFORMAT (damaged checkpoint), QVL_EUNSUPPORTED (another architecture or template).
    A Model is immutable: use it from any thread. Long calls release the GIL.
    """

    __slots__ = ("_info", "_tokenizer")

    def __init__(self, path: Union[str, os.PathLike], device: str = "cpu", dtype: str = "auto", threads: int = 0,
                 progress: Optional[Callable[[int, int], Any]] = None, **options: Any) -> None:
        out = C.c_void_p()
        # With a callback of ours even without one of the caller's, signals are seen while weights load.
        given = {"device": device, "dtype": dtype, "threads": threads, **options}
        with Options(given, progress or (lambda done, total: None)) as o:
            rc = lib.qvl_model_load(C.byref(out), _path(path), o)
            if o.failure is not None:
                if rc >= 0:
                    lib.qvl_model_free(out)
                raise o.failure
            check(rc)
        self._own(out, lib.qvl_model_free)
        self._info: Optional[Dict[str, Any]] = None

    @property
    def info(self) -> Dict[str, Any]:
        """family, template, dtype, device, isa, threads, weight_bytes, parameters, vocab_size, max_context, the shapes of
        text and vision, the generation defaults and weights_id."""
        if self._info is None:
            text = C.c_void_p()
            check(lib.qvl_model_info(self, C.byref(text)))
            self._info = json.loads(take_text(text))
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer."""
        return Tokenizer._borrow(self)

    def plan(self, **options: Any) -> Dict[str, Any]:
        """What an Engine with these options would take: bytes of weights, kv, workspace, vision and their total, and the
        sizes behind them. Nothing is taken."""
        text = C.c_void_p()
        with Options(options) as o:
            check(lib.qvl_engine_plan(self, o, C.byref(text)))
        return json.loads(take_text(text))

    def encode_text(self, text: str, parse_special: bool = False) -> List[int]:
        """As Tokenizer.encode_text."""
        return self.tokenizer.encode_text(text, parse_special)

    def decode_tokens(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """As Tokenizer.decode_tokens."""
        return self.tokenizer.decode_tokens(ids, skip_special)

    def render_chat(self, messages: Any, tools: Optional[Sequence[Any]] = None, add_generation_prompt: bool = True,
                    add_vision_id: bool = False) -> str:
        """The chat template's text for messages; pictures are placeholders and need not exist."""
        text = C.c_void_p()
        with Options({"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}) as o:
            check(lib.qvl_render_chat(self, bare(messages), _tools(tools), o, C.byref(text)))
        return take_text(text)

    def patches(self, image: Any, min_pixels: Optional[int] = None, max_pixels: Optional[int] = None
                ) -> Tuple[np.ndarray, Tuple[int, int, int]]:
        """What the processor makes of a picture: (float32[n, 1536], (1, rows, columns)) with n = rows x columns."""
        out, thw = C.c_void_p(), (C.c_int32 * 3)()
        with Options({"min_pixels": min_pixels, "max_pixels": max_pixels}) as o:
            check(lib.qvl_patches(self, to_image(image), o, C.byref(out), thw))
        t, h, w = thw
        return take_array(out, (t * h * w, 1536), np.float32), (t, h, w)

    def encode_image(self, image: Any, **pixels: Any) -> Embedding:
        """Runs the vision tower on a picture. Options: min_pixels, max_pixels."""
        out = C.c_void_p()
        with Options(pixels) as o:
            check(lib.qvl_encode_image(self, to_image(image), o, C.byref(out)))
        return Embedding._adopt(out)

    def prompt(self, messages: Any, images: Optional[Sequence[Any]] = None, tools: Optional[Sequence[Any]] = None,
               **options: Any) -> Prompt:
        """Messages to a Prompt. A content is a string (which may hold ![alt](data:image/...;base64,...)) or a list of parts:

            {"type": "text", "text": ...}
            {"type": "image", "image": path | bytes | uint8[height, width, 3] | Image | Embedding | data URI}
            {"type": "image_url", "image_url": {"url": data URI}}
            {"type": "video", "video": [frame, ...], "fps": frames a second, "do_sample_frames": True}

        Image parts without data take `images` in order (video parts a list of frames). `messages` may be a str of JSON.
        Options: add_generation_prompt, add_vision_id, min_pixels, max_pixels, video_min_pixels, video_max_pixels,
        video_layout, max_image_pixels, max_image_bytes. Raises Error with the place in the message, as in
        "messages[0].content[1]: ..."."""
        out = C.c_void_p()
        text, media = split(messages, images, options)
        with media, Options(options) as o:
            check(lib.qvl_prompt_new(C.byref(out), self, text, _tools(tools), media, o))
        return Prompt._adopt(out)

    def prompt_from_tokens(self, tokens: Sequence[int]) -> Prompt:
        """A text-only prompt of token ids. Raises Error QVL_EINVAL for ids out of range and for pad tokens."""
        out = C.c_void_p()
        ids = token_array(tokens)
        check(lib.qvl_prompt_from_tokens(C.byref(out), self, ids.ctypes.data, ids.size))
        return Prompt._adopt(out)

    def logits(self, prompt: Union[Prompt, Sequence[int]]) -> np.ndarray:
        """Teacher-forced logits: float32[n, vocab], row i for the token after token i of the prompt or token list."""
        if not isinstance(prompt, Prompt):
            prompt = self.prompt_from_tokens(prompt)
        out = np.empty((len(prompt), self.info["vocab_size"]), np.float32)
        check(lib.qvl_logits(self, prompt, out.ctypes.data, out.size))
        return out

    def chat(self, messages: Any, images: Optional[Sequence[Any]] = None, tools: Optional[Sequence[Any]] = None,
             stream: bool = False, **options: Any) -> Union[Completion, Stream]:
        """Answers messages (see prompt) and returns a Completion; with stream=True a Stream of events at once, whose
        `completion` is set after the last one:

            stream = model.chat(messages, stream=True)
            for event in stream:
                print(event.text, end="", flush=True)
            print(stream.completion.usage)

        Options: those of prompt, Engine and Engine.submit (max_tokens, temperature, top_p, top_k, min_p, seed, stop,
        logprobs, ...). Each call has an engine of its own, so it can be made from any thread and is ended by any exception.
        For many answers at once (and option n) use Engine."""
        if int(options.get("n") or 1) != 1:
            raise Error(-1, "option n: Model.chat gives one answer; use Engine.submit for more")
        prompt = self.prompt(messages, images, tools, **options)
        room = len(prompt) + int(options.get("max_tokens") or _default_max_tokens())
        size = {"max_requests": 1, "max_context": min(room, self.info["max_context"])}
        engine = Engine(self, **{**options, **{k: v for k, v in size.items() if options.get(k) is None}})
        # A Thinking template opens the reasoning itself, unless the last turn is to be continued.
        thinking = self.info["template"] == "thinking" and prompt.text.endswith("<think>\n")
        answer = Stream(engine, engine.submit(prompt, **options), thinking)
        if stream:
            return answer
        with answer:
            for _ in answer:
                pass
        assert answer.completion is not None
        return answer.completion

    def __repr__(self) -> str:
        return f"<qvl.Model {self.info['family']}, {self.info['dtype']}>" if not self.closed else "<qvl.Model, closed>"


def _tools(tools: Optional[Sequence[Any]]) -> Optional[bytes]:
    if tools is None:
        return None
    return text_bytes(tools, "tools") if isinstance(tools, str) else to_json(tools, "tools")
