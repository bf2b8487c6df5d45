"""The halo exchange against the definition of S2-Attn on the whole sequence, in 2, 3, 4 and 8 processes."""

import random
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist

from peft_longlora.kernels.cuts import tensors_of
from peft_longlora.kernels.groups import find_documents, plan_groups
from peft_longlora.kernels.kernel import Options
from peft_longlora.kernels.operators import attend_halves, attend_halves_backward
from peft_longlora.kernels.patterns import PATTERNS
from peft_longlora.reference import s2_attention_reference
from peft_longlora.sequence.edges import Edges, exchange_edges, plan_halo
from peft_longlora.sequence.halo import attend, attend_far, attend_far_backward, merge
from tests.helpers.ranks import Traffic, run_ranks

DIM = 4
S2 = PATTERNS.index("s2")
HEADS = [(4, 2), (4, 1), (9, 3), (4, 4), (1, 1), (5, 1)]

# Stretches of each number of ranks, in tokens, and the documents: a negative length is padding.
CASES = {
    "stretches of whole groups": ({2: [16, 16], 3: [8, 16, 8], 4: [8] * 4}, [32]),
    "odd stretches": ({2: [13, 18], 3: [13, 5, 13], 4: [9, 5, 10, 7]}, [31]),
    "a group over two ranks": ({2: [13, 6], 3: [5, 8, 6], 4: [4, 5, 4, 6]}, [19]),
    "a group over three ranks": ({2: [4, 1], 3: [9, 2, 9], 4: [9, 1, 1, 9]}, None),
    "documents that end at a border": ({2: [12, 12], 3: [12, 6, 6], 4: [12, 2, 4, 6]}, [5, 7, 12]),
    "documents shorter than a group": ({2: [6, 7], 3: [6, 1, 6], 4: [3, 3, 1, 6]}, [4, 3, 5, 1]),
    "a rank with only padding": ({2: [20, 5], 3: [6, 6, 13], 4: [3, 3, 14, 5]}, [-6, 14, -5]),
    "nothing but padding": ({2: [3, 4], 3: [3, 2, 2], 4: [1, 2, 2, 2]}, [-7]),
    "padding between documents": ({2: [14, 14], 3: [11, 3, 14], 4: [7] * 4}, [10, -3, 9, -2, 4]),
}

# The same for 8 ranks.
EIGHT = {
    "stretches of whole groups": ([8] * 8, None),
    "odd stretches": ([13, 5, 7, 9, 3, 11, 1, 6], None),
    "every group over three ranks or more": ([3] * 8, [17, -2, 5]),
    "a group over eight ranks": ([9, 1, 1, 1, 1, 1, 1, 9], None),
    "ranks with only padding": ([6, 6, 6, 5, 9, 8, 4, 7], [-6, 34, -11]),
    "documents shorter than a group": ([3, 1, 4, 1, 5, 2, 6, 3], [4, 3, 5, 1, 7, 2, 3]),
    "nothing but padding": ([1, 2] * 4, [-12]),
}


def rows(documents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, S) positions and segment ids."""
    positions = torch.cat([torch.arange(abs(n)) for n in documents])
    segments = torch.cat([torch.full((abs(n),), i + 1 if n > 0 else 0) for i, n in enumerate(documents)])
    return positions[None], segments[None]


def plan(lengths, positions, segments, group_size, pattern):
    """This rank's stretch as a slice, and its halo."""
    rank = dist.get_rank()
    mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    documents = find_documents(segments[:, mine])
    edges = exchange_edges(documents, positions[:, mine], group_size, pattern, dist.group.WORLD)
    return mine, plan_halo(edges, rank, documents, dist.group.WORLD)


