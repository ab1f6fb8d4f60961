"""The projectors of Granite Speech and Granite Vision: a Q-Former on many small windows, as it was and fused.

    python examples/granite.py speech [CHECKPOINT] [--count 30]
    python examples/granite.py vision [CHECKPOINT] [--count 1]

CHECKPOINT is a folder or hub name of such a model; without one, a random projector of such a shape. What it
reads is random: what is shown is that both say the same, and how long each takes.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
)
from transformers.models.granite4_vision.modeling_granite4_vision import (
    Granite4VisionWindowQFormerDownsampler,
)
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

import blip2_kernels

FEATURES_A_SECOND = 50


def speech(checkpoint: str | None, seconds: float) -> tuple[nn.Module, Tensor]:
    """The projector, and features [1, n, width] of so many seconds."""
    if checkpoint is None:
        projector: nn.Module = GraniteSpeechEncoderProjector(GraniteSpeechConfig())
    else:
        projector = GraniteSpeechForConditionalGeneration.from_pretrained(checkpoint).projector
    width = projector.qformer.config.encoder_hidden_size
    return projector, torch.randn(1, int(seconds * FEATURES_A_SECOND), width)


def vision(checkpoint: str | None, pictures: float) -> tuple[nn.Module, Tensor]:
    """The first projector, and features [pictures, n, width]."""
    if checkpoint is None:
        encoder = {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 384,
            "patch_size": 16,
        }
        config = Granite4VisionConfig(vision_config=encoder, downsample_rate="4/8")
        projector: nn.Module = Granite4VisionWindowQFormerDownsampler(config)
        nn.init.normal_(projector.query, std=0.02)
        nn.init.normal_(projector.image_positions, std=0.02)
    else:
        model = Granite4VisionForConditionalGeneration.from_pretrained(checkpoint).model
        projector = model.layerwise_projectors[0]
    return projector, torch.randn(int(pictures), projector.image_side**2, projector.norm.normalized_shape[0])


PROJECTORS = {"speech": (speech, 30.0), "vision": (vision, 1.0)}
"""What makes each, and how much it reads by default."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=PROJECTORS)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--count", type=float, help="seconds of speech (30), or pictures (1)")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    make, count = PROJECTORS[arguments.kind]
    projector, features = make(arguments.checkpoint, arguments.count or count)
    projector, features = projector.to(device).eval(), features.to(device)

    said = {}
    for name, change in (("transformers", lambda model: model), ("fused", blip2_kernels.fuse)):
        change(projector)
        projector(features)
        start = time.perf_counter()
        said[name] = projector(features).cpu()
        print(f"{name}: {(time.perf_counter() - start) * 1e3:.1f} ms")
    difference = (said["fused"] - said["transformers"]).abs().max()
    print(f"largest difference: {difference:.1e} of {said['transformers'].abs().max():.1f}")


if __name__ == "__main__":
    main()
