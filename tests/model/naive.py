"""Stage 1 written down as naively as possible: one sample, one head, one row at a time.

Nothing of blip2_kernels is used, neither its Q-Former nor its losses: parameters come in as a plain
dictionary, under the names a `Blip2ForPreTraining` state dict has. Texts keep their padding and masks are
dense tables that add -10000, as in LAVIS; captions read the keys and values that the image pass left behind.
Every rank of a job is simulated in this one process.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LABEL = -100


@dataclass
class RankBatch:
    """What one rank is given; `negatives` number the samples of all ranks, -1 for none."""

    input_ids: Tensor
    attention_mask: Tensor
    image_features: Tensor
    negatives: tuple[list[int], list[int]]
    image_ids: list[int] | None = None


class NaiveBlip2:
    """The model, from its parameters and its `Blip2PreTrainingConfig`; no dropout."""

    def __init__(self, params: dict[str, Tensor], config) -> None:
        self.p = params
        self.config = config
        self.q = config.qformer

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}.weight"].t() + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attend(self, name: str, x: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """Output block included: LayerNorm(x + dense(attention(x)))."""
        heads = self.q.num_attention_heads
        size = self.q.hidden_size // heads
        query = self.linear(f"{name}.attention.query", x)
        parts = []
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            scores = query[:, columns] @ k[:, columns].t() / math.sqrt(size)
            scores = scores + (1 - allowed.to(scores.dtype)) * -10000.0
            weights = (scores - scores.max(1, keepdim=True).values).exp()
            parts.append(weights / weights.sum(1, keepdim=True) @ v[:, columns])
        dense = self.linear(f"{name}.output.dense", torch.cat(parts, 1))
        return self.norm(f"{name}.output.LayerNorm", dense + x, self.q.layer_norm_eps)

    def feed_forward(self, layer: str, suffix: str, x: Tensor) -> Tensor:
        inner = self.linear(f"{layer}.intermediate{suffix}.dense", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        dense = self.linear(f"{layer}.output{suffix}.dense", inner)
        return self.norm(f"{layer}.output{suffix}.LayerNorm", dense + x, self.q.layer_norm_eps)

    def encode(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        image: Tensor | None,
        allowed: Tensor,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One sample through the Q-Former: hidden states [L, C] and each layer's keys and values."""
        rows = torch.cat([part for part in (queries, text) if part is not None])
        hidden = self.norm("qformer.layernorm", rows, self.q.layer_norm_eps)
        count = 0 if queries is None else len(queries)
        cache = []
        for number in range(self.q.num_hidden_layers):
            layer = f"qformer.encoder.layer.{number}"
            k = self.linear(f"{layer}.attention.attention.key", hidden)
            v = self.linear(f"{layer}.attention.attention.value", hidden)
            if past is not None:
                k, v = torch.cat([past[number][0], k]), torch.cat([past[number][1], v])
            cache.append((k, v))
            hidden = self.attend(f"{layer}.attention", hidden, k, v, allowed)
            outputs = []
            if count:
                seen = hidden[:count]
                if number % self.q.cross_attention_frequency == 0:
                    name = f"{layer}.crossattention"
                    image_k = self.linear(f"{name}.attention.key", image)
                    image_v = self.linear(f"{name}.attention.value", image)
                    everything = torch.ones(count, len(image))
                    seen = self.attend(name, seen, image_k, image_v, everything)
                outputs.append(self.feed_forward(layer, "_query", seen))
            if len(hidden) > count:
                outputs.append(self.feed_forward(layer, "", hidden[count:]))
            hidden = torch.cat(outputs)
        return hidden, cache

    def image(self, features: Tensor) -> Tensor:
        return self.norm("ln_vision", features.to(self.p["temp"].dtype), 1e-5)

    def embed(self, ids: Tensor) -> Tensor:
        words = self.p["embeddings.word_embeddings.weight"][ids]
        return words + self.p["embeddings.position_embeddings.weight"][: len(ids)]

    def image_pass(self, image: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Contrastive features [Q, E], hidden states and cache of one image."""
        queries = self.p["query_tokens"][0]
        hidden, cache = self.encode(queries, None, image, torch.ones(len(queries), len(queries)))
        return unit(self.linear("vision_projection", hidden)), hidden, cache

    def text_pass(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Contrastive feature [E] of one text."""
        hidden, _ = self.encode(None, self.embed(ids), None, mask.expand(len(ids), -1))
        return unit(self.linear("text_projection", hidden[0]))

    def matching_pass(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits [2] of one pair."""
        queries = self.p["query_tokens"][0]
        allowed = torch.cat([torch.ones(len(queries), dtype=mask.dtype), mask])
        hidden, _ = self.encode(queries, self.embed(ids), image, allowed.expand(len(allowed), -1))
        total = 0.0
        for row in hidden[: len(queries)]:
            total = total + self.linear("itm_head", row)
        return total / len(queries)

    def caption_pass(self, ids: Tensor, mask: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Vocabulary logits [T, V] of one caption behind a cached image."""
        ids = ids.clone()
        ids[0] = self.config.dec_token_id
        past, length = self.config.num_query_tokens, len(ids)
        allowed = torch.zeros(length, past + length)
        for row in range(length):
            allowed[row, :past] = 1
            for column in range(row + 1):
                allowed[row, past + column] = mask[column]
        hidden, _ = self.encode(None, self.embed(ids), None, allowed, cache)
        head = "cls.predictions.transform"
        hidden = self.linear(f"{head}.dense", hidden)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = self.norm(f"{head}.LayerNorm", hidden, self.q.layer_norm_eps)
        words = self.p["embeddings.word_embeddings.weight"]
        return hidden @ words.t() + self.p["cls.predictions.bias"]


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def log_softmax(x: Tensor) -> Tensor:
    x = x - x.max()
    return x - x.exp().sum().log()


def smoothed(log_probs: Tensor, label: int, smoothing: float) -> Tensor:
    """Cross entropy with label smoothing of one row."""
    return -(1 - smoothing) * log_probs[label] - smoothing * log_probs.mean()


def contrast(
    images: list[Tensor],
    texts: list[Tensor],
    all_images: list[Tensor],
    all_texts: list[Tensor],
    temperature: Tensor,
    first: int,
    ids: tuple[list[int], list[int]] | None,
) -> Tensor:
    """ITC of one rank whose samples are number `first`, `first` + 1, … of all; ids are (own, all) or None."""
    losses = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        to_texts = torch.stack([max_of([query @ other for query in image]) for other in all_texts])
        to_images = torch.stack([max_of([text @ query for query in other]) for other in all_images])
        for row in (to_texts / temperature, to_images / temperature):
            log_probs = log_softmax(row)
            if ids is None:
                losses.append(smoothed(log_probs, first + i, 0.1))
                continue
            positives = [j for j, other in enumerate(ids[1]) if other == ids[0][i]]
            loss = 0.0
            for j in range(len(row)):
                target = 0.1 / len(row) + (0.9 / len(positives) if j in positives else 0.0)
                loss = loss - target * log_probs[j]
            losses.append(loss)
    return sum(losses) / len(losses)


def max_of(values: list[Tensor]) -> Tensor:
    best = values[0]
    for value in values[1:]:
        best = value if value > best else best
    return best


def naive_step(
    params: dict[str, Tensor],
    config,
    batches: list[RankBatch],
    *,
    itc_gradient: str = "full",
    lm_normalisation: str = "rank",
) -> list[dict[str, Tensor]]:
    """The three losses of every rank, whose mean over ranks is the loss of the job."""
    model = NaiveBlip2(params, config)
    ids = torch.cat([batch.input_ids for batch in batches])
    masks = torch.cat([batch.attention_mask for batch in batches])
    images = [model.image(row) for batch in batches for row in batch.image_features]
    passes = [model.image_pass(image) for image in images]
    image_feats = [features for features, _, _ in passes]
    text_feats = [model.text_pass(row, mask) for row, mask in zip(ids, masks, strict=True)]
    image_ids = None
    if batches[0].image_ids is not None:
        image_ids = [number for batch in batches for number in batch.image_ids]
    constant = itc_gradient == "local" and len(batches) > 1
    all_images = [x.detach() for x in image_feats] if constant else image_feats
    all_texts = [x.detach() for x in text_feats] if constant else text_feats

    results, matches, words = [], [], []
    size = len(batches[0].input_ids)
    for rank, batch in enumerate(batches):
        first = rank * size
        own = range(first, first + size)
        itc = contrast(
            [image_feats[i] for i in own],
            [text_feats[i] for i in own],
            all_images,
            all_texts,
            params["temp"],
            first,
            None if image_ids is None else (batch.image_ids, image_ids),
        )

        rows = [(i, i, 1) for i in own]
        rows += [(image, i, 0) for i, image in zip(own, batch.negatives[0], strict=True)]
        rows += [(i, text, 0) for i, text in zip(own, batch.negatives[1], strict=True)]
        match = []
        for image, text, label in rows:
            if image < 0 or text < 0:
                continue
            logits = model.matching_pass(images[image], ids[text], masks[text])
            match.append(-log_softmax(logits)[label])
        matches.append(len(match))

        caption = []
        for i in own:
            logits = model.caption_pass(ids[i], masks[i], passes[i][2])
            for t in range(ids.shape[1] - 1):
                if int(ids[i, t + 1]) != config.pad_token_id:
                    caption.append(smoothed(log_softmax(logits[t]), int(ids[i, t + 1]), 0.1))
        words.append(len(caption))
        zero = params["temp"] * 0
        results.append({"itc": itc, "itm": sum(match, zero), "itg": sum(caption, zero)})

    for rank, result in enumerate(results):
        result["itm"] = result["itm"] * len(batches) / max(sum(matches), 1)
        if lm_normalisation == "rank":
            result["itg"] = result["itg"] / max(words[rank], 1)
        else:
            result["itg"] = result["itg"] * len(batches) / max(sum(words), 1)
    return results