def error_of(lengths, documents, group_size, pattern, heads, kv_heads) -> tuple[float, list[int]]:
    """The largest difference of output and gradients, and how many ranks this one's halo comes from, by half."""
    positions, segments = rows(documents)
    torch.manual_seed(len(documents))
    shape = positions.shape[1], DIM
    q, k, v = (torch.randn(1, h, *shape, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    dout = torch.randn(1, shape[0], heads, DIM, dtype=torch.float64)
    truth = s2_attention_reference(q, k, v, group_size, segment_ids=segments, pattern=pattern)
    grads = torch.autograd.grad(truth, (q, k, v), dout)
    mine, halo = plan(lengths, positions, segments, group_size, pattern)
    own = [x.detach()[:, :, mine].clone().requires_grad_() for x in (q, k, v)]
    out = attend(*own, halo)
    out.backward(dout[:, mine])
    pairs = [(out, truth[:, mine]), *((x.grad, grad[:, :, mine]) for x, grad in zip(own, grads, strict=True))]
    sources = [sum(first < last for first, last in half) for half in zip(*halo.receives, strict=True)]
    return max((a - b).detach().abs().max().item() for a, b in pairs), sources


def compare(ranks: int) -> dict:
    found = {}
    cases = EIGHT if ranks == 8 else {name: (each[ranks], documents) for name, (each, documents) in CASES.items()}
    for name, (lengths, documents) in cases.items():
        for heads, kv_heads in HEADS:
            for pattern in (p for p in PATTERNS if p != "full"):
                found[name, heads, kv_heads, pattern] = error_of(
                    lengths, documents or [sum(lengths)], 8, pattern, heads, kv_heads
                )
    choose = random.Random(ranks)
    for number in range(25):
        lengths = [choose.randint(1, 12) for _ in range(ranks)]
        documents, left = [], sum(lengths)
        while left:
            documents.append(choose.choice((1, 1, 1, -1)) * choose.randint(1, min(left, 20)))
            left -= abs(documents[-1])
        group_size, heads = choose.choice((2, 4, 8)), choose.choice(HEADS)
        name = f"drawn {number}: {lengths} tokens, documents {documents}, G = {group_size}"
        found[(name, *heads, "s2")] = error_of(lengths, documents, group_size, "s2", *heads)
    return found


@pytest.mark.parametrize("ranks", [2, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_output_and_gradients_are_those_of_one_process(ranks):
    """In float64, but for the log-sum-exp, which kernels keep in float32."""
    results = run_ranks(ranks, compare, ranks)
    wrong = {key: error for found in results for key, (error, _) in found.items() if not error < 2e-6}
    assert not wrong
    many = "a group over eight ranks" if ranks == 8 else "a group over three ranks"
    sources = [max(sources) for found in results for (name, *_), (_, sources) in found.items() if name == many]
    assert max(sources) == ranks - 1


def traffic(stretches: list[int], group_size: int) -> list:
    """Bytes sent forward and backward for each length of a stretch: 4 heads on 2 KV heads, in bfloat16."""
    found = []
    for stretch in stretches:
        lengths = [stretch] * dist.get_world_size()
        positions, segments = rows([sum(lengths)])
        _, halo = plan(lengths, positions, segments, group_size, "s2")
        q, k, v = (torch.randn(1, h, stretch, DIM, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
        with Traffic() as forward:
            out = attend(q, k, v, halo)
        with Traffic() as backward:
            out.sum().backward()
        found.append((forward.sent, backward.sent))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_depends_on_neither_length_nor_number_of_ranks(ranks):
    """G / 2 tokens of half the KV heads, keys and values, to the next rank; their gradients to the one before."""
    group_size = 8
    halo = group_size // 2 * 1 * 2 * DIM * 2
    results = run_ranks(ranks, traffic, [8, 64, 512], group_size)
    for rank, found in enumerate(results):
        assert found == [([halo * (rank < ranks - 1)], [halo * (rank > 0)])] * 3


def one_after_the_other() -> float:
    """Rank 1 begins its forward when rank 0 has finished its own, and rank 0 its backward when rank 1 has."""
    rank = dist.get_rank()
    positions, segments = rows([16])
    mine, halo = plan([8, 8], positions, segments, 8, "s2")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 16, DIM, dtype=torch.float64) for h in (4, 2, 2))
    own = [x[:, :, mine].clone().requires_grad_() for x in (q, k, v)]
    turn = torch.zeros(1)
    if rank == 1:
        dist.recv(turn, 0)
    out = attend(*own, halo)
    if rank == 0:
        dist.send(turn, 1)
        dist.recv(turn, 1)
    out.sum().backward()
    if rank == 1:
        dist.send(turn, 0)
    whole = [x.requires_grad_() for x in (q, k, v)]
    truth = s2_attention_reference(*whole, 8)
    truth.sum().backward()
    pairs = [(out, truth[:, mine]), *((a.grad, b.grad[:, :, mine]) for a, b in zip(own, whole, strict=True))]
    return max((a - b).abs().max().item() for a, b in pairs)


def test_a_rank_that_receives_nothing_waits_for_nobody():
    """Or this would never end: the first rank needs nothing forward, and the last one nothing backward."""
    assert max(run_ranks(2, one_after_the_other)) < 2e-6


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_two_parts_of_a_softmax_are_the_whole(dtype, most, queries, keys, heads):
    """Far keys and a rank's own, each by a kernel, against dense attention to both in float64; in units of the largest.

    The far scores are small for some heads and large for others, so that either part may weigh next to nothing.
    """
    torch.manual_seed(queries)
    heads, kv_heads = heads
    size = torch.logspace(-1, 1, kv_heads)[:, None]
    q, dout = (torch.randn(queries, heads, DIM, dtype=dtype) for _ in range(2))
    k, v, far_k, far_v = (torch.randn(n, kv_heads, DIM, dtype=dtype) for n in (queries, queries, keys, keys))
    far_k = far_k * size.to(dtype)
    exact = [x.double().clone().requires_grad_() for x in (q, torch.cat((far_k, k)), torch.cat((far_v, v)))]
    wide = [exact[0], *(x.repeat_interleave(heads // kv_heads, 1) for x in exact[1:])]
    scores = torch.einsum("qhd,khd->hqk", *wide[:2]) * 0.5
    scores = scores.masked_fill(torch.ones(queries, keys + queries).triu(keys + 1).bool(), -torch.inf)
    truth = torch.einsum("hqk,khd->qhd", scores.softmax(-1), wide[2])
    truth.backward(dout.double())

    plan = tensors_of(plan_groups(1, queries, 2, "full"), q.device)
    out, lse = attend_halves(q, k, v, *plan, 0.5, 0.0, "cpu")
    merge(out, lse, *attend_far(q, far_k, far_v, 0.5, 0.0, "cpu"))
    dq, *dkv = attend_halves_backward(dout, q, k, v, out, lse, *plan, 0.5, 0.0, "cpu")
    far_dq, *far_dkv = attend_far_backward(dout, q, far_k, far_v, out, lse, 0.5, 0.0, "cpu")
    found = [out, lse, dq + far_dq, *(torch.cat(pair) for pair in zip(far_dkv, dkv, strict=True))]
    expected = [truth, scores.logsumexp(-1), *(x.grad for x in exact)]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        rounding = 1 if name in ("out", "lse") else 4  # gradients also hold the rounding of the weights' gradients
        assert (a - b).abs().max() < rounding * most * b.abs().max().clamp(min=1), name


def stretches_of(lengths: list[int], documents: list[int]) -> list[tuple[Edges, list]]:
    """Edges and documents of every rank, without processes."""
    positions, segments = rows(documents)
    found = []
    for first, last in pairwise([0, *accumulate(lengths)]):
        own = find_documents(segments[:, first:last])
        (_, head, number), (_, tail, last_number) = own[0], own[-1]
        ends = positions[0, first].item(), positions[0, last - 1].item()
        found.append((Edges(last - first, head * bool(number), tail * bool(last_number), *ends, 8, S2), own))
    return found


def test_the_plans_of_all_ranks_fit_together():
    """Against the plan of the whole sequence; what one rank sends, another expects."""
    choose = random.Random(0)
    for _ in range(300):
        lengths = [choose.randint(1, 14) for _ in range(choose.randint(1, 6))]
        documents, left = [], sum(lengths)
        while left:
            documents.append(choose.choice((1, 1, -1)) * choose.randint(1, min(left, 40)))
            left -= abs(documents[-1])
        every = stretches_of(lengths, documents)
        edges = [edge for edge, _ in every]
        plans = [plan_halo(edges, rank, own) for rank, (_, own) in enumerate(every)]
        _, segments = rows(documents)
        whole = plan_groups(1, sum(lengths), 8, documents=find_documents(segments))
        starts = [0, *accumulate(lengths)]
        for rank, plan in enumerate(plans):
            first, last = starts[rank], starts[rank + 1]
            for half, (here, everywhere) in enumerate(
                [(plan.groups.straight, whole.straight), (plan.groups.shifted, whole.shifted)]
            ):
                is_padding = segments[0, first] == 0
                began = max(b for b in everywhere if b <= first)
                assert plan.needs[half] == (0 if is_padding else first - began)
                real = [b - first for b in everywhere if first < b < last and segments[0, b]]
                assert set(real) <= set(here) and here[-1] == last - first
                for other, theirs in enumerate(plans):
                    (a, b), (c, d) = plan.sends[other][half], theirs.receives[rank][half]
                    assert b - a == d - c and (other > rank or a == b)
                assert sum(d - c for c, d in (x[half] for x in plan.receives)) == plan.needs[half]


def test_a_thousand_ranks_are_planned_like_two():
    """100 million tokens on 1024 GPUs: nobody lists the groups of the whole sequence, and only neighbours talk."""
    stretch, group_size = 2**17, 8192
    edges = [Edges(stretch, stretch, stretch, i * stretch, (i + 1) * stretch - 1, group_size, S2) for i in range(1024)]
    plan = plan_halo(edges, 700, [(0, stretch, 1)])
    assert plan.needs == (0, group_size // 2)
    talking = [rank for rank in range(1024) if any(b > a for a, b in (*plan.sends[rank], *plan.receives[rank]))]
    assert talking == [699, 701]
    assert len(plan.groups.straight) == stretch // group_size + 1


def different(kind: str) -> str:
    rank = dist.get_rank()
    position_ids = torch.arange(6)[None] + 6 * rank
    group_size, pattern = 8, "s2"
    if kind == "positions":
        position_ids = torch.arange(6)[None] + 9 * rank
    elif kind == "group size":
        group_size = 8 + 2 * rank
    documents = [(0, 6, 1)]
    if kind == "padding inside" and rank == 1:
        documents = [(0, 2, 1), (2, 1, 0), (3, 3, 1)]
    if kind == "tokens" and rank == 1:
        documents, position_ids = [], position_ids[:, :0]
    try:
        exchange_edges(documents, position_ids, group_size, pattern, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def all_that_differs() -> list[str]:
    return [different(kind) for kind in ("nothing", "positions", "group size", "tokens", "padding inside")]


def test_stretches_that_do_not_fit_are_refused_on_every_rank():
    for found in run_ranks(2, all_that_differs):
        nothing, positions, sizes, tokens, padding = found
        assert nothing == "nothing"
        assert "rank 0 ends at position 5, and rank 1 begins at 9" in positions and "shard_batch" in positions
        assert "[(8, 's2'), (10, 's2')]" in sizes
        assert "stretches of [6, 0] tokens" in tokens
        assert "padding inside a document" in padding and "its own pad token" in padding


def test_kernels_that_only_autograd_can_run_are_refused():
    q = torch.randn(1, 2, 8, DIM)
    plan = plan_halo([Edges(8, 8, 8, 0, 7, 4, S2)], 0, [(0, 8, 1)])
    with pytest.raises(NotImplementedError, match="backend='flex' cannot attend to a sequence that ranks share"):
        attend(q, q, q, plan, Options(backend="flex"))
    with pytest.raises(NotImplementedError, match="no dropout"):
        attend(q, q, q, plan, Options(dropout=0.1))
    with pytest.raises(NotImplementedError, match="not 2 and 4"):
        attend(q, q, q[..., :2].contiguous(), plan)
    assert torch.allclose(attend(q, q, q, plan), s2_attention_reference(q, q, q, 4), atol=1e-6)
