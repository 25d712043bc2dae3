"""Build what a config describes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bcos_train.config.errors import UserError, blame
from bcos_train.config.plain import join, to_plain
from bcos_train.config.signature import parameters
from bcos_train.config.targets import resolve
from bcos_train.config.values import members

__all__ = ["MISSING", "RESERVED", "instantiate", "is_reserved"]

#: Keys of a node that are no arguments.
RESERVED = ("_target_", "_partial_")
#: A value that is still to be given.
MISSING = "???"


def instantiate(node: Mapping[str, Any], *, path: str = "") -> Any:
    """Call what ``_target_`` names with the other keys of the node as keyword arguments, the inner nodes first.

    With ``_partial_: true`` the result is a ``functools.partial`` that waits for the rest. Mappings and lists without
    ``_target_`` are copied, with the nodes in them built.

    Args:
        node: Plain containers, or a ``DictConfig``, whose interpolations are then resolved.
        path: Config key of the node, for messages.

    Raises:
        UserError: A ``_target_`` outside :data:`bcos_train.config.TARGETS` anywhere in the node (nothing has been
            built then), a reserved key that isn't supported, or a ``ValueError`` or missing file while building,
            with the key of the node before its message.
    """
    plain = to_plain(node, path)
    _refuse(plain, path)
    return _build(plain, path)


def _refuse(value: Any, path: str) -> None:
    """Find a bad node deep inside before anything that stands before it has been built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            resolve(value["_target_"], path)
            if not isinstance(value.get("_partial_", False), bool):
                raise UserError(f"{join(path, '_partial_')}={value['_partial_']}: expected true or false")
            for key in value:
                if is_reserved(key) and key not in RESERVED:
                    raise UserError(f"{join(path, key)}: not supported; arguments are given by name")
        for key, item in value.items():
            _refuse(item, join(path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse(item, join(path, index))
    elif isinstance(value, str) and value == MISSING:
        raise UserError(f"{path}: needs a value: add {path}=…")


def _build(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_build(item, join(path, index)) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _build(item, join(path, key)) for key, item in value.items() if key not in RESERVED}
    if "_target_" not in value:
        return arguments
    target = resolve(value["_target_"], path)
    arguments = _as_annotated(target, arguments)
    if value.get("_partial_", False):
        return partial(target, **arguments)
    with blame(path):
        return target(**arguments)


def _as_annotated(target: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers as floats where the target's annotation asks for them: YAML's ``1`` is no ``1.0``."""
    try:
        known = parameters(target, arguments)
    except ValueError:
        return arguments  # the target itself says it better
    converted = dict(arguments)
    for key, value in arguments.items():
        kinds = members(known[key].annotation) if key in known else ()
        if type(value) is int and float in kinds and int not in kinds:
            converted[key] = float(value)
    return converted


def is_reserved(key: object) -> bool:
    """Whether the key has the form ``_name_``."""
    return isinstance(key, str) and len(key) > 2 and key.startswith("_") and key.endswith("_")
