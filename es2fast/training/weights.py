"""Copies of the trainable weights, and the last of them that were measured to be sane.

Numbers of step s describe the weights before its update. So a copy is taken before the step and
becomes the good one only after the step has measured it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from es2fast.errors import UserError


class TrainableWeights:
    """Copies the trainable weights to the CPU and back.

    Under ZeRO-3 each rank copies its own partitions in the training precision, so that all ranks
    together hold one copy. Below stage 3 rank 0 copies the whole weights: it is rank 0 that writes
    them. Writing back changes what the model computes with, not the optimizer's fp32 weights.

    Args:
        model: its parameters that require gradients are meant, partitioned or whole.
    """

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in named]
        self._lora_a = ["lora_A" in name for name, _ in named]
        self._partitioned = any(hasattr(p, "ds_tensor") for p in self._parameters)

    def copy(self) -> list[Tensor]:
        """One tensor per parameter; an empty list on a rank that keeps none."""
        if not self._partitioned and dist.is_initialized() and dist.get_rank() != 0:
            return []
        return [_local(p).detach().to("cpu", copy=True) for p in self._parameters]

    def part(self, copies: Sequence[Sequence[Tensor]], rank: int) -> list[Tensor]:
        """What `copy` would return on `rank`, from what it returned on each of other ranks, which
        may have had another ZeRO stage.

        Args:
            copies: per earlier rank its tensors, or none.
        """
        kept = [copy for copy in copies if copy]
        if not self._partitioned and rank != 0:
            return []
        return [
            _of_rank(parameter, torch.cat([part.reshape(-1) for part in parts]), rank)
            for parameter, *parts in zip(self._parameters, *kept, strict=True)
        ]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Puts what `copy` returned back on every rank; call on every rank."""
        for i, parameter in enumerate(self._parameters):
            if self._partitioned:
                parameter.partition()  # type: ignore[attr-defined]  # drops a gathered, other value
            if values:
                _local(parameter).copy_(values[i])
            if not self._partitioned and dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(parameter.data, src=0)

    def write_between(self, start: Sequence[Tensor], end: Sequence[Tensor], t: float) -> None:
        """`write` of start + t (end - start). Of LoRA's factors B alone is scaled, which starts at
        0: then the update t B A is exactly t times the trained one.

        Args:
            start, end: from `copy`.
            t: 0..1.
        """
        pairs = zip(start, end, self._lora_a) if end else ()
        self.write([b if keep else a + t * (b - a) for a, b, keep in pairs])


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its ZeRO-3 partition, or all of it.

    Raises:
        UserError: the partition lies on a disk.
    """
    local = getattr(parameter, "ds_tensor", None)
    if local is None:
        return parameter.data
    if getattr(local, "final_location", None) == "nvme":
        raise UserError(
            "safeguards.keep_every: weights that are offloaded to a disk cannot be copied; "
            "set safeguards.keep_every=0 and kl.budget=null"
        )
    return local.data


def _of_rank(parameter: nn.Parameter, flat: Tensor, rank: int) -> Tensor:
    """What `rank` holds of a parameter whose values are `flat`, with or without ZeRO-3's padding at
    its end."""
    local = _local(parameter)
    if not hasattr(parameter, "ds_tensor"):
        return flat[: parameter.numel()].view(parameter.shape)
    own = torch.zeros(local.numel(), dtype=flat.dtype)
    values = flat[: parameter.ds_numel][rank * len(own) :][: len(own)]  # type: ignore[attr-defined]
    own[: len(values)] = values
    return own.view(local.shape)


@dataclass
class _Copy:
    """Trainable weights after `step` optimizer steps; kl of the batch that measured them."""

    step: int
    values: list[Tensor]
    kl: float = 0.0


class GoodWeights:
    """The last trainable weights that were measured to be sane.

    Args:
        weights: of the model.
        every: steps between two copies; 0 keeps none.
    """

    def __init__(self, weights: TrainableWeights, every: int):
        self._weights = weights
        self._every = every
        self._pending: _Copy | None = None
        self.copy: _Copy | None = None

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`, between two steps; this rank's part of the weights."""
        return {} if self.copy is None else dict(vars(self.copy))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        self.copy = _Copy(**state) if state else None

    def parted(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The state of `rank` from those of other ranks, in their order."""
        if not states[0]:
            return {}
        copies = [state["values"] for state in states]
        return states[0] | {"values": self._weights.part(copies, rank)}

    def before_step(self, step: int) -> None:
        """Copies the weights, when it is time, before optimizer step `step` (from 1)."""
        if self._every and (step - 1) % self._every == 0:
            self._pending = _Copy(step - 1, self._weights.copy())

    def measured(self, sane: bool, kl: float) -> None:
        """After that step: its numbers were sane, or not."""
        if self._pending is not None and sane:
            self._pending.kl = kl
            self.copy = self._pending
        self._pending = None

    def restore(self) -> None:
        """Puts the good weights into the model; call on every rank."""
        assert self.copy is not None
        self._weights.write(self.copy.values)
