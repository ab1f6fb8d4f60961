"""What a stage-1 step keeps for its backward: bytes of distinct storages, parameters and inputs left out."""

import math

import pytest
import torch
from test_fused_flops import batch, build
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from blip2_kernels.encoder import Saving


def saved_bytes(model: nn.Module, inputs: dict) -> int:
    """Bytes that the graph of the loss holds on to."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    saved: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t  # alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(**inputs).loss
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    loss.backward()  # the graph was whole
    return total


def both_paths(model: nn.Module, inputs: dict) -> tuple[int, int]:
    sizes = []
    for use_fused in (False, True):
        model.use_fused = use_fused
        sizes.append(saved_bytes(model, inputs))
    return sizes[0], sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["calm", "dropout"])
@pytest.mark.parametrize(("tokens", "limit"), [(257, 0.65), (677, 0.55)])
def test_a_stage_1_step_keeps_half_of_what_the_plain_path_keeps(tokens, limit, dropout):
    model = build()
    if dropout:
        rates = model.config.qformer.hidden_dropout_prob, model.config.qformer.attention_probs_dropout_prob
        assert rates == (dropout, dropout)
        model.train()
    plain, fused = both_paths(model, batch(model, 2, tokens))
    print(f"{fused / 2e6:.0f} of {plain / 2e6:.0f} MB a pair: {fused / plain:.3f}")
    assert fused <= limit * plain


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["calm", "dropout"])
def test_the_backward_fills_and_copies_nothing_of_an_image_s_size(dropout):
    """Keys and values get one gradient a pass, the second added to the first in place; no gradient of images
    starts from zeros, and none is gathered from copies."""
    samples, tokens, hidden, width = 3, 41, 64, 56
    sizes = dict(vocab_size=128, hidden_size=hidden, num_attention_heads=2, intermediate_size=100)
    sizes |= dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = build(**sizes, num_hidden_layers=4, encoder_hidden_size=width).train()
    loss = model(**batch(model, samples, tokens)).loss
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss.backward()
    large = {times * samples * tokens * channels for times in (1, 3) for channels in (hidden, width)}
    seen: dict[str, int] = {}
    for event in profiler.events():
        # Shapes of what an operator reads, and the sizes it is asked for.
        shapes = [*event.input_shapes, *event.concrete_inputs]
        if any(_is_shape(shape) and math.prod(shape) in large for shape in shapes):
            seen[event.name] = seen.get(event.name, 0) + 1
    print(seen)
    assert not {"aten::new_zeros", "aten::_index_put_impl_", "aten::index_add_"} & seen.keys(), seen
    layers = sum(hasattr(layer, "crossattention") for layer in model.qformer.encoder.layer)
    assert seen.get("aten::add_") == 2 * layers and "aten::add" not in seen, seen


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list | tuple) and bool(shape) and all(isinstance(size, int) for size in shape)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [257, 677])
def test_checkpointed_it_keeps_no_more_than_the_plain_path_checkpointed(tokens):
    model = build().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model.config.qformer.hidden_dropout_prob = model.config.qformer.attention_probs_dropout_prob = 0.0
    inputs = batch(model, 2, tokens)
    model.use_fused = False
    whole = saved_bytes(model, inputs)
    model.qformer.gradient_checkpointing_enable()
    plain, fused = both_paths(model, inputs)
    print(f"{fused / 2e6:.0f} of {plain / 2e6:.0f} MB a pair: {fused / plain:.3f}")
    assert plain < 0.5 * whole, "nothing was checkpointed"
    assert fused <= 1.1 * plain


def test_an_image_sized_copy_would_be_noticed():
    """The canary: features kept once a sample exceed the limit."""
    sizes = dict(vocab_size=128, hidden_size=64, num_attention_heads=2, intermediate_size=128)
    model = build(**sizes, num_hidden_layers=4, encoder_hidden_size=96)
    inputs = batch(model, 2, 400)
    plain, fused = both_paths(model, inputs)
    assert fused <= 0.55 * plain
    model.qformer.fused_encoder.force(**{Saving.PROJECT_ONCE.value: False})
    assert saved_bytes(model, inputs) > 0.55 * plain
