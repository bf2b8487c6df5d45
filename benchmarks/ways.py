"""The ways in which others compute S2-Attn: of LongLoRA, of LLaMA-Factory, and the plain way on one kernel."""

from itertools import pairwise

import torch
from measure import Case
from torch.nn.functional import scaled_dot_product_attention

from peft_longlora.kernels.groups import split_heads


def repeat_kv(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def roll(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """The way of LongLoRA without flash attention, and of LLaMA-Factory. Its last shifted group wraps around."""
    batch, heads, length, dim = q.shape
    group = case.group

    def shift(x: torch.Tensor) -> torch.Tensor:
        x = repeat_kv(x, heads)
        x = torch.cat((x[:, : heads // 2], x[:, heads // 2 :].roll(-group // 2, 2)), 1)
        return x.transpose(1, 2).reshape(batch * length // group, group, heads, dim).transpose(1, 2)

    out = scaled_dot_product_attention(shift(q), shift(k), shift(v), is_causal=True)
    out = out.transpose(1, 2).reshape(batch, length, heads, dim)
    return torch.cat((out[:, :, : heads // 2], out[:, :, heads // 2 :].roll(group // 2, 1)), 2)


def permute_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, slices=True) -> torch.Tensor:
    """The way of LongLoRA with FlashAttention-2: repeat KV, stack, permute, one call with cumulative lengths.

    `slices`: q, k and v are cut out of the stack one by one, whose backward is a zero-fill and an add for each;
    otherwise by one `unbind`, as far as that way can be mended without changing it.
    """
    _, heads, length, dim = q.shape
    plan = case.plan("s2")
    qkv = torch.stack((q, repeat_kv(k, heads), repeat_kv(v, heads)), 2).transpose(1, 3)  # (1, N, 3, H, D)
    qkv = qkv.reshape(1, length, 3, 2, heads // 2, dim).permute(0, 3, 1, 2, 4, 5).reshape(2 * length, 3, -1, dim)
    parts = (qkv[:, 0], qkv[:, 1], qkv[:, 2]) if slices else qkv.unbind(1)
    cuts = [*plan.straight, *(x + length for x in plan.shifted[1:])]
    if q.is_cuda:
        cu = torch.tensor(cuts, dtype=torch.int32).pin_memory().to(q.device, non_blocking=True)
        out = torch_varlen(*parts, cu, plan.max_length)
    else:
        pieces = (x.transpose(0, 1)[None] for x in parts)
        lengths = [b - a for a, b in pairwise(cuts)]
        parts = zip(*(x.split(lengths, 2) for x in pieces), strict=True)
        out = torch.cat([scaled_dot_product_attention(*x, is_causal=True) for x in parts], 2)[0].transpose(0, 1)
    return out.reshape(1, 2, length, heads // 2, dim).transpose(1, 2).reshape(1, length, heads, dim)


def torch_varlen(q, k, v, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    try:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
    except TypeError:  # torch before 2.12
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, is_causal=True)


def two_calls_fa4(q, k, v, case: Case) -> torch.Tensor:
    """The plain way on FlashAttention-4: its public function for each half of the heads, then a concatenation."""
    from flash_attn.cute import flash_attn_varlen_func

    h, h_kv = split_heads(case.heads, case.kv_heads)
    plan = case.plan("s2")
    q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
    parts = []
    for cuts, heads, kv in (
        (plan.straight, slice(0, h), slice(0, h_kv)),
        (plan.shifted, slice(h, None), slice(h_kv, None)),
    ):
        cu = torch.tensor(cuts, dtype=torch.int32).pin_memory().to(q.device, non_blocking=True)
        cut = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=plan.max_length, max_seqlen_k=plan.max_length)
        out = flash_attn_varlen_func(q[:, heads], k[:, kv], v[:, kv], causal=True, **cut)
        parts.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(parts, 1)[None]
