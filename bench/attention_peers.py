"""What others have for an attention: scores and softmax in eager PyTorch, `scaled_dot_product_attention` by
backend, FlexAttention compiled, FlashAttention 2 to 4 and xformers.

Two forms of input. Dense: q, k, v [batch, heads, length, head dim], and who sees whom as a mask. Packed:
rows [total, heads, head dim] and how many belong to each sequence, in one or several parts, each with a mask
that such a kernel has: none, or causal from the last row and key backwards.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from cases import Setting, Way
from measure import said
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
EAGER, FLEX = "eager", "flex, compiled"
PACKED = {
    "flash-attention 2": "flash_attn",
    "flash-attention 3": "flash_attn_interface",
    "flash-attention 4": "flash_attn.cute",
    "xformers": "xformers",
}
PEERS = (EAGER, *SDPA, FLEX, *PACKED)


def missing(module: str) -> str | None:
    """Why a module cannot be imported, None where it can be found."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    except Exception as error:  # the package around it, which finding it imports
        return f"{module} cannot be used: {said(error)}"
    return None if found else f"{module} is not installed"


# ---------------------------------------------------------------------------------------------------- dense


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, seen)


class Flex:
    """FlexAttention, compiled for the shapes it meets; the blocks it may leave out are found beforehand."""

    def __init__(self) -> None:
        self.attend: Callable[..., Tensor] | None = None
        self.blocks: dict[int, object] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        if self.attend is None:  # not before: importing the compiler takes seconds
            from torch.nn.attention.flex_attention import flex_attention

            self.attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        if seen is None:
            return self.attend(q, k, v)
        if id(seen) not in self.blocks:
            from torch.nn.attention.flex_attention import create_block_mask

            def sees(sample, head, row, key):
                return seen[sample, 0, row, key]

            lengths = q.shape[2], k.shape[2]
            self.blocks[id(seen)] = create_block_mask(sees, len(seen), None, *lengths, device=str(q.device))
        return self.attend(q, k, v, block_mask=self.blocks[id(seen)])


def dense_peers(
    setting: Setting, masked: bool, not_flex: str | None, make: Callable[[Attend], Way]
) -> dict[str, Way | str]:
    """A way, or a reason against it, for every peer that takes dense inputs.

    Args:
        masked: there is a mask.
        not_flex: a reason against FlexAttention.
        make: makes a way of a function of q, k, v and the mask.
    """
    ways: dict[str, Way | str] = {EAGER: make(eager)}
    for name, backend in SDPA.items():
        # The flash backend is what a CPU takes by itself: asking for it costs 20 us a call.
        usual = setting.device == "cpu" and backend == SDPBackend.FLASH_ATTENTION
        ways[name] = make(sdpa if usual else partial(sdpa_by, backend))
        if setting.device == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            ways[name] = "a CPU has no such backend"
        elif setting.device == "cuda" and backend == SDPBackend.FLASH_ATTENTION and masked:
            ways[name] = "it takes no mask on a GPU"
    ways[FLEX] = not_flex or setting.without_compiler() or replace(make(Flex()), counted=False)
    return ways


def against_flex(setting: Setting, backward: bool, usual: bool) -> str | None:
    """Each shape costs a run of the compiler, so on a CPU, and without `--full`, it is for the usual ones."""
    if setting.device == "cpu" and backward:
        return "it has no backward on a CPU"
    if usual or (setting.device == "cuda" and setting.full):
        return None
    return "compiled for 4 or 64 samples, or 2 or 64 images of 257 tokens, alone"


# --------------------------------------------------------------------------------------------------- packed


@dataclass(frozen=True)
class Part:
    """A call on packed rows.

    Attributes:
        rows, keys: of each sequence, how many attend and how many they attend to.
        causal: the last row sees every key, each before it one less.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool = False


Varlen = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(module: str, part: Part, device: str) -> Varlen:
    """`flash_attn_varlen_func` of FlashAttention 2, 3 or 4."""
    function = importlib.import_module(module).flash_attn_varlen_func
    offsets = [
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        for counts in (part.rows, part.keys)
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=offsets[0],
            cu_seqlens_k=offsets[1],
            max_seqlen_q=max(part.rows),
            max_seqlen_k=max(part.keys),
            causal=part.causal,
        )
        return out[0] if isinstance(out, tuple) else out

    return attend


def xformers(module: str, part: Part, device: str) -> Varlen:
    ops = importlib.import_module("xformers.ops")
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(part.rows, part.keys, device=device)
    if part.causal:
        bias = bias.make_causal_from_bottomright()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]

    return attend


def packed_peers(
    setting: Setting,
    parts: Sequence[Part],
    prepare: Callable[..., Sequence[Tensor]],
    read: Callable[..., Tensor],
) -> dict[str, Way | str]:
    """A way, or a reason against it, for every peer that takes packed rows.

    Args:
        parts: the calls.
        prepare: makes q, k and v of each part, one part behind the other.
        read: makes the operator's result of the parts' outputs.
    """
    ways: dict[str, Way | str] = {}
    for name, module in PACKED.items():
        reason = missing(module) or ("it needs a GPU" if setting.device == "cpu" else None)
        if reason:
            ways[name] = reason
            continue
        try:
            make = xformers if module == "xformers" else flash
            ways[name] = Way(in_parts([make(module, part, setting.device) for part in parts]), prepare, read)
        except Exception as error:  # installed, and cannot be loaded here
            ways[name] = f"{module} cannot be used: {said(error)}"
    return ways


def in_parts(calls: Sequence[Varlen]) -> Callable[..., list[Tensor]]:
    """All parts' outputs of all parts' q, k and v."""

    def compute(*tensors: Tensor) -> list[Tensor]:
        return [call(*tensors[3 * i : 3 * i + 3]) for i, call in enumerate(calls)]

    return compute
