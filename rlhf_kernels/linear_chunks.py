"""What linear_logprob and linear_token_loss share: the head, chunks of tokens, the row kernels.

The logits exist for one chunk of tokens at a time, in a buffer that every chunk uses again. They
are in the dtype of the inputs, as the matrix product makes them; where that is 16 bits the target's
logit and its share of the row's sum are computed again in float32. A float32 target beside a sum of
rounded logits would be worse than both rounded: for a likely token the two errors cancel.

CPUs without products of 16 bits get them in float32, a block of the weight at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rlhf_kernels import backend as _backend
from rlhf_kernels import checks
from rlhf_kernels.full_weight import full_weight
from rlhf_kernels.token_logprob import check_range, check_targets

# Bytes that may be used beside the inputs, the outputs and the returned gradients.
BUDGET = {"cpu": 128 << 20, "cuda": 1280 << 20}
LEAST_TOKENS = 128  # of a chunk: with fewer a matrix product starves
TILE = 128  # tokens that a matrix product takes at once: chunks are multiples, where there is room
LOW = (torch.bfloat16, torch.float16)
NOTHING_IGNORED = torch.iinfo(torch.int64).min  # an ignore_index for which nobody looks
LARGEST_CHANGE = 0.5  # of a logit, over the temperature, by what 16 bits have rounded off
ADDED_ROWS = 4096  # of a product of 16 bits that are added to dW at a time, on the CPU
BLOCK_ROWS = 1024  # of the weight that a CPU multiplies at a time: in float32 they fit its caches
_accumulation = checks.accumulation_dtype


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``check`` has cast what autocast wants cast; sums in float32 are to stay in float32."""

    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return plain


class Head(NamedTuple):
    """logits = hidden weight^T + bias, times logit_scale, softcap, over the temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: Tensor | None  # (N,)
    temperature_value: float
    logit_scale: float
    softcap: float  # 0: none
    ignore_index: int


class Rows(NamedTuple):
    """What the row kernels return for a chunk: the statistics stay apart for the backward."""

    logprob: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


def check(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor, Head]:
    """Check the arguments but ``check_tokens``; hidden (N, H), tokens (N,) or (N, K), the head."""
    checks.floating("hidden", hidden)
    if hasattr(hidden, "full_tensor"):
        raise TypeError(
            "hidden: expected a plain tensor, got a DTensor; pass hidden.to_local() or "
            "hidden.full_tensor()"
        )
    weight, bias = full_weight(weight), None if bias is None else full_weight(bias)
    checks.floating("weight", weight, hidden.device)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1] if hidden.dim() else 'H'}) to match "
            f"hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if weight.shape[1] < 1:
        raise ValueError(f"weight: expected shape (V, H) with H >= 1, got {tuple(weight.shape)}")
    wide = hidden.dtype == torch.float64  # which autocast leaves alone
    if torch.is_autocast_enabled(hidden.device.type) and not wide:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected {hidden.dtype} to match hidden, got {weight.dtype}")
    if bias is not None:
        checks.floating("bias", bias, hidden.device)
        checks.shape("bias", bias, weight.shape[:1], "to match weight")
        if bias.dtype != hidden.dtype:
            raise TypeError(f"bias: expected {hidden.dtype} to match hidden, got {bias.dtype}")
    checks.number("logit_scale", logit_scale, 0.0, open_low=True)
    if softcap is not None:
        checks.number("softcap", softcap, 0.0, open_low=True)
    if chunk_tokens is not None:
        checks.number("chunk_tokens", chunk_tokens, 1)
    many = tokens.dim() == hidden.dim() if isinstance(tokens, Tensor) else False
    temperature_tensor, temperature_value = check_targets(
        "hidden", hidden, tokens, temperature, ignore_index
    )
    head = Head(
        weight,
        bias,
        None if temperature_tensor is None else temperature_tensor.reshape(-1),
        temperature_value,
        float(logit_scale),
        0.0 if softcap is None else float(softcap),
        ignore_index,
    )
    factor = (head.softcap or head.logit_scale) if temperature_tensor is None else 1.0
    if not 1e-30 < temperature_value / factor < 1e30:
        name = "softcap" if head.softcap else "logit_scale"
        raise ValueError(
            f"temperature: expected temperature / {name} between 1e-30 and 1e30, got "
            f"{temperature_value} / {factor}"
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows, tokens.reshape(-1, tokens.shape[-1]) if many else tokens.reshape(-1), head


def check_tokens(tokens: Tensor, ignore_index: int, vocab: int) -> None:
    """On the CPU: tokens are in range. The kernels see chunks: here the place is the caller's."""
    if not torch.compiler.is_compiling() and not isinstance(tokens, FakeTensor):
        check_range(tokens, tokens != ignore_index, vocab)


