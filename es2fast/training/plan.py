"""Everything that can be checked before a run costs anything, and what the run is then made of.

`es2fast validate` prints a plan's lines; a training run uses the same object, so every source is
read once per process and nothing is trained on that was not checked.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch

from es2fast.attacks.registry import make_attacks
from es2fast.config import Config
from es2fast.data import Formatter, PairedSampler, Prompt, PromptGroups, load_groups
from es2fast.data.checks import prompt_lengths
from es2fast.distributed.deepspeed_config import AUTO, build_deepspeed
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.judges.registry import judges_of, make_judges
from es2fast.modeling.compiled import check_stage
from es2fast.modeling.head import read_transform
from es2fast.modeling.load import check_weights, load_model_config, load_tokenizer
from es2fast.modeling.skeleton import (
    check_lora_targets,
    check_positions,
    check_weight_files,
    make_skeleton,
)
from es2fast.modeling.taps import check_layers
from es2fast.modeling.teacher import resolve_teacher
from es2fast.ops.native import GEMM_BF16
from es2fast.run.claim import check_claim
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import check_trackers
from es2fast.training.head_exchange import HeadExchange, check_head, choose_head
from es2fast.training.refusals import anchor_line, check_refusals
from es2fast.training.stage import choose_stage

# Where a step in bfloat16 was seen to be faster than in fp32 (AMX: not seen, it comes on top).
BF16_PAYS = ("AVX512_BF16", "AMX")
BF16_WIDTH = 512  # of the smallest such model; SmolLM2-135M's is 576


@dataclass(frozen=True)
class Plan:
    """A checked run.

    world_size: ranks; device: "cpu" or "cuda"; dtype: "bf16" or "fp32"; deepspeed: the complete
    DeepSpeed mapping (copy it before changing it); model: the transformers config; lengths: tokens
    of every training prompt, harmful ones first; why_stage: the line on `deepspeed: auto`, else "".
    """

    config: Config
    world_size: int
    device: str
    dtype: str
    folder: RunFolder
    groups: PromptGroups
    formatter: Formatter
    model: Any
    deepspeed: dict[str, Any]
    lengths: list[int]
    why_stage: str = ""

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def longest(self) -> int:
        """Tokens that no row has more of."""
        data = self.config.data
        return min(data.max_length, max(self.lengths) + data.max_response_tokens)

    @functools.cached_property
    def head(self) -> HeadExchange:
        """Whether the LM head stays sharded under ZeRO-3."""
        return choose_head(
            self.config,
            self.model,
            self.deepspeed.get("zero_optimization", {}),
            world_size=self.world_size,
            device=self.device,
            dtype=self.dtype,
            longest=self.longest,
        )

    def sampler(
        self,
        rank: int,
        lengths: tuple[list[int], list[int]] | None = None,
        harmless: list[int] | None = None,
    ) -> PairedSampler:
        """Which rows of the two training groups `rank` sees at each step.

        Args:
            rank: whose.
            lengths: of both groups' rows, responses included, for `train.length_window`.
            harmless: the harmless rows that take part, ascending, which the sampler numbers anew;
                default: all.
        """
        ordinary = len(self.groups.harmless) - self.groups.borderline
        rows = range(len(self.groups.harmless)) if harmless is None else harmless
        return PairedSampler(
            len(self.groups.harmful),
            len(rows),
            seed=self.config.train.seed,
            micro_batch_size=self.config.train.micro_batch_size,
            gradient_accumulation=self.config.train.gradient_accumulation,
            rank=rank,
            world_size=self.world_size,
            num_borderline=sum(row >= ordinary for row in rows),
            borderline_share=self.config.data.borderline_share,
            lengths=lengths,
            window=self.config.train.length_window,
        )

    def row_lengths(self, harmless: list[Prompt]) -> tuple[list[int], list[int]]:
        """Tokens of the harmful prompts, and of the harmless ones with their responses."""
        pairs = (self.formatter.conversation_ids(p, p.response or "") for p in harmless)
        harmful = self.lengths[: len(self.groups.harmful)]
        return harmful, [len(ids) + len(answer) for ids, answer in pairs]

    @property
    def dtype_line(self) -> str:
        """That another `model.dtype` would be faster here, or ""."""
        if self.device != "cpu":
            return ""
        if self.dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return (
                "model.dtype: bf16, but this CPU has no bfloat16 instructions and its products are "
                "several times slower than in fp32; use model.dtype=fp32 if the memory suffices"
            )
        chosen = self.config.model.dtype == "auto"
        wide = self.model.get_text_config().hidden_size >= BF16_WIDTH
        if not (chosen and wide and GEMM_BF16 in BF16_PAYS):
            return ""
        return (
            f"model.dtype: auto takes fp32 on a CPU; this one multiplies bfloat16 ({GEMM_BF16}), "
            "where model.dtype=bf16 is faster and halves the weights; evaluate in the same one"
        )

    def lines(self) -> list[str]:
        """The run in words, for the screen."""
        config, train, text = self.config, self.config.train, self.model.get_text_config()
        unanswered = sum(prompt.response is None for prompt in self.groups.harmless)
        epochs = self.sampler(0).epochs(train.steps)
        rare = ""
        if "borderline" in epochs:
            rare = f", {epochs['borderline']:.1f} over the borderline ones"
        transform = read_transform(self.model)
        return [
            *self.groups.report.lines(),
            f"prompts: {min(self.lengths)} to {max(self.lengths)} tokens, "
            f"{self.formatter.truncated} cut to data.max_length={config.data.max_length}; the base "
            f"model will write {unanswered} harmless responses",
            f"model: {self.model.model_type}, {text.num_hidden_layers} blocks of width "
            f"{text.hidden_size}, vocabulary {text.vocab_size}; logit transform: "
            f"{', '.join(transform.keys) or 'none'}",
            f"layers: {config.layers}; trainable: {train.trainable}; "
            f"teacher: {resolve_teacher(train)}",
            anchor_line(config, self.groups.harmful),
            f"run: {self.world_size} ranks on {self.device} in {self.dtype}, "
            f"ZeRO stage {self.zero_stage}; {train.micro_batch_size} pairs x "
            f"{train.gradient_accumulation} micro-batches x {self.world_size} ranks = "
            f"{self.deepspeed['train_batch_size']} pairs per step",
            *(line for line in (self.dtype_line, self.why_stage, self.head.line) if line),
            f"steps: {train.steps} = {epochs['harmful']:.1f} passes over the harmful and "
            f"{epochs['harmless']:.1f} over the harmless prompts{rare}",
        ]


def without_machine(config: Config) -> Config:
    """The run as it can be checked here: on a CPU, on one rank, whatever its folder holds."""
    train = {"device": "cpu", "overwrite": True, "global_batch_size": None, "zero3_head": "auto"}
    changed = config.train.model_copy(update=train)
    deepspeed = "zero2" if config.deepspeed == AUTO else config.deepspeed
    return config.model_copy(update={"train": changed, "deepspeed": deepspeed})


def make_plan(config: Config, *, world_size: int = 1, weights: bool = True) -> Plan:
    """Checks configuration, folders, data, model and batch arithmetic; trains nothing.

    Args:
        config: the run.
        world_size: ranks it will have. In a process group every rank calls this: with `deepspeed:
            auto` they agree on the stage.
        weights: the model's are there; False: its config and tokenizer suffice.

    Raises:
        UserError: the first mistake found.
    """
    folder = RunFolder(config.output_dir)
    check_claim(folder, config)
    check_trackers(config.train)
    make_attacks(
        config.evaluate.attacks, steps=config.evaluate.attack_steps
    )  # not after the training
    make_judges(judges_of(config, config.model.name))
    device = resolve_device(config.train.device)
    dtype = resolve_dtype(config.model.dtype, device)
    model = load_model_config(config.model)
    if weights:
        check_weights(config.model.name)
    skeleton = make_skeleton(config.model, model)
    check_weight_files(skeleton, config.model, model)
    check_lora_targets(skeleton, config.train)
    auto = config.deepspeed == AUTO
    deepspeed = build_deepspeed(
        config,
        world_size=world_size,
        dtype=dtype,
        model_config=model,
        preset="zero2" if auto else None,
    )
    if config.train.teacher == "moments" and read_transform(model).softcap is not None:
        raise UserError(
            f"train.teacher: moments, but {model.model_type} caps its logits "
            f"({', '.join(read_transform(model).keys)}), which do not reduce; use teacher=cache"
        )
    if config.layers != "auto":
        check_layers(config.layers, model.get_text_config().num_hidden_layers)
    groups = load_groups(config.data)
    check_refusals(config, groups.harmful)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    plan = Plan(
        config=config,
        world_size=world_size,
        device=device,
        dtype=dtype,
        folder=folder,
        groups=groups,
        formatter=formatter,
        model=model,
        deepspeed=deepspeed,
        lengths=prompt_lengths(groups, formatter, model.get_text_config().vocab_size),
    )
    remedy = "set a smaller data.max_length or max_response_tokens"
    check_positions(skeleton, lambda: _longest_row(plan), remedy)
    plan.sampler(0)  # raises where a group or a size is too small
    plan = _with_stage(plan) if auto else plan
    check_head(config, plan.deepspeed.get("zero_optimization", {}), world_size)
    if config.train.compile:
        check_stage(plan.zero_stage)
    return plan


def _longest_row(plan: Plan) -> int:
    """Tokens of the longest row that the model sees: with its response, or with one that it writes,
    which is cut to `data.max_length` afterwards only; with the anchor's refusal and opening."""
    config, groups = plan.config, plan.groups
    harmful, harmless = plan.row_lengths(groups.harmless)
    bare = [prompt for prompt in groups.harmless if prompt.response is None]
    written = [len(plan.formatter.prompt_ids(p)) + config.data.max_response_tokens for p in bare]
    anchor = config.refusal.tokens + config.refusal.prefill.tokens if config.refusal.weight else 0
    return max(max(harmful) + anchor, *harmless, *written)


def _with_stage(plan: Plan) -> Plan:
    """The plan with the ZeRO stage that fits."""
    choice = choose_stage(
        plan.config,
        plan.model,
        world_size=plan.world_size,
        device=plan.device,
        dtype=plan.dtype,
        longest=plan.longest,
    )
    return dataclasses.replace(plan, deepspeed=choice.deepspeed, why_stage=choice.line)
