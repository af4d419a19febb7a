"""Whether what was read from a file is made as it should be."""

from __future__ import annotations

from typing import Any

__all__ = ["mismatch"]


def mismatch(value: Any, schema: Any, at: str = "") -> str:
    """What of ``value`` is not of the ``schema``, in words; "" if all of it is.

    Args:
        schema: a type or a union of types; a dict of schemas by name (further names may be
            there); ``{str: schema}``, a dict of any names; ``[schema]``, a list of any length; a tuple of
            schemas, a list of that length.
        at: the way to ``value`` from what was read, names with dots between.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{at or 'it'} is no dict"
        schemas = dict.fromkeys(value, schema[str]) if str in schema else schema
        missing = [name for name in schemas if name not in value]
        if missing:
            return f"{at and at + ': '}{', '.join(missing)} missing"
        parts = [(name, value[name], schemas[name]) for name in schemas]
    elif isinstance(schema, list | tuple):
        if not isinstance(value, list) or (isinstance(schema, tuple) and len(value) != len(schema)):
            return f"{at or 'it'} is no list{f' of {len(schema)}' if isinstance(schema, tuple) else ''}"
        schemas = schema if isinstance(schema, tuple) else schema * len(value)
        parts = [(i, part, schemas[i]) for i, part in enumerate(value)]
    else:
        # A bool is an int to Python.
        fits = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
        return "" if fits else f"{at or 'it'} is no {getattr(schema, '__name__', schema)}"
    return next(
        filter(None, (mismatch(part, kind, f"{at}.{name}" if at else str(name)) for name, part, kind in parts)), ""
    )
