"""The language model's weights in the cache: there whole, or not at all."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from blip2_kernels.model.demo import assets


@pytest.fixture
def small(monkeypatch) -> LlamaForCausalLM:
    """A small model in place of what the package's file holds."""
    tokenizer = assets.load_text_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    model, load = LlamaForCausalLM(config), assets.load_pretrained
    from_pretrained = AutoTokenizer.from_pretrained

    def load_pretrained(name, kind, folder, **options):
        return model if "gguf_file" in options else load(name, kind, folder, **options)

    def load_tokenizer(folder, **options):
        return tokenizer if "gguf_file" in options else from_pretrained(folder, **options)

    monkeypatch.setattr(assets, "load_pretrained", load_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_tokenizer)
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_language_model_is_dequantised_once(small, tmp_path, monkeypatch):
    first, tokenizer = assets.load_language_model(tmp_path / "cache", torch.float32)
    assert names(tmp_path / "cache") == ["smollm2-135m-instruct"]
    for name, value in small.state_dict().items():
        assert torch.equal(first.state_dict()[name], value.bfloat16().float()), name
    assert tokenizer("a car")["input_ids"] == assets.load_text_tokenizer()("a car")["input_ids"]
    monkeypatch.setattr(assets, "_dequantise", lambda folder: pytest.fail("twice"))
    assets.load_language_model(tmp_path / "cache")


def test_a_language_model_that_is_not_saved_whole_leaves_no_trace(small, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)  # behind the weights
        with pytest.raises(OSError, match="no space left"):
            assets.load_language_model(tmp_path)
    assert names(tmp_path) == []
    assets.load_language_model(tmp_path)


def test_a_process_that_was_faster_is_not_disturbed(small, tmp_path, monkeypatch):
    save = PreTrainedTokenizerBase.save_pretrained

    def save_while_another_does(self, folder, **options):
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)
            assets._dequantise(tmp_path / "smollm2-135m-instruct")
        (tmp_path / "smollm2-135m-instruct" / "of the other").touch()
        return save(self, folder, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_while_another_does)
    assets.load_language_model(tmp_path)
    assert names(tmp_path) == ["smollm2-135m-instruct"]
    assert "of the other" in names(tmp_path / "smollm2-135m-instruct")
