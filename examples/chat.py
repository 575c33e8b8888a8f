#!/usr/bin/env python3
"""chat.py - talk about pictures from Python.

Job:        answer every line of standard input with all that was said before; /image FILE shows a picture with the next line.
Input:      chat.py [PICTURE ...] [-m MODEL]; lines of standard input.
Output:     answers on standard output, as they are generated.
Run:        PYTHONPATH=bindings/python python3 examples/chat.py examples/images/shapes.png
"""
import argparse
import os
import sys

import qvl

BUNDLED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models", "qvl-tiny")


def answer(model, messages, **options):
    """Streams the answer to standard output; returns its text. Ctrl-C stops it and keeps what was said."""
    said = []
    with model.chat(messages, stream=True, **options) as events:
        try:
            for event in events:
                said.append(event.text)
                print(event.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
    print()
    return "".join(said)


def main():
    parser = argparse.ArgumentParser(description="Talk about pictures. /image FILE shows one, /quit ends.")
    parser.add_argument("pictures", nargs="*", help="pictures that come with the first message")
    parser.add_argument("-m", "--model", default=os.environ.get("QVL_MODEL", BUNDLED))
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: what the model's authors chose")
    args = parser.parse_args()
    options = {"max_tokens": args.max_tokens}
    if args.temperature is not None:
        options["temperature"] = args.temperature

    model = qvl.Model(args.model)
    # A picture is encoded once; its embedding stands for it in every later turn.
    waiting = [model.encode_image(qvl.Image(p)) for p in args.pictures]
    messages = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        try:
            if line.startswith("/image "):
                waiting.append(model.encode_image(qvl.Image(line[7:].strip())))
                continue
            content = [{"type": "image", "image": e} for e in waiting] + [{"type": "text", "text": line}]
            turn = messages + [{"role": "user", "content": content}]
            text = answer(model, turn, **options)
            messages, waiting = turn + [{"role": "assistant", "content": text}], []
        except qvl.Error as error:  # the conversation stays as it was
            print(f"chat.py: {error}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except qvl.Error as error:
        sys.exit(f"chat.py: {error}")
