"""One pydantic model = one YAML file = one run.

Every quantity that arXiv 2603.20206 leaves open is a field here. Unknown keys are refused with a
did-you-mean, `key=value` overrides use dotted paths (`train.lr=1e-4`), and the resolved
configuration is saved with every run.
"""

from __future__ import annotations

import copy
import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from es2fast.errors import UserError
from es2fast.yaml_text import parse_yaml

_NUMBERS = (int, float, int | None, float | None)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic makes 1 of true; text that is no UTF-8 fails where it is written."""
        name = info.field_name or ""
        annotation = cls.model_fields[name].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return {}  # a section of which nothing is given
        if isinstance(value, bool) and annotation in _NUMBERS:
            raise ValueError(f"{str(value).lower()} is no number; give one")
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{value!r} holds a character that is no text; remove it")
        return value


def _row_count(raw: Any) -> Any:
    if raw != "auto" and (type(raw) is not int or raw < 1):
        raise ValueError(f"expected auto, or a number of 1 or more, found {raw!r}")
    return raw


RowCount = Annotated[Literal["auto"] | int, BeforeValidator(_row_count)]


class DataSource(_Section):
    """A place prompts come from. A plain string in YAML is short for `{source: ...}`."""

    source: str = Field(
        description="Hugging Face dataset id, folder of a saved dataset, or a .jsonl/.json/.csv/"
        ".parquet file, or any other text file with one prompt per line"
    )
    split: str = Field("train", description="split, for dataset ids and saved dataset dicts")
    column: str | None = Field(None, description="prompt column; recognised when not named")
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="keep rows whose columns hold these values, each one or a list of them, such "
        "as {label: safe}; compared as text, upper and lower case alike",
    )
    side: Literal["harmful", "harmless"] | None = Field(
        None,
        description="where a column `label` tells harmful rows (harmful, unsafe, 1, true) from "
        "harmless ones (harmless, safe, 0, false), keep this side's",
    )
    rows: str | None = Field(
        None,
        pattern=r"^\d*:\d*(:[1-9]\d*)?$",
        description="slice of the rows that `where` and `side` kept, as in Python: '::2' and "
        "'1::2' part a source in two that share nothing",
    )
    limit: int | None = Field(None, ge=1, description="keep the first N of these rows")
    kind: str | None = Field(
        None,
        description="what these prompts are, such as borderline: refusals of held-out harmless "
        "prompts are also counted by it",
    )

    @field_validator("rows", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare 10:20 as minutes and seconds."""
        if isinstance(value, int):
            raise ValueError(
                f"{value} is a number, which YAML also makes of a bare 10:20; quote the slice, as "
                "in rows: '10:20'"
            )
        return value


