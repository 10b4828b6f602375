"""The masked-diffusion loss, alone and through the models."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorForLanguageModeling

from dllm_hf import modeling
from dllm_hf.training import masked_diffusion_loss

from ..builders import BUILDERS, FAMILIES, MASK, VOCAB, character_tokenizer, new_model

BATCH, LENGTH = 2, 6


@pytest.fixture
def model(family):
    return new_model(family)


@pytest.fixture
def batch():
    """`(tokens, labels)`, five positions masked."""
    torch.manual_seed(1)
    clean = torch.randint(0, 50, (BATCH, LENGTH))
    masked = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).bool()
    return torch.where(masked, MASK, clean), torch.where(masked, clean, -100)


@pytest.fixture
def losses(model, batch):
    """`(batch, length)`, the cross-entropy of each labelled position where this family predicts it, else 0."""
    tokens, labels = batch
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    values = torch.zeros(BATCH, LENGTH)
    for row, column in (labels != -100).nonzero().tolist():
        source = max(column - model.logits_shift, 0)
        values[row, column] = cross_entropy(logits[row, source], labels[row, column])
    return values


def loss(model, batch, **kwargs):
    with torch.no_grad():
        return model(input_ids=batch[0], labels=batch[1], **kwargs).loss


def test_labels_alone_give_the_mean_over_the_labelled_positions(model, batch, losses):
    torch.testing.assert_close(loss(model, batch), losses.sum() / 5)


def test_a_mask_ratio_for_each_row_weighs_its_tokens(model, batch, losses):
    ratio = torch.tensor([0.5, 0.25])
    expected = (losses[0] / 0.5 + losses[1] / 0.25).sum() / (BATCH * LENGTH)
    torch.testing.assert_close(loss(model, batch, mask_ratio=ratio), expected)


def test_a_mask_ratio_for_each_token_weighs_it(model, batch, losses):
    ratio = torch.linspace(0.1, 0.9, BATCH * LENGTH).view(BATCH, LENGTH)
    expected = (losses / ratio).sum() / (BATCH * LENGTH)
    torch.testing.assert_close(loss(model, batch, mask_ratio=ratio), expected)


def test_what_could_not_be_masked_has_a_ratio_of_zero_and_is_not_counted(model, batch, losses):
    ratio = torch.where(batch[1] == -100, 0.0, 0.5)
    torch.testing.assert_close(loss(model, batch, mask_ratio=ratio), losses.sum() / 0.5 / 5)


def test_a_label_whose_ratio_is_infinite_is_counted_and_weighs_nothing(model, batch, losses):
    tokens, labels = batch
    clean, ratio = torch.where(labels == -100, tokens, labels), torch.where(labels == -100, torch.inf, 0.5)
    torch.testing.assert_close(loss(model, (tokens, clean), mask_ratio=ratio), losses.sum() / 0.5 / (BATCH * LENGTH))


def test_padding_is_not_counted_as_tokens(batch):
    torch.manual_seed(0)
    logits, padding = torch.randn(BATCH, LENGTH, VOCAB), torch.ones(BATCH, LENGTH, dtype=torch.long)
    whole = masked_diffusion_loss(logits, batch[1], 0, torch.tensor([0.5, 0.5]))
    padding[:, 0] = 0
    padded = masked_diffusion_loss(logits, batch[1], 0, torch.tensor([0.5, 0.5]), padding)
    torch.testing.assert_close(padded, whole * LENGTH / (LENGTH - 1))


@pytest.mark.parametrize("number", [40, torch.tensor(40)])
@pytest.mark.parametrize("ratio", [None, torch.tensor([0.5, 0.5])])
def test_the_number_of_items_in_the_batch_divides_the_sum(model, batch, losses, number, ratio):
    expected = losses.sum() * (1 if ratio is None else 2) / 40
    torch.testing.assert_close(loss(model, batch, mask_ratio=ratio, num_items_in_batch=number), expected)


def test_nothing_labelled_gives_zero_not_nan(model, batch):
    assert loss(model, (batch[0], torch.full_like(batch[1], -100))) == 0


def test_wrong_shapes_are_refused_by_name(model, batch):
    tokens, labels = batch
    with pytest.raises(ValueError, match="`labels`.*logits_to_keep"):
        model(input_ids=tokens, labels=labels, logits_to_keep=2)
    with pytest.raises(ValueError, match="`labels`"):
        model(input_ids=tokens, labels=labels[:, :3])
    for ratio in (
        torch.ones(BATCH * LENGTH),
        torch.ones(BATCH, 3),
        torch.ones(BATCH, LENGTH, 2),
        torch.ones(3),
        torch.tensor(0.5),
    ):
        with pytest.raises(ValueError, match="`mask_ratio`"):
            model(input_ids=tokens, labels=labels, mask_ratio=ratio)


@pytest.mark.parametrize("family", [*FAMILIES, "gla_dream"])
def test_the_trainer_reduces_the_loss(family, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    clean = torch.tensor([7, 8, 9, 10, 11, 12, 13, 14])

    def example(index):
        masked = torch.rand(8, generator=torch.Generator().manual_seed(index)) < 0.5
        masked[index % 8] = True
        return {
            "input_ids": torch.where(masked, MASK, clean),
            "labels": torch.where(masked, clean, -100),
            "mask_ratio": torch.tensor(0.5),
        }

    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(new_model(family), arguments, train_dataset=[example(index) for index in range(96)])
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(history[-3:]) < 0.5 * sum(history[:3]), history


@pytest.mark.parametrize("shift", [0, 1])
def test_an_exported_loss_takes_any_batch_and_length(shift):
    class Loss(torch.nn.Module):
        def forward(self, logits, labels, ratio, mask):
            return masked_diffusion_loss(logits, labels, shift, ratio, mask)

    def inputs(batch, length):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 50, (batch, length), generator=generator)
        logits = torch.randn(batch, length, VOCAB, generator=generator)
        return logits, labels, torch.linspace(0.1, 0.9, batch), (torch.arange(length) > 0).long().expand(batch, -1)

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = (free, free, {0: torch.export.Dim.DYNAMIC}, free)
    program = torch.export.export(Loss(), inputs(3, 7), dynamic_shapes=shapes).module()
    for shape in [(3, 7), (2, 9), (5, 4)]:
        torch.testing.assert_close(program(*inputs(*shape)), Loss()(*inputs(*shape)))


# --- text without noise


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(modeling.logger, "warning_once", said.append)
    return said


CLEAN = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]), "labels": torch.tensor([[3, 4, 5, 6, 7, 8]])}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_batch_of_a_collator_for_autoregressive_models_is_warned_of_once(name, warnings):
    model = new_model(name)
    batch = DataCollatorForLanguageModeling(character_tokenizer(), mlm=False)([{"input_ids": [3, 4, 5, 6, 7, 8]}] * 2)
    for _ in range(3):
        model(**batch)
    if name == "gla_dream":  # draws the noise itself
        assert not warnings
    else:
        (warning,) = warnings
        assert "`labels`" in warning and "DataCollatorForMaskedDiffusion" in warning


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": torch.tensor([[3, MASK, 5, 6, 7, 8]])},
        {"labels": torch.full((1, 6), -100)},
        {
            "mask_ratio": torch.full((1, 6), torch.inf)
        },  # a text that chance left without a mask, as the collator has them
    ],
    ids=["a mask", "nothing to learn", "with the weights of drawn noise"],
)
def test_noisy_text_is_not_warned_of(name, changes, warnings):
    new_model(name)(**{**CLEAN, **changes})
    assert not warnings


def test_a_loss_does_not_wait_for_the_device_after_the_first(model):
    looks = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function):
                looks.append(function)
            return function(*args, **(kwargs or {}))

    with Looks():
        model(**CLEAN)
        assert looks
        looks.clear()
        model(**CLEAN)
    assert not looks
