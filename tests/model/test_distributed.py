"""Two ranks of batch B against one rank of batch 2 B, in two gloo processes on the CPU."""

import copy
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from naive import naive_step
from pretraining_cases import (
    IMAGE_WIDTH,
    LOSSES,
    gradients,
    rank_batch,
    small_batch,
    small_model,
    some_negatives,
)

from blip2_kernels.model import distributed
from blip2_kernels.model.negatives import positive_pairs

WORLD, BATCH = 2, 3
IMAGE_IDS = torch.tensor([4, 8, 5, 8, 9, 5])
NEGATIVES_OF_IDS = (torch.tensor([3, 4, 0, 5, 2, 1]), torch.tensor([5, 2, 4, 0, 3, 0]))
TIMEOUT = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(rank: int, port: int, tasks, results) -> None:
    """One rank: runs every function it is sent and answers with its result or its traceback."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            results.put((rank, True, function(rank, *arguments)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_ranks():
    """Call a module-level function as `f(rank, *arguments)` on both ranks; returns their results in order."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    tasks = [context.Queue() for _ in range(WORLD)]
    ranks = [context.Process(target=serve, args=(rank, port, tasks[rank], results)) for rank in range(WORLD)]
    for process in ranks:
        process.start()

    def call(function: Callable, *arguments: Any) -> list[Any]:
        for queue in tasks:
            queue.put((function, arguments))
        answers = sorted((results.get(timeout=TIMEOUT) for _ in range(WORLD)), key=lambda answer: answer[0])
        for rank, succeeded, value in answers:
            assert succeeded, f"rank {rank}:\n{value}"
        return [value for _, _, value in answers]

    yield call
    for queue in tasks:
        queue.put(None)
    for process in ranks:
        process.join(timeout=30)
        if process.is_alive():
            process.terminate()


def whole_batch(shared_images: bool = False) -> dict[str, torch.Tensor]:
    inputs = small_batch(WORLD * BATCH)
    return {**inputs, "image_ids": IMAGE_IDS} if shared_images else inputs


def part(rank: int, inputs):
    """The rows of a rank."""
    rows = slice(rank * BATCH, (rank + 1) * BATCH)
    if isinstance(inputs, tuple):
        return tuple(index[rows] for index in inputs)
    return {name: x[rows] for name, x in inputs.items()}


def step(rank: int, settings: dict, shared_images: bool, negatives, seed: int) -> dict[str, Any]:
    """A step of one rank; what it computed, as plain numbers and lists that travel between processes."""
    model = small_model(dtype=torch.float64, **settings)
    torch.manual_seed(seed + rank)
    inputs = part(rank, whole_batch(shared_images))
    output = model(**inputs, negatives=None if negatives is None else part(rank, negatives))
    grads = {name: gradients(output[f"loss_{name}"], model) for name in LOSSES}
    return {
        "losses": {name: float(output[f"loss_{name}"].detach()) for name in LOSSES},
        "gradients": {n: {key: x.numpy() for key, x in grads[n].items()} for n in LOSSES},
        "negatives": [index.tolist() for index in output.negatives],
        "labels": output.itm_labels.tolist(),
        "sims": output.sim_i2t.detach().numpy(),
    }


def averaged(ranks: list[dict], loss: str) -> dict[str, torch.Tensor]:
    """Gradients as DistributedDataParallel leaves them."""
    first = ranks[0]["gradients"][loss]
    return {
        name: sum(torch.from_numpy(rank["gradients"][loss][name]) for rank in ranks) / WORLD for name in first
    }


