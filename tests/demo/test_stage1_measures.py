"""What stage 1 is asked on held-out scenes, against the scores of every picture with every caption."""

import dataclasses

import pytest
import torch

from blip2_kernels.model.base import Blip2Base
from blip2_kernels.model.demo import assets, evaluation
from blip2_kernels.model.demo.scenes import OPPOSITE, RELATIONS, caption_of, make_splits
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.retrieval import Blip2ForImageTextRetrieval

N, BEST = 24, 5


def small_stage1(use_fused: bool) -> Blip2ForPreTraining:
    config = assets.stage1_config(4, image_width=16)
    qformer = config.qformer
    qformer.num_hidden_layers, qformer.hidden_size, qformer.intermediate_size = 2, 24, 48
    qformer.num_attention_heads, qformer.initializer_range = 2, 0.3
    config = dataclasses.replace(config, qformer=qformer, image_text_hidden_size=8)
    return Blip2ForPreTraining(config, use_fused=use_fused).eval()


def recall(places: list[int]) -> dict[str, float]:
    return {f"R@{k}": pytest.approx(sum(place < k for place in places) / N) for k in (1, 5, 10)}


def rank_all(scores):
    """The place of each row's own column."""
    return [sorted(row, reverse=True).index(row[own]) for own, row in enumerate(scores.tolist())]


def rank_best(itc, match):
    """The same by the sum of both scores among the best by ITC; N for who is not one of them."""
    places = []
    for own, row in enumerate(itc):
        best = row.topk(BEST).indices.tolist()
        order = sorted(best, key=lambda column: -(row[column] + match[own, column]))
        places.append(order.index(own) if own in best else N)
    return places


@pytest.mark.parametrize("use_fused", [True, False])
def test_every_figure_is_that_of_the_scores_of_all_pairs(use_fused, monkeypatch):
    scenes = make_splits(0, pairs=4, singles=2, held_out=N).test
    model, tokenizer = small_stage1(use_fused), assets.load_text_tokenizer()
    features = torch.randn(N, 9, 16)
    prepared, prepare = [], Blip2Base.prepare_images

    def counting_prepare(self, image_features, *arguments, **options):
        prepared.append(len(image_features))
        return prepare(self, image_features, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Blip2Base, "prepare_images", counting_prepare)
        found = evaluation.stage1_metrics(model, features, scenes, tokenizer, rerank=BEST)
    # For ranking, for all other captions by ITM, for those by ITC, and for what the queries read.
    assert sum(prepared) == 4 * N

    reader = Blip2ForImageTextRetrieval.from_pretraining(model)

    def ask(captions):
        """Cosines and logits [scenes, captions] and [scenes, captions, 2]."""
        texts = evaluation.Texts.of(captions, tokenizer)
        return reader.itc_scores(*texts, features), reader.itm_logits(*texts, features)

    itc, logits = ask([scene.caption() for scene in scenes])
    match, margin = logits[..., 1], logits[..., 1] - logits[..., 0]
    assert found["retrieval"]["itc"] == {
        "image_to_text": recall(rank_all(itc)),
        "text_to_image": recall(rank_all(itc.T)),
    }
    assert found["retrieval"]["itc_then_itm"] == {
        "image_to_text": recall(rank_best(itc, match)),
        "text_to_image": recall(rank_best(itc.T, match.T)),
    }

    own = torch.arange(N)
    hardest = margin[own, (itc - 9 * torch.eye(N)).argmax(1)]
    swapped, exchanged = (
        ask([change(scene) for scene in scenes])[1].diff(dim=2)[own, own, 0]
        for change in (
            lambda scene: caption_of(*scene.nouns, relation=OPPOSITE[scene.relation]),
            lambda scene: caption_of(*scene.nouns[::-1], relation=scene.relation),
        )
    )
    for name, other in (
        ("against_hardest_caption_of_another_scene", hardest),
        ("against_relation_swapped", swapped),
        ("against_things_exchanged", exchanged),
    ):
        right = int((margin[own, own] > 0).sum() + (other < 0).sum())
        assert found["itm_accuracy"][name] == pytest.approx(right / (2 * N)), name

    truth = torch.tensor([RELATIONS.index(scene.relation) for scene in scenes])
    cosines, logits = ask(evaluation.relation_captions(scenes))
    for name, scores in (("itc", cosines), ("itm", logits[..., 1] - logits[..., 0])):
        four = scores.view(N, N, 4)[own, own]
        assert found["relation_of_four"][name] == pytest.approx(int((four.argmax(1) == truth).sum()) / N)
