"""Modules changed by hooks, adapters, wrappers and shards: the plain path's result, savings declined."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from pretraining_cases import QUERIES, small_batch, small_model, some_negatives
from test_savings import assert_same_step, step
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from blip2_kernels.encoder import Saving, Workload
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask
from blip2_kernels.model.qformer import QFormerModel
from blip2_kernels.model.qformer_layers import QFormerLayer


class OwnLayer(QFormerLayer):
    """A layer somebody derived."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states * 1.1, *args, **kwargs)


class OwnQFormer(QFormerModel):
    def forward(self, *args, **kwargs):
        return scale_states(self, args, super().forward(*args, **kwargs))


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


class Wrapped(nn.Module):
    """A wrapper without a `weight`, as some quantisers and adapters are."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x) * 0.5 + 0.1


class DoublingTensor(torch.Tensor):
    """Weights with arithmetic of their own, as quantised tensors have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is nn.functional.linear:
            return (2 * out).as_subclass(torch.Tensor)
        return out


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 0.7


def layer(model, number: int = 1) -> QFormerLayer:
    return model.qformer.encoder.layer[number]


def cross(model) -> nn.Module:
    return layer(model, 2).crossattention.attention


def scale_output(factor: float):
    return lambda module, args, out: (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


def scale_states(module: nn.Module, args: tuple, out):
    """For a Q-Former, whose result has fields."""
    out.last_hidden_state = out.last_hidden_state * 1.1
    return out


def own_forward(module: nn.Module, factor: float) -> None:
    """What accelerate's hooks do: `forward` in the instance's own dictionary."""
    former = module.forward

    def forward(*args, **kwargs):
        scale = scale_states if isinstance(module, QFormerModel) else scale_output(factor)
        return scale(module, args, former(*args, **kwargs))

    module.forward = forward


def lora(model, *targets: str) -> None:
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    inject_adapter_in_model(config, model.qformer)


def replace(parent: nn.Module, name: str, make) -> None:
    setattr(parent, name, make(getattr(parent, name)))


def become(module: nn.Module, derived: type[nn.Module]) -> None:
    """Make a module one of a derived class, its parameters as they are."""
    module.__class__ = derived


def doubling(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(DoublingTensor))
    return linear


def set_rate(module: nn.Module, name: str, rate: float) -> None:
    setattr(module, name, rate)


CHANGES = {
    "a hook on a layer": (lambda m: layer(m).register_forward_hook(scale_output(1.1)), "the layer has hooks"),
    "a hook on the first layer": (
        lambda m: layer(m, 0).register_forward_hook(scale_output(1.1)),
        "layer 0 is called whole, on padded rows: the layer has hooks",
    ),
    "a hook on the last layer": (
        lambda m: layer(m, 2).register_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:])),
        "layer 2 is called whole",
    ),
    "a backward hook on a layer": (
        lambda m: layer(m).register_full_backward_hook(lambda module, gin, gout: (gin[0] * 2, *gin[1:])),
        "the layer has hooks",
    ),
    "a hook on the Q-Former": (lambda m: m.qformer.register_forward_hook(scale_states), "it has hooks"),
    "the Q-Former's own forward": (lambda m: own_forward(m.qformer, 1.1), "it has a forward of its own"),
    "a derived Q-Former": (lambda m: become(m.qformer, OwnQFormer), "it is a OwnQFormer"),
    "a hook on an attention": (
        lambda m: layer(m).attention.register_forward_hook(scale_output(0.9)),
        "attention has hooks",
    ),
    "a hook on an output block": (
        lambda m: layer(m).output_query.register_forward_hook(scale_output(0.9)),
        "output_query has hooks",
    ),
    "a hook on a dropout": (
        lambda m: layer(m).output.dropout.register_forward_hook(scale_output(0.9)),
        "output.dropout has hooks",
    ),
    "a hook on the image keys": (
        lambda m: cross(m).key.register_forward_hook(scale_output(0.9)),
        "its image key has hooks",
    ),
    "a hook on the image values": (
        lambda m: cross(m).value.register_forward_hook(scale_output(0.9)),
        "its image value has hooks",
    ),
    "a hook on a projection": (
        lambda m: layer(m).attention.attention.query.register_forward_hook(scale_output(0.9)),
        None,
    ),
    "a hook on a norm": (lambda m: layer(m).output.LayerNorm.register_forward_hook(scale_output(0.9)), None),
    "a hook on the image norm": (lambda m: m.ln_vision.register_forward_hook(scale_output(0.9)), None),
    "a layer's own forward": (lambda m: own_forward(layer(m), 1.1), "the layer has a forward of its own"),
    "an attention's own forward": (
        lambda m: own_forward(cross(m), 1.1),
        "crossattention.attention has a forward of its own",
    ),
    "the image keys' own forward": (lambda m: own_forward(cross(m).key, 1.1), "its image key has a forward"),
    "a derived layer": (
        lambda m: become(layer(m), OwnLayer),
        "the layer is a OwnLayer",
    ),
    "derived image values": (
        lambda m: become(cross(m).value, OwnLinear),
        "its image value is a OwnLinear",
    ),
    "wrapped image keys": (lambda m: replace(cross(m), "key", Wrapped), "its image key is a Wrapped"),
    "wrapped image values": (lambda m: replace(cross(m), "value", Wrapped), "its image value is a Wrapped"),
    "a wrapped query of the first layer": (
        lambda m: replace(layer(m, 0).attention.attention, "query", Wrapped),
        None,
    ),
    "a wrapped projection": (lambda m: replace(layer(m).attention.attention, "value", Wrapped), None),
    "another class of weights": (
        lambda m: replace(cross(m), "value", doubling),
        "its image value has weights of type DoublingTensor",
    ),
    "weight norm": (lambda m: weight_norm(cross(m).value), "its image value is a ParametrizedLinear"),
    "a derived image norm": (lambda m: become(m.ln_vision, OwnNorm), None),
    "a checkpointing wrapper": (
        lambda m: replace(m.qformer.encoder.layer, "1", checkpoint_wrapper),
        "layer 1 is called whole",
    ),
    "LoRA on everything": (
        lambda m: lora(m, "query", "key", "value", "dense"),
        "its image key is a Linear",
    ),
    "LoRA on queries": (lambda m: lora(m, "query"), None),
    "LoRA on keys": (lambda m: lora(m, "key"), "its image key is a Linear"),
    "LoRA on values": (lambda m: lora(m, "value"), "its image value is a Linear"),
    "LoRA on dense layers": (lambda m: lora(m, "dense"), None),
    "LoRA on queries and values": (lambda m: lora(m, "query", "value"), "its image value is a Linear"),
    "another rate of hidden dropout": (lambda m: set_rate(layer(m).output.dropout, "p", 0.6), None),
    "another rate of attention dropout": (
        lambda m: set_rate(layer(m).attention.attention, "attention_dropout", 0.6),
        None,
    ),
    "another rate of image dropout": (lambda m: set_rate(cross(m), "attention_dropout", 0.0), None),
}


