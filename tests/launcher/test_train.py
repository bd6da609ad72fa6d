"""The whole entry under the real launcher: LoRA, written responses, output folder, export."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_tiny, tokenizer, write_prompts
from transformers import AutoModelForCausalLM

from es2fast.config import ModelConfig, load_config
from es2fast.distributed.launch import free_port
from es2fast.errors import UserError
from es2fast.modeling.load import load_merged
from es2fast.probing.choose import probe_layers
from es2fast.report.model_card import merged_card
from es2fast.run.export import export_run

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
IDS = torch.tensor([[1, 4, 10, 16, 5, 23]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run on two ranks whose harmless prompts come without responses."""
    folder = tmp_path_factory.mktemp("train")
    words = tokenizer()
    words.add_tokens(["I"])  # what refusals start with
    model = save_tiny(folder / "model", vocab_size=len(words))
    words.save_pretrained(model)
    sources = write_prompts(folder / "data")
    rows = [json.loads(line) for line in Path(sources["harmless"]).read_text().splitlines()]
    bare = folder / "data" / "harmless.txt"
    bare.write_text("\n".join(row["prompt"] for row in rows) + "\n")
    config = {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": {
            "harmful": sources["harmful"], "harmless": str(bare), "max_response_tokens": 6,
            "cache_dir": str(folder / "cache"),
        },
        "kl": {"budget": 0.05},
        "train": {
            "steps": 4, "micro_batch_size": 1, "trainable": "lora", "lr": 1e-2, "lora": {"r": 4},
            "device": "cpu", "report_to": ["tensorboard"], "gradient_accumulation": 2,
        },
        "deepspeed": "zero3",
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
         "--master_port", str(free_port()), "--module", "es2fast.train",
         "--config", str(folder / "run.yaml"), "train.seed=3"],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_metrics_and_resolved_configuration_are_written(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    layers = json.loads((run / "run/layers.json").read_text())["layers"]
    assert len(layers) == 2
    for layer in layers:
        assert rows[0][f"distance_over_base/{layer}"] > 0
    expected = {"loss", "sep", "kl", "kl_weight", "grad_norm", "lr", "samples_per_second",
                "tokens_per_second", "peak_memory_bytes"}  # fmt: skip
    assert expected <= rows[0].keys()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl_weight"] < rows[0]["kl_weight"]  # below the budget, lambda relaxes
    saved = yaml.safe_load((run / "run/config.yaml").read_text())
    assert saved["train"]["seed"] == 3 and saved["kl"]["direction"] == "forward"
    assert list((run / "run/tensorboard").iterdir())
    assert json.loads((run / "run/train.json").read_text())["zero_stage"] == 3


def test_the_rate_is_that_of_warm_up_and_cosine(run: Path) -> None:
    """As it stands after each step: one of warm-up (a twentieth of 4, rounded up), then half a
    cosine over the other three."""
    rows = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    cosine = [1e-2 * 0.5 * (1 + math.cos(math.pi * part / 3)) for part in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx(cosine, abs=1e-12)


def test_layers_are_chosen_under_zero_3_as_on_one_rank(run: Path) -> None:
    """Two ranks, partitioned weights; the pass with a push at each block among the others."""
    saved = json.loads((run / "run/layers.json").read_text())
    alone = probe_layers(load_config(run / "run/config.yaml"))
    assert saved["layers"] == alone.layers
    assert "nats of refusal" in saved["reason"]
    for row, wanted in zip(saved["table"], alone.table, strict=True):
        assert row["accuracy"] == wanted.accuracy
        assert row["effect"] == pytest.approx(wanted.effect, abs=1e-4)
        assert row["relative_push"] == pytest.approx(wanted.relative_push, rel=1e-3)
    assert max(abs(row["effect"]) for row in saved["table"]) > 0.01


def test_responses_are_written_once_by_the_base_model(run: Path) -> None:
    from es2fast.config import DataConfig, ModelConfig
    from es2fast.data import Formatter, Prompt
    from es2fast.modeling.generate import generate
    from es2fast.modeling.load import load_causal_lm, load_tokenizer

    lines = (run / "cache/responses.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 12
    where = ModelConfig(name=str(run / "model"))
    formatter = Formatter(load_tokenizer(where), DataConfig())
    prompts = (run / "data/harmless.txt").read_text().splitlines()
    answers = [
        generate(
            load_causal_lm(where, "fp32"), formatter, [Prompt.of(text)], max_new_tokens=6,
            device=torch.device("cpu"),
        )[0]
        for text in prompts[:3]
    ]  # fmt: skip
    assert set(answers) <= {json.loads(line)["text"] for line in lines}


def test_adapter_and_merged_export_give_the_same_logits(run: Path) -> None:
    out = run / "merged"
    command = [sys.executable, "-m", "es2fast.cli", "export", str(run / "run"), "--merge"]
    again = None
    for again in range(2):
        done = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == (0 if again == 0 else 2), done.stderr
    assert "exists already" in done.stderr and "Traceback" not in done.stderr
    adapter = AutoModelForCausalLM.from_pretrained(run / "run/model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        found, expected = merged(input_ids=IDS).logits, adapter(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - base(input_ids=IDS).logits).abs().max() > 1e-3
    card = (run / "run/model/README.md").read_text()
    assert card.count("es2fast") > 0 and (out / "README.md").read_text() == merged_card(card)
    assert "- lora" in card and "- lora" not in merged_card(card)


@pytest.mark.parametrize("merge", [False, True])
def test_a_share_of_the_update_is_exported(run: Path, tmp_path: Path, merge: bool) -> None:
    """The merged weights are the base's and a quarter of the change; nothing claims to be them."""
    out = tmp_path / "quarter"
    export_run(run / "run", out, merge=merge, scale=0.25)

    def merged(folder: Path) -> dict[str, torch.Tensor]:
        model = load_merged(ModelConfig(name=str(folder)), "fp32")
        return {name: weight.detach() for name, weight in model.named_parameters()}

    base, whole, part = (merged(f) for f in (run / "model", run / "run/model", out))
    for name, weight in base.items():
        expected = weight.double() + 0.25 * (whole[name].double() - weight.double())
        torch.testing.assert_close(part[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(whole[name], weight) for name, weight in base.items())
    assert not (out / "README.md").exists()
    assert load_config(out / "es2fast.yaml").train.update_scale == 0.25


def test_what_is_no_share_is_refused(run: Path, tmp_path: Path) -> None:
    for scale in (0.0, 1.5):
        with pytest.raises(UserError, match="is no share"):
            export_run(run / "run", tmp_path / "out", merge=False, scale=scale)
    assert not (tmp_path / "out").exists()


REMOTE = """
from transformers import LlamaForCausalLM

class HalvedLlama(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.config.my_logit_factor
        return out
"""


def test_a_head_that_is_not_understood_is_refused_before_training(tmp_path: Path) -> None:
    """A model whose code scales its logits by a key of its own: one line that names the key."""
    model = save_tiny(tmp_path / "model")
    (model / "halved.py").write_text(REMOTE)
    settings = json.loads((model / "config.json").read_text())
    settings |= {"auto_map": {"AutoModelForCausalLM": "halved.HalvedLlama"}, "my_logit_factor": 0.5}
    (model / "config.json").write_text(json.dumps(settings))
    sources = write_prompts(tmp_path / "data")
    config = {
        "model": {"name": str(model), "dtype": "fp32", "trust_remote_code": True},
        "data": {"harmful": sources["harmful"], "harmless": sources["harmless"]},
        "train": {"steps": 1, "device": "cpu"}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "es2fast.train", "--config", str(tmp_path / "run.yaml")],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "my_logit_factor" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model").exists()
