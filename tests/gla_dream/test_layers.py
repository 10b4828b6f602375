"""What the layers compute, and what of the text they see."""

import pytest
import torch
from torch.nn import functional as F

from dllm_hf.gla_dream import attention_gla_dream
from dllm_hf.gla_dream.gated_linear_attention import block_states

from ..builders import MASK, left_pad, new_model
from .oracles import assert_near, logits_by_definition

ROW = [3, 4, MASK, 6, 7, MASK, 9, 10, 11, 12, 13]  # two blocks and a part of a third
BLOCKS = torch.arange(len(ROW)) // 4
ROWS = [ROW, [11, MASK, 13], [21, 22, 23, 24, MASK, 26, 27, 28]]


@pytest.fixture(params=[0, 3], ids="convolution {}".format)
def model(injection, shared, request):
    changes = {"inter_block_injection_mode": injection, "share_inter_intra_gate_weights": shared}
    return new_model("gla_dream", conv_size=request.param, **changes)


@torch.no_grad()
def logits(model, row: list[int], **kwargs) -> torch.Tensor:
    return model(input_ids=torch.tensor([row]), **kwargs).logits[0]


def sees(model, **kwargs) -> torch.Tensor:
    """`(length, length)` bool: whether the logits of a position change with another token."""
    model, length = model.double(), len(ROW)
    changed = torch.tensor([ROW]).repeat(length, 1)
    changed[range(length), range(length)] = 40
    with torch.no_grad():
        return (model(input_ids=changed, **kwargs).logits - logits(model, ROW, **kwargs)).abs().amax(-1).T > 1e-9


# --- what is computed

