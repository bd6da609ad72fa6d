"""What is installed and what the machine offers: `es2fast env`."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("es2fast", "torch", "triton", "transformers", "deepspeed", "datasets", "peft",
             "accelerate", "safetensors", "numpy")  # fmt: skip


def describe() -> dict[str, str]:
    """name -> value, in the order to print."""
    import torch

    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: installed(name) for name in _PACKAGES}
    found["cpu"] = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found["cuda"] = torch.version.cuda or "torch was built without CUDA"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"gpu {i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
    else:
        found["gpu"] = "none seen by torch"
    found["compiler"] = shutil.which("c++") or "none: DeepSpeed cannot build its operators"
    found["native"] = native_kernels()
    return found


def installed(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def native_kernels() -> str:
    """The native CPU kernels: the instruction sets in use, or what is missing and what it costs."""
    from es2fast.ops import native

    missing = native.why_missing()
    if missing is None:
        gemms = native.GEMM_BF16 or "none of our own"
        return f"CPU kernels loaded, {native.capability()}; bfloat16 GEMMs: {gemms}"
    return f"no CPU kernels: {missing}. Without them the losses run on a CPU in plain torch"
