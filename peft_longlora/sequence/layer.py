"""A layer's attention where ranks share each sequence: S2-Attn with a halo, dense attention through Ulysses.

Called by `attention` in place of what it does on one rank; `sequence` switches it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.settings import AttentionSettings
from peft_longlora.sequence import edges as neighbours
from peft_longlora.sequence import halo, ulysses


@dataclass(frozen=True)
class SharedSequence:
    """The ranks of a mesh, in the order of the sequence that they share.

    Attributes:
        mesh: a one-dimensional DeviceMesh.
    """

    mesh: DeviceMesh

    @torch.compiler.disable  # exchanges between kernels, which no compiler is to move
    def attend(
        self,
        module: nn.Module,
        settings: AttentionSettings,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: S2Mask | torch.Tensor,
        pattern: str,
        how: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Attention of this rank's stretch of the sequence: (1, H, S, D), (1, H_kv, S, D) -> (1, S, H, D_v).

        Args:
            pattern: "s2" or "local"; "full" is dense over the whole sequence.
            how: scaling, dropout, softcap, sinks and backend. kwargs: as the architecture passes them.
            others: as `attention.s2_attention_forward`.

        Raises:
            ValueError: more than one row, no position_ids, stretches that do not make up one sequence.
            NotImplementedError: a cache, a sliding window, an attention that is not causal.
        """
        _check(module, settings, query, key, mask, kwargs)
        group = self.mesh.get_group()
        documents = mask.documents(settings.call.position_ids)

        def edges() -> list[neighbours.Edges]:
            return neighbours.exchange_edges(documents, settings.call.position_ids, settings.group_size, pattern, group)

        found = mask.once(("edges", settings.group_size, pattern), edges)
        if pattern == "full":
            groups = mask.once("whole sequence", lambda: ulysses.plan_whole(found, documents, group))
            return ulysses.attend_whole(query, key, value, groups, self.mesh, **how)
        rank = dist.get_rank(group)
        plan = mask.once(
            ("halo", settings.group_size, pattern), lambda: neighbours.plan_halo(found, rank, documents, group)
        )
        return halo.attend_shared(query, key, value, plan, kept=_kept(module, settings, mask), **how)


def _kept(module: nn.Module, settings: AttentionSettings, mask: S2Mask) -> halo.Kept:
    """What this layer keeps of other ranks: something empty while the model is called, and the same in its backward.

    A layer that one call of the model runs more than once gets empty ones only: which run is recomputed is not known.
    """
    runs: list[halo.Kept] = mask.once(("kept", id(module)), list)
    if settings.call.caller is not None:
        runs.append(halo.Kept())
        return runs[-1]
    return runs[0] if len(runs) == 1 else halo.Kept()


def _check(module, settings, query, key, mask, kwargs) -> None:
    """Refuse what would be computed on a stretch by itself, and so wrongly."""
    if not isinstance(mask, S2Mask):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} cannot be shared out. Give each rank the 2-D attention_mask "
            f"of its stretch (shard_batch does)."
        )
    if query.shape[2] != key.shape[2] or settings.call.has_cache:
        raise NotImplementedError(
            f"The ranks share each sequence, and were called with a cache ({key.shape[2]} keys for {query.shape[2]} "
            f"queries), which cannot be shared out. Generate within `with unshared(model):` of peft_longlora.sequence."
        )
    if mask.is_local or kwargs.get("sliding_window") is not None:
        raise NotImplementedError(
            f"Layer {module.layer_idx} has a sliding window, which would end at the border of a rank. Use a model "
            f"without one (sliding_window=None), or train it without sequence parallelism."
        )
    if not getattr(module, "is_causal", True) or not mask.is_causal or kwargs.get("is_causal") is False:
        raise NotImplementedError("Only causal attention can be shared out. Train this model on one rank a sequence.")
    if query.shape[0] != 1:
        raise ValueError(
            f"A rank got {query.shape[0]} rows: with sequence parallelism it holds one stretch of all rows, laid end "
            f"to end. Cut the batch with shard_batch."
        )
    if settings.call.position_ids is None:
        raise ValueError(
            "The model was called without position_ids, and would count each rank's tokens from 0. Give it those of "
            "the whole sequence (shard_batch does)."
        )
