"""Stage 1 and matching as the paper's code runs them, on the parameters of a `Blip2ForPreTraining`.

Four passes a step, as published: queries over images, their keys and values kept; texts alone; matching on
3 B samples with repeated image features; captions behind the kept keys and values. All texts stay padded.

The plain path (`use_fused=False`) is the same algorithm, but draws its dropout by Philox in PyTorch, to match
the fused path's. Here it is PyTorch's own, which is what a training run would pay for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_kernels.model.pretraining import Blip2ForPreTraining

KeysValues = list[tuple[Tensor, Tensor]]
IGNORE = -100


@dataclass(frozen=True)
class Step:
    """Losses of a step and what they add up to."""

    loss: Tensor
    parts: tuple[Tensor, Tensor, Tensor]


class Published(nn.Module):
    """The published algorithm on a model's parameters.

    Args:
        model: whose parameters, dropout rates and configuration are used.
        sdpa: attention by PyTorch's fused function; else scores, softmax and dropout one after the other.
    """

    def __init__(self, model: Blip2ForPreTraining, sdpa: bool = False) -> None:
        super().__init__()
        self.model = model
        self.sdpa = sdpa
        self.train(model.training)

    def step(self, ids: Tensor, mask: Tensor, features: Tensor, negatives: tuple[Tensor, Tensor]) -> Step:
        """The three losses of B pairs, ids and mask [B, T], features [B, N, width]."""
        model, batch, smoothing = self.model, len(ids), self.model.config.label_smoothing
        images = model.ln_vision(features)
        queries = model.query_tokens.expand(batch, -1, -1)
        count = queries.shape[1]
        real = mask[:, None, None, :] != 0

        seen, kept = self._encode(queries, count, images, None)
        image_embeds = F.normalize(model.vision_projection(seen), dim=-1)
        text, _ = self._encode(self._embed(ids), 0, None, real)
        text_embeds = F.normalize(model.text_projection(text[:, 0]), dim=-1)
        similar = torch.einsum("iqe,te->itq", image_embeds, text_embeds).amax(-1) / model.temp
        own = torch.arange(batch, device=ids.device)
        contrast = sum(F.cross_entropy(s, own, label_smoothing=smoothing) for s in (similar, similar.t())) / 2

        image_rows, text_rows = torch.cat([own, negatives[0], own]), torch.cat([own, own, negatives[1]])
        logits = self.match(ids[text_rows], mask[text_rows], images[image_rows])
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        matching = F.cross_entropy(logits, labels)

        begun = torch.cat([torch.full_like(ids[:, :1], model.config.dec_token_id), ids[:, 1:]], 1)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        allowed = torch.cat([real.new_ones(batch, 1, length, count), causal & real], dim=-1)
        caption, _ = self._encode(self._embed(begun), 0, None, allowed, kept)
        head = model.cls["predictions"]
        words = F.linear(head.transform(caption), model.embeddings.word_embeddings.weight, head.bias)
        following = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE)
        generation = F.cross_entropy(
            words[:, :-1].flatten(0, 1), following.flatten(), ignore_index=IGNORE, label_smoothing=smoothing
        )
        return Step(contrast + matching + generation, (contrast, matching, generation))

    def match(self, ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """Logits [S, 2] of S texts, each with an image of its own, behind the image norm."""
        queries = self.model.query_tokens.expand(len(ids), -1, -1)
        count, text = queries.shape[1], self._embed(ids)
        real = F.pad(mask, (count, 0), value=1)[:, None, None, :] != 0
        hidden, _ = self._encode(torch.cat([queries.to(text.dtype), text], 1), count, images, real)
        return self.model.itm_head(hidden[:, :count]).mean(1)

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        return embeddings.word_embeddings(ids) + embeddings.position_embeddings.weight[: ids.shape[1]]

    def _encode(
        self,
        hidden: Tensor,
        queries: int,
        images: Tensor | None,
        allowed: Tensor | None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Rows [B, L, C], the first `queries` of them queries, through all layers; their keys and values."""
        qformer, kept = self.model.qformer, []
        hidden = qformer.dropout(qformer.layernorm(hidden))
        for number, layer in enumerate(qformer.encoder.layer):
            before = None if past is None else past[number]
            hidden, keys_values = self._attend(layer.attention, hidden, hidden, allowed, before)
            kept.append(keys_values)
            parts = []
            if queries:
                rows = hidden[:, :queries]
                if hasattr(layer, "crossattention"):
                    rows, _ = self._attend(layer.crossattention, rows, images, None)
                parts.append(_add_norm(layer.output_query, layer.intermediate_query(rows), rows))
            if hidden.shape[1] > queries:
                rows = hidden[:, queries:]
                parts.append(_add_norm(layer.output, layer.intermediate(rows), rows))
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return hidden, kept

    def _attend(
        self,
        block: nn.Module,
        hidden: Tensor,
        attended: Tensor,
        allowed: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        module = block.attention
        query = module.split_heads(module.query(hidden))
        key, value = (module.split_heads(linear(attended)) for linear in (module.key, module.value))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        rate = module.attention_dropout if self.training else 0.0
        if self.sdpa:
            context = F.scaled_dot_product_attention(query, key, value, allowed, rate)
        else:
            scores = query @ key.transpose(-1, -2) * module.scaling
            if allowed is not None:
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            probs = scores.softmax(-1).to(value.dtype)
            context = F.dropout(probs, rate, self.training) @ value
        return _add_norm(block.output, context.transpose(1, 2).flatten(2), hidden), (key, value)


def _add_norm(output: nn.Module, rows: Tensor, residual: Tensor) -> Tensor:
    """What follows an attention or the first half of a feed-forward network."""
    return output.LayerNorm(output.dropout(output.dense(rows)) + residual)
