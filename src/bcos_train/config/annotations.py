"""Compare config values with type annotations.

Values are YAML values. Nodes with ``_target_`` are compared by the return type of their target.

pydantic validates scalars. Containers, unions and nodes are traversed here, because pydantic reports an error for each
alternative of a union in its own vocabulary, and supports neither nodes nor suggestions of the nearest right name (see
CONTRIBUTING.md).
"""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NewType, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from bcos_train.utils.suggestions import join_words, suggest

__all__ = [
    "describe",
    "is_compatible",
    "is_list_type",
    "is_mapping_type",
    "is_scalar_type",
    "item_types",
    "mismatch",
    "union_members",
]

_NAMES = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Path: "a path",
}


def union_members(annotation: object) -> tuple[object, ...]:
    """Return the alternatives of a union, or a tuple of the annotation itself."""
    annotation = _resolved(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in union_members(member))
    return (annotation,)


def is_scalar_type(annotation: object) -> bool:
    """True if a YAML scalar can be of this type."""
    inner = _without_metadata(annotation)
    if get_origin(inner) is Literal:
        return True
    return inspect.isclass(inner) and (inner in _NAMES or issubclass(inner, PurePath))


def mismatch(value: object, annotation: Any) -> str | None:
    """Return a description of the expected values if ``value`` does not match a scalar type, else None.

    Whole numbers are numbers; ``true`` and ``"3"`` are not.
    """
    if get_origin(annotation) is Literal and not any(
        type(value) is type(choice) and value == choice for choice in get_args(annotation)
    ):  # pydantic takes 16.0 for 16
        return describe(annotation) + _did_you_mean(value, annotation)
    try:
        TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        is_bound = get_origin(annotation) is Annotated and message.startswith("Input should be ")
        if is_bound and not message.startswith("Input should be a valid"):
            return message.removeprefix("Input should be ")
        return describe(annotation) + _did_you_mean(value, annotation)
    return None


def is_list_type(annotation: object) -> bool:
    """True if a YAML list can be of this type; False for strings."""
    origin = get_origin(annotation) or annotation
    if not inspect.isclass(origin) or origin.__module__ not in ("builtins", "collections", "collections.abc"):
        return False
    return issubclass(origin, Iterable) and not issubclass(origin, (str, bytes, Mapping))


def is_mapping_type(annotation: object) -> bool:
    """True if a YAML mapping can be of this type."""
    origin = get_origin(annotation) or annotation
    return inspect.isclass(origin) and issubclass(origin, Mapping)


def item_types(annotation: object, length: int) -> list[object] | None:
    """Return the type of each item of a list with ``length`` items, or None if the list type has another length."""
    arguments = get_args(annotation)
    if (get_origin(annotation) or annotation) is not tuple or not arguments or arguments[-1] is Ellipsis:
        return [arguments[0] if arguments else object] * length
    return list(arguments) if len(arguments) == length else None


def is_compatible(result: object, annotation: object, is_partial: bool = False) -> bool:
    """True if an object of type ``result``, or a function returning one, can satisfy the annotation.

    Types that cannot be compared count as compatible. Parameters that take a mapping take a node without building it.
    """
    if annotation is Any or annotation is object or isinstance(annotation, (str, TypeVar)):
        return True
    origin = get_origin(annotation) or annotation
    if origin is Callable or origin is partial:
        expected = get_args(annotation)[-1] if get_args(annotation) else object
        if is_partial:
            return any(is_compatible(r, e) for r in union_members(result) for e in union_members(expected))
        return not inspect.isclass(result) or any("__call__" in vars(base) for base in result.__mro__)
    if is_mapping_type(annotation):
        return True
    if is_partial or origin is Literal:
        return False
    if Any in union_members(result) or not inspect.isclass(origin) or getattr(origin, "_is_protocol", False):
        return True
    results = [get_origin(member) or member for member in union_members(result)]
    # A function annotated with a base class may return the expected subclass.
    return any(not inspect.isclass(cls) or issubclass(cls, origin) or issubclass(origin, cls) for cls in results)


def describe(annotation: object, for_node: bool = False) -> str:
    """Describe the expected values in words: for a node all, otherwise those that can be typed, if any."""
    alternatives = union_members(annotation)
    if len(alternatives) > 1:
        typed = [member for member in alternatives if _can_be_typed(member) and member is not type(None)]
        if typed and not for_node:
            alternatives = tuple(member for member in alternatives if _can_be_typed(member))
        return join_words(dict.fromkeys(describe(member, for_node) for member in alternatives))
    annotation = _without_metadata(alternatives[0])
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    name = getattr(origin, "__name__", str(origin))
    if origin is Literal:
        return join_words(dict.fromkeys(map(_as_text, arguments)))
    if inspect.isclass(origin) and origin in _NAMES:
        return _NAMES[origin]
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(describe, arguments))}]"
    if is_list_type(annotation):
        return f"a list of {describe(arguments[0])}" if arguments and arguments[0] is not Any else "a list"
    if is_mapping_type(annotation):
        return "a mapping"
    if origin in (Callable, partial):
        returned = describe(arguments[-1]).partition(" (")[0] if arguments and arguments[-1] is not Any else ""
        return "a function" + (f" that returns {returned}" if returned else "") + " (a node with _target_)"
    return f"{name} (a node with _target_)"


def _resolved(annotation: object) -> object:
    """Replace a ``NewType`` by its base and ``None`` by its type."""
    while isinstance(annotation, NewType):
        annotation = annotation.__supertype__
    return type(None) if annotation is None else annotation


def _without_metadata(annotation: object) -> object:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _can_be_typed(annotation: object) -> bool:
    return is_scalar_type(annotation) or is_list_type(annotation) or is_mapping_type(annotation)


def _did_you_mean(value: object, annotation: object) -> str:
    inner = _without_metadata(annotation)
    return suggest(str(value), map(_as_text, get_args(inner) if get_origin(inner) is Literal else ()))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
