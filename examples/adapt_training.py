"""How `adapt.py` trains: rows in their order, the lines to fill in weighing more, a limit of time, GLADream's first stage."""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback

from dllm_hf import GLADreamModel
from dllm_hf.training import DataCollatorForMaskedDiffusion, masked_diffusion_loss


@dataclass
class WholeRows(DataCollatorForMaskedDiffusion):
    """Without an attention mask, which says nothing where all rows are full, and costs the attention its fast paths."""

    def __call__(self, features):
        batch = super().__call__(features)
        del batch["attention_mask"]
        batch["mask_ratio"] /= torch.stack([each["weights"] for each in features])
        return batch


class InOrder(Trainer):
    """Reads the rows in their order, which is the same for all arms."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Of an autoregressive model, whose own loss has no weights, the weighted loss of the next token."""
        weights = inputs.pop("weights", None)
        if (
            weights is not None
        ):  # the Trainer multiplies what comes of it by the processes, over which gradients are averaged
            self.compute_loss_func = partial(next_token_loss, weights)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def next_token_loss(weights: torch.Tensor, output, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """`weights`, `labels`: `(batch, length)`."""
    labels, ratio = F.pad(labels[:, 1:], (0, 1), value=-100), F.pad(1 / weights[:, 1:], (0, 1))
    return masked_diffusion_loss(output.logits, labels, 0, ratio, num_items_in_batch=num_items_in_batch)


class TimeLimit(TrainerCallback):
    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        over = torch.tensor(float(time.monotonic() > self.end), device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(over, 0)  # all processes stop after the same step
        if over and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class Alignment(nn.Module):
    """GLADream's first stage: what each layer's attention makes of the original's input comes to be what the original makes of
    it. The loss is the mean over the layers of the squared distance, over the squared length of the original's output."""

    def __init__(self, model: GLADreamModel, teacher: PreTrainedModel):
        super().__init__()
        self.model = model
        self.teacher = [teacher.eval().requires_grad_(False)]  # a list: no part of what is trained
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        model.requires_grad_(False)
        for layer in teacher.model.layers:
            layer.self_attn.register_forward_hook(self._note, with_kwargs=True)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.requires_grad_(True)
            layer.self_attn.register_forward_pre_hook(lambda module, args, i=index: (self.inputs[i], *args[1:]))
            layer.self_attn.register_forward_hook(lambda module, args, out, i=index: self._compare(i, out))

    def _note(self, module, args, kwargs, output):
        self.inputs.append(kwargs["hidden_states"])
        self.outputs.append(output[0])

    def _compare(self, index: int, output: torch.Tensor) -> torch.Tensor:
        expected = self.outputs[index].float()
        self.losses.append((output.float() - expected).square().sum() / expected.square().sum())
        return output.detach()

    def forward(self, input_ids: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
        self.inputs.clear(), self.outputs.clear(), self.losses.clear()
        with torch.no_grad():
            self.teacher[0].to(input_ids.device).model(input_ids, use_cache=False)
        self.model.model(input_ids, use_cache=False)
        return {"loss": torch.stack(self.losses).mean()}
