"""The roofline's terms: sums worked by hand, PEFT's real operations, and the page that is kept of it."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import roofline
from benchmarks.designs import BF16, DESIGNS, UNSHARED, Shape, Term
from benchmarks.roofline import CARDS, MODELS, RANKS, TOKENS

# 4 tokens, 8 inputs, 6 outputs, rank 2: x has 32 elements, y 24, A 16, B 12, H 8. In our buffers, 16 ranks wide: H, Q
# and the one part of P 64 each, the one part of dA 128, of D 96; of these, the rows of true ranks have 16 and 12. One
# sum a pass, one number a term, in the order that the design has them.
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
        (128 + 224, 128 + 48),
        (224 + 384 + 48 + 256 + 64 + 128, 640 + 128 + 48 + 576 + 64 + 64),
    ),
    "chain": (
        (128 + 176 + 48, 128 + 48 + 0),
        (224 + 384 + 48 + 256 + 64 + 64, 640 + 128 + 48 + 576 + 64 + 0),
    ),
    "aug": (  # fewer outputs than inputs: dY is copied
        (128 + 48 + 320, 320 + 24 + 0),
        (224 + 384 + 48 + 192 + 64 + 64 + 384, 688 + 128 + 48 + 512 + 64 + 32 + 0),
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
    assert hidden.pop("chain") == hidden.pop("chain, shared reads") == [48, 64]
    assert not any(sum(passes) for passes in hidden.values())


@pytest.mark.parametrize("name", UNSHARED)
def test_flops_are_six_thin_products_and_what_is_formed_again(name):
    forward, backward = DESIGNS[name].count(Shape(4, 8, (6,), 16))
    x, y = 2 * 4 * 8 * 16, 2 * 4 * 6 * 16
    again = x + y if name == "Unsloth" else 0
    assert sum(t.flops for t in forward) == x + y
    assert sum(t.flops for t in backward) == 2 * x + 2 * y + again


def test_a_shared_read_of_x_saves_x_and_dx_and_nothing_else():
    one, both = Shape(4, 8, (6,), 2), Shape(4, 8, (6, 6), 2)
    x = BF16 * one.x
    (forward, backward), (shared_forward, shared_backward) = DESIGNS["chain"].count(one), DESIGNS["chain"].count(both)
    assert roofline.moved(shared_forward) == 2 * roofline.moved(forward) - x
    assert roofline.moved(shared_backward) == 2 * roofline.moved(backward) - 2 * x  # x read, dX written
    assert sum(t.launches for t in shared_forward + shared_backward) == 2 * 7 - 2


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


def launched(name: str, args: tuple) -> tuple[int, int]:
    """Bytes that one of our launches reads and writes, the gates' left out."""
    if name == "_shrink":
        x, rows, _, h = args[:4]
        return numel_bytes(x, *rows), numel_bytes(h)
    if name == "_expand":
        h, _, b, _, y = args[:5]
        return numel_bytes(h, b), numel_bytes(y)
    if name == "_output_backward":
        dy, h, _, b, p, d = args[:6]
        return numel_bytes(dy, h, b), numel_bytes(p, d)
    if name == "_reduce_hidden":
        p, h, _, q = args[:4]
        return numel_bytes(p, h), numel_bytes(q)
    if name == "_reduce_rows":
        parts, gate, _, out = args[:4]
        return numel_bytes(parts[:, : len(gate)]), numel_bytes(out)
    assert name == "_input_backward"
    x, q, rows, _, dx, da = args[:6]
    return numel_bytes(x, q, *rows), numel_bytes(dx, da)


