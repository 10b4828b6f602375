"""How `adapt.py` trains: rows in their order, a limit of time, GLADream's first stage."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback

from dllm_hf import GLADreamModel
from dllm_hf.training import DataCollatorForMaskedDiffusion


@dataclass
class WholeRows(DataCollatorForMaskedDiffusion):
    """Without an attention mask, which says nothing where all rows are full, and costs the attention its fast paths.

    line_weight: of the loss of a masked token in rows of which a part alone is to be filled.
    """

    line_weight: float = 1.0

    def __call__(self, features):
        batch = super().__call__(features)
        del batch["attention_mask"]
        is_part = torch.tensor([-100 in each.get("labels", ()) for each in features])
        batch["mask_ratio"][is_part] /= self.line_weight
        return batch


class InOrder(Trainer):
    """Reads the rows in their order, which is the same for all arms."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


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
        # In lists: no part of what is trained, nor of a checkpoint.
        self.model, self.teacher = [model], [teacher.eval().requires_grad_(False)]
        self.attention = nn.ModuleList(layer.self_attn for layer in model.model.layers)
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []
        model.requires_grad_(False)
        for layer in teacher.model.layers:
            layer.self_attn.register_forward_hook(self._note, with_kwargs=True)
        self.attention.requires_grad_(True)
        for index, attention in enumerate(self.attention):
            attention.register_forward_pre_hook(lambda module, args, i=index: (self.inputs[i], *args[1:]))
            attention.register_forward_hook(lambda module, args, out, i=index: self._compare(i, out))

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
        self.model[0].to(input_ids.device).model(input_ids, use_cache=False)
        return {"loss": torch.stack(self.losses).mean()}
