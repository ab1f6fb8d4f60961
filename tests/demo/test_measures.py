"""The figures the report is made of, against brute force; the reports and pictures, read back."""

import json
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from blip2_kernels.model.demo import evaluation, figures, report
from blip2_kernels.model.demo.scenes import OPPOSITE, RELATIONS, caption_of, compose_pair, make_splits


def test_recall_against_sorting():
    scores = torch.randn(30, 30)
    ours = evaluation.retrieval(scores)
    for direction, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        for k in (1, 5, 10):
            hits = 0
            for row in range(30):
                best = sorted(range(30), key=lambda column: -table[row, column].item())[:k]
                hits += row in best
            assert ours[direction][f"R@{k}"] == pytest.approx(hits / 30)
    assert ours["image_to_text"] != ours["text_to_image"]


def test_a_constant_score_earns_nothing_and_nan_is_refused():
    nothing = {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}
    constant = torch.zeros(20, 20)
    assert evaluation.retrieval(constant) == {"image_to_text": nothing, "text_to_image": nothing}
    assert evaluation.balanced_accuracy(torch.zeros(5, 2), torch.zeros(5, 2)) == 0
    chance = evaluation.chance_retrieval(20)["text_to_image"]
    assert chance == pytest.approx({"R@1": 0.05, "R@5": 0.25, "R@10": 0.5})
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN in 20 rows"):
        evaluation.retrieval(constant / 0)


def test_texts_may_rank_images_by_scores_of_their_own():
    by_image, by_text = torch.eye(12), -torch.eye(12)
    assert evaluation.retrieval(by_image, by_text) == {
        "image_to_text": {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0},
        "text_to_image": {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0},
    }


def test_relation_captions_hold_the_truth_once():
    scenes = make_splits(0, pairs=10, singles=5, held_out=12).test
    captions = evaluation.relation_captions(scenes)
    labels = evaluation.relation_labels(scenes).tolist()
    for i, scene in enumerate(scenes):
        four = captions[4 * i : 4 * i + 4]
        assert len(set(four)) == 4
        assert [caption == scene.caption() for caption in four].index(True) == labels[i]


def test_verdicts_count_half_on_each_side():
    def logits(margins):
        return torch.tensor([[5.0, 5.0 + margin] for margin in margins])

    right, wrong = logits([1.0, -1.0, 2.0]), logits([-1.0, 0.5, -3.0])
    assert evaluation.balanced_accuracy(right, wrong) == pytest.approx(4 / 6)
    assert evaluation.balanced_accuracy(logits([1.0] * 5), logits([1.0] * 5)) == 0.5


@pytest.mark.parametrize(("common", "own", "spread"), [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.5)])
def test_query_spread_is_the_share_within_pictures(common, own, spread):
    """What differs from picture to picture alike in all queries, and what each query has for itself."""
    shared, single = torch.randn(600, 1, 8), torch.randn(600, 4, 8)
    single -= single.mean(1, keepdim=True)
    single *= (4 / 3) ** 0.5  # the mean over the queries took a quarter of the variance
    hidden = 5.0 + common * shared + own * single
    assert evaluation.query_spread(hidden).item() == pytest.approx(spread, abs=0.03)


def test_query_distance_sees_groups_of_like_queries():
    """Two groups differ from one another as much as two queries can; no query differs from its neighbour."""
    two = torch.randn(50, 2, 400)
    groups = 5.0 + two[:, [0, 0, 1, 1]]
    assert evaluation.query_spread(groups) > 0.45 and evaluation.query_distance(groups) == 0
    assert evaluation.query_distance(5.0 + two).item() == pytest.approx(1.0, abs=0.05)
    assert evaluation.query_distance(groups + torch.randn(50, 4, 400)).item() == pytest.approx(0.5, abs=0.05)


def test_query_hidden_is_what_all_pictures_give():
    class Model:
        def encode_image(self, image_features):
            assert len(image_features) <= 7
            return image_features[:, :3] * 2

    features = torch.randn(20, 5, 4)
    assert torch.equal(evaluation.query_hidden(Model(), features, batch_size=7), features[:, :3] * 2)


def test_hardest_other_is_never_the_own_text():
    scores = torch.tensor([[9.0, 1.0, 2.0], [0.0, 5.0, -1.0], [3.0, 4.0, 3.0]])
    assert evaluation.hardest_other(scores).tolist() == [2, 0, 1]


def test_caption_shares_count_what_they_say():
    rng = random.Random(0)
    scenes = [compose_pair("dog", "cat", relation, rng) for relation in RELATIONS]
    right = [scene.caption() for scene in scenes]
    turned = [scene.swapped().caption() for scene in scenes]
    wrong = [caption_of("dog", "cat", OPPOSITE[str(scene.relation)]) for scene in scenes]
    assert evaluation.caption_shares(right, scenes) == {"concepts_right": 1.0, "relation_right": 1.0}
    assert evaluation.caption_shares(turned, scenes) == {"concepts_right": 1.0, "relation_right": 1.0}
    assert evaluation.caption_shares(wrong, scenes) == {"concepts_right": 1.0, "relation_right": 0.0}
    mixed = [right[0], "a dog above a car", wrong[2], ""]
    assert evaluation.caption_shares(mixed, scenes) == {"concepts_right": 0.5, "relation_right": 0.25}


