"""Who takes part in bench/linear_kl.py, on which inputs, and whether what they compute is right.

Every contestant's value and gradients are compared with the float64 definition before it is timed
(:func:`check`): far from the teacher, where a swapped direction, teacher or head would show and the
rounding of a peer's logits would not; and near it, at a KL of 2e-3, where the difference between
implementations lies. Peers are called as their documentation says. What a peer computes whether or
not the mode asks for it is part of its time, and said in its rows' ``note``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from es2fast import half_head, linear_kl_div, moment_kl_div, teacher_moments
from es2fast.ops.reference import linear_kl_div_reference

CHECK_SHAPE = (64, 128, 1003)
FAR, NEAR = 1.0, 0.022  # standard deviation of the perturbation; KL about 5 and 2e-3
WRONG = 0.1  # relative error of the value from which on a contestant is not timed


@dataclass
class Inputs:
    """One shape's tensors; student and teacher have heads of their own."""

    x: Tensor  # (N, H)
    w: Tensor  # (V, H)
    x_t: Tensor  # (N, H)
    w_t: Tensor  # (V, H)
    mode: str

    def clear(self) -> None:
        """Frees the gradients of the last call."""
        self.x.grad = self.w.grad = None

    def step(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The measured call: loss, and backward unless the mode is no-grad."""

        def call() -> Tensor:
            self.clear()
            if self.mode == "no-grad":
                with torch.no_grad():
                    return loss()
            value = loss()
            value.backward()
            return value

        return call


def make_inputs(
    shape: tuple[int, int, int],
    mode: str,
    device: str,
    distance: float = 0.05,
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """The one set-up for time, memory and correctness of everyone: a student near its teacher."""
    n, h, v = shape
    gen = torch.Generator(device=device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device, dtype=dtype)

    spread = 2.0 / h**0.5
    x_t, w_t = randn(n, h), randn(v, h).mul_(spread)
    x = x_t + distance * randn(n, h)
    w = randn(v, h).mul_(distance * spread).add_(w_t)
    return Inputs(
        x.requires_grad_(mode != "no-grad"), w.requires_grad_(mode == "trainable"), x_t, w_t, mode
    )


@dataclass(frozen=True)
class Contestant:
    """``loss`` makes the function under test; it may raise, for instance ImportError."""

    name: str
    direction: str  # of the divergence it computes: the mean over tokens, beta = 0.5 for "jsd"
    loss: Callable[[Inputs], Callable[[], Tensor]]
    package: str | None = None
    note: str | None = None

    @property
    def version(self) -> str | None:
        """Of its package; None where it has none, or it is not installed."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def absent(self) -> bool:
        """Its package is not installed."""
        return self.package is not None and self.version is None

    def about(self) -> dict[str, Any]:
        """What stands in its rows."""
        version = "not installed" if self.absent else self.version
        row = dict(name=self.name, direction=self.direction, peer=self.package)
        return row | dict(peer_version=version, note=self.note)


def _ours(direction: str, **options: Any) -> Callable[[Inputs], Callable[[], Tensor]]:
    return lambda i: lambda: linear_kl_div(i.x, i.w, i.x_t, i.w_t, direction=direction, **options)


def eager_loss(i: Inputs) -> Callable[[], Tensor]:
    """Plain torch on float32 logits: what everybody writes first."""

    def loss() -> Tensor:
        log_s = torch.log_softmax((i.x @ i.w.t()).float(), -1)
        with torch.no_grad():
            log_t = torch.log_softmax((i.x_t @ i.w_t.t()).float(), -1)
        return torch.nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    return loss


def _compiled_loss(i: Inputs) -> Callable[[], Tensor]:
    return torch.compile(eager_loss(i))


def _liger_fused(beta: float, accum_dtype: torch.dtype | None = None) -> Callable:
    def make(i: Inputs) -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearJSD

        module = LigerFusedLinearJSD(jsd_beta=beta, accum_dtype=accum_dtype)
        return lambda: module(i.x, i.w, i.x_t, i.w_t, None)

    return make


def _liger_chunked(beta: float) -> Callable:
    def make(i: Inputs) -> Callable[[], Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
        labels = torch.zeros(i.x.shape[0], dtype=torch.long, device=i.x.device)
        return lambda: module(i.x, i.w, i.x_t, i.w_t, labels)

    return make


def _fla(i: Inputs) -> Callable[[], Tensor]:
    from fla.modules import FusedKLDivLoss

    module = FusedKLDivLoss()  # takes both hidden states first, then both heads
    return lambda: module(i.x, i.x_t, i.w, i.w_t)


def moments_loss(backend: str | None = None, half: bool = False) -> Callable:
    """Against a teacher reduced to moments before the timed call."""

    def make(i: Inputs) -> Callable[[], Tensor]:
        head = half_head(i.w).weight if half else i.w
        moments = teacher_moments(i.x_t, i.w_t, head)
        return lambda: moment_kl_div(i.x, head, moments, backend=backend)

    return make


def _moment_contestants(device: str) -> Iterator[Contestant]:
    """Nobody else has this mode."""
    yield Contestant("es2fast moments", "forward", moments_loss())
    yield Contestant("es2fast moments, fp16 head", "forward", moments_loss(half=True))
    if device == "cuda":
        yield Contestant("es2fast moments, torch backend", "forward", moments_loss("torch"))


def contestants(mode: str, device: str) -> Iterator[Contestant]:
    """Everyone who takes part in a mode."""
    if mode == "moments":
        yield from _moment_contestants(device)
        return
    for direction in ("forward", "reverse", "jsd"):
        yield Contestant(f"es2fast {direction}", direction, _ours(direction))
    if mode == "no-grad":  # the tile-fused kernel, beside chunks
        yield Contestant(
            "es2fast forward, low memory", "forward", _ours("forward", low_memory=True)
        )
    if mode == "trainable":  # beside one GEMM for all
        per_chunk = _ours("forward", grad_buffer_bytes=0)
        yield Contestant("es2fast forward, dW per chunk", "forward", per_chunk)
    if device == "cuda":
        yield Contestant(
            "es2fast forward, torch backend", "forward", _ours("forward", backend="torch")
        )
    yield Contestant("torch eager", "forward", eager_loss)
    yield Contestant("torch.compile", "forward", _compiled_loss)
    liger, anyway = "liger-kernel", None
    if mode == "no-grad":
        anyway = "computes dX anyway"
    # Liger's beta: 0 is KL(t||s), 0.5 the symmetric JSD
    for beta, direction in ((0.5, "jsd"), (0.0, "forward")):
        name = f"Liger fused_linear_jsd {direction}"
        yield Contestant(name, direction, _liger_fused(beta), liger, anyway)
    if mode == "trainable":
        wide = _liger_fused(0.5, torch.float32)
        yield Contestant("Liger fused_linear_jsd jsd, float32 dW", "jsd", wide, liger)
    anyway = {"frozen": "computes dW anyway", "no-grad": "computes dX and dW anyway"}.get(mode)
    for beta, direction in ((0.5, "jsd"), (0.0, "forward")):
        name = f"Liger chunked {direction}"
        yield Contestant(name, direction, _liger_chunked(beta), liger, anyway)
    fla = "flash-linear-attention"
    yield Contestant(f"{fla} fused_kl_div", "forward", _fla, fla)


def check(contestant: Contestant, mode: str, device: str) -> dict[str, Any]:
    """Relative errors against the float64 definition, or {error} when it is wrong or cannot run.

    ``value_error``, ``dx_error``, ``dw_error`` far from the teacher; ``near_dx_error`` at KL 2e-3.
    """
    try:
        row = _errors(contestant, mode, device, FAR)
        if mode != "no-grad":
            row["near_dx_error"] = _errors(contestant, mode, device, NEAR)["dx_error"]
    except ImportError as error:
        return dict(error=f"not installed: {error}"[:300])
    except Exception as error:  # a peer's failure is a row, not the end of the run
        first = str(error).splitlines()[0] if str(error) else ""
        return dict(error=f"{type(error).__name__}: {first}"[:300])
    if not row["value_error"] < WRONG:
        row["error"] = f"wrong value: {row['value_error']:.0%} from {contestant.direction} KL"
    return row


def _errors(contestant: Contestant, mode: str, device: str, distance: float) -> dict[str, Any]:
    i = make_inputs(CHECK_SHAPE, mode, device, distance)
    value = i.step(contestant.loss(i))()
    x, w = (t.detach().cpu().double().requires_grad_(t.requires_grad) for t in (i.x, i.w))
    x_t, w_t = i.x_t.cpu().double(), i.w_t.cpu().double()
    expected = linear_kl_div_reference(x, w, x_t, w_t, direction=contestant.direction)
    row: dict[str, Any] = dict(value_error=_relative(value, expected))
    if mode != "no-grad":
        expected.backward()
        row["dx_error"] = _relative(i.x.grad, x.grad)
    if mode == "trainable":
        row["dw_error"] = _relative(i.w.grad, w.grad)
    return row


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None, "a gradient was not made"
    error = found.detach().cpu().double() - expected.detach()
    return float(error.norm() / expected.detach().norm())
