"""What a callable takes and gives, read from its signature."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

__all__ = ["has_open_end", "parameters", "returned"]


def parameters(target: Callable[..., Any], node: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    """The parameters that can be given by name, their annotations evaluated (``Any`` where that is impossible).

    A callable whose keywords depend on the value of one of them carries a function
    ``config_signature(node) -> inspect.Signature``, which is asked instead.

    Raises:
        ValueError: From ``config_signature``, when the node names something that doesn't exist.
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


def returned(target: Callable[..., Any]) -> Any:
    """A class itself, or what a function is annotated to return; ``Any`` if it doesn't say."""
    return target if inspect.isclass(target) else _hints(target).get("return", Any)


def has_open_end(target: Callable[..., Any]) -> bool:
    """Whether a misspelt keyword would be swallowed: ``**kwargs`` without a ``config_signature``.

    A class without an ``__init__`` of its own, whose base is of another package, is not to blame for the base's.
    """
    kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
    maker = target.__init__ if inspect.isclass(target) else target
    is_ours = maker.__module__.partition(".")[0] == target.__module__.partition(".")[0]
    return inspect.Parameter.VAR_KEYWORD in kinds and is_ours and not hasattr(target, "config_signature")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        # A name that is imported for type checkers only: the parameters that use it stay unchecked.
        return {}


def _evaluated(annotation: Any, hint: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    return hint if isinstance(annotation, str) else annotation
