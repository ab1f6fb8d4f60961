"""Attention and Philox written out from their definitions, sharing nothing with the package."""

import math

import torch
from torch import Tensor

QUERY = -1


def may_attend(modes: tuple[str, ...], q: tuple[int, int], k: tuple[int, int]) -> bool:
    """The table of figure 2, row by row; a row is (segment, ordinal), segment -1 for queries."""
    if q[0] == QUERY and k[0] == QUERY:
        return True
    if q[0] == QUERY:
        return modes[k[0]] == "BIDIRECTIONAL"
    if k[0] == QUERY:
        return modes[q[0]] in ("BIDIRECTIONAL", "MULTIMODAL_CAUSAL")
    if q[0] != k[0]:
        return False
    return modes[q[0]] != "MULTIMODAL_CAUSAL" or k[1] <= q[1]


def sample_rows(num_queries: int, lengths: list[list[int]], sample: int) -> list[tuple[int, int, int]]:
    """(row number, segment, ordinal) of one sample's rows in a packed buffer."""
    samples = len(lengths[0]) if lengths else 1
    rows = [(sample * num_queries + i, QUERY, i) for i in range(num_queries)]
    start = samples * num_queries
    for segment, counts in enumerate(lengths):
        begin = start + sum(counts[:sample])
        rows += [(begin + i, segment, i) for i in range(counts[sample])]
        start += sum(counts)
    return rows


def naive_self_attention(
    q: Tensor, k: Tensor, v: Tensor, num_queries: int, lengths: list[list[int]], samples: int, modes
) -> Tensor:
    """Packed self-attention, sample by sample, who sees whom asked pair by pair; in the inputs' dtype."""
    out = torch.zeros_like(q)
    for sample in range(samples):
        rows = sample_rows(num_queries, lengths or [[0] * samples], sample)
        numbers = [number for number, *_ in rows]
        sees = torch.tensor([[may_attend(modes, tuple(a), tuple(b)) for _, *b in rows] for _, *a in rows])
        if rows:
            scores = torch.einsum("qhd,khd->hqk", q[numbers], k[numbers]) / math.sqrt(q.shape[-1])
            probs = scores.masked_fill(~sees, float("-inf")).softmax(-1)
            out = out.index_put((torch.tensor(numbers),), torch.einsum("hqk,khd->qhd", probs, v[numbers]))
    return out


def philox_words(counter: tuple[int, int, int, int], key: int) -> tuple[int, ...]:
    """Philox 4x32-10 in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def keep_element(key: int, row: int, name: int, head: int, layer: int, site: int, p: float) -> bool:
    """Whether the element `name` (channel, row key or token ordinal) of a row survives."""
    word = philox_words((row, name >> 3, head, layer * 8 + site), key)[(name & 7) >> 1]
    bits = word >> 16 if name & 1 else word & 0xFFFF
    return bits >= round(p * 65536)
