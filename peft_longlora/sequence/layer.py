"""A layer's attention if ranks share each sequence: S2-Attn with a halo, dense attention through Ulysses, a layer's own
window with a halo of its size.

Attention's `forward` calls it instead of its own attention; `switch` puts it into a model's settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from peft_longlora.architecture import counts_from, counts_tokens
from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.local import documents_of
from peft_longlora.attention.mask import S2Mask
from peft_longlora.kernels.patterns import BLOCK_PATTERNS
from peft_longlora.sequence import halo, ulysses, window
from peft_longlora.sequence.edges import Edges, exchange_edges, plan_halo, tokens_elsewhere


@dataclass(frozen=True)
class SharedSequence:
    """The ranks of a mesh, in the order of the sequence that they share.

    Attributes:
        mesh: a one-dimensional DeviceMesh.
    """

    mesh: DeviceMesh

    @torch.compiler.disable  # a compiler must not move exchanges between kernels
    def attend(self, call: LayerCall, pattern: str) -> torch.Tensor:
        """Attention of this rank's stretch of the sequence: (1, H, S, D), (1, H_kv, S, D) -> (1, S, H, D_v).

        Args:
            call: the layer's call on this rank.
            pattern: a sparse pattern, or "full": dense over the whole sequence.

        Raises:
            ValueError: more than one row, no position_ids or only those of axes, stretches that do not make up one
                sequence.
            NotImplementedError: a cache, a rule of the layer's own that is neither a window nor chunks, an attention
                that is not causal.
        """
        _check(call, pattern)
        _refuse_count(call, self.mesh.size())
        if call.is_local:
            return self._attend_local(call)
        mask, size, group = call.s2_mask, call.settings.group_size, self.mesh.get_group()
        position_ids = call.settings.inputs.position_ids
        documents = mask.documents(position_ids)

        def exchange() -> list[Edges]:
            return exchange_edges(documents, position_ids, size, pattern, group)

        edges = mask.once(("edges", size, pattern), exchange)
        tensors = call.query, call.key, call.value
        if pattern == "full":
            groups = mask.once("whole sequence", lambda: ulysses.plan_whole(edges, documents, group))
            return ulysses.attend(*tensors, groups, self.mesh, call.options)
        rank = dist.get_rank(group)
        plan = mask.once(("halo", size, pattern), lambda: plan_halo(edges, rank, documents, group))
        return halo.attend(*tensors, plan, call.options, _kept(call, mask))

    def place(self, mask: S2Mask, position_ids: torch.Tensor | None, group_size: int) -> tuple[int, int]:
        """The tokens of the sequence before this rank's stretch, and those of them that belong to its first document.

        Args:
            mask: knows the padding of the stretch. position_ids: (1, S) of the stretch.

        Raises: ValueError: the stretches do not make up one sequence.
        """
        if position_ids is None or position_ids.shape[0] != 1:
            return 0, 0  # `attend` refuses this
        group = self.mesh.get_group()
        edges = exchange_edges(mask.documents(position_ids), position_ids, group_size, "local", group)
        rank = dist.get_rank(group)
        return sum(edge.length for edge in edges[:rank]), tokens_elsewhere(edges)[0][rank]

    def _attend_local(self, call: LayerCall) -> torch.Tensor:
        """Attention of a layer with a window or chunks of its own; as `attend`."""
        group, positions = self.mesh.get_group(), call.settings.inputs.position_ids
        mask, local = call.mask, call.local(positions)
        is_chunks = local is not None and local.kind == "chunks"
        size, pattern = mask.arguments["local_size"], "local" if is_chunks else "full"
        documents = mask.once("plain", lambda: documents_of(mask)).documents(positions)
        # Before an error that only this rank may raise: here all ranks raise theirs.
        edges = mask.once("own edges", lambda: exchange_edges(documents, positions, size, pattern, group))
        if local is None:
            refuse_window(call.module)
        rank, tensors = dist.get_rank(group), (call.query, call.key, call.value)
        if is_chunks:
            plan = mask.once("own halo", lambda: plan_halo(edges, rank, documents, group))
            return halo.attend(*tensors, plan, call.options, _kept(call, mask))
        plan = mask.once("own halo", lambda: window.plan_window(edges, rank, documents, local.size, group))
        return window.attend(*tensors, plan, call.options, _kept(call, mask))


def _kept(call: LayerCall, mask: S2Mask) -> halo.Kept:
    """What this layer keeps from other ranks: an empty object in the forward, and the same object in recomputation.

    If one call of the model runs a layer more than once, it always gets an empty object, because nothing tells which
    run is being recomputed.
    """
    runs: list[halo.Kept] = mask.once(("kept", id(call.module)), list)
    if call.settings.inputs.caller is not None:
        runs.append(halo.Kept())
        return runs[-1]
    return runs[0] if len(runs) == 1 else halo.Kept()


def _check(call: LayerCall, pattern: str) -> None:
    """Refuse calls that would attend only inside this rank's stretch, and so give wrong results."""
    if isinstance(call.mask, torch.Tensor):
        raise ValueError(
            f"attention_mask of shape {tuple(call.mask.shape)} cannot be split over ranks. Give each rank the 2-D "
            f"attention_mask of its stretch (shard_batch does)."
        )
    if call.cached or call.settings.inputs.has_cache:
        raise NotImplementedError(
            f"The ranks share each sequence, but were called with a cache ({call.key.shape[2]} keys for "
            f"{call.query.shape[2]} queries), which cannot be split over ranks. Generate within `with "
            f"unshared(model):` of peft_longlora.sequence."
        )
    if call.is_local and not (isinstance(call.mask, S2Mask) and call.mask.is_local):
        refuse_window(call.module)
    if not call.is_causal:
        raise NotImplementedError(
            "Only causal attention can be split over ranks. Train this model without sequence parallelism."
        )
    if not call.is_local:
        refuse_blocks(pattern)
    if call.query.shape[0] != 1:
        raise ValueError(
            f"A rank got {call.query.shape[0]} rows: with sequence parallelism it holds one stretch of all rows, laid "
            f"end to end. Cut the batch with shard_batch."
        )
    if call.settings.inputs.position_ids is None:
        raise ValueError(
            "The model was called without position_ids, and would count each rank's tokens from 0. Give it those of "
            "the whole sequence (shard_batch does)."
        )
    if call.settings.inputs.now.are_of_axes:
        raise ValueError(
            "position_ids of three axes (time, height, width) do not tell which token of its document a rank's first "
            "one is, and each rank's tokens would be counted from 0. Give the model position_ids (1, S) of the whole "
            "sequence's text (shard_batch does), or put them before the axes: (4, 1, S)."
        )


