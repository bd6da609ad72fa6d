"""What a model is made of, read from its modules on the meta device: no weights are loaded.

Legend: H width of the residual stream, A heads x head size, V vocabulary.

A *product* is a weight that rows are multiplied by. A mixture-of-experts layer keeps its experts'
weights as (experts, out, in); a token meets `share` of them, the router's top k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from es2fast.modeling.taps import blocks, causal_lm

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Product:
    """inputs, outputs: of the matrix; share: rows per token; trained: the weight itself; rank: of
    its LoRA adapter, else 0; parent: the module it belongs to; last: nothing follows it there."""

    inputs: int
    outputs: int
    share: float
    trained: bool
    rank: int
    parent: str
    last: bool

    @property
    def flop(self) -> float:
        """Of a token's forward, without the adapter."""
        return 2.0 * self.share * self.inputs * self.outputs

    @property
    def adapter_flop(self) -> float:
        return 2.0 * self.share * self.rank * (self.inputs + self.outputs)

    @property
    def learns(self) -> bool:
        return self.trained or self.rank > 0


@dataclass(frozen=True)
class Block:
    """attention: A, of all heads' queries; keys: of all heads' keys, or values; norms: of width H;
    norms_trained: how many of them train; parameters: all."""

    products: tuple[Product, ...]
    attention: int
    keys: int
    heads: int
    norms: int
    norms_trained: int
    parameters: int
    eager: bool = False

    @property
    def flop(self) -> float:
        return sum(product.flop for product in self.products)

    @property
    def adapter_flop(self) -> float:
        return sum(product.adapter_flop for product in self.products)


@dataclass(frozen=True)
class Shape:
    """total, trained: parameters; active: those a token meets, without the embedding; deepest: the
    last block that harmful rows reach; experts: it is a mixture of experts; tied: the LM head
    is the embedding."""

    total: int
    trained: int
    active: float
    hidden: int
    vocabulary: int
    blocks: tuple[Block, ...]
    deepest: int
    head_trained: bool
    experts: bool
    tied: bool


def shape_of(student: nn.Module, deepest: int) -> Shape:
    """The shape of a model with its trainable parameters chosen.

    Args:
        student: possibly wrapped by peft and on the meta device.
        deepest: the deepest separated block.
    """
    text = causal_lm(student).config.get_text_config()
    parts = tuple(_block(block, text) for block in blocks(student))
    head = causal_lm(student).get_output_embeddings()
    size = text.vocab_size * text.hidden_size
    return Shape(
        total=sum(p.numel() for p in causal_lm(student).parameters())
        - sum(p.numel() for name, p in student.named_parameters() if "lora_" in name),
        trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
        active=sum(part.flop for part in parts) / 2 + size,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        blocks=parts,
        deepest=deepest,
        head_trained=head is not None and head.weight.requires_grad,
        experts=any(product.share != 1 for part in parts for product in part.products),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def _block(block: nn.Module, text: Any) -> Block:
    heads = getattr(text, "num_attention_heads", None) or 1  # a state-space model has none
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    products = list(_products(block, text))
    norms = [
        weight
        for module in block.modules()
        if (weight := getattr(module, "weight", None)) is not None
        and weight.dim() == 1
        and weight.numel() == text.hidden_size
    ]
    return Block(
        products=tuple(products),
        attention=heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        norms=len(norms),
        norms_trained=sum(weight.requires_grad for weight in norms),
        parameters=sum(p.numel() for p in block.parameters()),
        eager=getattr(text, "_attn_implementation", None) == "eager",
    )


def _products(block: nn.Module, text: Any) -> Iterator[Product]:
    found: list[tuple[str, nn.Parameter, int, float, int]] = []
    experts_at_once = next((getattr(text, key) for key in _TOP_K if getattr(text, key, None)), 1)
    for name, module in block.named_modules():
        if "lora_" in name:
            continue
        for weight_name, weight in module.named_parameters(recurse=False):
            if weight.dim() not in (2, 3) or "lora_" in weight_name:
                continue
            share = float(experts_at_once) if weight.dim() == 3 else 1.0
            path = name.removesuffix(".base_layer")
            parent = path if weight.dim() == 3 else path.rpartition(".")[0]
            found.append((parent, weight, weight.dim(), share, _rank(block, name)))
    for index, (parent, weight, _, share, rank) in enumerate(found):
        outputs, inputs = weight.shape[-2:]
        last = not any(other[0] == parent for other in found[index + 1 :])
        yield Product(inputs, outputs, share, weight.requires_grad, rank, parent, last)


def _rank(block: nn.Module, name: str) -> int:
    if not name.endswith(".base_layer"):
        return 0
    adapters: Any = getattr(block.get_submodule(name.removesuffix(".base_layer")), "lora_A", {})
    return sum(adapter.out_features for adapter in adapters.values())
