"""Validate a composed config against the signatures of its targets, before anything is built."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from bcos_train.config.annotations import (
    describe,
    is_compatible,
    is_list_type,
    is_mapping_type,
    is_scalar_type,
    item_types,
    mismatch,
    union_members,
)
from bcos_train.config.containers import join, to_container
from bcos_train.config.errors import UserError
from bcos_train.config.instantiation import MISSING, RESERVED, is_reserved
from bcos_train.config.plugins import KEY as PLUGINS
from bcos_train.config.plugins import missing_plugins
from bcos_train.config.signature import keyword_parameters, return_type
from bcos_train.config.targets import resolve
from bcos_train.utils.suggestions import suggest

__all__ = ["Problem", "check"]

_NO_VALUE = object()


@dataclass(frozen=True)
class Problem:
    """One problem: the config key as on the command line, the message, and the rejected value."""

    path: str
    text: str
    value: object = _NO_VALUE

    def __str__(self) -> str:
        return f"{self.path}{'' if self.value is _NO_VALUE else '=' + _format(self.value)}: {self.text}"


def check(config: Mapping[str, object], *, root: Callable[..., object] | None = None, path: str = "") -> list[Problem]:
    """Return all problems of a config; an empty list if it is valid.

    Every node with ``_target_`` is compared with the signature of its target: unknown keys, missing ones (unless
    ``_partial_``), values of the wrong type. Nothing is built, and only listed targets are imported.

    Args:
        config: Plain containers or a ``DictConfig``.
        root: Callable whose parameters are the top-level keys; ``None``: any key is allowed there.
        path: Config key of ``config``, if it is part of a larger config.
    """
    try:
        container = to_container(config, path)
    except UserError as error:
        key, _, text = str(error).partition(": ")
        return [Problem(key, text)]
    if root is None:
        return _check_value(container, object, path)
    if missing := missing_plugins(container):
        # Other problems may only result from the plugin's names being unknown.
        return [Problem(PLUGINS, _plugin_hint(name), name) for name in missing]
    return _check_arguments(root, container, path, complete=True)


def _check_value(value: object, annotation: object, path: str) -> list[Problem]:
    """Return the problems of ``value`` with respect to an annotation."""
    if isinstance(value, str) and value == MISSING:
        return [_missing(path, annotation)]
    if isinstance(value, Mapping) and "_target_" in value:
        return _check_node(value, annotation, path)
    trials = [_check_member(value, member, path) for member in union_members(annotation)]
    if [] in trials:
        return []
    # If the value has the form of one alternative only, report the problems inside it one by one.
    inside = [trial for trial in trials if all(problem.path != path for problem in trial)]
    if len(inside) == 1 or len(trials) == 1:
        return (inside or trials)[0]
    return [Problem(path, f"expected {describe(annotation)}", value), *_check_inner_nodes(value, path)]


def _check_member(value: object, annotation: object, path: str) -> list[Problem]:
    """Return the problems of ``value``, not a node, with respect to an annotation that is not a union."""
    if annotation is Any or annotation is object:
        return _check_inner_nodes(value, path)
    if (
        isinstance(value, list)
        and is_list_type(annotation)
        and (types := item_types(annotation, len(value))) is not None
    ):
        pairs = enumerate(zip(value, types, strict=True))
        return [problem for i, (item, kind) in pairs for problem in _check_value(item, kind, join(path, i))]
    if isinstance(value, Mapping) and is_mapping_type(annotation):
        kind = (*get_args(annotation), object, object)[1] if get_args(annotation) else object
        return [problem for key, item in value.items() for problem in _check_value(item, kind, join(path, key))]
    if isinstance(value, (list, Mapping)) or not is_scalar_type(annotation):
        return [Problem(path, f"expected {describe(annotation)}", value), *_check_inner_nodes(value, path)]
    expected = mismatch(value, annotation)
    return [] if expected is None else [Problem(path, f"expected {expected}", value)]


def _check_inner_nodes(value: object, path: str) -> list[Problem]:
    """Return the problems of the nodes inside a value of unknown type."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    return [problem for key, item in items for problem in _check_value(item, object, join(path, key))]


def _check_node(node: Mapping[str, object], annotation: object, path: str) -> list[Problem]:
    """Return the problems of a node with ``_target_``."""
    problems = [
        Problem(join(path, key), "not supported; arguments are given by name")
        for key in node
        if is_reserved(key) and key not in RESERVED
    ]
    is_partial = node.get("_partial_", False)
    if not isinstance(is_partial, bool):
        problems.append(Problem(join(path, "_partial_"), "expected true or false", is_partial))
    arguments = {key: value for key, value in node.items() if not is_reserved(key)}
    try:
        target = resolve(node["_target_"], path)
    except UserError as error:
        text = str(error).partition(": ")[2]
        problems.append(Problem(join(path, "_target_"), text, node["_target_"]))
        return problems + _check_inner_nodes(arguments, path)
    problems += _check_arguments(target, arguments, path, complete=not is_partial)
    result = return_type(target)
    if not any(is_compatible(result, member, bool(is_partial)) for member in union_members(annotation)):
        text = "a function" if is_partial else getattr(result, "__name__", str(result))
        text = f"expected {describe(annotation, for_node=True)}, but {node['_target_']} returns {text}"
        if any(is_compatible(result, member, not is_partial) for member in union_members(annotation)):
            text += "; remove _partial_" if is_partial else "; add _partial_: true"
        problems.append(Problem(path, text))
    return problems


def _check_arguments(
    target: Callable[..., object], arguments: Mapping[str, object], path: str, complete: bool
) -> list[Problem]:
    """Return the problems of keyword arguments; ``complete``: parameters without a default must be present."""
    try:
        known = keyword_parameters(target, arguments)
    except ValueError as error:
        # The other keywords depend on the value of the first parameter.
        first = next(iter(inspect.signature(target).parameters))
        message = Problem(join(path, first), " ".join(str(error).split()), arguments.get(first, _NO_VALUE))
        rest = {key: value for key, value in arguments.items() if key != first}
        return [message, *_check_inner_nodes(rest, path)]
    problems = []
    for key, value in arguments.items():
        if key in known:
            problems += _check_value(value, known[key].annotation, join(path, key))
        else:
            problems.append(Problem(join(path, key), _unknown(str(key), known), value))
            problems += _check_value(value, object, join(path, key))
    for key, parameter in known.items():
        if complete and parameter.default is parameter.empty and key not in arguments:
            problems.append(_missing(join(path, key), parameter.annotation))
    return problems


def _plugin_hint(name: str) -> str:
    return f"saved configs can't load plugins, since a plugin runs code; if you trust it, add plugins=[{name}]"


def _missing(path: str, annotation: object) -> Problem:
    kind = f" ({describe(annotation)})" if any(is_scalar_type(member) for member in union_members(annotation)) else ""
    return Problem(path, f"needs a value{kind}: add {path}=…")


def _unknown(key: str, known: Iterable[str]) -> str:
    """Return a message with the nearest right key, and all keys if there are few or none is near."""
    hint, known = suggest(key, known), list(known)
    allowed = f" (allowed: {', '.join(known) or 'none'})" if len(known) <= 12 or not hint else ""
    return f"unknown key{hint}{allowed}"


def _format(value: object) -> str:
    """Format a value as on the command line, truncated."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
