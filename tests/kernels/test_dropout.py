"""Dropout from a counter: one mask for all kernels and tiles, that of the reference, which is Philox4x32-10."""

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE, SINGLE, Case, assert_as_exact_as_torch, assert_close, assert_same_bits, case, kernels, results

from l1ra_kernels import configs
from l1ra_kernels.configs import Tile
from l1ra_kernels.dropout import keep_mask, threshold
from l1ra_kernels.reference import dropout_mask

SEEDS = [0, 7, 2**32 - 1, 2**40 + 12345, 2**62 - 1]


def philox(key, counter):
    """Philox4x32-10 as its paper has it, in Python's own numbers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & 0xFFFFFFFF, first >> 32 ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


# kat_vectors of Random123.
@pytest.mark.parametrize(
    "counter, key, numbers",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_generator_has_the_published_numbers(counter, key, numbers):
    read = lambda words: tuple(int(word, 16) for word in words.split())  # noqa: E731
    assert philox(read(key), read(counter)) == read(numbers)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_of_the_reference_compares_these_numbers_to_the_probability(seed):
    tokens, features, p = 5, 11, 0.3
    key = seed & 0xFFFFFFFF, seed >> 32
    numbers = [[philox(key, (k // 4, m, 0, 0))[k % 4] for k in range(features)] for m in range(tokens)]
    expected = torch.tensor(numbers) >= int(p * 2**32)
    assert torch.equal(dropout_mask(seed, tokens, features, p), expected)


@triton.jit
def _mask(p_out, p_seed, limit, first, BM: tl.constexpr, BK: tl.constexpr):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK
    keep = keep_mask(tl.load(p_seed), limit, first + o_m, k, BM, BK)
    o_k = k + tl.arange(0, BK)
    tl.store(p_out + o_m[:, None] * (tl.num_programs(1) * BK) + o_k[None, :], keep.to(tl.int8))


def mask_of_the_kernels(seed, tokens, features, p, first=0, block=(16, 32)):
    out = torch.empty(tokens, features, dtype=torch.int8, device=DEVICE)
    grid = tokens // block[0], features // block[1]
    limit = threshold(p)
    _mask[grid](out, torch.tensor([seed], device=DEVICE), limit, first, BM=block[0], BK=block[1])
    return out.bool()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-9, 1 - 1e-12])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_kernels_have_the_mask_of_the_reference(seed, p):
    expected = dropout_mask(seed, 32, 64, p, DEVICE)
    assert torch.equal(mask_of_the_kernels(seed, 32, 64, p), expected)


def test_a_number_that_equals_the_limit_is_kept():
    p = 0x6627E8D5 / 2**32  # the first number of seed 0
    for mask in (dropout_mask(0, 16, 32, p, DEVICE), mask_of_the_kernels(0, 16, 32, p)):
        assert mask[0, 0]
    for mask in (dropout_mask(0, 16, 32, p + 2**-32, DEVICE), mask_of_the_kernels(0, 16, 32, p + 2**-32)):
        assert not mask[0, 0]


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.5, 1 - 2**-53, 1.0])
def test_every_limit_is_a_signed_number_of_32_bits(p):
    assert -(2**31) <= threshold(p) <= 2**31 - 1


@pytest.mark.parametrize("block", [(16, 64), (32, 16), (8, 4)])
def test_the_mask_does_not_depend_on_the_tile(block):
    assert torch.equal(mask_of_the_kernels(5, 32, 64, 0.4, block=block), dropout_mask(5, 32, 64, 0.4, DEVICE))


def test_the_mask_of_a_row_does_not_depend_on_where_a_tile_begins():
    whole = dropout_mask(5, 64, 64, 0.4, DEVICE)
    assert torch.equal(mask_of_the_kernels(5, 32, 64, 0.4, first=21), whole[21:53])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_kept_elements_have_the_right_rate_in_every_row_and_column(p):
    tokens = features = 500
    mask = dropout_mask(11, tokens, features, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * deviation / 500
    for dim in (0, 1):
        assert (mask.mean(dim) - (1 - p)).abs().max() < 5 * deviation / 500**0.5


def test_rows_columns_and_seeds_are_independent():
    tokens = features = 500
    masks = [dropout_mask(seed, tokens, features, 0.5).double() * 2 - 1 for seed in (1, 2, 1 + 2**32)]
    largest = 5.5 / 500**0.5  # of 125,000 pairs, each a mean of 500 signs
    for mask in masks:
        for rows in (mask, mask.T):
            agreement = rows @ rows.T / 500
            assert agreement.fill_diagonal_(0).abs().max() < largest
        assert abs((mask[:, 1:] * mask[:, :-1]).mean()) < 4 / 500
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[i] * masks[j]).mean()) < 4 / 500


def seeded(seed=7):
    """Brings torch's generator to where ``seed`` brings it; the seed that the next forward draws."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, (1,), device=DEVICE).item()
    torch.manual_seed(seed)
    return drawn


@pytest.mark.parametrize(
    "ranks, options",
    [
        ((5,), {"base": "bias"}),
        ((5,), {"base": "output", "lead": (3, 25), "features": 130}),
        ((5,), {"lead": (70,), "features": 130, "dtypes": (SINGLE, SINGLE)}),
        ((40,), {}),
        ((140,), {}),
        ((3, 20, 4), {}),
    ],
)
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_the_layer_under_dropout_is_as_exact_as_plain_torch(ranks, options, p, few_processors):
    one = case(ranks, (47, 20, 9)[: len(ranks)], dropout=p, **options)
    seed = seeded()
    tokens, features = one.x.shape[:-1].numel(), one.x.shape[-1]
    assert_as_exact_as_torch(one, dropout_mask(seed, tokens, features, p, DEVICE))


def test_dropped_elements_of_the_input_are_not_read_and_have_no_gradient():
    one = case(base="output", dropout=0.5)
    mask = dropout_mask(seeded(), *one.x.shape, 0.5, DEVICE)
    expected = results(one, kernels(one))
    assert torch.equal(expected["dx"] != 0, mask)
    holed = Case(torch.where(mask, one.x.detach(), torch.nan), one.layers, one.dys, 0.5)
    seeded()
    assert_same_bits(results(holed, kernels(holed)), expected)


def test_another_tile_drops_the_same(monkeypatch):
    one = case([5, 3], [47, 20], base="output", dropout=0.5, lead=(70,), features=130, dtypes=(SINGLE, SINGLE))
    seeded()
    expected = results(one, kernels(one))
    other = dict.fromkeys(configs.RANK_TILES, Tile(16, 16, 4, 1))
    monkeypatch.setattr(configs, "SINGLE", dict.fromkeys(configs.SINGLE, other))
    monkeypatch.setattr(configs, "TILES", {})
    seeded()
    found = results(one, kernels(one))
    assert torch.equal(found["dx"] == 0, expected["dx"] == 0)
    assert_close(found, expected)


def test_the_seed_comes_from_the_generator_of_torch():
    one = case(dropout=0.5)
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append(results(one, kernels(one)))
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0]["y0"], runs[2]["y0"])
    again = results(one, kernels(one))  # no seed set in between
    assert not torch.equal(again["y0"], runs[2]["y0"])


def test_without_dropout_no_random_number_is_drawn():
    one = case()
    state = lambda: torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()  # noqa: E731
    before = state()
    kernels(one)
    assert torch.equal(state(), before)
    kernels(Case(one.x, one.layers, one.dys, 0.5))
    assert not torch.equal(state(), before)
