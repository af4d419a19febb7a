"""Rows of A for new ranks: along the gradient that the present rows don't span, and no louder than random rows."""

import pytest
import torch

from l1ra.allocation.new_rows import leading_rows


def gradient(strengths, width=32, seed=0):
    """``(len(strengths), width)`` with these singular values, and its right singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, len(strengths), generator=generator)).Q.T
    mix = torch.linalg.qr(torch.randn(len(strengths), len(strengths), generator=generator)).Q
    return mix @ (torch.tensor(strengths).unsqueeze(1) * directions), directions


def rows_along(sketch, present, random):
    return leading_rows([sketch], [present], [random])[0]


def drawn(count, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7))


def test_rows_lie_along_the_leading_directions():
    sketch, directions = gradient([5.0, 3.0, 1.0])
    rows = rows_along(sketch, torch.zeros(0, 32), drawn(2))
    cosines = torch.nn.functional.cosine_similarity(rows, directions[:2]).abs()
    torch.testing.assert_close(cosines, torch.ones(2))


def test_what_present_rows_span_is_left_out():
    sketch, directions = gradient([5.0, 3.0, 1.0])
    (row,) = rows_along(sketch, 4 * directions[:1], drawn(1))
    assert abs(row @ directions[0]) < 1e-5 * row.norm()
    assert abs(row @ directions[1]) > 0.999 * row.norm()


def test_the_gradient_answers_to_them_as_to_random_rows():
    sketch, _ = gradient([50.0, 3.0, 1.0])
    random = drawn(2000)
    usual = ((random @ sketch.T).norm(dim=1) / random.norm(dim=1)).square().mean().sqrt()
    rows = rows_along(sketch, torch.zeros(0, 32), drawn(1))
    answer = (rows @ sketch.T).norm() / drawn(1).norm()
    assert answer.item() == pytest.approx(usual.item(), rel=0.1)


def test_none_is_longer_than_a_random_row():
    sketch, _ = gradient([50.0, 3.0, 1e-3])  # to the weakest the gradient answers less than to a random row
    rows = rows_along(sketch, torch.zeros(0, 32), drawn(3))
    torch.testing.assert_close(rows[2].norm(), drawn(3)[2].norm())
    assert (rows.norm(dim=1) <= drawn(3).norm(dim=1) * 1.0001).all()


@pytest.mark.parametrize("sketch", [torch.full((2, 32), torch.nan), torch.zeros(2, 32)])
def test_without_a_gradient_rows_are_random(sketch):
    assert torch.equal(rows_along(sketch, torch.zeros(0, 32), drawn(3)), drawn(3))


def test_more_rows_than_directions_are_random():
    sketch, _ = gradient([5.0, 3.0])
    assert torch.equal(rows_along(sketch, torch.zeros(0, 32), drawn(4))[2:], drawn(4)[2:])


def test_rows_of_many_adapters_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(2)
    sizes = [
        (16, 32, 0, 2),
        (16, 32, 0, 1),
        (16, 32, 3, 20),
        (16, 32, 3, 2),
        (16, 8, 3, 4),
        (4, 8, 3, 4),
        (16, 32, 3, 1),
    ]
    columns = zip(
        *((torch.randn(rows, width, generator=generator) for rows in (k, r, n)) for k, width, r, n in sizes),
        strict=True,
    )
    sketches, present, random = map(list, columns)
    sketches[3][0, 0] = torch.nan
    sketches[1].zero_()
    found = leading_rows(sketches, present, random)
    for i, rows in enumerate(found):
        torch.testing.assert_close(rows, rows_along(sketches[i], present[i], random[i]), rtol=1e-4, atol=1e-5)
        assert torch.equal(rows, random[i]) == (i in (1, 3))
    assert leading_rows([], [], []) == []
