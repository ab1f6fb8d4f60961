"""Scenes of one or two drawings, what their captions say, and which scenes are kept for which purpose.

A scene is plain data (what, where, how large, how turned, on which background), so it is the same on every
machine for the same seed, and its picture is drawn from it on demand. A caption is composed from the geometry
alone, never the other way round, so "a banana left of a car" is true by construction.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from blip2_kernels.checks import check_int

from .concepts import NEVER_TRAINED, TRAINED, with_article

PICTURE_SIZE = 224
"""Side of a picture in pixels (what EfficientNet-Lite0 was trained on)."""

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")

_OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_CENTRES = {
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the middle": (0.5, 0.5),
}


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene. Lengths are fractions of the picture's side, ``y`` grows downwards."""

    noun: str
    x: float
    y: float
    size: float
    degrees: float


@dataclass(frozen=True)
class Background:
    """Two colours and how they meet: ``plain``, ``gradient``, ``stripes`` or ``dots``."""

    kind: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class Scene:
    """One or two things on a background."""

    things: tuple[Thing, ...]
    background: Background

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(thing.noun for thing in self.things)

    @property
    def relation(self) -> str | None:
        """How the first thing lies to the second; None for a scene of one thing."""
        return relation_between(*self.things) if len(self.things) == 2 else None

    @property
    def place(self) -> str | None:
        """Where the only thing lies; None for a scene of two."""
        if len(self.things) == 2:
            return None
        thing = self.things[0]
        return min(PLACES, key=lambda p: (thing.x - _CENTRES[p][0]) ** 2 + (thing.y - _CENTRES[p][1]) ** 2)

    @property
    def key(self) -> str:
        """sha256 of everything that decides the pixels."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()

    def swapped(self) -> Scene:
        """The same picture told from the second thing: "a car right of a banana"."""
        return replace(self, things=self.things[::-1])

    def in_reading_order(self) -> Scene:
        """The same picture told from left to right or from top to bottom: "a banana left of a car"."""
        return self.swapped() if self.relation in ("right of", "below") else self

    def caption(self) -> str:
        """``a banana left of a car`` or ``a banana at the top``."""
        if len(self.things) == 1:
            return f"{with_article(self.nouns[0])} {self.place}"
        return caption_of(*self.nouns, relation=self.relation)


def relation_between(first: Thing, second: Thing) -> str:
    """Which of the four relations the centres show: the axis on which they lie further apart decides."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption_of(first: str, second: str, relation: str) -> str:
    return f"{with_article(first)} {relation} {with_article(second)}"


@dataclass(frozen=True)
class Told:
    """What a caption claims: its nouns in order and the relation or place, None where it names none."""

    nouns: tuple[str, ...]
    where: str | None

    def names_the_things_of(self, scene: Scene) -> bool:
        """True if exactly the scene's things are named, in either order."""
        return sorted(self.nouns) == sorted(scene.nouns)

    def is_true_of(self, scene: Scene) -> bool:
        """True if the things are right and so is the relation (told from either thing) or the place."""
        if not self.names_the_things_of(scene):
            return False
        if len(scene.things) == 1:
            return self.where == scene.place
        told = scene if self.nouns == scene.nouns else scene.swapped()
        return self.where == told.relation


def parse_caption(text: str, nouns: Sequence[str] = tuple(TRAINED)) -> Told:
    """Read back a (generated) caption. Unknown words are skipped, so a rambling caption names whatever it
    names.
    """
    words = text.lower().replace(".", " ").replace(",", " ").split()
    known = set(nouns)
    found = tuple(word for word in words if word in known)
    sentence = " ".join(words)
    spots = [
        (sentence.find(f" {where}"), where) for where in (*RELATIONS, *PLACES) if f" {where}" in sentence
    ]
    return Told(found, min(spots)[1] if spots else None)


# -------------------------------------------------------------------------------------------------- composing


def _background(rng: random.Random) -> Background:
    def light() -> tuple[int, int, int]:
        return (rng.randint(165, 255), rng.randint(165, 255), rng.randint(165, 255))

    return Background(rng.choice(("plain", "plain", "gradient", "stripes", "dots")), (light(), light()))


