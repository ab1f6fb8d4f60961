"""A training step of stage 1, forward and backward, beside the algorithm as published and our plain path."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from blip2_models import Compiled, by_torchs_library, compulsory_bytes, image_features, pretraining, texts
from cases import FULL, NAMED, OURS, SHORT, Case, Peer, Result, Setting, Spec
from measure import Call
from published import Published
from torch import Tensor

PUBLISHED = ("published, eager", "published, sdpa", "published, sdpa, compiled")
PLAIN, PLAIN_FP32 = "plain", "plain, fp32"

Loss = Callable[[], tuple[Tensor, Sequence[Tensor]]]
"""The loss, and the three it is made of."""


def bench_stage1(timed):
    timed()


def stage1(
    batch: int,
    tokens: int,
    setting: Setting,
    *,
    dropout: float = 0.1,
    autocast: bool = True,
    compiles: bool = False,
) -> Case:
    """A step on pairs with given negatives.

    Args:
        batch: pairs, at least 2 and no multiple of 3: the negatives are the next pair but two and the next.
        dropout: rate of hidden states and attention probabilities.
        autocast: forward in bfloat16 where autocast has it.
        compiles: beside the published algorithm compiled instead of eager.
    """
    batch, tokens = setting.few(batch, 4), setting.few(tokens, 17)
    device = setting.device
    model = pretraining(setting, dropout).train()
    published = {name: Published(model, name == "sdpa") for name in ("eager", "sdpa")}
    own = torch.arange(batch, device=device)
    negatives = (own + 3) % batch, (own + 1) % batch
    text, features = texts(setting, batch), image_features(setting, batch, tokens, torch.float32)
    host_mask = text["attention_mask"].cpu()
    modules = (model, *published.values())

    def of_model(
        use_fused: bool, mask: Tensor | None = None, given: bool = True, static: bool = False
    ) -> Loss:
        def loss() -> tuple[Tensor, Sequence[Tensor]]:
            model.use_fused = use_fused
            model.qformer.fused_encoder.force(packed_text=False if static else None)
            output = model(
                text["input_ids"],
                text["attention_mask"] if mask is None else mask,
                image_features=features,
                negatives=negatives if given else None,
            )
            return output.loss, (output.loss_itc, output.loss_itm, output.loss_itg)

        return loss

    def of_published(step: Callable[..., Any]) -> Loss:
        def loss() -> tuple[Tensor, Sequence[Tensor]]:
            made = step(text["input_ids"], text["attention_mask"], features, negatives)
            return made.loss, made.parts

        return loss

    def step(loss: Loss, half: bool = autocast) -> Call:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(3)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                total, _ = loss()
            total.backward()

        return run

    watched = [
        model.query_tokens,
        model.ln_vision.weight,
        model.itm_head.weight,
        model.embeddings.position_embeddings.weight,
        model.qformer.encoder.layer[0].crossattention.attention.value.weight,
        model.qformer.encoder.layer[-1].output_query.dense.weight,
    ]

    def check(loss: Loss, half: bool = autocast) -> Callable[[], Result]:
        """Losses, and some gradients of matching and generation, dropout off.

        Gradients of the contrast say nothing at random weights: all pairs are alike, what is left of their
        differences is rounding (error of the plain model in bfloat16: 1.7 times the gradient).
        """

        def run() -> Result:
            for module in modules:
                module.eval()
            try:
                model.zero_grad(set_to_none=True)
                with torch.autocast(device, torch.bfloat16, enabled=half):
                    _, parts = loss()
                sum(parts[1:]).backward()
                return [torch.stack(list(parts)).detach().float(), *(w.grad.clone() for w in watched)]
            finally:
                for module in modules:
                    module.train()
                model.zero_grad(set_to_none=True)

        return run

    def peer(loss: Loss, unchecked: bool = False, **options: bool) -> Peer:
        return Peer([step(loss)], None if unchecked else check(loss), unchecked=unchecked, **options)

    graphs = {"captured": setting.capture_steps}
    plain = of_model(False)
    peers: dict[str, Peer | str] = {
        "published, sdpa": peer(of_published(published["sdpa"].step), host=True, **graphs),
        OURS: peer(of_model(True), host=True),
    }
    if compiles:
        reason = setting.without_compiler()
        loss = of_published(Compiled(published["sdpa"].step, fullgraph=True))
        # With dropout it is not compared: without, it would be another graph, and twice the time to compile.
        made = peer(loss, unchecked=dropout > 0, host=True, counted=False)
        peers["published, sdpa, compiled"] = reason or made
    else:
        of_gpu = "the host is the device" if device == "cpu" else None
        library = by_torchs_library(step(of_model(True)))
        peers |= {
            "published, eager": peer(of_published(published["eager"].step), host=True, **graphs),
            PLAIN: peer(plain, host=True),
            PLAIN_FP32: Peer([step(plain, False)], check(plain, False))
            if autocast
            else "the case is in fp32",
            "ours, mask on the host": of_gpu or peer(of_model(True, host_mask), host=True),
            "ours, static shapes": "they are for CUDA graphs"
            if device == "cpu"
            else peer(of_model(True, static=True), host=True, **graphs),
            "ours, negatives drawn": peer(of_model(True, host_mask, given=False), unchecked=True),
            "ours, torch's library": Peer([library], by_torchs_library(check(of_model(True))))
            if device == "cpu" and not autocast
            else "it is for fp32 on a CPU",
        }

    def clean() -> None:
        model.zero_grad(set_to_none=True)

    return Case(
        peers,
        check(plain, False) if autocast else in_fp64(model, features, check, plain),
        check(plain),
        shape={"batch": batch, "image tokens": tokens, "dropout": dropout},
        dtype=torch.bfloat16 if autocast else torch.float32,
        order=2.0,
        floor=1e-3 if autocast else 1e-4,
        moved=compulsory_bytes(model, [features], training=True),
        rounds=0.5 if device == "cuda" else 1.0,
        clean=clean,
    )


def in_fp64(
    model: torch.nn.Module, features: Tensor, check: Callable[..., Any], loss: Loss
) -> Callable[[], Result]:
    """The same check in fp64, weights and features going there and back."""

    def run() -> Result:
        kept = features.clone()
        model.double()
        features.data = kept.double()
        try:
            return check(loss)()
        finally:
            model.float()
            features.data = kept

    return run


PEERS = (
    OURS,
    *PUBLISHED[:2],
    PLAIN,
    PLAIN_FP32,
    "ours, mask on the host",
    "ours, static shapes",
    "ours, negatives drawn",
    "ours, torch's library",
)


def spec(build: Callable[[Setting], Case], cpu: int, cuda: int = NAMED, compiles: bool = False) -> Spec:
    peers = (OURS, "published, sdpa", "published, sdpa, compiled") if compiles else PEERS
    return Spec("stage-1 step", build, peers, cpu=cpu, cuda=cuda)


exact = partial(stage1, dropout=0.0, autocast=False)
CASES = {
    "stage1-100x257": spec(partial(stage1, 100, 257), NAMED, SHORT),
    "stage1-16x257": spec(partial(stage1, 16, 257), NAMED, SHORT),
    "stage1-32x677": spec(partial(stage1, 32, 677), NAMED, SHORT),
    # On a CPU: fp32 without dropout, and what dropout and bfloat16 change.
    "stage1-2x257-fp32": spec(partial(exact, 2, 257), SHORT),
    "stage1-2x677-fp32": spec(partial(exact, 2, 677), FULL),
    "stage1-2x257-fp32-dropout": spec(partial(exact, 2, 257, dropout=0.1), FULL),
    "stage1-2x257-bf16": spec(partial(stage1, 2, 257, dropout=0.0), FULL),
    "stage1-8x257-fp32": spec(partial(exact, 8, 257), NAMED),
    "stage1-8x677-fp32": spec(partial(exact, 8, 677), NAMED),
    "stage1-8x257-fp32-dropout": spec(partial(exact, 8, 257, dropout=0.1), NAMED),
    "stage1-8x677-fp32-dropout": spec(partial(exact, 8, 677, dropout=0.1), NAMED),
    "stage1-8x257-bf16": spec(partial(stage1, 8, 257, dropout=0.0), NAMED),
    "stage1-2x257-fp32-compiled": spec(partial(exact, 2, 257, compiles=True), NAMED, compiles=True),
    "stage1-100x257-compiled": spec(partial(stage1, 100, 257, compiles=True), NAMED, SHORT, compiles=True),
}
