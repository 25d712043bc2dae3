"""Does a configured value fit a type annotation?

Values are what YAML can hold. Nodes with ``_target_`` are compared by what their target returns.
"""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from bcos_train.suggest import join_words, suggest

__all__ = [
    "describe",
    "fits",
    "is_list_type",
    "is_mapping_type",
    "is_plain_type",
    "item_types",
    "members",
    "misfit",
]

_WORDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Path: "a path",
}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; of anything else itself alone."""
    annotation = _stripped(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in members(member))
    return (annotation,)


def is_plain_type(annotation: Any) -> bool:
    """Whether a YAML scalar can be of this type."""
    inner = _inner(annotation)
    if get_origin(inner) is Literal:
        return True
    return inspect.isclass(inner) and (inner in _WORDS or issubclass(inner, PurePath))


def misfit(value: Any, annotation: Any) -> str | None:
    """What is wrong with a scalar for a plain type, or None.

    Whole numbers are numbers; ``true`` is no number and ``"3"`` isn't either.
    """
    try:
        TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        bounds = get_origin(annotation) is Annotated and message.startswith("Input should be ")
        if bounds and not message.startswith("Input should be a valid"):
            return message.removeprefix("Input should be ")
        return describe(annotation) + _did_you_mean(value, annotation)
    return None


def is_list_type(annotation: Any) -> bool:
    """Whether a YAML list can be of this type. A text is a sequence too, but no list can stand for it."""
    origin = get_origin(annotation) or annotation
    if not inspect.isclass(origin) or origin.__module__ not in ("builtins", "collections", "collections.abc"):
        return False
    return issubclass(origin, Iterable) and not issubclass(origin, (str, bytes, Mapping))


def is_mapping_type(annotation: Any) -> bool:
    """Whether a YAML mapping can be of this type."""
    origin = get_origin(annotation) or annotation
    return inspect.isclass(origin) and issubclass(origin, Mapping)


def item_types(annotation: Any, length: int) -> list[Any] | None:
    """The types of the items of a list of that length; None if the list type has another length."""
    arguments = get_args(annotation)
    if (get_origin(annotation) or annotation) is not tuple or not arguments or arguments[-1] is Ellipsis:
        return [arguments[0] if arguments else Any] * length
    return list(arguments) if len(arguments) == length else None


def fits(result: Any, annotation: Any, is_partial: bool = False) -> bool:
    """Whether a ``result``-typed object, or a function returning one, can be what the annotation says.

    In doubt, yes: a type that can't be compared is left to the code that uses it. A parameter that takes a mapping
    takes a node as it is, to be built later.
    """
    if annotation is Any or annotation is object or isinstance(annotation, (str, TypeVar)):
        return True
    origin = get_origin(annotation) or annotation
    if origin is Callable or origin is partial:
        expected = get_args(annotation)[-1] if get_args(annotation) else Any
        if is_partial:
            return any(fits(made, member) for made in members(result) for member in members(expected))
        return not inspect.isclass(result) or any("__call__" in vars(base) for base in result.__mro__)
    if is_mapping_type(annotation):
        return True
    if is_partial or origin is Literal:
        return False
    if Any in members(result) or not inspect.isclass(origin) or getattr(origin, "_is_protocol", False):
        return True
    results = [get_origin(made) or made for made in members(result)]
    # A function that is annotated with a base class may well return the class in question.
    return any(not inspect.isclass(made) or issubclass(made, origin) or issubclass(origin, made) for made in results)


def describe(annotation: Any, for_node: bool = False) -> str:
    """The expected values, in words: all of them for a node, otherwise those that can be typed, if there are any."""
    alternatives = members(annotation)
    if len(alternatives) > 1:
        typed = [member for member in alternatives if _is_typed(member) and member is not type(None)]
        if typed and not for_node:
            alternatives = tuple(member for member in alternatives if _is_typed(member))
        return join_words(dict.fromkeys(describe(member, for_node) for member in alternatives))
    annotation = _inner(alternatives[0])
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    name = getattr(origin, "__name__", str(origin))
    if origin is Literal:
        return join_words(map(_scalar, arguments))
    if inspect.isclass(origin) and origin in _WORDS:
        return _WORDS[origin]
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


def _stripped(annotation: Any) -> Any:
    """Without NewType and None in place of its type."""
    while hasattr(annotation, "__supertype__"):
        annotation = annotation.__supertype__
    return type(None) if annotation is None else annotation


def _inner(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_typed(annotation: Any) -> bool:
    return is_plain_type(annotation) or is_list_type(annotation) or is_mapping_type(annotation)


def _did_you_mean(value: Any, annotation: Any) -> str:
    inner = _inner(annotation)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    return suggest(str(value), [choice for choice in choices if isinstance(choice, str)])


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