def _source_list(value: Any) -> Any:
    """A single source, or a bare string, stands for a list of one."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"source": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[DataSource], BeforeValidator(_source_list)]


class ModelConfig(_Section):
    name: str = Field(description="folder or Hugging Face id of an aligned chat model")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    dtype: Literal["bf16", "fp32", "auto"] = Field(
        "auto", description="training precision; auto: bf16 on a GPU, fp32 on a CPU"
    )
    attn_implementation: str | None = Field(None, description="sdpa, flash_attention_2, eager ...")
    trust_remote_code: bool = Field(False, description="run model code that ships with the weights")


class DataConfig(_Section):
    harmful: Sources = Field(default_factory=list, description="prompts to move away (group A)")
    harmless: Sources = Field(default_factory=list, description="prompts to preserve (group B)")
    borderline: Sources = Field(
        default_factory=list,
        description="more of group B: harmless prompts that look harmful, such as the safe half of "
        "XSTest, or contrasts to the harmful ones; without them a refusal anchor over-refuses",
    )
    borderline_share: float = Field(
        0.25, gt=0, lt=1, description="of the harmless rows of a step, where there are borderline"
    )
    refused: Literal["keep", "even", "drop"] = Field(
        "keep",
        description="harmless prompts whose response is a refusal by the rules: keep trains to "
        "go on refusing them, even does without kl.first_weight, drop leaves them out",
    )
    labelled: Sources = Field(
        default_factory=list, description="files whose `label` column tells the two groups apart"
    )
    eval_harmful: Sources = Field(default_factory=list, description="held-out harmful prompts")
    eval_harmless: Sources = Field(default_factory=list, description="held-out harmless prompts")
    eval_labelled: Sources = Field(
        default_factory=list, description="held-out prompts of both kinds, told apart likewise"
    )
    near_duplicates: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="training prompts at least this similar to a held-out one are left out (words "
        "in common, weighted by their rarity); null: only equal ones",
    )
    system_prompt: str | None = Field(None, description="system message put before every prompt")
    chat_template: str | None = Field(
        None, description="a Jinja file to use in place of the tokenizer's own chat template"
    )
    max_length: int = Field(
        512, ge=8, le=2**22, description="tokens of prompt + response; longer rows are cut"
    )
    max_response_tokens: int = Field(
        128, ge=1, description="tokens of the response, given or written by the base model"
    )
    response_batch_size: RowCount = Field(
        "auto",
        description="prompts that a rank's base model answers at a time; auto: 32 on a CPU, on a "
        "GPU what its memory holds, halved when that was too much",
    )
    cache_dir: str | None = Field(
        None, description="where written responses are kept; default: the user's cache folder"
    )


class LayersConfig(_Section):
    """How `layers: auto` chooses (probes on the base model's last-prompt-token states)."""

    prompts: int = Field(256, ge=4, description="prompts per group for the probes and for d0")
    folds: int = Field(5, ge=2, description="of the cross-validated probes")
    resamples: int = Field(
        200, ge=20, description="of the prompts, behind intervals and how sure the choice is"
    )
    causal: bool = Field(
        True,
        description="measure what a push by the groups' gap at each block takes from the refusal, "
        "one forward pass per block, and count it in the choice",
    )
    causal_prompts: int = Field(32, ge=2, description="harmful prompts for that")
    first: float = Field(
        0.5, gt=0, le=1, description="part of the depth that the first block lies in, if it can"
    )
    gap: float = Field(
        0.2, gt=0, lt=1, description="least distance of the second block, as a part of the depth"
    )
    last: float = Field(
        0.9, gt=0, le=1, description="part of the depth that both lie in; above, blocks read them"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, raw: Any) -> Any:
        """`accuracy` and `depth` are gone; saved configurations hold their old defaults."""
        old = {"accuracy": 0.95, "depth": 0.6}
        if not isinstance(raw, dict) or not old.keys() & raw.keys():
            return raw
        for key, default in old.items():
            if raw.get(key, default) != default:
                raise ValueError(
                    f"{key}={raw[key]} is not read any more; name the blocks in `layers`, or see "
                    "layer_choice.first, gap and last"
                )
        return {key: value for key, value in raw.items() if key not in old}


_DEFAULT_MARGINS = {"hinge": 4.0, "softplus": 4.0, "cosine": 0.0}


class RobustConfig(_Section):
    """Separation, and the anchor's refusal, demanded under a simulated attack on the harmful
    states."""

    probability: float = Field(
        0.0, ge=0, lt=1, description="share of the steps that are attacked; 0: none"
    )
    attacks: list[Literal["scav", "mean_difference", "replacement", "ablation"]] = Field(
        ["mean_difference"],
        min_length=1,
        description="one of these is drawn per attacked step; the attacks of the evaluation in "
        "their plain form",
    )
    blocks: Literal["separated", "all"] = Field(
        "separated",
        description="where mean_difference and replacement act, one block drawn per step; all "
        "needs a refusal anchor, without which harmful rows end at the deepest separated block",
    )
    strength: tuple[float, float] = Field(
        (1.0, 1.0),
        description="range of the mean difference's strength, drawn per step, in units of the "
        "current gap between the groups' means",
    )
    states: int = Field(
        256, ge=4, description="most recent states per group that the attack is fitted on"
    )
    refit_every: int = Field(5, ge=1, description="steps between two fits")

    @model_validator(mode="before")
    @classmethod
    def _one_attack(cls, raw: Any) -> Any:
        """`attack: NAME` of earlier versions."""
        if not isinstance(raw, dict) or "attack" not in raw or "attacks" in raw:
            return raw
        return {key: value for key, value in raw.items() if key != "attack"} | {
            "attacks": [raw["attack"]]
        }

    @model_validator(mode="after")
    def _consistent(self) -> RobustConfig:
        low, high = self.strength
        if not 0 < low <= high < float("inf"):
            raise ValueError(
                f"strength={[low, high]} is no range; give [low, high] with 0 < low <= high"
            )
        return self


class SeparationConfig(_Section):
    weight: float = Field(
        1.0, ge=0, description="of the separation in the loss; 0: the refusal anchor alone"
    )
    loss: Literal["hinge", "l2", "log", "softplus", "squared", "centroid", "fisher", "cosine"] = (
        Field(
            "hinge", description="hinge stops at margin x d0; l2 is the paper's unbounded distance"
        )
    )
    margin: float | None = Field(
        None,
        description="target distance in units of d0 (fisher: of the base model's mean Mahalanobis "
        "distance; cosine: a cosine); default 4 for hinge and softplus, 0 for cosine; squared, "
        "centroid and fisher are unbounded without one",
    )
    weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="one weight per layer, not all 0; default: 1 each"
    )
    space: Literal["residual", "normed"] = Field(
        "residual",
        description="residual: the block's output; normed: after the next block's input norm, "
        "where a longer state gains nothing",
    )
    norm_band: tuple[float, float] | None = Field(
        None, description="lowest and highest norm of a state, in units of the base model's mean"
    )
    norm_band_weight: float = Field(
        10.0, gt=0, description="of the squared excess over the band, averaged over the states"
    )
    moves: Literal["both", "harmful"] = Field(
        "both",
        description="which group's states the loss moves; the paper moves both, and the KL then "
        "has to bring the harmless ones back",
    )
    ramp: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps in which the margin grows from the base distance to its "
        "full size; 0: full from the start",
    )
    bank: int = Field(
        0,
        ge=0,
        description="embeddings of each group, from earlier micro-batches of all ranks, that the "
        "other group is also held away from; rounded up to a multiple of the ranks",
    )
    robust: RobustConfig = Field(default_factory=RobustConfig)

    @property
    def bounded(self) -> bool:
        """The loss has a target, at which it is 0 (softplus: almost)."""
        return self.margin is not None

    @model_validator(mode="after")
    def _consistent(self) -> SeparationConfig:
        loss, margin, band = self.loss, self.margin, self.norm_band
        if margin is None:
            self.margin = _DEFAULT_MARGINS.get(loss)
            self.model_fields_set.discard("margin")  # another loss has another default
        elif loss in ("l2", "log"):
            raise ValueError(
                f"margin={margin:g} with loss={loss!r}, which has none; leave it out or use "
                "loss=hinge"
            )
        elif loss == "cosine" and not -1 <= margin < 1:
            raise ValueError(f"margin={margin:g} with loss='cosine' must be a cosine below 1")
        elif loss != "cosine" and margin <= 0:
            raise ValueError(f"margin={margin:g} must be greater than 0; it is in units of d0")
        if self.weights is not None and not any(self.weights):
            raise ValueError(
                f"weights={self.weights} switches every layer off; give one above 0, or weight=0"
            )
        if self.ramp and (self.margin is None or loss == "cosine"):
            raise ValueError(
                f"ramp={self.ramp:g} with loss={loss!r} has no margin in units of d0 to grow; "
                "leave it out or use loss=hinge"
            )
        if band is not None and not 0 <= band[0] < 1 < band[1]:
            raise ValueError(
                f"norm_band={list(band)} does not hold 1, where the base model is; give "
                "[low, high] with 0 <= low < 1 < high"
            )
        return self


