"""The registered operators of the similarity of images and texts, and the launches behind them."""

from typing import Any

import torch
from torch import Tensor

from ... import launching
from ...library import Gradient, define
from .. import launch


def supports(image_feats: Tensor, text_feats: Tensor) -> str | None:
    """None where the kernels can serve, else the reason."""
    return launching.supports({"image_feats": image_feats, "text_feats": text_feats})


def image_text_similarity_triton(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """See `image_text_similarity`."""
    keep_index = torch.is_grad_enabled() and (image_feats.requires_grad or text_feats.requires_grad)
    return _forward(image_feats, text_feats, keep_index)[0]


def _run_forward(image_feats: Tensor, text_feats: Tensor, keep_index: bool) -> tuple[Tensor, Tensor]:
    (images, queries, channels), texts = image_feats.shape, text_feats.shape[0]
    precision = launching.input_precision(image_feats.dtype)
    constants = {"QUERIES": queries, "KEEP_INDEX": keep_index, "PRECISION": precision}
    constants |= {"WIDE": launching.wide(image_feats, text_feats), "GROUP": launch.GROUP}

    def run(config: launching.Config) -> tuple[Tensor, Tensor]:
        from .forward import forward_kernel

        even = {"EVEN_CHANNELS": channels % config["BLOCK_E"] == 0}
        out = image_feats.new_empty((images, texts))
        index = image_feats.new_empty((images, texts) if keep_index else (0,), dtype=torch.int32)
        strides = (*launching.strides(image_feats), *launching.strides(text_feats))
        args = (image_feats, text_feats, out, index, images, texts, channels, *strides)
        tiles = _tiles(images, config["BLOCK_I"]) * _tiles(texts, config["BLOCK_T"])
        launching.launch(forward_kernel, (tiles,), args, constants | even, config)
        return out, index

    key = launch.forward_key(image_feats.dtype, queries)
    configs = launch.FORWARD.configs(launching.architecture(image_feats.device), key)
    compiled_for = (image_feats.dtype, *constants.values())
    return launching.first_that_fits("image_text_similarity", image_feats.device, compiled_for, configs, run)


def _run_image_backward(grad: Tensor, text_feats: Tensor, index: Tensor, queries: int) -> Tensor:
    (images, texts), channels = index.shape, text_feats.shape[1]
    grad, index = grad.contiguous(), index.contiguous()
    precision = launching.input_precision(text_feats.dtype)
    constants = {"QUERIES": queries, "CHANNELS": channels, "PRECISION": precision}
    constants |= {"WIDE": launching.wide(text_feats)}

    def run(config: launching.Config) -> Tensor:
        from .backward import image_gradient_kernel

        d_image = text_feats.new_empty((images, queries, channels))
        args = (grad, text_feats, index, d_image, images, texts, *launching.strides(text_feats))
        blocks = (config["BLOCK_I"], config["BLOCK_Q"], config["BLOCK_E"])
        grid = tuple(map(_tiles, (images, queries, channels), blocks))
        launching.launch(image_gradient_kernel, grid, args, constants, config)
        return d_image

    key = launch.image_gradient_key(text_feats.dtype, queries, channels)
    configs = launch.IMAGE_GRADIENT.configs(launching.architecture(text_feats.device), key)
    name = "image_text_similarity_image_backward"
    compiled_for = (text_feats.dtype, *constants.values())
    return launching.first_that_fits(name, text_feats.device, compiled_for, configs, run)


def _run_text_backward(grad: Tensor, image_feats: Tensor, index: Tensor) -> Tensor:
    (images, texts), (queries, channels) = index.shape, image_feats.shape[1:]
    grad, index = grad.contiguous(), index.contiguous()
    constants = {"QUERIES": queries, "CHANNELS": channels, "WIDE": launching.wide(image_feats)}

    def run(config: launching.Config) -> Tensor:
        from .backward import text_gradient_kernel

        d_text = image_feats.new_empty((texts, channels))
        args = (grad, image_feats, index, d_text, images, texts, *launching.strides(image_feats))
        grid = (texts, _tiles(channels, config["BLOCK_E"]))
        launching.launch(text_gradient_kernel, grid, args, constants, config)
        return d_text

    key = launch.text_gradient_key(channels)
    configs = launch.TEXT_GRADIENT.configs(launching.architecture(image_feats.device), key)
    name = "image_text_similarity_text_backward"
    compiled_for = (image_feats.dtype, *constants.values())
    return launching.first_that_fits(name, image_feats.device, compiled_for, configs, run)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _fake_forward(image_feats: Tensor, text_feats: Tensor, keep_index: bool) -> tuple[Tensor, Tensor]:
    shape = (image_feats.shape[0], text_feats.shape[0])
    return image_feats.new_empty(shape), image_feats.new_empty(shape if keep_index else 0, dtype=torch.int32)


def _fake_image_backward(grad: Tensor, text_feats: Tensor, index: Tensor, queries: int) -> Tensor:
    return text_feats.new_empty((index.shape[0], queries, text_feats.shape[1]))


def _fake_text_backward(grad: Tensor, image_feats: Tensor, index: Tensor) -> Tensor:
    return image_feats.new_empty((index.shape[1], image_feats.shape[2]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    image_feats, text_feats, keep_index = inputs
    index = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(image_feats, text_feats, index)
    ctx.keep_index = keep_index


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    if not ctx.keep_index:
        raise RuntimeError("image_text_similarity: expected keep_index=True where a gradient is asked for")
    image_feats, text_feats, index = ctx.saved_tensors
    for_images, for_texts, _ = ctx.needs_input_grad
    d_image = _image_backward(grad, text_feats, index, image_feats.shape[1]) if for_images else None
    d_text = _text_backward(grad, image_feats, index) if for_texts else None
    return d_image, d_text, None


_forward = define(
    "image_text_similarity(Tensor image_feats, Tensor text_feats, bool keep_index) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    Gradient(_differentiate, _save),
)
_image_backward = define(
    "image_text_similarity_image_backward(Tensor grad, Tensor text_feats, Tensor index, SymInt queries)"
    " -> Tensor",
    _run_image_backward,
    _fake_image_backward,
)
_text_backward = define(
    "image_text_similarity_text_backward(Tensor grad, Tensor image_feats, Tensor index) -> Tensor",
    _run_text_backward,
    _fake_text_backward,
)
