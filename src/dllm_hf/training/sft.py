"""TRL's `SFTTrainer` with the loss of masked diffusion."""

from transformers import Trainer

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("`MaskedDiffusionSFTTrainer` needs TRL: `pip install trl`.") from error


class MaskedDiffusionSFTTrainer(SFTTrainer):
    """[`trl.SFTTrainer`] for masked-diffusion language models: the datasets, chat templates and adapters of TRL, and the
    loss of the model's `forward`. SFTTrainer itself computes the loss of the next token from the logits.

        collator = DataCollatorForMaskedDiffusion(tokenizer, mask_token_id=model.config.mask_token_id, seed=0)
        MaskedDiffusionSFTTrainer(model, SFTConfig("out"), collator, train_dataset=chats, callbacks=[collator])

    Args:
        data_collator: a [`DataCollatorForMaskedDiffusion`], which draws the noise.
        kwargs: those of `SFTTrainer`.
    """

    _tag_names = ["trl", "sft", "masked-diffusion"]

    def __init__(self, model, args=None, data_collator=None, **kwargs):
        if data_collator is None:
            raise ValueError(
                "`data_collator` is missing: give a `DataCollatorForMaskedDiffusion`, which draws the noise. That of TRL "
                "gives clean text."
            )
        if getattr(args, "loss_type", "nll") != "nll":
            raise ValueError(f"`loss_type={args.loss_type!r}` is a loss of the next token: leave it out.")
        super().__init__(model, args, data_collator, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    prediction_step = Trainer.prediction_step
    _set_signature_columns_if_needed = Trainer._set_signature_columns_if_needed
