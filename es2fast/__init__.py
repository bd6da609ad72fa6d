"""es2fast: Embedding Space Separation (arXiv 2603.20206) for safer open LLMs."""

from es2fast.ops.linear_kl import linear_kl_div

__all__ = ["linear_kl_div"]
