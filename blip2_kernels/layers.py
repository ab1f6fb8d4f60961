"""The layers of live transformers Q-Formers with fused operators in them: `patch` and `unpatch`.

`fuse` runs a Q-Former past its layers. `patch` keeps every layer the module it is, called in its turn: its
attentions go to the attention kernels, bias + dropout + residual + LayerNorm and bias + GELU to one operator
each. It gives less, and serves what needs layers: their hidden states, hooks on them, wrappers and callbacks
of a `Trainer` that work layer by layer. Both go together: `fuse` then goes around patched layers as it does
around others, and what it leaves to transformers runs through them.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.instructblip import modeling_instructblip
from transformers.models.instructblipvideo import modeling_instructblipvideo

from .attention_interface import NAME, register_attention
from .checks import check_bool
from .encoder.epilogues import HiddenDropout, dense_add_norm, dense_gelu
from .encoder.modules import exporting, plain_reason
from .ops.philox import Site, draw_key
from .stand_in import StandIn, put_in, take_out
from .transformers import find_qformers

__all__ = ["patch", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)

# Here, and not first in `patch`: a pickle of a patched model names the attention too.
register_attention()


def _as_built(*modules: tuple[nn.Module, type[nn.Module]]) -> bool:
    """Whether modules may be read past their `__call__`, in a graph that may hold our operators."""
    return not exporting() and all(plain_reason(module, kind) is None for module, kind in modules)


class _PatchedOutput(StandIn):
    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """LayerNorm(input_tensor + dropout(dense(hidden_states))), [B, rows, C]."""
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout
        if not _as_built((dense, nn.Linear), (norm, nn.LayerNorm), (dropout, nn.Dropout)):
            return self.original.forward(self, hidden_states, input_tensor)
        rows, residual = hidden_states.flatten(0, -2), input_tensor.flatten(0, -2)
        drop = None
        if dropout.training and dropout.p > 0:
            # A key of its own stands for the place, so that each call and layer drops other elements.
            names = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
            drop = HiddenDropout(dropout.p, draw_key(rows.device), names, 0, Site.SELF_OUTPUT)
        return dense_add_norm(dense, norm, rows, residual, drop).view(input_tensor.shape)


class _PatchedIntermediate(StandIn):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """intermediate_act_fn(dense(hidden_states)), [B, rows, intermediate]."""
        dense, activation = self.dense, self.intermediate_act_fn
        if not _as_built((dense, nn.Linear)):
            return self.original.forward(self, hidden_states)
        rows = dense_gelu(dense, activation, hidden_states.flatten(0, -2))
        return rows.unflatten(0, hidden_states.shape[:-1])


def _stand_in(original: type[nn.Module], body: type[StandIn]) -> type[nn.Module]:
    """A class of this module, where pickles find it."""
    name = f"Patched{original.__name__}"
    own = {"original": original, "__module__": __name__, "__qualname__": name}
    globals()[name] = type(name, (body, original), own)
    return globals()[name]


PATCHED: dict[type[nn.Module], type[nn.Module]] = {
    original: _stand_in(original, body)
    for module, family in (
        (modeling_blip_2, "Blip2"),
        (modeling_instructblip, "InstructBlip"),
        (modeling_instructblipvideo, "InstructBlipVideo"),
    )
    for part, body in (
        ("SelfOutput", _PatchedOutput),
        ("Output", _PatchedOutput),
        ("Intermediate", _PatchedIntermediate),
    )
    for original in [getattr(module, f"{family}QFormer{part}")]
}
"""A class of transformers' Q-Former layers, and the class it has patched."""


def patch(model: Model, *, attention: bool = True) -> Model:
    """Put fused operators into the layers of every Q-Former of a live transformers model, in place.

    Parameters, names and modules stay; so do the numbers, but for rounding, and the elements that dropout
    zeroes. A linear layer, norm or dropout on which something hangs (a hook, an adapter) is called as the
    module it is. Without the compiled extension the attentions alone are ours.

    Args:
        model: any module with a Q-Former of transformers in it, as for `fuse`; also one that is fused, whose
            calls that fall back then take these layers.
        attention: also choose the attention kernels for the Q-Formers (`register_attention`). They give no
            attention probabilities: for `output_attentions` keep transformers' own, by False.

    Returns:
        The model that was given.

    Raises:
        TypeError: no module, none of its modules is a Q-Former, or `attention` is no bool.
    """
    check_bool("attention", attention)
    for qformer in find_qformers(model):
        put_in(qformer.modules(), PATCHED)
        chosen = qformer.config._attn_implementation
        if attention and chosen != NAME:
            qformer._attention_before_patch = chosen
            qformer.set_attn_implementation(NAME)
    return model


def unpatch(model: Model) -> Model:
    """Give the layers of a model the classes back that they had before `patch`, in place.

    Args:
        model: as for `patch`; whatever is not patched stays as it is.

    Returns:
        The model that was given.

    Raises:
        TypeError: as for `patch`.
    """
    for qformer in find_qformers(model):
        take_out(qformer.modules(), PATCHED)
        before = qformer.__dict__.pop("_attention_before_patch", None)
        if before is not None:
            qformer.set_attn_implementation(before)
    return model
