"""The ES2 objective: one forward pass of one module gives every loss and every metric.

    L = sigma sum_l alpha_l Sep_l(A, B) + lambda KL(base || tuned | harmless tokens)
        [+ rho CE(tuned -> refusal | harmful tokens)] [+ norm band]

Legend: n harmful rows (A), m harmless rows (B), T tokens, H hidden size, D data-parallel ranks.

Both groups run as one batch, padded or packed into one sequence. The states at the last prompt
token are tapped at the chosen blocks; after the deepest of them the harmful rows are dropped, so
the blocks above, the final norm and the LM head see harmless rows alone: the paper's separation.
With a refusal anchor (rho > 0) they carry a refusal behind the prompt and run to the end, and the
LM head takes the harmless tokens of the KL and the harmful ones of the cross-entropy in one call.

DeepSpeed receives this module and sees exactly one forward per backward. Pairs are global:
`pairwise_separation` gathers all ranks' embeddings (without gradient for the others') and gives a
rank the full gradient for its own rows, times D here because DeepSpeed averages over ranks. KL and
cross-entropy are divided by the weights of all their tokens in the optimizer step, not in the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from es2fast.config import Config
from es2fast.data.packing import AttentionRows, Packed
from es2fast.errors import UserError
from es2fast.modeling import head as heads
from es2fast.modeling import packed_attention
from es2fast.modeling.packing import attends_by_rows
from es2fast.modeling.sharded_head import ShardedHead
from es2fast.modeling.sublayers import added
from es2fast.modeling.taps import (
    Intervention,
    SeparationTaps,
    backbone,
    blocks,
    causal_lm,
    cut_tokens,
    position_ids,
)
from es2fast.modeling.teacher import freeze, teacher_hidden
from es2fast.ops.moments.cache import TeacherMoments
from es2fast.ops.separation.op import pairwise_separation
from es2fast.ops.separation.whitening import Whitening
from es2fast.training.bank import EmbeddingBank
from es2fast.training.refusals import RefusalTokens
from es2fast.training.robust import attacked_blocks


class ES2Objective(nn.Module):
    """Student, teacher and losses in one module, made for `deepspeed.initialize`.

    Args:
        student: a causal language model with its trainable parameters chosen.
        teacher: a frozen twin of the base model; None when the student without its LoRA adapters
            is the base model, or when every forward brings what the base model says.
        layers: the separated blocks, ascending.
        d0: mean harmful-harmless distance per layer under the base model.
        norm0: mean norm of the states per layer under the base model.
        scale: unit of the margin per layer; default: d0.
        whitening: per layer, for the loss `fisher`.
        config: separation and KL settings.
        teacher_head: the base model's LM head where the student's is trained; the twin's own, or
            without a twin a frozen copy.
        sharded: the losses are computed from a head that stays parted under ZeRO-3, see
            `modeling.sharded_head`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        layers: list[int],
        d0: dict[int, float],
        norm0: dict[int, float],
        config: Config,
        scale: dict[int, float] | None = None,
        whitening: dict[int, Whitening] | None = None,
        teacher_head: nn.Linear | None = None,
        sharded: bool = False,
    ):
        super().__init__()
        self.student = student
        self.teacher = freeze(teacher) if teacher is not None else None
        self.layers = list(layers)
        self.d0 = d0
        self.norm0 = norm0
        self.scale = scale or d0
        self.whitening = whitening or {}
        self.config = config
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.world = dist.get_world_size() if several else 1
        self.group = dist.group.WORLD if several else None
        bank = config.separation.bank
        self.bank = EmbeddingBank(bank, self.world) if bank else None
        self.alphas = layer_weights(config, self.layers)
        self._dtype = next(student.parameters()).dtype
        for model in (student, teacher):
            if model is not None:
                packed_attention.install(causal_lm(model))
        hit = attacked_blocks(config, self.layers, len(blocks(student)))
        robust = config.separation.robust
        ablated = hit if robust.probability and "ablation" in robust.attacks else []
        self.taps = SeparationTaps(
            student,
            self.layers,
            config.separation.space,
            hit,
            [(i, part) for i in ablated for part in added(blocks(student)[i])],
        )
        self.lm_head, self.transform = heads.install(student, teacher_head)
        self.teacher_head = teacher_head if teacher is None else None
        self._sharded = ShardedHead(heads.lm_head_of(student), self.transform) if sharded else None

    def train(self, mode: bool = True) -> ES2Objective:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            self.student.train(mode)  # it may share modules with the twin
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_last: Tensor,
        kl_index: Tensor,
        kl_weights: Tensor,
        num_harmful: int,
        kl_weight: float,
        kl_tokens: float,
        accumulation: int = 1,
        attack: Intervention | None = None,
        margin: float | None = None,
        refusal: RefusalTokens | None = None,
        refusal_weights: Tensor | None = None,
        target: Tensor | TeacherMoments | None = None,
        packed: Packed | None = None,
        attacked: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch.

        Args:
            input_ids, attention_mask: (n + m, T) int64, harmful rows first; of packed rows the
                ids (1, S), and no mask.
            prompt_last: (n + m,) column of the last prompt token; its place in the one sequence.
            kl_index: (N,) positions in the flattened (m, T) harmless block that enter the KL; of
                packed rows in the sequence behind the harmful suffixes. Those of `refusal` alike.
            kl_weights: (N,) fp32 weights of these tokens.
            num_harmful: n.
            kl_weight: lambda.
            kl_tokens: sum of all kl_weights of the optimizer step, over ranks and micro-batches.
            accumulation: micro-batches per optimizer step.
            attack: a simulated attack on the harmful states, see `SeparationTaps.arm`.
            margin: of this step, in units of the scale; default: the configured one.
            refusal: what the anchor learns; None: harmful rows end early.
            refusal_weights: sum of the weights of all refusals' tokens of the optimizer step, over
                ranks and micro-batches.
            target: what a cache holds of the base model at the tokens of kl_index; default: it
                runs here.
            packed: the rows are one sequence.
            attacked: what the attack changes, see `SeparationTaps.arm`.

        Returns:
            the loss to call backward on (scaled so that DeepSpeed's averages come out right), and
            detached fp32 metrics: `kl_sum` (this rank's), `sep`, `sep/l`, `distance/l`, `norm/l`
            (of all ranks' rows); with a norm band `norm_band` and `norm_out/l`, the share of this
            rank's states outside it; with an anchor `refusal_sum` (nats, weighted),
            `refusal_hits`, first tokens that are the likeliest, and `harmless_hits`, those that are
            so on harmless rows, all of this rank.
        """
        if packed is None:
            assert attention_mask is not None
            inputs = _backbone_inputs(input_ids, attention_mask, position_ids(attention_mask))
            count, size, dim = num_harmful, input_ids.shape[0], 0
        else:
            inputs = _packed_inputs(input_ids, packed, self.student, self._dtype)
            count, size, dim = packed.harmful, input_ids.shape[1], 1
        self.taps.disarm()
        if target is None:
            states = teacher_hidden(self.student, self.teacher, _behind(inputs, size, count, dim))
            target = states.flatten(0, 1)[kl_index]
        self.taps.arm(
            prompt_last,
            num_harmful,
            attack,
            keep=refusal is not None,
            packed=None if packed is None else (size, count),
            attacked=attacked,
        )
        final = backbone(self.student)(**inputs).last_hidden_state
        margin = self.config.separation.margin if margin is None else margin
        sep, metrics = self._separation(self.taps.states, num_harmful, margin)
        if self.training and attack is None:
            self._remember(self.taps.states, num_harmful)
        kl_task = self._kl_task(target, kl_weights)
        behind = final.shape[dim] - (size - count)  # 0 where the harmful rows ended early
        harmless = final.narrow(dim, behind, size - count).flatten(0, 1)
        hidden = harmless[kl_index]
        if refusal is None:
            kl_sum = self._losses(hidden, kl_task)
        else:
            harmful = final.narrow(dim, 0, count).flatten(0, 1)
            watched = harmless[refusal.watch].detach()
            hidden = torch.cat([hidden, harmful[refusal.index], watched])
            kl_sum, ce_sum, hits, wrong = self._losses(hidden, kl_task, refusal.task).unbind()
        weight = self.config.separation.weight
        part = sep if weight == 1.0 else weight * sep if weight else 0.0
        loss = self.world * (part + kl_weight * accumulation / kl_tokens * kl_sum)
        if refusal is not None:
            assert refusal_weights is not None
            rho = self.config.refusal.weight * accumulation / refusal_weights.clamp_min(1.0)
            loss = loss + self.world * rho * ce_sum
            metrics |= {
                "refusal_sum": ce_sum.detach(),
                "refusal_hits": hits.detach(),
                "harmless_hits": wrong.detach(),
            }
        if self.config.separation.norm_band is not None:
            band, outside = self._norm_band(self.taps.states)
            loss = loss + band  # a mean over equally many rows of each rank: DeepSpeed's average
            metrics |= outside | {"norm_band": band.detach()}
        return loss, metrics | {"sep": sep.detach(), "kl_sum": kl_sum.detach()}

    def _losses(self, hidden: Tensor, *tasks: Any) -> Tensor:
        """What the LM head makes of the tokens, see `FusedHead`."""
        head: Any = self._sharded or self.lm_head
        return head(hidden, *tasks)

    def _norm_band(self, states: dict[int, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty on states whose norm left the band, and their share per layer."""
        section = self.config.separation
        assert section.norm_band is not None
        total = torch.zeros((), device=states[self.layers[0]].device)
        metrics = {}
        for layer in self.layers:
            ratio = states[layer].float().norm(dim=-1) / self.norm0[layer]
            excess = band_excess(ratio, *section.norm_band)
            total = total + section.norm_band_weight * excess.square().mean()
            metrics[f"norm_out/{layer}"] = (excess.detach() > 0).float().mean()
        return total, metrics

    def _kl_task(self, target: Tensor | TeacherMoments, weights: Tensor) -> heads.KLTask:
        """Of the N harmless tokens that count: target (N, H), weights (N,)."""
        return heads.KLTask(
            target,
            weights,
            self.config.kl.direction,
            self.config.kl.temperature,
            self.config.kl.beta,
        )

    def _separation(
        self, states: dict[int, Tensor], num_harmful: int, margin: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Over the pairs of all ranks, the same value on each."""
        total: Tensor | float = 0.0
        metrics: dict[str, Tensor] = {}
        for layer in self.layers:
            a, b = states[layer][:num_harmful], states[layer][num_harmful:]
            if self.config.separation.moves == "harmful":
                b = b.detach()
            loss = self._pairs(layer, a, b, margin)
            total = total + self.alphas[layer] * loss
            metrics[f"sep/{layer}"] = loss.detach()
            with torch.no_grad():
                metrics[f"distance/{layer}"] = -self._op(a, b, loss="l2")
                metrics[f"norm/{layer}"] = states[layer].float().norm(dim=-1).mean()
        assert isinstance(total, Tensor)
        return total, metrics

    def _pairs(self, layer: int, a: Tensor, b: Tensor, margin: float | None) -> Tensor:
        """The separation loss of one layer: a (n, H), b (m, H), and the bank if there is one."""
        section = self.config.separation
        scale = 1.0 if section.loss == "cosine" else self.scale[layer]
        options = {
            "loss": section.loss,
            "scale": scale,
            "margin": None if margin is None else margin * scale,
            "whitening": self._whitening(layer, a.device),
        }
        old = None if self.bank is None else self.bank.rows(layer)
        if old is None:
            return self._op(a, b, **options)
        first = self._op(a, torch.cat([b.detach(), old[1]]), **options)
        second = self._op(torch.cat([a.detach(), old[0]]), b, **options)
        return first + second - (first + second).detach() / 2

    def _op(self, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        """Every rank has as many rows as this one, so nothing has to be asked."""
        rows = None if self.group is None else (len(a), len(b))
        return pairwise_separation(a, b, group=self.group, max_rows=rows, **options)

    def _whitening(self, layer: int, device: torch.device) -> Whitening | None:
        if self.config.separation.loss != "fisher":
            return None
        found = self.whitening[layer]
        if found.factor.device != device:
            found = self.whitening[layer] = found.to(device)
        return found

    def _remember(self, states: dict[int, Tensor], num_harmful: int) -> None:
        if self.bank is not None:
            for layer, rows in states.items():
                self.bank.add(layer, rows[:num_harmful], rows[num_harmful:])


def layer_weights(config: Config, layers: list[int]) -> dict[int, float]:
    """alpha_l: `separation.weights` in the order in which `layers` names the blocks, else 1.

    Args:
        config: the run; with `layers: auto` the weights go to the chosen blocks in ascending order.
        layers: the separated blocks.

    Raises:
        UserError: another number of weights than of layers.
    """
    weights = config.separation.weights
    if weights is None:
        return dict.fromkeys(layers, 1.0)
    named = sorted(layers) if config.layers == "auto" else config.layers
    if len(weights) != len(named):
        raise UserError(
            f"separation.weights: {len(weights)} weights for {len(named)} layers; "
            "give one per layer"
        )
    return dict(zip(named, weights))


def band_excess(ratio: Tensor, low: float, high: float) -> Tensor:
    """How far each norm ratio lies outside [low, high]; 0 inside."""
    return (low - ratio).relu() + (ratio - high).relu()


def _backbone_inputs(input_ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Any]:
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": positions,
        "use_cache": False,
    }


def _packed_inputs(
    input_ids: Tensor, packed: Packed, student: nn.Module, dtype: torch.dtype
) -> dict[str, Any]:
    """By rows where the student's attention can; an empty mask, which no other attention takes,
    keeps transformers from making one."""
    if not attends_by_rows(causal_lm(student).config):
        return _backbone_inputs(input_ids, packed.mask(dtype), packed.position_ids)
    mask = torch.empty(1, 1, 0, 0, device=input_ids.device)
    inputs = _backbone_inputs(input_ids, mask, packed.position_ids)
    return inputs | {"attention_rows": packed.rows}


def _behind(inputs: dict[str, Any], size: int, count: int, dim: int) -> dict[str, Any]:
    """Inputs of the harmless part: without the first `count` of `size` rows (dim 0) or tokens of
    the one sequence (dim 1)."""

    def cut(value: Any) -> Any:
        if isinstance(value, AttentionRows):
            return value.without_first(count)
        if not isinstance(value, Tensor):
            return value
        return value[count:] if dim == 0 else cut_tokens(value, size, count)

    return {key: cut(value) for key, value in inputs.items()}
