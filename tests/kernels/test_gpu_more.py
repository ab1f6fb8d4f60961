"""Latent attention, the similarity of images and texts, and torch's own attention on a GPU."""

import cross_cases
import pytest
import self_cases
import torch
from cross_cases import CrossCase
from on_gpu import captured, no_synchronisation, on_a_busy_stream
from self_cases import B, C, SelfCase, U
from test_image_text_similarity_kernels import draw as draw_features
from test_latent_attention_kernels import draw, draw_visibility
from tolerances import assert_yardstick

from blip2_kernels.device_errors import check_device_errors
from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops import cross_attention, image_text_similarity, latent_attention, self_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LATENT = [(384, 257, 1408), (384, 257, 1024), (33, 65, 100), (7, 31, 33)]
"""Rows, tokens, width."""
SIMILAR = [(12, 130, 32, 256), (9, 33, 32, 64), (5, 7, 33, 31)]
"""Images, texts, queries, channels."""


def to_device(tensors):
    return [t.to(DEVICE) for t in tensors]


def latent_case(sizes, dtype, visible="all", samples=3, images=2):
    """Tensors and options of latent attention; the last image may have no visible token."""
    rows, tokens, width = sizes
    tensors = to_device(draw(samples, rows, images, tokens, width, dtype))
    options = draw_visibility(visible, images, tokens)
    options["image_index"] = torch.randint(images, (samples,), dtype=torch.int32)
    return tensors, {name: t.to(DEVICE) for name, t in options.items()} | {"scale": 64**-0.5}


def latent(tensors, options, backend="triton", dtype=None):
    return latent_attention(*(t.to(dtype or t.dtype) for t in tensors), **options, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LATENT, ids=str)
def test_latent_attention(sizes, dtype, backend):
    for visible in ("all", "lengths", "mask"):
        tensors, options = latent_case(sizes, dtype, visible)
        plain = latent(tensors, options, "reference")
        truth = latent(tensors, options, "reference", torch.float64)
        assert_yardstick(f"out ({visible})", latent(tensors, options, backend), plain, truth)


