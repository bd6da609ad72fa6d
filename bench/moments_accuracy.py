"""How accurate is the gradient of the teacher moments next to the teacher, and what buys accuracy?

    python bench/moments_accuracy.py                    # random heads: flat, middle, peaked
    python bench/moments_accuracy.py --toy build/toy-0  # and the toy's tokens (built if absent)

Relative L2 error of dX over all tokens against float64 on the rounded inputs, before dX itself is
rounded to bfloat16 (that costs everyone 1.7e-3). A GPU's 16-bit GEMM is imitated: G and W rounded,
products in float32. Variants: ``direct`` (bf16 G of p_s - p_t, the three-GEMM path), the moments
with K anchors and a bf16 or fp16 head, anchors chosen per token (``adaptive``: the fewest, up to
256, that hold 99 % of sum p^2, which is what the noise goes with), and two single-GEMM epilogues
E = exp(z_s - offset): the teacher's logsumexp A_t as offset, and A_t + m_t.(h_s - h_t).
One JSON row per measurement goes to results/moments_accuracy.jsonl; ``--table`` prints the rows of
a file as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench._harness import Rows, conditions
from es2fast import TeacherMoments, half_head, teacher_moments
from es2fast.ops.moments.chunked import MomentProblem, rounded_row_pass, run_moments

TARGETS = (3e-2, 2e-3, 2e-4, 2e-6)  # nats
SPREADS = {"flat": 0.5, "middle": 2.0, "peaked": 5.0}  # standard deviation of the logits
ANCHORS = (0, 16, 64, 256)
BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """A student near a teacher; states and head hold bfloat16 values."""

    name: str
    x: Tensor  # (N, H)
    x_t: Tensor  # (N, H)
    w: Tensor  # (V, H)

    def oracle(self) -> Truth:
        """Everything in float64 by the definition."""
        w = self.w.double()
        log_t = torch.log_softmax(self.x_t.double() @ w.t(), -1)
        log_s = torch.log_softmax(self.x.double() @ w.t(), -1)
        p_t = log_t.exp()
        values = (p_t * (log_t - log_s)).sum(-1)
        mass = p_t.topk(min(16, p_t.shape[1]), -1).values.sum(1)
        return Truth(values, float(values.mean()), (log_s.exp() - p_t) @ w, float(mass.mean()))


@dataclass(frozen=True)
class Truth:
    """The float64 oracle of a case."""

    values: Tensor  # (N,) KL per token
    kl: float  # their mean
    dx: Tensor  # (N, H) gradient of their sum
    mass: float  # of 16 anchors, mean


# --- cases ----------------------------------------------------------------------------------------


def random_case(name: str, target: float, n: int, h: int, v: int) -> Case:
    """Gaussian head and states; the student's distance is fitted to the KL wanted."""
    gen = torch.Generator().manual_seed(0)
    w = (torch.randn(v, h, generator=gen) * (SPREADS[name] / h**0.5)).to(BF16)
    x_t, noise = (torch.randn(n, h, generator=gen) for _ in range(2))
    distance = (2 * target) ** 0.5 / SPREADS[name]
    for _ in range(4):
        case = Case(name, (x_t.to(BF16).float() + distance * noise).to(BF16), x_t.to(BF16), w)
        kl = case.oracle().kl
        if 0.8 < kl / target < 1.25:
            break
        distance *= (target / kl) ** 0.5
    return case


