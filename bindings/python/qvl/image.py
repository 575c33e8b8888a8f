"""image - pictures and their embeddings.

Job:        Image (pixels), Embedding (what the vision tower made of them), and the conversion of everything that may
            stand for a picture into one of the two.
Input:      paths, encoded bytes, data URIs, uint8 arrays.
Output:     handles that prompts take; numpy copies.
Invariants: both are immutable and may be shared between threads; arrays handed out are copies.
"""
from __future__ import annotations

import base64
import binascii
import ctypes as C
import os
from typing import TYPE_CHECKING, Any, Tuple, Union

import numpy as np

from ._lib import Handle, Options, check, copy_array, invalid, lib, take_bytes, text_bytes

if TYPE_CHECKING:
    from .model import Model


class Image(Handle):
    """RGB pixels of a picture: EXIF orientation applied, alpha laid over white, grey replicated.

    `source` is a path (str or os.PathLike), encoded JPEG, PNG or WebP bytes, or a uint8 array of shape [height, width, 3]
    (anything numpy can see as one, a PIL RGB image for instance). Options: max_image_pixels, max_image_bytes.
    Raises Error: QVL_EIO (no such file), QVL_EFORMAT (damaged), QVL_EUNSUPPORTED (another format), QVL_ELIMIT (too large).
    """

    __slots__ = ()

    def __init__(self, source: Any, **options: Any) -> None:
        out = C.c_void_p()
        with Options(options) as o:
            if isinstance(source, (str, os.PathLike)):
                path = os.fspath(source)
                path = os.fsencode(path) if isinstance(path, bytes) else text_bytes(path, "path")
                check(lib.qvl_image_from_file(C.byref(out), path, o))
            elif isinstance(source, (bytes, bytearray, memoryview)):
                data = bytes(source)
                check(lib.qvl_image_from_bytes(C.byref(out), data, len(data), o))
            else:
                pixels = _pixels(source)
                height, width = pixels.shape[:2]
                check(lib.qvl_image_from_pixels(C.byref(out), pixels.ctypes.data, width, height, 0))
        self._own(out, lib.qvl_image_free)

    @property
    def width(self) -> int:
        """Pixels, after EXIF orientation."""
        return int(lib.qvl_image_width(self))

    @property
    def height(self) -> int:
        """Pixels, after EXIF orientation."""
        return int(lib.qvl_image_height(self))

    def to_numpy(self) -> np.ndarray:
        """A copy of the pixels, uint8[height, width, 3]."""
        return copy_array(lib.qvl_image_pixels(self), (self.height, self.width, 3), np.uint8)

    def __repr__(self) -> str:
        return f"<qvl.Image {self.width} x {self.height}>" if not self.closed else "<qvl.Image, closed>"


def _pixels(source: Any) -> np.ndarray:
    if not isinstance(source, np.ndarray) and not hasattr(source, "__array_interface__"):
        raise invalid("a picture must be a path, bytes or a uint8 array of shape [height, width, 3], not a "
                      f"{type(source).__name__}")
    pixels = np.asarray(source)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise invalid(f"an array of pixels must be uint8[height, width, 3], not {pixels.dtype.name}{list(pixels.shape)}")
    if max(pixels.shape) >= 2**31:
        raise invalid(f"an array of {pixels.shape[1]} x {pixels.shape[0]} pixels is too large")
    return np.ascontiguousarray(pixels)


class Embedding(Handle):
    """What the vision tower makes of one picture (Model.encode_image). It can stand for the picture in any prompt of the
    same model, and be stored with to_bytes()."""

    __slots__ = ()

    def __init__(self) -> None:
        raise TypeError("embeddings come from Model.encode_image and Embedding.from_bytes")

    @classmethod
    def _adopt(cls, pointer: C.c_void_p) -> "Embedding":
        self = cls.__new__(cls)
        self._own(pointer, lib.qvl_embedding_free)
        return self

    @classmethod
    def from_bytes(cls, model: "Model", data: Union[bytes, bytearray, memoryview]) -> "Embedding":
        """What to_bytes() gave. Raises Error QVL_EFORMAT for bytes of other weights and for damaged ones."""
        raw = bytes(data)
        out = C.c_void_p()
        check(lib.qvl_embedding_from_bytes(C.byref(out), model, raw, len(raw)))
        return cls._adopt(out)

    def to_bytes(self) -> bytes:
        """Bytes with the identity of the weights and a checksum inside."""
        data, size = C.c_void_p(), C.c_size_t()
        check(lib.qvl_embedding_to_bytes(self, C.byref(data), C.byref(size)))
        return take_bytes(data, size.value)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(1 + deepstack features, tokens, hidden)."""
        layers, tokens, hidden = C.c_int(), C.c_int(), C.c_int()
        check(lib.qvl_embedding_data(self, None, C.byref(layers), C.byref(tokens), C.byref(hidden)))
        return layers.value, tokens.value, hidden.value

    def to_numpy(self) -> np.ndarray:
        """A copy, float32[1 + deepstack, tokens, hidden]: row 0 is what takes the tokens' place, the others are added
        after the first text layers."""
        data = C.c_void_p()
        check(lib.qvl_embedding_data(self, C.byref(data), None, None, None))
        return copy_array(data.value, self.shape, np.float32)

    def __repr__(self) -> str:
        return f"<qvl.Embedding {list(self.shape)}>" if not self.closed else "<qvl.Embedding, closed>"


def to_image(source: Any, **options: Any) -> Image:
    """An Image of anything that may be a picture."""
    if isinstance(source, Image):
        return source
    if isinstance(source, str) and source[:5].lower() == "data:":
        return Image(_data_uri(source), **options)
    return Image(source, **options)


def _data_uri(uri: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise invalid(f'"{uri[:40]}": a data URI must be data:image/...;base64,...')
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as e:
        raise invalid(f'"{uri[:40]}...": {e}') from None
