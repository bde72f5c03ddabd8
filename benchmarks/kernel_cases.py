"""Calls of every kernel at the shapes of Z-Image, for `kernels.py`; a new kernel is added here.

Each case says what it moves or computes, what gives the same result otherwise, and the goal. Bytes
are those of inputs and outputs, each once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import zquant_kernels.dequantize
import zquant_kernels.quantize
from fidelity import TRUE_SIZE, random_block
from torch import Tensor
from zquant_kernels import hadamard, runtime
from zquant_kernels.attention_int8 import attention_int8
from zquant_kernels.dequant_int8 import dequant_int8, row_scales
from zquant_kernels.fused_norm import fused_norm
from zquant_kernels.fused_qk import fused_qk
from zquant_kernels.fused_residual import Norms, fused_residual, residual
from zquant_kernels.fused_swiglu import fused_swiglu
from zquant_kernels.groupnorm_silu import groupnorm_silu
from zquant_kernels.matmul_int8 import matmul_int8
from zquant_kernels.quantize_tokens import quantize_tokens

import zquant.quant.codec
from zquant.layers.attention import attention
from zquant.layers.compute import Compute
from zquant.models.config import DiTConfig
from zquant.quant.qtypes import QTYPES

__all__ = ["BOUND_BY_MEMORY", "COPY", "GROUPS", "UNITS", "Case", "Shapes", "plainly", "small"]

EPS = 1e-5
EXACT, ROUNDED, SUMMED = 0.0, 1e-3, 1e-2  # largest |y - reference| / |reference|
COPY, CUBLAS, REFERENCES = "copy", "bf16 cuBLAS", "torch references, bf16"
UNITS = {"GiB/s": 2**30, "TOP/s": 1e12, "Gweights/s": 1e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What is computed, where: weights are `[rows, dim]`, pictures `[1, channels, side, side]`."""

    device: torch.device
    dtype: torch.dtype
    config: DiTConfig = TRUE_SIZE
    tokens: tuple[int, ...] = (1056, 4224, 9344)
    rows: int = TRUE_SIZE.hidden_dim
    channels: tuple[int, ...] = (128, 256, 512)
    side: int = 512
    copy_bytes: int = 2**30

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """N(0, 1); 40 times that in int8."""
        x = torch.randn(shape, device=self.device)
        return ((x * 40).clamp(-127, 127) if dtype == torch.int8 else x).to(dtype or self.dtype)

    def vectors(self, *lengths: int) -> list[Tensor]:
        """float32 near 1: weights of norms, modulations, scales."""
        return [1 + 0.1 * self.random(length, dtype=torch.float32) for length in lengths]

    def packed(self, qtype: str) -> Tensor:
        """uint8 `[rows, row_bytes]`, the same 64 rows again and again."""
        some = stored(self.random(64, self.config.dim, dtype=torch.float32), qtype)
        return some.repeat(-(-self.rows // 64), 1)[: self.rows]

    def outputs(self, width: int) -> Iterator[tuple[torch.dtype, int, str]]:
        """Dtype, rotation and name of what fused kernels give."""
        group = hadamard.group_of(width)
        yield self.dtype, 0, str(self.dtype).removeprefix("torch.")
        yield torch.int8, group, f"int8 rotated {group}"

    def products(self) -> Iterator[tuple[int, int, int]]:
        """M, K, N of the linears of a block."""
        k, h = self.config.dim, self.config.hidden_dim
        return ((m, *kn) for m in self.tokens for kn in ((k, k), (k, h), (h, k)))


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel.

    Attributes:
        kernel: its name.
        label: what tells the call from others.
        work: the call.
        amount: bytes moved, operations or weights.
        unit: of the rate, a key of `UNITS`.
        limit: largest relative error against the reference.
        rivals: other ways to the same result.
        goal: a rival, or the copy, and how many times its rate is hoped for.
        reset: renews what `work` overwrites.
        reference: what `work` is compared with; None is `work` without kernels.
    """

    kernel: str
    label: str
    work: Callable[[], Any]
    amount: float
    unit: str = "GiB/s"
    limit: float = ROUNDED
    rivals: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    goal: tuple[str, float] | None = None
    reset: Callable[[], Any] = lambda: None
    reference: Callable[[], Any] | None = None


def small(s: Shapes) -> Shapes:
    """The same where a reference, or an interpreter, is fast: odd numbers of tokens and rows."""
    config = replace(TRUE_SIZE, dim=768, n_heads=6)
    sizes = replace(s, config=config, tokens=(33,), rows=70, channels=(64,), side=16)
    return replace(sizes, copy_bytes=2**24)


def stored(weights: Tensor, qtype: str) -> Tensor:
    """float32 `[N, K]` as `qtype`, by the quantizers of the CPU."""
    packed = zquant.quant.codec.quantize(weights.cpu().numpy(), QTYPES[qtype])
    return torch.from_numpy(packed).to(weights.device)


def moved(*tensors: Tensor) -> int:
    """Bytes of them all."""
    return sum(t.numel() * t.element_size() for t in tensors)


def in_place(kernel: Callable[..., None], x: Tensor, *rest: Any) -> Tensor:
    """What `kernel` made of `x`."""
    kernel(x, *rest)
    return x


def weight_cases(s: Shapes) -> Iterator[Case]:
    """Expanding every storage to floats and to rotated int8, and storing."""
    k, goal = s.config.dim, (COPY, 0.85)
    group, weights = hadamard.group_of(k), s.random(s.rows, k, dtype=torch.float32)
    floats, ints = (torch.empty_like(weights, dtype=dtype) for dtype in (s.dtype, torch.int8))
    for q in zquant_kernels.dequantize.QTYPES:
        packed, label = s.packed(q), f"{q} {s.rows}x{k}"
        work = partial(zquant_kernels.dequantize.dequantize, packed, q, s.dtype, floats)
        yield Case("dequantize", label, work, moved(packed, floats), limit=EXACT, goal=goal)
        label, find = f"{label} rotated {group}", partial(row_scales, packed, q, group)
        work = partial(dequant_int8, packed, q, find(), group, ints)
        yield Case("dequant_int8", label, work, moved(packed, ints), goal=goal)
        yield Case("dequant_int8", f"{label}, scales", find, moved(packed))
    for q in zquant_kernels.quantize.QTYPES:
        wanted = partial(stored, weights, q)
        # the only kernel that has no reference to fall back to
        on_cpu = runtime.why_not(s.device)
        work = wanted if on_cpu else partial(zquant_kernels.quantize.quantize, weights, q)
        case = partial(Case, limit=EXACT, reference=wanted)
        yield case("quantize", f"{q} {s.rows}x{k}", work, weights.numel(), "Gweights/s")


def token_cases(s: Shapes) -> Iterator[Case]:
    """What is between the products of a block."""
    case = partial(Case, goal=(COPY, 0.8))
    k, wide, heads, head = s.config.dim, s.config.hidden_dim, s.config.n_heads, s.config.head_dim
    a, b, c, d, q, p = s.vectors(k, k, k, k, head, head)
    norms = Norms(h_weight=a, gate=b, weight=c, modulation=d, h_eps=EPS, eps=EPS)
    for m in s.tokens:
        x, h = s.random(m, k, dtype=torch.float32), s.random(m, k)
        gate, up = s.random(m, wide), s.random(m, wide)
        work = partial(quantize_tokens, h, group=hadamard.group_of(k))
        yield case("quantize_tokens", f"{m}x{k}", work, 1.5 * moved(h))
        for dtype, group, name in s.outputs(k):
            label, out = f"{m}x{k} to {name}", m * k * dtype.itemsize
            work = partial(fused_norm, x, a, b, EPS, dtype, group=group)
            yield case("fused_norm", label, work, moved(x) + out)
            work = partial(fused_residual, x, h, norms, dtype, group=group)
            yield case("fused_residual", label, work, moved(x, x, h) + out)
        work = partial(residual, x, h, a, b, EPS)
        yield case("fused_residual", f"{m}x{k}, last of a block", work, moved(x, x, h))
        for dtype, group, name in s.outputs(wide):
            label, out = f"{m}x{wide} to {name}", m * wide * dtype.itemsize
            work = partial(fused_swiglu, gate, up, dtype, group=group)
            yield case("fused_swiglu", label, work, moved(gate, up) + out)
        qkv, angles = s.random(m, 3, heads, head), s.random(m, head // 2, dtype=torch.float32)
        cos, sin, reset = angles.cos(), angles.sin(), partial(qkv.copy_, qkv.clone())
        work, label = partial(in_place, fused_qk, qkv, q, p, cos, sin, EPS), f"{m}x2x{heads}x{head}"
        yield case("fused_qk", label, work, 2 * moved(qkv[:, :2]) + moved(cos, sin), reset=reset)


def product_cases(s: Shapes) -> Iterator[Case]:
    """The int8 products of a block."""
    for m, k, n in s.products():
        x, w = s.random(m, k, dtype=torch.int8), s.random(n, k, dtype=torch.int8)
        scales = [0.01 * v for v in s.vectors(m, n)]
        rivals = {
            CUBLAS: partial(torch.mm, x.to(s.dtype), w.to(s.dtype).t()),
            "_int_mm": partial(torch._int_mm, x, w.t()),
        }
        work = partial(matmul_int8, x, scales[0], w, scales[1], s.dtype)
        case = partial(Case, rivals=rivals, goal=(CUBLAS, 1.4))
        yield case("matmul_int8", f"{m}x{k}x{n}", work, 2 * m * k * n, "TOP/s")
    heads, head = s.config.n_heads, s.config.head_dim
    for m in s.tokens:
        qkv = s.random(1, m, 3, heads, head).unbind(2)
        rivals = {"torch SDPA": partial(attention, *qkv)}
        case = partial(Case, limit=SUMMED, rivals=rivals)
        work, label = partial(attention_int8, *qkv), f"{m}x{heads}x{head}"
        yield case("attention_int8", label, work, 4 * m * m * heads * head, "TOP/s")


def picture_cases(s: Shapes) -> Iterator[Case]:
    """The norms of the autoencoder, whose parameters have the dtype of its pictures."""
    for c in s.channels:
        x, (weight, bias) = s.random(1, c, s.side, s.side), s.vectors(c, c)
        more = (weight.to(s.dtype), bias.to(s.dtype))
        rivals = {"torch": partial(norm_silu, x, *more)}
        work, label = partial(groupnorm_silu, x, *more, 32, EPS), f"{c}x{s.side}x{s.side}"
        yield Case("groupnorm_silu", label, work, 2 * moved(x), limit=SUMMED, rivals=rivals)


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Group norm and SiLU by torch."""
    return F.silu(F.group_norm(x, 32, weight, bias, EPS), inplace=True)


def block_cases(s: Shapes) -> Iterator[Case]:
    """A whole block, exact and int8, against plain torch with dense weights."""
    exact, k, wide = Compute(dtype=s.dtype), s.config.dim, s.config.hidden_dim
    dense = random_block(s.config, "BF16", 0).to(s.device)
    for qtype in ("Q4_K", "Q8_0"):
        block = random_block(s.config, qtype, 0).to(s.device)
        for compute in (exact, replace(exact, int8=True)):
            block.use(compute, "layers.1")
            for m in s.tokens:
                x = s.random(1, m, k, dtype=torch.float32)
                angles = s.random(m, s.config.head_dim // 2, dtype=torch.float32)
                rest = (x, (angles.cos(), angles.sin()), s.vectors(k, k, k, k))
                case = partial(Case, limit=SUMMED, goal=(REFERENCES, 1.5) if compute.int8 else None)
                rivals = {REFERENCES: partial(plainly, partial(on_copy, dense, *rest, exact))}
                amount = 2 * m * (4 * k * k + 3 * k * wide) + 4 * m * m * k
                work, label = partial(on_copy, block, *rest, compute), f"{qtype} {compute.mode} {m}"
                yield case("block", label, work, amount, "TOP/s", rivals=rivals)


def on_copy(block: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """The block's output; a block works in the memory of its input."""
    return block(x.clone(), *rest)


def plainly(work: Callable[[], Any]) -> Any:
    """The result without kernels."""
    with runtime.forbidden("compared with kernels"):
        return work()


GROUPS: dict[tuple[str, ...], Callable[[Shapes], Iterator[Case]]] = {
    ("dequantize", "dequant_int8", "quantize"): weight_cases,
    ("quantize_tokens", "fused_norm", "fused_residual", "fused_swiglu", "fused_qk"): token_cases,
    ("matmul_int8", "attention_int8"): product_cases,
    ("groupnorm_silu",): picture_cases,
    ("block",): block_cases,
}
BOUND_BY_MEMORY = (weight_cases, token_cases, picture_cases)