LOSS_STAYS = ("rate", "dropout", "backward hook", "checkpointing", "weight norm")
"""Parts of the names of changes that alter no loss, or none in eval mode."""


def case(dropout: float = 0.0):
    model = small_model(dtype=torch.float64, dropout=dropout).train(dropout > 0)
    inputs = small_batch(4) | {"negatives": some_negatives(4)}
    return model, inputs | {"image_features": inputs["image_features"].double()}


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_result_is_the_plain_path_s(change, dropout):
    model, inputs = case(dropout)
    untouched = step(model, inputs)
    torch.manual_seed(1)
    make, said = CHANGES[change]
    make(model)
    # The plain path's cache and a checkpoint of a layer do not go together.
    expected = step(model, inputs) if "checkpointing" not in change else untouched
    if not any(word in change for word in LOSS_STAYS):
        assert (expected[0]["loss"] - untouched[0]["loss"]).abs() > 1e-6, "the change must matter"
    model.use_fused = True
    got = step(model, inputs)
    if "checkpointing" in change:
        got = got[0], {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in got[1].items()}
    assert_same_step(got, expected, torch.float64)
    explained = model.qformer.fused_encoder.explain(Workload(4, 3, images=4, image_tokens=5, gradients=True))
    assert (said is None) == (len(explained.splitlines()) == len(Saving) + 2)
    assert said is None or said in explained


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_so_is_what_is_inferred(change):
    model, inputs = case()
    torch.manual_seed(1)
    CHANGES[change][0](model)
    features = inputs["image_features"]
    expected = model.encode_image(features)
    model.use_fused = True
    torch.testing.assert_close(model.encode_image(features), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_dropout_without_gradients_is_the_plain_path_s():
    """Of attention too, where the absorbed form would be the cheaper one."""
    model, inputs = case(0.3)
    features = inputs["image_features"].repeat(1, 40, 1)

    def read() -> torch.Tensor:
        torch.manual_seed(2)
        return model.encode_image(features)

    expected = read()
    model.use_fused = True
    torch.testing.assert_close(read(), expected, rtol=0, atol=1e-10)


BAD_IMAGE_INDEX = {
    "negative": (
        torch.tensor([0, 1, 2, -1]).int(),
        ValueError,
        "with values in [0, 3), got values in [-1, 2]",
    ),
    "past the last": (torch.tensor([0, 1, 2, 3]).int(), ValueError, "with values in [0, 3), got"),
    "int64": (torch.tensor([0, 1, 2, 2]), TypeError, "expected int32 [4]"),
    "too long": (torch.tensor([0, 1, 2, 2, 1]).int(), ValueError, "expected int32 [4], got int32 [5]"),
    "missing": (None, ValueError, "expected int32 [4] where 4 samples meet 3 images, got None"),
}


@pytest.mark.parametrize("images", [3, 1])
@pytest.mark.parametrize("bad", BAD_IMAGE_INDEX)
@pytest.mark.parametrize("whole", [False, True], ids=["stock layers", "layers called whole"])
@torch.no_grad()
def test_an_image_index_that_does_not_fit_is_refused_by_every_kind_of_layer(bad, images, whole):
    """A layer that is called whole picks images by indexing, which takes -1 for the last one."""
    model, inputs = case()
    for part in model.qformer.encoder.layer if whole else ():
        part.register_forward_hook(lambda *_: None)
    encoder = model.qformer.fused_encoder
    layout = TokenLayout.from_attention_masks(QUERIES, samples=4)
    projected = encoder.project_images(inputs["image_features"][:images], norm=model.ln_vision)
    index, error, words = BAD_IMAGE_INDEX[bad]
    words = words.replace("[0, 3)", f"[0, {images})").replace("3 images", f"{images} images")
    with pytest.raises(error) as caught:
        encoder(model.query_tokens, (), layout, AttentionMask(), projected, index)
    assert str(caught.value).startswith("image_index: ") and words in str(caught.value)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_model_inside_peft(dora):
    model, inputs = case(0.3)
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=dora)
    wrapped = get_peft_model(model, config).train()
    expected = step(wrapped, inputs)
    model.use_fused = True
    assert_same_step(step(wrapped, inputs), expected, torch.float64)
    assert "lora" in next(name for name, grad in expected[1].items() if grad is not None)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@torch.no_grad()
