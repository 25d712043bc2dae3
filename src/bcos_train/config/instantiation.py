"""Build the objects that a config describes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bcos_train.config.annotations import union_members
from bcos_train.config.containers import join, to_container
from bcos_train.config.errors import UserError, user_errors_at
from bcos_train.config.signature import keyword_parameters
from bcos_train.config.targets import resolve

__all__ = ["MISSING", "RESERVED", "instantiate", "is_reserved"]

#: Keys of a node that are not arguments.
RESERVED = ("_target_", "_partial_")
#: Value of a mandatory key that has not been set.
MISSING = "???"


def instantiate(node: Mapping[str, object], *, path: str = "") -> Any:
    """Call the ``_target_`` of a node with the other keys as keyword arguments, inner nodes first.

    With ``_partial_: true`` the result is a ``functools.partial``. Mappings and lists without ``_target_`` are copied
    and the nodes in them are built.

    Args:
        node: Plain containers, or a ``DictConfig``, whose interpolations are then resolved.
        path: Config key of the node, for messages.

    Raises:
        UserError: A ``_target_`` outside the allow-list anywhere in the node (nothing is built then), a reserved key
            that is not supported, or a ``ValueError`` or missing file while building; the message begins with the key
            of the node.
    """
    config = to_container(node, path)
    _validate_nodes(config, path)
    return _build(config, path)


def _validate_nodes(value: object, path: str) -> None:
    """Raise a UserError for a bad node at any depth, before anything is built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            resolve(value["_target_"], path)
            if not isinstance(value.get("_partial_", False), bool):
                raise UserError(f"{join(path, '_partial_')}={value['_partial_']}: expected true or false")
            for key in value:
                if is_reserved(key) and key not in RESERVED:
                    raise UserError(f"{join(path, key)}: not supported; arguments are given by name")
        for key, item in value.items():
            _validate_nodes(item, join(path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _validate_nodes(item, join(path, index))
    elif isinstance(value, str) and value == MISSING:
        raise UserError(f"{path}: needs a value: add {path}=…")


def _build(value: object, path: str) -> object:
    if isinstance(value, list):
        return [_build(item, join(path, index)) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _build(item, join(path, key)) for key, item in value.items() if key not in RESERVED}
    if "_target_" not in value:
        return arguments
    target = resolve(value["_target_"], path)
    arguments = _convert_integers(target, arguments)
    if value.get("_partial_", False):
        return partial(target, **arguments)
    with user_errors_at(path):
        return target(**arguments)


def _convert_integers(target: Callable[..., object], arguments: dict[str, object]) -> dict[str, object]:
    """Convert integers to floats where the annotation is float: in YAML, ``1`` is an integer."""
    try:
        known = keyword_parameters(target, arguments)
    except ValueError:
        return arguments  # calling the target raises a better message
    converted = dict(arguments)
    for key, value in arguments.items():
        types = union_members(known[key].annotation) if key in known else ()
        if type(value) is int and float in types and int not in types:
            converted[key] = float(value)
    return converted


def is_reserved(key: object) -> bool:
    """True if the key has the form ``_name_``."""
    return isinstance(key, str) and len(key) > 2 and key.startswith("_") and key.endswith("_")
