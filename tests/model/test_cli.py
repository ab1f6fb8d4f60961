"""The command line, run as a user does, on tiny models in local folders."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for needed in ("typer", "rich", "accelerate", "PIL"):
    pytest.importorskip(needed)
from broken_pictures import BROKEN  # noqa: E402
from PIL import Image  # noqa: E402
from processes import clean_environment  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from blip2_kernels.mask import MaskMode  # noqa: E402
from blip2_kernels.model import cli  # noqa: E402
from blip2_kernels.model.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from blip2_kernels.model.from_bert import (  # noqa: E402
    LAYER_NAMES,
    read_bert,
    read_bert_config,
    start_from_bert,
)
from blip2_kernels.model.pipeline import (  # noqa: E402
    build_stage1,
    caption_images,
    load_language_model,
    load_tokenizer,
    load_trained,
    load_vision,
    retrieval_scores,
)
from blip2_kernels.model.training_state import read_history  # noqa: E402

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "a", "photo", "of", "picture", *COLOURS]


def save_tokenizer(folder: Path, *, bert: bool) -> None:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "[CLS] $A [SEP]" if bert else "[CLS] $A"
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = (
        {"cls_token": "[CLS]", "sep_token": "[SEP]"} if bert else {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", **names
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Image encoder, BERT, language model, and a manifest of coloured squares, in folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained(folder / "vision")
    (folder / "vision" / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 8, "width": 8}, "do_center_crop": False})
    )
    shape = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 40, "vocab_size": len(WORDS), "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(folder / "bert")
    save_tokenizer(folder / "bert", bert=True)
    OPTForCausalLM(
        OPTConfig(
            vocab_size=len(WORDS), hidden_size=24, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=48, word_embed_proj_dim=24, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, init_std=0.3,
        )
    ).save_pretrained(folder / "opt")  # fmt: skip
    save_tokenizer(folder / "opt", bert=False)
    with open(folder / "manifest.jsonl", "w") as file:
        for name, colour in COLOURS.items():
            Image.new("RGB", (12, 10), colour).save(folder / f"{name}.png")
            file.write(json.dumps({"image": f"{name}.png", "caption": f"a {name} picture"}) + "\n")
    return folder


def run(*arguments, code: int = 0, capsys=None) -> tuple[str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (left.value.code or 0) == code, err
    return out, err


TRAIN = ("--batch-size", 4, "--device", "cpu", "--learning-rate", 3e-3, "--min-learning-rate", 1e-3)


@pytest.fixture(scope="module")
def stage1(parts, tmp_path_factory) -> Path:
    """The output folder of a short stage 1."""
    output = tmp_path_factory.mktemp("runs") / "stage1"
    arguments = [
        "train", "stage1", parts / "manifest.jsonl", "--output", output, "--vision", parts / "vision",
        "--bert", parts / "bert", "--steps", 40, "--num-query-tokens", 2, "--max-text-length", 10,
        "--embedding-width", 8, "--cache-dir", output.parent / "features", *TRAIN,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    assert not left.value.code
    return output


def test_stage_1_learns_and_leaves_a_checkpoint_that_says_how_to_be_loaded(stage1, parts):
    history = read_history(stage1)
    assert len(history) == 40 and history[-1]["loss"] < history[0]["loss"] - 0.5
    checkpoint = load_checkpoint(stage1 / "checkpoint-40")
    assert checkpoint.config["stage"] == 1 and checkpoint.config["tokenizer"] == str(parts / "bert")
    assert checkpoint.config["vision"]["name"] == str(parts / "vision")
    trained = load_trained(stage1 / "checkpoint-40")
    own = dict(trained.model.named_parameters())
    for name, value in checkpoint.state.items():
        assert torch.equal(own[name].detach(), value), name
    assert not any(name.startswith("vision_model") for name in checkpoint.state)
    assert trained.model.config.dec_token_id == len(WORDS) and not trained.model.training


def test_score_caption_and_the_second_stage_follow(stage1, parts, tmp_path, capsys):
    out, _ = run("score", stage1, parts / "manifest.jsonl", "--rerank", 2, "--device", "cpu", capsys=capsys)
    result = json.loads(out)
    assert result["images"] == result["captions"] == 4 and result["skipped"] == []
    assert (
        result["itc"]["image_to_text"]["R@1"] == 1.0 and result["itc"]["chance_image_to_text"]["R@1"] == 0.25
    )
    assert set(result["itm_reranked"]) == {"image_to_text", "text_to_image"}

    images = [parts / f"{name}.png" for name in COLOURS]
    out, _ = run(
        "caption", stage1 / "checkpoint-40", *images, "--device", "cpu", "--max-new-tokens", 5, capsys=capsys
    )
    lines = [line.split("\t") for line in out.splitlines()]
    assert [path for path, _ in lines] == [str(image) for image in images]
    assert sum(name in text for name, (_, text) in zip(COLOURS, lines, strict=True)) >= 3, lines

    second = tmp_path / "stage2"
    out, err = run(
        "train", "stage2", parts / "manifest.jsonl", "-o", second, "--stage1", stage1, "--language-model",
        parts / "opt", "--steps", 40, "--max-text-length", 8, "--save-every", 20, *TRAIN, capsys=capsys,
    )  # fmt: skip
    assert out.strip() == str(second / "checkpoint-40") and "4 images, 4 captions; 0 skipped" in err
    history = read_history(second)
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    state = load_checkpoint(second / "checkpoint-40").state
    assert {name.split(".")[0] for name in state} == {
        "query_tokens", "ln_vision", "qformer", "language_projection",
    }  # fmt: skip
    out, _ = run("caption", second, images[0], "--device", "cpu", "--max-new-tokens", 4, capsys=capsys)
    assert out.startswith(f"{images[0]}\t")
    _, err = run("score", second, parts / "manifest.jsonl", code=1, capsys=capsys)
    assert "expected one of stage 1" in err


def test_resume_goes_on_and_init_starts_from_a_checkpoint(
    stage1, parts, tmp_path, capsys, asked_to_keep_memory
):
    output = tmp_path / "more"
    asked_to_keep_memory.clear()
    options = ("--device", "cpu", "--batch-size", 4, "--warmup", 0)
    begin = ("train", "stage1", parts / "manifest.jsonl", "--init", stage1, "-o", output)
    run(*begin, "--steps", 2, *options, capsys=capsys)
    assert asked_to_keep_memory
    assert read_history(output)[0]["loss"] < read_history(stage1)[0]["loss"] - 0.5
    _, err = run(*begin, "--steps", 4, *options, code=1, capsys=capsys)
    assert "output_dir: expected a folder without checkpoints (or resume_from, --resume)" in err
    out, _ = run(*begin, "--steps", 4, "--resume", *options, capsys=capsys)
    assert out.strip().endswith("checkpoint-4")
    assert [row["step"] for row in read_history(output)] == [1, 2, 3, 4]


def test_broken_images_are_named_and_the_rest_is_done(stage1, parts, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    out, err = run("caption", stage1, broken, parts / "red.png", "--device", "cpu", code=1, capsys=capsys)
    assert out.startswith(f"{parts / 'red.png'}\t") and len(out.splitlines()) == 1
    assert "1 of 2 images cannot be decoded" in err and str(broken) in err


@BROKEN
def test_a_picture_no_decoder_can_read_stops_neither_captions_nor_scores(
    stage1, parts, tmp_path, capsys, broken, suffix, error
):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(broken())
    out, err = run("caption", stage1, path, parts / "red.png", "--device", "cpu", code=1, capsys=capsys)
    assert out.startswith(f"{parts / 'red.png'}\t") and "1 of 2 images cannot be decoded" in err
    lines = [
        json.dumps({"image": str(image), "caption": "a red picture"}) for image in (path, parts / "red.png")
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    out, _ = run("score", stage1, tmp_path / "m.jsonl", "--device", "cpu", capsys=capsys)
    assert json.loads(out)["images"] == 1 and str(path) in json.loads(out)["skipped"][0]


ONE = "train stage1 {parts}/manifest.jsonl -o {tmp} "
BOTH = ONE + "--vision {parts}/vision --bert {parts}/bert "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (BOTH.replace("manifest", "none"), "manifest: no such file or folder"),
        (ONE + "--vision {parts}/vision", "tokenizer: expected --tokenizer, --bert or --init"),
        (ONE + "--bert {parts}/bert", "vision: expected --vision"),
        (ONE + "--vision vit --bert {parts}/bert", "vision: expected 'efficientnet-lite0' or a model folder"),
        (ONE + "--vision {parts}/vision --tokenizer {tmp}", "tokenizer: expected one in"),
        (ONE + "--vision {parts}/vision --bert {parts}/opt", "bert: expected a config of model_type 'bert'"),
        (BOTH + "--steps 1 --batch-size 5", "dataset: expected at least one batch of 5 samples, got 4"),
        (BOTH + "--steps 1 --epochs 2", "steps, epochs: expected one of them"),
        (BOTH + "--qformer-config {tmp}", "Is a directory"),
        (BOTH + "--qformer-config {parts}/red.png", "qformer_config: expected JSON in"),
        (BOTH + "--cache-dir {parts}/red.png", "directory: expected a folder, got"),
        (BOTH + "--steps 1 --output {parts}/red.png/x", "output_dir: expected a folder, got"),
        (BOTH + "--epochs nan", "epochs: expected a finite number > 0, got nan"),
        (BOTH + "--epochs -1", "epochs: expected a finite number > 0, got -1"),
        ("demo --output {parts}/red.png/x", "output: expected a folder, got"),
        ("demo --output {tmp} --cache-dir {parts}/red.png", "cache_dir: expected a folder, got"),
        (BOTH + "--device tpu", "device: expected cpu or cuda, got 'tpu'"),
        (
            "train stage2 {parts}/manifest.jsonl -o {tmp} --stage1 {tmp} --language-model {parts}/opt",
            "checkpoint: expected a checkpoint or a folder of checkpoints",
        ),
        ("caption {tmp} x.png", "checkpoint: expected a checkpoint or a folder of checkpoints"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(parts, tmp_path, capsys, arguments, message):
    filled = arguments.format(parts=parts, tmp=tmp_path).split()
    _, err = run(*filled, code=1, capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("blip2-kernels: ")]
    assert len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err
    with pytest.raises((ValueError, OSError), match=message.replace("(", r"\(").split("'")[0]):
        cli.main([*filled, "--debug"])


@pytest.mark.parametrize(
    "option",
    [
        "--seed -1", "--seed 99999999999999999999", "--steps 0", "--batch-size 0", "--warmup -1",
        "--accumulate 0", "--workers -1", "--save-every 0", "--num-query-tokens 2000", "--max-text-length 1",
        "--embedding-width 0",
    ],
)  # fmt: skip
def test_numbers_out_of_range_name_their_option(parts, tmp_path, capsys, option):
    filled = f"{BOTH} {option}".format(parts=parts, tmp=tmp_path / "run").split()
    _, err = run(*filled, code=2, capsys=capsys)
    assert option.split()[0] in err and not (tmp_path / "run").exists()


def test_a_failed_start_leaves_nothing(parts, tmp_path, capsys):
    (tmp_path / "q.json").write_text('{"use_qformer_text_input": false}')
    begin = BOTH.format(parts=parts, tmp=tmp_path / "run").split()
    small = ["--num-query-tokens", 2, "--batch-size", 4, "--steps", 1, "--device", "cpu"]
    _, err = run(*begin, *small, "--qformer-config", tmp_path / "q.json", code=1, capsys=capsys)
    assert "qformer.use_qformer_text_input: expected True, since stage 1 reads text, got False" in err
    for option, message in ((("--beta2", 2), "betas: "), (("--learning-rate", "nan"), "learning_rate: ")):
        _, err = run(*begin, *small, *option, code=1, capsys=capsys)
        assert message in err
    assert not (tmp_path / "run").exists()


def test_wrong_options_and_help(capsys):
    _, err = run("train", "stage1", "m", "--stepz", 3, code=2, capsys=capsys)
    assert "--stepz" in err
    out, _ = run("--help", capsys=capsys)
    for command in ("demo", "train", "caption", "score", "version"):
        assert command in out
    for command in (("demo",), ("train", "stage1"), ("train", "stage2"), ("caption",), ("score",)):
        out, _ = run(*command, "--help", capsys=capsys)
        assert "--device" in out and "Usage" in out
    out, _ = run("version", capsys=capsys)
    assert f"torch {torch.__version__}" in out and out.startswith("blip2-kernels ")


def test_demo_hands_its_options_on(monkeypatch, capsys, tmp_path, asked_to_keep_memory):
    from blip2_kernels.model import demo

    asked_to_keep_memory.clear()
    calls, signature = [], inspect.signature(demo.run)

    def record(*arguments, **options):
        calls.append(signature.bind(*arguments, **options).arguments)

    monkeypatch.setattr(demo, "run", record)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run("demo", "--quick", "--seed", 3, "--output", tmp_path, "--no-use-fused", capsys=capsys)
    assert calls == [
        {"output_dir": tmp_path, "quick": True, "seed": 3, "use_fused": False, "cache_dir": None}
    ]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    run("demo", "--device", "cpu", "--cache-dir", tmp_path, capsys=capsys)
    assert calls[1]["cache_dir"] == tmp_path and not calls[1]["quick"] and calls[1]["use_fused"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and asked_to_keep_memory
    monkeypatch.setattr(demo, "compare", lambda **options: calls.append(options))
    run("demo", "--compare-paths", 7, "--seed", 3, "--output", tmp_path, capsys=capsys)
    assert calls.pop() == {
        "output_dir": tmp_path, "steps": 7, "quick": False, "seed": 3, "cache_dir": None
    }  # fmt: skip
    _, err = run("demo", "--device", "tpu", code=1, capsys=capsys)
    assert "device: expected cpu or cuda, got 'tpu'" in err and len(calls) == 2


def test_says_what_to_install_without_typer(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    _, err = run("version", code=1, capsys=capsys)
    assert "needs typer and rich: pip install 'blip2-kernels[train]'" in err


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "blip2_kernels.model.cli", "caption", "/nowhere", "x.png"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("blip2-kernels: checkpoint: expected") and len(done.stderr.splitlines()) == 1
    )


RANK_SCRIPT = """
import os, pathlib, sys, torch
from blip2_kernels.model import cli
try:
    cli.main(sys.argv[2:])
