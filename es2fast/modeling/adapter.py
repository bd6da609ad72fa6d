"""The folder of a LoRA adapter as peft writes it: the base model it belongs on, and its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from es2fast.errors import UserError

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """The folder holds a LoRA adapter, not a whole model."""
    return (Path(folder) / ADAPTER).is_file()


def adapter_base(folder: str) -> dict[str, str | None]:
    """`name` and `revision` of the model that a folder's LoRA adapter belongs on.

    Raises:
        UserError: the adapter does not say.
    """
    raw = _options(Path(folder))
    return {"name": raw["base_model_name_or_path"], "revision": raw.get("revision")}


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's options and the tensors of an adapter.

    Raises:
        UserError: either is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    try:
        return _options(folder), load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(damaged(path, error)) from None


def damaged(path: Path, error: BaseException) -> str:
    """The sentence about a file of weights that cannot be read."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"model.name: {str(path)!r} is damaged ({lines[0][:200]}); copy or download it anew"


def _options(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw["base_model_name_or_path"], str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"model.name: {str(path)!r} does not say of which model the adapter is "
            "(base_model_name_or_path); give an intact adapter"
        ) from None
    return dict(raw)
