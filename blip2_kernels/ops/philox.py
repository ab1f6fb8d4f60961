"""Dropout masks by Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The contract, which every kernel follows to the bit:

- The key is an int64 tensor drawn once a step; its low and high 32 bits are Philox's two key words.
- The counter names the element, not where it happens to be computed:
    - a hidden element:         (row key, channel >> 3, 0, layer * 8 + site), lane = channel & 7
    - an attention probability: (row key of the query, name >> 3, head, layer * 8 + site), lane = name & 7,
      where name is the row key of the attended row or the ordinal of the image token.
- A call gives four words, which serve eight neighbouring elements: lane l takes the low (l even) or high (l
  odd) half of word l >> 1.
- An element is kept if its 16 bits are >= round(p * 65536), and is then scaled by the inverse of the exact
  probability of being kept.

So any tiling, packing or number of passes draws the same mask. This file is the reference, for every device;
on a CPU it works in chunks that stay in the cache.
"""

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import (
    FLOATING,
    check_device,
    check_int,
    check_probability,
    check_tensor,
    describe,
    values_are_free,
)

LANES = 8
LEVELS = 1 << 16
CHUNK = 1 << 15
"""Counters a chunk: its six int64 work arrays stay in a core's second-level cache."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Site(enum.IntEnum):
    """Where in a layer a dropout stands."""

    SELF_ATTENTION = 0
    SELF_OUTPUT = 1
    CROSS_ATTENTION = 2
    CROSS_OUTPUT = 3
    FEED_FORWARD = 4
    EMBEDDINGS = 5


def place(layer: int, site: Site) -> int:
    """The word of the counter that says where in the model an element is dropped."""
    return layer * LANES + int(site)


def draw_key(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Draw the Philox key of a step: int64 [], from `generator` or torch's default one for the device.

    Raises:
        TypeError: `device` is none, or `generator` is none.
        ValueError: a device that is not here, or a generator of another one.
    """
    if device is not None:
        device = check_device("device", device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {describe(generator)}")
        home = torch.empty(0, device=device).device
        if generator.device.type != home.type:
            raise ValueError(f"generator: expected one of {home}, got one of {generator.device}")
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device, generator=generator)


