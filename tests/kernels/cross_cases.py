"""Cases of cross-attention: what a call looks like, drawn at random or listed."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2_kernels.ops import cross_attention


@dataclass(frozen=True)
class CrossCase:
    """One call of `cross_attention`.

    Attributes:
        index: the image of each sample, or None where sample s looks at image s.
        samples, images, tokens, num_queries, heads, head_dim, dtype, dropout, scale: as they say.
        visible: "every" token, some "lengths" or a random "mask".
        memory: "packed" keys and values of one projection, "plain" tensors, or an "offset" into larger ones.
        device: where it runs.
    """

    index: tuple[int, ...] | None = None
    samples: int = 2
    images: int = 2
    tokens: int = 33
    num_queries: int = 32
    heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    scale: float | None = None
    visible: str = "every"
    memory: str = "packed"
    device: str = "cpu"

    def tensors(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in this case's dtype and memory."""
        shape = (self.images, self.tokens, 2, self.heads, self.head_dim)
        fused = torch.randn(shape, generator=generator).to(self.dtype)
        q = torch.randn(self.samples, self.num_queries, self.heads, self.head_dim, generator=generator).to(
            self.dtype
        )
        if self.memory == "offset":
            fused = torch.cat([torch.zeros_like(fused[:1]), fused])[1:]
            q = torch.cat([torch.zeros_like(q), q], 2)[:, :, self.heads :]
        k, v = fused.unbind(2)
        if self.memory == "plain":
            k, v = k.contiguous(), v.contiguous()
        return q.to(self.device), k.to(self.device), v.to(self.device)

    def options(self) -> dict:
        """What goes with q, k and v."""
        generator = torch.Generator().manual_seed(3)
        options = {"dropout": self.dropout, "layer": 5, "scale": self.scale}
        if self.index is not None:
            options["image_index"] = torch.tensor(self.index, dtype=torch.int32)
        if self.dropout:
            options["dropout_key"] = torch.tensor(8_413_662_914_573_002_811)
        if self.visible == "lengths":
            lengths = torch.randint(0, self.tokens + 1, (self.images,), generator=generator)
            options["image_lengths"] = lengths.int()
        if self.visible == "mask":
            options["image_mask"] = torch.rand(self.images, self.tokens, generator=generator) < 0.6
        return {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in options.items()}


def output(case: CrossCase, tensors: tuple[Tensor, ...], backend: str, **changed) -> Tensor:
    """The output alone; `changed` replaces options."""
    return cross_attention(*tensors, backend=backend, **(case.options() | changed))


def run(case: CrossCase, tensors: tuple[Tensor, ...], backend: str, dtype=None, **changed) -> list[Tensor]:
    """Output and gradients; `dtype` computes in another one, `changed` replaces options."""
    leaves = [t.detach().to(dtype or case.dtype).requires_grad_() for t in tensors]
    out = output(case, tuple(leaves), backend, **changed)
    weight = torch.randn(
        *out.shape[::-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).permute(3, 2, 1, 0)
    # Rounded once, so that every dtype is asked for the same gradient.
    weight = weight.to(case.device, case.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def draw_case(rng: random.Random) -> CrossCase:
    """A random call."""
    images = rng.choice([1, 2, 3, 5])
    shared = rng.random() < 0.7
    samples = rng.randint(1, 9) if shared else images
    return CrossCase(
        index=tuple(rng.randrange(images) for _ in range(samples)) if shared else None,
        samples=samples,
        images=images,
        tokens=rng.choice([1, 7, 15, 31, 33, 64, 130, 257, 520]),
        num_queries=rng.choice([1, 5, 8, 16, 32, 33, 70]),
        heads=rng.randint(1, 2),
        head_dim=rng.choice([1, 8, 16, 24, 32, 64, 80, 128]),
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        dropout=rng.choice([0.0, 0.0, 0.1, 0.5]),
        scale=rng.choice([None, 0.3]),
        visible=rng.choice(["every", "lengths", "mask"]),
        memory=rng.choice(["packed", "plain", "offset"]),
    )