@pytest.mark.parametrize(
    "shape",
    [(96, 1040, (512,), 5), (2500, 300, (520, 130), 16), (64, 64, (48, 48, 48), 40)],
    ids=["one", "two that share", "three that need two passes"],
)
def test_terms_of_chain_are_the_launches_that_our_code_makes(shape):
    pytest.importorskip("triton")
    from l1ra_kernels import gated_linear
    from l1ra_kernels.launch import redirected
    from l1ra_kernels.layer import Layer

    tokens, inputs, outputs, rank = shape
    layers = [
        Layer(torch.ones(rank, inputs), torch.ones(rank), torch.ones(rank, n), 1.0, torch.ones(n, inputs).bfloat16())
        for n in outputs
    ]
    x = torch.ones(tokens, inputs).bfloat16()
    dys = [torch.ones(tokens, n).bfloat16() for n in outputs]
    found: list[tuple[int, int]] = []
    with redirected(lambda kernel, grid, *args, **meta: found.append(launched(kernel.fn.__name__, args))):
        _, hidden = gated_linear.forward(x, layers, torch.bfloat16, 0.0, None)
        forward = len(found)
        gated_linear.backward(
            dys, x, hidden, layers, True, [gated_linear.Needs(True, True, True)] * len(outputs), 0.0, None
        )
    for terms, launches in zip(DESIGNS["chain"].count(Shape(*shape)), (found[:forward], found[forward:]), strict=True):
        ours = [t for t in terms if t.launches and "further" not in t.name]  # those sums are torch's
        assert sum(t.launches for t in ours) == len(launches)
        assert read_and_written(ours) == (sum(r for r, _ in launches), sum(w for _, w in launches))


def test_a_pass_over_x_serves_as_many_adapters_as_our_code_lets_share_it():
    pytest.importorskip("triton")
    from l1ra_kernels.gated_linear import _bundles

    for rank in (1, 16, 17, 32, 33, 64, 128):
        for linears in (1, 2, 3, 4):
            made = [len(pieces) for _, pieces in _bundles([rank] * linears)]
            assert Shape(4, 8, (6,) * linears, rank).bundles == made


@pytest.mark.parametrize("name", DESIGNS)
def test_a_layers_totals_are_linear_in_tokens(name):
    def totals(tokens: int) -> list[int]:
        forward, backward = roofline.layer_passes(DESIGNS[name], MODELS["Llama-3.2-1B"], tokens, 16)
        terms = forward + backward
        return [sum(getattr(t, what) for t in terms) for what in ("read", "write", "flops", "launches")]

    two, four, eight = totals(8192), totals(16384), totals(32768)
    ours = name.startswith(("add", "chain", "aug"))
    for a, b, c in zip(two[:2], four[:2], eight[:2], strict=True):
        assert c - b == pytest.approx(2 * (b - a), rel=0.02 if ours else 0)  # the number of our streams is rounded
    assert four[2] == 2 * two[2] and eight[2] == 2 * four[2] and two[3] == four[3] == eight[3]


@pytest.mark.parametrize("model", MODELS)
def test_chain_never_moves_more_exposed_bytes_than_peft_bf16(model):
    for tokens in TOKENS:
        for rank in RANKS:
            for _, shape in roofline.shapes(DESIGNS["chain"], MODELS[model], tokens, rank):
                ours, theirs = (DESIGNS[name].count(shape) for name in ("chain", "PEFT bf16"))
                for our_pass, their_pass in zip(ours, theirs, strict=True):
                    assert roofline.moved(our_pass, hidden=False) <= roofline.moved(their_pass)


def test_floor_leaves_out_hidden_bytes_and_flops_that_do_not_lengthen_a_product():
    card = roofline.Card("any", bandwidth=2.0, tflops=100.0, source="")
    terms = [
        Term("copy", 3 * 10**9, 10**9, flops=10**12),
        Term("hidden", 10**9, 0, hidden=True),
        Term("longer", 0, 0, flops=10**11, in_product=True),
    ]
    assert roofline.floor_ms(terms, card) == pytest.approx(2.0 + 1.0)
    layer = (("one", 1000, (500,)),)
    assert roofline.frozen_ms(layer, 10**5, card) == pytest.approx(4 * 1000 * 500 * 10**5 / 100e12 * 1e3)


def test_the_kept_page_is_what_the_program_prints():
    page = Path(roofline.__file__).parents[1] / "docs" / "roofline.md"
    assert page.read_text(encoding="utf-8") == roofline.report(CARDS["h100"]), "run benchmarks.roofline again"
