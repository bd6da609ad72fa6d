"""One optimizer step of the real engine, 2 CPU ranks under ZeRO-3, against fp64 plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tokenizer, write_prompts

from es2fast.config import DataConfig, parse_config
from es2fast.data import Formatter, PairedSampler, load_groups
from es2fast.distributed.launch import free_port
from es2fast.modeling.teacher import set_trainable
from es2fast.training.refusals import RefusalAnchor, anchor_texts
from launcher.plain_es2 import es2_loss, refusal_loss, state_after_block
from launcher.worker import STEPS, some_whitening

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
LAYERS = [1, 2]
TESTS = Path(__file__).parents[1]
UNBOUNDED = ["l2", "log", "squared", "centroid", "fisher"]
ANCHOR = {"weight": 2.0, "source": "list", "texts": ["here is some text .", "please draw a tree"],
          "tokens": 4, "decay": 0.7}  # fmt: skip
DEEP = ANCHOR | {
    "prefill": {"probability": 0.6, "tokens": 3, "texts": ["sure here is the road", "the house"]}
}
COMPILED = ["compiled", "compiled_lora"] if "ES2FAST_LONG" in os.environ else []  # minutes
UNPARTITIONED = ("zero0", "zero1", "zero2", "anchor_alone", "moments_zero2", *COMPILED)
Bank = dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]


def case(model: Path, data: dict[str, str], **train: Any) -> dict[str, Any]:
    zero = {"stage": train.pop("stage", 3)} | train.pop("zero", {})
    settings = {"micro_batch_size": 1, "lr": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"}
    return {
        "config": {
            "model": {"name": str(model), "dtype": "fp32"},
            "data": data,
            "layers": LAYERS,
            "separation": train.pop("separation", {}),
            "refusal": train.pop("refusal", {}),
            "kl": {"weight": 3.0, "direction": train.pop("direction", "forward")},
            "train": settings | {"device": "cpu", "max_grad_norm": 1e9} | train,
            "deepspeed": {"zero_optimization": zero},
        }
    }


def execute(folder: Path, name: str, cases: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Runs worker.py on `ranks` ranks, by the launcher when there is more than one."""
    (folder / f"{name}.json").write_text(json.dumps(cases))
    out = folder / f"{name}.pt"
    worker = [str(TESTS / "launcher/worker.py"), "--out", str(out)]
    worker += ["--cases", str(folder / f"{name}.json")]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port()), "--log_level", "warning"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *worker]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exact")
    untied = save_tiny(folder / "untied", "llama", tie_word_embeddings=False)
    tied = save_tiny(folder / "tied", "qwen3", tie_word_embeddings=True)
    biased = save_tiny(folder / "biased", "phi", tie_word_embeddings=False)
    capped = save_tiny(folder / "capped", "gemma2", tie_word_embeddings=True)
    data = write_prompts(folder / "data")
    two = {
        "twin": case(untied, data),
        "twin_checkpointed": case(untied, data, gradient_checkpointing=True),
        "twin_padded": case(untied, data, packing=False),
        "lora": case(untied, data, trainable="lora", lora={"r": 4}),
        "lora_padded": case(untied, data, trainable="lora", lora={"r": 4}, packing=False),
        "lora_checkpointed": case(
            untied, data, trainable="lora", lora={"r": 4}, gradient_checkpointing=True
        ),
        "all": case(untied, data, trainable="all"),
        "all_tied": case(tied, data, trainable="all", direction="reverse"),
        "all_biased": case(biased, data, trainable="all"),
        "tied": case(capped, data),
        "tied_lora": case(tied, data, trainable="lora", lora={"r": 4}),
        "accumulated": case(untied, data, gradient_accumulation=2),
        "zero0": case(untied, data, stage=0, gradient_accumulation=2),
        "zero1": case(untied, data, stage=1, gradient_accumulation=2),
        "zero2": case(untied, data, stage=2),
        "normed": case(untied, data, separation={"space": "normed", "margin": 2.0}),
        "normed_checkpointed": case(
            untied, data, separation={"space": "normed", "margin": 2.0}, gradient_checkpointing=True
        ),
        "norm_band": case(untied, data, separation={"norm_band": [0.9, 1.1]}),
        "bank": case(untied, data, separation={"bank": 4, "margin": 5.0}),
        "bank_accumulated": case(
            untied, data, separation={"bank": 4, "margin": 5.0}, gradient_accumulation=2
        ),
        **{loss: case(untied, data, separation={"loss": loss}) for loss in UNBOUNDED},
        "moves": case(untied, data, separation={"moves": "harmful"}),
        "moves_bank": case(untied, data, separation={"moves": "harmful", "bank": 4}),
        "softplus": case(untied, data, separation={"loss": "softplus", "margin": 2.0}),
        "cosine": case(untied, data, separation={"loss": "cosine", "margin": -0.5}),
        "centroid_bank": case(
            untied, data, separation={"loss": "centroid", "margin": 3.0, "bank": 2}
        ),
    }
    robust = {"robust": {"probability": 0.6}, "bank": 4}
    two["robust"] = case(untied, data, separation=robust)
    two["robust_checkpointed"] = case(untied, data, separation=robust, gradient_checkpointing=True)
    two |= {
        "anchor": case(untied, data, refusal=ANCHOR),
        "anchor_lora": case(
            untied, data, trainable="lora", lora={"r": 4}, gradient_checkpointing=True, refusal=DEEP
        ),
        "anchor_every_block": case(
            untied, data, trainable="lora", lora={"r": 4}, trainable_blocks="all", refusal=DEEP
        ),
        "anchor_all_accumulated": case(
            capped, data, trainable="all", gradient_accumulation=2, refusal=DEEP
        ),
        "anchor_alone": case(
            biased, data, stage=2, separation={"weight": 0.0}, refusal=DEEP | {"decay": 1.0}
        ),
    }
    attacked = {"separation": robust | {"weight": 0.5}, "refusal": DEEP}
    two["anchor_robust"] = case(untied, data, **attacked)
    two["anchor_robust_checkpointed"] = case(untied, data, gradient_checkpointing=True, **attacked)
    wide = {"attacks": ["mean_difference", "replacement", "ablation"], "blocks": "all"}
    wide |= {"probability": 0.9, "strength": [0.5, 2.0]}
    every: dict[str, Any] = {"separation": {"robust": wide}, "refusal": DEEP}
    two["attacks"] = case(untied, data, **every)
    two["attacks_checkpointed"] = case(untied, data, gradient_checkpointing=True, **every)
    kept = data | {"cache_dir": str(folder / "cache")}
    two |= {
        "cache": case(untied, kept, teacher="cache"),
        "cache_all_tied": case(tied, kept, teacher="cache", trainable="all", direction="reverse"),
        "cache_anchor_lora": case(
            untied, kept, teacher="cache", trainable="lora", lora={"r": 4}, refusal=DEEP
        ),
        "moments": case(untied, kept, teacher="moments"),
        "moments_zero2": case(untied, kept, teacher="moments", stage=2, gradient_accumulation=2),
    }
    parted = {"zero": {"stage3_param_persistence_threshold": 0}}  # tiny weights too
    lora = {"trainable": "lora", "lora": {"r": 4}}
    sharded = parted | {"zero3_head": "sharded"}
    two |= {
        "parted_head": case(untied, data, **lora, **parted),
        "sharded_head": case(untied, data, **lora, **sharded),
        "sharded_head_twin": case(
            capped, data, refusal=DEEP, gradient_accumulation=2, gradient_checkpointing=True,
            **sharded,
        ),
        "sharded_head_tied": case(tied, data, direction="reverse", **lora, **sharded),
        "sharded_head_cache": case(
            biased, kept, teacher="cache", refusal=DEEP, **lora, **sharded
        ),
    }  # fmt: skip
    if COMPILED:
        fast = {"stage": 2, "compile": True}
        two |= {
            "compiled": case(untied, data, **fast),
            "compiled_lora": case(
                untied, data, trainable="lora", lora={"r": 4}, gradient_checkpointing=True,
                refusal=DEEP, **fast,
            ),
            "attacks_compiled": case(untied, data, **fast, **every),
        }  # fmt: skip
    one = {
        "attacks": case(untied, data, micro_batch_size=2, **every),
        "anchor": case(untied, data, micro_batch_size=2, refusal=ANCHOR),
        "anchor_robust": case(untied, data, micro_batch_size=2, **attacked),
        "robust": case(untied, data, micro_batch_size=2, separation=robust),
        "twin": case(untied, data, micro_batch_size=2),
        "accumulated": case(untied, data, micro_batch_size=2, gradient_accumulation=2),
    }
    return {
        "two": execute(folder, "two", two, 2),
        "one": execute(folder, "one", one, 1),
        "cases": two,
    }


SHARDED = ["sharded_head", "sharded_head_twin", "sharded_head_tied", "sharded_head_cache"]
CACHED = ["cache", "cache_all_tied", "cache_anchor_lora", "moments", "moments_zero2"]
CASES = ["twin", "twin_padded", "twin_checkpointed", "lora", "lora_padded", "lora_checkpointed",
         "all", "all_tied", "all_biased",
         "tied", "tied_lora", "accumulated", "zero0", "zero1", "zero2",
         "normed", "normed_checkpointed", "norm_band",
         "bank", "bank_accumulated", *UNBOUNDED, "softplus", "cosine",
         "centroid_bank", "moves", "moves_bank", "anchor", "anchor_lora",
         "anchor_every_block", "anchor_all_accumulated",
         "anchor_alone", *CACHED, "parted_head", *SHARDED, *COMPILED]  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


class Plain:
    """The run of one case again, in fp64, from the weights the engine had before each step."""

    def __init__(self, spec: dict[str, Any], found: dict[str, Any]):
        from transformers import AutoModelForCausalLM

        self.config = config = parse_config(spec["config"])
        name = config.model.name
        self.teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
        student: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
        self.student = set_trainable(student, config.train, LAYERS[-1]).double().eval()
        self.states = found["states"]
        self.groups = load_groups(config.data)
        self.formatter = Formatter(tokenizer(), DataConfig())
        self.sampler = PairedSampler(
            len(self.groups.harmful), len(self.groups.harmless), seed=0, micro_batch_size=2,
            gradient_accumulation=config.train.gradient_accumulation, rank=0, world_size=1,
        )  # fmt: skip
        texts = anchor_texts(config, self.groups.harmful)
        self.anchor: RefusalAnchor | None = None
        if texts is not None:
            self.anchor = RefusalAnchor(config, self.formatter, self.groups.harmful, texts)

    def load(self, step: int) -> None:
        state = {k: v.double() for k, v in self.states[step].items()}
        assert not self.student.load_state_dict(state, strict=False).unexpected_keys

    def batches(self, step: int) -> list[tuple[list[list[int]], list[tuple[list[int], list[int]]]]]:
        """Per global micro-batch: ids of harmful prompts, of harmless prompts and responses."""
        return [
            (
                [self.formatter.prompt_ids(self.groups.harmful[i]) for i in a],
                [
                    self.formatter.conversation_ids(p, p.response or "")
                    for p in (self.groups.harmless[i] for i in b)
                ],
            )
            for a, b in self.sampler.indices(step)
        ]

    def remember(self, bank: Bank, harmful: Any, harmless: Any) -> None:
        """Appends a micro-batch's states to the bank and keeps the last rows."""
        size = self.config.separation.bank
        for layer in LAYERS:
            for rows, prompts in zip(bank[layer], (harmful, [p for p, _ in harmless])):
                with torch.no_grad():
                    rows += [state_after_block(self.student, p, layer)[-1] for p in prompts]
                del rows[: max(len(rows) - size, 0)]

    def refusals(self, step: int) -> tuple[torch.Tensor, float]:
        """Cross-entropy per token of a step's refusals, and the share of first tokens predicted."""
        total, weights, hits = torch.zeros(()).double(), 0.0, []
        for rows, _ in self.sampler.indices(step) if self.anchor is not None else ():
            for row in rows:
                after = self.anchor.row(step, row)  # type: ignore[union-attr]
                prompt = self.formatter.prompt_ids(self.groups.harmful[row])
                decay = self.config.refusal.decay
                found = refusal_loss(self.student, prompt, after.opening, after.refusal, decay)
                total, weights = total + found[0], weights + found[1]
                hits.append(found[2])
        return total / max(weights, 1.0), sum(hits) / max(len(hits), 1)

    def last_step(self) -> tuple[float, float, dict[str, torch.Tensor]]:
        """Separation, KL and gradients of the last step."""
        section, train = self.config.separation, self.config.train
        fisher = section.loss == "fisher"
        scale = 8.0 if fisher else 1.0 if section.loss == "cosine" else 5.0
        bank: Bank = {layer: ([], []) for layer in LAYERS}
        for step in range(STEPS - 1) if section.bank else ():
            self.load(step)
            for harmful, harmless in self.batches(step):
                self.remember(bank, harmful, harmless)
        self.load(STEPS - 1)
        parts, counts = [], []
        for harmful, harmless in self.batches(STEPS - 1):
            counts.append(sum(len(p) + len(r) for p, r in harmless))
            parts.append(
                es2_loss(
                    self.student,
                    self.teacher,
                    harmful,
                    harmless,
                    layers=LAYERS,
                    kl_weight=0.0,
                    loss=section.loss,
                    margin=None if section.margin is None else section.margin * scale,
                    scale=scale,
                    whiten=dense(some_whitening()) if fisher else None,
                    bank={layer: (list(a), list(b)) for layer, (a, b) in bank.items()},
                    direction=self.config.kl.direction,
                    space=section.space,
                    norm0=10.0,
                    band=section.norm_band,
                    band_weight=section.norm_band_weight,
                    weight=section.weight,
                    moves=section.moves,
                )
            )
            if section.bank:
                self.remember(bank, harmful, harmless)
        kl = sum(part[1] * count for part, count in zip(parts, counts)) / sum(counts)
        rest = sum(part[2] for part in parts) / train.gradient_accumulation
        refusal, self.top1 = self.refusals(STEPS - 1)
        (rest + self.config.kl.weight * kl + self.config.refusal.weight * refusal).backward()
        self.refusal = refusal.item()
        separation = sum(part[0].item() for part in parts) / len(parts)
        grads = {n: p.grad for n, p in self.student.named_parameters() if p.requires_grad}
        return separation, kl.item(), grads


