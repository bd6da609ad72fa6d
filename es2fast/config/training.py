"""How it is trained, saved and stopped."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from es2fast.config.section import Section


class SafeguardsConfig(Section):
    """When a run stops by itself, and what is kept for that case."""

    max_kl: float | None = Field(
        2.0, gt=0, description="nats per token that no usable model reaches; null: no limit"
    )
    max_grad_growth: float | None = Field(
        100.0, gt=1, description="gradient norm over the largest of the first ten steps"
    )
    max_harmless_refusals: float | None = Field(
        0.3,
        gt=0,
        le=1,
        description="with a refusal anchor: share of the harmless training prompts, of those that "
        "the base model answers otherwise, whose likeliest first token begins a refusal; a running "
        "mean over about the last 50 rows; null: no limit",
    )
    patience: int = Field(5, ge=1, description="steps in a row that a limit must be passed")
    keep_every: int = Field(
        10, ge=0, description="steps between copies of sane weights to fall back on; 0: none"
    )


class CheckpointConfig(Section):
    """What survives a run that is killed, in `checkpoints/` of its folder until it is finished."""

    every: int = Field(
        50,
        ge=0,
        description="optimizer steps between two; 0: none. 50 of the 150 default steps: a third of "
        "a run is lost at most, and two are written",
    )
    keep: int = Field(2, ge=1, description="newest ones that stay, each as large as the optimizer")
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: the same command again continues a run that was not finished; another "
        "number of ranks needs values of train.micro_batch_size and train.gradient_accumulation "
        "that keep the pairs per step",
    )


class LoraSection(Section):
    r: int = Field(16, ge=1, le=2**14)
    alpha: int = Field(32, ge=1, le=2**20)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field("all-linear", description="as peft's target_modules")


class TrainConfig(Section):
    steps: int = Field(150, ge=1, le=10**7, description="optimizer steps")
    micro_batch_size: int = Field(
        4, ge=1, le=2**16, description="harmful + harmless pairs per rank and pass"
    )
    gradient_accumulation: int = Field(1, ge=1, le=2**16)
    global_batch_size: int | None = Field(
        None, ge=1, description="pairs per optimizer step; checked against the product when given"
    )
    length_window: int = Field(
        1,
        ge=1,
        description="micro-batches among whose rows those of like length are put together, which "
        "leaves less padding; 1: rows come at random",
    )
    packing: bool = Field(
        True,
        description="a micro-batch's rows as one sequence: no padding, and their common beginning "
        "is computed once; where the model's attention does not take that, or would cost more, "
        "rows are padded",
    )
    lr: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    schedule: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = Field("cosine", description="of the learning rate, as transformers names it")
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    trainable: Literal["blocks", "lora", "all"] = Field(
        "blocks", description="blocks or lora: of those that trainable_blocks names"
    )
    trainable_blocks: Literal["separated", "all"] = Field(
        "separated",
        description="separated: the blocks up to the deepest separated layer, since no later one "
        "can move its states; all: also those above it, which learn from the KL and the anchor",
    )
    lora: LoraSection = Field(default_factory=LoraSection)
    teacher: Literal["auto", "adapters_off", "twin", "cache", "moments"] = Field(
        "auto",
        description="auto: adapters_off with LoRA, a frozen twin otherwise; cache: the base "
        "model's final states, written once to data.cache_dir, when rows are seen in several "
        "epochs or runs or no second model fits; moments: the same reduced for a frozen head, "
        "twice the size of bf16 states and a third less work in the head",
    )
    zero3_head: Literal["auto", "gathered", "sharded"] = Field(
        "gathered",
        description="a frozen LM head under ZeRO-3: gathered by every rank for the losses; or "
        "sharded, each rank makes the logits of its rows for the tokens of all ranks (not yet "
        "tried with NCCL); auto: sharded on a GPU where the longest micro-batch exchanges less "
        "than half of the bytes",
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(
        False,
        description="torch.compile of each decoder block while it trains; costs a minute or more "
        "of the first steps, needs a C++ compiler, not with ZeRO stage 3",
    )
    bind_cores: bool = Field(
        False,
        description="ranks on a CPU keep to cores of their own, a share of those that may be used; "
        "on two cores it bought nothing, and lost beside other work",
    )
    update_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the weights' whole change that the saved model has: below 1 it lies "
        "between the base model and the trained one, which costs less KL",
    )
    update_filter: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="LoRA: after the last step, takes out of the update of each layer (but those "
        "with inputs wider than the residual stream) what acts on its inputs from harmless rows; "
        "their weight against that of harmful ones. 0: off",
    )
    early_stop: bool = Field(
        False, description="stop when a bounded loss has reached its target on every layer"
    )
    overwrite: bool = Field(False, description="replace a run that output_dir already holds")
    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(1, ge=1)
    profile: bool = Field(
        False,
        description="look at three early steps with torch's profiler: trace.json, profile.txt",
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
