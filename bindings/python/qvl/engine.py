"""engine - many requests at once, and what they report.

Job:        Engine (submit, step, cancel), Event, and the split of a thinking model's answer into reasoning and text.
Input:      Prompt objects or token lists, sampling options.
Output:     Event tuples, copied out of the library, so they stay valid.
Invariants: one thread steps an engine; submit, cancel, wake and stats may be called from any thread;
            step never blocks in C for longer than a slice of waiting, so that signals (KeyboardInterrupt) are seen.
"""
from __future__ import annotations

import ctypes as C
import json
import math
import time
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ._lib import Handle, Options, check, copy_array, lib, take_text

if TYPE_CHECKING:
    from .model import Model, Prompt

_TYPES = {1: "token", 2: "finished", 3: "error", 4: "prompt"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "image_tokens": 3, "queue_ms": 4, "vision_ms": 5, "ttft_ms": 6,
          "total_ms": 7, "cached_tokens": 8, "prefill_ms": 9, "decode_ms": 10, "speculated_tokens": 11, "images": 12,
          "images_cached": 13}
_COUNTS = ("prompt_tokens", "completion_tokens", "image_tokens", "cached_tokens", "speculated_tokens", "images", "images_cached")
_SLICE = 0.1  # seconds that C may wait before Python looks for signals


class EventError(NamedTuple):
    """Why a request failed: what Error would have said."""
    code: int
    message: str

    def __str__(self) -> str:
        return self.message


class Event(NamedTuple):
    """One thing that happened to a request. `type` is "token", "finished" (the last event of a choice), "error" (the last
    event of a choice that failed; the engine goes on) or "prompt" (a prompt token, with option prompt_logprobs)."""
    request: int                                             # as submit returned it
    type: str
    token: Optional[int] = None                              # id, of token and prompt events
    text: str = ""                                           # what became whole with this event: never half a character
    finish_reason: Optional[str] = None                      # "stop", "length", "cancelled", "deadline"; of finished events
    error: Optional[EventError] = None
    logprob: Optional[float] = None                          # of the token, with option logprobs
    top_logprobs: Optional[List[Tuple[int, float]]] = None   # (token, logprob), best first
    logits: Optional[np.ndarray] = None                      # float32[vocab], with option return_logits
    usage: Optional[Dict[str, Any]] = None                   # tokens and milliseconds, of the last event
    reasoning: str = ""                                      # Model.chat(stream=True) with a thinking model only
    choice: int = 0                                          # which of the answers that option n asked for


def _read_event(pointer: int) -> Event:
    kind = _TYPES[lib.qvl_event_type(pointer)]
    size = C.c_size_t()
    address = lib.qvl_event_text(pointer, C.byref(size))
    text = C.string_at(address, size.value).decode("utf-8", "replace") if size.value else ""
    request, choice = lib.qvl_event_request(pointer), lib.qvl_event_choice(pointer)
    if kind in ("token", "prompt"):
        logprob, top = lib.qvl_event_logprob(pointer), None
        if not math.isnan(logprob):  # neither wanted, nor the first token of a prompt
            ids, values = C.c_void_p(), C.c_void_p()
            n = lib.qvl_event_top_logprobs(pointer, C.byref(ids), C.byref(values))
            top = list(zip(copy_array(ids.value, (n,), np.int32).tolist(), copy_array(values.value, (n,), np.float32).tolist()))
        address = lib.qvl_event_logits(pointer, C.byref(size))
        logits = copy_array(address, (size.value,), np.float32) if address else None
        return Event(request, kind, lib.qvl_event_token(pointer), text, logprob=None if math.isnan(logprob) else logprob,
                     top_logprobs=top, logits=logits, choice=choice)
    usage = {name: lib.qvl_event_usage(pointer, what) for name, what in _USAGE.items()}
    usage = {k: None if math.isnan(v) else int(v) if k in _COUNTS else v for k, v in usage.items()}
    if kind == "finished":
        return Event(request, kind, text=text, finish_reason=lib.qvl_event_finish_reason(pointer).decode(), usage=usage,
                     choice=choice)
    message = C.c_char_p()
    code = lib.qvl_event_error(pointer, C.byref(message))
    return Event(request, kind, text=text, error=EventError(code, (message.value or b"").decode("utf-8", "replace")), usage=usage,
                 choice=choice)


