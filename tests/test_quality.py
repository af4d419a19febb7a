"""The comparison of methods, on tiny models and made-up token ids: equal terms, honest records, honest tables."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import climb, methods, models, program, runs, schedule, texts, training
from benchmarks.quality.runs import TUNING_SEED, Spec
from benchmarks.quality.tasks import TASKS, Examples, Part, Task, encode
from examples.data import DataError

VOCABULARY, CLASSES, STEPS = 40, 3, 12
ALPHA = 4.0
HEAD_RATE = 3e-2
TRAINED = [method for method in methods.METHODS if method != methods.FROZEN]
SHORT = {"interval": 2, "min_interval": 1, "warmup": 0.0, "cooldown": 0.1}


def part(count, seed, prompts=False):
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 10, count)
    ids = random.integers(3, VOCABULARY, lengths.sum()).astype(np.int32)
    ends = np.cumsum(lengths)
    # The class is in the first token: something to learn.
    labels = np.full(count, 2) if prompts else ids[ends - lengths] % CLASSES
    return Part(ids, ends.astype(np.int64), labels.astype(np.int64))


def examples(classes, counts=(80, 20, 30)):
    return Examples(classes, 0, *(part(count, seed, not classes) for seed, count in enumerate(counts)))


@dataclass(frozen=True)
class TinyTask(Task):
    """Made-up ids instead of texts."""

    def examples(self):
        return examples(CLASSES if self.metric == "accuracy" else 0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    little = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    found = {name: tmp_path_factory.mktemp(name) for name in ("bert", "llama")}
    bert = BertConfig(**little, num_attention_heads=2, max_position_embeddings=16)
    BertModel(bert).save_pretrained(found["bert"])
    llama = LlamaConfig(**little, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    LlamaForCausalLM(llama).save_pretrained(found["llama"])
    return found


@pytest.fixture(autouse=True)
def _tiny_tasks(monkeypatch, folders):
    for name, metric in (("bert", "accuracy"), ("llama", "perplexity")):
        task = TinyTask(name, name, lambda name=name: folders[name], None, STEPS, 4, 10, metric, 10.0)
        monkeypatch.setitem(TASKS, name, task)


def spec(tmp_path, method="lora", multiplier=2, seed=0, rate=1e-2, task="bert", **more):
    head_rate = HEAD_RATE if task == "bert" and method != methods.FROZEN else None
    return Spec(task, method, multiplier, seed, rate, STEPS, str(tmp_path), **{"head_rate": head_rate, **more})


class InProcess:
    """A run without a process of its own."""

    def __init__(self, spec):
        self.output, self.returncode = "", 0
        try:
            runs.run(spec)
        except Exception as error:
            self.output, self.returncode = str(error), 1

    def poll(self):
        return self.returncode

    def communicate(self):
        return self.output, None


# --- data and batches


def test_no_text_is_in_two_parts():
    rows = [{"text": f"text {i % 70}{' ' * (i % 3)}", "label": 0} for i in range(200)]
    split = texts.three_parts(2, rows, 10, 20)
    keys = [texts.key(e) for name in ("train", "validation", "test") for e in getattr(split, name)]
    assert len(keys) == len(set(keys)) == 70
    assert (len(split.validation), len(split.test)) == (10, 20)
    assert texts.three_parts(2, rows, 10, 20) == split
    with pytest.raises(DataError, match="too few"):
        texts.three_parts(2, rows, 40, 30)


def test_wordnet_lines_become_word_and_definition():
    line = (
        '02084071 05 n 03 domestic_dog 0 dog 0 001 @ 02083346 n 0000 | a member of Canis; "the dog barked all night"  '
    )
    assert texts._synsets("noun", f"  1 licence\n{line}") == ["noun\t5\tdomestic dog\ta member of Canis"]


def test_a_language_model_learns_the_completion_alone():
    class Words:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, rows, **options):
            return type("Encoded", (), {"input_ids": [[len(word) for word in row.split()] for row in rows]})

    rows = [{"prompt": "aa aaa", "completion": "b bbbb"}, {"prompt": "a a a a a", "completion": "b"}]
    found = encode(texts.Split(0, rows, rows[:1], rows[:1]), Words(), max_tokens=5)
    assert len(found.train) == 1  # of the other one no completion is left
    batch = training.collate(found.train, np.array([0]), 0, 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[2, 3, 1, 4, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 1, 4, 1]]


def test_batches_are_of_similar_length_and_use_an_epoch_before_the_next():
    lengths = np.random.default_rng(0).integers(3, 60, 400)
    batches = training.batch_numbers(lengths, 8, 60, seed=3)
    assert len(batches) == 60 and all(len(numbers) == 8 for numbers in batches)
    assert sorted(np.concatenate(batches[:50])) == list(range(400))
    padded = sum(8 * lengths[numbers].max() for numbers in batches[:50])
    assert padded < 1.3 * lengths.sum()
    assert all((a == b).all() for a, b in zip(batches, training.batch_numbers(lengths, 8, 60, seed=3), strict=True))
    assert any((a != b).any() for a, b in zip(batches, training.batch_numbers(lengths, 8, 60, seed=4), strict=True))


def test_what_is_read_is_read_once_whatever_the_length(monkeypatch):
    monkeypatch.setattr(training, "EVALUATED_TOKENS", 20)
    found = examples(CLASSES)
    read = list(training.reading(found.test, found, torch.device("cpu")))
    assert sorted(np.concatenate([numbers for numbers, _ in read])) == list(range(30))
    assert all(batch["input_ids"].numel() <= 20 for _, batch in read)


def test_the_rate_warms_up_and_falls_to_0():
    shares = [training.share_of_rate(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 6) and max(shares) == shares[6] == 1 and shares[100] == 0
    assert shares[53] == pytest.approx(0.5)


# --- methods


@pytest.mark.parametrize("task", ["bert", "llama"])
@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_on_equal_terms(method, task, tmp_path, folders, monkeypatch):
    seen = []
    collate = training.collate
    monkeypatch.setattr(training, "collate", lambda p, n, *rest: (seen.append(n), collate(p, n, *rest))[1])
    settings = tuple(SHORT.items()) if method.startswith("l1ra") else ()
    record = runs.run(spec(tmp_path, method, task=task, settings=settings))
    expected = training.batch_numbers(examples(1).train.lengths, 4, STEPS, 0)
    assert all((a == b).all() for a, b in zip(seen[:STEPS], expected, strict=True))

    layers = 13 if task == "bert" else 14
    assert record["adapted_layers"] == len(record["ranks"]) == layers
    uniform = 2 * sum(map(sum, record["layer_sizes"].values()))
    assert record["budget"] == (uniform if method == "l1ra-params" else 2 * layers)
    if method == "l1ra-params":
        assert record["adapter_parameters"] <= uniform == record["initial_adapter_parameters"]
    else:
        assert sum(record["ranks"].values()) <= 2 * layers
        assert sum(record["initial_ranks"].values()) == (3 if method == "adalora" else 2) * layers
    assert record["head_rate"] == (HEAD_RATE if task == "bert" else None)
    assert record["head_parameters"] == (16 * CLASSES + CLASSES if task == "bert" else 0)
    if method in ("l1ra", "l1ra-params"):
        assert record["ranks_moved"] > 0 and sum(r["moved"] for r in record["reallocations"]) == record["ranks_moved"]
        assert record["config"]["interval"] == 2
    assert math.isfinite(record["test_loss"]) and record["diverged"] is False
    assert json.loads(spec(tmp_path, method, task=task).file.read_text()) == json.loads(json.dumps(record))


def test_heads_are_the_same_for_every_method_and_are_trained(folders):
    heads = {}
    for method in TRAINED:
        model = models.load(folders["bert"], CLASSES)
        adapted = adapt(method, model, seed=5)
        assert model.classifier.weight.requires_grad and model.classifier.bias.requires_grad
        assert any(p is model.classifier.weight for p in adapted.trained)
        heads[method] = model.classifier.weight.detach().clone()
    assert all(torch.equal(head, heads["lora"]) for head in heads.values())


def adapt(method, model, seed=0, steps=STEPS):
    return methods.adapt(method, model, 2, alpha=ALPHA, seed=seed, steps=steps)


def rates_of(adapted, task, head_rate, monkeypatch):
    """The learning rates of the optimizer's groups at each step of a training at 1e-3, and the groups' parameters."""
    rates, parameters = [], []

    def note(optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])
        parameters[:] = [group["params"] for group in optimizer.param_groups]

    def watched(*arguments, **options):
        optimizer = adamw(*arguments, **options)
        optimizer.register_step_pre_hook(note)
        return optimizer

    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", watched)
    found = examples(CLASSES if task == "bert" else 0)
    training.train(adapted, found, training.batch_numbers(found.train.lengths, 4, STEPS, 0), 1e-3, 0, head_rate)
    return np.array(rates), parameters


SHARES = np.array([[training.share_of_rate(step, STEPS)] for step in range(STEPS)])


@pytest.mark.filterwarnings("ignore:no rank will move")  # so few steps
@pytest.mark.parametrize("method", TRAINED)
def test_the_head_learns_at_its_own_rate_and_the_adapters_at_theirs(method, folders, monkeypatch):
    model = models.load(folders["bert"], CLASSES)
    adapted = adapt(method, model)
    rates, (adapters, head) = rates_of(adapted, "bert", HEAD_RATE, monkeypatch)
    assert rates == pytest.approx(SHARES * [1e-3, HEAD_RATE])
    assert set(map(id, head)) == set(map(id, model.classifier.parameters()))
    assert set(map(id, [*adapters, *head])) == set(map(id, adapted.trained)) and adapters
    assert len(adapters) + len(head) == len(adapted.trained)


def test_one_rate_is_for_all_where_there_is_no_fresh_head(folders, monkeypatch):
    adapted = adapt("lora", models.load(folders["llama"], 0))
    rates, (adapters,) = rates_of(adapted, "llama", None, monkeypatch)
    assert rates == pytest.approx(SHARES * 1e-3) and len(adapters) == len(adapted.trained)


def test_a_head_without_a_rate_of_its_own_is_an_error_and_a_rate_without_a_head(tmp_path):
    for wrong in (spec(tmp_path, "lora", head_rate=None), spec(tmp_path, "lora", task="llama", head_rate=HEAD_RATE)):
        with pytest.raises(ValueError, match="a learning rate of its own, and nothing else"):
            runs.run(wrong)


def test_a_head_that_a_wrapper_replaces_by_a_copy_is_an_error(folders, monkeypatch):
    import peft

    plain = peft.get_peft_model

    def wrapping(model, config):
        config.modules_to_save = ["classifier"]
        return plain(model, config)

    monkeypatch.setattr(peft, "get_peft_model", wrapping)
    with pytest.raises(RuntimeError, match="not the one that was drawn"):
        adapt("lora", models.load(folders["bert"], CLASSES))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_settings_of_l1ra_are_for_l1ra(method, tmp_path):
    with pytest.raises(ValueError, match=f"{method} takes no settings of L1RA"):
        runs.run(spec(tmp_path, method, settings=(("margin", 0.2),)))


@pytest.mark.parametrize("multiplier", [2, 4, 8])
def test_alpha_is_the_same_at_every_budget_and_all_scalings_at_the_middle_one(multiplier, folders):
    found = {method: scalings(method, multiplier, folders["bert"]) for method in TRAINED}
    expected = dict.fromkeys(TRAINED, ALPHA / multiplier)
    expected["rslora"] = math.sqrt(ALPHA / multiplier)
    for method in TRAINED:
        assert found[method] == pytest.approx([expected[method]] * 13, rel=1e-4)
    if multiplier == TASKS["bert"].middle == ALPHA:
        assert set(expected.values()) == {1}


def scalings(method, multiplier, folder):
    """What each layer's adapter is multiplied by, from what it adds to the weight when all its factors are 1."""
    model = models.load(folder, CLASSES)
    adapted = methods.adapt(method, model, multiplier, alpha=ALPHA, seed=0, steps=STEPS)
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name or name.endswith("gate"):
            parameter.data.fill_(1.0)
    found = []
    for layer in adapted.model.modules():
        if hasattr(layer, "delta_weight"):
            found.append(layer.delta_weight().mean().item() / layer.rank)
        elif hasattr(layer, "get_delta_weight"):
            found.append(layer.get_delta_weight("default").mean().item() / layer.r["default"])
    return found


