"""Self-attention under the three masks and cross-attention, beside what PyTorch and others have.

12 heads of 64 channels, 32 queries. Peers get their inputs in the layout they like best, without the copies
that making it costs. Texts of 12 tokens on average are padded to 32 for peers that cannot do without.
"""

from functools import partial

import torch
from attention_peers import PEERS, Attend, Part, against_flex, dense_peers, packed_peers
from cases import FULL, NAMED, OURS, SHORT, Case, Setting, Spec, Way, operator_case
from torch import Tensor

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import cross_attention, self_attention
from blip2_kernels.ops.philox import draw_key

HEADS, HEAD_DIM, QUERIES = 12, 64, 32
CHANNELS = HEADS * HEAD_DIM
CAPTIONS = (4, 10, 14, 20)
"""Tokens of the captions: 12 on average, padded to 32."""
TORCH = "our torch path"


def bench_attention(timed):
    timed()


# ------------------------------------------------------------------------------------------- self-attention


def text_lengths(samples: int, tokens: int, padded: int) -> list[int]:
    """Every text `tokens` long, or 12 on average where they are padded to more."""
    if tokens == padded:
        return [tokens] * samples
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(samples)]


def self_case(
    samples: int, modes: tuple[MaskMode, ...], text: tuple[int, int], backward: bool, setting: Setting
) -> Case:
    """A packed projection [rows, 3, heads, head dim], read in place, against padded tensors and a mask.

    Args:
        text: tokens of a text on average, and what they are padded to.
    """
    device, padded = setting.device, text[1]
    lengths = text_lengths(samples, *text)
    real = torch.arange(padded) < torch.tensor(lengths)[:, None]
    layout = TokenLayout.from_attention_masks(
        QUERIES, [real.to(device)] * len(modes), samples=samples, device=device
    )
    mask = AttentionMask(modes)
    attend = partial(self_attention, q_layout=layout, kv_layout=layout, mask=mask)

    def run(backend: str, fused: Tensor) -> Tensor:
        return attend(*fused.unbind(1), backend=backend)

    padding = Padding(samples, modes, real, layout, setting)
    not_flex = against_flex(setting, backward, samples in (4, 64))
    ways: dict[str, Way | str] = {
        OURS: Way(partial(run, "triton" if device == "cuda" else "auto")),
        TORCH: Way(partial(run, "torch")) if device == "cuda" else "the same as ours on a CPU",
        **dense_peers(setting, bool(modes), not_flex, padding.way),
        **packed_peers(setting, padding.parts(lengths), padding.packed, padding.unpacked),
    }
    rows, size = layout.rows, setting.dtype.itemsize
    joint = any(mode != MaskMode.UNIMODAL for mode in modes)
    pairs = sum((QUERIES + length * joint) ** 2 for length in lengths)
    pairs += sum(length**2 for length in lengths) * (MaskMode.UNIMODAL in modes)
    return operator_case(
        setting,
        lambda: [torch.randn(rows, 3, HEADS, HEAD_DIM, device=device, dtype=setting.dtype)],
        partial(run, "reference"),
        ways,
        backward=backward,
        moved=(4 * rows * CHANNELS * size, 7 * rows * CHANNELS * size),
        operations=(4.0 * pairs * CHANNELS, 10.0 * pairs * CHANNELS),
        shape={"mask": name_of(modes), "batch": samples, "text tokens": text[0], "padded": padded},
    )


