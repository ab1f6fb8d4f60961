"""Models and inputs of the benchmarks: a BERT-base Q-Former, 32 queries, image width 1408, random weights."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from cases import Peer, Setting
from measure import Call, Captured
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, OPTConfig, OPTForCausalLM

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.generation import Blip2ForConditionalGeneration
from blip2_kernels.model.pretraining import Blip2ForPreTraining

WIDTH, QUERIES, PADDED, VOCABULARY = 1408, 32, 32, 30523
LENGTHS = (8, 16, 10, 14, 12, 12, 9, 15)
"""Tokens of the captions: 12 on average."""


def width(setting: Setting) -> int:
    return setting.few(WIDTH, 48)


def qformer_config(setting: Setting, **options: Any) -> Blip2QFormerConfig:
    sizes: dict[str, Any] = {"encoder_hidden_size": width(setting)}
    if setting.tiny:
        sizes |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    return Blip2QFormerConfig(**{**sizes, **options})


def image_features(
    setting: Setting, images: int, tokens: int, dtype: torch.dtype | None = None, seed: int = 2
) -> Tensor:
    return setting.randn(images, tokens, width(setting), seed=seed, dtype=dtype)


def texts(setting: Setting, samples: int) -> dict[str, Tensor]:
    """Ids and mask [samples, 32] of captions, the mask on the device."""
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(samples)])
    mask = (torch.arange(PADDED) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (samples, PADDED), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 101
    made = {"input_ids": ids * mask, "attention_mask": mask}
    return {name: value.to(setting.device) for name, value in made.items()}


def pretraining(setting: Setting, dropout: float, dtype: torch.dtype = torch.float32) -> Blip2ForPreTraining:
    """A stage-1 model, the same weights each time."""
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    config = qformer_config(setting, vocab_size=VOCABULARY, use_qformer_text_input=True, **rates)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = Blip2ForPreTraining(Blip2PreTrainingConfig(config))
    return model.to(dtype)


def captioner(setting: Setting, language_dtype: torch.dtype | None = None) -> Blip2ForConditionalGeneration:
    """Stage 2 without dropout, in front of a small frozen OPT."""
    stage1_model = pretraining(setting, 0.0)
    hidden, layers = (32, 2) if setting.tiny else (768, 6)
    config = OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 8 if setting.tiny else 12,
        max_position_embeddings=512,
        vocab_size=50272,
    )
    with torch.device(setting.device):
        language_model = OPTForCausalLM(config).to(language_dtype or setting.dtype).eval()
        return Blip2ForConditionalGeneration.from_pretraining(stage1_model, language_model)


def compulsory_bytes(model: nn.Module, inputs: Sequence[Tensor], training: bool = False) -> float:
    """What any algorithm moves: inputs and weights once; in training the gradients once more."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return sum(t.numel() * t.element_size() for t in inputs) + weights * (2 if training else 1)


# ------------------------------------------------------------------------------------------ ways to call them


class Replay:
    """A call in a CUDA graph, captured when first called."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.captured: Captured | None = None
        self.result: Any = None

    def _hold(self) -> None:
        self.result = self.call()

    def __call__(self) -> Any:
        if self.captured is None:
            self.captured = Captured.of([self._hold])
        self.captured.graph.replay()
        return self.result


def in_inference(call: Callable[..., Any], *args: Any) -> Call:
    def run() -> Any:
        with torch.inference_mode():
            return call(*args)

    return run


class Compiled:
    """A function that is compiled when first called: a compiler that cannot be had fails this peer alone.

    Args:
        options: of torch.compile; the backend "tensorrt" comes with a package of its own.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options = function, options
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            if self.options.get("backend") == "tensorrt":
                importlib.import_module("torch_tensorrt")
            self.compiled = torch.compile(self.function, dynamic=False, **self.options)
        return self.compiled(*args)


def compiled(call: Callable[..., Any], *args: Any, **options: Any) -> Call:
    """A compiled call without gradients. In mode "reduce-overhead" its result is valid until the next one."""
    made = Compiled(call, **options)

    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return made(*args)

    return run


def compiled_modes(setting: Setting) -> Mapping[str, dict[str, str] | str]:
    """Options of torch.compile by mode, or a reason against it."""
    reason = setting.without_compiler()
    modes: dict[str, dict[str, str] | str] = {
        "compiled": {},
        "reduce-overhead": {"mode": "reduce-overhead"},
        "max-autotune": {"mode": "max-autotune"},
    }
    if setting.device == "cpu":
        modes["reduce-overhead"] = "it is CUDA graphs, and this is a CPU"
    if not setting.autotune:
        modes["max-autotune"] = "not asked for: --autotune"
    return dict.fromkeys(modes, reason) if reason else modes


def compiled_peers(
    setting: Setting, name: str, call: Callable[..., Any], *args: Any
) -> dict[str, Peer | str]:
    """The call in every mode of torch.compile, or reasons against it; in all but the first one it replays a
    CUDA graph."""
    peers: dict[str, Peer | str] = {}
    for mode, options in compiled_modes(setting).items():
        peers[f"{name}, {mode}"] = options
        if not isinstance(options, str):
            run, graph = compiled(call, *args, fullgraph=True, **options), bool(options)
            peers[f"{name}, {mode}"] = Peer([run], captured=not graph, graph=graph, host=True, counted=False)
    return peers


def by_torchs_library(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with fp32 products by the library that torch prefers: without what `ops/linear.py` gains."""

    def run(*args: Any) -> Any:
        torch.backends.mkldnn.enabled = False
        try:
            return call(*args)
        finally:
            torch.backends.mkldnn.enabled = True

    return run
