"""A whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from es2fast.config.data import DataConfig, ModelConfig
from es2fast.config.evaluation import EvaluateConfig
from es2fast.config.objective import KLConfig, LayersConfig, RefusalConfig, SeparationConfig
from es2fast.config.section import Section
from es2fast.config.training import CheckpointConfig, SafeguardsConfig, TrainConfig


class Config(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    layers: Literal["auto"] | list[int] = Field(
        "auto", description="decoder blocks (0-based) whose outputs are separated; two by default"
    )
    layer_choice: LayersConfig = Field(default_factory=LayersConfig)
    separation: SeparationConfig = Field(default_factory=SeparationConfig)
    refusal: RefusalConfig = Field(default_factory=RefusalConfig)
    kl: KLConfig = Field(default_factory=KLConfig)
    safeguards: SafeguardsConfig = Field(default_factory=SafeguardsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    deepspeed: str | dict[str, Any] = Field(
        "auto",
        description="auto: the lightest ZeRO stage that fits in memory; a preset (zero0 to zero3, "
        "zero3_offload), a JSON file, or a mapping",
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    output_dir: str = Field("runs/es2", description="where model, metrics and report are written")

    @field_validator("layers", mode="before")
    @classmethod
    def _block_numbers(cls, raw: Any) -> Any:
        """`layers: 4` and the command line's `layers=4,8` are lists too."""
        if isinstance(raw, bool) or raw == "auto":
            return raw
        if isinstance(raw, int):
            return [raw]
        if isinstance(raw, str):
            parts = [part.strip() for part in raw.split(",")]
            if not all(part.isdecimal() for part in parts):
                raise ValueError(f"{raw!r} is neither 'auto' nor block numbers such as [8, 16]")
            return [int(part) for part in parts]
        for item in raw if isinstance(raw, list) else []:
            if isinstance(item, bool) or not isinstance(item, int):
                raise ValueError(f"{item!r} is no block number; give numbers such as [8, 16]")
        return raw

    @field_validator("output_dir")
    @classmethod
    def _home(cls, path: str) -> str:
        if not path.strip():
            raise ValueError("is blank; name a folder, such as runs/es2")
        return str(Path(path).expanduser()) if path.startswith("~") else path

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if isinstance(self.layers, list):
            if not self.layers:
                raise ValueError("layers: [] is empty; give block numbers or 'auto'")
            if len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers: {self.layers} names a block twice")
            weights = self.separation.weights
            if weights is not None and len(weights) != len(self.layers):
                raise ValueError(
                    f"separation.weights: {len(weights)} weights for {len(self.layers)} layers; "
                    "give one per layer"
                )
        if not self.separation.weight and not self.refusal.weight:
            raise ValueError(
                "separation.weight: 0 without a refusal anchor trains nothing; set refusal.weight "
                "or separation.weight above 0"
            )
        if self.train.update_filter and self.train.trainable != "lora":
            raise ValueError(
                f"train.update_filter: {self.train.update_filter:g} filters a LoRA update, and "
                f"train.trainable is {self.train.trainable!r}; set train.trainable=lora or "
                "update_filter=0"
            )
        if self.kl.refused_weight != 1 and self.data.refused != "even":
            raise ValueError(
                f"kl.refused_weight: {self.kl.refused_weight:g} is for data.refused: even, and "
                f"that is {self.data.refused!r}; set data.refused=even or refused_weight=1"
            )
        if self.separation.robust.blocks == "all" and not self.refusal.weight:
            raise ValueError(
                "separation.robust.blocks: 'all' without a refusal anchor, but harmful rows then "
                "end at the deepest separated block; set refusal.weight or blocks=separated"
            )
        if self.train.early_stop and not self.separation.weight:
            raise ValueError(
                "train.early_stop: separation.weight=0 has no target to reach; set "
                "train.early_stop=false"
            )
        if self.train.teacher == "adapters_off" and self.train.trainable != "lora":
            raise ValueError(
                f"train.teacher: adapters_off needs train.trainable=lora, which is "
                f"{self.train.trainable!r}; use teacher=twin"
            )
        if self.train.teacher == "moments":
            self._check_moments()
        if self.train.early_stop and not self.separation.bounded:
            raise ValueError(
                f"train.early_stop: separation.loss={self.separation.loss!r} without a margin has "
                "no target to reach; use separation.loss=hinge"
            )
        return self

    def _check_moments(self) -> None:
        if self.kl.direction != "forward":
            raise ValueError(
                f"train.teacher: moments holds for kl.direction=forward only, which is "
                f"{self.kl.direction!r}; use teacher=cache"
            )
        if self.train.trainable == "all":
            raise ValueError(
                "train.teacher: moments needs a frozen LM head, and train.trainable=all trains "
                "it; use teacher=cache"
            )
