"""A training step of stage 2, forward and backward, through a small frozen language model."""

from functools import partial

import torch
from blip2_models import captioner, compulsory_bytes, image_features, texts
from cases import FULL, NAMED, OURS, SHORT, Case, Peer, Result, Setting, Spec


def bench_stage2(timed):
    timed()


def stage2(batch: int, tokens: int, setting: Setting) -> Case:
    """On a GPU under autocast, the language model in bfloat16; on a CPU all in fp32."""
    batch, tokens, device = setting.few(batch, 3), setting.few(tokens, 17), setting.device
    half = setting.dtype == torch.bfloat16
    model, text = captioner(setting).train(), texts(setting, batch)
    features = image_features(setting, batch, tokens, torch.float32)
    prompt = torch.ones(batch, dtype=torch.int64, device=device)

    def step(use_fused: bool, autocast: bool = half, exact: bool = False) -> Result:
        model.use_fused = use_fused
        model.zero_grad(set_to_none=True)
        given = features.double() if exact else features
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**text, image_features=given, prompt_lengths=prompt).loss
        loss.backward()
        return [loss.detach().float(), model.query_tokens.grad, model.language_projection.weight.grad]

    def peer(use_fused: bool) -> Peer:
        def check() -> Result:
            return [value.clone() for value in step(use_fused)]

        return Peer([lambda: step(use_fused)], check, host=True)

    def truth() -> Result:
        (model.language_model.float if half else model.double)()
        try:
            return [value.clone() for value in step(False, autocast=False, exact=not half)]
        finally:
            model.float()
            model.language_model.to(setting.dtype)

    def clean() -> None:
        model.zero_grad(set_to_none=True)

    plain = peer(False)
    return Case(
        {"plain": plain, OURS: peer(True)},
        truth,
        plain.check,
        shape={"batch": batch, "image tokens": tokens},
        dtype=setting.dtype,
        order=2.0,
        floor=1e-3 if half else 1e-4,
        moved=compulsory_bytes(model, [features], training=True),
        rounds=0.5 if device == "cuda" else 1.0,
        clean=clean,
    )


CASES = {
    f"stage2-{batch}x{tokens}": Spec(
        "stage-2 step", partial(stage2, batch, tokens), (OURS, "plain"), cpu=cpu, cuda=cuda
    )
    for batch, tokens, cpu, cuda in (
        (1, 257, SHORT, NAMED),
        (2, 257, FULL, NAMED),
        (4, 257, NAMED, NAMED),
        (32, 257, NAMED, SHORT),
    )
}
