"""The parts of a decoder block, found by the names that model families give them.

    x = x + attention(...);  x = x + mlp(...)

What attention and MLP return is what a block adds to the residual stream, and the last matrix of
each is what writes it. Where a norm stands between, as in Gemma, `added` names it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from es2fast.errors import UserError
from es2fast.modeling.taps import backbone

_ATTENTION = ("self_attn", "self_attention", "attn", "attention", "linear_attn", "mamba", "conv",
              "temporal_block", "mixer")  # fmt: skip
_BEHIND = (("post_attention_layernorm", "post_feedforward_layernorm"),
           ("post_self_attn_layernorm", "post_mlp_layernorm"))  # fmt: skip
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "experts")
_WRITERS = {"o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "down_proj", "fc2",
            "dense_4h_to_h", "w2", "output_linear"}  # fmt: skip


def sublayers(block: nn.Module) -> list[nn.Module]:
    """A block's attention and MLP, all of either where it has several side by side (Falcon-H1's
    attention and Mamba, Granite's experts and the MLP that all tokens share).

    Raises:
        UserError: the block has none under a known name.
    """
    return [*_named(block, _ATTENTION, "attention"), *_named(block, _MLP, "MLP")]


def added(block: nn.Module) -> list[nn.Module]:
    """The modules whose outputs a block adds to the stream: attention and MLP, or the norms that
    some families have behind them (Gemma 2 and 3, OLMo 2, GLM-4).

    Raises:
        UserError: see `sublayers`.
    """
    for names in _BEHIND:
        found = [getattr(block, name, None) for name in names]
        if all(isinstance(norm, nn.Module) for norm in found):
            return found  # type: ignore[return-value]
    return sublayers(block)


def _named(block: nn.Module, names: tuple[str, ...], what: str) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name in names:
        part = getattr(block, name, None)
        if isinstance(part, nn.Module) and not any(part is one for one in found):
            found.append(part)
    if not found:
        raise UserError(
            f"model: {type(block).__name__} has no {what} that can be found "
            f"(looked for {', '.join(names)}); leave this attack out for this model"
        )
    return found


def writers(sublayer: nn.Module) -> list[nn.Module]:
    """The modules inside an attention or MLP that hold a matrix which writes its output.

    A linear layer (wrapped by peft or not), or experts that keep theirs in one (E, H, I) parameter.

    Raises:
        UserError: there is none under a known name.
    """
    found: list[nn.Module] = []
    for name, module in sublayer.named_modules():
        inside = "base_layer" in name or "lora_" in name
        if not inside and (name.rpartition(".")[2] in _WRITERS or fused(module) is not None):
            found.append(module)
    if not found:
        raise UserError(
            f"model: {type(sublayer).__name__} has no output matrix that can be found "
            f"(looked for {', '.join(sorted(_WRITERS))}); leave this attack out for this model"
        )
    return found


def fused(module: nn.Module) -> nn.Parameter | None:
    """The output matrices of experts that are one parameter, (E, H, I) or (E, I, H)."""
    found = module._parameters.get("down_proj")
    return found if found is not None and found.dim() == 3 else None


def embeddings(model: nn.Module) -> Iterator[nn.Embedding]:
    """The tables that the residual stream starts from: of tokens, and of learnt positions."""
    decoder = backbone(model)
    width = decoder.get_input_embeddings().weight.shape[1]
    for module in decoder.children():
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == width:
            yield module
