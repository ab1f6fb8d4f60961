"""Ask an InstructBLIP-Video of transformers about a video, given as pictures, its Q-Former fused.

    python examples/instructblip_video.py CHECKPOINT QUESTION FRAME [FRAME ...]

CHECKPOINT is a folder or hub name of an InstructBLIP, whose weights the video model takes. The processor is
that of the model for pictures, which needs no torchvision.
"""

import argparse

import torch
from PIL import Image
from transformers import AutoProcessor, InstructBlipVideoForConditionalGeneration

import blip2_kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("question")
    parser.add_argument("frames", nargs="+")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    load = InstructBlipVideoForConditionalGeneration.from_pretrained
    model = blip2_kernels.fuse(load(arguments.checkpoint, dtype=dtype).to(device))

    frames = [Image.open(path).convert("RGB") for path in arguments.frames]
    given = processor(text=arguments.question, return_tensors="pt").to(device)
    pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"].to(device, dtype)
    # In front of the question stands a token for each query of each frame.
    count = len(frames) * model.config.num_query_tokens
    words = processor.tokenizer(arguments.question, return_tensors="pt").to(device)["input_ids"]
    input_ids = torch.cat([words.new_full((1, count), model.config.video_token_index), words], dim=1)
    tokens = model.generate(
        pixel_values=pixels[None],
        qformer_input_ids=given["qformer_input_ids"],
        qformer_attention_mask=given["qformer_attention_mask"],
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        num_beams=5,
        max_new_tokens=50,
    )
    print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())


if __name__ == "__main__":
    main()
