"""From folders and files to models and back: what the command line is made of.

A checkpoint of the command line says how to build everything that is not in it: which image encoder,
tokenizer and language model (`config.json`: `stage`, `model`, `vision`, `tokenizer`, …). Checkpoints of
:func:`~blip2_kernels.model.train.train` with another `checkpoint_config` are not loaded here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2_kernels.checks import FLOATING, check_device, check_function, check_int, describe

from .base import Blip2Base
from .checkpoints import load_checkpoint
from .config import Blip2PreTrainingConfig
from .data.collate import GenerationCollator
from .data.manifest import Manifest
from .evaluate import positives_from_ids, recall_at, retrieval_metrics
from .from_bert import qformer_config_from_bert, read_bert, read_bert_config, start_from_bert
from .generation import Blip2ForConditionalGeneration
from .generation_config import Blip2GenerationConfig
from .images import ImagePreprocessing, open_image
from .pretrained import check_model_folder, load_pretrained, read_config, read_json
from .pretraining import Blip2ForPreTraining
from .retrieval import Blip2ForImageTextRetrieval
from .training_state import load_trainable_state
from .vision import FrozenVisionEncoder, load_efficientnet_lite0

EFFICIENTNET = "efficientnet-lite0"
# What a checkpoint of each stage says of what is around the model.
SURROUNDINGS = {
    1: ("stage", "model", "vision", "tokenizer"),
    2: ("stage", "model", "vision", "tokenizer", "language_model", "prompt"),
}


@dataclass
class Trained:
    """A model as it comes out of a checkpoint, with the tokenizer its captions are written in.

    Attributes:
        stage: 1 or 2.
        model: `Blip2ForPreTraining` or `Blip2ForConditionalGeneration`, in eval mode, with its image encoder.
        tokenizer: of the Q-Former's texts (stage 1) or of the language model (stage 2).
        config: what the checkpoint says.
    """

    stage: int
    model: Any
    tokenizer: Any
    config: dict[str, Any]

    @property
    def vision(self) -> FrozenVisionEncoder:
        return self.model.vision_model


def load_vision(vision: Mapping[str, Any]) -> FrozenVisionEncoder:
    """The image encoder that a description names.

    Args:
        vision: `name`: `"efficientnet-lite0"` or a transformers model folder (of an image encoder, or of a
            model with a `vision_model`, as CLIP and BLIP-2 have); `layer`: entry of its hidden states, `None`
            for the last.

    Raises:
        TypeError: no such description.
        FileNotFoundError: neither of the two.
        ImportError: a package is missing.
        ValueError: a layer where there are none; a file that cannot be read; weights that are missing or of
            another shape, all named.
    """
    if not isinstance(vision, Mapping) or "name" not in vision:
        got = sorted(vision) if isinstance(vision, Mapping) else describe(vision)
        raise TypeError(f"vision: expected a mapping with a name, got {got}")
    name, layer = str(vision["name"]), vision.get("layer")
    if name == EFFICIENTNET:
        if layer is not None:
            raise ValueError(f"vision layer: expected none for {EFFICIENTNET}, got {layer}")
        return load_efficientnet_lite0()
    folder = check_model_folder("vision", name, f"{EFFICIENTNET!r} or ")
    from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

    # The vision towers of dual encoders are classes of their own, which read the dual model's folder.
    towers = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    config = read_config("vision", folder)
    loader = towers.get(config.model_type, AutoModel)
    # A pooler reads the features and makes none; the folder of a classifier has none.
    model: Any = load_pretrained("vision", loader, folder, optional=("pooler",))
    inner = getattr(model, "vision_model", None)
    if isinstance(inner, nn.Module) and config.model_type not in towers:
        model = inner
    return FrozenVisionEncoder(model, layer=layer, preprocessing=_preprocessing(folder, model))


def _preprocessing(folder: Path, model: Any) -> ImagePreprocessing:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        try:
            return ImagePreprocessing.from_dict(read_json("vision", path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"vision: cannot use {path}: {error}") from error
    size = getattr(model.config, "image_size", None)
    if size is None:
        raise FileNotFoundError(
            f"vision: expected preprocessor_config.json in {folder}, or an image_size in config.json"
        )
    return ImagePreprocessing(size if isinstance(size, int) else tuple(size))


def load_tokenizer(folder: str | Path) -> Any:
    """A tokenizer from a local folder; nothing is fetched.

    Raises:
        TypeError: no path.
        FileNotFoundError: no such folder.
        ValueError: no tokenizer in it.
    """
    from transformers import AutoTokenizer

    if not isinstance(folder, str | Path):
        raise TypeError(f"tokenizer: expected a path, got {describe(folder)}")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer: expected a local folder, got {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its parser in Rust raises nothing narrower
        raise ValueError(f"tokenizer: expected one in {folder}: {error}") from error


def load_language_model(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A causal or sequence-to-sequence language model from a local folder, in `dtype` (default: as
    stored).

    Raises:
        TypeError: no path, or no dtype.
        FileNotFoundError: no `config.json` there.
        ValueError: a file that cannot be read, or no language model; weights that are missing or of another
            shape, all named.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating torch.dtype or None, got {dtype!r}")
    config = read_config("language model", folder)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return load_pretrained("language model", loader, folder, dtype=dtype or "auto")


def special_token(tokenizer: Any, *names: str) -> int:
    """Id of the first of the special tokens that the tokenizer has, e.g. `"cls_token_id", "bos_token_id"`."""
    for name in names:
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise ValueError(f"tokenizer: expected one with {' or '.join(names)}, got neither")


def build_stage1(
    vision: FrozenVisionEncoder,
    tokenizer: Any,
    *,
    bert: str | Path | None = None,
    qformer: Mapping[str, Any] | None = None,
    num_query_tokens: int = 32,
    max_text_length: int = 32,
    embedding_width: int = 256,
    use_fused: bool = True,
) -> Blip2ForPreTraining:
    """A new stage-1 model around an image encoder and a BERT-like tokenizer.

    Args:
        bert: a BERT folder to start from; default: BERT-base's shape, random weights.
        qformer: fields of `Blip2QFormerConfig` that differ.
        embedding_width: of the space in which images and texts are compared.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown field, a tokenizer without the special tokens, a BERT that does not fit.
    """
    from transformers import Blip2QFormerConfig

    if not isinstance(vision, FrozenVisionEncoder):
        raise TypeError(f"vision: expected a FrozenVisionEncoder, got {describe(vision)}")
    if qformer is not None and not isinstance(qformer, Mapping):
        raise TypeError(f"qformer: expected a mapping of fields, got {describe(qformer)}")
    fields = dict(qformer or {})
    known = vars(Blip2QFormerConfig())
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"qformer: expected fields of Blip2QFormerConfig, got {unknown}")
    if fields.get("use_qformer_text_input", True) is not True:
        raise ValueError(
            "qformer.use_qformer_text_input: expected True, since stage 1 reads text, got "
            f"{fields['use_qformer_text_input']!r}"
        )
    vocabulary = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    fields["encoder_hidden_size"] = vision.width
    if bert is not None:
        vocabulary = max(vocabulary, read_bert_config(bert)["vocab_size"])
        config = qformer_config_from_bert(bert, vocab_size=vocabulary + 1, **fields)
    else:
        config = Blip2QFormerConfig(
            **{**fields, "vocab_size": vocabulary + 1, "use_qformer_text_input": True}
        )
    model = Blip2ForPreTraining(
        Blip2PreTrainingConfig(
            config,
            num_query_tokens=num_query_tokens,
            image_text_hidden_size=embedding_width,
            pad_token_id=special_token(tokenizer, "pad_token_id"),
            cls_token_id=special_token(tokenizer, "cls_token_id", "bos_token_id"),
            sep_token_id=special_token(tokenizer, "sep_token_id", "eos_token_id"),
            max_text_length=max_text_length,
        ),
        vision_model=vision,
        use_fused=use_fused,
    )
    if bert is not None:
        start_from_bert(model, read_bert(bert))
    return model


def load_trained(
    checkpoint: str | Path, *, device: str | torch.device = "cpu", use_fused: bool = True
) -> Trained:
    """Builds the model of a checkpoint of the command line, with everything around it.

    Raises:
        TypeError: an argument of the wrong kind.
        FileNotFoundError, CheckpointError: no such checkpoint, or a damaged one; an image encoder, tokenizer
            or language model that is no longer where it was.
        ValueError: a checkpoint that does not say what is around the model; an image encoder or language
            model with other weights than in training; a device that is not here.
    """
    if not isinstance(checkpoint, str | Path):
        raise TypeError(f"checkpoint: expected a path, got {describe(checkpoint)}")
    device = check_device("device", device)
    loaded = load_checkpoint(checkpoint)
    config = loaded.config
    needed = SURROUNDINGS.get(config.get("stage"), SURROUNDINGS[1])
    if config.get("stage") not in SURROUNDINGS or not set(needed) <= set(config):
        raise ValueError(
            f"checkpoint: expected one of `blip2-kernels train` (config.json with {', '.join(needed)}), got "
            f"{sorted(config)} in {checkpoint}"
        )
    vision = load_vision(config["vision"])
    fingerprint = config["vision"].get("fingerprint")
    if fingerprint is not None and fingerprint != vision.fingerprint():
        raise ValueError(
            f"vision: expected the encoder of the training, {fingerprint[:12]}, got another, "
            f"{vision.fingerprint()[:12]}: {config['vision']['name']} has changed since"
        )
    tokenizer = load_tokenizer(config["tokenizer"])
    model: nn.Module
    if config["stage"] == 1:
        model = Blip2ForPreTraining(
            Blip2PreTrainingConfig.from_dict(config["model"]), vision_model=vision, use_fused=use_fused
        )
    else:
        model = Blip2ForConditionalGeneration(
            Blip2GenerationConfig.from_dict(config["model"]),
            language_model=load_language_model(config["language_model"]),
            vision_model=vision,
            use_fused=use_fused,
        )
    load_trainable_state(model, loaded)
    return Trained(config["stage"], model.to(device).eval(), tokenizer, config)


def features_of(model: Any, images: list[Any], device: torch.device) -> Tensor:
    """Frozen features [B, N, width] of PIL images."""
    vision = model.vision_model
    pixels = torch.stack([vision.preprocess(image) for image in images]).to(device)
    return vision(pixels)


@torch.no_grad()
def caption_images(
    trained: Trained,
    paths: Sequence[str | Path],
    *,
    prompt: str | None = None,
    max_new_tokens: int = 30,
    num_beams: int = 1,
    batch_size: int = 16,
) -> list[str | None]:
    """A caption for each image; `None` where the image cannot be decoded.

    Args:
        prompt: words to go on from; default: the prompt of the training (stage 2), none (stage 1).

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """
    from .captioning import generate_captions

    if not isinstance(trained, Trained):
        raise TypeError(f"trained: expected what load_trained returns, got {describe(trained)}")
    if isinstance(paths, str | Path) or not isinstance(paths, Sequence):
        raise TypeError(f"paths: expected a list of image files, got {describe(paths)}")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a str or None, got {describe(prompt)}")
    for name, number in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        check_int(name, number, 1)
    check_int("batch_size", batch_size, 1)
    device = trained.model.query_tokens.device
    captions: list[str | None] = [None] * len(paths)
    images = []
    for index, path in enumerate(paths):
        try:
            images.append((index, open_image(path)))
        except OSError:
            continue
    tokenizer = trained.tokenizer
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        features = features_of(trained.model, [image for _, image in chunk], device)
        options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        if trained.stage == 1:
            words = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
            if words:
                options["prompt_ids"] = torch.tensor([words], device=device)
            ids = generate_captions(trained.model, features, **options)
        else:
            collator = GenerationCollator(
                tokenizer,
                prompt=trained.config["prompt"] if prompt is None else prompt,
                encoder_decoder=trained.model.is_encoder_decoder,
            )
            row = collator.prompt_ids(len(chunk)).to(device)
            ids = trained.model.generate(
                image_features=features, input_ids=row, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=collator.filler, **options,
            )  # fmt: skip
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for (index, _), text in zip(chunk, texts, strict=True):
            captions[index] = " ".join(text.split())
    return captions


@torch.no_grad()
def retrieval_scores(
    model: Blip2Base,
    tokenizer: Any,
    manifest: Manifest,
    *,
    limit: int = 1000,
    rerank: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Retrieval among the first `limit` images of a manifest and all their captions.

    Features of all images are held in memory: about 1.4 MB an image of 257 tokens x 1408.

    Args:
        rerank: candidates a query whose ITC score is replaced by ITM + ITC; 0 for none.

    Returns:
        `itc` (and `itm_reranked`): see :func:`~blip2_kernels.model.evaluate.retrieval_metrics`; `images`,
        `captions` counted; `skipped`, images that cannot be decoded.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value; not one image that can be decoded.
    """
    if not isinstance(model, Blip2Base):
        raise TypeError(f"model: expected a Blip2ForPreTraining, got {describe(model)}")
    if not isinstance(manifest, Manifest):
        raise TypeError(f"manifest: expected a Manifest (see read_manifest), got {describe(manifest)}")
    check_int("limit", limit, 1)
    check_int("rerank", rerank, 0)
    check_int("batch_size", batch_size, 1)
    check_function("progress", progress)
    device = model.query_tokens.device
    captions_of, kept, features, skipped = manifest.captions_of_images(), [], [], []
    images: list[tuple[int, Any]] = []
    total = min(limit, len(manifest.images))
    for index, path in enumerate(manifest.images[:total]):
        try:
            images.append((index, open_image(path)))
        except OSError as error:
            skipped.append(f"{path}: {error}")
        if images and (len(images) == batch_size or index == total - 1):
            kept += [image for image, _ in images]
            features.append(features_of(model, [picture for _, picture in images], device))
            images = []
        if progress is not None:
            progress(index + 1, total)
    if not features:
        raise ValueError(
            f"manifest: expected an image that can be decoded, got {total} broken ones: {skipped[:3]}"
        )
    captions = [caption for image in kept for caption in captions_of[image]]
    text_ids = torch.tensor([row for row, image in enumerate(kept) for _ in captions_of[image]])
    texts = tokenizer(
        captions, padding=True, truncation=True, max_length=model.config.max_text_length, return_tensors="pt"
    ).to(device)
    positives = positives_from_ids(torch.arange(len(kept)), text_ids)
    retrieval = Blip2ForImageTextRetrieval.from_pretraining(model)
    arguments = (texts["input_ids"], texts["attention_mask"], torch.cat(features))
    result: dict[str, Any] = {"images": len(kept), "captions": len(captions), "skipped": skipped}
    if rerank:
        output = retrieval.rerank(*arguments, k=rerank, batch_size=batch_size)
        result["itc"] = retrieval_metrics(output.itc.cpu(), positives)
        result["itm_reranked"] = {
            "image_to_text": recall_at(output.image_to_text.cpu(), positives),
            "text_to_image": recall_at(output.text_to_image.cpu(), positives.T),
        }
    else:
        result["itc"] = retrieval_metrics(
            retrieval.itc_scores(*arguments, batch_size=batch_size).cpu(), positives
        )
    return result
