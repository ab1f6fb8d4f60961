"""The dropout contract: known answers, and every element against Philox in plain Python integers."""

import random
import time

import pytest
import torch
from naive_attention import keep_element, philox_words

from blip2_kernels.layout import TEXT_STREAM, padded_row_keys, row_keys
from blip2_kernels.ops import philox
from blip2_kernels.ops.philox import Site

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, words):
    got = philox.philox_4x32_10(tuple(torch.tensor([c]) for c in counter), torch.tensor(key))
    assert tuple(int(word) for word in got) == words
    assert philox_words(counter, key) == words


# One row of the dropout contract, spelt out: which channels survive for a given key, row, layer and site.
def test_known_answer_of_the_contract():
    key = torch.tensor(0x0123456789ABCDEF)
    row = row_keys(TEXT_STREAM, torch.tensor([5]), torch.tensor([3]))
    assert row.tolist() == [(1 << 29) + (5 << 10) + 3]
    keep = philox.hidden_keep_mask(key, row, 16, 0.5, layer=2, site=Site.FEED_FORWARD)
    words = philox_words((536876035, 0, 0, 20), 0x0123456789ABCDEF)
    words += philox_words((536876035, 1, 0, 20), 0x0123456789ABCDEF)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert keep[0].tolist() == [half >= 32768 for half in halves]


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_hidden_mask_element_by_element(channels, p):
    key = torch.tensor(-1234567890123456789)
    rows = padded_row_keys(3, 2, torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]]), first_sample=7)
    keep = philox.hidden_keep_mask(key, rows, channels, p, layer=3, site=Site.CROSS_OUTPUT)
    assert keep.shape == (*rows.shape, channels)
    for i, row in enumerate(rows.flatten().tolist()):
        for c in range(channels):
            expected = keep_element(int(key), row, c, 0, 3, Site.CROSS_OUTPUT, p)
            assert bool(keep.flatten(0, 1)[i, c]) == expected


@pytest.mark.parametrize("num_queries", [0, 1, 5, 8])
def test_attention_mask_element_by_element(num_queries):
    key = torch.tensor(987654321)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    names = padded_row_keys(2, num_queries, mask)
    keep = philox.attention_keep_mask(key, names, names, 3, 0.3, layer=1, site=Site.SELF_ATTENTION)
    for s in range(2):
        for h in range(3):
            for i, query in enumerate(names[s].tolist()):
                row = [keep_element(987654321, query, k, h, 1, 0, 0.3) for k in names[s].tolist()]
                assert keep[s, h, i].tolist() == row


def test_image_tokens_go_by_their_ordinal():
    key, names = torch.tensor(55), padded_row_keys(2, 3)
    ordinals = torch.arange(13, dtype=torch.int32)
    keep = philox.attention_keep_mask(key, names, ordinals, 2, 0.5, layer=4, site=Site.CROSS_ATTENTION)
    query = int(names[1, 2])
    expected = [keep_element(55, query, n, 1, 4, Site.CROSS_ATTENTION, 0.5) for n in range(13)]
    assert keep[1, 1, 2].tolist() == expected


def test_masks_do_not_depend_on_order_or_company():
    seed = random.randrange(2**31)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    key = philox.draw_key(generator=generator)
    names = padded_row_keys(5, 9, torch.ones(5, 6))
    keep = philox.attention_keep_mask(key, names, names, 2, 0.4, layer=0, site=Site.SELF_ATTENTION)
    samples, columns = torch.randperm(5, generator=generator), torch.randperm(15, generator=generator)
    moved = names[samples][:, columns]
    again = philox.attention_keep_mask(key, moved, moved, 2, 0.4, layer=0, site=Site.SELF_ATTENTION)
    assert torch.equal(again, keep[samples][:, :, columns][..., columns])
    alone = philox.attention_keep_mask(
        key, names[2:3], names[2:3, 4:7], 2, 0.4, layer=0, site=Site.SELF_ATTENTION
    )
    assert torch.equal(alone[0], keep[2, :, :, 4:7])


