"""What of a LoRA update acts on harmless text, taken out of it after the training.

Gradient descent has to find, from a few rows a step, an update that turns harmful prompts and does
nothing to all others. For one linear layer y = W x that question has an answer in closed form. Of
all updates D' the one that does on harmful inputs what the learned D does, and least on harmless
ones,

    D' = argmin  E_harmful |(D' - D) x|^2 + strength E_harmless |D' x|^2 + ridge |(D' - D) s|^2
       = D (C_harmful + R) (C_harmful + strength C_harmless + R)^-1,   C = E[x x^T],

is D behind a Wiener filter. With D = B A the filter goes into A, and the rank stays what it was.
R = ridge diag(C_harmful + C_harmless), each channel in its own units s, keeps the solution where
neither group has inputs, and D at strength 0. x are the inputs of the tuned model, over all tokens
of harmful prompts with their refusals (after an opening or without), and of harmless prompts with
their responses.

What an attack makes of the harmful inputs is not among them, and there the filtered update does
less: docs/real_models.md has a model that gives way under ablation only when filtered.

Every layer is filtered for itself, on the inputs that the unfiltered model gives it. Layers whose
inputs are wider than the residual stream (an MLP's down projection) are left as they are: their
moments would be the largest part of all.

Source: N. Wiener, 1949; the closed form of a weight edit that spares what other keys retrieve: Meng
et al., arXiv 2210.07229, eq. 14. On LoRA updates of a safety training it is ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from es2fast.config import Config
from es2fast.data import Formatter, Prompt, Refusal
from es2fast.distributed.runtime import Runtime, resolve_device, resolve_dtype
from es2fast.distributed.zero import gathered
from es2fast.modeling.load import load_causal_lm
from es2fast.modeling.taps import backbone, blocks, causal_lm, position_ids
from es2fast.progress import tqdm
from es2fast.training.plan import Plan, make_plan
from es2fast.training.prepare import own_refusals
from es2fast.training.refusals import AnchorTexts, RefusalAnchor
from es2fast.training.responses import fill_responses, trained_rows

RIDGE = 1e-3  # of a channel's own energy
ROWS = 256  # of each group at most
BATCH = 16  # rows per forward pass
MOMENT_BYTES = 4 << 30  # of moments held at a time: at most 2 groups x 4 bytes x H^2 per layer
ADAPTER = "default"  # peft's name of the one adapter

Row = list[int]


def filter_rows(
    plan: Plan, harmless: Sequence[Prompt], texts: AnchorTexts | None
) -> tuple[list[Row], list[Row]]:
    """Token ids of the two groups, at most `ROWS` of each, the same on every rank.

    Args:
        plan: the run.
        harmless: all harmless training prompts, with their responses.
        texts: what the refusal anchor says; None: harmful prompts stand alone.
    """
    config, formatter, harmful = plan.config, plan.formatter, plan.groups.harmful
    draw = random.Random(f"{config.train.seed}/filter")
    anchor = None if texts is None else RefusalAnchor(config, formatter, harmful, texts, harmless)
    rows = []
    for number, prompt in enumerate(harmful):
        row = formatter.prompt_ids(prompt)
        after = anchor.row(config.train.steps, number) if anchor else Refusal()
        rows.append([*row, *after.opening, *after.refusal])
    kept = [harmless[i] for i in trained_rows(config, harmless)]
    others = [
        [i for part in formatter.conversation_ids(p, p.response or "") for i in part] for p in kept
    ]
    return draw.sample(rows, min(ROWS, len(rows))), draw.sample(others, min(ROWS, len(others)))


@torch.no_grad()
def filter_update(
    student: nn.Module,
    formatter: Formatter,
    harmful: Sequence[Row],
    harmless: Sequence[Row],
    strength: float,
    runtime: Runtime,
) -> None:
    """Filters the update of every LoRA layer that reads the tokens of the stream, in place; call on
    every rank.

    Args:
        student: a model wrapped by peft, on its device, whole or partitioned by ZeRO-3.
        formatter: pads rows.
        harmful, harmless: token ids of whole rows.
        strength: weight of the harmless inputs, above 0.
        runtime: the ranks that share the forward passes.
    """
    training = student.training
    student.eval()
    filtered: list[tuple[nn.Parameter, Tensor]] = []
    for layers in _groups(student):
        title = f"update filter, {len(layers)} layers"
        moments = InputMoments(layers)
        with moments:
            for group, rows in (("harmful", harmful), ("harmless", harmless)):
                _forward(student, formatter, rows, group, moments, runtime, title)
        tokens = {"harmful": sum(map(len, harmful)), "harmless": sum(map(len, harmless))}
        for first, names in moments.shared().items():
            c, d = (runtime.sum(moments.sums.pop((first, g))) / tokens[g] for g in tokens)
            parts = [_factor(layers[name]) for name in names]
            with gathered(parts):
                made = wiener(torch.cat([a.detach() for a in parts]), c, d, strength)
                ranks = [a.shape[0] for a in parts]
            filtered += zip(parts, made.float().cpu().split(ranks))
    for a, values in filtered:  # last: the moments of every layer are those of the learned update
        with gathered([a], written=True):
            if a.numel():
                a.copy_(values)
    student.train(training)


def wiener(a: Tensor, harmful: Tensor, harmless: Tensor, strength: float) -> Tensor:
    """A (C_harmful + R) (C_harmful + strength C_harmless + R)^-1, in fp64.

    Args:
        a: (r, H) LoRA factor.
        harmful, harmless: (H, H) second moments of the layer's inputs.
        strength: weight of the harmless ones, at least 0.

    Returns:
        (r, H) fp64, on a's device.
    """
    c, d = harmful.double(), harmless.double()
    unit = (c + d).diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    c, d = c / unit / unit[:, None], d / unit / unit[:, None]
    ridge = RIDGE * torch.eye(len(unit), dtype=c.dtype, device=c.device)
    scaled = (c + ridge) @ (a.double() * unit).T
    return torch.linalg.solve(c + strength * d + ridge, scaled).T / unit


class InputMoments:
    """Sums of x x^T over the tokens that layers read, per group of rows; layers that read the same
    tensor share one. Hooks, while it is entered.

    A layer whose input is not (B, T, H), as that of a mixture's experts, is left out: on every rank
    alike.

    Args:
        layers: by name.
    """

    def __init__(self, layers: dict[str, nn.Module]):
        self._layers = layers
        self._same: dict[str, str] = {}  # layer -> the first that read the same tensor
        self.sums: dict[tuple[str, str], Tensor] = {}  # (that one, group) -> (H, H) fp32
        self._last: tuple[str, Tensor] | None = None
        self._handles: list[Any] = []
        self.group = ""
        self.mask = torch.zeros(0, 0, dtype=torch.bool)  # (B, T): tokens of this pass that count

    def __enter__(self) -> InputMoments:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _hook(self, name: str) -> Any:
        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if x.shape[:-1] != self.mask.shape:
                return
            if self._last is not None and self._last[1] is x:
                self._same[name] = self._last[0]
                return
            self._same[name] = name
            self._last = (name, x)
            rows = x[self.mask].float()
            total = rows.T @ rows
            key = (name, self.group)
            self.sums[key] = self.sums[key].add_(total) if key in self.sums else total

        return read

    def shared(self) -> dict[str, list[str]]:
        """The layers of each distinct input, by the first of them."""
        found: dict[str, list[str]] = {}
        for name, first in self._same.items():
            found.setdefault(first, []).append(name)
        return found


def _forward(
    student: nn.Module,
    formatter: Formatter,
    rows: Sequence[Row],
    group: str,
    moments: InputMoments,
    runtime: Runtime,
    title: str,
) -> None:
    """One pass over the rows of a group, shared among the ranks, equally many calls on each."""
    order = sorted(rows, key=len)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    rounds = -(-len(batches) // runtime.world_size)
    moments.group = group
    for i in tqdm(range(rounds), f"{title}, {group}", disable=not runtime.is_main, unit="batch"):
        number = i * runtime.world_size + runtime.rank
        padded = formatter.pad(batches[number % len(batches)])
        mask = padded["attention_mask"].to(runtime.device)
        moments.mask = mask.bool() & (number < len(batches))  # a repeated batch does not count
        backbone(student)(
            input_ids=padded["input_ids"].to(runtime.device),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
        )


def _groups(student: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The LoRA layers that are filtered, as many blocks at a time as `MOMENT_BYTES` hold."""
    width = causal_lm(student).config.get_text_config().hidden_size
    part: dict[str, nn.Module] = {}
    for number, block in enumerate(blocks(student)):
        own = {
            f"{number}.{name}": module
            for name, module in block.named_modules()
            if ADAPTER in getattr(module, "lora_A", {}) and module.in_features <= width
        }
        if part and 8 * width**2 * (len(part) + len(own)) > MOMENT_BYTES:
            yield part
            part = {}
        part |= own
    if part:
        yield part


