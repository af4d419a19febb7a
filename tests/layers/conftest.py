"""Fixtures of the tests of adapted layers."""

import pytest


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """Of the tiny Llama that is loaded with quantised weights."""
    from quantised_helpers import save_llama

    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder
