"""`dllm-hf batch`: a file of prompts into a file of results."""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from dllm_hf.engine import LLM, CompletionOutput, SamplingParams
from dllm_hf.engine.prompts import encode
from dllm_hf.engine.sampling_params import OF_THE_ENGINE
from dllm_hf.generation.configuration import REPLACES, canonical_options

from .output import tell
from .session import Session

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]  # there is none

BEGINNING = b'{"id": "'  # of every result
# What a line may hold, and what that is.
PROMPTS = {
    "prompt": ("a text", lambda value: isinstance(value, str)),
    "messages": ("a list of messages", lambda value: _holds(value, dict) and len(value) > 0),
    "prompt_token_ids": ("a list of integers", lambda value: _holds(value, int)),
}


class Request(NamedTuple):
    """A line that is to be decoded. mark: of all that its result depends on, which stands beside the result."""

    prompt: list[int]
    params: SamplingParams
    mark: str


def batch(arguments: argparse.Namespace) -> int:
    """Exit code 1 where requests have failed: they are not among the results, and the next run tries them again."""
    prompts, results = Path(arguments.prompts), Path(arguments.results)
    lines = _read_lines(prompts)
    if results.exists() and not results.is_file():
        raise ValueError(f"{results} is no file, from which an interrupted run could go on: name one for the results.")
    if results.exists() and results.samefile(prompts):
        raise ValueError(f"{results} holds the prompts: name another file for the results.")
    is_new = not results.exists()
    with results.open("a", encoding="utf-8") as file:
        _lock(file, results)
        try:
            return _run(arguments, lines, results, file)
        except ValueError:
            if is_new and not results.stat().st_size:  # refused: nothing is left of it
                results.unlink()
            raise


def _run(arguments: argparse.Namespace, lines: dict[str, dict[str, Any]], results: Path, file: TextIO) -> int:
    done = _finished(results, lines)
    session = Session(arguments, takes_token_ids=True)
    requests = _open_requests(session, lines, done, results)
    failed = 0
    with tqdm(total=len(lines), initial=len(done), unit="request", dynamic_ncols=True) as bar:
        if requests:
            with _engine(session) as llm:
                failed = _decode(llm, requests, file, bar)
    if failed:
        tell(f"dllm-hf: {failed} of {len(lines)} requests failed: the same command tries them again.")
    return 1 if failed else 0