def test_lora_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "peak_bytes", lambda: 2**20)
    # Enough to train on that it is no matter of luck, and to test on that it shows: a guess is right in 1 of 3.
    monkeypatch.setattr(TinyTask, "examples", lambda task: examples(CLASSES, (800, 100, 200)))
    record = runs.run(Spec("bert", "lora", 4, 0, 1e-2, 150, str(tmp_path), head_rate=1e-2))
    assert record["test_metric"] > 0.6
    assert record["peak_mib"] == 1


def test_the_ranks_of_adalora_fall(folders):
    model = models.load(folders["bert"], CLASSES)
    adapted = methods.adapt("adalora", model, 2, alpha=ALPHA, seed=0, steps=20)
    assert set(adapted.ranks().values()) == {3}
    found = examples(CLASSES)
    training.train(adapted, found, training.batch_numbers(found.train.lengths, 4, 20, 0), 1e-2, 0, 1e-2)
    assert 0 < sum(adapted.ranks().values()) <= 2 * 13
    assert len(set(adapted.ranks().values())) > 1


def test_adalora_is_trained_on_its_orthogonality_term_too_and_not_judged_by_it(folders):
    model = models.load(folders["bert"], CLASSES)
    found = examples(CLASSES)
    models.fresh_head(model, 0)
    before = training.evaluate(model, found.test, found)[0]
    adapted = adapt("adalora", model, steps=20)
    factors = {name: p for name, p in adapted.model.named_parameters() if "lora_A" in name or "lora_B" in name}
    with torch.no_grad():
        grams = [p @ p.T if "lora_A" in name else p.T @ p for name, p in factors.items()]
        term = sum(torch.dist(gram, torch.eye(len(gram))).item() for gram in grams) / len(grams)
        batch = training.collate(found.test, np.arange(8), CLASSES, 0, torch.device("cpu"))
        adapted.model.eval()
        plain, whole = (forward(**batch).loss.item() for forward in (adapted.model, adapted.forward))
    assert len(factors) == 2 * 13 and term > 1
    weight = adapted.model.peft_config["default"].orth_reg_weight
    assert weight > 0 and whole - plain == pytest.approx(weight * term, rel=1e-4)

    # Its singular values are 0 at first: the factors get no gradient but the term's.
    gradients = []
    adapted.after_step = lambda step: gradients.extend(p.grad.abs().max().item() for p in factors.values())
    assert training.evaluate(adapted.model, found.test, found)[0] == pytest.approx(before)
    training.train(adapted, found, [np.arange(4)], 1e-2, 0, 1e-2)
    assert len(gradients) == len(factors) and min(gradients) > 0


