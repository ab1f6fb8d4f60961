"""Checkpoints from LAVIS to transformers to ours and back, and what is refused on the way."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from lavis_checkpoints import KINDS, TEXT, config, language_state, lavis_state, save_lavis

for needed in ("typer", "rich"):
    pytest.importorskip(needed)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTForCausalLM,
)

from blip2_kernels.model import cli  # noqa: E402
from blip2_kernels.model.checkpoints import CheckpointError, load_checkpoint, save_checkpoint  # noqa: E402
from blip2_kernels.model.config import Blip2PreTrainingConfig  # noqa: E402
from blip2_kernels.model.conversion import containers  # noqa: E402
from blip2_kernels.model.conversion.check import check_loading  # noqa: E402
from blip2_kernels.model.conversion.configs import config_from_shapes, kind_of, model_on_meta  # noqa: E402
from blip2_kernels.model.conversion.convert import convert, plan_conversion  # noqa: E402
from blip2_kernels.model.conversion.names import FORMATS, Kind, rename  # noqa: E402
from blip2_kernels.model.generation import Blip2ForConditionalGeneration as OurGeneration  # noqa: E402
from blip2_kernels.model.pretraining import Blip2ForPreTraining  # noqa: E402
from blip2_kernels.model.training_state import trainable_state  # noqa: E402


def save_config(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(json.loads(config(kind).to_json_string(use_diff=False))))
    return path


def hop(source: Path, source_format: str, target: Path, target_format: str, **options) -> Path:
    convert(plan_conversion(source, source_format, target_format, **options), target)
    return target


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def read_lavis(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_state(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


# --- the way there and back ---


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_loses_no_bit_and_means_the_same_at_each_stop(tmp_path, kind):
    state = lavis_state(kind)
    source = save_lavis(tmp_path / "lavis.pth", state)
    settings = save_config(tmp_path, kind)
    ours = hop(source, "lavis", tmp_path / "ours", "blip2_kernels", config=settings)
    theirs = hop(ours, "blip2_kernels", tmp_path / "theirs", "transformers")
    again = hop(theirs, "transformers", tmp_path / "again", "blip2_kernels")
    back = hop(again, "blip2_kernels", tmp_path / "back.pth", "lavis")
    assert_same_state(read_lavis(back), state)

    cls = Blip2ForImageTextRetrieval if kind == "stage1" else Blip2ForConditionalGeneration
    cls = InstructBlipForConditionalGeneration if kind.startswith("instruct") else cls
    _, found = cls.from_pretrained(theirs, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]

    of_lavis = {"source": source, "source_format": "lavis", "config": settings}
    for path, form, options in (
        (ours, "blip2_kernels", of_lavis),
        (theirs, "transformers", of_lavis),
        (theirs, "transformers", {}),  # against its own plain forward
        (again, "blip2_kernels", {}),
    ):
        outputs = check_loading(path, form, **options)
        assert len(outputs) >= 3
        for output in outputs:
            # Half precision, where a language model computes in it, is compared as such.
            assert output.difference <= (1e-5 if output.tolerance < 1e-3 else 1e-2), (form, output)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_reads_the_same_in_all_directions(kind):
    state = lavis_state(kind)
    which = kind_of(state, None, "lavis")
    for name in state:
        if name.endswith(("q_bias", "v_bias")):
            continue
        for form in FORMATS:
            there, _ = rename(name, which, "lavis", form)
            assert rename(there, which, form, "lavis") == (name, True), (name, form, there)


def test_folders_that_transformers_saved_in_shards(tmp_path):
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config("opt")).half()
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    with torch.no_grad():
        model.vision_model.encoder.layers[0].self_attn.qkv.bias.zero_()
    lavis = hop(tmp_path / "theirs", "transformers", tmp_path / "lavis.pth", "lavis")
    state = read_lavis(lavis)
    assert (
        state["opt_model.lm_head.weight"].data_ptr()
        == state["opt_model.model.decoder.embed_tokens.weight"].data_ptr()
    )
    again = hop(lavis, "lavis", tmp_path / "again", "transformers", config=tmp_path / "theirs")
    loaded = Blip2ForConditionalGeneration.from_pretrained(again)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert_same_state(loaded.state_dict(), theirs.state_dict())


def test_shards_are_written_one_by_one(tmp_path, monkeypatch):
    source = save_lavis(tmp_path / "lavis.pth", lavis_state("t5"))
    monkeypatch.setattr(containers, "SHARD_BYTES", 20_000)
    theirs = hop(source, "lavis", tmp_path / "theirs", "transformers", config=save_config(tmp_path, "t5"))
    shards = sorted(theirs.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name.endswith(f"-of-{len(shards):05d}.safetensors")
    index = json.loads((theirs / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(theirs / file)
    back = hop(theirs, "transformers", tmp_path / "back.pth", "lavis")
    assert_same_state(read_lavis(back), lavis_state("t5"))


def test_what_lavis_leaves_out_of_its_training_files_comes_from_elsewhere(tmp_path):
    trained = save_lavis(tmp_path / "trained.pth", lavis_state("opt", trained_only=True))
    settings = save_config(tmp_path, "opt")
    whole = lavis_state("opt")
    # As EVA-CLIP is published: no prefix, a block more than BLIP-2 reads, a head.
    encoder = {
        name.removeprefix("visual_encoder."): value
        for name, value in whole.items()
        if name.startswith("visual_encoder.")
    }
    encoder |= {
        name.replace("blocks.1.", "blocks.2."): value
        for name, value in encoder.items()
        if name.startswith("blocks.1.")
    }
    encoder["head.weight"] = torch.zeros(2, 48)
    torch.save(encoder, tmp_path / "eva.pth")
    language = tmp_path / "opt"
    language.mkdir()
    save_file(
        {n: v.clone() for n, v in language_state("opt").items() if n != "lm_head.weight"},
        language / "model.safetensors",
    )
    (language / "config.json").write_text(config("opt").text_config.to_json_string())

    # Without them: to our format and back, since nothing is lost; to transformers, no.
    ours = hop(trained, "lavis", tmp_path / "ours", "blip2_kernels", config=settings)
    plan = plan_conversion(ours, "blip2_kernels", "lavis").plan
    assert plan.absent == ("vision_model", "language_model") and not plan.problems
    assert_same_state(
        read_lavis(hop(ours, "blip2_kernels", tmp_path / "back.pth", "lavis")),
        lavis_state("opt", trained_only=True),
    )
    with pytest.raises(
        CheckpointError, match=r"missing vision_model\.\* \(name its files with --vision\); .*"
    ):
        hop(trained, "lavis", tmp_path / "theirs", "transformers", config=settings)
    parts = {"vision": tmp_path / "eva.pth", "language_model": language}
    conversion = plan_conversion(trained, "lavis", "transformers", config=settings, **parts)
    assert "head.weight" in " ".join(conversion.plan.left_out)
    assert sum("blocks.2." in name for name in conversion.plan.left_out) == len(
        [name for name in encoder if name.startswith("blocks.2.") and "q_bias" not in name]
    )
    convert(conversion, tmp_path / "theirs")
    assert_same_state(
        read_lavis(hop(tmp_path / "theirs", "transformers", tmp_path / "whole.pth", "lavis")), whole
    )
    checked = check_loading(trained, "lavis", config=settings, **parts)
    assert all(output.agrees for output in checked)


def test_an_output_layer_of_its_own_is_not_tied(tmp_path):
    state = lavis_state("opt")
    state["opt_model.lm_head.weight"] = state["opt_model.lm_head.weight"] + 1
    source = save_lavis(tmp_path / "lavis.pth", state)
    theirs = hop(source, "lavis", tmp_path / "theirs", "transformers", config=save_config(tmp_path, "opt"))
    # transformers 5 sees that the two differ; older ones go by what the configuration says.
    assert json.loads((theirs / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False
    loaded = Blip2ForConditionalGeneration.from_pretrained(theirs)
    head, words = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    torch.testing.assert_close(head, (words + 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_what_training_saved_goes_to_lavis_and_back(tmp_path, stage):
    """As `blip2-kernels train` saves it: trained parts alone, with words about the frozen ones."""
    settings = config("stage1")
    language = OPTForCausalLM(TEXT["opt"])
    language.config.save_pretrained(tmp_path / "opt")
    whole = {"cls_token_id": 1, "sep_token_id": 2, "max_text_length": 8}
    model = Blip2ForPreTraining(Blip2PreTrainingConfig.from_blip2_config(settings, **whole))
    if stage == 2:
        model = OurGeneration.from_pretraining(model, language)
    said: dict = {
        "stage": stage,
        "model": model.config.to_dict(),
        "vision": {"name": "vit"},
        "tokenizer": "bert",
    }
    said["language_model"] = str(tmp_path / "opt")
    saved = trainable_state(model)
    save_checkpoint(tmp_path / "ours", saved, config=json.loads(json.dumps(said)))
    lavis = hop(tmp_path / "ours", "blip2_kernels", tmp_path / "lavis.pth", "lavis")
    names = read_lavis(lavis)
    assert {"ln_vision.weight", "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"} <= names.keys()
    assert ("temp" in names) == (stage == 1) and ("opt_proj.bias" in names) == (stage == 2)
    same = save_config(tmp_path, "stage1" if stage == 1 else "opt")
    back = hop(lavis, "lavis", tmp_path / "back", "blip2_kernels", config=same)
    assert_same_state(load_checkpoint(back).state, saved)
    with pytest.raises(CheckpointError, match=r"missing vision_model\.\*"):
        hop(tmp_path / "ours", "blip2_kernels", tmp_path / "theirs", "transformers")


# --- configurations from shapes ---


OPT = dict(
    model_type="opt", hidden_size=2560, word_embed_proj_dim=2560, num_attention_heads=32, num_hidden_layers=2,
    ffn_dim=10240, vocab_size=50272, max_position_embeddings=2048,
)  # fmt: skip
FLAN = dict(
    model_type="t5", vocab_size=32128, d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=2,
    num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    scale_decoder_outputs=False, relative_attention_num_buckets=32,
)  # fmt: skip
VICUNA = dict(
    model_type="llama", vocab_size=32001, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32,
    num_hidden_layers=2, intermediate_size=11008,
)  # fmt: skip
READS = dict(vocab_size=30523, max_position_embeddings=512)


@pytest.mark.parametrize(
    "kind, text, qformer",
    [
        (Kind(), OPT, READS | {"use_qformer_text_input": True}),
        (Kind("opt"), OPT, {}),
        (Kind("t5"), FLAN, {}),
        (Kind("llm", True), VICUNA, READS),
        (Kind("t5", True), FLAN, READS),
    ],
    ids=["stage 1", "OPT", "T5", "Vicuna", "instructed T5"],
)
def test_full_size_configurations_are_told_by_shapes(kind, text, qformer):
    """LAVIS's own sizes, with fewer layers of the language model."""
    cls = InstructBlipConfig if kind.instruct else Blip2Config
    wanted = cls(text_config=text, qformer_config=qformer)
    found = config_from_shapes(kind, model_on_meta(kind, wanted).state_dict())
    assert found.vision_config.to_dict() == wanted.vision_config.to_dict()
    assert found.qformer_config.to_dict() == wanted.qformer_config.to_dict()
    assert found.num_query_tokens == 32
    assert found.image_token_index == {"opt": 50265, "t5": 32100}.get(kind.language)
    assert kind.language is not None or found.image_text_hidden_size == 256
    if kind.language is not None:
        theirs = {name: getattr(found.text_config, name) for name in text}
        assert theirs == {name: getattr(wanted.text_config, name) for name in text}


