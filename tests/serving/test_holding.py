"""Clients that read slowly, bodies beyond every limit, and a server that is told to end."""

import json
import socket
import threading
import time

import httpx
import pytest

from mindvl_jax.inference.server.sizes import prompt_sizes


def body_of(stream=True, **rest):
    return {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "stream": stream,
            "ignore_eos": True, "temperature": 0, **rest}  # fmt: skip


def send(port: int, body: dict, buffer: int | None = None) -> socket.socket:
    """A connection whose request is sent and whose answer nobody reads yet."""
    content = json.dumps(body).encode()
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to it"
        time.sleep(0.01)


def test_readers_that_stand_still_hold_nobody_up_and_get_their_answers_in_the_end(running):
    assert running.idle()
    body = body_of(max_tokens=150, logprobs=True, top_logprobs=20, stream_options={"include_usage": True})
    slow = [send(running.port, body, buffer=4096) for _ in range(8)]  # twice as many as slots
    try:
        wait_until(lambda: running.runner.load >= len(slow))
        quick = httpx.post(f"{running.url}/v1/chat/completions", json=body_of(False, max_tokens=5), timeout=60)
        assert quick.status_code == 200 and quick.json()["usage"]["completion_tokens"] == 5
        wait_until(lambda: not running.runner.busy)  # their slots are free though nothing was read
        answers = [rest_of(connection) for connection in slow]
    finally:
        for connection in slow:
            connection.close()
    assert min(map(len, answers)) > 100_000, "the answers fit into buffers: nobody stood still"
    assert all(b'"completion_tokens": 150' in answer and b"data: [DONE]" in answer for answer in answers)
    assert running.idle()


def test_a_body_of_a_hundred_megabytes_is_refused_while_it_is_sent(running):
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {100 << 20}\r\n\r\n".encode()
        )
        sent = 0
        try:
            while sent < 100 << 20:
                sent += connection.send(b"x" * 65536)
        except OSError:
            pass  # the server hung up: it had read enough
        else:
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


@pytest.fixture
def ending(opened, start):
    server = start(opened, context=64, sizes=prompt_sizes(context=64, patches=0, images=0, rows=1))
    with server:
        yield server


def test_a_server_that_is_told_to_end_finishes_what_runs_and_takes_nothing_new(ending):
    """What uvicorn does on SIGTERM: it sets `should_exit`."""
    streams = [send(ending.port, body_of(max_tokens=40)) for _ in range(6)]  # more than slots: some wait
    wait_until(lambda: ending.runner.load == 6)
    ending.server.should_exit = True

    def refused():
        try:
            socket.create_connection(("127.0.0.1", ending.port), timeout=1).close()
        except OSError:
            return True
        return False

    wait_until(refused)
    answers = [rest_of(connection) for connection in streams]
    for connection in streams:
        connection.close()
    assert all(b"data: [DONE]" in answer and b"error" not in answer for answer in answers)
    ending.thread.join(60)
    assert not ending.thread.is_alive() and not ending.runner.accepting and not ending.runner.load
    assert not [thread for thread in threading.enumerate() if thread is ending.runner._thread]
