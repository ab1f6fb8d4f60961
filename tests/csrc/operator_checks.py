"""Operators as csrc/ registers them, forward and backward, against the plain ones and the truth in fp64.

`ops` is a namespace of torch.ops: of CUDA kernels that run on the host, or of loops for one instruction set.
"""

import torch
from compiled_cases import strided, with_gradients
from tolerances import assert_yardstick

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import add_layer_norm, bias_gelu, self_attention
from blip2_kernels.ops.embed_tokens.reference import embed_tokens_reference
from blip2_kernels.ops.philox import LANES, Site, draw_key
from blip2_kernels.ops.self_attention import compiled as compiled_self_attention

NORM_NAMES = ("out", "dx", "dresidual", "dweight", "dbias", "dinput_bias")


def output_gradient(out):
    """The one that `with_gradients` takes."""
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)


def norm(ops, tensors, dropout, key, names, place):
    x, residual, weight, bias, input_bias = tensors
    drop = (dropout, key, names, place) if dropout else (0.0, None, None, place)
    out, mean, rstd = ops.add_layer_norm(x, residual, weight, bias, input_bias, 1e-5, *drop)
    saved = (x, residual, weight, input_bias, mean, rstd)
    dx, dresidual, *sums = ops.add_layer_norm_backward(output_gradient(out), *saved, *drop)
    if dresidual.shape != residual.shape:
        dresidual = dx
    return [out, dx, dresidual, *(sums if input_bias is not None else sums[:2])]


def check_norm(ops, rows, width, dtypes, dropout, *, apart=False, input_bias=True):
    x, residual = (torch.randn(rows, width).to(dtype) for dtype in dtypes)
    vectors = [torch.randn(width).to(dtypes[1]) for _ in range(3)]
    tensors = [x, residual, *vectors[:2], vectors[2] if input_bias else None]
    if apart:
        tensors[:2] = [strided(t) for t in tensors[:2]]
    key, names = draw_key(), torch.randperm(1 << 20)[:rows].to(torch.int32) * 5 + 1
    drop = {"dropout": dropout, "dropout_key": key, "row_keys": names, "layer": 4, "site": Site.FEED_FORWARD}

    def plain(x, residual, weight, bias, input_bias):
        vectors = (weight, bias)
        given = {"input_bias": input_bias, "eps": 1e-5, "backend": "reference"} | drop
        return add_layer_norm(x, residual, *vectors, **given)

    got = norm(ops, tensors, dropout, key, names, 4 * LANES + Site.FEED_FORWARD)
    reference = with_gradients(plain, tensors)
    truth = with_gradients(plain, [None if t is None else t.double() for t in tensors], dtypes[1])
    names_of_results = NORM_NAMES if input_bias else NORM_NAMES[:-1]
    for name, *values in zip(names_of_results, got, reference, truth, strict=True):
        assert_yardstick(name, *values)


def check_gelu(ops, rows, width, dtypes, *, bias=True):
    x, b = (2 * torch.randn(rows, width)).to(dtypes[0]), torch.randn(width).to(dtypes[1]) if bias else None
    out = ops.bias_gelu(x, b)
    dx, dbias = ops.bias_gelu_backward(output_gradient(out), x, b)

    def plain(x, b):
        return bias_gelu(x, b, backend="reference")

    reference = with_gradients(plain, [x, b])
    truth = with_gradients(plain, [x.double(), None if b is None else b.double()], dtypes[0])
    for name, *values in zip(
        ("out", "dx", "dbias"), [out, dx, dbias][: 2 + bias], reference, truth, strict=False
    ):
        assert_yardstick(name, *values)


EMBED_NAMES = ("out", "dqueries", "dwords", "dpositions", "dweight", "dbias")


