"""Many streams at once, of which many end before their time. `benchmarks/serving_online.py storm` does it for longer."""

import gc
import random
import threading
import time

import pytest

from .served import serving, tiny_llm

SECONDS, CLIENTS = 5, 100


@pytest.mark.slow
def test_a_storm_of_streams_leaves_nothing_behind():
    random.seed(0)
    with serving(tiny_llm("sdar", max_num_seqs=32, num_cache_tokens=3000)) as server:
        end = time.monotonic() + SECONDS
        finished, left, wrong, waits = [], [], [], []
        bodies = [
            {"prompt": "abc"[: 1 + index % 3], "max_tokens": 8 + index % 40, "seed": index, "temperature": 1.0}
            for index in range(12)
        ]
        wanted = [server.complete(**body).json["choices"][0]["text"] for body in bodies]

        def client(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < end:
                number = draw.randrange(len(bodies))
                try:
                    if draw.random() < 1 / 3:
                        connection = server.connect()
                        content = b'{"prompt": "abc", "max_tokens": 100, "ignore_eos": true, "stream": true}'
                        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
                        time.sleep(draw.random() * 0.2)
                        connection.close()
                        left.append(1)
                        continue
                    reply = server.complete(**bodies[number], stream=True)
                    (finished if reply.status == 200 and reply.text == wanted[number] else wrong).append(reply)
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            waits.append(server.get("/health").seconds)
            time.sleep(0.1)
        for thread in threads:
            thread.join(timeout=60)
        assert not wrong, wrong[:3]
        assert len(finished) > CLIENTS / 2 and len(left) > CLIENTS / 4
        assert server.becomes_idle(30)
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each).__name__ == "Job" and each.left]
    # Client threads and the server share one interpreter here, so that this is no figure of the server's.
    assert sorted(waits)[len(waits) // 2] < 0.5
