"""Loading a checkpoint for a processor, and the settings with which it is fast there."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..families import family
from ..runtimes.exported import FAMILIES
from .model import DreamEdge

QUANTIZED = torch.qint8
CPUINFO = Path("/proc/cpuinfo")  # of Linux


def load_hf_model(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    optimize_cpu: bool = False,
) -> tuple[DreamEdge, str, Any]:
    """Load a checkpoint of LLaDA, Dream or SDAR, ours or an original.

    Args:
        path: a folder, or a repository of the Hugging Face Hub.
        dtype: of the weights. `torch.qint8` stores those of matrix products in 8 bits, a scale for each output channel, and
            quantises what they are multiplied with in each pass: for processors alone, and not to be exported. None is
            float32; with `optimize_cpu` bfloat16 where the checkpoint is of it and the processor has units for it.
        optimize_cpu: see [`optimize_for_cpu`].

    Returns:
        The model, ready to be evaluated; its `model_type`; its configuration.

    Raises:
        ValueError: the checkpoint is of another family, or `dtype` is not possible on `device`.
    """
    device = torch.device(device)
    config = AutoConfig.from_pretrained(path)
    family(config)
    if config.model_type not in FAMILIES or hasattr(config, "num_experts"):
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{path} is a {name}: `load_hf_model` loads {', '.join(FAMILIES)}, without experts.")
    if dtype == QUANTIZED and device.type != "cpu":
        raise ValueError(f"`dtype=torch.qint8` runs on a processor, not on `device={str(device)!r}`.")
    if optimize_cpu:
        optimize_for_cpu()
        if dtype is None and config.dtype == torch.bfloat16 and has_units(torch.bfloat16):
            dtype = torch.bfloat16
    loaded = torch.float32 if dtype in (None, QUANTIZED) else dtype
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=loaded)
    model = model.to(device).eval()
    if dtype == QUANTIZED:
        if getattr(config, "has_identity_norms", False):
            model.drop_identity_norms()  # PyTorch's scales end at 2^-23, far above those of projections before such norms
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=QUANTIZED, inplace=True)
    return DreamEdge(model), config.model_type, config


def optimize_for_cpu() -> None:
    """Settings of the process: a thread for each core, unless `OMP_NUM_THREADS` says how many, and the quantised linear
    layers that the processor has instructions for."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(physical_cores())
    engines = torch.backends.quantized.supported_engines
    preferred = (
        ("x86", "fbgemm") if torch.backends.cpu.get_cpu_capability().startswith("AVX") else ("onednn", "qnnpack")
    )
    torch.backends.quantized.engine = next(each for each in (*preferred, *engines) if each in engines)


def has_units(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies matrices of this dtype itself; otherwise it converts each number, and takes longer
    than in float32."""
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "asimdhp")}
    if dtype == torch.float32 or not CPUINFO.is_file():
        return dtype == torch.float32
    return any(name in CPUINFO.read_text().split() for name in names[dtype])


def physical_cores() -> int:
    """The cores that the process may use; two threads of one core would share its units."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (Path(f"/sys/devices/system/cpu/cpu{each}/topology/thread_siblings_list") for each in usable)
    return max(len({file.read_text() if file.is_file() else str(file) for file in siblings}), 1)
