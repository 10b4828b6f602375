"""The server on Ray Serve: the client's tests, and what Serve adds."""

import json
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install "dllm-hf[ray]"')

from ray import serve  # noqa: E402

from dllm_hf import LLM  # noqa: E402
from dllm_hf.scaling import deployment  # noqa: E402
from dllm_hf.scaling.deployment import DiffusionServer  # noqa: E402
from dllm_hf.serving import Settings, create_app  # noqa: E402
from dllm_hf.serving.errors import ApiError  # noqa: E402

from ..serving.served import NAME, Server  # noqa: E402
from ..serving.test_openai_client import *  # noqa: E402, F403  these tests run here too, on the `server` below

del test_a_full_queue_asks_for_patience  # noqa: F821  of a server of its own

LONG = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True}
OPTIONS = {"max_num_seqs": 8, "num_cache_tokens": 2000, "device": "cpu"}


class Served(Server):
    """`llm`: an engine of the same model in this process."""

    def __init__(self, url: str, llm: LLM):
        self.url, self.llm = url, llm

    def metric(self, name: str) -> float:
        lines = [
            line for line in self.get("/metrics").body.decode().splitlines() if line.startswith(f"dllm_hf_{name}{{")
        ]
        return float(lines[0].rpartition(" ")[2])

    def becomes_idle(self, seconds: float = 20.0) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # The engine's load is that of its last event, which may be of one completion of several.
            if not self.metric("requests_waiting") and self.complete("a", max_tokens=1).status == 200:
                if not self.metric("requests_running") and not self.metric("cache_usage"):
                    return True
            time.sleep(0.05)
        return False


@pytest.fixture(scope="module")
def server(cluster, folder):
    serve.start(http_options={"host": "127.0.0.1", "port": 18431}, proxy_location="HeadOnly")
    serve.run(deployment(folder, Settings(name=NAME), num_gpus=0, **OPTIONS))
    yield Served("http://127.0.0.1:18431", LLM(folder, **OPTIONS))
    serve.shutdown()


def test_more_requests_than_serves_default_are_decoded_together(server):
    most = 0
    for _ in range(5):  # on a machine with other work the requests may come too late for each other, or end unseen
        threads = [threading.Thread(target=server.complete, kwargs={**LONG, "seed": each}) for each in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, server.metric("requests_running"))
        if most > 5:
            return
    raise AssertionError(f"{most} at once")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_rows_behind_the_proxy(server, stream):
    finished = server.metric("generation_tokens_total")
    connection = server.connect()
    body = {"prompt": ["abc", "de"], "n": 10, "max_tokens": 120, "ignore_eos": True, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(0.2)
    connection.close()
    assert server.becomes_idle(5)
    assert server.metric("generation_tokens_total") - finished < 20 * 120


def test_health_and_page_come_through(server):
    assert server.get("/health").status == 200 and b"<html" in server.get("/").body


def test_serve_is_told_of_an_engine_that_has_failed(folder):
    """Serve replaces a replica whose health check raises."""
    application = create_app(LLM(folder, **OPTIONS), Settings(name=NAME))
    replica = SimpleNamespace(application=application)
    DiffusionServer.check_health(replica)
    application.state.api.engine.failure = "the device is lost"
    with pytest.raises(ApiError, match="the device is lost"):
        DiffusionServer.check_health(replica)


def test_replicas_are_started_when_requests_are_more_than_the_slots_of_one(server, folder):
    """The last test: its application takes the place of that of the others."""
    autoscaling = {"max_replicas": 2, "upscale_delay_s": 0.1, "metrics_interval_s": 0.1, "look_back_period_s": 0.5}
    options = {**OPTIONS, "max_num_seqs": 1}
    serve.run(deployment(folder, Settings(name=NAME), num_gpus=0, autoscaling=autoscaling, **options))
    replicas = lambda: serve.status().applications["default"].deployments["DiffusionServer"].replica_states
    assert replicas() == {"RUNNING": 1}
    statuses, end = [], time.monotonic() + 60

    def ask() -> None:
        while time.monotonic() < end and replicas().get("RUNNING") != 2:
            statuses.append(server.complete(**LONG).status)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replicas()["RUNNING"] == 2 and set(statuses) == {200}
