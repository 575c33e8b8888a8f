"""qvl-serve/openapi.json as a judge of real traffic.

Job:        say whether a request body and a response are what the document promises.
Input:      method, path, status, content type, body.
Output:     nothing, or AssertionError naming the operation and the field.
Invariants: what the document does not name is an error: an unknown path, method, status or content type.
"""
import json
import re
from pathlib import Path

import jsonschema

FILE = Path(__file__).resolve().parents[2] / "qvl-serve" / "openapi.json"
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


def load():
    def no_twins(pairs):
        keys = [k for k, _ in pairs]
        assert len(keys) == len(set(keys)), f"openapi.json: a key twice among {keys}"
        return dict(pairs)

    return json.loads(FILE.read_text(encoding="utf-8"), object_pairs_hook=no_twins)


class Contract:
    def __init__(self, document=None):
        self.document = document or load()

    def deref(self, value):
        while isinstance(value, dict) and "$ref" in value:
            ref = value["$ref"]
            assert ref.startswith("#/"), f"{ref}: only references inside the document"
            value = self.document
            for step in ref[2:].split("/"):
                assert step in value, f"{ref} leads nowhere"
                value = value[step]
        return value

    def routes(self):
        """Every (METHOD, path pattern)."""
        return {(m.upper(), p) for p, item in self.document["paths"].items() for m in item if m in METHODS}

    def operation(self, method, path):
        path = path.split("?")[0]
        best = None
        for pattern, item in self.document["paths"].items():
            regex = re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(pattern))
            if re.fullmatch(regex, path) and method.lower() in item and (best is None or "{" not in pattern):
                best = pattern, item[method.lower()]
        assert best, f"{method} {path} is not in openapi.json"
        return best

    def validate(self, schema, value, where):
        root = {"components": self.document["components"], "allOf": [schema]}
        worst = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(root).iter_errors(value))
        if worst:
            at = "/".join(str(p) for p in worst.absolute_path) or "the whole"
            raise AssertionError(f"{where}: {at}: {worst.message[:400]}")

    def check_request(self, method, path, body):
        pattern, op = self.operation(method, path)
        schema = self.deref(op["requestBody"])["content"]["application/json"]["schema"]
        self.validate(schema, body, f"request {method} {pattern}")

    def check_response(self, method, path, status, content_type, body):
        """body: bytes."""
        pattern, op = self.operation(method, path)
        where = f"response {status} of {method} {pattern}"
        assert str(status) in op["responses"], f"{where} is not in openapi.json"
        content = self.deref(op["responses"][str(status)]).get("content", {})
        kind = (content_type or "").split(";")[0].strip()
        if not content:
            return
        assert kind in content, f"{where}: content type {kind!r} is not in openapi.json"
        if kind == "application/json":
            self.validate(content[kind]["schema"], json.loads(body), where)
        elif kind == "text/event-stream":
            self.check_stream(pattern, body.decode("utf-8"))

    def check_stream(self, pattern, text):
        """Every event of a stream that has come to its end."""
        name = {"/v1/chat/completions": "ChatChunk", "/v1/completions": "CompletionResponse"}[pattern]
        assert text.endswith("\n\n"), f"stream of {pattern}: cut off"
        events = [e for e in text[:-2].split("\n\n") if not e.startswith(":")]
        assert events and events[-1] == "data: [DONE]", f"stream of {pattern}: no [DONE] at the end"
        for event in events[:-1]:
            assert event.startswith("data: ") and "\n" not in event, f"stream of {pattern}: {event[:100]!r}"
            value = json.loads(event[6:])
            schema = "Error" if "error" in value else name
            self.validate({"$ref": f"#/components/schemas/{schema}"}, value, f"stream of {pattern}")
