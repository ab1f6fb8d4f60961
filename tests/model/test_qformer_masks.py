"""Who reaches whom in the Q-Former, its cache and its dropout; plain and fused path against each other."""

import copy

import pytest
import torch
from qformer_cases import (
    BOTH_PATHS,
    PADDINGS,
    WIDTH,
    blip2_config,
    build,
    inputs,
    instruct_config,
    randomise,
    run_joint,
    text_mask,
    with_queries,
)
from tolerances import assert_yardstick
from transformers import Blip2QFormerModel

from blip2_kernels.layout import CAPTION_STREAM, QUERY_STREAM, padded_row_keys
from blip2_kernels.mask import MaskMode
from blip2_kernels.model.qformer import QFormerCache, dense_attention_mask

# By mode: does a text token reach the queries, earlier text, later text?
REACHES = {
    MaskMode.UNIMODAL: (False, True, True),
    MaskMode.BIDIRECTIONAL: (True, True, True),
    MaskMode.MULTIMODAL_CAUSAL: (False, False, True),
}


class TestMasks:
    @BOTH_PATHS
    @pytest.mark.parametrize("mode", list(MaskMode), ids=lambda mode: mode.name)
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_a_text_token_reaches_whom_it_should_and_nobody_else(self, use_fused, mode, padding):
        batch, queries, tokens, changed = 3, 7, 8, 4
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, _ = inputs(batch, queries, tokens)
        text = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(2))
        mask = text_mask(padding, batch, tokens)
        options = {"mask": mode, "attention_mask": with_queries(mask, queries)}
        other = text.clone()
        other[:, changed] += 1

        before = run_joint(model, query_tokens, text, images, **options)
        after = run_joint(model, query_tokens, other, images, **options)
        moved = (before != after).any(dim=-1)
        text.requires_grad_()
        out = run_joint(model, query_tokens, text, images, **options)
        by_query, by_earlier, by_later = REACHES[mode]
        for sample in range(batch):
            real = [t for t in range(tokens) if mask[sample, t]]
            if not mask[sample, changed]:
                # Padding reaches nobody but itself.
                rows = [r for r in range(queries + tokens) if r != queries + changed]
                assert not moved[sample, rows].any()
                self.assert_gradient(out, text, sample, rows, changed, expected=False)
                continue
            groups = [
                (list(range(queries)), by_query),
                ([queries + t for t in real if t < changed], by_earlier),
                ([queries + t for t in real if t > changed], by_later),
                ([queries + changed], True),
            ]
            for rows, reached in groups:
                if rows:
                    assert (
                        bool(moved[sample, rows].all()) == reached
                        and bool(moved[sample, rows].any()) == reached
                    )
                    self.assert_gradient(out, text, sample, rows, changed, expected=reached)

    @staticmethod
    def assert_gradient(out, text, sample, rows, token, expected):
        # A weighted sum: LayerNorm makes the plain sum over channels a constant.
        weights = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(4))
        (gradient,) = torch.autograd.grad((out[sample, rows] * weights).sum(), text, retain_graph=True)
        assert bool(gradient[sample, token].any()) == expected
        others = [s for s in range(text.shape[0]) if s != sample]
        assert not gradient[others].any()

    @BOTH_PATHS
    @pytest.mark.parametrize("mode", list(MaskMode), ids=lambda mode: mode.name)
    def test_queries_reach_text(self, use_fused, mode):
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, _ = inputs(2, 7, 5)
        text = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
        before = run_joint(model, query_tokens, text, images, mask=mode)
        after = run_joint(model, query_tokens + torch.randn(WIDTH), text, images, mask=mode)
        moved = (before[:, 7:] != after[:, 7:]).any(dim=-1)
        assert bool(moved.all()) == (mode != MaskMode.UNIMODAL)
        assert bool(moved.any()) == (mode != MaskMode.UNIMODAL)

    @BOTH_PATHS
    @pytest.mark.parametrize(
        "mode", [MaskMode.UNIMODAL, MaskMode.MULTIMODAL_CAUSAL], ids=lambda mode: mode.name
    )
    def test_queries_that_see_no_text_equal_queries_alone(self, use_fused, mode):
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, _ = inputs(2, 7, 5)
        text = torch.randn(2, 5, WIDTH)
        joint = run_joint(model, query_tokens, text, images, mask=mode)
        alone = model(query_tokens, encoder_hidden_states=images).last_hidden_state
        torch.testing.assert_close(joint[:, :7], alone, atol=1e-5, rtol=0)

    @BOTH_PATHS
    def test_hidden_image_tokens_are_not_read(self, use_fused):
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, image_mask = inputs(3, 7, 0)
        other = images + 5.0 * (1 - image_mask)[..., None]
        options = {"encoder_attention_mask": image_mask}
        before = model(query_tokens, encoder_hidden_states=images, **options).last_hidden_state
        after = model(query_tokens, encoder_hidden_states=other, **options).last_hidden_state
        assert torch.equal(before, after)
        assert not torch.equal(before, model(query_tokens, encoder_hidden_states=other).last_hidden_state)

    @BOTH_PATHS
    def test_rows_that_may_attend_to_nothing(self, use_fused):
        """A fully hidden image or text contributes 0, with finite (zero) gradients."""
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, image_mask = inputs(2, 7, 0)
        image_mask[1] = 0
        images.requires_grad_()
        out = model(query_tokens, encoder_hidden_states=images, encoder_attention_mask=image_mask)
        out.last_hidden_state.square().sum().backward()
        assert torch.isfinite(out.last_hidden_state).all()
        assert images.grad[0].any() and not images.grad[1].any()
        # Zero attention means that only the value path's output bias is added, whatever the image holds.
        other = model(query_tokens, encoder_hidden_states=images * 3, encoder_attention_mask=image_mask)
        assert torch.equal(out.last_hidden_state[1], other.last_hidden_state[1])

        text = torch.randn(2, 5, WIDTH, requires_grad=True)
        hidden = torch.tensor([[1] * 5, [0] * 5])
        out = model(text, hidden, query_length=0).last_hidden_state
        out[:, 2].square().sum().backward()
        assert torch.isfinite(out).all() and torch.isfinite(text.grad).all()
        assert not text.grad[1, [0, 1, 3, 4]].any() and text.grad[1, 2].any()

    def test_three_and_four_dimensional_masks(self):
        """They narrow the structural mask, row by row or head by head, and take the plain layers."""
        query_tokens, _, images, _ = inputs(2, 3, 4)
        text = torch.randn(2, 4, WIDTH)
        narrow = torch.ones(2, 7, 7)
        narrow[:, :3, 3:] = 0
        narrow[:, 3:, :3] = 0
        for use_fused in (False, True):
            model = build(blip2_config(), use_fused)
            expected = run_joint(model, query_tokens, text, images, mask=MaskMode.UNIMODAL)
            for mask in (narrow, narrow[:, None], narrow[:, None].expand(2, 4, 7, 7)):
                got = run_joint(model, query_tokens, text, images, attention_mask=mask)
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    def test_hidden_queries(self):
        """Zeros over query positions hide those queries, on either switch."""
        query_tokens, _, images, _ = inputs(2, 7, 0)
        mask = torch.ones(2, 7)
        mask[:, 5:] = 0
        outs = [
            build(blip2_config(), use_fused)(query_tokens, mask, images).last_hidden_state
            for use_fused in (False, True)
        ]
        alone = build(blip2_config())(query_tokens[:, :5], None, images).last_hidden_state
        torch.testing.assert_close(outs[0][:, :5], alone, atol=1e-5, rtol=0)
        assert torch.equal(outs[0], outs[1])


