"""Manifests, datasets with broken files in them, collators."""

import csv
import io
import json
import random
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("PIL")
from broken_pictures import BROKEN
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blip2_kernels.model import data as data_package
from blip2_kernels.model.data import (
    CaptionCollator,
    GenerationCollator,
    ImageTextDataset,
    RandomResizedCrop,
    read_manifest,
)
from blip2_kernels.model.images import ImagePreprocessing, open_image

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "cat", "dog", "photo", "of"]


def tokenizer(*, bert: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; [CLS] and [SEP] around a text, or only [CLS] in front as decoder-only models do."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if bert else "[CLS] $A", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )


def picture(path: Path, colour=(200, 30, 60), size=(20, 14), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def write_lines(path: Path, entries) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def average(image) -> list[float]:
    return ImagePreprocessing(4, mean=(0, 0, 0), std=(1, 1, 1))(image).mean((1, 2)).mul(255).tolist()


# --- manifests ---


def test_json_lines_csv_json_and_a_folder_say_the_same(tmp_path):
    picture(tmp_path / "sub" / "a.png"), picture(tmp_path / "b.png")
    rows = [("b.png", "a dog"), ("sub/a.png", "a cat"), ("sub/a.png", "a red  cat ")]
    write_lines(tmp_path / "m.jsonl", [{"image": i, "caption": c} for i, c in rows])
    (tmp_path / "m.json").write_text(json.dumps([{"image": i, "caption": c} for i, c in rows]))
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"m{suffix}", "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("image", "caption"), *rows])
    (tmp_path / "b.txt").write_text("a dog\n")
    (tmp_path / "sub" / "a.txt").write_text("a cat\n\na red cat\n")
    manifests = [read_manifest(tmp_path / f"m{s}") for s in (".jsonl", ".json", ".csv", ".tsv")]
    manifests.append(read_manifest(tmp_path))
    for manifest in manifests:
        assert manifest.images == [tmp_path / "b.png", tmp_path / "sub" / "a.png"]
        assert [(p.image, p.caption) for p in manifest.pairs] == [
            (0, "a dog"),
            (1, "a cat"),
            (1, "a red cat"),
        ]
        assert manifest.captions_of_images() == [["a dog"], ["a cat", "a red cat"]]


def test_image_ids_join_and_lists_of_captions_and_other_keys(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    entries = [
        {"file": "a.png", "text": ["one", "two"], "image_id": 7},
        {"file": "b.png", "text": "three", "image_id": "7"},
        {"file": "c.png", "text": "four", "image_id": 7},
    ]
    path = write_lines(tmp_path / "elsewhere.jsonl", entries)
    manifest = read_manifest(path, image_key="file", caption_key="text", image_root=tmp_path)
    assert [p.image for p in manifest.pairs] == [0, 0, 1, 0]


def test_every_fault_is_named_with_its_line(tmp_path):
    picture(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "m.jsonl",
        [
            {"image": "a.png", "caption": "fine"},
            '{"image": "a.png", "caption": ',
            "",
            {"image": "a.png"},
            {"image": "a.png", "caption": " \n"},
            {"image": "gone.png", "caption": "x"},
            ["a.png", "x"],
            {"image": 3, "caption": "x"},
        ],
    )
    with pytest.raises(ValueError, match="6 faulty entries") as caught:
        read_manifest(path)
    pieces = ["line 2: not JSON", "line 4: expected a field 'caption'", "line 5: caption: expected a text"]
    for piece in [*pieces, "line 6: no such image", "line 7: expected an object, got list", "and 1 more"]:
        assert piece in str(caught.value), piece
    manifest = read_manifest(path, on_fault="skip")
    assert len(manifest.pairs) == 1 and len(manifest.faults) == 6
    assert manifest.faults[-1] == "line 8: image: expected a path, got 3"
    assert len(read_manifest(path, on_fault="skip", check_files=False).pairs) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.csv",
            "picture,caption\na.png,x\n",
            r"line 1: expected columns 'image' and 'caption', got \['picture'",
        ),
        ("m.csv", "image,caption\na.png,x\na.png,a, b\n", "line 3: expected 2 columns, got 3"),
        ("m.csv", "image,caption\na.png\n", "line 2: expected a field 'caption'"),
        ("m.csv", "", r"expected columns 'image' and 'caption', got \[\]"),
        ("m.json", '{"image": 1}', "expected a list of objects, got dict"),
        ("m.json", "[", "not JSON"),
        ("m.jsonl", "", "at least one image with a caption"),
        ("m.txt", "a", r"expected \.jsonl, \.json, \.csv, \.tsv or a folder, got 'm\.txt'"),
    ],
)
def test_refuses_manifests(tmp_path, name, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_entries_that_trip_the_reader_are_faults_like_any_other(tmp_path):
    picture(tmp_path / "a.png")
    lines = [
        '{"image": "a.png", "caption": "x"}',
        "[" * 100_000,
        json.dumps({"image": "b" * 999, "caption": "x"}),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    manifest = read_manifest(tmp_path / "m.jsonl", on_fault="skip")
    assert len(manifest.images) == 1 and [fault[:7] for fault in manifest.faults] == ["line 2:", "line 3:"]
    with pytest.raises(ValueError, match="2 faulty entries"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not JSON"):
        read_manifest(tmp_path / "m.json", on_fault="skip")


def test_refuses_folders_without_captions_and_what_is_not_there(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(
        ValueError, match=r"a\.png: no captions beside it \(a\.txt\); b\.png: b\.txt is empty"
    ):
        read_manifest(tmp_path)
    for arguments, message in (
        ({"path": 5}, "path: expected a path, got int 5"),
        ({"path": tmp_path, "image_root": 5}, "image_root: expected a path, got int 5"),
        ({"path": tmp_path, "image_key": 5}, "image_key: expected a str, got int 5"),
        ({"path": tmp_path, "check_files": "no"}, "check_files: expected a bool, got str 'no'"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            read_manifest(**arguments)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="on_fault: expected 'raise' or 'skip'"):
        read_manifest(tmp_path, on_fault="ignore")


# --- decoding ---


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_every_mode_decodes_to_the_same_colours(tmp_path, mode):
    grey = (255, 255, 255) if mode == "1" else (180, 180, 180)
    suffix = "jpg" if mode == "CMYK" else "png"
    found = average(open_image(picture(tmp_path / f"x.{suffix}", grey, mode=mode)))
    assert found == pytest.approx(grey, abs=2)


def test_16_bit_and_floating_images_keep_their_contrast(tmp_path):
    ramp = torch.arange(256, dtype=torch.int32) * 257
    image = Image.frombytes("I;16", (16, 16), ramp.to(torch.uint16).numpy().tobytes())
    image.save(tmp_path / "x.png")
    loaded = open_image(tmp_path / "x.png")
    assert loaded.mode == "L" and list(loaded.tobytes()) == list(range(256))
    for scale in (1.0, 255.0):
        values = (torch.arange(256, dtype=torch.float32) / 255 * scale).numpy().tobytes()
        Image.frombytes("F", (16, 16), values).save(tmp_path / "x.tif")
        assert list(open_image(tmp_path / "x.tif").tobytes()) == list(range(256)), scale
    Image.frombytes("I", (16, 16), ramp.numpy().tobytes()).save(tmp_path / "y.tif")
    assert list(open_image(tmp_path / "y.tif").tobytes()) == list(range(256))
    nan = torch.full((256,), float("nan")).numpy().tobytes()
    Image.frombytes("F", (16, 16), nan).save(tmp_path / "z.tif")
    with pytest.raises(OSError, match="not finite"):
        open_image(tmp_path / "z.tif")


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what is left comes up
    image.save(tmp_path / "x.jpg", exif=exif, quality=100)
    loaded = open_image(tmp_path / "x.jpg")
    assert loaded.size == (10, 20)
    assert loaded.getpixel((5, 3))[2] > 200 and loaded.getpixel((5, 16))[0] > 200


def test_random_resized_crop_stays_inside_and_follows_its_generator():
    image = Image.frombytes("L", (31, 17), bytes(i % 251 for i in range(31 * 17)))
    crop, sizes = RandomResizedCrop((0.3, 0.6)), []
    for seed in range(40):
        part = crop(image, random.Random(seed))
        assert part.tobytes() == crop(image, random.Random(seed)).tobytes()
        sizes.append(part.size[0] * part.size[1] / (31 * 17))
        assert part.size[0] <= 31 and part.size[1] <= 17
    assert 0.2 < min(sizes) < max(sizes) < 0.7 and len(set(sizes)) > 10
    flipped = {RandomResizedCrop((1, 1), (31 / 17, 31 / 17), flip=True)(image, random.Random(s)).tobytes()
               for s in range(9)}  # fmt: skip
    assert image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() in flipped and len(flipped) == 2
    with pytest.raises(ValueError, match="scale: expected"):
        RandomResizedCrop((0.0, 1.0))


# --- the dataset ---


def broken_files(folder: Path) -> list[str]:
    """Files no decoder should accept, by name."""
    buffer = io.BytesIO()
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    noise.save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "empty.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    header = bytearray(buffer.getvalue())
    header[16:24] = (60000).to_bytes(4, "big") * 2  # a bomb: 3.6 gigapixels announced
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(header)
    return ["cut.jpg", "text.png", "empty.png", "bomb.png"]


def mixed(tmp_path: Path, captions: str = "each", **options):
    """Broken images among good ones: good red, 4 broken, good blue; each with two captions."""
    names = ["red.png", *broken_files(tmp_path), "blue.png"]
    picture(tmp_path / "red.png", (255, 0, 0)), picture(tmp_path / "blue.png", (0, 0, 255))
    entries = [{"image": name, "caption": [f"first of {name}", f"second of {name}"]} for name in names]
    manifest = read_manifest(write_lines(tmp_path / "m.jsonl", entries))
    preprocess = ImagePreprocessing(6, mean=(0, 0, 0), std=(1, 1, 1))
    return ImageTextDataset(manifest, preprocess=preprocess, captions=captions, **options), names


def test_broken_images_are_named_counted_and_passed_over(tmp_path, caplog):
    dataset, names = mixed(tmp_path)
    assert len(dataset) == 12 and dataset.skipped == []
    samples = [dataset[i] for i in range(12)]
    assert [s["index"] for s in samples] == [0, 1] + [10] * 9 + [11]
    for sample in samples:
        colour = sample["pixel_values"].mean((1, 2))
        is_red = sample["image_id"] == 0
        assert colour.tolist() == pytest.approx([1, 0, 0] if is_red else [0, 0, 1], abs=1e-6)
        assert ("red.png" if is_red else "blue.png") in sample["caption"]
    assert dataset.skipped == [tmp_path / name for name in names[1:5]]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4 and all(any(name in m for m in messages) for name in names[1:5])
    assert (
        dataset.summary().startswith("6 images, 12 captions; 4 skipped: ") and "bomb.png" in dataset.summary()
    )


@BROKEN
def test_whatever_the_decoder_trips_over_is_a_broken_image(tmp_path, broken, suffix, error):
    data = broken()
    with pytest.raises(error), Image.open(io.BytesIO(data)) as image:
        image.load()
    for source in (data, tmp_path / f"broken.{suffix}"):
        (tmp_path / f"broken.{suffix}").write_bytes(data)
        with pytest.raises(OSError, match="cannot decode image: "):
            open_image(source)
    picture(tmp_path / "good.png", (255, 0, 0))
    entries = [{"image": name, "caption": name} for name in (f"broken.{suffix}", "good.png")]
    manifest = read_manifest(write_lines(tmp_path / "m.jsonl", entries))
    dataset = ImageTextDataset(manifest, preprocess=ImagePreprocessing(6))
    assert dataset[0]["caption"] == "good.png" and dataset.skipped == [tmp_path / f"broken.{suffix}"]


@pytest.mark.parametrize("error", [ImportError, MemoryError])
def test_what_is_not_the_file_s_fault_is_no_broken_image(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error("not the file's fault")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(error, match="not the file's fault"):
        open_image(picture(tmp_path / "good.png"))


def test_what_stands_in_does_not_depend_on_what_was_read_before(tmp_path):
    forward, _ = mixed(tmp_path)
    backward, _ = mixed(tmp_path)
    one = [forward[i]["index"] for i in range(12)]
    other = [backward[i]["index"] for i in reversed(range(12))][::-1]
    assert one == other
    assert backward[-1]["index"] == 11
    with pytest.raises(IndexError, match=r"index: expected a value in \[-12, 12\), got 12"):
        forward[12]


def test_workers_report_what_they_skip(tmp_path):
    dataset, names = mixed(tmp_path)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=CaptionCollator(tokenizer()))
    batches = list(loader)
    assert [len(b["image_ids"]) for b in batches] == [4, 4, 4]
    assert dataset.skipped == [tmp_path / name for name in names[1:5]]


def test_nothing_but_broken_images_is_an_error_not_a_hang(tmp_path):
    names = broken_files(tmp_path)
    manifest = read_manifest(write_lines(tmp_path / "m.jsonl", [{"image": n, "caption": "x"} for n in names]))
    dataset = ImageTextDataset(manifest, preprocess=ImagePreprocessing(4))
    with pytest.raises(ValueError, match="no image of 4 can be decoded; 4 images, 4 captions; 4 skipped"):
        dataset[0]


def test_one_random_caption_an_image_and_epoch(tmp_path):
    dataset, _ = mixed(tmp_path, captions="random", augment=RandomResizedCrop())
    assert len(dataset) == 6
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        assert sample["caption"] == dataset[0]["caption"] and sample["image_id"] == 0
        seen.add(sample["caption"])
    assert seen == {"first of red.png", "second of red.png"}


def test_features_come_from_the_cache(tmp_path):
    from torch import nn

    from blip2_kernels.model.feature_cache import FeatureCache
    from blip2_kernels.model.vision import FrozenVisionEncoder

    dataset, names = mixed(tmp_path)
    encoder = FrozenVisionEncoder(nn.Conv2d(3, 5, 2, 2), preprocessing=ImagePreprocessing(6))
    cache = FeatureCache(tmp_path / "cache", encoder)
    steps = []
    cached = ImageTextDataset(
        dataset.manifest, feature_cache=cache, progress=lambda done, total: steps.append((done, total))
    )
    assert cached.skipped == [tmp_path / name for name in names[1:5]] and steps[-1] == (6, 6)
    expected = encoder(ImagePreprocessing(6)(open_image(tmp_path / "blue.png"))[None])[0]
    sample = cached[2]
    assert sample["index"] == 10 and "pixel_values" not in sample
    torch.testing.assert_close(sample["image_features"].float(), expected, rtol=1e-3, atol=1e-3)


def test_dataset_refuses(tmp_path):
    dataset, _ = mixed(tmp_path)
    manifest, preprocess = dataset.manifest, dataset.preprocess
    for arguments, message in (
        ({}, "preprocess, feature_cache: expected exactly one of them, got neither"),
        ({"preprocess": preprocess, "captions": "all"}, "captions: expected 'each' or 'random', got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageTextDataset(manifest, **arguments)
    for arguments, message in (
        ({"preprocess": 5}, "preprocess: expected a function or None, got int 5"),
        ({"preprocess": preprocess, "augment": 5}, "augment: expected a function or None, got int 5"),
        ({"preprocess": preprocess, "progress": True}, "progress: expected a function or None, got bool"),
        ({"preprocess": preprocess, "seed": "a"}, "seed: expected an int >= 0, got str 'a'"),
        ({"feature_cache": "cache"}, "feature_cache: expected a FeatureCache or None, got str 'cache'"),
    ):
        with pytest.raises(TypeError, match=f"^{message}"):
            ImageTextDataset(manifest, **arguments)
    with pytest.raises(TypeError, match="manifest: expected a Manifest"):
        ImageTextDataset([("a.png", "x")], preprocess=preprocess)
    assert set(data_package.__all__) <= set(dir(data_package))
    with pytest.raises(AttributeError, match="no attribute 'Datasets'"):
        data_package.Datasets  # noqa: B018


# --- collators ---


def samples(*captions: str):
    return [
        {"pixel_values": torch.full((3, 2, 2), float(i)), "caption": c, "image_id": 5 + i, "index": i}
        for i, c in enumerate(captions)
    ]


def test_caption_collator_pads_cuts_and_keeps_the_end():
    batch = CaptionCollator(tokenizer(), 5, extras=True)(samples("a cat", "a red cat a dog"))
    assert batch["input_ids"].tolist() == [[1, 4, 7, 2, 0], [1, 4, 5, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["lengths"] == [4, 5] and isinstance(batch["lengths"], list)
    assert batch["image_ids"].tolist() == [5, 6] and batch["indices"] == [0, 1]
    assert batch["captions"] == ["a cat", "a red cat a dog"]
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["pixel_values"][1].eq(1).all()
    fixed = CaptionCollator(tokenizer(), 6, padding="max_length")(samples("a cat"))
    assert fixed["input_ids"].tolist() == [[1, 4, 7, 2, 0, 0]]
    assert set(fixed) == {"input_ids", "attention_mask", "image_ids", "pixel_values"}
    assert CaptionCollator(tokenizer(), 9)(samples("a cat"))["input_ids"].shape == (1, 4)


def test_generation_collator_joins_prompt_and_caption():
    collator = GenerationCollator(tokenizer(bert=False), prompt="a photo of", max_text_length=3, extras=True)
    batch = collator(samples("a cat", "a red cat a dog"))
    assert batch["input_ids"].tolist() == [[1, 4, 9, 10, 4, 7, 2], [1, 4, 9, 10, 4, 5, 2]]
    assert batch["prompt_lengths"].tolist() == [4, 4] and batch["lengths"] == [7, 7]
    assert collator.prompt_ids(2).tolist() == [[1, 4, 9, 10]] * 2
    short = GenerationCollator(tokenizer(bert=False), prompt="", max_text_length=9)
    batch = short(samples("cat", "a red dog"))
    assert batch["input_ids"].tolist() == [[1, 7, 2, 0, 0], [1, 4, 5, 8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["prompt_lengths"].tolist() == [1, 1]
    encoder = GenerationCollator(tokenizer(), prompt="photo", encoder_decoder=True)
    assert encoder.prompt_row == [1, 9, 2] and GenerationCollator(tokenizer(), prompt="photo").prompt_row == [
        1,
        9,
    ]


def test_collators_refuse():
    words = tokenizer()
    with pytest.raises(ValueError, match="max_text_length: expected an int >= 2"):
        CaptionCollator(words, 1)
    with pytest.raises(ValueError, match="padding: expected 'longest' or 'max_length', got 'max'"):
        CaptionCollator(words, padding="max")
    for collator in (CaptionCollator, GenerationCollator):
        with pytest.raises(TypeError, match="tokenizer: expected one of transformers, got str 'bert'"):
            collator("bert")
        with pytest.raises(TypeError, match="extras: expected a bool, got int 1"):
            collator(words, extras=1)
    with pytest.raises(TypeError, match="prompt: expected a str, got NoneType"):
        GenerationCollator(words, prompt=None)
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got -1"):
        GenerationCollator(words).prompt_ids(-1)
    for collator in (CaptionCollator(words), GenerationCollator(words)):
        with pytest.raises(ValueError, match="samples: expected at least one"):
            collator([])
        for wrong, message in (
            (5, "samples: expected a list of mappings, got int 5"),
            ([5], "samples: expected a list of mappings, got list"),
            ([{"pixel_values": 5, "caption": "a"}], r"samples\[0\]\['pixel_values'\]: expected a tensor"),
            ([{"pixel_values": torch.zeros(1)}], r"samples\[0\]\['caption'\]: expected a str, got NoneType"),
        ):
            with pytest.raises(TypeError, match=f"^{message}"):
                collator(wrong)
        with pytest.raises(ValueError, match=r"^samples\[1\]\['pixel_values'\]: expected \[1\], got .*\[2\]"):
            collator([{"pixel_values": torch.zeros(size), "caption": "a cat"} for size in (1, 2)])
        with pytest.raises(ValueError, match="caption: expected a text"):
            collator(samples("a cat", " "))
        with pytest.raises(ValueError, match="samples: expected one of"):
            collator([{"caption": "a cat"}])
    words.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with a padding token"):
        CaptionCollator(words)
    words.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an end-of-sequence token"):
        GenerationCollator(words)