def dense(whitening: Any) -> torch.Tensor:
    """(H, H) fp64 matrix of a whitening, from its two factors."""
    std, factor = whitening.inverse_std.double(), whitening.factor.double()
    return (torch.eye(len(std)).double() - factor @ factor.t()) @ torch.diag(std)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_plain_fp64(runs: dict[str, Any], name: str) -> None:
    found = runs["two"][name]
    plain = Plain(runs["cases"][name], found)
    separation, kl, grads = plain.last_step()
    assert kl > 1e-4  # the step compared is not the trivial one at KL = 0
    # a cosine is 1 at most and rounded to 6e-8; the loss is what it exceeds the margin by
    rounding = 2e-7 if name == "cosine" else 0.0
    assert found["losses"][-1] == pytest.approx(separation, rel=1e-5, abs=rounding)
    assert found["kl"][-1] == pytest.approx(kl, rel=1e-3)
    if plain.anchor is None:
        assert found["refusal"][-1] == {}
    else:
        assert plain.refusal > 0.1
        assert found["refusal"][-1]["refusal"] == pytest.approx(plain.refusal, rel=1e-5)
        assert found["refusal"][-1]["refusal_top1"] == pytest.approx(plain.top1)
    assert found["grads"].keys() == grads.keys()
    everything = torch.cat([grads[k].flatten() for k in grads])
    ours = torch.cat([found["grads"][k].flatten() for k in grads])
    assert relative(ours, everything) <= 1e-5
    assert found["norms"][-1] == pytest.approx(everything.norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["robust", "anchor_robust", "attacks"])
