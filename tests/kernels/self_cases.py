"""Cases of masked self-attention: what a call looks like, drawn at random or listed."""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import self_attention

U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
MODES = ((), (U,), (B,), (C,), (U, C))


@dataclass(frozen=True)
class SelfCase:
    """One call of `self_attention`.

    Attributes:
        modes: a mode a text segment.
        num_queries: Q.
        lengths: real tokens of each sample, a tuple a segment.
        width: columns of the padded texts.
        padded: keep the padding rows.
        select: the query side keeps "all" rows, or of each text the "first" or "last" or "none".
        queries_attend: the query side keeps the queries.
        memory: "packed" views of one projection, "plain" tensors, or an "offset" into larger ones.
        device: where it runs.
    """

    modes: tuple[MaskMode, ...] = (B,)
    num_queries: int = 32
    lengths: tuple[tuple[int, ...], ...] = ((7, 31),)
    width: int = 32
    padded: bool = False
    select: str = "all"
    queries_attend: bool = True
    heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    memory: str = "packed"
    scale: float | None = None
    device: str = "cpu"

    @property
    def samples(self) -> int:
        return len(self.lengths[0]) if self.lengths else 2

    def layouts(self) -> tuple[TokenLayout, TokenLayout, Tensor]:
        """Query side, key side, and the numbers of the former's rows among the latter's."""
        place = torch.arange(self.width)
        masks = [place < torch.tensor(counts)[:, None] for counts in self.lengths]
        kv = TokenLayout.from_attention_masks(
            self.num_queries, masks, samples=self.samples, padded=self.padded, device=self.device
        )
        if self.select == "all" and self.queries_attend:
            return kv, kv, torch.arange(kv.rows, device=self.device)
        q, rows = kv.select(queries=self.queries_attend, texts=[self.select] * len(masks))
        return q, kv, rows

    def tensors(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in this case's dtype and memory."""
        q_layout, kv_layout, rows = self.layouts()
        fused = torch.randn(kv_layout.rows, 3, self.heads, self.head_dim, generator=generator)
        fused = fused.to(self.device, self.dtype)
        if self.memory == "offset":
            fused = torch.cat([fused.new_zeros(1, *fused.shape[1:]), fused])[1:]
        q, k, v = fused.unbind(1)
        if self.memory == "plain":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return (q if q_layout is kv_layout else q[rows]), k, v


def output(case: SelfCase, tensors: tuple[Tensor, ...], backend: str) -> Tensor:
    """The output alone."""
    q_layout, kv_layout, _ = case.layouts()
    key = torch.tensor(-8_413_662_914_573_002_811, device=case.device) if case.dropout else None
    return self_attention(
        *tensors,
        q_layout,
        kv_layout,
        AttentionMask(case.modes),
        dropout=case.dropout,
        dropout_key=key,
        layer=7,
        scale=case.scale,
        backend=backend,
    )


def run(case: SelfCase, tensors: tuple[Tensor, ...], backend: str, dtype=None) -> list[Tensor]:
    """Output and gradients; `dtype` computes in another one."""
    leaves = [t.detach().to(dtype or case.dtype).requires_grad_() for t in tensors]
    out = output(case, tuple(leaves), backend)
    weight = torch.randn(
        *out.shape[::-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).permute(2, 1, 0)
    # Rounded once, so that every dtype is asked for the same gradient.
    weight = weight.to(case.device, case.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def draw_case(rng: random.Random) -> SelfCase:
    """A random call."""
    modes = rng.choice(MODES)
    samples = rng.randint(1, 3)
    longest = rng.choice([1, 7, 31, 32, 33, 40, 64, 100, 130])
    lengths = tuple(
        tuple(rng.choice([0, 1, longest, rng.randint(0, longest)]) for _ in range(samples)) for _ in modes
    )
    select = rng.choice(["all", "all", "all", "first", "last", "none"])
    if any(count == 0 for counts in lengths for count in counts) and select in ("first", "last"):
        select = "none"
    dropout = rng.choice([0.0, 0.0, 0.1, 0.5])
    return SelfCase(
        modes=modes,
        num_queries=rng.choice([0, 1, 5, 8, 32, 33, 64]),
        lengths=lengths,
        width=longest + rng.randint(0, 3),
        padded=rng.random() < 0.4,
        select=select,
        queries_attend=rng.random() < 0.8,
        heads=rng.randint(1, 3),
        head_dim=rng.choice([1, 8, 16, 24, 32, 64, 80, 128]),
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        dropout=dropout,
        memory=rng.choice(["packed", "plain", "offset"]),
        scale=rng.choice([None, 0.3]),
    )


__all__ = ["MODES", "B", "C", "SelfCase", "U", "draw_case", "output", "replace", "run"]
