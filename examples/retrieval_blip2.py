"""Which of some texts fits a picture: a `Blip2ForImageTextRetrieval` of transformers, its Q-Former fused.

    python examples/retrieval_blip2.py CHECKPOINT PICTURE TEXT [TEXT ...]

CHECKPOINT is a folder or hub name, such as one of BLIP-2's image-text matching checkpoints. Matching one
picture with many texts works because the model is fused: the picture is read once, for all texts together.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoProcessor, Blip2ForImageTextRetrieval

import blip2_kernels


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("picture")
    parser.add_argument("texts", nargs="+")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    model = Blip2ForImageTextRetrieval.from_pretrained(arguments.checkpoint).to(device).eval()
    blip2_kernels.fuse(model)

    picture = Image.open(arguments.picture).convert("RGB")
    given = processor(images=picture, text=arguments.texts, return_tensors="pt", padding=True).to(device)
    contrast = model(**given).logits_per_image[0]
    match = model(**given, use_image_text_matching_head=True).logits_per_image.softmax(dim=1)[:, 1]
    for text, similarity, probability in zip(arguments.texts, contrast, match, strict=True):
        print(f"{text}: similarity {similarity:.3f}, matches with probability {probability:.3f}")


if __name__ == "__main__":
    main()
