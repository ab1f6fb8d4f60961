"""Live transformers models on the fused encoder: `fuse`, `unfuse` and `fused`.

A fused Q-Former is the same module with the same parameters under another class, a subclass of the one it had
whose `forward` runs `FusedEncoder`. Everything that hangs on the module (its state dict, `save_pretrained`,
optimizers, hooks, `device_map`) stays where it is. A call that the fused encoder cannot serve exactly goes to
transformers' own `forward`, which is said once.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForImageTextRetrieval, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.blip_2.modeling_blip_2 import Blip2ImageTextMatchingModelOutput, Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel
from transformers.models.instructblipvideo.modeling_instructblipvideo import InstructBlipVideoQFormerModel
from transformers.utils import output_capturing

from .checks import describe
from .encoder import LayerCall
from .encoder.modules import exporting, first_norm_owner, plain_reason, touched
from .encoder.owner import OwnsFusedEncoder
from .encoder.padded import encode_padded, is_expanded
from .stand_in import StandIn, put_in, take_out

__all__ = ["fuse", "fused", "unfuse"]

logger = logging.getLogger(__name__)
Output = BaseModelOutputWithPoolingAndCrossAttentions
Model = TypeVar("Model", bound=nn.Module)


class _FusedQFormer(StandIn, OwnsFusedEncoder):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _let_outputs_be_recorded(self)

    @staticmethod
    def call_layer(layer: nn.Module, call: LayerCall) -> Tensor:
        """A layer of transformers' Q-Former called as the module it is, for the fused encoder."""
        masks = [call.allowed, call.image_allowed]
        if layer.attention.attention.config._attn_implementation == "eager":
            lowest = torch.finfo(call.hidden.dtype).min
            masks = [
                None
                if each is None
                else torch.zeros_like(each, dtype=call.hidden.dtype).masked_fill(~each, lowest)
                for each in masks
            ]
        return layer(
            call.hidden,
            masks[0],
            call.features,
            encoder_attention_mask=masks[1],
            query_length=call.num_queries,
        )

    def _plain_reason(self, attention_mask: Any, query_length: int, options: dict[str, Any]) -> str | None:
        """Why transformers' own `forward` has to serve a call; None where the fused encoder does."""
        for name in ("output_attentions", "output_hidden_states"):
            asked = options.pop(name, None)
            if asked if asked is not None else getattr(self.config, name, False):
                return f"{name} asks for what the fused encoder does not keep"
        unknown = [name for name, value in options.items() if value is not None]
        if unknown:
            return f"it does not know {', '.join(unknown)}"
        if exporting():
            return "the model is being exported"
        if getattr(self.config, "position_embedding_type", "absolute") not in (None, "absolute"):
            return f"position embeddings are {self.config.position_embedding_type}"
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            return f"attention_mask is a {type(attention_mask).__name__}"
        if attention_mask is not None and attention_mask.dim() != 2:
            return f"attention_mask has {attention_mask.dim()} dimensions"
        return self._changed or _hidden_queries(attention_mask, query_length)

    @property
    def _changed(self) -> str | None:
        """What was changed around the layers (what was changed in them, the encoder sees itself)."""
        owner = first_norm_owner(self)
        parts = {"encoder": self.encoder} | ({} if owner is self else {"embeddings": owner})
        for name, part in parts.items():
            reason = touched(part)
            if reason is not None:
                return f"{name} {reason}"
        reason = plain_reason(owner.dropout, nn.Dropout)
        if reason is not None:
            return f"dropout {reason}"
        first = (owner.layernorm, *(layer.attention.attention.query for layer in self.encoder.layer))
        if any("_hf_hook" in part.__dict__ for part in first):
            return "accelerate moves its weights"
        return None

    def _encode(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        attention_mask: Tensor | None,
        features: Tensor | None,
        image_mask: Tensor | None,
        return_dict: bool | None,
    ) -> Any:
        encoder, count = self.fused_encoder, 0 if queries is None else queries.shape[1]
        samples = max(part.shape[0] for part in (queries, text) if part is not None)
        images = None
        if count:
            if features is None:
                raise ValueError("encoder_hidden_states: expected image features for the queries, got None")
            samples = max(samples, features.shape[0])
            if is_expanded(features) and (image_mask is None or is_expanded(image_mask)):
                # One image for all samples is projected once.
                features, image_mask = features[:1], None if image_mask is None else image_mask[:1]
            mask = None if image_mask is None else image_mask != 0
            if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
                mask = None
            features = features.to(self._dtype)
            images = encoder.project_images(features, mask=mask, query_rows=samples * count)
        if attention_mask is not None:
            attention_mask = attention_mask.expand(samples, -1)[:, count:] != 0
        if text is not None:
            text = text.to(self._dtype).expand(samples, -1, -1)
        if queries is not None:
            queries = (queries[:1] if is_expanded(queries) else queries).to(self._dtype)
        rows = encode_padded(
            encoder,
            queries,
            text,
            samples=samples,
            text_mask=attention_mask if text is not None else None,
            images=images,
        )
        output = Output(last_hidden_state=rows, pooler_output=rows[:, 0])
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    @property
    def _dtype(self) -> torch.dtype:
        return first_norm_owner(self).layernorm.weight.dtype


