"""Progress bars, and how much libraries say beside results: `es2fast --quiet`, `--verbose`.

Both travel in the variables that the libraries read themselves (tqdm, transformers, DeepSpeed,
Python's warnings), so the ranks that a command starts have them too.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from tqdm import tqdm as _tqdm

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_LOG_LEVEL": "error",
    "PYTHONWARNINGS": "ignore",
}
VERBOSE = {"TRANSFORMERS_VERBOSITY": "info", "DS_LOG_LEVEL": "info"}


class tqdm(_tqdm):
    """tqdm's bar; `TQDM_DISABLE` also silences one that is given `disable=False`."""

    def __init__(self, *args: Any, **options: Any):
        if os.environ.get("TQDM_DISABLE", "0") not in ("", "0", "false"):
            options["disable"] = True
        super().__init__(*args, **options)


def say_less() -> None:
    """No bars, and of libraries errors alone, in this process and those it starts."""
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")
    from transformers.utils import logging  # its bars read the variable when tqdm is imported

    logging.disable_progress_bar()


def say_more() -> None:
    """What libraries log at their level INFO too, in this process and those it starts."""
    os.environ.update(VERBOSE)


def verbose() -> bool:
    """`say_more` was called here or in the process that started this one."""
    return os.environ.get("DS_LOG_LEVEL") == VERBOSE["DS_LOG_LEVEL"]
