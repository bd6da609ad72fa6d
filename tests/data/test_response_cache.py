"""Answers on disk, and the fingerprint that keeps models apart."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from es2fast.config import DataConfig
from es2fast.data import Prompt, ResponseCache, cache_folder, model_fingerprint
from es2fast.errors import UserError


def cache(folder, fingerprint="m", template_hash="t", **data) -> ResponseCache:
    config = DataConfig(cache_dir=str(folder), **data)
    return ResponseCache(config, fingerprint=fingerprint, template_hash=template_hash)


def test_round_trip_and_missing(tmp_path):
    made = cache(tmp_path / "new" / "folder")
    one, two = Prompt.of("one"), Prompt.of("two")
    assert made.get(one) is None
    made.put(one, "fine\nthen ü \u2028")
    again = cache(tmp_path / "new" / "folder")
    assert again.get(one) == made.get(one) == "fine\nthen ü \u2028"
    assert again.get(Prompt.of("one", "a response")) == made.get(one)
    answered = Prompt.of("three", "has one")
    assert again.missing([one, two, answered, two]) == [two]


def test_the_key_covers_what_the_answer_depends_on(tmp_path):
    cache(tmp_path).put(Prompt.of("one"), "fine")
    assert cache(tmp_path).get(Prompt.of("one")) == "fine"
    others = [
        cache(tmp_path, fingerprint="n"),
        cache(tmp_path, template_hash="u"),
        cache(tmp_path, max_response_tokens=9),
        cache(tmp_path, max_length=99),
    ]
    assert [other.get(Prompt.of("one")) for other in others] == [None] * 4
    system = ({"role": "system", "content": "x"}, {"role": "user", "content": "one"})
    assert cache(tmp_path).get(Prompt(system)) is None


def test_a_torn_last_line_costs_only_itself(tmp_path):
    made = cache(tmp_path)
    made.put(Prompt.of("one"), "fine")
    made.put(Prompt.of("two"), "good")
    content = made.path.read_bytes()
    made.path.write_bytes(content[:-9])
    after = cache(tmp_path)
    assert after.get(Prompt.of("one")) == "fine" and after.get(Prompt.of("two")) is None
    after.put(Prompt.of("three"), "new")
    last = cache(tmp_path)
    assert last.get(Prompt.of("one")) == "fine" and last.get(Prompt.of("three")) == "new"


def test_reload_sees_another_writer(tmp_path):
    reader, writer = cache(tmp_path), cache(tmp_path)
    writer.put(Prompt.of("one"), "fine")
    assert reader.get(Prompt.of("one")) is None
    reader.reload()
    assert reader.get(Prompt.of("one")) == "fine"


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*; set data\.cache_dir to a folder"):
        cache(blocked / "below").put(Prompt.of("one"), "fine")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "es2fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "es2fast"
    assert cache_folder("x") != cache_folder(None)


def model_folder(folder, weights=None):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if weights is not None:
        save_file({"a": weights}, folder / "model.safetensors")
    return folder


def test_fingerprint_follows_content_and_not_place(tmp_path):
    weights = torch.arange(1000.0)
    one = model_fingerprint(str(model_folder(tmp_path / "one", weights)))
    assert one == model_fingerprint(str(model_folder(tmp_path / "copy", weights)))
    weights[500] += 1
    assert one != model_fingerprint(str(model_folder(tmp_path / "tuned", weights)))
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "qwen2"}')
    assert one != model_fingerprint(str(tmp_path / "copy"))
    adapter = tmp_path / "one/adapter_config.json"
    adapter.write_text('{"lora_alpha": 32}')
    scaled = model_fingerprint(str(tmp_path / "one"))
    adapter.write_text('{"lora_alpha": 16}')
    assert len({one, scaled, model_fingerprint(str(tmp_path / "one"))}) == 3


def test_fingerprint_of_large_files_sees_a_change_in_the_middle(tmp_path):
    weights = torch.zeros(10 * 2**20)  # 40 MiB: sampled, not read whole
    one = model_fingerprint(str(model_folder(tmp_path / "one", weights)))
    weights[3 * 2**20 : 4 * 2**20] = 1  # one block of ten
    assert one != model_fingerprint(str(model_folder(tmp_path / "tuned", weights)))


def test_fingerprint_of_hub_ids(monkeypatch, tmp_path):
    assert model_fingerprint("nobody/nothing") == "nobody/nothing@main"
    assert model_fingerprint("nobody/nothing", "v1") == "nobody/nothing@v1"
    import huggingface_hub.constants

    commit = "0123456789" * 4
    repo = tmp_path / "models--nobody--nothing"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_fingerprint("nobody/nothing") == f"nobody/nothing@{commit}"


def test_fingerprint_errors(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        model_fingerprint(str(model_folder(tmp_path / "one")))
    with pytest.raises(UserError, match="neither a folder nor a Hugging Face model id"):
        model_fingerprint("no/such/folder")
    assert os.listdir(tmp_path) == ["one"]
