"""What this machine is good at: which device, which dtype, how much memory is free."""

from collections.abc import Sequence

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU if there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name} is not available on this machine")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto`: bf16 where the device is fast at it (Ampere on, AVX512-BF16 or AMX CPUs), fp16 on older GPUs, else fp32.
    Raises ValueError for one that the device does not have."""
    if name == "int8" and device.type != "cpu":
        raise ValueError(f"dtype: int8 runs on a CPU, not on {device}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "bf16" if _cpu_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


def weight_dtype(dtype: str) -> torch.dtype:
    """What weights are loaded as: those of an int8 model in full, to be rounded once."""
    return DTYPES.get(dtype, torch.float32)


def kv_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The model's own, since half the bytes are half the time; bf16 beside int8 weights. No kernel reads fp16 on a CPU."""
    if dtype == "fp16" and device.type == "cpu":
        return torch.float32
    return DTYPES.get(dtype, torch.bfloat16)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cpu_flags() -> set[str]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((set(line.split(":", 1)[1].split()) for line in file if line.startswith("flags")), set())


def to_device(values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the device, without waiting until it has done what it was given before."""
    here = torch.tensor(values, dtype=dtype)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)
