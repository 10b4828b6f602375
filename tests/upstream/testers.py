"""What the test classes of all families share."""

import tempfile
import unittest

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from .library import ConfigTester, ModelTesterMixin, TensorParallelTesterMixin, ids_tensor, run_distributed

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}


class ModelTester:
    """What the library's tests ask of a `model_tester`: a tiny configuration, and a batch padded on the right."""

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, config_class: type[PreTrainedConfig], causal_lm_class: type[PreTrainedModel], **changes):
        self.config_class, self.causal_lm_class = config_class, causal_lm_class
        self.fields = {**SIZES, **SPECIAL, **changes}
        vars(self).update(self.fields)

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids).tril().to(torch_device),
        }


def assert_tensor_parallel_generates_the_same(rank: int, folder: str, model_class: type[PreTrainedModel]) -> None:
    model = model_class.from_pretrained(folder)
    parallel = model_class.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    prompt, options = torch.arange(10, 20)[None], {"max_new_tokens": 16, "remasking_strategy": "low_confidence_static"}
    sequences = [each.eval().diffusion_generate(prompt, **options) for each in (model, parallel)]
    assert torch.equal(*sequences), sequences


class DiffusionModelTest(ModelTesterMixin, TensorParallelTesterMixin):
    """Goes before `unittest.TestCase` in a class's bases.

    changes: to the fields of the tiny configuration.
    """

    config_class: type[PreTrainedConfig]
    base_model_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    changes: dict = {}

    # `generate()` is `diffusion_generate()`: the library's tests of it are about autoregressive decoding.
    all_generative_model_classes = ()
    # Else a family without a year of copyright in its files counts as an old one.
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None

    @classmethod
    def setUpClass(cls):
        # The library's tests look here for what a class is: a head with `labels`, or a stack of layers without.
        MODEL_MAPPING_NAMES[cls.config_class.model_type] = cls.base_model_class.__name__
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.config_class.model_type] = cls.causal_lm_class.__name__

    @property
    def all_model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return (self.base_model_class, self.causal_lm_class)

    def setUp(self):
        self.model_tester = ModelTester(self.config_class, self.causal_lm_class, **self.changes)
        self.config_tester = ConfigTester(self, config_class=self.config_class)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_forward_default_config_values(self):
        # The default special tokens are those of the published vocabulary. A smaller one has to name its own.
        self.model_tester.fields["vocab_size"] = self.config_class.vocab_size
        super().test_model_forward_default_config_values()

    @unittest.skip("`labels` hold the clean tokens at the masks, not the next tokens: there are no `shift_labels`")
    def test_causal_lm_loss_honors_shift_labels(self):
        pass

    def test_tp_generation(self):
        # The library's asks for `num_beams` and the scores of every step.
        with tempfile.TemporaryDirectory() as folder:
            set_seed(0)
            self.causal_lm_class(self.model_tester.get_config()).save_pretrained(folder)
            run_distributed(2)(assert_tensor_parallel_generates_the_same)(folder, self.causal_lm_class)

    @unittest.skip("It asks `generate()` for `num_beams`, which diffusion does not have")
    def test_tp_generation_quantized(self):
        pass
