"""A fused model beside what people do with models: adapters, offloading, checkpointing, sharding, casts."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from small_models import QUERIES, assert_alike, both, build, doubled, inputs
from tolerances import assert_same_gradients, assert_yardstick
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

import blip2_kernels.encoder.layer as encoder_layer
from blip2_kernels import fuse, fused, patch, unfuse
from blip2_kernels.encoder.modules import checkpoints

CLS = Blip2ForConditionalGeneration
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def step(model, given):
    """Gradients of one training step."""
    model.zero_grad()
    model(**given).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def steps(model, given):
    """The same as the model was, and fused."""
    return step(unfuse(model), given), step(fuse(model), given)


# --- adapters ---


@pytest.mark.parametrize("cls", [CLS, InstructBlipForConditionalGeneration], ids=lambda cls: cls.__name__)
def test_lora_trains_saves_reloads_and_merges(cls, tmp_path, calls):
    peft = pytest.importorskip("peft")
    model = fuse(build(cls, **NO_DROPOUT)).double()
    config = peft.LoraConfig(
        target_modules=r".*qformer.*\.(attention|crossattention)\.attention\.(query|value)",
        init_lora_weights=False,
    )
    wrapped, given = peft.get_peft_model(model, config), doubled(inputs(cls))
    plain, ours = steps(wrapped, given)
    # Layer 0 and 2 have both attentions: query and value of each, two matrices an adapter.
    assert len(plain) == 2 * 2 * (4 + 2) and all(grad.any() for grad in plain.values())
    assert_same_gradients(ours, plain, torch.float64)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    before = wrapped(**given).logits
    optimizer.step()
    with torch.no_grad():
        adapted = wrapped(**given).logits
        assert (adapted - before).abs().max() > 1e-6
        wrapped.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(fuse(build(cls, **NO_DROPOUT)).double(), tmp_path)
        torch.testing.assert_close(again.double()(**given).logits, adapted, atol=1e-10, rtol=0)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(**given).logits, adapted, atol=1e-10, rtol=0)
        assert "whole" not in merged.qformer.fused_encoder.explain(work())
    assert len(calls) == 5


def work():
    from blip2_kernels.encoder import Workload

    return Workload(2, QUERIES)


# --- memory ---


@torch.no_grad()
def test_offloaded_by_accelerate(calls):
    accelerate = pytest.importorskip("accelerate")
    model = build(CLS)
    plain = model(**inputs(CLS))
    accelerate.cpu_offload(fuse(model), execution_device="cpu")
    assert_alike(plain, model(**inputs(CLS)), atol=0)
    assert_alike(plain, patch(model)(**inputs(CLS)))
    assert not calls
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_alike(plain, model(**inputs(CLS)))
    assert calls


def saved_bytes(model, given) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(**given)
    assert output.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_keeps_no_more_than_plain(dropout, calls):
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = build(CLS, **rates).qformer.train()
    given = {
        "query_embeds": torch.randn(8, QUERIES, 32),
        "encoder_hidden_states": torch.randn(8, 17, 32),
    }
    whole = saved_bytes(unfuse(model), given), saved_bytes(fuse(model), given)
    model.gradient_checkpointing_enable()
    plain, ours = saved_bytes(unfuse(model), given), saved_bytes(fuse(model), given)
    assert checkpoints(model) and plain < 0.5 * whole[0]
    assert ours <= 1.1 * plain, (ours, plain, whole)
    if not dropout:
        model.double()
        found = []
        for change in (unfuse, fuse):
            change(model).zero_grad()
            model(**doubled(given)).last_hidden_state.pow(3).sum().backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        for name in [name for name, grad in found[0].items() if grad is None]:
            assert found[1][name] is None or not found[1][name].any()
            del found[0][name], found[1][name]
        assert_same_gradients(found[1], found[0], torch.float64)
    assert calls


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast(dtype, calls):
    model = build(CLS, **NO_DROPOUT).qformer
    given = {"query_embeds": torch.randn(3, QUERIES, 32), "encoder_hidden_states": torch.randn(3, 17, 32)}
    weight = torch.randn(3, QUERIES, 32)

    def gradients(model, dtype=None):
        model.zero_grad()
        arguments = given if dtype is not None else doubled(given)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            hidden = model(**arguments).last_hidden_state
        (hidden * weight).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    truth = gradients(unfuse(copy.deepcopy(model)).double())
    plain, ours = gradients(unfuse(model), dtype), gradients(fuse(model), dtype)
    assert len(calls) == 1
    for name, expected in truth.items():
        assert ours[name].dtype == plain[name].dtype == torch.float32
        if name.endswith("attention.key.bias"):  # truly 0: what is computed is rounding
            assert ours[name].abs().max() <= plain[name].abs().max() + 1e-5
            continue
        scale = expected.abs().max()
        assert_yardstick(name, ours[name] / scale.float(), plain[name] / scale.float(), expected / scale)


@torch.no_grad()
def test_a_qformer_in_bf16_inside_an_fp16_load(calls):
    model = build(CLS).half()
    model.qformer.float()
    model.query_tokens.data = model.query_tokens.data.float()
    given = {n: v.half() if v.is_floating_point() else v for n, v in inputs(CLS).items()}
    truth = copy.deepcopy(model).double()(**doubled(given)).qformer_outputs.last_hidden_state
    plain = copy.deepcopy(model)
    plain.qformer.bfloat16()
    # transformers multiplies bf16 weights with fp16 features and fails: it takes them cast.
    features = plain.vision_model(given["pixel_values"]).last_hidden_state.bfloat16()
    queries = plain.query_tokens.expand(len(features), -1, -1).bfloat16()
    expected = plain.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    assert fuse(model, qformer_dtype=torch.bfloat16) is model
    assert {p.dtype for p in model.qformer.parameters()} == {torch.bfloat16}
    assert (
        model.query_tokens.dtype == torch.float32 and model.language_projection.weight.dtype == torch.float16
    )
    output = model(**given)
    ours = output.qformer_outputs.last_hidden_state
    assert output.logits.dtype == torch.float16 and ours.dtype == torch.bfloat16 and len(calls) == 1
    assert_yardstick("hidden", ours, expected, truth)


@torch.no_grad()
def test_moving_and_casting_afterwards(calls):
    model, given = fuse(build(CLS)), inputs(CLS)
    model(**given)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        ours = model(**(doubled(given) if dtype == torch.float64 else given))
        assert ours.qformer_outputs.last_hidden_state.dtype == dtype
        plain, again = both(model, **(doubled(given) if dtype == torch.float64 else given))
        assert_alike(plain, again, atol=1e-10 if dtype == torch.float64 else 1e-5)
    moved = model.to("meta")
    meta = {n: v.to("meta") for n, v in given.items()}
    hidden = moved.qformer(
        query_embeds=moved.query_tokens.expand(3, -1, -1),
        encoder_hidden_states=moved.vision_model(meta["pixel_values"]).last_hidden_state,
    ).last_hidden_state
    assert hidden.is_meta and hidden.shape == (3, QUERIES, 32)


def test_freezing_and_thawing_afterwards(calls):
    model, given = fuse(build(CLS, **NO_DROPOUT)).double(), doubled(inputs(CLS))
    everything = step(model, given)
    model.requires_grad_(False)
    assert not model(**given).logits.requires_grad
    model.qformer.encoder.layer[1].requires_grad_(True)
    plain, ours = steps(model, given)
    assert (
        plain.keys() == {n: 0 for n in everything if "qformer.encoder.layer.1." in n}.keys()
        and len(plain) > 8
    )
    assert_same_gradients(ours, plain, torch.float64)
    model.requires_grad_(True)
    assert_same_gradients(step(model, given), everything, torch.float64)
    assert len(calls) == 4


# --- sharding ---


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("change", [fuse, patch])
def test_layers_sharded_one_by_one(change, calls):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, given = build(CLS, **NO_DROPOUT).double(), doubled(inputs(CLS))
    expected = step(model, given)
    mesh = init_device_mesh("cpu", (1,))
    for layer in change(model).qformer.encoder.layer:
        fully_shard(layer, mesh=mesh)
    found = step(model, given)
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    assert_same_gradients({name: whole[name] for name in expected}, expected, torch.float64)
    if change is fuse:
        assert len(calls) == 1
        assert "layer 0 is called whole" in model.qformer.fused_encoder.explain(work())


# --- backends ---


@torch.no_grad()
def test_a_named_backend_runs_the_attentions(monkeypatch, calls):
    model, given, asked = build(CLS), inputs(CLS), []
    for name in ("self_attention", "cross_attention"):
        op = getattr(encoder_layer, name)

        def counted(*args, op=op, **options):
            asked.append(options["backend"])
            return op(*args, **options)

        monkeypatch.setattr(encoder_layer, name, counted)
    plain = model(**given)
    assert_alike(plain, fuse(model, backend="reference")(**given))
    assert len(asked) >= 4 and set(asked) == {"reference"}
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.qformer.fused_encoder.backend == "reference"
    asked.clear()
    fuse(model, backend="torch")(**given)
    assert set(asked) == {"torch"}
    with pytest.raises(ValueError, match="backend: 'triton' cannot serve this call"):
        fuse(model, backend="triton")(**given)
    assert fuse(unfuse(model)).qformer.fused_encoder.backend == "auto"
    with fused(backend="reference"):
        assert build(CLS).qformer.fused_encoder.backend == "reference"


def test_options_that_do_not_exist():
    model = build(CLS)
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'triton', 'torch'"):
        fuse(model, backend="cudnn")
    for wrong in (torch.int8, "bf16"):
        with pytest.raises(TypeError, match=r"qformer_dtype: expected a floating torch\.dtype, got"):
            fuse(model, qformer_dtype=wrong)
    assert type(model.qformer).__module__.startswith("transformers.")
