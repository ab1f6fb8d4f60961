"""Figures that say how good a model is, each beside what chance would give.

Small pure functions: scores (or logits, or captions) and what is right go in, numbers come out. Ties are
always counted against the model, so that constant scores are worth nothing: a model that says the same about
every pair has recall 0, not 1.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_kernels.checks import FLOATING, INTEGERS, check_int, check_range, check_tensor, describe

IGNORED = -100


def positives_from_ids(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """bool [N, M]: where row and column show the same image.

    Args:
        row_ids: integers [N], the image of each row (image or caption).
        column_ids: integers [M].
    """
    _check_values("row_ids", row_ids, ["n"], INTEGERS)
    _check_values("column_ids", column_ids, ["n"], INTEGERS, row_ids.device)
    return row_ids[:, None] == column_ids[None, :]


def _check_values(
    name: str,
    value: object,
    shape: Sequence[int | str] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATING,
    device: torch.device | None = None,
) -> None:
    """As `check_tensor`; and the tensor has values, which everything here looks at."""
    if check_tensor(name, value, shape, dtypes, device).is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on meta")


def _check_ks(ks: Sequence[int]) -> None:
    if not isinstance(ks, Sequence) or isinstance(ks, str):
        raise TypeError(f"ks: expected a sequence of ints, got {describe(ks)}")
    for k in ks:
        check_int("ks", k, 1)


def _check_scores(scores: Tensor, positives: Tensor) -> None:
    _check_values("scores", scores)
    _check_values("positives", positives, dtypes=(), device=scores.device)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores: expected [queries, candidates], not empty, got {list(scores.shape)}")
    if positives.shape != scores.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"positives: expected bool {list(scores.shape)}, got {positives.dtype} {list(positives.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"scores: expected numbers, got NaN in {int(scores.isnan().any(1).sum())} rows")
    if not bool(positives.any(1).all()):
        row = int((~positives.any(1)).nonzero()[0])
        raise ValueError(f"positives: expected at least one in every row, got none in row {row}")


def ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank of the best positive of each row, from 1; int64 [N].

    Wrong candidates that score the same count as better; other positives never count.

    Args:
        scores: floating [N, M], higher is better.
        positives: bool [N, M], at least one a row.

    Raises:
        ValueError: shapes that do not fit, an empty or NaN score, a row without a positive.
    """
    _check_scores(scores, positives)
    best = scores.masked_fill(~positives, -math.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~positives).sum(1)