except SystemExit as left:
    said = f"{left.code or 0} {torch.distributed.is_initialized()}"
    pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(said)
"""


@pytest.mark.slow
def test_two_ranks_train_and_end_their_process_group(parts, tmp_path):
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        tmp_path / "script.py", tmp_path, *BOTH.format(parts=parts, tmp=tmp_path / "run").split(),
        "--steps", 1, "--num-query-tokens", 2, "--batch-size", 2, "--device", "cpu",
    ]  # fmt: skip
    environment = clean_environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 False", "0 False"]
    assert done.stdout.strip() == str(tmp_path / "run" / "checkpoint-1")


# --- what the commands are made of ---


def test_a_q_former_starts_from_bert(parts):
    vision = load_vision({"name": parts / "vision"})
    torch.manual_seed(5)
    model = build_stage1(vision, load_tokenizer(parts / "bert"), bert=parts / "bert", num_query_tokens=2)
    state, own = read_bert(parts / "bert"), dict(model.named_parameters())
    for layer in range(2):
        for source, targets in LAYER_NAMES.items():
            for target in targets:
                name = f"qformer.encoder.layer.{layer}.{target}.weight"
                assert torch.equal(own[name], state[f"encoder.layer.{layer}.{source}.weight"]), name
    words = own["embeddings.word_embeddings.weight"]
    assert torch.equal(words[:-1], state["embeddings.word_embeddings.weight"])
    assert torch.equal(words[-1], words[1]) and model.config.dec_token_id == len(words) - 1
    assert torch.equal(
        own["cls.predictions.transform.dense.weight"], state["cls.predictions.transform.dense.weight"]
    )
    # A text that reads nothing but itself comes out as BERT's own last hidden state.
    bert = BertForMaskedLM.from_pretrained(parts / "bert").eval()
    ids = torch.tensor([[1, 5, 9, 8, 2], [1, 5, 6, 2, 0]])
    mask = (ids != 0).long()
    expected = bert.bert(ids, attention_mask=mask).last_hidden_state
    for use_fused in (False, True):
        model.use_fused = use_fused
        embedded = model.eval().embeddings(ids)
        found = model.qformer(embedded, mask, query_length=0, mask=MaskMode.UNIMODAL).last_hidden_state
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.text_hidden(ids, mask), expected[:, 0], rtol=1e-4, atol=1e-5)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def test_start_from_bert_names_everything_that_does_not_fit(parts):
    vision = load_vision({"name": parts / "vision"})
    model = build_stage1(
        vision, load_tokenizer(parts / "bert"),
        qformer=SMALL,
    )  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"missing qformer\.encoder\.layer\.2.*expected \[24, 32\], got \[64, 32\]"
    ):
        start_from_bert(model, read_bert(parts / "bert"))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"qformer: expected fields of Blip2QFormerConfig, got \['layers'\]"):
        build_stage1(vision, load_tokenizer(parts / "bert"), qformer={"layers": 3})


def test_a_checkpoint_is_refused_when_what_is_around_it_changed(stage1, parts, tmp_path):
    shutil.copytree(stage1 / "checkpoint-40", tmp_path / "checkpoint-40")
    checkpoint = load_checkpoint(tmp_path / "checkpoint-40")
    vision = {**checkpoint.config["vision"], "fingerprint": "0" * 64}
    save_checkpoint(tmp_path / "a", checkpoint.state, config={**checkpoint.config, "vision": vision})
    with pytest.raises(ValueError, match="vision: expected the encoder of the training"):
        load_trained(tmp_path / "a")
    save_checkpoint(tmp_path / "b", checkpoint.state, config=checkpoint.config["model"])
    with pytest.raises(ValueError, match="expected one of `blip2-kernels train`"):
        load_trained(tmp_path / "b")
    missing = dict(list(checkpoint.state.items())[1:])
    save_checkpoint(tmp_path / "c", missing, config=checkpoint.config)
    with pytest.raises(ValueError, match="does not fit this model: missing"):
        load_trained(tmp_path / "c")


def test_a_stage_2_checkpoint_refuses_another_language_model(stage1, parts, tmp_path, capsys):
    shutil.copytree(parts / "opt", tmp_path / "opt")
    run(
        "train", "stage2", parts / "manifest.jsonl", "-o", tmp_path / "run", "--stage1", stage1,
        "--language-model", tmp_path / "opt", "--steps", 1, *TRAIN, capsys=capsys,
    )  # fmt: skip
    image = parts / "red.png"
    ask = ("caption", tmp_path / "run", image, "--device", "cpu", "--max-new-tokens", 2)
    run(*ask, capsys=capsys)
    state = load_file(tmp_path / "opt" / "model.safetensors")
    name = next(key for key in state if key.endswith("fc1.weight"))
    state[name] = state[name] + 1
    save_file(state, tmp_path / "opt" / "model.safetensors", metadata={"format": "pt"})
    _, err = run(*ask, code=1, capsys=capsys)
    assert "language_model: expected that of the training, OPTForCausalLM of " in err and ", got OPT" in err


LOADERS = {
    "vision": lambda parts: load_vision({"name": parts / "vision"}),
    "tokenizer": lambda parts: load_tokenizer(parts / "opt"),
    "language model": lambda parts: load_language_model(parts / "opt"),
    "bert": lambda parts: (read_bert_config(parts / "bert"), read_bert(parts / "bert")),
}
WIDE = '{"model_type": "opt", "hidden_size": "wide"}'


@pytest.mark.parametrize(
    ("part", "file", "content"),
    [
        ("vision", "vision/config.json", "{"),
        ("vision", "vision/config.json", '{"model_type": "nobody"}'),
        ("vision", "vision/preprocessor_config.json", '{"size": "big"}'),
        ("vision", "vision/model.safetensors", "cut"),
        ("tokenizer", "opt/tokenizer.json", "[]"),
        ("language model", "opt/config.json", "[]"),
        ("language model", "opt/config.json", WIDE),
        ("language model", "opt/model.safetensors", ""),
        ("bert", "bert/config.json", '{"model_type": "bert"}'),
        ("bert", "bert/model.safetensors", "cut"),
    ],
)
def test_a_file_of_a_model_folder_that_cannot_be_read_is_named(parts, tmp_path, part, file, content):
    load = LOADERS[part]
    shutil.copytree(parts, tmp_path / "parts")
    load(tmp_path / "parts")
    (tmp_path / "parts" / file).write_text(content)
    with pytest.raises((TypeError, ValueError), match=f"^{part}: ") as caught:
        load(tmp_path / "parts")
    assert str((tmp_path / "parts" / file).parent) in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_vision("vit"), TypeError, "vision: expected a mapping with a name, got str 'vit'"),
        (lambda: load_vision({"layer": 2}), TypeError, r"vision: expected a mapping with a name, got \['lay"),
        (lambda: load_tokenizer(5), TypeError, "tokenizer: expected a path, got int 5"),
        (lambda: load_language_model(5), TypeError, "language model: expected a path, got int 5"),
        (lambda: load_language_model("x", dtype="bf16"), TypeError, "dtype: expected a floating torch.dtype"),
        (lambda: load_trained("x", device="gpu"), ValueError, "device: expected a torch.device .* 'gpu'"),
        (lambda: load_trained("x", device=0), TypeError, "device: expected a torch.device .* got int 0"),
        (lambda: load_trained(None), TypeError, "checkpoint: expected a path, got NoneType"),
        (lambda: build_stage1("vit", None), TypeError, "vision: expected a FrozenVisionEncoder, got str"),
        (lambda: caption_images("run", []), TypeError, "trained: expected what load_trained returns"),
        (lambda: retrieval_scores(None, None, None), TypeError, "model: expected a Blip2ForPreTraining"),
    ],
)
def test_bad_arguments_of_the_loaders_are_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def load_opt(folder: Path):
    return load_language_model(folder)


def load_clip(folder: Path):
    return load_vision({"name": folder})


def load_demo_opt(folder: Path):
    from blip2_kernels.model.demo import assets

    here = folder.parent / "cache" / "smollm2-135m-instruct"
    shutil.copytree(folder, here)
    return assets.load_language_model(folder.parent / "cache")


@pytest.mark.parametrize(
    ("part", "load", "name"),
    [
        ("opt", load_opt, "language model: "),
        ("opt", load_demo_opt, "language model: "),
        ("vision", load_clip, "vision: "),
    ],
)
def test_missing_and_misshapen_weights_are_named_not_drawn(parts, tmp_path, part, load, name):
    folder = tmp_path / part
    shutil.copytree(parts / part, folder)
    state = load_file(folder / "model.safetensors")
    lost = [key for key in state if "layers.0" in key and key.endswith("weight")][:2]
    bent = next(key for key in state if "layers.0" in key and key.endswith("bias"))
    kept = {key: value for key, value in state.items() if key not in lost}
    save_file({**kept, bent: torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name) as raised:
        load(folder)
    for key in lost:
        assert f"missing {key}" in str(raised.value)
    assert f"{bent} expected {list(state[bent].shape)}, got [3]" in str(raised.value)
    assert str(raised.value).count("missing ") == 2


SMALL_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def test_an_encoder_is_read_from_a_dual_model_and_from_a_classifier(tmp_path):
    small_text = {**SMALL_VISION, "vocab_size": 20}
    CLIPModel(CLIPConfig(text_config=small_text, vision_config=SMALL_VISION)).save_pretrained(tmp_path / "a")
    assert load_vision({"name": tmp_path / "a"}).num_tokens == 5
    # A classifier has no pooler, which would be drawn anew, and be another encoder, at every loading.
    ViTForImageClassification(ViTConfig(**SMALL_VISION)).save_pretrained(tmp_path / "b")
    first, second = load_vision({"name": tmp_path / "b"}), load_vision({"name": tmp_path / "b"})
    assert first.fingerprint() == second.fingerprint() and first.width == 16
