"""image_text_similarity: every backend against the maximum written out, and what each holds in memory."""

import random

import pytest
import torch
from largest_tensor import LargestTensor
from tolerances import assert_yardstick, max_error

from blip2_kernels.model.losses import contrastive_similarities
from blip2_kernels.ops import image_text_similarity
from blip2_kernels.ops.image_text_similarity import chunked

BACKENDS = ["reference", "torch"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def draw(images=3, texts=4, queries=5, channels=8, dtype=torch.float64):
    shapes = [(images, queries, channels), (texts, channels)]
    return [
        torch.nn.functional.normalize(torch.randn(s, dtype=torch.float64), dim=-1).to(dtype) for s in shapes
    ]


def naive(image_feats, text_feats):
    """One image at a time; the dtype of its inputs throughout."""
    if not len(image_feats):
        return image_feats.new_zeros(0, len(text_feats))
    return torch.stack([torch.stack([text_feats @ q for q in image]).amax(0) for image in image_feats])


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "texts", "queries", "channels"),
    # Odd sizes everywhere; 32 queries and 256 channels are BLIP-2's.
    [(1, 1, 1, 1), (7, 31, 33, 7), (33, 7, 1, 257), (2, 257, 31, 33), (5, 6, 32, 256), (1, 33, 257, 31)],
)
def test_against_the_definition(backend, dtype, images, texts, queries, channels):
    tensors = draw(images, texts, queries, channels, dtype)
    got = gradients(lambda *t: image_text_similarity(*t, backend=backend), tensors)
    plain = gradients(naive, tensors)
    truth = gradients(naive, [t.double() for t in tensors])
    for name, *values in zip(("out", "d_image", "d_text"), got, plain, truth, strict=True):
        assert values[0].dtype == dtype
        assert_yardstick(name, *values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_without_gradients_the_values_are_the_same(backend, dtype):
    tensors = draw(9, 33, 31, 64, dtype)
    with_gradients = gradients(lambda *t: image_text_similarity(*t, backend=backend), tensors)[0]
    assert torch.equal(image_text_similarity(*tensors, backend=backend), with_gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_queries_the_first_gets_the_gradient(backend):
    image, text = draw(2, 3, 6, 4)
    image[0, 4], image[0, 1] = text[2], text[2]
    image[1] = image[1, :1]
    out, d_image, _ = gradients(lambda *t: image_text_similarity(*t, backend=backend), (image, text))
    assert max_error(out[0, 2], torch.ones((), dtype=torch.float64)) < 1e-12
    assert (d_image[0, 4] == 0).all() and (d_image[0, 1] != 0).all()
    assert (d_image[1, 1:] == 0).all() and (d_image[1, 0] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_queries_are_told_apart_before_they_are_rounded(backend, dtype):
    """Scores 1 and 1 + 1e-5 are the same number in half precision; the larger one gets the gradient."""
    step = 2.0**-14 if dtype == torch.float16 else 1e-5
    image = torch.tensor([[[1.0, 0.0], [1.0, step], [1.0, 0.0]]], dtype=dtype)
    text = torch.tensor([[1.0, 1.0]], dtype=dtype)
    _, d_image, _ = gradients(lambda *t: image_text_similarity(*t, backend=backend), (image, text))
    assert (d_image[0, 1] != 0).all() and (d_image[0, [0, 2]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_nan_among_the_scores_is_the_result(backend, needs_gradient):
    image, text = draw(3, 4, 5, 8, torch.float32)
    clean = image_text_similarity(image, text, backend=backend)
    image[1, 3], image[1, 2, 0] = float("nan"), float("nan")
    text[3] = float("inf")
    out = image_text_similarity(image.requires_grad_(needs_gradient), text, backend=backend)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2], :3], clean[[0, 2], :3])
    expected = (image[[0, 2]].detach() @ text[3]).max(1).values
    assert torch.equal(out[[0, 2], 3].isnan(), expected.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_scores(backend):
    image = torch.full((2, 3, 1), float("-inf"))
    image[1, 2] = float("inf")
    out, d_image, _ = gradients(
        lambda *t: image_text_similarity(*t, backend=backend), (image, torch.ones(1, 1))
    )
    assert out.tolist() == [[float("-inf")], [float("inf")]]
    assert (d_image != 0).squeeze(-1).tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("images", "texts"), [(0, 3), (3, 0), (0, 0)])
def test_empty_batches(backend, images, texts):
    tensors = draw(images, texts)
    out, d_image, d_text = gradients(lambda *t: image_text_similarity(*t, backend=backend), tensors)
    assert out.shape == (images, texts)
    assert d_image.shape == (images, 5, 8) and (d_image == 0).all()
    assert d_text.shape == (texts, 8) and (d_text == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    image = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    text = torch.randn(9, 16, dtype=torch.float64)[1::2, 3:11]
    assert image.stride(-1) != 1 and not text.is_contiguous()
    got = gradients(lambda *t: image_text_similarity(*t, backend=backend), (image, text))
    direct = image_text_similarity(image, text, backend=backend)
    for a, b in zip([direct, *got], [naive(image, text), *gradients(naive, (image, text))], strict=True):
        assert max_error(a, b) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_repeated_runs_give_the_same_bits(backend, dtype):
    tensors = draw(5, 33, 31, 33, dtype)
    runs = [gradients(lambda *t: image_text_similarity(*t, backend=backend), tensors) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_and_texts_permute(backend):
    image, text = draw(7, 33, 31, 16)
    rows, columns = torch.randperm(7), torch.randperm(33)
    out = image_text_similarity(image, text, backend=backend)
    permuted = image_text_similarity(image[rows], text[columns], backend=backend)
    assert max_error(out[rows][:, columns], permuted) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    leaves = [t.requires_grad_() for t in draw(3, 4, 5, 3)]
    assert torch.autograd.gradcheck(lambda *t: image_text_similarity(*t, backend=backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_op_changes_nothing(backend, dtype):
    tensors = draw(dtype=dtype)

    def similarity(image, text, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return image_text_similarity(image, text, backend=backend)

    results = [gradients(lambda *t, e=e: similarity(*t, e), tensors) for e in (False, True)]
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


def test_it_is_what_the_contrastive_loss_compares():
    image, text = draw(4, 4)
    temperature = torch.tensor(0.07, dtype=torch.float64)
    i2t, t2i = contrastive_similarities(image, text, temperature)
    out = image_text_similarity(image, text) / temperature
    assert max_error(out, i2t) < 1e-14 and max_error(out.t(), t2i) < 1e-14


@pytest.mark.parametrize(("backend", "bounded"), [("torch", True), ("reference", False)])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_how_many_scores_are_held(monkeypatch, backend, bounded, needs_gradient):
    """The reference holds them all, which shows that the measure measures."""
    monkeypatch.setattr(chunked, "MAX_SCORES", 2000)
    tensors = [t.requires_grad_(needs_gradient) for t in draw(20, 30, 16, 4, torch.float32)]
    with LargestTensor() as largest:
        out = image_text_similarity(*tensors, backend=backend)
        if needs_gradient:
            out.sum().backward()
    assert largest.elements == (4 * 16 * 30 if bounded else 20 * 16 * 30)
    assert max_error(out.detach(), naive(*tensors).detach()) < 1e-5


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_one_graph_under_compile(backend):
    tensors = draw(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(image_text_similarity, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(lambda *t: compiled(*t, backend=backend), tensors),
        gradients(lambda *t: image_text_similarity(*t, backend=backend), tensors),
        strict=True,
    ):
        assert max_error(a, b.double()) < 1e-6


def test_random_cases_agree_between_backends(seed):
    rng = random.Random(seed)
    for _ in range(60):
        sizes = rng.randint(0, 9), rng.randint(0, 40), rng.randint(1, 40), rng.randint(1, 20)
        tensors = draw(*sizes)
        results = [
            gradients(lambda *t, b=backend: image_text_similarity(*t, backend=b), tensors)
            for backend in BACKENDS
        ]
        for a, b in zip(*results, strict=True):
            assert max_error(a, b) < 1e-12, sizes


IMAGE, TEXT = (t.float() for t in draw())
FLOATS = "float16 or bfloat16 or float32 or float64"
BAD = [
    ({"image_feats": None}, TypeError, f"image_feats: expected a tensor {FLOATS} [B, Q, E], got NoneType"),
    (
        {"image_feats": IMAGE.tolist()},
        TypeError,
        f"image_feats: expected a tensor {FLOATS} [B, Q, E], got list",
    ),
    ({"image_feats": IMAGE.numpy()}, TypeError, "image_feats: expected a tensor"),
    ({"image_feats": 3.0}, TypeError, "image_feats: expected a tensor"),
    ({"image_feats": IMAGE[0]}, ValueError, "image_feats: expected float16"),
    ({"image_feats": IMAGE[None]}, ValueError, "[B, Q, E], got float32 [1, 3, 5, 8]"),
    ({"image_feats": IMAGE.long()}, TypeError, "[B, Q, E], got int64 [3, 5, 8]"),
    ({"image_feats": IMAGE.bool()}, TypeError, "image_feats: expected float16"),
    ({"image_feats": IMAGE.to(torch.complex64)}, TypeError, "[B, Q, E], got complex64 [3, 5, 8]"),
    ({"image_feats": IMAGE.to(torch.float8_e4m3fn)}, TypeError, "[B, Q, E], got float8_e4m3fn [3, 5, 8]"),
    (
        {"image_feats": IMAGE[:, :0]},
        ValueError,
        "image_feats: expected at least one query and one channel, got float32 [3, 0, 8]",
    ),
    (
        {"image_feats": IMAGE[:, :, :0], "text_feats": TEXT[:, :0]},
        ValueError,
        "image_feats: expected at least one query and one channel, got float32 [3, 5, 0]",
    ),
    ({"image_feats": IMAGE[:, :, :7]}, ValueError, "text_feats: expected float32 [T, 7], got float32 [4, 8]"),
    ({"image_feats": IMAGE.half()}, TypeError, "text_feats: expected float16 [T, 8], got float32 [4, 8]"),
    ({"image_feats": IMAGE.to("meta")}, ValueError, "text_feats: expected a tensor on meta, got one on cpu"),
    ({"text_feats": None}, TypeError, "text_feats: expected a tensor float32 [T, 8], got NoneType"),
    ({"text_feats": TEXT.tolist()}, TypeError, "text_feats: expected a tensor float32 [T, 8], got list"),
    ({"text_feats": "a cat"}, TypeError, "text_feats: expected a tensor float32 [T, 8], got str 'a cat'"),
    ({"text_feats": TEXT[0]}, ValueError, "text_feats: expected float32 [T, 8], got float32 [8]"),
    ({"text_feats": TEXT[None]}, ValueError, "text_feats: expected float32 [T, 8], got float32 [1, 4, 8]"),
    ({"text_feats": TEXT.t()}, ValueError, "text_feats: expected float32 [T, 8], got float32 [8, 4]"),
    ({"text_feats": TEXT[:, 1:]}, ValueError, "text_feats: expected float32 [T, 8], got float32 [4, 7]"),
    ({"text_feats": TEXT.double()}, TypeError, "text_feats: expected float32 [T, 8], got float64 [4, 8]"),
    ({"text_feats": TEXT.bfloat16()}, TypeError, "text_feats: expected float32 [T, 8], got bfloat16 [4, 8]"),
    ({"text_feats": TEXT.int()}, TypeError, "text_feats: expected float32 [T, 8], got int32 [4, 8]"),
    ({"text_feats": TEXT.to("meta")}, ValueError, "text_feats: expected a tensor on cpu, got one on meta"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'triton', 'torch', 'reference', got"),
    ({"backend": None}, ValueError, "backend: expected one of"),
    ({"backend": ["torch"]}, ValueError, "backend: expected one of"),
    (
        {"backend": "triton", "image_feats": IMAGE.double(), "text_feats": TEXT.double()},
        ValueError,
        "backend: 'triton' cannot serve this call: image_feats is float64",
    ),
    (
        {"backend": "triton", "text_feats": TEXT.t().contiguous().t()},
        ValueError,
        "backend: 'triton' cannot serve this call: the last dimension of text_feats is not contiguous",
    ),
    ({"bakend": "torch"}, TypeError, "unexpected keyword argument"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    good = {"image_feats": IMAGE, "text_feats": TEXT}
    image_text_similarity(**good)
    with pytest.raises(error) as caught:
        image_text_similarity(**(good | change))
    assert words in str(caught.value)
