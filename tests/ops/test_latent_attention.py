"""latent_attention: every backend against attention written out, and the cross-attention it absorbs."""

import random

import pytest
import torch
from largest_tensor import LargestTensor
from tolerances import assert_yardstick, max_error

from blip2_kernels.ops import cross_attention, latent_attention

BACKENDS = ["reference", "torch"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.3


def draw(samples=4, rows=5, images=3, tokens=7, width=8, dtype=torch.float64):
    shapes = [(samples, rows, width), (images, tokens, width)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def naive(q, features, index, visible, scale=SCALE):
    """One sample and one row at a time; the dtype of its inputs throughout."""
    out = torch.zeros_like(q)
    for s, image in enumerate(index):
        seen = features[image, visible[image].nonzero().flatten()]
        for r in range(q.shape[1]):
            if len(seen):
                out[s, r] = (seen @ q[s, r] * scale).softmax(0) @ seen
    return out


def everything(features):
    return torch.ones(features.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tokens", "width"), [(1, 1, 1), (7, 31, 33), (33, 257, 7), (12, 7, 257)])
@pytest.mark.parametrize("index", [None, [2, 2, 0, 2, 0], [1]], ids=["own", "shared", "one"])
def test_against_the_definition(backend, dtype, rows, tokens, width, index):
    q, features = draw(3 if index is None else len(index), rows, 3, tokens, width, dtype)
    image_index = None if index is None else torch.tensor(index, dtype=torch.int32)
    looking, visible = index or [0, 1, 2], everything(features)
    scale = width**-0.5
    got = latent_attention(q, features, scale=scale, image_index=image_index, backend=backend)
    plain = naive(q, features, looking, visible, scale)
    truth = naive(q.double(), features.double(), looking, visible, scale)
    assert got.dtype == dtype
    assert_yardstick("out", got, plain, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_cross_attention_it_absorbs(backend):
    """Section 3.1's attention with keys I W_k and values I W_v, without ever making either."""
    samples, queries, heads, head_dim, images, tokens, width = 3, 4, 2, 5, 2, 11, 13
    q = torch.randn(samples, queries, heads, head_dim, dtype=torch.float64)
    w_k, w_v = torch.randn(2, width, heads, head_dim, dtype=torch.float64)
    features = torch.randn(images, tokens, width, dtype=torch.float64)
    options = {
        "image_index": torch.tensor([1, 0, 1], dtype=torch.int32),
        "image_lengths": torch.tensor([11, 6], dtype=torch.int32),
    }
    key, value = (torch.einsum("ntw,whd->nthd", features, w) for w in (w_k, w_v))
    expected = cross_attention(q, key, value, **options)
    absorbed = torch.einsum("sqhd,whd->sqhw", q, w_k).reshape(samples, queries * heads, width)
    mixed = latent_attention(absorbed, features, scale=head_dim**-0.5, **options, backend=backend)
    out = torch.einsum("sqhw,whd->sqhd", mixed.view(samples, queries, heads, width), w_v)
    assert max_error(out, expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", [1, 3])
def test_lengths_and_masks(backend, images):
    q, features = draw(4, 5, images, 9)
    index = [0, images - 1, 0, images // 2]
    options = {"image_index": torch.tensor(index, dtype=torch.int32), "backend": backend, "scale": SCALE}
    lengths = torch.tensor([4, 9, 0][:images], dtype=torch.int32)
    dtypes = (torch.bool, torch.uint8, torch.int64, torch.float16)
    for visible, extra in (
        (torch.arange(9) < lengths[:, None], {"image_lengths": lengths}),
        *(((m := torch.rand(images, 9) < 0.5), {"image_mask": m.to(d)}) for d in dtypes),
    ):
        got = latent_attention(q, features, **options, **extra)
        assert max_error(got, naive(q, features, index, visible)) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_an_image_with_no_visible_token_gives_zero(backend, tokens):
    q, features = draw(2, 3, 2, tokens)
    lengths = torch.tensor([0, tokens], dtype=torch.int32)
    out = latent_attention(q, features, scale=SCALE, image_lengths=lengths, backend=backend)
    assert (out[0] == 0).all()
    assert ((out[1] != 0) == bool(tokens)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_in_hidden_tokens_changes_no_bit(backend, dtype, poison):
    q, features = draw(3, 4, 3, 6, dtype=dtype)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 0]])
    clean = latent_attention(q, features, scale=SCALE, image_mask=mask, backend=backend)
    features[mask == 0] = poison
    dirty = latent_attention(q, features, scale=SCALE, image_mask=mask, backend=backend)
    assert torch.equal(clean, dirty) and torch.isfinite(clean).all()


@pytest.mark.parametrize("index", [None, [1, 0]])
def test_poison_in_hidden_tokens_changes_no_bit_under_compile(index):
    """Where the values of a mask cannot be asked for, the backend `torch` takes another way."""
    q, features = draw(2, 4, 2, 6, dtype=torch.float32)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0], [0] * 6])
    options = {"scale": SCALE, "image_mask": mask, "backend": "torch"}
    options["image_index"] = None if index is None else torch.tensor(index, dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    clean = compiled(q, features, **options)
    features[mask == 0] = float("nan")
    assert torch.equal(compiled(q, features, **options), clean) and torch.isfinite(clean).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_not_rounded_to_half_precision(backend, dtype):
    """Scores 1 and 1 + 2^-9 are the same bf16 number; with a large scale one weighs e times the other."""
    step = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    q = torch.tensor([[[1.0, 1.0]]], dtype=dtype)
    features = torch.tensor([[[1.0, 0.0], [1.0, step]]], dtype=dtype)
    out = latent_attention(q, features, scale=1 / step, backend=backend)
    weight = torch.tensor(1.0).sigmoid().item()
    assert abs(out[0, 0, 1].item() / step - weight) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_visible_nan_spoils_its_image_only(backend):
    q, features = draw(3, 4, 3, 6)
    clean = latent_attention(q, features, scale=SCALE, backend=backend)
    features[1, 2, 3] = float("nan")
    out = latent_attention(q, features, scale=SCALE, backend=backend)
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [None, [1, 0, 1]])
def test_any_strides(backend, index):
    features = torch.randn(9, 8, 3, dtype=torch.float64).permute(2, 0, 1)[:, 1:8]
    q = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    assert q.stride(-1) != 1 and not features.is_contiguous()
    image_index = None if index is None else torch.tensor(index, dtype=torch.int32)
    out = latent_attention(q, features, scale=SCALE, image_index=image_index, backend=backend)
    assert max_error(out, naive(q, features, index or [0, 1, 2], everything(features))) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("samples", "rows", "images"), [(0, 5, 0), (0, 5, 3), (3, 0, 3)])