def _factor(layer: Any) -> nn.Parameter:
    """A of a LoRA layer, (r, H)."""
    found: nn.Parameter = layer.lora_A[ADAPTER].weight
    return found


def filter_adapter(config: Config, folder: Path, strength: float) -> None:
    """Filters the update of a LoRA adapter on disk, in place, on one process.

    Args:
        config: the run that trained it: its prompts are read again, and its base model writes what
            is not cached of the responses.
        folder: of the adapter.
        strength: see `filter_update`.

    Raises:
        UserError: the run's prompts or base model are gone; no layer of it is filtered.
    """
    from peft import PeftModel

    device = torch.device(resolve_device(config.train.device))
    dtype = resolve_dtype(config.model.dtype, device.type)
    runtime = Runtime(rank=0, world_size=1, device=device, dtype=dtype)
    with TemporaryDirectory() as elsewhere:  # the run's own folder is taken
        plan = make_plan(_alone(config, elsewhere))
    base: Any = load_causal_lm(config.model, dtype).to(device).eval()
    harmless, texts = fill_responses(plan, base, runtime), own_refusals(plan, base, runtime)
    student = PeftModel.from_pretrained(base, str(folder))
    filter_update(student, plan.formatter, *filter_rows(plan, harmless, texts), strength, runtime)
    path = folder / "adapter_model.safetensors"
    tensors, now = load_file(path), dict(student.named_parameters())
    for name, tensor in tensors.items():
        if "lora_A" in name:
            found = now[f"{name.removesuffix('.weight')}.{ADAPTER}.weight"]
            tensors[name] = found.detach().to("cpu", tensor.dtype).contiguous()
    save_file(tensors, path)


def _alone(config: Config, folder: str) -> Config:
    """A run as one process can plan it, whatever it was trained on."""
    changes = {"zero3_head": "gathered", "compile": False, "global_batch_size": None,
               "report_to": [], "update_filter": 1.0}  # fmt: skip
    train = config.train.model_copy(update=changes)
    return config.model_copy(
        update={"train": train, "deepspeed": "zero0", "output_dir": folder}, deep=True
    )
