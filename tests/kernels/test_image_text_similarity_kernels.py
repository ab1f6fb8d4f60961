"""The Triton kernels of image_text_similarity against the reference, in the interpreter."""

import random
from contextlib import ExitStack

import pytest
import torch
from harness import interpreter
from harness.fresh_process import call
from tolerances import assert_yardstick, max_error

from blip2_kernels.ops import image_text_similarity, launching
from blip2_kernels.ops.image_text_similarity import launch as launch_tables

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
"""In fp32 the interpreter's matrix products (NumPy's) depend on where in a tile a row lies."""


def draw(images, texts, queries, channels, dtype=torch.float32, memory="plain"):
    """Normalised features; "strided" ones lie in larger tensors with gaps between rows, at an offset."""
    tensors = []
    for shape in ((images, queries, channels), (texts, channels)):
        t = torch.nn.functional.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).to(dtype)
        if memory == "strided":
            larger = torch.full((*(2 * n for n in shape[:-1]), channels + 9), float("nan"), dtype=dtype)
            part = larger[(*(slice(1, 2 * n + 1, 2) for n in shape[:-1]), slice(5, channels + 5))]
            t = part.copy_(t)
        tensors.append(t)
    return tensors


def run(tensors, backend="triton", dtype=None, weight=None):
    """Output and the gradients of a random projection of it."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = image_text_similarity(*leaves, backend=backend)
    if weight is None:
        weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]


def check(tensors):
    got = run(tensors)
    plain, truth = run(tensors, "reference"), run(tensors, "reference", torch.float64)
    for name, *values in zip(("out", "d_image", "d_text"), got, plain, truth, strict=True):
        assert values[0].dtype == tensors[0].dtype
        assert_yardstick(name, *values)
    return got


# Every odd size in every place, the sizes of BLIP-2, and tiles that are just full or just not.
SIZES = [
    (1, 1, 1, 1),
    (7, 31, 33, 257),
    (31, 33, 1, 7),
    (33, 7, 31, 33),
    (3, 257, 7, 31),
    (2, 5, 257, 17),
    (257, 3, 1, 16),
    (5, 130, 32, 64),
    (4, 128, 32, 256),
    (9, 65, 64, 48),
    (3, 9, 16, 32),
    (2, 3, 2, 100),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "memory"),
    [(sizes, "plain") for sizes in SIZES] + [(sizes, "strided") for sizes in SIZES if max(sizes) < 200],
    ids=str,
)
def test_grid(sizes, dtype, memory):
    check(draw(*sizes, dtype, memory))


@pytest.mark.usefixtures("poisoned_memory")
def test_random_cases(kernel_cases, seed):
    rng = random.Random(seed)
    for _ in range(kernel_cases):
        sizes = rng.randint(1, 40), rng.randint(1, 140), rng.choice([1, 3, 8, 20, 32, 40]), rng.randint(1, 90)
        check(draw(*sizes, rng.choice(DTYPES), rng.choice(["plain", "strided"])))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("images", "texts"), [(0, 3), (3, 0), (0, 0)])
def test_empty_batches(images, texts):
    out, d_image, d_text = run(draw(images, texts, 5, 8))
    assert out.shape == (images, texts)
    assert d_image.shape == (images, 5, 8) and (d_image == 0).all()
    assert d_text.shape == (texts, 8) and (d_text == 0).all()


# ------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("queries", [32, 33])
def test_a_permuted_batch_gives_the_same_bits(dtype, queries):
    image, text = draw(7, 70, queries, 40, dtype)
    weight = torch.randn(7, 70)
    first = run((image, text), weight=weight)
    rows, columns = torch.randperm(7), torch.randperm(70)
    by_image = run((image[rows], text), weight=weight[rows])
    by_text = run((image, text[columns]), weight=weight[:, columns])
    assert torch.equal(by_image[0], first[0][rows]) and torch.equal(by_image[1], first[1][rows])
    assert torch.equal(by_text[0], first[0][:, columns]) and torch.equal(by_text[2], first[2][columns])


@pytest.mark.parametrize("dtype", HALF)
def test_a_pair_s_similarity_does_not_depend_on_the_batch(dtype):
    image, text = draw(9, 150, 32, 48, dtype)
    out = image_text_similarity(image, text, backend="triton")
    for rows, columns in (
        (slice(4, 5), slice(0, 150)),
        (slice(0, 9), slice(77, 78)),
        (slice(3, 8), slice(9, 99)),
    ):
        part = image_text_similarity(image[rows], text[columns], backend="triton")
        assert torch.equal(part, out[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_give_the_same_bits(dtype):
    tensors = draw(7, 70, 33, 40, dtype)
    for a, b in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ["reversed", 5])
def test_the_order_of_programs_does_not_matter(order):
    tensors = draw(20, 150, 33, 40, torch.bfloat16)
    forward = run(tensors)
    with interpreter.guard(order=order):
        other = run(tensors)
    for a, b in zip(forward, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [6, 32, 70])
def test_of_equal_queries_the_first_gets_the_gradient(queries, dtype):
    """Small integers: every sum is exact, so that nothing but the ties decides."""
    image = torch.randint(-2, 3, (5, queries, 17)).to(dtype)
    text = torch.randint(-2, 3, (33, 17)).to(dtype)
    scores = image.double() @ text.double().t()
    ties = (scores == scores.amax(1, keepdim=True)).sum(1) > 1
    assert ties.any()
    weight = torch.randint(-3, 4, (5, 33)).double()
    truth = run((image, text), "reference", torch.float64, weight)
    for got, expected in zip(run((image, text), weight=weight), truth, strict=True):
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("queries", [5, 32, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_those_of_the_reference(queries, dtype):
    """Also which of several NaN among an image's scores gets the gradient: the first, as of equal numbers."""
    image, text = draw(6, 9, queries, 16, dtype)
    image[1, queries // 2], image[1, queries - 1, 3] = float("nan"), float("nan")
    image[2] = float("nan")
    image[3, 1] = float("inf")
    image[4] = float("-inf")
    text[:] = text.abs() + 0.1
    text[5, 2] = float("nan")
    for backend in ("triton", "reference"):
        with torch.no_grad():
            out = image_text_similarity(image, text, backend=backend)
        assert out[1].isnan().all() and out[2].isnan().all() and out[:, 5].isnan().all()
        assert (out[3, :5] == float("inf")).all() and (out[4, :5] == float("-inf")).all()
    _, index = torch.ops.blip2_kernels.image_text_similarity(image, text, True)
    expected = (image.float() @ text.float().t()).max(1).indices
    certain = [1, 2, 3, 4]
    assert torch.equal(index[certain].long(), expected[certain])


def test_a_nan_replaces_a_number_of_an_earlier_block_and_stays():
    image, text = draw(1, 3, 70, 8)
    image[0, 40] = float("nan")
    image[0, 60], image[0, 69] = float("inf"), float("nan")
    text = text.abs()
    out, index = torch.ops.blip2_kernels.image_text_similarity(image, text, True)
    assert out.isnan().all() and index.tolist() == [[40, 40, 40]]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_each_side_gets_its_gradient_only_when_it_wants_one(wanted, launches):
    image, text = (t.requires_grad_(w) for t, w in zip(draw(3, 4, 5, 8), wanted, strict=True))
    image_text_similarity(image, text, backend="triton").sum().backward()
    kernels = [name for name, w in zip(("image", "text"), wanted, strict=True) if w]
    expected = ["forward_kernel", *(f"{name}_gradient_kernel" for name in kernels)]
    assert [launch.kernel for launch in launches] == expected
    assert (image.grad is not None, text.grad is not None) == wanted


def test_without_gradients_no_index_is_kept(monkeypatch):
    image, text = draw(3, 4, 5, 8)
    kept, launch = [], launching.launch

    def watch(kernel, grid, args, constants, config):
        kept.append((constants["KEEP_INDEX"], args[3].numel()))
        launch(kernel, grid, args, constants, config)

    monkeypatch.setattr(launching, "launch", watch)
    plain = image_text_similarity(image, text, backend="triton")
    image.requires_grad_()
    with torch.no_grad():
        assert torch.equal(image_text_similarity(image, text, backend="triton"), plain)
    assert torch.equal(image_text_similarity(image, text, backend="triton"), plain)
    assert kept == [(False, 0), (False, 0), (True, 12)]


def test_a_forward_that_kept_no_index_has_no_backward():
    image, text = (t.requires_grad_() for t in draw(3, 4, 5, 8))
    out, _ = torch.ops.blip2_kernels.image_text_similarity(image, text, False)
    with pytest.raises(RuntimeError, match="keep_index=True"):
        out.sum().backward()


def test_no_launch_holds_the_scores(launches):
    """Neither B * T * Q * E nor B * T * Q elements: what the kernels are given is inputs and outputs."""
    image, text = draw(8, 64, 32, 16)
    given = []
    launch = launching.launch

    def watch(kernel, grid, args, constants, config):
        given.extend(a.numel() for a in args if isinstance(a, torch.Tensor))
        launch(kernel, grid, args, constants, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "launch", watch)
        run((image, text))
    assert len(launches) == 3 and max(given) == image.numel() < 8 * 64 * 32


@pytest.mark.parametrize("far", ["images", "queries", "texts"])
def test_offsets_beyond_two_to_the_31_elements(far):
    """Features that lie far apart in a buffer of which only the pages that are touched exist."""
    image, text = draw(3, 4, 2, 16, torch.float16)
    step = 2**30 + 64
    strides = {"images": (step, 16, 1), "queries": (16, 2**31 + 64, 1), "texts": (32, 16, 1)}[far]
    wide_image = torch.empty_strided(image.shape, strides, dtype=image.dtype).copy_(image)
    wide_text = text
    if far == "texts":
        wide_text = torch.empty_strided(text.shape, (step, 1), dtype=text.dtype).copy_(text)
    assert launching.wide(wide_image, wide_text)
    for a, b in zip(run((image, text)), run((wide_image, wide_text)), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("memory", ["plain", "strided"])
def test_opcheck(memory):
    image, text = draw(3, 5, 4, 16, memory=memory)
    ops = torch.ops.blip2_kernels
    for keep in (False, True):
        torch.library.opcheck(ops.image_text_similarity, (image, text, keep))
    out, index = ops.image_text_similarity(image, text, True)
    grad = torch.randn_like(out)
    for some in (grad, grad.t().contiguous().t(), grad[:1, :1].expand_as(grad)):
        torch.library.opcheck(ops.image_text_similarity_image_backward, (some, text, index, 4))
        torch.library.opcheck(ops.image_text_similarity_text_backward, (some, image, index))
    leaves = [t.requires_grad_() for t in (image, text)]
    torch.library.opcheck(ops.image_text_similarity, (*leaves, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_and_transposed_gradients(dtype):
    tensors = draw(3, 33, 5, 16, dtype)
    for weight in (torch.ones(1, 1).expand(3, 33), torch.randn(33, 3).t()):
        for a, b in zip(run(tensors, weight=weight), run(tensors, weight=weight.contiguous()), strict=True):
            assert torch.equal(a, b)


def test_one_graph_under_compile():
    tensors = draw(3, 33, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(image_text_similarity, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = compiled(*leaves, backend="triton")
    weight = torch.randn(out.shape)
    got = [out.detach(), *torch.autograd.grad(out, leaves, weight)]
    for a, b in zip(got, run(tensors, weight=weight), strict=True):
        assert torch.equal(a, b)


def test_autocast_around_the_op_changes_nothing():
    tensors = draw(3, 33, 5, 16, torch.float16)
    plain = run(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(plain, run(tensors), strict=True):
            assert a.dtype == torch.float16 and torch.equal(a, b)


def test_tf32_where_torch_allows_it():
    """Its eleven bits are seen in the result, and only where they were asked for."""
    tensors = draw(4, 33, 32, 64)
    exact = run(tensors)
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        coarse = run(tensors)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    error = max_error(coarse[0], run(tensors, "reference", torch.float64)[0])
    assert 1e-5 < error < 1e-2 and not torch.equal(coarse[0], exact[0])


def test_a_configuration_that_does_not_fit_gives_way_to_the_next(monkeypatch):
    from triton.runtime.errors import OutOfResources

    tensors = draw(4, 70, 32, 64, torch.float16)
    launch, tried = launching.launch, []

    def refuse_large(kernel, grid, args, constants, config):
        tried.append(config.num_stages)
        if config.num_stages > limit:
            raise OutOfResources(300_000, 101_376, "shared memory")
        launch(kernel, grid, args, constants, config)

    monkeypatch.setattr(launching, "launch", refuse_large)
    monkeypatch.setattr(launching, "_too_large", {})
    limit = 2
    check(tensors)
    assert tried[:5] == [3, 2, 3, 2, 2]
    limit = 0
    with pytest.raises(RuntimeError, match="image_text_similarity: expected a launch configuration"):
        run(tensors)


# ------------------------------------------------------------------------------------------ compiled kernels


def drive(arch, batches, dtype, choice=None):
    """Forward and backward on a GPU that is not there, with BLIP-2's sizes; what was compiled and launched.

    Args:
        batches: of images and texts.
        choice: which configuration of each table; None for the first that fits.
    """
    from harness import fake_driver

    from blip2_kernels.ops.image_text_similarity.triton import op

    queries, channels = 32, 256
    tables = {
        launch_tables.FORWARD: launch_tables.forward_key(dtype, queries),
        launch_tables.IMAGE_GRADIENT: launch_tables.image_gradient_key(dtype, queries, channels),
        launch_tables.TEXT_GRADIENT: launch_tables.text_gradient_key(channels),
    }
    with fake_driver.drive(arch) as recorder, pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(launching, "architecture", lambda device: arch)
        patch.setattr(launching, "_compiled", {})
        patch.setattr(launching, "_too_large", {})
        for table, key in tables.items() if choice is not None else ():
            configs = table.configs(arch, key)
            stack.enter_context(table.overridden(configs[min(choice, len(configs) - 1)]))
        for images, texts in batches:
            image = torch.empty(images, queries, channels, dtype=dtype)
            text = torch.empty(texts, channels, dtype=dtype)
            out, index = op._run_forward(image, text, True)
            op._run_image_backward(out, text, index, queries)
            op._run_text_backward(out, image, index)
    return recorder


def figures_of_every_configuration(arch):
    """[dtype, kernel, bytes of stack, tensor-core instructions] of each."""
    from harness.compile_report import report

    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for choice in (0, 1):
            for made in drive(arch, [(128, 1024)], dtype, choice).compilations:
                figures = report(made)
                found.append([str(dtype), figures.kernel, figures.stack_bytes, figures.tensor_core])
    return found


def kernels_of_several_batches(arch):
    """The names of what is compiled, and of what is launched."""
    batches = [(64, 256), (1, 1), (16, 33), (7, 16), (32, 1), (1, 48)]
    recorder = drive(arch, batches, torch.bfloat16)
    return [made.name for made in recorder.compilations], [launch.kernel for launch in recorder.launches]


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.architectures(90, 80, 100)
def test_every_configuration_fits_and_does_not_spill(arch):
    figures = call(figures_of_every_configuration, arch)
    assert len(figures) == 2 * 2 * 3
    for dtype, kernel, stack, tensor_core in figures:
        assert stack == 0, (dtype, kernel)
        assert tensor_core or dtype == "torch.float32" or kernel == "text_gradient_kernel", (dtype, kernel)


@pytest.mark.compiles
def test_no_other_batch_compiles_a_kernel_anew():
    compiled, launched = call(kernels_of_several_batches, 90)
    assert sorted(compiled) == ["forward_kernel", "image_gradient_kernel", "text_gradient_kernel"]
    assert len(launched) == 18
