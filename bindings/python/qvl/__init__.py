"""qvl - Qwen3-VL from Python: pictures, video frames and text to text, on the CPU, through libqvl.

    import qvl
    model = qvl.Model("examples/models/qvl-tiny")
    answer = model.chat([{"role": "user", "content": [
        {"type": "image", "image": "cat.jpg"},
        {"type": "text", "text": "What is this?"}]}])
    print(answer.text)

Threads: Model, Tokenizer, Image, Embedding and Prompt are immutable and may be shared. An Engine is stepped by one thread;
everything else on it may be called from any. Objects may be dropped in any order. docs/python.md is the guide.
"""
from ._lib import Error, lib as _library, options
from .engine import Engine, Event, EventError
from .image import Embedding, Image
from .model import Completion, Model, Prompt, Stream, TokenLogprob, Tokenizer, bench_kernels, quantize

__version__: str = _library.qvl_version().decode()

__all__ = ["Completion", "Embedding", "Engine", "Error", "Event", "EventError", "Image", "Model", "Prompt", "Stream",
           "TokenLogprob", "Tokenizer", "bench_kernels", "options", "quantize"]
