"""The models against their peers on a GPU, case by case in one process.

    python bench/models.py                          every case
    python bench/models.py --only stage1 --rounds 5
    python bench/models.py --json models.json       keeps every figure, rewritten after each case
    python bench/models.py --warm --only queries-1  fills the caches of compilers, times nothing
    python bench/models.py --device cpu --tiny      all of it, small: a test of the script

BERT-base Q-Former (12 layers, 768 channels), 32 queries, image width 1408, random weights. Inference in
bfloat16, training steps under bfloat16 autocast with dropout 0.1 unless the case says otherwise. Before it is
timed a peer's result is compared with the plain model's in higher precision: its error may be twice that of
the plain model in the same precision, and 1e-3 of the largest value more. A peer that does not agree is timed
all the same, and marked. Steps are compared without dropout: losses and gradients, by their Euclidean norms.
"""

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import measure
import savings
import torch
from about import about
from measure import said
from published import Published
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig, OPTConfig, OPTForCausalLM
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from blip2_kernels import extension
from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.generation import Blip2ForConditionalGeneration
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.qformer import QFormerModel
from blip2_kernels.ops.flops import FORMULAS

Result = list[Tensor]
BF16 = torch.bfloat16
OURS = "ours"


@dataclass(frozen=True)
class Setting:
    """What holds for all cases.

    Attributes:
        device: "cuda" or "cpu".
        tiny: small models and batches.
        autotune: peers of torch.compile's mode "max-autotune" take part.
        capture_steps: training steps are captured in CUDA graphs.
    """

    device: str
    tiny: bool
    autotune: bool
    capture_steps: bool

    @property
    def width(self) -> int:
        return 48 if self.tiny else savings.WIDTH

    def qformer(self, **options: Any) -> Blip2QFormerConfig:
        sizes: dict[str, Any] = {"encoder_hidden_size": self.width}
        if self.tiny:
            sizes |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
        return Blip2QFormerConfig(**{**sizes, **options})

    def few(self, count: int, tiny: int) -> int:
        return min(count, tiny) if self.tiny else count

    def features(self, images: int, tokens: int, dtype: torch.dtype, seed: int = 2) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(
            images, tokens, self.width, generator=generator, device=self.device, dtype=torch.float32
        ).to(dtype)

    def texts(self, samples: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in savings.texts(samples).items()}

    def pretraining(self, dropout: float, dtype: torch.dtype = torch.float32) -> Blip2ForPreTraining:
        rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        config = self.qformer(vocab_size=30523, use_qformer_text_input=True, **rates)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Blip2ForPreTraining(Blip2PreTrainingConfig(config))
        return model.to(dtype)

    def empty_cache(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    Attributes:
        calls: the call on one or several sets of inputs.
        check: what it must agree on; default the first call's result. None with `unchecked`.
        unchecked: nothing to compare (a part of another peer's work).
        captured: its kernels are also timed alone, in a CUDA graph.
        host: the time until its launches are out is taken.
        counted: its FLOPs and peak memory are (not those of a replayed graph, which say nothing).
    """

    calls: Sequence[measure.Call]
    check: Callable[[], Result] | None = None
    unchecked: bool = False
    captured: bool = False
    host: bool = False
    counted: bool = True

    def result(self) -> Result:
        return self.check() if self.check is not None else [self.calls[0]()]


@dataclass(frozen=True)
class Case:
    """Peers that compute the same.

    Attributes:
        peers: by name.
        truth: what all must give, in higher precision, of the plain model.
        plain: what the plain model gives in the peers' precision.
        order: of the norm in which results are compared.
        rounds: part of the rounds asked for.
        clean: frees what a call leaves behind (gradients).
    """

    peers: dict[str, Peer]
    truth: Callable[[], Result] | None = None
    plain: Callable[[], Result] | None = None
    order: float = float("inf")
    rounds: float = 1.0
    clean: Callable[[], None] = lambda: None


class Replay:
    """A call in a CUDA graph, captured when first called."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self.captured: measure.Captured | None = None
        self.result: Tensor | None = None

    def _hold(self) -> None:
        self.result = self.call()

    def __call__(self) -> Tensor | None:
        if self.captured is None:
            self.captured = measure.Captured.of([self._hold])
        self.captured.graph.replay()
        return self.result


def without_gradients(call: Callable[..., Tensor], *args: Any, mode=torch.inference_mode) -> measure.Call:
    def run() -> Tensor:
        with mode():
            return call(*args)

    return run


def compiled(call: Callable[..., Tensor], *args: Any, **options: Any) -> measure.Call:
    """A compiled call without gradients. In mode "reduce-overhead" its result is valid until the next one."""
    made = torch.compile(call, dynamic=False, **options)

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return made(*args)

    return run


# ------------------------------------------------------------------------------------------------ query-only


def queries(batch: int, tokens: int, setting: Setting, *, compiles: bool = False, fp32: bool = False) -> Case:
    """Queries that read images, without text."""
    batch, tokens = setting.few(batch, 3), setting.few(tokens, 17)
    torch.manual_seed(0)
    device = setting.device

    def theirs(implementation: str) -> Blip2QFormerModel:
        with torch.device(device):
            made = Blip2QFormerModel(setting.qformer(attn_implementation=implementation)).eval().to(BF16)
        if weights:
            made.load_state_dict(weights)
        return made

    def ours(use_fused: bool = True) -> QFormerModel:
        with torch.device(device):
            made = QFormerModel(setting.qformer(), use_fused=use_fused).eval().to(BF16)
        made.load_state_dict(weights)
        return made

    weights: dict[str, Tensor] = {}
    eager = theirs("eager")
    weights |= eager.state_dict()
    sdpa, plain, fused, prepared, projected = theirs("sdpa"), ours(False), ours(), ours(), ours()
    prepared.fused_encoder.prepare_inference()
    projected.fused_encoder.prepare_inference().force(absorbed_cross_attention=False)
    width = eager.config.hidden_size
    generator = torch.Generator(device).manual_seed(1)
    tokens_of_queries = torch.randn(1, savings.QUERIES, width, generator=generator, device=device).to(BF16)
    query_embeds = tokens_of_queries.expand(batch, -1, -1)
    sets = [setting.features(batch, tokens, BF16, seed) for seed in range(2, 4 if batch <= 64 else 3)]

    def read(model: nn.Module, features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        asked = query_embeds if dtype is None else query_embeds.to(dtype)
        given = features if dtype is None else features.to(dtype)
        return model(query_embeds=asked, encoder_hidden_states=given).last_hidden_state

    def each(model: nn.Module) -> list[measure.Call]:
        return [without_gradients(read, model, features) for features in sets]

    peers = {
        "transformers sdpa": Peer(each(sdpa), captured=True, host=True),
        OURS: Peer(each(fused), captured=True, host=True),
        "ours, prepared": Peer(each(prepared), captured=True, host=True),
        "ours, prepared, projected": Peer(each(projected), captured=True),
    }
    if not compiles:
        peers = {"transformers eager": Peer(each(eager), captured=True, host=True), **peers}
    if device == "cuda":
        replay = Replay(without_gradients(read, sdpa, sets[0]))
        peers["transformers sdpa, graph"] = Peer([replay], counted=False)
        replay = Replay(without_gradients(read, prepared, sets[0]))
        peers["ours, prepared, graph"] = Peer([replay], host=True, counted=False)
    if compiles:
        modes: dict[str, dict[str, str]] = {"transformers sdpa, compiled": {}}
        if device == "cuda":
            modes["transformers sdpa, reduce-overhead"] = {"mode": "reduce-overhead"}
            if setting.autotune:
                modes["transformers sdpa, max-autotune"] = {"mode": "max-autotune"}
        for name, options in modes.items():
            calls = [compiled(partial(read, sdpa), sets[0], **options)]
            peers[name] = Peer(calls, captured=not options, host=True, counted=False)
        call = compiled(partial(read, fused), sets[0], fullgraph=True)
        peers["ours, compiled"] = Peer([call], captured=True, host=True, counted=False)
    if fp32:
        single = copy.deepcopy(eager).float()
        calls = [without_gradients(read, single, features, torch.float32) for features in sets]
        peers["transformers eager, fp32"] = Peer(calls, captured=True)

    def truth() -> Result:
        dtype = torch.float64 if batch <= 64 else torch.float32
        return [without_gradients(read, copy.deepcopy(plain).to(dtype), sets[0], dtype)()]

    return Case(peers, truth, lambda: [without_gradients(read, plain, sets[0])()])


# --------------------------------------------------------------------------------------------------- stage 1


def stage1(batch: int, tokens: int, setting: Setting, *, compiles: bool = False) -> Case:
    """A training step of stage 1, forward and backward, negatives given."""
    batch, tokens = setting.few(batch, 4), setting.few(tokens, 17)
    device = setting.device
    model = setting.pretraining(0.1).train()
    published = {name: Published(model, name == "sdpa") for name in ("eager", "sdpa")}
    own = torch.arange(batch, device=device)
    negatives = (own + 3) % batch, (own + 1) % batch
    text, features = setting.texts(batch), setting.features(batch, tokens, torch.float32)
    host_mask = text["attention_mask"].cpu()
    modules = (model, *published.values())

    Loss = Callable[[], tuple[Tensor, Sequence[Tensor]]]

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

    def step(loss: Loss) -> measure.Call:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, BF16):
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

    def check(loss: Loss, autocast: bool = True) -> Callable[[], Result]:
        """Losses, and some gradients of matching and generation, dropout off.

        Gradients of the contrast say nothing at random weights: all pairs are alike, what is left of their
        differences is rounding (error of the plain model in bfloat16: 1.7 times the gradient).
        """

        def run() -> Result:
            for module in modules:
                module.eval()
            try:
                model.zero_grad(set_to_none=True)
                with torch.autocast(device, BF16, enabled=autocast):
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
    peers = {
        "published, sdpa": peer(of_published(published["sdpa"].step), host=True, **graphs),
        OURS: peer(of_model(True), host=True),
    }
    if compiles:
        # Not compared: without dropout it would be another graph, and twice the time to compile.
        forward = torch.compile(published["sdpa"].step, dynamic=False)
        loss = of_published(forward)
        peers["published, sdpa, compiled"] = peer(loss, unchecked=True, host=True, counted=False)
    else:
        peers |= {
            "published, eager": peer(of_published(published["eager"].step), host=True, **graphs),
            "ours, mask on the host": peer(of_model(True, host_mask), host=True),
            "ours, static shapes": peer(of_model(True, static=True), host=True, **graphs),
            "ours, negatives drawn": peer(of_model(True, host_mask, given=False), unchecked=True),
        }
    plain = of_model(False)
    return Case(
        peers,
        check(plain, autocast=False),
        check(plain),
        order=2.0,
        rounds=0.5,
        clean=lambda: model.zero_grad(set_to_none=True),
    )


# ------------------------------------------------------------------------------------------------- re-ranking


def rerank(samples: int, setting: Setting, *, compiles: bool = False) -> Case:
    """One image and the texts that might describe it: logits of matching."""
    samples, tokens = setting.few(samples, 5), setting.few(257, 17)
    model = setting.pretraining(0.0, BF16).eval()
    static = copy.deepcopy(model)
    static.use_fused = True
    static.qformer.fused_encoder.prepare_inference().force(packed_text=False)
    published = {name: Published(model, name == "sdpa") for name in ("eager", "sdpa")}
    text, image = setting.texts(samples), setting.features(1, tokens, BF16)
    index = torch.zeros(samples, dtype=torch.int32, device=setting.device)
    on_host = text | {"attention_mask": text["attention_mask"].cpu()}

    def score(some: Blip2ForPreTraining, use_fused: bool, given: dict[str, Tensor]) -> Tensor:
        some.use_fused = use_fused
        features = image.to(some.query_tokens.dtype)
        return some.match(some.get_multimodal_features(**given, image_features=features, image_index=index))

    def repeat(some: Published) -> Tensor:
        images = some.model.ln_vision(image).expand(samples, -1, -1)
        return some.match(text["input_ids"], text["attention_mask"], images)

    def plain(some: Blip2ForPreTraining) -> measure.Call:
        return without_gradients(score, some, False, text)

    def each(call: Callable[..., Tensor], *given: Any, captured: bool = True) -> Peer:
        return Peer([without_gradients(call, *given)], captured=captured, host=True)

    peers = {
        "published, sdpa": each(repeat, published["sdpa"]),
        OURS: each(score, model, True, text, captured=False),
        "ours, static shapes": each(score, static, True, text),
    }
    if setting.device == "cuda":
        replay = Replay(without_gradients(score, static, True, text))
        peers["ours, static shapes, graph"] = Peer([replay], host=True, counted=False)
    if not compiles:
        peers["published, eager"] = each(repeat, published["eager"])
        peers["ours, mask on the host"] = each(score, model, True, on_host, captured=False)
    else:
        call = compiled(partial(repeat, published["sdpa"]))
        peers["published, sdpa, compiled"] = Peer([call], captured=True, host=True, counted=False)
        if setting.device == "cuda":
            call = compiled(partial(repeat, published["sdpa"]), mode="reduce-overhead")
            peers["published, sdpa, reduce-overhead"] = Peer([call], host=True, counted=False)

    def truth() -> Result:
        return [plain(copy.deepcopy(model).to(torch.float64 if samples <= 64 else torch.float32))()]

    return Case(peers, truth, lambda: [plain(model)()])


# --------------------------------------------------------------------------------------------------- stage 2


def captioner(setting: Setting) -> Blip2ForConditionalGeneration:
    """Stage 2 without dropout, in front of a small frozen OPT in bfloat16."""
    stage1_model = setting.pretraining(0.0)
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
        language_model = OPTForCausalLM(config)
        return Blip2ForConditionalGeneration.from_pretraining(stage1_model, language_model.to(BF16).eval())


def captioning(setting: Setting) -> Case:
    """A training step of stage 2, forward and backward."""
    batch, tokens, device = setting.few(32, 3), setting.few(257, 17), setting.device
    model, text = captioner(setting).train(), setting.texts(batch)
    features = setting.features(batch, tokens, torch.float32)
    prompt = torch.ones(batch, dtype=torch.int64, device=device)

    def step(use_fused: bool, autocast: bool = True) -> Result:
        model.use_fused = use_fused
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, BF16, enabled=autocast):
            loss = model(**text, image_features=features, prompt_lengths=prompt).loss
        loss.backward()
        return [loss.detach().float(), model.query_tokens.grad, model.language_projection.weight.grad]

    def peer(use_fused: bool) -> Peer:
        def check() -> Result:
            return [value.clone() for value in step(use_fused)]

        return Peer([lambda: step(use_fused)], check, host=True)

    def truth() -> Result:
        model.language_model.float()
        try:
            return [value.clone() for value in step(False, autocast=False)]
        finally:
            model.language_model.to(BF16)

    plain = peer(False)
    return Case(
        {"plain": plain, OURS: peer(True)},
        truth,
        plain.check,
        order=2.0,
        rounds=0.5,
        clean=lambda: model.zero_grad(set_to_none=True),
    )


def generation(setting: Setting) -> Case:
    """Greedy captions of 20 tokens, and the soft prompt's part of the time."""
    model = captioner(setting).eval().to(BF16).requires_grad_(False)
    features = setting.features(setting.few(8, 2), setting.few(257, 17), BF16)

    def prompt(use_fused: bool) -> Tensor:
        model.use_fused = use_fused
        return model.soft_prompt(image_features=features)

    def caption(use_fused: bool) -> Tensor:
        model.use_fused = use_fused
        return model.generate(image_features=features, max_new_tokens=20, min_new_tokens=20, do_sample=False)

    def truth() -> Result:
        single = copy.deepcopy(model).float()
        single.use_fused = False
        return [without_gradients(single.soft_prompt, None, features.float())()]

    def peer(call: Callable[[bool], Tensor], use_fused: bool, **options: bool) -> Peer:
        return Peer([without_gradients(call, use_fused)], **options)

    peers = {
        "soft prompt, plain": peer(prompt, False),
        OURS: peer(prompt, True),
        "caption, plain": peer(caption, False, unchecked=True),
        "caption, ours": peer(caption, True, unchecked=True),
    }
    return Case(peers, truth, lambda: [without_gradients(prompt, False)()], rounds=0.25)


CASES: dict[str, Callable[[Setting], Case]] = {
    "queries-1": partial(queries, 1, 257),
    "queries-64": partial(queries, 64, 257, fp32=True),
    "stage1-100": partial(stage1, 100, 257),
    "rerank-1x32": partial(rerank, 32),
    "queries-8": partial(queries, 8, 257),
    "stage1-16": partial(stage1, 16, 257),
    "stage1-32-677": partial(stage1, 32, 677),
    "queries-512": partial(queries, 512, 257),
    "queries-64-677": partial(queries, 64, 677),
    "queries-8-677": partial(queries, 8, 677),
    "rerank-1x256": partial(rerank, 256),
    "captioning": captioning,
    "generation": generation,
    "queries-1-compiled": partial(queries, 1, 257, compiles=True),
    "queries-64-compiled": partial(queries, 64, 257, compiles=True),
    "rerank-1x32-compiled": partial(rerank, 32, compiles=True),
    "stage1-100-compiled": partial(stage1, 100, 257, compiles=True),
}
COMPILED = "-compiled"
"""End of the names of cases that wait for torch.compile. They come last, the others in the order of what
would be missed most."""


# -------------------------------------------------------------------------------------------------- measuring


@dataclass
class Row:
    """What is known of a peer in a case. Times by kind as `measure.Timing.json`, or a reason.

    Attributes:
        ratio: eager time over that of ours.
        kernel_ms: sum of the times of one call's kernels, by the profiler.
        kernels: the longest of them by name, milliseconds and count.
        agreement: error against truth, and what was allowed; None where nothing is compared.
        failure: why the peer failed, or that it does not agree.
        remarks: why a figure beside the times is missing.
    """

    case: str
    peer: str
    device: dict[str, float] | str | None = None
    eager: dict[str, float] | None = None
    host: dict[str, float] | None = None
    ratio: float | None = None
    peak_mib: float | None = None
    launches: int | None = None
    kernel_ms: float | None = None
    kernels: list[tuple[str, float, int]] = field(default_factory=list)
    flops: int | None = None
    agreement: dict[str, float] | None = None
    failure: str | None = None
    remarks: list[str] = field(default_factory=list)


@contextmanager
def noted(row: Row, what: str | None = None) -> Iterator[None]:
    """A failure inside becomes the row's; with `what` only a remark that this is missing."""
    try:
        yield
    except Exception as error:  # out of memory, a compiler that gives up: a result, and the others go on
        if what is None:
            row.failure = said(error)
        else:
            row.remarks.append(f"{what}: {said(error)}")


def distance(got: Result, truth: Result, order: float) -> float:
    """The largest error of any tensor, as a share of the norm of its truth."""
    worst = 0.0
    for one, right in zip(got, truth, strict=True):
        one, right = one.detach().to(right.dtype), right.detach()
        error = torch.linalg.vector_norm((one - right).flatten(), order)
        size = torch.linalg.vector_norm(right.flatten(), order).clamp(min=1e-30)
        value = float(error / size)
        worst = max(worst, value if value == value else float("inf"))
    return worst


def gate(case: Case, peer: Peer, row: Row, truth: Result | None, allowed: float) -> None:
    """Run a peer and compare it."""
    if peer.unchecked or truth is None:
        for call in peer.calls:
            call()
        return
    error = distance([value.clone() for value in peer.result()], truth, case.order)
    row.agreement = {"error": error, "allowed": allowed}
    if not error <= allowed:
        row.failure = f"does not agree: error {error:.2e}, allowed {allowed:.2e}"


def profile(peer: Peer, row: Row) -> None:
    """Kernels of one call: how many, how long, and which."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        peer.calls[0]()
        torch.cuda.synchronize()
    names: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        other = event.name.startswith(("Memcpy", "Memset", "#")) or getattr(
            event, "is_user_annotation", False
        )
        if event.device_type == DeviceType.CUDA and not other:
            spent, count = names.get(event.name, (0.0, 0))
            names[event.name] = spent + event.time_range.elapsed_us() / 1e3, count + 1
    row.launches = sum(count for _, count in names.values())
    row.kernel_ms = sum(spent for spent, _ in names.values())
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:12]
    row.kernels = [(name[:120], spent, count) for name, (spent, count) in longest]


def peak_mib(case: Case, peer: Peer) -> float:
    """Memory that one call takes at most, on top of what is there before."""
    case.clean()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peer.calls[0]()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def count_flops(peer: Peer) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        peer.calls[0]()
    return counter.get_total_flops()


def timed(case: Case, rows: dict[str, Row], setting: Setting, rounds: int) -> None:
    """All times of the peers that ran, in turn."""
    running = {name: case.peers[name] for name in rows if _runs(rows[name])}
    rounds = max(1, round(rounds * case.rounds))
    calls = {name: peer.calls for name, peer in running.items()}
    for name, timing in measure.eager_times(calls, setting.device, rounds=rounds).items():
        rows[name].eager = timing.json()
    if setting.device == "cuda":
        few = 5 if case.rounds == 1 else 1
        calls = {name: peer.calls for name, peer in running.items() if peer.host}
        for name, timing in measure.host_times(calls, rounds=max(3, rounds // 4), calls=few).items():
            rows[name].host = timing.json()
        setting.empty_cache()
        calls = {name: peer.calls for name, peer in running.items() if peer.captured}
        for name, made in measure.device_times(calls, rounds=rounds).items():
            rows[name].device = made if isinstance(made, str) else made.json()
    ours = rows[OURS].eager
    for row in rows.values():
        if ours and row.eager:
            row.ratio = row.eager["median"] / ours["median"]


def _runs(row: Row) -> bool:
    """A peer that ran is timed, also where it does not agree: the row says so."""
    return row.failure is None or row.failure.startswith("does not agree")


def run_case(name: str, setting: Setting, rounds: int, warm: bool) -> list[Row]:
    """Check and time a case."""
    case = CASES[name](setting)
    rows = {peer: Row(name, peer) for peer in case.peers}
    truth, allowed = None, 0.0
    if case.truth is not None and case.plain is not None and not warm:
        try:
            truth = [value.clone() for value in case.truth()]
            allowed = 2 * distance(case.plain(), truth, case.order) + 1e-3
        except Exception as error:
            print(f"{name}: nothing to compare with: {said(error)}", flush=True)
            truth = None
        setting.empty_cache()
    for peer, row in rows.items():
        with noted(row):
            gate(case, case.peers[peer], row, truth, allowed)
            if warm:
                case.peers[peer].calls[0]()
    if warm:
        return list(rows.values())
    del truth
    setting.empty_cache()
    try:
        timed(case, rows, setting, rounds)
    except Exception as error:
        for row in rows.values():
            row.failure = row.failure or f"while timing: {said(error)}"
    setting.empty_cache()
    for peer, row in rows.items():
        if _runs(row) and case.peers[peer].counted:
            with noted(row, "FLOPs"):
                row.flops = count_flops(case.peers[peer])
            if setting.device == "cuda":
                with noted(row, "peak"):
                    row.peak_mib = peak_mib(case, case.peers[peer])
    return list(rows.values())


def profile_case(name: str, rows: Sequence[Row], setting: Setting) -> None:
    """Look at the kernels of a case that was timed: after all, since a profiler may leave launches slower."""
    case = CASES[name](setting)
    for row in rows:
        if _runs(row) and case.peers[row.peer].counted:
            with noted(row, "kernels"):
                for call in case.peers[row.peer].calls:
                    call()
                profile(case.peers[row.peer], row)


def table(rows: Sequence[Row]) -> str:
    """The rows of a case for people."""

    def milliseconds(timing: dict[str, float] | str | None) -> str:
        if isinstance(timing, str):
            return "failed"
        return "" if timing is None else f"{timing['median']:.3f}"

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    head = f"{rows[0].case:36} {'eager':>9} {'ratio':>6} {'device':>9} {'host':>8}"
    lines = [head + f" {'peak MiB':>9} {'GFLOP':>9}  error"]
    for row in rows:
        flops = None if row.flops is None else row.flops / 1e9
        line = f"  {row.peer:34} {milliseconds(row.eager):>9} {number(row.ratio, '.2f'):>6} "
        line += f"{milliseconds(row.device):>9} {milliseconds(row.host):>8} "
        line += f"{number(row.peak_mib, '.0f'):>9} {number(flops, '.1f'):>9}"
        if row.agreement is not None:
            line += f"  {row.agreement['error']:.1e} of {row.agreement['allowed']:.1e}"
        lines.append(line.rstrip())
        if row.failure is not None:
            lines.append(f"    ! {row.failure}")
        if isinstance(row.device, str):
            lines.append(f"    ! in a graph: {row.device}")
        lines.extend(f"    ! {remark}" for remark in row.remarks)
    return "\n".join(lines)


def table_of_kernels(rows: Sequence[Row]) -> str:
    """What the profiler saw of a case's peers, for people."""
    lines = []
    for row in rows:
        if row.kernel_ms is not None:
            longest = ", ".join(f"{name[:40]} {spent:.3f} x{count}" for name, spent, count in row.kernels[:3])
            lines.append(
                f"{row.case:22} {row.peer:26} {row.launches:6d} kernels {row.kernel_ms:9.3f} ms  {longest}"
            )
        lines.extend(f"    ! {remark}" for remark in row.remarks if remark.startswith("kernels"))
    return "\n".join(lines)


def facts_of(setting: Setting, warm: bool) -> dict[str, Any]:
    """Where, with what and how this was measured."""
    roofline = measure.Roofline.measure() if setting.device == "cuda" and not warm else None
    extension_used = extension.device_reason(setting.device) or "used"
    return about(roofline, setting.device) | {"tiny": setting.tiny, "extension": extension_used}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="NAMES", help=f"cases, or parts of names: {', '.join(CASES)}"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds a case (default 20)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--budget", type=float, default=150, help="no case starts after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="without peers of torch.compile")
    parser.add_argument("--autotune", action="store_true", help="also peers in mode max-autotune")
    parser.add_argument(
        "--capture-steps", action="store_true", help="capture training steps in CUDA graphs too"
    )
    parser.add_argument("--no-profile", action="store_true", help="do not look at the kernels afterwards")
    parser.add_argument("--warm", action="store_true", help="run every peer once and time nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and batches")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.only.split(",") if name] or [""]
    chosen = [name for name in CASES if any(w == name if w in CASES else w in name for w in wanted)]
    if arguments.no_compile:
        chosen = [name for name in chosen if not name.endswith(COMPILED)]
    if not chosen or arguments.rounds < 1:
        parser.error("expected parts of cases' names, and at least one round")
    setting = Setting(arguments.device, arguments.tiny, arguments.autotune, arguments.capture_steps)
    begin = time.perf_counter()
    facts = facts_of(setting, arguments.warm)
    print(json.dumps(facts), flush=True)
    cases: dict[str, list[Row] | str] = {}

    def keep() -> None:
        if arguments.json and not arguments.warm:
            shown = {n: rows if isinstance(rows, str) else list(map(vars, rows)) for n, rows in cases.items()}
            arguments.json.write_text(json.dumps({"about": facts, "cases": shown}, indent=1) + "\n")

    def spent() -> bool:
        return time.perf_counter() - begin > arguments.budget

    for name in chosen:
        started = time.perf_counter()
        if spent():
            cases[name] = f"skipped: the budget of {arguments.budget:.0f} s is spent"
            print(f"{name}: {cases[name]}", flush=True)
            continue
        try:
            rows = run_case(name, setting, arguments.rounds, arguments.warm)
            cases[name] = rows
            print(table(rows), flush=True)
        except Exception as error:
            cases[name] = said(error)
            print(f"{name}: {said(error)}", flush=True)
        print(f"  {time.perf_counter() - started:.1f} s", flush=True)
        keep()
        torch._dynamo.reset()
        try:
            setting.empty_cache()
        except RuntimeError as error:  # an access that was not allowed: nothing runs on the GPU any more
            rest = [other for other in chosen if other not in cases]
            print(f"{name} has lost the GPU ({said(error)}); run the rest: --only {','.join(rest)}")
            return 1
    if setting.device == "cuda" and not (arguments.warm or arguments.no_profile):
        for name, rows in cases.items():
            if spent():
                print(f"{name}: its kernels are not looked at, the budget is spent", flush=True)
            elif not isinstance(rows, str) and not name.endswith(COMPILED):
                profile_case(name, rows, setting)
                print(table_of_kernels(rows), flush=True)
                keep()
                setting.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
