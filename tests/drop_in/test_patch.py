"""`patch`: every layer stays the module it is, with fused operators in it."""

import copy
import pickle
import statistics
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from processes import clean_environment
from small_models import FAMILIES, QUERIES, assert_alike, build, doubled, inputs
from tolerances import FLOOR, assert_same_gradients, max_error
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

import blip2_kernels.encoder.epilogues as epilogues
from blip2_kernels import extension, fuse, patch, unfuse, unpatch
from blip2_kernels.encoder import Workload

CLS = Blip2ForConditionalGeneration
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LAYERS = 4
# A layer's two or three sums (self-attention, cross-attention in every second one, feed-forward).
SUMS = LAYERS * 2 + LAYERS // 2


@pytest.fixture
def operators(monkeypatch):
    """Names of the compiled operators that ran."""
    made = []
    for name in ("add_layer_norm", "bias_gelu"):
        op = getattr(epilogues, f"{name}_compiled")
        monkeypatch.setattr(
            epilogues, op.__name__, lambda *a, op=op, name=name, **k: made.append(name) or op(*a, **k)
        )
    return made


@pytest.fixture
def compiled(operators):
    """The same, where the extension was built."""
    reason = extension.device_reason("cpu")
    if reason is not None:
        pytest.skip(reason)
    return operators


