"""The attention kernels and the compiled operators on a GPU, beside what PyTorch has for the same shapes.

    python bench/kernels.py                      every case
    python bench/kernels.py --only cross --rounds 40 --json kernels.json
    python bench/kernels.py --warm --share 0/8   compiles an eighth of the cases and times nothing

bf16, 12 heads of 64 channels, 32 queries. What a peer computes is compared with the fp32 reference first; a
wrong one is not timed. Peers get their inputs in the layout they like best, without the copies that making it
costs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from about import about
from measure import Call, Roofline, Timing, device_times, host_times, said
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import (
    add_layer_norm,
    bias_gelu,
    cross_attention,
    embed_tokens,
    image_text_similarity,
    latent_attention,
    self_attention,
)
from blip2_kernels.ops.philox import draw_key

HEADS, HEAD_DIM, QUERIES, CHANNELS, IMAGE_WIDTH = 12, 64, 32, 768, 1408
DTYPE = torch.bfloat16
TEXT = (4, 10, 14, 20)
"""Tokens of the captions: 12 on average, padded to 32."""
PADDED = 32
OURS = "ours"
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Peer:
    """A way to compute a case's result.

    Attributes:
        compute: takes the tensors of `prepare` and returns the result.
        prepare: makes them of the case's inputs, untimed.
        read: makes the case's result of what was computed, untimed.
    """

    compute: Callable[..., Tensor]
    prepare: Callable[..., Sequence[Tensor]] = lambda *tensors: tensors
    read: Callable[[Tensor], Tensor] = lambda out: out


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        draw: makes its inputs.
        truth: the result in fp32, of inputs in fp32.
        peers: by name; the first is ours.
        moved: bytes that any kernel must move, forward; backward.
        operations: floating-point operations, forward; backward.
        gradients: whether it is timed with its backward too.
        tolerance: of the largest error, relative to the largest value.
    """

    draw: Callable[[], tuple[Tensor, ...]]
    truth: Callable[..., Tensor]
    peers: dict[str, Peer]
    moved: tuple[float, float]
    operations: tuple[float, float]
    gradients: bool = True
    tolerance: float = 0.03


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = DTYPE) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)


# --------------------------------------------------------------------------------------------- self-attention


