"""Train a masked-diffusion language model with `transformers.Trainer`, from a configuration or from a checkpoint.

python examples/train.py --model hub_configs/llada-tiny-shakespeare/config.json --dataset text.txt --output_dir out \
    --max_steps 2000 --eval_strategy steps --eval_steps 500 --sample_prompt "ROMEO:"

Every option of `TrainingArguments` can be given. `--resume_from_checkpoint last` goes on after an interruption.

The dataset is a text file, a JSON-lines file or the name of a dataset (with the `datasets` package), whose rows have
  text                  a document; documents follow each other in windows of `--context` tokens
  text, masked          `masked` is the text with mask tokens in the places that are to be learnt (infilling)
  prompt, completion    the completion is learnt
  messages              a chat, by the tokenizer's chat template; the answers are learnt
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

from dllm_hf import DiffusionGenerationConfig
from dllm_hf.families import family
from dllm_hf.training import DataCollatorForMaskedDiffusion, chat_texts, pack

KINDS = {"text", "masked", "prompt", "completion", "messages"}  # the columns that are read


@dataclass
class Arguments:
    model: str = field(metadata={"help": "a configuration, `.../config.json`, for new weights; else a checkpoint"})
    dataset: str = field(
        metadata={"help": "a .txt or .jsonl file, or the name or folder of a dataset; what it holds is said above"}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "like --dataset; else its last part is held out"})
    eval_fraction: float = field(default=0.1, metadata={"help": "how much of --dataset is held out"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a named dataset"})
    tokenizer: str | None = field(default=None, metadata={"help": "the model's if not given"})
    context: int = field(default=256, metadata={"help": "tokens of a row at most"})
    stride: int | None = field(
        default=None, metadata={"help": "from a window of a text to the next in training, --context if not given"}
    )
    packing: bool = field(default=False, metadata={"help": "several completions or chats in a row, without padding"})
    schedule: Literal["llada", "dream", "complementary"] = field(default="llada", metadata={"help": "noise schedule"})
    weighting: Literal["1/t", "1-t", "cart", "none"] = field(
        default="1/t", metadata={"help": "weighting of the loss, for --schedule dream"}
    )
    cart_p: float = field(default=0.1, metadata={"help": "parameter of --weighting cart"})
    eos_padding: bool = field(default=False, metadata={"help": "learn the end-of-sequence tokens that pad an answer"})
    save_dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "type of the weights that are saved in --output_dir at the end"}
    )
    sample_prompt: str | None = field(default=None, metadata={"help": "continued after each evaluation"})


class Rows(Dataset):
    """Rows of equal length in tensors `(rows, length)`, or windows of one long text `(tokens,)`."""

    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor | None = None, length: int = 0, stride: int = 1):
        self.tokens, self.labels, self.length, self.stride = tokens, labels, length, stride

    def __len__(self) -> int:
        if self.tokens.ndim == 2:
            return len(self.tokens)
        return (len(self.tokens) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.tokens.ndim == 1:
            start = range(len(self))[index] * self.stride
            return {"input_ids": self.tokens[start : start + self.length]}
        row = {"input_ids": self.tokens[index]}
        return row if self.labels is None else {**row, "labels": self.labels[index]}


class Samples(TrainerCallback):
    """Prints what the model makes of a prompt, or of the first held-out row with masks to fill, after each evaluation."""

    def __init__(self, tokenizer, prompt: torch.Tensor, new_tokens: int | None):
        self.tokenizer, self.prompt, self.options = tokenizer, prompt, {}
        if new_tokens is not None:
            self.options["max_new_tokens"] = new_tokens

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        was_training = model.training
        generator = torch.Generator(model.device).manual_seed(0)
        filled = model.eval().diffusion_generate(self.prompt.to(model.device), generator=generator, **self.options)
        model.train(was_training)
        print(f"--- step {state.global_step}\n{self.tokenizer.decode(filled[0])}\n---", flush=True)


def read_rows(name: str, config: str | None) -> list[dict] | str:
    """A text, or the rows of a dataset."""
    path = Path(name)
    if path.suffix == ".txt" and path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in (".jsonl", ".json") and path.is_file():
        with path.open(encoding="utf-8") as lines:
            return [read_line(line, f"{name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if path.is_file() or path.suffix in (".txt", ".jsonl", ".json"):
        raise SystemExit(f"--dataset {name}: there is no .txt or .jsonl file of this name.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(f"--dataset {name} is no file; for other datasets, `pip install datasets`.") from None
    return list(load_dataset(name, config, split="train"))


def read_line(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{place}: this is no JSON ({error}).") from None
    if not isinstance(row, dict):
        raise SystemExit(f'{place}: a row must be an object like {{"text": "..."}}.')
    return row


def tokenized(tokenizer, texts: list[str], **options) -> list[list[int]]:
    return tokenizer(texts, verbose=False, return_attention_mask=False, **options).input_ids


def make_dataset(rows: list[dict] | str, tokenizer, args: Arguments, stride: int) -> Dataset | list[dict]:
    """What the collator reads: see [`~dllm_hf.training.DataCollatorForMaskedDiffusion`]."""
    if isinstance(rows, str):
        rows = [{"text": rows}]
    elif not rows:
        raise SystemExit("The dataset has no rows.")
    names = rows[0].keys()
    for number, row in enumerate(rows):
        for name in KINDS & names:
            if row.get(name) is None:
                raise SystemExit(f"Row {number} has no `{name}`, which the first row has.")
    if "messages" in names:
        texts = [text for row in rows for text in chat_texts(row["messages"], tokenizer)]
    elif {"prompt", "completion"} <= names:
        prompts = tokenized(tokenizer, [row["prompt"] for row in rows])
        answers = tokenized(tokenizer, [row["completion"] for row in rows], add_special_tokens=False)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = [
            {"input_ids": prompt + answer + end, "labels": [-100] * len(prompt) + answer + end}
            for prompt, answer in zip(prompts, answers)
        ]
    elif {"text", "masked"} <= names:
        return infilling(rows, tokenizer, args.context)
    elif "text" in names:
        documents = tokenized(tokenizer, [row["text"] for row in rows])
        end = [tokenizer.eos_token_id] if len(documents) > 1 and tokenizer.eos_token_id is not None else []
        tokens = torch.tensor([token for document in documents for token in document + end])
        if len(tokens) < args.context:
            raise SystemExit(
                f"A part of the dataset has {len(tokens)} tokens, less than one window: --context {args.context}."
            )
        return Rows(tokens, None, args.context, stride)
    else:
        raise SystemExit(f"The rows of the dataset have {', '.join(names)}; what they may have is said in --help.")
    texts = [{name: tokens[: args.context] for name, tokens in text.items()} for text in texts]
    whole, texts = len(texts), [text for text in texts if set(text["labels"]) != {-100}]
    if not texts:
        raise SystemExit(f"Every prompt fills --context {args.context}: no answer is left to learn.")
    if len(texts) < whole:
        print(f"{whole - len(texts)} of {whole} texts are left out: their prompts fill --context {args.context}.")
    return pack(texts, args.context) if args.packing else texts


def infilling(rows: list[dict], tokenizer, context: int) -> Dataset | list[dict]:
    whole, masked = (as_numbers(tokenizer, [row[name] for row in rows]) for name in ("text", "masked"))
    for number, (one, other) in enumerate(zip(whole, masked)):
        if len(one) != len(other) or len(one) > context:
            raise SystemExit(
                f"Row {number}: `text` has {len(one)} tokens and `masked` {len(other)}; both must have the same number, "
                f"at most --context {context}."
            )
    learnt = lambda whole, masked: np.where(masked == tokenizer.mask_token_id, whole, -100)
    if len({len(row) for row in whole}) == 1:
        whole, masked = np.stack(whole), np.stack(masked)
        return Rows(torch.from_numpy(whole), torch.from_numpy(learnt(whole, masked)))
    return [{"input_ids": one, "labels": learnt(one, other)} for one, other in zip(whole, masked)]


def as_numbers(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """In parts: a million lists of numbers would take gigabytes."""
    parts = (tokenized(tokenizer, texts[start : start + 50_000]) for start in range(0, len(texts), 50_000))
    return [np.array(row, dtype=np.int32) for part in parts for row in part]


def load(args: Arguments, training: TrainingArguments):
    """The model in float32, and its tokenizer."""
    path = Path(args.model)
    is_new = path.suffix == ".json"
    if is_new and not path.is_file():
        raise SystemExit(f"--model {args.model}: there is no such file.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SystemExit(f"--model {args.model}: the folder holds no config.json.")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or (path.parent if is_new else args.model))
    config = AutoConfig.from_pretrained(args.model)
    family(config)  # refuses others
    if tokenizer.mask_token is None and config.mask_token_id is not None:  # LLaDA's names none
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(config.mask_token_id)
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(f"The tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} (`vocab_size`).")
    if args.schedule == "complementary" and not hasattr(config, "block_size"):
        raise SystemExit(f"--schedule complementary is for models in blocks, which `{config.model_type}` has none of.")
    if not is_new:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), tokenizer
    torch.manual_seed(training.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (path.parent / "generation_config.json").is_file():
        model.generation_config = DiffusionGenerationConfig.from_pretrained(path.parent)
    return model, tokenizer


def last_checkpoint(folder: str) -> str | None:
    """The last complete checkpoint. The state is written last; a run may be killed before."""
    for checkpoint in reversed(sort_checkpoints(folder)):
        try:
            TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            return checkpoint
        except (OSError, ValueError):
            print(f"{checkpoint} is not complete: it is passed over.")
    return None


def check(args: Arguments, training: TrainingArguments) -> None:
    if not 0 < args.eval_fraction < 1:
        raise SystemExit(f"--eval_fraction {args.eval_fraction} must be between 0 and 1.")
    for name in ("context", "stride"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name} {getattr(args, name)} must be at least 1.")
    check_run(training)
    folder = Path(training.output_dir)
    if training.resume_from_checkpoint is None and any((*folder.glob("checkpoint-*"), *folder.glob("*.safetensors"))):
        raise SystemExit(
            f"--output_dir {folder} holds a model or its checkpoints: name another folder, or go on with them by "
            "--resume_from_checkpoint last."
        )


def check_run(training: TrainingArguments) -> None:
    """Refuse processes that would each train a model of its own, and make the folder of the last checkpoint of `last`."""
    if int(os.environ.get("WORLD_SIZE", 1)) != training.world_size:
        raise SystemExit("Several processes without a GPU take --use_cpu true --ddp_backend gloo.")
    checkpoint = training.resume_from_checkpoint
    if checkpoint in ("last", "True", "true"):
        training.resume_from_checkpoint = last_checkpoint(training.output_dir)
        if training.resume_from_checkpoint is None:
            raise SystemExit(f"--resume_from_checkpoint: {training.output_dir} holds no checkpoint yet.")
    elif checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise SystemExit(f"--resume_from_checkpoint {checkpoint} is no folder of a checkpoint.")


def make_trainer(args: Arguments, training: TrainingArguments) -> Trainer:
    model, tokenizer = load(args, training)
    rows = read_rows(args.dataset, args.dataset_config)
    if args.eval_dataset is not None:
        held_out = read_rows(args.eval_dataset, args.dataset_config)
    else:
        cut = len(rows) - int(len(rows) * args.eval_fraction)
        rows, held_out = rows[:cut], rows[cut:]
        if not held_out:
            raise SystemExit(f"--eval_fraction {args.eval_fraction} of {cut} rows holds out none.")
    train_set = make_dataset(rows, tokenizer, args, args.stride or args.context)
    eval_set = make_dataset(held_out, tokenizer, args, args.context)
    collator = DataCollatorForMaskedDiffusion(
        tokenizer,
        args.schedule,
        weighting=args.weighting,
        cart_p=args.cart_p,
        block_size=model.config.block_size if args.schedule == "complementary" else None,
        eos_padding=args.eos_padding,
        mask_token_id=model.config.mask_token_id,
        seed=training.seed,
    )
    if args.sample_prompt is not None:
        samples = Samples(tokenizer, tokenizer(args.sample_prompt, return_tensors="pt").input_ids, None)
    else:
        row = collator([eval_set[0]])
        # The first of packed texts, and one of the two rows with complementary masks.
        end = len(row["input_ids"][0])
        if "position_ids" in row:
            end = (row["position_ids"][0, 1:].tolist() + [0]).index(0) + 1
        samples = Samples(tokenizer, row["input_ids"][:1, :end], 0)
    return Trainer(
        model,
        training,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        callbacks=[collator, samples],
    )


def interrupted(folder: str) -> str:
    """What to say after Ctrl-C."""
    last = last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is None:
        return "\nInterrupted. There is no checkpoint yet: --save_strategy steps --save_steps N makes some."
    return f"\nInterrupted. With --resume_from_checkpoint last the same command goes on from {last}."


def main(argv: list[str] | None = None) -> None:
    usage = "train.py --model MODEL --dataset DATASET --output_dir FOLDER [options], which --help lists"
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__, usage=usage)
    args, training = parser.parse_args_into_dataclasses(argv)
    try:
        check(args, training)
        trainer = make_trainer(args, training)
    except (OSError, ValueError) as error:  # of the library, which says what is wrong with the input
        raise SystemExit(str(error)) from error
    try:
        result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except KeyboardInterrupt:
        print(interrupted(training.output_dir), file=sys.stderr)
        raise SystemExit(130) from None
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.to(getattr(torch, args.save_dtype)).save_pretrained(training.output_dir)
        trainer.processing_class.save_pretrained(training.output_dir)
        print(f"Saved in {training.output_dir} after {result.metrics['train_runtime']:.0f} s.")


if __name__ == "__main__":
    main(sys.argv[1:])
