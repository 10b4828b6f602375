"""Many machines, by Ray: a dataset of prompts, and the server. `pip install "dllm-hf[ray]"`. docs/scaling.md"""

try:
    import ray.data  # noqa: F401
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ImportError(f'Ray is an extra: `pip install "dllm-hf[ray]"`. {error}') from error

from .deployment import deployment
from .predictor import DiffusionPredictor, unfinished

__all__ = ["DiffusionPredictor", "deployment", "unfinished"]
