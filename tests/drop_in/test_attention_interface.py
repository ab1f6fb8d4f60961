"""The attentions under transformers' own registration, the layout for `kernels`, and `Trainer`."""

import importlib.metadata
import subprocess
import sys
import textwrap

import pytest
import torch
from processes import clean_environment
from small_models import FAMILIES, QUERIES, assert_alike, build, inputs
from tolerances import assert_same_gradients
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

import blip2_kernels
import blip2_kernels.attention_interface as interface
from blip2_kernels import fuse
from blip2_kernels.hub_layout import write_layout

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def served(monkeypatch):
    """The attentions that our operator computed, by their module's class."""
    made = []
    op = interface.cross_attention
    serves = interface._serves

    def asked(module, *rest):
        made.append(type(module).__name__) if serves(module, *rest) else None
        return serves(module, *rest)

    monkeypatch.setattr(interface, "_serves", asked)
    assert blip2_kernels.register_attention() == "blip2_kernels" and op is interface.cross_attention
    return made


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_every_family_with_the_attention_alone(cls, served):
    model, given = build(cls), inputs(cls)
    model.set_attn_implementation("sdpa")
    plain = model(**given)
    model.set_attn_implementation("blip2_kernels")
    assert_alike(plain, model(**given))
    # Both attentions of the Q-Former and the image encoder's; never the language model's, which is causal.
    assert any("QFormer" in name for name in served) and not any("OPT" in name for name in served)


def test_gradients_and_dropout(served):
    model = build(Blip2ForImageTextRetrieval, **NO_DROPOUT).qformer.double().train()
    given = {
        "query_embeds": torch.randn(2, QUERIES + 4, 32, dtype=torch.float64),
        "query_length": QUERIES,
        "attention_mask": (torch.arange(QUERIES + 4) < torch.tensor([[QUERIES + 2], [QUERIES + 4]])).long(),
        "encoder_hidden_states": torch.randn(2, 17, 32, dtype=torch.float64),
    }
    found = []
    for name in ("sdpa", "blip2_kernels"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(**given).last_hidden_state.pow(3).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert len(served) == 6
    assert_same_gradients(found[1], found[0], torch.float64)
    for layer in model.encoder.layer:
        layer.attention.attention.attention_dropout = 0.3
    torch.manual_seed(3)
    drawn = [model(**given).last_hidden_state for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(3)
    assert torch.equal(model(**given).last_hidden_state, drawn[0])


@torch.no_grad()
def test_padded_images_beside_text(served):
    """transformers' own masks have the rows of queries and text together, and fail."""
    model = build(Blip2ForImageTextRetrieval).qformer
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    given = {
        "query_embeds": torch.randn(2, QUERIES + 4, 32),
        "query_length": QUERIES,
        "encoder_hidden_states": torch.randn(2, 17, 32),
        "encoder_attention_mask": mask,
    }
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError):
        model(**given)
    model.set_attn_implementation("blip2_kernels")
    alone = model(**given)
    torch.testing.assert_close(fuse(model)(**given), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_it_does_not_serve_goes_to_sdpa(served):
    model = build(Blip2ForConditionalGeneration).qformer
    model.set_attn_implementation("blip2_kernels")
    given = {"query_embeds": torch.randn(2, QUERIES, 32), "encoder_hidden_states": torch.randn(2, 17, 32)}
    causal = torch.ones(2, 1, QUERIES, QUERIES, dtype=torch.bool).tril()
    ours = model(**given, attention_mask=causal).last_hidden_state
    assert len(served) == 2, "the two cross-attentions"
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, model(**given, attention_mask=causal).last_hidden_state)


# --- the layout of the `kernels` package ---


def test_the_layout_holds_the_package_and_what_describes_it(tmp_path):
    build_folder = write_layout(tmp_path / "hub")
    assert write_layout(tmp_path / "hub") == build_folder
    for variant in build_folder.iterdir():
        assert (variant / "ops" / "cross_attention" / "triton" / "forward.py").is_file()
        assert not [*variant.rglob("*.so"), *variant.rglob("__pycache__")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="folder: expected an empty one or an older layout"):
        write_layout(tmp_path / "mine")


def test_the_layout_loads_through_kernels(tmp_path):
    """In a process of its own, which has no other blip2_kernels."""
    try:  # by its distribution: a folder of the tests has the same name
        where = str(importlib.metadata.distribution("kernels").locate_file(""))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package kernels")
    write_layout(tmp_path / "hub")
    code = """
        import sys
        from pathlib import Path
        sys.path.append(sys.argv[2])
        import kernels, torch
        from transformers import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
        ours = kernels.get_local_kernel(Path(sys.argv[1]))
        assert ours.__file__.startswith(sys.argv[1]), ours.__file__
        model = Blip2QFormerModel(Blip2QFormerConfig(hidden_size=32, num_attention_heads=2,
            num_hidden_layers=2, intermediate_size=48, encoder_hidden_size=32)).eval()
        given = dict(query_embeds=torch.randn(2, 5, 32), encoder_hidden_states=torch.randn(2, 9, 32))
        plain = model(**given).last_hidden_state
        torch.testing.assert_close(ours.fuse(model)(**given).last_hidden_state, plain, atol=1e-5, rtol=0)
        assert type(model).__module__ == "blip2_kernels.transformers"
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "hub"), where]
    done = subprocess.run(command, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Trainer ---


def test_a_fused_or_patched_model_in_transformers_trainer(tmp_path, calls):
    """Same losses and weights as plain; its checkpoint is an ordinary one."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    cls = Blip2ForConditionalGeneration
    given = inputs(cls, batch=4)
    given["labels"] = given["input_ids"]
    samples = [{name: value[i] for name, value in given.items()} for i in range(4)]
    losses, weights = [], []
    for change in (blip2_kernels.unfuse, blip2_kernels.patch, fuse):
        model = change(build(cls, **NO_DROPOUT))
        arguments = TrainingArguments(
            str(tmp_path / change.__name__), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
            gradient_checkpointing=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=samples)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][2] and calls
    for ours, trained, folder in zip(losses[1:], weights[1:], ("patch", "fuse"), strict=True):
        torch.testing.assert_close(ours, losses[0], atol=1e-4, rtol=0)
        for name, value in weights[0].items():
            if not name.endswith(
                "attention.key.bias"
            ):  # no gradient but rounding, which Adam scales to a step
                torch.testing.assert_close(trained[name], value, atol=5e-3, rtol=0, msg=name)
        again = cls.from_pretrained(tmp_path / folder / "checkpoint-3")
        assert all(type(part).__module__.partition(".")[0] != "blip2_kernels" for part in again.modules())
        for name, value in again.named_parameters():
            assert torch.equal(value, trained[name]), name

    with blip2_kernels.fused():
        trainer = Trainer(args=arguments, model_init=lambda: build(cls), train_dataset=samples)
        before = len(calls)
        trainer.train()
    assert len(calls) >= before + 3 and type(trainer.model.qformer).__module__ == "blip2_kernels.transformers"
