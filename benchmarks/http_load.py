"""Clients of `serving_online.py`, in a process of their own, without PyTorch: a job as JSON on standard input, what became of
each request as JSON on standard output.

job: host, port; requests, bodies for /v1/completions, which are streamed; clients, how many requests are in flight (closed
loop), or rate, arrivals a second (Poisson); seconds, after which the requests begin again from the first one as long as there
is time, or null for each of them once; leaving, the part of them whose client disconnects at a random moment of its first
`patience` seconds; seed.
result: for each request its number, its beginning, first text and end in seconds, its text, how many tokens it got, and what
went wrong: null, "left", or a message.
"""

import asyncio
import json
import random
import sys
import time


class Load:
    def __init__(self, job: dict):
        self.job, self.dice = job, random.Random(job["seed"])
        self.begun, self.results = time.perf_counter(), []

    def now(self) -> float:
        return time.perf_counter() - self.begun

    async def request(self, number: int) -> None:
        result = {"number": number, "begin": self.now(), "first": None, "text": "", "tokens": 0, "error": None}
        leaves = self.dice.random() < self.job["leaving"]
        patience = self.dice.random() * self.job["patience"] if leaves else None
        try:
            await asyncio.wait_for(self._stream(number, result), patience)
        except asyncio.TimeoutError:
            result["error"] = "left"
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        result["end"] = self.now()
        self.results.append(result)

    async def _stream(self, number: int, result: dict) -> None:
        body = json.dumps({**self.job["requests"][number], "stream": True, "stream_options": {"include_usage": True}})
        reader, writer = await asyncio.open_connection(self.job["host"], self.job["port"])
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.job['host']}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write((head + body).encode())
            status = (await reader.readline()).split()[1]
            if status != b"200":
                raise RuntimeError((await reader.read()).decode()[-300:])
            while line := await reader.readline():
                if not line.startswith(b"data: {"):  # heads, sizes of chunks, and the end
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event.get("usage"):
                    result["tokens"] = event["usage"]["completion_tokens"]
                elif text := event["choices"][0]["text"]:
                    if result["first"] is None:
                        result["first"] = self.now()
                    result["text"] += text
            if not result["tokens"]:
                raise RuntimeError("the stream broke off")
        finally:
            writer.close()

    async def run(self) -> None:
        job, numbers = self.job, iter(range(len(self.job["requests"])))

        def following() -> int | None:
            nonlocal numbers
            number = next(numbers, None)
            if number is None and job["seconds"] is not None:
                numbers = iter(range(len(job["requests"])))
                number = next(numbers)
            return None if job["seconds"] is not None and self.now() > job["seconds"] else number

        async def client() -> None:
            while (number := following()) is not None:
                await self.request(number)

        if job["rate"] is None:
            await asyncio.gather(*(client() for _ in range(job["clients"])))
            return
        arrived = []
        while (number := following()) is not None:
            arrived.append(asyncio.ensure_future(self.request(number)))
            await asyncio.sleep(self.dice.expovariate(job["rate"]))
        await asyncio.gather(*arrived)


if __name__ == "__main__":
    load = Load(json.load(sys.stdin))
    asyncio.run(load.run())
    json.dump(load.results, sys.stdout)
