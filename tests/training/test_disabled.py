"""``controller.disabled()``: the model as it was before the adapters were put in, for the time of a block."""

import pytest
import torch
from helpers import bert, copied, gpt2, llama, patched, same_bits, shake, step, tokens, trainable
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import l1ra
from l1ra_kernels import choice


def logits(model):
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_outputs_are_those_of_the_base_model_to_the_bit(make):
    model = make().eval()
    expected = logits(model).detach()
    controller = l1ra.patch(model, 60)
    shake(model)
    adapted = logits(model)
    with controller.disabled():
        assert same_bits(logits(model), expected)
    assert same_bits(logits(model), adapted) and not torch.equal(adapted, expected)


def test_blocks_may_be_nested_and_left_by_an_error():
    model, controller, _, x, _ = patched()
    adapted = shake(model)(x)
    with pytest.raises(ZeroDivisionError), controller.disabled():
        with controller.disabled():
            base = model(x)
        assert same_bits(model(x), base) and not torch.equal(base, adapted)
        raise ZeroDivisionError
    assert same_bits(model(x), adapted)


def test_a_module_that_is_trained_in_full_stays_as_it_is():
    model = bert().eval()
    controller = l1ra.patch(model, 60)
    with torch.no_grad():
        model.classifier.weight.fill_(0.1)
    with controller.disabled():
        disabled = logits(shake(model))
    assert same_bits(logits(l1ra.unpatch(model)), disabled)


def test_a_reference_at_each_step_changes_nothing_of_the_training():
    def run(reference):
        torch.manual_seed(0)
        model, controller, optimizer, x, y = patched(dropout=0.1)
        for _ in range(60):
            if reference:
                with torch.no_grad(), controller.disabled():
                    model(x)
            step(model, optimizer, x, y)
        assert controller.moved > 0
        return controller.history, [p.detach() for p in trainable(model)]

    (history, rows), (same_history, same_rows) = run(False), run(True)
    assert history == same_history and all(same_bits(a, b) for a, b in zip(rows, same_rows, strict=True))


def test_a_backward_in_the_block_reaches_no_adapter():
    model, controller, _, x, y = patched()
    x.requires_grad_()
    with controller.disabled():
        F.mse_loss(model(x), y).backward()
    assert x.grad.any() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("auto", [True, False])
def test_no_optimizer_steps_in_the_block_unnoticed(auto):
    model, controller, optimizer, x, y = patched(auto=auto)
    F.mse_loss(shake(model)(x), y).backward()
    before = [p.detach().clone() for p in trainable(model)]

    def advance():
        optimizer.step()
        if not auto:
            controller.step(optimizer)

    with controller.disabled(), pytest.raises(RuntimeError, match="leave the block before"):
        advance()
    assert controller.steps == 0
    if auto:
        assert all(same_bits(p, old) for p, old in zip(trainable(model), before, strict=True))
    advance()
    assert controller.steps == 1


def test_merged_adapters_are_neither_disabled_nor_disabled_ones_merged():
    model, controller, _, x, _ = patched()
    adapted = shake(model)(x)
    l1ra.merge(model)
    with pytest.raises(RuntimeError, match=r"blocks.0 is merged .* call l1ra.unmerge"), controller.disabled():
        pass
    l1ra.unmerge(model)
    with controller.disabled():
        with pytest.raises(RuntimeError, match=r"leave controller.disabled"):
            l1ra.merge(model)
        with pytest.raises(RuntimeError, match=r"leave controller.disabled"):
            l1ra.unpatch(model, merge=True)
    assert same_bits(model(x), adapted)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_that_is_made_in_the_block_has_its_adapters(how):
    model, controller, _, x, _ = patched()
    adapted = shake(model)(x)
    with controller.disabled():
        twin = copied(model, how)
    assert same_bits(twin(x), adapted)


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_a_compiled_model_has_a_graph_with_adapters_and_one_without(kernels):
    if kernels == "fused" and not (choice.interpreting() or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or triton's interpreter: TRITON_INTERPRET=1")
    torch._dynamo.reset()
    model, controller, _, x, _ = patched()
    with choice.using(kernels):
        adapted = shake(model)(x)
        with controller.disabled():
            base = model(x)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), adapted)
            with controller.disabled():
                torch.testing.assert_close(compiled(x), base)
    assert counter.frame_count == 2
