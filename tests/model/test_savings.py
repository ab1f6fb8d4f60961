"""Every saving of the fused encoder alone, all together and none: the plain path's numbers each time."""

import pytest
import torch
from pretraining_cases import (
    IMAGE_WIDTH,
    QUERIES,
    small_batch,
    small_config,
    small_model,
    some_negatives,
)
from qformer_cases import randomise
from tolerances import WHOLE_MODEL, assert_same_gradients, max_error
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig, LlamaConfig, LlamaForCausalLM

from blip2_kernels import layout as layout_module
from blip2_kernels.encoder import Saving
from blip2_kernels.encoder.plan import (
    WORTH_ABSORBING,
    Architecture,
    Plan,
    Products,
    Workload,
    absorbed_flops,
    projected_flops,
)
from blip2_kernels.model.generation import Blip2ForConditionalGeneration, Blip2GenerationConfig
from blip2_kernels.model.retrieval import Blip2ForImageTextRetrieval

EVERY_OTHER_OFF = {
    f"only {saving}": {other.value: False for other in Saving if other != saving} for saving in Saving
}
"""What is to be alone is left to the plan, which may have to decline it."""
ALONE_OFF = {f"no {saving}": {saving.value: False} for saving in Saving}
SETTINGS = {"plan": {}, "none": {saving.value: False for saving in Saving}} | ALONE_OFF | EVERY_OTHER_OFF
VIDEO_TOKENS = 8 * 257


