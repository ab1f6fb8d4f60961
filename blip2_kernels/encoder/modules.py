"""Which modules the fused encoder may go around, and what it reads from them.

The encoder computes with the parameters of a Q-Former without calling its layers. Whatever hangs on a module
that is not called (a hook, an adapter, another `forward`, a sharding or quantising wrapper) would be lost in
silence, so a module is gone around only while it is exactly what it was built as.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear import linear
from .plan import Hinders, Saving

STOCK = (
    "blip2_kernels.model.qformer_layers",
    "transformers.models.blip_2.modeling_blip_2",
    "transformers.models.instructblip.modeling_instructblip",
    "transformers.models.instructblipvideo.modeling_instructblipvideo",
    "blip2_kernels.layers",
)
"""Where the classes of Q-Former layers that this encoder knows are defined."""

QFORMERS = (*STOCK, "blip2_kernels.model.qformer", "blip2_kernels.transformers")
"""Where the classes of Q-Formers are defined whose own `forward` may be gone around."""

EMBEDDINGS = ("blip2_kernels.model.qformer_text", "transformers.models.blip_2.modeling_blip_2")
"""Where the classes of text embeddings that are the sum of a word and a position are defined."""

_PROJECTIONS = ("query", "key", "value")


def _recorder(hook: object) -> bool:
    """Whether a forward hook is the one by which transformers records outputs. It stays on a module for good
    once outputs were asked for, and does nothing while they are not."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def exporting() -> bool:
    """Whether a graph is being made that has to stay free of our operators."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def touched(module: nn.Module) -> str | None:
    """None where calling a module runs the `forward` of its class and nothing else, else why not."""
    own = module.__dict__
    if "forward" in own:
        return "has a forward of its own"
    # Asked a few hundred times a pass, so without a loop.
    if (
        (own["_forward_hooks"] and not all(map(_recorder, own["_forward_hooks"].values())))
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has hooks"
    return None


def _parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer that are gone around: all but linear layers, norms and activations."""
    yield "", layer
    for name in (
        "attention",
        "crossattention",
        "intermediate",
        "output",
        "intermediate_query",
        "output_query",
    ):
        part = layer._modules.get(name)
        if part is None:
            continue
        yield name, part
        for child in ("attention", "output"):
            if child in part._modules:
                yield f"{name}.{child}", part._modules[child]


def bypass_reason(layer: nn.Module) -> str | None:
    """None where a layer may be gone around, else why it must be called as the module it is."""
    for name, part in _parts(layer):
        if type(part).__module__ not in STOCK:
            reason: str | None = f"is a {type(part).__qualname__}"
        else:
            reason = touched(part)
            dropout = part._modules.get("dropout")
            if reason is None and dropout is not None:
                name = f"{name}.dropout".lstrip(".")
                is_stock = type(dropout) is nn.Dropout
                reason = touched(dropout) if is_stock else f"is a {type(dropout).__qualname__}"
        if reason is not None:
            return f"{name or 'the layer'} {reason}"
    return None


def qformer_reason(qformer: nn.Module) -> str | None:
    """None where rows may be encoded past a Q-Former's own `forward`, else why it must be called."""
    if type(qformer).__module__ not in QFORMERS:
        return f"is a {type(qformer).__qualname__}"
    return touched(qformer)


def plain_reason(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """None where a linear layer, norm or activation is an untouched `kind` with ordinary weights, which may
    be read past its `__call__`; else why not."""
    if type(module) is not kind:
        return f"is a {type(module).__qualname__}"
    own = module.__dict__["_parameters"]
    for name in ("weight", "bias"):
        parameter = own[name] if name in own else getattr(module, name, None)
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return f"has weights of type {type(parameter).__name__}"
    return touched(module)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); past its `__call__` where it is an untouched linear layer, by the faster library."""
    if x.is_cpu and plain_reason(module, nn.Linear) is None:
        return linear(x, module.weight, module.bias)
    return module(x)


def stock_reason(embeddings: nn.Module) -> str | None:
    """None where text embeddings are an untouched module of a class that is known here, else why not."""
    if type(embeddings).__module__ not in EMBEDDINGS:
        return f"is a {type(embeddings).__qualname__}"
    return touched(embeddings)


def projections_reason(attention: nn.Module) -> str | None:
    """None where the key and value weights of an attention may be read, else why not."""
    for name in ("key", "value"):
        reason = plain_reason(getattr(attention, name), nn.Linear)
        if reason is not None:
            return f"{name} {reason}"
    return None


def affine_reason(norm: nn.Module) -> str | None:
    """None where a LayerNorm is an untouched one whose weight and bias may be read, else why not."""
    reason = plain_reason(norm, nn.LayerNorm)
    if reason is None and (norm.weight is None or norm.bias is None):
        reason = "has no weight and bias"
    return reason


def image_norm_reason(norm: nn.Module) -> str | None:
    """The same of an image norm, named as such."""
    reason = affine_reason(norm)
    return reason and f"the image norm {reason}"


def first_norm_owner(qformer: nn.Module) -> Any:
    """The module that holds the LayerNorm and dropout which all rows pass first: the Q-Former of BLIP-2, the
    embeddings of InstructBLIP's."""
    return qformer.embeddings if getattr(qformer, "layernorm", None) is None else qformer


