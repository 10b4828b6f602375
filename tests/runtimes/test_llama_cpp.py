"""llama.cpp: an exported model gives the logits and the tokens of the model that it comes from."""

import ctypes
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dllm_hf import LLM, SamplingParams

from ..builders import character_tokenizer, left_pad, new_model
from . import comparing
from .comparing import (
    CHECKPOINTS,
    ROWS,
    change,
    check_guidance_and_defaults,
    check_later_rows,
    check_strategies,
    check_windows,
    golden,
)

REASON = 'needs llama.cpp, which has no wheel: pip install "dllm-hf[llama-cpp]"'
llama = pytest.importorskip("llama_cpp", reason=REASON)
gguf = pytest.importorskip("gguf", reason='the export needs it: pip install "dllm-hf[gguf]"')

from dllm_hf.generation.cache import Copy  # noqa: E402
from dllm_hf.runtimes.exported import hash_of  # noqa: E402
from dllm_hf.runtimes.gguf_export import export_gguf  # noqa: E402
from dllm_hf.runtimes.gguf_tokenizer import SPLITS  # noqa: E402
from dllm_hf.runtimes.llama_cpp import FORMAT, MASK_KEY, LlamaCppBackend, LlamaCppModel  # noqa: E402

pytestmark = pytest.mark.slow  # exports
ROOT = Path(__file__).parents[2]
CELLS = [cell for cell in comparing.CELLS if cell[1] != "dual"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of each family and the folder that it is exported to, once."""
    root = tmp_path_factory.mktemp("gguf")

    @cache
    def pair(family: str, type: str) -> tuple:
        model = golden(family)
        return model, export_gguf(model, root / f"{family}-{type}", type)

    return lambda family, type="f32": pair(family, type)


@pytest.fixture(scope="module")
def both(exported):
    """The model and what llama.cpp makes of it."""

    @cache
    def pair(family: str) -> tuple:
        model, folder = exported(family)
        return model, LlamaCppModel.from_pretrained(folder)

    return pair


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an exported folder, to break."""
    return shutil.copytree(exported("dream")[1], tmp_path / "copy")


@pytest.mark.parametrize("family, policy", CELLS)
def test_logits_of_every_window_of_a_decode_are_those_of_the_model(both, family, policy):
    check_windows(*both(family), policy)


@pytest.mark.parametrize("family, policy", CELLS)
def test_tokens_of_every_strategy_are_those_of_the_model(both, family, policy):
    check_strategies(*both(family), policy)


@pytest.mark.parametrize("family, policy", CELLS)
def test_rows_that_join_a_decoder_later_get_what_they_get_alone(both, family, policy):
    check_later_rows(*both(family), policy)


def test_rows_that_do_not_fit_into_one_call_get_what_they_get_alone(both, monkeypatch):
    """A call takes at most as many tokens as llama.cpp has memory for."""
    model, exported = both("llada")
    monkeypatch.setattr("dllm_hf.runtimes.llama_cpp.MAX_TOKENS", 20)
    options = {"max_new_tokens": 8, "block_length": 4, "cache_policy": "prefix"}
    got, expected = (each.diffusion_generate(**left_pad(ROWS), **options) for each in (exported, model))
    assert got.tolist() == expected.tolist()


def test_guidance_and_the_defaults_are_those_of_the_model(both):
    for family in CHECKPOINTS:
        check_guidance_and_defaults(*both(family))


def test_the_engine_shares_beginnings_of_prompts(both):
    model, exported = both("sdar")
    prompts = [[*ROWS[0], 1], [*ROWS[0], 2, 3], [*ROWS[0], 1]]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    got, expected = (
        [each.outputs[0].token_ids for each in LLM(one, tokenizer=character_tokenizer()).generate(prompts, params)]
        for one in (exported, model)
    )
    assert got == expected


def test_a_beginning_that_is_taken_over_replaces_what_was_there(both):
    _, exported = both("sdar")
    state = LlamaCppBackend(exported, True).open(2, 32)
    columns, wanted = torch.arange(8), torch.ones(4, dtype=torch.bool)
    for slot in (0, 1):
        state.decode(columns + 100 * slot, columns, torch.full((8,), slot), columns < 0)
    assert state.share([Copy(source=0, target=1, final_length=8, column=8, block_length=4)]) == [8]
    block = torch.tensor([50, 51, 52, 53]), torch.arange(8, 12)
    logits = [state.decode(*block, torch.full((4,), slot), wanted).clone() for slot in (0, 1)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_quantised_files_are_smaller_and_close(exported):
    sizes, logits = {}, {}
    for type in ("f32", "f16", "q8_0", "q4_k_m"):
        folder = exported("llada", type)[1]
        sizes[type] = (folder / "model.gguf").stat().st_size
        options = {"max_new_tokens": 8, "block_length": 4, "remasking_strategy": "sequential"}
        raws: list[torch.Tensor] = []
        hook = lambda step, tokens, raw, raws=raws: raws.append(raw[0].clone()) or raw
        one = LlamaCppModel.from_pretrained(folder)
        one.diffusion_generate(torch.tensor([[5, 6, 7]]), generation_logits_hook_func=hook, **options)
        logits[type] = raws[0]
    errors = {type: float((each - logits["f32"]).square().mean().sqrt()) for type, each in logits.items()}
    assert sizes["f32"] > sizes["f16"] > sizes["q8_0"] > sizes["q4_k_m"]
    assert 0 == errors["f32"] < errors["f16"] < errors["q8_0"] < 0.1 * logits["f32"].std()
    assert errors["q8_0"] < errors["q4_k_m"]


def test_llama_cpp_quantises_to_the_same_8_bits(exported, tmp_path):
    """The file of the package `gguf` holds the bytes that llama.cpp's quantizer makes of the same weights."""
    options = llama.llama_model_quantize_default_params()
    options.ftype = llama.LLAMA_FTYPE_MOSTLY_Q8_0
    source = exported("llada")[1] / "model.gguf"
    assert llama.llama_model_quantize(bytes(source), bytes(tmp_path / "theirs"), options) == 0
    ours, theirs = (
        {each.name: each.data for each in gguf.GGUFReader(path).tensors}
        for path in (exported("llada", "q8_0")[1] / "model.gguf", tmp_path / "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@contextmanager
def loaded(folder: Path):
    """The file as llama.cpp's own programs load it."""
    pointer = llama.llama_model_load_from_file(bytes(folder / "model.gguf"), llama.llama_model_default_params())
    yield pointer
    llama.llama_model_free(pointer)


def tokens_of(pointer, text: str) -> list[int]:
    tokens, data = (ctypes.c_int32 * 256)(), text.encode()
    number = llama.llama_tokenize(llama.llama_model_get_vocab(pointer), data, len(data), tokens, 256, True, True)
    return tokens[:number]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_llama_cpp_alone_reads_text_and_decodes_by_diffusion(tmp_path, family):
    """The file without ours beside it: its architecture, mask and tokenizer."""
    source = ROOT / "hub_configs" / f"{family}-tiny-shakespeare"
    if not (source / "model.safetensors").is_file():
        pytest.skip("needs the trained weights of the repository")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    folder = export_gguf(model, tmp_path / "out", "f16")
    tokenizer = AutoTokenizer.from_pretrained(source)
    with loaded(folder) as pointer:
        assert llama.llama_model_is_diffusion(pointer)
        assert llama.llama_vocab_mask(llama.llama_model_get_vocab(pointer)) == model.config.mask_token_id
        text = "ROMEO:\nWhat, is it so? Ay; I'll  go!" + tokenizer.mask_token * 2
        assert tokens_of(pointer, text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("pattern", [*SPLITS, None])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path, pattern):
    """Byte-level BPE of each kind that is written, trained on this file."""
    tokenizer = Tokenizer(models.BPE())
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    special = ["<end>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", mask_token="<mask>").save_pretrained(
        tmp_path
    )
    model = new_model("dream", vocab_size=640)
    model.config._name_or_path = str(tmp_path)
    with loaded(export_gguf(model, tmp_path / "out", "f16")) as pointer:
        text = "It's 1234  tests,\n\n  they'LL pass: <mask><mask>; naïve «δοκιμή» 测试!\t\n x_y()...  "
        assert tokens_of(pointer, text) == tokenizer.encode(text).ids


# --- what is refused


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_block_in_the_middle_alone_is_refused_by_name(both, family):
    _, exported = both(family)
    with pytest.raises(ValueError, match="cache_policy='dual'.*choose one of none, prefix"):
        exported.diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4, cache_policy="dual")


def test_what_does_not_fit_is_refused_before_the_first_pass(both):
    _, exported = both("sdar")
    with pytest.raises(ValueError, match="512"):
        exported.diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=600)
    with pytest.raises(ValueError, match="300 rows are more than the 256"):
        exported.diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4, num_return_sequences=300)
    cache = both("sdar")[0].diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="`past_key_values` is not possible in llama.cpp"):
        exported.diffusion_generate(torch.tensor([[5, 6]]), past_key_values=cache.past_key_values)
    output = exported.diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4, return_dict_in_generate=True)
    assert output.past_key_values is None


