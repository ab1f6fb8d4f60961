"""What a training step sees: scenes as features and freshly told captions, and batches in which twins
meet.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .scenes import Scene

Sample = tuple[Tensor, Scene]


class SceneDataset(Dataset):
    """Features [tokens, width] and the scene of each picture.

    Args:
        features: [n, tokens, width], as cached.
        scenes: n scenes.
    """

    def __init__(self, features: Tensor, scenes: Sequence[Scene]) -> None:
        if len(features) != len(scenes):
            raise ValueError(f"features: expected {len(scenes)}, one a scene, got {len(features)}")
        self.features, self.scenes = features, scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        return self.features[index], self.scenes[index]


class TwinBatches:
    """Batches of indices in which scenes of the same two things meet: the contrast has to tell them apart by
    the relation alone, and draws them as hard negatives for matching. They never end: an epoch follows
    another, each in an order of its own.

    Where asked, scenes that share one thing follow one another too ("a lock left of a rose", "a lock left of
    a football"): these are what is confused with one another on held-out scenes.

    Args:
        groups: of each scene, as `Splits.twins`.
        nouns: of each scene, as `Scene.nouns`.
        batch_size: scenes in the batch of a step (counted from 0); what is left of an epoch is dropped.
        seed: decides the orders.
        sharing: whether scenes that share one thing shall meet in the batch of a step. Those batches are cut
            from an order of their own: an epoch with both kinds leaves some scenes out and shows some twice.
    """

    def __init__(
        self,
        groups: Sequence[int],
        nouns: Sequence[tuple[str, ...]],
        batch_size: Callable[[int], int],
        seed: int = 0,
        sharing: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.batch_size, self.seed, self.sharing = batch_size, seed, sharing
        members: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self.groups = list(members.values())
        self.nouns = [nouns[group[0]] for group in self.groups]
        self.total = len(groups)

    def __iter__(self) -> Iterator[list[int]]:
        orders, begin, epochs = self._orders(0), 0, 1
        for step in itertools.count():
            size = self.batch_size(step)
            if not 1 <= size <= self.total:
                raise ValueError(
                    f"batch_size: expected 1 to {self.total} scenes (all of them) at step {step}, got {size}"
                )
            if begin + size > self.total:
                orders, begin, epochs = self._orders(epochs), 0, epochs + 1
            yield orders[self.sharing(step)][begin : begin + size]
            begin += size

    def _orders(self, epoch: int) -> tuple[list[int], list[int]]:
        """All indices in an order in which twins meet, and in one in which scenes that share a thing do."""
        rng = random.Random(f"{self.seed} {epoch}")
        shuffled = rng.sample(range(len(self.groups)), len(self.groups))
        twins, shared = (
            [index for group in groups for index in self.groups[group]]
            for groups in (shuffled, self._walk(shuffled, rng))
        )
        return twins, shared

    def _walk(self, groups: list[int], rng: random.Random) -> list[int]:
        """The groups in an order in which, where possible, each shares a thing with the one before."""
        left = dict.fromkeys(groups)
        of_noun: dict[str, list[int]] = {}
        for group in groups:
            for noun in self.nouns[group]:
                of_noun.setdefault(noun, []).append(group)
        walk: list[int] = []
        while left:
            related = rng.sample(self.nouns[walk[-1]], len(self.nouns[walk[-1]])) if walk else []
            # Each list is used up from its end, so that the whole walk takes linear time.
            for candidates in (of_noun[noun] for noun in related):
                while candidates and candidates[-1] not in left:
                    candidates.pop()
            following = next((of_noun[noun].pop() for noun in related if of_noun[noun]), next(iter(left)))
            del left[following]
            walk.append(following)
        return walk


def tell(scene: Scene, rng: Any = random) -> str:
    """The scene's caption, told from either of its two things."""
    return (scene.swapped() if len(scene.things) == 2 and rng.random() < 0.5 else scene).caption()


class Stage1Collate:
    """Scenes to what `Blip2ForPreTraining.forward` takes.

    Args:
        tokenizer: of the texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        texts = self.tokenizer([tell(scene) for _, scene in samples], padding=True, return_tensors="pt")
        return {
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "image_features": torch.stack([features for features, _ in samples]).float(),
        }


PROMPT = "An image of"
"""What the language model reads behind the soft prompt; never supervised."""


class Stage2Collate:
    """Scenes to what `Blip2ForConditionalGeneration.forward` takes: "An image of a banana left of a car." and
    the end-of-text token, of which the prompt is not supervised.

    Captions are told in reading order. Told from either side, the relation depends on the thing that the
    language model has just named; a frozen one of this size cannot look that up (not even in plain words).

    Args:
        tokenizer: the language model's.
        features: a fixed [1, tokens, width] instead of each scene's own (the prompt-only baseline).
    """

    def __init__(self, tokenizer: Any, features: Tensor | None = None) -> None:
        self.tokenizer, self.features = tokenizer, features
        self.prompt_ids: list[int] = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]

    def texts(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """Token ids int64 [n, T], their mask and the lengths of the prompts."""
        end = self.tokenizer.eos_token_id
        captions = [scene.in_reading_order().caption() for scene in scenes]
        told = self.tokenizer([f"{PROMPT} {caption}." for caption in captions], add_special_tokens=False)
        rows = [[*row, end] for row in told["input_ids"]]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [end] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "prompt_lengths": torch.full((len(rows),), len(self.prompt_ids)),
        }

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        features = torch.stack([features for features, _ in samples]).float()
        if self.features is not None:
            features = self.features.float().expand(len(samples), -1, -1)
        return {**self.texts([scene for _, scene in samples]), "image_features": features}