def test_linear_layers_quantised_dynamically():
    """They have no parameters, and `weight` is a method."""
    model, inputs = case()
    model = torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)
    images = inputs["image_features"].float()
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def everything() -> list[torch.Tensor]:
        joint = model.get_multimodal_features(**texts, image_features=images)
        return [model.encode_image(images), model.get_text_features(**texts), joint]

    expected = everything()
    model.use_fused = True
    encoder = model.qformer.fused_encoder
    for _ in range(2):
        for got, truth in zip(everything(), expected, strict=True):
            # Activations are rounded to 8 bits by the range of all rows, padding included.
            torch.testing.assert_close(got, truth, rtol=0, atol=0.05 * float(truth.abs().max()))
        encoder.prepare_inference()
    explained = encoder.explain(Workload(4, 3, images=4, image_tokens=5))
    assert "its image key is a Linear" in explained


def test_a_layer_that_is_called_whole_needs_somebody_to_call_it():
    model, inputs = case()
    layer(model).register_forward_hook(scale_output(1.1))
    model.use_fused = True
    model.qformer.fused_encoder.call_layer = None
    with pytest.raises(ValueError, match=r"layer 1 that must be called whole: the layer has hooks"):
        model(**inputs)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_hooks_of_the_q_former_are_called_as_often_as_on_the_plain_path(use_fused):
    model, inputs = case()
    model.use_fused, calls = use_fused, []
    handle = model.qformer.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs)
    assert len(calls) == 4  # image, text, caption, matching
    handle.remove()
    assert model.packs == use_fused


def test_a_copy_has_an_encoder_of_its_own():
    model, inputs = case()
    model.use_fused = True
    model.qformer.fused_encoder.force(dead_rows=False)
    twin = copy.deepcopy(model)
    assert twin.qformer.fused_encoder is not model.qformer.fused_encoder
    assert twin.qformer.fused_encoder.qformer is twin.qformer
    assert not twin.qformer.fused_encoder.plan.forced, "what is forced belongs to the one it was forced on"
    # So the two leave out different things, and round differently.
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss, rtol=1e-13, atol=0)


# ------------------------------------------------------------------------------------- checkpoints and shards


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_checkpointed_layers_change_nothing(use_fused, dropout):
    model, inputs = case(dropout)
    model.train()
    expected = step(model, inputs)
    model.use_fused = use_fused
    model.qformer.gradient_checkpointing_enable()
    assert_same_step(step(model, inputs), expected, torch.float64)
    model.qformer.gradient_checkpointing_disable()
    assert_same_step(step(model, inputs), expected, torch.float64)


def test_checkpointing_is_never_reentrant():
    model, _ = case()
    with pytest.raises(ValueError, match="use_reentrant=False, the only kind here, got True"):
        model.qformer.gradient_checkpointing_enable({"use_reentrant": True})
    model.qformer.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    features = torch.randn(1, 5, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="use_cache: expected no cache where layers are checkpointed"):
        model.qformer(model.query_tokens, encoder_hidden_states=features, use_cache=True)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize("also", [None, "the Q-Former", "the model"])
@pytest.mark.usefixtures("process_group")
def test_layers_sharded_one_by_one(also, dropout):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs = case(dropout)
    expected = step(model, inputs)
    mesh = init_device_mesh("cpu", (1,))
    for part in model.qformer.encoder.layer:
        fully_shard(part, mesh=mesh)
    if also == "the Q-Former":
        fully_shard(model.qformer, mesh=mesh)
    elif also == "the model":
        fully_shard(model, mesh=mesh, ignored_params={model.temp})  # FSDP shards no scalar
    model.use_fused = True
    values, grads = step(model, inputs)
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    assert_same_step((values, whole), expected, torch.float64)
    explained = model.qformer.fused_encoder.explain(Workload(4, 3, images=4, image_tokens=5))
    assert "layer 0 is called whole" in explained and "FSDPQFormerLayer" in explained
