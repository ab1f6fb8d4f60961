"""Caption pictures with a BLIP-2 of transformers, its Q-Former fused.

    python examples/captions_blip2.py CHECKPOINT PICTURE [PICTURE ...]

CHECKPOINT is a folder or hub name that `Blip2ForConditionalGeneration.from_pretrained` takes.
"""

import argparse

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

import blip2_kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--beams", type=int, default=5)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = Blip2Processor.from_pretrained(arguments.checkpoint)
    model = Blip2ForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=dtype).to(device)
    blip2_kernels.fuse(model)

    pictures = [Image.open(path).convert("RGB") for path in arguments.pictures]
    given = processor(images=pictures, return_tensors="pt").to(device, dtype)
    tokens = model.generate(**given, num_beams=arguments.beams, max_new_tokens=30)
    for path, caption in zip(
        arguments.pictures, processor.batch_decode(tokens, skip_special_tokens=True), strict=True
    ):
        print(f"{path}: {caption.strip()}")


if __name__ == "__main__":
    main()
