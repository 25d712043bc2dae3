"""Compare configured values with type annotations.

Values are what YAML can hold. Nodes with ``_target_`` are compared by the return type of their target.

pydantic validates scalars. Containers, unions and nodes are walked here: pydantic reports an error for each alternative
of a union in its own vocabulary, and knows neither nodes nor the nearest right name (see CONTRIBUTING.md).
"""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

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


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; any other annotation alone."""
    annotation = _resolved(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in union_members(member))
    return (annotation,)


def is_scalar_type(annotation: Any) -> bool:
    """True if a YAML scalar can be of this type."""
    inner = _without_metadata(annotation)
    if get_origin(inner) is Literal:
        return True
    return inspect.isclass(inner) and (inner in _NAMES or issubclass(inner, PurePath))


def mismatch(value: Any, annotation: Any) -> str | None:
    """What a scalar type expects instead of ``value``, or None if they agree.

    Whole numbers are numbers; ``true`` and ``"3"`` are not.
    """
    try:
        TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        is_bound = get_origin(annotation) is Annotated and message.startswith("Input should be ")
        if is_bound and not message.startswith("Input should be a valid"):
            return message.removeprefix("Input should be ")
        return describe(annotation) + _did_you_mean(value, annotation)
    return None


def is_list_type(annotation: Any) -> bool:
    """True if a YAML list can be of this type. A text is a sequence too, but is not written as a list."""
    origin = get_origin(annotation) or annotation
    if not inspect.isclass(origin) or origin.__module__ not in ("builtins", "collections", "collections.abc"):
        return False
    return issubclass(origin, Iterable) and not issubclass(origin, (str, bytes, Mapping))


def is_mapping_type(annotation: Any) -> bool:
    """True if a YAML mapping can be of this type."""
    origin = get_origin(annotation) or annotation
    return inspect.isclass(origin) and issubclass(origin, Mapping)


def item_types(annotation: Any, length: int) -> list[Any] | None:
    """The types of the items of a list of that length; None if the list type has another length."""
    arguments = get_args(annotation)
    if (get_origin(annotation) or annotation) is not tuple or not arguments or arguments[-1] is Ellipsis:
        return [arguments[0] if arguments else Any] * length
    return list(arguments) if len(arguments) == length else None


def is_compatible(result: Any, annotation: Any, is_partial: bool = False) -> bool:
    """True if an object of type ``result``, or a function returning one, can satisfy the annotation.

    Types that cannot be compared count as compatible and are left to the code that uses them. A parameter that takes a
    mapping takes an unbuilt node.
    """
    if annotation is Any or annotation is object or isinstance(annotation, (str, TypeVar)):
        return True
    origin = get_origin(annotation) or annotation
    if origin is Callable or origin is partial:
        expected = get_args(annotation)[-1] if get_args(annotation) else Any
        if is_partial:
            return any(is_compatible(r, e) for r in union_members(result) for e in union_members(expected))
        return not inspect.isclass(result) or any("__call__" in vars(base) for base in result.__mro__)
    if is_mapping_type(annotation):
        return True
    if is_partial or origin is Literal:
        return False
    if Any in union_members(result) or not inspect.isclass(origin) or getattr(origin, "_is_protocol", False):
        return True
    results = [get_origin(made) or made for made in union_members(result)]
    # A function that is annotated with a base class may well return the class in question.
    return any(not inspect.isclass(made) or issubclass(made, origin) or issubclass(origin, made) for made in results)


def describe(annotation: Any, for_node: bool = False) -> str:
    """The expected values in words: all of them for a node, otherwise those that can be typed, if any."""
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
        return join_words(map(_as_text, arguments))
    if inspect.isclass(origin) and origin in _NAMES:
        return _NAMES[origin]
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(describe, arguments))}]"
    if is_list_type(annotation):
        return f"a list of {describe(arguments[0])}" if arguments and arguments[0] is not Any else "a list"
    if is_mapping_type(annotation):
        return "a mapping"
    if origin is Callable:
        made = describe(arguments[-1]).partition(" (")[0] if arguments else "Any"
        return "a function" + ("" if made == "Any" else f" that makes {made}") + " (a node with _target_)"
    return f"{name} (a node with _target_)"


def _resolved(annotation: Any) -> Any:
    """Resolve ``NewType`` and ``None`` to the types that they stand for."""
    while hasattr(annotation, "__supertype__"):
        annotation = annotation.__supertype__
    return type(None) if annotation is None else annotation


def _without_metadata(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _can_be_typed(annotation: Any) -> bool:
    return is_scalar_type(annotation) or is_list_type(annotation) or is_mapping_type(annotation)


def _did_you_mean(value: Any, annotation: Any) -> str:
    inner = _without_metadata(annotation)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    return suggest(str(value), [choice for choice in choices if isinstance(choice, str)])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
