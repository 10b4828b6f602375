"""`dllm-hf serve`: its options reach the engine and the server, or are refused before anything listens."""

import pytest
import torch

from dllm_hf import SamplingParams

pytest.importorskip("fastapi", reason='needs the server: pip install "dllm-hf[serve]"')

from dllm_hf_cli import serve  # noqa: E402


@pytest.fixture
def started(monkeypatch):
    """What would be served, instead of serving it."""
    found = []
    monkeypatch.setattr(
        serve, "run", lambda llm, settings, listener: found.append((llm, settings, listener.getsockname()))
    )
    return found


def test_its_options_reach_the_engine_and_the_server(run, folder, started, monkeypatch, tmp_path):
    monkeypatch.setenv("DLLM_HF_API_KEY", "sesame")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    code, *_ = run(
        "serve", folder, "--port", 0, "--served-model-name", "tiny", "--chat-template", template,
        "--max-model-len", 64, "--max-num-seqs", 3, "--max-queue", 5, "--num-cache-tokens", 200,
        "--max-num-batched-tokens", 48, "--max-choices", 7, "--max-body-bytes", 1000, "--request-timeout", 9,
        "--shutdown-timeout", 2, "--allowed-origins", "https://a.example", "--log-prompts",
        "--cache-policy", "dual", "--temperature", "0.5", "--block-length", 8, "--max-new-tokens", 12, "--dtype", "bfloat16",
    )  # fmt: skip
    assert code == 0
    [(llm, settings, (host, port))] = started
    assert host == "127.0.0.1" and port > 0
    assert llm.max_model_len == 64 and llm.tokenizer.chat_template == "{{ messages[0].content }}"
    engine = llm._driver.engine
    assert len(engine._decoder.rows) == 3 and engine.max_queue == 5 and engine._decoder.token_budget == 48
    options = llm.effective_options(SamplingParams())
    assert (options.cache_policy, options.temperature, options.block_length) == ("dual", 0.5, 8)
    assert options.max_new_tokens == 12 and llm.model.dtype == torch.bfloat16
    assert (settings.name, settings.api_key, settings.max_choices, settings.max_body_bytes) == (
        "tiny",
        "sesame",
        7,
        1000,
    )
    assert (settings.request_timeout, settings.shutdown_timeout, settings.log_prompts) == (9, 2, True)
    assert settings.allowed_origins == ["https://a.example"]


@pytest.mark.parametrize(
    "options, named",
    [
        (["--max-model-len", 5000], "`max_model_len=5000` is more than the 4096 positions"),
        (["--max-num-seqs", 0], "`max_num_seqs`"),
        (["--tensor-parallel-size", 0], "`tensor_parallel_size`"),
        (["--max-choices", 0], "`max_choices`"),
        (["--request-timeout", "nan"], "`request_timeout`"),
        (["--api-key", ""], "`api_key`"),
        (["--allowed-origins", "a.example"], "'a.example'"),
        (["--max-length", 5], "--max-new-tokens"),
        (["--num-return-sequences", 2], "`n` in a request"),
        (["--port", 99999], "--port 99999 cannot be had"),
        (["--gpu-memory-utilization", 2], "`gpu_memory_utilization`"),
        (["--chat-template", "no-such-file"], "no-such-file"),
        (["--max-model-ln", 64], "--max-model-len"),
    ],
)
def test_what_cannot_be_served_is_an_error_by_name(run, folder, started, options, named):
    code, stdout, stderr = run("serve", folder, "--port", 0, *options)
    assert (code, stdout, started) == (2, "", []) and named in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("template", ["{% for", "{{ 1 // 0 }}"])
def test_a_template_that_fails_is_refused_before_it_listens(run, folder, started, tmp_path, template):
    file = tmp_path / "template.jinja"
    file.write_text(template)
    code, stdout, stderr = run("serve", folder, "--port", 0, "--chat-template", file)
    assert (code, stdout, started) == (2, "", []) and f"the chat template in {file} fails" in stderr
