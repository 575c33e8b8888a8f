"""The official OpenAI client and LangChain's, unchanged. Run: make check-clients (packages from PyPI in build/venv)."""
import base64
import json

import openai
import pytest

from serving import IMAGES, data_uri

PICTURE = [{"role": "user", "content": [{"type": "text", "text": "What do you see?"}, {"type": "image_url", "image_url": {"url": data_uri()}}]}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_chat(client):
    r = client.chat.completions.create(model="qvl-tiny", messages=PICTURE, temperature=0)
    assert "triangle" in r.choices[0].message.content and r.choices[0].finish_reason == "stop"
    assert r.usage.prompt_tokens_details.cached_tokens >= 0 and r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens


def test_stream(client):
    whole = client.chat.completions.create(model="qvl-tiny", messages=PICTURE, temperature=0).choices[0].message.content
    chunks = list(client.chat.completions.create(model="qvl-tiny", messages=PICTURE, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens > 0


def test_the_stream_helper(client):
    with client.chat.completions.stream(model="qvl-tiny", messages=PICTURE, temperature=0) as stream:
        for _ in stream:
            pass
        assert "triangle" in stream.get_final_completion().choices[0].message.content


def test_options(client):
    r = client.chat.completions.create(model="qvl-tiny", messages=PICTURE, n=2, seed=3, logprobs=True, top_logprobs=2, max_completion_tokens=5, stop=["zzz"],
                                       presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"1": -5}, user="u", extra_body={"top_k": 5, "min_p": 0.1})
    assert len(r.choices) == 2 and len(r.choices[0].logprobs.content[0].top_logprobs) == 2


def test_tools(client):
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    r = client.chat.completions.create(model="qvl-tiny", messages=[{"role": "user", "content": "Hello"}], tools=[tool], tool_choice="auto", max_tokens=10)
    assert r.choices[0].message.tool_calls is None or r.choices[0].message.tool_calls[0].function.name
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="qvl-tiny", messages=[{"role": "user", "content": "Hello"}], tools=[tool], tool_choice="required")


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-99", messages=PICTURE)
    assert e.value.code == "model_not_found" and e.value.param == "model"
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="qvl-tiny", messages=[{"role": "user", "content": "word " * 9000}])
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="qvl-tiny", messages=PICTURE, response_format={"type": "json_object"})


def test_keys(start, keys):
    good = keys("client")
    s = start("--set", f"auth.keys={keys.path}")
    assert openai.OpenAI(base_url=s.url + "/v1", api_key=good).models.list().data[0].id == "qvl-tiny"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=s.url + "/v1", api_key="sk-wrong", max_retries=0).models.list()


def test_completions_and_models(client):
    assert client.models.retrieve("qvl-tiny").id == "qvl-tiny"
    assert client.completions.create(model="qvl-tiny", prompt="Hello", max_tokens=4).choices[0].text is not None


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai")
    llm = langchain.ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="qvl-tiny", temperature=0, max_retries=0)
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode((IMAGES / "shapes.png").read_bytes()).decode()}}
    message = [("human", [{"type": "text", "text": "What do you see?"}, picture])]
    assert "triangle" in llm.invoke(message).content
    assert "triangle" in "".join(c.content for c in llm.stream(message))
    json.dumps(llm.invoke(message).response_metadata)