class PrefillConfig(_Section):
    """Refusals that are also learned after the beginning of a compliant answer."""

    probability: float = Field(
        0.0, ge=0, le=1, description="share of the harmful rows that get an opening; 0: none"
    )
    tokens: int = Field(
        8, ge=1, description="longest opening; a row's length is drawn from 1 to this"
    )
    texts: list[str] = Field(
        ["Sure, here is how to do that. First,"],
        description="compliant openings, one drawn per row and step",
    )
    own_answers: bool = Field(
        True,
        description="with source=auto, a prompt that the base model answers gets the beginning of "
        "that answer in place of a text",
    )


class RefusalConfig(_Section):
    """The refusal anchor: what the displaced states of harmful prompts mean to the blocks above."""

    weight: float = Field(
        0.0,
        ge=0,
        description="of the cross-entropy towards a refusal after every harmful prompt; 0: no "
        "anchor, and harmful rows end at the deepest separated block",
    )
    source: Literal["auto", "column", "list"] = Field(
        "auto",
        description="auto: the base model's own refusals, written once; column: the harmful "
        "source's response column; list: `texts`",
    )
    texts: list[str] = Field(
        default_factory=list, description="refusals for source=list, one drawn per row"
    )
    fallback: list[str] = Field(
        [
            "I'm sorry, but I can't help with that.",
            "I cannot help with this request.",
            "Sorry, that is something I can't assist with.",
        ],
        description="with source=auto, what stands in when the base model refuses none of the "
        "harmful prompts, one drawn per row; []: that is an error",
    )
    tokens: int = Field(24, ge=1, description="tokens of the refusal that are learned")
    decay: float = Field(
        0.9, gt=0, le=1, description="weight of a token relative to that of the one before it"
    )
    prefill: PrefillConfig = Field(default_factory=PrefillConfig)

    @model_validator(mode="after")
    def _consistent(self) -> RefusalConfig:
        texts = {
            "texts": self.texts,
            "fallback": self.fallback,
            "prefill.texts": self.prefill.texts,
        }
        for name, given in texts.items():
            if any(not text.strip() for text in given):
                raise ValueError(f"{name} holds a blank text; remove it")
        if self.source == "list" and not self.texts:
            raise ValueError("texts is empty with source=list; give at least one refusal")
        if self.source != "list" and self.texts:
            raise ValueError(
                f"texts is given with source={self.source!r}, which does not read it; use "
                "source=list"
            )
        if self.prefill.probability and not self.prefill.texts:
            raise ValueError("prefill.texts is empty; give at least one opening or probability=0")
        return self


