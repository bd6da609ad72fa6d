"""Public data sheet numbers of GPUs, and what a CPU here does.

Peaks are dense bf16 matrix products without sparsity, of the SXM parts: NVIDIA A100 80 GB, H100,
H200, and one GPU of an HGX B200. What of a peak a training attains is an assumption.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from es2fast.errors import UserError

ATTAINABLE = 0.5  # assumed share of the peak that a whole step's matrix products attain
PER_NODE = 8  # assumed GPUs of a machine


@dataclass(frozen=True)
class Machine:
    """peak: flop/s; bandwidth: of the memory, byte/s; memory: bytes, of a CPU those that its ranks
    share; link, network: byte/s that a
    rank sends to others of its machine and of other machines (network: an assumption);
    attainable: assumed share of the peak; source: where the peak comes from."""

    name: str
    peak: float
    bandwidth: float
    memory: float | None
    link: float
    network: float
    attainable: float = ATTAINABLE
    source: str = "data sheet, dense bf16"

    @property
    def device(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"

    def memory_of_rank(self, ranks: int) -> int | None:
        """Bytes that each of `ranks` ranks has."""
        if self.memory is None:
            return None
        return int(self.memory) // (ranks if self.device == "cpu" else 1)

    def between(self, ranks: int) -> float:
        """Byte/s of an exchange among `ranks` ranks."""
        return self.link if ranks <= PER_NODE else self.network


GPUS = {
    "A100": Machine("A100", 312e12, 2.039e12, 80e9, 300e9, 25e9),
    "H100": Machine("H100", 989e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Machine("H200", 989e12, 4.8e12, 141e9, 450e9, 50e9),
    "B200": Machine("B200", 2250e12, 8.0e12, 180e9, 900e9, 50e9),
}


def machine(name: str, memory: int | None = None) -> Machine:
    """The machine of a name.

    Args:
        name: of `GPUS`, or cpu, whose speed is measured in less than a second.
        memory: bytes that a CPU has.

    Raises:
        UserError: an unknown name.
    """
    known = {key.lower(): value for key, value in GPUS.items()}
    if name.lower() == "cpu":
        return _cpu(memory)
    if name.lower() not in known:
        raise UserError(f"--gpu: {name!r} is unknown; use {', '.join([*GPUS, 'cpu'])}")
    return known[name.lower()]


def _cpu(memory: int | None) -> Machine:
    """One process with as many threads as torch would use, in fp32."""
    size = 768
    x = torch.ones(size, size)
    out = torch.empty_like(x)
    torch.mm(x, x, out=out)
    took = min(_seconds(lambda: torch.mm(x, x, out=out)) for _ in range(3))
    large = torch.ones(8_000_000)
    moved = min(_seconds(lambda: large.add_(1.0)) for _ in range(3))
    bandwidth = 2 * large.numel() * 4 / moved
    return Machine(
        "cpu", 2 * size**3 / took, bandwidth, memory, bandwidth / 4, 1e9, 0.7,
        f"fp32 product measured here, {torch.get_num_threads()} threads",
    )  # fmt: skip


def _seconds(work: object) -> float:
    began = time.perf_counter()
    work()  # type: ignore[operator]
    return max(time.perf_counter() - began, 1e-9)
