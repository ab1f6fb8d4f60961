"""What the images contribute to the cross-attention layers, made once for every pass that looks at them."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dense_attention import autocasts
from ..ops.linear import linear
from .modules import call_linear
from .weights import Fold

__all__ = ["ImageFeatures", "ImageKeyValues", "KeyValues"]


@dataclass(frozen=True)
class ImageFeatures:
    """Image features as the cross-attention layers read them: values * norm.weight + norm.bias.

    Attributes:
        values: [images, tokens, width]; behind the whole norm, or normalised only where `norm` is given.
        norm: the image LayerNorm whose weight and bias are still to be applied, or None. Folded into the key
            and value weights they cost nothing, and no gradient of an image's size exists.
        whole: [images, tokens, width] behind the whole norm, where some module has to be called with it.
    """

    values: Tensor
    norm: nn.LayerNorm | None = None
    whole: Tensor | None = None

    @classmethod
    def normalized(cls, features: Tensor, norm: nn.LayerNorm, *, keep_whole: bool) -> "ImageFeatures":
        """Features with mean 0 and variance 1, as the norm makes them before its weight and bias."""
        values = F.layer_norm(features, norm.normalized_shape, eps=norm.eps)
        if autocasts(features.device):
            # Every projection would round them anew.
            values = values.to(torch.get_autocast_dtype(features.device.type))
        made = cls(values, norm)
        return replace(made, whole=made.behind_norm) if keep_whole else made

    @property
    def behind_norm(self) -> Tensor:
        """[images, tokens, width] behind the whole norm."""
        if self.whole is not None:
            return self.whole
        return self.values if self.norm is None else self.values * self.norm.weight + self.norm.bias

    def of_samples(self, image_index: Tensor) -> "ImageFeatures":
        """The same with one copy a sample."""
        index = image_index.long()
        whole = None if self.whole is None else self.whole.index_select(0, index)
        return ImageFeatures(self.values.index_select(0, index), self.norm, whole)


@dataclass(frozen=True)
class KeyValues:
    """One layer's keys and values of a set of images.

    Attributes:
        key, value: [images, tokens, heads, head_dim].
        context_bias: [hidden] to be added to what is read from an image with a visible token, or None: the
            value bias, which the probabilities, that sum to one, leave as it is.
    """

    key: Tensor
    value: Tensor
    context_bias: Tensor | None = None


@dataclass(frozen=True)
class ImageKeyValues:
    """A set of images, ready for any number of passes of a Q-Former.

    Attributes:
        features: what the layers read.
        layers: one entry a layer: its keys and values, or None where it has no cross-attention or makes them
            itself (absorbed cross-attention, checkpointed layers, layers that are called as modules).
        mask: 0/1 [images, tokens], or None where every token is visible.
        owner: the Q-Former whose weights made them.
        absorbed: layers without keys and values attend to the features themselves.
        shared: an image is projected once for all samples that look at it, not once a sample.
        cut_from: tensors they were made of while no gradients were recorded; empty where gradients were.
    """

    features: ImageFeatures
    layers: tuple[KeyValues | None, ...]
    mask: Tensor | None
    owner: nn.Module
    absorbed: bool = False
    shared: bool = True
    cut_from: tuple[Tensor, ...] = ()

    @property
    def images(self) -> int:
        """How many images; samples point at them through `image_index`."""
        return self.features.values.shape[0]


def project(
    attention: nn.Module,
    heads: int,
    features: ImageFeatures,
    *,
    read_weights: bool,
    bias_identities: bool,
    fold: Fold,
) -> KeyValues:
    """One layer's keys and values of all images.

    Args:
        attention: with the linear layers `key` and `value`.
        heads: attention heads.
        features: of the images.
        read_weights: whether the linear layers may be gone around; else they are called as modules.
        bias_identities: leave the key bias out, which cancels in the softmax (its gradient is 0), and the
            value bias to `context_bias`.
        fold: how to fold the norm into a linear layer.
    """
    if not read_weights:
        values = _cast(features.behind_norm, attention.key)
        key, value = call_linear(attention.key, values), call_linear(attention.value, values)
        return KeyValues(key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1)))
    values = _cast(features.values, attention.key)
    folded_key = fold(attention.key, features.norm, with_bias=not bias_identities)
    folded_value = fold(attention.value, features.norm)
    added_here, added_later = (None, folded_value.bias) if bias_identities else (folded_value.bias, None)
    key = linear(values, folded_key.weight, folded_key.bias)
    value = linear(values, folded_value.weight, added_here)
    return KeyValues(key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1)), added_later)


def _cast(values: Tensor, layer: nn.Module) -> Tensor:
    """Values in the dtype of a linear layer's weight, if it has an ordinary one and autocast does not see to
    it."""
    weight = getattr(layer, "weight", None)
    if autocasts(values.device) or not isinstance(weight, Tensor):
        return values
    return values.to(weight.dtype) if weight.is_floating_point() else values