def test_an_allocation_of_adalora_that_does_nothing_is_an_error(folders, monkeypatch):
    from peft import AdaLoraModel

    model = models.load(folders["bert"], CLASSES)
    adapted = methods.adapt("adalora", model, 2, alpha=ALPHA, seed=0, steps=20)
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda self, step: None)
    with pytest.raises(RuntimeError, match="AdaLoRA has 39 ranks after its last cut instead of 26"):
        for step in range(1, 21):
            adapted.after_step(step)


def test_frozen_models_are_judged_too(tmp_path):
    classifier = runs.run(spec(tmp_path, "frozen", 0, rate=0.0))
    language = runs.run(spec(tmp_path, "frozen", 0, rate=0.0, task="llama"))
    assert 0 <= classifier["test_metric"] <= 1
    assert language["test_metric"] == pytest.approx(math.exp(language["test_loss"]))


def test_a_training_that_diverges_is_recorded_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOOK", 1)
    record = runs.run(spec(tmp_path, rate=1e30))
    assert record["diverged"] and record["test_loss"] is None


def test_only_whole_ranks_for_uniform_methods(folders):
    with pytest.raises(ValueError, match="must be whole"):
        methods.adapt("lora", models.load(folders["bert"], CLASSES), 1.4, alpha=ALPHA, seed=0, steps=STEPS)
    adapted = methods.adapt("l1ra", models.load(folders["bert"], CLASSES), 1.4, alpha=ALPHA, seed=0, steps=STEPS)
    assert adapted.budget == 18  # of 18.2


