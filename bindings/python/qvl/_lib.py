"""_lib - finds and loads libqvl, declares its C functions, and turns its errors into exceptions.

Job:        one `lib` object with checked prototypes; `check`, `Handle`, `Options` and the small conversions all modules share.
Input:      include/qvl.h, written here once more as ctypes prototypes.
Output:     `lib`, `Error`, `options`.
Invariants: the library is found in one documented order and a failure names every place that was tried;
            a handle is freed exactly once, in any order, and never while the interpreter shuts down.
"""
from __future__ import annotations

import ctypes as C
import json
import os
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Union

import numpy as np

P, S, I, U64, SIZE = C.c_void_p, C.c_char_p, C.c_int, C.c_uint64, C.c_size_t

# Return type and arguments of every function of qvl.h that the binding uses. Strings that may hold zeros, and buffers
# that must be freed, are void pointers here.
_PROTOTYPES: Dict[str, tuple] = {
    "qvl_version": (S,),
    "qvl_last_error": (S,),
    "qvl_error_name": (S, I),
    "qvl_free": (None, P),
    "qvl_options_new": (I, C.POINTER(P)),
    "qvl_options_free": (None, P),
    "qvl_options_set": (I, P, S, S),
    "qvl_options_set_i64": (I, P, S, C.c_int64),
    "qvl_options_set_f64": (I, P, S, C.c_double),
    "qvl_options_set_progress": (I, P, P, P),
    "qvl_option_info": (I, I) + (C.POINTER(S),) * 6,
    "qvl_model_load": (I, C.POINTER(P), S, P),
    "qvl_model_free": (None, P),
    "qvl_model_info": (I, P, C.POINTER(P)),
    "qvl_quantize": (I, S, S, P, C.POINTER(P)),
    "qvl_bench_kernels": (I, P, C.POINTER(P)),
    "qvl_model_tokenizer": (P, P),
    "qvl_tokenizer_load": (I, C.POINTER(P), S),
    "qvl_tokenizer_free": (None, P),
    "qvl_tokenize": (I, P, S, SIZE, I, C.POINTER(P), C.POINTER(SIZE)),
    "qvl_detokenize": (I, P, P, SIZE, I, C.POINTER(P), C.POINTER(SIZE)),
    "qvl_image_from_bytes": (I, C.POINTER(P), P, SIZE, P),
    "qvl_image_from_data_uri": (I, C.POINTER(P), S, SIZE, P),
    "qvl_image_from_file": (I, C.POINTER(P), S, P),
    "qvl_image_from_pixels": (I, C.POINTER(P), P, I, I, SIZE),
    "qvl_image_free": (None, P),
    "qvl_image_width": (I, P),
    "qvl_image_height": (I, P),
    "qvl_image_pixels": (P, P),
    "qvl_media_new": (I, C.POINTER(P)),
    "qvl_media_free": (None, P),
    "qvl_media_add_image": (I, P, P),
    "qvl_media_add_embedding": (I, P, P),
    "qvl_media_add_video": (I, P, C.POINTER(P), SIZE, C.c_double, I),
    "qvl_patches": (I, P, P, P, C.POINTER(P), C.POINTER(C.c_int32)),
    "qvl_encode_image": (I, P, P, P, C.POINTER(P)),
    "qvl_embedding_free": (None, P),
    "qvl_embedding_data": (I, P, C.POINTER(P), C.POINTER(I), C.POINTER(I), C.POINTER(I)),
    "qvl_embedding_to_bytes": (I, P, C.POINTER(P), C.POINTER(SIZE)),
    "qvl_embedding_from_bytes": (I, C.POINTER(P), P, P, SIZE),
    "qvl_render_chat": (I, P, S, S, P, C.POINTER(P)),
    "qvl_prompt_new": (I, C.POINTER(P), P, S, S, P, P),
    "qvl_prompt_from_tokens": (I, C.POINTER(P), P, P, SIZE),
    "qvl_prompt_free": (None, P),
    "qvl_prompt_tokens": (I, P, C.POINTER(P), C.POINTER(SIZE)),
    "qvl_prompt_positions": (I, P, C.POINTER(P), C.POINTER(SIZE)),
    "qvl_prompt_text": (S, P),
    "qvl_logits": (I, P, P, P, SIZE),
    "qvl_engine_new": (I, C.POINTER(P), P, P),
    "qvl_engine_free": (None, P),
    "qvl_engine_plan": (I, P, P, C.POINTER(P)),
    "qvl_engine_configure": (I, P, P),
    "qvl_engine_submit": (I, P, P, P, C.POINTER(U64)),
    "qvl_engine_check": (I, P, P, P, C.POINTER(P)),
    "qvl_engine_cancel": (I, P, U64),
    "qvl_engine_wake": (I, P),
    "qvl_engine_step": (I, P, I),
    "qvl_engine_event": (P, P, I),
    "qvl_engine_stats": (I, P, C.POINTER(P)),
    "qvl_event_type": (I, P),
    "qvl_event_request": (U64, P),
    "qvl_event_choice": (I, P),
    "qvl_event_token": (C.c_int32, P),
    "qvl_event_text": (P, P, C.POINTER(SIZE)),
    "qvl_event_finish_reason": (S, P),
    "qvl_event_error": (I, P, C.POINTER(S)),
    "qvl_event_logprob": (C.c_float, P),
    "qvl_event_top_logprobs": (I, P, C.POINTER(P), C.POINTER(P)),
    "qvl_event_logits": (P, P, C.POINTER(SIZE)),
    "qvl_event_usage": (C.c_double, P, I),
}

