"""cross_attention: every backend against attention written out, with shared, padded and unseen images."""

import random
from functools import partial

import pytest
import torch
from naive_attention import keep_element
from tolerances import assert_yardstick, max_error

from blip2_kernels.layout import padded_row_keys
from blip2_kernels.ops import cross_attention

BACKENDS = ["reference", "torch"]


def draw(samples=4, queries=5, images=3, tokens=7, heads=2, head_dim=8, dtype=torch.float64):
    shapes = [(samples, queries), (images, tokens), (images, tokens)]
    return [torch.randn(*shape, heads, head_dim, dtype=torch.float64).to(dtype) for shape in shapes]


def naive(q, k, v, index, visible, scale=None):
    """One sample and one visible token at a time; the dtype of its inputs throughout."""
    out = torch.zeros_like(q)
    for s, image in enumerate(index):
        tokens = visible[image].nonzero().flatten()
        if len(tokens):
            scores = torch.einsum("qhd,nhd->qhn", q[s], k[image, tokens]) * (scale or q.shape[-1] ** -0.5)
            out[s] = torch.einsum("qhn,nhd->qhd", scores.softmax(-1), v[image, tokens])
    return out


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 15, 49, 257])
@pytest.mark.parametrize("index", [[0, 1, 2], [2, 2, 0, 2, 0], [1]], ids=["own", "shared", "one"])
def test_against_the_definition(backend, dtype, tokens, index):
    torch.manual_seed(tokens)
    tensors = draw(len(index), 6, 3, tokens, dtype=dtype)
    image_index = torch.tensor(index, dtype=torch.int32)
    visible = torch.ones(3, tokens, dtype=torch.bool)
    got = gradients(
        lambda q, k, v: cross_attention(q, k, v, image_index=image_index, backend=backend), tensors
    )
    plain = gradients(lambda q, k, v: naive(q, k, v, index, visible), tensors)
    truth = gradients(lambda q, k, v: naive(q, k, v, index, visible), [t.double() for t in tensors])
    for name, *values in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=True):
        assert values[0].dtype == dtype
        assert_yardstick(name, *values)
    unseen = sorted({0, 1, 2} - set(index))
    assert (got[2][unseen] == 0).all() and (got[3][unseen] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", [1, 3])
def test_lengths_and_masks(backend, images):
    torch.manual_seed(0)
    tensors = draw(4, 5, images, 9)
    index = [0, images - 1, 0, images // 2]
    options = {"image_index": torch.tensor(index, dtype=torch.int32), "backend": backend}
    lengths = torch.tensor([4, 9, 0][:images], dtype=torch.int32)
    for visible, extra in (
        (torch.arange(9) < lengths[:, None], {"image_lengths": lengths}),
        *(((m := torch.rand(images, 9) < 0.5), {"image_mask": m.to(d)}) for d in (torch.bool, torch.int64)),
    ):
        got = gradients(lambda q, k, v, e=extra: cross_attention(q, k, v, **options, **e), tensors)
        truth = gradients(lambda q, k, v, m=visible: naive(q, k, v, index, m), tensors)
        for a, b in zip(got, truth, strict=True):
            assert max_error(a, b) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_with_no_visible_token_gives_zero_and_no_gradient(backend):
    tensors = draw(2, 3, 2, 5)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    results = gradients(
        lambda q, k, v: cross_attention(q, k, v, image_lengths=lengths, backend=backend), tensors
    )
    for t in results:
        assert torch.isfinite(t).all() and (t[0] == 0).all() and (t[1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_in_hidden_tokens_changes_no_bit(backend, poison):
    torch.manual_seed(0)
    q, k, v = draw(3, 4, 3, 6)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 0]])
    clean = gradients(lambda *t: cross_attention(*t, image_mask=mask, backend=backend), (q, k, v))
    k[mask == 0], v[mask == 0] = poison, poison
    dirty = gradients(lambda *t: cross_attention(*t, image_mask=mask, backend=backend), (q, k, v))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views_of_one_projection(backend):
    torch.manual_seed(0)
    k, v = torch.randn(3, 7, 4, 2, 8, dtype=torch.float64).unbind(2)[1:3]
    q = torch.randn(5, 4, 2, 8, dtype=torch.float64).transpose(0, 1)[:3]
    assert not (q.is_contiguous() or k.is_contiguous())
    got = gradients(lambda *t: cross_attention(*t, backend=backend), (q, k, v))
    truth = gradients(lambda *t: naive(*t, [0, 1, 2], torch.ones(3, 7, dtype=torch.bool)), (q, k, v))
    direct = cross_attention(q, k, v, backend=backend)
    assert max_error(direct, truth[0]) < 1e-13
    for a, b in zip(got, truth, strict=True):
        assert max_error(a, b) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_op_changes_nothing(backend, dtype):
    torch.manual_seed(0)
    tensors = draw(dtype=dtype, images=4)

    def attend(q, k, v, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return cross_attention(q, k, v, backend=backend)

    results = [gradients(partial(attend, enabled=enabled), tensors) for enabled in (False, True)]
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


def test_dropout_is_the_contract():
    torch.manual_seed(0)
    q, k, v = draw(2, 3, 2, 10)
    names = padded_row_keys(2, 3, first_sample=4)
    index = torch.tensor([1, 1], dtype=torch.int32)
    options = {"dropout": 0.3, "dropout_key": torch.tensor(-5), "layer": 6}
    out = cross_attention(q, k, v, image_index=index, row_keys=names, **options)
    for s in range(2):
        for i in range(3):
            probs = (torch.einsum("hd,nhd->hn", q[s, i], k[1]) * 8**-0.5).softmax(-1)
            for h in range(2):
                kept = [keep_element(-5, int(names[s, i]), n, h, 6, 2, 0.3) for n in range(10)]
                probs[h] *= torch.tensor(kept) / (1 - round(0.3 * 65536) / 65536)
            assert max_error(out[s, i], torch.einsum("hn,nhd->hd", probs, v[1])) < 1e-7
    default = cross_attention(q, k, v, image_index=index, **options)
    explicit = cross_attention(q, k, v, image_index=index, row_keys=padded_row_keys(2, 3), **options)
    assert torch.equal(default, explicit) and not torch.equal(default, out)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck_of_the_reference(dropout):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in draw(3, 2, 2, 4, 1, 3)]
    options = {"dropout": dropout, "dropout_key": torch.tensor(4), "backend": "reference"}
    options["image_index"] = torch.tensor([1, 0, 1], dtype=torch.int32)
    options["image_lengths"] = torch.tensor([4, 2], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *t: cross_attention(*t, **options), leaves)


DROPPING = {
    "dropout": 0.3,
    "dropout_key": torch.tensor(4),
    "image_index": torch.tensor([1, 0, 1], dtype=torch.int32),
}


def test_with_dropout_the_inputs_are_all_that_is_kept():
    q, k, v = (t.requires_grad_() for t in draw(3, 2, 2, 40))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_attention(q, k, v, **DROPPING)
    assert sum(t.numel() for t in kept if t.is_floating_point()) == sum(t.numel() for t in (q, k, v))
    assert sum(t.numel() for t in kept if not t.is_floating_point()) <= 3 * 2 + 3 + 1


def test_a_backward_inside_autocast_recomputes_in_the_inputs_precision():
    torch.manual_seed(0)
    leaves, results = [t.requires_grad_() for t in draw(3, 2, 2, 4, dtype=torch.float32)], []
    for enabled in (False, True):
        out = cross_attention(*leaves, **DROPPING).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(out, leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("written", ["q", "k", "v", "dropout_key", "image_index"])
def test_what_was_written_to_before_the_backward_is_noticed(written):
    given = dict(zip("qkv", draw(3, 2, 2, 4), strict=True)) | DROPPING
    given["dropout_key"], given["image_index"] = given["dropout_key"].clone(), given["image_index"].clone()
    leaves = [given[name].requires_grad_() for name in "qkv"]
    out = cross_attention(**given).sum()
    with torch.no_grad():
        given[written].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves)


def test_random_cases_agree_between_backends():
    seed = random.randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        samples, images, tokens = rng.randint(0, 6), rng.randint(1, 4), rng.randint(1, 70)
        tensors = draw(samples, rng.randint(1, 40), images, tokens, rng.randint(1, 3), rng.randint(1, 20))
        options = {"image_index": torch.randint(images, (samples,), dtype=torch.int32)}
        if rng.random() < 0.5:
            options["image_lengths"] = torch.randint(tokens + 1, (images,), dtype=torch.int32)
        results = [
            gradients(lambda *t, o=options, b=backend: cross_attention(*t, **o, backend=b), tensors)
            for backend in BACKENDS
        ]
        for a, b in zip(*results, strict=True):
            assert max_error(a, b) < 1e-12, seed


Q, K, V = (t.float() for t in draw(4, 5, 3, 7))
INDEX = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
BAD = [
    (
        {"q": Q.flatten(0, 1)},
        ValueError,
        "q: expected float16 or bfloat16 or float32 or float64 [S, Q, heads",
    ),
    ({"k": K.flatten(0, 1)}, ValueError, "k: expected float32 [images, tokens, 2, 8]"),
    ({"k": K.double()}, TypeError, "k: expected float32 [images, tokens, 2, 8], got float64"),
    ({"v": V[:, :6]}, ValueError, "v: expected [3, 7, 2, 8], got float32 [3, 6, 2, 8]"),
    ({"v": V.to("meta")}, ValueError, "v: expected a tensor on cpu, got one on meta"),
    (
        {"image_index": None},
        ValueError,
        "image_index: expected int32 [4] where 4 samples meet 3 images, got None",
    ),
    (
        {"image_index": INDEX.long()},
        TypeError,
        "image_index: expected int32 [4] with values in [0, 3), got int64 [4]",
    ),
    (
        {"image_index": [0, 1, 2, 0]},
        TypeError,
        "image_index: expected int32 [4] with values in [0, 3), got list",
    ),
    ({"image_index": INDEX[:3]}, ValueError, "image_index: expected int32 [4], got int32 [3]"),
    ({"image_index": INDEX + 1}, ValueError, "with values in [0, 3), got values in [1, 3]"),
    ({"image_index": INDEX - 1}, ValueError, "with values in [0, 3), got values in [-1, 1]"),
    (
        {"image_lengths": torch.tensor([1, 2, 8], dtype=torch.int32)},
        ValueError,
        "expected values in [0, 7], got",
    ),
    (
        {"image_lengths": torch.tensor([1, -2, 7], dtype=torch.int32)},
        ValueError,
        "image_lengths: expected values",
    ),
    (
        {"image_lengths": torch.tensor([1, 2, 3])},
        TypeError,
        "image_lengths: expected int32 [3], got int64 [3]",
    ),
    ({"image_lengths": INDEX}, ValueError, "image_lengths: expected int32 [3], got int32 [4]"),
    ({"image_mask": torch.ones(4, 7)}, ValueError, "image_mask: expected"),
    ({"image_mask": torch.ones(3, 7) * 0.5}, ValueError, "image_mask: expected only 0 and 1, got 0.5"),
    (
        {"image_mask": torch.ones(3, 7), "image_lengths": INDEX[:3]},
        ValueError,
        "image_mask: expected None beside",
    ),
    ({"row_keys": torch.zeros(4, 5)}, TypeError, "row_keys: expected int32 [4, 5], got float32 [4, 5]"),
    ({"row_keys": torch.zeros(4, 4, dtype=torch.int32)}, ValueError, "row_keys: expected int32 [4, 5]"),
    ({"dropout": -0.5}, ValueError, "dropout: expected a number in [0, 1), got -0.5"),
    ({"dropout": 0.5}, ValueError, "dropout_key: expected an int64 [] tensor"),
    (
        {"dropout": 0.5, "dropout_key": torch.tensor(1), "backend": "torch"},
        ValueError,
        "'torch' cannot serve",
    ),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
    ({"validate": "x"}, TypeError, "validate: expected a bool, got str 'x'"),
    (
        {"backend": "flash"},
        ValueError,
        "backend: expected one of 'auto', 'triton', 'torch', 'reference', got str 'flash'",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    good = {"q": Q, "k": K, "v": V, "image_index": INDEX}
    cross_attention(**good)
    with pytest.raises(error) as caught:
        cross_attention(**(good | change))
    assert words in str(caught.value)
