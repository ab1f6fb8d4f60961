"""Ask an InstructBLIP of transformers about a picture, its Q-Former fused.

    python examples/instructblip.py CHECKPOINT PICTURE QUESTION

CHECKPOINT is a folder or hub name that `InstructBlipForConditionalGeneration.from_pretrained` takes.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

import blip2_kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("question")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    model = InstructBlipForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=dtype).to(device)
    blip2_kernels.fuse(model)

    picture = Image.open(arguments.picture).convert("RGB")
    given = processor(images=picture, text=arguments.question, return_tensors="pt").to(device, dtype)
    tokens = model.generate(**given, num_beams=5, max_new_tokens=50)
    print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())


if __name__ == "__main__":
    main()
