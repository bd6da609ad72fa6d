"""What ZeRO-3 asks of its users: loading straight into partitions, and whole tensors back.

Below stage 3 nothing is partitioned and everything here does what its plain counterpart does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_GATHER_ELEMENTS = 250_000_000  # gathered at a time


@contextmanager
def zero3_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """While this lasts, `from_pretrained` partitions weights as it reads them (ZeRO-3)."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    stage = deepspeed_config.get("zero_optimization", {}).get("stage")
    alive = HfDeepSpeedConfig(deepspeed_config) if stage == 3 else None  # held by weak reference
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def partitioned(model: nn.Module) -> bool:
    """ZeRO-3 has parted the model's weights among the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def full_state_dict(model: nn.Module, *, main: bool) -> dict[str, Tensor]:
    """All parameters and persistent buffers, whole, on the CPU of the main rank.

    Args:
        model: possibly partitioned by ZeRO-3; call on every rank.
        main: this rank keeps the result; others return {}.
    """
    state: dict[str, Tensor] = {}
    for chunk in _chunks(list(model.named_parameters())):
        with gathered([parameter for _, parameter in chunk]):
            if main:
                state.update({name: p.detach().cpu().clone() for name, p in chunk})
    if main:
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in persistent:
                state[name] = buffer.detach().cpu().clone()
    return state


def _chunks(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    chunk: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        count = getattr(parameter, "ds_numel", parameter.numel())
        if chunk and size + count > _GATHER_ELEMENTS:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, parameter))
        size += count
    if chunk:
        yield chunk


def gathered(parameters: list[nn.Parameter], *, written: bool = False) -> Any:
    """While this lasts, parameters that ZeRO-3 partitioned are whole; call on every rank.

    Args:
        parameters: some of them partitioned or none.
        written: keeps what is written into them, which has to be the same on every rank.
    """
    import deepspeed

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=0 if written else None, enabled=bool(partitioned)
    )