SHAPES = {
    "grouped heads": {},
    "every head its own": {"num_key_value_heads": 4},
    "one head for all": {"num_key_value_heads": 1, "attention_bias": True},
    "wider values than keys": {"expand_k": 0.5, "expand_v": 1.5},
    "wider keys than values": {"expand_k": 2, "expand_v": 0.75},
    "one block": {"block_size": 16},
    "blocks of one": {"block_size": 1},
    "short convolutions": {"conv_size": 3},
    "wider convolutions": {"conv_size": 9, "expand_v": 2, "num_key_value_heads": 1, "attention_bias": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_those_of_the_design(injection, shared, shape):
    changes = {"inter_block_injection_mode": injection, "share_inter_intra_gate_weights": shared, **SHAPES[shape]}
    model = new_model("gla_dream", **changes)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    assert_near({"logits": logits(model.double(), ROW)}, {"logits": logits_by_definition(model, ROW)}, 1e-6)


def test_the_parameters_of_fla_s_layer_have_its_names_and_shapes():
    hidden, key_dim, value_dim, groups, rank = 32, 16, 48, 2, 8
    changes = {"expand_k": 0.5, "expand_v": 1.5, "num_key_value_heads": 2, "gate_low_rank_dim": rank, "conv_size": 5}
    attention = new_model("gla_dream", **changes).model.layers[0].self_attn
    expected = {
        "q_proj.weight": (key_dim, hidden),
        "k_proj.weight": (key_dim // groups, hidden),
        "v_proj.weight": (value_dim // groups, hidden),
        "q_conv1d.weight": (key_dim, 1, 5),
        "k_conv1d.weight": (key_dim // groups, 1, 5),
        "v_conv1d.weight": (value_dim // groups, 1, 5),
        "g_proj.weight": (value_dim, hidden),
        "gk_proj.0.weight": (rank, hidden),
        "gk_proj.1.weight": (key_dim // groups, rank),
        "gk_proj.1.bias": (key_dim // groups,),
        "g_norm_swish_gate.weight": (value_dim // 4,),
        "o_proj.weight": (hidden, value_dim),
    }
    own = {"intra_gate_proj.weight": (value_dim, 2 * value_dim), "inter_gate_proj.weight": (value_dim, 2 * value_dim)}
    assert {name: tuple(x.shape) for name, x in attention.named_parameters()} == {**expected, **own}


def test_shared_gates_are_one_matrix():
    names = dict(new_model("gla_dream", share_inter_intra_gate_weights=True).model.layers[0].self_attn.named_modules())
    assert "intra_gate_proj" in names and "inter_gate_proj" not in names


@pytest.mark.parametrize("heads, many", [(1, 0), (2, 1), (4, 1), (8, 2)])
def test_before_training_a_quarter_of_the_heads_keeps_a_token_for_many_steps_and_the_others_for_four(heads, many):
    for layer in new_model("gla_dream", num_attention_heads=heads, num_key_value_heads=heads).model.layers:
        steps = (-16 / F.logsigmoid(layer.self_attn.gk_proj[1].bias)).view(heads, -1)
        assert torch.allclose(steps[: heads - many], torch.tensor(4.0), rtol=1e-3)
        assert (steps[heads - many :] > 64).all() and (steps[heads - many :] < 8192).all()


def test_before_training_a_short_convolution_is_the_identity_and_noise():
    attention = new_model("gla_dream", hidden_size=256, conv_size=5).model.layers[1].self_attn
    for name in "qkv":
        noise = getattr(attention, f"{name}_conv1d").weight[:, 0] - torch.tensor([0, 0, 1, 0, 0])
        assert noise.abs().max() <= 5**-0.5 and abs(noise.std() - (5 * 3) ** -0.5) < 0.03 and noise.mean().abs() < 0.03


@pytest.mark.parametrize("mode", ["naive", "auto"])
def test_every_implementation_gives_the_same_logits(injection, mode):
    model, other = (
        new_model("gla_dream", inter_block_injection_mode=injection, attn_mode=name) for name in ("torch", mode)
    )
    torch.testing.assert_close(logits(model, ROW), logits(other, ROW), atol=1e-5, rtol=1e-4)


# --- what is seen


def test_a_token_sees_its_own_block_and_every_earlier_one(model):
    assert torch.equal(sees(model), BLOCKS[:, None] >= BLOCKS)


def test_with_the_state_cut_blocks_are_independent(model, monkeypatch):
    no_states = lambda *args: map(torch.zeros_like, block_states(*args))
    monkeypatch.setattr(attention_gla_dream, "block_states", no_states)
    assert torch.equal(sees(model), BLOCKS[:, None] == BLOCKS)


def test_a_block_is_block_size_positions_from_position_0_on(model):
    """Also where a text begins in the middle of one."""
    positions = torch.arange(6, 6 + len(ROW))
    blocks = positions // 4
    assert torch.equal(sees(model, position_ids=positions[None]), blocks[:, None] >= blocks)


LAYOUTS = {
    "left": [0] * 5 + [1] * 11,
    "right": [1] * 11 + [0] * 5,
    "both sides": [0] * 2 + [1] * 11 + [0] * 3,
    "holes": [1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad", [0, MASK])
def test_padding_anywhere_changes_no_real_position(model, layout, pad):
    """Nor does what stands in it."""
    mask = torch.tensor([LAYOUTS[layout]])
    tokens = torch.full(mask.shape, pad)
    tokens[mask == 1] = torch.tensor(ROW)
    found = logits(model, tokens[0].tolist(), attention_mask=mask)
    torch.testing.assert_close(found[mask[0] == 1], logits(model, ROW), atol=1e-5, rtol=1e-4)


def test_rows_of_a_padded_batch_do_not_see_each_other(model):
    batch = left_pad(ROWS)
    with torch.no_grad():
        found = model(**batch).logits[batch["attention_mask"] == 1]
    alone = torch.cat([logits(model, row) for row in ROWS])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_samples_packed_into_a_row_do_not_see_each_other(model):
    parts = [ROW[:5], ROW[5:6], ROW[6:]]
    positions = torch.tensor([[position for part in parts for position in range(len(part))]])
    alone = torch.cat([logits(model, part) for part in parts])
    torch.testing.assert_close(logits(model, ROW, position_ids=positions), alone, atol=1e-5, rtol=1e-4)


# --- what is refused


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 2, 1], [0, 1, 3, 4, 5, 6], [-1, 0, 1, 2, 3, 4]],
    ids=["back", "backwards", "gap", "below 0"],
)
@pytest.mark.parametrize("training", [False, True])
def test_positions_that_do_not_rise_by_one_are_refused(positions, training):
    tokens = torch.tensor([ROW[:6]])
    labels = {"labels": torch.where(tokens == MASK, 7, -100)} if training else {}
    with pytest.raises(ValueError, match="`position_ids` must rise by one.*leave them out"):
        new_model("gla_dream")(input_ids=tokens, position_ids=torch.tensor([positions]), **labels)


@pytest.mark.parametrize("shape", [(1, 1, 11, 11), (1, 4), (2, 11)])
def test_a_mask_that_is_not_2d_padding_is_refused(shape):
    with pytest.raises(ValueError, match="`attention_mask`"):
        new_model("gla_dream")(input_ids=torch.tensor([ROW]), attention_mask=torch.ones(shape))


def test_the_tokens_are_given_once():
    model = new_model("gla_dream")
    tokens = torch.tensor([ROW])
    for kwargs in ({}, {"input_ids": tokens, "inputs_embeds": model.get_input_embeddings()(tokens)}):
        with pytest.raises(ValueError, match="`input_ids`.*`inputs_embeds`"):
            model(**kwargs)
