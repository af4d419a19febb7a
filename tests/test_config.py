"""L1RAConfig: frozen, checked once, with errors that say what to write."""

import dataclasses
import re

import pytest
import torch

from l1ra import L1RAConfig


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        L1RAConfig().rule = "l1"


def test_every_field_is_documented():
    for field in dataclasses.fields(L1RAConfig):
        assert re.search(rf"^\s+{field.name}: ", L1RAConfig.__doc__, re.MULTILINE), field.name


def test_the_default_preset_is_the_default():
    assert L1RAConfig.from_preset() == L1RAConfig.from_preset("default") == L1RAConfig()


def test_the_reference_preset_is_what_its_authors_ran():
    config = L1RAConfig.from_preset("reference")
    expected = {
        "init": "gaussian",
        "new_rows": "random",
        "rule": "l1",
        "l1_lambda": 1e-3,
        "l2_lambda": 0.0,
        "gate_lr": 2e-2,
        "interval": 0.1,
        "warmup": 0.0,
        "cooldown": 0.0,
        "prune_threshold": 1e-10,
        "min_rank": 1,
        "exclude_pruned": True,
        "budget_unit": "ranks",
        "adapter_dtype": "float32",
        "rank_stabilized": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert L1RAConfig.from_preset("reference", l1_lambda=5e-3).l1_lambda == 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_a_dtype_is_taken_by_name_or_as_it_is(dtype):
    config = L1RAConfig(adapter_dtype=dtype)
    assert config.adapter_dtype == "bfloat16" and config.dtype is torch.bfloat16
    assert config == L1RAConfig(adapter_dtype="bfloat16")


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("rule", "paper", ValueError, "rule must be one of"),
        ("init", "zeros", ValueError, "init must be one of"),
        ("new_rows", "svd", ValueError, "new_rows must be one of"),
        ("budget_unit", "bytes", ValueError, "'ranks', 'params'"),
        ("adapter_dtype", "int8", ValueError, "adapter_dtype must be one of"),
        ("adapter_dtype", torch.int8, ValueError, "adapter_dtype must be one of"),
        ("alpha", 0, ValueError, "alpha must be above 0"),
        ("alpha", -1.0, ValueError, "alpha must be"),
        ("alpha", "16", TypeError, "alpha must be a number or None"),
        ("dropout", 1.0, ValueError, "from 0 to below 1"),
        ("dropout", -0.1, ValueError, "from 0 to below 1"),
        ("dropout", True, TypeError, "must be a number"),
        ("dropout", float("nan"), ValueError, "from 0 to below 1"),
        ("gate_lr", float("inf"), ValueError, "gate_lr must be finite and at least 0"),
        ("l1_lambda", -1, ValueError, "l1_lambda must be finite and at least 0"),
        ("l2_lambda", None, TypeError, "l2_lambda must be a number, not None"),
        ("prune_threshold", 1.0, ValueError, "prune_threshold"),
        ("total_steps", 0, ValueError, "at least 1"),
        ("total_steps", 100.0, TypeError, "total_steps must be an int or None"),
        ("min_rank", 0, ValueError, "min_rank must be at least 1"),
        ("min_rank", True, TypeError, "min_rank must be an int"),
        ("max_rank", 0, ValueError, "max_rank must be at least 1"),
        ("seed", -1, ValueError, "seed must be at least 0"),
        ("interval", 0, ValueError, "interval must be at least 1"),
        ("interval", 1.0, ValueError, "a share of the total"),
        ("interval", 0.0, ValueError, "a share of the total"),
        ("interval", True, ValueError, "a number of steps"),
        ("interval", "10", ValueError, "a number of steps"),
        ("warmup", 1.0, ValueError, "warmup must be"),
        ("rank_stabilized", 1, TypeError, "must be True or False"),
        ("exclude_pruned", "yes", TypeError, "must be True or False"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_says_what_to_write(field, value, error, message):
    with pytest.raises(error, match=message):
        L1RAConfig(**{field: value})


def test_settings_that_contradict_each_other_are_an_error():
    with pytest.raises(ValueError, match="leave no step for reallocations"):
        L1RAConfig(warmup=0.5, cooldown=0.5)
    with pytest.raises(ValueError, match="max_rank 2 is below min_rank 3"):
        L1RAConfig(min_rank=3, max_rank=2)


def test_an_unknown_setting_is_an_error_with_a_hint():
    with pytest.raises(TypeError, match="did you mean 'l1_lambda'"):
        L1RAConfig().replace(l1_lamda=1.0)
    with pytest.raises(TypeError, match="the settings are alpha, "):
        L1RAConfig.from_preset("reference", zzzz=1)


def test_replace_checks_anew_and_leaves_the_old_one():
    config = L1RAConfig(min_rank=2)
    assert config.replace(seed=3) == L1RAConfig(min_rank=2, seed=3) and config.seed == 0
    with pytest.raises(ValueError, match="max_rank 1 is below"):
        config.replace(max_rank=1)