def test_more_devices_than_there_are_are_refused(exported):
    with pytest.raises(ValueError, match="devices=99.*llama.cpp finds \\d+ GPUs"):
        LlamaCppModel.from_pretrained(exported("dream")[1], devices=99)


def describe(folder: Path, **changes) -> None:
    """Change the description, with the hash of the file as it is now."""
    change(folder / FORMAT.description, sha256={"model.gguf": hash_of(folder / "model.gguf")}, **changes)


def test_a_truncated_file_is_refused(folder):
    file = folder / "model.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.gguf is cut short.*export the model again"):
        LlamaCppModel.from_pretrained(folder)
    describe(folder)
    with pytest.raises(ValueError, match="llama.cpp cannot read .*model.gguf"):
        LlamaCppModel.from_pretrained(folder)


def test_a_file_of_another_version_or_architecture_is_refused(folder, exported):
    describe(folder, format=99)
    with pytest.raises(ValueError, match="the format 99, and this version reads 1"):
        LlamaCppModel.from_pretrained(folder)
    shutil.copyfile(exported("llada")[1] / "model.gguf", folder / "model.gguf")
    describe(folder, format=FORMAT.version)
    with pytest.raises(
        ValueError, match="llama.cpp cannot read .*model.gguf as a qwen2.*key not found in model: qwen2."
    ):
        LlamaCppModel.from_pretrained(folder)


def test_a_file_without_a_mask_token_is_refused(folder):
    file = folder / "model.gguf"
    file.write_bytes(file.read_bytes().replace(MASK_KEY.encode(), MASK_KEY.encode()[:-2] + b"xx"))
    describe(folder)
    with pytest.raises(ValueError, match="model.gguf has no mask token"):
        LlamaCppModel.from_pretrained(folder)


def test_a_pass_that_llama_cpp_cannot_compute_is_an_error(both, monkeypatch):
    _, exported = both("dream")
    monkeypatch.setattr(llama, "llama_decode", lambda context, batch: -3)
    with pytest.raises(RuntimeError, match="llama.cpp could not compute .* tokens: `llama_decode` gave -3"):
        exported.diffusion_generate(torch.tensor([[5, 6]]), max_new_tokens=4)
