"""AdamW for 16-bit weights that keeps fp32 copies, for a rank that holds all of them.

ZeRO makes one flat fp32 copy of the gradients at every step and a flat 16-bit one of the weights;
a rank that shares with nobody gains nothing from that. Here a step goes through the weights in
pieces of CHUNK elements, so on a CPU nothing of their size is allocated (208 M weights of a 0.5B
model on one core: see bench/results/step.jsonl). On a GPU, where launching each piece takes the
host longer than the GPU needs for it, groups of TOGETHER elements are one update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

CHUNK = 2**22  # elements
TOGETHER = 2**27  # elements of a group on a GPU, for which 512 MB of fp32 gradients are made
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
        every = [p.grad for group in self.param_groups for p in group["params"]]
        gradients = [g for g in every if g is not None]
        if gradients[0].is_cuda:
            norms = list(torch._foreach_norm(gradients, dtype=torch.float32))
        else:
            norms = [g.norm(dtype=torch.float32) for g in gradients]
        norm = torch.stack(norms).norm()
        self.factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            changed = [p for p in group["params"] if p.grad is not None]
            for some in _groups([p for p in changed if _at_once(p)]):
                self._update_together(some, group)
            for parameter in changed:
                if not _at_once(parameter):
                    self._update(parameter, group)
        self.factor = 1.0

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["master"] = parameter.detach().float()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        return state

    def _update_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """All of them at once, in a few kernels."""
        states = [self._state(p) for p in parameters]
        masters, means, squares = ([state[name] for state in states] for name in STATES)
        gradients = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(gradients, [p.grad for p in parameters if p.grad is not None])
        torch._foreach_mul_(gradients, self.factor)
        adamw(
            masters, gradients, means, squares, [], [state["step"] for state in states],
            **_options(group),
        )  # fmt: skip
        torch._foreach_copy_(parameters, masters)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self._state(parameter)
        assert parameter.grad is not None
        flat = [state[name].view(-1).split(CHUNK) for name in STATES]
        gradients = parameter.grad.reshape(-1).split(CHUNK)
        for own, grad, master, mean, square in zip(
            parameter.view(-1).split(CHUNK), gradients, *flat
        ):
            adamw(
                [master], [grad.float().mul_(self.factor)], [mean], [square], [],
                [state["step"].clone()], **_options(group),
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


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What torch's update takes beside tensors."""
    beta1, beta2 = group["betas"]
    return {"fused": True, "amsgrad": False, "maximize": False, "beta1": beta1, "beta2": beta2,
            "lr": group["lr"], "weight_decay": group["weight_decay"], "eps": EPS}  # fmt: skip


def _at_once(parameter: Tensor) -> bool:
    """With others, and not in pieces."""
    return parameter.is_cuda and parameter.numel() <= TOGETHER


def _groups(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one precision each, and of TOGETHER elements at most."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        some: list[Tensor] = []
        elements = 0
        for parameter in parameters:
            if parameter.dtype != dtype:
                continue
            if some and elements + parameter.numel() > TOGETHER:
                yield some
                some, elements = [], 0
            some.append(parameter)
            elements += parameter.numel()
        if some:
            yield some
