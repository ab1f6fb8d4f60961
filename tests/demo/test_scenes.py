"""Scenes: the same on every machine, truthfully told, and really held out."""

import itertools
import random
from itertools import pairwise

import pytest

from blip2_kernels.model.demo.batches import TwinBatches, tell
from blip2_kernels.model.demo.concepts import NEVER_TRAINED, TRAINED, with_article
from blip2_kernels.model.demo.scenes import (
    OPPOSITE,
    PLACES,
    RELATIONS,
    Scene,
    compose_pair,
    compose_single,
    make_splits,
    parse_caption,
    relation_between,
)


@pytest.fixture(scope="module")
def splits():
    return make_splits(3)


def pairs_of(scenes):
    return {frozenset(scene.nouns) for scene in scenes if len(scene.things) == 2}


def test_the_seed_decides_everything(splits):
    again, other = make_splits(3), make_splits(4)
    assert again == splits
    assert other.test != splits.test
    # Pinned: a scene that changes changes every cached feature and every reported figure.
    assert splits.train[0].nouns == again.train[0].nouns
    assert splits.train[0].key == again.train[0].key != other.train[0].key


def test_held_out_pairs_never_meet_in_training(splits):
    train, validation, test = pairs_of(splits.train), pairs_of(splits.validation), pairs_of(splits.test)
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert len(test) == len(splits.test) == len(validation) == 160
    assert len(splits.train) == 2 * 1250 + 500


def test_pictures_are_never_repeated(splits):
    keys = [s.key for part in (splits.train, splits.validation, splits.test, splits.zero_shot) for s in part]
    assert len(set(keys)) == len(keys)


def test_things_of_the_zero_shot_row_are_in_no_training_scene(splits):
    trained = {noun for scene in splits.train for noun in scene.nouns}
    assert not trained & {noun for scene in splits.zero_shot for noun in scene.nouns}
    assert not set(TRAINED) & set(NEVER_TRAINED)
    held = {noun for scene in (*splits.test, *splits.validation) for noun in scene.nouns}
    assert held <= trained  # else retrieval would be asked about things it was never shown


def test_twins_show_the_same_things_in_other_relations(splits):
    members = {}
    for scene, group in zip(splits.train, splits.twins, strict=True):
        members.setdefault(group, []).append(scene)
    doubles = [scenes for scenes in members.values() if len(scenes) > 1]
    assert len(doubles) == 1250
    opposite = 0
    for first, second in doubles:
        assert first.nouns == second.nouns
        assert first.relation != second.relation
        opposite += first.relation == OPPOSITE[second.relation]
    assert 0.6 < opposite / len(doubles) < 0.9


def test_relations_are_balanced_on_the_test_scenes(splits):
    counts = {relation: sum(s.relation == relation for s in splits.test) for relation in RELATIONS}
    assert set(counts.values()) == {40}


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_composed_pair_lies_as_asked(relation):
    rng = random.Random(7)
    for _ in range(300):
        scene = compose_pair("banana", "car", relation, rng)
        first, second = scene.things
        # Independent of relation_between: read off the coordinates, which grow to the right and downwards.
        ahead = {
            "left of": second.x - first.x,
            "right of": first.x - second.x,
            "above": second.y - first.y,
            "below": first.y - second.y,
        }
        assert max(ahead, key=ahead.get) == relation
        assert 0.3598 <= ahead[relation] <= 0.5602  # of the side; coordinates are rounded
        assert scene.caption() == f"a banana {relation} a car"
        assert scene.swapped().caption() == f"a car {OPPOSITE[relation]} a banana"
        read = scene.in_reading_order()
        assert (read.relation, set(read.things)) == (
            "left of" if relation in ("left of", "right of") else "above",
            set(scene.things),
        )
        assert read.in_reading_order() == scene.swapped().in_reading_order() == read
        for thing in scene.things:
            assert 0 < thing.x < 1 and 0 < thing.y < 1


