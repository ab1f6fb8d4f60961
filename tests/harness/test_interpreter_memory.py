"""The interpreter guard: planted out-of-bounds accesses, duplicate stores and races are found."""

import pytest
import torch

pytest.importorskip("triton")

from harness import interpreter
from harness.faults import DuplicateStore, OutOfBounds, Race

if not interpreter.available():
    pytest.skip("a GPU is visible: kernels are compiled in this process", allow_module_level=True)

with interpreter.switched_on():
    from harness import toys


@pytest.fixture(autouse=True)
def guard():
    with interpreter.guard():
        yield


def assert_identical(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------- bounds


def test_masked_lanes_may_point_anywhere():
    source, target = torch.randn(37), torch.empty(37)
    toys.copy[(3,)](source, target, 37, 0, BLOCK=16)
    assert_identical(target, source)


@pytest.mark.parametrize("shift, lanes", [(1, 1), (5, 5), (-1, 1), (-3, 3)])
def test_a_load_out_of_bounds_is_found(shift, lanes):
    memory = torch.zeros(64)  # the tensor lies within it: nothing but the guard would notice
    message = rf"^copy, program \(0, 0, 0\): load: {lanes} of 16 lanes outside source_ptr \[16\]$"
    with pytest.raises(OutOfBounds, match=message):
        toys.copy[(1,)](memory[16:32], torch.empty(16), 16, shift, BLOCK=16)


@pytest.mark.parametrize("atomic, kind", [(False, "store"), (True, "atomic")])
def test_a_store_out_of_bounds_is_found_before_it_is_made(atomic, kind):
    memory = torch.zeros(64)
    message = rf"^fill, program \(1, 0, 0\): {kind}: 4 of 16 lanes outside target_ptr \[28\]$"
    with pytest.raises(OutOfBounds, match=message):
        toys.fill[(2,)](memory[:28], 0, 16, 1.0, BLOCK=16, ATOMIC=atomic)
    assert_identical(memory, torch.cat([torch.ones(16), torch.zeros(48)]))


def test_an_empty_tensor_has_nothing_to_load():
    with pytest.raises(OutOfBounds, match=r"16 of 16 lanes outside source_ptr \[0\]"):
        toys.copy[(1,)](torch.empty(0), torch.empty(16), 16, 0, BLOCK=16)


def test_a_strided_view_ends_where_its_elements_do():
    queries, keys = torch.randn(4, 2, 8).unbind(1)
    target = torch.empty(4, 8)
    toys.copy_rows[(1,)](queries, target, 16, 0, ROWS=4, COLUMNS=8)
    assert_identical(target, queries)
    toys.copy_rows[(1,)](keys, target, 16, 0, ROWS=4, COLUMNS=8)
    assert_identical(target, keys)
    # Columns 1 to 8 of the queries: the last column is the first of the keys.
    with pytest.raises(
        OutOfBounds, match=r"load: 4 of 32 lanes outside source_ptr \[4, 8\] of strides \[16, 1\]$"
    ):
        toys.copy_rows[(1,)](queries, target, 16, 1, ROWS=4, COLUMNS=8)
    with pytest.raises(OutOfBounds, match="load: 32 of 32 lanes outside source_ptr"):
        toys.copy_rows[(1,)](queries, target, 16, 8, ROWS=4, COLUMNS=8)


def test_a_gap_of_an_overlapping_view_is_found():
    windows = torch.randn(8).as_strided((2, 2, 2), (5, 1, 1))  # elements 0, 1, 2 and 5, 6, 7 of eight
    with pytest.raises(
        OutOfBounds, match=r"2 of 8 lanes outside source_ptr \[2, 2, 2\] of strides \[5, 1, 1\]"
    ):
        toys.copy[(1,)](windows, torch.empty(8), 8, 0, BLOCK=8)


def test_transposed_and_expanded_views_are_read_in_place():
    x = torch.randn(8, 4)
    target = torch.empty(4, 8)
    toys.copy_rows[(1,)](x.T.clone(memory_format=torch.contiguous_format), target, 8, 0, ROWS=4, COLUMNS=8)
    assert_identical(target, x.T)
    toys.copy_rows[(1,)](x[:1].T.expand(4, 8).T.contiguous().T, target, 8, 0, ROWS=4, COLUMNS=8)
    row = torch.randn(8)
    toys.copy_rows[(1,)](row.expand(4, 8), target, 0, 0, ROWS=4, COLUMNS=8)
    assert_identical(target, row.expand(4, 8))


def test_bool_tensors_are_checked_as_well():
    source, target = torch.rand(16) < 0.5, torch.zeros(16, dtype=torch.bool)
    toys.copy[(1,)](source, target, 16, 0, BLOCK=16)
    assert_identical(target, source)
    with pytest.raises(OutOfBounds, match=r"1 of 16 lanes outside source_ptr \[16\]"):
        toys.copy[(1,)](source, target, 16, 1, BLOCK=16)


def test_a_selected_pointer_may_point_to_either_tensor_and_no_further():
    a, b, out = torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.empty(1)
    for which, value in ((0, 3.0), (1, 2.0)):
        toys.select[(1,)](a, b, out, which)
        assert out.item() == value
    with pytest.raises(OutOfBounds, match="1 of 1 lanes outside any tensor of the launch"):
        toys.select[(1,)](a, b, out, 10**6)


def test_descriptors_are_checked_by_the_tensor_and_not_by_what_they_say():
    source, target = torch.randn(13, 16), torch.empty(13, 16)
    toys.copy_described[(4,)](source, target, 13, BLOCK=4)
    assert_identical(target, source)
    with pytest.raises(OutOfBounds, match=r"load: 16 of 32 lanes outside source_ptr \[13, 16\]"):
        toys.copy_described[(4,)](source, target, 14, BLOCK=4)


def test_a_pointer_to_something_smaller_is_checked_as_well():
    source, target = torch.randn(8), torch.empty(8)
    toys.copy_bytes[(1,)](source, target, BYTES=32)
    assert_identical(target, source)
    with pytest.raises(OutOfBounds, match=r"32 of 64 lanes outside source_ptr \[8\]"):
        toys.copy_bytes[(1,)](source, target, BYTES=64)


def test_an_exchange_out_of_bounds_is_found():
    memory = torch.zeros(8, dtype=torch.int32)
    toys.exchange[(3,)](memory[:4], 3)
    assert memory.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    with pytest.raises(OutOfBounds, match="atomic: 1 of 1 lanes outside target_ptr"):
        toys.exchange[(1,)](memory[:4], 4)


# ---------------------------------------------------------------------------------------------------- races


def test_two_lanes_on_one_element_are_found():
    index = torch.arange(16)
    toys.scatter[(1,)](torch.empty(16), index.flip(0), BLOCK=16)
    index[3] = 7
    with pytest.raises(DuplicateStore, match=r"^scatter, .*: store to target_ptr: 1 lanes"):
        toys.scatter[(1,)](torch.empty(16), index, BLOCK=16)


@pytest.mark.parametrize("order", ["forward", "reversed", 5])
def test_two_programs_that_write_one_element_are_found(order):
    with interpreter.guard(order=order):
        toys.fill[(3,)](torch.empty(48), 0, 16, 1.0, BLOCK=16)
        with pytest.raises(Race, match="store of target_ptr: another program writes 1 of its 16 elements"):
            toys.fill[(3,)](torch.empty(48), 0, 15, 1.0, BLOCK=16)


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize("distance", [1, -1])
def test_a_program_that_reads_what_another_writes_is_found(order, distance):
    x, out = torch.zeros(4), torch.empty(4)
    with interpreter.guard(order=order), pytest.raises(Race, match="x_ptr: another program"):
        toys.neighbour[(4,)](x, out, distance)


@pytest.mark.parametrize("order", ["forward", "reversed"])
@pytest.mark.parametrize("writer", [0, 1, 2])
def test_the_last_of_many_readers_that_writes_is_found(order, writer):
    with interpreter.guard(order=order), pytest.raises(Race, match="x_ptr: another program"):
        toys.read_by_all[(3,)](torch.zeros(1), writer)
    toys.read_by_all[(3,)](torch.zeros(1), 3)


def test_a_program_may_write_what_it_read_itself():
    x, out = torch.zeros(4), torch.empty(4)
    toys.neighbour[(4,)](x, out, 0)
    assert_identical(x, torch.ones(4))


def test_views_of_one_storage_race_with_each_other():
    memory = torch.zeros(40)
    toys.copy[(2,)](memory[:20], memory[20:], 20, 0, BLOCK=16)
    with pytest.raises(Race, match="source_ptr: another program writes 3 of its 4 elements"):
        toys.copy[(2,)](memory[:20], memory[3:23], 20, 0, BLOCK=16)
    # As int64 and as int32: bytes 8 p of the one are bytes 4 (2 p) of the other.
    whole = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Race, match="target_ptr: another program"):
        toys.copy[(2,)](whole.view(torch.int64), whole, 32, 0, BLOCK=16)


