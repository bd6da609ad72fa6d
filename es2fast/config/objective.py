"""What is trained for: the blocks, the separation, the refusal anchor, the KL."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from es2fast.config.section import Section


class LayersConfig(Section):
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


class RobustConfig(Section):
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
        description="where mean_difference and replacement act, at one block drawn per row; scav "
        "acts at every separated one, with all at one per row, the middle third or every block; "
        "all needs a refusal anchor, without which harmful rows end at the deepest separated block",
    )
    strength: tuple[float, float] = Field(
        (1.0, 1.0),
        description="range of the mean difference's strength, drawn per row, in units of the "
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


class SeparationConfig(Section):
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


class PrefillConfig(Section):
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
    words: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the openings that are one word out of a harmless response instead, "
        "compliant or not: what a push at the last prompt token makes of an answer's beginning",
    )


class RefusalConfig(Section):
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


class KLConfig(Section):
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
    refused_weight: float = Field(
        1.0,
        gt=0,
        le=1e3,
        description="with data.refused: even, that of the first tokens of a refusal; below 1 the "
        "model is freer to answer where the base model refuses a harmless prompt",
    )
    first_tokens: int = Field(4, ge=1, description="how many first tokens have first_weight")
    weight: float = Field(10.0, ge=0, description="lambda; its start value when a budget is given")
    budget: float | None = Field(
        None, gt=0, description="nats per token; lambda then adapts so that the KL stays below"
    )
    budget_lr: float = Field(0.15, gt=0, description="step of the dual ascent on log lambda")
    max_weight: float = Field(1e4, gt=0, description="upper bound of the adaptive lambda")
