"""The losses of a frozen LM head that ZeRO-3 has parted and that no rank gathers.

DeepSpeed gathers a weight when its module is called, and also when it is read as an attribute of
its module anywhere in a forward pass. So this is no module, holds the parameters themselves, and
reads what DeepSpeed leaves on each rank of them (`ds_tensor`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from es2fast.modeling.head import CETask, HeadTransform, KLTask, kl_options, stacked_losses
from es2fast.ops.linear_kl.zero3 import zero3_linear_kl_div
from es2fast.ops.zero3_linear_ce import zero3_linear_cross_entropy


class ShardedHead:
    """Called with tasks, gives what `FusedHead` gives for them; every rank calls it equally often.

    Args:
        lm_head: the student's, frozen and the teacher's too, partitioned or about to be.
        transform: what the model does to its logits afterwards.
    """

    def __init__(self, lm_head: nn.Linear, transform: HeadTransform):
        self._weight: Any = lm_head.weight
        self._bias: Any = lm_head.bias
        self._transform = transform

    def __call__(self, hidden: Tensor, task: KLTask, refusal: CETask | None = None) -> Tensor:
        """Of hidden (N, H) the summed KL, (); with a refusal's task of hidden (N + M, H), KL rows
        first, (4,): KL, cross-entropy, hits of either kind. All of this rank's tokens."""
        count = task.token_weights.shape[0]
        kl = self._divergence(hidden[:count], task)
        if refusal is None:
            return kl
        loss, hits = zero3_linear_cross_entropy(
            hidden[count:],
            self._weight.ds_tensor,
            self._weight.ds_shape[0],
            refusal.targets,
            refusal.token_weights,
            **self._shares,
            logit_scale=self._transform.logit_scale,
            softcap=self._transform.softcap,
        )
        return stacked_losses(kl, loss, hits, refusal)

    def _divergence(self, hidden: Tensor, task: KLTask) -> Tensor:
        assert isinstance(task.teacher, Tensor)  # moments want the whole head
        return zero3_linear_kl_div(
            hidden,
            self._weight.ds_tensor,
            self._weight.ds_shape[0],
            task.teacher,
            **self._shares,
            **kl_options(task, self._transform),
        )

    @property
    def _shares(self) -> dict[str, Any]:
        """The slice of the bias, and the ranks whose slices make up the head: DeepSpeed's group, so
        that these exchanges and its gathers take turns in one communicator."""
        bias = None if self._bias is None else self._bias.ds_tensor
        return {"flat_bias": bias, "group": self._weight.ds_process_group}
