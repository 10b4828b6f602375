"""Many requests on one model: rows that join and leave the loop of `generation/` between its steps."""

from ..generation.inputs import TooLongError
from .engine import QueueFullError
from .llm import LLM
from .outputs import CompletionOutput, Event, Load, Logprob, RequestOutput, Usage
from .sampling_params import SamplingParams, StructuredOutputsParams
