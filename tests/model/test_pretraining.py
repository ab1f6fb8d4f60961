"""Blip2ForPreTraining against a naive stage 1, its two paths against each other, and what it refuses."""

import copy

import pytest
import torch
from naive import naive_step
from pretraining_cases import (
    BOTH_PATHS,
    CLS,
    IMAGE_WIDTH,
    LOSSES,
    POSITIONS,
    QUERIES,
    SEP,
    gradients,
    rank_batch,
    small_batch,
    small_config,
    small_model,
    some_negatives,
)
from tolerances import assert_same_gradients, assert_yardstick

from blip2_kernels.encoder import FusedEncoder
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.qformer import QFormerModel
from blip2_kernels.model.retrieval import Blip2ForImageTextRetrieval

IMAGE_IDS = torch.tensor([5, 7, 5, 9])
NEGATIVES_OF_IDS = (torch.tensor([1, 0, 3, 2]), torch.tensor([3, 2, 1, 0]))


@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shared_images", [False, True], ids=["distinct", "image_ids"])
def test_losses_and_gradients_are_those_of_the_naive_step(use_fused, dtype, shared_images):
    model = small_model(use_fused=use_fused, dtype=dtype)
    inputs, negatives = small_batch(), some_negatives(4)
    if shared_images:
        inputs["image_ids"], negatives = IMAGE_IDS, NEGATIVES_OF_IDS
    output = model(**inputs, negatives=negatives)
    expected = naive_step(dict(model.named_parameters()), model.config, [rank_batch(inputs, negatives)])[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name in LOSSES:
        loss = output[f"loss_{name}"]
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=tolerance)
        assert_same_gradients(gradients(loss, model), gradients(expected[name], model), dtype)
    torch.testing.assert_close(output.loss, sum(expected.values()), rtol=0, atol=3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_both_paths_drop_the_same_elements(dtype):
    model = small_model(dtype=dtype, dropout=0.3).train()
    inputs, negatives = small_batch(), some_negatives(4)
    outputs = []
    for use_fused in (False, True):
        model.use_fused = use_fused
        torch.manual_seed(11)
        outputs.append(model(**inputs, negatives=negatives))
    plain, fused = outputs
    for name in LOSSES:
        name = f"loss_{name}"
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(fused[name], plain[name], rtol=0, atol=tolerance)
        assert_same_gradients(gradients(fused[name], model), gradients(plain[name], model), dtype)
    quiet = model.eval()(**inputs, negatives=negatives)
    assert all(abs(quiet[f"loss_{name}"] - plain[f"loss_{name}"]) > 1e-3 for name in LOSSES), (
        "nothing dropped"
    )


def test_both_paths_draw_the_same_negatives_and_new_masks_each_step():
    model = small_model().train()
    losses, drawn = [], []
    for use_fused in (False, True):
        model.use_fused = use_fused
        torch.manual_seed(5)
        steps = [model(**small_batch(7)) for _ in range(3)]
        losses.append([float(step.loss.detach()) for step in steps])
        drawn.append([torch.stack(step.negatives).tolist() for step in steps])
    assert drawn[0] == drawn[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(set(losses[0])) == 3


SUBSETS = [("itc",), ("itm",), ("itg",), ("itc", "itm"), ("itc", "itg"), ("itm", "itg"), LOSSES]


@BOTH_PATHS
@pytest.mark.parametrize("losses", SUBSETS, ids="+".join)
def test_some_of_the_losses_are_what_they_are_together(use_fused, losses):
    """With dropout: leaving a pass out changes no mask of the others."""
    model = small_model(use_fused=use_fused, dtype=torch.float64, dropout=0.3).train()
    inputs, negatives = small_batch(), some_negatives(4)
    torch.manual_seed(3)
    together = model(**inputs, negatives=negatives)
    torch.manual_seed(3)
    some = model(**inputs, negatives=negatives, losses=losses)
    for name in LOSSES:
        name = f"loss_{name}"
        if name.removeprefix("loss_") not in losses:
            assert getattr(some, name) is None
            continue
        torch.testing.assert_close(some[name], together[name], rtol=0, atol=1e-12)
        assert_same_gradients(gradients(some[name], model), gradients(together[name], model), torch.float64)
    torch.testing.assert_close(
        some.loss, sum(together[f"loss_{name}"] for name in losses), rtol=0, atol=1e-12
    )
    assert (some.sim_i2t is None) == ("itc" not in losses)
    assert (some.itm_logits is None) == (some.negatives is None) == ("itm" not in losses)


@pytest.mark.parametrize(
    ("losses", "fixed_negatives", "plain_passes", "fused_passes"),
    [
        (("itc",), False, 2, 1),
        (("itg",), False, 2, 1),
        (("itm",), False, 3, 2),
        (("itm",), True, 1, 1),
        (("itc", "itg"), True, 3, 1),
        (("itm", "itg"), True, 3, 2),
    ],
)
def test_only_passes_that_a_loss_needs_are_run(
    losses, fixed_negatives, plain_passes, fused_passes, monkeypatch
):
    calls = []
    plain, fused = QFormerModel.forward, FusedEncoder.__call__
    monkeypatch.setattr(QFormerModel, "forward", lambda *a, **k: calls.append("plain") or plain(*a, **k))
    monkeypatch.setattr(FusedEncoder, "__call__", lambda *a, **k: calls.append("fused") or fused(*a, **k))
    negatives = some_negatives(4) if fixed_negatives else None
    for use_fused in (False, True):
        small_model(use_fused=use_fused)(**small_batch(), negatives=negatives, losses=losses)
    assert calls == ["plain"] * plain_passes + ["fused"] * fused_passes


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ("itc", TypeError, "losses: expected a collection with at least one of 'itc', 'itm', 'itg', got str"),
        (None, TypeError, "losses: expected a collection"),
        ((), ValueError, "losses: expected at least one of"),
        (("itc", "mlm"), ValueError, "losses: expected at least one of"),
    ],
)
def test_losses_that_there_are_not_are_refused(losses, error, message):
    with pytest.raises(error, match=message):
        small_model()(**small_batch(), losses=losses)


