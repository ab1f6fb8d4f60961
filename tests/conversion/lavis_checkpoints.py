"""Small random checkpoints with the names that LAVIS's own classes give their tensors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    InstructBlipConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

WIDTH, IMAGE_WIDTH, INNER, WORDS, POSITIONS, QUERIES, BLOCKS, LAYERS = 32, 48, 40, 61, 16, 5, 2, 3
KINDS = ("stage1", "opt", "t5", "instruct_llm", "instruct_t5")

TEXT = {
    "opt": OPTConfig(
        vocab_size=64, hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2, ffn_dim=36,
        num_attention_heads=2, max_position_embeddings=80, dropout=0.0,
    ),
    "t5": T5Config(
        vocab_size=64, d_model=24, d_kv=12, num_heads=2, d_ff=36, num_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    ),
    "llm": LlamaConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, intermediate_size=36, num_attention_heads=2
    ),
}  # fmt: skip
CLASSES = {"opt": OPTForCausalLM, "t5": T5ForConditionalGeneration, "llm": LlamaForCausalLM}


def language_of(kind: str) -> str | None:
    return None if kind == "stage1" else kind.removeprefix("instruct_")


def config(kind: str) -> Blip2Config | InstructBlipConfig:
    """transformers' configuration of such a checkpoint."""
    instruct = kind.startswith("instruct")
    language = language_of(kind)
    qformer: dict[str, Any] = dict(
        hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=LAYERS, intermediate_size=INNER,
        encoder_hidden_size=IMAGE_WIDTH, vocab_size=WORDS, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    if kind == "stage1":
        qformer["use_qformer_text_input"] = True
    cls = InstructBlipConfig if instruct else Blip2Config
    whole = cls(
        vision_config=dict(
            hidden_size=IMAGE_WIDTH, num_attention_heads=2, num_hidden_layers=BLOCKS,
            intermediate_size=INNER, image_size=8, patch_size=4,
        ),
        qformer_config=qformer,
        text_config=TEXT[language or "opt"].to_dict(),
        num_query_tokens=QUERIES,
    )  # fmt: skip
    whole.image_text_hidden_size = 12
    return whole


def lavis_state(kind: str, seed: int = 0, *, trained_only: bool = False) -> dict[str, Tensor]:
    """A state dict as `model.state_dict()` of LAVIS gives it; the image encoder is in fp16.

    Args:
        kind: one of `KINDS`.
        seed: of the values.
        trained_only: as LAVIS saves its training: without the frozen parts.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, about: float = 0.0) -> None:
        state[name] = about + torch.randn(*shape, generator=generator) * 0.3

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, about=1.0)
        add(f"{name}.bias", width)

    add("query_tokens", 1, QUERIES, WIDTH)
    add("visual_encoder.cls_token", 1, 1, IMAGE_WIDTH)
    add("visual_encoder.pos_embed", 1, 5, IMAGE_WIDTH)
    add("visual_encoder.patch_embed.proj.weight", IMAGE_WIDTH, 3, 4, 4)
    add("visual_encoder.patch_embed.proj.bias", IMAGE_WIDTH)
    for block in range(BLOCKS):
        front = f"visual_encoder.blocks.{block}"
        norm(f"{front}.norm1", IMAGE_WIDTH)
        add(f"{front}.attn.q_bias", IMAGE_WIDTH)
        add(f"{front}.attn.v_bias", IMAGE_WIDTH)
        add(f"{front}.attn.qkv.weight", 3 * IMAGE_WIDTH, IMAGE_WIDTH)
        linear(f"{front}.attn.proj", IMAGE_WIDTH, IMAGE_WIDTH)
        norm(f"{front}.norm2", IMAGE_WIDTH)
        linear(f"{front}.mlp.fc1", INNER, IMAGE_WIDTH)
        linear(f"{front}.mlp.fc2", IMAGE_WIDTH, INNER)
    for name in [name for name in state if name.startswith("visual_encoder.")]:
        state[name] = state[name].half()
    norm("ln_vision", IMAGE_WIDTH)
    reads_text = kind == "stage1" or kind.startswith("instruct")
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    if reads_text:
        add("Qformer.bert.embeddings.word_embeddings.weight", WORDS, WIDTH)
        add("Qformer.bert.embeddings.position_embeddings.weight", POSITIONS, WIDTH)
    norm("Qformer.bert.embeddings.LayerNorm", WIDTH)
    for layer in range(LAYERS):
        front = f"Qformer.bert.encoder.layer.{layer}"
        parts = (
            {"attention": WIDTH, "crossattention": IMAGE_WIDTH} if layer % 2 == 0 else {"attention": WIDTH}
        )
        for part, width in parts.items():
            linear(f"{front}.{part}.self.query", WIDTH, WIDTH)
            linear(f"{front}.{part}.self.key", WIDTH, width)
            linear(f"{front}.{part}.self.value", WIDTH, width)
            linear(f"{front}.{part}.output.dense", WIDTH, WIDTH)
            norm(f"{front}.{part}.output.LayerNorm", WIDTH)
        for which in ("", "_query") if reads_text else ("_query",):
            linear(f"{front}.intermediate{which}.dense", INNER, WIDTH)
            linear(f"{front}.output{which}.dense", WIDTH, INNER)
            norm(f"{front}.output{which}.LayerNorm", WIDTH)
    language = language_of(kind)
    if language is None:
        head = "Qformer.cls.predictions"
        add(f"{head}.bias", WORDS)
        linear(f"{head}.transform.dense", WIDTH, WIDTH)
        norm(f"{head}.transform.LayerNorm", WIDTH)
        state[f"{head}.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
        linear("vision_proj", 12, WIDTH)
        linear("text_proj", 12, WIDTH)
        linear("itm_head", 2, WIDTH)
        state["temp"] = torch.tensor(0.05)
        return state
    linear(f"{language}_proj", 24, WIDTH)
    state |= {f"{language}_model.{name}": value for name, value in language_state(language).items()}
    frozen = ("visual_encoder.", f"{language}_model.")
    return {name: v for name, v in state.items() if not (trained_only and name.startswith(frozen))}


def language_state(language: str, seed: int = 0) -> dict[str, Tensor]:
    """A language model's state dict; OPT's in bf16."""
    torch.manual_seed(seed)
    model = CLASSES[language](TEXT[language])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = model.to(torch.bfloat16 if language == "opt" else torch.float32).state_dict()
    if language == "t5":  # Flan-T5's output layer is a matrix of its own
        state["lm_head.weight"] = torch.randn(64, 24)
    if language == "llm":  # a buffer of the Llamas of that time
        for layer in range(2):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
    return state


def save_lavis(path: Path, state: dict[str, Tensor]) -> Path:
    """As LAVIS's runner does, with what else it saves."""
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"run": {"seed": 1}}, "epoch": 3}, path)
    return path