def recall_at(scores: Tensor, positives: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`{"R@1": …, "R@5": …}`: share of rows with a positive among the k best; arguments as for
    :func:`ranks`.
    """
    _check_ks(ks)
    found = ranks(scores, positives)
    return {f"R@{k}": float((found <= k).double().mean()) for k in ks}


def chance_recall_at(positives: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """What random scores reach in :func:`recall_at` on average: 1 - C(M - p, k) / C(M, k) with p positives of
    M.
    """
    _check_values("positives", positives, dtypes=())
    _check_ks(ks)
    if positives.ndim != 2 or 0 in positives.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"positives: expected bool [queries, candidates], not empty, got {describe(positives)}"
        )
    candidates = positives.shape[1]
    counts = positives.sum(1).tolist()
    chances = {}
    for k in ks:
        draws = min(k, candidates)
        of_count = {
            p: 1.0 - math.comb(candidates - p, draws) / math.comb(candidates, draws) for p in set(counts)
        }
        chances[f"R@{k}"] = sum(of_count[p] for p in counts) / len(counts)
    return chances


def retrieval_metrics(
    scores: Tensor, positives: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """Recall both ways.

    Args:
        scores: floating [images, texts].
        positives: bool of the same shape; default: text i belongs to image i.

    Returns:
        `image_to_text`, `text_to_image`: `R@k`, `median_rank`; `chance_image_to_text`,
        `chance_text_to_image`: `R@k`.

    Raises:
        ValueError: as :func:`ranks`; no `positives` and not square.
    """
    _check_values("scores", scores)
    if positives is not None:
        _check_values("positives", positives, dtypes=(), device=scores.device)
    _check_ks(ks)
    if positives is None:
        if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
            raise ValueError(
                f"positives: expected them with scores that are not square, {list(scores.shape)}"
            )
        positives = torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    metrics: dict[str, dict[str, float]] = {}
    for name, table, right in (
        ("image_to_text", scores, positives),
        ("text_to_image", scores.T, positives.T),
    ):
        found = ranks(table, right)
        metrics[name] = {
            **{f"R@{k}": float((found <= k).double().mean()) for k in ks},
            "median_rank": float(found.double().quantile(0.5)),
        }
        metrics[f"chance_{name}"] = chance_recall_at(right, ks)
    return metrics


def choice_accuracy(scores: Tensor, correct: Tensor | int = 0) -> dict[str, float]:
    """How often the right one of several candidates scores highest, e.g. captions with only the relation
    swapped.

    Args:
        scores: floating [N, candidates].
        correct: index of the right candidate, one for all rows or int64 [N]. A tie with a wrong one is wrong.

    Returns:
        `accuracy` and `chance` (1 / candidates).

    Raises:
        ValueError: fewer than two candidates, an index out of range, NaN.
    """
    _check_values("scores", scores)
    if isinstance(correct, Tensor):
        _check_values("correct", correct, dtypes=INTEGERS)
    else:
        check_int("correct", correct, 0)
    if scores.ndim != 2 or scores.shape[0] == 0 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected [n, at least 2 candidates], got {list(scores.shape)}")
    right = torch.as_tensor(correct, device=scores.device)
    if right.shape not in ((), scores.shape[:1]):
        raise ValueError(f"correct: expected an int or integers [{scores.shape[0]}], got {describe(right)}")
    right = right.expand(scores.shape[0])
    check_range("correct", right, scores.shape[1], force=True)
    positives = F.one_hot(right.long(), scores.shape[1]).bool()
    return {"accuracy": float((ranks(scores, positives) == 1).double().mean()), "chance": 1 / scores.shape[1]}


def matching_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of image-text matching.

    Args:
        logits: floating [S, 2]: no match, match. Equal logits are wrong either way.
        labels: integers [S], 0 or 1; -100 is left out.

    Returns:
        `accuracy`; `accuracy_match` and `accuracy_no_match` (NaN without such rows); `chance`, what always
        giving the more frequent answer reaches; `rows` counted.

    Raises:
        ValueError: other shapes or labels, or no row that counts.
    """
    _check_values("logits", logits)
    _check_values("labels", labels, dtypes=INTEGERS, device=logits.device)
    if logits.ndim != 2 or logits.shape[1] != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits, labels: expected [S, 2] and [S], got {list(logits.shape)} and {list(labels.shape)}"
        )
    counted = labels != IGNORED
    logits, labels = logits[counted], labels[counted]
    if bool(logits.isnan().any()):
        raise ValueError(f"logits: expected numbers, got NaN in {int(logits.isnan().any(1).sum())} rows")
    if not len(labels) or not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError("labels: expected 0, 1 or -100, at least one other than -100")
    rows = torch.arange(len(labels), device=logits.device)
    right = logits[rows, labels.long()] > logits[rows, 1 - labels.long()]
    match = labels == 1

    def share(values: Tensor) -> float:
        return float(values.double().mean()) if values.numel() else math.nan

    return {
        "accuracy": share(right),
        "accuracy_match": share(right[match]),
        "accuracy_no_match": share(right[~match]),
        "chance": max(share(match), 1.0 - share(match)),
        "rows": len(labels),
    }


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood (nats) and number of supervised tokens of each caption.

    Add both up over batches before dividing; a mean of means would favour short captions.

    Args:
        logits: floating [B, T, vocabulary]; position t already predicts `labels[:, t]`.
        labels: integers [B, T], -100 where nothing is supervised.

    Returns:
        float64 [B] and int64 [B].

    Raises:
        TypeError: no tensors, or of another dtype.
        ValueError: shapes that do not fit.
    """
    _check_values("logits", logits)
    _check_values("labels", labels, dtypes=INTEGERS, device=logits.device)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits, labels: expected [B, T, V] and [B, T], got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )
    check_range("labels", labels, logits.shape[2], ignored=IGNORED, force=True)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape).double().sum(1), (labels != IGNORED).sum(1)


def words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation; raises TypeError for anything else."""
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {describe(text)}")
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", text.lower())


def mentions(caption: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand in `caption` one after the other (`"car"` is not in `"a cart"`)."""
    return position(caption, phrase) >= 0


def position(caption: str, phrase: str) -> int:
    """Index of the word at which `phrase` first begins in `caption`, or -1.

    Raises:
        ValueError: a phrase without words.
    """
    text, wanted = words(caption), words(phrase)
    if not wanted:
        raise ValueError(f"phrase: expected at least one word, got {phrase!r}")
    for start in range(len(text) - len(wanted) + 1):
        if text[start : start + len(wanted)] == wanted:
            return start
    return -1


def content_accuracy(captions: Sequence[str], required: Sequence[Sequence[str]]) -> dict[str, float]:
    """How many captions say what they must.

    Args:
        captions: generated texts.
        required: for each, the phrases it must mention (:func:`mentions`).

    Returns:
        `all`: share of captions with every phrase; `any`: with at least one; `each`: share of phrases
        mentioned.

    Raises:
        TypeError: no lists of texts.
        ValueError: lists of different length, none at all, or a caption nothing is required of.
    """
    for name, values in (("captions", captions), ("required", required)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name}: expected a sequence, one entry a caption, got {describe(values)}")
    for phrases in required:
        if isinstance(phrases, str) or not isinstance(phrases, Sequence):
            raise TypeError(f"required: expected a list of phrases a caption, got {describe(phrases)}")
    if len(captions) != len(required) or not captions:
        raise ValueError(
            f"required: expected one entry for each of {len(captions)} captions, got {len(required)}"
        )
    if not all(required):
        raise ValueError("required: expected at least one phrase a caption, got none for some")
    hits = [
        [mentions(caption, phrase) for phrase in phrases]
        for caption, phrases in zip(captions, required, strict=True)
    ]
    return {
        "all": sum(map(all, hits)) / len(hits),
        "any": sum(map(any, hits)) / len(hits),
        "each": sum(map(sum, hits)) / sum(map(len, hits)),
    }