@pytest.mark.parametrize(("use_fused", "passes"), [(False, 4), (True, 2)])
def test_the_path_that_was_asked_for_is_taken(use_fused, passes, monkeypatch):
    calls, projections = [], []
    plain, fused, project = QFormerModel.forward, FusedEncoder.__call__, FusedEncoder.project_images
    monkeypatch.setattr(QFormerModel, "forward", lambda *a, **k: calls.append("plain") or plain(*a, **k))
    monkeypatch.setattr(FusedEncoder, "__call__", lambda *a, **k: calls.append("fused") or fused(*a, **k))
    monkeypatch.setattr(
        FusedEncoder, "project_images", lambda *a, **k: projections.append(1) or project(*a, **k)
    )
    small_model(use_fused=use_fused)(**small_batch())
    assert calls == ["fused" if use_fused else "plain"] * passes
    assert len(projections) == int(use_fused), "images are projected once a step"


@BOTH_PATHS
def test_more_padding_changes_nothing(use_fused):
    model = small_model(use_fused=use_fused, dtype=torch.float64)
    short, long = small_batch(length=7), small_batch(length=7)
    for name in ("input_ids", "attention_mask"):
        long[name] = torch.nn.functional.pad(long[name], (0, 5))
    # Tokens behind the mask must not be read whatever they are; their labels are off by the mask alone.
    long["input_ids"][:, 9:] = 8
    negatives = some_negatives(4)
    before, after = model(**short, negatives=negatives), model(**long, negatives=negatives)
    for name in ("loss", *(f"loss_{x}" for x in LOSSES), "text_embeds", "itm_logits"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-12)


