"""What is measured on scenes that were held out, and the controls each figure stands beside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluate import chance_recall_at, choice_accuracy, matching_accuracy, recall_at
from ..retrieval import Blip2ForImageTextRetrieval
from .scenes import OPPOSITE, RELATIONS, Scene, caption_of, parse_caption


class Texts(NamedTuple):
    """Padded token ids int64 [n, T] and their 0/1 mask [n, T]."""

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, captions: Sequence[str], tokenizer: Any, device: torch.device | str = "cpu") -> Texts:
        batch = tokenizer(list(captions), padding=True, return_tensors="pt")
        return cls(batch["input_ids"].to(device), batch["attention_mask"].to(device))


def retrieval(scores: Tensor, text_to_image: Tensor | None = None) -> dict[str, dict[str, float]]:
    """Recall both ways of n images and their n texts.

    Args:
        scores: [images, texts], whose diagonal holds the true pairs.
        text_to_image: [texts, images], where other scores rank the images of a text; default the same.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    by_text = scores.T if text_to_image is None else text_to_image
    return {"image_to_text": recall_at(scores, own), "text_to_image": recall_at(by_text, own)}


def chance_retrieval(n: int) -> dict[str, dict[str, float]]:
    """What random scores reach in :func:`retrieval` on average."""
    row = chance_recall_at(torch.eye(n, dtype=torch.bool))
    return {"image_to_text": row, "text_to_image": dict(row)}


def relation_captions(scenes: Sequence[Scene]) -> list[str]:
    """Four captions a scene, [len(scenes) · 4]: its two things in their order, each relation once."""
    return [caption_of(*scene.nouns, relation=relation) for scene in scenes for relation in RELATIONS]


def relation_labels(scenes: Sequence[Scene]) -> Tensor:
    """Which of the four is true: int64 [len(scenes)]."""
    return torch.tensor([RELATIONS.index(str(scene.relation)) for scene in scenes])


@torch.no_grad()
def query_hidden(model: Any, features: Tensor, batch_size: int = 64) -> Tensor:
    """What the queries read from pictures, [n, Q, C] in fp32, of features [n, tokens, width]."""
    return torch.cat([model.encode_image(image_features=part).float() for part in features.split(batch_size)])


def query_spread(hidden: Tensor) -> Tensor:
    """How different the queries are that read one picture, [] in fp32.

    Args:
        hidden: [n, Q, C], what the queries of n pictures end as.

    Returns:
        Of the variance over pictures, the share that lies between queries of the same picture. 0 if all of
        them say the same.
    """
    hidden = hidden.float() - hidden.float().mean(0)
    within = hidden - hidden.mean(1, keepdim=True)
    return within.square().sum() / hidden.square().sum()


def query_distance(hidden: Tensor) -> Tensor:
    """How far a query is from the one most like it, [] in fp32.

    Two groups of like queries make a large `query_spread`, and may still be two voices alone.

    Args:
        hidden: [n, Q, C], what the queries of n pictures end as, Q at least 2.

    Returns:
        Mean over queries and pictures of the squared distance to the nearest other query of the picture, as a
        share of that between queries with nothing in common. 0 if each has its like; one query far from the
        others, which are one, makes it large all the same.
    """
    hidden = hidden.float() - hidden.float().mean(0)
    apart = (hidden[:, :, None] - hidden[:, None]).square().sum(-1)
    itself = torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    nearest = apart.masked_fill(itself, torch.inf).amin(-1)
    return nearest.mean() / (2 * hidden.square().sum(-1).mean())


def balanced_accuracy(right: Tensor, wrong: Tensor) -> float:
    """Share of right verdicts on n pairs that match and n that do not, from logits [n, 2] of each."""
    labels = torch.tensor([1, 0], device=right.device).repeat_interleave(len(right))
    return matching_accuracy(torch.cat([right, wrong]), labels)["accuracy"]


def hardest_other(scores: Tensor) -> Tensor:
    """The best-scored wrong text of each image, int64 [n], from scores [n, n]."""
    return scores.masked_fill(
        torch.eye(len(scores), dtype=torch.bool, device=scores.device), -torch.inf
    ).argmax(1)


