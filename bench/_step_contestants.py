"""Who takes part in bench/step.py. Each runs in a process of its own and is asked for one step
after another.

`Plain` is what one writes with transformers and torch alone: a second model as the teacher,
`output_hidden_states`, full logits, `torch.cdist`, `torch.nn.functional.kl_div`, AdamW on fp32
weights (copies where the model is in bf16). Its groups are padded apart, on the right, so it pays
for less padding than one batch of both would. It shares no code with the package but the rows'
ids. `Liger` is the same with Liger's fused linear JSD at beta 0, KL(base || tuned), on hidden
states. `Ours` are the package's own engine and step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._step_workload import ALPHA, KL_WEIGHT, LR, MARGIN, RANK, SEED

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Rows = tuple[list[list[int]], list[tuple[list[int], list[int]]]]  # harmful ids; prompt, response


class Plain:
    """A loop of two models in plain transformers.

    Args:
        name: the model's folder.
        trainable: "lora" and "blocks" up to the deepest layer, "all".
        layers: separated blocks, ascending.
        d0: the margin's unit per layer.
        pad: token id.
    """

    def __init__(
        self, name: str, *, dtype: str, device: str, trainable: str, layers: Sequence[int],
        d0: dict[int, float], pad: int,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM

        self.layers, self.d0, self.pad, self.device = layers, d0, pad, device

        def load() -> Any:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
            return model.to(device)

        self.student, self.teacher = load(), load().requires_grad_(False).eval()
        self.weights_bytes = sum(p.nbytes for p in self.teacher.parameters())
        self.student = self._trainable(self.student, trainable).train()
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.masters = self.trained
        if dtype != "fp32":
            self.masters = [p.detach().float().clone() for p in self.trained]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=LR, weight_decay=0.0, fused=device == "cuda"
        )

    def _trainable(self, model: Any, kind: str) -> Any:
        if kind == "all":
            return model
        if kind == "blocks":
            model.requires_grad_(False)
            model.model.layers[: self.layers[-1] + 1].requires_grad_(True)
            return model
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        first = [
            f"model.layers.{i}.{path}"
            for i in range(self.layers[-1] + 1)
            for path, module in model.model.layers[i].named_modules()
            if isinstance(module, nn.Linear)
        ]
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=first)
        return get_peft_model(model, lora, autocast_adapter_dtype=False)  # of ours' precision

    def step(self, rows: Rows) -> dict[str, float]:
        """One optimizer step; its separation and KL."""
        harmful = self._batch(rows[0])
        harmless = self._batch([prompt + response for prompt, response in rows[1]])
        ends = [len(ids) - 1 for ids in rows[0]], [len(prompt) - 1 for prompt, _ in rows[1]]
        found = self._forward(self.student, **harmful)
        other = self._forward(self.student, **harmless)
        sep = torch.zeros((), device=self.device)
        for layer in self.layers:
            a, b = (
                out.hidden_states[layer + 1][range(len(last)), last].float()
                for out, last in zip((found, other), ends)
            )
            d0 = self.d0[layer]
            sep = sep + F.relu(MARGIN - torch.cdist(a, b) / d0).mean()
        kl = self._kl(other, harmless)
        (sep + KL_WEIGHT * kl).backward()
        self._update()
        return {"sep": sep.item(), "kl": kl.item()}

    def _forward(self, model: Any, **inputs: Tensor) -> Any:
        return model(**inputs, output_hidden_states=True, use_cache=False)

    def _kl(self, student: Any, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = self.teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)
        own = student.logits.float().log_softmax(-1)
        rows = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
        return rows[inputs["attention_mask"].bool()].mean()

    def _batch(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _update(self) -> None:
        if self.masters is not self.trained:
            for master, p in zip(self.masters, self.trained):
                assert p.grad is not None
                master.grad, p.grad = p.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.trained:
            with torch.no_grad():
                for master, p in zip(self.masters, self.trained):
                    p.copy_(master)


class Liger(Plain):
    """`Plain` without full logits in the KL.

    Raises:
        ImportError: Liger is not installed.
    """

    def __init__(self, name: str, **options: Any):
        from liger_kernel.transformers import LigerFusedLinearJSD

        super().__init__(name, **options)
        self.fused = LigerFusedLinearJSD(jsd_beta=0.0)

    def _forward(self, model: Any, **inputs: Tensor) -> Any:
        return super()._forward(model, logits_to_keep=1, **inputs)  # type: ignore[arg-type]

    def _kl(self, student: Any, inputs: dict[str, Tensor]) -> Tensor:
        counted = inputs["attention_mask"].bool()
        with torch.no_grad():
            target = self.teacher.model(**inputs, use_cache=False).last_hidden_state[counted]
        hidden = student.hidden_states[-1][counted]
        own, base = (m.get_output_embeddings().weight for m in (self.student, self.teacher))
        return self.fused(hidden, own, target, base, None)


class Ours:
    """The package's engine.

    Args:
        raw: the configuration, see `_step_workload.configuration`.
        d0, norm0: per layer.
        off: part of the package to leave out: "early_exit", "fused_kl".
    """

    def __init__(
        self, raw: dict[str, Any], d0: dict[int, float], norm0: dict[int, float], off: str = ""
    ):
        from es2fast.config import parse_config
        from es2fast.distributed import runtime as runtimes
        from es2fast.training.engine import build_engine
        from es2fast.training.feed import Feed
        from es2fast.training.plan import make_plan
        from es2fast.training.prepare import Prepared, cached_teacher

        if off == "fused_kl":
            from es2fast.modeling import head

            head.linear_kl_div = eager_kl  # type: ignore[assignment]
        config = parse_config(raw)
        self.runtime = runtimes.start(config)
        plan = make_plan(config)
        prepared = Prepared(list(d0), d0, norm0, "given")
        harmless = plan.groups.harmless
        prepared.teacher = cached_teacher(plan, harmless, self.runtime)
        self.engine = build_engine(plan, prepared, self.runtime)
        self.feed = Feed(plan, harmless, 0, None, prepared.teacher)
        self.stage = plan.zero_stage
        student = self.engine.module.student
        self.weights_bytes = sum(p.nbytes for n, p in student.named_parameters() if "lora" not in n)
        if off == "early_exit":
            taps = self.engine.module.taps
            taps.arm = keeping(taps.arm)

    def step(self, index: int) -> dict[str, float]:
        """Optimizer step `index`; its separation and KL."""
        from es2fast.training.step import step_inputs, train_step

        inputs = step_inputs(self.engine, self.feed(index), self.runtime.device)
        sums = train_step(self.engine, inputs, KL_WEIGHT, self.runtime)[0].wait()
        return {"sep": sums["sep"], "kl": sums["kl_sum"] / sums["kl_tokens"]}

    def flop(self, index: int, gemms: int) -> float:
        """Of optimizer step `index`: what torch counts, and the head's products, which it does not
        see in a fused kernel: `gemms` of 2 N H V.

        Args:
            gemms: either side's logits, dX and dW, as far as they are computed.
        """
        from torch.utils.flop_counter import FlopCounterMode

        objective, tokens = self.engine.module, []  # what rows begin with is in the head once
        handle = objective.lm_head.register_forward_pre_hook(
            lambda module, given: tokens.append(len(given[0]))
        )
        plain = torch.compiler.set_stance("force_eager")  # compiled code is not seen into
        with plain, FlopCounterMode(display=False) as counter:
            self.step(index)
        handle.remove()
        config = objective.student.config
        head = 2 * sum(tokens) * config.hidden_size * config.vocab_size
        return counter.get_total_flops() + gemms * head


def keeping(arm: Callable[..., None]) -> Callable[..., None]:
    """`SeparationTaps.arm` that lets harmful rows run to the end."""

    @functools.wraps(arm)
    def armed(*args: Any, **options: Any) -> None:
        arm(*args, **(options | {"keep": True}))

    return armed


def eager_kl(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor | None,
    *, token_weights: Tensor, **options: Any,
) -> Tensor:  # fmt: skip
    """KL(base || tuned), summed, on full logits."""
    own = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        head = weight if teacher_weight is None else teacher_weight
        target = F.linear(teacher.to(hidden.dtype), head).float().log_softmax(-1)
    rows = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
    return (token_weights * rows).sum()