def self_case(samples: int, modes: tuple[MaskMode, ...]) -> Case:
    """A packed projection [rows, 3, heads, head dim], read in place, against padded tensors and a mask."""
    counts = torch.tensor(TEXT).repeat(-(-samples // len(TEXT)))[:samples]
    text = torch.arange(PADDED) < counts[:, None]
    layout = TokenLayout.from_attention_masks(
        QUERIES, [text.cuda()] * len(modes), samples=samples, device="cuda"
    )
    mask = AttentionMask(modes)
    attend = partial(self_attention, q_layout=layout, kv_layout=layout, mask=mask)

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, backend=backend)

    def views(fused: Tensor) -> Sequence[Tensor]:
        return fused.unbind(1)

    peers = {
        OURS: Peer(partial(run, "triton"), views),
        "our torch path": Peer(partial(run, "torch"), views),
    }
    for name, backend in SDPA.items():
        if not (modes and backend == SDPBackend.FLASH_ATTENTION):  # it takes no mask
            peers[name] = _padded_sdpa(backend, samples, modes, text, layout)
    rows, size = layout.rows, DTYPE.itemsize
    moved = 4 * rows * CHANNELS * size
    text_rows = sum(c * c for c in counts.tolist())
    pairs = 0
    for count in counts.tolist():
        joint = [m for m in modes if m != MaskMode.UNIMODAL]
        pairs += (QUERIES + count) ** 2 if joint else QUERIES**2
    pairs += text_rows * sum(m == MaskMode.UNIMODAL for m in modes)
    operations = 4 * pairs * CHANNELS
    return Case(
        lambda: draw((rows, 3, HEADS, HEAD_DIM)),
        lambda fused: run("reference", *views(fused)),
        peers,
        (moved, 7 * rows * CHANNELS * size),
        (operations, 2.5 * operations),
    )


def _padded_sdpa(
    backend: SDPBackend, samples: int, modes: tuple[MaskMode, ...], text: Tensor, layout: TokenLayout
) -> Peer:
    """A call for the joint part and one for the unimodal text, on [batch, heads, padded length, head dim]."""
    unimodal = MaskMode.UNIMODAL in modes
    joint = [mode for mode in modes if mode != MaskMode.UNIMODAL]
    lengths = [QUERIES + PADDED * bool(joint)] + [PADDED] * unimodal
    masks: list[Tensor | None] = []
    if joint:
        seen = torch.ones(samples, lengths[0], lengths[0], dtype=torch.bool)
        seen[:, :, QUERIES:] = text[:, None]
        if joint[0] == MaskMode.MULTIMODAL_CAUSAL:
            seen[:, :QUERIES, QUERIES:] = False
            seen[:, QUERIES:, QUERIES:] &= torch.ones(PADDED, PADDED).tril().bool()
        masks.append(seen[:, None].cuda())
    else:
        masks.append(None)
    if unimodal:
        masks.append(text[:, None, None].expand(-1, 1, PADDED, -1).contiguous().cuda())

    places = _padded_places(samples, modes, text, layout, lengths)

    def prepare(fused: Tensor) -> list[Tensor]:
        padded = []
        for length, (rows, inside) in zip(lengths, places, strict=True):
            for part in fused.detach().unbind(1):
                room = part.new_zeros(samples * length, HEADS, HEAD_DIM)
                room[inside] = part[rows]
                padded.append(room.view(samples, length, HEADS, HEAD_DIM).transpose(1, 2).contiguous())
        return padded

    def compute(*padded: Tensor) -> Tensor:
        outs = []
        with sdpa_kernel(backend):
            for i, seen in enumerate(masks):
                q, k, v = padded[3 * i : 3 * i + 3]
                outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return outs[0] if len(outs) == 1 else outs

    def read(outs) -> Tensor:
        result = torch.zeros(layout.rows, HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
        for out, (rows, inside) in zip(outs if isinstance(outs, list) else [outs], places, strict=True):
            result[rows] = out.transpose(1, 2).flatten(0, 1)[inside]
        return result

    return Peer(compute, prepare, read)


def _padded_places(samples, modes, text, layout, lengths) -> list[tuple[Tensor, Tensor]]:
    """Of each padded call: which packed rows it holds, and where."""
    base = torch.arange(samples)[:, None]
    joint_rows = [torch.arange(layout.query_rows)]
    joint_inside = [(base * lengths[0] + torch.arange(QUERIES)).flatten()]
    places = []
    unimodal_place = None
    for i, mode in enumerate(modes):
        start, offsets = layout.text_start(i), layout.texts[i].offsets.cpu().long()
        sample, token = text.nonzero(as_tuple=True)
        rows = start + offsets[sample] + token
        if mode == MaskMode.UNIMODAL:
            unimodal_place = (rows.cuda(), (sample * PADDED + token).cuda())
        else:
            joint_rows.append(rows)
            joint_inside.append(sample * lengths[0] + QUERIES + token)
    places.append((torch.cat(joint_rows).cuda(), torch.cat(joint_inside).cuda()))
    return places if unimodal_place is None else [*places, unimodal_place]


# -------------------------------------------------------------------------------------------- cross-attention


def cross_case(images: int, tokens: int, samples_an_image: int, dropout: float = 0.0) -> Case:
    """Keys and values of one projection [images, tokens, 2, heads, head dim]; sample s sees s % images."""
    samples = images * samples_an_image
    shared = samples_an_image > 1
    index = (torch.arange(samples, device="cuda") % images).int() if shared else None

    options = {"dropout": dropout, "dropout_key": draw_key("cuda") if dropout else None}

    def run(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cross_attention(q, k, v, image_index=index, backend=backend, **options)

    def views(q: Tensor, kv: Tensor) -> Sequence[Tensor]:
        return (q, *kv.unbind(2))

    def transposed(q: Tensor, kv: Tensor) -> Sequence[Tensor]:
        k, v = kv.detach().unbind(2)
        if index is not None:
            k, v = k[index.long()], v[index.long()]
        return [t.detach().transpose(1, 2).contiguous() for t in (q, k, v)]

    def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    peers = {
        OURS: Peer(partial(run, "triton"), views),
        "our torch path": Peer(partial(run, "torch"), views),
    }
    if dropout:  # it would draw another mask, and has no name for a row that keeps its own
        del peers["our torch path"]
    for name, backend in SDPA.items() if not dropout else ():
        peers[name] = Peer(partial(sdpa, backend), transposed, lambda out: out.transpose(1, 2))
    size = DTYPE.itemsize
    rows, keys = samples * QUERIES * CHANNELS * size, images * tokens * CHANNELS * size
    operations = 4.0 * samples * QUERIES * tokens * CHANNELS
    return Case(
        lambda: draw((samples, QUERIES, HEADS, HEAD_DIM), (images, tokens, 2, HEADS, HEAD_DIM)),
        lambda q, kv: run("reference", *views(q, kv)),
        peers,
        (2 * rows + 2 * keys, 4 * rows + 4 * keys),
        (operations, 2.5 * operations),
    )


# ---------------------------------------------------------------------------- latent attention and similarity


def latent_case(samples: int, tokens: int, width: int = IMAGE_WIDTH) -> Case:
    rows = HEADS * QUERIES

    def run(backend: str, q: Tensor, features: Tensor) -> Tensor:
        return latent_attention(q, features, scale=0.02, backend=backend)

    def bmm(q: Tensor, features: Tensor) -> Tensor:
        return torch.bmm(torch.softmax(torch.bmm(q, features.mT) * 0.02, -1), features)

    def sdpa(q: Tensor, features: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, features, features, scale=0.02)

    size = DTYPE.itemsize
    return Case(
        lambda: draw((samples, rows, width), (samples, tokens, width)),
        partial(run, "reference"),
        {
            OURS: Peer(partial(run, "triton")),
            "our torch path": Peer(partial(run, "torch")),
            "bmm": Peer(bmm),
            "sdpa": Peer(sdpa),
        },
        ((2 * samples * rows * width + samples * tokens * width) * size, 0),
        (4.0 * samples * rows * tokens * width, 0),
        gradients=False,
    )


def similarity_case(images: int, texts: int, channels: int = 256) -> Case:
    def run(backend: str, image: Tensor, text: Tensor) -> Tensor:
        return image_text_similarity(image, text, backend=backend)

    def einsum(image: Tensor, text: Tensor) -> Tensor:
        return torch.einsum("iqe,te->itq", image, text).amax(-1)

    size = DTYPE.itemsize
    operations = 2.0 * images * QUERIES * texts * channels
    moved = (images * QUERIES + texts) * channels * size
    return Case(
        lambda: draw((images, QUERIES, channels), (texts, channels)),
        partial(run, "reference"),
        {
            OURS: Peer(partial(run, "triton")),
            "our torch path": Peer(partial(run, "torch")),
            "einsum": Peer(einsum),
        },
        (moved + images * texts * 4, 2 * moved),
        (operations, 2 * operations / QUERIES),
    )


# ----------------------------------------------------------------------------------------- compiled operators


def compiled_case(
    run: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    rows: int,
    width: int,
    *,
    matrices: int,
    vectors: int,
) -> Case:
    """`run(backend, *tensors)` of so many [rows, width], read once, and [width]; out is written once. The
    backward is counted as reading them again with grad, and writing a gradient of each."""
    matrix = rows * width * DTYPE.itemsize
    return Case(
        lambda: draw(*[(rows, width)] * matrices, *[(width,)] * vectors),
        partial(run, "reference"),
        {
            OURS: Peer(partial(run, "csrc")),
            "eager": Peer(plain),
            "compiled": Peer(torch.compile(plain, dynamic=False)),
        },
        ((matrices + 1) * matrix, (2 * matrices + 1) * matrix),
        (0, 0),
        tolerance=0.05,
    )


def norm_case(rows: int, width: int = CHANNELS) -> Case:
    def run(backend: str, x, residual, weight, bias, input_bias) -> Tensor:
        return add_layer_norm(x, residual, weight, bias, input_bias=input_bias, backend=backend)

    def plain(x, residual, weight, bias, input_bias) -> Tensor:
        return F.layer_norm(x + input_bias + residual, (width,), weight, bias, 1e-12)

    return compiled_case(run, plain, rows, width, matrices=2, vectors=3)


def gelu_case(rows: int, width: int = 4 * CHANNELS) -> Case:
    def run(backend: str, x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x, bias, backend=backend)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return compiled_case(run, plain, rows, width, matrices=1, vectors=1)


def embed_case(samples: int, width: int = CHANNELS) -> Case:
    """Shared queries and packed captions; the backward also writes a row of zeros for every unseen word."""
    vocabulary, places, padded = 30523, 512, 32
    lengths = torch.tensor(TEXT).repeat(-(-samples // len(TEXT)))[:samples]
    layout = TokenLayout.from_attention_masks(
        QUERIES, [torch.arange(padded) < lengths[:, None]], device=torch.device("cuda")
    )
    ids = torch.randint(1, vocabulary, (samples, padded), device="cuda")
    source = layout.texts[0].source

    def run(backend: str, queries, words, positions, weight, bias) -> Tensor:
        tables = (queries, [ids], words, positions, weight, bias)
        return embed_tokens(*tables, layout, padding_idx=0, backend=backend)

    def plain(queries, words, positions, weight, bias) -> Tensor:
        text = F.embedding(ids.flatten()[source], words, 0) + F.embedding(source % padded, positions)
        rows = torch.cat([queries.expand(samples, -1, -1).flatten(0, 1), text])
        return F.layer_norm(rows, (width,), weight, bias, 1e-12)

    row = width * DTYPE.itemsize
    text_rows = layout.texts[0].rows
    read = (QUERIES + text_rows + padded) * row
    return Case(
        lambda: draw((1, QUERIES, width), (vocabulary, width), (places, width), (width,), (width,)),
        partial(run, "reference"),
        {
            OURS: Peer(partial(run, "csrc")),
            "eager": Peer(plain),
            "compiled": Peer(torch.compile(plain, dynamic=False)),
        },
        (read + layout.rows * row, read + (layout.rows + QUERIES + vocabulary + places) * row),
        (0, 0),
        tolerance=0.05,
    )


U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
CASES: dict[str, Callable[[], Case]] = {
    **{
        f"self-{name}-{samples}": partial(self_case, samples, modes)
        for name, modes in (("queries", ()), ("itm", (B,)), ("itc+itg", (U, C)))
        for samples in (1, 64, 512)
    },
    **{
        f"cross-{n}x{tokens}": partial(cross_case, n, tokens, 1)
        for n in (1, 64)
        for tokens in (257, 677, 2056)
    },
    "cross-512x257": partial(cross_case, 512, 257, 1),
    "cross-64x257-by-3": partial(cross_case, 64, 257, 3),
    "cross-1x257-by-128": partial(cross_case, 1, 257, 128),
    "cross-64x257-dropout": partial(cross_case, 64, 257, 1, 0.1),
    "cross-64x257-by-3-dropout": partial(cross_case, 64, 257, 3, 0.1),
    "latent-8x257": partial(latent_case, 8, 257),
    "latent-64x257": partial(latent_case, 64, 257),
    "latent-8x2056": partial(latent_case, 8, 2056),
    "similarity-100x100": partial(similarity_case, 100, 100),
    "similarity-1000x5000": partial(similarity_case, 1000, 5000),
    "add_layer_norm-16384": partial(norm_case, 16384),
    "bias_gelu-16384": partial(gelu_case, 16384),
    "embed_tokens-100": partial(embed_case, 100),
    "add_layer_norm-1024": partial(norm_case, 1024),
    "bias_gelu-1024": partial(gelu_case, 1024),
}


# ---------------------------------------------------------------------------------------------------- running


def with_backward(compute: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Call:
    """The call and the gradients of all its tensors, for random output gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    shown = compute(*leaves)
    outs = shown if isinstance(shown, list) else [shown]
    grads = [torch.randn_like(out) for out in outs]

    def call() -> object:
        result = compute(*leaves)
        return torch.autograd.grad(result if isinstance(result, list) else [result], leaves, grads)

    return call


def input_sets(case: Case, moved: float) -> list[tuple[Tensor, ...]]:
    """Enough sets of inputs that none is still in the second-level cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [case.draw() for _ in range(max(2, min(12, round(3 * cache / moved))))]


def gate(case: Case, peer: Peer, inputs: tuple[Tensor, ...]) -> str | None:
    """None where the peer's result is right, else what is wrong with it."""
    truth = case.truth(*(t.float() for t in inputs))
    out = peer.read(peer.compute(*peer.prepare(*inputs))).float()
    if out.shape != truth.shape:
        return f"its shape is {tuple(out.shape)}, expected {tuple(truth.shape)}"
    error = float((out - truth).abs().max() / truth.abs().max())
    return None if error <= case.tolerance else f"wrong: relative error {error:.2e}"


def run_case(name: str, rounds: int, warm: bool, roofline: Roofline | None) -> list[dict]:
    """Rows of the report: a direction and a peer each."""
    case = CASES[name]()
    rows: list[dict] = []
    sets = input_sets(case, case.moved[0])
    for direction in ("forward", "forward+backward")[: 1 + case.gradients]:
        moved, operations = case.moved[0], case.operations[0]
        if direction != "forward":
            moved, operations = sum(case.moved), sum(case.operations)
        calls: dict[str, list[Call]] = {}
        failed: dict[str, str] = {}
        for peer_name, peer in case.peers.items():
            try:
                wrong = gate(case, peer, sets[0])
                if wrong:
                    failed[peer_name] = wrong
                    continue
                made = [peer.prepare(*inputs) for inputs in sets]
                if direction == "forward":
                    calls[peer_name] = [partial(without_gradients, peer.compute, tensors) for tensors in made]
                else:
                    calls[peer_name] = [with_backward(peer.compute, tensors) for tensors in made]
                calls[peer_name][0]()
            except Exception as error:
                calls.pop(peer_name, None)
                failed[peer_name] = said(error)
        if warm:
            rows.extend({"case": name, "peer": peer, "failed": reason} for peer, reason in failed.items())
            continue
        times = device_times(calls, rounds=rounds)
        hosts = host_times(calls, rounds=5)
        floor = roofline.floor_ms(moved, operations) if roofline else None
        for peer_name in case.peers:
            row = {
                "case": name,
                "direction": direction,
                "peer": peer_name,
                "bytes": moved,
                "operations": operations,
                "floor_ms": floor,
            }
            timing = times.get(peer_name)
            if isinstance(timing, Timing):
                row |= {"device": timing.json(), "host": hosts[peer_name].json()}
                row["roofline"] = floor / timing.median if floor else None
                ours = times.get(OURS)
                row["times_ours"] = timing.median / ours.median if isinstance(ours, Timing) else None
            else:
                row["failed"] = failed.get(peer_name) or timing
            rows.append(row)
    return rows


def without_gradients(compute: Callable[..., Tensor], tensors: Sequence[Tensor]) -> object:
    with torch.no_grad():
        return compute(*tensors)


def show(row: dict) -> None:
    if "device" not in row:
        print(f"{row['case']:22} {row.get('direction', ''):17} {row['peer']:15} {row['failed']}", flush=True)
        return
    device = {name: value * 1e3 for name, value in row["device"].items()}
    print(
        f"{row['case']:22} {row['direction']:17} {row['peer']:15} {device['median']:9.2f} us "
        f"[{device['p20']:.2f}, {device['p80']:.2f}]  x{row['times_ours'] or 0:6.2f}  "
        f"{100 * (row['roofline'] or 0):5.1f}% of roofline, host {row['host']['median'] * 1e3:7.1f} us",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help=f"cases among {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--json", type=Path, help="write every row here")
    parser.add_argument("--warm", action="store_true", help="compile everything, time nothing")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th case from the I-th on")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device; bench_attention.py compares the backends on a CPU")
    torch.manual_seed(0)
    first, step = map(int, arguments.share.split("/"))
    chosen = [name for name in CASES if arguments.only in name][first::step]
    roofline = None if arguments.warm else Roofline.measure()
    if roofline:
        print(
            f"copy {roofline.copy / 1e12:.2f} TB/s, matmul {roofline.matmul / 1e12:.0f} TFLOP/s", flush=True
        )
    rows: list[dict] = []
    for name in chosen:
        try:
            found = run_case(name, arguments.rounds, arguments.warm, roofline)
        except Exception as error:
            found = [{"case": name, "peer": OURS, "failed": said(error)}]
        for row in found:
            show(row)
        rows += found
        torch.cuda.empty_cache()
        if arguments.json and roofline:
            arguments.json.write_text(json.dumps({"about": about(roofline), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
