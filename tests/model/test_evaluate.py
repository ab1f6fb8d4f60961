"""Metrics against brute force, and what ties and chance are worth."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from blip2_kernels.model import evaluate
from blip2_kernels.model.evaluate import (
    chance_recall_at,
    choice_accuracy,
    content_accuracy,
    matching_accuracy,
    mentions,
    position,
    positives_from_ids,
    ranks,
    recall_at,
    retrieval_metrics,
    token_loss,
    words,
)


def brute_rank(row: list[float], right: list[bool]) -> int:
    """Worst place of the best positive among the wrong candidates, over all orders that the scores allow."""
    best = max(s for s, r in zip(row, right, strict=True) if r)
    order = sorted(zip(row, right, strict=True), key=lambda pair: (-pair[0], pair[1]))
    place = 1
    for score, is_right in order:
        if is_right and score == best:
            return place
        place += not is_right
    raise AssertionError("no positive")


def test_ranks_are_those_of_brute_force_with_ties_and_several_positives():
    for shape in ((1, 1), (1, 7), (7, 1), (33, 31)):
        scores = torch.randint(0, 6, shape).float()
        positives = torch.rand(shape) < 0.2
        positives[torch.arange(shape[0]), torch.randint(0, shape[1], (shape[0],))] = True
        expected = [brute_rank(s, p) for s, p in zip(scores.tolist(), positives.tolist(), strict=True)]
        assert ranks(scores, positives).tolist() == expected
        recall = recall_at(scores, positives, (1, 3))
        assert recall["R@1"] == pytest.approx(sum(r <= 1 for r in expected) / len(expected))
        assert recall["R@3"] == pytest.approx(sum(r <= 3 for r in expected) / len(expected))


def test_constant_scores_are_worth_nothing():
    metrics = retrieval_metrics(torch.zeros(9, 9), ks=(1, 8, 9))
    assert metrics["image_to_text"] == {"R@1": 0.0, "R@8": 0.0, "R@9": 1.0, "median_rank": 9.0}
    assert choice_accuracy(torch.ones(4, 3)) == {"accuracy": 0.0, "chance": 1 / 3}
    assert matching_accuracy(torch.zeros(3, 2), torch.tensor([0, 1, 1]))["accuracy"] == 0.0


def test_retrieval_goes_both_ways():
    image_ids = torch.tensor([4, 8, 2])
    text_ids = torch.tensor([8, 4, 2, 2, 8])
    positives = positives_from_ids(image_ids, text_ids)
    assert positives.tolist() == [
        [False, True, False, False, False],
        [True, False, False, False, True],
        [False, False, True, True, False],
    ]
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.2, 0.6], [0.3, 0.2, 0.1, 0.8, 0.7], [0.1, 0.2, 0.9, 0.3, 0.4]])
    metrics = retrieval_metrics(scores, positives, ks=(1, 2))
    assert metrics["image_to_text"] == {
        "R@1": pytest.approx(1 / 3),
        "R@2": pytest.approx(2 / 3),
        "median_rank": 2,
    }
    # text by text: ranks 2, 1, 1, 2, 1
    assert metrics["text_to_image"] == {"R@1": pytest.approx(3 / 5), "R@2": 1.0, "median_rank": 1}
    assert metrics["chance_text_to_image"] == {"R@1": pytest.approx(1 / 3), "R@2": pytest.approx(2 / 3)}
    assert metrics["chance_image_to_text"]["R@1"] == pytest.approx((1 / 5 + 2 / 5 + 2 / 5) / 3)


def test_chance_is_the_mean_over_all_orders():
    positives = torch.tensor([[True, False, True, False, False], [False, False, False, True, False]])
    for k in (1, 2, 4, 5, 9):
        hits = [
            any(positives[row, candidate] for candidate in order[:k])
            for row in range(2)
            for order in itertools.permutations(range(5))
        ]
        assert chance_recall_at(positives, (k,))[f"R@{k}"] == pytest.approx(sum(hits) / len(hits)), k


def test_choice_accuracy_counts_the_highest():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.4, 0.1], [0.5, 0.5, 0.1], [0.0, 0.1, 0.7]])
    assert choice_accuracy(scores)["accuracy"] == 0.25
    assert choice_accuracy(scores, torch.tensor([0, 1, 1, 2]))["accuracy"] == 0.75


def test_matching_accuracy_leaves_out_what_is_not_labelled():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [5.0, 1.0], [0.0, 9.0]])
    labels = torch.tensor([0, 1, 0, -100, 0])
    metrics = matching_accuracy(logits, labels)
    assert metrics["accuracy"] == 0.5 and metrics["rows"] == 4
    assert metrics["accuracy_match"] == 1.0 and metrics["accuracy_no_match"] == pytest.approx(1 / 3)
    assert metrics["chance"] == 0.75
    assert math.isnan(matching_accuracy(logits[:1], labels[:1])["accuracy_match"])


def test_token_loss_is_the_negative_log_likelihood_of_each_caption():
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(0, 7, (3, 5))
    labels[0, 3:] = labels[2] = -100
    total, count = token_loss(logits, labels)
    assert count.tolist() == [3, 5, 0] and total[2] == 0
    for row in range(3):
        expected = sum(
            -F.log_softmax(logits[row, t], -1)[labels[row, t]].item() for t in range(5) if labels[row, t] >= 0
        )
        assert total[row].item() == pytest.approx(expected, rel=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert (total.sum() / count.sum()).item() == pytest.approx(loss.item(), rel=1e-5)
    assert token_loss(logits.bfloat16(), labels)[0].dtype == torch.float64


def test_content_of_captions():
    assert words("A red-hot Car's wheel, 2 dogs!") == ["a", "red-hot", "car's", "wheel", "2", "dogs"]
    assert mentions("A Red car, left of a hot dog.", "red car") and mentions("hot dog", "Hot Dog")
    assert (
        not mentions("a cart", "car") and not mentions("red big car", "red car") and not mentions("", "car")
    )
    assert position("a cat left of a cat", "cat") == 1 and position("a cat", "dog") == -1
    captions = ["a red car and a banana", "a banana", "nothing"]
    required = [["red car", "banana"], ["banana", "dog"], ["cat"]]
    assert content_accuracy(captions, required) == {
        "all": pytest.approx(1 / 3),
        "any": pytest.approx(2 / 3),
        "each": pytest.approx(3 / 5),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ranks(torch.zeros(2, 3), torch.ones(3, 2, dtype=torch.bool)),
            r"positives: expected bool \[2, 3\]",
        ),
        (
            lambda: ranks(torch.zeros(2, 3), torch.ones(2, 3)),
            r"positives: expected bool .* got torch.float32",
        ),
        (lambda: ranks(torch.zeros(0, 3), torch.ones(0, 3).bool()), "scores: expected"),
        (lambda: ranks(torch.full((1, 2), math.nan), torch.ones(1, 2).bool()), "got NaN in 1 rows"),
        (
            lambda: ranks(torch.zeros(2, 2), torch.eye(2).bool() & torch.tensor([True, False])),
            "none in row 1",
        ),
        (lambda: retrieval_metrics(torch.zeros(2, 3)), "not square"),
        (lambda: positives_from_ids(torch.zeros(2, 1).long(), torch.zeros(2)), r"row_ids: expected .* \[n\]"),
        (lambda: choice_accuracy(torch.zeros(2, 1)), "at least 2 candidates"),
        (lambda: choice_accuracy(torch.zeros(2, 2), 2), r"correct: expected values in \[0, 2\), got 2"),
        (lambda: matching_accuracy(torch.zeros(2, 3), torch.zeros(2).long()), r"expected \[S, 2\] and \[S\]"),
        (lambda: matching_accuracy(torch.zeros(2, 2), torch.tensor([0, 2])), "expected 0, 1 or -100"),
        (lambda: matching_accuracy(torch.zeros(1, 2), torch.tensor([-100])), "at least one other than -100"),
        (lambda: token_loss(torch.zeros(2, 3), torch.zeros(2, 3).long()), r"expected \[B, T, V\]"),
        (lambda: content_accuracy(["a"], []), "one entry for each of 1 captions, got 0"),
        (lambda: content_accuracy(["a"], [[]]), "at least one phrase"),
        (lambda: mentions("a", "..."), "phrase: expected at least one word"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SCORES, RIGHT = torch.rand(3, 3), torch.eye(3, dtype=torch.bool)
BAD = {
    "listed scores": (
        lambda: evaluate.ranks([[1.0]], RIGHT),
        TypeError,
        "^scores: expected a tensor .*, got list",
    ),
    "listed positives": (lambda: evaluate.ranks(SCORES, [[1]]), TypeError, "^positives: expected a tensor"),
    "k 0": (lambda: evaluate.recall_at(SCORES, RIGHT, (0,)), ValueError, "^ks: expected an int >= 1, got 0"),
    "k -1": (
        lambda: evaluate.chance_recall_at(RIGHT, (-1,)),
        ValueError,
        "^ks: expected an int >= 1, got -1",
    ),
    "one k": (
        lambda: evaluate.retrieval_metrics(SCORES, ks=5),
        TypeError,
        "^ks: expected a sequence of ints",
    ),
    "choice -1": (
        lambda: evaluate.choice_accuracy(SCORES, torch.tensor([-1, 0, 0])),
        ValueError,
        r"^correct: expected values in \[0, 3\), got -1",
    ),
    "NaN logits": (
        lambda: evaluate.matching_accuracy(torch.full((2, 2), math.nan), torch.tensor([0, 1])),
        ValueError,
        "^logits: expected numbers, got NaN in 2 rows",
    ),
    "choices of another length": (
        lambda: evaluate.choice_accuracy(SCORES, torch.tensor([0, 0])),
        ValueError,
        r"^correct: expected an int or integers \[3\], got int64 \[2\]",
    ),
    "label 7": (
        lambda: evaluate.token_loss(SCORES[None], torch.tensor([[0, 7, -100]])),
        ValueError,
        r"^labels: expected -100 or values in \[0, 3\), got 7",
    ),
    "soft positives": (lambda: evaluate.chance_recall_at(SCORES), ValueError, "^positives: expected bool"),
    "listed square": (
        lambda: evaluate.retrieval_metrics(SCORES, [[1]]),
        TypeError,
        "^positives: expected a tensor",
    ),
    "whole scores": (lambda: evaluate.ranks(SCORES.long(), RIGHT), TypeError, "^scores: .* got int64"),
    "no values": (
        lambda: evaluate.ranks(SCORES.to("meta"), RIGHT.to("meta")),
        ValueError,
        "^scores: expected a tensor with values, got one on meta",
    ),
    "elsewhere": (
        lambda: evaluate.ranks(SCORES, RIGHT.to("meta")),
        ValueError,
        "^positives: expected a tensor on cpu, got one on meta",
    ),
    "no choice": (
        lambda: evaluate.choice_accuracy(SCORES, None),
        TypeError,
        "^correct: expected an int >= 0",
    ),
    "ids of floats": (
        lambda: evaluate.positives_from_ids(torch.zeros(2), torch.zeros(2)),
        TypeError,
        "^row_ids: expected int64 or int32",
    ),
    "no text": (lambda: evaluate.words(5), TypeError, "^text: expected a str, got int 5"),
    "one caption": (
        lambda: evaluate.content_accuracy("a cat", [["cat"]]),
        TypeError,
        "^captions: expected a sequence, one entry a caption, got str",
    ),
    "one phrase": (
        lambda: evaluate.content_accuracy(["a cat"], ["cat"]),
        TypeError,
        "^required: expected a list of phrases a caption, got str 'cat'",
    ),
    "listed labels": (
        lambda: evaluate.token_loss(SCORES[None], [1]),
        TypeError,
        "^labels: expected a tensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
