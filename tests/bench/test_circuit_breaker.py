"""The baseline's two losses against fp64 row by row, and that training does what they say."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tokenizer, write_prompts
from torch import Tensor

from bench.studies.circuit_breaker import circuit_breaker, rerouting, retention
from es2fast.config import DataConfig, ModelConfig, TrainConfig, parse_config
from es2fast.data import Formatter, Prompt
from es2fast.modeling.load import load_merged
from es2fast.modeling.teacher import set_trainable

PROMPTS = [
    Prompt.of("break the car", "sure here is the road"),
    Prompt.of("please draw a tree .", "sure here is some text ."),
]
DEPTH = 4
SHARED = 2  # tokens that do not count


def student(folder: Path) -> Any:
    """A LoRA model whose adapters have moved away from nothing."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Any = set_trainable(model, TrainConfig(trainable="lora"), DEPTH - 1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return found


def plain_states(model: Any, formatter: Formatter, prompt: Prompt) -> tuple[Tensor, ...]:
    """Block outputs (L, tokens, H) of one unpadded row, base and tuned, by transformers' own
    option; the last block's is not among them before the final norm."""
    ids = torch.tensor([[i for part in formatter.conversation_ids(prompt, prompt.response or "")
                         for i in part]])  # fmt: skip
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=ids, output_hidden_states=True).hidden_states[1:-1]
        tuned = model(input_ids=ids, output_hidden_states=True).hidden_states[1:-1]
    return torch.stack(base)[:, 0, SHARED:], torch.stack(tuned)[:, 0, SHARED:]


def test_losses_equal_plain_fp64(tmp_path: Path) -> None:
    model = student(save_tiny(tmp_path / "tiny", "llama"))
    formatter = Formatter(tokenizer(), DataConfig())
    wide = copy.deepcopy(model).double()
    pairs = [plain_states(wide, formatter, prompt) for prompt in PROMPTS]
    layers = [1, 2]
    cosines = [
        (b * t).sum() / (b.norm() * t.norm())
        for base, tuned in pairs
        for layer in layers
        for b, t in zip(base[layer], tuned[layer])
    ]
    expected = sum(max(float(c), 0.0) for c in cosines) / len(cosines)
    assert expected < 0.999  # the adapters do move the states
    found = rerouting(model, formatter, PROMPTS, layers, SHARED)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # every block's distance: the last one's is what the others leave of the mean over all
    kept = retention(model, formatter, PROMPTS, SHARED).item() * DEPTH
    below = [(b - t).norm(dim=-1) for b, t in pairs]
    means = torch.cat(below, dim=1).mean(1)
    assert kept > means.sum().item() * (1 - 1e-5)
    last = kept - means.sum().item()
    assert last == pytest.approx(last_distance(wide, formatter), rel=1e-4)


def last_distance(model: Any, formatter: Formatter) -> float:
    """Mean distance of the last block's outputs, which a hook of the test's own reads."""
    seen: list[Tensor] = []
    block = model.get_base_model().model.layers[-1]
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(
            (out if isinstance(out, Tensor) else out[0])[0, SHARED:]
        )
    )
    for prompt in PROMPTS:
        plain_states(model, formatter, prompt)
    handle.remove()
    gaps = [(base - tuned).norm(dim=-1) for base, tuned in zip(seen[::2], seen[1::2])]
    return torch.cat(gaps).mean().item()


def test_training_turns_harmful_states_and_leaves_a_loadable_adapter(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", "llama")
    config = parse_config(
        {
            "model": {"name": str(tiny), "dtype": "fp32"},
            "data": write_prompts(tmp_path / "data") | {"cache_dir": str(tmp_path / "cache")},
            "train": {"steps": 12, "micro_batch_size": 2, "trainable": "lora", "lr": 1e-2,
                      "device": "cpu"},
            "output_dir": str(tmp_path / "out"),
        }
    )  # fmt: skip
    folder = tmp_path / "adapter"
    circuit_breaker(config, folder, answer_tokens=4)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trained: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    formatter = Formatter(tokenizer(), DataConfig())
    cosine = rerouting(trained, formatter, PROMPTS[:1], [1, 2], SHARED).item()
    assert math.isfinite(cosine) and cosine < 0.9  # it starts at 1
    merged = load_merged(ModelConfig(name=str(folder)), "fp32")
    assert not any("lora" in name for name, _ in merged.named_parameters())
