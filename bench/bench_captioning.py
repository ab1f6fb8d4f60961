"""Captions from pixels, the whole of BLIP-2 end to end, and what each part has in the time.

The image encoder is ViT-g/14 as published (width 1408, 39 layers, 257 tokens; `SHALLOW` layers where the case
says so), the language model a small OPT: a large one would only shrink the share of what we make faster.
Random weights, greedy, 20 tokens.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from blip2_models import WIDTH, captioner, compulsory_bytes, in_inference, width
from cases import FULL, NAMED, SHORT, Case, Peer, Result, Setting, Spec
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

LAYERS, SHALLOW, HEADS, NEW_TOKENS = 39, 4, 16, 20
WHOLE = "ours, whole"


def bench_captioning(timed):
    timed()


def vision_encoder(setting: Setting, layers: int) -> Blip2VisionModel:
    channels = width(setting)
    config = Blip2VisionConfig(
        hidden_size=channels,
        intermediate_size=6144 if channels == WIDTH else 2 * channels,
        num_hidden_layers=setting.few(layers, 2),
        num_attention_heads=HEADS,
        image_size=setting.few(224, 56),
        patch_size=14,
        attn_implementation="sdpa",
    )
    with torch.device(setting.device):
        return Blip2VisionModel(config).eval().to(setting.dtype).requires_grad_(False)


def captioning(batch: int, layers: int, setting: Setting) -> Case:
    batch, dtype = setting.few(batch, 2), setting.dtype
    vision = vision_encoder(setting, layers)
    model = captioner(setting).eval().to(dtype).requires_grad_(False)
    side = vision.config.image_size
    pixels = setting.randn(batch, 3, side, side, seed=5)

    def see() -> Tensor:
        return vision(pixels).last_hidden_state

    with torch.inference_mode():
        features = see()
        prompts = model.soft_prompt(image_features=features)

    def prompt(use_fused: bool) -> Tensor:
        model.use_fused = use_fused
        return model.soft_prompt(image_features=features)

    def speak() -> Tensor:
        """What the language model alone takes: the soft prompt is given."""
        start = model.language_model.get_input_embeddings().weight[:1].expand(batch, 1, -1)
        embeds = torch.cat([prompts, start.to(prompts.dtype)], 1)
        return model.language_model.generate(
            inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )

    def caption(use_fused: bool) -> Tensor:
        model.use_fused = use_fused
        return model.generate(
            image_features=see(), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )

    def truth() -> Result:
        exact = copy.deepcopy(model).double()
        exact.use_fused = False
        return [in_inference(exact.soft_prompt, None, features.double())()]

    def part(call: Callable[..., Tensor], *given: bool, unchecked: bool = True) -> Peer:
        return Peer([in_inference(call, *given)], unchecked=unchecked, part=True, host=True)

    def whole(use_fused: bool) -> Peer:
        """Checked by the soft prompt: a caption of random weights turns on single roundings."""
        return Peer(
            [in_inference(caption, use_fused)], lambda: [in_inference(prompt, use_fused)()], host=True
        )

    return Case(
        {
            WHOLE: whole(True),
            "plain, whole": whole(False),
            "image encoder": part(see),
            "plain, soft prompt": part(prompt, False, unchecked=False),
            "ours, soft prompt": part(prompt, True, unchecked=False),
            "language model": part(speak),
        },
        truth,
        lambda: [in_inference(prompt, False)()],
        shape={"batch": batch, "image encoder layers": vision.config.num_hidden_layers},
        dtype=dtype,
        floor=1e-4 if dtype == torch.float32 else 1e-3,
        moved=compulsory_bytes(vision, [pixels]) + compulsory_bytes(model, []),
        rounds=0.25 if setting.device == "cuda" else 1.0,
    )


PEERS = (WHOLE, "plain, whole", "image encoder", "plain, soft prompt", "ours, soft prompt", "language model")
CASES = {
    name: Spec("captioning", partial(captioning, batch, layers), PEERS, cpu=cpu, cuda=cuda, ours=WHOLE)
    for name, batch, layers, cpu, cuda in (
        ("captioning-1-shallow", 1, SHALLOW, SHORT, NAMED),
        ("captioning-1", 1, LAYERS, FULL, FULL),
        ("captioning-8", 8, LAYERS, NAMED, SHORT),
    )
}