def similar(tensors, backend="triton", dtype=None):
    """Output and the gradients of a random projection of it."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = image_text_similarity(*leaves, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(tensors[0].dtype).to(out.dtype))]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIMILAR, ids=str)
def test_image_text_similarity(sizes, dtype, backend):
    tensors = to_device(draw_features(*sizes, dtype))
    plain, truth = similar(tensors, "reference"), similar(tensors, "reference", torch.float64)
    for name, *values in zip(
        ("out", "d_image", "d_text"), similar(tensors, backend), plain, truth, strict=True
    ):
        assert_yardstick(name, *values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [self_cases, cross_cases], ids=["self", "cross"])
def test_attention_through_torch_s_own(module, dtype):
    """Texts without a token and images without a visible one among them."""
    if module is self_cases:
        options = {"width": 32, "dtype": dtype, "heads": 12, "device": DEVICE}
        cases = [
            SelfCase((), lengths=(), **options),
            SelfCase((B,), lengths=((7, 31, 0),), **options),
            SelfCase((U, C), lengths=((7, 31, 1),) * 2, **options),
            SelfCase((B,), lengths=((7, 31, 0),), padded=True, **options),
        ]
    else:
        options = {"tokens": 257, "dtype": dtype, "heads": 12, "device": DEVICE}
        cases = [
            CrossCase(visible=visible, index=(0, 1, 1, 0), samples=4, **options)
            for visible in ("every", "lengths", "mask")
        ]
    for case in cases:
        tensors = case.tensors(torch.Generator().manual_seed(0))
        plain = module.run(case, tensors, "reference")
        truth = module.run(case, tensors, "reference", torch.float64)
        got = module.run(case, tensors, "torch")
        for name, *values in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=True):
            assert_yardstick(f"{name} of {case}", *values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_without_a_visible_token_gives_zeros(dtype):
    q, k, v = (torch.randn(2, n, 12, 64, device=DEVICE).to(dtype).requires_grad_() for n in (32, 257, 257))
    mask = torch.ones(2, 257, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    for backend in ("triton", "torch", "reference"):
        out = cross_attention(q, k, v, image_mask=mask, backend=backend)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert (out[1] == 0).all() and (out[0] != 0).any(), backend
        assert all(torch.isfinite(g).all() and (g[1] == 0).all() for g in gradients), backend


# ----------------------------------------------------------------------- bits, streams, graphs, compilation


def calls():
    """Each op as a function without arguments, and the tensors that it reads."""
    tensors, options = latent_case(LATENT[0], torch.bfloat16, "mask")
    yield lambda: [latent(tensors, options)], [tensors[0], options["image_index"]]
    leaves = [t.requires_grad_() for t in to_device(draw_features(*SIMILAR[0], torch.bfloat16))]
    weight = torch.randn(SIMILAR[0][:2], device=DEVICE).bfloat16()

    def similarity():
        out = image_text_similarity(*leaves, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    yield similarity, [leaves[0], weight]


@pytest.fixture(params=[0, 1], ids=["latent", "similarity"])
def call(request):
    return list(calls())[request.param]


def assert_same_bits(results, others):
    for a, b in zip(results, others, strict=True):
        assert torch.equal(a, b)


def test_a_thousand_runs_give_the_same_bits(call):
    function, _ = call
    first = function()
    for _ in range(1000):
        assert_same_bits(first, function())


def test_a_stream_of_one_s_own(call):
    function, _ = call
    first = function()
    assert_same_bits(first, on_a_busy_stream(function))


def test_a_cuda_graph_replayed_on_other_numbers(call):
    function, (first, second) = call
    graph, outputs = captured(function)
    with torch.no_grad():
        first.mul_(-0.5)
        second.copy_(second.flip(0))
    graph.replay()
    assert_same_bits(outputs, function())


def test_no_synchronisation_in_a_call(call):
    function, _ = call
    function()
    with no_synchronisation():
        function()


def test_one_graph_of_latent_attention_under_compile():
    tensors, options = latent_case(LATENT[2], torch.float32, "mask")
    torch._dynamo.reset()
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    got = compiled(*tensors, **options, backend="triton")
    assert torch.equal(got, latent(tensors, options))


def with_gradients(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("module", [self_cases, cross_cases], ids=["self", "cross"])
def test_one_graph_of_an_attention_under_compile(module, dropout):
    if module is self_cases:
        case = SelfCase((U, C), 32, ((20, 3, 31),) * 2, dtype=torch.bfloat16, device=DEVICE)
        layout = case.layouts()[0]
        key = torch.tensor(7, device=DEVICE)

        def attend(q, k, v):
            options = {"dropout": dropout, "dropout_key": key, "backend": "triton"}
            return self_attention(q, k, v, layout, layout, AttentionMask(case.modes), **options)
    else:
        case = CrossCase(
            (0, 1, 1), 3, 2, 257, dtype=torch.bfloat16, device=DEVICE, dropout=dropout, visible="mask"
        )
        options = case.options()

        def attend(q, k, v):
            return cross_attention(q, k, v, backend="triton", **options)

    tensors = case.tensors(torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same_bits(with_gradients(compiled, tensors), with_gradients(attend, tensors))


def test_one_graph_of_the_similarity_under_compile():
    tensors = to_device(draw_features(*SIMILAR[1], torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(image_text_similarity, fullgraph=True, backend="aot_eager")

    def run(function):
        return with_gradients(lambda a, b: function(a, b, backend="triton"), tensors)

    assert_same_bits(run(compiled), run(image_text_similarity))


def test_opcheck():
    operators = torch.ops.blip2_kernels
    q, features = to_device(draw(3, 5, 2, 7, 16))
    index = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    mask = torch.ones(2, 7, dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(operators.latent_attention, (q, features, index, mask, 0.25))
    image, text = (t.requires_grad_() for t in to_device(draw_features(3, 5, 4, 16)))
    torch.library.opcheck(operators.image_text_similarity, (image, text, True))


def test_a_wrong_index_is_reported_for_a_device_without_a_number():
    tensors, options = latent_case(LATENT[2], torch.float32)
    check_device_errors()
    latent(tensors, options | {"image_index": torch.full_like(options["image_index"], 99)})
    with pytest.raises(IndexError, match="image_index"):
        check_device_errors(DEVICE)
    check_device_errors()
