"""Weights that are not those of the model in the `config.json` beside them are refused, before anything is written."""

import json
import shutil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dllm_hf.hub import checkpoint, export

from ..builders import BUILDERS, new_model
from .spoiling import change, refusal, rename, rewrite

WEIGHTS, INDEX = checkpoint.WEIGHTS, checkpoint.INDEX


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 0.01, 0.1, 0.5, 0.99, -1])
def test_a_weights_file_that_is_cut_short_is_refused(source, part):
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[: int(part * len(data)) if isinstance(part, float) else part])
    message = refusal(source)
    assert WEIGHTS in message and "fetch it again" in message


def test_so_is_one_that_is_too_long(source):
    with (source / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    assert "fetch it again" in refusal(source)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(offsets=(0, 4), shape=(1,)) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()


GARBAGE = {
    "nothing": b"",
    "a web page": b"<!DOCTYPE html><html>Not found</html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 16060556376\n",
    "a header longer than memory": b"\xff" * 16,
    "a header that is no JSON": with_header(b"{" * 40),
    "a header that is no text": with_header(b"\xff\xfe\xfd" * 9),
    "a header that is a list": with_header(b"[1, 2]"),
    "a header that is a number": with_header(b"12"),
    "a header of deep lists": with_header(b"[" * 100_000),
    "tensors that are numbers": with_header(b'{"x": 5}'),
    "tensors that say nothing": with_header(b'{"x": {}}'),
    "offsets that are none": with_header(entry(None)),
    "offsets that are words": with_header(entry(("a", "b"))),
    "offsets that are not whole": with_header(entry((0, 0.5))),
    "one offset": with_header(entry((0,))),
    "offsets beyond the end": with_header(entry((0, 400)), b"0000"),
    "a shape that is a number": with_header(entry((0, 4), 5), b"0000"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_weights_file_that_is_something_else_is_refused(source, kind):
    (source / WEIGHTS).write_bytes(GARBAGE[kind])
    assert WEIGHTS in refusal(source)


@given(st.binary(max_size=64), st.booleans())
@example(b'{"__metadata__": 5}', True)
@example(b'{"x": null}', True)
def test_no_bytes_at_all_bring_it_down(tmp_path_factory, sources, data, framed):
    file = tmp_path_factory.mktemp("bytes") / WEIGHTS
    file.write_bytes(with_header(data) if framed else data)
    try:
        checkpoint._tensors(file)
    except (ValueError, OSError) as error:
        assert WEIGHTS in str(error)


def test_a_shard_that_is_missing_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    message = refusal(sharded)
    assert shard.name in message and "fetch the missing shard" in message


def test_a_shard_that_is_cut_short_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-5])
    message = refusal(sharded)
    assert shard.name in message and "fetch it again" in message


OUTSIDE = ["../secret.safetensors", "/etc/hostname", "sub/x.safetensors", "..", ".", "", "a\\..\\..\\b/../c", "./x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_names_a_file_outside_of_its_folder_is_refused(sharded, name):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    (sharded / "sub").mkdir()
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / "sub" / "x.safetensors")
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / "x")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refusal(sharded)


INDICES = ["", "[]", "5", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 5}}']
INDICES += ['{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": "x", "b": 5}}', '{"weight_map": {"a": "\\u0000"}}']
INDICES += ['{"weight_map": {}}', "[" * 100_000]


@pytest.mark.parametrize("text", INDICES, ids=lambda text: text[:40])
def test_an_index_that_is_none_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    assert "index" in refusal(sharded)


def test_an_index_that_names_a_file_that_is_no_weights_is_refused(sharded):
    (sharded / INDEX).write_text('{"weight_map": {"a": "config.json"}}')
    assert "config.json" in refusal(sharded)


def test_a_folder_without_weights_is_refused(source):
    (source / WEIGHTS).unlink()
    assert f"has no {WEIGHTS}" in refusal(source)


def test_pickled_weights_are_not_taken_and_the_way_out_is_named(source):
    (source / WEIGHTS).unlink()
    torch.save({}, source / "pytorch_model.bin")
    message = refusal(source)
    assert "pickled" in message and "convert them to safetensors" in message


@pytest.mark.parametrize("family", BUILDERS)
def test_weights_that_lack_any_tensor_are_refused(sources, tmp_path, family):
    source = shutil.copytree(sources / family, tmp_path / "source")
    whole = load_file(source / WEIGHTS)
    for name in list(whole)[:: 1 if family == "llada" else 5]:
        save_file({n: t for n, t in whole.items() if n != name}, source / WEIGHTS, metadata={"format": "pt"})
        message = refusal(source)
        assert "config.json" in message
        # An expert is one of a stack.
        assert "1 tensor (" in message or "not to be put together" in message or "1 of another shape" in message


@pytest.mark.parametrize("family", BUILDERS)
def test_weights_under_other_names_are_refused(sources, tmp_path, family):
    source = shutil.copytree(sources / family, tmp_path / "source")
    last = sorted(load_file(source / WEIGHTS))[-1]
    rewrite(source, lambda tensors: rename(tensors, last, f"x.{last}"))
    assert "1 tensor (" in refusal(source) and "missing" in refusal(source)


def test_weights_of_other_shapes_are_refused_though_their_numbers_are_as_many(source):
    name = "model.transformer.blocks.1.ff_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert "(model.layers.1.mlp.gate_proj.weight is (32, 48), not (48, 32))" in refusal(source)


def test_weights_that_the_model_has_no_place_for_are_refused(source):
    rewrite(source, lambda tensors: tensors.update(another=torch.zeros(3)))
    assert "1 tensor (another)" in refusal(source)


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_a_tied_head_may_be_in_the_file_or_not(tmp_path, family):
    tied = {"weight_tying": True} if family == "llada" else {"tie_word_embeddings": True}
    head, embedding = {
        "llada": ("model.transformer.ff_out.weight", "model.transformer.wte.weight"),
        "sdar": ("lm_head.weight", "model.embed_tokens.weight"),
    }[family]
    source = tmp_path / "source"
    new_model(family, **tied).save_pretrained(source)
    assert head not in load_file(source / WEIGHTS)
    export(str(source), tmp_path / "one")
    rewrite(source, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    export(str(source), tmp_path / "other")
    rewrite(source, lambda tensors: [tensors.pop(embedding), tensors.pop(head)])
    assert "missing" in refusal(source)


def test_buffers_that_old_checkpoints_hold_are_no_obstacle(source, tmp_path):
    name = "model.transformer.blocks.0.rotary_emb.inv_freq"
    rewrite(source, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert (export(str(source), tmp_path / "out") / WEIGHTS).is_file()


def test_quantised_weights_are_refused_with_the_way_to_go(source):
    change(source / "config.json", quantization_config={"quant_method": "torchao"})
    message = refusal(source)
    assert "quantization_config" in message and "quantise them on loading" in message