class KLConfig(_Section):
    direction: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="forward: KL(base || tuned); reverse: KL(tuned || base); jsd: both against "
        "their mixture",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="jsd: the base model's share of the mixture")
    temperature: float = Field(1.0, gt=0)
    positions: Literal["all", "response", "last"] = Field(
        "all", description="harmless tokens on which next-token distributions are compared"
    )
    first_weight: float = Field(
        1.0,
        gt=0,
        le=1e3,
        description="of each of a response's first tokens in the mean over tokens, where others "
        "have 1: they decide whether an answer is a refusal",
    )
    first_tokens: int = Field(4, ge=1, description="how many first tokens have first_weight")
    weight: float = Field(10.0, ge=0, description="lambda; its start value when a budget is given")
    budget: float | None = Field(
        None, gt=0, description="nats per token; lambda then adapts so that the KL stays below"
    )
    budget_lr: float = Field(0.15, gt=0, description="step of the dual ascent on log lambda")
    max_weight: float = Field(1e4, gt=0, description="upper bound of the adaptive lambda")


class SafeguardsConfig(_Section):
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


class CheckpointConfig(_Section):
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


class LoraSection(_Section):
    r: int = Field(16, ge=1, le=2**14)
    alpha: int = Field(32, ge=1, le=2**20)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field("all-linear", description="as peft's target_modules")


