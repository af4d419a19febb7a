"""Rows of many tensors in one launch: the kernel against its twin in plain torch, bit by bit."""

import pytest
import torch
from helpers import bits, same_bits

from l1ra_kernels import choice, dispatch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLEMENTATIONS = ["torch", "fused"]


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request):
    """The public ops, by each implementation in turn."""
    if request.param == "fused" and not (choice.interpreting() or DEVICE == "cuda"):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    with choice.using(request.param):
        yield dispatch


def poisoned(shape, dtype, freed=()):
    """Random rows with all that must survive a move: NaN with a payload, both zeros, infinities."""
    rows = torch.randn(shape, dtype=torch.float64).to(dtype)
    flat = bits(rows.view(-1))
    flat[::7] = torch.iinfo(flat.dtype).max - torch.arange(len(flat[::7]), dtype=flat.dtype) % 3
    rows.view(-1)[3::11] = -0.0
    rows.view(-1)[5::13] = -torch.inf
    for row in freed:
        rows[row] = torch.nan
    return rows.to(DEVICE)


def layers():
    """Ragged tensors as of many layers and their moments; (rows, kept rows)."""
    shapes = [((4, 33), (0, 3)), ((4,), (0, 3)), ((4, 1500), (0, 3)), ((1, 7), (0,)), ((1,), (0,)), ((3, 5), ())]
    shapes += [((17, 64), tuple(range(1, 17, 2))), ((6, 1024), tuple(range(6))), ((5, 2, 3), (4,)), ((3, 0), (1,))]
    return [
        (poisoned(shape, dtype, set(range(shape[0])) - set(keep)), keep) for dtype in DTYPES for shape, keep in shapes
    ]


def test_kept_rows_come_first_and_freed_ones_become_zero_whatever_they_held(ops):
    tensors, keeps = zip(*layers(), strict=True)
    before = [rows.clone() for rows in tensors]
    addresses = [rows.data_ptr() for rows in tensors]
    ops.compact_rows_(tensors, keeps)
    for rows, old, keep in zip(tensors, before, keeps, strict=True):
        assert same_bits(rows[: len(keep)], old[list(keep)])
        assert not bits(rows[len(keep) :]).any()
    assert addresses == [rows.data_ptr() for rows in tensors]


def test_rows_move_anywhere_and_new_ones_are_filled(ops):
    tensors, keeps = zip(*layers(), strict=True)
    before = [rows.clone() for rows in tensors]
    sources = [(-1, *reversed(keep), -1, *keep[:1]) for keep in keeps]
    fills = [(-1.25, 0.0, 3.0, -0.0)[i % 4] for i in range(len(tensors))]
    moved = ops.move_rows_many(tensors, sources, fills)
    for new, rows, old, source, fill in zip(moved, tensors, before, sources, fills, strict=True):
        assert new.shape == (len(source), *rows.shape[1:]) and new.dtype == rows.dtype
        for i, row in enumerate(source):
            assert same_bits(new[i], torch.full_like(old[0], fill) if row < 0 else old[row])
        assert same_bits(rows, old)
        assert rows.numel() == 0 or new.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_no_dtype_is_looked_at(dtype):
    if not (choice.interpreting() or DEVICE == "cuda"):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    rows = torch.randint(0, 2, (3, 5), device=DEVICE).to(dtype)
    with choice.using("fused"):
        (moved,) = dispatch.move_rows_many([rows], [(2, -1, 0)], [1])
    assert moved.dtype == dtype
    assert moved.float().tolist() == [rows.float()[2].tolist(), [1.0] * 5, rows.float()[0].tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_may_be_longer_in_memory_than_its_elements(ops, dtype):
    wide = poisoned((6, 50), dtype)
    column, part, every_other = wide[:, 3], wide[:, 7:20], wide[::2, 1::2]
    before = wide.clone()
    moved = ops.move_rows_many([column, part, every_other], [(5, 0), (1, -1), (2,)], [1.0, 1.0, 1.0])
    assert same_bits(moved[0], before[[5, 0], 3]) and same_bits(moved[1][0], before[1, 7:20])
    assert same_bits(moved[2][0], before[4, 1::2])
    ops.compact_rows_([column, part], [(2, 5), (0, 4)])
    expected = before.clone()
    reference.compact_rows_([expected[:, 3], expected[:, 7:20]], [(2, 5), (0, 4)])
    assert same_bits(wide, expected)  # nothing between or beside the rows has changed
    ops.compact_rows_([every_other], [(1,)])  # its rows have gaps within
    reference.compact_rows_([expected[::2, 1::2]], [(1,)])
    assert same_bits(wide, expected)


def test_nothing_to_move_is_fine(ops):
    assert ops.move_rows_many([], [], []) == []
    ops.compact_rows_([], [])
    rows = torch.randn(3, 4, device=DEVICE)
    (empty,) = ops.move_rows_many([rows], [()], [0.0])
    assert empty.shape == (0, 4)
    (grown,) = ops.move_rows_many([rows[:0]], [(-1, -1)], [2.0])
    assert grown.tolist() == [[2.0] * 4] * 2


def test_row_numbers_are_checked_before_anything_moves(ops):
    good, rows = torch.randn(3, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    before = good.clone()
    for sources in ((3,), (-2,)):
        with pytest.raises(ValueError, match="row numbers below 3"):
            ops.move_rows_many([good, rows], [(0,), sources], [0.0, 0.0])
    for keep in ((3,), (-1,), (1, 0), (1, 1)):
        with pytest.raises(ValueError, match="rising row numbers below 3"):
            ops.compact_rows_([good, rows], [(1,), keep])
    assert same_bits(good, before)


def test_autograd_learns_that_rows_were_moved_in_place(ops):
    rows = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    loss = (rows * rows).sum()
    with torch.no_grad():
        ops.compact_rows_([rows], [(1, 2)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_all_tensors_move_in_one_launch(monkeypatch):
    if not (choice.interpreting() or DEVICE == "cuda"):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    from l1ra_kernels import rank_compaction

    launched = []
    launch = rank_compaction.launch
    monkeypatch.setattr(rank_compaction, "launch", lambda *a, **k: (launched.append(a[1]), launch(*a, **k)))
    tensors, keeps = zip(*layers(), strict=True)
    with choice.using("fused"):
        dispatch.move_rows_many(tensors, keeps, [0.0] * len(tensors))
        dispatch.compact_rows_(tensors, keeps)
    assert len(launched) == 2


def test_rows_further_apart_than_an_int32_can_say(ops):
    try:  # of its 4 GiB only what the rows touch becomes real memory
        apart = torch.empty(2, 2**31 + 8, dtype=torch.int8, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = apart[:, :5]
    rows[0], rows[1] = 7, torch.arange(5)
    ops.compact_rows_([rows], [(1,)])
    assert rows.tolist() == [[0, 1, 2, 3, 4], [0] * 5]
