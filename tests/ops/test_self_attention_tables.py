"""What backend `torch` of self_attention keeps of a pair of layouts; and one sample alone."""

import gc
import weakref

import pytest
import torch
from tolerances import max_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops import self_attention
from blip2_kernels.ops.self_attention import kept, sdpa

U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
MODES = [(U,), (B,), (C,), (U, C)]
MODE_IDS = ["unimodal", "bidirectional", "causal", "pair"]


def layout_of(lengths: list[int], segments: int = 1, padded: bool = False) -> TokenLayout:
    masks = [(torch.arange(9) < torch.tensor(lengths)[:, None]).int() for _ in range(segments)]
    return TokenLayout.from_attention_masks(5, masks, padded=padded)


def rows_of(layout: TokenLayout) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(layout.rows, 2, 8, dtype=torch.float64, generator=generator) for _ in range(3)]


def attend(layout: TokenLayout, *modes: MaskMode, backend: str = "torch") -> torch.Tensor:
    return self_attention(*rows_of(layout), layout, layout, AttentionMask(modes), backend=backend)


@pytest.fixture
def made(monkeypatch):
    """The masks of the tables that were made."""
    masks = []
    make = sdpa.TABLES.make
    monkeypatch.setattr(sdpa.TABLES, "make", lambda q, kv, mask: masks.append(mask) or make(q, kv, mask))
    return masks


@pytest.mark.parametrize("modes", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("length", [0, 4, 9])
def test_one_sample(length, padded, modes):
    """All, some and no row of the queries among those that attend."""
    layout = layout_of([length], len(modes), padded)
    q, k, v = rows_of(layout)
    for queries, text in ((True, "all"), (False, "all"), (True, "none")):
        kept, index = layout.select(queries=queries, texts=[text] * len(modes))
        got, want = (
            self_attention(q[index], k, v, kept, layout, AttentionMask(modes), backend=backend)
            for backend in ("torch", "reference")
        )
        assert max_error(got, want) <= 1e-12
    rows = layout.dense().spread(q)
    assert torch.equal(layout.dense().collect(rows), q) and rows.shape[0] == 1


def test_a_table_is_made_once_for_a_pair_of_layouts_and_a_mask(made):
    layout, other = layout_of([3, 9]), layout_of([9, 3])
    for _ in range(3):
        attend(layout, B)
    assert made == [AttentionMask((B,))]
    causal, further = attend(layout, C), attend(other, B)
    assert made == [AttentionMask((mode,)) for mode in (B, C, B)]
    assert max_error(causal, attend(layout, C, backend="reference")) <= 1e-12
    assert max_error(further, attend(other, B, backend="reference")) <= 1e-12
    text, index = layout.select(queries=False)
    q, k, v = rows_of(layout)
    for _ in range(2):
        self_attention(q[index], k, v, text, layout, AttentionMask((C,)), backend="torch")
    assert len(made) == 4


def test_a_table_lives_as_long_as_its_layouts():
    layout = layout_of([3, 9])
    kept, index = layout.select(queries=False)
    q, k, v = rows_of(layout)
    self_attention(q[index], k, v, kept, layout, AttentionMask((C,)), backend="torch")
    attend(layout, C)
    table = weakref.ref(sdpa.TABLES.tables[kept][layout][AttentionMask((C,))])
    own = weakref.ref(sdpa.TABLES.tables[layout][layout][AttentionMask((C,))])
    gc.disable()
    try:
        del kept
        assert table() is None and own() is not None
        del layout
        assert own() is None
    finally:
        gc.enable()


def test_a_table_of_an_inference_serves_a_training_step():
    layout = layout_of([3, 9])
    with torch.inference_mode():
        attend(layout, C)
    leaves = [t.requires_grad_() for t in rows_of(layout)]
    out = self_attention(*leaves, layout, layout, AttentionMask((C,)), backend="torch")
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("transform", ["functionalize", "vmap", "grad of grad", "function mode"])
def test_what_others_made_is_not_kept(transform, made):
    """Their tensors may be their own, and must not come back in a later call."""
    layout = layout_of([3, 9])
    q, k, v = (t.float() for t in rows_of(layout))

    def call(q: torch.Tensor) -> torch.Tensor:
        return self_attention(q, k, v, layout, layout, AttentionMask((C,)), backend="torch")

    def gradient(q: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.grad(lambda q: call(q).sum())(q)

    expected = self_attention(q, k, v, layout, layout, AttentionMask((C,)), backend="reference")
    made.clear()
    if transform == "functionalize":
        torch.func.functionalize(call)(q)
    elif transform == "vmap":
        torch.vmap(call)(q[None])
    elif transform == "grad of grad":
        torch.func.grad(lambda q: gradient(q).square().sum())(q)
    else:
        with BaseTorchFunctionMode():
            call(q)
    assert made and not sdpa.TABLES.tables.get(layout)
    if transform == "grad of grad":
        gradient(q)
    assert max_error(call(q), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_trace_has_what_makes_a_table_in_it():
    """Both times: torch traces again to check, between calls that keep a table."""
    layout = layout_of([3, 9])
    q, k, v = rows_of(layout)

    def call(*tensors: torch.Tensor) -> torch.Tensor:  # the default scale would be a traced one, in fp32
        return self_attention(*tensors, layout, layout, AttentionMask((C,)), scale=0.25, backend="torch")

    traced = torch.jit.trace(call, (q, k, v))
    assert max_error(traced(q, k, v), call(q, k, v)) <= 1e-12
    assert "index_copy" in str(traced.graph)


def test_a_large_table_is_not_kept(made, monkeypatch):
    layout = layout_of([3, 9])
    pairs = 2 * (5 + 9) ** 2
    for most, tables in ((pairs - 1, 2), (pairs, 1)):
        made.clear()
        monkeypatch.setattr(kept, "MOST_PAIRS", most)
        for _ in range(2):
            attend(layout, C)
        assert len(made) == tables


def test_rows_are_contiguous_for_one_sample_too():
    layout = layout_of([4])
    leaves = [t.bfloat16().requires_grad_() for t in rows_of(layout)]
    out = self_attention(*leaves, layout, layout, AttentionMask((B,)), backend="torch")
    assert out.is_contiguous()
    with pytest.raises(RuntimeError):
        layout.dense().spread(torch.zeros(layout.rows + 1, 2))


def test_a_mode_sees_every_operation_and_leaves_no_table(made):
    """What a mode makes of tensors may be its own."""
    layout = layout_of([3, 9])

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operations = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations.append(function)
            return function(*args, **kwargs or {})

    with Seen() as first:
        attend(layout, C)
    assert len(made) == 1
    attend(layout, C)
    with Seen() as second:
        attend(layout, C)
    assert len(made) == 3 and first.operations == second.operations
    attend(layout, C)
    assert len(made) == 3
