"""Looking into a Hugging Face causal language model: its decoder blocks, and their outputs.

Legend: B rows, T tokens, H hidden size, L decoder blocks, n selected rows.

A *tap* is a forward hook on a decoder block that keeps the residual-stream state of one position
per row. Hooks see what the block returns, a tensor or a tuple whose first entry is that tensor
(both occur in supported transformers releases), cost no memory beyond the (B, H) slice, and are
removed when their context ends. `output_hidden_states` is not used: it keeps every layer, and its
last entry comes after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from es2fast.data.packing import AttentionRows
from es2fast.errors import UserError

Where = Literal["last", "onwards", "all"]


@dataclass(frozen=True)
class Intervention:
    """What a simulated attack makes of the harmful rows' block outputs.

    layers: blocks at whose output it acts; change: (layer, states (k, H) fp32, the place among the
    step's of the harmful row that each belongs to (k,)) -> the states in their place, (k, H);
    where: at the last prompt token, at it and all later ones (an answer's, which an attack changes
    while it is decoded), or at every token; name: of the attack; inside: it also acts on what
    attention and MLP of these blocks add to the stream, and on the first block's input, so that
    nothing in a block reads another one.
    """

    layers: frozenset[int]
    change: Callable[[int, Tensor, Tensor], Tensor]
    where: Where = "onwards"
    name: str = ""
    inside: bool = False


def attacked_positions(where: Where, last: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the states that an attack changes, each (k,).

    Args:
        where: it acts, see `Intervention`.
        last: (n,) column of each row's last prompt token.
        length: T, columns of the batch.
    """
    column = torch.arange(length, device=last.device)
    if where == "last":
        chosen = column == last[:, None]
    elif where == "onwards":
        chosen = column >= last[:, None]
    else:
        chosen = (column >= 0).expand(len(last), length)
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows, columns


def causal_lm(model: nn.Module) -> Any:
    """The transformers `...ForCausalLM` inside `model`, which may be wrapped by peft."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def backbone(model: nn.Module) -> Any:
    """The module that maps tokens to final hidden states (embeddings, blocks, final norm).

    Raises:
        UserError: the model has no decoder that this library can find.
    """
    inner = causal_lm(model)
    found = [inner.get_decoder()] if hasattr(inner, "get_decoder") else []
    names = (getattr(inner, "base_model_prefix", ""), "model", "transformer")
    found += [getattr(inner, name, None) for name in names]
    # `get_decoder` may be at a loss (Llama 4: the model itself), or take a head for it (ModernBERT)
    heads = [inner.get_output_embeddings()] if hasattr(inner, "get_output_embeddings") else []
    no_decoder = (None, inner, *heads)
    decoder = next((one for one in found if not any(one is other for other in no_decoder)), None)
    if decoder is None:
        raise UserError(
            f"model: {type(inner).__name__} has no decoder that can be found; "
            "use a decoder-only AutoModelForCausalLM"
        )
    return decoder


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order: the `ModuleList` with one entry per hidden layer."""
    decoder = backbone(model)
    for name in ("layers", "h", "blocks", "block"):
        found = getattr(decoder, name, None)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            return found
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"model: no list of decoder blocks found in {type(decoder).__name__}")


def check_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Sorted block numbers; a UserError names the first that the model does not have."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise UserError(
                f"layers: block {layer} is out of range; the model has blocks 0..{depth - 1}"
            )
    return sorted(layers)