CENTRES = dict(zip(PLACES, [(0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75), (0.5, 0.5)], strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_a_composed_single_lies_where_its_caption_says(place):
    rng = random.Random(8)
    for _ in range(100):
        scene = compose_single("elephant", place, rng)
        assert scene.caption() == f"an elephant {place}"
        assert scene.relation is None
        (thing,), (x, y) = scene.things, CENTRES[place]
        assert max(abs(thing.x - x), abs(thing.y - y)) <= 0.0601


def test_captions_are_told_from_either_thing_and_always_true():
    rng = random.Random(9)
    scene = compose_pair("owl", "gift", "above", rng)
    told = {tell(scene, rng) for _ in range(50)}
    assert told == {"an owl above a gift", "a gift below an owl"}
    assert all(parse_caption(caption).is_true_of(scene) for caption in told)


def test_reading_captions_back():
    rng = random.Random(10)
    for (first, second), relation in itertools.product(
        [("dog", "cat"), ("apple", "scissors"), ("owl", "egg")], RELATIONS
    ):
        scene = compose_pair(first, second, relation, rng)
        told = parse_caption(scene.caption() + ".")
        assert told.nouns == (first, second) and told.where == relation
        wrong = parse_caption(f"{with_article(first)} {OPPOSITE[relation]} {with_article(second)}")
        assert wrong.names_the_things_of(scene) and not wrong.is_true_of(scene)
        turned = parse_caption(f"{with_article(second)} {OPPOSITE[relation]} {with_article(first)}")
        assert turned.is_true_of(scene)
    scene = compose_pair("dog", "cat", "left of", rng)
    assert not parse_caption("a dog left of a dog").names_the_things_of(scene)
    assert not parse_caption("a dog left of a cat and a car").names_the_things_of(scene)
    assert not parse_caption("a dog and a cat").is_true_of(scene)
    assert not parse_caption("").names_the_things_of(scene)
    single = compose_single("dog", "at the top", rng)
    assert parse_caption("a dog at the top.").is_true_of(single)
    assert not parse_caption("a dog on the left").is_true_of(single)


def test_diagonals_go_to_the_longer_axis():
    rng = random.Random(11)
    scene = compose_pair("dog", "cat", "left of", rng)
    first, second = scene.things
    moved = Scene(
        (
            type(first)("dog", 0.5, 0.2, 0.3, 0.0),
            type(second)("cat", 0.6, 0.7, 0.3, 0.0),
        ),
        scene.background,
    )
    assert moved.relation == relation_between(*moved.things) == "above"


def test_refusals():
    wrong = {"pairs": -1, "held_out": -1, "singles": -3, "seed": -1, "relations_a_pair": 5}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected an int .*, got {value}"):
            make_splits(**{name: value})
        with pytest.raises(TypeError, match=rf"^{name}: expected an int .*, got str 'x'"):
            make_splits(**{name: "x"})
    with pytest.raises(ValueError, match=r"expected pairs \+ 2·held_out <= 4950"):
        make_splits(0, pairs=4900)
    for size in (0, 4):
        batches = TwinBatches([0, 0, 1], [("cat",), ("cat",), ("dog",)], lambda step, size=size: size)
        with pytest.raises(ValueError, match=f"batch_size: expected 1 to 3 .* at step 0, got {size}"):
            next(iter(batches))


def test_twins_meet_in_batches_and_epochs_differ(splits):
    batches = TwinBatches(splits.twins, [scene.nouns for scene in splits.train], lambda step: 64, seed=5)
    each = 3000 // 64
    some = list(itertools.islice(batches, 2 * each))
    epoch, following = some[:each], some[each:]
    for part in (epoch, following):
        seen = [index for batch in part for index in batch]
        assert len(set(seen)) == len(seen) == 64 * each
    split_up = 0
    for batch in epoch:
        groups = [splits.twins[index] for index in batch]
        split_up += sum(groups.count(g) == 1 and splits.twins.count(g) == 2 for g in groups)
    assert split_up <= 2 * len(epoch)  # only a group at the edge of a batch is cut in two
    assert list(itertools.islice(batches, 2 * each)) == some
    assert following != epoch


def test_scenes_that_share_a_thing_meet_in_the_batches_for_which_that_is_asked(splits):
    told = [scene.nouns for scene in splits.train]
    nouns, asked = [set(names) for names in told], []

    def sharing(step):
        asked.append(step)
        return step % 2 == 0

    batches = TwinBatches(splits.twins, told, lambda step: 64, seed=5, sharing=sharing)
    before, two_epochs = TwinBatches(splits.twins, told, lambda step: 64, seed=5), 2 * (3000 // 64)
    for step, batch, usual in zip(range(two_epochs), batches, before, strict=False):
        assert len(set(batch)) == 64
        assert (batch == usual) == bool(step % 2)
        changes = [(a, b) for a, b in pairwise(batch) if splits.twins[a] != splits.twins[b]]
        share = sum(bool(nouns[a] & nouns[b]) for a, b in changes) / len(changes)
        assert share < 0.2 if step % 2 else share > 0.7
    assert asked == list(range(two_epochs))


def test_batches_may_change_their_size_within_an_epoch(splits):
    told = [scene.nouns for scene in splits.train]
    whole = iter(TwinBatches(splits.twins, told, lambda step: 3000, seed=5))
    epoch, following = next(whole), next(whole)
    sizes = [64, 1000, 1000, 800, 1, 135]
    batches = iter(TwinBatches(splits.twins, told, lambda step: ([*sizes, 64] * 2)[step], seed=5))
    assert [index for _ in sizes for index in next(batches)] == epoch
    assert next(batches) == following[:64]
