"""Vocabulary-parallel heads: every rank holds consecutive rows of the weight.

Each rank runs the row kernels on the logits of its own rows, and vectors of one number a token are
reduced: the maxima, then the sums relative to the common maximum (without the maxima themselves,
which are counted: so that log p near 0 keeps its digits), the energies of the entropy, and the
targets' logits, to which the one rank that holds the target contributes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.autograd import not_compiled
from rlhf_kernels.linear_chunks import LOW, Head, Rows, Sweep, products_dtype

IGNORED, WRONG = -100, -1  # what the kernels see: a caller's ignore_index may be a row of the shard


class Shard(NamedTuple):
    """Which part of the vocabulary this rank holds."""

    group: dist.ProcessGroup
    begin: int  # global id of the first row
    size: int
    vocab: int  # rows of all ranks
    largest: int  # rows of the largest shard: the ranks have to cut the same chunks


def shard_of(
    group: dist.ProcessGroup | None,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    chunk_tokens: int | None,
    with_entropy: bool,
) -> Shard | None:
    """This rank's shard; None without a group, or with one of a single rank.

    Args:
        group: the ranks in the order of their rows.
        hidden: (..., H).
        weight: (V of this rank, H).
        tokens, chunk_tokens, with_entropy: as the caller gave them.

    Raises:
        TypeError: ``group`` is no process group (or this process is not in it).
        ValueError: the ranks disagree; on all of them, where they would wait for each other.
    """
    if group is None:
        if weight.shape[0] < 1:
            shape = tuple(weight.shape)
            raise ValueError(f"weight: expected shape (V, H) with V >= 1, got {shape}")
        return None
    return _exchange(group, hidden, weight, tokens, chunk_tokens, with_entropy)


@not_compiled
def _exchange(
    group: dist.ProcessGroup,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    chunk_tokens: int | None,
    with_entropy: bool,
) -> Shard | None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup that this process is in, "
            f"got {type(group).__name__}"
        )
    if group.size() == 1:
        return None
    same = {
        "number of elements of hidden": hidden.numel(),
        "number of tokens": tokens.numel(),
        "hidden.requires_grad": hidden.requires_grad and torch.is_grad_enabled(),
        "chunk_tokens": chunk_tokens or 0,
        "with_entropy": bool(with_entropy),
        "bytes of a logit (which the CPU decides)": products_dtype(hidden).itemsize,
    }
    mine = torch.tensor([weight.shape[0], *same.values()], device=hidden.device)
    rows = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(rows, mine, group=group)
    sizes, *others = torch.stack(rows, 1).tolist()
    for name, values in zip(same, others, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name}: expected the same on all ranks of process_group, got {values}"
            )
    if min(sizes) < 1:
        raise ValueError(
            f"weight: expected a row or more on each rank of process_group, got {sizes} rows"
        )
    rank = group.rank()
    return Shard(group, sum(sizes[:rank]), sizes[rank], sum(sizes), max(sizes))


def check_backend(backend: str, shard: Shard | None) -> None:
    """The reference is the formula for a whole weight."""
    if backend == "reference" and shard is not None:
        raise ValueError(
            "process_group: expected a backend other than 'reference', which takes the whole "
            "weight in one process"
        )


def make_sweep(
    hidden: Tensor,
    head: Head,
    backend: str,
    size: int,
    shard: Shard | None,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> Sweep:
    """The sweep over the chunks of a head that is whole (``shard`` None) or shared."""
    if shard is None:
        return Sweep(hidden, head, backend, size, dtypes)
    return _ShardSweep(hidden, head, backend, size, shard, dtypes)


class _ShardSweep(Sweep):
    """A sweep whose log-probabilities and entropies are those of the whole vocabulary."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        backend: str,
        size: int,
        shard: Shard,
        dtypes: tuple[torch.dtype, torch.dtype] | None,
    ):
        # dH is this rank's share, and is rounded once, after the sum over the ranks.
        wide = checks.accumulation_dtype(hidden)
        self.returned, weight = dtypes or (hidden.dtype, head.weight.dtype)
        super().__init__(hidden, head, backend, size, (wide, weight))
        self.shard = shard

    def _local(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens as rows of this shard (0 where another rank holds it), and where they are."""
        shard, here = self.shard, tokens - self.shard.begin
        scored = tokens != self.head.ignore_index
        owned = scored & (here >= 0) & (here < shard.size)
        wrong = scored & ((tokens < 0) | (tokens >= shard.vocab))
        local = torch.where(owned, here, 0).masked_fill(wrong, WRONG)
        return local.masked_fill(~scored, IGNORED), owned

    def rows(self, part: slice, z: Tensor, tokens: Tensor, with_entropy: bool) -> Rows:
        """As for the whole vocabulary, with ``refined`` done: it needs the same reduction."""
        temperature, value, _ = self.scaling(part)
        local, owned = self._local(tokens)
        args = (z, local, temperature, value, IGNORED, with_entropy)
        mine = Rows(*self.ops.token_logprob_fwd(*args))
        scale = value if temperature is None else temperature.double()
        row_max = mine.row_max.clone()
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group=self.shard.group)

        # A shard without a finite logit has a sum of 0 and no mean energy.
        shift = (mine.row_max.double() - row_max) / scale
        share = (shift + mine.log_sum).exp()
        top = mine.row_max == row_max
        beside = torch.where(top, mine.log_sum.double().expm1(), share)  # the maximum
        many = tokens.dim() == 2
        index, held = (local, owned) if many else (local.unsqueeze(-1), owned.unsqueeze(-1))
        sums = [torch.stack((beside, top.to(beside.dtype)), -1)]
        sums.append(torch.where(held, z.gather(-1, index.clamp(min=0)), 0.0))
        if with_entropy:
            energy = share * (shift + mine.log_sum - mine.entropy)
            sums.append(torch.where(share == 0, 0.0, energy).unsqueeze(-1))
        if self.dtype in LOW:
            sums.append(torch.where(held, self.exact_target(part, local), 0.0))
        widths = [x.shape[1] for x in sums]
        reduced = torch.cat([x.double() for x in sums], -1)
        dist.all_reduce(reduced, group=self.shard.group)
        beside, target, *rest = reduced.split(widths, -1)

        scale = scale.unsqueeze(-1) if isinstance(scale, Tensor) else scale
        log_sum = (beside[:, :1] + (beside[:, 1:] - 1)).log1p()
        logprob = (target - row_max.unsqueeze(-1)) / scale - log_sum
        logprob = logprob.masked_fill(index == WRONG, torch.nan).masked_fill(index == IGNORED, 0.0)
        used = (index != IGNORED).any(-1)
        entropy = mine.entropy
        if with_entropy:
            entropy = torch.where(used, (log_sum - rest.pop(0) / log_sum.exp()).squeeze(-1), 0.0)
        dtype = row_max.dtype
        rows = Rows(
            logprob.view(tokens.shape).to(dtype),
            entropy.to(dtype),
            torch.where(used, row_max, 0.0),
            torch.where(used, log_sum.squeeze(-1), 0.0).to(dtype),
        )
        if not rest:
            return rows
        return rows._replace(logprob=self.with_target(part, tokens, rows, rest[0].to(dtype)))

    def refined(self, part: slice, tokens: Tensor, rows: Rows) -> Tensor:
        return rows.logprob

    def write_gradient(
        self,
        part: slice,
        z: Tensor,
        tokens: Tensor,
        rows: Rows,
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> None:
        """A target that another rank holds goes to the kernel as row 0, which is put right here."""
        temperature, value, _ = self.scaling(part)
        local, owned = self._local(tokens)
        first = z[:, 0].to(rows.row_max.dtype, copy=True)
        saved = (local, temperature, value, IGNORED, rows.entropy, rows.row_max, rows.log_sum)
        self.ops.token_logprob_bwd_(grad_logprob, grad_entropy, z, *saved)
        if grad_logprob is None:
            return  # no target is anything special
        own = torch.where(owned & (local == 0), grad_logprob, 0.0)
        others = torch.where(local >= 0, grad_logprob, 0.0) - own
        elsewhere = (local == 0) & ~owned
        if tokens.dim() == 2:
            own, others, elsewhere = own.sum(-1), others.sum(-1), elsewhere.any(-1)
        scale = value if temperature is None else temperature
        log_p = (first - rows.row_max) / scale - rows.log_sum
        g = -own * torch.expm1(log_p) - others * log_p.exp()
        if grad_entropy is not None:
            energy = log_p.clamp(min=-1000) + rows.entropy  # p = 0: the term is 0, not 0 * inf
            g = g - grad_entropy * log_p.exp() * energy
        g = torch.where(first == -torch.inf, 0.0, g / scale).to(z.dtype)
        z[:, 0] = torch.where(elsewhere, g, z[:, 0])

    def hidden_gradient(self, written: Tensor) -> Tensor:
        dist.all_reduce(written, group=self.shard.group)
        return written.to(self.returned)