def test_a_simulated_attack_is_the_same_on_one_rank_two_ranks_and_recomputed(
    runs: dict[str, Any], name: str
) -> None:
    two, one = runs["two"][name], runs["one"][name]
    again = runs["two"][f"{name}_checkpointed"]
    assert any(two["attacked"][:-1]) and not all(two["attacked"])
    if name == "attacks":
        assert {"replacement", "ablation"} <= set(two["attacked"])
    compiled = [runs["two"][f"{name}_compiled"]] if COMPILED and name == "attacks" else []
    for other in (one, again, *compiled):
        assert other["attacked"] == two["attacked"]
        assert other["losses"] == pytest.approx(two["losses"], rel=1e-5)
        assert other["kl"][1:] == pytest.approx(two["kl"][1:], rel=1e-4)
        for found, expected in zip(other["refusal"], two["refusal"]):
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*CASES, "robust", "anchor_robust", "attacks"])
def test_ranks_end_with_equal_parameters(runs: dict[str, Any], name: str) -> None:
    digests = runs["two"][name]["digests"]
    assert len(digests) == 2 and len(set(digests)) == 1


@pytest.mark.parametrize(
    "name", [c for c in [*CASES, "robust", "anchor_robust"] if c not in UNPARTITIONED]
)
def test_trace_is_never_invalidated(runs: dict[str, Any], name: str) -> None:
    """Recorded in the first step, complete and in use from then on."""
    assert runs["two"][name]["trace"][1:] == [True] * (STEPS - 1)


@pytest.mark.parametrize("name", ["twin", "accumulated", "anchor"])
def test_one_rank_of_two_rows_equals_two_ranks_of_one(runs: dict[str, Any], name: str) -> None:
    one, two = runs["one"][name], runs["two"][name]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["kl"][1:] == pytest.approx(two["kl"][1:], rel=1e-4)
    for key, grad in one["grads"].items():
        assert relative(two["grads"][key], grad.double()) <= 1e-4, key


@pytest.mark.parametrize("name", ["parted_head", *SHARDED])
def test_nothing_is_left_gathered(runs: dict[str, Any], name: str) -> None:
    assert runs["two"][name]["whole"] == []


def test_a_sharded_head_is_never_gathered(runs: dict[str, Any]) -> None:
    """Gathered, it is once per step: half of its V x 32 float32 come from the other rank."""
    gathered, sharded = (
        [step["parameters"] for step in runs["two"][name]["wire"]]
        for name in ("parted_head", "sharded_head")
    )
    head = len(tokenizer()) * 32 * 4 // 2
    assert [a - b for a, b in zip(gathered, sharded, strict=True)][1:] == [head] * (STEPS - 1)


def test_checkpointing_changes_nothing(runs: dict[str, Any]) -> None:
    for name in ("twin", "lora"):
        plain, recomputed = runs["two"][name], runs["two"][f"{name}_checkpointed"]
        assert plain["losses"] == pytest.approx(recomputed["losses"], rel=1e-6)
