"""A server in a thread of the tests' own process, and calls of HTTP without a client library."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from dllm_hf import LLM

from ..builders import character_tokenizer, tiny_model

for _package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(_package, reason='needs the server: pip install "dllm-hf[serve]"')

import uvicorn  # noqa: E402

from dllm_hf.serving import Settings, bind, create_app  # noqa: E402

NAME = "tiny"
CHAT = "{% for turn in messages %}{{ turn.content }}:{% endfor %}"
ROOM = {"max_tokens": 8, "block_length": 4}


@dataclass
class Reply:
    """An answer. `seconds`: until it was whole."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """What a stream holds, without its end."""
        data = [each.removeprefix("data: ") for each in self.body.decode().split("\n\n") if not each.startswith(":")]
        assert data[-2:] == ["[DONE]", ""]
        return [json.loads(each) for each in data[:-2]]

    @property
    def text(self) -> str:
        """What a stream says."""
        choices = [choice for event in self.events for choice in event["choices"]]
        return "".join(each["text"] if "text" in each else each["delta"].get("content", "") for each in choices)


class Server:
    """A running one, with what is inside."""

    def __init__(self, url: str, llm: LLM, app: Any):
        self.url, self.llm, self.api = url, llm, app.state.api

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)

    def call(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        begun, connection = time.perf_counter(), self.connect()
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, names, content, time.perf_counter() - begun)

    def get(self, path: str, **headers: str) -> Reply:
        return self.call("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call("POST", path, content, {"Content-Type": "application/json", **headers})

    def complete(self, prompt: Any, **parameters: Any) -> Reply:
        return self.post("/v1/completions", {"prompt": prompt, **parameters})

    def becomes_idle(self, seconds: float = 20.0) -> bool:
        """Whether every row and every column of the cache gets free."""
        end, engine = time.monotonic() + seconds, self.llm._driver.engine
        while time.monotonic() < end:
            load = engine.load()
            if engine.is_idle and not load.running and not load.cache and not self.api.engine._jobs:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def serving(llm: LLM, **settings: Any):
    """A [`Server`], until the block ends."""
    app = create_app(llm, Settings(**{"name": NAME, **settings}))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", llm, app)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def tiny_llm(family: str = "llada", tokenizer=None, **options: Any) -> LLM:
    tokenizer = tokenizer or character_tokenizer()
    tokenizer.chat_template = CHAT
    return LLM(tiny_model(family), tokenizer=tokenizer, **{"max_num_seqs": 8, "num_cache_tokens": 2000, **options})
