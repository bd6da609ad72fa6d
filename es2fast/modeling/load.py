"""Loading models and tokenizers through transformers, with errors a user can act on."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from es2fast.config import ModelConfig
from es2fast.errors import UserError
from es2fast.modeling.adapter import ADAPTER, adapter_base, is_adapter
from es2fast.modeling.skeleton import BROKEN_CONFIG, check_causal, missing_tensors, stored_shapes
from es2fast.ops.scratch import forget

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none at `model.name`.
    """
    from transformers import AutoTokenizer

    _check_folder(model.name)
    try:
        return AutoTokenizer.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.name: no tokenizer at {model.name!r} ({_first(error)})") from None


def load_model_config(model: ModelConfig) -> Any:
    """The transformers config of `model.name`.

    Raises:
        UserError: neither a folder nor a Hugging Face id that can be loaded.
    """
    from transformers import AutoConfig

    _check_folder(model.name)
    if is_adapter(model.name) and not (Path(model.name) / "config.json").is_file():
        raise UserError(
            f"model.name: {model.name!r} is a LoRA adapter, and a whole model is needed; es2fast "
            "export RUN --merge --out DIR writes one"
        )
    if model.revision is not None and Path(model.name).is_dir():
        raise UserError(
            f"model.revision: {model.revision!r} is for a Hugging Face id, and {model.name!r} is a "
            "folder; leave it out"
        )
    try:
        return AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (*BROKEN_CONFIG, ImportError) as error:
        raise UserError(
            f"model.name: {model.name!r} is neither a model folder nor a Hugging Face id that can "
            f"be loaded ({_first(error)})"
        ) from None


def known_config(model: ModelConfig) -> Any | None:
    """The transformers config of a whole model; None where there is none to read, as of an adapter
    on the hub, which transformers loads all the same."""
    try:
        return load_model_config(model)
    except UserError:
        return None


def load_causal_lm(
    model: ModelConfig, dtype: str, device_map: str | dict[str, int | str] | None = None
) -> nn.Module:
    """The causal language model at `model.name`, or the base model and adapter of a LoRA folder.

    Args:
        model: where it is.
        dtype: "bf16" or "fp32".
        device_map: as transformers has it, "auto" spreads the blocks over the GPUs; default: the
            model is on the CPU and goes where the caller puts it.

    Raises:
        UserError: a folder without weights; no decoder-only causal language model, or one that
            transformers cannot load; missing or non-finite weights; a device map that leaves
            weights outside of any device's memory.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_weights(model.name)
    if (config := known_config(model)) is not None:
        check_causal(model.name, config)
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            attn_implementation=model.attn_implementation,
            dtype=DTYPES[dtype],
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.name: {model.name!r} cannot be loaded ({_first(error)})") from None
    loaded, found = pair
    if missing := sorted(found["missing_keys"]):
        raise UserError(missing_tensors(model.name, missing))
    for name, weight in loaded.named_parameters():
        if not weight.is_meta and not weight.detach().sum().isfinite():
            raise UserError(
                f"model.name: {model.name!r} holds weights that are no finite numbers ({name}); "
                "give an intact checkpoint"
            )
    offloaded = [name for name, weight in loaded.named_parameters() if weight.is_meta]
    if offloaded:
        raise UserError(
            f"evaluate.device_map: {device_map!r} leaves {offloaded[0]} (of {len(offloaded)}) in "
            "the CPU's memory or on disk, where attacks cannot reach it; use more or larger GPUs"
        )
    return loaded


def load_merged(
    model: ModelConfig, dtype: str, device_map: str | dict[str, int | str] | None = None
) -> nn.Module:
    """As `load_causal_lm`, with a LoRA adapter folded into the weights: generation is about twice
    as fast, and what attacks edit is a plain model.

    Raises:
        UserError: see `load_causal_lm`; the adapter is damaged, or its base model gone.
    """
    if not is_adapter(model.name):
        return load_causal_lm(model, dtype, device_map)
    from peft import PeftModel
    from safetensors import SafetensorError

    check_weights(model.name)
    below = model.model_copy(update=adapter_base(model.name))
    plain: Any = load_causal_lm(below, dtype, device_map)
    try:
        adapted: Any = PeftModel.from_pretrained(plain, model.name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.name: the adapter {model.name!r} does not go on {below.name!r} "
            f"({_first(error)}); give an intact one and its base model"
        ) from None
    merged: Any = adapted.merge_and_unload()
    return merged


def free_memory() -> None:
    """Gives the memory of models that nobody holds any more, and the losses' buffers, back to the
    system.

    Models may be cyclic, so that they outlive their last reference until the next collection, and
    glibc keeps what weights below 32 MB were loaded into, more with every model (DEVELOPING.md).
    """
    forget()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_files(name: str) -> None:
    """UserError where a folder has no weights, or a file of them is damaged; a Hugging Face id
    passes."""
    folder = Path(name)
    if not folder.is_dir():
        return
    if not any(next(folder.glob(p), None) for p in _WEIGHTS):
        raise UserError(
            f"model.name: folder {name!r} has no weights (*.safetensors; pickled ones are not "
            "read); give the folder that save_pretrained wrote"
        )
    stored_shapes(folder)


def check_weights(name: str) -> None:
    """What can be known of a model without loading it.

    Raises:
        UserError: see `check_files`, also of an adapter's base model; that is gone.
    """
    folder = Path(name)
    check_files(name)
    if not is_adapter(folder):
        return
    base = adapter_base(name)["name"]
    assert base is not None
    if _looks_local(base) and not Path(base).is_dir():
        raise UserError(
            f"model.name: {str(folder / ADAPTER)!r} names the base model {base!r}, and there is no "
            "such folder; set base_model_name_or_path there to where it is now"
        )
    check_weights(base)


def holds_model(folder: Path) -> bool:
    """A model or an adapter lies right in the folder."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER))


def _looks_local(name: str) -> bool:
    """It cannot be a Hugging Face id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_folder(name: str) -> None:
    folder = Path(name)
    if _looks_local(name) and not folder.is_dir():
        raise UserError(f"model.name: folder {name!r} does not exist")
    if (folder / "train.json").is_file() and not holds_model(folder):
        raise UserError(
            f"model.name: {name!r} is the folder of a run; es2fast export {name} --out DIR writes "
            "its model as a plain one, with --merge where it is a LoRA adapter"
        )


def _first(error: BaseException) -> str:
    """The first line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
