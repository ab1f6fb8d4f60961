"""QFormerModel against transformers' own Q-Formers, its parts, and what it refuses."""

import copy

import pytest
import torch
from qformer_cases import (
    BOTH_PATHS,
    IMAGE_WIDTH,
    PADDINGS,
    POSITIONS,
    WIDTH,
    blip2_config,
    build,
    inputs,
    instruct_config,
    randomise,
    text_mask,
    with_queries,
)
from transformers import (
    Blip2QFormerModel,
    InstructBlipQFormerModel,
)

from blip2_kernels.mask import MaskMode
from blip2_kernels.model.qformer import (
    LMHead,
    QFormerModel,
    TextEmbeddings,
)
from blip2_kernels.model.qformer_init import copy_text_feed_forward_to_query, init_bert_weights


@pytest.fixture(scope="module")
def blip2() -> Blip2QFormerModel:
    return randomise(Blip2QFormerModel(blip2_config())).eval()


@pytest.fixture(scope="module")
def instruct() -> InstructBlipQFormerModel:
    return randomise(InstructBlipQFormerModel(instruct_config())).eval()


class TestAgainstTransformers:
    """Same random weights, every row: at most 1e-5 apart in fp32."""

    def ours(self, theirs, use_fused: bool) -> QFormerModel:
        model = QFormerModel(theirs.config, use_fused=use_fused).eval()
        model.load_state_dict(theirs.state_dict(), strict=True)
        return model

    @pytest.mark.parametrize("text_input", [True, False])
    def test_state_dicts_are_interchangeable(self, text_input):
        config = blip2_config(use_qformer_text_input=text_input)
        theirs, ours = Blip2QFormerModel(config), QFormerModel(config)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)

    def test_instruct_state_dicts_are_interchangeable(self):
        theirs, ours = InstructBlipQFormerModel(instruct_config()), QFormerModel(instruct_config())
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)

    @BOTH_PATHS
    @pytest.mark.parametrize("masked_image", [False, True])
    @pytest.mark.parametrize(("batch", "queries", "image_tokens"), [(3, 7, 15), (1, 32, 1), (2, 1, 15)])
    def test_queries_only(self, blip2, use_fused, masked_image, batch, queries, image_tokens):
        query_tokens, _, images, image_mask = inputs(batch, queries, 0, image_tokens)
        mask = image_mask if masked_image else None
        with torch.no_grad():
            expected = blip2(query_tokens, encoder_hidden_states=images, encoder_attention_mask=mask)
            got = self.ours(blip2, use_fused)(
                query_tokens, encoder_hidden_states=images, encoder_attention_mask=mask
            )
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)

    @BOTH_PATHS
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize(
        ("batch", "queries", "tokens", "image_tokens"), [(3, 7, 5, 15), (1, 32, 33, 15), (2, 1, 1, 1)]
    )
    def test_queries_and_text(self, blip2, use_fused, padding, batch, queries, tokens, image_tokens):
        query_tokens, ids, images, _ = inputs(batch, queries, tokens, image_tokens)
        rows = torch.cat([query_tokens, randomise(TextEmbeddings(blip2.config)).embed(ids)], dim=1)
        options = {
            "query_length": queries,
            "attention_mask": with_queries(text_mask(padding, batch, tokens), queries),
            "encoder_hidden_states": images,
        }
        with torch.no_grad():
            expected = blip2(rows, **options).last_hidden_state
            got = self.ours(blip2, use_fused)(rows, **options).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    @BOTH_PATHS
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("tokens", [1, 5, 33])
    def test_text_only(self, blip2, use_fused, padding, tokens):
        _, ids, _, _ = inputs(3, 1, tokens)
        text = randomise(TextEmbeddings(blip2.config)).embed(ids)
        options = {"query_length": 0, "attention_mask": text_mask(padding, 3, tokens)}
        with torch.no_grad():
            expected = blip2(text, **options).last_hidden_state
            got = self.ours(blip2, use_fused)(text, **options).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    @BOTH_PATHS
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("masked_image", [False, True])
    @pytest.mark.parametrize(("batch", "queries", "tokens"), [(3, 7, 5), (1, 32, 33), (2, 1, 1), (2, 7, 0)])
    def test_instructblip(self, instruct, use_fused, padding, masked_image, batch, queries, tokens):
        query_tokens, ids, images, image_mask = inputs(batch, queries, tokens, 15)
        options = {
            "query_embeds": query_tokens,
            "input_ids": ids if tokens else None,
            "attention_mask": with_queries(text_mask(padding, batch, tokens), queries) if tokens else None,
            "encoder_hidden_states": images,
            "encoder_attention_mask": image_mask if masked_image else None,
        }
        with torch.no_grad():
            expected = instruct(**options).last_hidden_state
            got = self.ours(instruct, use_fused)(**options).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    @BOTH_PATHS
    def test_instructblip_text_only_and_position_ids(self, instruct, use_fused):
        _, ids, _, _ = inputs(2, 1, 6)
        positions = torch.randint(POSITIONS, (2, 6), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = instruct(ids, position_ids=positions).last_hidden_state
            got = self.ours(instruct, use_fused)(input_ids=ids, position_ids=positions).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    @BOTH_PATHS
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_masked_image_with_text(self, blip2, use_fused, padding):
        """BLIP-2 with a padded image and text, which transformers cannot run, equals InstructBLIP's form of
        it."""
        query_tokens, ids, images, image_mask = inputs(3, 7, 5)
        instruct = InstructBlipQFormerModel(instruct_config()).eval()
        embeddings = randomise(TextEmbeddings(blip2.config), seed=5)
        state = {k: v for k, v in blip2.state_dict().items() if k.startswith("encoder.")}
        state |= {f"embeddings.{k}": v for k, v in embeddings.state_dict().items()}
        state |= {f"embeddings.layernorm.{k}": v for k, v in blip2.layernorm.state_dict().items()}
        instruct.load_state_dict(state, strict=True)
        mask = with_queries(text_mask(padding, 3, 5), 7)
        options = {
            "attention_mask": mask,
            "encoder_hidden_states": images,
            "encoder_attention_mask": image_mask,
        }
        with torch.no_grad():
            expected = instruct(input_ids=ids, query_embeds=query_tokens, **options).last_hidden_state
            rows = embeddings(ids, query_embeds=query_tokens)
            got = self.ours(blip2, use_fused)(rows, query_length=7, **options).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    def test_upstream_crash_on_masked_image_with_text(self, blip2, record_property):
        """Records whether this transformers still crashes; should it no longer, it must agree with us."""
        query_tokens, ids, images, image_mask = inputs(2, 7, 5)
        rows = torch.cat([query_tokens, randomise(TextEmbeddings(blip2.config)).embed(ids)], dim=1)
        options = {
            "query_length": 7,
            "encoder_hidden_states": images,
            "encoder_attention_mask": image_mask,
        }
        ours = self.ours(blip2, False)(rows, **options).last_hidden_state
        try:
            theirs = blip2(rows, **options).last_hidden_state
        except (RuntimeError, ValueError, IndexError) as error:
            record_property("transformers_masked_image_with_text", f"crashes: {str(error)[:80]}")
            assert torch.isfinite(ours).all()
        else:
            record_property("transformers_masked_image_with_text", "works")
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    @BOTH_PATHS
    @pytest.mark.parametrize("frequency", [1, 3])
    def test_cross_attention_frequency_and_activation(self, use_fused, frequency):
        config = blip2_config(cross_attention_frequency=frequency, hidden_act="relu", num_attention_heads=2)
        theirs = randomise(Blip2QFormerModel(config)).eval()
        query_tokens, _, images, _ = inputs(2, 7, 0)
        with torch.no_grad():
            expected = theirs(query_tokens, encoder_hidden_states=images).last_hidden_state
            got = self.ours(theirs, use_fused)(query_tokens, encoder_hidden_states=images).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    def test_maps_and_hidden_states(self, blip2):
        query_tokens, _, images, _ = inputs(2, 7, 0)
        theirs = copy.deepcopy(blip2)
        theirs.set_attn_implementation("eager")
        options = {"encoder_hidden_states": images, "output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            expected = theirs(query_tokens, **options)
            got = self.ours(blip2, True)(query_tokens, **options)
        assert len(got.hidden_states) == 5 and len(got.attentions) == 4 and len(got.cross_attentions) == 2
        for ours, theirs_ in zip(got.cross_attentions, expected.cross_attentions, strict=True):
            torch.testing.assert_close(ours, theirs_, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.hidden_states[-1], got.last_hidden_state)


class TestParts:
    def test_text_embeddings(self):
        embeddings = randomise(TextEmbeddings(blip2_config()))
        ids = torch.tensor([[3, 1, 2]])
        expected = embeddings.word_embeddings.weight[[3, 1, 2]] + embeddings.position_embeddings.weight[4:7]
        assert torch.equal(embeddings(ids, past_length=4)[0], expected)
        assert torch.equal(embeddings(ids, torch.tensor([[4, 5, 6]]))[0], expected)
        queries = torch.randn(1, 2, WIDTH)
        assert torch.equal(embeddings(ids, query_embeds=queries)[:, :2], queries)

    def test_lm_head_is_tied(self):
        config = blip2_config()
        embeddings, head = randomise(TextEmbeddings(config)), randomise(LMHead(config))
        hidden = torch.randn(2, 3, WIDTH)
        logits = head(hidden, embeddings.word_embeddings.weight)
        transformed = head.transform.LayerNorm(torch.nn.functional.gelu(head.transform.dense(hidden)))
        expected = transformed @ embeddings.word_embeddings.weight.T + head.bias
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert set(head.state_dict()) == {
            "bias",
            "transform.dense.weight",
            "transform.dense.bias",
            "transform.LayerNorm.weight",
            "transform.LayerNorm.bias",
        }

    def test_initialisation(self):
        torch.manual_seed(0)
        model = QFormerModel(blip2_config(hidden_size=256, intermediate_size=512))
        layer = model.encoder.layer[0]
        assert abs(layer.intermediate.dense.weight.std().item() - 0.02) < 5e-4
        assert not layer.intermediate.dense.bias.any() and (layer.output.LayerNorm.weight == 1).all()
        embeddings = TextEmbeddings(blip2_config(pad_token_id=0))
        init_bert_weights(embeddings, 0.5)
        assert not embeddings.word_embeddings.weight[0].any()
        assert abs(embeddings.word_embeddings.weight[1:].std().item() - 0.5) < 0.05

    def test_query_feed_forward_copied_from_text(self):
        model = build(blip2_config())
        assert not torch.equal(
            model.encoder.layer[1].intermediate_query.dense.weight,
            model.encoder.layer[1].intermediate.dense.weight,
        )
        copy_text_feed_forward_to_query(model)
        for layer in model.encoder.layer:
            for query, text in (
                (layer.intermediate_query, layer.intermediate),
                (layer.output_query, layer.output),
            ):
                for ours, theirs in zip(query.parameters(), text.parameters(), strict=True):
                    assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
        with pytest.raises(ValueError, match="use_qformer_text_input"):
            copy_text_feed_forward_to_query(QFormerModel(blip2_config(use_qformer_text_input=False)))


class TestBadInput:
    """Every refusal names the argument, what was expected and what came."""

    Q, T, N = 3, 4, 5

    def arguments(self) -> dict:
        return {
            "query_embeds": torch.randn(2, self.Q + self.T, WIDTH),
            "query_length": self.Q,
            "attention_mask": torch.ones(2, self.Q + self.T),
            "encoder_hidden_states": torch.randn(2, self.N, IMAGE_WIDTH),
            "encoder_attention_mask": torch.ones(2, self.N),
        }

    CASES = {  # noqa: RUF012
        "nothing to read": ({"query_embeds": None}, ValueError, "query_embeds.*neither"),
        "rank": ({"query_embeds": torch.randn(7, WIDTH)}, ValueError, r"query_embeds: expected .*\[7, 32\]"),
        "width": (
            {"query_embeds": torch.randn(2, 7, 8)},
            ValueError,
            r"query_embeds: .*32.*, got .*\[2, 7, 8\]",
        ),
        "integers": ({"query_embeds": torch.ones(2, 7, WIDTH).long()}, TypeError, "query_embeds.*int64"),
        "no tensor": ({"query_embeds": [[1.0]]}, TypeError, "query_embeds: expected a tensor"),
        "no rows": (
            {"query_embeds": torch.randn(2, 0, WIDTH), "query_length": 0},
            ValueError,
            "query_embeds",
        ),
        "no samples": ({"query_embeds": torch.randn(0, 7, WIDTH)}, ValueError, "query_embeds"),
        "too many queries": ({"query_length": 8}, ValueError, r"query_length: expected .*7.*, got 8"),
        "no count": ({"query_length": 3.0}, TypeError, "query_length.*float"),
        "image width": (
            {"encoder_hidden_states": torch.randn(2, 5, 25)},
            ValueError,
            r"encoder_hidden_states: .*24.*\[2, 5, 25\]",
        ),
        "image rank": ({"encoder_hidden_states": torch.randn(5, 24)}, ValueError, "encoder_hidden_states"),
        "image integers": (
            {"encoder_hidden_states": torch.ones(2, 5, 24).int()},
            TypeError,
            "encoder_hidden_states.*int32",
        ),
        "image missing": (
            {"encoder_hidden_states": None, "encoder_attention_mask": None},
            ValueError,
            "encoder_hidden_states: .*None",
        ),
        "image batch": (
            {"encoder_hidden_states": torch.randn(3, 5, 24), "encoder_attention_mask": None},
            ValueError,
            "encoder_hidden_states: expected 2 images.*got 3",
        ),
        "no image": (
            {"encoder_hidden_states": torch.randn(0, 5, 24), "encoder_attention_mask": None},
            ValueError,
            r"^encoder_hidden_states: expected at least one token of one image, got float32 \[0, 5, 24\]",
        ),
        "no image for one sample": (
            {
                "query_embeds": torch.randn(1, 7, WIDTH),
                "attention_mask": None,
                "encoder_hidden_states": torch.randn(0, 5, 24),
                "encoder_attention_mask": None,
            },
            ValueError,
            r"^encoder_hidden_states: expected at least one token of one image, got float32 \[0, 5, 24\]",
        ),
        "no image token": (
            {"encoder_hidden_states": torch.randn(1, 0, 24), "encoder_attention_mask": None},
            ValueError,
            r"^encoder_hidden_states: expected at least one token of one image, got float32 \[1, 0, 24\]",
        ),
        "queries elsewhere": (
            {"query_embeds": torch.randn(2, 7, WIDTH, device="meta")},
            ValueError,
            "^query_embeds: expected a tensor on cpu, got one on meta",
        ),
        "image elsewhere": (
            {"encoder_hidden_states": torch.randn(2, 5, 24, device="meta"), "encoder_attention_mask": None},
            ValueError,
            "^encoder_hidden_states: expected a tensor on cpu, got one on meta",
        ),
        "image mask elsewhere": (
            {"encoder_attention_mask": torch.ones(2, 5, device="meta")},
            ValueError,
            "^encoder_attention_mask: expected a tensor on cpu, got one on meta",
        ),
        "mask without image": ({"encoder_hidden_states": None}, ValueError, "encoder_attention_mask"),
        "image mask length": (
            {"encoder_attention_mask": torch.ones(2, 6)},
            ValueError,
            r"encoder_attention_mask: expected .*\[2, 5\], got .*\[2, 6\]",
        ),
        "image mask values": (
            {"encoder_attention_mask": torch.full((2, 5), 2)},
            ValueError,
            "encoder_attention_mask: expected only 0 and 1, got 2",
        ),
        "text mask length": (
            {"attention_mask": torch.ones(2, 4)},
            ValueError,
            r"attention_mask: expected .*\[2, 7\], got .*\[2, 4\]",
        ),
        "text mask rank": ({"attention_mask": torch.ones(7)}, ValueError, "attention_mask: expected"),
        "text mask heads": (
            {"attention_mask": torch.ones(2, 3, 7, 7)},
            ValueError,
            "attention_mask: .*1 or 4",
        ),
        "additive mask": (
            {"attention_mask": torch.full((2, 7), -1e4)},
            ValueError,
            "attention_mask: .*only 0 and 1",
        ),
        "complex mask": (
            {"attention_mask": torch.ones(2, 7).cfloat()},
            TypeError,
            "attention_mask.*complex64",
        ),
        "mode": ({"mask": "causal"}, TypeError, "mask: expected a MaskMode, got str"),
        "ids": (
            {"input_ids": torch.ones(2, 4).long()},
            ValueError,
            "input_ids: expected None.*TextEmbeddings",
        ),
        "cache kind": (
            {"past_key_values": ()},
            TypeError,
            "past_key_values: expected a QFormerCache, got tuple",
        ),
        **{
            f"{switch} that is none": (
                {switch: value},
                TypeError,
                f"^{switch}: expected a bool, got {type(value).__name__} {value!r}",
            )
            for switch, value in (
                ("output_attentions", "no"),
                ("output_hidden_states", 0),
                ("queries_only", "no"),
                ("use_cache", 3),
            )
        },
        "row keys": ({"row_keys": torch.ones(2, 6).int()}, ValueError, r"row_keys: expected int32 \[2, 7\]"),
        "row keys' dtype": ({"row_keys": torch.ones(2, 7)}, TypeError, "row_keys: expected int32"),
    }

    @BOTH_PATHS
    @pytest.mark.parametrize("case", CASES)
    def test_blip2(self, use_fused, case):
        overrides, error, message = self.CASES[case]
        with pytest.raises(error, match=message):
            build(blip2_config(), use_fused)(**{**self.arguments(), **overrides})

    def test_the_good_arguments_are_good(self):
        for use_fused in (False, True):
            out = build(blip2_config(), use_fused)(**self.arguments()).last_hidden_state
            assert out.shape == (2, 7, WIDTH)

    def test_use_fused_is_a_bool_at_any_time(self):
        model = build(blip2_config())
        with pytest.raises(TypeError, match=r"^use_fused: expected a bool, got str 'no'"):
            model.use_fused = "no"
        assert model.use_fused is False

    def test_text_without_text_networks(self):
        with pytest.raises(
            ValueError, match=r"query_length: expected 7, since .*use_qformer_text_input=False, got 3"
        ):
            build(blip2_config(use_qformer_text_input=False))(**self.arguments())

    def test_filled_cache_takes_causal_text_only(self):
        model = build(blip2_config())
        arguments = self.arguments() | {"attention_mask": None}
        cache = model(**arguments, use_cache=True).past_key_values
        text = torch.randn(2, 1, WIDTH)
        with pytest.raises(ValueError, match=r"past_key_values: .*MULTIMODAL_CAUSAL.*got .*BIDIRECTIONAL"):
            model(text, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: expected a cache of 3 samples, got one of 2"):
            model(text[:1].expand(3, -1, -1), past_key_values=cache, mask=MaskMode.MULTIMODAL_CAUSAL)
        with pytest.raises(ValueError, match=r"past_key_values: .*query_length=1"):
            images = arguments["encoder_hidden_states"]
            model(text, None, images, query_length=1, past_key_values=cache, mask=MaskMode.MULTIMODAL_CAUSAL)

    def test_instruct(self):
        model = build(instruct_config())
        images = torch.randn(2, self.N, IMAGE_WIDTH)
        queries, ids = torch.randn(2, self.Q, WIDTH), torch.ones(2, self.T).long()

        def refuses(error, message, **options):
            with pytest.raises(error, match=message):
                model(encoder_hidden_states=images, **options)

        refuses(TypeError, "input_ids: expected int64 or int32", query_embeds=queries, input_ids=ids.float())
        refuses(ValueError, "input_ids: expected .*tokens", query_embeds=queries, input_ids=ids[0])
        refuses(ValueError, r"input_ids: expected values in \[0, 61\), got 61", input_ids=ids + 60)
        refuses(ValueError, r"input_ids: expected values in \[0, 61\), got -1", input_ids=ids - 2)
        refuses(
            ValueError, "input_ids: expected at most 40 tokens.*got 41", input_ids=torch.ones(1, 41).long()
        )
        refuses(
            ValueError, "query_embeds: .*got .*3, 3, 32", query_embeds=torch.randn(3, 3, WIDTH), input_ids=ids
        )
        refuses(ValueError, "query_length: expected 3, .*got 2", query_embeds=queries, query_length=2)
        refuses(ValueError, "position_ids: expected input_ids", query_embeds=queries, position_ids=ids)
        refuses(ValueError, "position_ids: expected .*4", input_ids=ids, position_ids=ids[:, 1:])
        refuses(
            ValueError, r"position_ids: expected values in \[0, 40\)", input_ids=ids, position_ids=ids * 40
        )

    def test_configuration(self):
        with pytest.raises(TypeError, match="config: expected Blip2QFormerConfig"):
            QFormerModel({"hidden_size": 4})
        with pytest.raises(ValueError, match=r"config: .*multiple of num_attention_heads, got 32 and 5"):
            QFormerModel(blip2_config(num_attention_heads=5))
        with pytest.raises(ValueError, match=r"^config\.num_attention_heads: expected an int >= 1, got 0"):
            QFormerModel(blip2_config(num_attention_heads=0))
        with pytest.raises(
            ValueError, match=r"^config\.cross_attention_frequency: expected an int >= 1, got 0"
        ):
            QFormerModel(blip2_config(cross_attention_frequency=0))
        with pytest.raises(ValueError, match=r"^config\.hidden_act: expected one of .*gelu.*, got 'gelou'"):
            QFormerModel(blip2_config(hidden_act="gelou"))

    def test_embeddings_and_head(self):
        embeddings, head = TextEmbeddings(blip2_config()), LMHead(blip2_config())
        words = embeddings.word_embeddings.weight
        with pytest.raises(ValueError, match=r"^past_length: expected an int >= 0, got -2"):
            embeddings(torch.ones(1, 3).long(), past_length=-2)
        with pytest.raises(
            ValueError, match=r"^hidden_states: expected .*\[2, 3, 32\], got float32 \[2, 3, 5\]"
        ):
            head(torch.randn(2, 3, 5), words)
        with pytest.raises(
            ValueError, match=r"^word_embeddings: expected .*\[61, channels\], got float32 \[7"
        ):
            head(torch.randn(2, 3, WIDTH), words[:7])