def stage1_metrics(
    model: Any, features: Tensor, scenes: Sequence[Scene], tokenizer: Any, rerank: int = 16
) -> dict:
    """Retrieval, matching and choosing the relation, on held-out scenes of two things each.

    Args:
        model: a stage-1 model in eval mode.
        features: [n, tokens, width] of the scenes.
        scenes: n scenes of two things, each pair another.
        tokenizer: of the stage-1 texts.
        rerank: candidates of each query that ITM scores again.
    """
    n, device = len(scenes), features.device
    own = torch.arange(n, device=device)
    captions = [scene.caption() for scene in scenes]
    four, relations = relation_captions(scenes), relation_labels(scenes).to(device)
    reader = Blip2ForImageTextRetrieval.from_pretraining(model)
    queries = query_hidden(model, features)
    ranked = reader.rerank(*Texts.of(captions, tokenizer, device), features, k=rerank)
    wrong = {
        "against_hardest_caption_of_another_scene": [captions[i] for i in hardest_other(ranked.itc).tolist()],
        "against_relation_swapped": [
            caption_of(*scene.nouns, relation=OPPOSITE[str(scene.relation)]) for scene in scenes
        ],
        "against_things_exchanged": [
            caption_of(*scene.nouns[::-1], relation=str(scene.relation)) for scene in scenes
        ],
    }
    logits = reader.pair_logits(
        *Texts.of([*captions, *chain(*wrong.values()), *four], tokenizer, device),
        features,
        image_index=torch.cat([own.repeat(1 + len(wrong)), own.repeat_interleave(4)]),
    )
    right, *others = logits[: -4 * n].split(n)
    by_itm = logits[-4 * n :].diff(dim=1).view(n, 4)
    by_itc = reader.itc_scores(*Texts.of(four, tokenizer, device), features).view(n, n, 4)[own, own]
    return {
        "retrieval": {
            "itc": retrieval(ranked.itc),
            "chance": chance_retrieval(n),
            "itc_then_itm": retrieval(ranked.image_to_text, ranked.text_to_image),
        },
        "query_spread": query_spread(queries).item(),
        "query_distance": query_distance(queries).item(),
        "itm_accuracy": {
            **{name: balanced_accuracy(right, other) for name, other in zip(wrong, others, strict=True)},
            "chance": 0.5,
        },
        "relation_of_four": {
            "itm": choice_accuracy(by_itm, relations)["accuracy"],
            "itc": choice_accuracy(by_itc, relations)["accuracy"],
            "chance": 0.25,
        },
    }


def caption_shares(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of captions that name exactly the scene's things, and share that are also right about where they
    lie.
    """
    told = [parse_caption(caption) for caption in captions]
    n = len(scenes)
    return {
        "concepts_right": sum(t.names_the_things_of(s) for t, s in zip(told, scenes, strict=True)) / n,
        "relation_right": sum(t.is_true_of(s) for t, s in zip(told, scenes, strict=True)) / n,
    }


def shuffled(n: int) -> Tensor:
    """Another image for each text: int64 [n], no image in its own place."""
    return torch.arange(n).roll(max(1, n // 2)) if n > 1 else torch.zeros(1, dtype=torch.int64)


@torch.no_grad()
def largest_difference(model: Any, features: Tensor, texts: Texts) -> dict[str, float]:
    """How far ``use_fused=True`` and ``False`` differ in fp32 on the same weights and images: largest
    absolute value.
    """
    was = model.use_fused
    outputs: list[dict[str, Tensor]] = []
    own = torch.arange(len(features), device=features.device)
    reader = Blip2ForImageTextRetrieval.from_pretraining(model)
    for use_fused in (True, False):
        model.use_fused = use_fused
        outputs.append(
            {
                "image_embeds": model.get_image_features(image_features=features),
                "text_embeds": model.get_text_features(*texts),
                "itm_logits": reader.pair_logits(*texts, features).diff(dim=1),
            }
        )
        losses = model(*texts, image_features=features, negatives=(own.roll(1), own.roll(1)))
        outputs[-1] |= {name: losses[name] for name in ("loss_itc", "loss_itm", "loss_itg")}
    model.use_fused = was
    return {name: (outputs[0][name] - outputs[1][name]).abs().max().item() for name in outputs[0]}
