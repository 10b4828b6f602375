"""The library's common tests of the models of every family."""

import unittest
from unittest.mock import patch

import torch

from dllm_hf import (
    DreamConfig,
    DreamModel,
    GLADreamBaseModel,
    GLADreamConfig,
    GLADreamModel,
    LLaDAConfig,
    LLaDAModelLM,
    SDARConfig,
    SDARForCausalLM,
    SDARModel,
    SDARMoeConfig,
    SDARMoeForCausalLM,
    SDARMoeModel,
)
from dllm_hf.dream import DreamBaseModel
from dllm_hf.llada import LLaDAModel

from .testers import DiffusionModelTest


class LLaDAModelTest(DiffusionModelTest, unittest.TestCase):
    config_class = LLaDAConfig
    base_model_class = LLaDAModel
    causal_lm_class = LLaDAModelLM

    def test_reverse_loading_mapping(self):
        # Every pattern must match a name, and that of the head matches none in the stack of layers. Such a pattern is
        # known by its `lm_head`, which is not what the published checkpoints call it.
        with patch.object(LLaDAModelTest, "all_model_classes", (LLaDAModelLM,)):
            super().test_reverse_loading_mapping()


class DreamModelTest(DiffusionModelTest, unittest.TestCase):
    config_class = DreamConfig
    base_model_class = DreamBaseModel
    causal_lm_class = DreamModel


class SDARModelTest(DiffusionModelTest, unittest.TestCase):
    config_class = SDARConfig
    base_model_class = SDARModel
    causal_lm_class = SDARForCausalLM
    changes = {"head_dim": 12}

    @unittest.skip("The configuration refuses a sliding window: a block sees every earlier block")
    def test_sliding_window_mask(self):
        pass


class SDARMoeModelTest(SDARModelTest):
    config_class = SDARMoeConfig
    base_model_class = SDARMoeModel
    causal_lm_class = SDARMoeForCausalLM
    # In half precision `grouped_mm` needs rows of 16 bytes.
    changes = {"head_dim": 12, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

    def test_moe_models_record_router_logits(self):
        # It looks for the decorator of the experts in the file of the model; ours stands at those that are inherited.
        with patch("inspect.getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()


class GLADreamModelTest(DiffusionModelTest, unittest.TestCase):
    config_class = GLADreamConfig
    base_model_class = GLADreamBaseModel
    causal_lm_class = GLADreamModel
    # Two blocks: of one alone, the gates between blocks have no gradient.
    changes = {"block_size": 4, "conv_size": 3, "inter_block_injection_mode": "boundary"}
    has_attentions = False  # it keeps states instead

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:
            # The text is noised already, this says: else each forward pass would draw masks of its own.
            inputs["mask_ratio"] = torch.ones(len(inputs["labels"]))
        return inputs

    @unittest.skip("Hidden states are read out of whole blocks: what is returned is not what the next layer reads")
    def test_retain_grad_hidden_states_attentions(self):
        pass
