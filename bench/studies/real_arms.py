"""The cells of the study on real models: how each model is made, and how each is attacked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from es2fast.config import merged

BASE = "base"
SEEDS = 3  # runs of an arm, of which means are made
CIRCUIT_BREAKERS = ("circuit_breaker", "circuit_breaker_long")

ANCHOR = {"weight": 1.0, "prefill": {"probability": 0.5, "tokens": 20}}
ROBUST = {
    "probability": 0.5,
    "attacks": ["replacement", "ablation", "mean_difference"],
    "blocks": "all",
    "strength": [0.5, 2.0],
}
EVERY_BLOCK = {"trainable": "lora", "lr": 2e-4, "trainable_blocks": "all"}
RESPONSES = {"weight": 10.0, "positions": "response"}
BOTH_ROBUST: dict[str, Any] = {
    "layers": [8, 16],
    "separation": {"margin": 4.0, "moves": "harmful", "ramp": 0.5, "robust": ROBUST},
    "refusal": ANCHOR,
    "kl": RESPONSES,
    "train": EVERY_BLOCK,
}
HELD = merged(
    BOTH_ROBUST,
    {
        "separation": {"margin": 2.0},
        "kl": {"weight": 30.0, "first_weight": 4.0},
        "train": {"steps": 120},
    },
)
MORE = {"harmless": {"limit": 400}}  # all that there are
LONG = merged(
    HELD, {"data": MORE | {"refused": "even"}, "kl": {"weight": 60.0}, "train": {"steps": 240}}
)
LONGER = merged(LONG, {"train": {"steps": 600, "teacher": "cache"}})
VARIED = merged(
    LONGER,
    {
        "data": {"harmful": {"limit": 600}},  # all that there are
        "separation": {"robust": {"attacks": [*ROBUST["attacks"], "ablation"]}},
    },
)


@dataclass(frozen=True)
class Arm:
    """One way to make a model: what it is, and what differs from `TRAINING`; or what becomes of the
    update of the arm `of`: its share `scale`, or what `filter` leaves (`train.update_scale`,
    `train.update_filter`), or the mean of those of several seeds (`es2fast average`), each so
    many further on as `mean` says, and after the last one again the first. contrast: the unsafe
    half of XSTest is among the harmful prompts, all of it, `unsafe_pairs` or the types `DEEDS`.
    more: built-in prompts are among the harmless ones, all that there were then (`builtin`) or
    `builtin:topical`."""

    words: str
    changes: dict[str, Any] = field(default_factory=dict)
    of: str | None = None
    scale: float = 1.0
    filter: float = 0.0
    mean: tuple[int, ...] = ()
    contrast: Literal["", "all", "pairs", "deeds"] = ""
    more: Literal["", "builtin", "topical"] = ""


# Steps and batch are what two CPU cores can do.
TRAINING: dict[str, Any] = {
    "deepspeed": "zero2",
    "layers": [8, 13],
    "layer_choice": {"prompts": 48},
    "separation": {"margin": 4.0},
    "kl": {"weight": 10.0},
    "train": {
        "steps": 40,
        "micro_batch_size": 4,
        "trainable": "lora",
        "lr": 2e-4,
        "device": "cpu",
        "overwrite": True,
    },
}

ARMS: dict[str, Arm] = {
    "separation": Arm("separation alone (hinge)"),
    "paper": Arm(
        "separation alone, the paper's unbounded distance",
        {"separation": {"loss": "l2", "margin": None}},
    ),
    "anchor": Arm("refusal anchor alone", {"separation": {"weight": 0.0}, "refusal": ANCHOR}),
    "both": Arm(
        "separation and anchor (d0 from all prompts)",
        {"refusal": ANCHOR, "layer_choice": {"prompts": 256}},
    ),
    "anchor_robust": Arm(
        "anchor under simulated attacks; LoRA on every block, KL on response tokens",
        {
            "separation": {"weight": 0.0, "robust": ROBUST},
            "refusal": ANCHOR,
            "kl": RESPONSES,
            "train": EVERY_BLOCK,
        },
    ),
    "both_robust": Arm(
        "separation (of the harmful states alone, margin growing, blocks 8 and 16) and anchor, "
        "under simulated attacks; LoRA on every block, KL on response tokens",
        BOTH_ROBUST,
    ),
    "closer": Arm(
        "as both_robust, with margin 2, kl.weight 20, twice the steps, and ablation simulated "
        "inside of blocks as well, of directions from the middle",
        merged(
            BOTH_ROBUST,
            {"separation": {"margin": 2.0}, "kl": {"weight": 20.0}, "train": {"steps": 80}},
        ),
    ),
    "first": Arm(
        "as closer, without the harmless prompts that the base model refuses, the first four "
        "tokens of a response with eight times the weight in the KL, and kl.weight 40",
        merged(
            BOTH_ROBUST,
            {
                "separation": {"margin": 2.0},
                "data": {"refused": "drop"},
                "kl": {"weight": 40.0, "first_weight": 8.0},
                "train": {"steps": 80},
            },
        ),
    ),
    "held": Arm(
        "as closer, the first four tokens of a response with four times the weight in the KL, "
        "kl.weight 30, 120 steps",
        HELD,
    ),
    "held_75": Arm("held, of whose update three quarters are kept", of="held", scale=0.75),
    "held_50": Arm("held, of whose update half is kept", of="held", scale=0.5),
    "wide": Arm(
        "as held, with all 390 harmless prompts in place of 160, less those that the base model "
        "refuses",
        merged(HELD, {"data": MORE | {"refused": "drop"}}),
    ),
    "wide_75": Arm("wide, of whose update three quarters are kept", of="wide", scale=0.75),
    "even": Arm(
        "as held, with all 390 harmless prompts in place of 160; the first tokens of a response "
        "weigh more only where it is no refusal",
        merged(HELD, {"data": MORE | {"refused": "even"}}),
    ),
    "even_75": Arm("even, of whose update three quarters are kept", of="even", scale=0.75),
    "long": Arm(
        "as even, with twice the steps and kl.weight 60",
        LONG,
    ),
    "long_75": Arm("long, of whose update three quarters are kept", of="long", scale=0.75),
    "longer": Arm(
        "as long, with 600 steps; trained in bfloat16, the base model's states kept on disk",
        merged(LONGER, {"model": {"dtype": "bf16"}}),
    ),
    "longer_fp32": Arm("as longer, trained in float32", LONGER),
    "longer_filtered": Arm(
        "longer, its update filtered (`train.update_filter` 1)", of="longer", filter=1.0
    ),
    "varied": Arm(
        "as longer, with all harmful prompts in place of 149; of four simulated attacks two are "
        "ablations, and every harmful row has a block and a strength of its own",
        merged(VARIED, {"model": {"dtype": "bf16"}}),
    ),
    "contrast": Arm(
        "as varied, the unsafe half of XSTest among the harmful prompts",
        merged(VARIED, {"model": {"dtype": "bf16"}}),
        contrast="all",
    ),
    "pairs": Arm(
        "as contrast, without the unsafe prompts whose safe twin is held out; 1000 steps",
        merged(VARIED, {"model": {"dtype": "bf16"}, "train": {"steps": 1000}}),
        contrast="pairs",
    ),
    "firm": Arm(
        "as pairs, with 600 steps, kl.weight 120, and the first four tokens of a response with "
        "eight times the weight in the KL",
        merged(VARIED, {"model": {"dtype": "bf16"}, "kl": {"weight": 120.0, "first_weight": 8.0}}),
        contrast="pairs",
    ),
    "broad": Arm(
        "as contrast, with 1 344 harmless prompts more and kl.weight 120",
        merged(VARIED, {"model": {"dtype": "bf16"}, "kl": {"weight": 120.0}}),
        contrast="all",
        more="builtin",
    ),
    "deeds": Arm(
        "as contrast, of XSTest's unsafe half the prompts that ask how to do something: without "
        "discrimination and privacy",
        merged(VARIED, {"model": {"dtype": "bf16"}}),
        contrast="deeds",
    ),
    "probed": Arm(
        "as contrast, SCAV at one block, the middle third or all among the simulated attacks, and "
        "the first four tokens of refusals with a quarter of the weight of later ones in the KL",
        merged(
            VARIED,
            {
                "model": {"dtype": "bf16"},
                "separation": {"robust": {"attacks": [*ROBUST["attacks"], "ablation", "scav"]}},
                "kl": {"refused_weight": 0.25},
            },
        ),
        contrast="all",
    ),
    "words": Arm(
        "as contrast, and of the openings after which a refusal is learned two fifths are one word "
        "out of a harmless answer (`refusal.prefill.words`)",
        merged(VARIED, {"model": {"dtype": "bf16"}, "refusal": {"prefill": {"words": 0.4}}}),
        contrast="all",
    ),
    "topical": Arm(
        "as contrast, with 592 harmless requests about the subjects of harmful ones "
        "(`builtin:topical`)",
        merged(VARIED, {"model": {"dtype": "bf16"}}),
        contrast="all",
        more="topical",
    ),
    "topical_mean": Arm(
        "the mean of the updates of two runs of topical, seeds 0 and 2, or s and s - 1",
        of="topical",
        mean=(0, 2),
    ),
    "topical_mean_90": Arm(
        "topical_mean, of whose update nine tenths are kept", of="topical", mean=(0, 2), scale=0.9
    ),
    "topical_mean_80": Arm(
        "topical_mean, of whose update four fifths are kept", of="topical", mean=(0, 2), scale=0.8
    ),
    "contrast_mean": Arm(
        "the mean of the updates of two runs of contrast, seeds 0 and 2, or s and s - 1",
        of="contrast",
        mean=(0, 2),
    ),
    "contrast_mean_90": Arm(
        "contrast_mean, of whose update nine tenths are kept", of="contrast", mean=(0, 2), scale=0.9
    ),
    "contrast_mean_80": Arm(
        "contrast_mean, of whose update four fifths are kept", of="contrast", mean=(0, 2), scale=0.8
    ),
    "contrast_mean3": Arm(
        "the mean of the updates of three runs of contrast, seeds 0, 1 and 2",
        of="contrast",
        mean=(0, 1, 2),
    ),
    "contrast_mean3_90": Arm(
        "contrast_mean3, of whose update nine tenths are kept",
        of="contrast",
        mean=(0, 1, 2),
        scale=0.9,
    ),
    "probed_mean_90": Arm(
        "as contrast_mean_90, SCAV at one block, the middle third or all among the simulated "
        "attacks, and the first four tokens of refusals with a quarter of the weight of later ones "
        "in the KL (probed)",
        of="probed",
        mean=(0, 2),
        scale=0.9,
    ),
    "words_mean_80": Arm("as contrast_mean_80, of words", of="words", mean=(0, 2), scale=0.8),
    "circuit_breaker": Arm(
        "circuit breaker, from its formula; all 390 harmless prompts, 120 steps",
        {"data": MORE, "train": {"steps": 120}},
    ),
    "circuit_breaker_long": Arm(
        "as circuit_breaker, with 400 steps at five times the rate (lr 1e-3), in bfloat16",
        {"model": {"dtype": "bf16"}, "data": MORE, "train": {"steps": 400, "lr": 1e-3}},
    ),
    "default": Arm(
        "es2fast's defaults: hinge, whole blocks, lr 5e-5",
        {"layers": "auto", "train": {"trainable": "blocks", "lr": 5e-5}},
    ),
}

# (attack, held-out prompts at most), essential and quick ones first
ATTACKS: list[tuple[dict[str, Any], int]] = [
    ({"name": "direct"}, 100),
    ({"name": "prefill", "tokens": [20]}, 100),
    ({"name": "replacement", "trial_prompts": 4}, 100),
    (
        {
            "name": "mean_difference",
            "layers": [15, 18, 21],
            "blocks": ["single"],
            "strengths": [1.0, 2.0],
            "trial_prompts": 6,
            "steps": "all",
        },
        100,
    ),
    ({"name": "ablation", "form": "zero", "layer": 12, "position": -1}, 100),
    ({"name": "scav", "trial_prompts": 4, "strengths": [1e-3], "steps": "prompt"}, 100),
    ({"name": "ablation", "form": "zero"}, 50),
    ({"name": "template"}, 50),
    ({"name": "roleplay"}, 50),
    ({"name": "repe", "trial_prompts": 4}, 50),
    ({"name": "splice"}, 50),
    ({"name": "finetune", "steps": [4, 16]}, 50),
    ({"name": "latent_pgd", "layer": 6, "epsilons": [0.1], "steps": 16}, 50),
    (
        {"name": "soft_prompt", "universal": True, "prompts": 32, "batch": 8, "steps": 100},
        50,
    ),
    ({"name": "soft_prompt", "steps": 60}, 50),
]


# How these attackers searched when the first rows were made; no part of a row's key.
_AS_THEN: dict[str, dict[str, Any]] = {
    "mean_difference": {"repetition_penalty": 1.0},
    "scav": {"repetition_penalty": 1.0},
    "repe": {"blocks": ["all"], "steps": "all", "repetition_penalty": 1.0},
}


def as_then(attack: dict[str, Any]) -> dict[str, Any]:
    """An entry of `ATTACKS` with what was the library's default for it then."""
    return _AS_THEN.get(attack["name"], {}) | attack


def mean_seeds(name: str, seed: int) -> tuple[int, ...]:
    """The runs that an arm is the mean of, with `seed` first; empty: it is none."""
    return tuple((seed + other) % SEEDS for other in ARMS[name].mean)


def label(attack: dict[str, Any]) -> str:
    """Of an attack in tables: its name, whether one prompt has to serve for all, and whether it
    searches the direction that elsewhere is given."""
    searched = attack["name"] == "ablation" and "layer" not in attack
    how = ", universal" * bool(attack.get("universal")) + ", searched" * searched
    return str(attack["name"]) + how


def answer_tokens(attack: dict[str, Any], tokens: int) -> int:
    """At which answers under an attack are cut: later where it makes the model say a sentence of
    its own first, of some 25 tokens, behind which a refusal may follow."""
    return max(tokens, 96) if attack["name"] in ("latent_pgd", "soft_prompt") else tokens
