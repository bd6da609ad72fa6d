"""From a trained engine to a folder that `AutoModelForCausalLM.from_pretrained` loads.

Weights are safetensors, gathered into rank 0's memory; the frozen twin is not part of the result.
LoRA runs save the adapter; `merge` folds it in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from es2fast.config import Config, ModelConfig, load_config, save_config
from es2fast.distributed.zero import full_state_dict
from es2fast.errors import UserError
from es2fast.modeling.adapter import ADAPTER_WEIGHTS, is_adapter, read_adapter
from es2fast.modeling.load import check_files, load_merged, load_tokenizer
from es2fast.run.files import copy_folder, remove, write_text
from es2fast.run.folder import RunFolder

CHAT_TEMPLATE = "chat_template.jinja"  # where transformers looks for it


def save_model(
    model: nn.Module, tokenizer: Any, folder: Path, *, main: bool, template: str | None = None
) -> None:
    """Writes weights (or the adapter), config and tokenizer; complete or not at all.

    Args:
        model: the student, possibly wrapped by peft and partitioned; call on every rank.
        folder: replaced when it exists.
        main: this rank writes.
        template: the chat template that the model was trained on; default: the tokenizer's.
    """
    state = full_state_dict(model, main=main)
    if main:
        write_model(model, state, tokenizer, folder, template=template)


def write_model(
    model: nn.Module, state: Any, tokenizer: Any, folder: Path, *, template: str | None = None
) -> None:
    """The second half of `save_model`, on the rank that writes: `state` from `full_state_dict`."""
    partial = folder.with_name(folder.name + ".tmp")
    remove(partial)
    model.save_pretrained(partial, state_dict=state)  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    if template is not None:
        (partial / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    (partial / "README.md").unlink(missing_ok=True)  # peft's generic card
    _name_rope_as_before(partial / "config.json")
    remove(folder)
    partial.rename(folder)


def _name_rope_as_before(path: Path) -> None:
    """Names the rotary base, its share of a head and its scaling as transformers 4 did too, which
    otherwise silently takes its defaults (seen with 4.53: other logits)."""
    if not path.is_file():  # an adapter
        return
    raw = json.loads(path.read_text(encoding="utf-8"))
    rope = raw.get("rope_parameters") or {}
    if "sliding_attention" in rope:  # Gemma 3
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return
    base, share = ("rope_theta", "partial_rotary_factor")
    rest = {key: value for key, value in rope.items() if key not in (base, share)}
    raw[base] = rope[base]
    if share in rope:
        raw[share] = rope[share]
    if raw["model_type"] == "gpt_neox":
        raw |= {"rotary_emb_base": rope[base], "rotary_pct": rope.get(share, 1.0)}
    if rest.get("rope_type", "default") != "default":
        raw["rope_scaling"] = rest
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


MOST_STRENGTH = 1e6  # of a filter, as `train.update_filter`
SETTINGS = "es2fast.yaml"  # in a model's folder: what it was made with
_BESIDE = ("README.md", SETTINGS)  # and the model card


def export_merged(
    source: str, out: Path, *, dtype: str, merged_card: Callable[[str], str] = str
) -> None:
    """Folds a LoRA adapter into its base model and writes a plain model folder.

    Args:
        source: a folder with an adapter.
        out: must not exist.
        dtype: "bf16" or "fp32".
        merged_card: what becomes of the model card's text.

    Raises:
        UserError: no adapter there, or a damaged one; `out` exists; the base model is gone.
    """
    if not is_adapter(source):
        raise UserError(f"export: {source!r} holds no LoRA adapter; there is nothing to merge")
    _must_not_exist(out)
    own = Path(source) / SETTINGS
    remote = own.is_file() and load_config(own).model.trust_remote_code
    merged = load_merged(ModelConfig(name=source, trust_remote_code=remote), dtype)
    with torch.no_grad():
        save_model(merged, load_tokenizer(ModelConfig(name=source)), out, main=True)
    for name in _BESIDE:
        if (Path(source) / name).is_file():
            shutil.copy2(Path(source) / name, out)
    path = out / "README.md"
    if path.is_file():
        write_text(path, merged_card(path.read_text(encoding="utf-8")))


def export_run(
    run: Path,
    out: Path,
    *,
    merge: bool,
    scale: float = 1.0,
    strength: float = 0.0,
    filter_adapter: Callable[[Config, Path, float], None] | None = None,
    merged_card: Callable[[str], str] = str,
) -> None:
    """Writes a run's model to `out`: as trained, or with its LoRA adapter folded in.

    Args:
        scale: share of the adapter's update that is kept, as `train.update_scale`. Below 1 it is
            another model than the run's card and report speak of, so these do not come along.
        strength: above 0 the update is filtered, as `train.update_filter`; another model too.
        filter_adapter: does it, in place.
        merged_card: see `export_merged`.

    Raises:
        UserError: no finished run there, or damaged weights; `out` exists; nothing to merge, to
            scale or to filter, or filtered already.
    """
    folder = RunFolder(run)
    folder.check_finished("export")
    source = folder.model
    check_files(str(source))
    _must_not_exist(out)
    if source.resolve() in out.resolve().parents:
        raise UserError(f"export: {str(out)!r} lies inside the model itself; choose another --out")
    with TemporaryDirectory() as scratch:
        if scale != 1 or strength != 0:
            source = _changed(source, Path(scratch) / "model", scale, strength, filter_adapter)
        if merge:
            dtype = "bf16" if _is_bf16(source) else "fp32"
            export_merged(str(source), out, dtype=dtype, merged_card=merged_card)
        else:
            copy_folder(source, out)


def scale_adapter(folder: Path, scale: float) -> None:
    """Keeps that share of a LoRA adapter's update, in place: B times `scale`."""
    _, tensors = read_adapter(folder)
    scaled = {name: scale * x if "lora_B" in name else x for name, x in tensors.items()}
    save_file(scaled, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _changed(
    source: Path,
    target: Path,
    scale: float,
    strength: float,
    filter_adapter: Callable[[Config, Path, float], None] | None,
) -> Path:
    """A copy of an adapter with what is left of its update, and that written beside it."""
    if not 0 < scale <= 1:
        raise UserError(f"--scale: {scale:g} is no share; give one above 0 and at most 1")
    if not 0 <= strength <= MOST_STRENGTH:
        raise UserError(f"--filter: {strength:g} is no strength; give one from 0 to 1e6")
    option = "filter" if strength else "scale"
    if not is_adapter(source):
        raise UserError(
            f"--{option}: {str(source)!r} holds whole weights and no LoRA adapter; train with "
            + ("train.trainable=lora" if strength else "train.update_scale")
        )
    config = load_config(source / SETTINGS)
    if strength and config.train.update_filter:
        raise UserError(
            f"--filter: the run was trained with train.update_filter={config.train.update_filter:g}"
            "; export it without"
        )
    copy_folder(source, target, "README.md")
    changes = {"update_scale": scale * config.train.update_scale}
    if strength:
        assert filter_adapter is not None
        filter_adapter(config, target, strength)
        changes["update_filter"] = strength
    scale_adapter(target, scale)
    train = config.train.model_copy(update=changes)
    save_config(config.model_copy(update={"train": train}), target / SETTINGS)
    return target


def _is_bf16(folder: Path) -> bool:
    """The run that wrote the folder trained in bf16."""
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return file.get_slice(next(iter(file.keys()))).get_dtype() == "BF16"


def _must_not_exist(out: Path) -> None:
    if out.exists():
        raise UserError(f"export: {str(out)!r} exists already; choose another --out")
