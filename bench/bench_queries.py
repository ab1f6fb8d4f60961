"""Q-Former inference: queries that read images, alone and with a text, beside transformers' model."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from attention_peers import missing
from blip2_models import (
    PADDED,
    QUERIES,
    VOCABULARY,
    Replay,
    by_torchs_library,
    compiled,
    compiled_peers,
    compulsory_bytes,
    image_features,
    in_inference,
    qformer_config,
    texts,
)
from cases import FULL, NAMED, OURS, SHORT, Case, Peer, Result, Setting, Spec
from measure import Call
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from blip2_kernels.model.qformer import QFormerModel

COMPILED = ("compiled", "reduce-overhead", "max-autotune")
THEIRS = "transformers"


def bench_queries(timed):
    timed()


class Models:
    """transformers' Q-Former and ours on the same weights, and what they are asked."""

    def __init__(self, setting: Setting, batch: int, tokens: int, dtype: torch.dtype, text: bool) -> None:
        self.setting, self.batch, self.dtype, self.with_text = setting, batch, dtype, text
        torch.manual_seed(0)
        self.options = dict(use_qformer_text_input=True, vocab_size=VOCABULARY) if text else {}
        config = qformer_config(setting, attn_implementation="eager", **self.options)
        with torch.device(setting.device):
            self.eager = Blip2QFormerModel(config).eval().to(dtype)
            self.plain = QFormerModel(qformer_config(setting, **self.options), use_fused=False).eval()
        self.plain.load_state_dict(self.eager.state_dict())
        self.plain.to(dtype)
        hidden = self.eager.config.hidden_size
        asked = setting.randn(1, QUERIES, hidden, seed=1, dtype=dtype).expand(batch, -1, -1)
        self.mask: Tensor | None = None
        if text:  # as Blip2ForImageTextRetrieval embeds it
            self.mask = texts(setting, batch)["attention_mask"]
            asked = torch.cat([asked, setting.randn(batch, PADDED, hidden, seed=4, dtype=dtype)], 1)
            self.mask = torch.cat([self.mask.new_ones(batch, QUERIES), self.mask], 1)
        self.asked = asked
        self.sets = [
            image_features(setting, batch, tokens, dtype, seed) for seed in (2, 3)[: 1 + (batch <= 64)]
        ]

    def theirs(self, implementation: str) -> Blip2QFormerModel:
        """A copy of transformers' model with another attention."""
        made = copy.deepcopy(self.eager)
        made.set_attn_implementation(implementation)
        return made

    def ours(self) -> QFormerModel:
        """A copy of our model, fused. Not a new one: drawing weights takes longer than a benchmark."""
        made = copy.deepcopy(self.plain)
        made.use_fused = True
        return made

    def read(self, model: nn.Module, features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Hidden states of the queries."""
        asked, given = (t.to(dtype or self.dtype) for t in (self.asked, features))
        text = {"query_length": QUERIES, "attention_mask": self.mask} if self.with_text else {}
        made = model(query_embeds=asked, encoder_hidden_states=given, **text)
        return made.last_hidden_state[:, :QUERIES]

    def each(self, model: nn.Module) -> list[Call]:
        return [in_inference(self.read, model, features) for features in self.sets]


def queries(
    batch: int,
    tokens: int,
    setting: Setting,
    *,
    dtype: torch.dtype | None = None,
    text: bool = False,
    compiles: bool = False,
    fp32: bool = False,
) -> Case:
    """Queries that read images, without text or each with a text behind it.

    Args:
        dtype: of weights and inputs; default the device's.
        compiles: beside compiled peers instead of eager ones.
        fp32: beside the eager model in fp32 too.
    """
    batch, tokens = setting.few(batch, 3), setting.few(tokens, 17)
    cuda, dtype = setting.device == "cuda", dtype or setting.dtype
    models = Models(setting, batch, tokens, dtype, text)
    read, sets = models.read, models.sets
    sdpa, plain = models.theirs("sdpa"), models.plain
    fused, prepared, projected = (models.ours() for _ in range(3))
    prepared.fused_encoder.prepare_inference()
    projected.fused_encoder.prepare_inference().force(absorbed_cross_attention=False)

    peers: dict[str, Peer | str] = {
        f"{THEIRS}, sdpa": Peer(models.each(sdpa), captured=True, host=True),
        OURS: Peer(models.each(fused), captured=True, host=True),
        "ours, prepared": Peer(models.each(prepared), captured=True, host=True),
        "ours, prepared, projected": Peer(models.each(projected), captured=True),
    }
    graph = "CUDA graphs need a GPU"
    peers[f"{THEIRS}, sdpa, graph"] = peers["ours, prepared, graph"] = graph
    if cuda:
        replay = Replay(in_inference(read, sdpa, sets[0]))
        peers[f"{THEIRS}, sdpa, graph"] = Peer([replay], graph=True, counted=False)
        replay = Replay(in_inference(read, prepared, sets[0]))
        peers["ours, prepared, graph"] = Peer([replay], host=True, graph=True, counted=False)
    if not compiles:
        peers[f"{THEIRS}, eager"] = Peer(models.each(models.eager), captured=True, host=True)
        library = [by_torchs_library(call) for call in models.each(fused)]
        by_mkl = not cuda and dtype == torch.float32
        peers["ours, torch's library"] = Peer(library) if by_mkl else "it is for fp32 on a CPU"
        peers[f"{THEIRS}, eager, fp32"] = (
            "the case is in fp32" if dtype == torch.float32 else "in another case"
        )
        if fp32 and dtype != torch.float32:
            single = copy.deepcopy(models.eager).float()
            calls = [in_inference(read, single, features, torch.float32) for features in sets]
            peers[f"{THEIRS}, eager, fp32"] = Peer(calls, captured=True)
    else:
        peers |= compiled_peers(setting, f"{THEIRS}, sdpa", partial(read, sdpa), sets[0])
        reason = setting.without_compiler()
        absent = missing("torch_tensorrt") or (None if cuda else "it needs a GPU")
        for name, why, model, options in (
            ("ours, compiled", reason, fused, {"fullgraph": True}),
            ("TensorRT", absent, sdpa, {"backend": "tensorrt"}),
        ):
            peers[name] = why or Peer(
                [compiled(partial(read, model), sets[0], **options)], captured=True, host=True, counted=False
            )

    def truth() -> Result:
        exact = torch.float64 if batch <= 64 else torch.float32
        return [in_inference(read, copy.deepcopy(plain).to(exact), sets[0], exact)()]

    return Case(
        peers,
        truth,
        lambda: [in_inference(read, plain, sets[0])()],
        shape={"batch": batch, "image tokens": tokens, "text tokens": PADDED * text},
        dtype=dtype,
        floor=1e-4 if dtype == torch.float32 else 1e-3,
        moved=compulsory_bytes(plain, [sets[0], models.asked]),
    )


EAGER_PEERS = (
    OURS,
    f"{THEIRS}, eager",
    f"{THEIRS}, sdpa",
    f"{THEIRS}, sdpa, graph",
    f"{THEIRS}, eager, fp32",
    "ours, prepared",
    "ours, prepared, projected",
    "ours, prepared, graph",
    "ours, torch's library",
)
COMPILED_PEERS = (
    OURS,
    f"{THEIRS}, sdpa",
    f"{THEIRS}, sdpa, graph",
    *(f"{THEIRS}, sdpa, {mode}" for mode in COMPILED),
    "TensorRT",
    "ours, prepared",
    "ours, prepared, projected",
    "ours, prepared, graph",
    "ours, compiled",
)


def spec(build: Callable[[Setting], Case], cpu: int, cuda: int, compiles: bool = False) -> Spec:
    return Spec("Q-Former inference", build, COMPILED_PEERS if compiles else EAGER_PEERS, cpu=cpu, cuda=cuda)


CASES = {
    f"queries-{batch}x{tokens}": spec(partial(queries, batch, tokens, fp32=batch == 64), cpu, cuda)
    for batch, tokens, cpu, cuda in (
        (1, 257, SHORT, SHORT),
        (64, 257, NAMED, SHORT),
        (2, 257, FULL, NAMED),
        (4, 257, FULL, NAMED),
        (8, 257, FULL, SHORT),
        (512, 257, NAMED, SHORT),
        (64, 677, NAMED, SHORT),
        (8, 677, NAMED, SHORT),
        (1, 677, FULL, FULL),
        (1, 2056, FULL, FULL),
        (8, 2056, NAMED, FULL),
    )
} | {
    "queries-text-1x257": spec(partial(queries, 1, 257, text=True), SHORT, FULL),
    "queries-text-8x257": spec(partial(queries, 8, 257, text=True), NAMED, SHORT),
    "queries-text-64x257": spec(partial(queries, 64, 257, text=True), NAMED, SHORT),
    "queries-text-512x257": spec(partial(queries, 512, 257, text=True), NAMED, FULL),
    "queries-2x257-bf16": spec(partial(queries, 2, 257, dtype=torch.bfloat16, fp32=True), FULL, NAMED),
    "queries-8x257-bf16": spec(partial(queries, 8, 257, dtype=torch.bfloat16), FULL, NAMED),
    "queries-1x257-compiled": spec(partial(queries, 1, 257, compiles=True), FULL, SHORT, True),
    "queries-8x257-compiled": spec(partial(queries, 8, 257, compiles=True), NAMED, FULL, True),
    "queries-64x257-compiled": spec(partial(queries, 64, 257, compiles=True), NAMED, SHORT, True),
}