_PROGRESS = C.CFUNCTYPE(I, P, U64, U64)

EINVAL, EMISUSE = -1, -12


# ------------------------------------------------------------------------------------------------------------- loading

def _candidates() -> Iterable[str]:
    """Where libqvl may be, best first."""
    asked = os.environ.get("QVL_LIBRARY")
    if asked:  # asked for by name: nothing else will do
        yield asked
        return
    here = Path(__file__).resolve().parent
    for name in ("libqvl.so", "libqvl.so.0"):
        if (here / name).exists():
            yield str(here / name)
    for folder in here.parents:  # a checkout of the repository
        if (folder / "include" / "qvl.h").exists():
            yield str(folder / "build" / "release" / "libqvl.so")
            break
    yield "libqvl.so.0"  # the system's loader
    yield "libqvl.so"


def _guarded(function: Any) -> Callable[..., Any]:
    """ctypes refuses a closed Handle with an ArgumentError of its own words; ours say what is wrong."""
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except C.ArgumentError:
            for a in arguments:
                if isinstance(a, Handle) and a.closed:
                    raise Error(EMISUSE, f"this {type(a).__name__} is closed") from None
            raise
    return call


class Library:
    """The C functions of qvl.h by name."""

    def __init__(self, found: C.CDLL) -> None:
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
            # Events are read by plain addresses, many times a token, and freeing must not run Python; all else takes handles.
            plain = name.startswith("qvl_event_") or name.endswith("_free")
            setattr(self, name, function if plain else _guarded(function))

    def __getattr__(self, name: str) -> Any:  # for type checkers; every function is set above
        raise AttributeError(name)


def _load() -> Library:
    tried: List[str] = []
    for path in _candidates():
        try:
            found = C.CDLL(path)
        except OSError as e:
            tried.append(f"  {path}: {e}")
            continue
        try:
            return Library(found)
        except AttributeError as e:
            raise ImportError(f"qvl: {path} is not the libqvl that this package needs: {e}") from None
    raise ImportError("qvl: libqvl was not found. Build it (make), install it (make install), or name the file in the "
                      "environment variable QVL_LIBRARY. Tried:\n" + "\n".join(tried))


lib = _load()


# -------------------------------------------------------------------------------------------------------------- errors

class Error(Exception):
    """Every failure of libqvl.

    Attributes: `code` (negative int, QVL_E* of qvl.h), `name` ("QVL_EINVAL", ...), `message` (one line that says what
    was wrong and where).
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    @property
    def name(self) -> str:
        return lib.qvl_error_name(self.code).decode()

    def __str__(self) -> str:
        return f"{self.message} ({self.name})"


def check(rc: int) -> int:
    """Passes a count on; raises the thread's last error for a negative code."""
    if rc < 0:
        raise Error(rc, lib.qvl_last_error().decode("utf-8", "replace"))
    return rc


def invalid(message: str) -> Error:
    return Error(EINVAL, message)


# ------------------------------------------------------------------------------------------------------------- handles

class Handle:
    """Base of all objects that own a C handle. `close()` frees it early; otherwise it goes with the object."""

    # _as_parameter_ is what ctypes passes for an object. A plain slot, no property: Python code that runs while ctypes
    # converts arguments may be interrupted by a signal, and ctypes would turn KeyboardInterrupt into an ArgumentError.
    __slots__ = ("_as_parameter_", "_finalizer", "__weakref__")

    def _own(self, pointer: C.c_void_p, free: Callable[[Any], None]) -> None:
        self._as_parameter_ = pointer.value
        self._finalizer = weakref.finalize(self, free, pointer.value)
        # At exit the process gives everything back, and a daemon thread may still be using the handle.
        self._finalizer.atexit = False  # type: ignore[misc]

    @property
    def closed(self) -> bool:
        return not hasattr(self, "_as_parameter_")

    def close(self) -> None:
        """Frees the handle now. Using the object afterwards raises Error (QVL_EMISUSE). Safe to call twice; must not be
        called while another thread is using this object."""
        if not self.closed:
            del self._as_parameter_
            self._finalizer()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} belongs to this process and cannot be pickled or copied")


# ------------------------------------------------------------------------------------------------------------- options

def options() -> List[Dict[str, str]]:
    """Every option of the library as dicts of name, type ("bool", "int", "float", "string", "json"), scope ("model",
    "image", "prompt", "engine", "request"), range, default and help."""
    keys = ("name", "type", "scope", "range", "default", "help")
    found: List[Dict[str, str]] = []
    while True:
        values = [S() for _ in keys]
        if lib.qvl_option_info(len(found), *(C.byref(v) for v in values)) < 0:
            return found
        found.append({k: (v.value or b"").decode() for k, v in zip(keys, values)})


