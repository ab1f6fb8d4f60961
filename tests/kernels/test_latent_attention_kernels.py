"""The Triton kernels of latent_attention against the reference, in the interpreter."""

import random
from contextlib import ExitStack

import pytest
import torch
from harness import interpreter
from harness.fresh_process import call
from tolerances import assert_yardstick, max_error

from blip2_kernels import device_errors
from blip2_kernels.ops import latent_attention, launching
from blip2_kernels.ops.latent_attention import launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(samples, rows, images, tokens, width, dtype=torch.float32, memory="plain"):
    """q and features; "strided" ones lie in larger tensors with gaps between rows, at an offset."""
    tensors = []
    for shape in ((samples, rows, width), (images, tokens, width)):
        t = torch.randn(shape, dtype=torch.float64).to(dtype)
        if memory == "strided":
            larger = torch.full((*(2 * n for n in shape[:-1]), width + 9), float("nan"), dtype=dtype)
            t = larger[(*(slice(1, 2 * n + 1, 2) for n in shape[:-1]), slice(5, width + 5))].copy_(t)
        tensors.append(t)
    return tensors


def draw_visibility(kind, images, tokens):
    """Options of a call: all tokens, the first of each image, or any pattern; the last image has none."""
    if kind == "lengths":
        lengths = torch.randint(tokens + 1, (images,), dtype=torch.int32)
        lengths[-1] = 0
        return {"image_lengths": lengths}
    if kind == "mask":
        mask = torch.rand(images, tokens) < 0.5
        mask[-1] = False
        return {"image_mask": mask.to(random.choice([torch.bool, torch.int64, torch.bfloat16]))}
    return {}


def run(tensors, backend="triton", dtype=None, **options):
    tensors = [t.to(dtype or t.dtype) for t in tensors]
    return latent_attention(*tensors, **({"scale": tensors[0].shape[-1] ** -0.5} | options), backend=backend)


def check(tensors, **options):
    got = run(tensors, **options)
    plain, truth = run(tensors, "reference", **options), run(tensors, "reference", torch.float64, **options)
    assert got.dtype == tensors[0].dtype
    assert_yardstick("out", got, plain, truth)
    return got


def shared(samples, images):
    return torch.randint(images, (samples,), dtype=torch.int32)


