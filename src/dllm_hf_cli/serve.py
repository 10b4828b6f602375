"""`dllm-hf serve`: one model behind a port."""

import argparse
import logging
import os
from pathlib import Path

from dllm_hf import LLM
from dllm_hf.serving import Settings, bind
from dllm_hf.serving import serve as run

from .chat import GREETING, templated
from .session import Session

KEY_VARIABLE = "DLLM_HF_API_KEY"


def serve(arguments: argparse.Namespace) -> int:
    """Exit code 0 after SIGTERM and Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = Settings(
        name=arguments.served_model_name or arguments.model.rstrip("/"),
        api_key=os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key,
        allowed_origins=arguments.allowed_origins or [],
        max_body_bytes=arguments.max_body_bytes,
        max_choices=arguments.max_choices,
        request_timeout=arguments.request_timeout,
        shutdown_timeout=arguments.shutdown_timeout,
        log_prompts=arguments.log_prompts,
    )
    with bind(arguments.host, arguments.port) as listener:
        run(_engine(arguments), settings, listener)
    return 0


def _engine(arguments: argparse.Namespace) -> LLM:
    session = Session(arguments)
    for name, instead in (("max_length", "--max-new-tokens"), ("num_return_sequences", "`n` in a request")):
        if name in session.options:
            raise ValueError(f"`{name}` is nothing that a server could take for all requests: give {instead}.")
    if arguments.chat_template is not None:
        file = Path(arguments.chat_template)
        session.tokenizer.chat_template = file.read_text(encoding="utf-8")
        templated(session.tokenizer, GREETING, file)
    engine = session.of_engine()
    if session.is_read_elsewhere:
        engine["generation_config"] = session.resolved
    else:
        engine["model"].generation_config = session.resolved
    return LLM(
        **engine,
        enforce_eager=session.resolved.disable_compile,
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_queue=arguments.max_queue,
        num_cache_tokens=arguments.num_cache_tokens,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        tensor_parallel_size=arguments.tensor_parallel_size,
        data_parallel_size=arguments.data_parallel_size,
    )
