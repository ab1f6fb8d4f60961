"""The three losses and the sampler of hard negatives, each against loops or closed forms."""

import math

import pytest
import torch
from naive import contrast, log_softmax, smoothed, unit

from blip2_kernels.model.losses import (
    IGNORE_INDEX,
    caption_labels,
    caption_loss,
    contrastive_loss,
    contrastive_similarities,
    matching_loss,
)
from blip2_kernels.model.negatives import check_negatives, positive_pairs, sample_hard_negatives

CPU = torch.device("cpu")


def embeddings(batch: int, queries: int = 3, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    image = unit(torch.randn(batch, queries, width, dtype=torch.float64))
    return image, unit(torch.randn(batch, width, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("image_ids", [None, [3, 1, 3, 3, 0, 1, 8]], ids=["distinct", "shared"])
def test_contrastive_loss_is_that_of_loops(batch, image_ids):
    image, text = embeddings(batch)
    temperature = torch.tensor(0.07, dtype=torch.float64)
    ids = None if image_ids is None else torch.tensor(image_ids[:batch])
    sims = contrastive_similarities(image, text, temperature)
    loss = contrastive_loss(*sims, positive_pairs(batch, ids, device=CPU))
    both = None if ids is None else (ids.tolist(), ids.tolist())
    expected = contrast(list(image), list(text), list(image), list(text), temperature, 0, both)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_similarity_is_that_of_the_best_query_over_the_temperature():
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    sim_i2t, sim_t2i = contrastive_similarities(image, text, torch.tensor(0.5))
    torch.testing.assert_close(sim_i2t, torch.tensor([[2.0, 2.0], [1.2, 1.6]]))
    torch.testing.assert_close(sim_t2i, torch.tensor([[2.0, 1.2], [2.0, 1.6]]))


@pytest.mark.parametrize("gradient", ["local", "full"])
def test_without_ranks_both_sides_of_the_contrast_get_their_gradient(gradient):
    image, text = (x.requires_grad_() for x in embeddings(3))
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    sim_i2t, _ = contrastive_similarities(image, text, temperature, gradient=gradient)
    # The texts are the gathered side of this direction.
    grad = torch.autograd.grad(sim_i2t[0, 2], text)[0]
    best = (image[0] @ text[2]).argmax()
    torch.testing.assert_close(grad[2], image[0, best].detach() / 0.07)


def test_matching_loss_counts_labelled_rows_only():
    logits = torch.randn(5, 2, dtype=torch.float64)
    labels = torch.tensor([1, 0, IGNORE_INDEX, 1, IGNORE_INDEX])
    expected = -sum(log_softmax(logits[i])[labels[i]] for i in (0, 1, 3)) / 3
    torch.testing.assert_close(matching_loss(logits, labels), expected)


@pytest.mark.parametrize("normalisation", ["rank", "global"])
def test_caption_loss_is_that_of_loops(normalisation):
    logits = torch.randn(4, 3, 11, dtype=torch.float64)
    labels = torch.tensor([[1, 2, IGNORE_INDEX], [10, IGNORE_INDEX, 4], [0, 0, 0], [IGNORE_INDEX] * 3])
    pairs = zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True)
    rows = [smoothed(log_softmax(row), label, 0.1) for row, label in pairs if label >= 0]
    loss = caption_loss(logits, labels, normalisation=normalisation)
    torch.testing.assert_close(loss, sum(rows) / len(rows))


@pytest.mark.parametrize("loss", [matching_loss, caption_loss])
def test_a_loss_without_labelled_rows_is_zero_and_differentiable(loss):
    logits = torch.randn(3, 2, requires_grad=True)
    value = loss(logits, torch.full((3,), IGNORE_INDEX))
    assert value.item() == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_summed_in_fp32(dtype):
    logits = torch.randn(6, 9).to(dtype)
    labels = torch.arange(6)
    loss = caption_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, caption_loss(logits.float(), labels), rtol=0, atol=0)


def test_each_token_is_predicted_from_the_one_before():
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [1, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    no = IGNORE_INDEX
    expected = [[5, 6, 2, no, no], [7, 2, no, no, no], [no] * 5]
    assert caption_labels(ids, mask, pad_token_id=0).tolist() == expected


def test_labels_skip_masked_rows_and_padding_that_is_not_masked():
    ids = torch.tensor([[1, 5, 6, 7, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    no = IGNORE_INDEX
    assert caption_labels(ids, mask, pad_token_id=0).tolist() == [[5, no, no, 2, no]]
    ids, mask = torch.tensor([[1, 5, 0, 2]]), torch.ones(1, 4)
    assert caption_labels(ids, mask, pad_token_id=0).tolist() == [[5, no, 2, no]]


@pytest.mark.parametrize("draw", range(20))
def test_a_positive_is_never_drawn(seed, draw):
    generator = torch.Generator().manual_seed(seed)
    batch = int(torch.randint(1, 9, (), generator=generator))
    total = batch * int(torch.randint(1, 4, (), generator=generator))
    # Sharp similarities that make positives by far the likeliest, were they admitted.
    positives = torch.rand(batch, total, generator=generator) < torch.rand((), generator=generator)
    sims = [torch.randn(batch, total, generator=generator) * 20 + 50 * positives for _ in range(2)]
    for _ in range(20):
        for index in sample_hard_negatives(*sims, positives, generator=generator):
            none = index < 0
            assert torch.equal(none, positives.all(dim=1)), "exactly rows of positives only have no negative"
            assert not positives.gather(1, index.clamp(min=0)[:, None])[~none].any()
            assert (index < total).all() and (index[none] == -1).all() and index.dtype == torch.int64


def test_negatives_are_drawn_from_the_softmax_of_their_own_direction(seed):
    generator = torch.Generator().manual_seed(seed)
    draws, total = 4000, 6
    positives = torch.tensor([True, False, False, True, False, False]).expand(draws, -1)
    rows = [torch.randn(total, generator=generator) for _ in range(2)]
    sim_i2t, sim_t2i = (row.expand(draws, -1) for row in rows)
    image_index, text_index = sample_hard_negatives(sim_i2t, sim_t2i, positives, generator=generator)
    for index, row in ((text_index, rows[0]), (image_index, rows[1])):
        weights = row.exp() * ~positives[0]
        expected = (weights / weights.sum() * draws)[~positives[0]]
        observed = torch.bincount(index, minlength=total)[~positives[0]]
        chi_square = ((observed - expected) ** 2 / expected).sum()
        # Three degrees of freedom: 21.1 is passed once in ten thousand draws, and the seed is fixed.
        assert chi_square < 21.1, f"{chi_square=}: observed {observed}, expected {expected}"


def test_similarities_gone_wrong_still_give_admissible_negatives():
    sim = torch.full((3, 3), math.nan)
    positives = torch.eye(3, dtype=torch.bool)
    for index in sample_hard_negatives(sim, torch.full((3, 3), math.inf), positives):
        assert not positives[torch.arange(3), index].any()


def test_positives_are_own_pairs_and_pairs_of_the_same_image():
    assert torch.equal(positive_pairs(3, device=CPU), torch.eye(3, dtype=torch.bool))
    shared = positive_pairs(3, torch.tensor([4, 9, 4]), device=CPU)
    assert shared.tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_sampler_refuses_what_does_not_belong_together():
    sim, positives = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="sim_i2t: expected a floating"):
        sample_hard_negatives(sim.long(), sim.long(), positives)
    with pytest.raises(TypeError, match="sim_t2i: expected float32"):
        sample_hard_negatives(sim, sim.double(), positives)
    with pytest.raises(ValueError, match=r"sim_t2i: expected float32 \[2, 3\], got float32 \[3, 2\]"):
        sample_hard_negatives(sim, sim.t(), positives)
    with pytest.raises(TypeError, match="positives: expected bool"):
        sample_hard_negatives(sim, sim, positives.int())


@pytest.mark.parametrize(
    ("negatives", "error", "message"),
    [
        (torch.tensor([1, 0]), TypeError, "expected a pair"),
        (([1, 0], [1, 0]), TypeError, r"negatives \(image_index\): expected a tensor"),
        ((torch.tensor([1, 0]),), TypeError, "expected a pair .*got 1 values"),
        ((torch.tensor([1.0, 0.0]), torch.tensor([1, 0])), TypeError, r"\(image_index\): expected int64 or"),
        ((torch.tensor([1, 0]), torch.tensor([1, 0]).int()), TypeError, r"\(text_index\): expected int64"),
        (
            (torch.tensor([1, 0]), torch.tensor([1, 0, 1])),
            ValueError,
            r"\(text_index\): .*\[2\], got int64 \[3\]",
        ),
        ((torch.tensor([2, 0]), torch.tensor([1, 0])), ValueError, r"image_index.* in \[0, 2\).*got 2"),
        ((torch.tensor([1, 0]), torch.tensor([1, -2])), ValueError, r"text_index.* in \[0, 2\).*got -2"),
        (
            (torch.tensor([1, 1]), torch.tensor([1, 0])),
            ValueError,
            "image_index.*no positive.*got 1 in row 1",
        ),
        (
            (torch.tensor([1, 0]), torch.tensor([0, -1])),
            ValueError,
            "text_index.*no positive.*got 0 in row 0",
        ),
    ],
)
def test_given_negatives_are_checked(negatives, error, message):
    with pytest.raises(error, match=message):
        check_negatives(negatives, positive_pairs(2, device=CPU))


def test_given_negatives_come_back_as_int64():
    given = (torch.tensor([1, -1], dtype=torch.int32), torch.tensor([-1, 0], dtype=torch.int32))
    checked = check_negatives(given, positive_pairs(2, device=CPU))
    assert [x.dtype for x in checked] == [torch.int64] * 2
    assert [x.tolist() for x in checked] == [[1, -1], [-1, 0]]


# --- bad input ---

IMAGES, TEXTS, TEMP = torch.randn(4, 3, 8), torch.randn(4, 8), torch.tensor(0.07)
SIM, OWN = torch.randn(4, 4), torch.eye(4, dtype=torch.bool)
TWO, BIT = torch.randn(4, 2), torch.tensor([0, 1, 1, IGNORE_INDEX])
WORDS, NEXT = torch.randn(2, 5, 9), torch.ones(2, 5, dtype=torch.int64)


def similarities(image=IMAGES, text=TEXTS, temperature=TEMP, **options):
    return contrastive_similarities(image, text, temperature, **options)


def contrast_of(i2t=SIM, t2i=SIM, positives=OWN, **options):
    return contrastive_loss(i2t, t2i, positives, **options)


BAD = {
    "gradient": (
        lambda: similarities(gradient="ful"),
        ValueError,
        "^gradient: expected one of 'local', 'full'",
    ),
    "integers": (lambda: similarities(IMAGES.int(), TEXTS.int()), TypeError, r"^image_embeds: .* got int32"),
    "image rank": (
        lambda: similarities(IMAGES[0]),
        ValueError,
        r"^image_embeds: .*\[B, Q, E\], got float32 \[3, 8\]",
    ),
    "text dtype": (
        lambda: similarities(text=TEXTS.half()),
        TypeError,
        r"^text_embeds: expected float32 \[4, 8\]",
    ),
    "text batch": (
        lambda: similarities(text=TEXTS[:3]),
        ValueError,
        r"^text_embeds: .*\[4, 8\], got .*\[3, 8\]",
    ),
    "temperature 0": (lambda: similarities(temperature=TEMP * 0), ValueError, "^temperature: .* > 0, got 0"),
    "temperature str": (lambda: similarities(temperature="x"), TypeError, "^temperature: expected a tensor"),
    "temperatures": (lambda: similarities(temperature=torch.ones(4)), ValueError, r"^temperature: .*\[4\]"),
    "no positive": (
        lambda: contrast_of(positives=OWN & (torch.arange(4) != 2)),
        ValueError,
        "^positives: expected at least one a row, got none in row 2",
    ),
    "soft positives": (lambda: contrast_of(positives=OWN * 0.5), TypeError, "^positives: expected bool"),
    "positives' shape": (lambda: contrast_of(positives=OWN[:, :3]), ValueError, r"^positives: .*\[4, 4\]"),
    "sims' shapes": (lambda: contrast_of(t2i=SIM[:3]), ValueError, r"^sim_t2i: .*\[4, 4\]"),
    "sims' dtypes": (lambda: contrast_of(t2i=SIM.double()), TypeError, "^sim_t2i: expected float32"),
    "no sims": (
        lambda: contrast_of(SIM[:0], SIM[:0], OWN[:0]),
        ValueError,
        "^sim_i2t: expected at least one",
    ),
    "smoothing 2": (
        lambda: contrast_of(label_smoothing=2.0),
        ValueError,
        r"^label_smoothing: .*\[0, 1\), got 2",
    ),
    "smoothing str": (
        lambda: contrast_of(label_smoothing="x"),
        TypeError,
        "^label_smoothing: expected a number",
    ),
    "three logits": (lambda: matching_loss(torch.randn(4, 3), BIT), ValueError, r"^logits: .*\[S, 2\]"),
    "label 5": (
        lambda: matching_loss(TWO, torch.tensor([0, 5, 1, 0])),
        ValueError,
        r"^labels: expected -100 or values in \[0, 2\), got 5",
    ),
    "label -1": (lambda: matching_loss(TWO, BIT - 1), ValueError, r"^labels: expected -100 or .*got -1"),
    "float labels": (lambda: matching_loss(TWO, BIT.float()), TypeError, "^labels: expected int64"),
    "int32 labels": (lambda: matching_loss(TWO, BIT.int()), TypeError, "^labels: expected int64"),
    "labels' length": (lambda: matching_loss(TWO, BIT[:3]), ValueError, r"^labels: .*\[4\], got int64 \[3\]"),
    "float ids": (lambda: caption_labels(NEXT.float(), NEXT, 0), TypeError, "^input_ids: expected int64"),
    "mask shape": (lambda: caption_labels(NEXT, NEXT[:1], 0), ValueError, r"^attention_mask: .*\[2, 5\]"),
    "mask value": (lambda: caption_labels(NEXT, NEXT * 0.5, 0), ValueError, "^attention_mask: .*got 0.5"),
    "pad": (lambda: caption_labels(NEXT, NEXT, "0"), TypeError, "^pad_token_id: expected an int"),
    "normalisation": (
        lambda: caption_loss(WORDS, NEXT, normalisation="glob"),
        ValueError,
        "^normalisation: expected one of 'rank', 'global', got 'glob'",
    ),
    "label range": (lambda: caption_loss(WORDS, NEXT * 10), ValueError, r"^labels: .*\[0, 9\), got 10"),
    "label shape": (
        lambda: caption_loss(WORDS, NEXT.T),
        ValueError,
        r"^labels: .*\[2, 5\], got int64 \[5, 2\]",
    ),
    "smoothing -1": (
        lambda: caption_loss(WORDS, NEXT, label_smoothing=-1.0),
        ValueError,
        "^label_smoothing: ",
    ),
    "no logits": (lambda: caption_loss(WORDS[0, 0], NEXT[0, 0]), ValueError, r"^logits: .*\[\.\.\., vocab\]"),
    "listed logits": (lambda: caption_loss([[1.0]], NEXT), TypeError, "^logits: expected a tensor"),
    "ids of a batch": (
        lambda: positive_pairs(4, torch.ones(3).long(), device=CPU),
        ValueError,
        r"^image_ids: .*\[4\], got int64 \[3\]",
    ),
    "ids in a column": (lambda: positive_pairs(4, NEXT[:, :1], device=CPU), ValueError, "^image_ids: "),
    "batch str": (lambda: positive_pairs("4", device=CPU), TypeError, "^batch_size: expected an int"),
    "batch -1": (
        lambda: positive_pairs(-1, device=CPU),
        ValueError,
        "^batch_size: expected an int >= 0, got -1",
    ),
    "listed positives": (
        lambda: check_negatives((BIT, BIT), [[True]]),
        TypeError,
        "^positives: expected a tensor",
    ),
    "negatives str": (lambda: check_negatives("ab", OWN), TypeError, "^negatives: .*pair.* got str 'ab'"),
    "generator": (
        lambda: sample_hard_negatives(SIM, SIM, OWN, generator=3),
        TypeError,
        "^generator: expected a torch.Generator or None, got int 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_computed(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_temperature_that_is_nan_gives_a_loss_that_is():
    sims = similarities(temperature=torch.tensor(math.nan))
    assert contrast_of(*sims).isnan()
