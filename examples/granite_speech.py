"""The projector of Granite Speech, a Q-Former on many small windows, as it was and fused.

    python examples/granite_speech.py [CHECKPOINT] [--seconds 30]

CHECKPOINT is a folder or hub name of a Granite Speech model; without one, a random projector of its shape.
Audio features are random: what is shown is that both say the same, and how long each takes.
"""

import argparse
import time

import torch
from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

import blip2_kernels

FEATURES_A_SECOND = 50


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--seconds", type=float, default=30.0, help="of speech")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.checkpoint is None:
        projector = GraniteSpeechEncoderProjector(GraniteSpeechConfig())
    else:
        projector = GraniteSpeechForConditionalGeneration.from_pretrained(arguments.checkpoint).projector
    projector = projector.to(device).eval()
    width = projector.qformer.config.encoder_hidden_size
    features = torch.randn(1, int(arguments.seconds * FEATURES_A_SECOND), width, device=device)

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
