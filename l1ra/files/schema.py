"""Whether what was read from a file is made as it should be."""

from __future__ import annotations

from typing import Any

__all__ = ["misfit"]


def misfit(value: Any, form: Any, at: str = "") -> str:
    """What of ``value`` is not of the ``form``, in words; "" if all of it is.

    Args:
        form: a type or a union of types; a dict of forms by name (further names may be there); ``{str: form}``, a dict
            of any names; ``[form]``, a list of any length; a tuple of forms, a list of that length.
        at: the way to ``value`` from what was read, names with dots between.
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{at or 'it'} is no dict"
        forms = dict.fromkeys(value, form[str]) if str in form else form
        missing = [name for name in forms if name not in value]
        if missing:
            return f"{at and at + ': '}{', '.join(missing)} missing"
        parts = [(name, value[name], forms[name]) for name in forms]
    elif isinstance(form, list | tuple):
        if not isinstance(value, list) or (isinstance(form, tuple) and len(value) != len(form)):
            return f"{at or 'it'} is no list{f' of {len(form)}' if isinstance(form, tuple) else ''}"
        forms = form if isinstance(form, tuple) else form * len(value)
        parts = [(i, part, forms[i]) for i, part in enumerate(value)]
    else:
        # A bool is an int to Python.
        fits = isinstance(value, form) and (form is bool or not isinstance(value, bool))
        return "" if fits else f"{at or 'it'} is no {getattr(form, '__name__', form)}"
    return next(
        filter(None, (misfit(part, kind, f"{at}.{name}" if at else str(name)) for name, part, kind in parts)), ""
    )