def threshold(p: float) -> int:
    """16-bit level below which an element is dropped; the exact drop probability is this / 65536."""
    return min(round(check_probability("p", p) * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """Factor of a kept element: one over the exact probability of being kept."""
    return LEVELS / (LEVELS - threshold(p))


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Ten Philox rounds on int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors of one shape, values in [0, 2**32).
        key: int64 [] tensor.

    Returns:
        Four int64 tensors of that shape, values in [0, 2**32).

    Raises:
        TypeError, ValueError: no four words, or words or a key of another dtype or shape.
    """
    if not isinstance(counter, tuple | list) or len(counter) != 4:
        got = f"{len(counter)} values" if isinstance(counter, tuple | list) else describe(counter)
        raise TypeError(f"counter: expected four int64 tensors, got {got}")
    for word in counter:
        shape = counter[0].shape if isinstance(counter[0], Tensor) else ["..."]
        check_tensor("counter", word, shape, [torch.int64])
    check_tensor("key", key, [], [torch.int64])
    return _rounds(counter, key)


def _rounds(counter: Sequence[Tensor], key: Tensor) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = (word.clone() for word in counter)
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        # Products may pass 2**63: they wrap, and masking after the shift still gives the high word.
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        torch.bitwise_and(p1, _WORD, out=c1)
        torch.bitwise_and(p0, _WORD, out=c3)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def hidden_keep_mask(
    key: Tensor, row_keys: Tensor, channels: int, p: float, *, layer: int, site: Site
) -> Tensor:
    """Which hidden elements survive.

    Args:
        key: int64 [] from `draw_key`.
        row_keys: int32 [...].
        channels: C.
        p: dropout probability.
        layer: number of the layer, from 0.
        site: where in the layer.

    Returns:
        bool [..., C].

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
    """
    _check_common(key, layer, site)
    check_tensor("row_keys", row_keys, None, [torch.int32])
    check_int("channels", channels, 0)
    check_probability("p", p)
    groups = torch.arange((channels + LANES - 1) // LANES, device=row_keys.device)
    rows = row_keys.reshape(-1, 1).long()
    keep = _keep_lanes(key, rows, groups[None, :], None, p, layer, site).flatten(-2)
    return keep[..., :channels].reshape(*row_keys.shape, channels)


def attention_keep_mask(
    key: Tensor, query_keys: Tensor, key_keys: Tensor, heads: int, p: float, *, layer: int, site: Site
) -> Tensor:
    """Which attention probabilities survive.

    Args:
        key: int64 [] from `draw_key`.
        query_keys: int32 [B, Lq], row keys of the rows that attend.
        key_keys: int32 [B, Lk] row keys of the rows attended to, or [Lk] ordinals of image tokens.
        heads: H.
        p, layer, site: as for hidden elements.

    Returns:
        bool [B, H, Lq, Lk].

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
    """
    _check_common(key, layer, site)
    check_tensor("query_keys", query_keys, ["B", "Lq"], [torch.int32])
    check_tensor("key_keys", key_keys, None, [torch.int32])
    if key_keys.dim() != 1:
        check_tensor("key_keys", key_keys, [query_keys.shape[0], "Lk"], [torch.int32])
    check_int("heads", heads, 0)
    check_probability("p", p)
    groups, column = _groups(key_keys.expand(query_keys.shape[0], -1))
    head = torch.arange(heads, device=query_keys.device)[None, :, None, None]
    rows = query_keys.long()[:, None, :, None]
    keep = _keep_lanes(key, rows, groups[:, None, None, :], head, p, layer, site).flatten(-2)
    if column is None:
        return keep[..., : key_keys.shape[-1]]
    return keep.gather(-1, column[:, None, None, :].expand(*keep.shape[:-1], -1))


def dropout_hidden(x: Tensor, p: float, key: Tensor, row_keys: Tensor, *, layer: int, site: Site) -> Tensor:
    """Dropout on hidden states x [..., C], rows named by `row_keys` int32 [...]; p = 0 gives x itself.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
    """
    if check_probability("p", p) == 0:
        return x
    _check_common(key, layer, site)
    check_tensor("x", x, x.shape if isinstance(x, Tensor) and x.dim() else ["...", "C"], FLOATING)
    check_tensor("row_keys", row_keys, x.shape[:-1], [torch.int32], x.device)
    keep = hidden_keep_mask(key, row_keys, x.shape[-1], p, layer=layer, site=site)
    return (x * keep_scale(p)).masked_fill(~keep, 0)


def dropout_attention(
    probs: Tensor, p: float, key: Tensor, query_keys: Tensor, key_keys: Tensor, *, layer: int, site: Site
) -> Tensor:
    """Dropout on attention probabilities [B, H, Lq, Lk]; p = 0 gives them back.

    Args:
        probs: [B, H, Lq, Lk].
        p: probability.
        key: int64 [].
        query_keys: int32 [B, Lq].
        key_keys: int32 [B, Lk] row keys, or [Lk] ordinals of image tokens.
        layer, site: where.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
    """
    if check_probability("p", p) == 0:
        return probs
    _check_common(key, layer, site)
    check_tensor("probs", probs, ["B", "H", "Lq", "Lk"])
    batch, heads, queries, keys = probs.shape
    check_tensor("query_keys", query_keys, [batch, queries], [torch.int32], probs.device)
    check_tensor("key_keys", key_keys, None, [torch.int32])
    expected = [batch, keys] if key_keys.dim() == 2 else [keys]
    check_tensor("key_keys", key_keys, expected, [torch.int32], probs.device)
    keep = attention_keep_mask(key, query_keys, key_keys, heads, p, layer=layer, site=site)
    return (probs * keep_scale(p)).masked_fill(~keep, 0)


def _check_common(key: Tensor, layer: int, site: int) -> None:
    check_tensor("key", key, [], [torch.int64])
    check_int("layer", layer, 0, (1 << 29) - 1)
    check_int("site", site, 0, max(Site))


def _groups(names: Tensor) -> tuple[Tensor, Tensor | None]:
    """Groups of eight neighbours among the names of each sample, so that one call serves all of a group.

    Args:
        names: integer [B, L].

    Returns:
        int64 [B, G] group numbers (names >> 3, each once a sample, padded by repeats), and int64 [B, L]:
        column of each name among the G * 8 elements, or None where that is 0 … L - 1 throughout.
    """
    names = names.long()
    group = names // LANES
    length = names.shape[1]
    if length == 0:
        return group, None
    first = group[:, ::LANES]
    places = torch.arange(length, device=names.device)
    whole = first[:, places // LANES] * LANES + places % LANES
    if values_are_free(names.device) and torch.equal(names, whole):
        return first, None
    ordered, order = group.sort(dim=1)
    slot = torch.zeros_like(ordered)
    slot[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long().cumsum(1)
    # On a device the number of groups stays an upper bound (L): reading it back would synchronise.
    count = int(slot.max()) + 1 if values_are_free(names.device) else length
    groups = ordered[:, :1].repeat(1, count).scatter_(1, slot, ordered)
    column = torch.empty_like(slot).scatter_(1, order, slot) * LANES + names % LANES
    return groups, column


def _keep_lanes(
    key: Tensor, rows: Tensor, groups: Tensor, head: Tensor | None, p: float, layer: int, site: Site
) -> Tensor:
    """Broadcast the counters and return bool [*broadcast shape, 8], by chunks of the first dimension."""
    if head is None:
        head = torch.zeros((), dtype=torch.int64, device=rows.device)
    shape = torch.broadcast_shapes(rows.shape, groups.shape, head.shape)
    keep = torch.empty(*shape, LANES, dtype=torch.bool, device=rows.device)
    key = key.to(rows.device)
    level = threshold(p)
    where = torch.full((), place(layer, site), dtype=torch.int64, device=rows.device)
    inner = max(keep[0].numel() // LANES, 1) if shape[0] else 1
    step = shape[0] if rows.device.type != "cpu" else max(CHUNK // inner, 1)
    for start in range(0, shape[0], max(step, 1)):
        part = slice(start, start + step)
        chunk = [t[part] if t.dim() == len(shape) and t.shape[0] > 1 else t for t in (rows, groups, head)]
        size = (min(step, shape[0] - start), *shape[1:])
        counter = tuple(t.expand(size).contiguous() for t in (*chunk, where))
        for word, bits in enumerate(_rounds(counter, key)):
            torch.ge(bits & (LEVELS - 1), level, out=keep[part][..., 2 * word])
            torch.ge(bits >> 16, level, out=keep[part][..., 2 * word + 1])
    return keep
