"""A device map: hooks, gradients and weights of attacks work on a model that accelerate placed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import dispatch_model
from attacks.small import HARMFUL, hook_count, small_target, snapshot, unchanged
from tiny_models import save_tiny
from torch import nn

from es2fast.attacks.registry import make_attack
from es2fast.config import ModelConfig, TrainConfig
from es2fast.errors import UserError
from es2fast.evaluation.teacher import SavedTeacher, token_batches
from es2fast.modeling import load
from es2fast.modeling.load import (
    adapter_base,
    load_causal_lm,
    load_merged,
    load_model_config,
    load_tokenizer,
)
from es2fast.modeling.skeleton import make_skeleton
from es2fast.modeling.sublayers import sublayers
from es2fast.modeling.teacher import set_trainable
from es2fast.run.export import save_model

# every block is a unit of its own, with accelerate's hooks on it, as on several GPUs
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu",
          "lm_head": "cpu"} | {f"model.layers.{i}": "cpu" for i in range(4)}  # fmt: skip
ATTACKS: list[Any] = [
    "direct",
    {"name": "scav", "strengths": [1e-3], "blocks": ["all"], "positions": "all"},
    {"name": "mean_difference", "strengths": [1.0], "layers": [1, 2]},
    "replacement",
    {"name": "ablation", "candidates": 4},
    {"name": "ablation_weights", "candidates": 4},
    {"name": "latent_pgd", "steps": 2, "epsilons": [0.3], "layer": 1},
    {"name": "soft_prompt", "steps": 2, "tokens": 3},
    {"name": "finetune", "steps": [2], "pairs": 4},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


def loaded(folder: Path, *, placed: bool) -> Any:
    """The model; placed: with accelerate's hooks, which transformers leaves out on one device."""
    if not placed:
        return load_causal_lm(ModelConfig(name=str(folder)), "fp32").eval()
    model: Any = load_causal_lm(ModelConfig(name=str(folder)), "fp32", PLACES).eval()
    model = dispatch_model(model, PLACES, force_hooks=True)
    assert all(hasattr(block, "_hf_hook") for block in model.model.layers)
    return model


@pytest.mark.parametrize("entry", ATTACKS, ids=lambda e: e if isinstance(e, str) else e["name"])
def test_attacks_give_the_same_answers(folder: Path, entry: Any) -> None:
    found = []
    for placed in (False, True):
        model = loaded(folder, placed=placed)
        target, attack = small_target(model), make_attack(entry)
        before = snapshot(model)
        attack.prepare(target)
        answers = attack.answers(target, HARMFUL[:6])
        found.append(
            [[(answer.text, dict(answer.parameters)) for answer in one] for one in answers]
        )
        assert hook_count(model) == 0 and unchanged(model, before)
    assert found[0] == found[1]


def test_what_is_measured_is_the_same(folder: Path, tmp_path: Path) -> None:
    plain, placed = loaded(folder, placed=False), loaded(folder, placed=True)
    formatter = small_target().formatter
    batches = token_batches(formatter, HARMFUL[:5], ["sure here is some text ."] * 5, 2)
    teacher = SavedTeacher(tmp_path / "t", "key")
    teacher.write(plain, batches, "plain")
    found = teacher.compare(placed, batches, "placed")
    assert found.kl == pytest.approx(0.0, abs=1e-7) and found.top1 == 1.0


def test_weights_outside_of_the_devices_are_a_mistake(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def offloading(*args: Any, **options: Any) -> Any:
        model, found = real(*args, **options)
        model.model.layers[3].to("meta")  # what accelerate leaves of an offloaded block
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offloading)
    with pytest.raises(UserError, match=r"evaluate\.device_map: 'auto' leaves model\.layers\.3"):
        load_causal_lm(ModelConfig(name=str(folder)), "fp32", "auto")


def test_the_template_that_a_run_named_is_saved_with_the_model(
    folder: Path, tmp_path: Path
) -> None:
    name = ModelConfig(name=str(folder))
    template = "<s><user> {{ messages[0]['content'] }} <bot>"
    save_model(
        load_causal_lm(name, "fp32"),
        load_tokenizer(name),
        tmp_path / "saved",
        main=True,
        template=template,
    )
    assert load_tokenizer(ModelConfig(name=str(tmp_path / "saved"))).chat_template == template
    assert load_tokenizer(name).chat_template != template


