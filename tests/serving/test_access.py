"""Who is let in, and what is told to whom."""

import base64
import logging

import pytest

from .served import NAME, serving, tiny_llm

KEY = "sesame-5f3a"
BEARER = {"Authorization": f"Bearer {KEY}"}
PATHS = ["/", "/page.js", "/page.css", "/metrics", "/version", "/openapi.json", "/v1/models", "/v1/nothing", "/docs"]
POSTED = ["/v1/completions", "/v1/chat/completions", "/v1/infill", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def locked():
    with serving(tiny_llm(), api_key=KEY, allowed_origins=["https://friend.example"]) as server:
        yield server


def test_without_the_key_only_health_answers(locked):
    assert locked.get("/health").json == {"status": "ok"}
    for path in PATHS:
        assert locked.get(path).status == 401 and locked.get(path).error["code"] == "invalid_api_key"
    for path in POSTED:
        assert locked.post(path, {}).status == 401
    for path in ("/health/", "//health", "/health/../v1/models", "/v1/models?/health"):
        assert locked.get(path).status == 401


def test_a_wrong_key_is_as_good_as_none(locked):
    wrong = [
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        KEY,
        f"Token {KEY}",
        "Bearer \xff",
        "Basic ???",
    ]
    wrong.append("Basic " + base64.b64encode(b"user:wrong").decode())
    for value in wrong:
        assert locked.get("/v1/models", Authorization=value).status == 401


def test_the_key_opens_every_endpoint(locked):
    assert locked.get("/v1/models", **BEARER).status == 200
    assert locked.post("/v1/completions", {"prompt": "a", "max_tokens": 2}, **BEARER).status == 200


def test_a_browser_asks_for_the_key_as_a_password(locked):
    refused = locked.get("/", Accept="text/html,*/*")
    assert refused.status == 401 and refused.headers["www-authenticate"].startswith("Basic")
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    assert locked.get("/", Authorization=f"Basic {basic}").status == 200


def test_neither_key_nor_prompts_are_logged(locked, caplog):
    with caplog.at_level(logging.DEBUG):
        locked.post("/v1/completions", {"prompt": "secret", "max_tokens": 2}, **BEARER)
        locked.post("/v1/completions", {"prompt": "secret", "max_tokens": -2}, **BEARER)
        locked.get("/v1/models", Authorization=f"Bearer {KEY}x")
    logged = caplog.text + "".join(str(record.args) for record in caplog.records)
    assert "/v1/completions 200" in caplog.text
    assert KEY not in logged and "secret" not in logged


def test_prompts_are_logged_where_that_is_asked_for(caplog):
    with serving(tiny_llm(), log_prompts=True) as server, caplog.at_level(logging.INFO):
        server.complete("secret", max_tokens=2)
    assert "secret" in caplog.text


def test_only_the_pages_of_named_origins_may_call(locked, server):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = locked.call("OPTIONS", "/v1/completions", None, {"Origin": "https://friend.example", **asked})
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    for where, origin in ((locked, "https://other.example"), (server, "https://friend.example")):
        refused = where.call("OPTIONS", "/v1/completions", None, {"Origin": origin, **asked})
        assert "access-control-allow-origin" not in refused.headers
        assert "access-control-allow-origin" not in where.get("/health", Origin=origin).headers


def test_the_page_loads_nothing_from_elsewhere(server):
    page = server.get("/")
    assert page.status == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", "/page.css", "/page.js"):
        text = server.get(path).body.decode()
        assert text and "http://" not in text and "https://" not in text
    for path in ("/page.html", "/index.html", "/..%2fapp.py", "/page/index.html"):
        assert server.get(path).status == 404


@pytest.mark.parametrize(
    "name, value", [("api_key", ""), ("api_key", "schlüssel"), ("max_choices", 0), ("request_timeout", -1.0)]
)
def test_settings_that_cannot_be_are_refused(name, value):
    from dllm_hf.serving import Settings

    with pytest.raises(ValueError, match=f"`{name}`"):
        Settings(NAME, **{name: value})
