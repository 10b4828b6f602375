"""What the collator for the trainer refuses, by name."""

import pytest

from dllm_hf.training import DataCollatorForMaskedDiffusion

from ..builders import character_tokenizer
from .test_collator import TOKENIZER, collator_of, feature, packed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "linear"}, "`schedule='linear'`"),
        ({"schedule": "dream", "weighting": "t"}, "`weighting='t'`"),
        ({"weighting": "cart"}, "`weighting='cart'`"),
        ({"schedule": "complementary", "block_size": 4, "weighting": "none"}, "`weighting='none'`"),
        ({"schedule": "dream", "weighting": "cart", "cart_p": 0.0}, "`cart_p=0.0`"),
        ({"schedule": "dream", "weighting": "cart", "cart_p": 1.5}, "`cart_p=1.5`"),
        ({"schedule": "complementary"}, "needs `block_size`"),
        ({"schedule": "complementary", "block_size": 0}, "`block_size=0`"),
        ({"block_size": 4}, "`block_size`"),
        ({"schedule": "complementary", "block_size": 2.5}, "`block_size=2.5`"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of=0`"),
        ({"pad_to_multiple_of": -8}, "`pad_to_multiple_of=-8`"),
        ({"mask_token_id": -1}, "`mask_token_id=-1`"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForMaskedDiffusion(TOKENIZER, **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mask_token", {}, "`mask_token_id=model.config.mask_token_id`"),
        ("eos_token", {"eos_padding": True}, "`eos_padding`.*`eos_token`"),
    ],
)
def test_a_tokenizer_that_lacks_a_token_is_refused(name, options, message):
    tokenizer = character_tokenizer()
    setattr(tokenizer, name, None)
    with pytest.raises(ValueError, match=message):
        DataCollatorForMaskedDiffusion(tokenizer, **options)


@pytest.mark.parametrize(
    "features, message",
    [
        ([], "`input_ids`"),
        ([{"text": "a"}], "`input_ids`"),
        ([feature(3), {"text": "a"}], "Row 1 .* no `input_ids`"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "`labels` of row 0.* 2 .* 3:"),
        ([feature(3), {"input_ids": [1, 2], "attention_mask": [1, 1, 0]}], "`attention_mask` of row 1.* 3 .* 2:"),
        ([packed(3, 4), {**packed(2), "position_ids": [0]}], "`position_ids` of row 1.* 1 .* 2:"),
        ([packed(3, 4), feature(2)], "Row 1 .* no `position_ids`"),
        ([feature(2), packed(3, 4)], "Row 0 .* no `position_ids`"),
        ([{"input_ids": [[1, 2, 3]]}], "`input_ids` of row 0"),
        ([{"input_ids": [[1, 2], [3]]}], "`input_ids` of row 0"),
        ([{"input_ids": "abc"}], "`input_ids` of row 0"),
        ([{"input_ids": [1.5, 2.0]}], "`input_ids` of row 0"),
        ([{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}], "`labels` of row 0.*-100"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_name(features, message):
    with pytest.raises(ValueError, match=message):
        collator_of()(features)


def test_packed_samples_with_end_of_sequence_padding_are_refused():
    with pytest.raises(ValueError, match="`eos_padding`"):
        collator_of(eos_padding=True)([packed(3, 4)])