def test_neighbours_do_not_race_beside_a_view_of_wider_elements():
    memory = torch.zeros(16, dtype=torch.int32)
    toys.copy[(8,)](memory[8:].view(torch.int64), memory[:4], 4, 0, BLOCK=1)


def test_atomics_do_not_race_with_each_other_but_with_everything_else():
    def counter():
        return torch.zeros(1, dtype=torch.int32), torch.empty(3, dtype=torch.int32)

    count, turns = counter()
    toys.count_then[(3,)](count, turns, READ=False, WRITE=False)
    assert (count.item(), turns.tolist()) == (3, [0, 1, 2])
    for read, write, kind in ((True, False, "load"), (False, True, "store")):
        with pytest.raises(Race, match=f"{kind} of counter_ptr: another program writes 1 of its 1 elements"):
            toys.count_then[(3,)](*counter(), READ=read, WRITE=write)


def test_a_program_reads_back_only_behind_a_barrier():
    x, out = torch.empty(2, 16, dtype=torch.int32)
    toys.read_back[(1,)](x, out, BARRIER=True)
    assert out.tolist() == list(range(15, -1, -1))
    with pytest.raises(
        Race, match="load of x_ptr: the program itself wrote, with no barrier since, 16 of its 16"
    ):
        toys.read_back[(1,)](x, out, BARRIER=False)


def test_races_can_be_left_out():
    with interpreter.guard(races=False):
        toys.fill[(3,)](torch.empty(48), 0, 15, 1.0, BLOCK=16)
        toys.neighbour[(4,)](torch.zeros(4), torch.empty(4), 1)
        with pytest.raises(OutOfBounds):
            toys.fill[(3,)](torch.empty(47), 0, 16, 1.0, BLOCK=16)
        with pytest.raises(DuplicateStore):
            toys.scatter[(1,)](torch.empty(16), torch.zeros(16, dtype=torch.int64), BLOCK=16)