@pytest.mark.parametrize("revision", [None, "v1"])
def test_an_adapter_remembers_the_revision_of_its_base(
    folder: Path, tmp_path: Path, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ModelConfig(name=str(folder))
    lora = TrainConfig(trainable="lora")
    student = set_trainable(load_causal_lm(name, "fp32"), lora, 1, revision)
    save_model(student, load_tokenizer(name), tmp_path / "saved", main=True)
    base = {"name": str(folder), "revision": revision}
    assert adapter_base(str(tmp_path / "saved")) == base
    asked: list[Any] = []
    real = load.load_causal_lm

    def loading(model: ModelConfig, *more: Any) -> Any:
        asked.append(model)
        return real(name, *more)

    monkeypatch.setattr(load, "load_causal_lm", loading)
    load_merged(ModelConfig(name=str(tmp_path / "saved")), "fp32")
    assert [{"name": model.name, "revision": model.revision} for model in asked] == [base]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox"])
def test_a_saved_model_tells_transformers_4_its_rotary_base(tmp_path: Path, family: str) -> None:
    """Which reads other keys; the model as transformers 5 reads it is the same."""
    scaled = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    ropes: dict[str, Any] = {
        "llama": {"rope_parameters": scaled},
        "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "gemma3_text": {},
        "gpt_neox": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e5,
                "partial_rotary_factor": 0.75,
            }
        },
    }
    expected: dict[str, dict[str, Any]] = {
        "llama": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "qwen2": {"rope_theta": 1e6},
        "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        "gpt_neox": {"rotary_emb_base": 5e5, "rotary_pct": 0.75, "partial_rotary_factor": 0.75},
    }
    source = save_tiny(tmp_path / "made", family, **ropes[family])
    name = ModelConfig(name=str(source))
    model = load_causal_lm(name, "fp32")
    save_model(model, load_tokenizer(name), tmp_path / "saved", main=True)
    raw = json.loads((tmp_path / "saved/config.json").read_text())
    assert {key: raw[key] for key in expected[family]} == expected[family]
    assert ("rope_scaling" in raw) == ("rope_scaling" in expected[family])
    again = load_causal_lm(ModelConfig(name=str(tmp_path / "saved")), "fp32")
    assert again.config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize(
    "broken", [{"hidden_act": "none_such"}, {"num_attention_heads": 0}, {"pad_token_id": 10**6}]
)
def test_a_config_that_its_family_cannot_have(tmp_path: Path, broken: dict[str, Any]) -> None:
    path = save_tiny(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | broken))
    model = ModelConfig(name=str(tmp_path))
    with pytest.raises(UserError, match=r"model\.name: .* cannot be built|that can be loaded"):
        make_skeleton(model, load_model_config(model))


def test_masks_that_cannot_be_cut_and_blocks_with_several_states(tmp_path: Path) -> None:
    model = ModelConfig(name=str(save_tiny(tmp_path)), attn_implementation="flex_attention")
    config = load_model_config(model)
    with pytest.raises(UserError, match=r"attn_implementation: 'flex_attention' is not supported"):
        make_skeleton(model, config)
    config.model_type = "gemma3n_text"
    with pytest.raises(UserError, match="whose blocks hold several states per token"):
        make_skeleton(ModelConfig(name=str(tmp_path)), config)


@pytest.mark.parametrize("text", ["{}", "{", "[]"])
def test_an_adapter_of_no_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="does not say of which model the adapter is"):
        adapter_base(str(tmp_path))


def test_all_that_adds_to_the_stream_is_found() -> None:
    block, shared = nn.Module(), nn.Linear(2, 2)
    block.self_attn, block.mamba = nn.Linear(2, 2), nn.Linear(2, 2)
    block.block_sparse_moe, block.mlp, block.shared_mlp = None, shared, shared  # one, twice named
    assert sublayers(block) == [block.self_attn, block.mamba, shared]
    del block.self_attn, block.mamba
    with pytest.raises(UserError, match="has no attention that can be found"):
        sublayers(block)


RELEASE = """
import gc
from pathlib import Path
import torch
from torch import nn
from es2fast.modeling.load import free_memory
def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024
def model():
    found = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(100)))
    found.self = [found]  # cyclic, as transformers' models are
    return found
gc.disable()
torch.ones(8_000_000)  # from now on glibc keeps what is smaller than this
before = resident()
first = model()
left = [layer for i, layer in enumerate(first) if i % 10 == 9]  # between what is let go
held = resident() - before
del first
free_memory()
print(held, resident() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_memory_of_a_model_goes_back_to_the_system() -> None:
    """A tenth of its 400 MB is still held; without the collection or the trim it is all of it."""
    done = subprocess.run(
        [sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True
    )
    held, kept = map(int, done.stdout.split())
    assert kept < 0.3 * held
