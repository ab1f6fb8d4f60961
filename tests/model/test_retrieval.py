"""Retrieval: against transformers' Blip2ForImageTextRetrieval, against pairs scored one by one, and LAVIS's
re-ranking."""

import copy

import pytest
import torch
from qformer_cases import IMAGE_WIDTH, SIZES, VOCABULARY, blip2_config, randomise
from torch import nn
from transformers import Blip2Config, Blip2VisionConfig, OPTConfig
from transformers import Blip2ForImageTextRetrieval as TransformersRetrieval

from blip2_kernels.encoder import FusedEncoder
from blip2_kernels.model.base import Blip2Base
from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.retrieval import NOT_SCORED, Blip2ForImageTextRetrieval

QUERIES, EMBED = 5, 8
BOTH_PATHS = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])


def config() -> Blip2PreTrainingConfig:
    return Blip2PreTrainingConfig(
        qformer=blip2_config(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=EMBED,
        cls_token_id=1,
        sep_token_id=2,
    )


def build(use_fused: bool = False, **options) -> Blip2ForImageTextRetrieval:
    return randomise(Blip2ForImageTextRetrieval(config(), use_fused=use_fused, **options)).eval()


def inputs(images: int, texts: int, tokens: int = 6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (texts, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for text in range(texts):
        mask[text, tokens - text % 4 :] = 0 if text % 4 else 1
    features = torch.randn(images, 9, IMAGE_WIDTH, generator=generator)
    image_mask = torch.ones(images, 9, dtype=torch.long)
    image_mask[-1, 6:] = 0
    return ids, mask, features, image_mask


def count_prepared(monkeypatch) -> list[int]:
    """Grows by the number of images of each call of `prepare_images`."""
    prepared, prepare = [], Blip2Base.prepare_images

    def counting_prepare(self, *args, **kwargs):
        images = prepare(self, *args, **kwargs)
        prepared.append(len(images))
        return images

    monkeypatch.setattr(Blip2Base, "prepare_images", counting_prepare)
    return prepared


class TestAgainstTransformers:
    @pytest.fixture(scope="class")
    @classmethod
    def theirs(cls) -> TransformersRetrieval:
        vision = Blip2VisionConfig(
            hidden_size=IMAGE_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            layer_norm_eps=1e-5,
        )
        text = OPTConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            ffn_dim=8,
            num_attention_heads=1,
            word_embed_proj_dim=8,
        )
        blip2 = Blip2Config(
            vision_config=vision.to_dict(),
            qformer_config={**SIZES, "use_qformer_text_input": True},
            text_config=text.to_dict(),
            num_query_tokens=QUERIES,
            image_text_hidden_size=EMBED,
        )
        return randomise(TransformersRetrieval(blip2)).eval()

    def ours(self, theirs, use_fused: bool) -> Blip2ForImageTextRetrieval:
        """The same weights: `ln_vision` is what transformers calls the encoder's post_layernorm."""
        model = Blip2ForImageTextRetrieval(
            config(), vision_model=copy.deepcopy(theirs.vision_model), use_fused=use_fused
        )
        model.load_state_dict(theirs.state_dict(), strict=True)
        return model.eval()

    @BOTH_PATHS
    @pytest.mark.parametrize(("images", "texts"), [(3, 5), (1, 4), (4, 1)])
    def test_itc(self, theirs, use_fused, images, texts):
        ids, mask, _, _ = inputs(images, texts)
        pixels = torch.randn(images, 3, 28, 28)
        with torch.no_grad():
            expected = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask)
        model = self.ours(theirs, use_fused)
        got = model.itc_scores(ids, mask, pixel_values=pixels, batch_size=2)
        if images == texts or 1 not in (images, texts):
            expected_scores = expected.logits_per_image
        else:
            # With one image or one text the maximum over queries must still leave [images, texts].
            similarities = torch.einsum("nqe,me->nmq", expected.image_embeds, expected.text_embeds)
            expected_scores = similarities.max(dim=2).values
        torch.testing.assert_close(got, expected_scores, atol=1e-5, rtol=0)
        with torch.no_grad():
            text_features = model.get_text_features(ids, mask)
            image_features = model.get_image_features(pixel_values=pixels)
        torch.testing.assert_close(text_features, expected.text_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(image_features, expected.image_embeds, atol=1e-5, rtol=0)

    @BOTH_PATHS
    def test_itm(self, theirs, use_fused):
        """transformers scores pairs (image i, text i): our diagonal, and any pair by repeating the image."""
        ids, mask, _, _ = inputs(3, 3)
        pixels = torch.randn(3, 3, 28, 28)
        got = self.ours(theirs, use_fused).itm_logits(ids, mask, pixel_values=pixels, batch_size=4)
        for image in range(3):
            with torch.no_grad():
                expected = theirs(
                    pixel_values=pixels[image].expand(3, -1, -1, -1),
                    input_ids=ids,
                    attention_mask=mask,
                    use_image_text_matching_head=True,
                ).logits_per_image
            torch.testing.assert_close(got[image], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got[image].softmax(-1), expected.softmax(-1), atol=1e-5, rtol=0)

    def test_one_image_and_many_texts(self, theirs, record_property):
        """transformers (so far) crashes there; should it no longer, it must agree with us."""
        ids, mask, _, _ = inputs(1, 4)
        pixels = torch.randn(1, 3, 28, 28)
        got = self.ours(theirs, False).itm_logits(ids, mask, pixel_values=pixels)[0]
        try:
            with torch.no_grad():
                expected = theirs(
                    pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True
                ).logits_per_image
        except (RuntimeError, ValueError) as error:
            record_property("transformers_itm_one_image_many_texts", f"crashes: {str(error)[:80]}")
            assert got.shape == (4, 2) and torch.isfinite(got).all()
        else:
            record_property("transformers_itm_one_image_many_texts", "works")
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


class TestScores:
    @BOTH_PATHS
    @pytest.mark.parametrize(("images", "texts"), [(3, 5), (1, 4), (4, 1), (1, 1)])
    @pytest.mark.parametrize("batch_size", [1, 2, 64])
    def test_chunks_equal_pairs_one_by_one(self, use_fused, images, texts, batch_size):
        ids, mask, features, image_mask = inputs(images, texts)
        plain, model = build(), build(use_fused)
        options = {"image_features": features, "image_mask": image_mask, "batch_size": batch_size}
        itc, itm = model.itc_scores(ids, mask, **options), model.itm_logits(ids, mask, **options)
        assert itc.shape == (images, texts) and itm.shape == (images, texts, 2)
        assert torch.equal(model.itm_scores(ids, mask, **options), itm[..., 1])
        for i in range(images):
            for j in range(texts):
                real = ids[j : j + 1, : mask[j].sum()]
                seen = features[i : i + 1, : image_mask[i].sum()]
                with torch.no_grad():
                    image, text = plain.get_image_features(seen), plain.get_text_features(real)
                    hidden = plain.get_multimodal_features(real, image_features=seen)
                    logits = plain.itm_head(hidden).mean(dim=1)
                assert abs(itc[i, j] - (image[0] @ text[0]).max()) <= 1e-5
                torch.testing.assert_close(itm[i, j], logits[0], atol=1e-5, rtol=1e-5)

    @BOTH_PATHS
    @pytest.mark.parametrize("batch_size", [2, 64])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    def test_chosen_pairs_equal_those_among_all(self, use_fused, batch_size, dtype, monkeypatch):
        """In whatever order they come; an image is prepared once, and not at all if it meets no text."""
        ids, mask, features, image_mask = inputs(5, 7)
        index = torch.tensor([4, 0, 4, 1, 0, 4, 1], dtype=dtype)
        model = build(use_fused)
        options = {"image_features": features, "image_mask": image_mask, "batch_size": batch_size}
        every = model.itm_logits(ids, mask, **options)
        prepared = count_prepared(monkeypatch)
        got = model.pair_logits(ids, mask, image_index=index, **options)
        assert sum(prepared) == (3 if batch_size == 2 else 5)
        torch.testing.assert_close(got, every[index.long(), torch.arange(7)], atol=1e-5, rtol=1e-5)
        own = model.pair_logits(ids[:5], mask[:5], **options)
        torch.testing.assert_close(own, every.diagonal().T, atol=1e-5, rtol=1e-5)

    @BOTH_PATHS
    def test_half_precision_ends_where_scores_begin(self, use_fused):
        """Under autocast the model computes in bfloat16, but cosines and logits of it do not tie."""
        ids, mask, features, _ = inputs(5, 7)
        model, index = build(use_fused), torch.arange(7) % 5
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            itc, itm = model.itc_scores(ids, mask, features), model.itm_scores(ids, mask, features)
            pairs = model.pair_logits(ids, mask, features, image_index=index)
            image, text = model.get_image_features(features), model.get_text_features(ids, mask)
        for scores in (itc, itm, pairs):
            assert scores.dtype == torch.float32 and (scores != scores.bfloat16()).any()
        expected = torch.einsum("nqe,me->nmq", image.float(), text.float()).amax(-1)
        torch.testing.assert_close(itc, expected, atol=1e-6, rtol=0)

    @BOTH_PATHS
    def test_features(self, use_fused):
        ids, mask, features, image_mask = inputs(3, 3)
        model = build(use_fused)
        image = model.get_image_features(features, image_mask=image_mask)
        text = model.get_text_features(ids, mask)
        both = model.get_multimodal_features(ids, mask, features, image_mask=image_mask)
        assert (
            image.shape == (3, QUERIES, EMBED) and text.shape == (3, EMBED) and both.shape == (3, QUERIES, 32)
        )
        for unit in (image, text):
            torch.testing.assert_close(unit.norm(dim=-1), torch.ones(unit.shape[:-1]))
        index = torch.tensor([2, 0, 2])
        chosen = model.get_multimodal_features(ids, mask, features, image_mask=image_mask, image_index=index)
        copied = model.get_multimodal_features(ids, mask, features[index], image_mask=image_mask[index])
        torch.testing.assert_close(chosen, copied, atol=1e-5, rtol=0)

    def test_left_padding_reads_the_first_real_token(self):
        """[CLS] is the first real token; only positions differ from right padding, so we give texts no
        positions."""
        for use_fused in (False, True):
            model = build(use_fused)
            with torch.no_grad():
                model.embeddings.position_embeddings.weight.zero_()
            left = model.get_text_features(torch.tensor([[0, 0, 1, 7, 9]]), torch.tensor([[0, 0, 1, 1, 1]]))
            alone = model.get_text_features(torch.tensor([[1, 7, 9]]))
            torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)

    @BOTH_PATHS
    @pytest.mark.parametrize("k", [1, 2, 99])
    @pytest.mark.parametrize(("images", "texts"), [(4, 6), (1, 3), (3, 1)])
    def test_rerank_is_lavis(self, use_fused, k, images, texts):
        """Row by row, as LAVIS's evaluation: the k best by ITC get ITM + ITC, the others -100."""
        ids, mask, features, image_mask = inputs(images, texts)
        model = build(use_fused)
        options = {"image_features": features, "image_mask": image_mask}
        out = model.rerank(ids, mask, k=k, batch_size=3, **options)
        itc, itm = model.itc_scores(ids, mask, **options), model.itm_scores(ids, mask, **options)
        torch.testing.assert_close(out.itc, itc)
        for scores, sims, matches in (
            (out.image_to_text, itc, itm),
            (out.text_to_image, itc.T, itm.T),
        ):
            expected = torch.full_like(sims, -100.0)
            for row in range(len(sims)):
                best_sims, best = sims[row].topk(min(k, sims.shape[1]))
                expected[row, best] = matches[row, best] + best_sims
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
            assert ((scores == NOT_SCORED).sum(1) == sims.shape[1] - min(k, sims.shape[1])).all()

    def test_rerank_reads_each_pair_once_and_each_image_once(self, monkeypatch):
        ids, mask, features, _ = inputs(4, 6)
        model = build(use_fused=True)
        pairs, seen = [], []
        read, prepared = Blip2Base.multimodal_hidden, count_prepared(monkeypatch)

        def counting_read(self, images, input_ids, *args, **kwargs):
            pairs.append((len(images), len(input_ids)))
            return read(self, images, input_ids, *args, **kwargs)

        monkeypatch.setattr(Blip2Base, "multimodal_hidden", counting_read)
        out = model.rerank(ids, mask, features, k=2, batch_size=3, progress=lambda *done: seen.append(done))
        scored = (out.image_to_text != NOT_SCORED) | (out.text_to_image.T != NOT_SCORED)
        assert sum(count for _, count in pairs) == int(scored.sum())
        # Bounded memory: never more images or pairs at a time than the batch size.
        assert max(images for images, _ in pairs) <= 3 and max(count for _, count in pairs) <= 3
        assert sum(prepared) == 8  # four for ITC, four for ITM
        assert seen[-1] == (int(scored.sum()), int(scored.sum()))
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})

    @pytest.mark.parametrize(
        ("batch_size", "forced", "projections"),
        [(4, {}, 4), (3, {}, 8), (3, {"absorbed_cross_attention": None}, 4)],
        ids=["one chunk", "two chunks", "two chunks, the first step absorbed"],
    )
    def test_rerank_projects_an_image_and_reads_a_text_alone_once(
        self, batch_size, forced, projections, monkeypatch
    ):
        """Nothing more than `batch_size` images is held, so two chunks are projected once a step."""
        ids, mask, features, _ = inputs(4, 6)
        features = features.repeat(1, 9, 1)  # long enough for the absorbed form where an image is read once
        model = build(use_fused=True)
        encoder = model.qformer.fused_encoder
        encoder.force(**({"absorbed_cross_attention": False} | forced))
        options = {"k": 5, "batch_size": batch_size}
        expected = build().rerank(ids, mask, features, **options)
        images, texts = [], []
        project, read = FusedEncoder._project, Blip2Base.text_hidden

        def counting_project(self, layer, source):
            made = project(self, layer, source)
            images.append(0 if made is None else len(made.key))
            return made

        def counting_read(self, input_ids, *args, **kwargs):
            texts.append(len(input_ids))
            return read(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(FusedEncoder, "_project", counting_project)
        monkeypatch.setattr(Blip2Base, "text_hidden", counting_read)
        got = model.rerank(ids, mask, features, **options)
        assert sum(texts) == 6
        layers = sum(hasattr(layer, "crossattention") for layer in model.qformer.encoder.layer)
        assert sum(images) == projections * layers
        for ours, theirs in ((got.itc, expected.itc), (got.image_to_text, expected.image_to_text)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    def test_progress_of_itc(self):
        ids, mask, features, _ = inputs(5, 4)
        seen = []
        build().itc_scores(ids, mask, features, batch_size=3, progress=lambda *done: seen.append(done))
        assert seen == [(3, 9), (4, 9), (7, 9), (9, 9)]

    def test_pixels_are_encoded_once_for_reranking(self):
        class Encoder(nn.Module):
            calls = 0

            def forward(self, pixel_values):
                Encoder.calls += len(pixel_values)
                return pixel_values.flatten(2)

        ids, mask, features, _ = inputs(4, 6)
        model = build(vision_model=Encoder())
        pixels = features.unflatten(2, (4, -1))  # a channel an image token
        by_pixels = model.rerank(ids, mask, pixel_values=pixels, k=2, batch_size=3)
        assert Encoder.calls == 4
        by_features = model.rerank(ids, mask, features, k=2, batch_size=3)
        assert torch.equal(by_pixels.image_to_text, by_features.image_to_text)

    def test_no_dropout_and_mode_kept(self):
        ids, mask, features, _ = inputs(3, 4)
        model = build()
        expected = model.itm_logits(ids, mask, features)
        model.train()
        assert torch.equal(model.itm_logits(ids, mask, features), expected)
        assert model.training and model.qformer.training
        assert not model.itm_logits(ids, mask, features).requires_grad


class TestFromPretraining:
    def test_shares_parameters(self):
        stage1 = randomise(Blip2ForPreTraining(config())).eval()
        model = Blip2ForImageTextRetrieval.from_pretraining(stage1)
        theirs = dict(stage1.named_parameters())
        ours = dict(model.named_parameters())
        assert ours and all(parameter is theirs[name] for name, parameter in ours.items())
        assert {name for name in theirs if name not in ours} == {
            name for name in theirs if name.startswith("cls.") or name == "temp"
        }
        ids, mask, features, _ = inputs(3, 4)
        texts, images = stage1.get_text_features(ids, mask), stage1.get_image_features(features)
        expected = torch.einsum("nqe,me->nmq", images, texts).max(dim=2).values
        torch.testing.assert_close(model.itc_scores(ids, mask, features), expected, atol=1e-5, rtol=0)

    def test_refuses_others(self):
        with pytest.raises(TypeError, match="model: expected a Blip2ForPreTraining, got Linear"):
            Blip2ForImageTextRetrieval.from_pretraining(nn.Linear(1, 1))


IDS = torch.ones(3, 6).long()
REFUSED = {
    "ids' rank": ({"input_ids": IDS[0]}, ValueError, "input_ids: expected .*tokens"),
    "ids' kind": ({"input_ids": IDS.float()}, TypeError, "input_ids: expected int64 or int32"),
    "ids' range": ({"input_ids": IDS + VOCABULARY}, ValueError, r"input_ids: expected values in \[0, 61\)"),
    "no text": (
        {"input_ids": IDS[:0], "attention_mask": None},
        ValueError,
        "input_ids: expected at least one",
    ),
    "too long": (
        {"input_ids": torch.ones(3, 41).long(), "attention_mask": None},
        ValueError,
        "input_ids: expected at most 40 tokens",
    ),
    "mask": ({"attention_mask": torch.ones(3, 5)}, ValueError, r"attention_mask: .*\[3, 6\], got .*\[3, 5\]"),
    "mask values": ({"attention_mask": IDS * 2}, ValueError, "attention_mask: expected only 0 and 1, got 2"),
    "no image": ({"image_features": None}, ValueError, "image_features: .*neither"),
    "both": ({"pixel_values": torch.zeros(1)}, ValueError, "image_features: .*both"),
    "no encoder": (
        {"image_features": None, "pixel_values": torch.zeros(1, 3)},
        ValueError,
        "pixel_values: expected image_features",
    ),
    "no pixels": (
        {"image_features": None, "pixel_values": torch.zeros(0)},
        TypeError,
        "pixel_values: expected",
    ),
    "empty images": ({"image_features": torch.zeros(0, 9, 24)}, ValueError, "image_features: .*at least one"),
    "image width": ({"image_features": torch.zeros(2, 9, 5)}, ValueError, "image_features: .*24.*, 5"),
    "image kind": ({"image_features": torch.zeros(2, 9, 24).int()}, TypeError, "image_features: .*int32"),
    "image mask": ({"image_mask": torch.ones(3, 9)}, ValueError, r"image_mask: expected .*\[2, tokens\]"),
    "image mask length": ({"image_mask": torch.ones(2, 8)}, ValueError, r"image_mask: expected .*\[2, 9\]"),
    "image mask values": ({"image_mask": torch.full((2, 9), 3)}, ValueError, "image_mask: .*0 and 1, got 3"),
    "batch size": ({"batch_size": 0}, ValueError, "batch_size: expected an int >= 1, got 0"),
    "batch size's kind": ({"batch_size": 2.0}, TypeError, "batch_size: expected an int >= 1, got float"),
}


class TestBadInput:
    @pytest.mark.parametrize("method", ["itc_scores", "itm_logits", "pair_logits", "itm_scores", "rerank"])
    @pytest.mark.parametrize("case", REFUSED)
    def test_scores(self, method, case):
        overrides, error, message = REFUSED[case]
        arguments = {
            "input_ids": IDS,
            "attention_mask": IDS,
            "image_features": torch.zeros(2, 9, IMAGE_WIDTH),
        }
        if method == "pair_logits":
            arguments["image_index"] = torch.zeros(3).long()
        with pytest.raises(error, match=message):
            getattr(build(), method)(**{**arguments, **overrides})

    def test_image_index(self):
        ids, mask, features, _ = inputs(2, 3)
        model = build()

        def refuses(error, message, index):
            for method in (model.get_multimodal_features, model.pair_logits):
                with pytest.raises(error, match=message):
                    method(ids, mask, features, image_index=index)

        refuses(ValueError, "image_index: expected one for 2 images and 3 texts, got None", None)
        refuses(ValueError, r"image_index: expected values in \[0, 2\), got 2", torch.tensor([0, 1, 2]))
        refuses(ValueError, r"image_index: expected values in \[0, 2\), got -1", torch.tensor([0, -1, 0]))
        refuses(ValueError, r"image_index: expected .*\[3\], got .*\[2\]", torch.tensor([0, 1]))
        refuses(TypeError, "image_index: expected int64 or int32", torch.zeros(3))

    def test_k(self):
        ids, mask, features, _ = inputs(2, 3)
        with pytest.raises(ValueError, match="k: expected an int >= 1, got 0"):
            build().rerank(ids, mask, features, k=0)

    def test_progress(self):
        ids, mask, features, _ = inputs(3, 3)
        for name in ("itc_scores", "itm_logits", "pair_logits", "itm_scores", "rerank"):
            with pytest.raises(TypeError, match=r"^progress: expected a function or None, got bool True"):
                getattr(build(), name)(ids, mask, features, progress=True)

    def test_configuration_and_encoder(self):
        with pytest.raises(TypeError, match="config: expected a Blip2PreTrainingConfig"):
            Blip2ForImageTextRetrieval(blip2_config())
        with pytest.raises(TypeError, match=r"vision_model: expected an nn\.Module or None, got str"):
            Blip2ForImageTextRetrieval(config(), vision_model="vit")


class TestBase:
    def test_frozen_encoder_stays_frozen_and_in_eval_mode(self):
        encoder = nn.Sequential(nn.Conv2d(3, IMAGE_WIDTH, 1), nn.Dropout(0.5))
        model = build(vision_model=encoder).train()
        assert model.qformer.training and not any(module.training for module in encoder.modules())
        pixels = torch.randn(2, 3, 3, 3)
        assert torch.equal(
            model.frozen_features(pixel_values=pixels), model.frozen_features(pixel_values=pixels)
        )
        model.get_image_features(pixel_values=pixels).square().sum().backward()
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert model.ln_vision.weight.grad is not None

    def test_half_precision_features_are_cast(self):
        _, _, features, _ = inputs(2, 2)
        for use_fused in (False, True):
            model = build(use_fused)
            got = model.get_image_features(features.half())
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, model.get_image_features(features.half().float()))

    def test_initialisation(self):
        torch.manual_seed(0)
        model = Blip2ForImageTextRetrieval(config())
        layer = model.qformer.encoder.layer[0]
        assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
        assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
        assert 0.01 < model.query_tokens.std() < 0.03
        assert 0.018 < model.embeddings.word_embeddings.weight[1:].std() < 0.022
        assert not model.embeddings.word_embeddings.weight[0].any()
        assert model.use_fused is False
        model.use_fused = True
        assert model.qformer.use_fused is True