def toy_cases(folder: Path, tokens: int = 256) -> Iterator[Case]:
    """The toy's own tokens: perturbed states, and states after real steps of separation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from es2fast.demo.toy import build_toy

    build_toy(folder, seed=0, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [[_chat(tokenizer, row) for row in _rows(folder, g)] for g in ("harmful", "harmless")]
    w = model.lm_head.weight.detach().to(BF16)

    def states(m: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            parts = [m.model(ids).last_hidden_state[0] for ids in texts[1]]
        return torch.cat(parts)[:tokens]

    x_t = states(model)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    for target in TARGETS:
        distance = target**0.5
        for _ in range(6):
            case = Case("toy, perturbed", (x_t + distance * noise).to(BF16), x_t.to(BF16), w)
            kl = case.oracle().kl
            distance *= (target / kl) ** 0.5 if not 0.8 < kl / target < 1.25 else 1.0
        yield case
    tuned = copy.deepcopy(model)
    for step in _separation_steps(tuned, texts, steps=10):
        if step % 3 == 0:  # KL 5e-6, 3e-4, 4e-3, 6e-2
            yield Case("toy, tuned", states(tuned).to(BF16), x_t.to(BF16), w)


def _rows(folder: Path, group: str, count: int = 16) -> list[dict[str, str]]:
    lines = (folder / "data" / f"eval_{group}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def _chat(tokenizer: object, row: dict[str, str]) -> Tensor:
    """(1, T) a request and its answer."""
    turns = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)  # type: ignore[attr-defined]
    text += row["response"] + "<|end|>"
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])  # type: ignore[attr-defined]


def _separation_steps(model: torch.nn.Module, texts: list[list[Tensor]], steps: int) -> Iterator:
    """Plain steps that push the groups' mean states after block 4 apart, growing in size."""
    blocks = [p for n, p in model.named_parameters() if ".layers." in n]
    for step in range(steps):
        means = [
            torch.stack([model.model(t, output_hidden_states=True).hidden_states[4][0, -1]
                         for t in group[:8]]).mean(0)
            for group in texts
        ]  # fmt: skip
        gradients = torch.autograd.grad(-(means[0] - means[1]).norm(), blocks, allow_unused=True)
        size = 1e-3 * 1.6**step / sum(g.norm() ** 2 for g in gradients if g is not None) ** 0.5
        with torch.no_grad():
            for parameter, gradient in zip(blocks, gradients, strict=True):
                if gradient is not None:
                    parameter -= size * gradient
        yield step


# --- variants -------------------------------------------------------------------------------------


def moments_gradient(case: Case, m: TeacherMoments, w: Tensor) -> tuple[Tensor, Tensor]:
    """(dX in float32, KL per token) of the loss with a GPU's rounding."""
    n = case.x.shape[0]
    rows, dx = run_moments(
        MomentProblem(
            hidden=case.x.float(),
            weight=w,
            bias=None,
            tail_moment=m.tail_moment,
            top_ids=m.top_ids,
            top_probs=m.top_probs,
            tail_sums=m.tail_sums,
            index=None,
            scale=torch.ones(n),
            gain=1.0,
            chunk_tokens=n,
            need_dx=True,
        ),
        rounded_row_pass,
    )
    assert dx is not None
    return dx, rows


def direct_gradient(case: Case) -> Tensor:
    """The three-GEMM path: G = p_s - p_t in float32, rounded to bfloat16."""
    w = case.w.float()
    z_t, z_s = case.x_t.float() @ w.t(), case.x.float() @ w.t()
    g = torch.softmax(z_s, -1) - torch.softmax(z_t, -1)
    return g.to(BF16).float() @ w


def adaptive(m: TeacherMoments, w: Tensor, share: float = 0.99) -> tuple[TeacherMoments, float]:
    """(each token's fewest anchors that hold ``share`` of the sum of p^2, their mean number)."""
    squares = m.top_probs.double() ** 2
    below = squares.cumsum(1) - squares  # without the anchor itself
    keep = below < share * squares.sum(1, keepdim=True)
    dropped = torch.where(keep, 0.0, m.top_probs)
    rows = w.float()[m.top_ids.long()]
    sums = m.tail_sums.clone()
    sums[:, 0] += dropped.double().sum(1)
    sums[:, 2] += torch.xlogy(dropped.double(), dropped.double()).sum(1)
    tail = m.tail_moment + torch.einsum("nk,nkh->nh", dropped, rows)
    kept = replace(
        m, tail_moment=tail, tail_sums=sums, top_probs=torch.where(keep, m.top_probs, 0.0)
    )
    return kept, float(keep.double().sum(1).mean())