_json_options = {o["name"] for o in options() if o["type"] == "json"}


def text_bytes(value: str, what: str) -> bytes:
    """UTF-8 for a C string."""
    data = value.encode("utf-8", "surrogatepass")
    if b"\0" in data:
        raise invalid(f"{what}: the text holds a NUL character")
    return data


def to_json(value: Any, what: str) -> bytes:
    def plain(v: Any) -> Any:
        if isinstance(v, np.generic):
            return v.item()
        if isinstance(v, np.ndarray):
            return v.tolist()
        if isinstance(v, (set, frozenset)):
            return sorted(v)
        raise TypeError(f"a {type(v).__name__} cannot stand here")
    try:
        return json.dumps(value, default=plain, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise invalid(f"{what}: {e}") from None


class Options:
    """A qvl_options made from keyword arguments; None means unset. Names, types and ranges are checked by the library."""

    def __init__(self, values: Mapping[str, Any], progress: Optional[Callable[[int, int], Any]] = None) -> None:
        self.failure: Optional[BaseException] = None
        self._as_parameter_ = P()
        check(lib.qvl_options_new(C.byref(self._as_parameter_)))
        try:
            for name, value in values.items():
                if value is not None:
                    self._set(name, value)
            if progress is not None:
                self._callback = _PROGRESS(self._guard(progress))
                check(lib.qvl_options_set_progress(self, C.cast(self._callback, P), None))
        except BaseException:
            self.free()
            raise

    def _set(self, name: str, value: Any) -> None:
        key = text_bytes(name, "option name")
        if name in _json_options:
            check(lib.qvl_options_set(self, key, to_json(value, f"option {name}")))
        elif isinstance(value, (bool, np.bool_)):
            check(lib.qvl_options_set(self, key, b"true" if value else b"false"))
        elif isinstance(value, (int, np.integer)):
            if -2**63 <= int(value) < 2**63:
                check(lib.qvl_options_set_i64(self, key, int(value)))
            else:
                check(lib.qvl_options_set(self, key, str(int(value)).encode()))
        elif isinstance(value, (float, np.floating)):
            check(lib.qvl_options_set_f64(self, key, float(value)))
        elif isinstance(value, str):
            check(lib.qvl_options_set(self, key, text_bytes(value, f"option {name}")))
        else:
            # An unknown name is the better message of the two.
            check(lib.qvl_options_set(self, key, type(value).__name__.encode("utf-8", "replace")))
            raise invalid(f"option {name}: a {type(value).__name__} cannot be the value")

    def _guard(self, progress: Callable[[int, int], Any]) -> Callable[[Any, int, int], int]:
        """An exception in the callback (KeyboardInterrupt too) stops the load and is raised where it was called."""
        def call(_: Any, done: int, total: int) -> int:
            try:
                progress(done, total)
                return 0
            except BaseException as e:  # noqa: B902 - must not pass through C
                self.failure = e
                return 1
        return call

    def free(self) -> None:
        lib.qvl_options_free(self)
        self._as_parameter_ = P()

    def __enter__(self) -> "Options":
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


# --------------------------------------------------------------------------------------------------------- conversions

def take_bytes(pointer: C.c_void_p, size: int) -> bytes:
    """Copies a buffer the library handed out and frees it."""
    try:
        return C.string_at(pointer, size) if size else b""
    finally:
        lib.qvl_free(pointer)


def take_text(pointer: C.c_void_p) -> str:
    """The same for a terminated string."""
    try:
        return C.string_at(pointer).decode("utf-8", "replace")
    finally:
        lib.qvl_free(pointer)


def take_array(pointer: C.c_void_p, shape: tuple, dtype: Any) -> np.ndarray:
    """The same for numbers."""
    try:
        return copy_array(pointer.value, shape, dtype)
    finally:
        lib.qvl_free(pointer)


def copy_array(address: Any, shape: tuple, dtype: Any) -> np.ndarray:
    """A copy of memory that the library keeps."""
    out = np.empty(shape, dtype)
    if out.nbytes:
        C.memmove(out.ctypes.data, address, out.nbytes)
    return out


def token_array(ids: Union[Iterable[int], np.ndarray], what: str = "tokens") -> np.ndarray:
    """Ids of any integer kind as contiguous int32."""
    try:
        given = np.asarray(ids if isinstance(ids, (list, tuple, np.ndarray)) else list(ids))
    except (TypeError, ValueError, OverflowError) as e:
        raise invalid(f"{what}: {e}") from None
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise invalid(f"{what}: a flat list of integers is needed, not {given.dtype.name} of shape {given.shape}")
    if given.size and (int(given.min()) < -2**31 or int(given.max()) >= 2**31):
        raise invalid(f"{what}: an id is beyond 32 bits")
    return np.ascontiguousarray(given, np.int32)