class FusedBlip2QFormerModel(_FusedQFormer, Blip2QFormerModel):
    """`Blip2QFormerModel` on the fused encoder."""

    original = Blip2QFormerModel

    def forward(
        self,
        query_embeds: Tensor,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' (which see); padded images beside text work too."""
        count = query_embeds.shape[1] if query_length is None else query_length
        options = {name: value for name, value in kwargs.items() if name != "return_dict"}
        reason = self._plain_reason(attention_mask, count, options)
        if reason is not None:
            _say_once(reason)
            return Blip2QFormerModel.forward(
                self,
                query_embeds,
                query_length,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                **kwargs,
            )
        return self._encode(
            query_embeds[:, :count] if count else None,
            query_embeds[:, count:] if count < query_embeds.shape[1] else None,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            kwargs.get("return_dict"),
        )


class _FusedInstructQFormer(_FusedQFormer):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' (which see); padded images beside text work too."""
        if input_ids is None and query_embeds is None:
            raise ValueError("input_ids: expected input_ids or query_embeds, got neither")
        count = 0 if query_embeds is None else query_embeds.shape[1]
        options = {name: value for name, value in kwargs.items() if name != "return_dict"}
        reason = self._plain_reason(attention_mask, count, options)
        if reason is not None:
            _say_once(reason)
            return self.original.forward(
                self,
                input_ids,
                attention_mask,
                position_ids,
                query_embeds,
                encoder_hidden_states,
                encoder_attention_mask,
                **kwargs,
            )
        text = None
        if input_ids is not None:
            embeddings = self.embeddings
            if position_ids is None:
                position_ids = embeddings.position_ids[:, : input_ids.shape[1]]
            text = embeddings.word_embeddings(input_ids)
            text = text + embeddings.position_embeddings(position_ids.to(text.device))
        return self._encode(
            query_embeds,
            text,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            kwargs.get("return_dict"),
        )


class FusedInstructBlipQFormerModel(_FusedInstructQFormer, InstructBlipQFormerModel):
    """`InstructBlipQFormerModel` on the fused encoder."""

    original = InstructBlipQFormerModel


class FusedInstructBlipVideoQFormerModel(_FusedInstructQFormer, InstructBlipVideoQFormerModel):
    """`InstructBlipVideoQFormerModel` on the fused encoder."""

    original = InstructBlipVideoQFormerModel


class FusedBlip2ForImageTextRetrieval(StandIn, Blip2ForImageTextRetrieval):
    """`Blip2ForImageTextRetrieval` that also matches one image with many texts, and takes texts without a
    mask."""

    original = Blip2ForImageTextRetrieval

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' (which see)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        samples = input_ids.shape[0]
        if not use_image_text_matching_head or not pixel_values.shape[0] == 1 < samples:
            return super().forward(
                pixel_values,
                input_ids,
                attention_mask,
                use_image_text_matching_head,
                output_attentions,
                output_hidden_states,
                return_dict,
                **kwargs,
            )
        count = self.config.num_query_tokens
        vision = self.vision_model(
            pixel_values=pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        if self.config.image_token_index is not None:
            input_ids = input_ids[:, count:]
        else:
            attention_mask = F.pad(attention_mask, (count, 0), value=1)
        features = vision.last_hidden_state.expand(samples, -1, -1)
        read = self.qformer(
            query_embeds=self.embeddings(
                input_ids=input_ids, query_embeds=self.query_tokens.expand(samples, -1, -1)
            ),
            query_length=count,
            attention_mask=attention_mask,
            encoder_hidden_states=features,
            return_dict=True,
        )
        hidden = read.last_hidden_state.to(self.itm_head.weight.dtype)
        logits = self.itm_head(hidden[:, :count]).mean(dim=1)
        output = Blip2ImageTextMatchingModelOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            text_embeds=hidden,
            image_embeds=features,
            text_model_output=read,
            vision_model_output=vision,
        )
        if return_dict if return_dict is not None else self.config.return_dict:
            return output
        return (*output.to_tuple()[:4], read.to_tuple(), vision.to_tuple())


FUSED: dict[type[PreTrainedModel], Any] = {
    each.original: each
    for each in (FusedBlip2QFormerModel, FusedInstructBlipQFormerModel, FusedInstructBlipVideoQFormerModel)
}
"""A Q-Former's class in transformers, and the class it has fused."""
AROUND: dict[type[PreTrainedModel], Any] = {Blip2ForImageTextRetrieval: FusedBlip2ForImageTextRetrieval}
"""The same for models around a Q-Former that stand in the way of what it can do."""
BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fuse(model: Model, *, backend: str = "auto", qformer_dtype: torch.dtype | None = None) -> Model:
    """Run every Q-Former of a live transformers model through the fused encoder, in place.

    Numbers stay what they were but for rounding, with these differences: elements that dropout zeroes are
    drawn otherwise, a fully masked image gives 0 (transformers' eager attention averages its padding), and
    padded images beside text, which transformers refuses, work.

    Args:
        model: any module with a Q-Former of transformers in it: BLIP-2, InstructBLIP, InstructBLIP-Video,
            Granite Speech, Granite Vision, ..., or a Q-Former itself. Fused ones stay fused; those of a
            class derived from transformers' stay as they are, which is said once.
        backend: of the attentions: "auto" (for each the first that can serve it), "triton", "torch" or
            "reference"; one that cannot serve a call raises ValueError when it is met.
        qformer_dtype: cast the Q-Formers' parameters to this dtype, which `unfuse` does not take back; for an
            fp16 load, which leaves them in fp32, torch.bfloat16. Default: as they are.

    Returns:
        The model that was given.

    Raises:
        TypeError: no module, none of its modules is a Q-Former, or no floating dtype.
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend: expected one of {names}, got {describe(backend)}")
    if qformer_dtype is not None and qformer_dtype not in DTYPES:
        raise TypeError(f"qformer_dtype: expected a floating torch.dtype, got {describe(qformer_dtype)}")
    qformers = find_qformers(model)
    put_in(model.modules(), FUSED | AROUND)
    for module in qformers:
        if isinstance(module, _FusedQFormer):
            _let_outputs_be_recorded(module)
            module.attention_backend = backend
        else:
            _say_once(f"{type(module).__name__} is a class of its own, whose forward may say something else")
        if qformer_dtype is not None:
            module.to(qformer_dtype)
    return model


def unfuse(model: Model) -> Model:
    """Give every Q-Former of a model the class back that it had before `fuse`, in place.

    Args:
        model: as for `fuse`; whatever is not fused stays as it is.

    Returns:
        The model that was given.

    Raises:
        TypeError: as for `fuse`.
    """
    for module in find_qformers(model):
        if isinstance(module, _FusedQFormer):
            module.__dict__.pop("_fused_encoder", None)
            module.__dict__.pop("_attention_backend", None)
    take_out(model.modules(), FUSED | AROUND)
    return model


@contextlib.contextmanager
def fused(*, backend: str = "auto") -> Iterator[None]:
    """Fuse the Q-Formers that transformers builds inside, whichever way:

    with blip2_kernels.fused():
        model = Blip2ForConditionalGeneration.from_pretrained(path)

    Args:
        backend: as for `fuse`.
    """
    before = {original: original.__dict__.get("__init__") for original in (*FUSED, *AROUND)}

    def building(original: type[PreTrainedModel], init: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            if type(self) is original:
                fuse(self, backend=backend)

        return functools.wraps(init)(__init__)

    try:
        for original, init in before.items():
            original.__init__ = building(original, init)
        yield
    finally:
        for original, init in before.items():
            original.__init__ = init


def find_qformers(model: Any) -> list[Any]:
    """The Q-Formers of transformers in a model, fused or not.

    Raises:
        TypeError: no module, or one without any.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module with a Q-Former of transformers, got {describe(model)}")
    found = [module for module in model.modules() if isinstance(module, tuple(FUSED))]
    if not found:
        searched = ", ".join(original.__name__ for original in FUSED)
        raise TypeError(
            f"model: expected a module in which there is a {searched}, got a {type(model).__name__} without"
        )
    return found


def _hidden_queries(attention_mask: Tensor | None, count: int) -> str | None:
    """Why a mask of two dimensions is not one a layout can express: it hides queries."""
    if attention_mask is None or not count:
        return None
    shown = (attention_mask[:, :count] != 0).all()
    if torch.compiler.is_compiling():
        # What a mask holds cannot choose the path of a compiled graph: it is checked when that runs.
        torch._assert_async(shown, "attention_mask: expected no hidden query in a compiled model")
        return None
    return None if bool(shown) else "attention_mask hides queries"


def _let_outputs_be_recorded(module: Any) -> None:
    """transformers looks up by class what the plain path of a module can record of its layers."""
    registry = output_capturing._CAN_RECORD_REGISTRY
    key = str(type(module))
    dict.__setitem__(registry, key, module._can_record_outputs)


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("a fused Q-Former takes the path of transformers: %s", reason)
