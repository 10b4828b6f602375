"""What docs/serving.md says about deployment works as far as a test can run it: proxy, unit, container file, dashboard."""

import getpass
import grp
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_hf_cli.options import command_parser

from .served import serving, tiny_llm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
NGINX = shutil.which("nginx")


def fence(language: str) -> str:
    """The only one of the page in a language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


def test_every_metric_of_the_dashboard_is_there(server):
    dashboard = json.loads((ROOT / "docs/serving_dashboard.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    server.complete("abc", max_tokens=4)
    samples = {line.split("{")[0] for line in server.get("/metrics").body.decode().splitlines() if line[0] != "#"}
    asked = {name for query in queries for name in re.findall(r"\bdllm_hf_\w+", query)}
    assert len(queries) == 11 and asked <= samples
    assert set(re.findall(r"`((?:vllm:|dllm_hf_)\w+)`", PAGE)) - samples <= {
        "vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds",  # of which samples are counts and sums
    }  # fmt: skip
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert (
        len({(place["x"], place["y"]) for place in places})
        == len(places)
        == len({p["id"] for p in dashboard["panels"]})
    )


def test_unit_and_container_start_the_command_with_options_that_it_has():
    unit, container = fence("ini"), fence("dockerfile")
    [started] = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    [entry] = re.findall("^ENTRYPOINT (.*)$", container, re.MULTILINE)
    for words in (shlex.split(started), json.loads(entry)):
        assert Path(words[0]).name == "dllm-hf" and words[1] == "serve"
        arguments = command_parser("serve").parse(words[2:])
        assert arguments.port == 8000
        # systemd waits longer than the server takes to stop.
        assert arguments.shutdown_timeout + 10 < int(re.search(r"TimeoutStopSec=(\d+)", unit)[1])
    assert "[serve,grammar]" in container and "constraints.txt" in container


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "dllm-hf.service"
    unit.write_text(fence("ini").replace("/opt/dllm-hf/bin/dllm-hf", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(NGINX is None or shutil.which("openssl") is None, reason="there is no nginx with openssl")
def test_a_stream_comes_through_the_proxy_as_it_is_made(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=llm.example.org -keyout {tmp_path}/llm.key"
    subprocess.run([*command.split(), "-out", f"{tmp_path}/llm.pem"], check=True, capture_output=True)
    with serving(tiny_llm(), api_key="sesame") as server:
        site = (
            fence("nginx")
            .replace("/etc/ssl/", f"{tmp_path}/")
            .replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
        )
        site = site.replace("http://127.0.0.1:8000", server.url)
        temporary = "".join(
            f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = tmp_path / "nginx.conf"
        # The folder of a test is its user's alone.
        main = f"user {getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name};\npid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\ndaemon off;\nevents {{}}\n"
        configuration.write_text(f"{main}http {{\naccess_log off;\n{temporary}{site}}}\n")
        run = [NGINX, "-p", str(tmp_path), "-e", f"{tmp_path}/error.log", "-c", str(configuration)]
        checked = subprocess.run([*run, "-t"], capture_output=True, text=True, timeout=30)
        assert checked.returncode == 0, checked.stderr
        proxy = subprocess.Popen(run, stderr=subprocess.PIPE)
        try:
            _read_a_stream(server, port)
        finally:
            os.kill(proxy.pid, signal.SIGTERM)
            proxy.wait(timeout=10)


def _read_a_stream(server, port: int) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    body = {"prompt": "abc", "max_tokens": 120, "block_length": 4, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sesame"}
    for attempt in range(100):
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            break
        except ConnectionRefusedError:
            assert attempt < 99
            time.sleep(0.05)
    answer = connection.getresponse()
    assert answer.status == 200
    first = answer.readline()
    assert first.startswith(b"data: ") and server.llm._driver.engine.running, "the proxy has held the stream back"
    assert answer.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    large = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    large.request("POST", "/v1/completions", b" " * 3 * 2**20 + json.dumps(body).encode(), headers)
    assert large.getresponse().status == 200  # what the server takes, the proxy does
    large.close()