def embed(ops, tensors, ids, query_rows, dropout, key, names, padding_idx=-1, errors=None):
    """Flat arguments: of token and position ids either both are given, or the words are the text itself."""
    queries, words, positions, weight, bias = tensors
    inputs = (queries, words, positions, *ids, query_rows)
    drop = (dropout, key, names, 5) if dropout else (0.0, None, None, 5)
    out, mean, rstd = ops.embed_tokens_forward(*inputs, weight, bias, 1e-5, *drop, errors)
    orders = [None if t is None else t.argsort(stable=True) for t in ids]
    rest = (weight, mean, rstd, *drop)
    found = ops.embed_tokens_backward(output_gradient(out), *inputs, *orders, padding_idx, *rest)
    wanted = zip(found, tensors, strict=True)
    return [out, *(gradient for gradient, tensor in wanted if tensor is not None)]


def draw_embed(queries, text_rows, width, dtype, *, embedded=False):
    """Tensors and ids; words recur, one of them in most rows."""
    shapes = [(queries, width), (text_rows if embedded else 7, width), (5, width), (width,), (width,)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if not queries:
        tensors[0] = None
    if embedded:
        tensors[2] = None
        return tensors, (None, None)
    words = torch.where(torch.rand(text_rows) < 0.5, 2, torch.randint(0, 7, (text_rows,)))
    return tensors, (words, torch.randint(0, 5, (text_rows,)))


def check_embed(
    ops, queries, samples, text_rows, width, dtype, dropout, *, apart=False, embedded=False, padding=-1
):
    tensors, ids = draw_embed(queries, text_rows, width, dtype, embedded=embedded)
    if apart:
        tensors[:3] = [None if t is None else strided(t) for t in tensors[:3]]
    query_rows = queries * samples
    key, names = draw_key(), torch.randperm(1 << 20)[: query_rows + text_rows].to(torch.int32) * 5 + 1

    def plain(queries, words, positions, weight, bias):
        options = {"query_rows": query_rows, "padding_idx": None if padding < 0 or embedded else padding}
        drop = {
            "dropout": dropout,
            "dropout_key": key,
            "row_keys": names,
            "layer": 0,
            "site": Site.EMBEDDINGS,
        }
        given = options | drop
        return embed_tokens_reference(queries, words, positions, *ids, weight, bias, eps=1e-5, **given)

    got = embed(ops, tensors, ids, query_rows, dropout, key, names, padding)
    reference = with_gradients(plain, tensors)
    truth = with_gradients(plain, [None if t is None else t.double() for t in tensors], dtype)
    results = ["out", *(n for n, t in zip(EMBED_NAMES[1:], tensors, strict=True) if t is not None)]
    for name, *values in zip(results, got, reference, truth, strict=True):
        assert_yardstick(name, *values)


def packed_attention(ops, tensors, layout, mask, drop):
    table = compiled_self_attention.TABLES.of(layout, layout, mask)
    names = (layout.row_keys, layout.row_keys) if drop[1] is not None else (None, None)
    rest = (*table, 0.2, *drop, *names, LANES)
    out = ops.packed_attention(*tensors, *rest)
    return [out, *ops.packed_attention_backward(output_gradient(out), *tensors, *rest)]


def check_attention(ops, queries, lengths, head_dim, dtype, dropout):
    masks = [torch.arange(70) < torch.tensor(lengths)[:, None]] * 2
    layout = TokenLayout.from_attention_masks(queries, masks)
    mask = AttentionMask((MaskMode.UNIMODAL, MaskMode.MULTIMODAL_CAUSAL))
    tensors = [torch.randn(layout.rows, 2, head_dim).to(dtype) for _ in range(3)]
    key = draw_key() if dropout else None

    def plain(q, k, v):
        options = {"dropout": dropout, "dropout_key": key, "layer": 1, "scale": 0.2, "backend": "reference"}
        return self_attention(q, k, v, layout, layout, mask, **options)

    got = packed_attention(ops, tensors, layout, mask, (dropout, key))
    reference = with_gradients(plain, tensors)
    truth = with_gradients(plain, [t.double() for t in tensors], dtype)
    for name, *values in zip(("out", "dq", "dk", "dv"), got, reference, truth, strict=True):
        assert_yardstick(name, *values)