class TestCache:
    @pytest.mark.parametrize("use_fused", [False, True])
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_queries_then_text_equals_one_pass(self, use_fused, padding):
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, image_mask = inputs(3, 7, 6)
        text = torch.randn(3, 6, WIDTH)
        mask = with_queries(text_mask(padding, 3, 6), 7)
        image = {"encoder_hidden_states": images, "encoder_attention_mask": image_mask}
        causal = {"mask": MaskMode.MULTIMODAL_CAUSAL, "attention_mask": mask}
        whole = model(torch.cat([query_tokens, text], 1), query_length=7, **image, **causal).last_hidden_state
        first = model(query_tokens, use_cache=True, **image)
        assert first.past_key_values.num_queries == 7
        second = model(text, past_key_values=first.past_key_values, **causal)
        real = mask[:, 7:].bool()
        torch.testing.assert_close(first.last_hidden_state, whole[:, :7], atol=1e-5, rtol=0)
        torch.testing.assert_close(second.last_hidden_state[real], whole[:, 7:][real], atol=1e-5, rtol=0)

    def test_token_by_token(self):
        model = build(instruct_config())
        query_tokens, ids, images, _ = inputs(2, 7, 6)
        causal = {"mask": MaskMode.MULTIMODAL_CAUSAL}
        whole = model(query_tokens, input_ids=ids, encoder_hidden_states=images, **causal).last_hidden_state
        cache = QFormerCache()
        model(query_tokens, encoder_hidden_states=images, past_key_values=cache)
        for token in range(6):
            step = model(input_ids=ids[:, token : token + 1], past_key_values=cache, **causal)
            torch.testing.assert_close(step.last_hidden_state[:, 0], whole[:, 7 + token], atol=1e-5, rtol=0)
        assert cache.get_seq_length() == 13

    def test_training_through_the_cache(self):
        """With dropout: the same key gives the same masks through the cache as in one pass, and the same
        gradients."""
        config = blip2_config()
        query_tokens, _, images, _ = inputs(2, 7, 6)
        text = torch.randn(2, 6, WIDTH)
        mask = with_queries(text_mask("right", 2, 6), 7)
        names = padded_row_keys(2, 7, mask[:, 7:], text_stream=CAPTION_STREAM)
        key = torch.tensor(1234567)
        gradients = []
        for cached in (False, True):
            model = build(config).double().train()
            queries = query_tokens.double()
            if cached:
                past = model(queries, None, images.double(), use_cache=True, dropout_key=key).past_key_values
                out = model(
                    text.double(),
                    mask,
                    mask=MaskMode.MULTIMODAL_CAUSAL,
                    past_key_values=past,
                    row_keys=names,
                    dropout_key=key,
                ).last_hidden_state
            else:
                rows = torch.cat([queries, text.double()], 1)
                out = model(
                    rows,
                    mask,
                    images.double(),
                    query_length=7,
                    mask=MaskMode.MULTIMODAL_CAUSAL,
                    row_keys=names,
                    dropout_key=key,
                ).last_hidden_state[:, 7:]
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
            (out * weights).sum().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradient, gradients[0][name], atol=1e-10, rtol=1e-10)