# --- runs and the program


ARGUMENTS = ["--tasks", "bert", "--methods", "frozen", "lora", "l1ra", "--seeds", "2", "--rates", "1e-2", "3e-2"]


@pytest.mark.filterwarnings("ignore:no rank will move")  # so few steps
def test_the_program_tunes_runs_resumes_and_reports(tmp_path, capsys):
    arguments = [*ARGUMENTS, "--jobs", "1", "--budgets", "2", "--out", str(tmp_path)]
    launched = []

    def launch(spec):
        launched.append(spec)
        return InProcess(spec)

    assert program.main(arguments, launch) == 0
    tuning = [s for s in launched if s.seed == TUNING_SEED]
    # At the chosen rate of the head, LoRA's first rate was tried with the head's rates already.
    assert len(tuning) == 2 + 2 * 2 - 1 and len(launched) == len(tuning) + 2 * 3
    records = schedule.read(tmp_path)
    assert all((r["test_loss"] is None) == (r["seed"] == TUNING_SEED) for r in records)
    heads = [r for r in records if r["seed"] == TUNING_SEED and (r["method"], r["rate"]) == ("lora", 1e-2)]
    head_rate = climb.best({r["head_rate"]: r["validation_loss"] for r in heads})
    assert {r["head_rate"] for r in heads} == {1e-2, 3e-2}
    assert {s.head_rate for s in launched if s.method != "frozen" and s.seed < 2} == {head_rate}
    for method in ("lora", "l1ra"):
        tried = [r for r in records if (r["method"], r["seed"], r["head_rate"]) == (method, TUNING_SEED, head_rate)]
        best = climb.best({r["rate"]: r["validation_loss"] for r in tried})
        assert {s.rate for s in launched if s.method == method and s.seed < 2} == {best}
    report = (tmp_path / "quality.md").read_text()
    assert f"| the head, beside lora | {head_rate:g} |" in report
    assert (
        "l1ra − lora" in report
        and "of the grid" in report
        and "Alpha is 4 at every budget" in report
        and (tmp_path / "bert.png").stat().st_size > 0
    )
    assert "python -m benchmarks.quality --tasks bert" in report and str(tmp_path) not in report

    launched.clear()
    next(tmp_path.glob("bert/lora/2x-seed1-*.json")).unlink()
    assert program.main(arguments, launch) == 0
    assert [(s.method, s.seed) for s in launched] == [("lora", 1)]
    assert not list(tmp_path.rglob("*.partial"))

    launched.clear()
    experiment = ["--tasks", "bert", "--seeds", "1", "--budgets", "2", "--rate", "1e-2", "--out", str(tmp_path)]
    experiment += ["--rates", "1e-2", "3e-2", "--set", "margin=0.2", "--label", "q25"]
    assert program.main(experiment, launch) == 0
    assert [(s.name, s.rate, s.head_rate) for s in launched] == [("q25", 1e-2, head_rate)]
    (record,) = [r for r in schedule.read(tmp_path) if r["method"] == "q25"]
    assert record["settings"] == {"margin": 0.2} and record["config"]["margin"] == 0.2
    assert record["base_method"] == "l1ra" and record["alpha"] == record["config"]["alpha"] == ALPHA
    assert "q25 − l1ra" in (tmp_path / "quality.md").read_text()