def _refuse_count(call: LayerCall, ranks: int) -> None:
    """Refuse a layer that would count the tokens of each rank's stretch from 0. Raises: NotImplementedError."""
    length = call.query.shape[2] * ranks
    if counts_tokens(type(call.module)) and length > counts_from(call.module):
        raise NotImplementedError(
            f"Layer {call.module.layer_idx} ({type(call.module).__name__}) counts the tokens of a row by itself and "
            f"scales its queries by their place, in rows of more than {counts_from(call.module):,} tokens. On a later "
            f"rank of these {length:,} it would count from 0. Train this model without sequence parallelism."
        )


def refuse_window(module: nn.Module) -> NoReturn:
    """Refuse a layer whose own rule is neither a window nor chunks. Raises: NotImplementedError."""
    raise NotImplementedError(
        f"Layer {module.layer_idx} ({type(module).__name__}) sees only a part of the tokens before it, by a rule that "
        f"is neither a sliding window nor chunks, and would end at the border of a rank. Train this model without "
        f"sequence parallelism."
    )


def refuse_blocks(pattern: str) -> None:
    """Refuse a pattern whose queries see blocks of keys of any rank. Raises: NotImplementedError."""
    if pattern in BLOCK_PATTERNS:
        raise NotImplementedError(
            f"attention_pattern={pattern!r} cannot be used where ranks share a sequence: a query may see blocks of "
            f"keys of any rank. Use 's2', 'local' or 'full', or train on one rank a sequence."
        )
