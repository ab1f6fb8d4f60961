"""Embeddings of pictures and texts in one space, by BLIP-2's two towers of transformers, both fused.

    python examples/embeddings_blip2.py CHECKPOINT PICTURE [PICTURE ...] --texts TEXT [TEXT ...]

CHECKPOINT is a folder or hub name, such as one of BLIP-2's image-text matching checkpoints.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoProcessor, Blip2TextModelWithProjection, Blip2VisionModelWithProjection

import blip2_kernels


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--texts", nargs="+", required=True)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    with blip2_kernels.fused():
        vision = Blip2VisionModelWithProjection.from_pretrained(arguments.checkpoint).to(device).eval()
        text = Blip2TextModelWithProjection.from_pretrained(arguments.checkpoint).to(device).eval()

    pictures = [Image.open(path).convert("RGB") for path in arguments.pictures]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(device)
    words = processor.tokenizer(arguments.texts, return_tensors="pt", padding=True).to(device)
    images = vision(pixels).image_embeds  # [pictures, queries, width]
    texts = text(words["input_ids"], words["attention_mask"]).text_embeds[:, 0]  # of [CLS]
    similarity = (images @ texts.T).amax(dim=1)
    for path, row in zip(arguments.pictures, similarity, strict=True):
        print(
            path, *(f"{text}={value:.3f}" for text, value in zip(arguments.texts, row, strict=True)), sep="\t"
        )


if __name__ == "__main__":
    main()
