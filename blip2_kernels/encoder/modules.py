"""Which modules the fused encoder may go around, and what it reads from them.

The encoder computes with the parameters of a Q-Former without calling its layers. Whatever hangs on a module
that is not called (a hook, an adapter, another `forward`, a sharding or quantising wrapper) would be lost in
silence, so a module is gone around only while it is exactly what it was built as.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops.linear import linear

STOCK = (
    "blip2_kernels.model.qformer_layers",
    "transformers.models.blip_2.modeling_blip_2",
    "transformers.models.instructblip.modeling_instructblip",
    "transformers.models.instructblipvideo.modeling_instructblipvideo",
)
"""Where the classes of Q-Former layers that this encoder knows are defined."""

EMBEDDINGS = ("blip2_kernels.model.qformer_text", "transformers.models.blip_2.modeling_blip_2")
"""Where the classes of text embeddings that are the sum of a word and a position are defined."""


def _recorder(hook: object) -> bool:
    """Whether a forward hook is the one by which transformers records outputs. It stays on a module for good
    once outputs were asked for, and does nothing while they are not."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def touched_reason(module: nn.Module) -> str | None:
    """None where a module is called as it was built, else what hangs on it."""
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
            reason = touched_reason(part)
            dropout = part._modules.get("dropout")
            if reason is None and dropout is not None:
                name = f"{name}.dropout".lstrip(".")
                is_stock = type(dropout) is nn.Dropout
                reason = touched_reason(dropout) if is_stock else f"is a {type(dropout).__qualname__}"
        if reason is not None:
            return f"{name or 'the layer'} {reason}"
    return None


def plain_reason(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """None where a linear layer, norm or activation is an untouched `kind` with ordinary weights, which may
    be read past its `__call__`; else why not."""
    if type(module) is not kind:
        return f"is a {type(module).__qualname__}"
    for parameter in (getattr(module, "weight", None), getattr(module, "bias", None)):
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return f"has weights of type {type(parameter).__name__}"
    return touched_reason(module)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); past its `__call__` where it is an untouched linear layer, by the faster library."""
    if x.device.type == "cpu" and plain_reason(module, nn.Linear) is None:
        return linear(x, module.weight, module.bias)
    return module(x)


def stock_reason(embeddings: nn.Module) -> str | None:
    """None where text embeddings are an untouched module of a class that is known here, else why not."""
    if type(embeddings).__module__ not in EMBEDDINGS:
        return f"is a {type(embeddings).__qualname__}"
    return touched_reason(embeddings)


def projections_reason(attention: nn.Module) -> str | None:
    """None where the key and value weights of an attention may be read, else why not."""
    for name in ("key", "value"):
        reason = plain_reason(getattr(attention, name), nn.Linear)
        if reason is not None:
            return f"{name} {reason}"
    return None


def drops(qformer: nn.Module) -> bool:
    """Whether a forward pass of a Q-Former now would apply dropout."""
    config = qformer.config
    rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob)
    return qformer.training and any(rate > 0 for rate in rates)


def checkpoints(qformer: nn.Module) -> bool:
    """Whether a forward pass of a Q-Former now would checkpoint its layers."""
    # transformers' models are asked through their layers.
    owners = (qformer, next(iter(qformer.encoder.layer), qformer))
    asked = any(getattr(owner, "gradient_checkpointing", False) for owner in owners)
    return asked and qformer.training and torch.is_grad_enabled()
