"""schemathesis makes requests from the OpenAPI schema: none of them is answered with a 5xx or outside of the schema."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from .served import serving, tiny_llm

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("DLLM_HF_FUZZ", 30))  # of each operation and mode
DRAWN = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed():
    # Most of what is drawn is valid: short texts keep it cheap.
    with serving(tiny_llm(), request_timeout=0.05, max_choices=4) as server:
        yield server


def test_no_request_that_the_schema_allows_or_forbids_makes_the_server_fail(fuzzed):
    schema = schemathesis.openapi.from_dict(fuzzed.get("/openapi.json").json)
    schema.config.update(base_url=fuzzed.url)
    seen = 0
    for each in schema.get_all_operations():
        operation = each.ok()

        def check(case):
            nonlocal seen
            seen += 1
            answer = case.call()
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text

        for mode in schemathesis.GenerationMode:
            try:
                DRAWN(given(operation.as_strategy(generation_mode=mode))(check))()
            except Unsatisfiable:  # an operation without parameters has no wrong ones
                assert operation.method == "get" and not mode.is_positive
    assert seen > 8 * CASES
    assert fuzzed.get("/health").status == 200 and fuzzed.becomes_idle()
