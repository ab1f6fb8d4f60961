"""Small stage-2 models and inputs that its tests share."""

import copy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Gemma2Config,
    LlamaConfig,
    OPTConfig,
    T5Config,
)
from transformers import Blip2ForConditionalGeneration as TransformersBlip2

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.generation import Blip2ForConditionalGeneration, Blip2GenerationConfig

VOCABULARY, IMAGE_TOKEN, QUERIES, SIDE, WIDTH = 61, 60, 5, 28, 24
QFORMER = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    encoder_hidden_size=WIDTH,
    max_position_embeddings=32,
    vocab_size=VOCABULARY,
)
VISION = dict(
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=14,
)
SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
LANGUAGE = {
    "opt": OPTConfig(
        **SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=40, dropout=0.1, init_std=0.4
    ),
    "llama": LlamaConfig(**SMALL, intermediate_size=32, initializer_range=0.4, tie_word_embeddings=True),
    # Caps its logits behind the head.
    "gemma2": Gemma2Config(
        **SMALL,
        intermediate_size=32,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
        final_logit_softcapping=2.0,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        initializer_factor=1.0,
        tie_word_embeddings=False,
    ),
    # Adds a bias behind the head.
    "bart": BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=40,
        init_std=0.4,
        forced_eos_token_id=None,
    ),
}
DECODER_ONLY, ENCODER_DECODER = ("opt", "llama", "gemma2"), ("t5", "bart")
FROZEN = ("vision_model.", "language_model.")


def spread(module):
    """Random weights far from their initial values, so that no two paths agree by chance."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("language_model."):
                scale = 0.3 if parameter.dim() > 1 else 0.1
                offset = 1.0 if parameter.dim() == 1 and "weight" in name else 0.0
                parameter.copy_(offset + scale * torch.randn_like(parameter))
    return module


def language_model(name):
    config = copy.deepcopy(LANGUAGE[name])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)
    if name == "bart":
        nn.init.normal_(model.final_logits_bias)
    return model.eval()


def transformers_blip2(name):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=copy.deepcopy(LANGUAGE[name]),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    return spread(TransformersBlip2(config)).eval()


def stage2(name, use_fused=False, dropout=0.0, **qformer):
    config = Blip2QFormerConfig(
        **{**QFORMER, **qformer}, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return spread(
        Blip2ForConditionalGeneration(
            Blip2GenerationConfig(config, QUERIES), language_model=language_model(name), use_fused=use_fused
        )
    ).eval()


def pretraining_config(**qformer):
    return Blip2PreTrainingConfig(
        Blip2QFormerConfig(**{**QFORMER, "vocab_size": 120, **qformer}, use_qformer_text_input=True),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
    )


def pad(texts, side, length=None, value=1):
    """Token ids [B, T] and mask of lists of tokens, padded on a side; "scattered" puts padding anywhere."""
    length = length or max(map(len, texts)) + 2
    ids, mask = torch.full((len(texts), length), value), torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        places = {
            "right": torch.arange(len(text)),
            "left": torch.arange(length - len(text), length),
            "scattered": torch.randperm(length)[: len(text)].sort().values,
        }[side]
        ids[row, places], mask[row, places] = torch.tensor(text, dtype=torch.int64), 1
    return ids, mask


TEXTS = [[4, 9, 33, 7, 21, 50], [5, 8, 2], [40, 41, 42, 43, 17]]
PROMPT_LENGTHS = torch.tensor([2, 1, 3])


def features(batch=3, tokens=6):
    return torch.randn(batch, tokens, WIDTH)


GREEDY = dict(do_sample=False, pad_token_id=1, return_dict_in_generate=True, output_logits=True)


def assert_same_logits(got, expected, row=None):
    """Logits of each generated token, of all rows or of one."""
    assert len(got.logits) == len(expected.logits)
    for step, (value, truth) in enumerate(zip(got.logits, expected.logits, strict=True)):
        value = value if row is None else value[row : row + 1]
        torch.testing.assert_close(
            value, truth, rtol=0, atol=1e-4, msg=lambda text, at=step: f"step {at}: {text}"
        )


def behind_image_tokens(ids, mask):
    """What transformers wants to be given: a placeholder for each row of the soft prompt."""
    image = torch.full((len(ids), QUERIES), IMAGE_TOKEN)
    return torch.cat([image, ids], dim=1), torch.cat([torch.ones_like(image), mask], dim=1)
