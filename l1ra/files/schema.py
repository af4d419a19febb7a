"""Check nested data that was read from a file against a schema."""

from __future__ import annotations

from typing import Any

__all__ = ["mismatch"]


def mismatch(value: Any, schema: Any, at: str = "") -> str:
    """The first difference between ``value`` and ``schema``, as text for an error message; "" if there is none.

    Args:
        value: nested dicts, lists and scalars.
        schema: a type or a union of types; a dict of schemas by key (``value`` may have further keys); ``{str:
            schema}``, a dict with any keys; ``[schema]``, a list of any length; a tuple of schemas, a list of that
            length.
        at: the path to ``value``, keys joined with dots.
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
        # In Python a bool is also an int.
        fits = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
        return "" if fits else f"{at or 'it'} is no {getattr(schema, '__name__', schema)}"
    for name, part, part_schema in parts:
        if wrong := mismatch(part, part_schema, f"{at}.{name}" if at else str(name)):
            return wrong
    return ""
