"""A stand-in for the Hub: what `huggingface_hub` asks of its API to publish files, over HTTP on this machine."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http

LARGE = ".safetensors"  # these go through the store of large files, the others are in the commit itself


class Hub(ThreadingHTTPServer):
    """
    url: what to set as the library's endpoint.
    repositories: name -> {"visibility", "commits": the files of each commit, by name}.
    stored: the large files, by their hash.
    requests: (method, path) of every request.
    fail: step -> what happens there: a status code, `"drop"` to close the connection instead of answering, or
        `"lose the answer"` to do as asked and then close it. The steps: `create`, `batch`, `upload`, `commit`.
    most: files in a commit; a larger one is refused (413).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.stored, self.requests, self.fail = {}, {}, [], {}
        self.most = 1000

    def files(self, name: str) -> dict[str, bytes]:
        """What a repository holds after all of its commits."""
        return {path: content for commit in self.commits(name) for path, content in commit.items()}

    def commits(self, name: str) -> list[dict[str, bytes]]:
        return self.repositories[name]["commits"] if name in self.repositories else []

    def handle_error(self, request, client_address):
        pass  # a connection that a test has dropped


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.body()
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            self.step("create", lambda: self.create(json.loads(body)))
        elif self.path == "/api/validate-yaml":
            self.answer(200, {})
        elif "preupload" in parts:
            self.answer(200, {"files": [self.mode("/".join(parts[2:4]), f) for f in json.loads(body)["files"]]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.step("batch", lambda: (200, {"objects": [self.place(o) for o in json.loads(body)["objects"]]}))
        elif "commit" in parts:
            self.step("commit", lambda: self.commit("/".join(parts[2:4]), body))
        else:
            self.answer(404, {"error": "Not found"})

    def do_PUT(self):
        content = self.body()
        self.step("upload", lambda: self.store(content))

    def do_GET(self):
        self.body()
        name = "/".join(self.path.split("?")[0].strip("/").split("/")[2:4])
        if self.path.startswith("/api/models/") and self.server.commits(name):
            self.answer(200, {"id": name, "sha": "0" * 40})
        else:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def step(self, name, act):
        failure = self.server.fail.get(name)
        if isinstance(failure, int):
            self.answer(failure, {"error": f"The {name} did not work"})
        elif failure == "drop":
            self.close_connection = True
        else:
            answer = act()
            if failure == "lose the answer":
                self.close_connection = True
            else:
                self.answer(*answer)

    def create(self, wanted) -> tuple[int, dict]:
        if not self.headers.get("Authorization"):
            return 401, {"error": "Invalid username or password."}
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        known = name in self.server.repositories
        # huggingface_hub 1.5 sends `private`, later ones `visibility`.
        visibility = wanted.get("visibility", "private" if wanted.get("private") else None)
        self.server.repositories.setdefault(name, {"visibility": visibility, "commits": []})
        return 409 if known else 200, {"url": f"{self.server.url}/{name}"}

    def mode(self, name, file) -> dict:
        path = file["path"]
        large = path.endswith(LARGE)
        there = self.server.files(name).get(path)
        header = b"" if large or there is None else f"blob {len(there)}\0".encode()
        kind = hashlib.sha256 if large else hashlib.sha1
        oid = None if there is None else kind(header + there).hexdigest()
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def place(self, wanted) -> dict:
        if wanted["oid"] in self.server.stored:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/store/{wanted['oid']}"}}}

    def store(self, content) -> tuple[int, dict]:
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "not what it was said to be"}
        self.server.stored[oid] = content
        return 200, {}

    def commit(self, name, body) -> tuple[int, dict]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        if len(files) > self.server.most:
            return 413, {"error": "too many files"}
        self.server.commits(name).append(files)
        oid = f"{len(self.server.commits(name)):040x}"
        return 200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    def body(self) -> bytes:
        self.server.requests.append((self.command, self.path))
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: dict, headers: dict | None = None):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def lead_library_to(hub: Hub, monkeypatch) -> None:
    """`huggingface_hub` talks to the stand-in, by HTTP alone, and does not sleep before it tries again."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