class Padding:
    """The packed rows of a self-attention, as others want them: a joint part, and one for unimodal texts."""

    def __init__(
        self,
        samples: int,
        modes: tuple[MaskMode, ...],
        real: Tensor,
        layout: TokenLayout,
        setting: Setting,
    ) -> None:
        self.layout, device = layout, setting.device
        padded = real.shape[1]
        joint = [mode for mode in modes if mode != MaskMode.UNIMODAL]
        self.causal = joint == [MaskMode.MULTIMODAL_CAUSAL]
        self.samples, self.unimodal = samples, MaskMode.UNIMODAL in modes
        self.lengths = [QUERIES + padded * bool(joint)] + [padded] * self.unimodal
        self.seen: list[Tensor | None] = [None]
        if joint:
            seen = torch.ones(samples, self.lengths[0], self.lengths[0], dtype=torch.bool)
            seen[:, :, QUERIES:] = real[:, None]
            if self.causal:
                seen[:, :QUERIES, QUERIES:] = False
                seen[:, QUERIES:, QUERIES:] &= torch.ones(padded, padded).tril().bool()
            self.seen = [seen[:, None].to(device)]
        if self.unimodal:
            self.seen.append(real[:, None, None].expand(-1, 1, padded, -1).contiguous().to(device))

        # Of each part: which packed rows it holds, and where; of the joint one also in the order of samples.
        base = torch.arange(samples)[:, None]
        rows, inside = (
            [torch.arange(layout.query_rows)],
            [(base * self.lengths[0] + torch.arange(QUERIES)).flatten()],
        )
        self.places: list[tuple[Tensor, Tensor]] = []
        sample, token = real.nonzero(as_tuple=True)
        for i, mode in enumerate(modes):
            text = layout.text_start(i) + layout.texts[i].offsets.cpu().long()[sample] + token
            if mode == MaskMode.UNIMODAL:
                self.places.append((text.to(device), (sample * padded + token).to(device)))
            else:
                rows.append(text)
                inside.append(sample * self.lengths[0] + QUERIES + token)
        self.places.insert(0, (torch.cat(rows).to(device), torch.cat(inside).to(device)))

    def way(self, attend: Attend) -> Way:
        """A call for the joint part and one for the unimodal text, [batch, heads, length, head dim]."""

        def prepare(fused: Tensor) -> list[Tensor]:
            tensors = []
            for length, (rows, inside) in zip(self.lengths, self.places, strict=True):
                for part in fused.unbind(1):
                    room = part.new_zeros(self.samples * length, HEADS, HEAD_DIM).index_copy(
                        0, inside, part[rows]
                    )
                    tensors.append(
                        room.view(self.samples, length, HEADS, HEAD_DIM).transpose(1, 2).contiguous()
                    )
            return tensors

        def compute(*tensors: Tensor) -> list[Tensor]:
            return [attend(*tensors[3 * i : 3 * i + 3], seen) for i, seen in enumerate(self.seen)]

        def read(outs: list[Tensor]) -> Tensor:
            return self._rows(
                [o.transpose(1, 2).flatten(0, 1)[i] for o, (_, i) in zip(outs, self.places, strict=True)]
            )

        return Way(compute, prepare, read)

    def _rows(self, parts: list[Tensor]) -> Tensor:
        result = parts[0].new_zeros(self.layout.rows, HEADS, HEAD_DIM)
        for part, (rows, _) in zip(parts, self.places, strict=True):
            result = result.index_copy(0, rows, part)
        return result

    # Packed: under the bidirectional mask a sample's queries and text are one sequence. Under the causal one
    # queries see queries, and texts see queries and, causally, texts: two calls.

    def parts(self, lengths: list[int]) -> list[Part]:
        queries, joint = [QUERIES] * self.samples, self.lengths[0] > QUERIES
        if self.causal:
            both = tuple(QUERIES + length for length in lengths)
            parts = [Part(tuple(queries), tuple(queries)), Part(tuple(lengths), both, causal=True)]
        else:
            rows = tuple(QUERIES + length * joint for length in lengths)
            parts = [Part(rows, rows)]
        return parts + [Part(tuple(lengths), tuple(lengths))] * self.unimodal

    def _order(self) -> Tensor:
        """The joint part's packed rows, sample by sample."""
        rows, inside = self.places[0]
        return rows[inside.argsort()]

    def packed(self, fused: Tensor) -> list[Tensor]:
        q, k, v = fused.unbind(1)
        order = self._order()
        if self.causal:
            is_query = order < self.layout.query_rows
            queries, text = order[is_query], order[~is_query]
            taken = [(queries, queries), (text, order)]
        else:
            taken = [(order, order)]
        if self.unimodal:
            taken.append((self.places[1][0],) * 2)
        return [t for rows, keys in taken for t in (q[rows], k[keys], v[keys])]

    def unpacked(self, outs: list[Tensor]) -> Tensor:
        order = self._order()
        rows = [order]
        if self.causal:
            is_query = order < self.layout.query_rows
            rows = [order[is_query], order[~is_query]]
        if self.unimodal:
            rows.append(self.places[1][0])
        result = outs[0].new_zeros(self.layout.rows, HEADS, HEAD_DIM)
        for place, out in zip(rows, outs, strict=True):
            result = result.index_copy(0, place, out)
        return result


# ------------------------------------------------------------------------------------------ cross-attention


