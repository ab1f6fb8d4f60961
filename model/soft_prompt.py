"""The trained part of stage 2: from an image to the soft prompt of a language model (paper, figure 3)."""

from typing import Any

import torch
from torch import Tensor, nn

from blip2_kernels.checks import check_binary, check_range, check_tensor, describe
from blip2_kernels.layout import MASK_DTYPES

from .generation_config import Blip2GenerationConfig
from .image_reading import ReadsImages
from .qformer import QFormerModel
from .qformer_text import TOKEN_IDS, check_text_length

__all__ = ["SoftPromptModel", "check_text", "copy_weights"]


class SoftPromptModel(ReadsImages):
    """Image encoder (frozen), ln_vision, Q-Former with its queries, and the projection to a text's width.

    Args:
        config: of the Q-Former.
        text_width: D, width of the language model's embeddings.
        vision_model: a `FrozenVisionEncoder`, or a module to make one of; None where callers pass
            `image_features`. If it brings a trained `ln_vision` along, that is where this one starts.
        use_fused: run the Q-Former through the fused encoder.

    Raises:
        TypeError: vision_model is no module.
        ValueError: vision_model has another width than the Q-Former reads.
    """

    def __init__(
        self,
        config: Blip2GenerationConfig,
        text_width: int,
        vision_model: nn.Module | None = None,
        use_fused: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        qformer = config.qformer
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer.hidden_size))
        nn.init.normal_(self.query_tokens, std=qformer.initializer_range)
        self.ln_vision = nn.LayerNorm(qformer.encoder_hidden_size, eps=config.vision_layer_norm_eps)
        self.attach_vision_model(vision_model)
        self.qformer = QFormerModel(qformer, use_fused=use_fused)
        self.language_projection = nn.Linear(qformer.hidden_size, text_width)

    def soft_prompt(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What the language model gets to see of each image, [B, Q, D] in the projection's dtype.

        Args:
            pixel_values: what the image encoder takes; or
            image_features: [B, N, encoder_hidden_size], its output before `ln_vision`.
            image_mask: 0/1 [B, N], image tokens that may be read; default all.
            qformer_input_ids: integers [B, T_q], the instruction (InstructBLIP only).
            qformer_attention_mask: 0/1 [B, T_q]; default all 1.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value.
        """
        features = self.frozen_features(image_features, pixel_values)
        if image_mask is not None:
            check_tensor("image_mask", image_mask, features.shape[:2], MASK_DTYPES)
            check_binary("image_mask", image_mask)
        batch = features.shape[0]
        queries = self.query_tokens.expand(batch, -1, -1)
        text: dict[str, Any] = {}
        if qformer_input_ids is None:
            if qformer_attention_mask is not None:
                raise ValueError("qformer_attention_mask: expected qformer_input_ids beside it, got None")
        elif not self.config.is_instruct:
            raise ValueError(
                "qformer_input_ids: expected None, since only a Q-Former with an InstructBlipQFormerConfig "
                f"reads an instruction, got {describe(qformer_input_ids)}"
            )
        else:
            mask = check_text("qformer_", qformer_input_ids, qformer_attention_mask, batch)
            positions = self.config.qformer.max_position_embeddings
            check_text_length("qformer_input_ids", qformer_input_ids, positions)
            check_range("qformer_input_ids", qformer_input_ids, self.config.qformer.vocab_size)
            text = {"input_ids": qformer_input_ids, "text_mask": mask}
        features = features.to(self.ln_vision.weight.device, self.ln_vision.weight.dtype)
        if image_mask is not None:
            image_mask = image_mask.to(features.device)
        images: dict[str, Any]
        if self.packs:
            prepared = self.qformer.fused_encoder.project_images(
                features, norm=self.ln_vision, mask=image_mask, query_rows=queries.shape[0] * queries.shape[1]
            )
            images = {"encoder_hidden_states": prepared}
        else:
            images = {
                "encoder_hidden_states": self.ln_vision(features),
                "encoder_attention_mask": image_mask,
            }
        hidden = self.qformer(queries, queries_only=True, **images, **text).last_hidden_state
        return self.language_projection(hidden.to(self.language_projection.weight.dtype))


def copy_weights(part: nn.Module, source: nn.Module) -> None:
    """Copy the weights that `part` has from `source`, with their dtype and device."""
    theirs = source.state_dict()
    missing = sorted(part.state_dict().keys() - theirs.keys())
    if missing:
        raise ValueError(f"weights: expected {', '.join(missing)}, got none of that name")
    first = next(source.parameters())
    part.to(first.device, first.dtype)
    part.load_state_dict({name: theirs[name] for name in part.state_dict()})


def check_text(prefix: str, input_ids: Tensor, attention_mask: Tensor | None, batch: int) -> Tensor:
    """Check ids [batch, T] and their 0/1 mask; return the mask, all 1 by default."""
    check_tensor(f"{prefix}input_ids", input_ids, [batch, "tokens"], TOKEN_IDS)
    if attention_mask is None:
        return torch.ones_like(input_ids)
    name = f"{prefix}attention_mask"
    check_tensor(name, attention_mask, input_ids.shape, MASK_DTYPES, input_ids.device)
    check_binary(name, attention_mask)
    return attention_mask.to(input_ids.dtype)