def compose_pair(first: str, second: str, relation: str, rng: random.Random) -> Scene:
    """A scene in which ``first`` lies in ``relation`` to ``second``, the rest random.

    The centres lie 0.36 to 0.56 of the side apart on the relation's axis and at most half of that apart on
    the other.
    """
    dx, dy = _OFFSETS[relation]
    apart, across = rng.uniform(0.36, 0.56), rng.uniform(-0.5, 0.5)
    across *= apart
    half_x, half_y = (dx * apart + abs(dy) * across) / 2, (dy * apart + abs(dx) * across) / 2
    sizes = [rng.uniform(0.28, 0.4) for _ in range(2)]
    margin = 0.19
    x = rng.uniform(margin + abs(half_x), 1 - margin - abs(half_x))
    y = rng.uniform(margin + abs(half_y), 1 - margin - abs(half_y))
    things = (
        Thing(
            first,
            round(x + half_x, 4),
            round(y + half_y, 4),
            round(sizes[0], 4),
            round(rng.uniform(-25, 25), 2),
        ),
        Thing(
            second,
            round(x - half_x, 4),
            round(y - half_y, 4),
            round(sizes[1], 4),
            round(rng.uniform(-25, 25), 2),
        ),
    )
    return Scene(things, _background(rng))


def compose_single(noun: str, place: str, rng: random.Random) -> Scene:
    """A scene of one thing, on either axis within 0.06 of the centre of ``place``, the rest random."""
    x, y = _CENTRES[place]
    thing = Thing(
        noun,
        round(x + rng.uniform(-0.06, 0.06), 4),
        round(y + rng.uniform(-0.06, 0.06), 4),
        round(rng.uniform(0.32, 0.5), 4),
        round(rng.uniform(-25, 25), 2),
    )
    return Scene((thing,), _background(rng))


# ----------------------------------------------------------------------------------------------------- splits


@dataclass(frozen=True)
class Splits:
    """Scenes by purpose. No pair of nouns of ``validation`` or ``test`` occurs in ``train``, nor in one
    another.

    ``twins`` gives, for each scene of ``train``, the index of its group: scenes of one group show the same
    things in different relations, so they are each other's hardest negatives.
    """

    train: tuple[Scene, ...]
    twins: tuple[int, ...]
    validation: tuple[Scene, ...]
    test: tuple[Scene, ...]
    zero_shot: tuple[Scene, ...]


def make_splits(
    seed: int = 0, *, pairs: int = 1250, relations_a_pair: int = 2, singles: int = 500, held_out: int = 160
) -> Splits:
    """Compose every scene of the demo.

    Args:
        seed: decides everything.
        pairs: pairs of nouns in training.
        relations_a_pair: renders of each training pair, each in another relation (1 to 4).
        singles: training scenes of one thing.
        held_out: scenes in each of validation and test, each of another pair.

    Raises:
        TypeError, ValueError: a number of the wrong kind or value, or more pairs than there are.
    """
    check_int("seed", seed, 0)
    check_int("relations_a_pair", relations_a_pair, 1, 4)
    for name, count in (("pairs", pairs), ("singles", singles), ("held_out", held_out)):
        check_int(name, count, 0)
    nouns = sorted(TRAINED)
    every_pair = list(itertools.combinations(nouns, 2))
    if pairs + 2 * held_out > len(every_pair):
        raise ValueError(
            f"pairs, held_out: expected pairs + 2·held_out <= {len(every_pair)} (the pairs there are), "
            f"got {pairs} + 2·{held_out}"
        )
    rng = random.Random(f"blip2_kernels demo scenes {seed}")
    rng.shuffle(every_pair)
    ordered = [pair if rng.random() < 0.5 else pair[::-1] for pair in every_pair]
    test_pairs, validation_pairs = ordered[:held_out], ordered[held_out : 2 * held_out]
    train_pairs = ordered[2 * held_out : 2 * held_out + pairs]

    train: list[Scene] = []
    twins: list[int] = []
    for group, pair in enumerate(train_pairs):
        for relation in _relations_of_a_group(relations_a_pair, rng):
            train.append(compose_pair(*pair, relation, rng))
            twins.append(group)
    for index, (noun, place) in enumerate(itertools.islice(_singles(nouns, rng), singles)):
        train.append(compose_single(noun, place, rng))
        twins.append(len(train_pairs) + index)

    def held(pairs_of_split: Sequence[tuple[str, str]]) -> tuple[Scene, ...]:
        return tuple(compose_pair(*pair, RELATIONS[i % 4], rng) for i, pair in enumerate(pairs_of_split))

    unseen = tuple(compose_single(noun, rng.choice(PLACES), rng) for noun in sorted(NEVER_TRAINED))
    return Splits(tuple(train), tuple(twins), held(validation_pairs), held(test_pairs), unseen)


def _relations_of_a_group(count: int, rng: random.Random) -> tuple[str, ...]:
    """Distinct relations; mostly a relation and its opposite first, which differ only in which thing is
    where.
    """
    first = rng.choice(RELATIONS)
    others = rng.sample([relation for relation in RELATIONS if relation != first], 3)
    if rng.random() < 0.6:
        others.sort(key=lambda relation: relation != OPPOSITE[first])
    return (first, *others)[:count]


def _singles(nouns: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        for noun in rng.sample(nouns, len(nouns)):
            yield noun, rng.choice(PLACES)