# Rows, tokens, width: odd ones in every place, and the widths and tokens of image encoders.
SIZES = [
    (1, 1, 1),
    (7, 31, 33),
    (31, 33, 7),
    (33, 257, 31),
    (257, 7, 77),
    (130, 65, 64),
    (12, 257, 1408),
    (12, 257, 1024),
    (96, 64, 100),
    (5, 1100, 40),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("visible", ["all", "lengths", "mask"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grid(sizes, visible, dtype):
    rows, tokens, width = sizes
    tensors = draw(3, rows, 2, tokens, width, dtype)
    index = torch.tensor([1, 0, 0], dtype=torch.int32)
    out = check(tensors, image_index=index, **draw_visibility(visible, 2, tokens))
    if visible != "all":
        assert (out[0] == 0).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [384, 383])
def test_rows_of_twelve_heads(rows, dtype):
    check(draw(1, rows, 1, 40, 64, dtype), image_lengths=torch.tensor([37], dtype=torch.int32))


@pytest.mark.usefixtures("poisoned_memory")
def test_a_very_long_image():
    check(draw(1, 3, 1, 4112, 32, torch.bfloat16))


@pytest.mark.usefixtures("poisoned_memory")
def test_random_cases(kernel_cases, seed):
    rng = random.Random(seed)
    for _ in range(kernel_cases):
        samples, images, tokens = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 150)
        dtype, memory = rng.choice(DTYPES), rng.choice(["plain", "strided"])
        tensors = draw(samples, rng.randint(1, 140), images, tokens, rng.randint(1, 100), dtype, memory)
        options = draw_visibility(rng.choice(["all", "lengths", "mask"]), images, tokens)
        if samples != images or rng.random() < 0.5:
            options["image_index"] = shared(samples, images)
        check(tensors, scale=rng.choice([-1.0, 0.0, 0.05, 0.5]), **options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "sizes", [(0, 5, 0, 3, 8), (0, 5, 2, 3, 8), (2, 0, 2, 3, 8), (2, 5, 2, 0, 8)], ids=str
)
def test_empty_batches(sizes):
    q, features = draw(*sizes)
    out = run((q, features), image_index=torch.arange(sizes[0], dtype=torch.int32))
    assert out.shape == q.shape and (out == 0).all()


# ------------------------------------------------------------------------------------------------ properties


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("visible", ["lengths", "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_hidden_tokens_changes_no_bit(dtype, visible, poison):
    q, features = draw(3, 20, 3, 140, 40, dtype)
    options = draw_visibility(visible, 3, 140)
    seen = options.get("image_mask")
    seen = torch.arange(140) < options["image_lengths"][:, None] if seen is None else seen != 0
    clean = run((q, features), **options)
    features[~seen] = poison
    dirty = run((q, features), **options)
    assert torch.equal(clean, dirty) and torch.isfinite(clean).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_not_rounded_to_half_precision(dtype):
    """Scores 1 and 1 + 2^-9 are the same bf16 number; with a large scale one weighs e times the other."""
    step = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    q = torch.tensor([[[1.0, 1.0]]], dtype=dtype)
    features = torch.tensor([[[1.0, 0.0], [1.0, step]]], dtype=dtype)
    out = run((q, features), scale=1 / step)
    weight = torch.tensor(1.0).sigmoid().item()
    assert abs(out[0, 0, 1].item() / step - weight) < 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_visible_nan_or_infinity_spoils_its_image_only(value):
    q, features = draw(3, 20, 3, 140, 40)
    clean = run((q, features))
    features[1, 130, 3] = value
    out, reference = run((q, features)), run((q, features), "reference")
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert torch.equal(out.isnan(), reference.isnan()) and out[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("visible", ["all", "lengths", "mask"])
def test_samples_and_images_permute_to_the_same_bits(visible, dtype):
    q, features = draw(5, 20, 3, 70, 40, dtype)
    index, options = shared(5, 3), draw_visibility(visible, 3, 70)
    out = run((q, features), image_index=index, **options)
    samples, images = torch.randperm(5), torch.randperm(3)
    moved = images.argsort().int()[index.long()][samples]
    options = {name: t[images] for name, t in options.items()}
    assert torch.equal(run((q[samples], features[images]), image_index=moved, **options), out[samples])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_s_bits_do_not_depend_on_the_batch(dtype, monkeypatch):
    q, features = draw(5, 20, 3, 70, 40, dtype)
    index = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32)
    out = run((q, features), image_index=index)
    for s in range(5):
        alone = run((q[s : s + 1], features[index[s] : index[s] + 1]))
        assert torch.equal(alone[0], out[s])
    # Nor on how many samples are worked on at a time.
    monkeypatch.setattr(launch, "WORKSPACE", 2 * 20 * 128)
    with interpreter.guard() as launches:
        assert torch.equal(run((q, features), image_index=index), out)
    assert len(launches) == 3 * 3
    own = run((q[:3], features), image_lengths=torch.tensor([70, 5, 0], dtype=torch.int32))
    monkeypatch.setattr(launch, "WORKSPACE", 1)
    lengths = torch.tensor([70, 5, 0], dtype=torch.int32)
    assert torch.equal(run((q[:3], features), image_lengths=lengths), own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_give_the_same_bits(dtype):
    tensors, options = draw(3, 33, 3, 70, 40, dtype), draw_visibility("mask", 3, 70)
    assert torch.equal(run(tensors, **options), run(tensors, **options))


@pytest.mark.parametrize("order", ["reversed", 5])
def test_the_order_of_programs_does_not_matter(order):
    tensors = draw(3, 140, 3, 70, 140, torch.bfloat16)
    forward = run(tensors)
    with interpreter.guard(order=order):
        assert torch.equal(run(tensors), forward)


def test_which_kernels_run_and_what_they_are_given(launches, monkeypatch):
    """No copy of the features for the samples that share them: the kernels read the caller's tensor."""
    q, features = draw(6, 4, 2, 200, 64)
    given, launch_kernel = [], launching.launch

    def watch(kernel, grid, args, constants, config):
        given.append([a for a in args if isinstance(a, torch.Tensor)])
        launch_kernel(kernel, grid, args, constants, config)

    monkeypatch.setattr(launching, "launch", watch)
    run((q, features), image_index=shared(6, 2))
    assert [launch.kernel for launch in launches] == ["scores_kernel", "softmax_kernel", "output_kernel"]
    assert max(t.numel() for tensors in given for t in tensors) == features.numel()
    for tensors in (given[0], given[2]):
        assert any(t.data_ptr() == features.data_ptr() for t in tensors)


@pytest.mark.parametrize("wide", ["samples", "rows", "images", "tokens"])
def test_offsets_beyond_two_to_the_31_elements(wide):
    """Tensors that lie far apart in a buffer of which only the pages that are touched exist."""
    q, features = draw(3, 2, 3, 2, 16, torch.float16)
    step, far = 2**30 + 64, 2**31 + 64
    q_strides = {"samples": (step, 16, 1), "rows": (16, far, 1)}.get(wide, q.stride())
    feature_strides = {"images": (step, 16, 1), "tokens": (16, far, 1)}.get(wide, features.stride())
    wide_q = torch.empty_strided(q.shape, q_strides, dtype=q.dtype).copy_(q)
    wide_features = torch.empty_strided(features.shape, feature_strides, dtype=q.dtype).copy_(features)
    assert torch.equal(run((q, features)), run((wide_q, wide_features)))


def test_an_image_index_out_of_range_reads_nothing_else_and_sets_the_flag():
    """Past the checks of CPU tensors, as on a GPU: the nearest image is read, and the error raised later.

    A wrong number counts once, however many tiles the scores of its sample have.
    """
    q, features = draw(4, 200, 3, 300, 16)
    index = torch.tensor([1, 7, -5, 2], dtype=torch.int32)
    device_errors.check_device_errors()
    out = torch.ops.blip2_kernels.latent_attention(q, features, index, None, 0.2)
    with pytest.raises(IndexError, match=r"image_index: expected values in \[0, images\), got 2 others"):
        device_errors.check_device_errors()
    device_errors.check_device_errors()
    assert torch.equal(out, run((q, features), image_index=index.clamp(0, 2), scale=0.2))


def test_lengths_out_of_range_read_nothing_else():
    q, features = draw(2, 20, 2, 7, 16)
    lengths = torch.tensor([-3, 9], dtype=torch.int32)
    out = torch.ops.blip2_kernels.latent_attention(q, features, None, lengths, 0.2)
    assert torch.equal(out, run((q, features), image_lengths=lengths.clamp(0, 7), scale=0.2))


# -------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("memory", ["plain", "strided"])
def test_opcheck(memory):
    q, features = draw(3, 5, 2, 7, 16, memory=memory)
    index = torch.tensor([1, 0, 1], dtype=torch.int32)
    lengths, mask = torch.tensor([7, 3], dtype=torch.int32), torch.ones(2, 7, dtype=torch.uint8)
    operator = torch.ops.blip2_kernels.latent_attention
    for visible in (None, lengths, mask):
        torch.library.opcheck(operator, (q, features, index, visible, 0.25))
    torch.library.opcheck(operator, (q[:2], features, None, None, 0.25))


@pytest.mark.parametrize("visible", ["all", "lengths", "mask"])
@pytest.mark.parametrize("indexed", [False, True])
def test_one_graph_under_compile(visible, indexed):
    tensors, options = draw(3, 5, 3, 7, 16), draw_visibility(visible, 3, 7)
    if indexed:
        options["image_index"] = shared(3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    got = compiled(*tensors, scale=0.25, **options, backend="triton")
    assert torch.equal(got, run(tensors, scale=0.25, **options))


def test_a_tensor_that_wants_a_gradient_is_refused_before_anything_runs(launches):
    q, features = draw(3, 5, 3, 7, 16)
    with pytest.raises(ValueError, match="q: expected a tensor without gradient"):
        run((q.requires_grad_(), features))
    assert launches == []
    with torch.no_grad():
        assert not run((q, features)).requires_grad


def test_autocast_around_the_op_changes_nothing():
    tensors = draw(3, 5, 3, 7, 16, torch.float16)
    plain = run(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(tensors), plain)


def test_tf32_where_torch_allows_it():
    """Its eleven bits are seen in the result, and only where they were asked for."""
    tensors = draw(2, 33, 2, 70, 64)
    truth = run(tensors, "reference", torch.float64)
    assert max_error(run(tensors), truth) < 1e-5
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        coarse = run(tensors)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert 1e-5 < max_error(coarse, truth) < 1e-1


def test_a_configuration_that_does_not_fit_gives_way_to_the_next(monkeypatch):
    from triton.runtime.errors import OutOfResources

    tensors = draw(2, 33, 2, 70, 64, torch.float16)
    launch_kernel, tried = launching.launch, []

    def refuse_large(kernel, grid, args, constants, config):
        tried.append(config.num_stages)
        if config.num_stages > limit:
            raise OutOfResources(300_000, 101_376, "shared memory")
        launch_kernel(kernel, grid, args, constants, config)

    monkeypatch.setattr(launching, "launch", refuse_large)
    monkeypatch.setattr(launching, "_too_large", {})
    limit = 2
    check(tensors)
    assert tried[:5] == [3, 2, 2, 3, 2]
    limit = 1
    with pytest.raises(RuntimeError, match=r"latent_attention \(scores\): expected a launch configuration"):
        run(tensors)


# ------------------------------------------------------------------------------------------ compiled kernels


def drive(arch, batches, dtype, rows=384, width=1408, choice=None):
    """Launches on a GPU that is not there; what was compiled and launched.

    Args:
        batches: of samples, images and tokens.
        choice: which configuration of each table; None for the first that fits.
    """
    from harness import fake_driver

    from blip2_kernels.ops.latent_attention.triton import op

    tables = (launch.SCORES, launch.OUTPUT)
    with fake_driver.drive(arch) as recorder, pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(launching, "architecture", lambda device: arch)
        patch.setattr(launching, "_compiled", {})
        patch.setattr(launching, "_too_large", {})
        for table in tables if choice is not None else ():
            configs = table.configs(arch, launch.key(dtype, rows, width))
            stack.enter_context(table.overridden(configs[choice]))
        for samples, images, tokens in batches:
            q = torch.empty(samples, rows, width, dtype=dtype)
            features = torch.empty(images, tokens, width, dtype=dtype)
            index = torch.empty(samples, dtype=torch.int32)
            mask = torch.empty(images, tokens, dtype=torch.uint8)
            op._run(q, features, index, mask, 0.125)
    return recorder


def figures_of_some_configurations(arch):
    """[dtype, kernel, bytes of stack, tensor-core instructions] of each."""
    from harness.compile_report import report

    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width, choice in ((384, 1408, 0), (384, 1408, 1), (12, 1408, 0), (383, 77, 0)):
            for made in drive(arch, [(2, 1, 257)], dtype, rows, width, choice).compilations:
                figures = report(made)
                found.append([str(dtype), figures.kernel, figures.stack_bytes, figures.tensor_core])
    return found


def kernels_of_several_batches(arch):
    """The names of what is compiled, and of what is launched."""
    batches = [(3, 2, 257), (1, 1, 320), (16, 1, 272), (48, 16, 319)]
    recorder = drive(arch, batches, torch.bfloat16)
    return [made.name for made in recorder.compilations], [launch.kernel for launch in recorder.launches]


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.architectures(90, 80, 100)
def test_configurations_fit_and_do_not_spill(arch):
    figures = call(figures_of_some_configurations, arch)
    assert len(figures) == 2 * 4 * 3
    for dtype, kernel, stack, tensor_core in figures:
        assert stack == 0, (dtype, kernel)
        assert tensor_core or dtype == "torch.float32" or kernel == "softmax_kernel", (dtype, kernel)


@pytest.mark.compiles
def test_no_other_batch_compiles_a_kernel_anew():
    compiled, launched = call(kernels_of_several_batches, 90)
    assert sorted(compiled) == ["output_kernel", "scores_kernel", "softmax_kernel"]
    assert len(launched) == 12
