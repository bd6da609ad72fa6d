"""An op's arguments by name.

torch hands an op's inputs to its shape function and to autograd as one tuple, and takes gradients
back as another. Their positions are read from the op's own signature, never counted by hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor


class Arguments:
    """The names of a function's arguments, in order."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.names = tuple(inspect.signature(function).parameters)

    def named(self, inputs: Sequence[Any]) -> SimpleNamespace:
        """The inputs of one call as attributes."""
        return SimpleNamespace(**dict(zip(self.names, inputs, strict=True)))

    def positional(self, **arguments: Any) -> tuple[Any, ...]:
        """The inputs of one call in order; KeyError for one that is missing."""
        return tuple(arguments[name] for name in self.names)

    def gradients(self, **made: Tensor) -> tuple[Tensor | None, ...]:
        """What an autograd function returns: the gradients made, None for every other argument."""
        return tuple(made.get(name) for name in self.names)
