"""The fused path against its peers at full size, pair by pair in one process.

    python bench/savings.py                         every case (about 40 minutes on 2 cores)
    python bench/savings.py --only stage1-257 --pairs 5
    python bench/savings.py --json savings.json     keeps every time, with device and versions
    python bench/savings.py --same-library          our fp32 products by MKL too: the savings alone
    python bench/savings.py --peak --only stage1    peak memory of each side, in processes of their own

BERT-base Q-Former (12 layers, 768 channels), 32 queries, image width 1408, random weights, fp32 unless the
case says otherwise. A figure is the ratio of the medians of interleaved runs. Both sides must agree first.
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.qformer import QFormerModel

BATCH, WIDTH, QUERIES, PADDED = 8, 1408, 32, 32
LENGTHS = (8, 16, 10, 14, 12, 12, 9, 15)
"""Tokens of the captions: 12 on average."""


@dataclass(frozen=True)
class Case:
    """Two ways to compute the same.

    Attributes:
        peer: name of the first.
        run_peer, run_ours: each returns what the two must agree on.
        tolerance: of their largest difference.
    """

    peer: str
    run_peer: Callable[[], torch.Tensor]
    run_ours: Callable[[], torch.Tensor]
    tolerance: float


def stage1_model(dropout: float) -> Blip2ForPreTraining:
    torch.manual_seed(0)
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    qformer = Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=True, **rates)
    return Blip2ForPreTraining(Blip2PreTrainingConfig(qformer))


def texts(samples: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(samples)])
    mask = (torch.arange(PADDED) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (samples, PADDED), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 101
    return {"input_ids": ids * mask, "attention_mask": mask}


def features(images: int, tokens: int) -> torch.Tensor:
    return torch.randn(images, tokens, WIDTH, generator=torch.Generator().manual_seed(2))


def stage1(tokens: int, dropout: float = 0.0, autocast: bool = False) -> Case:
    model = stage1_model(dropout).train()
    own = torch.arange(BATCH)
    negatives = (own + 3) % BATCH, (own + 1) % BATCH
    inputs = texts(BATCH) | {"image_features": features(BATCH, tokens), "negatives": negatives}

    def step(use_fused: bool) -> torch.Tensor:
        model.use_fused = use_fused
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and use_fused):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach().float()

    peer = "plain, fp32" if autocast else "plain"
    return Case(peer, lambda: step(False), lambda: step(True), 0.1 if autocast else 1e-4)


def query_only(tokens: int) -> Case:
    torch.manual_seed(0)
    config = Blip2QFormerConfig(attn_implementation="sdpa")
    theirs = Blip2QFormerModel(config).eval()
    ours = QFormerModel(config, use_fused=True).eval()
    ours.load_state_dict(theirs.state_dict())
    queries, images = torch.randn(1, QUERIES, 768).expand(BATCH, -1, -1), features(BATCH, tokens)

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(query_embeds=queries, encoder_hidden_states=images).last_hidden_state

    return Case("transformers, sdpa", lambda: run(theirs), lambda: run(ours), 1e-4)


def rerank() -> Case:
    model, text, image = stage1_model(0.0).eval(), texts(32), features(1, 257)
    index = torch.zeros(32, dtype=torch.int32)

    def run(use_fused: bool) -> torch.Tensor:
        model.use_fused = use_fused
        with torch.inference_mode():
            hidden = model.get_multimodal_features(**text, image_features=image, image_index=index)
            return model.match(hidden)

    return Case("plain", lambda: run(False), lambda: run(True), 1e-4)


CASES: dict[str, Callable[[], Case]] = {
    "stage1-257": lambda: stage1(257),
    "stage1-677": lambda: stage1(677),
    "stage1-257-dropout": lambda: stage1(257, dropout=0.1),
    "stage1-677-dropout": lambda: stage1(677, dropout=0.1),
    "stage1-257-bf16": lambda: stage1(257, autocast=True),
    "queries-257": lambda: query_only(257),
    "queries-677": lambda: query_only(677),
    "queries-2056": lambda: query_only(2056),
    "rerank-1x32": rerank,
}


def without_onednn(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run with fp32 products by the library that torch prefers."""
    torch.backends.mkldnn.enabled = False
    try:
        return run()
    finally:
        torch.backends.mkldnn.enabled = True


def measure(case: Case, pairs: int) -> dict[str, list[float]]:
    """Seconds of interleaved runs, a warm-up of each and a comparison before them."""
    error = float((case.run_peer() - case.run_ours()).abs().max())
    if not error <= case.tolerance:
        raise SystemExit(
            f"the two sides differ by {error:.2e}, more than {case.tolerance:.0e}: nothing is timed"
        )
    seconds: dict[str, list[float]] = {"peer": [], "ours": []}
    for _ in range(pairs):
        for name, run in (("peer", case.run_peer), ("ours", case.run_ours)):
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def resident_mib(field: str) -> float:
    """Resident memory of this process as Linux has it: VmRSS now, VmHWM at most. (`ru_maxrss` of a process
    starts from its parent's.)"""
    sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return int(sizes[field]) / 1024


def peak_mib(name: str, side: str, threads: int) -> tuple[float, float]:
    """Resident MiB of this process with a case's weights and inputs, and at most during one run."""
    torch.set_num_threads(threads)
    case = CASES[name]()
    before = resident_mib("VmRSS")
    (case.run_peer if side == "peer" else case.run_ours)()
    return before, resident_mib("VmHWM")


def report_peaks(names: list[str], threads: int) -> dict[str, dict[str, float]]:
    """One run of each side in a process that does nothing else."""
    results = {}
    for name in names:
        peaks = {}
        for side in ("peer", "ours"):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                before, peaks[side] = process.apply(peak_mib, (name, side, threads))
            print(
                f"{name:20} {side:5} peak {peaks[side]:6.0f} MiB, {peaks[side] - before:6.0f} more than with "
                "weights and inputs alone",
                flush=True,
            )
            peaks[f"{side}, before"] = before
        results[name] = peaks
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help=f"cases among {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs a case (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with (default 2)")
    parser.add_argument(
        "--same-library", action="store_true", help="multiply with the peer's BLAS, not with oneDNN"
    )
    parser.add_argument("--peak", action="store_true", help="measure peak memory, not times (Linux)")
    parser.add_argument("--json", type=Path, help="write every time here")
    arguments = parser.parse_args()
    chosen = [name for name in CASES if arguments.only in name]
    if not chosen or arguments.pairs < 1 or arguments.threads < 1:
        parser.error("expected a part of a case's name, and at least one pair and one thread")
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = report_peaks(chosen, arguments.threads) if arguments.peak else {}
    for name in [] if arguments.peak else chosen:
        case = CASES[name]()
        if arguments.same_library:
            case = replace(case, run_ours=partial(without_onednn, case.run_ours))
        seconds = measure(case, arguments.pairs)
        peer, ours = (statistics.median(seconds[side]) for side in ("peer", "ours"))
        print(
            f"{name:20} {peer / ours:5.2f} x   {ours:7.3f} s against {peer:7.3f} s ({case.peer}); "
            f"{arguments.pairs} pairs",
            flush=True,
        )
        results[name] = {"peer": case.peer, "ratio": peer / ours, "seconds": seconds}
    if arguments.json:
        about = {
            "device": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "our products by": "MKL" if arguments.same_library else "the faster library",
            "transformers": transformers.__version__,
        }
        arguments.json.write_text(json.dumps({"about": about, "cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