def test_language_models_have_no_head_to_look_for_a_rate_for(tmp_path):
    launched = []

    def launch(spec):
        launched.append(spec)
        return InProcess(spec)

    arguments = ["--tasks", "llama", "--methods", "lora", "--seeds", "1", "--budgets", "2", "--rate", "1e-2"]
    assert program.main([*arguments, "--out", str(tmp_path)], launch) == 0
    assert [(s.method, s.rate, s.head_rate) for s in launched] == [("lora", 1e-2, None)]
    (record,) = schedule.read(tmp_path)
    assert record["head_rate"] is None and "the head" not in (tmp_path / "quality.md").read_text()


def test_no_minutes_start_nothing(tmp_path, capsys):
    def launch(spec):
        raise AssertionError("started")

    assert program.main([*ARGUMENTS, "--minutes", "0", "--out", str(tmp_path)], launch) == 0
    assert "are left for the next call" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, capsys):
    def launch(spec):
        fails = (spec.method, spec.seed) == ("lora", 0)
        return InProcess(Spec(**{**vars(spec), "method": "nonsense"}) if fails else spec)

    arguments = ["--tasks", "bert", "--methods", "lora", "--seeds", "2", "--budgets", "2", "--rate", "1e-2"]
    arguments += ["--rates", "3e-2"]
    assert program.main([*arguments, "--out", str(tmp_path)], launch) == 1
    captured = capsys.readouterr()
    assert "no method is called 'nonsense'" in captured.out and "1 runs FAILED" in captured.err
    assert [r["seed"] for r in schedule.read(tmp_path) if r["seed"] != TUNING_SEED] == [1]


def test_a_run_of_its_own_process_has_one_thread_and_fails_loudly(tmp_path, monkeypatch):
    seen = {}

    def popen(command, env, **options):
        seen.update(command=command, env=env)

    monkeypatch.setattr(subprocess, "Popen", popen)
    wanted = spec(tmp_path, "l1ra", settings=(("margin", 0.3),))
    schedule.start(wanted)
    assert seen["env"]["OMP_NUM_THREADS"] == "1" and seen["env"]["GOMP_SPINCOUNT"] == "0"
    assert Spec.parse(seen["command"][-1]) == wanted


def test_settings_and_label_belong_together(capsys):
    for arguments in (["--label", "x"], ["--set", "margin=0.3"], ["--set", "margin", "--label", "x"]):
        with pytest.raises(SystemExit):
            program.main(arguments)
