"""`dllm-hf evaluate`: tasks of lm-eval, and lines of programs to fill in, into a result file."""

import argparse
from pathlib import Path
from typing import Any

from dllm_hf.evaluation import results
from dllm_hf.evaluation.human_eval import problems_sha256, tasks
from dllm_hf.evaluation.infilling import InPlace, LeftToRight
from dllm_hf.evaluation.infilling import evaluate as fill_in
from dllm_hf.hub import checkpoint

from .options import did_you_mean
from .output import show, tell
from .session import Session

INFILLING = "infilling"  # the task that is not lm-eval's


def evaluate(arguments: argparse.Namespace) -> int:
    path = Path(arguments.results)
    results.check_new(path)
    for option in ("limit", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: give at least 1.")
    names = list(dict.fromkeys(arguments.tasks))
    of_harness = [name for name in names if name != INFILLING]
    _refuse_useless(arguments, names)
    # What is missing or mistyped is named before weights are read.
    manager = None
    if of_harness:
        from dllm_hf.evaluation.harness import DiffusionLM  # noqa: F401

        manager = _manager(arguments.include_path, of_harness)
    if INFILLING in names:
        problems_sha256()
    session = Session(arguments)
    session.load()
    result = results.circumstances(session.model, session.folder, arguments.command_line)
    result["settings"] = _settings(arguments, session)
    try:
        form = _form(arguments, session) if INFILLING in names else None
        result |= {"results": {}} if manager is None else _run_harness(arguments, session, of_harness, manager)
        if form is not None:
            result["results"][INFILLING] = _run_infilling(arguments, session, form)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"decoding with {session.folder} failed: {checkpoint.first_line(error)}") from error
    except KeyboardInterrupt:
        tell(f"dllm-hf: interrupted: {path} is not written.")
        raise
    results.write(path, result)
    for name, values in result["results"].items():
        for metric, value in values.items():
            if isinstance(value, float):
                show(f"{name}  {metric.removesuffix(',none')}  {value:.4f}")
    tell(f"dllm-hf: written: {path}")
    return 0


def _is_given(arguments: argparse.Namespace, option: str) -> bool:
    value = getattr(arguments, option.replace("-", "_"))
    return value is not None and value is not False


def _refuse_useless(arguments: argparse.Namespace, names: list[str]) -> None:
    """Options that would change nothing, before weights are read."""
    useless = {}
    if INFILLING not in names:
        useless = dict.fromkeys(["num-masks", "infilling-tokens", "infilling-order"], f"the task {INFILLING}")
    elif names == [INFILLING]:
        useless = dict.fromkeys(["num-fewshot", "apply-chat-template"], "a task of lm-eval")
    for option in ("stop-strings", "num-return-sequences", "output-history", "max-length"):
        if _is_given(arguments, option):
            raise ValueError(f"--{option} is no option of a measure: leave it out.")
    for option, use in useless.items():
        if _is_given(arguments, option):
            raise ValueError(f"--{option} is for {use}: leave it out, or add it to --tasks.")
    if arguments.infilling_order is not None and arguments.infilling_tokens is None:
        raise ValueError(
            f"--infilling-order {arguments.infilling_order} needs --infilling-tokens, the texts before prefix, suffix and line."
        )


def _settings(arguments: argparse.Namespace, session: Session) -> dict[str, Any]:
    names = ["tasks", "limit", "num_fewshot", "batch_size", "num_samples", "seed", "apply_chat_template", "num_masks"]
    names += ["infilling_tokens", "infilling_order", "include_path"]
    return {**{name: getattr(arguments, name) for name in names}, "generation": session.options}


def _manager(folder: str | None, names: list[str]) -> Any:
    """lm-eval's, which knows these tasks."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--include-path {folder}: there is no such folder.")
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # lm-eval's own are so many that to list them takes seconds
        manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        meant = did_you_mean(unknown[0], [INFILLING, *manager.all_tasks])
        raise ValueError(
            f"There is no task {unknown[0]!r}{meant}: `lm_eval ls tasks` lists lm-eval's; --include-path adds yours."
        )
    return manager


def _run_harness(arguments: argparse.Namespace, session: Session, names: list[str], manager: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from dllm_hf.evaluation.harness import DiffusionLM

    options = dict(session.options)
    length = options.pop("max_new_tokens", None)
    model = DiffusionLM(
        session.model,
        session.tokenizer,
        batch_size=arguments.batch_size,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        **({} if length is None else {"max_gen_toks": length}),
        **options,
    )
    found = simple_evaluate(
        model,
        tasks=names,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        task_manager=manager,
        random_seed=arguments.seed,
        numpy_random_seed=arguments.seed,
        torch_random_seed=arguments.seed,
        fewshot_random_seed=arguments.seed,
        log_samples=arguments.log_samples,
        confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
    )
    kept = ("results", "groups", "configs", "n-samples", "samples")
    about = {**model.get_model_info(), "task_versions": found["versions"]}
    return {**{name: found[name] for name in kept if name in found}, "lm_eval": about}


def _form(arguments: argparse.Namespace, session: Session) -> InPlace | LeftToRight:
    is_in_place = not session.model.sees_earlier_blocks
    wrong, right = ["num-masks"], "infilling-tokens"
    if is_in_place:
        wrong, right = ["infilling-tokens", "infilling-order"], "num-masks"
        if arguments.tasks == [INFILLING]:
            wrong.append("max-new-tokens")
    if given := [f"--{name}" for name in wrong if _is_given(arguments, name)]:
        name = type(session.model).__name__
        raise ValueError(f"{name} takes no {' and no '.join(given)}: leave it out, or see --{right}.")
    if is_in_place:
        return InPlace(arguments.num_masks)
    names = arguments.infilling_tokens or []
    ids = [list(session.tokenizer(name, add_special_tokens=False)["input_ids"]) for name in names]
    where: dict[str, Any] = dict(zip(("prefix", "suffix", "middle"), ids))
    if "max_new_tokens" in session.options:
        where["max_new_tokens"] = session.options["max_new_tokens"]
    return LeftToRight(suffix_first=arguments.infilling_order == "spm", **where)


def _run_infilling(arguments: argparse.Namespace, session: Session, form: InPlace | LeftToRight) -> dict[str, Any]:
    options = {name: value for name, value in session.options.items() if name != "max_new_tokens"}
    measured = fill_in(
        session.model,
        session.tokenizer,
        form,
        tasks()[: arguments.limit],
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        **options,
    )
    return {**measured.to_dict(), "problems_sha256": problems_sha256()}
