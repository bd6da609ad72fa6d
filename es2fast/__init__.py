"""es2fast: Embedding Space Separation (arXiv 2603.20206) for safer open LLMs."""

from es2fast.ops.linear_kl.op import linear_kl_div
from es2fast.ops.linear_kl.parallel import vocab_parallel_linear_kl_div
from es2fast.ops.linear_kl.zero3 import zero3_linear_kl_div
from es2fast.ops.moments.cache import TeacherMoments, half_head
from es2fast.ops.moments.op import moment_kl_div, teacher_moments
from es2fast.ops.separation.distance_stats import DistanceStats, pairwise_distance_stats
from es2fast.ops.separation.op import pairwise_separation
from es2fast.ops.separation.whitening import Whitening

__all__ = [
    "DistanceStats",
    "TeacherMoments",
    "Whitening",
    "half_head",
    "linear_kl_div",
    "moment_kl_div",
    "pairwise_distance_stats",
    "pairwise_separation",
    "teacher_moments",
    "vocab_parallel_linear_kl_div",
    "zero3_linear_kl_div",
]