@BOTH_PATHS
def test_permuting_the_batch_permutes_the_outputs(use_fused):
    model = small_model(use_fused=use_fused, dtype=torch.float64)
    inputs, negatives = small_batch(5), some_negatives(5)
    order = torch.tensor([3, 0, 4, 2, 1])
    place = order.argsort()
    permuted = {name: x[order] for name, x in inputs.items()}
    before = model(**inputs, negatives=negatives)
    after = model(**permuted, negatives=tuple(place[index[order]] for index in negatives))
    for name in ("loss", *(f"loss_{x}" for x in LOSSES)):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-12)
    for name in ("query_hidden", "image_embeds", "text_embeds"):
        torch.testing.assert_close(after[name], before[name][order], rtol=0, atol=1e-12)
    for name in ("sim_i2t", "sim_t2i"):
        torch.testing.assert_close(after[name], before[name][order][:, order], rtol=0, atol=1e-12)
    logits = before.itm_logits.unflatten(0, (3, 5))[:, order].flatten(0, 1)
    torch.testing.assert_close(after.itm_logits, logits, rtol=0, atol=1e-12)


@BOTH_PATHS
def test_a_single_pair_has_no_negatives(use_fused):
    model = small_model(use_fused=use_fused)
    inputs = small_batch(1)
    output = model(**inputs)
    assert [index.tolist() for index in output.negatives] == [[-1], [-1]]
    assert output.itm_labels.tolist() == [1, -100, -100]
    params, batch = dict(model.named_parameters()), rank_batch(inputs, output.negatives)
    expected = naive_step(params, model.config, [batch])[0]
    for name in LOSSES:
        torch.testing.assert_close(output[f"loss_{name}"], expected[name], rtol=0, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@BOTH_PATHS
def test_one_image_under_several_captions_has_no_negatives(use_fused):
    model = small_model(use_fused=use_fused)
    output = model(**small_batch(3), image_ids=torch.tensor([4, 4, 4]))
    assert output.itm_labels.tolist() == [1, 1, 1] + [-100] * 6
    assert output.loss.isfinite()


@BOTH_PATHS
def test_a_text_of_one_token_teaches_no_words(use_fused):
    model = small_model(use_fused=use_fused)
    inputs = small_batch(2)
    inputs["input_ids"], inputs["attention_mask"] = torch.full((2, 1), CLS), torch.ones(2, 1)
    output = model(**inputs)
    assert output.loss_itg.item() == 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_image_features_of_any_floating_dtype_are_cast():
    model, inputs, negatives = small_model(), small_batch(), some_negatives(4)
    half = {**inputs, "image_features": inputs["image_features"].half()}
    full = {**inputs, "image_features": inputs["image_features"].half().float()}
    assert torch.equal(model(**half, negatives=negatives).loss, model(**full, negatives=negatives).loss)


def test_parameters_have_the_names_of_the_checkpoints():
    names = set(Blip2ForPreTraining(small_config()).state_dict())
    transform = {f"transform.{part}.{name}" for part in ("dense", "LayerNorm") for name in ("weight", "bias")}
    assert {f"cls.predictions.{name}" for name in transform | {"bias"}} <= names
    assert {"temp", "query_tokens", "embeddings.word_embeddings.weight", "itm_head.weight"} <= names
    prefixes = {name.split(".")[0] for name in names}
    assert prefixes == {
        "query_tokens", "embeddings", "ln_vision", "qformer", "vision_projection", "text_projection",
        "itm_head", "cls", "temp",
    }  # fmt: skip


def test_the_model_starts_as_the_paper_says(seed):
    model = Blip2ForPreTraining(small_config(num_query_tokens=64))
    assert model.temp.item() == pytest.approx(0.07)
    for parameter in (model.query_tokens, model.cls["predictions"].transform.dense.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    for layer in model.qformer.encoder.layer:
        assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)


def test_the_decoder_is_the_word_embedding():
    model, inputs = small_model(), small_batch()
    grad = gradients(model(**inputs).loss_itg, model)["embeddings.word_embeddings.weight"]
    unused = [token for token in range(SEP + 1, 30) if not (inputs["input_ids"] == token).any()]
    assert unused and all(grad[token].abs().max() > 0 for token in unused), "words never read, only predicted"


@BOTH_PATHS
def test_the_caption_starts_with_dec_and_ignores_the_contrastive_text(use_fused):
    model = small_model(use_fused=use_fused, dtype=torch.float64)
    inputs, negatives = small_batch(), some_negatives(4)
    other = copy.deepcopy(inputs)
    other["input_ids"][:, 0] = 20
    before, after = model(**inputs, negatives=negatives), model(**other, negatives=negatives)
    torch.testing.assert_close(after.loss_itg, before.loss_itg, rtol=0, atol=1e-12)
    assert (after.loss_itc - before.loss_itc).abs() > 1e-6


@BOTH_PATHS
@pytest.mark.parametrize("token", range(1, 7))
def test_caption_rows_do_not_see_what_they_predict(use_fused, token):
    model = small_model(use_fused=use_fused)
    inputs = small_batch(2)
    inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    inputs["input_ids"] = torch.arange(3, 17).view(2, 7)
    rows = []
    model.cls["predictions"].register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    embedded = []
    model.embeddings.register_forward_hook(lambda *args: embedded.append(args[2]))
    model(**inputs)
    captions = rows[0].view(2, -1, 16)  # without the last row, which predicts nothing, on the fused path

    def reaches(source: int, row: int) -> bool:
        """Whether a caption row depends on a token, in whatever text it was embedded."""
        weights = torch.randn(captions.shape[-1])  # A plain sum behind a LayerNorm would have no gradient.
        total = (captions[:, row] * weights).sum()
        grads = torch.autograd.grad(total, embedded, retain_graph=True, allow_unused=True)
        found = [grad.view(2, 7, 16)[:, source] for grad in grads if grad is not None]
        return any(bool(grad.abs().max() > 1e-6) for grad in found)

    assert [reaches(token, row) for row in range(6)] == [row >= token for row in range(6)]


BAD_INPUT = {
    "ids are floats": ({"input_ids": torch.ones(4, 7)}, TypeError, "input_ids: expected int64"),
    "ids of rank 1": ({"input_ids": torch.ones(7).long()}, ValueError, r"input_ids: .*got int64 \[7\]"),
    "ids outside the vocabulary": ({"input_ids": torch.full((4, 7), 99)}, ValueError, "input_ids: .*got 99"),
    "empty batch": (
        {"input_ids": torch.ones(0, 7).long(), "attention_mask": torch.ones(0, 7)},
        ValueError,
        "input_ids: expected at least one",
    ),
    "no mask": ({"attention_mask": None}, TypeError, "attention_mask: expected a 0/1 tensor"),
    "mask of another length": (
        {"attention_mask": torch.ones(4, 6)},
        ValueError,
        r"attention_mask: .*\[4, 7\]",
    ),
    "mask of twos": (
        {"attention_mask": torch.full((4, 7), 2)},
        ValueError,
        "attention_mask: .*0 and 1, got 2",
    ),
    "first token masked": (
        {"attention_mask": torch.tensor([[1] * 7, [1] * 7, [0] + [1] * 6, [1] * 7])},
        ValueError,
        "attention_mask: expected 1 in the first column.*got 0 in row 2",
    ),
    "text longer than the position table": (
        {"input_ids": torch.ones(4, POSITIONS + 1).long(), "attention_mask": torch.ones(4, POSITIONS + 1)},
        ValueError,
        f"input_ids: expected at most {POSITIONS} tokens.*got {POSITIONS + 1}",
    ),
    "no image": ({"image_features": None}, ValueError, "image_features: .*got neither"),
    "two kinds of image": (
        {"pixel_values": torch.zeros(4, 3, 4, 5)},
        ValueError,
        "image_features: .*got both",
    ),
    "pixels without an encoder": (
        {"image_features": None, "pixel_values": torch.zeros(4, 3, 4, 5)},
        ValueError,
        "pixel_values: expected image_features",
    ),
    "features of rank 2": ({"image_features": torch.zeros(4, IMAGE_WIDTH)}, ValueError, "image_features: "),
    "features of another width": (
        {"image_features": torch.zeros(4, 5, IMAGE_WIDTH + 1)},
        ValueError,
        rf"image_features: .*{IMAGE_WIDTH}\], got float32 \[4, 5, {IMAGE_WIDTH + 1}\]",
    ),
    "features that are integers": (
        {"image_features": torch.zeros(4, 5, IMAGE_WIDTH).long()},
        TypeError,
        "image_features: .*got int64",
    ),
    "more images than texts": (
        {"image_features": torch.zeros(5, 5, IMAGE_WIDTH)},
        ValueError,
        "image_features: expected 4 images, one a text, got 5",
    ),
    "image ids of another length": ({"image_ids": torch.arange(3)}, ValueError, r"image_ids: .*\[4\]"),
    "image ids that are floats": ({"image_ids": torch.zeros(4)}, TypeError, "image_ids: .*got float32"),
    "a negative that is the positive": (
        {"negatives": (torch.tensor([1, 2, 2, 0]), torch.tensor([1, 2, 3, 0]))},
        ValueError,
        r"negatives \(image_index\): expected no positive of the row, got 2 in row 2",
    ),
    "a negative of the same image": (
        {"image_ids": IMAGE_IDS, "negatives": (torch.tensor([1, 2, 3, 0]), torch.tensor([2, 0, 3, 0]))},
        ValueError,
        r"negatives \(text_index\): expected no positive of the row, got 2 in row 0",
    ),
    "a negative out of range": (
        {"negatives": (torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 3, 4]))},
        ValueError,
        r"negatives \(text_index\): expected values in \[0, 4\)",
    ),
}