class TestDropout:
    @BOTH_PATHS
    def test_key_decides(self, use_fused):
        model = build(blip2_config(), use_fused).train()
        query_tokens, _, images, _ = inputs(2, 7, 5)
        text = torch.randn(2, 5, WIDTH)
        outs = [
            run_joint(model, query_tokens, text, images, dropout_key=torch.tensor(key)) for key in (5, 5, 6)
        ]
        assert torch.equal(outs[0], outs[1])
        assert not torch.allclose(outs[0], outs[2], atol=1e-2)
        torch.manual_seed(3)
        drawn = [run_joint(model, query_tokens, text, images) for _ in range(2)]
        torch.manual_seed(3)
        again = run_joint(model, query_tokens, text, images)
        assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], again)
        model.eval()
        assert not torch.allclose(outs[0], run_joint(model, query_tokens, text, images), atol=1e-2)

    @pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
    def test_each_rate_drops(self, which):
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, which: 0.3}
        model = build(blip2_config(**rates)).train()
        query_tokens, _, images, _ = inputs(2, 7, 0)
        outs = [
            model(query_tokens, None, images, dropout_key=torch.tensor(k)).last_hidden_state for k in (1, 2)
        ]
        assert not torch.allclose(*outs, atol=1e-2)

    @pytest.mark.parametrize("mode", list(MaskMode), ids=lambda mode: mode.name)
    @pytest.mark.parametrize("padding", ["right", "left", "scattered"])
    def test_paths_agree_in_training(self, mode, padding):
        query_tokens, _, images, image_mask = inputs(3, 7, 6)
        text = torch.randn(3, 6, WIDTH)
        mask = with_queries(text_mask(padding, 3, 6), 7)
        outs = [
            run_joint(
                build(blip2_config(), use_fused).train(),
                query_tokens,
                text,
                images,
                mask=mode,
                attention_mask=mask,
                encoder_attention_mask=image_mask,
                dropout_key=torch.tensor(99),
            )
            for use_fused in (False, True)
        ]
        real = mask.bool()
        torch.testing.assert_close(outs[0][real], outs[1][real], atol=1e-5, rtol=0)

    def test_row_keys_name_the_rows(self):
        """Other names, other masks; and the fused path takes the names it is given."""
        query_tokens, _, images, _ = inputs(2, 7, 0)
        options = {"dropout_key": torch.tensor(4), "encoder_hidden_states": images}
        plain, fused = build(blip2_config()).train(), build(blip2_config(), True).train()
        default = plain(query_tokens, **options).last_hidden_state
        shifted = padded_row_keys(2, 7, first_sample=2)
        assert shifted[0, 0] >> 29 == QUERY_STREAM
        other = plain(query_tokens, row_keys=shifted, **options).last_hidden_state
        assert not torch.allclose(default, other, atol=1e-2)
        same = plain(query_tokens, row_keys=padded_row_keys(2, 7), **options).last_hidden_state
        assert torch.equal(default, same)
        through_ops = fused(query_tokens, row_keys=shifted, **options).last_hidden_state
        torch.testing.assert_close(through_ops, other, atol=1e-5, rtol=0)


