"""How the models of both stages come by the features that the Q-Former reads: from a frozen image encoder, or
from the caller."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2_kernels.checks import check_bool, check_tensor, describe

from .gradient_checkpointing import CheckpointsQFormer
from .qformer_text import FLOATING
from .vision import FrozenVisionEncoder


class ReadsImages(CheckpointsQFormer, nn.Module):
    """Base of models with a `qformer` and an `ln_vision` in front of it."""

    config: Any
    vision_model: FrozenVisionEncoder | None
    ln_vision: nn.LayerNorm

    def attach_vision_model(self, vision_model: nn.Module | None) -> None:
        """Take an image encoder, once `ln_vision` is there; called by constructors.

        Args:
            vision_model: a `FrozenVisionEncoder`, or a module to make one of; None where callers pass
                `image_features`. If it brings a trained `ln_vision` along, that is where this one starts.

        Raises:
            TypeError: vision_model is no module.
            ValueError: vision_model has another width than the Q-Former reads.
        """
        if vision_model is not None and not isinstance(vision_model, FrozenVisionEncoder):
            if not isinstance(vision_model, nn.Module):
                raise TypeError(f"vision_model: expected an nn.Module or None, got {describe(vision_model)}")
            vision_model = FrozenVisionEncoder(vision_model)
        self.vision_model = vision_model
        if vision_model is not None and vision_model.layer_norm is not None:
            trained = vision_model.layer_norm
            if trained.normalized_shape != self.ln_vision.normalized_shape:
                raise ValueError(
                    f"vision_model: expected features of width {self.ln_vision.normalized_shape[0]} "
                    f"(encoder_hidden_size), got {trained.normalized_shape[0]}"
                )
            self.ln_vision.load_state_dict(trained.state_dict())
        self.register_load_state_dict_pre_hook(_read_names_of_the_encoder)

    @property
    def use_fused(self) -> bool:
        """Whether the Q-Former runs through the fused encoder."""
        return self.qformer.use_fused

    @use_fused.setter
    def use_fused(self, value: bool) -> None:
        self.qformer.use_fused = check_bool("use_fused", value)

    @property
    def packs(self) -> bool:
        """Whether passes go to the fused encoder itself, packed and with images projected once. A Q-Former
        with hooks, a `forward` of its own or another class (a sharded one) is called as the module it is."""
        return self.use_fused and self.qformer.called_reason is None

    @property
    def _home(self) -> torch.device | None:
        """Where the caller's tensors must live; None for anywhere."""
        return None

    def frozen_features(
        self, image_features: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Tensor:
        """Features [B, N, width] before `ln_vision`: those given, or the frozen encoder's of `pixel_values`.

        Raises:
            TypeError, ValueError: both or neither given; no image encoder, or pixels that it does not take;
            features of another kind or shape.
        """
        if (image_features is None) == (pixel_values is None):
            got = "neither" if image_features is None else "both"
            raise ValueError(f"image_features: expected image_features or pixel_values, got {got}")
        name = "image_features"
        if image_features is None:
            if self.vision_model is None:
                raise ValueError(
                    "pixel_values: expected image_features, since this model has no vision_model"
                )
            name, image_features = "features of vision_model", self.vision_model(pixel_values)
        width = self.config.qformer.encoder_hidden_size
        check_tensor(name, image_features, ["batch", "tokens", width], FLOATING, self._home)
        if 0 in image_features.shape:
            raise ValueError(
                f"{name}: expected at least one token of one image, got {describe(image_features)}"
            )
        return image_features


def _read_names_of_the_encoder(
    module: ReadsImages, state_dict: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    """Load hook: names that an image encoder's tensors have without `FrozenVisionEncoder` around it, as in
    transformers, become ours; BLIP-2's `post_layernorm` is `ln_vision`."""
    vision = f"{prefix}vision_model."
    ours: set[str] = set() if module.vision_model is None else set(module.vision_model.state_dict())
    for name in [name for name in state_dict if name.startswith(vision)]:
        rest = name.removeprefix(vision)
        if rest in ours:
            continue
        if f"module.{rest}" in ours:
            state_dict[f"{vision}module.{rest}"] = state_dict.pop(name)
        elif rest.startswith("post_layernorm."):
            state_dict[f"{prefix}ln_vision.{rest.removeprefix('post_layernorm.')}"] = state_dict.pop(name)