def assert_close_gradients(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, truth in expected.items():
        torch.testing.assert_close(
            got[name], truth, rtol=0, atol=1e-10 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def one_rank(settings: dict, shared_images: bool, negatives) -> tuple[Any, torch.nn.Module]:
    model = small_model(dtype=torch.float64, **settings)
    return model(**whole_batch(shared_images), negatives=negatives), model


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("shared_images", [False, True], ids=["distinct", "image_ids"])
def test_two_ranks_are_one_rank_of_twice_the_batch(on_ranks, use_fused, shared_images):
    settings = {"use_fused": use_fused, "itc_gradient": "full", "lm_normalisation": "global"}
    negatives = NEGATIVES_OF_IDS if shared_images else some_negatives(WORLD * BATCH)
    ranks = on_ranks(step, settings, shared_images, negatives, 0)
    whole, model = one_rank(settings, shared_images, negatives)
    for name in LOSSES:
        mean = sum(rank["losses"][name] for rank in ranks) / WORLD
        assert mean == pytest.approx(float(whole[f"loss_{name}"].detach()), abs=1e-12)
        assert_close_gradients(averaged(ranks, name), gradients(whole[f"loss_{name}"], model))
    sims = torch.cat([torch.from_numpy(rank["sims"]) for rank in ranks])
    torch.testing.assert_close(sims, whole.sim_i2t)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("shared_images", [False, True], ids=["distinct", "image_ids"])
def test_sampled_negatives_reach_over_the_ranks(on_ranks, use_fused, shared_images, seed):
    settings = {"use_fused": use_fused, "itc_gradient": "full", "lm_normalisation": "global"}
    reached = set()
    for draw in range(4):
        ranks = on_ranks(step, settings, shared_images, None, (seed + 17 * draw) % 2**31)
        drawn = tuple(
            torch.cat([torch.tensor(rank["negatives"][side]) for rank in ranks]) for side in range(2)
        )
        ids = IMAGE_IDS if shared_images else None
        positives = positive_pairs(WORLD * BATCH, ids, device=torch.device("cpu"))
        for index in drawn:
            assert (index >= 0).all() and not positives.gather(1, index[:, None]).any()
            reached |= {(row // BATCH, other // BATCH) for row, other in enumerate(index.tolist())}
        whole, _ = one_rank(settings, shared_images, drawn)
        for name in LOSSES:
            mean = sum(rank["losses"][name] for rank in ranks) / WORLD
            assert mean == pytest.approx(float(whole[f"loss_{name}"].detach()), abs=1e-12)
    assert {(0, 1), (1, 0)} <= reached, "no rank ever drew from the other"


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_local_gradient_and_mean_over_own_tokens_are_those_of_lavis(on_ranks, use_fused):
    settings = {"use_fused": use_fused, "itc_gradient": "local", "lm_normalisation": "rank"}
    negatives = some_negatives(WORLD * BATCH)
    ranks = on_ranks(step, settings, False, negatives, 0)
    model = small_model(dtype=torch.float64, **settings)
    batches = [rank_batch(part(rank, whole_batch()), part(rank, negatives)) for rank in range(WORLD)]
    params = dict(model.named_parameters())
    naive = naive_step(params, model.config, batches, itc_gradient="local", lm_normalisation="rank")
    full = naive_step(params, model.config, batches, itc_gradient="full", lm_normalisation="global")
    for name in LOSSES:
        for rank in range(WORLD):
            # The fused path computes a matching row on the rank that owns the image: only the mean is fixed.
            if name != "itm":
                expected = float(naive[rank][name].detach())
                assert ranks[rank]["losses"][name] == pytest.approx(expected, abs=1e-12)
        mean = sum(result[name] for result in naive) / WORLD
        assert_close_gradients(averaged(ranks, name), gradients(mean, model))
    for name in ("itc", "itg"):
        other = gradients(sum(result[name] for result in full) / WORLD, model)
        with pytest.raises(AssertionError):
            assert_close_gradients(averaged(ranks, name), other)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_rows_without_negative_are_left_out_of_the_mean_of_all_ranks(on_ranks, use_fused):
    settings = {"use_fused": use_fused, "itc_gradient": "full", "lm_normalisation": "global"}
    # On the fused path rank 1 owns none of the drawn images, so no text travels to it.
    negatives = (torch.tensor([1, -1, -1, 1, 0, 1]), torch.tensor([-1, -1, -1, 2, -1, 0]))
    ranks = on_ranks(step, settings, False, negatives, 0)
    whole, model = one_rank(settings, False, negatives)
    mean = sum(rank["losses"]["itm"] for rank in ranks) / WORLD
    assert mean == pytest.approx(float(whole.loss_itm.detach()), abs=1e-12)
    assert_close_gradients(averaged(ranks, "itm"), gradients(whole.loss_itm, model))
    counts = [sum(label >= 0 for label in rank["labels"]) for rank in ranks]
    assert sum(counts) == 12 and counts[0] != counts[1]


def gathered(rank: int, use_fused: bool) -> list[list[int]]:
    """Shapes of all tensors that collectives were given during a step, forward and backward."""
    shapes: list[list[int]] = []
    names = [
        name
        for name in (
            "all_gather",
            "all_gather_into_tensor",
            "all_reduce",
            "all_to_all",
            "broadcast",
            "gather",
        )
        if hasattr(dist, name)
    ] + ["all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "isend"]
    originals = {name: getattr(dist, name) for name in names}

    def spy(name: str):
        def call(*args, **kwargs):
            for x in (*args, *kwargs.values()):
                tensors = x if isinstance(x, list | tuple) else [x]
                shapes.extend(list(t.shape) for t in tensors if isinstance(t, torch.Tensor))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, spy(name))
    try:
        model = small_model(dtype=torch.float64, use_fused=use_fused)
        output = model(**part(rank, whole_batch()), negatives=part(rank, some_negatives(WORLD * BATCH)))
        output.loss.backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return shapes


def test_no_image_feature_travels_on_the_fused_path(on_ranks):
    """Contrastive features do, which are smaller; the plain path, which gathers images, is the canary."""

    def of_images(shapes: list[list[int]]) -> list[list[int]]:
        return [shape for shape in shapes if len(shape) >= 3 and shape[-1] == IMAGE_WIDTH]

    for shapes in on_ranks(gathered, True):
        assert shapes and not of_images(shapes), shapes
    for shapes in on_ranks(gathered, False):
        assert of_images(shapes), shapes


def dropping_step(rank: int, use_fused: bool) -> dict[str, Any]:
    """A step with dropout under one Philox key of all ranks."""
    settings = {"use_fused": use_fused, "itc_gradient": "full", "lm_normalisation": "global"}
    model = small_model(dtype=torch.float64, dropout=0.3, **settings).train()
    torch.manual_seed(5)
    negatives = some_negatives(WORLD * BATCH)
    output = model(**part(rank, whole_batch()), negatives=part(rank, negatives))
    losses = {name: float(output[f"loss_{name}"].detach()) for name in LOSSES}
    return {"losses": losses, "logits": output.itm_logits[:BATCH].tolist()}


def test_dropout_on_two_ranks(on_ranks):
    """Contrast, captions and the matching of true pairs drop the same on both paths. What is computed on the
    image's rank has another place in its batch there, and so another mask (docs/decisions.md)."""
    plain, fused = on_ranks(dropping_step, False), on_ranks(dropping_step, True)
    for one, other in zip(plain, fused, strict=True):
        for name in ("itc", "itg"):
            assert other["losses"][name] == pytest.approx(one["losses"][name], abs=1e-12)
        assert torch.allclose(torch.tensor(one["logits"]), torch.tensor(other["logits"]), atol=1e-12)


def unequal_batches(rank: int) -> list[str]:
    """What each kind of mismatch raises on this rank."""
    inputs = small_batch(2 + rank)
    longer = copy.deepcopy(small_batch(2, length=7 + rank))
    messages = []
    for batch in (inputs, longer):
        try:
            small_model()(**batch)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_ranks_with_unequal_batches_are_told_so(on_ranks):
    for messages in on_ranks(unequal_batches):
        assert messages[0] == "input_ids: expected one shape on all ranks, got [[2, 7], [3, 7]]"
        assert messages[1] == "input_ids: expected one shape on all ranks, got [[2, 7], [2, 8]]"


def unlike_arguments(rank: int, use_fused: bool) -> list[str]:
    """What arguments that only one rank has, or has otherwise, raise on this rank."""
    ids, negatives = torch.arange(BATCH), some_negatives(BATCH, WORLD, rank)
    batch = small_batch(BATCH)
    on_one = [
        {"image_ids": ids},
        {"image_ids": ids.int()},
        {"negatives": negatives},
        {"losses": ("itc",)},
        {"input_ids": batch["input_ids"].int()},
    ]
    on_other = [{}, {"image_ids": ids}, {}, {"losses": ("itc", "itg")}, {}]
    messages = []
    for arguments in (on_one, on_other)[rank]:
        try:
            small_model(use_fused=use_fused)(**{**batch, **arguments})
            messages.append("went on")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_ranks_with_unlike_arguments_are_told_so(on_ranks, use_fused):
    for messages in on_ranks(unlike_arguments, use_fused):
        assert messages == [
            "image_ids: expected the same on all ranks, got ['torch.int64', 'None']",
            "image_ids: expected the same on all ranks, got ['torch.int32', 'torch.int64']",
            "negatives: expected the same on all ranks, got ['given', 'drawn']",
            "losses (itg): expected the same on all ranks, got ['False', 'True']",
            "input_ids: expected the same on all ranks, got ['torch.int32', 'torch.int64']",
        ]


def gathers(rank: int) -> dict[str, Any]:
    x = torch.full((2, 3), float(rank + 1), requires_grad=True)
    every = distributed.all_gather_with_grad(x)
    # Each rank weighs the rows differently; rank r's rows get the sum of all ranks' weights for them.
    weights = torch.arange(4.0)[:, None] + 10 * rank
    (every * weights).sum().backward()
    plain = distributed.all_gather(x)
    return {
        "every": every.tolist(),
        "grad": x.grad[:, 0].tolist(),
        "plain": (plain.tolist(), plain.requires_grad),
        "sum": distributed.global_sum(torch.tensor(rank + 1)).item(),
        "rank": (distributed.get_rank(), distributed.get_world_size()),
    }


def test_gathers(on_ranks):
    expected = [[1.0] * 3] * 2 + [[2.0] * 3] * 2
    for rank, result in enumerate(on_ranks(gathers)):
        assert result["every"] == expected and result["plain"] == (expected, False)
        assert result["grad"] == [[10.0, 12.0], [14.0, 16.0]][rank]
        assert result["sum"] == 3 and result["rank"] == (rank, WORLD)


def test_without_a_process_group_everything_is_the_identity():
    x = torch.ones(2, requires_grad=True)
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert distributed.all_gather(x) is x and distributed.all_gather_with_grad(x) is x
    assert distributed.global_sum(x) is x
    distributed.check_same_batch({"x": x}, {"y": ("a", ("a", "b"))})
