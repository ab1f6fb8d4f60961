"""Live transformers models, fused and as they were."""

import copy
import logging
import pickle

import pytest
import torch
from small_models import FAMILIES, QUERIES, assert_alike, both, build, doubled, inputs
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    InstructBlipForConditionalGeneration,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

import blip2_kernels
import blip2_kernels.transformers as drop_in
from blip2_kernels import fuse, unfuse
from blip2_kernels.encoder.modules import checkpoints


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_every_output_of_every_family(cls, calls):
    model = build(cls)
    for batch in (3, 1):
        assert_alike(*both(model, **inputs(cls, batch)))
    assert len(calls) >= 2


@torch.no_grad()
def test_matching(calls):
    model, given = build(Blip2ForImageTextRetrieval), inputs(Blip2ForImageTextRetrieval)
    assert_alike(*both(model, **given, use_image_text_matching_head=True))
    assert len(calls) == 1


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cls", [Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration])
def test_generated_tokens(cls, how, calls):
    model, given = build(cls), inputs(cls)
    plain = unfuse(model).generate(**given, max_new_tokens=8, **how)
    assert torch.equal(fuse(model).generate(**given, max_new_tokens=8, **how), plain)
    assert calls


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cls", [Blip2ForImageTextRetrieval, InstructBlipForConditionalGeneration])
def test_gradients_of_a_training_step(cls, implementation, calls):
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = build(cls, **dropout).double()
    model.set_attn_implementation(implementation)
    given = doubled(inputs(cls))
    if cls is Blip2ForImageTextRetrieval:
        given["use_image_text_matching_head"] = True
    found = []
    for change in (unfuse, fuse):
        change(model).train().zero_grad()
        out = model(**given)
        (out.logits_per_image if cls is Blip2ForImageTextRetrieval else out.logits).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    plain, ours = found
    for name, grad in plain.items():
        if grad is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(
                ours[name], grad, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert calls


@pytest.mark.parametrize("mix", ["bf16", "fp16 with an fp32 Q-Former", "autocast"])
@torch.no_grad()
def test_precisions(mix, calls):
    cls = Blip2ForConditionalGeneration
    model = build(cls)
    truth = copy.deepcopy(model).double()(**doubled(inputs(cls)))
    dtype = torch.float16 if mix.startswith("fp16") else torch.bfloat16
    given = inputs(cls)
    if mix != "autocast":
        qformer = model.qformer.float() if mix.startswith("fp16") else None
        model.to(dtype)
        if qformer is not None:
            model.qformer.float()
            model.query_tokens.data = model.query_tokens.data.float()
        given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=mix == "autocast"):
        plain, ours = both(model, **given)
    states = [o.qformer_outputs.last_hidden_state for o in (truth, plain, ours)]
    assert states[2].dtype == states[1].dtype
    errors = [(state.double() - states[0]).norm() for state in states[1:]]
    assert errors[1] <= 2 * errors[0]
    assert calls


@torch.no_grad()
def test_maps_and_states_come_from_transformers(calls, caplog):
    cls = Blip2ForConditionalGeneration
    model = build(cls)
    model.set_attn_implementation("eager")
    features = torch.randn(2, 17, 32)
    given = dict(query_embeds=model.query_tokens, encoder_hidden_states=features)
    drop_in._say_once.cache_clear()
    before = fuse(model).qformer(**given)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            plain, ours = both(model.qformer, **given, output_attentions=True, output_hidden_states=True)
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "output_attentions" in caplog.text
    assert len(ours.hidden_states) == 5 and len(ours.cross_attentions) == 2 and ours.attentions
    assert_alike(plain, ours)
    # The hooks that transformers leaves behind do nothing, and do not end the fused path.
    after = model.qformer(**given)
    assert len(calls) == 2
    assert "whole" not in model.qformer.fused_encoder.explain(blip2_kernels.encoder.Workload(2, QUERIES))
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


@torch.no_grad()
def test_tuples():
    model = fuse(build(Blip2ForConditionalGeneration))
    given = dict(query_embeds=model.query_tokens, encoder_hidden_states=torch.randn(2, 17, 32))
    out, named = model.qformer(**given, return_dict=False), model.qformer(**given)
    assert isinstance(out, tuple) and len(out) == 2
    assert torch.equal(out[0], named.last_hidden_state) and torch.equal(out[1], named.pooler_output)


