"""The compared methods, on tiny models and made-up token ids: equal terms, honest records."""

import json
import math

import numpy as np
import pytest
import torch
from quality_helpers import ALPHA, CLASSES, HEAD_RATE, STEPS, TinyTask, examples, put_tiny_tasks, spec

from benchmarks.quality import methods, models, runs, training
from benchmarks.quality.runs import Spec
from benchmarks.quality.tasks import TASKS

TRAINED = [method for method in methods.METHODS if method != methods.FROZEN]
SHORT = {"interval": 2, "min_interval": 1, "warmup": 0.0, "cooldown": 0.1}


@pytest.fixture(autouse=True)
def _tiny_tasks(monkeypatch, folders):
    put_tiny_tasks(monkeypatch, folders)


@pytest.mark.parametrize("task", ["bert", "llama", "damaged-bert", "damaged-llama"])
@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_on_equal_terms(method, task, tmp_path, folders, monkeypatch):
    seen = []
    collate = training.collate
    monkeypatch.setattr(training, "collate", lambda p, n, *rest: (seen.append(n), collate(p, n, *rest))[1])
    settings = tuple(SHORT.items()) if method.startswith("l1ra") else ()
    record = runs.run(spec(tmp_path, method, task=task, settings=settings))
    expected = training.batch_numbers(examples(1).train.lengths, 4, STEPS, 0)
    assert all((a == b).all() for a, b in zip(seen[:STEPS], expected, strict=True))

    layers = {"bert": 13, "llama": 14, "damaged-bert": 12, "damaged-llama": 14}[task]
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
    assert spec(tmp_path, method, task=task).record() == json.loads(json.dumps(record))


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
