"""transformers.Trainer and TRL's SFTTrainer, unmodified: nothing to pass, nothing to call."""

import copy
import math
import warnings

import pytest
import torch
from circumstances import llama as one_layer
from helpers import bert, llama, shake
from trainer_helpers import STEPS, arguments, labelled, livelier, sentences, tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

import l1ra
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.shared_input import learned_groups
from l1ra_kernels import choice


class Board(TrainerCallback):
    """Writes down what it is given to log, as the TensorBoard callback does."""

    def __init__(self):
        self.scalars = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in logs.items():
            self.scalars.setdefault(name, []).append((state.global_step, value))


def train(path, model=None, budget=28, patch=None, explicit=False, **kwargs):
    model = livelier(model or llama())
    controller = l1ra.patch(model, budget, **{"interval": 3, "warmup": 0.0, **(patch or {})})
    board = Board()
    data = kwargs.pop("data", sentences())
    args = TrainingArguments(**arguments(path, **kwargs))
    callbacks = [board, controller.callback()] if explicit else [board]
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(L1RA|rank).*")
        trainer.train()
    return controller, trainer, board


def test_the_trainer_says_how_long_and_ranks_move(tmp_path):
    controller, trainer, _ = train(tmp_path)
    assert controller.total_steps == controller.steps == trainer.state.global_step == STEPS
    assert [entry["step"] for entry in controller.history] == [0, 3, 6, 9, 12, 15, 18, 21]  # a cooldown of 0.3
    assert controller.moved > 0 and sum(controller.ranks.values()) + controller.spare == 28
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_statistics_stand_in_the_history_and_on_every_board(tmp_path):
    controller, trainer, board = train(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS // 5 and all(controller.statistics().keys() <= entry.keys() for entry in logged)
    for name, value in controller.statistics().items():
        assert [step for step, _ in board.scalars[name]][: STEPS // 5] == list(range(5, STEPS + 1, 5))
        assert board.scalars[name][-1] == (STEPS, value)
    assert board.scalars["l1ra/moved"][0][1] <= board.scalars["l1ra/moved"][-1][1] == controller.moved


@pytest.mark.parametrize("auto", [True, False])
def test_a_callback_that_is_passed_does_what_happens_by_itself(tmp_path, auto):
    saving = {"save_strategy": "steps", "save_steps": 10}
    expected, _, expected_board = train(tmp_path / "itself", model=llama(), **saving)
    controller, trainer, board = train(
        tmp_path / "passed", model=llama(), patch={"auto": auto}, explicit=True, **saving
    )
    assert controller.auto == auto and controller.history == expected.history and controller.moved > 0
    assert controller.gates() == expected.gates()
    ranks = [name for name in board.scalars if name.startswith("l1ra/")]
    assert len(ranks) == 6 and all(board.scalars[name] == expected_board.scalars[name] for name in ranks)
    ours = [c for c in trainer.callback_handler.callbacks if getattr(c, "controller", None) is controller]
    assert len(ours) == 1 and (tmp_path / "passed" / "checkpoint-10" / "l1ra" / "l1ra.json").exists()


def test_a_callback_of_the_user_with_a_controller_is_left_alone(tmp_path):
    class Mine(TrainerCallback):
        def __init__(self, controller):
            self.controller = controller

    model = livelier(llama())
    controller = l1ra.patch(model, 28, interval=3, warmup=0.0)
    args = TrainingArguments(**arguments(tmp_path, save_strategy="steps", save_steps=10))
    trainer = Trainer(model, args, train_dataset=sentences(), callbacks=[Mine(controller)])
    trainer.train()
    assert any("l1ra/ranks" in entry for entry in trainer.state.log_history)
    assert (tmp_path / "checkpoint-10" / "l1ra" / "l1ra.json").exists()


def test_a_callback_of_the_user_that_makes_the_steps_makes_all_of_them(tmp_path):
    class Steps(TrainerCallback):
        def __init__(self, controller):
            self.mine, self.calls = controller, 0

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.calls += 1
            self.mine.step(optimizer.optimizer)

    expected, *_ = train(tmp_path)
    model = livelier(llama())
    controller = l1ra.patch(model, 28, interval=3, warmup=0.0, auto=False)
    steps = Steps(controller)
    Trainer(model, TrainingArguments(**arguments(tmp_path)), train_dataset=sentences(), callbacks=[steps]).train()
    assert steps.calls == controller.steps == STEPS and controller.history == expected.history


def test_a_copy_of_a_callback_does_nothing():
    copied = copy.deepcopy(l1ra.patch(llama(), 28, auto=False).callback())
    assert copied.controller is None
    copied.on_optimizer_step(None, None, None, optimizer=None)
    copied.on_train_begin(None, None, None)
    copied.on_log(None, None, None, logs={"loss": 1.0})


def test_a_callback_needs_no_trainer_on_the_call_stack(tmp_path, monkeypatch):
    monkeypatch.setattr("l1ra.integrations.trainer.calls", lambda *names: iter(()))
    controller, trainer, _ = train(tmp_path, explicit=True)
    assert controller.total_steps == STEPS and controller.history[-1]["step"] == 21
    assert any("l1ra/ranks" in entry for entry in trainer.state.log_history)


def test_a_step_that_accelerate_skipped_moves_no_gate():
    controller = l1ra.patch(llama(), 28, auto=False, total_steps=STEPS)

    class Skipped:
        step_was_skipped = True

    controller.callback().on_optimizer_step(None, None, None, optimizer=Skipped())
    assert controller.steps == 0


def test_a_number_of_epochs_is_counted_in_optimizer_steps(tmp_path):
    controller, *_ = train(
        tmp_path, patch={"interval": 2}, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4
    )
    assert controller.total_steps == controller.steps == 8  # 64 samples, 4 a batch, 4 batches a step


def test_total_steps_of_your_own_win(tmp_path):
    controller, *_ = train(tmp_path, patch={"total_steps": 2 * STEPS})
    assert controller.total_steps == 2 * STEPS and controller.steps == STEPS
    assert controller.history[-1]["step"] == STEPS


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_both_kinds_moves_the_same_ranks(tmp_path, reentrant):
    plain, *_ = train(tmp_path)
    saved, trainer, _ = train(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert saved.history[2]["ranks"] == plain.history[2]["ranks"]
    assert saved.gates() == {name: pytest.approx(row, abs=0.05) for name, row in plain.gates().items()}
    assert saved.moved > 0 and trainer.state.global_step == STEPS


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "max_grad_norm": 0.1, "weight_decay": 0.3, "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "learning_rate": 0.3},
        {"optim": "rmsprop"},
        {"optim": "adagrad"},
        {"optim": "adamw_8bit"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"bf16": True},
        {"gradient_accumulation_steps": 3},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_the_trainers_settings_do_not_reach_the_gates(tmp_path, settings):
    needs = {"adamw_8bit": "bitsandbytes", "schedule_free_adamw": "schedulefree"}.get(settings.get("optim"))
    if needs:
        pytest.importorskip(needs)
    controller, trainer, _ = train(tmp_path, **settings)
    gates = [g for row in controller.gates().values() for g in row]
    assert controller.steps == STEPS and len(controller.history) == 8 and controller.skipped_steps == 0
    assert min(gates) >= 0 and max(gates) <= 1
    for layer in controller.adapters.values():
        assert layer.gate.grad is None or not layer.gate.grad.any()
        # Adagrad alone has a state before it has seen a gradient.
        assert trainer.optimizer.state.get(layer.gate, {}).keys() <= {"step", "sum"}


def test_the_trainer_compiles_the_model_for_once(tmp_path):
    """One graph, and one more for the steps at which probes ride along: beyond eight torch gives up."""
    torch._dynamo.reset()
    settings = {"patch": {"reserve": 8}, "budget": 14, "max_steps": 15}

    def model():
        whole = llama()
        del whole.model.layers[1]
        return whole

    plain, *_ = train(tmp_path, model(), **settings)
    limit = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
    with limit:
        compiled, *_ = train(tmp_path, model(), torch_compile_backend="aot_eager", **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.ranks == plain.ranks and compiled.moved == plain.moved > 0


def test_a_classifier_is_trained_with_its_head(tmp_path):
    data = [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][0]) % 3} for row in sentences()]
    model = bert()
    head = model.classifier.weight.detach().clone()
    controller, trainer, _ = train(tmp_path, model, budget=40, data=data)
    assert not torch.equal(model.classifier.weight, head) and controller.steps == STEPS
    assert all("l1ra/ranks" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_a_checkpoint_of_the_trainer_can_be_loaded_into_a_fresh_patched_model(tmp_path):
    controller, trainer, _ = train(tmp_path, save_strategy="steps", save_steps=15)
    assert len(set(controller.ranks.values())) > 1
    fresh = livelier(llama())
    l1ra.patch(fresh, 28)
    from safetensors.torch import load_file

    missing = fresh.load_state_dict(load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert {name: layer.rank for name, layer in find_adapters(fresh)} == controller.ranks
    ids = sentences(2)[0]["input_ids"][None]
    torch.testing.assert_close(fresh(ids).logits, trainer.model(ids).logits, rtol=0, atol=0)


def test_two_trainers_one_after_the_other_each_drive_their_own_model(tmp_path):
    first, *_ = train(tmp_path)
    second, *_ = train(tmp_path, max_steps=10)
    assert (first.steps, first.total_steps, second.steps, second.total_steps) == (STEPS, STEPS, 10, 10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trls_sft_trainer_is_driven_just_the_same(tmp_path, checkpointing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [" ".join(f"w{3 + (i + 2 * j) % 47}" for j in range(12)) for i in range(48)]
    model = livelier(llama())
    controller, board = l1ra.patch(model, 28, interval=3, warmup=0.0), Board()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **arguments(tmp_path, gradient_checkpointing=checkpointing, bf16=False),
            max_length=16,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        callbacks=[board],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(L1RA|rank).*")
        trainer.train()
    assert controller.total_steps == controller.steps == STEPS and controller.moved > 0
    assert len(board.scalars["l1ra/moved"]) >= STEPS // 5
    assert all("l1ra/ranks" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_trls_dpo_trainer_asks_the_disabled_model_for_its_reference(tmp_path):
    """With adapters that have learned something already, as after supervised fine-tuning."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = [f"w{i}" for i in range(3, 50)]
    rows = [{"prompt": w, "chosen": f" {words[i - 2]}", "rejected": f" {words[i - 9]}"} for i, w in enumerate(words)]

    def trainer_of(model, **kwargs):
        args = DPOConfig(**arguments(tmp_path), max_length=16, bf16=False, precompute_ref_log_probs=True)
        data = Dataset.from_list(rows)
        return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), **kwargs)

    model = livelier(llama())
    base = copy.deepcopy(model)
    controller = l1ra.patch(model, 28, interval=3, warmup=0.0)
    shake(model)
    with controller.disabled():
        trainer = trainer_of(model)
    told = trainer_of(model, ref_model=base)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        reference = torch.tensor(trainer.train_dataset[column])
        assert torch.equal(reference, torch.tensor(told.train_dataset[column]))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] != pytest.approx(math.log(2), abs=1e-3)  # log 2: it would be its own reference
    assert controller.steps == controller.total_steps == STEPS and controller.moved > 0


def test_a_second_trainer_on_the_same_model_logs_the_statistics_too(tmp_path):
    model = livelier(llama())
    l1ra.patch(model, 28, interval=3, warmup=0.0, total_steps=12)
    for _ in range(2):
        trainer = Trainer(
            model=model, args=TrainingArguments(**arguments(tmp_path, max_steps=6)), train_dataset=sentences()
        )
        trainer.train()
        assert [e["step"] for e in trainer.state.log_history if "loss" in e and "l1ra/ranks" in e] == [5]


@pytest.mark.parametrize("at", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_trainer_resumes_from_its_checkpoint_bit_for_bit(at, make, tmp_path):
    """At every kind of step: reallocation after 6, the last half interval of which begins after 4."""
    settings = {"patch": {"interval": 6, "margin": 1.0}, "max_steps": 20, "data": labelled() if make is bert else None}
    whole, trainer = resumable(tmp_path / "whole", make, **settings)
    resumable(tmp_path / "broken", make, save_steps=at, **settings)
    resumed, again = resumable(tmp_path / "broken", make, resume=f"checkpoint-{at}", **settings)
    assert resumed.steps == whole.steps == 20 and resumed.history == whole.history and whole.moved > 0
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())


@pytest.mark.skipif(not choice.interpreting(), reason="needs triton's interpreter: TRITON_INTERPRET=1")
def test_a_trainer_resumes_bit_for_bit_on_the_fused_path(tmp_path):
    """Which layers are computed together is a part of the state: it decides in which order gradients are summed."""
    settings = {"patch": {"interval": 3, "margin": 1.0, "min_interval": 1}, "max_steps": 8, "checkpointing": True}
    with choice.using("fused"):
        whole, trainer = resumable(tmp_path / "whole", one_layer, **settings)
        resumable(tmp_path / "broken", one_layer, save_steps=4, **settings)
        resumed, again = resumable(tmp_path / "broken", one_layer, resume="checkpoint-4", **settings)
    assert resumed.steps == whole.steps == 8 and resumed.history == whole.history and whole.moved > 0
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in again.model.named_parameters())
    assert learned_groups(resumed.adapters) == learned_groups(whole.adapters) != {}


def resumable(path, make, save_steps=10, resume=None, data=None, max_steps=20, patch=None, checkpointing=False):
    torch.manual_seed(0)
    model = livelier(make())
    controller = l1ra.patch(model, 28, **{"warmup": 0.0, **(patch or {})})
    args = TrainingArguments(
        **arguments(path, save_strategy="steps", save_steps=save_steps, max_steps=max_steps, seed=5),
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(model, args, train_dataset=data or sentences())
    trainer.train(resume_from_checkpoint=str(path / resume) if resume else None)
    return controller, trainer
