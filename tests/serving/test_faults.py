"""Clients that go, steps that fail, an engine that ends."""

import socket
import threading
import time

import pytest

from dllm_hf.serving import engine_thread

from ..builders import new_model
from .served import LLM, NAME, character_tokenizer, serving, tiny_llm

LONG = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True}


@pytest.fixture
def own():
    """A server that a test may break."""
    with serving(tiny_llm()) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_frees_its_rows(server, stream, begun):
    def finished(reason: str) -> float:
        labels = {"model_name": NAME, "finished_reason": reason}
        return server.api.metrics.registry.get_sample_value("dllm_hf_completions_total", labels) or 0.0

    aborted, whole, connection = finished("abort"), finished("length"), server.connect()
    body = b'{"prompt": ["abc", "de"], "n": 10, "max_tokens": 120, "ignore_eos": true, "stream": %s}'
    connection.request(
        "POST", "/v1/completions", body % (b"true" if stream else b"false"), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 5
    while begun and not server.llm._driver.engine.load().running:
        assert time.monotonic() < end
        time.sleep(0.001)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert server.becomes_idle(5)
    assert finished("length") < whole + 20  # most had only begun
    assert not begun or finished("abort") > aborted


def test_a_step_that_fails_is_told_to_those_who_took_part_and_nobody_else(monkeypatch):
    llm = LLM(new_model("llada"), tokenizer=character_tokenizer(), num_cache_tokens=2000)
    with serving(llm) as server:
        good = server.complete(**LONG).json["choices"]
        decoder, launch, calls = llm._driver.engine._decoder, llm._driver.engine._decoder.launch, []

        def failing():
            calls.append(None)
            if len(calls) == 3:
                raise RuntimeError("out of luck")
            return launch()

        monkeypatch.setattr(decoder, "launch", failing)
        reply = server.complete(**LONG)
        assert (
            reply.status == 500 and reply.error["code"] == "decoding_failed" and "out of luck" in reply.error["message"]
        )
        calls.clear()
        streamed = server.complete(**LONG, stream=True)
        assert streamed.status == 200 and streamed.events[-1]["error"]["code"] == "decoding_failed"
        assert server.get("/health").status == 200
        assert server.complete(**LONG).json["choices"] == good


def test_when_the_engine_ends_health_says_so_and_nobody_waits(own, monkeypatch):
    replies = []
    threads = [
        threading.Thread(target=lambda stream=stream: replies.append(own.complete(**LONG, stream=stream)))
        for stream in (True, False)
    ]
    turn, is_broken = own.llm._driver.turn, threading.Event()

    def breaking(mailbox):
        if is_broken.wait(timeout=0.001):
            raise SystemError("the engine is gone")
        turn(mailbox)

    monkeypatch.setattr(own.llm._driver, "turn", breaking)
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert own.get("/health").status == 200
    is_broken.set()
    for thread in threads:
        thread.join(timeout=10)
    assert len(replies) == 2
    for reply in replies:
        error = reply.events[-1]["error"] if reply.body.startswith(b"data") else reply.error
        assert error["code"] == "engine_failed" and "the engine is gone" in error["message"]
    assert own.get("/health").status == 503 and own.get("/health").error["code"] == "engine_failed"
    assert own.complete("a").status == 503
    assert own.get("/metrics").status == 200


def test_drafts_change_nothing_of_the_text(server):
    body = {**LONG, "stream": True, "block_length": 4}
    whole = server.complete(**body).text
    drafted = server.complete(**body, stream_drafts=True)
    assert drafted.text == whole


def test_comments_keep_a_silent_stream_alive(monkeypatch):
    """A block that takes long tells nothing until it is done; clients pass over comments."""
    monkeypatch.setattr(engine_thread, "IDLE_SECONDS", 0.5)
    llm = tiny_llm()
    launch = llm._driver.engine._decoder.launch
    monkeypatch.setattr(llm._driver.engine._decoder, "launch", lambda: (time.sleep(0.25), launch()))
    with serving(llm) as server:
        reply = server.complete("abc", max_tokens=12, ignore_eos=True, stream=True)
        assert reply.body.count(b": nothing has become final") >= 2
        assert [bool(event["choices"][0]["text"]) for event in reply.events] == [True, False]


def test_a_request_that_a_stop_aborts_gets_an_error():
    with serving(tiny_llm()) as server:
        replies = []
        thread = threading.Thread(target=lambda: replies.append(server.complete(**LONG)))
        thread.start()
        time.sleep(0.05)
        server.api.engine._loop.call_soon_threadsafe(server.api.engine.abort_all)
        thread.join(timeout=10)
    assert replies[0].status == 503 and replies[0].error["code"] == "shutting_down"