class TrainConfig(_Section):
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
        "is computed once; where the model's attention does not take that, where it would cost "
        "more, and in steps under a simulated attack rows are padded",
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
    gradient_checkpointing: bool = False
    update_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the weights' whole change that the saved model has: below 1 it lies "
        "between the base model and the trained one, which costs less KL",
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


class LmEvalConfig(_Section):
    """Tasks of lm-evaluation-harness (extra `lm-eval`) on every model."""

    tasks: list[str] = Field(
        default_factory=list, description="names, or paths of task files or FOLDER/NAME; none: off"
    )
    tasks_dir: str | None = Field(None, description="folder with task files of your own")
    attacks: list[str] = Field(
        default_factory=list,
        description="labels of evaluate.attacks under which the tasks run as well: attacks on "
        "hidden states or weights",
    )
    limit: int | None = Field(None, ge=1, description="documents per task; default: all")
    num_fewshot: int | None = Field(None, ge=0, description="default: the task's own")
    chat_template: bool = Field(False, description="ask in the model's chat format")


class EvaluateConfig(_Section):
    attacks: list[str | dict[str, Any]] = Field(
        ["direct", "scav", "mean_difference"],
        description="names, or mappings of a name and the attack's own settings, such as "
        "{name: scav, p0: 0.001}",
    )
    judge: str | list[str] = Field(
        "rules",
        description="who says how an answer ended: rules, hf:MODEL, openai:URL#MODEL (see "
        "docs/judges.md); of several the first decides and the others' rates stand beside",
    )
    calibration: str | None = Field(
        None,
        description="file that `es2fast judges --calibrate --json` wrote about the deciding judge; "
        "the report then gives the useful rate corrected for its mistakes",
    )
    limit: int = Field(100, ge=2, description="held-out prompts per group")
    fit_limit: int = Field(140, ge=2, description="training prompts per group for probes and means")
    max_new_tokens: int = Field(
        256,
        ge=1,
        description="at which an answer is cut; other safety evaluations use 256 to 2048, and "
        "fewer show where an answer sets out to go, not what it achieves",
    )
    batch_size: RowCount = Field(
        "auto",
        description="prompts that are answered at a time; auto: 32 on a CPU, on a GPU what its "
        "memory holds, halved when that was too much",
    )
    device_map: str | dict[str, int | str] | None = Field(
        None,
        description="for models larger than a GPU: auto spreads the blocks over all GPUs, a "
        "mapping of modules to devices is taken as transformers has it",
    )
    attack_steps: Literal["all", "prompt"] = Field(
        "all",
        description="`steps` of attacks on hidden states that do not say it themselves: push at "
        "every decoding step, or only while the prompt is read",
    )
    seed: int = Field(0, description="of whatever an attack draws")
    lm_eval: LmEvalConfig = Field(default_factory=LmEvalConfig)

    @model_validator(mode="before")
    @classmethod
    def _settings_of_scav(cls, raw: Any) -> Any:
        """`scav_p0` and `scav_p1` of earlier versions are settings of the attack now."""
        if not isinstance(raw, dict) or not {"scav_p0", "scav_p1"} & raw.keys():
            return raw
        rest = {key: value for key, value in raw.items() if key not in ("scav_p0", "scav_p1")}
        given = {key[5:]: raw[key] for key in ("scav_p0", "scav_p1") if key in raw}
        names = rest.get("attacks", cls.model_fields["attacks"].default)
        rest["attacks"] = [{"name": "scav", **given} if name == "scav" else name for name in names]
        return rest


class Config(_Section):
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