@BOTH_PATHS
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(use_fused, case):
    changes, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        small_model(use_fused=use_fused)(**{**small_batch(), **changes})


TOO_LONG = torch.ones(4, POSITIONS + 1, dtype=torch.int64)
LENGTH = f"^input_ids: expected at most {POSITIONS} tokens .max_position_embeddings., got {POSITIONS + 1}"
NO_KEY = r"^dropout_key: expected int64 \[\], got float32 \[\]"
FLOAT_KEY = torch.tensor(1.0)
BAD_CALLS = {
    "features elsewhere": (
        lambda m, b: m.get_image_features(b["image_features"].to("meta")),
        ValueError,
        "^image_features: expected a tensor on cpu, got one on meta",
    ),
    "text elsewhere": (
        lambda m, b: m.get_text_features(b["input_ids"].to("meta")),
        ValueError,
        "^input_ids: expected a tensor on cpu, got one on meta",
    ),
    "hidden states elsewhere": (
        lambda m, b: m.match(torch.zeros(1, 3, m.config.qformer.hidden_size, device="meta")),
        ValueError,
        "^multimodal_hidden: expected a tensor on cpu, got one on meta",
    ),
    "a switch that is none": (
        lambda m, b: setattr(m, "use_fused", "yes"),
        TypeError,
        "^use_fused: expected a bool, got str 'yes'",
    ),
    "text features, too long": (lambda m, b: m.get_text_features(TOO_LONG), ValueError, LENGTH),
    "text features, too long under a short mask": (
        lambda m, b: m.get_text_features(TOO_LONG, (torch.arange(17) < 5).long().expand(4, -1)),
        ValueError,
        LENGTH,
    ),
    "multimodal features, too long": (
        lambda m, b: m.get_multimodal_features(TOO_LONG, None, b["image_features"]),
        ValueError,
        LENGTH,
    ),
    "scores, too long": (
        lambda m, b: Blip2ForImageTextRetrieval.from_pretraining(m).itc_scores(
            TOO_LONG, None, b["image_features"]
        ),
        ValueError,
        LENGTH,
    ),
    "samples": (
        lambda m, b: m.prepare_images(b["image_features"], samples="x"),
        TypeError,
        "^samples: expected an int >= 0, got str 'x'",
    ),
    "raw images to read": (
        lambda m, b: m.image_hidden(b["image_features"]),
        TypeError,
        "^images: expected PreparedImages from prepare_images, got float32",
    ),
    "raw images to read with text": (
        lambda m, b: m.multimodal_hidden(b["image_features"], b["input_ids"]),
        TypeError,
        "^images: expected PreparedImages from prepare_images, got float32",
    ),
    "key of the image pass": (
        lambda m, b: m.image_hidden(m.prepare_images(b["image_features"]), dropout_key=FLOAT_KEY),
        TypeError,
        NO_KEY,
    ),
    "key of the text pass": (
        lambda m, b: m.train().text_hidden(b["input_ids"], dropout_key=FLOAT_KEY),
        TypeError,
        NO_KEY,
    ),
    "key of the multimodal pass": (
        lambda m, b: m.multimodal_hidden(
            m.prepare_images(b["image_features"]), b["input_ids"], dropout_key=FLOAT_KEY
        ),
        TypeError,
        NO_KEY,
    ),
    "hidden states of one query": (
        lambda m, b: m.match(torch.randn(3, 16)),
        ValueError,
        r"^multimodal_hidden: expected .*\[samples, queries, 16\], got float32 \[3, 16\]",
    ),
    "hidden states of another width": (
        lambda m, b: m.project_image(torch.randn(3, 17)),
        ValueError,
        r"^hidden: expected .*16\], got float32 \[3, 17\]",
    ),
    "no hidden states": (lambda m, b: m.project_text([1.0]), TypeError, "^hidden: expected a tensor"),
}