def test_chunks_join_without_a_seam(monkeypatch):
    names = padded_row_keys(7, 5)
    whole = philox.hidden_keep_mask(torch.tensor(3), names, 40, 0.2, layer=0, site=Site.EMBEDDINGS)
    monkeypatch.setattr(philox, "CHUNK", 4)
    parts = philox.hidden_keep_mask(torch.tensor(3), names, 40, 0.2, layer=0, site=Site.EMBEDDINGS)
    assert torch.equal(whole, parts)


def test_sites_layers_heads_and_keys_differ_and_the_rate_is_right():
    names = padded_row_keys(64, 32)
    masks = {
        (key, layer, site): philox.hidden_keep_mask(torch.tensor(key), names, 64, 0.1, layer=layer, site=site)
        for key in (1, 2)
        for layer in (0, 11)
        for site in Site
    }
    flat = torch.stack([mask.flatten() for mask in masks.values()]).double()
    n = flat.shape[1]
    # Six standard deviations of a binomial of n elements.
    assert ((flat.mean(1) - 0.9).abs() < 6 * (0.09 / n) ** 0.5).all()
    centred = flat - flat.mean(1, keepdim=True)
    correlation = (centred @ centred.T) / (0.09 * n)
    assert (correlation - torch.eye(len(masks))).abs().max() < 0.02


def test_dropout_scales_by_the_exact_rate_and_passes_gradients():
    x = torch.randn(4, 6, 33, dtype=torch.float64, requires_grad=True)
    names = padded_row_keys(4, 6)
    out = philox.dropout_hidden(x, 0.3, torch.tensor(9), names, layer=0, site=Site.EMBEDDINGS)
    keep = philox.hidden_keep_mask(torch.tensor(9), names, 33, 0.3, layer=0, site=Site.EMBEDDINGS)
    factor = keep.double() * (65536 / (65536 - round(0.3 * 65536)))
    assert torch.equal(out, x * factor)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, factor)
    assert philox.dropout_hidden(x, 0.0, torch.tensor(9), names, layer=0, site=Site.EMBEDDINGS) is x


def test_draw_key_follows_the_default_generator():
    torch.manual_seed(5)
    first, second = philox.draw_key(), philox.draw_key()
    torch.manual_seed(5)
    assert int(philox.draw_key()) == int(first) != int(second)
    assert first.dtype == torch.int64 and first.shape == ()


def test_forty_million_elements_a_second():
    """Of processor time: what else the machine does is no fault of Philox."""
    names = padded_row_keys(64, 32)
    best = 0.0
    for _ in range(7):
        start = time.process_time()
        keep = philox.hidden_keep_mask(torch.tensor(1), names, 768, 0.1, layer=0, site=Site.EMBEDDINGS)
        best = max(best, keep.numel() / (time.process_time() - start))
    assert best >= 40e6, f"{best / 1e6:.0f} M elements/s"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"p": 1.0}, ValueError, "p: expected a number in [0, 1), got 1.0"),
        ({"p": -0.1}, ValueError, "p: expected"),
        ({"p": "0.1"}, TypeError, "p: expected"),
        ({"p": float("nan")}, ValueError, "p: expected"),
        ({"key": 5}, TypeError, "key: expected a tensor int64 []"),
        ({"key": torch.zeros(2, dtype=torch.int64)}, ValueError, "key: expected int64 []"),
        ({"key": torch.zeros(())}, TypeError, "key: expected int64 [], got float32 []"),
        ({"row_keys": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, "row_keys: expected int32 [3, 2]"),
        ({"row_keys": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "row_keys: expected int32 [3, 2]"),
        ({"layer": -1}, ValueError, "layer: expected an int in [0, "),
        ({"layer": 1.0}, TypeError, "layer: expected an int in [0, "),
    ],
)
def test_bad_input(change, error, words):
    names = torch.zeros(3, 2, dtype=torch.int32)
    good = {"x": torch.randn(3, 2, 4), "p": 0.1, "key": torch.tensor(1), "row_keys": names}
    good |= {"layer": 0, "site": Site.EMBEDDINGS}
    philox.dropout_hidden(**good)
    with pytest.raises(error) as caught:
        philox.dropout_hidden(**(good | change))
    assert words in str(caught.value)