def qformer_inputs(batch: int = 2, text: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of a Q-Former alone, the first sample's text padded."""
    given = {
        "query_embeds": torch.randn(batch, QUERIES + text, 32),
        "encoder_hidden_states": torch.randn(batch, 17, 32),
    }
    if text:
        mask = torch.ones(batch, QUERIES + text, dtype=torch.long)
        mask[0, -2:] = 0
        given |= {"query_length": QUERIES, "attention_mask": mask}
    return given


def classes(model) -> set[str]:
    return {type(module).__module__ for module in model.modules()}


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_every_family(cls, compiled):
    model, given = build(cls), inputs(cls)
    plain = model(**given)
    assert patch(model) is model
    assert_alike(plain, model(**given))
    assert {"add_layer_norm", "bias_gelu"} == set(compiled) and "blip2_kernels.layers" in classes(model)
    assert_alike(plain, unpatch(model)(**given), atol=0)
    assert "blip2_kernels.layers" not in classes(model)


@torch.no_grad()
def test_every_sum_of_a_layer_is_one_operator(compiled):
    model = patch(build(CLS)).qformer
    model(**qformer_inputs())
    assert (compiled.count("add_layer_norm"), compiled.count("bias_gelu")) == (SUMS, LAYERS)
    # Beside text, whose feed-forward is another.
    compiled.clear()
    model = patch(build(Blip2ForImageTextRetrieval)).qformer
    model(**qformer_inputs(text=4))
    assert (compiled.count("add_layer_norm"), compiled.count("bias_gelu")) == (SUMS + LAYERS, 2 * LAYERS)


def all_gradients(change, dtype, seed: int) -> dict[str, torch.Tensor]:
    """Of a Q-Former's weights, drawn by the seed as its inputs are."""
    own = change(build(Blip2ForImageTextRetrieval, seed=seed, **NO_DROPOUT).qformer).to(dtype).train()
    given, weight = qformer_inputs(text=4), torch.randn(2, QUERIES + 4, 32)
    arguments = {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items() if n[-1] != "h"}
    hidden = own(**arguments, query_length=QUERIES).last_hidden_state
    (hidden * weight.to(dtype)).sum().backward()
    return {n: p.grad for n, p in own.named_parameters() if not n.endswith("attention.key.bias")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients(dtype, seed):
    plain, ours = (all_gradients(change, dtype, seed) for change in (unpatch, patch))
    assert_same_gradients(ours, plain, dtype)


def test_gradients_in_half_precision(seed):
    """The error of each gradient is the mean of several draws: in a single one, some are twice as large."""
    errors = {change: defaultdict(list) for change in (unpatch, patch)}
    for draw in range(seed, seed + 8):
        truth = all_gradients(unpatch, torch.float64, draw)
        for change, its in errors.items():
            for name, gradient in all_gradients(change, torch.bfloat16, draw).items():
                scale = truth[name].abs().max()
                its[name].append(max_error(gradient.double() / scale, truth[name] / scale))
    for name, its in errors[patch].items():
        plain, ours = statistics.mean(errors[unpatch][name]), statistics.mean(its)
        assert ours <= 2 * plain + FLOOR[torch.float64], name


@torch.no_grad()
def test_hidden_states_and_attentions():
    model, given = build(CLS), qformer_inputs()
    plain = model.qformer(**given, output_hidden_states=True)
    ours = patch(model).qformer(**given, output_hidden_states=True)
    assert len(ours.hidden_states) == len(plain.hidden_states) == LAYERS + 1
    assert_alike(plain, ours)
    model = build(CLS)
    model.set_attn_implementation("eager")
    plain = model.qformer(**given, output_attentions=True)
    ours = patch(model, attention=False).qformer(**given, output_attentions=True)
    assert ours.attentions[0].shape == (2, 2, QUERIES, QUERIES)
    assert_alike(plain, ours)


def test_the_attention_is_chosen_and_given_back():
    model = build(CLS)
    model.set_attn_implementation({"qformer_config": "eager"})
    before = model.qformer.config._attn_implementation
    assert patch(patch(model)).qformer.config._attn_implementation == "blip2_kernels"
    assert model.language_model.config._attn_implementation != "blip2_kernels"
    assert unpatch(unpatch(model)).qformer.config._attn_implementation == before
    assert patch(model, attention=False).qformer.config._attn_implementation == before
    # Who chose the kernels keeps them.
    unpatch(model).qformer.set_attn_implementation("blip2_kernels")
    assert unpatch(patch(model)).qformer.config._attn_implementation == "blip2_kernels"


def test_dropout_follows_torch_s_generator(compiled):
    model = patch(build(CLS, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)).qformer.train()
    given = qformer_inputs()
    torch.manual_seed(3)
    drawn = [model(**given).last_hidden_state for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(model(**given).last_hidden_state, drawn[0]) and not torch.equal(*drawn)
    # What is dropped of a row becomes one number behind the norm.
    part, rows = model.encoder.layer[0].output_query, torch.randn(64, 4, 48)
    first, second = (part(rows, torch.zeros(64, 4, 32)) for _ in range(2))
    dropped = [(each - each.mode(-1, keepdim=True).values).abs() < 1e-6 for each in (first, second)]
    for each in dropped:
        assert abs(each.double().mean() - 0.3) < 0.03
    assert abs((dropped[0] & dropped[1]).double().mean() - 0.09) < 0.02, "each call drops other elements"


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(rate):
    rates = dict(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    model, given = patch(build(CLS, **rates)).qformer.train(), qformer_inputs()
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(7)
        model(**given).last_hidden_state.pow(3).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


@torch.no_grad()
def test_what_hangs_on_a_part_is_called():
    model, given, seen = build(CLS), qformer_inputs(), []
    layer = model.qformer.encoder.layer[1]
    for name in ("output_query.dense", "output_query.LayerNorm", "intermediate_query.dense"):
        layer.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.append(name) or 2 * o)
    plain = model.qformer(**given)
    assert_alike(plain, patch(model).qformer(**given))
    assert len(seen) == 6


def test_lora_on_every_linear_layer():
    peft = pytest.importorskip("peft")
    model, given = patch(build(CLS, **NO_DROPOUT)).double(), doubled(inputs(CLS))
    targets = r".*qformer.*\.(query|value|dense)"
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    found = []
    for change in (unpatch, patch):
        change(model).zero_grad()
        model(**given).logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 2 * SUMS
    assert_same_gradients(found[1], found[0], torch.float64)


@torch.no_grad()
def test_copies_pickles_and_checkpoints(tmp_path, compiled):
    model, given = patch(build(CLS)), inputs(CLS)
    ours = model(**given)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compiled.clear()
        assert_alike(ours, copied(**given), atol=0)
        assert compiled
        assert unpatch(copied).qformer.config._attn_implementation != "blip2_kernels"
    assert "blip2_kernels" not in repr(model) and "Patched" not in repr(model)
    model.save_pretrained(tmp_path)
    assert "blip2_kernels" not in (tmp_path / "config.json").read_text()
    again = CLS.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert "blip2_kernels.layers" not in classes(again)
    assert_alike(ours, patch(again)(**given), atol=0)


@torch.no_grad()
def test_a_pickle_opens_in_a_new_process(tmp_path):
    model = patch(build(CLS)).qformer
    given = qformer_inputs()
    torch.save((model, given, model(**given).last_hidden_state), tmp_path / "model.pt")
    code = """
        import sys, torch
        model, given, expected = torch.load(sys.argv[1], weights_only=False)
        torch.testing.assert_close(model(**given).last_hidden_state, expected)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", [(patch, fuse), (fuse, patch)], ids=["patch-fuse", "fuse-patch"])
@torch.no_grad()
def test_beside_fuse(order, calls):
    model, given = build(CLS), qformer_inputs()
    plain = model.qformer(**given, output_hidden_states=True)
    for change in order:
        change(model)
    assert_alike(plain.last_hidden_state, model.qformer(**given).last_hidden_state)
    assert len(calls) == 1 and "whole" not in model.qformer.fused_encoder.explain(Workload(2, QUERIES))
    assert_alike(plain, model.qformer(**given, output_hidden_states=True))
    assert len(calls) == 1 and "blip2_kernels.layers" in classes(model)
    assert "blip2_kernels.transformers" not in classes(unfuse(model)), "unfuse leaves patched layers alone"
    assert "blip2_kernels.layers" in classes(model) and "blip2_kernels.layers" not in classes(unpatch(model))


@torch.no_grad()
def test_compiled_and_exported():
    model, given = build(CLS).qformer, qformer_inputs()
    plain = model(**given).last_hidden_state
    patch(model)
    graph = torch.compile(
        lambda **given: model(**given).last_hidden_state, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(graph(**given), plain, atol=1e-5, rtol=0)
    exported = torch.export.export(patch(unpatch(model), attention=False), (), given, strict=False)
    assert not [node for node in exported.graph.nodes if "blip2_kernels" in str(node.target)]
    torch.testing.assert_close(exported.module()(**given).last_hidden_state, plain, atol=1e-5, rtol=0)


def test_bad_calls():
    for change in (patch, unpatch):
        with pytest.raises(TypeError, match="model: expected a module with a Q-Former of transformers, got"):
            change("model")
        with pytest.raises(TypeError, match="model: expected a module in which there is a Blip2QFormerModel"):
            change(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="attention: expected"):
        patch(build(CLS), attention="sdpa")