def epilogue_gradient(
    case: Case, m: TeacherMoments, w: Tensor, moment_offset: bool
) -> tuple[Tensor, Tensor]:
    """One GEMM with an exp epilogue: (dX, KL per token).

    E = exp(z_s - o) needs no maximum and no logits in memory; its float32 row sum is S = e^(A_s-o).
    p_t is subtracted at the anchors before rounding, unscaled, since A_s is not known yet:

        dX = (1/S) W^T (E - p_t at the anchors) + (1/S - 1) W^T p_top - m_tail

    With o = A_t + m_t.(h_s - h_t) the offset is the first-order expansion of A at h_t, so that
    A_s - o is the KL itself: S = e^KL, no overflow below KL 88, and log S is the value.
    """
    wide, index = w.float(), m.top_ids.long()
    z_t, z_s = case.x_t.float() @ wide.t(), case.x.float() @ wide.t()
    offset = torch.logsumexp(z_t, -1)
    top_moment = torch.einsum("nk,nkh->nh", m.top_probs, wide[index])
    first_order = ((m.tail_moment + top_moment).double() * (case.x.double() - case.x_t)).sum(1)
    if moment_offset:
        offset = (offset.double() + first_order).float()
    e = torch.exp(z_s - offset[:, None])
    total = e.sum(1, dtype=torch.float64)
    unit = 2.0**13 if w.dtype == FP16 else 1.0
    g = e.scatter_add_(1, index, -m.top_probs).mul_(unit).to(w.dtype).float()
    dx = (g @ wide).div_(unit).double() / total[:, None]
    dx += (1.0 / total - 1.0)[:, None] * top_moment.double() - m.tail_moment
    kl = total.log() if moment_offset else total.log() - first_order
    return dx, kl


def variants(case: Case) -> Iterator[tuple[str, Tensor, Tensor | None, float]]:
    """(name, dX, KL per token or None, mean number of anchors)."""
    half = half_head(case.w).weight
    yield "direct bf16", direct_gradient(case), None, 0
    for k in ANCHORS:
        if k > case.w.shape[0]:
            continue
        for name, w in (("bf16", case.w), ("fp16", half)):
            m = teacher_moments(case.x_t, w, top_k=k)
            yield f"{k} anchors {name}", *moments_gradient(case, m, w), k
    m = teacher_moments(case.x_t, case.w, top_k=min(256, case.w.shape[0]))
    fewer, count = adaptive(m, case.w)
    yield "adaptive bf16", *moments_gradient(case, fewer, case.w), count
    for name, w in (("bf16", case.w), ("fp16", half)):
        m = teacher_moments(case.x_t, w, top_k=16)
        yield f"epilogue A_t, 16 anchors {name}", *epilogue_gradient(case, m, w, False), 16
        yield f"epilogue A_t + m_t.dh, 16 anchors {name}", *epilogue_gradient(case, m, w, True), 16


# --- command line ---------------------------------------------------------------------------------


def _largest(error: Tensor) -> float:
    return float(error.abs().max())


def measure_case(rows: Rows, case: Case) -> None:
    """Every variant on one case."""
    truth = case.oracle()
    (n, h), v = case.x.shape, case.w.shape[0]
    for name, got, value, k in variants(case):
        finite = bool(got.isfinite().all())
        error = float((got.double() - truth.dx).norm() / truth.dx.norm()) if finite else None
        rows.add(
            op="moments_accuracy",
            case=case.name,
            variant=name,
            n=n,
            h=h,
            v=v,
            kl=truth.kl,
            mass_16=truth.mass,
            anchors=k,
            dx_error=error,
            value_error=None if value is None else _largest(value.double() - truth.values),
            error=None if finite else "overflow",
        )


def table(path: Path) -> str:
    """Rows of a results file as Markdown: variants down, cases across."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    cases = list(dict.fromkeys((r["case"], r["kl"], r["mass_16"]) for r in found))
    names = list(dict.fromkeys(r["variant"] for r in found))
    errors = {(r["variant"], r["case"], r["kl"]): r["error"] or r["dx_error"] for r in found}
    lines = ["| variant | " + " | ".join(f"{c}, KL {k:.1g}" for c, k, _ in cases) + " |"]
    lines.append("|---|" + "---|" * len(cases))
    lines.append("| *mass of 16 anchors* | " + " | ".join(f"{m:.2f}" for *_, m in cases) + " |")
    for name in names:
        cells = [errors.get((name, case, kl)) for case, kl, _ in cases]
        texts = [f"{100 * e:.2g} %" if isinstance(e, float) else e or "" for e in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"))
    parser.add_argument("--toy", type=Path, help="folder of the toy model")
    parser.add_argument("--case", choices=SPREADS, nargs="*", default=list(SPREADS))
    parser.add_argument("--table", action="store_true", help="print the table of --out and stop")
    default = Path(__file__).parent / "results" / "moments_accuracy.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    rows = Rows(args.out, conditions("cpu"))
    n, h, v = args.shape or (8, 1024, 32768)
    for name in args.case:
        for target in TARGETS:
            measure_case(rows, random_case(name, target, n, h, v))
    if args.toy:
        for case in toy_cases(args.toy):
            measure_case(rows, case)


if __name__ == "__main__":
    main()