def hidden_of(output: Any) -> Tensor:
    """(B, T, H) hidden states from a block's output, tensor or tuple."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states replaced, in the form the block returned them."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


_INPUT_NORMS = ("input_layernorm", "ln_1", "attn_norm", "attention_norm", "norm1", "norm_1",
                "ln1", "input_norm", "operator_norm")  # fmt: skip
_FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "final_norm", "norm_f")


def tap_points(model: nn.Module, layers: Sequence[int], space: str) -> list[nn.Module]:
    """The modules whose outputs are "the state after block l", per listed block.

    Args:
        model: a causal language model, possibly wrapped by peft.
        layers: block numbers, 0-based.
        space: "residual", the block itself; "normed", the norm at the entry of block l + 1, or the
            final norm after the last block: what the network above reads of the state. A module's
            output is taken rather than its weight, so whatever the family's norm does is in it and
            ZeRO-3 gathers the weight as always.

    Raises:
        UserError: no such norm is found, as where a family normalises after attention and MLP only.
    """
    every = blocks(model)
    if space == "residual":
        return [every[i] for i in layers]
    return [_norm_after(model, every, i) for i in layers]


def _norm_after(model: nn.Module, every: nn.ModuleList, layer: int) -> nn.Module:
    last = layer == len(every) - 1
    owner = backbone(model) if last else every[layer + 1]
    names = _FINAL_NORMS if last else _INPUT_NORMS
    for name in names:
        found = getattr(owner, name, None)
        if isinstance(found, nn.Module):
            return found
    place = "a final norm" if last else f"a norm at the entry of block {layer + 1}"
    raise UserError(
        f"separation.space: 'normed' needs {place}, and {type(owner).__name__} has none of "
        f"{', '.join(names)}; use separation.space=residual"
    )


@contextmanager
def hooks(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Removes hooks when the context ends, however it ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tapped(
    model: nn.Module,
    layers: Sequence[int],
    select: Callable[[Tensor], Tensor],
    space: str = "residual",
) -> Iterator[dict[int, Tensor]]:
    """Keeps `select(hidden)` of each listed block while the context lasts.

    Args:
        model: a causal language model, possibly wrapped by peft.
        layers: block numbers, 0-based.
        select: maps (B, T, H) to what is kept, usually (n, H).
        space: "residual" or "normed", see `tap_points`.

    Yields:
        a dict, layer -> kept tensor of the latest forward pass.
    """
    kept: dict[int, Tensor] = {}
    points = tap_points(model, layers, space)

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[layer] = select(hidden_of(output))

        return hook

    handles = [point.register_forward_hook(keep(i)) for i, point in zip(layers, points)]
    with hooks(handles):
        yield kept


def at_positions(positions: Tensor) -> Callable[[Tensor], Tensor]:
    """Selector of one position per row: positions (B,) int64; hidden (B, T, H) -> (B, H)."""

    def select(hidden: Tensor) -> Tensor:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, positions.to(hidden.device)]

    return select


def in_sequence(positions: Tensor) -> Callable[[Tensor], Tensor]:
    """Selector of places in one sequence: positions (n,) int64; hidden (1, S, H) -> (n, H)."""

    def select(hidden: Tensor) -> Tensor:
        return hidden[0, positions.to(hidden.device)]

    return select


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) token positions that start at 0 on each row's first real token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def cut_tokens(value: Tensor, length: int, count: int) -> Tensor:
    """A block's argument without the first `count` of a sequence's `length` tokens: what has the
    tokens in dimension 1 after a batch of 1 (states, positions, rotary tables), masks (.., S, S),
    and (S,); anything else as it is."""
    if value.dim() == 4 and value.shape[-2:] == (length, length):
        return value[..., count:, count:]
    if value.dim() >= 2 and value.shape[:2] == (1, length):
        return value[:, count:]
    return value[count:] if value.shape == (length,) else value


# families whose blocks are given biases or shapes of the whole batch: no row can end early there
UNCUT = ("bloom", "gpt_bigcode", "mpt")


class SeparationTaps:
    """The training forward's view into a model: tapped states, and rows that end early.

    Hooks are registered once. While *armed*, each chosen block keeps its state at one position per
    row, and every block after the deepest one computes on the harmless rows alone: a pre-hook cuts
    the hidden states and each per-row argument (attention mask, position ids, rotary embeddings).
    The sequence of modules called does not change, so ZeRO-3's prefetch trace stays valid. Hooks
    must still be there, and armed alike, when activation checkpointing recomputes a block during
    backward; so they stay armed until the next pass says otherwise.

    A pass that keeps its harmful rows (`arm(..., keep=True)`, for the refusal anchor) cuts nothing,
    nor does a model of `UNCUT`.
    Rows packed into one sequence (`arm(..., packed=...)`) are cut by tokens in place of rows.

    In the normed space the deepest state is read inside the block above it, which therefore still
    sees all rows: rows end one block later, which costs the harmful rows one block more.

    Args:
        model: a causal language model, possibly wrapped by peft.
        layers: tapped blocks, ascending.
        space: "residual" or "normed", see `tap_points`.
        attacked: blocks at whose outputs an attack may act; default: the tapped ones.
        parts: block numbers and what in these blocks adds to the stream, where attacks may act
            inside of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        space: str = "residual",
        attacked: Sequence[int] | None = None,
        parts: Sequence[tuple[int, nn.Module]] = (),
    ):
        self.states: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.acts_inside = False  # an attack does, in this pass
        self.hooked_inside = [] if space == "residual" else [i + 1 for i in layers]
        self._intervention: Intervention | None = None
        self._positions: Tensor | None = None
        self._select: Callable[[Tensor], Tensor] | None = None
        self._rows = 0
        self._num_harmful = 0
        self._packed: tuple[int, int] | None = None
        self._attacked: tuple[Tensor, Tensor, Tensor] | None = None
        self._keep_all = False
        self._uncut = causal_lm(model).config.get_text_config().model_type in UNCUT
        every, points = blocks(model), tap_points(model, layers, space)
        hit = layers if attacked is None else attacked
        self._handles = [every[i].register_forward_hook(self._attack(i)) for i in hit]
        self._handles += [part.register_forward_hook(self._attack_inside(i)) for i, part in parts]
        if parts:
            start = every[0].register_forward_pre_hook(self._attack_input, with_kwargs=True)
            self._handles.append(start)
        self._handles += [p.register_forward_hook(self._keep(i)) for i, p in zip(layers, points)]
        self._handles += [
            block.register_forward_pre_hook(self._cut, with_kwargs=True)
            for block in every[layers[-1] + (1 if space == "residual" else 2) :]
        ]

    def arm(
        self,
        positions: Tensor,
        num_harmful: int,
        attack: Intervention | None = None,
        *,
        keep: bool = False,
        packed: tuple[int, int] | None = None,
        attacked: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Before the student's pass.

        Afterwards `states` holds the tapped states, layer -> (B, H), and `outputs` what the blocks
        under attack returned at these positions, without gradient and before the attack.

        Args:
            positions: (B,) of the tapped states, harmful rows first: columns, or places of the one
                sequence.
            num_harmful: n.
            attack: what is made of the harmful rows' block outputs: what is tapped there and
                everything above sees the changed stream, and the gradient is that of the change.
                Blocks that the harmful rows do not reach are left alone.
            keep: let the harmful rows run to the end.
            packed: the rows are one sequence of so many tokens, of which so many at the beginning
                belong to harmful rows alone.
            attacked: rows and columns of the states that the attack changes, none twice, and the
                place among the step's of each one's harmful row, (k,) each; default: where
                `attacked_positions` finds them in padded rows, for which the host waits, rows
                numbered from 0.

        Raises:
            ValueError: an attack on a packed sequence without its places.
        """
        if attack is not None and packed is not None and attacked is None:
            raise ValueError("an attack on a packed sequence needs the places that it changes")
        self.states = {}
        self.outputs = {}
        self.acts_inside = attack is not None and attack.inside
        self._intervention = attack
        self._positions = positions
        self._select = at_positions(positions) if packed is None else in_sequence(positions)
        self._rows = positions.shape[0]
        self._num_harmful = num_harmful
        self._packed = packed
        self._attacked = attacked
        self._keep_all = keep or self._uncut

    def disarm(self) -> None:
        """Before any other pass through the same blocks."""
        self._select = None
        self.acts_inside = False

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _attack(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden, attack = hidden_of(output), self._intervention
            if self._select is None or not self._whole(hidden):
                return None
            self.outputs[layer] = self._select(hidden).detach()
            if attack is None or layer not in attack.layers:
                return None
            return with_hidden(output, self._changed(attack, layer, hidden))

        return hook

    def _attack_inside(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.acts_inside:  # all that a compiled block sees of this hook
                return None
            hidden = hidden_of(output)
            attack = self._acting_inside(hidden)
            if attack is None or layer not in attack.layers:
                return None
            return with_hidden(output, self._changed(attack, layer, hidden))

        return hook

    def _attack_input(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        attack = self._acting_inside(hidden)
        if attack is None:
            return None
        hidden = self._changed(attack, 0, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _whole(self, hidden: Tensor) -> bool:
        """Hidden states (B, T, H) before the harmful rows are cut off."""
        if self._packed is None:
            return hidden.shape[0] == self._rows
        return hidden.shape[1] == self._packed[0]

    def _acting_inside(self, hidden: Tensor) -> Intervention | None:
        attack = self._intervention
        armed = self._select is not None and self._whole(hidden)
        return attack if armed and attack is not None and attack.inside else None

    def _changed(self, attack: Intervention, layer: int, hidden: Tensor) -> Tensor:
        """(B, T, H) with the harmful rows' states as the attack makes them."""
        assert self._positions is not None
        if self._attacked is None:
            last = self._positions[: self._num_harmful]
            found = attacked_positions(attack.where, last, hidden.shape[1])
            self._attacked = (*found, found[0])
        rows, columns, owner = (one.to(hidden.device) for one in self._attacked)
        place = (rows, columns)
        changed = attack.change(layer, hidden[place].float(), owner)
        return hidden.index_put(place, changed.to(hidden.dtype))

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._select is not None:
                self.states[layer] = self._select(hidden_of(output))

        return hook

    def _cut(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._select is None or self._keep_all:
            return None
        return self._harmless(args), self._harmless(kwargs)

    def _harmless(self, value: Any) -> Any:
        if isinstance(value, AttentionRows):
            assert self._packed is not None
            return value.without_first(self._packed[1])
        if isinstance(value, Tensor):
            if self._packed is not None:
                return cut_tokens(value, *self._packed)
            per_row = value.dim() >= 2 and value.shape[0] == self._rows
            return value[self._num_harmful :] if per_row else value
        if isinstance(value, (tuple, list)):
            return type(value)(self._harmless(item) for item in value)
        if isinstance(value, dict):
            return {key: self._harmless(item) for key, item in value.items()}
        return value