KEY, NAMES = torch.tensor(1), torch.zeros(2, 3, dtype=torch.int32)
HERE = {"layer": 0, "site": Site.EMBEDDINGS}
COUNTER = tuple(torch.tensor([1]) for _ in range(4))


def hidden(key=KEY, row_keys=NAMES, channels=4, p=0.1, **where):
    return philox.hidden_keep_mask(key, row_keys, channels, p, **(HERE | where))


def attention(queries=NAMES, keys=NAMES, heads=1, p=0.1):
    return philox.attention_keep_mask(KEY, queries, keys, heads, p, **HERE)


BAD_CALLS = [
    (lambda: hidden(key=KEY.int()), TypeError, "key: expected int64 [], got int32 []"),
    (lambda: hidden(key=5), TypeError, "key: expected a tensor int64 []"),
    (lambda: hidden(row_keys=NAMES.float()), TypeError, "row_keys: expected int32 [2, 3], got float32"),
    (lambda: hidden(row_keys=NAMES.long()), TypeError, "row_keys: expected int32 [2, 3], got int64"),
    (lambda: hidden(channels=-4), ValueError, "channels: expected an int >= 0, got -4"),
    (lambda: hidden(p=1.0), ValueError, "p: expected a number in [0, 1), got 1.0"),
    (lambda: hidden(layer=-1), ValueError, "layer: expected an int in [0, "),
    (lambda: hidden(site=99), ValueError, "site: expected an int in [0, 5], got 99"),
    (lambda: attention(queries=NAMES[0]), ValueError, "query_keys: expected int32 [B, Lq], got int32 [3]"),
    (lambda: attention(keys=NAMES[:1]), ValueError, "key_keys: expected int32 [2, Lk], got int32 [1, 3]"),
    (lambda: attention(keys=None), TypeError, "key_keys: expected a tensor"),
    (lambda: attention(heads=-1), ValueError, "heads: expected an int >= 0, got -1"),
    (
        lambda: philox.dropout_hidden(torch.ones(2, 3, 4).int(), 0.1, KEY, NAMES, **HERE),
        TypeError,
        "x: expected float64 or",
    ),
    (lambda: philox.dropout_hidden([1.0], 0.1, KEY, NAMES, **HERE), TypeError, "x: expected a tensor"),
    (
        lambda: philox.dropout_attention(torch.ones(2, 1, 3, 3), 0.1, KEY, NAMES, None, **HERE),
        TypeError,
        "key_keys: expected a tensor",
    ),
    (
        lambda: philox.philox_4x32_10(COUNTER[:3], KEY),
        TypeError,
        "counter: expected four int64 tensors, got 3",
    ),
    (
        lambda: philox.philox_4x32_10(tuple(word.float() for word in COUNTER), KEY),
        TypeError,
        "counter: expected int64 [1], got float32",
    ),
    (lambda: philox.philox_4x32_10(COUNTER, 1), TypeError, "key: expected a tensor int64 []"),
    (
        lambda: philox.draw_key("gpu"),
        ValueError,
        "device: expected a torch.device or its name, got 'gpu'",
    ),
    (
        lambda: philox.draw_key("cuda:99"),
        ValueError,
        "device: expected a device that torch has here, got 'cuda:99'",
    ),
    (lambda: philox.draw_key(5), TypeError, "device: expected a torch.device or its name, got int 5"),
    (
        lambda: philox.draw_key("meta", torch.Generator()),
        ValueError,
        "generator: expected one of meta, got one of cpu",
    ),
    (lambda: philox.threshold(1.0), ValueError, "p: expected a number in [0, 1), got 1.0"),
    (lambda: philox.keep_scale("half"), TypeError, "p: expected a number in [0, 1), got str 'half'"),
    (
        lambda: philox.draw_key(generator=5),
        TypeError,
        "generator: expected a torch.Generator or None, got int 5",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS)
def test_bad_calls(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
