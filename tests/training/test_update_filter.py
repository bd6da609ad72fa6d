"""The filter of a LoRA update against least squares, and what it leaves of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tiny_model, tokenizer, write_prompts
from torch import Tensor

from es2fast.config import DataConfig, TrainConfig, parse_config
from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.teacher import set_trainable
from es2fast.training import update_filter
from es2fast.training.plan import make_plan
from es2fast.training.update_filter import RIDGE, InputMoments, filter_update, wiener

RUNTIME = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")
HARMFUL = [Prompt.of(f"{verb} the {thing}", "sure here") for verb in ("break", "steal")
           for thing in ("car", "lamp", "door")]  # fmt: skip
HARMLESS = [Prompt.of(f"please draw a {thing} .", "here is some text .")
            for thing in ("car", "boat", "hill", "tree")]  # fmt: skip
STRENGTH = 3.0


def rows(prompts: list[Prompt]) -> list[list[int]]:
    formatter = Formatter(tokenizer(), DataConfig())
    return [
        [i for part in formatter.conversation_ids(p, p.response or "") for i in part]
        for p in prompts
    ]


def student(size: float = 0.1) -> Any:
    """LoRA on every block of a tiny model, with an update that is not 0."""
    generator = torch.Generator().manual_seed(0)
    train = TrainConfig(trainable="lora", trainable_blocks="all")
    found: Any = set_trainable(tiny_model("llama"), train, 3)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))
    return found


def test_equals_least_squares() -> None:
    """The objective of the module's docstring, as one overdetermined system of equations."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, x, z = draw(3, 8), draw(40, 8), draw(50, 8) * torch.logspace(-3, 3, 8, dtype=torch.float64)
    c, d = x.T @ x / len(x), z.T @ z / len(z)
    unit = (RIDGE * (c + d).diagonal()).sqrt()
    design = torch.cat([x / len(x) ** 0.5, (STRENGTH / len(z)) ** 0.5 * z, unit.diag()])
    wanted = torch.cat([x @ a.T / len(x) ** 0.5, 0 * z @ a.T, unit[:, None] * a.T])
    expected = torch.linalg.lstsq(design, wanted, driver="gelsd").solution.T
    torch.testing.assert_close(wiener(a, c, d, STRENGTH), expected, rtol=1e-8, atol=1e-10)


def test_strength_0_is_no_filter() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    a = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(wiener(a, x.T @ x, x.T @ x, 0.0), a.double())


def test_moments_are_those_of_the_inputs() -> None:
    """Padding does not count, layers with one input share it, and wide inputs are left out."""
    model = student().eval()
    formatter = Formatter(tokenizer(), DataConfig())
    layer = model.get_base_model().model.layers[2].self_attn.q_proj
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows(HARMFUL):
            model(input_ids=torch.tensor([row]))
    handle.remove()
    expected = torch.cat(seen).double()

    (layers,) = update_filter._groups(model)
    assert not any("down_proj" in name for name in layers)
    moments = InputMoments(layers)
    with moments, torch.no_grad():
        update_filter._forward(model, formatter, rows(HARMFUL), "harmful", moments, RUNTIME, "")
    q, k, v = (f"2.self_attn.{name}_proj" for name in "qkv")
    assert moments.shared()[q] == [q, k, v] and len(moments.shared()) == 4 * 3
    found = moments.sums[q, "harmful"].double()
    torch.testing.assert_close(found, expected.T @ expected, rtol=1e-4, atol=1e-4)


def factors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def test_a_block_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is filtered on what filtered ones below it give."""
    formatter = Formatter(tokenizer(), DataConfig())
    found = []
    for most in (update_filter.MOMENT_BYTES, 1):
        monkeypatch.setattr(update_filter, "MOMENT_BYTES", most)
        model = student()
        assert len(list(update_filter._groups(model))) == (1 if most > 1 else 4)
        filter_update(model, formatter, rows(HARMFUL), rows(HARMLESS), STRENGTH, RUNTIME)
        found.append(factors(model))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma2", "gpt_neox"])
def test_of_other_families_what_reads_the_stream_is_filtered(family: str) -> None:
    """Experts and routers, which read tokens in another shape, are left as they are."""
    train = TrainConfig(trainable="lora", trainable_blocks="all")
    model: Any = set_trainable(tiny_model(family), train, 3)
    before = {name: a.clone() for name, a in factors(model).items()}
    filter_update(
        model, Formatter(tokenizer(), DataConfig()), rows(HARMFUL), rows(HARMLESS), 1.0, RUNTIME
    )
    changed = {name for name, a in factors(model).items() if not a.equal(before[name])}
    assert any("attn" in name or "attention" in name for name in changed)
    assert not any("expert" in name or "down_proj" in name for name in changed)
    assert all(a.isfinite().all() for a in factors(model).values())


def energies(model: Any, prompts: list[Prompt]) -> dict[str, float]:
    """Per filtered layer the mean |B A x|^2 over the inputs that the base model gives it."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, inputs, name=name: found.setdefault(name, []).append(inputs[0][0])
        )
        for part in update_filter._groups(model)
        for name, layer in part.items()
    ]
    with torch.no_grad(), model.disable_adapter():
        for row in rows(prompts):
            model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    layers = next(update_filter._groups(model))
    energy = {}
    for name, inputs in found.items():
        layer: Any = layers[name]
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        energy[name] = (torch.cat(inputs) @ update.T).square().sum(-1).mean().item()
    return energy


def test_layers_act_less_on_harmless_inputs_and_hardly_less_on_harmful_ones() -> None:
    model = student(0.01).eval()
    formatter = Formatter(tokenizer(), DataConfig())
    before = [energies(model, group) for group in (HARMFUL, HARMLESS)]
    wide = model.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"].weight
    kept = wide.clone()
    filter_update(model, formatter, rows(HARMFUL), rows(HARMLESS), STRENGTH, RUNTIME)
    after = [energies(model, group) for group in (HARMFUL, HARMLESS)]
    assert len(before[0]) == 24
    for name in before[0]:
        harmful, harmless = (b[name] / a[name] for a, b in zip(before, after))
        assert harmless < 0.7 * harmful < harmful, (name, harmful, harmless)
    assert wide.equal(kept) and not model.training


def test_what_cannot_be_filtered_is_refused(tmp_path: Path) -> None:
    raw = {"model": {"name": str(save_tiny(tmp_path / "tiny"))},
           "data": write_prompts(tmp_path / "data"), "layers": [1, 2],
           "train": {"update_filter": 1.0}, "output_dir": str(tmp_path / "run")}  # fmt: skip
    with pytest.raises(UserError, match=r"train\.update_filter: 1 .*train\.trainable=lora"):
        parse_config(raw)
    wide = {"trainable": "lora", "update_filter": 1.0, "lora": {"targets": ["down_proj"]}}
    with pytest.raises(UserError, match=r"train\.update_filter: 1, but train\.lora\.targets"):
        make_plan(parse_config(raw | {"train": wide}))
