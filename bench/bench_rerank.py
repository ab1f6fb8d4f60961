"""Re-ranking: one image and the texts that might describe it, logits of matching."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from blip2_models import (
    Replay,
    by_torchs_library,
    compiled_peers,
    compulsory_bytes,
    image_features,
    in_inference,
    pretraining,
    texts,
)
from cases import FULL, NAMED, OURS, SHORT, Case, Peer, Result, Setting, Spec
from measure import Call
from published import Published
from torch import Tensor

from blip2_kernels.model.pretraining import Blip2ForPreTraining

MODES = ("compiled", "reduce-overhead", "max-autotune")


def bench_rerank(timed):
    timed()


def rerank(samples: int, setting: Setting, *, compiles: bool = False) -> Case:
    samples, tokens, dtype = setting.few(samples, 5), setting.few(257, 17), setting.dtype
    model = pretraining(setting, 0.0, dtype).eval()
    static = copy.deepcopy(model)
    static.use_fused = True
    static.qformer.fused_encoder.prepare_inference().force(packed_text=False)
    published = {name: Published(model, name == "sdpa") for name in ("eager", "sdpa")}
    text, image = texts(setting, samples), image_features(setting, 1, tokens, dtype)
    index = torch.zeros(samples, dtype=torch.int32, device=setting.device)
    on_host = text | {"attention_mask": text["attention_mask"].cpu()}
    cuda = setting.device == "cuda"

    def score(some: Blip2ForPreTraining, use_fused: bool, given: dict[str, Tensor]) -> Tensor:
        some.use_fused = use_fused
        features = image.to(some.query_tokens.dtype)
        return some.match(some.get_multimodal_features(**given, image_features=features, image_index=index))

    def repeat(some: Published) -> Tensor:
        images = some.model.ln_vision(image).expand(samples, -1, -1)
        return some.match(text["input_ids"], text["attention_mask"], images)

    def plain(some: Blip2ForPreTraining) -> Call:
        return in_inference(score, some, False, text)

    def each(call: Callable[..., Tensor], *given: Any, captured: bool = True) -> Peer:
        return Peer([in_inference(call, *given)], captured=captured, host=True)

    graph = "CUDA graphs need a GPU"
    peers: dict[str, Peer | str] = {
        "published, sdpa": each(repeat, published["sdpa"]),
        OURS: each(score, model, True, text, captured=False),
        "ours, static shapes": each(score, static, True, text),
        "ours, static shapes, graph": graph,
    }
    if cuda:
        replay = Replay(in_inference(score, static, True, text))
        peers["ours, static shapes, graph"] = Peer([replay], host=True, graph=True, counted=False)
    if not compiles:
        peers["published, eager"] = each(repeat, published["eager"])
        peers["plain"] = each(score, model, False, text)
        host = each(score, model, True, on_host, captured=False)
        peers["ours, mask on the host"] = host if cuda else "the host is the device"
        library = Peer([by_torchs_library(in_inference(score, model, True, text))])
        peers["ours, torch's library"] = "it is for a CPU" if cuda else library
    else:
        peers |= compiled_peers(setting, "published, sdpa", partial(repeat, published["sdpa"]))

    def truth() -> Result:
        return [plain(copy.deepcopy(model).to(torch.float64 if samples <= 64 else torch.float32))()]

    return Case(
        peers,
        truth,
        lambda: [plain(model)()],
        shape={"texts an image": samples, "image tokens": tokens},
        dtype=dtype,
        floor=1e-4 if dtype == torch.float32 else 1e-3,
        moved=compulsory_bytes(model.qformer, [image]),
    )


PEERS = (
    OURS,
    "published, eager",
    "published, sdpa",
    "plain",
    "ours, mask on the host",
    "ours, static shapes",
    "ours, static shapes, graph",
    "ours, torch's library",
)
COMPILED_PEERS = (
    OURS,
    "published, sdpa",
    *(f"published, sdpa, {mode}" for mode in MODES),
    "ours, static shapes",
    "ours, static shapes, graph",
)
CASES = {
    f"rerank-1x{samples}": Spec("re-ranking", partial(rerank, samples), PEERS, cpu=cpu, cuda=cuda)
    for samples, cpu, cuda in (
        (4, SHORT, NAMED),
        (8, FULL, NAMED),
        (16, FULL, NAMED),
        (32, NAMED, SHORT),
        (128, NAMED, FULL),
        (256, NAMED, SHORT),
    )
} | {
    "rerank-1x32-compiled": Spec(
        "re-ranking", partial(rerank, 32, compiles=True), COMPILED_PEERS, cpu=NAMED, cuda=SHORT
    )
}
