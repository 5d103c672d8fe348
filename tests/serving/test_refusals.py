"""Invalid requests get a clear 4xx in the OpenAI form, and the server goes on."""

import base64
import dataclasses
import socket

import pytest

from mindvl_jax.inference.server import media
from mindvl_jax.inference.server.errors import HTTPError
from mindvl_jax.inference.server.runner import Ticket
from mindvl_jax.inference.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "hello"}]


def _chat(**fields) -> dict:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 2, **fields}


def _image(url: str) -> dict:
    return _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


BAD = {
    "no model": ({"messages": HELLO}, "`model`"),
    "no messages": ({"model": "tiny", "messages": []}, "`messages`"),
    "a list": ([1, 2], "must be a JSON object, found list"),
    "a role": (_chat(messages=[{"role": "wizard", "content": "x"}]), "`messages[0].role`"),
    "last turn is not the user's": (_chat(messages=[{"role": "assistant", "content": "x"}]), "must end with a user"),
    "a number as text": (_chat(temperature="0.5"), "`temperature`"),
    "a boolean as number": (_chat(max_tokens=True), "`max_tokens`"),
    "no tokens": (_chat(max_tokens=0), "`max_tokens`"),
    "top_p above one": (_chat(top_p=1.5), "`top_p`"),
    "an unknown field": (_chat(temprature=1), "`temprature` is not supported"),
    "a tool without a name": (_chat(tools=[{"type": "function", "function": {}}]), "`tools[0].function.name`"),
    "a choice without tools": (_chat(tool_choice="required"), "needs tools"),
    "a choice of another tool": (
        _chat(
            tools=[{"type": "function", "function": {"name": "f"}}],
            tool_choice={"type": "function", "function": {"name": "g"}},
        ),
        "names 'g'",
    ),
    "an unknown format": (_chat(response_format={"type": "xml"}), "`response_format`"),
    "a schema that is none": (
        _chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}),
        "JSON schema cannot be used",
    ),
    "a schema with what is not built": (
        _chat(structured_outputs={"json": {"not": {"type": "string"}}}),
        "JSON schema cannot be used",
    ),
    "an open bracket": (_chat(response_format={"type": "regex", "regex": "[ab"}), "regular expression cannot be used"),
    "two formats": (_chat(structured_outputs={"regex": "a"}, response_format={"type": "json_object"}), "exclude"),
    "a format that cannot end": (_chat(structured_outputs={"regex": "a"}, ignore_eos=True), "ignore_eos"),
    "a user that calls": (
        _chat(
            messages=[
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                }
            ]
        ),
        "only the assistant's",
    ),
    "no content": (_chat(messages=[{"role": "user"}]), "content is missing"),
    "top_logprobs alone": (_chat(top_logprobs=3), "needs logprobs"),
    "options without a stream": (_chat(stream_options={"include_usage": True}), "needs stream"),
    "an empty stop": (_chat(stop=[""]), "`stop`"),
    "a long prompt": (_chat(messages=[{"role": "user", "content": "x" * 5000}]), "the context holds 256"),
    "too many images": (
        _chat(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 5,
                }
            ]
        ),
        "at most 4",
    ),
    "no image at all": (_image("data:image/png;base64," + base64.b64encode(b"no picture").decode()), "image"),
    "no base64": (_image("data:image/png;base64,@@@@"), "not base64"),
    "a data URI without base64": (_image("data:image/png,abc"), "data URI"),
    "a file": (_image("file:///etc/passwd"), "neither a data: URI nor https"),
    "http": (_image("http://example.org/a.png"), "neither a data: URI nor https"),
    "a host that is not allowed": (_image("https://example.org/a.png"), "not fetched from host 'example.org'"),
    "an image in a system message": (
        _chat(
            messages=[
                {
                    "role": "system",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                },
                *HELLO,
            ]
        ),
        "only user messages",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_the_openai_form(http, name):
    body, message = BAD[name]
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600


def test_a_later_prompt_that_does_not_fit_leaves_no_place_of_the_queue_taken(http, running):
    body = {"model": "tiny", "prompt": ["go", "x" * 5000], "max_tokens": 2}
    before = set(running.runner._tickets)
    for _ in range(3):
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert not running.runner._tickets - before


def test_a_mark_that_a_client_spells_is_text(http):
    tokens = {}
    for text in ("<image> what?", "<imago> what?"):
        answer = http.post("/v1/chat/completions", json=_chat(messages=[{"role": "user", "content": text}]))
        assert answer.status_code == 200
        tokens[text] = answer.json()["usage"]["prompt_tokens"]
    assert len(set(tokens.values())) == 1  # the byte tokenizer has a token for each letter


def test_bytes_that_are_no_json_are_refused(http):
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN'):
        answer = http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_a_large_body_is_refused_before_it_is_held(http):
    answer = http.post("/v1/chat/completions", content=(b"x" * 65536 for _ in range(64)))
    assert answer.status_code == 413


def test_ten_thousand_header_lines_are_refused(running):
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        lines = "".join(f"X-{number}: {number}\r\n" for number in range(10_000))
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 4")


def test_unknown_paths_and_methods_are_named(http):
    assert "there is no '/v2/x'" in http.get("/v2/x").json()["error"]["message"]
    assert http.get("/v1/chat/completions").status_code == 405


def test_a_full_queue_answers_429_with_a_time_to_come_back(running, http):
    limit, running.runner._limit = running.runner._limit, 0
    try:
        answer = http.post("/v1/chat/completions", json=_chat())
    finally:
        running.runner._limit = limit
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_key_that_fills_the_queue_leaves_the_places_of_the_others(running, monkeypatch):
    runner = running.runner
    monkeypatch.setattr(runner, "_limit", 8)
    monkeypatch.setattr(runner, "_owners", 2)  # four places for all, two for each

    def room(owner):
        try:
            runner.check_room(owner)
        except HTTPError as error:
            assert error.status == 429
            return False
        return True

    held = [Ticket(None, None, None, 1, 0.0, owner=owner) for owner in ["greedy"] * 6 + ["modest"] * 2]
    states = []
    for ticket in held:
        assert room(ticket.owner)
        runner._tickets.add(ticket)
        states.append((room("greedy"), room("modest")))
    for ticket in held:
        runner._tickets.discard(ticket)
    assert states == [(True, True)] * 5 + [(False, True)] * 2 + [(False, False)]


def test_an_engine_that_fails_tells_its_requests_and_answers_the_next(running, http, monkeypatch):
    expected = http.post("/v1/chat/completions", json=_chat(temperature=0)).json()["choices"]
    engine = running.runner.engine
    monkeypatch.setattr(engine, "step", lambda **_: 1 / 0)
    answer = http.post("/v1/chat/completions", json=_chat())
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failed"
    assert running.runner.engine is not engine
    assert http.post("/v1/chat/completions", json=_chat(temperature=0)).json()["choices"] == expected


def test_keys_are_asked_for_where_there_are_some(running, http):
    settings = running.settings
    server = next(route.endpoint for route in running.app.routes if route.path == "/v1/models").__closure__
    owner = next(cell.cell_contents for cell in server if hasattr(cell.cell_contents, "_checked_key"))
    owner.settings = dataclasses.replace(settings, api_keys=("right", "other"))
    try:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 200
        assert http.get("/health").status_code == 200
    finally:
        owner.settings = settings


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.8",
        "192.168.1.1",
        "169.254.169.254",
        "::1",
        "fd00::1",
        "0.0.0.0",
        "100.64.0.1",
        "::ffff:127.0.0.1",
    ],
)
def test_an_allowed_host_that_resolves_to_a_private_address_is_not_fetched(monkeypatch, address):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    monkeypatch.setattr(media.httpx, "Client", lambda **_: pytest.fail("connected"))
    with pytest.raises(HTTPError, match="not public"):
        media.read_media("https://images.example/a.png", ServerSettings(model="m", hosts=("images.example",)), "url")


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(0, 0, 0, "", ("93.184.216.34", 443)), (0, 0, 0, "", ("127.0.0.1", 443))],
    )
    with pytest.raises(HTTPError, match="not public"):
        media.read_media("https://images.example/a.png", ServerSettings(model="m", hosts=("images.example",)), "url")