def test_shapes_that_tell_no_heads_ask_for_a_configuration(tmp_path):
    source = save_lavis(tmp_path / "lavis.pth", lavis_state("opt"))
    with pytest.raises(CheckpointError, match=r"config: expected one \(--config\).* an OPT of width 24"):
        plan_conversion(source, "lavis", "blip2_kernels")


# --- the command ---


def test_the_command_converts_says_what_it_does_and_checks(tmp_path, capsys):
    source = save_lavis(tmp_path / "lavis.pth", lavis_state("stage1"))
    settings, out = save_config(tmp_path, "stage1"), tmp_path / "theirs"
    options = ("--config", settings, "--to", "transformers")
    assert run("convert", source, *options, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "ln_vision.weight -> vision_model.post_layernorm.weight" in told
    assert "blocks.0.attn.q_bias + visual_encoder.blocks.0.attn.v_bias -> vision_model" in told
    assert "carried in a file of its own: 9\n  Qformer.bert.embeddings.position_ids" in told
    assert not out.exists()
    assert run("convert", source, *options, "--from", "lavis", "-o", out) == 0
    captured = capsys.readouterr()
    assert "stage 1: " in captured.out and "9 carried" in captured.out and "convert: " in captured.err
    assert (out / "blip2_kernels.safetensors").is_file()

    assert run("convert", source, *options, "-o", out) == 1
    assert "output: expected a new path (or --overwrite)" in capsys.readouterr().err
    assert run("convert", source, *options, "-o", out, "--overwrite") == 0
    assert run("load-check", out, "--source", source, "--config", settings) == 0
    assert capsys.readouterr().out.count(" ok\n") >= 5
    file = out / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(file).items()}
    state["itm_head.weight"] += 0.1
    save_file(state, file, {"format": "pt"})
    assert run("load-check", out, "--source", source, "--config", settings) == 1
    captured = capsys.readouterr()
    assert "itm logits: " in captured.out and "got others in itm logits" in captured.err