def row_hinders(whole: Sequence[str | None]) -> tuple[str | None, str | None]:
    """Why the first and the last layer cannot compute fewer rows, from the `bypass_reason` of each layer."""
    if not whole:
        return "there is no layer", "there is no layer"
    first, last = _called_whole(0, whole), _called_whole(len(whole) - 1, whole)
    if len(whole) == 1:
        first = first or "there is one layer, which is the last too"
    return first, last


def image_hinders(layers: Sequence[nn.Module], whole: Sequence[str | None]) -> Iterator[str | None]:
    """Of each layer with cross-attention, why its image projections cannot be read past."""
    for number, layer in enumerate(layers):
        if hasattr(layer, "crossattention"):
            reason = _called_whole(number, whole)
            if reason is None:
                own = projections_reason(layer.crossattention.attention)
                reason = own and f"the image {own} in layer {number}"
            yield reason


def hinders(qformer: nn.Module, whole: Sequence[str | None], norm: nn.Module | None = None) -> Hinders:
    """What the modules of a Q-Former stand in the way of.

    Args:
        qformer: with `encoder.layer`.
        whole: `bypass_reason` of each layer.
        norm: the image norm, if one is read.
    """
    layers = qformer.encoder.layer
    images = list(image_hinders(layers, whole))
    called = [_called_whole(i, whole) for i, layer in enumerate(layers) if hasattr(layer, "crossattention")]
    first, last = row_hinders(whole)
    return Hinders(
        first_layer=first,
        last_layer=last,
        some_images=next(filter(None, images), None),
        every_image=images[0] if images and all(images) else None,
        every_layer=called[0] if called and all(called) else None,
        image_norm=None if norm is None else image_norm_reason(norm),
    )


def _called_whole(number: int, whole: Sequence[str | None]) -> str | None:
    reason = whole[number]
    return reason and f"layer {number} is called whole: {reason}"


def changes(qformer: nn.Module, whole: Sequence[str | None], *, joined: bool) -> list[str]:
    """Which modules were changed and what is declined because of them, a line each.

    Args:
        qformer: with `encoder.layer`.
        whole: `bypass_reason` of each layer.
        joined: whether the projections of self-attention are joined where they can be.
    """
    lines = []
    own = qformer_reason(qformer)
    if own is not None:
        declined_by_models = f"{Saving.ONE_PASS}, {Saving.PROJECT_ONCE}"
        lines.append(f"the Q-Former is called pass by pass, without {declined_by_models}: it {own}")
    for number, (layer, reason) in enumerate(zip(qformer.encoder.layer, whole, strict=True)):
        if reason is not None:
            lines.append(f"layer {number} is called whole, on padded rows: {reason}")
            continue
        declined: list[tuple[str, str]] = []
        own = projections_reason(layer.crossattention.attention) if hasattr(layer, "crossattention") else None
        if own is not None:
            savings = ", ".join((Saving.NO_IMAGE_GRADIENT, Saving.ABSORBED, Saving.BIAS_IDENTITIES))
            declined.append((savings, f"image {own}"))
        if joined:
            attention = layer.attention.attention
            named = ((name, plain_reason(getattr(attention, name), nn.Linear)) for name in _PROJECTIONS)
            found = next((f"{name} {reason}" for name, reason in named if reason is not None), None)
            if found is not None:
                declined.append((Saving.JOINED_PROJECTIONS, found))
        lines += [f"layer {number} goes without {savings}: its {why}" for savings, why in declined]
    return lines


def drops(qformer: nn.Module) -> bool:
    """Whether a forward pass of a Q-Former now would apply dropout."""
    if not qformer.training:
        return False
    config = qformer.config
    return any(rate > 0 for rate in (config.hidden_dropout_prob, config.attention_probs_dropout_prob))


def checkpoints(qformer: nn.Module) -> bool:
    """Whether a forward pass of a Q-Former now would checkpoint its layers."""
    if not (qformer.training and torch.is_grad_enabled()):
        return False
    # transformers' models are asked through their layers.
    owners = (qformer, next(iter(qformer.encoder.layer), qformer))
    return any(getattr(owner, "gradient_checkpointing", False) for owner in owners)
