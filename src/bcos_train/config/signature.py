"""Read parameters and return types of callables from their signatures."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

__all__ = ["keyword_parameters", "return_type"]


def keyword_parameters(target: Callable[..., object], node: Mapping[str, object]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be passed by name, annotations evaluated (``Any`` where that is impossible).

    A callable whose keywords depend on the value of one of them has an attribute
    ``config_signature(node) -> inspect.Signature``, which is called instead.

    Raises:
        ValueError: From ``config_signature``, if the node names something that does not exist.
    """
    hook = getattr(target, "config_signature", None)
    signature = inspect.signature(target) if hook is None else hook(node)
    hints = _hints(target)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.replace(annotation=_evaluated(parameter.annotation, hints.get(name, Any)))
        for name, parameter in signature.parameters.items()
        if parameter.kind in by_name
    }


def return_type(target: Callable[..., object]) -> object:
    """Return a class itself, or the return annotation of a function (``Any`` if there is none)."""
    return target if inspect.isclass(target) else _hints(target).get("return", Any)


def _hints(target: Callable[..., object]) -> dict[str, object]:
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        # A name imported only for type checkers: the parameters that use it are not validated.
        return {}


def _evaluated(annotation: object, hint: object) -> object:
    if annotation is inspect.Parameter.empty:
        return Any
    return hint if isinstance(annotation, str) else annotation
