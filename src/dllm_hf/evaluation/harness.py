"""`DiffusionLM`: the tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on diffusion language models."""

from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import __version__
from ..engine.sampling_params import SamplingParams
from ..families import stranger
from .engines import effective, of_requests, open_engine
from .likelihood import check_sizes

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f'lm-eval is missing or too old: `pip install "dllm-hf[evaluation]"`. {error}') from error

logger = logging.get_logger(__name__)

DEFAULT_MAX_LENGTH = 4096
ROWS = 256  # texts that `log_likelihood` is given at once, between two moves of the progress bar
NOTHING = -1  # stands before the first token of a text
Pair = tuple[list[int], list[int]]  # what is given, and what is scored


@register_model("dllm")
class DiffusionLM(TemplateLM):
    """A diffusion language model for lm-eval. Likelihoods are the bounds of [`log_likelihood`], texts come from the engine.

    Args:
        pretrained: a folder, a repository of the Hub, or a loaded model.
        tokenizer: by default that of `pretrained`.
        dtype, trust_remote_code: as in `from_pretrained`.
        device: by default a GPU if there is one.
        batch_size: texts that are decoded together, and noisy texts in a forward pass.
        max_length: tokens of a context and what follows it; contexts that are longer lose their beginning.
        max_gen_toks: new tokens where a task says nothing.
        num_samples: see [`log_likelihood`].
        seed: of masks, and of draws where a task asks for any.
        options: of `diffusion_generate`: `cache_policy`, `steps`, `confidence_threshold`, ... Those that a task names
            for its texts go before.

    Attributes:
        usage: forward passes and tokens so far.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        num_samples: int = 128,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        # lm-eval's command line gives a text.
        batch_size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_sizes(num_samples, batch_size)
        self.model = pretrained
        if isinstance(pretrained, str):
            wanted = {"dtype": dtype, "trust_remote_code": trust_remote_code}
            self.model = AutoModelForCausalLM.from_pretrained(pretrained, **wanted)
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                logger.warning("There is no GPU for `device=%s`, lm-eval's default: the model runs on the CPU.", device)
                device = None
            self.model = self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            tokenizer = pretrained if tokenizer is None else tokenizer
        if not hasattr(self.model, "log_likelihood"):
            config = self.model.config
            hint = stranger(config.model_type, getattr(config, "auto_map", None))
            raise ValueError(f"`pretrained` is a {type(self.model).__name__}, which is no diffusion model{hint}")
        if tokenizer is None:
            raise ValueError("`tokenizer` is missing: give one with a loaded model.")
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        self.tokenizer: Any = tokenizer
        self.options, self.request_options = options, of_requests(options)
        self.effective_options = effective(self.model, options)  # refuses what the model cannot do
        positions = getattr(self.model.config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
        self.max_length = min(positions, DEFAULT_MAX_LENGTH) if max_length is None else max_length
        if self.max_length > positions:
            raise ValueError(f"`max_length={max_length}` is more than the {positions} positions of the model.")
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.num_samples, self.seed = num_samples, seed
        self._device, self._is_chat = self.model.device, False
        self.usage = {"likelihood_passes": 0, "scored_tokens": 0, "generated_tokens": 0, "denoising_steps": 0}
        self._variance = 0.0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the beginning of sequence where the tokenizer puts one, else
        nothing."""
        begins = self.tokenizer("")["input_ids"]
        return begins[0] if begins and begins[0] == self.tokenizer.bos_token_id else NOTHING

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._is_chat = True
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with special tokens as the tokenizer has them, unless the text brings the first of them."""
        if not string:
            return []
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its result file."""
        steps = self.usage["denoising_steps"]
        return {
            "dllm_hf_version": __version__,
            "torch_version": torch.__version__,
            "model_class": type(self.model).__name__,
            "model_dtype": str(self.model.dtype),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "max_length": self.max_length,
            "generation": self.effective_options,  # where a task says nothing else; temperature 0 then
            "usage": self.usage,
            "tokens_per_forward": self.usage["generated_tokens"] / steps if steps else None,
            "log_likelihood_standard_error": self._variance**0.5,  # of the sum of all that was scored
        }

    # --- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each context and continuation the bound, and whether greedy decoding gives the continuation."""
        encoded = []
        for context, continuation in (request.args for request in requests):
            if context:
                pair = self._encode_pair(context, continuation)
            else:
                pair = ([], self.tok_encode(continuation, add_special_tokens=False))
            encoded.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(*self._begun(given, scored)) for _, given, scored in requests]
        sums = self._bounds(pairs, disable_tqdm)
        answers = list(zip(sums, self._are_greedy(pairs)))
        for (texts, _, _), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text the bound: of pieces of `max_length`, each given the token before it, where the text is longer."""
        pairs, owners = list[Pair](), list[int]()
        for index, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            # One column of a window is for what is given.
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            for given, scored in map(make_disjoint_window, windows):
                pairs.append(([token for token in given if token != NOTHING], list(scored)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, bound in zip(owners, self._bounds(pairs, disable_tqdm)):
            totals[owner] += bound
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _begun(self, given: list[int], scored: list[int]) -> Pair:
        prefix = self.prefix_token_id
        return (given if given or prefix == NOTHING else [prefix]), scored

    def _cut(self, given: list[int], scored: list[int]) -> Pair:
        """A pair that fits."""
        if len(scored) > self.max_length:
            raise ValueError(
                f"A continuation of {len(scored)} tokens is longer than `max_length={self.max_length}`: raise it."
            )
        room = self.max_length - len(scored)
        if len(given) > room:
            logger.warning_once("Contexts that are longer than `max_length` lose their beginning.")
        return given[len(given) - room :] if len(given) > room else given, scored

    def _bounds(self, pairs: list[Pair], disable_tqdm: bool) -> list[float]:
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        found = [0.0] * len(pairs)
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm) as bar:
            for first in range(0, len(order), ROWS):
                some = order[first : first + ROWS]
                width = max(sum(map(len, pairs[index])) for index in some)
                ids = torch.zeros(len(some), width, dtype=torch.long)
                seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
                for row, (given, scored) in enumerate(pairs[index] for index in some):
                    ids[row, : len(given) + len(scored)] = torch.tensor([*given, *scored])
                    seen[row, : len(given) + len(scored)] = 1
                    labels[row, len(given) : len(given) + len(scored)] = torch.tensor(scored)
                sizes = {"num_samples": self.num_samples, "batch_size": self.batch_size}
                output = self.model.log_likelihood(ids, seen, labels, seed=self.seed, **sizes)
                for index, value in zip(some, output.log_likelihood.tolist()):
                    found[index] = value
                self.usage["likelihood_passes"] += output.num_forward_passes
                self.usage["scored_tokens"] += int(output.num_tokens.sum())
                self._variance += float(output.standard_error.square().sum())
                bar.update(len(some))
        return found

    def _are_greedy(self, pairs: list[Pair]) -> list[bool]:
        """Whether decoding without draws gives exactly the scored tokens."""
        longest = max((len(given) + len(scored) for given, scored in pairs), default=0)
        llm = open_engine(self.model, self.tokenizer, self.options, self.batch_size, longest)
        options = {**self.request_options, "temperature": 0.0}
        common: dict[str, Any] = {"ignore_eos": True, "seed": self.seed, "options": options}
        params = [SamplingParams(max_tokens=len(scored), **common) for _, scored in pairs]
        prompts: list[Any] = [given for given, _ in pairs]
        with llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids == scored for output, (_, scored) in zip(outputs, pairs)]

    # --- texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params = list[Any](), []
        for index, (context, given) in enumerate(request.args for request in requests):
            options: dict[str, Any] = {**normalize_gen_kwargs(given, self.max_gen_toks)}
            until, new_tokens = options.pop("until"), options.pop("max_gen_toks")
            prompt = self.tok_encode(context)
            if new_tokens >= self.max_length:
                raise ValueError(f"`max_gen_toks={new_tokens}` leaves no room in `max_length={self.max_length}`.")
            prompts.append(self._cut(prompt, [0] * new_tokens)[0])
            params.append((new_tokens, [text for text in until if text], self.seed + index, options))
        longest = max((len(prompt) + each[0] for prompt, each in zip(prompts, params)), default=0)
        llm = open_engine(self.model, self.tokenizer, self.options, self.batch_size, longest)
        ends = [getattr(self.model.config, "eot_token_id", None), self.eot_token_id] if self._is_chat else []
        common: dict[str, Any] = {"stop_token_ids": [token for token in ends if token is not None]}
        texts = [""] * len(requests)
        with llm, tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            every = [
                SamplingParams(
                    max_tokens=number, stop=until, seed=seed, options={**self.request_options, **options}, **common
                )
                for number, until, seed, options in params
            ]
            names = [str(index) for index in range(len(prompts))]
            for event in llm.generate_streaming(prompts, every, request_ids=names):
                if event.output is None or event.usage is None:
                    continue
                if event.output.error:
                    raise RuntimeError(f"A request failed: {event.output.error}")
                index, steps = int(event.request_id), event.usage.num_denoising_steps
                texts[index] = event.output.text
                self.usage["denoising_steps"] += steps
                self.usage["generated_tokens"] += round(event.output.tokens_per_forward * steps)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                bar.update()
        return texts
