"""What is measured on scenes that were held out, and the controls each figure stands beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .scenes import OPPOSITE, RELATIONS, Scene, caption_of, parse_caption


@dataclass(frozen=True)
class Texts:
    """Padded token ids int64 [n, T] and their 0/1 mask [n, T]."""

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, captions: Sequence[str], tokenizer: Any, device: torch.device | str = "cpu") -> Texts:
        batch = tokenizer(list(captions), padding=True, return_tensors="pt")
        return cls(batch["input_ids"].to(device), batch["attention_mask"].to(device))


def recall_at(scores: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of rows of [n, n] whose own column (the diagonal) is among the k best; ties count against it."""
    own = scores.diagonal()[:, None]
    rank = (scores >= own).sum(1) - 1
    return {f"R@{k}": (rank < k).double().mean().item() for k in ks}


def retrieval(scores: Tensor) -> dict[str, dict[str, float]]:
    """Recall both ways from scores [images, texts] whose diagonal holds the true pairs."""
    return {"image_to_text": recall_at(scores), "text_to_image": recall_at(scores.T)}


def chance_retrieval(n: int, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict[str, float]]:
    row = {f"R@{k}": min(k, n) / n for k in ks}
    return {"image_to_text": row, "text_to_image": dict(row)}


def relation_captions(scenes: Sequence[Scene]) -> list[str]:
    """Four captions a scene, [len(scenes) · 4]: its two things in their order, each relation once."""
    return [caption_of(*scene.nouns, relation=relation) for scene in scenes for relation in RELATIONS]


def relation_labels(scenes: Sequence[Scene]) -> Tensor:
    """Which of the four is true: int64 [len(scenes)]."""
    return torch.tensor([RELATIONS.index(str(scene.relation)) for scene in scenes])


def choice_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of [n, choices] whose largest score is at the label."""
    return (scores.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def match_logits(
    model: Any, features: Tensor, texts: Texts, image_index: Tensor, batch_size: int = 256
) -> Tensor:
    """ITM score (match minus no match) of text s with image ``image_index[s]``: fp32 [samples]."""
    images = model.prepare_images(features)
    rows = []
    for start in range(0, len(image_index), batch_size):
        part = slice(start, start + batch_size)
        hidden = model.multimodal_hidden(
            images, texts.input_ids[part], texts.attention_mask[part], image_index=image_index[part]
        )
        logits = model.match(hidden).float()
        rows.append(logits[:, 1] - logits[:, 0])
    return torch.cat(rows)


@torch.no_grad()
def contrastive_scores(model: Any, features: Tensor, texts: Texts, batch_size: int = 64) -> Tensor:
    """Cosine of each text with each image's best query: fp32 [images, texts]."""
    text = model.get_text_features(texts.input_ids, texts.attention_mask).float()
    rows = []
    for part in features.split(batch_size):
        image = model.get_image_features(image_features=part).float()
        with torch.autocast(image.device.type, enabled=False):  # half precision would make ties
            rows.append(torch.einsum("bqe,te->btq", image, text).amax(-1))
    return torch.cat(rows)


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


def matching_accuracy(positive: Tensor, negative: Tensor) -> float:
    """Balanced share of right verdicts: matches scored above 0, others at or below."""
    right = torch.cat([positive > 0, negative <= 0])
    return right.double().mean().item()


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
        rerank: candidates of each query that ITM scores again (score = ITM + ITC, as LAVIS).
    """
    n, device = len(scenes), features.device
    own = torch.arange(n, device=device)
    captions = [scene.caption() for scene in scenes]
    texts = Texts.of(captions, tokenizer, device)
    itc = contrastive_scores(model, features, texts)
    result: dict[str, Any] = {
        "retrieval": {"itc": retrieval(itc), "chance": chance_retrieval(n)},
        "query_spread": query_spread(query_hidden(model, features)).item(),
    }

    pairs = torch.zeros_like(itc, dtype=torch.bool)
    pairs.scatter_(1, itc.topk(min(rerank, n), 1).indices, True)
    pairs.scatter_(0, itc.topk(min(rerank, n), 0).indices, True)
    image_of, text_of = pairs.nonzero(as_tuple=True)
    some = Texts(texts.input_ids[text_of], texts.attention_mask[text_of])
    scores = torch.full_like(itc, -1e4)
    scores[image_of, text_of] = match_logits(model, features, some, image_of) + itc[image_of, text_of]
    result["retrieval"]["itc_then_itm"] = retrieval(scores)

    positive = match_logits(model, features, texts, own)
    hard = hardest_other(itc)
    hard_texts = Texts(texts.input_ids[hard], texts.attention_mask[hard])
    opposite = [caption_of(*scene.nouns, relation=OPPOSITE[str(scene.relation)]) for scene in scenes]
    exchanged = [caption_of(*scene.nouns[::-1], relation=str(scene.relation)) for scene in scenes]
    result["itm_accuracy"] = {
        "against_hardest_caption_of_another_scene": matching_accuracy(
            positive, match_logits(model, features, hard_texts, own)
        ),
        "against_relation_swapped": matching_accuracy(
            positive, match_logits(model, features, Texts.of(opposite, tokenizer, device), own)
        ),
        "against_things_exchanged": matching_accuracy(
            positive, match_logits(model, features, Texts.of(exchanged, tokenizer, device), own)
        ),
        "chance": 0.5,
    }
    four = Texts.of(relation_captions(scenes), tokenizer, device)
    labels = relation_labels(scenes).to(device)
    by_itm = match_logits(model, features, four, own.repeat_interleave(4)).view(n, 4)
    by_itc = contrastive_scores(model, features, four).view(n, n, 4)[own, own]
    result["relation_of_four"] = {
        "itm": choice_accuracy(by_itm, labels),
        "itc": choice_accuracy(by_itc, labels),
        "chance": 0.25,
    }
    return result


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
    for use_fused in (True, False):
        model.use_fused = use_fused
        outputs.append(
            {
                "image_embeds": model.get_image_features(image_features=features),
                "text_embeds": model.get_text_features(texts.input_ids, texts.attention_mask),
                "itm_logits": match_logits(model, features, texts, own),
            }
        )
        losses = model(
            texts.input_ids,
            texts.attention_mask,
            image_features=features,
            negatives=(own.roll(1), own.roll(1)),
        )
        outputs[-1] |= {name: losses[name] for name in ("loss_itc", "loss_itm", "loss_itg")}
    model.use_fused = was
    return {name: (outputs[0][name] - outputs[1][name]).abs().max().item() for name in outputs[0]}
