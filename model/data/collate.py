"""Lists of samples → the arguments of a model, for both stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2_kernels.checks import check_bool, check_int, check_tensor, describe

PICTURES = ("pixel_values", "image_features")


def _pictures(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The stacked `pixel_values` or `image_features` of the samples, which have captions too."""
    if not isinstance(samples, Sequence) or not all(isinstance(sample, Mapping) for sample in samples):
        raise TypeError(f"samples: expected a list of mappings, got {describe(samples)}")
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    names = [name for name in PICTURES if name in samples[0]]
    if len(names) != 1:
        raise ValueError(f"samples: expected one of {PICTURES}, got {sorted(samples[0])}")
    name = names[0]
    pictures: list[Tensor] = []
    for number, sample in enumerate(samples):
        first = pictures[0] if pictures else sample.get(name)
        shape = first.shape if isinstance(first, Tensor) else ["..."]
        pictures.append(check_tensor(f"samples[{number}][{name!r}]", sample.get(name), shape))
        if not isinstance(sample.get("caption"), str):
            got = describe(sample.get("caption"))
            raise TypeError(f"samples[{number}]['caption']: expected a str, got {got}")
    return {name: torch.stack(pictures)}


def _check_tokenizer(tokenizer: Any, needed: str, words: str) -> None:
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected one of transformers, got {describe(tokenizer)}")
    if getattr(tokenizer, needed, None) is None:
        raise ValueError(f"tokenizer: expected one with {words} token, got none")


def _pad(rows: Sequence[Sequence[int]], filler: int, length: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and 0/1 mask, [rows, longest row or `length`]."""
    width = max([*map(len, rows), length or 1])
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, : len(tokens)] = 1
    return ids, mask


class CaptionCollator:
    """Samples of :class:`ImageTextDataset` → arguments of `Blip2ForPreTraining`.

    Args:
        tokenizer: a BERT-like tokenizer: texts become [CLS] … [SEP].
        max_text_length: tokens a text at most, at least 2 ([CLS] and [SEP]); longer ones are cut before
            [SEP].
        padding: `"longest"` of the batch, or `"max_length"` for static shapes.
        extras: also returns `lengths` (list of int: tokens of each text, on the host), `captions` and
            `indices`, which the model does not take.

    Returns (when called): `input_ids` and `attention_mask` int64 [B, T], `image_ids` int64 [B], and
    `pixel_values` or `image_features` stacked.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a length below 2, another word for padding;
            samples without pictures of one shape or without a caption, a text without a single token of its
            own.
    """

    def __init__(
        self, tokenizer: Any, max_text_length: int = 32, *, padding: str = "longest", extras: bool = False
    ) -> None:
        check_int("max_text_length", max_text_length, 2)
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding: expected 'longest' or 'max_length', got {padding!r}")
        _check_tokenizer(tokenizer, "pad_token_id", "a padding")
        check_bool("extras", extras)
        self.tokenizer, self.max_text_length = tokenizer, max_text_length
        self.padding, self.extras = padding, extras

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = _pictures(samples)
        captions = [sample["caption"] for sample in samples]
        rows = self.tokenizer(captions, truncation=True, max_length=self.max_text_length)["input_ids"]
        for caption, row in zip(captions, rows, strict=True):
            if not caption.strip():
                raise ValueError(f"caption: expected a text, got {caption!r}")
            if not row:
                raise ValueError(f"caption: expected a text that has tokens, got {caption!r}")
        fixed = self.max_text_length if self.padding == "max_length" else None
        batch["input_ids"], batch["attention_mask"] = _pad(rows, self.tokenizer.pad_token_id, fixed)
        batch["image_ids"] = torch.tensor([sample["image_id"] for sample in samples])
        if self.extras:
            batch["lengths"] = [len(row) for row in rows]
            batch["captions"] = captions
            batch["indices"] = [sample["index"] for sample in samples]
        return batch


class GenerationCollator:
    """Samples of :class:`ImageTextDataset` → arguments of `Blip2ForConditionalGeneration`, prompt and caption
    in one.

    The prompt is not supervised, the caption and the end-of-sequence token are. The prompt is tokenized on
    its own, so that it is the same tokens in training and in generation.

    Args:
        tokenizer: the language model's.
        prompt: comes before every caption; may be empty.
        max_text_length: tokens of the caption at most, the end included.
        encoder_decoder: the prompt goes to an encoder, and keeps the end that the tokenizer puts behind it.
        extras: as for :class:`CaptionCollator`; `lengths` counts prompt and caption.

    Returns (when called): `input_ids`, `attention_mask` int64 [B, T] padded on the right, `prompt_lengths`
    int64 [B], and `pixel_values` or `image_features` stacked.

    Raises:
        TypeError, ValueError: as :class:`CaptionCollator`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt: str = "a photo of",
        max_text_length: int = 32,
        encoder_decoder: bool = False,
        extras: bool = False,
    ) -> None:
        check_int("max_text_length", max_text_length, 2)
        _check_tokenizer(tokenizer, "eos_token_id", "an end-of-sequence")
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a str, got {describe(prompt)}")
        check_bool("encoder_decoder", encoder_decoder)
        check_bool("extras", extras)
        self.tokenizer, self.prompt = tokenizer, prompt.strip()
        self.max_text_length, self.extras = max_text_length, extras
        self.filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.prompt_row = self._prompt_tokens(encoder_decoder)

    def _prompt_tokens(self, keep_end: bool) -> list[int]:
        """Prompt with what the tokenizer puts in front of a text (BOS), mostly without what it puts behind
        (EOS).
        """
        row = list(self.tokenizer(self.prompt)["input_ids"])
        end, start = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        while row and not keep_end and row[-1] == end and not (len(row) == 1 and end == start):
            row.pop()
        return row

    def prompt_ids(self, batch_size: int) -> Tensor:
        """`input_ids` int64 [batch_size, tokens of the prompt] for `generate`."""
        check_int("batch_size", batch_size, 1)
        return torch.tensor([self.prompt_row] * batch_size, dtype=torch.int64).reshape(batch_size, -1)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = _pictures(samples)
        captions = [sample["caption"] for sample in samples]
        rows = []
        for caption in captions:
            text = f" {caption.strip()}" if self.prompt else caption.strip()
            own = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if not own:
                raise ValueError(f"caption: expected a text that has tokens, got {caption!r}")
            rows.append([*self.prompt_row, *own[: self.max_text_length - 1], self.tokenizer.eos_token_id])
        batch["input_ids"], batch["attention_mask"] = _pad(rows, self.filler, None)
        batch["prompt_lengths"] = torch.full((len(rows),), len(self.prompt_row))
        if self.extras:
            batch["lengths"] = [len(row) for row in rows]
            batch["captions"] = captions
            batch["indices"] = [sample["index"] for sample in samples]
        return batch
