"""Sharded heads over gloo processes: the results and gradients of the whole weight."""

from __future__ import annotations

import copy
import datetime
import itertools
import math
import sys
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from compare import assert_close_to_truth
from rlhf_kernels import (
    full_weight,
    linear_chunks,
    linear_logprob,
    linear_token_loss,
    token_logprob,
)
from rlhf_kernels.backend import why_not

SHARDS = {2: (30, 37), 3: (10, 1, 56)}  # uneven; 1: the other tokens are all elsewhere
VOCAB, ROWS, WIDTH = 67, 23, 16
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

needs_processes = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32" or why_not("token_logprob", "cpu"),
    reason="needs gloo and the CPU kernels",
)


def cases() -> dict[str, dict[str, Any]]:
    """What a case differs in; ``likely``, ``banned`` and ``masked`` change the inputs."""
    generator = torch.Generator().manual_seed(7)
    warm = torch.rand(ROWS, generator=generator) + 0.5
    ignored = torch.randint(VOCAB, (ROWS,), generator=generator)
    ignored[::3] = -100
    many = torch.randint(VOCAB, (ROWS, 4), generator=generator)
    many[:, 1] = many[:, 0]  # scored twice
    many[::3, 2] = -100
    many[::4, 3] = torch.tensor([0, 10, 11, 30])[torch.arange(6) % 4]  # first rows of shards
    some_of_first = torch.arange(ROWS) % VOCAB
    many[5] = -100
    return {
        "plain": {},
        "entropy, bias": {"with_entropy": True, "bias": True},
        "chunks": {"chunk_tokens": 5, "with_entropy": True},
        "temperature": {"temperature": warm, "with_entropy": True, "chunk_tokens": 9},
        "scale": {"logit_scale": 0.3, "temperature": 0.7, "bias": True},
        "softcap": {"softcap": 3.0, "logit_scale": 2.0, "bias": True, "chunk_tokens": 8},
        "softcap, entropy": {"softcap": 3.0, "temperature": warm, "with_entropy": True},
        "ignored": {"tokens": ignored, "with_entropy": True, "chunk_tokens": 4},
        "an id is ignored": {"tokens": some_of_first, "ignore_index": 0, "with_entropy": True},
        "nothing scored": {"tokens": torch.full((ROWS,), -100), "with_entropy": True},
        "K tokens": {"tokens": many, "with_entropy": True, "chunk_tokens": 7},
        "likely": {"likely": 3.0, "with_entropy": True},
        "certain": {"likely": 12.0, "with_entropy": True, "chunk_tokens": 10},
        "banned shard": {"banned": slice(0, 10), "with_entropy": True},
        "banned tokens": {"banned": slice(5, 40), "with_entropy": True, "chunk_tokens": 6},
        "a finite mask": {"masked": slice(0, 11), "with_entropy": True, "temperature": 0.4},
    }