def logits_reference(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """The specification: all logits, but for the temperature; of zeros where nothing is scored."""
    used = tokens != head.ignore_index
    used = used.any(-1, keepdim=True) if used.dim() == 2 else used.unsqueeze(-1)
    hidden = torch.where(used, hidden, 0.0)  # select: a NaN there reaches no product, dW is one
    z = torch.nn.functional.linear(hidden, head.weight, head.bias)  # 2 N V H
    z = z.to(_accumulation(hidden)) * head.logit_scale
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def products_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of ``x`` are computed in: float32 for 16 bits on CPUs without them.

    There torch's own are loops: with AVX2 alone the three products of a step took 0.75 s in float32
    and 54 s in bfloat16 (benchmarks/results/cpu_avx2_linear.json).
    """
    low = x.dtype in LOW and x.device.type == "cpu"
    return torch.float32 if low and not _cpu_multiplies(x.dtype) else x.dtype


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    return bool(torch.backends.mkldnn.enabled) and _mkldnn_multiplies(dtype)


@functools.cache
def _mkldnn_multiplies(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


@functools.cache
def _cpu_takes_blocks() -> bool:
    """Whether logits in float32 are made a block of the weight at a time, which MKL is faster at
    without AVX-512: linear_logprob at 1024 x 256 x 128256 took 625 ms, not 703
    (benchmarks/results/cpu_avx2_linear.json).
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def blocks(count: int) -> Iterator[slice]:
    """Of the rows of a weight."""
    for begin in range(0, count, BLOCK_ROWS):
        yield slice(begin, min(begin + BLOCK_ROWS, count))


def tokens_of_chunk(
    hidden: Tensor,
    head: Head,
    asked: int | None,
    vocab: int | None = None,
    taken: bool = False,
) -> int:
    """Tokens of a chunk: as many as the budget has room for, in chunks of about equal size.

    The same with and without gradients, as the last bits of a matrix product depend on how many
    rows it has: log-probs of before the first optimiser step are to have those of the step itself.
    So there is always room for dW, which takes float32 where there are several chunks of 16 bits
    and is part of the budget on the CPU.

    Args:
        hidden: (N, H).
        head: the head of these tokens.
        asked: the caller's number, or None.
        vocab: rows of the weight to plan for; None: of this one.
        taken: hidden is a copy of the scored ones, and so is its gradient.
    """
    n, width = max(hidden.shape[0], 1), hidden.shape[1]
    vocab = head.weight.shape[0] if vocab is None else vocab
    if asked is not None:
        return min(asked, n)
    budget = BUDGET.get(hidden.device.type, BUDGET["cuda"])
    made = products_dtype(hidden).itemsize
    low, widened = made == 2, made > hidden.element_size()
    size = made + (_accumulation(hidden).itemsize if head.softcap else 0)
    row = vocab * size + 64 + width * made  # vectors; hidden times coefficients
    copies = 2 * n * width * hidden.element_size() if taken else 0
    if low:
        row += width * 6  # the targets' rows of the weight, then in float32
    if widened:
        row += width * 2 * made  # hidden, and the sum of its gradient
        copies += 2 * min(vocab, BLOCK_ROWS) * width * made  # of the weight, of its gradient
    if n * row + copies <= budget:
        return n
    if low and not hidden.is_cuda:  # products of 16 bits, added in float32
        row += min(vocab, ADDED_ROWS) * 4
        copies += (vocab + ADDED_ROWS) * width * 4
    if widened:
        copies += vocab * width * made
    most = max((budget - copies) // row, LEAST_TOKENS)
    even = -(-n // -(-n // most))
    whole = -(-even // TILE) * TILE
    return whole if whole <= most else even


def used_tokens(tokens: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the positions that are scored; None: all, or not worth looking.

    To look waits for the device, so in a CUDA graph everything goes through the matrix product, and
    so it does where ``ignore_index`` is NOTHING_IGNORED.
    """
    if ignore_index == NOTHING_IGNORED:
        return None
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    used = tokens != ignore_index
    used = used.any(-1) if used.dim() == 2 else used
    return None if bool(used.all()) else used.nonzero().squeeze(-1)


@overload
def take(x: Tensor, index: Tensor | None) -> Tensor: ...
@overload
def take(x: None, index: Tensor | None) -> None: ...
@overload
def take(x: Tensor | None, index: Tensor | None) -> Tensor | None: ...
def take(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    return x if x is None or index is None else x.index_select(0, index)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size``; one without tokens where there are none."""
    for begin in range(0, max(count, 1), max(size, 1)):
        yield slice(begin, min(begin + size, count))


class Sweep:
    """Makes the logits of a chunk and their gradient; holds the buffer and the accumulated dW.

    Args:
        hidden: (N, H).
        head: with temperatures of these N tokens.
        backend: of the row kernels.
        size: tokens of a chunk.
        dtypes: of the gradients of hidden and of weight and bias; None: of the tensors themselves.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        backend: str,
        size: int,
        dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    ):
        self.hidden, self.head = hidden, head
        self.hidden_dtype, self.weight_dtype = dtypes or (hidden.dtype, head.weight.dtype)
        self.ops = _backend.operators[backend]
        self.dtype = products_dtype(hidden)
        self.buffer = hidden.new_empty(size, head.weight.shape[0], dtype=self.dtype)
        self.blocked = self.dtype != hidden.dtype or (
            self.dtype == torch.float32 and hidden.device.type == "cpu" and _cpu_takes_blocks()
        )
        self.block: Tensor | None = None  # of the weight, in float32
        self.capped: Tensor | None = None  # tanh of the logits, in float32
        if head.softcap:
            self.capped = torch.empty_like(self.buffer, dtype=_accumulation(hidden))
        self.one_chunk = size >= hidden.shape[0]
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def logits(self, part: slice) -> Tensor:
        """The logits of a chunk (softcap: their tanh), to be read with ``scaling``."""
        h, head = self.hidden[part], self.head
        z = self.buffer[: h.shape[0]]
        if self.blocked:
            self._logits_of_blocks(h.to(self.dtype), z)
        elif head.bias is None:
            torch.mm(h, head.weight.t(), out=z)
        else:
            torch.addmm(head.bias, h, head.weight.t(), out=z)
        if self.capped is None:
            return z
        return self.capped[: h.shape[0]].copy_(z).mul_(head.logit_scale / head.softcap).tanh_()

    def _logits_of_blocks(self, h: Tensor, z: Tensor) -> None:
        bias = self.head.bias
        for rows in blocks(z.shape[1]):
            w = self.widened(rows).t()
            if bias is None:
                torch.mm(h, w, out=z[:, rows])
            else:
                torch.addmm(bias[rows].to(h.dtype), h, w, out=z[:, rows])

    def widened(self, rows: slice) -> Tensor:
        """Rows of the weight in float32, until the next call."""
        some = self.head.weight[rows]
        if some.dtype == _accumulation(some):
            return some
        if self.block is None:
            self.block = torch.empty_like(some, dtype=_accumulation(some))
        return self.block[: some.shape[0]].copy_(some)

    def scaling(self, part: slice) -> tuple[Tensor | None, float, int]:
        """(temperature, temperature_value, ignore_index) that make of ``logits`` the logits."""
        head = self.head
        factor = 1 / (head.softcap or head.logit_scale)
        temperature = None if head.temperature is None else head.temperature[part] * factor
        return temperature, head.temperature_value * factor, head.ignore_index

    def rows(self, part: slice, z: Tensor, tokens: Tensor, with_entropy: bool) -> Rows:
        return Rows(*self.ops.token_logprob_fwd(z, tokens, *self.scaling(part), with_entropy))

    def rows_and_gradient(self, part: slice, z: Tensor, tokens: Tensor) -> Rows:
        """The same, and onehot - p, over the temperature, in place of the logits."""
        constants = (None, None, None, 0.0, torch.inf, torch.inf, False)
        args = (z, tokens, *self.scaling(part), *constants)
        return Rows(*self.ops.token_logprob_and_grad_(*args))

    def refined(self, part: slice, tokens: Tensor, rows: Rows) -> Tensor:
        """logprob with the target's logit, here and in the sum, in float32; for logits of 16 bits.

        1 - p of what was read is the share of the other tokens in the sum.
        """
        if self.dtype not in LOW:
            return rows.logprob
        return self.with_target(part, tokens, rows, self.exact_target(part, tokens))

    def exact_target(self, part: slice, tokens: Tensor) -> Tensor:
        """The target's logit (softcap: its tanh) in float32, (n, K)."""
        head, h = self.head, self.hidden[part]
        many = tokens.dim() == 2
        index = (tokens if many else tokens.unsqueeze(-1)).clamp(0, head.weight.shape[0] - 1)
        exact = torch.empty(index.shape, dtype=torch.float32, device=h.device)
        for k in range(index.shape[1]):
            w = head.weight.index_select(0, index[:, k]).float()
            exact[:, k] = w.mul_(h).sum(-1)
        if head.bias is not None:
            exact += head.bias.float()[index]
        return torch.tanh(exact * (head.logit_scale / head.softcap)) if head.softcap else exact

    def with_target(self, part: slice, tokens: Tensor, rows: Rows, exact: Tensor) -> Tensor:
        """logprob with ``exact`` (n, K) as the target's logit, also in the sum.

        log p = -log1p(others / e^x), with others = (1 - p) e^log_sum: near p = 1 it keeps its
        digits.
        """
        many = tokens.dim() == 2
        temperature, value, ignore_index = self.scaling(part)
        scale = value if temperature is None else temperature.unsqueeze(-1)
        row_max, log_sum = rows.row_max.unsqueeze(-1), rows.log_sum.unsqueeze(-1)
        logprob = rows.logprob if many else rows.logprob.unsqueeze(-1)
        x, rounded = (exact - row_max) / scale, logprob + log_sum
        others = log_sum + (-torch.expm1(logprob)).log()
        fine = -torch.nn.functional.softplus(others - x)
        scored = (tokens if many else tokens.unsqueeze(-1)) != ignore_index
        # Rounding keeps an order that a target alone would leave: where the difference decides, as
        # at a very low temperature, both stay rounded.
        small = (x - rounded).abs() <= LARGEST_CHANGE
        kept = scored & small & fine.isfinite() & logprob.isfinite()
        return torch.where(kept, fine, logprob).view_as(rows.logprob)

    def gradient(
        self,
        part: slice,
        z: Tensor,
        tokens: Tensor,
        rows: Rows,
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """d loss / d (hidden weight^T + bias), in place of the logits."""
        head = self.head
        self.write_gradient(part, z, tokens, rows, grad_logprob, grad_entropy)
        if self.capped is None:
            return z
        factor = head.logit_scale / head.softcap
        logits = self.buffer[: z.shape[0]]
        for few, g in zip(logits.split(16), z.split(16), strict=True):  # tanh is made again
            slope = few.to(g.dtype).mul_(factor).tanh_().square_().neg_().add_(1).mul_(factor)
            few.copy_(g.mul_(slope))
        return logits

    def write_gradient(
        self,
        part: slice,
        z: Tensor,
        tokens: Tensor,
        rows: Rows,
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> None:
        """The gradient of what ``logits`` made, in its place."""
        saved = (tokens, *self.scaling(part), rows.entropy, rows.row_max, rows.log_sum)
        self.ops.token_logprob_bwd_(grad_logprob, grad_entropy, z, *saved)

    def new_gradient(self) -> Tensor:
        """What ``add_products`` writes dH into."""
        return torch.empty_like(self.hidden, dtype=self.hidden_dtype)

    def times_weight(self, g: Tensor, out: Tensor) -> None:
        weight = self.head.weight
        if weight.dtype == g.dtype == out.dtype:
            torch.mm(g, weight, out=out)
            return
        if g.is_cuda:
            torch.ops.aten.mm.dtype_out(g, weight, out.dtype, out=out)
            return
        # CPUs have no product of 16 bits into float32.
        wide = _accumulation(g)
        total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
        total.zero_()
        for rows in blocks(weight.shape[0]):
            total.addmm_(g[:, rows].to(wide), self.widened(rows))
        if total is not out:
            out.copy_(total)

    def hidden_gradient(self, written: Tensor) -> Tensor:
        """dH, when all chunks are written."""
        return written

    def add_products(
        self,
        part: slice,
        g: Tensor,
        coefficient: Tensor | None,
        into: Tensor | None,
        weight: bool,
        bias: bool,
        unit: float = 1.0,
    ) -> None:
        """dH = c g W into ``into``, and where wanted dW += g^T (c H) and d bias += g^T c.

        Scaling the rows of the thin factors is scaling the rows of g. All times ``unit``, in the
        dtype of the gradients: what is in g and c then stays in the range of theirs.
        """
        h, c = self.hidden[part].to(self.dtype), coefficient
        if into is not None:
            self.times_weight(g, into[part])
            if c is not None:
                into[part].mul_(c.unsqueeze(-1))
            if unit != 1:
                into[part].mul_(unit)
        if weight:
            scaled = h if c is None else (h * c.unsqueeze(-1)).to(h.dtype)
            self.grad_weight = self._added(self.grad_weight, g, scaled, unit)
        if bias:
            ones = h.new_ones(h.shape[0], 1) if c is None else c.unsqueeze(-1).to(h.dtype)
            self.grad_bias = self._added(self.grad_bias, g, ones, unit)

    def _added(self, total: Tensor | None, g: Tensor, h: Tensor, unit: float) -> Tensor:
        """total + unit g^T h; the total in float32 with several chunks, or where asked for."""
        dtype = _accumulation(g)
        if self.one_chunk and self.weight_dtype == g.dtype and unit == 1:
            return g.t() @ h
        if self.one_chunk and self.weight_dtype in LOW and self.blocked and unit == 1:
            total = h.new_empty(g.shape[1], h.shape[1], dtype=self.weight_dtype)
            for some in blocks(g.shape[1]):
                total[some] = g[:, some].t() @ h
            return total
        if total is None:
            total = torch.zeros(g.shape[1], h.shape[1], dtype=dtype, device=g.device)
        if g.dtype == dtype:
            return total.addmm_(g.t(), h, alpha=unit)
        if g.is_cuda:
            return torch.ops.aten.addmm.dtype_out(total, g.t(), h, dtype, alpha=unit, out=total)
        # CPUs have no product of 16 bits into float32, and rounded products would add up to less.
        for begin in range(0, g.shape[1], ADDED_ROWS):
            some = slice(begin, begin + ADDED_ROWS)
            total[some].addmm_(g[:, some].t().to(dtype), h.to(dtype), alpha=unit)
        return total

    def weight_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dW and d bias."""
        dw, db = self.grad_weight, self.grad_bias
        return (
            None if dw is None else dw.to(self.weight_dtype),
            None if db is None else db.squeeze(-1).to(self.weight_dtype),
        )