def cross_case(
    images: int, tokens: int, samples_an_image: int, dropout: float, backward: bool, setting: Setting
) -> Case:
    """Keys and values of one projection [images, tokens, 2, heads, head dim]; sample s sees s % images."""
    device, dtype, samples = setting.device, setting.dtype, images * samples_an_image
    shared = samples_an_image > 1
    index = (torch.arange(samples, device=device) % images).int() if shared else None
    options = {"dropout": dropout, "dropout_key": draw_key(device) if dropout else None}

    def run(backend: str, q: Tensor, kv: Tensor) -> Tensor:
        return cross_attention(q, *kv.unbind(2), image_index=index, backend=backend, **options)

    # All samples of an image stand behind one another, so that the others read it once too.

    def stacked(q: Tensor, kv: Tensor) -> list[Tensor]:
        k, v = kv.unbind(2)
        q = q.view(samples_an_image, images, QUERIES, HEADS, HEAD_DIM).transpose(0, 1).flatten(1, 2)
        return [t.transpose(1, 2).contiguous() for t in (q, k, v)]

    def unstacked(out: Tensor) -> Tensor:
        by_image = out.transpose(1, 2).unflatten(1, (samples_an_image, QUERIES))
        return by_image.transpose(0, 1).flatten(0, 1)

    def packed(q: Tensor, kv: Tensor) -> list[Tensor]:
        return [t.transpose(1, 2).flatten(0, 1) for t in stacked(q, kv)]

    def unpacked(outs: list[Tensor]) -> Tensor:
        return unstacked(outs[0].unflatten(0, (images, -1)).transpose(1, 2))

    def way(attend: Attend) -> Way:
        return Way(lambda q, k, v: attend(q, k, v, None), stacked, unstacked)

    not_flex = against_flex(setting, backward, tokens == 257 and images in (2, 64))
    part = Part((samples_an_image * QUERIES,) * images, (tokens,) * images)
    peers = {**dense_peers(setting, False, not_flex, way), **packed_peers(setting, [part], packed, unpacked)}
    torch_path: Way | str = Way(partial(run, "torch")) if device == "cuda" else "the same as ours on a CPU"
    if dropout:  # they would draw another mask, and have no name for a row that keeps its own
        peers = dict.fromkeys(peers, "its dropout mask is another")
        torch_path = "it declines dropout"
    size = dtype.itemsize
    rows, keys = samples * QUERIES * CHANNELS * size, images * tokens * CHANNELS * size
    operations = 4.0 * samples * QUERIES * tokens * CHANNELS
    return operator_case(
        setting,
        lambda: [
            torch.randn(samples, QUERIES, HEADS, HEAD_DIM, device=device, dtype=dtype),
            torch.randn(images, tokens, 2, HEADS, HEAD_DIM, device=device, dtype=dtype),
        ],
        partial(run, "reference"),
        {OURS: Way(partial(run, "triton" if device == "cuda" else "auto")), TORCH: torch_path, **peers},
        backward=backward,
        moved=(2 * rows + 2 * keys, 4 * rows + 4 * keys),
        operations=(operations, 2.5 * operations),
        shape={
            "images": images,
            "image tokens": tokens,
            "samples an image": samples_an_image,
            "dropout": dropout,
        },
    )


# ----------------------------------------------------------------------------------------------------- cases


U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
MASKS = {"queries": (), "itm": (B,), "itg": (C,), "itc+itg": (U, C)}
TEXTS = {"": (12, 32), "-text32": (32, 32), "-text128": (128, 128), "-text512": (512, 512)}
BACKWARD = {"": False, "-backward": True}


def name_of(modes: tuple[MaskMode, ...]) -> str:
    return next(name for name, its in MASKS.items() if its == modes)


def when(short: bool, full: bool) -> int:
    return SHORT if short else FULL if full else NAMED


def self_cases() -> dict[str, Spec]:
    cases = {}
    for name, modes in MASKS.items():
        for ending, text in TEXTS.items() if modes else (("", (0, 32)),):
            for samples in (1, 4, 8, 16, 64, 512):
                for back, backward in BACKWARD.items():
                    usual = text[0] in (0, 12)
                    cases[f"self-{name}-{samples}{ending}{back}"] = Spec(
                        "self-attention",
                        partial(self_case, samples, modes, text, backward),
                        (OURS, TORCH, *PEERS),
                        cpu=when(
                            samples == 4 and usual and name != "itg",
                            (usual and samples in (1, 16, 64) and name != "itg")
                            or (samples == 4 and name == "itm"),
                        ),
                        cuda=when(
                            samples in (1, 64, 512) and usual and name != "itg",
                            samples in (1, 8, 64, 512) and not (samples == 512 and text[0] == 512),
                        ),
                    )
    return cases


def cross_cases() -> dict[str, Spec]:
    cases = {}
    shapes = [(n, tokens, 1, 0.0) for n in (1, 2, 8, 64, 512) for tokens in (257, 577, 677, 2056, 4112)]
    shapes += [(n, 257, by, 0.0) for n, by in ((1, 4), (1, 16), (1, 128), (2, 3), (64, 3), (64, 4))]
    shapes += [(64, 257, 1, 0.1), (64, 257, 3, 0.1)]
    for images, tokens, by, dropout in shapes:
        for back, backward in BACKWARD.items():
            name = f"cross-{images}x{tokens}" + f"-by-{by}" * (by > 1) + "-dropout" * bool(dropout) + back
            cases[name] = Spec(
                "cross-attention",
                partial(cross_case, images, tokens, by, dropout, backward),
                (OURS, TORCH, *PEERS),
                cpu=when(
                    (images, tokens, by) in ((2, 257, 1), (2, 257, 3)),
                    images <= 2 and (images == 2 or by > 1) and not dropout,
                ),
                cuda=when(
                    (tokens in (257, 677, 2056) and images in (1, 64) and by != 4)
                    or (images == 512 and tokens == 257),
                    images * tokens < 512 * 577,
                ),
            )
    return cases


CASES = self_cases() | cross_cases()