def inputs(dtype, likely=1.0, banned=None, masked=None, bias=None, tokens=None, **options):
    """hidden, weight, bias of the whole vocabulary, and the keywords."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=generator) * likely
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * 0.7
    offset = torch.randn(VOCAB, generator=generator) if bias else None
    if banned is not None:
        offset = torch.zeros(VOCAB).index_fill_(0, torch.arange(VOCAB)[banned], -torch.inf)
    if masked is not None:
        lowest = torch.finfo(dtype).min
        offset = torch.zeros(VOCAB, dtype=dtype)
        offset[masked] = lowest
    if tokens is None:
        tokens = torch.randint(VOCAB, (ROWS,), generator=generator)
        if likely != 1:
            tokens = (hidden @ weight.t()).argmax(-1)
        if banned is not None:
            tokens[1:] = tokens[1:].clamp(min=41)  # and one that may be banned
            tokens[0] = 7
        if masked is not None:
            tokens = tokens.clamp(min=masked.stop)
    leaves = [x if x is None else x.to(dtype) for x in (hidden, weight, offset)]
    return leaves, {"tokens": tokens, **options}


def run(leaves, options, one_sweep):
    """Results and the gradients of a loss of them."""
    hidden, weight, bias = (None if x is None else x.detach().requires_grad_() for x in leaves)
    tokens, ignore = options["tokens"], options.get("ignore_index", -100)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    coefficient = torch.linspace(-1, 2, tokens.numel(), dtype=dtype).view(tokens.shape) / ROWS

    def loss_fn(logprob, entropy, coefficient, place=None):
        valid = logprob.isfinite()
        loss = (torch.where(valid, logprob, 0.0) * coefficient).sum()
        if entropy is not None:
            first = coefficient[..., 0] if coefficient.dim() == 2 else coefficient
            loss = loss + 0.4 * (entropy * first).sum()
        if place is None:
            return loss, None
        return loss, {"logprob": torch.zeros(ROWS, dtype=dtype).index_copy(0, place, logprob)}

    found = {}
    options = {**options, "bias": bias}
    if one_sweep:
        per_token = {"coefficient": coefficient, "place": torch.arange(ROWS)}
        loss, stats = linear_token_loss(
            hidden, weight, loss_fn=loss_fn, per_token=per_token, **options
        )
        found.update(stats)
    else:
        out = linear_logprob(hidden, weight, **options)
        found["logprob"], entropy = (out, None) if isinstance(out, torch.Tensor) else out
        if entropy is not None:
            found["entropy"] = entropy
        loss, _ = loss_fn(found["logprob"], entropy, coefficient)
    assert (found["logprob"][tokens == ignore] == 0).all()
    loss.backward()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    found |= {f"d {name}": x.grad for name, x in named.items() if x is not None}
    return {"loss": loss.detach(), **found}


def check_case(name: str, dtype: torch.dtype, one_sweep: bool, own: slice) -> None:
    leaves, options = inputs(dtype, **cases()[name])
    double = [x if x is None else x.double() for x in leaves]
    plain = run(leaves, {**options, "backend": "reference"}, one_sweep)
    truth = run(double, {**options, "backend": "reference"}, one_sweep)
    mine = [x if x is None or i == 0 else x[own] for i, x in enumerate(leaves)]
    got = run(mine, {**options, "process_group": dist.group.WORLD}, one_sweep)
    everywhere = {}  # gathered before anything fails on some of the ranks
    for key in ("loss", "logprob", "d hidden"):
        everywhere[key] = [torch.empty_like(got[key]) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere[key], got[key].detach())
    assert got.keys() == truth.keys()
    for key, x in got.items():
        rows = own if key in ("d weight", "d bias") else slice(None)
        a, b = (y if y.dim() == 0 else y[rows] for y in (plain[key], truth[key]))
        what = f"{name}, {dtype}, {'loss' if one_sweep else 'logprob'}: {key}"
        assert_close_to_truth(x, a, b, DTYPES[dtype], what)
    for key, others in everywhere.items():  # the same bits
        for x in others:
            torch.testing.assert_close(x, got[key], rtol=0, atol=0, equal_nan=True)


def check_near_one(own: slice) -> None:
    """49 of test_known_bugs.py: log p of -1e-12, whichever rank holds the token; the logits are
    exact. Maxima on two ranks are two tokens."""
    hidden = torch.tensor([[0.5], [0.75], [1.0]]).requires_grad_()
    tokens = torch.tensor([1, 1, 1])
    for token in (0, 9, 10, 11, 29, 30, 66):
        weight = -(torch.arange(VOCAB).remainder(8) / 4).unsqueeze(-1)
        weight[token] = 40
        w, h = weight.double().flatten(), hidden.detach().double()
        d = h * (w - w[token])
        e = d.exp().index_fill(1, torch.tensor([token]), 0.0)
        rest = e.sum(1)
        p = e / (1 + rest[:, None])
        entropy = rest.log1p() - (p * d).sum(1)
        mine = weight[own].clone().requires_grad_()
        options = {"with_entropy": True, "process_group": dist.group.WORLD}
        out = linear_logprob(hidden, mine, tokens.fill_(token), **options)
        torch.testing.assert_close(out.logprob.double(), -rest.log1p(), rtol=1e-5, atol=0)
        torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(out.logprob.sum(), (hidden, mine))
        truth = (p * (w[token] - w)).sum(1, keepdim=True)
        torch.testing.assert_close(grads[0].double(), truth, rtol=1e-5, atol=0)
        if own.start <= token < own.stop:
            truth = (rest / (1 + rest) * h[:, 0]).sum()
            got = grads[1][token - own.start, 0]
            torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)
    for others in ((66,), (1, 66)):
        weight = torch.full((VOCAB, 1), -40.0)
        weight[[0, *others]] = 0.0
        out = linear_logprob(hidden, weight[own], tokens.fill_(0), process_group=dist.group.WORLD)
        expected = torch.full_like(out, -math.log(1 + len(others)))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def check_errors(rank: int, world: int, own: slice) -> None:
    """They are raised on all ranks, so that none waits for another."""
    (hidden, weight, _), options = inputs(torch.float32)
    tokens, mine = options["tokens"], weight[own]
    group = dist.group.WORLD
    with pytest.raises(TypeError, match=r"process_group: expected a .*ProcessGroup.*, got str"):
        linear_logprob(hidden, mine, tokens, process_group="world")
    for wrong in (VOCAB, -1):
        outside = tokens.clone()
        outside[4] = wrong
        with pytest.raises(IndexError, match=rf"in \[0, 67\) or .*got {wrong} at position 4"):
            linear_logprob(hidden, mine, outside, process_group=group)
    with pytest.raises(ValueError, match="process_group: expected a backend other than"):
        linear_logprob(hidden, mine, tokens, process_group=group, backend="reference")
    with pytest.raises(ValueError, match="weight: expected a row or more on each rank"):
        linear_logprob(hidden, mine if rank else mine[:0], tokens, process_group=group)
    low = hidden.bfloat16(), mine.bfloat16(), tokens
    with (
        mock.patch.object(linear_chunks, "_cpu_multiplies", lambda dtype: rank == 0),
        pytest.raises(ValueError, match=r"bytes of a logit .*: expected the same on all ranks"),
    ):
        linear_logprob(*low, process_group=group)
    fewer = ROWS - rank
    with pytest.raises(ValueError, match="number of tokens: expected the same on all ranks"):
        one_token = (torch.zeros(ROWS, WIDTH), mine, torch.zeros(ROWS, fewer, dtype=torch.int64))
        linear_logprob(*one_token, process_group=group)
    with pytest.raises(ValueError, match="chunk_tokens: expected the same on all ranks"):
        linear_token_loss(
            hidden,
            mine,
            tokens,
            lambda logprob, entropy: (logprob.sum(), None),
            chunk_tokens=1 + rank,
            process_group=group,
        )


def check_the_rest(world: int, own: slice) -> None:
    """Without gradients, chunks by the budget, 16 bits, a group of one rank, autocast."""
    (hidden, weight, _), options = inputs(torch.float32)
    tokens, mine = options["tokens"], weight[own]
    # No gradient, and the same bits; no hidden gradient: nothing to add up.
    with torch.no_grad():
        old = linear_logprob(hidden, mine, tokens, process_group=dist.group.WORLD)
    leaf = mine.clone().requires_grad_()
    new = linear_logprob(hidden, leaf, tokens, process_group=dist.group.WORLD)
    assert torch.equal(old, new.detach())
    new.sum().backward()
    assert leaf.grad is not None
    # Chunks by the budget: shards of different sizes have to cut the same ones.
    budget = mock.patch.dict(linear_chunks.BUDGET, cpu=2000)
    with budget, mock.patch.object(linear_chunks, "LEAST_TOKENS", 1):
        some = linear_logprob(hidden, mine, tokens, process_group=dist.group.WORLD)
    torch.testing.assert_close(some, old)
    # 16-bit logits: target and sum are refined as they are without shards.
    low = [x.bfloat16() for x in (hidden * 3, weight)]
    likely = (low[0] @ low[1].t()).argmax(-1)
    truth = token_logprob(low[0].double() @ low[1].double().t(), likely)
    rounded = token_logprob(low[0] @ low[1].t(), likely)
    fine = linear_logprob(low[0], low[1][own], likely, process_group=dist.group.WORLD)
    errors = [(x - truth).square().mean() for x in (fine, rounded)]
    assert errors[0] < 0.7 * errors[1], errors
    # A group of one rank is the plain path.
    alone = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()]
    got = linear_logprob(hidden, weight, tokens, process_group=alone)
    assert torch.equal(got, linear_logprob(hidden, weight, tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = linear_logprob(hidden, mine, tokens, process_group=dist.group.WORLD)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, old, rtol=0.05, atol=0.05)


def check_fsdp(rank: int) -> None:
    """Each rank has tokens of its own: as FSDP2's own forward and backward of the same head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (_, weight, bias), _ = inputs(torch.float32, bias=True)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    tokens = torch.randint(VOCAB, (ROWS,), generator=generator)

    def sum_of_logprobs(logprob, entropy):
        return logprob.sum(), None

    def head() -> torch.nn.Linear:
        linear = torch.nn.Linear(WIDTH, VOCAB)
        linear.load_state_dict({"weight": weight, "bias": bias})
        return fully_shard(linear, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    expected = head()
    token_logprob(expected(hidden), tokens).sum().backward()
    for one_sweep in (False, True):
        got = head()
        if one_sweep:
            loss, _ = linear_token_loss(
                hidden, got.weight, tokens, sum_of_logprobs, bias=got.bias, chunk_tokens=7
            )
        else:
            loss = linear_logprob(hidden, got.weight, tokens, bias=got.bias).sum()
        loss.backward()
        for a, b in zip(got.parameters(), expected.parameters(), strict=True):
            assert a.grad.placements == a.placements
            torch.testing.assert_close(a.grad.to_local(), b.grad.to_local())
    total = head()
    whole = full_weight(total.weight, reduce="sum")
    assert torch.equal(whole, weight) and full_weight(whole) is whole
    linear_logprob(hidden, whole, tokens, bias=bias).sum().backward()
    want = expected.weight.grad.to_local() * dist.get_world_size()
    torch.testing.assert_close(total.weight.grad.to_local(), want)
    with pytest.raises(ValueError, match="reduce: expected mean or sum, got 'max'"):
        full_weight(weight, reduce="max")


def check_ddp(rank: int) -> None:
    """36. Gradients of a head that only a fused loss touches are averaged over the ranks. trl
    7245"""
    if find_spec("transformers") is None:
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_kernels.integrations.transformers import hidden_forward

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))
    model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(whole))
    for other in range(dist.get_world_size()):
        ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(other))
        logprob = token_logprob(whole(ids).logits[:, :-1], ids[:, 1:])
        (logprob.sum() / dist.get_world_size()).backward()
        if other == rank:
            hidden, head = hidden_forward(model, ids)
            loss, _ = linear_token_loss(
                hidden[:, :-1],
                tokens=ids[:, 1:],
                loss_fn=lambda logprob, entropy: (logprob.sum(), None),
                **head._asdict(),
            )
            loss.backward()
    for got, want in zip(model.module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def run_rank(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )
    begin = sum(SHARDS[world][:rank])
    own = slice(begin, begin + SHARDS[world][rank])
    failures = []
    for name, dtype, has_products in itertools.product(cases(), DTYPES, (True, False)):
        if not has_products and dtype not in linear_chunks.LOW:
            continue
        linear_chunks._cpu_multiplies = lambda dtype, has=has_products: has  # whatever this CPU has
        for one_sweep in (False,) if name == "K tokens" else (False, True):
            try:
                check_case(name, dtype, one_sweep, own)
            except AssertionError as error:
                failures.append(str(error))
    check_near_one(own)
    check_errors(rank, world, own)
    check_the_rest(world, own)
    check_fsdp(rank)
    check_ddp(rank)
    dist.destroy_process_group()
    assert not failures, f"rank {rank}: {len(failures)} failures\n" + "\n".join(failures)


@needs_processes
@pytest.mark.parametrize("world", SHARDS)
def test_vocab_parallel_sentinel(world, tmp_path):
    """7 of test_known_bugs.py, and what else goes over ranks: targets that another shard holds (CCE
    59, Megatron-LM 7452); weights of FSDP2; DDP (36)."""
    mp.set_forkserver_preload(["rlhf_kernels"])  # imported once, not once a process
    args = (world, str(tmp_path / "store"))
    mp.start_processes(run_rank, args, nprocs=world, start_method="forkserver")
