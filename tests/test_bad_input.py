"""A user's mistakes: each one line that names the field, and nothing written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tokenizer, write_prompts
from transformers import AutoConfig, AutoModelForCausalLM

from es2fast.config import Config, DataSource, load_config, parse_config
from es2fast.data.prompts import read_source
from es2fast.errors import UserError
from es2fast.evaluation.run import evaluate_run
from es2fast.modeling.load import load_causal_lm
from es2fast.probing.choose import check_targets
from es2fast.training.plan import make_plan

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    save_tiny(root / "model")
    write_prompts(root / "data")
    return root


@pytest.fixture
def raw(made: Path, tmp_path: Path) -> Iterator[Raw]:
    """A run that would work; nothing of it may be written."""
    shutil.copytree(made / "data", tmp_path / "data")
    yield {
        "model": {"name": str(made / "model"), "dtype": "fp32"},
        "data": {name: str(tmp_path / f"data/{name}.jsonl") for name in ("harmful", "harmless")},
        "layers": [1, 2],
        "train": {"steps": 1, "micro_batch_size": 2, "device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    assert not (tmp_path / "run").exists()


def refused(raw: Raw, words: str, overrides: list[str] | None = None) -> None:
    """The run is refused in one line with these words, separated by " | "."""
    with pytest.raises(UserError) as caught:
        make_plan(load_config(copy.deepcopy(raw), overrides or []))
    message = str(caught.value)
    assert "\n" not in message
    for word in words.split(" | "):
        assert word in message


def test_the_run_is_otherwise_right(raw: Raw) -> None:
    assert make_plan(load_config(raw)).lengths


SETTINGS = [
    ("separation.margin=.nan", "separation.margin | finite | nan"),
    ("separation.margin=.inf", "separation.margin | finite | inf"),
    ("separation.margin=0", "margin=0 must be greater than 0"),
    ("separation.weight=.nan", "separation.weight | finite"),
    ("separation.weight=-1", "separation.weight | greater than or equal to 0 | -1"),
    ("separation.weight=0", "separation.weight | refusal anchor | refusal.weight"),
    ("separation.weights=[-1,1]", "separation.weights.0 | -1"),
    ("separation.weights=[0,0]", "weights=[0.0, 0.0] | weight=0"),
    ("separation.weights=[1]", "1 weights for 2 layers"),
    ("separation.loss=foo", "separation.loss | 'foo'"),
    ("separation.norm_band=[.nan,2]", "separation.norm_band.0 | finite"),
    ("separation.norm_band=[2,3]", "norm_band | does not hold 1"),
    ("separation.robust.strength=[2,1]", "separation.robust | strength | low <= high"),
    ("separation.robust.strength=[.nan,1]", "separation.robust.strength.0 | finite"),
    ("separation.robust.attacks=[foo]", "separation.robust.attacks.0 | 'foo'"),
    ("separation.robust.attacks=[]", "separation.robust.attacks | at least 1"),
    ("separation.robust.blocks=all", "separation.robust.blocks | refusal anchor"),
    ("separation.ramp=2", "separation.ramp | less than or equal to 1 | 2"),
    ("separation.bank=-1", "separation.bank | -1"),
    ("kl.temperature=.inf", "kl.temperature | finite"),
    ("kl.temperature=0", "kl.temperature | greater than 0"),
    ("kl.weight=.nan", "kl.weight | finite"),
    ("kl.budget=0", "kl.budget | greater than 0"),
    ("kl.direction=sideways", "kl.direction | 'sideways'"),
    ("kl.beta=1", "kl.beta | less than 1"),
    ("train.lr=.inf", "train.lr | finite | inf"),
    ("train.lr=0", "train.lr | greater than 0"),
    ("train.lr=fast", "train.lr | 'fast'"),
    ("train.betas=[1.0,2.0]", "train.betas.0 | less than 1"),
    ("train.betas=[-0.1,0.9]", "train.betas.0 | -0.1"),
    ("train.betas=[0.9]", "train.betas.1"),
    ("train.schedule=foo", "train.schedule | 'cosine' | found 'foo'"),
    ("train.schedule=reduce_lr_on_plateau", "train.schedule | 'reduce_lr_on_plateau'"),
    ("train.seed=1180591620717411303424", "train.seed | less than 4294967296"),
    ("train.seed=-1", "train.seed | -1"),
    ("train.steps=true", "train.steps | true is no number"),
    ("train.steps=1e30", "train.steps | 1e+30"),
    ("train.steps=0", "train.steps | greater than or equal to 1"),
    ("train.steps=1.5", "train.steps | 1.5"),
    ("train.micro_batch_size=1000000000", "train.micro_batch_size | 1000000000"),
    ("train.gradient_accumulation=1000000000", "train.gradient_accumulation | 1000000000"),
    ("train.global_batch_size=7", "train.global_batch_size | 7 | = 2"),
    ("train.lora.r=1000000000", "train.lora.r | 1000000000"),
    ("train.lora.dropout=1", "train.lora.dropout | less than 1"),
    ("train.warmup_ratio=1", "train.warmup_ratio | less than 1"),
    ("train.max_grad_norm=0", "train.max_grad_norm | greater than 0"),
    ("train.report_to=[foo]", "train.report_to.0 | 'foo'"),
    ("train.device=tpu", "train.device | 'tpu'"),
    ("train.trainable=some", "train.trainable | 'some'"),
    ("train.teacher=adapters_off", "train.teacher | trainable=lora"),
    ("train.l_r=1", "train.l_r | unknown key | 'lr'"),
    ("layers=4", "layers: block 4 is out of range | 0..3"),
    ("layers='4'", "layers: block 4 is out of range"),
    ("layers=0,4", "layers: block 4 is out of range"),
    ("layers=some", "layers: 'some' is neither 'auto' nor block numbers"),
    ("layers=[-1]", "layers: block -1"),
    ("layers=[1.5]", "layers: 1.5 is no block number"),
    ("layers=[true]", "layers: True is no block number"),
    ("layers=[1,1]", "layers | twice"),
    ("layers=[]", "layers | empty"),
    ("layers=true", "layers"),
    ("model.name=''", "model.name: '' is neither a model folder"),
    ("model.name=/nowhere/at/all", "model.name: folder '/nowhere/at/all' does not exist"),
    ("model.dtype=fp16", "model.dtype | 'fp16'"),
    ("model.revision=v1", "model.revision: 'v1' | folder"),
    ("model.attn_implementation=foo", "model.attn_implementation: 'foo' | sdpa or eager"),
    ("output_dir='  '", "output_dir"),
    ("safeguards.max_kl=.inf", "safeguards.max_kl | finite"),
    ("safeguards.patience=0", "safeguards.patience"),
    ("evaluate.attacks=[foo]", "evaluate.attacks: no attack 'foo'"),
    ("evaluate.judge=foo", "evaluate.judge: no judge 'foo'"),
    ("evaluate.limit=0", "evaluate.limit | greater than or equal to 2"),
    ("evaluate.batch_size=0", "evaluate.batch_size: expected auto"),
    ("data.response_batch_size=many", "data.response_batch_size: expected auto"),
    ("data.max_length=8.5", "data.max_length | 8.5"),
    ("data.max_length=1000000000000", "data.max_length"),
    ("data.borderline_share=0", "data.borderline_share | greater than 0"),
    ("data.harmful=[]", "data.harmful: no harmful prompts"),
    ("data.harmful=nofile.csv", "data.harmful[0]: 'nofile.csv' | check the path"),
    ("data.harmful=[{file: x}]", "data.harmful.0.file: unknown key"),
    ("data.harmful.5.limit=3", "there is no entry 5 | there are 1"),
    ("data.harmful.0.rows=3", "data.harmful.0.rows | quote the slice"),
    ("data.harmful.0.column=nope", "data.harmful[0] | no column 'nope'"),
    ("data.harmful.0.where={nope: 1}", "data.harmful[0]: where | no column 'nope'"),
    ("data.chat_template=nofile.jinja", "data.chat_template: 'nofile.jinja' | Jinja"),
    ("refusal.texts=[' ']", "refusal | texts holds a blank"),
    ("refusal.source=list", "refusal | texts is empty"),
    ("deepspeed=zero9", "deepspeed: 'zero9' is neither a preset | 'zero3'"),
    ("deepspeed={zero_optimization: [1]}", "deepspeed.zero_optimization: [1] is no mapping"),
    ("deepspeed={zero_optimization: null}", "deepspeed.zero_optimization: None is no mapping"),
    ("deepspeed={zero_optimization: {stage: 9}}", "deepspeed.zero_optimization.stage | 9"),
    ("deepspeed={zero_optimization: {stage: three}}", "zero_optimization.stage | 'three'"),
    ("deepspeed={zero_optimization: {stge: 3}}", "zero_optimization.stge: unknown key | 'stage'"),
    ("deepspeed={zero_optimization: {reduce_bucket_size: -5}}", "reduce_bucket_size | -5"),
    (
        "deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: foo}}}",
        "offload_optimizer.device | 'foo'",
    ),
    (
        "deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: nvme}}}",
        "offload_optimizer.nvme_path: None is no folder",
    ),
    ("deepspeed={optimizer: {type: foo}}", "deepspeed.optimizer | 'foo' | AdamW"),
    ("deepspeed={optimizer: fast}", "deepspeed.optimizer: 'fast'"),
    ("deepspeed={fp16: {enabled: true}}", "deepspeed.fp16 | bf16"),
    ("deepspeed={gradient_clipping: 7}", "deepspeed.gradient_clipping: 7 contradicts"),
    ("nonsense=1", "nonsense: unknown key"),
    ("nonsense", "expected key=value"),
    ("train.lr.x=1", "train.lr | number | {'x': 1}"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "words"), SETTINGS, ids=[item for item, _ in SETTINGS])
def test_settings(raw: Raw, override: str, words: str) -> None:
    refused(raw, words, [override])


def test_lora_targets_that_no_module_has(raw: Raw) -> None:
    for targets in ("foo", "[foo, bar]"):
        words = "train.lora.targets | matches no linear layer | q_proj"
        refused(raw, words, ["train.trainable=lora", f"train.lora.targets={targets}"])
    words = "train.lora.targets: '.*(q' is no regular expression"
    refused(raw, words, ["train.trainable=lora", "train.lora.targets='.*(q'"])


def test_moments_hold_for_a_frozen_plain_head_and_the_forward_kl(raw: Raw, tmp_path: Path) -> None:
    moments = "train.teacher=moments"
    refused(raw, "train.teacher: moments | kl.direction", [moments, "kl.direction=reverse"])
    refused(raw, "train.teacher: moments | trainable=all", [moments, "train.trainable=all"])
    raw["model"]["name"] = str(save_tiny(tmp_path / "capped", "gemma2"))
    refused(raw, "train.teacher: moments", [moments])


def test_entries_of_a_list_can_be_overridden(raw: Raw) -> None:
    plain = load_config(copy.deepcopy(raw), ["data.harmful.0.limit=3"])
    short = load_config(copy.deepcopy(raw), ["data.harmful.limit=3", "layers=0,2"])
    assert plain.data.harmful[0].limit == short.data.harmful[0].limit == 3
    assert plain.data.harmful[0].source == raw["data"]["harmful"] and short.layers == [0, 2]


YAML = [
    ("- a\n", "expected a mapping of keys, found list"),
    ("a: [\n", "not valid YAML"),
    ("train:\n\t steps: 1\n", "not valid YAML"),
    ("\x00", "not valid YAML"),
    ("train: {steps: 3}\nmodel: {name: x}\ntrain: {lr: 1}\n", "'train' | line 1 | line 3"),
    ("model: {name: x, name: y}\n", "'name' stands in line 1 and again in line 1"),
    ('model: {name: "\\ud800"}\n', "model.name | no text"),
    ('output_dir: "a\\0b"\nmodel: {name: x}\n', "output_dir | no text"),
    ("1: 2\n", "model.name: required | as model.name="),
    ("", "model.name: required | as model.name="),
    ("model: {dtype: fp32}\n", "model.name: required | as model.name="),
    ("data: {harmful: [{limit: 3}]}\nmodel: {name: x}\n", "data.harmful.0.source: required"),
    ("a: " + "[" * 3000, "not valid YAML (nested too deep)"),
    ("train: &a\n  x: *a\n", "train.x: unknown key"),
]


@pytest.mark.parametrize(("text", "words"), YAML, ids=range(len(YAML)))
def test_configuration_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)
    for word in words.split(" | "):
        assert word in str(caught.value)


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def configured(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def without_block(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if ".layers.2." in name]:
        del weights[name]


def cut(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:8].clone()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def halved(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing block": (rewrite(without_block), "lacks the weights model.layers.2. | and 8 more"),
    "wrong shape": (rewrite(cut), "layers.1.mlp.up_proj.weight as [8, 32] | [48, 32]"),
    "truncated": (halved, "model.safetensors' is damaged"),
    "zero bytes": (lambda d: (d / "model.safetensors").write_bytes(b""), "is damaged"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "pickled": (pickled, "has no weights | pickled ones are not read"),
    "no config": (lambda d: (d / "config.json").unlink(), "neither a model folder"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json | not a valid JSON"),
    "no blocks": (configured(num_hidden_layers=0), "has no blocks"),
    "small vocabulary": (configured(vocab_size=10), "as [29, 32] | [10, 32]"),
    "unknown family": (configured(model_type="foo"), "model type `foo`"),
    "masks": (configured(model_type="bert"), "'bert' model, which fills masks"),
    "encoder": (configured(model_type="t5"), "'t5' model, which has an encoder"),
    "no tokenizer": (without_tokenizer, "no tokenizer at"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "no tokenizer at"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_folders(raw: Raw, made: Path, tmp_path: Path, name: str) -> None:
    edit, words = MODELS[name]
    raw["model"]["name"] = str(shutil.copytree(made / "model", tmp_path / "broken"))
    edit(tmp_path / "broken")
    refused(raw, f"model.name | {words}")


def test_weights_that_are_no_numbers_are_refused_when_loaded(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "model", tmp_path / "broken")
    rewrite(lambda w: w["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))(folder)
    with pytest.raises(UserError, match=r"no finite numbers \(model\.layers\.1\.mlp\.up_proj"):
        load_causal_lm(Config.model_validate({"model": {"name": str(folder)}}).model, "fp32")


def test_a_tokenizer_that_is_larger_than_the_embedding(
    raw: Raw, made: Path, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "small", vocab_size=10)
    raw["model"]["name"] = str(folder)
    refused(raw, "model.name: the tokenizer writes token | 10 embeddings")


@pytest.mark.parametrize("family, table", [("gpt2", {}), ("opt", {"ffn_dim": 48})])
def test_rows_longer_than_a_table_of_learned_positions(
    raw: Raw, tmp_path: Path, family: str, table: dict[str, int]
) -> None:
    """A llama of as many positions computes more of them, and is asked for more in every test."""
    config = AutoConfig.for_model(
        family, vocab_size=40, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, **table,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "learned")
    tokenizer().save_pretrained(tmp_path / "learned")
    raw["model"]["name"] = str(tmp_path / "learned")
    make_plan(load_config(raw))  # every harmless prompt has a short response of its own
    rows = Path(raw["data"]["harmless"]).read_text().splitlines()
    bare = [json.loads(row)["prompt"] for row in rows]
    (tmp_path / "bare.txt").write_text("\n".join(bare))
    raw["data"]["harmless"] = str(tmp_path / "bare.txt")
    lengths = make_plan(load_config(raw, ["data.max_response_tokens=40"])).lengths
    longest = max(lengths[-len(bare) :])
    make_plan(load_config(raw, [f"data.max_response_tokens={64 - longest}"]))
    words = "64 learned positions | has 65 tokens | data.max_length or max_response_tokens"
    refused(raw, words, [f"data.max_response_tokens={65 - longest}"])


LABELS = "prompt,label\n" + "".join(f"draw {i} cars,{'un' * (i % 2)}safe\n" for i in range(8))
PROMPTS = [
    ("harmful", "a.txt", "break the car\n", "data.harmful: 1 distinct prompt"),
    ("harmless", "a.txt", "draw the car\n" * 50, "data.harmless: 1 distinct prompt"),
    ("harmful", "a.txt", "\n \n", "data.harmful[0] | no rows"),
    ("harmful", "a.txt", "a\0b\n", "data.harmful[0] | binary"),
    ("harmful", "a.jsonl", '{"prompt": "\\ud800"}\n', "row 1 | lone surrogate"),
    ("harmful", "a.jsonl", '{"prompt": 5}\n', "row 1 | holds 5 (int)"),
    ("harmful", "a.jsonl", "{\n", "line 1 is not valid JSON"),
    ("harmful", "a.jsonl", '{"x": "y"}\n', "no column recognised | 'x'"),
    ("harmful", "a.json", "3", "without a list of rows"),
    ("harmful", "a.csv", 'prompt\n"open\n', "not valid CSV"),
    ("harmful", "a.csv", "prompt\na,b\n", "more cells than the header"),
    ("harmful", "a.parquet", "PAR1", "not a readable Parquet file"),
    ("harmless", "a.csv", LABELS, "4 of 8 rows labelled 'unsafe' | where: {label: safe}"),
    ("harmful", "a.csv", LABELS, "4 of 8 rows labelled 'safe' | data.labelled"),
    ("eval_harmful", "a.csv", LABELS, "4 of 8 rows labelled 'safe' | data.eval_labelled"),
]


@pytest.mark.parametrize(("group", "name", "text", "words"), PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(raw: Raw, tmp_path: Path, group: str, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    raw["data"][group] = str(tmp_path / name)
    refused(raw, f"data.{group} | {words}")


@pytest.mark.parametrize("text", ["", "<s><user> hello <bot>", "{% for"])
def test_templates_that_write_no_prompt(raw: Raw, tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jinja").write_text(text)
    refused(raw, "chat template | data.chat_template", [f"data.chat_template={tmp_path}/t.jinja"])


def test_files_that_cannot_be_written_are_known_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--json: .* is also the file of --plot"):
        check_targets(tmp_path / "a.png", tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match=r"--plot: .* is a folder"):
        check_targets(tmp_path / "b.png", None)


def test_a_finished_run_cannot_be_evaluated_as_another(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "m"}}))
    with pytest.raises(UserError, match=r"train\.lr: the run is trained"):
        evaluate_run(tmp_path, ["train.lr=1"])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    (section, field)
    for section, info in Config.model_fields.items()
    for field in getattr(info.annotation, "model_fields", {"": None})
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), ANY)
@example(("data", "harmful"), {"\n": None})
@example(("train", "betas"), [])
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(
    field: tuple[str, str], value: Any
) -> None:
    section, key = field
    raw: Raw = {"model": {"name": "m"}, section: {key: value} if key else value}
    if section == "model" and key != "name":
        raw["model"]["name"] = "m"
    try:
        parse_config(raw)
    except UserError as error:
        assert "\n" not in str(error)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "parquet"]),
    st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))
    | ANY.map(lambda value: json.dumps({"prompt": value}).encode()),
)  # fmt: skip
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, ending: str, text: bytes) -> None:
    path = tmp_path / f"any.{ending}"
    path.write_bytes(text)
    with suppress(UserError):
        assert read_source(DataSource(source=str(path)), "data.harmful[0]").prompts
