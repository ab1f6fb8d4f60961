"""Every script in examples/, on small random models in local folders."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from small_models import QUERIES, build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

Image = pytest.importorskip("PIL.Image")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "what", "colour", "picture")


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def save(cls: type[nn.Module], folder: Path) -> Path:
    """A checkpoint with its processor, as the hub has it."""
    try:
        from transformers import BlipImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import BlipImageProcessor as ImageProcessor
    pictures = ImageProcessor(size={"height": 16, "width": 16})
    model, words = build(cls), tokenizer()
    if "InstructBlip" in cls.__name__:
        processor = InstructBlipProcessor(pictures, words, words, num_query_tokens=QUERIES)
    else:
        processor = Blip2Processor(pictures, words, num_query_tokens=QUERIES)
    token = words.convert_tokens_to_ids("<image>")
    name = "video_token_index" if hasattr(model.config, "video_token_index") else "image_token_index"
    setattr(model.config, name, token)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (20, 24), colour).save(paths[-1])
    return [str(path) for path in paths]


def run(monkeypatch, capsys, name: str, *arguments: str) -> list[str]:
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.strip().splitlines()


def test_captions(tmp_path, monkeypatch, capsys, pictures, calls):
    folder = save(Blip2ForConditionalGeneration, tmp_path / "model")
    told = run(monkeypatch, capsys, "captions_blip2.py", str(folder), *pictures, "--beams", "2")
    assert [line.split(": ")[0].rstrip(":") for line in told] == pictures and calls


def test_retrieval(tmp_path, monkeypatch, capsys, pictures, calls):
    folder = save(Blip2ForImageTextRetrieval, tmp_path / "model")
    texts = ["a red picture", "a blue picture", "blue"]
    told = run(monkeypatch, capsys, "retrieval_blip2.py", str(folder), pictures[0], *texts)
    assert [line.split(": ")[0] for line in told] == texts and len(calls) == 3


def test_embeddings(tmp_path, monkeypatch, capsys, pictures, calls):
    folder = save(Blip2ForImageTextRetrieval, tmp_path / "model")
    told = run(monkeypatch, capsys, "embeddings_blip2.py", str(folder), *pictures, "--texts", "red", "blue")
    assert len(told) == 2 and all(line.count("=") == 2 for line in told) and len(calls) == 2


@pytest.mark.parametrize("video", [False, True])
def test_instructblip(tmp_path, monkeypatch, capsys, pictures, calls, video):
    cls = InstructBlipVideoForConditionalGeneration if video else InstructBlipForConditionalGeneration
    folder, question = save(cls, tmp_path / "model"), "what colour"
    if video:
        run(monkeypatch, capsys, "instructblip_video.py", str(folder), question, *pictures)
    else:
        run(monkeypatch, capsys, "instructblip.py", str(folder), pictures[0], question)
    assert len(calls) == 1


@pytest.mark.parametrize("layers", [False, True])
def test_fine_tuning(tmp_path, monkeypatch, capsys, pictures, calls, layers):
    pytest.importorskip("accelerate")
    folder, output = save(Blip2ForConditionalGeneration, tmp_path / "model"), tmp_path / "tuned"
    lines = [{"image": Path(path).name, "caption": f"a {Path(path).stem} picture"} for path in pictures]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--output", str(output), "--steps", "2", "--learning-rate", "0.01"]
    options += ["--layers"] if layers else []
    run(monkeypatch, capsys, "finetune_blip2.py", str(folder), str(tmp_path / "captions.jsonl"), *options)
    before, tuned = (
        Blip2ForConditionalGeneration.from_pretrained(path).state_dict() for path in (folder, output)
    )
    changed = {name.split(".")[0] for name, value in tuned.items() if not torch.equal(value, before[name])}
    assert changed == {"query_tokens", "qformer", "language_projection"} and bool(calls) != layers


@pytest.mark.parametrize(("kind", "count"), [("speech", "0.6"), ("vision", "1")])
def test_granite(monkeypatch, capsys, calls, kind, count):
    told = run(monkeypatch, capsys, "granite.py", kind, "--count", count)
    assert len(told) == 3 and float(told[2].split()[2]) < 1e-4 and len(calls) == 2


def test_every_script_is_run_here():
    text = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text] == []
