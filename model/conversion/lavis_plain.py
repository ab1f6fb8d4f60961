"""What LAVIS computes with a checkpoint of its own, in plain functions of its state dict, in fp32.

The yardstick of a conversion: it reads LAVIS's names and knows nothing of the table that renames them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

VISION_EPS, LN_VISION_EPS, BERT_EPS = 1e-6, 1e-5, 1e-12


def image_features(state: Mapping[str, Tensor], pixels: Tensor, blocks: int, heads: int) -> Tensor:
    """EVA-CLIP's features [B, N, width] before `ln_vision`, of pictures [B, 3, H, W].

    LAVIS reads 39 of its 40 `blocks`; the last one may be in the state or not.
    """
    part = _Part(state, "visual_encoder.")
    weight = part["patch_embed.proj.weight"]
    x = F.conv2d(pixels, weight, part["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).mT
    x = torch.cat([part["cls_token"].expand(len(x), -1, -1), x], dim=1) + part["pos_embed"]
    for block in range(blocks):
        layer = part / f"blocks.{block}."
        q_bias, v_bias = layer["attn.q_bias"], layer["attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
        q, k, v = F.linear(layer.norm("norm1", x, VISION_EPS), layer["attn.qkv.weight"], bias).chunk(
            3, dim=-1
        )
        x = x + layer.linear("attn.proj", _attention(q, k, v, heads))
        hidden = F.gelu(layer.linear("mlp.fc1", layer.norm("norm2", x, VISION_EPS)))
        x = x + layer.linear("mlp.fc2", hidden)
    return x


def qformer(
    state: Mapping[str, Tensor],
    heads: int,
    features: Tensor | None = None,
    input_ids: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    """The Q-Former's last hidden states [B, Q + T, C]: queries where there are features, text where there are
    ids.

    Args:
        state: LAVIS's.
        heads: of its attentions.
        features: [B, N, width], before `ln_vision`; None for text alone.
        input_ids: [B, T], or None.
        text_mask: 0/1 [B, T].
    """
    embeddings, parts, image, count = _Part(state, "Qformer.bert.embeddings."), [], None, 0
    batch = next(len(given) for given in (features, input_ids) if given is not None)
    if features is not None:
        image = _Part(state, "").norm("ln_vision", features, LN_VISION_EPS)
        parts.append(state["query_tokens"].float().expand(batch, -1, -1))
        count = parts[0].shape[1]
    mask = torch.ones(batch, count, dtype=torch.bool)
    if input_ids is not None:
        positions = embeddings["position_embeddings.weight"][: input_ids.shape[1]]
        parts.append(F.embedding(input_ids, embeddings["word_embeddings.weight"]) + positions)
        text = torch.ones_like(input_ids) if text_mask is None else text_mask
        mask = torch.cat([mask, text.bool()], dim=1)
    x = embeddings.norm("LayerNorm", torch.cat(parts, dim=1), BERT_EPS)
    layers = 0
    while f"Qformer.bert.encoder.layer.{layers}.attention.self.query.weight" in state:
        layer = _Part(state, f"Qformer.bert.encoder.layer.{layers}.")
        x = _attend(layer / "attention.", x, x, heads, mask[:, None, None])
        queries, words = x[:, :count], x[:, count:]
        if count:
            if "crossattention.self.query.weight" in layer:
                queries = _attend(layer / "crossattention.", queries, image, heads)
            queries = _feed_forward(layer, "_query", queries)
        if words.shape[1]:
            words = _feed_forward(layer, "", words)
        x = torch.cat([queries, words], dim=1)
        layers += 1
    return x


def vocabulary_logits(state: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """What the language-modelling head of stage 1 makes of hidden states."""
    head = _Part(state, "Qformer.cls.predictions.")
    hidden = head.norm("transform.LayerNorm", F.gelu(head.linear("transform.dense", hidden)), BERT_EPS)
    words = state["Qformer.bert.embeddings.word_embeddings.weight"].float()
    return F.linear(hidden, words, head["bias"])


class _Part:
    """The tensors whose names begin alike, in fp32."""

    def __init__(self, state: Mapping[str, Tensor], front: str) -> None:
        self._state, self._front = state, front

    def __truediv__(self, rest: str) -> "_Part":
        return _Part(self._state, self._front + rest)

    def __contains__(self, name: str) -> bool:
        return self._front + name in self._state

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._front + name].float()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)


def _attend(part: _Part, x: Tensor, source: Tensor | None, heads: int, mask: Tensor | None = None) -> Tensor:
    if source is None:
        raise ValueError("features: expected an image for the queries, got None")
    query, key, value = (
        part.linear(f"self.{name}", rows) for name, rows in (("query", x), ("key", source), ("value", source))
    )
    out = part.linear("output.dense", _attention(query, key, value, heads, mask))
    return part.norm("output.LayerNorm", out + x, BERT_EPS)


def _feed_forward(layer: _Part, which: str, x: Tensor) -> Tensor:
    hidden = F.gelu(layer.linear(f"intermediate{which}.dense", x))
    return layer.norm(f"output{which}.LayerNorm", layer.linear(f"output{which}.dense", hidden) + x, BERT_EPS)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -10000.0)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
