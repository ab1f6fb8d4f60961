"""Times candidate tiles, warps and stages of every kernel on this GPU, beside those of the launch tables.

    python bench/tune.py                         every kernel
    python bench/tune.py --only cross --top 10
    python bench/tune.py --warm --share 0/8      compiles an eighth of the candidates and times nothing

bf16, at shapes of bench/bench_attention.py and bench/bench_latent_similarity.py. Nothing is changed: what is
better goes into the launch tables by hand.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bench_attention
import bench_latent_similarity
import torch
from about import about
from cases import OURS, Setting
from measure import Call, Timing, device_times, said

from blip2_kernels.ops.cross_attention import launch as cross
from blip2_kernels.ops.image_text_similarity import launch as similarity
from blip2_kernels.ops.latent_attention import launch as latent
from blip2_kernels.ops.launching import Config
from blip2_kernels.ops.self_attention import launch as self_launch
from blip2_kernels.ops.self_attention.triton import op as self_op

CURRENT = "as shipped"
CASES = bench_attention.CASES | bench_latent_similarity.CASES


@dataclass(frozen=True)
class Target:
    """A kernel to look at.

    Attributes:
        cases: by which it is judged.
        use: the context in which a candidate serves.
        candidates: what is tried.
        backward: whether the gradients are timed too.
    """

    cases: tuple[str, ...]
    use: Callable[[Config], AbstractContextManager]
    candidates: tuple[Config, ...]
    backward: bool = False


def grid(make: Callable[..., Config], *choices: tuple[int, ...]) -> tuple[Config, ...]:
    return tuple(make(*choice) for choice in itertools.product(*choices))


@contextmanager
def one_tile(name: str, changed: Config) -> Iterator[None]:
    """Let `launch.<name>` give its own tile with other warps, stages and, where it has one, SLICE."""
    shipped = getattr(self_launch, name)

    def other(*arguments) -> Config:
        config = shipped(*arguments)
        blocks = dict(config.blocks) | {n: s for n, s in changed.blocks if s}
        return _interned(Config.of(changed.num_warps, changed.num_stages, **blocks))

    setattr(self_launch, name, other)
    self_op._plan.cache_clear()
    try:
        yield
    finally:
        setattr(self_launch, name, shipped)
        self_op._plan.cache_clear()


_configs: dict[Config, Config] = {}


def _interned(config: Config) -> Config:
    """Equal configurations as one object: launches are looked up by identity."""
    return _configs.setdefault(config, config)


def _tile(rows: int, tokens: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=rows, BLOCK_N=tokens)


SELF = ("self-queries-64", "self-itm-64", "self-itc+itg-64", "self-itc+itg-512")
TARGETS: dict[str, Target] = {
    "self forward": Target(
        SELF, partial(one_tile, "one_tile_config"), grid(lambda w: Config.of(w, 1), (1, 2, 4, 8))
    ),
    "self backward": Target(
        SELF,
        partial(one_tile, "one_tile_backward"),
        grid(lambda w, s: Config.of(w, 1, SLICE=s), (1, 2, 4, 8), (16, 32, 64)),
        backward=True,
    ),
    "cross forward": Target(
        ("cross-64x257", "cross-64x2056", "cross-64x257-by-3", "cross-1x257"),
        cross.FORWARD.overridden,
        grid(_tile, (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        + grid(_tile, (32,), (32, 64), (1, 2), (2, 3, 4)),
    ),
    "cross backward alone": Target(
        ("cross-64x257", "cross-64x677"),
        cross.BACKWARD_ALONE.overridden,
        grid(_tile, (32,), (32, 64, 128), (2, 4, 8), (1, 2, 3)),
        backward=True,
    ),
    "cross backward shared": Target(
        ("cross-64x257-by-3", "cross-1x257-by-128"),
        cross.BACKWARD_SHARED.overridden,
        grid(_tile, (64, 128), (32, 64, 128), (4, 8), (1, 2)),
        backward=True,
    ),
    "cross backward dropped": Target(
        ("cross-64x257-by-3-dropout",),
        cross.BACKWARD_SHARED.overridden,
        grid(_tile, (128,), (32, 64), (4, 8), (1, 2)),
        backward=True,
    ),
    "cross backward keys": Target(
        ("cross-64x257-by-3", "cross-1x257-by-128"),
        cross.BACKWARD_KEYS.overridden,
        grid(_tile, (32, 64), (32, 64, 128), (4, 8), (1, 2)),
        backward=True,
    ),
    "latent scores": Target(
        ("latent-8x257", "latent-64x257"),
        latent.SCORES.overridden,
        grid(latent._scores, (64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)),
    ),
    "latent output": Target(
        ("latent-8x257", "latent-64x257"),
        latent.OUTPUT.overridden,
        grid(latent._output, (64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)),
    ),
    "similarity forward": Target(
        ("similarity-1000x5000",),
        similarity.FORWARD.overridden,
        tuple(
            similarity._forward(32, texts=t, rows=r, channels=c, warps=w, stages=s)
            for t, r, c, w, s in itertools.product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
        ),
    ),
}


def candidate_calls(target: Target, case_name: str, config: Config | None) -> list[Call]:
    """Our calls of a case, forward alone or with its backward, under a candidate or as shipped."""

    def calls() -> list[Call]:
        case = CASES[case_name + "-backward" * target.backward].build(Setting("cuda", compiles=False))
        ours = case.peers[OURS]
        return [] if isinstance(ours, str) else list(ours.calls[:4])

    if config is None:
        return calls()

    def under(call: Call) -> object:
        with target.use(config):
            return call()

    with target.use(config):
        return [partial(under, call) for call in calls()]


def look_at(name: str, rounds: int, warm: bool, share: tuple[int, int]) -> dict[str, dict[str, object]]:
    """Timings by case and configuration; with `warm` one call of this share's candidates only."""
    target = TARGETS[name]
    found: dict[str, dict[str, object]] = {}
    candidates = [*target.candidates][share[0] :: share[1]] if warm else [None, *target.candidates]
    for case_name in target.cases:
        calls = {}
        for config in candidates:
            label = CURRENT if config is None else str(config)
            try:
                made = candidate_calls(target, case_name, config)
                made[0]()
                calls[label] = made
            except Exception as error:
                found.setdefault("failed", {})[label] = said(error)
        torch.cuda.synchronize()
        if not warm:
            found[case_name] = device_times(calls, rounds=rounds, least_ms=0.5)
        torch.cuda.empty_cache()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help=f"kernels among {', '.join(TARGETS)}")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default 10)")
    parser.add_argument("--top", type=int, default=5, help="lines a case (default 5)")
    parser.add_argument("--json", type=Path, help="write every time here")
    parser.add_argument("--warm", action="store_true", help="compile everything, time nothing")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th candidate from the I-th on")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device")
    torch.manual_seed(0)
    share = tuple(map(int, arguments.share.split("/")))
    results = {}
    for name in [name for name in TARGETS if arguments.only in name]:
        found = look_at(name, arguments.rounds, arguments.warm, share)
        for case_name, times in found.items():
            if case_name == "failed":
                continue
            timed = {label: t for label, t in times.items() if isinstance(t, Timing)}
            if not timed:
                print(f"{name}, {case_name}: nothing ran: {times}", flush=True)
                continue
            now = timed.get(CURRENT)
            print(f"{name}, {case_name}: as shipped {now}", flush=True)
            for label, timing in sorted(timed.items(), key=lambda item: item[1].median)[: arguments.top]:
                print(f"    {timing.median * 1e3:9.2f} us  {label}", flush=True)
        results[name] = {
            case: {label: t.json() if isinstance(t, Timing) else t for label, t in times.items()}
            for case, times in found.items()
        }
        if arguments.json and not arguments.warm:
            arguments.json.write_text(json.dumps({"about": about(), "kernels": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
