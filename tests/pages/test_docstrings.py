"""The docstrings of the public names: each has an example that is Python."""

import ast
import inspect
import textwrap

import pytest

import l1ra


def example(docstring):
    """The code under ``Example::`` in a docstring."""
    lines = inspect.cleandoc(docstring).splitlines()
    rest = lines[lines.index("Example::") + 1 :]
    end = next((i for i, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return textwrap.dedent("\n".join(rest[:end])).strip()


@pytest.mark.parametrize("name", l1ra.__all__)
def test_every_public_name_has_an_example(name):
    code = example(getattr(l1ra, name).__doc__)
    assert code and ast.parse(code).body
