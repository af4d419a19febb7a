"""Fixtures of the benchmarks' tests."""

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of the tiny pretrained models on which fine-tuning methods are compared, by name."""
    from quality_helpers import save_models

    found = {name: tmp_path_factory.mktemp(name) for name in ("bert", "llama")}
    save_models(found)
    return found