def load_config(
    source: str | Path | dict[str, Any] | None, overrides: typing.Sequence[str] = ()
) -> Config:
    """Reads a YAML file, applies `key=value` overrides and validates.

    Args:
        source: YAML file, or the mapping that one holds; None starts from an empty mapping
            (overrides must then name the model).
        overrides: dotted `key=value` strings; values are parsed as YAML.

    Raises:
        UserError: missing file, malformed YAML or override, unknown key, value out of range.
    """
    raw = copy.deepcopy(source) if isinstance(source, dict) else read_yaml(source)
    for item in overrides:
        _apply_override(raw, item)
    return parse_config(raw)


def read_yaml(path: str | Path | None, name: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file; an empty one for None and for an empty file.

    Args:
        path: the file.
        name: what it is called in messages.

    Raises:
        UserError: missing file, malformed YAML, no mapping.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{name} {path}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name} {path}: not valid YAML ({reason})") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{name} {path}: expected a mapping of keys, found {type(raw).__name__}")
    return raw


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one, section by section; a value or a list of `high` replaces that of
    `low`."""
    result = dict(low)
    for key, value in high.items():
        below = result.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def parse_config(raw: dict[str, Any]) -> Config:
    """Validates a mapping; the first mistake becomes a one-line UserError."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved configuration, every default included; whole, or as it was."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    partial = Path(f"{path}.tmp")
    partial.write_text(text)
    partial.replace(path)


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {item!r}: expected key=value, for example train.lr=1e-4")
    value = _yaml_value(key, text)
    *parents, last = key.strip().split(".")
    node: Any = raw
    for part, following in zip(parents, [*parents[1:], last]):
        node = _inside(node, part, following, item)
    if isinstance(node, list):
        node[_place(node, last, item)] = value
    else:
        node[last] = value


def _inside(node: Any, part: str, following: str, item: str) -> Any:
    """What stands at `part`; a bare source of prompts becomes the mapping that it is short for."""
    place: Any = _place(node, part, item) if isinstance(node, list) else part
    child = node[place] if isinstance(node, list) else node.setdefault(part, {})
    if isinstance(child, str) and following in DataSource.model_fields:
        child = node[place] = {"source": child}
    elif following.isdecimal() and not isinstance(child, list) and child:
        child = node[place] = [child]
    if isinstance(child, list) and not following.isdecimal():
        raise UserError(
            f"override {item!r}: {part} is a list; name one of its entries, as in {part}.0."
            f"{following}"
        )
    if not isinstance(child, dict | list):
        raise UserError(f"override {item!r}: {part} is not a section")
    return child


def _place(entries: list[Any], part: str, item: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        raise UserError(
            f"override {item!r}: there is no entry {part}; there are {len(entries)}, counted from 0"
        )
    return int(part)


def _yaml_value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: {text!r} is not a valid value") from None
    if isinstance(value, str) and value == text.strip():  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    unknown = [item for item in found if item["type"] == "extra_forbidden"]
    first = (unknown or found)[0]  # a misspelt key also shows up as a missing one
    path = ".".join(str(part) for part in first["loc"] if not _is_variant(part))
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, first["loc"])
    if first["type"] == "missing":
        return f"{path}: required and not given; set it in the YAML file or as {path}=..."
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return message
    if first["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]}, found {first['input']!r}"


def _is_variant(part: Any) -> bool:
    """pydantic names the union's branch in the location (`list[int]`, `literal['auto']`)."""
    return isinstance(part, str) and ("[" in part or part in {"str"})


_ALIASES = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "batch_size": "micro_batch_size",
    "lambda": "weight",
    "kappa": "margin",
    "model_name": "name",
    "path": "name",
}


def _unknown_key(path: str, loc: tuple[Any, ...]) -> str:
    names = list(_section_at(loc[:-1]).model_fields)
    alias = _ALIASES.get(str(loc[-1]))
    close = (
        [alias]
        if alias in names
        else difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    )
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}"
    return f"{path}: unknown key; {hint}"


def _section_at(loc: tuple[Any, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_type(section.model_fields[part].annotation) or section
    return section


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            found = _section_type(argument)
            if found is not None:
                return found
    return None