def test_empty_batches(backend, samples, rows, images):
    q, features = draw(samples, rows, images)
    index = torch.arange(samples, dtype=torch.int32)
    out = latent_attention(q, features, scale=SCALE, image_index=index, backend=backend)
    assert out.shape == (samples, rows, 8) and out.dtype == q.dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_repeated_runs_give_the_same_bits(backend, dtype):
    q, features = draw(5, 33, 3, 31, 33, dtype)
    index = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32)
    runs = [latent_attention(q, features, scale=SCALE, image_index=index, backend=backend) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_and_images_permute(backend):
    q, features = draw(6, 4, 3, 9)
    index = torch.tensor([2, 0, 1, 1, 2, 0], dtype=torch.int32)
    lengths = torch.tensor([9, 3, 5], dtype=torch.int32)
    out = latent_attention(
        q, features, scale=SCALE, image_index=index, image_lengths=lengths, backend=backend
    )
    samples, images = torch.randperm(6), torch.randperm(3)
    moved = images.argsort().int()[index.long()][samples]
    permuted = latent_attention(
        q[samples],
        features[images],
        scale=SCALE,
        image_index=moved,
        image_lengths=lengths[images],
        backend=backend,
    )
    assert max_error(out[samples], permuted) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_op_changes_nothing(backend, dtype):
    q, features = draw(images=4, dtype=dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(latent_attention(q, features, scale=SCALE, backend=backend))
    assert results[0].dtype == dtype and torch.equal(*results)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["q", "features"])
def test_a_tensor_that_wants_a_gradient_is_refused_where_gradients_are_recorded(backend, name):
    tensors = dict(zip(("q", "features"), draw(images=4), strict=True))
    tensors[name].requires_grad_()
    expected = f"{name}: expected a tensor without gradient, .* got one with requires_grad=True"
    with pytest.raises(ValueError, match=expected):
        latent_attention(**tensors, scale=SCALE, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not latent_attention(**tensors, scale=SCALE, backend=backend).requires_grad


@pytest.mark.parametrize(("backend", "copies"), [("torch", False), ("reference", True)])
@pytest.mark.parametrize("hidden", [False, True])
def test_features_of_a_shared_image_are_not_copied(backend, copies, hidden):
    """The reference copies them, which shows that the measure measures."""
    q, features = draw(16, 1, 2, 40, 32)
    index = torch.arange(16, dtype=torch.int32) % 2
    lengths = torch.tensor([40, 30], dtype=torch.int32) if hidden else None
    with LargestTensor() as largest:
        latent_attention(q, features, scale=SCALE, image_index=index, image_lengths=lengths, backend=backend)
    assert (largest.elements >= 16 * 40 * 32) if copies else (largest.elements <= features.numel())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("visible", ["all", "lengths", "mask"])
@pytest.mark.parametrize("index", [None, [1, 0]])
def test_one_graph_under_compile(backend, visible, index):
    q, features = draw(2, 3, 2, dtype=torch.float32)
    options = {"scale": SCALE, "backend": backend}
    options["image_index"] = None if index is None else torch.tensor(index, dtype=torch.int32)
    if visible == "lengths":
        options["image_lengths"] = torch.tensor([7, 3], dtype=torch.int32)
    if visible == "mask":
        options["image_mask"] = torch.rand(2, 7) < 0.5
    torch._dynamo.reset()
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    expected = latent_attention(q, features, **options)
    assert max_error(compiled(q, features, **options), expected.double()) < 1e-5


def test_one_shared_image_under_compile():
    q, features = draw(4, 3, 1, dtype=torch.float32)
    options = {"scale": SCALE, "image_index": torch.zeros(4, dtype=torch.int32), "backend": "torch"}
    torch._dynamo.reset()
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    expected = latent_attention(q, features, **options)
    assert max_error(compiled(q, features, **options), expected.double()) < 1e-5


def test_random_cases_agree_between_backends(seed):
    rng = random.Random(seed)
    for _ in range(60):
        samples, images, tokens = rng.randint(0, 6), rng.randint(1, 4), rng.randint(1, 70)
        q, features = draw(samples, rng.randint(1, 40), images, tokens, rng.randint(1, 40))
        options = {"image_index": torch.randint(images, (samples,), dtype=torch.int32), "scale": 0.2}
        if rng.random() < 0.5:
            options["image_lengths"] = torch.randint(tokens + 1, (images,), dtype=torch.int32)
        results = [latent_attention(q, features, **options, backend=backend) for backend in BACKENDS]
        assert max_error(*results) < 1e-12, options


Q, FEATURES = (t.float() for t in draw())
INDEX = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
LENGTHS = INDEX[:3]
FLOATS = "float16 or bfloat16 or float32 or float64"
BAD = [
    ({"q": None}, TypeError, f"q: expected a tensor {FLOATS} [S, R, width], got NoneType"),
    ({"q": Q.tolist()}, TypeError, "q: expected a tensor"),
    ({"q": Q[0]}, ValueError, f"q: expected {FLOATS} [S, R, width], got float32 [5, 8]"),
    ({"q": Q[None]}, ValueError, "q: expected"),
    ({"q": Q.int()}, TypeError, "[S, R, width], got int32 [4, 5, 8]"),
    ({"q": Q[:, :, :0], "features": FEATURES[:, :, :0]}, ValueError, "q: expected at least one channel, got"),
    ({"features": None}, TypeError, "features: expected a tensor float32 [images, tokens, 8], got NoneType"),
    (
        {"features": FEATURES[0]},
        ValueError,
        "features: expected float32 [images, tokens, 8], got float32 [7, 8]",
    ),
    (
        {"features": FEATURES[..., :5]},
        ValueError,
        "features: expected float32 [images, tokens, 8], got float32",
    ),
    (
        {"features": FEATURES.double()},
        TypeError,
        "features: expected float32 [images, tokens, 8], got float64",
    ),
    ({"features": FEATURES.to("meta")}, ValueError, "features: expected a tensor on cpu, got one on meta"),
    (
        {"image_index": None},
        ValueError,
        "image_index: expected int32 [4] where 4 samples meet 3 images, got None",
    ),
    (
        {"image_index": INDEX.long()},
        TypeError,
        "image_index: expected int32 [4] with values in [0, 3), got int64",
    ),
    (
        {"image_index": [0, 1, 2, 0]},
        TypeError,
        "image_index: expected int32 [4] with values in [0, 3), got list",
    ),
    ({"image_index": INDEX[:3]}, ValueError, "image_index: expected int32 [4], got int32 [3]"),
    ({"image_index": INDEX[:, None]}, ValueError, "image_index: expected int32 [4], got int32 [4, 1]"),
    ({"image_index": INDEX + 1}, ValueError, "with values in [0, 3), got values in [1, 3]"),
    ({"image_index": INDEX - 1}, ValueError, "with values in [0, 3), got values in [-1, 1]"),
    ({"image_index": INDEX.to("meta")}, ValueError, "image_index: expected a tensor on cpu, got one on meta"),
    (
        {"features": FEATURES[:0]},
        ValueError,
        "image_index: expected int32 [0] where there is no image, got int32 [4]",
    ),
    (
        {"image_lengths": LENGTHS + 6},
        ValueError,
        "image_lengths: expected values in [0, 7], got values in [6, 8]",
    ),
    (
        {"image_lengths": LENGTHS - 1},
        ValueError,
        "image_lengths: expected values in [0, 7], got values in [-1, 1]",
    ),
    ({"image_lengths": LENGTHS.long()}, TypeError, "image_lengths: expected int32 [3], got int64 [3]"),
    ({"image_lengths": [1, 2, 3]}, TypeError, "image_lengths: expected a tensor int32 [3], got list"),
    ({"image_lengths": INDEX}, ValueError, "image_lengths: expected int32 [3], got int32 [4]"),
    ({"image_mask": torch.ones(4, 7)}, ValueError, "image_mask: expected"),
    ({"image_mask": torch.ones(3, 7) * 0.5}, ValueError, "image_mask: expected only 0 and 1, got 0.5"),
    ({"image_mask": torch.full((3, 7), 2)}, ValueError, "image_mask: expected only 0 and 1, got 2"),
    ({"image_mask": torch.ones(3, 7, dtype=torch.complex64)}, TypeError, "image_mask: expected"),
    (
        {"image_mask": torch.ones(3, 7), "image_lengths": LENGTHS},
        ValueError,
        "image_mask: expected None beside image_lengths, got both",
    ),
    ({"scale": None}, TypeError, "scale: expected a finite number, got NoneType"),
    ({"scale": True}, TypeError, "scale: expected a finite number, got bool True"),
    ({"scale": "0.1"}, TypeError, "scale: expected a finite number, got str '0.1'"),
    ({"scale": torch.tensor(0.1)}, TypeError, "scale: expected a finite number, got float32 []"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"validate": "x"}, TypeError, "validate: expected a bool, got str 'x'"),
    (
        {"backend": "flash"},
        ValueError,
        "backend: expected one of 'auto', 'triton', 'torch', 'reference', got",
    ),
    ({"backend": None}, ValueError, "backend: expected one of"),
    (
        {"backend": "triton", "q": Q.double(), "features": FEATURES.double()},
        ValueError,
        "backend: 'triton' cannot serve this call: q is float64",
    ),
    ({"dropout": 0.1}, TypeError, "unexpected keyword argument"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input(change, error, words):
    good = {"q": Q, "features": FEATURES, "image_index": INDEX, "scale": SCALE}
    latent_attention(**good)
    with pytest.raises(error) as caught:
        latent_attention(**(good | change))
    assert words in str(caught.value)


def test_the_scale_must_be_given():
    with pytest.raises(TypeError, match="scale"):
        latent_attention(Q, FEATURES, image_index=INDEX)
