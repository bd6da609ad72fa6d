"""AdamW for 16-bit weights that keeps fp32 copies, for a rank that holds all of them.

ZeRO makes one flat fp32 copy of the gradients at every step and a flat 16-bit one of the weights;
a rank that shares with nobody gains nothing from that. Here a step goes through the weights in
pieces of CHUNK elements, so nothing of their size is allocated (208 M weights of a 0.5B model on
one core: see bench/results/step.jsonl).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

CHUNK = 2**22  # elements
EPS = 1e-8
STATES = ("master", "exp_avg", "exp_avg_sq")


class MasterAdamW(torch.optim.Optimizer):
    """AdamW as torch's, on fp32 copies of the weights, with gradients multiplied by `factor`.

    State per parameter: `step` (), and `master`, `exp_avg`, `exp_avg_sq`, fp32, of its shape.

    Args:
        params: contiguous 16-bit weights.
        lr, betas, weight_decay: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.factor: Tensor | float = 1.0  # of clipping, for the next step

    def clip(self, largest: float) -> Tensor:
        """Has the next step scale the gradients to a norm of at most `largest`; their norm."""
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms = [g.norm(dtype=torch.float32) for g in gradients if g is not None]
        norm = torch.stack(norms).norm()
        self.factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        self.factor = 1.0

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["master"] = parameter.detach().float()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        assert parameter.grad is not None
        flat = [state[name].view(-1).split(CHUNK) for name in STATES]
        gradients = parameter.grad.reshape(-1).split(CHUNK)
        for own, grad, master, mean, square in zip(
            parameter.view(-1).split(CHUNK), gradients, *flat
        ):
            adamw(
                [master], [grad.float().mul_(self.factor)], [mean], [square], [],
                [state["step"].clone()], fused=True, amsgrad=False, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=EPS,
            )  # fmt: skip
            own.copy_(master)
        state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As it was at `state_dict`; torch's own would round the copies to the weights' dtype."""
        super().load_state_dict(state_dict)
        every = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, parameter in zip(numbers, every, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)