class TestPathsAgree:
    @pytest.mark.parametrize("mode", list(MaskMode), ids=lambda mode: mode.name)
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_gradients(self, mode, dropout):
        config = blip2_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        query_tokens, _, images, image_mask = inputs(3, 7, 6)
        text = torch.randn(3, 6, WIDTH).double()
        mask = with_queries(text_mask("scattered", 3, 6), 7)
        weights = (
            torch.randn(3, 13, WIDTH, generator=torch.Generator().manual_seed(8)).double() * mask[..., None]
        )
        results = []
        for use_fused in (False, True):
            model = build(config, use_fused).double().train()
            leaves = [t.double().requires_grad_() for t in (query_tokens, images)]
            out = run_joint(
                model,
                leaves[0],
                text,
                leaves[1],
                mask=mode,
                attention_mask=mask,
                encoder_attention_mask=image_mask,
                dropout_key=torch.tensor(7),
            )
            (out * weights).sum().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append(gradients | {"query_embeds": leaves[0].grad, "images": leaves[1].grad})
        plain, fused = results
        assert plain.keys() == fused.keys()
        for name in plain:
            torch.testing.assert_close(fused[name], plain[name], atol=1e-10, rtol=1e-10, msg=name)

    @BOTH_PATHS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, use_fused, dtype):
        """At most twice as far from the fp64 truth as transformers at the same dtype."""
        config = blip2_config()
        peer = randomise(Blip2QFormerModel(config)).eval().to(dtype)
        query_tokens, _, images, _ = inputs(4, 7, 5)
        rows = torch.cat([query_tokens, torch.randn(4, 5, WIDTH)], dim=1).to(dtype)
        images = images.to(dtype)
        with torch.no_grad():
            truth = (
                build(config)
                .to(dtype)
                .double()(rows.double(), encoder_hidden_states=images.double(), query_length=7)
            )
            plain = peer(rows, encoder_hidden_states=images, query_length=7)
            got = build(config, use_fused).to(dtype)(rows, encoder_hidden_states=images, query_length=7)
        assert got.last_hidden_state.dtype == dtype
        assert_yardstick(
            "last_hidden_state", got.last_hidden_state, plain.last_hidden_state, truth.last_hidden_state
        )

    @BOTH_PATHS
    def test_mixed_dtypes_are_cast_to_the_parameters(self, use_fused):
        """An fp32 Q-Former behind an fp16 image encoder, as transformers loads it."""
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, _ = inputs(2, 7, 0)
        half = images.half()
        got = model(query_tokens.half(), encoder_hidden_states=half).last_hidden_state
        expected = model(query_tokens.half().float(), encoder_hidden_states=half.float()).last_hidden_state
        assert got.dtype == torch.float32 and torch.equal(got, expected)

    @BOTH_PATHS
    def test_autocast(self, use_fused):
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, _ = inputs(2, 7, 0)
        expected = model(query_tokens, encoder_hidden_states=images).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(query_tokens, encoder_hidden_states=images).last_hidden_state
        assert not torch.equal(got, expected) and (got - expected).abs().max() < 0.15

    @BOTH_PATHS
    def test_one_image_for_all_and_one_query_set_for_all(self, use_fused):
        model = build(blip2_config(), use_fused)
        query_tokens, _, images, _ = inputs(3, 7, 0)
        expected = model(query_tokens[:1].expand(3, -1, -1), encoder_hidden_states=images).last_hidden_state
        got = model(query_tokens[:1], encoder_hidden_states=images).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        expected = model(query_tokens, encoder_hidden_states=images[:1].expand(3, -1, -1)).last_hidden_state
        got = model(query_tokens, encoder_hidden_states=images[:1]).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    def test_fused_path_is_taken_and_left_out_of_the_modules(self, monkeypatch):
        model = build(blip2_config(), use_fused=True)
        query_tokens, _, images, _ = inputs(2, 7, 0)

        def forbidden(*args, **kwargs):
            raise AssertionError("the plain layers ran")

        monkeypatch.setattr(type(model.encoder.layer[0]), "forward", forbidden)
        fused = model(query_tokens, encoder_hidden_states=images).last_hidden_state
        with pytest.raises(AssertionError, match="plain layers"):
            model(query_tokens, encoder_hidden_states=images, use_cache=True)
        monkeypatch.undo()
        names = [name for name, _ in model.named_modules()]
        assert not any("fused" in name for name in names)
        twin = copy.deepcopy(model)
        randomise(twin, seed=9)
        assert torch.equal(model(query_tokens, encoder_hidden_states=images).last_hidden_state, fused)
        assert not torch.equal(twin(query_tokens, encoder_hidden_states=images).last_hidden_state, fused)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "causal"}, TypeError, "mode: expected a MaskMode, got str 'causal'"),
        ({"num_queries": -1}, ValueError, "num_queries: expected an int >= 0, got -1"),
        ({"past": None}, TypeError, "past: expected an int >= 0, got NoneType"),
        ({"length": 2.0}, TypeError, r"length: expected an int >= 0, got float 2\.0"),
        ({"device": "gpu"}, ValueError, "device: expected a torch.device or its name, got 'gpu'"),
    ],
)
def test_a_dense_mask_of_nothing_that_is_one_is_refused(change, error, message):
    good = {"mode": MaskMode.UNIMODAL, "num_queries": 2, "past": 0, "length": 5}
    assert dense_attention_mask(**good).shape == (1, 1, 5, 5)
    with pytest.raises(error, match=f"^{message}"):
        dense_attention_mask(**{**good, **change})