@BOTH_PATHS
@pytest.mark.parametrize("case", BAD_CALLS)
def test_every_way_of_reading_names_what_it_cannot_read(use_fused, case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(small_model(use_fused=use_fused), small_batch())


def test_the_constructor_names_what_it_cannot_use():
    with pytest.raises(TypeError, match="config: expected a Blip2PreTrainingConfig, got Blip2QFormerConfig"):
        Blip2ForPreTraining(small_config().qformer)
    with pytest.raises(TypeError, match=r"vision_model: expected an nn\.Module or None, got str"):
        Blip2ForPreTraining(small_config(), vision_model="vit")


def test_image_side_of_the_public_features():
    model, inputs = small_model(), small_batch()
    output = model(**inputs)
    image = model.get_image_features(inputs["image_features"])
    assert image.shape == (4, QUERIES, 8)
    torch.testing.assert_close(output.image_embeds, image)
    torch.testing.assert_close(output.query_hidden, model.encode_image(inputs["image_features"]))
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(output.text_embeds, text)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(4, QUERIES))
    best = torch.einsum("iqe,te->itq", image, text).amax(-1) / model.temp
    torch.testing.assert_close(output.sim_i2t, best)
    torch.testing.assert_close(output.sim_t2i, best.t())


def test_a_trained_model_captions_what_it_was_shown():
    model = small_model(label_smoothing=0.0, dropout=0.0).train()
    inputs = small_batch(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(**inputs).loss_itg.backward()
        optimizer.step()
    captions = model.caption(inputs["image_features"], max_new_tokens=8)
    for caption, ids in zip(captions.tolist(), inputs["input_ids"].tolist(), strict=True):
        assert caption[: caption.index(SEP)] == ids[1 : ids.index(SEP)]
    with pytest.raises(ValueError, match="num_beam"):
        model.caption(inputs["image_features"], num_beam=2)


@pytest.mark.parametrize("mode", ["autocast", "bf16", "fp16"])
def test_half_precision_is_as_near_the_truth_on_both_paths(mode):
    inputs, negatives = small_batch(), some_negatives(4)
    truth = small_model(dtype=torch.float64)(**inputs, negatives=negatives)
    outputs = []
    for use_fused in (False, True):
        dtype = {"autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mode]
        model = small_model(use_fused=use_fused, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            outputs.append(model(**inputs, negatives=negatives))
        assert outputs[-1].loss.dtype == torch.float32
        outputs[-1].loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    plain, fused = outputs
    for name in ("query_hidden", "image_embeds", "text_embeds", "itm_logits"):
        assert_yardstick(name, fused[name], plain[name], truth[name])