# --- what is refused ---


def without(name):
    return lambda state: state.pop(name)


def with_value(name, change):
    return lambda state: state.update({name: change(state[name])})


LAYER = "Qformer.bert.encoder.layer.1.attention.self"
FAULTS = {
    "a missing key": (
        without(f"{LAYER}.query.bias"),
        "missing qformer.encoder.layer.1.attention.attention.query.bias",
    ),
    "an unknown key": (lambda s: s.update(other=torch.ones(1)), "unexpected other"),
    "an unknown key of a known part": (
        lambda s: s.update({f"{LAYER}.gate": torch.ones(1)}),
        "unexpected qformer.encoder.layer.1.attention.attention.gate",
    ),
    "an unknown key of the head": (
        lambda s: s.update({"Qformer.cls.predictions.gate": torch.ones(1)}),
        "unexpected Qformer.cls.predictions.gate",
    ),
    "a wrong shape": (
        with_value("text_proj.bias", lambda v: v[:-1]),
        "text_projection.bias: expected [12], got [11]",
    ),
    "a wrong shape of what is carried": (with_value("temp", lambda v: v[None]), "temp: expected [], got [1]"),
    "half a bias": (
        without("visual_encoder.blocks.1.attn.v_bias"),
        "expected visual_encoder.blocks.1.attn.q_bias",
    ),
    "NaN": (with_value("temp", lambda v: v * float("nan")), "got NaN or infinity in temp"),
    "infinity": (
        with_value("visual_encoder.pos_embed", lambda v: v / 0),
        "got NaN or infinity in visual_encoder.pos_embed",
    ),
    "no BLIP-2 at all": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("Qformer")],
        "checkpoint of LAVIS's BLIP-2",
    ),
    "no kind": (lambda s: s.pop("itm_head.weight"), "expected itm_head, opt_proj, t5_proj or llm_proj"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_one_line_and_leaves_what_was_there(tmp_path, capsys, fault):
    state = lavis_state("stage1")
    change, message = FAULTS[fault]
    change(state)
    source, out = save_lavis(tmp_path / "lavis.pth", state), tmp_path / "out"
    settings = save_config(tmp_path, "stage1")
    out.mkdir()
    (out / "manifest.json").write_text("mine")
    options = ("--config", settings, "--to", "blip2_kernels", "-o", out, "--overwrite")
    assert run("convert", source, *options) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and len([line for line in told if not line.startswith("convert: ")]) == 1
    assert [entry.name for entry in out.iterdir()] == ["manifest.json"]
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    if "NaN" not in message:
        assert run("convert", source, "--config", settings, "--to", "blip2_kernels", "--dry-run") == 1
        assert message in "".join(capsys.readouterr())


class RunsCode:
    """What a hostile pickle does: call something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, capsys, zipped):
    source, trap = tmp_path / "lavis.pth", tmp_path / "trap"
    content = {"model": lavis_state("stage1"), "extra": RunsCode(trap)}
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    assert run("convert", source, "--to", "blip2_kernels", "-o", tmp_path / "out") == 1
    assert "refused" in capsys.readouterr().err
    assert not trap.exists() and not (tmp_path / "out").exists()
    torch.load(source, weights_only=False)  # the trap is one
    assert trap.exists()


def test_old_files_that_are_no_zip_are_read(tmp_path):
    state = lavis_state("opt")
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_state(containers.read(tmp_path / "old.pth", "lavis").state, state)


@pytest.fixture
def theirs(tmp_path):
    source = save_lavis(tmp_path / "lavis.pth", lavis_state("opt"))
    return hop(source, "lavis", tmp_path / "theirs", "transformers", config=save_config(tmp_path, "opt"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def broken_folder(theirs: Path, how: str) -> None:
    file, index = theirs / "model.safetensors", theirs / "model.safetensors.index.json"
    if how == "cut":
        cut(file)
    elif how == "absent":
        file.unlink()
    elif how == "no config":
        (theirs / "config.json").unlink()
    elif how == "config cut":
        cut(theirs / "config.json")
    elif how == "carried cut":
        cut(theirs / "blip2_kernels.safetensors")
    elif how == "another model":
        (theirs / "config.json").write_text('{"model_type": "bert"}')
    else:
        names = list(load_file(file))
        shutil.move(file, theirs.parent / "stolen.safetensors")
        where = {"traversal": "../stolen.safetensors", "absolute": str(theirs.parent / "stolen.safetensors")}
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, where.get(how, "gone.safetensors"))}))
        if how == "index cut":
            cut(index)


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut", "damaged file"),
        ("absent", "expected model.safetensors or model.safetensors.index.json, got neither"),
        ("no config", "expected a folder of transformers with config.json"),
        ("config cut", "damaged file"),
        ("carried cut", "damaged file"),
        ("another model", "expected a configuration of blip-2 or instructblip, got model_type 'bert'"),
        ("traversal", "expected plain file names, got '../stolen.safetensors'"),
        ("absolute", "expected plain file names, got '/"),
        ("shard gone", "gone.safetensors is missing"),
        ("index cut", "damaged file"),
    ],
)
def test_a_broken_folder_is_refused(theirs, capsys, how, message):
    broken_folder(theirs, how)
    out = theirs.parent / "out.pth"
    assert run("convert", theirs, "--from", "transformers", "--to", "lavis", "-o", out) == 1
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told
    assert not out.exists()


def test_files_that_are_cut_changed_or_of_another_format(tmp_path, theirs, capsys):
    lavis, ours = tmp_path / "lavis.pth", hop(theirs, "transformers", tmp_path / "ours", "blip2_kernels")
    bits = bytearray((ours / "model.safetensors").read_bytes())
    bits[-5] ^= 1
    (ours / "model.safetensors").write_bytes(bits)
    cut(lavis)
    for source, form, message in (
        (lavis, "lavis", "damaged"),
        (ours, "blip2_kernels", "its SHA-256 differs"),
        (theirs, "lavis", "expected a file of LAVIS, got a folder"),
        (theirs, "blip2_kernels", "manifest.json"),
        (lavis, "transformers", "expected a folder of transformers"),
        (lavis, "blip2_kernels", "got a file"),
        (tmp_path / "nothing", "lavis", "does not exist"),
        (theirs, "flax", "source_format: expected one of lavis, transformers, blip2_kernels, got 'flax'"),
    ):
        out = tmp_path / "out"
        assert run("convert", source, "--from", form, "--to", "transformers", "-o", out) == 1
        told = capsys.readouterr().err.strip()
        assert message in told and "\n" not in told and not out.exists(), told


def test_a_bias_of_keys_has_no_place_in_lavis(tmp_path, theirs, capsys):
    file = theirs / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(file).items()}
    state["vision_model.encoder.layers.1.self_attn.qkv.bias"][60] = 1e-3
    save_file(state, file, {"format": "pt"})
    assert run("convert", theirs, "--to", "lavis", "-o", tmp_path / "out.pth") == 1
    assert "layers.1.self_attn.qkv.bias: expected zeros in its middle third" in capsys.readouterr().err
    hop(theirs, "transformers", tmp_path / "ours", "blip2_kernels")  # ours has


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, capsys, form, existing):
    source = save_lavis(tmp_path / "lavis.pth", lavis_state("opt"))
    settings, out = save_config(tmp_path, "opt"), tmp_path / "out"
    options = ("--config", settings, "--to", form, "-o", out, "--overwrite")
    before = None
    if existing:
        assert run("convert", source, *options) == 0
        before = {p: p.read_bytes() for p in ([out] if out.is_file() else sorted(out.iterdir()))}
    seen = sorted(p.name for p in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # the disk is full for larger files
    try:
        assert run("convert", source, *options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "blip2-kernels: " in capsys.readouterr().err.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == seen
    if before is not None:
        assert {p: p.read_bytes() for p in before} == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("target", FORMATS)
def test_a_conversion_loads_no_tensor_whole(tmp_path, target):
    """40 MB of vocabulary pass through; memory that is not the file's own stays far below that."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    state, settings = lavis_state("opt"), config("opt")
    words = 2**20
    settings.text_config.vocab_size = words
    table = torch.zeros(words, 24, dtype=torch.bfloat16)
    state["opt_model.lm_head.weight"] = state["opt_model.model.decoder.embed_tokens.weight"] = table
    source = save_lavis(tmp_path / "lavis.pth", state)
    (tmp_path / "c.json").write_text(settings.to_json_string(use_diff=False))
    del state, table
    hop(source, "lavis", tmp_path / "ours", "blip2_kernels", config=tmp_path / "c.json")
    before, peaks = anonymous(), []
    conversion = plan_conversion(tmp_path / "ours", "blip2_kernels", target)
    convert(conversion, tmp_path / "out", progress=lambda *_: peaks.append(anonymous()))
    assert max(peaks) - before < 24 * 2**20 < words * 24 * 2