class Engine(Handle):
    """Runs requests of one model together (continuous batching over a paged KV cache). A request gets the same tokens
    whatever else runs beside it.

    Options: max_requests, max_context, max_batched_tokens, kv_blocks (of 32 tokens), kv_dtype ("auto", "f32", "bf16", "f16",
    "int8"; "fp8" on a GPU), prefix_cache (True: prompts that begin alike are computed once), step_ms, embedding_cache, max_image_tokens.
    All memory is taken here (Model.plan tells how much beforehand). Threads: the thread that first calls step owns stepping (another one gets Error
    QVL_EMISUSE); submit, cancel, wake and stats may be called from any thread.

        engine = qvl.Engine(model)
        request = engine.submit(model.prompt(messages), max_tokens=64)
        while engine.active:
            for event in engine.step(timeout=1):
                print(event.text, end="")
    """

    __slots__ = ("_model", "_woken")

    def __init__(self, model: "Model", **options: Any) -> None:
        out = C.c_void_p()
        with Options(options) as o:
            check(lib.qvl_engine_new(C.byref(out), model, o))
        self._model = model
        self._woken = 0
        self._own(out, lib.qvl_engine_free)

    def submit(self, prompt: "Union[Prompt, Sequence[int]]", **sampling: Any) -> int:
        """Queues a request and returns its number. `prompt` is a Prompt or a list of token ids. Options: max_tokens,
        min_tokens, temperature (0 is greedy), top_p, top_k, min_p, seed, stop, stop_token_ids, logit_bias, logprobs,
        return_logits, ignore_eos, n (several answers: see Event.choice), priority, deadline_ms, speculate, prompt_logprobs
        and the penalties; unset ones come from generation_config.json. Raises Error
        QVL_ECONTEXT when it can never fit, QVL_EINVAL for a wrong option."""
        from .model import Prompt
        if not isinstance(prompt, Prompt):
            prompt = self._model.prompt_from_tokens(prompt)
        number = C.c_uint64()
        with Options(sampling) as o:
            check(lib.qvl_engine_submit(self, prompt, o, C.byref(number)))
        return number.value

    def check(self, prompt: Union["Prompt", Sequence[int]], **sampling: Any) -> Dict[str, Any]:
        """What submit would say and take, without queuing: the same errors, or prompt_tokens, cached_tokens, image_tokens,
        max_tokens, kv_blocks and images with their sizes, tokens and whether their embedding is there."""
        from .model import Prompt
        if not isinstance(prompt, Prompt):
            prompt = self._model.prompt_from_tokens(prompt)
        text = C.c_void_p()
        with Options(sampling) as o:
            check(lib.qvl_engine_check(self, prompt, o, C.byref(text)))
        return json.loads(take_text(text))

    def cancel(self, request: int) -> bool:
        """Ends a request: its "finished" event with reason "cancelled" comes with the next step. True when it was alive."""
        return 0 <= request < 2**64 and check(lib.qvl_engine_cancel(self, request)) == 1

    def configure(self, **options: Any) -> None:
        """Changes max_requests, max_batched_tokens (both at most what the engine was made with), step_ms and
        embedding_cache from the next step on."""
        with Options(options) as o:
            check(lib.qvl_engine_configure(self, o))

    def wake(self) -> None:
        """Makes a waiting step return (with no events)."""
        self._woken += 1
        check(lib.qvl_engine_wake(self))

    @property
    def active(self) -> bool:
        """Whether any request has not ended yet."""
        requests = self.stats["requests"]
        return bool(requests["submitted"] > requests["finished"] + requests["failed"] + requests["cancelled"])

    @property
    def stats(self) -> Dict[str, Any]:
        """Requests, KV blocks, memory in bytes, counters."""
        text = C.c_void_p()
        check(lib.qvl_engine_stats(self, C.byref(text)))
        return json.loads(take_text(text))

    def step(self, timeout: Optional[float] = None) -> List[Event]:
        """Works until there are events and returns them; returns [] after `timeout` seconds (None: no limit), or when
        wake() is called. 0 is one step of work without waiting."""
        if timeout is None or timeout != timeout:
            timeout = math.inf
        end, woken = time.monotonic() + timeout, self._woken
        while True:
            wait = min(max(end - time.monotonic(), 0.0), _SLICE)
            n = check(lib.qvl_engine_step(self, math.ceil(wait * 1000)))
            if n:
                return [_read_event(lib.qvl_engine_event(self, i)) for i in range(n)]
            if self._woken != woken or time.monotonic() >= end:
                return []

    def __repr__(self) -> str:
        return "<qvl.Engine>" if not self.closed else "<qvl.Engine, closed>"


class ReasoningSplitter:
    """Cuts a thinking model's text, which begins inside the reasoning, at the first "</think>": feed() and end() return
    (reasoning, text). Newlines around the tag belong to neither. The result does not depend on the pieces."""

    TAG = "</think>"

    def __init__(self, thinking: bool) -> None:
        self._inside = thinking
        self._fresh = True   # nothing was given out on this side of the tag yet: leading newlines are dropped
        self._thinking = thinking
        self._held = ""

    def feed(self, piece: str) -> Tuple[str, str]:
        if not self._thinking:
            return "", piece
        if not self._inside:
            return "", self._lead(piece)
        held = self._held + piece
        at = held.find(self.TAG)
        if at >= 0:
            reasoning = self._lead(held[:at]).rstrip("\n")
            self._inside, self._fresh, self._held = False, True, ""
            return reasoning, self._lead(held[at + len(self.TAG):])
        # What may be the beginning of the tag, or newlines before it, is held back.
        keep = next((n for n in range(min(len(held), len(self.TAG) - 1), 0, -1) if self.TAG.startswith(held[-n:])), 0)
        safe = held[:len(held) - keep].rstrip("\n")
        self._held = held[len(safe):]
        return self._lead(safe), ""

    def end(self) -> Tuple[str, str]:
        held, self._held = self._held, ""
        return (self._lead(held).rstrip("\n") if self._inside else ""), ""

    def _lead(self, piece: str) -> str:
        if self._fresh:
            piece = piece.lstrip("\n")
            self._fresh = not piece
        return piece
