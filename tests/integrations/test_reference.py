"""The reference of preference training that goes on from trained adapters: the model as it was when training began."""

import copy

import pytest
import torch
from helpers import llama, shake, tokens
from trainer_helpers import arguments, livelier, sentences, tokenizer
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import l1ra

peft = pytest.importorskip("peft")
MOVING = {"interval": 3, "min_interval": 3, "warmup": 0.0, "min_coherence": 0.0, "margin": 1.0}


def logits(model, x=None):
    with torch.no_grad():
        return model.eval()(tokens() if x is None else x).logits


@pytest.fixture
def begun(tmp_path):
    """A base model on disk, and a LoRA that has been trained from it."""
    livelier(llama()).save_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    lora = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    lora.save_pretrained(tmp_path / "lora")

    def go_on():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        return model, l1ra.from_peft(model, tmp_path / "lora", budget=40, **MOVING)

    return go_on


def train(model, path, steps=12, resume=None, **kwargs):
    args = TrainingArguments(**arguments(path, max_steps=steps, seed=5, **kwargs))
    Trainer(model, args, train_dataset=sentences()).train(resume_from_checkpoint=resume)


def test_the_reference_stays_the_loaded_lora_while_ranks_move(begun, tmp_path):
    model, controller = begun()
    first = logits(model)
    train(model, tmp_path, save_strategy="steps", save_steps=6)
    assert controller.moved > 0 and not torch.allclose(logits(model), first, atol=1e-2)
    with controller.disabled():
        torch.testing.assert_close(logits(model), first, atol=1e-5, rtol=1e-5)
    controller.save(tmp_path / "own")

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = l1ra.load(loaded, tmp_path / "own")
    resumed, other = begun()
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-6"))
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    patched = l1ra.patch(fresh, 40, **MOVING)
    fresh.load_state_dict(model.state_dict())
    for reader, its in ((loaded, again), (resumed, other), (fresh, patched)):
        torch.testing.assert_close(logits(reader), logits(model))
        with its.disabled():
            torch.testing.assert_close(logits(reader), first, atol=1e-5, rtol=1e-5)


def test_the_reference_is_set_anew_for_a_second_stage(tmp_path):
    model = livelier(llama())
    base = logits(model)
    controller = l1ra.patch(model, 28, **MOVING)
    train(model, tmp_path)
    with controller.disabled():
        assert torch.equal(logits(model), base)
    controller.set_reference()
    then = logits(model)
    shake(model)
    with controller.disabled():
        torch.testing.assert_close(logits(model), then, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(logits(model).float(), then, atol=0.05)
    l1ra.merge(model)
    with pytest.raises(RuntimeError, match=r"unmerge\(model\) before set_reference"):
        controller.set_reference()
    l1ra.unpatch(model)
    assert not any("reference" in name for name in model.state_dict())


def test_a_reference_without_gradient_in_sixteen_bits():
    model = livelier(llama()).to(torch.bfloat16)
    controller = l1ra.patch(model, 28, total_steps=100)
    shake(model)
    then = logits(model)
    controller.set_reference()
    with controller.disabled():
        found = model(tokens()).logits
        assert found.dtype == then.dtype and not found.requires_grad
        assert torch.allclose(found.float(), then.float(), atol=0.1)
    copied = copy.deepcopy(model)
    assert {name for name in copied.state_dict() if "reference" in name}


def preferences():
    from datasets import Dataset

    words = [f"w{i}" for i in range(3, 50)]
    rows = [{"prompt": w, "chosen": f" {words[i - 2]}", "rejected": f" {words[i - 9]}"} for i, w in enumerate(words)]
    return Dataset.from_list(rows)


def grpo(model, path, **kwargs):
    trl = pytest.importorskip("trl")
    settings = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1, "bf16": False, **kwargs}
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=trl.GRPOConfig(**{**arguments(path, max_steps=2, logging_steps=1), "learning_rate": 0.0}, **settings),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


def test_a_trainer_that_makes_a_reference_without_the_loaded_lora_is_refused(begun, tmp_path):
    model, _ = begun()
    with pytest.raises(ValueError, match=r"of GRPOTrainer has not the adapters .* merge these adapters"):
        grpo(model, tmp_path).train()


@pytest.mark.filterwarnings("ignore:no rank will move")
def test_what_the_refusal_says_to_do_works(begun, tmp_path):
    model, _ = begun()
    l1ra.unpatch(model, merge=True)
    model.save_pretrained(tmp_path / "merged")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    controller = l1ra.patch(model, 28, total_steps=2)
    trainer = grpo(model, tmp_path)
    trainer.train()
    assert controller.steps == 2
    assert next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry) == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:no rank will move")
def test_dpo_from_a_lora_begins_at_its_reference(begun, tmp_path):
    trl = pytest.importorskip("trl")
    model, controller = begun()

    def trainer_of(**kwargs):
        args = {**arguments(tmp_path, max_steps=2, logging_steps=1), "learning_rate": 0.0, "bf16": False}
        precompute = "ref_model" not in kwargs
        args = trl.DPOConfig(**args, max_length=16, precompute_ref_log_probs=precompute)
        return trl.DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer(), **kwargs)

    with controller.disabled():
        inside = trainer_of()
    merged = begun()[0]
    l1ra.unpatch(merged, merge=True)
    told = trainer_of(ref_model=merged)
    for trainer in (inside, told):
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    bare = trainer_of(ref_model=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"create the trainer within controller\.disabled\(\)"):
        bare.train()


def test_a_reference_that_follows_the_model_is_refused(tmp_path):
    model = livelier(llama())
    model.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    l1ra.patch(model, 28, total_steps=2)
    with pytest.raises(ValueError, match="pass sync_ref_model=False"):
        grpo(model, tmp_path, sync_ref_model=True, ref_model_sync_steps=1).train()
