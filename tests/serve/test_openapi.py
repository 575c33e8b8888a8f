"""openapi.json is a correct document, and it says what OpenAI's wire format says."""
import copy
import json

import pytest

jsonschema = pytest.importorskip("jsonschema")
contract = pytest.importorskip("contract")


@pytest.fixture(scope="module")
def api():
    return contract.Contract()


def walk(value, path=()):
    yield path, value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from walk(item, path + (key,))


def test_every_reference_leads_somewhere_and_everything_is_used(api):
    used = set()
    for _, value in walk(api.document):
        if isinstance(value, dict) and isinstance(value.get("$ref"), str):
            assert set(value) == {"$ref"}
            api.deref(value)
            used.add(value["$ref"])
    for kind in ("schemas", "responses"):
        for name in api.document["components"][kind]:
            if name != "ChatChunk":  # an event of a stream, which OpenAPI 3.1 cannot describe
                assert f"#/components/{kind}/{name}" in used, f"{name} is never used"


def test_every_schema_is_json_schema_2020_12(api):
    for name, schema in api.document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "$ref" not in schema, name
        for required in (s for _, s in walk(schema) if isinstance(s, dict) and "required" in s and "properties" in s):
            assert set(required["required"]) <= set(required["properties"]), name


def test_operations_are_named_documented_and_have_responses(api):
    ids = []
    for path, item in api.document["paths"].items():
        for method, op in item.items():
            assert method in contract.METHODS
            ids.append(op["operationId"])
            assert op["summary"] and op["tags"][0] in {t["name"] for t in api.document["tags"]}
            named = {p["name"] for p in op.get("parameters", ()) if p["in"] == "path"}
            assert named == {s[1:-1] for s in path.split("/") if s.startswith("{")}, path
            assert any(code[0] in "12" for code in op["responses"])
            open_to_all = op.get("security") == []
            assert open_to_all or "401" in op["responses"], f"{method} {path} needs a key but cannot say so"
            if "requestBody" in op:
                assert "400" in op["responses"], f"{method} {path} cannot refuse a body"
    assert len(ids) == len(set(ids))


def test_only_these_routes_are_open(api):
    is_open = {p for p, item in api.document["paths"].items() for op in item.values() if op.get("security") == []}
    assert is_open == {"/", "/status", "/docs", "/openapi.json", "/health", "/ready"}


def test_examples_are_valid(api):
    seen = 0
    for name, schema in api.document["components"]["schemas"].items():
        for example in schema.get("examples", ()):
            api.validate({"$ref": f"#/components/schemas/{name}"}, example, name)
            seen += 1
    assert seen >= 4


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}}
RESPONSE = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "logprobs": None, "finish_reason": "stop"}]}
CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
         "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def changed(value, path, new):
    value = copy.deepcopy(value)
    at = value
    for step in path[:-1]:
        at = at[step]
    if new is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


def test_what_openais_clients_send_is_accepted(api):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    for content in ("Hi", [{"type": "text", "text": "Hi"}, image], [{"type": "image_url", "image_url": "data:image;base64,AA=="}], None):
        for extra in ({}, {"stream": True, "stream_options": {"include_usage": True}}, {"stop": ["a"], "n": 2, "seed": 1}, {"stop": "a", "temperature": None},
                      {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}, {"anything": {"else": 1}},
                      {"logprobs": True, "top_logprobs": 3, "logit_bias": {"42": -100}, "response_format": {"type": "text"}},
                      {"mm_processor_kwargs": {"size": {"longest_edge": 1000}}, "chat_template_kwargs": {"enable_thinking": True}}):
            api.check_request("POST", "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": content}], **extra})
    turn = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "4"}]
    api.check_request("POST", "/v1/chat/completions", {"model": "m", "messages": turn})


@pytest.mark.parametrize("path, new", [
    (("messages",), KeyError), (("model",), 5), (("messages",), []), (("messages",), "Hi"), (("messages", 0, "role"), "robot"),
    (("messages", 0, "content"), 5), (("messages", 0, "content"), [{"type": "image"}]), (("temperature",), -1), (("top_p",), 2),
    (("n",), 0), (("stop",), [1]), (("max_tokens",), 0), (("stream",), "yes"), (("logit_bias",), {"1": "a"}),
])
def test_wrong_requests_are_refused(api, path, new):
    good = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    api.check_request("POST", "/v1/chat/completions", good)
    with pytest.raises(AssertionError):
        api.check_request("POST", "/v1/chat/completions", changed(good, path, new))


def answer(api, value, status=200, kind="application/json"):
    api.check_response("POST", "/v1/chat/completions", status, kind, json.dumps(value).encode())


def test_responses_are_judged(api):
    answer(api, RESPONSE)
    answer(api, changed(RESPONSE, ("choices", 0, "message"), {"role": "assistant", "content": None, "tool_calls": [CALL]}))
    for path, new in ((("id",), KeyError), (("object",), "chat"), (("choices",), []), (("choices", 0, "finish_reason"), None),
                      (("choices", 0, "message", "role"), "user"), (("usage", "total_tokens"), -1), (("usage",), KeyError), (("created",), "now")):
        with pytest.raises(AssertionError):
            answer(api, changed(RESPONSE, path, new))
    error = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
    answer(api, error, 400)
    for status, kind, value in ((418, "application/json", error), (200, "text/html", RESPONSE), (400, "application/json", {"error": "no"})):
        with pytest.raises(AssertionError):
            answer(api, value, status, kind)
    with pytest.raises(AssertionError, match="not in openapi.json"):
        api.check_response("GET", "/v1/chat/completions", 200, "application/json", b"{}")


def test_streams_are_judged(api):
    def stream(*events):
        return "".join(e if isinstance(e, str) else f"data: {json.dumps(e)}\n\n" for e in events).encode()

    def check(body):
        api.check_response("POST", "/v1/chat/completions", 200, "text/event-stream; charset=utf-8", body)

    done = "data: [DONE]\n\n"
    error = {"error": {"message": "no", "type": "server_error", "param": None, "code": None}}
    piece = changed(CHUNK, ("choices", 0, "delta"), {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})
    check(stream(CHUNK, ": keep-alive\n\n", piece, {**CHUNK, "choices": [], "usage": USAGE}, done))
    check(stream(CHUNK, error, done))
    for bad in (stream(CHUNK), stream(CHUNK, done)[:-1], stream("data: [DONE]\n\n", CHUNK), stream(RESPONSE, done), stream("event: x\n\n", done)):
        with pytest.raises(AssertionError):
            check(bad)