def step(model: nn.Module, inputs: dict, seed: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Floating outputs and every parameter's gradient; one Philox key and one draw of negatives a seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(**inputs)
    output.loss.backward()
    values = {
        name: v.detach() for name, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    return values, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(got, expected, dtype: torch.dtype, absent: tuple[str, ...] = ()) -> None:
    """Outputs and gradients by the whole-model yardstick; no gradient is missing."""
    (values, grads), (true_values, true_grads) = got, expected
    for name, truth in true_values.items():
        if name in absent and name not in values:
            continue
        scale = max(1.0, float(truth.abs().max()))
        assert max_error(values[name], truth) <= WHOLE_MODEL[dtype] * scale, name
    assert_same_gradients(grads, true_grads, dtype)


# ------------------------------------------------------------------------------------------------- stage 1


@pytest.fixture(scope="module")
def plain_steps() -> dict:
    return {}


def stage1_case(dtype: torch.dtype, dropout: float, tokens: int | None = None) -> tuple[nn.Module, dict]:
    model = small_model(dtype=dtype, dropout=dropout).train(dropout > 0)
    inputs = small_batch(4) | {"negatives": some_negatives(4)}
    if tokens is not None:
        generator = torch.Generator().manual_seed(3)
        inputs["image_features"] = torch.randn(4, tokens, IMAGE_WIDTH, generator=generator)
    inputs["image_features"] = inputs["image_features"].to(dtype)
    return model, inputs


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_stage_1(setting, dropout, dtype, plain_steps):
    model, inputs = stage1_case(dtype, dropout)
    if (dtype, dropout) not in plain_steps:
        plain_steps[dtype, dropout] = step(model, inputs)
    model.use_fused = True
    model.qformer.fused_encoder.force(**SETTINGS[setting])
    assert_same_step(step(model, inputs), plain_steps[dtype, dropout], dtype)


@pytest.mark.parametrize("setting", ["plan", "none", *ALONE_OFF])
def test_stage_1_without_forced_negatives_draws_the_same(setting):
    model, inputs = stage1_case(torch.float64, 0.3)
    del inputs["negatives"]
    expected = step(model, inputs)
    model.use_fused = True
    model.qformer.fused_encoder.force(**SETTINGS[setting])
    assert_same_step(step(model, inputs), expected, torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [(torch.float64, VIDEO_TOKENS), (torch.float32, VIDEO_TOKENS), (torch.float32, 700)],
    ids=["fp64", "fp32", "700 tokens"],
)
def test_stage_1_on_images_as_long_as_a_video(dtype, tokens, dropout):
    model, inputs = stage1_case(dtype, dropout, tokens)
    expected = step(model, inputs)
    model.use_fused = True
    for setting in ["plan", "none", *(ALONE_OFF if tokens == 700 else ())]:
        model.qformer.fused_encoder.force(**dict.fromkeys(Saving))
        model.qformer.fused_encoder.force(**SETTINGS[setting])
        assert_same_step(step(model, inputs), expected, dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
def test_an_instruction_on_images_as_long_as_a_video(dropout):
    model, inputs = stage2_case(True, torch.float32, dropout)
    generator = torch.Generator().manual_seed(3)
    inputs["image_features"] = torch.randn(3, VIDEO_TOKENS, IMAGE_WIDTH, generator=generator)
    inputs["image_mask"] = (torch.rand(3, VIDEO_TOKENS, generator=generator) > 0.3).long()
    expected = step(model, inputs)
    model.use_fused = True
    assert_same_step(step(model, inputs), expected, torch.float32, absent=("logits",))


def test_stage_1_with_features_that_need_a_gradient():
    """A trained image encoder: the norm cannot be folded away, and the features get their gradient."""
    model, inputs = stage1_case(torch.float64, 0.0)
    results = []
    for use_fused in (False, True):
        model.use_fused = use_fused
        features = inputs["image_features"].clone().requires_grad_()
        got = step(model, inputs | {"image_features": features})
        results.append((got[0], got[1] | {"features": features.grad}))
    assert_same_step(results[1], results[0], torch.float64)


@pytest.mark.parametrize("frozen", ["ln_vision", "qformer.encoder.layer.0", "query_tokens", "embeddings"])
def test_stage_1_with_some_parameters_frozen(frozen):
    model, inputs = stage1_case(torch.float64, 0.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    expected = step(model, inputs)
    model.use_fused = True
    assert_same_step(step(model, inputs), expected, torch.float64)


# ------------------------------------------------------------------------------------------------- stage 2


def exact_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_) -> Tensor:
    """transformers' causal loss without its cast to fp32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def stage2_case(instruct: bool, dtype: torch.dtype, dropout: float) -> tuple[nn.Module, dict]:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    sizes |= dict(encoder_hidden_size=IMAGE_WIDTH, vocab_size=61, max_position_embeddings=32) | rates
    kind = InstructBlipQFormerConfig if instruct else Blip2QFormerConfig
    language = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(
        Blip2GenerationConfig(kind(**sizes), 5), language_model=LlamaForCausalLM(language)
    )
    randomise(model).to(dtype).train(dropout > 0)
    model.language_model.loss_function = exact_loss
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    inputs = {
        "input_ids": torch.randint(3, 60, (3, 6), generator=generator),
        "attention_mask": mask,
        "prompt_lengths": torch.tensor([2, 1, 1]),
        "image_features": torch.randn(3, 7, IMAGE_WIDTH, generator=generator, dtype=dtype),
        "image_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0] * 7]),
    }
    if instruct:
        inputs["qformer_input_ids"] = torch.randint(3, 60, (3, 4), generator=generator)
        inputs["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    return model, inputs


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("instruct", [False, True], ids=["blip2", "instructblip"])
def test_stage_2(instruct, dtype, dropout, setting, plain_steps):
    model, inputs = stage2_case(instruct, dtype, dropout)
    if (instruct, dtype, dropout) not in plain_steps:
        plain_steps[instruct, dtype, dropout] = step(model, inputs)
    model.use_fused = True
    model.qformer.fused_encoder.force(**SETTINGS[setting])
    got = step(model, inputs)
    assert ("logits" in got[0]) == (SETTINGS[setting].get("supervised_rows") is False)
    assert_same_step(got, plain_steps[instruct, dtype, dropout], dtype, absent=("logits",))


@pytest.mark.parametrize("instruct", [False, True], ids=["blip2", "instructblip"])
def test_queries_of_stage_2_are_one_sample_s_in_the_first_layer(instruct):
    model, inputs = stage2_case(instruct, torch.float32, 0.0)
    model.use_fused, rows = True, []
    query = model.qformer.encoder.layer[0].attention.attention.query
    query.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model(**inputs)
    text = int(inputs["qformer_attention_mask"].sum()) if instruct else 0
    assert rows == [5 + text]


def test_stage_2_with_a_frozen_q_former():
    """The queries alone are trained: a gradient flows through images whose projections need none."""
    model, inputs = stage2_case(False, torch.float64, 0.0)
    model.qformer.requires_grad_(False)
    model.ln_vision.requires_grad_(False)
    expected = step(model, inputs)
    model.use_fused = True
    assert_same_step(step(model, inputs), expected, torch.float64, absent=("logits",))


# ------------------------------------------------------------------------------------------------ inference

ABSORBED = {"absorbed": {"absorbed_cross_attention": True}, "projected": {"absorbed_cross_attention": False}}


@pytest.mark.parametrize("setting", [*ABSORBED, "none", *ALONE_OFF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@torch.no_grad()
def test_features_and_scores(setting, dtype, masked):
    base = small_model(dtype=dtype)
    model = Blip2ForImageTextRetrieval.from_pretraining(base)
    texts, images = small_batch(5), small_batch(3, seed=2)["image_features"].to(dtype)
    image_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]) if masked else None
    text = {name: texts[name] for name in ("input_ids", "attention_mask")}
    image = {"image_features": images, "image_mask": image_mask}
    index = torch.tensor([2, 0, 1, 1, 0])

    def everything() -> list[Tensor]:
        joint = model.get_multimodal_features(**text, **image, image_index=index)
        scores = [model.itc_scores(**text, **image), model.itm_logits(**text, **image)]
        return [model.encode_image(**image), model.get_text_features(**text), joint, *scores]

    expected = everything()
    model.use_fused = True
    model.qformer.fused_encoder.force(**(ABSORBED.get(setting) or SETTINGS[setting]))
    for got, truth in zip(everything(), expected, strict=True):
        assert max_error(got, truth) <= max(WHOLE_MODEL[dtype], 1e-5 if got.dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@torch.no_grad()
def test_features_from_weights_that_are_kept(dtype):
    """`prepare_inference`, the projections of self-attention joined; read twice, the second time kept."""
    model, inputs = stage1_case(dtype, 0.0)
    texts = inputs["input_ids"], inputs["attention_mask"]

    def everything() -> list[Tensor]:
        images = inputs["image_features"]
        joint = model.get_multimodal_features(*texts, images)
        return [model.encode_image(images), model.get_text_features(*texts), joint]

    expected = everything()
    model.use_fused = True
    encoder = model.qformer.fused_encoder.prepare_inference().force(joined_projections=True)
    for _ in range(2):
        for got, truth in zip(everything(), expected, strict=True):
            assert max_error(got, truth) <= WHOLE_MODEL[dtype]
    assert encoder._cache.entries


@torch.no_grad()
def test_the_absorbed_form_is_taken_where_it_is_cheaper(monkeypatch):
    """With 257 tokens of width 1408 it is for one sample an image, and is not for four."""
    model = small_model(use_fused=True)
    encoder = model.qformer.fused_encoder
    long = torch.randn(2, 200, IMAGE_WIDTH)

    def absorbed(rows: int | None) -> bool:
        return encoder.project_images(long, norm=model.ln_vision, query_rows=rows).absorbed

    # Heads x width against hidden channels: small here, so that few rows pay for no key at all.
    assert absorbed(2) and not absorbed(2000) and not absorbed(None)
    assert encoder.force(absorbed_cross_attention=True).project_images(long, norm=model.ln_vision).absorbed
    with torch.enable_grad():
        encoder.force(absorbed_cross_attention=None)
        assert not absorbed(2)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_half_precision_takes_keys_and_values_on_a_cpu_too(autocast):
    """The scores of the absorbed form are products in fp32, up to twice the time of a bf16 pass with AMX."""
    model = small_model(use_fused=True).to(torch.float32 if autocast else torch.bfloat16)
    encoder, features = model.qformer.fused_encoder, torch.randn(2, 200, IMAGE_WIDTH)
    # Cheaper in FLOPs by less than a third of them.
    work = Workload(2, 4, images=2, image_tokens=200)
    fewer = projected_flops(encoder.architecture, 2, 200, 8) / absorbed_flops(encoder.architecture, 2, 200, 8)
    assert 1 < fewer < WORTH_ABSORBING

    def taken() -> tuple[bool, bool]:
        images = encoder.project_images(features, norm=model.ln_vision, query_rows=8)
        line = next(x for x in encoder.explain(work).splitlines() if x.startswith("absorbed"))
        return images.absorbed, "keys and values are cheaper" not in line

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert taken() == (False, False)
    assert taken() == (autocast, autocast)


def test_a_gpu_takes_the_absorbed_form_only_where_it_is_much_cheaper():
    plan, qformer = Plan(), Architecture(768, 3072, 12, (True, False) * 6, 1408)
    read = Workload(8, 32, images=8, image_tokens=257)
    assert plan.absorbed(read, qformer, products=Products("cpu")).applies
    assert not plan.absorbed(read, qformer, products=Products("cuda")).applies
    few = Workload(8, 2, images=8, image_tokens=257)
    for products in (Products("cuda"), Products("cpu", half=True)):
        assert plan.absorbed(few, qformer, products=products).applies


def test_a_saving_that_is_forced_off_is_off():
    """What each saving changes, seen from outside: so that a test above cannot pass by doing nothing."""
    model, inputs = stage1_case(torch.float32, 0.0)
    model.use_fused = True
    encoder = model.qformer.fused_encoder
    seen: dict[str, int] = {}

    def count(name: str, module: nn.Module) -> None:
        def hook(_, args, out):
            seen[name] = seen.get(name, 0) + args[0].flatten(0, -2).shape[0]

        module.register_forward_hook(hook)

    last, first = model.qformer.encoder.layer[-1], model.qformer.encoder.layer[0]
    count("first queries", first.attention.attention.query)
    count("last text", last.intermediate.dense)
    count("last query", last.attention.attention.query)
    count("head", model.cls["predictions"].transform.dense)
    count("norm", model.ln_vision)

    def rows(**forced: bool) -> dict[str, int]:
        seen.clear()
        for saving in Saving:
            encoder.force(**{saving.value: forced.get(saving.value)})
        step(model, inputs)
        return dict(seen)

    lengths, samples = inputs["attention_mask"].sum(1), 4
    negative_texts = lengths[inputs["negatives"][1]].sum()
    text, joint = int(lengths.sum()), int(2 * lengths.sum() + negative_texts)
    planned = rows()
    assert planned["first queries"] == 2 * QUERIES + 2 * text + joint
    assert planned["last text"] == samples + text
    assert planned["head"] == text - samples
    # A norm with a hook is no longer read past: hooks are what this test looks through.
    assert planned["norm"] == samples * inputs["image_features"].shape[1]
    assert rows(shared_first_layer=False)["first queries"] == 4 * samples * QUERIES + 2 * text + joint
    assert rows(dead_rows=False)["last text"] == 2 * text + joint
    assert rows(supervised_rows=False)["head"] == text
    padded = samples * inputs["input_ids"].shape[1]
    assert rows(packed_text=False, dead_rows=False)["last text"] == 5 * padded
    assert rows(one_pass=False)["first queries"] == planned["first queries"]


def test_config_of_this_file_has_cross_attention_in_the_last_layer():
    """Dead rows and image masks meet there."""
    config = small_config().qformer
    assert (config.num_hidden_layers - 1) % config.cross_attention_frequency == 0


@pytest.mark.parametrize(
    ("mask_device", "forced", "waits"),
    [("cpu", {}, 1), ("meta", {}, 2), ("meta", {"packed_text": False}, 0)],
    ids=["lengths known", "lengths on the device", "static shapes"],
)
def test_how_often_a_step_of_stage_1_waits_for_the_device(mask_device, forced, waits, monkeypatch):
    """On tensors without data, where reading any value raises; the one place that may read is counted."""
    model, inputs = stage1_case(torch.float32, 0.3)
    del inputs["negatives"]
    lengths = inputs["attention_mask"].sum(1)
    seen = []

    def sizes_of(sizes: Tensor) -> tuple[int, int, int]:
        if sizes.device.type == "cpu":
            return tuple(map(int, sizes.tolist()))
        # The first pass' texts, or those of matching, each three times.
        seen.append(sizes)
        times = 3 if len(seen) == waits else 1
        return times * int(lengths.sum()), int(lengths.max()), 0

    monkeypatch.setattr(layout_module, "read_sizes", sizes_of)
    model.use_fused = True
    model.qformer.fused_encoder.force(**forced)
    given = {name: t.to("meta") for name, t in inputs.items()}
    given["attention_mask"] = inputs["attention_mask"].to(mask_device)
    model.to("meta")(**given).loss.backward()
    assert len(seen) == waits
