"""Fine-tune the Q-Former and projection of transformers' BLIP-2 on captions, with transformers' `Trainer`.

    python examples/finetune_blip2.py CHECKPOINT CAPTIONS --output FOLDER [--layers]

CAPTIONS is a file with a line {"image": "path", "caption": "text"} a picture; paths are relative to it.
Image encoder and language model stay as they are. FOLDER gets an ordinary transformers checkpoint.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor, Trainer, TrainingArguments

import blip2_kernels


class Collate:
    """Lines of the file to what the model takes; image tokens and padding are not supervised."""

    def __init__(self, processor: Blip2Processor, folder: Path, unsupervised: set[int]) -> None:
        self.processor, self.folder, self.unsupervised = processor, folder, unsupervised

    def __call__(self, lines: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        pictures = [Image.open(self.folder / line["image"]).convert("RGB") for line in lines]
        captions = [line["caption"] + self.processor.tokenizer.eos_token for line in lines]
        batch: dict[str, Any] = self.processor(pictures, captions, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for token in self.unsupervised:
            labels = labels.masked_fill(labels == token, -100)
        return {**batch, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("captions", type=Path)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument(
        "--layers", action="store_true", help="keep every layer a module of its own (patch instead of fuse)"
    )
    arguments = parser.parse_args()

    lines = [json.loads(line) for line in arguments.captions.read_text().splitlines() if line.strip()]
    processor = Blip2Processor.from_pretrained(arguments.checkpoint)
    model = Blip2ForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    (blip2_kernels.patch if arguments.layers else blip2_kernels.fuse)(model)

    options = TrainingArguments(
        arguments.output,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=min(100, arguments.steps // 10),
        weight_decay=0.05,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        remove_unused_columns=False,
        report_to=[],
    )
    collate = Collate(processor, arguments.captions.parent, {model.config.image_token_index})
    trainer = Trainer(model, options, train_dataset=lines, data_collator=collate)
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(arguments.output)
    print(f"{arguments.output}: {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
