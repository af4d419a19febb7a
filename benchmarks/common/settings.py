"""Settings of L1RA on a command line."""

from __future__ import annotations

import argparse
import ast
from typing import Any

__all__ = ["setting"]


def setting(text: str) -> tuple[str, Any]:
    """``"margin=0.3"`` -> ``("margin", 0.3)``; a value that is not a Python literal stays a string.

    Raises:
        argparse.ArgumentTypeError: there is no name or no ``=``.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"write a setting of L1RAConfig as margin=0.3, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
