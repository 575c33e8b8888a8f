"""messages - Python messages to JSON and media.

Job:        take the pictures and videos out of OpenAI-style messages, in order, and hand them over as handles.
Input:      a list of messages whose parts may hold paths, bytes, arrays, Image and Embedding objects; `images=`.
Output:     the messages as JSON text, and a qvl_media list for the parts that have no data left in the JSON.
Invariants: the caller's objects are not changed; the n-th part without data in the JSON gets the n-th entry of media;
            strings that are URLs stay in the JSON, where the library opens none of them.
"""
from __future__ import annotations

import ctypes as C
import os
import re
from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np

from ._lib import P, Error, check, invalid, lib, text_bytes, to_json
from .image import Embedding, Image, to_image

_URL = re.compile(r"(data:|[a-zA-Z][a-zA-Z0-9+.-]*://)", re.IGNORECASE)


class Media:
    """A qvl_media list."""

    def __init__(self) -> None:
        self._as_parameter_ = P()
        check(lib.qvl_media_new(C.byref(self._as_parameter_)))

    def add(self, item: Union[Image, Embedding]) -> None:
        if isinstance(item, Embedding):
            check(lib.qvl_media_add_embedding(self, item))
        else:
            check(lib.qvl_media_add_image(self, item))

    def add_video(self, frames: Sequence[Image], fps: float, sample: bool) -> None:
        handles = (P * len(frames))(*(f._as_parameter_ for f in frames))
        check(lib.qvl_media_add_video(self, handles, len(frames), fps, int(sample)))

    def free(self) -> None:
        lib.qvl_media_free(self)
        self._as_parameter_ = P()

    def __enter__(self) -> "Media":
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and _URL.match(value) is not None


def _is_frames(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 4)


class _Splitter:
    def __init__(self, media: Media, images: Sequence[Any], options: dict) -> None:
        self.media = media
        self.spare = list(images)
        # The library applies these limits to data URIs in the JSON itself.
        self.options = {k: v for k, v in options.items() if k in ("max_image_pixels", "max_image_bytes")}

    def messages(self, messages: Any) -> Any:
        if not isinstance(messages, (list, tuple)):
            return messages
        return [self.message(m, f"messages[{i}]") for i, m in enumerate(messages)]

    def message(self, message: Any, where: str) -> Any:
        if not isinstance(message, dict) or not isinstance(message.get("content"), (list, tuple)):
            return message
        parts = [self.part(p, f"{where}.content[{i}]") for i, p in enumerate(message["content"])]
        return {**message, "content": parts}

    def part(self, part: Any, where: str) -> Any:
        if not isinstance(part, dict):
            return part
        try:
            # The order of the templates' own tests: image before video, keys count as much as the type.
            if part.get("type") in ("image", "image_url") or "image" in part or "image_url" in part:
                return self.image(part)
            if part.get("type") == "video" or "video" in part:
                return self.video(part)
        except Error as e:
            raise Error(e.code, f"{where}: {e.message}") from None
        return part

    def image(self, part: dict) -> dict:
        if part.get("image") is not None:
            value = part["image"]
        elif part.get("image_url") is not None:
            value = part["image_url"]
            if isinstance(value, dict):
                value = value.get("url")
            if value is None or isinstance(value, str):  # a URL by definition, whatever it looks like
                return part
        elif self.spare:
            value = self.spare.pop(0)
            if _is_url(value):
                return {**_bare(part, "image"), "image": value}
        else:
            return part  # the library says how many are missing
        # URLs stay for the library to open or refuse, and so does what cannot be a picture: it has the words for it.
        if _is_url(value) or value is None or isinstance(value, (dict, bool, int, float)):
            return part
        self.media.add(value if isinstance(value, Embedding) else to_image(value, **self.options))
        return _bare(part, "image")

    def video(self, part: dict) -> dict:
        value: Any = part.get("video")
        if value is None and self.spare and _is_frames(self.spare[0]):
            value = self.spare.pop(0)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not _is_frames(value) or len(value) == 0 or all(_is_url(f) for f in value):
            return {**part, "video": value} if value is not None else part
        fps, sample = part.get("fps"), part.get("do_sample_frames")
        if fps is None or isinstance(fps, bool) or not isinstance(fps, (int, float, np.integer, np.floating)):
            raise invalid('a video given as frames needs a number "fps", its frames a second')
        if sample is not None and not isinstance(sample, (bool, np.bool_)):
            raise invalid("do_sample_frames must be True or False")
        frames: List[Image] = []
        for i, f in enumerate(value):
            if isinstance(f, Embedding):
                raise invalid(f"video[{i}]: an embedding cannot be a frame of a video")
            try:
                frames.append(to_image(f, **self.options))
            except Error as e:
                raise Error(e.code, f"video[{i}]: {e.message}") from None
        self.media.add_video(frames, float(fps), sample is None or bool(sample))
        return _bare(part, "video")

    def rest(self) -> None:
        """Entries of images= that no part took: into the list all the same, so that the library counts them."""
        for item in self.spare:
            if not _is_frames(item):
                self.media.add(item if isinstance(item, Embedding) else to_image(item, **self.options))
            elif len(item):
                self.media.add_video([to_image(f, **self.options) for f in item], 1.0, True)


def _bare(part: dict, kind: str) -> dict:
    """The part without its data."""
    return {**{k: v for k, v in part.items() if k not in ("image", "image_url", "video")}, "type": kind}


def split(messages: Any, images: Optional[Sequence[Any]], options: dict) -> Tuple[bytes, Media]:
    """JSON text and media (to be freed by the caller) of messages. A str is taken as JSON text already."""
    if images is None:
        images = ()
    elif not isinstance(images, (list, tuple)):
        images = (images,)
    media = Media()
    try:
        splitter = _Splitter(media, images, options)
        if isinstance(messages, str):
            text = text_bytes(messages, "messages")
        else:
            text = to_json(splitter.messages(messages), "messages")
        splitter.rest()
        return text, media
    except BaseException:
        media.free()
        raise


def bare(messages: Any) -> bytes:
    """JSON text of messages for rendering alone: parts are there, their data is not."""
    if isinstance(messages, str):
        return text_bytes(messages, "messages")

    def part(p: Any) -> Any:
        if not isinstance(p, dict):
            return p
        if p.get("type") in ("image", "image_url") or "image" in p or "image_url" in p:
            return _bare(p, "image")
        return _bare(p, "video") if p.get("type") == "video" or "video" in p else p

    if isinstance(messages, (list, tuple)):
        messages = [{**m, "content": [part(p) for p in m["content"]]}
                    if isinstance(m, dict) and isinstance(m.get("content"), (list, tuple)) else m for m in messages]
    return to_json(messages, "messages")