def _lock(file: TextIO, path: Path) -> None:
    """Refuse to write what another run is writing."""
    if fcntl is None:  # on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{path} is being written by another run: wait for it, or name another file.") from error
    except OSError:  # a file system without locks
        pass


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The requests of a file, by their ids."""
    lines: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                text = content.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}") from error
            if not isinstance(line, dict) or sum(name in line for name in PROMPTS) != 1:
                raise ValueError(f"{where} must be an object with one of {', '.join(PROMPTS)}.")
            name = line.pop("id", number)
            if type(name) not in (str, int) or not _is_text(name := str(name)):
                raise ValueError(f"{where} has the id {name!r}: an id is a string or an integer.")
            if name in lines:
                raise ValueError(f"{where} has the id {name!r} of an earlier line: ids must differ.")
            lines[name] = line
    return lines


def _is_text(text: str) -> bool:
    """Whether a file can hold a text: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finished(path: Path, lines: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """The ids of the results that an earlier run has written, and their marks. What it had begun to write when it was killed
    is removed."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done: dict[str, str | None] = {}
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            result = json.loads(text)
            name = result["id"] if isinstance(result["outputs"], list) else None
        except (ValueError, TypeError, KeyError):
            name = None
        if not isinstance(name, str) or name not in lines:
            raise ValueError(f"{path} line {number} is no result of these prompts: name another file for the results.")
        done[name] = result.get("request")
    if begun := content[len(whole) :]:
        if not (begun.startswith(BEGINNING) or BEGINNING.startswith(begun)):
            raise ValueError(f"{path} does not end with a result: name another file for the results.")
        os.truncate(path, len(whole))
    return done


def _open_requests(
    session: Session, lines: dict[str, dict[str, Any]], done: dict[str, str | None], results: Path
) -> dict[str, Request]:
    """The lines that have no result yet.

    Raises:
        ValueError: a line is wrong, or its result was made with something else.
    """
    engine = {name: value for name, value in session.options.items() if name in OF_THE_ENGINE}
    # Wherever the model's folder stands.
    made_with = [
        engine,
        Path(session.arguments.model).name,
        (session.folder / "config.json").read_text(encoding="utf-8"),
    ]
    requests = {}
    for number, (name, line) in enumerate(lines.items()):
        try:
            params = _params(session, line, number)
            prompt = [] if name in done else _prompt(session, line)
        except ValueError as error:
            raise ValueError(f"request {name}: {error}") from error
        mark = _mark(line, params, made_with)
        if name not in done:
            requests[name] = Request(prompt, params, mark)
        elif done[name] not in (None, mark):  # None: of a version before there were any
            raise ValueError(
                f"{results} has a result of request {name} with another prompt, other options or another model: name "
                "another file for the results, or give what they were made with."
            )
    return requests


def _params(session: Session, line: dict[str, Any], number: int) -> SamplingParams:
    """A line's own options, else those of the command. `--seed` is that of the first line, and the next numbers those of the
    next ones."""
    given = canonical_options({key: value for key, value in line.items() if key not in PROMPTS})
    options: dict[str, Any] = {key: value for key, value in session.options.items() if key not in OF_THE_ENGINE}
    options["num_return_sequences"] = session.resolved.num_return_sequences
    own = {key: given.pop(key) for key in ("n", "seed", "stop", "timeout") if key in given}
    replaced = {REPLACES.get(key) for key in given}  # `--max-tokens` where a line has `max_length`
    options = {**{key: value for key, value in options.items() if key not in replaced}, **given}
    seed = session.arguments.seed
    arguments = {
        "n": options.pop("num_return_sequences"),
        "stop": options.pop("stop_strings", None),
        "timeout": options.pop("max_time", None),
        "seed": None if seed is None else seed + number,
        **own,
    }
    return SamplingParams(**arguments, options=options)


def _prompt(session: Session, line: dict[str, Any]) -> list[int]:
    [key] = PROMPTS.keys() & line
    kind, fits = PROMPTS[key]
    if not fits(line[key]):
        raise ValueError(f"`{key}` must be {kind}, but is {json.dumps(line[key])[:100]}.")
    return encode(line[key], session.tokenizer)


def _mark(line: dict[str, Any], params: SamplingParams, made_with: list[Any]) -> str:
    """Of all that a result depends on."""
    prompt = {key: line[key] for key in PROMPTS if key in line}  # as it is: a chat template may add the date
    options: dict[str, Any] = {**vars(params), "timeout": None}
    made_of = json.dumps([prompt, options, *made_with], sort_keys=True, default=str)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _holds(value: Any, kind: type) -> bool:
    """Whether it is a list of such; True and False are no integers."""
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _engine(session: Session) -> LLM:
    arguments = session.arguments
    return LLM(
        **session.of_engine(),
        **{own: session.options[name] for name, own in OF_THE_ENGINE.items() if name in session.options},
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        tensor_parallel_size=arguments.tensor_parallel_size,
        data_parallel_size=arguments.data_parallel_size,
    )


def _decode(llm: LLM, requests: dict[str, Request], file: TextIO, bar: tqdm) -> int:
    """Write each request's result as soon as it has finished. Returns how many have failed."""
    failed, tokens = 0, 0
    outputs: dict[str, list[CompletionOutput]] = {name: [] for name in requests}
    prompts, params, _ = zip(*requests.values())
    try:
        for event in llm.generate_streaming(list(prompts), list(params), request_ids=list(requests)):
            tokens += len(event.token_ids)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
            if event.output is None:
                continue
            name = event.request_id
            outputs[name].append(event.output)
            if len(outputs[name]) < requests[name].params.n:
                continue
            completions = sorted(outputs.pop(name), key=lambda each: each.index)
            errors = [each.error for each in completions if each.error]
            if errors:
                failed += 1
                tell(f"dllm-hf: request {name} failed: {errors[0]}")
            else:
                found = [{key: value for key, value in vars(each).items() if value is not None} for each in completions]
                result = {"id": name, "outputs": found, "request": requests[name].mark}
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
            bar.update()
    except KeyboardInterrupt:
        tell(f"dllm-hf: {bar.n} of {bar.total} requests are done: the same command goes on from here.")
        raise
    return failed