@pytest.mark.parametrize("n", [2, 3, 7, 160])
def test_shuffling_leaves_no_image_in_place(n):
    order = evaluation.shuffled(n)
    assert sorted(order.tolist()) == list(range(n))
    assert (order != torch.arange(n)).all()


def test_a_report_that_the_disk_refuses_leaves_the_one_before(tmp_path, monkeypatch):
    path = report.write_text(tmp_path / "metrics.json", "before")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        report.write_text(path, "after")
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_captions_md_marks_right_and_wrong(tmp_path):
    rng = random.Random(1)
    scenes = [compose_pair("dog", "cat", "above", rng) for _ in range(3)]
    generated = ["a dog above a cat", "a cat above a dog", "a car | above a tree"]
    path = report.write_captions(
        scenes, generated, generated[::-1], ["pictures/00.png"], tmp_path / "c.md", 1
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [report.mark(c, s) for c, s in zip(generated, scenes, strict=True)] == ["✓", "◐", "✗"]
    assert any("pictures/00.png" in line and "✓" in line and "a dog above a cat" in line for line in lines)
    assert any("a car \\| above a tree" in line and "✗" in line for line in lines)
    assert "CC BY-SA 4.0" in lines[-1]
    assert [*tmp_path.iterdir()] == [path]


def test_metrics_json_is_rounded_and_whole(tmp_path):
    path = report.write_metrics({"a": {"b": 0.123456789, "n": 160}, "c": [1.0, 2]}, tmp_path / "m.json")
    assert json.loads(path.read_text()) == {"a": {"b": 0.1235, "n": 160}, "c": [1.0, 2]}


def test_smoothing_against_a_loop():
    values = np.random.default_rng(0).normal(size=23)
    smoothed = figures.smooth(values, 5)
    for i in range(23):
        assert smoothed[i] == pytest.approx(values[max(0, i - 2) : i + 3].mean())


def test_the_step_at_which_matching_joins_is_read_from_the_losses():
    rows = [{"step": i, "loss": 5.0, "loss_itc": 2.0, "loss_itg": 3.0} for i in range(1, 8)]
    rows[3]["loss_itm"] = rows[5]["loss_itm"] = 0.6
    assert figures.start_of_matching(rows) == 4
    assert figures.start_of_matching(rows[:3]) is None


def test_spread_out_takes_different_rows():
    rows = torch.tensor([[1.0, 0, 0], [0.99, 0.01, 0], [0, 1, 0], [0, 0.9, 0.1], [0, 0, 1]])
    assert figures.spread_out(rows, 3) == [0, 2, 4]


def test_figures_are_legible_pictures(tmp_path):
    scenes = make_splits(0, pairs=10, singles=5, held_out=6).test
    rows = [{"step": i + 1, "loss_itc": 3 - i / 50, "loss_itm": 0.6, "loss": 2.0} for i in range(40)]
    paths = [
        figures.draw_curves(rows, rows, rows[:20], tmp_path / "curves.png"),
        figures.draw_retrieval(torch.eye(6), scenes, tmp_path / "retrieval.png"),
        figures.draw_attention(torch.rand(2, 9, 49).softmax(-1), scenes[:2], tmp_path / "attention.png"),
    ]
    for path in paths:
        assert path.stat().st_size < 400_000
        with Image.open(path) as picture:
            assert picture.width > 600
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == 255).all(-1).mean() > 0.1 and pixels.std() > 10  # neither empty nor full
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attention.png", "curves.png", "retrieval.png"]


@pytest.mark.parametrize("part", ["matplotlib", "pillow"])
def test_a_figure_that_fails_leaves_the_one_before_and_no_trace(tmp_path, monkeypatch, part):
    from matplotlib import pyplot

    pyplot.close("all")
    rows = [{"step": i + 1, "loss_itc": 3 - i / 50, "loss": 2.0} for i in range(40)]
    path = figures.draw_curves(rows, rows, rows, tmp_path / "curves.png")
    before = path.read_bytes()
    saver, name = (pyplot.Figure, "savefig") if part == "matplotlib" else (Image.Image, "save")
    save = getattr(saver, name)

    def cut_short(*arguments, **options):
        save(*arguments, **options)
        raise OSError("no space left")

    monkeypatch.setattr(saver, name, cut_short)
    with pytest.raises(OSError, match="no space left"):
        figures.draw_curves(rows[:9], rows, rows, path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    assert not pyplot.get_fignums()


def test_retrieval_marks_the_true_picture(tmp_path):
    """The green frame follows the scores: first column for a perfect table, elsewhere for a rotated one."""
    scenes = make_splits(0, pairs=10, singles=5, held_out=4).test
    green = np.array([0x1F, 0x9D, 0x6B])

    def frame_column(scores):
        path = figures.draw_retrieval(scores, scenes, tmp_path / "r.png", rows=1, columns=4)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        at = np.nonzero((np.abs(pixels - green).max(-1) < 12).sum(0) > 20)[0]
        return at.mean() / pixels.shape[1]

    first = frame_column(torch.eye(4))
    last = frame_column(-torch.eye(4))
    assert first < 0.5 < last
