"""The roofline's terms: sums worked by hand, PEFT's real operations, and the page that is kept of it."""

import inspect
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the designs ask the launchers of our kernels")

from benchmarks import designs, roofline
from benchmarks.designs import BF16, DESIGNS, UNSHARED, Shape, Term
from benchmarks.roofline import CARDS, MODELS, RANKS, TOKENS
from l1ra_kernels import gated_linear
from l1ra_kernels.launch import redirected
from l1ra_kernels.layer import Layer

# 4 tokens, 8 inputs, 6 outputs, rank 2: x has 32 elements, y 24, A 16, B 12, H 8. In our buffers, 16 ranks wide: H, Q
# and the one part of H and of P 64 each, the one part of dA 128, of D 96; of these, the rows of true ranks have 16 and
# 12. One sum a pass, one number a term, in the order that the design has them.
SMALL = Shape(4, 8, (6,), 2)
BY_HAND = {
    "PEFT fp32, no autocast": (
        (64 + 192 + 80 + 96 + 144 + 96, 128 + 32 + 96 + 96 + 96 + 48),
        (48 + 96 + 96 + 128 + 144 + 160 + 96 + 128 + 128, 96 + 48 + 96 + 48 + 32 + 64 + 128 + 64 + 64),
    ),
    "PEFT fp32, autocast": (
        (64 + 128 + 64 + 48 + 96 + 40 + 48 + 96, 128 + 64 + 32 + 24 + 16 + 48 + 48 + 48),
        (48 + 64 + 72 + 80 + 48 + 128 + 64 + 128 + 32 + 24, 48 + 24 + 16 + 32 + 64 + 64 + 128 + 64 + 64 + 48),
    ),
    "PEFT bf16": (
        (96 + 40 + 48 + 96, 16 + 48 + 48 + 48),
        (48 + 64 + 72 + 80 + 48 + 128, 48 + 24 + 16 + 32 + 64 + 64),
    ),
    "torch.compile": (
        (96 + 40 + 96, 16 + 48 + 48),
        (48 + 64 + 72 + 80 + 48 + 64, 48 + 24 + 16 + 32 + 64 + 0),
    ),
    "Unsloth": (
        (64 + 48 + 96 + 88, 32 + 24 + 16 + 48),
        (64 + 48 + 72 + 80 + 96 + 64 + 72 + 112 + 32 + 24, 32 + 24 + 16 + 32 + 16 + 24 + 16 + 64 + 64 + 48),
    ),
    "LoRAFusion": (
        (96 + 40, 16 + 0),
        (0 + 168 + 80 + 80 + 48, 80 + 80 + 40 + 32 + 0),
    ),
    "add": (
        (128 + 304 + 48, 256 + 176),
        (224 + 384 + 256 + 112 + 128, 640 + 128 + 576 + 112 + 64),
    ),
    "chain": (
        (128 + 304 + 48, 256 + 176 + 0),
        (224 + 384 + 256 + 112 + 64, 640 + 128 + 576 + 112 + 0),
    ),
    "aug": (
        (128 + 304 + 320, 320 + 448 + 0),
        (224 + 384 + 256 + 112 + 64, 640 + 128 + 576 + 112 + 0),
    ),
}


def read_and_written(terms: list[Term]) -> tuple[int, int]:
    return sum(t.read for t in terms), sum(t.write for t in terms)


@pytest.mark.parametrize("name", UNSHARED)
def test_terms_of_a_small_linear_are_those_worked_by_hand(name):
    forward, backward = DESIGNS[name].count(SMALL)
    assert (read_and_written(forward), read_and_written(backward)) == BY_HAND[name]


def test_what_is_hidden_is_the_output_that_a_large_product_adds_to():
    hidden = {
        name: [roofline.moved(terms, hidden=True) for terms in design.count(SMALL)] for name, design in DESIGNS.items()
    }
    for name in ("chain", "chain, shared reads", "augment=True, shared reads"):
        assert hidden.pop(name) == [48, 64]
    for name in ("aug", "aug, shared reads"):
        assert hidden.pop(name) == [0, 64]
    assert not any(sum(passes) for passes in hidden.values())


@pytest.mark.parametrize("name", UNSHARED)
def test_flops_are_six_thin_products_and_what_is_formed_again(name):
    forward, backward = DESIGNS[name].count(Shape(4, 8, (6,), 16))
    x, y = 2 * 4 * 8 * 16, 2 * 4 * 6 * 16
    again = x + y if name == "Unsloth" else 0
    assert sum(t.flops for t in forward) == x + y
    assert sum(t.flops for t in backward) == 2 * x + 2 * y + again