@torch.no_grad()
def test_many_windows_and_one_set_of_queries(calls):
    """As the projectors of Granite Speech call it."""
    model = build(Blip2ForConditionalGeneration).qformer
    given = dict(query_embeds=torch.randn(1, 3, 32), encoder_hidden_states=torch.randn(40, 15, 32))
    assert_alike(*both(model, **given, encoder_attention_mask=None))
    assert len(calls) == 1


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_padded_images_beside_text(batch, calls):
    """Plain transformers refuses these; ours are those of each sample alone, unpadded."""
    model = build(Blip2ForImageTextRetrieval).qformer
    queries, text, features = (
        torch.randn(batch, QUERIES, 32),
        torch.randn(batch, 4, 32),
        torch.randn(batch, 17, 32),
    )
    mask = (torch.arange(17) < torch.tensor([9, 17, 12])[:batch, None]).long()
    given = dict(query_embeds=torch.cat([queries, text], 1), query_length=QUERIES)
    with pytest.raises(RuntimeError):
        unfuse(model)(**given, encoder_hidden_states=features, encoder_attention_mask=mask)
    ours = fuse(model)(**given, encoder_hidden_states=features, encoder_attention_mask=mask).last_hidden_state
    assert calls
    for i in range(batch):
        alone = unfuse(model)(
            query_embeds=given["query_embeds"][i : i + 1],
            query_length=QUERIES,
            encoder_hidden_states=features[i : i + 1, mask[i].bool()],
        )
        torch.testing.assert_close(ours[i : i + 1], alone.last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_masks_that_no_layout_can_express(calls):
    model = build(Blip2ForImageTextRetrieval).qformer
    given = dict(
        query_embeds=torch.randn(2, QUERIES + 3, 32),
        query_length=QUERIES,
        encoder_hidden_states=torch.randn(2, 17, 32),
    )
    hiding = torch.ones(2, QUERIES + 3, dtype=torch.long)
    hiding[1, 2] = 0
    for mask in (hiding, torch.ones(2, 1, QUERIES + 3, QUERIES + 3, dtype=torch.bool).tril()):
        assert_alike(*both(model, **given, attention_mask=mask))
    assert not calls


def test_it_is_the_model_it_was(tmp_path):
    model = build(Blip2ForConditionalGeneration)
    names, printed = [*model.state_dict()], repr(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert fuse(model) is model and fuse(model) is model
    assert [*model.state_dict()] == names and repr(model) == printed
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert isinstance(model.qformer, Blip2QFormerModel)
    model.qformer.save_pretrained(tmp_path / "q")
    assert '"Blip2QFormerModel"' in (tmp_path / "q" / "config.json").read_text()
    assert type(Blip2QFormerModel.from_pretrained(tmp_path / "q")) is Blip2QFormerModel
    assert unfuse(model) is model and type(model.qformer) is Blip2QFormerModel
    assert "_fused_encoder" not in model.qformer.__dict__
    unfuse(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies(copied, calls):
    cls = Blip2ForConditionalGeneration
    model = fuse(build(cls))
    model(**inputs(cls))
    other = copied(model)
    model.qformer.layernorm.weight.mul_(2)
    ours = other(**inputs(cls))
    assert len(calls) == 2
    assert_alike(unfuse(other)(**inputs(cls)), ours)
    assert other.qformer(
        other.query_tokens, encoder_hidden_states=torch.randn(1, 17, 32), output_hidden_states=True
    ).hidden_states


@torch.no_grad()
def test_saved_and_loaded(tmp_path, calls):
    cls = Blip2ForConditionalGeneration
    model = fuse(build(cls))
    model.save_pretrained(tmp_path)
    with blip2_kernels.fused():
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(
            Blip2QFormerModel(Blip2QFormerConfig(num_hidden_layers=1)), drop_in.FusedBlip2QFormerModel
        )
    assert isinstance(loaded.qformer, drop_in.FusedBlip2QFormerModel)
    assert_alike(model(**inputs(cls)), loaded(**inputs(cls)), atol=0)
    assert len(calls) == 2
    assert type(cls.from_pretrained(tmp_path).qformer) is Blip2QFormerModel


@torch.no_grad()
def test_what_changes_afterwards_counts(calls):
    cls = Blip2ForConditionalGeneration
    model = fuse(build(cls))
    model(**inputs(cls))
    model.double()
    model.qformer.encoder.layer[1].register_forward_hook(lambda module, args, out: out * 1.5)
    given = doubled(inputs(cls))
    ours = model(**given)
    assert_alike(unfuse(model)(**given), ours, atol=1e-10)
    fuse(model).qformer.encoder.register_forward_pre_hook(lambda module, args: None)
    before = len(calls)
    assert_alike(unfuse(model)(**given), fuse(model)(**given), atol=0)
    assert len(calls) == before, "a hook on the encoder was gone around"


def test_gradient_checkpointing(calls):
    cls = Blip2ForConditionalGeneration
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = build(cls, **dropout).double()
    given = doubled(inputs(cls))
    found = []
    for change in (unfuse, fuse):
        change(model).train()
        model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given).logits.square().mean().backward()
        found.append([p.grad for p in model.qformer.parameters()])
    assert checkpoints(model.qformer)
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-9)


@torch.no_grad()
def test_compiled_in_one_graph(calls):
    model = build(Blip2ForConditionalGeneration).qformer
    given = dict(query_embeds=torch.randn(1, QUERIES, 32), encoder_hidden_states=torch.randn(2, 17, 32))
    plain = unfuse(model)(**given).last_hidden_state
    compiled = torch.compile(fuse(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given).last_hidden_state, plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_exported():
    model = fuse(build(Blip2ForConditionalGeneration).qformer)
    given = dict(query_embeds=torch.randn(2, QUERIES, 32), encoder_hidden_states=torch.randn(2, 17, 32))
    program = torch.export.export(model, (), given)
    torch.testing.assert_close(
        program.module()(**given).last_hidden_state, model(**given).last_hidden_state, atol=1e-5, rtol=0
    )


def test_lora(calls):
    peft = pytest.importorskip("peft")
    cls = Blip2ForConditionalGeneration
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = fuse(build(cls, **dropout)).double()
    config = peft.LoraConfig(target_modules=r".*qformer.*\.(query|value)", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    given = doubled(inputs(cls))
    found = []
    for change in (unfuse, fuse):
        change(wrapped).zero_grad()
        wrapped(**given).logits.square().mean().backward()
        found.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    assert found[0] and calls
    for name, grad in found[0].items():
        torch.testing.assert_close(
            found[1][name], grad, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        adapted = wrapped(**given).logits
        merged = wrapped.merge_and_unload()(**given).logits
    torch.testing.assert_close(merged, adapted, atol=1e-10, rtol=0)


@torch.no_grad()
def test_offloaded_by_accelerate(calls):
    accelerate = pytest.importorskip("accelerate")
    cls = Blip2ForConditionalGeneration
    model = build(cls)
    plain = model(**inputs(cls))
    accelerate.cpu_offload(fuse(model), execution_device="cpu")
    assert_alike(plain, model(**inputs(cls)))
    assert not calls


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
@torch.no_grad()
def test_other_activations(activation, calls):
    model = build(Blip2ForConditionalGeneration, hidden_act=activation)
    assert_alike(*both(model, **inputs(Blip2ForConditionalGeneration)))
    assert calls


@torch.no_grad()
def test_other_position_embeddings_stay_with_transformers(calls, caplog):
    model = build(Blip2ForConditionalGeneration)
    model.qformer.config.position_embedding_type = "relative_key"
    drop_in._say_once.cache_clear()
    for _ in range(2):
        assert_alike(*both(model, **inputs(Blip2ForConditionalGeneration)), atol=0)
    assert not calls and len(caplog.records) == 1
    assert "position embeddings are relative_key" in caplog.text


class _QFormerOfTheirOwn(Blip2QFormerModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).last_hidden_state * 2


@torch.no_grad()
def test_a_class_of_their_own_stays_as_it_is(calls, caplog):
    model = build(Blip2ForConditionalGeneration).qformer
    model.__class__ = _QFormerOfTheirOwn
    given = dict(query_embeds=torch.randn(2, QUERIES, 32), encoder_hidden_states=torch.randn(2, 17, 32))
    plain = model(**given)
    drop_in._say_once.cache_clear()
    assert torch.equal(fuse(model)(**given), plain) and not calls
    assert "_QFormerOfTheirOwn is a class of its own" in caplog.text


def test_refusals():
    with pytest.raises(
        TypeError, match=r"model: expected a module in which there is a Blip2QFormerModel, .*got a Linear"
    ):
        fuse(nn.Linear(2, 2))
    for change in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model: expected a module .* got str"):
            change("blip2")
    model = fuse(build(Blip2ForConditionalGeneration).qformer)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected image features"):
        model(torch.randn(1, QUERIES, 32))