def test_a_shared_read_of_x_saves_x_and_dx_and_all_launches_but_one_set():
    one, both = Shape(4, 8, (6,), 2), Shape(4, 8, (6, 6), 2)
    x = BF16 * one.x
    (forward, backward), (shared_forward, shared_backward) = DESIGNS["chain"].count(one), DESIGNS["chain"].count(both)
    assert roofline.moved(shared_forward) == 2 * roofline.moved(forward) - x
    assert roofline.moved(shared_backward) == 2 * roofline.moved(backward) - 2 * x  # x read, dX written
    assert sum(t.launches for t in forward + backward) == sum(t.launches for t in shared_forward + shared_backward) == 6


class Traffic(TorchDispatchMode):
    """Bytes that the operations under it read and write; a view moves none."""

    def __init__(self):
        super().__init__()
        self.read = self.written = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if not {t.data_ptr() for t in inputs} & {t.data_ptr() for t in outputs}:
            self.read += sum(t.nbytes for t in inputs)
            self.written += sum(t.nbytes for t in outputs)
            self.launches += 1
        return out


@pytest.mark.parametrize(
    ("name", "adapter_fp32", "autocast"),
    [("PEFT fp32, no autocast", True, False), ("PEFT fp32, autocast", True, True), ("PEFT bf16", False, False)],
)
def test_peft_terms_are_the_operations_that_peft_calls(name, adapter_fp32, autocast):
    peft = pytest.importorskip("peft")
    tokens, inputs, outputs, rank = 16, 64, 32, 4
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16))
    config = peft.LoraConfig(r=rank, target_modules=["0"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=adapter_fp32).base_model.model
    x = torch.randn(tokens, inputs, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, outputs, dtype=torch.bfloat16)
    shape = Shape(tokens, inputs, (outputs,), rank)
    weight = BF16 * inputs * outputs
    forward, backward = DESIGNS[name].count(shape)
    with Traffic() as traffic, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    frozen = (BF16 * shape.x + weight, BF16 * shape.y)
    check(traffic, frozen, forward)
    with Traffic() as traffic:
        y.backward(dy)
    frozen = (BF16 * shape.y + weight, BF16 * shape.x)
    check(traffic, frozen, backward)


def check(traffic: Traffic, frozen: tuple[int, int], terms: list[Term]) -> None:
    """What ran is the frozen product, of which bytes are given, and the terms."""
    assert (traffic.read - frozen[0], traffic.written - frozen[1]) == read_and_written(terms)
    assert traffic.launches - 1 == sum(t.launches for t in terms)


def numel_bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def by_name(kernel, args) -> dict:
    """The arguments of a launch that are tensors or numbers."""
    names = list(inspect.signature(kernel.fn).parameters)
    return dict(zip(names, args, strict=False))


def launched(kernel, grid: tuple[int, ...], args: tuple, meta: dict) -> tuple[int, int, int]:
    """Bytes that one of our launches reads, writes, and reads again, the gates' left out."""
    t, name, adapters = by_name(kernel, args), kernel.fn.__name__, range(meta["G"])

    def each(prefix: str) -> list[torch.Tensor]:
        return [t[f"{prefix}{i}"] for i in adapters]

    if name == "_shrink":
        rows = numel_bytes(*each("p_a"))
        copied = numel_bytes(t["p_x"]) if meta["AUGMENT"] else 0
        return numel_bytes(t["p_x"]) + rows, numel_bytes(t["p_h"]) + copied, (grid[0] - 1) * rows
    if name == "_expand":
        part, b = numel_bytes(t["p_parts"]) // meta["G"], numel_bytes(*each("p_b"))
        again = part * (grid[1] - meta["G"]) + b * (grid[0] - 1)
        return numel_bytes(t["p_parts"]) + b, numel_bytes(t["p_h"], *each("p_y")), again
    if name == "_write_behind":
        rows = sum(BF16 * b.shape[1] for b in each("p_b"))
        columns = meta["G"] * meta["R"]
        return numel_bytes(t["p_parts"], *each("p_b")), 2 * numel_bytes(t["p_h"]) + rows * columns, 0
    if name == "_output_backward":
        h, b = numel_bytes(t["p_h"]), numel_bytes(*each("p_b"))
        again = h // meta["G"] * (grid[0] - meta["G"]) + b * (grid[1] - 1)
        return numel_bytes(*each("p_dy")) + h + b, numel_bytes(t["p_p"], t["p_d"]), again
    if name == "_reduce_hidden":
        return numel_bytes(t["p_p"], t["p_h"]), numel_bytes(t["p_q"]), 0
    if name == "_reduce_rows":
        rows = numel_bytes(*each("p_da")) * t["a_parts"] + numel_bytes(*each("p_db")) * t["d_parts"]
        assert t["p_da_parts"].shape[0] == t["a_parts"] and t["p_d_parts"].shape[0] == t["d_parts"]
        return rows, numel_bytes(*each("p_da"), *each("p_db")), 0
    assert name == "_input_backward"
    q, rows = numel_bytes(t["p_q"]), numel_bytes(*each("p_a"))
    again = q * (grid[0] - 1) + rows * (grid[1] - 1)
    return numel_bytes(t["p_x"]) + q + rows, numel_bytes(t["p_dx"], t["p_da"]), again


SHAPES = {
    "one": (96, 1040, (512,), 5),
    "two that share": (2500, 300, (520, 130), 16),
    "three that share, many parts": (300, 4096, (4096, 1024, 1024), 16),
    "three that need two bundles": (64, 64, (48, 48, 48), 40),
}


def our_launches(shape: tuple, augment: bool) -> tuple[list, list]:
    """What the launches of a forward and of a backward move."""
    tokens, inputs, outputs, rank = shape
    half = {"dtype": torch.bfloat16, "device": "meta"}
    wide = [torch.empty(n, inputs + 128, **half) for n in outputs]
    layers = [
        Layer(
            *(torch.empty(*size, device="meta") for size in ((rank, inputs), (rank,), (rank, n))),
            1.0,
            weight=whole[:, :inputs],
            augmented=whole if augment else None,
        )
        for n, whole in zip(outputs, wide, strict=True)
    ]
    x, dys = torch.empty(tokens, inputs, **half), [torch.empty(tokens, n, **half) for n in outputs]
    found: list[tuple[int, int, int]] = []
    needs = [gated_linear.Needs(True, True, True)] * len(outputs)
    with redirected(lambda kernel, grid, *args, **meta: found.append(launched(kernel, grid, args, meta))):
        _, hidden = gated_linear.forward(x, layers, torch.bfloat16, 0.0, None)
        forward = len(found)
        gated_linear.backward(dys, x, hidden, layers, True, needs, 0.0, None)
    return found[:forward], found[forward:]


@pytest.mark.parametrize("name", ["chain", "aug"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms_are_the_launches_that_our_code_makes(name, shape):
    for terms, launches in zip(DESIGNS[name].count(Shape(*shape)), our_launches(shape, name == "aug"), strict=True):
        ours = [t for t in terms if t.launches and "further" not in t.name]  # those sums are torch's
        assert all(t.launches == 1 for t in ours)
        assert all(t.parts <= t.read + t.write for t in ours)
        assert sorted((t.read, t.write, t.again) for t in ours) == sorted(launches)


def test_partial_sums_are_written_once_and_read_once():
    forward, backward = DESIGNS["chain"].count(Shape(2048, 4096, (4096, 1024, 1024), 16))  # a full rank tile
    shrink, expand = (t.parts for t in forward if t.launches)
    y_pass, reduce_p, x_pass, reduce_rows = (t.parts for t in backward if t.launches)
    assert shrink == expand > 0
    assert y_pass + x_pass == reduce_p + reduce_rows > 0


def test_a_decoder_layer_takes_twenty_four_launches():
    for name in roofline.SHARED:
        forward, backward = roofline.layer_passes(DESIGNS[name], MODELS["Llama-3-8B"], 8192, 16)
        assert [sum(t.launches for t in terms) for terms in (forward, backward)] == [8, 16]


def test_busy_share_is_that_of_programs_that_start_in_order():
    assert designs.busy_share([3, 3], slots=2) == 1
    assert designs.busy_share([1, 1, 1], slots=2) == 3 / 4
    assert designs.busy_share([3, 1, 1, 1], slots=2) == 1  # the short ones follow one another
    assert designs.busy_share([1, 1, 1, 3], slots=2) == 6 / 8
    assert designs.busy_share([5], slots=4) == 1 / 4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_programs_have_all_tiles_among_them(shape):
    tokens, inputs, _, _ = shape
    for bundle in Shape(*shape).bundles:
        launch, parts = designs.shrink(bundle)
        rows = -(-tokens // launch.meta["BM"])
        assert sum(designs.program_lengths(launch)) == rows * -(-inputs // launch.meta["BK"])
        more = [designs.NOTHING] * bundle.adapters, [0] * bundle.adapters, [True] * bundle.adapters
        launch = designs.expand(bundle, parts, *more)
        rows = -(-tokens // launch.meta["BM"])
        assert sum(designs.program_lengths(launch)) == rows * sum(bundle.columns_of(launch.meta["BN"]))
        launch, left = designs.output_backward(bundle, [0] * bundle.adapters, [True] * bundle.adapters)
        rows = -(-tokens // launch.meta["BM"])
        assert sum(designs.program_lengths(launch)) == rows * sum(left.tiles)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_layers_totals_are_linear_in_tokens(name):
    def totals(tokens: int) -> list[int]:
        forward, backward = roofline.layer_passes(DESIGNS[name], MODELS["Llama-3.2-1B"], tokens, 16)
        terms = forward + backward
        return [sum(getattr(t, what) for t in terms) for what in ("read", "write", "flops", "launches")]

    two, four, eight = totals(8192), totals(16384), totals(32768)
    ours = name.startswith(("add", "chain", "aug"))
    for a, b, c in zip(two[:2], four[:2], eight[:2], strict=True):
        assert c - b == pytest.approx(2 * (b - a), rel=0.1 if ours else 0)  # the number of our parts is rounded
    assert four[2] == 2 * two[2] and eight[2] == 2 * four[2] and two[3] == four[3] == eight[3]


@pytest.mark.parametrize("model", MODELS)
def test_layers_that_share_x_never_move_more_exposed_bytes_than_with_peft_bf16(model):
    for tokens in TOKENS:
        for rank in RANKS:
            for _, shape in roofline.shapes(DESIGNS["chain, shared reads"], MODELS[model], tokens, rank):
                ours = DESIGNS["chain"].count(shape)
                alone = [DESIGNS["PEFT bf16"].count(Shape(tokens, shape.inputs, (n,), rank)) for n in shape.outputs]
                for our_pass, their_passes in zip(ours, zip(*alone, strict=True), strict=True):
                    assert roofline.moved(our_pass, hidden=False) <= sum(map(roofline.moved, their_passes))


def test_floor_leaves_out_hidden_bytes_and_flops_that_do_not_lengthen_a_product():
    card = roofline.Card("any", bandwidth=2.0, tflops=100.0, l2=1.0, source="")
    terms = [
        Term("copy", 3 * 10**9, 10**9, flops=10**12),
        Term("hidden", 10**9, 0, hidden=True),
        Term("longer", 0, 0, flops=10**11, in_product=True),
    ]
    assert roofline.floor_ms(terms, card) == pytest.approx(2.0 + 1.0)
    layer = (("one", 1000, (500,)),)
    assert roofline.frozen_ms(layer, 10**5, card) == pytest.approx(4 * 1000 * 500 * 10**5 / 100e12 * 1e3)


def test_all_terms_are_those_worked_by_hand():
    card = roofline.Card("any", bandwidth=2.0, tflops=100.0, l2=4.0, source="")
    terms = [
        Term("half busy, twice", 10**9, 10**9, launches=2, again=4 * 10**9, busy=0.5, waits=3),
        Term("hidden", 10**9, 0, launches=0, hidden=True),
        Term("longer", 0, 0, flops=10**11, launches=0, in_product=True),
    ]
    layer = (("one two", 1000, (500, 500)),)
    frozen = 4 * 1000 * 1000 * 10**6 / 100e12 * 1e3
    sums = 3 * BF16 * 1000 * 10**6 / 2e12 * 1e3 + roofline.GAP
    designs.DESIGNS["mine"] = designs.Design(lambda shape: (terms, []), shared=True)
    try:
        found = roofline.estimate("mine", layer, 10**6, 16, card)
    finally:
        del designs.DESIGNS["mine"]
    assert found.bytes == found.tail == pytest.approx(1.0)
    assert found.again == found.longer == pytest.approx(1.0)
    assert found.waits == pytest.approx(3 * roofline.WAIT) and found.gaps == pytest.approx(2 * roofline.GAP)
    assert found.credit == pytest.approx(sums)
    assert found.frozen == pytest.approx(frozen + sums + 4 * roofline.GAP)
    assert found.overhead == pytest.approx((4.0 + 3 * roofline.WAIT + 2 * roofline.GAP - sums) / found.frozen)


def test_the_sums_of_dx_that_sharing_saves_a_decoder_layer_are_604_megabytes():
    card = roofline.Card("any", bandwidth=1.0, tflops=1.0, l2=1.0, source="")
    assert roofline.sums_of_dx(MODELS["Llama-3-8B"], 8192, card) - 3 * roofline.GAP == pytest.approx(0.604, rel=1e-3)


def test_the_kept_page_is_what_the_program_prints():
    page = Path(roofline.__file__).parents[1] / "docs" / "roofline.md"
    assert page.read_text(encoding="utf-8") == roofline.report(list(CARDS.values())), "run benchmarks.roofline again"
