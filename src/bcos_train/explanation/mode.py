"""Explanation mode: gradients are those of the dynamic linear map W(x)."""

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from types import TracebackType

from torch import nn

from bcos_train.nn import BcosConv2d, BcosLinear

__all__ = ["evaluating", "explanation_mode", "is_explainable"]


def is_explainable(model: nn.Module) -> bool:
    """True if the model has B-cos layers, so that in explanation mode the gradient of a logit is W(x)."""
    return any(isinstance(module, (BcosConv2d, BcosLinear)) for module in model.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode within the block, and restore each module's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_active(module: nn.Module) -> bool:
    """True if a module is in explanation mode; modules without a state (centered batch norms) count as off."""
    return bool(getattr(module, "is_in_explanation_mode", getattr(module, "detach", False)))


class explanation_mode(ContextDecorator):
    """Treat the dynamic weights of ``model`` as constants in gradients within the block, so d logit / d x is W(x).

    Every module with a ``set_explanation_mode`` method takes part. Modules are looked up at each entry, so later
    replacements are included, and models wrapped in DDP or compiled in place need no unwrapping. On exit, also after an
    exception, each module's previous state is restored: blocks can be nested, and one instance can be entered again
    while it is active. Also usable as a decorator::

        with explanation_mode(model):
            ...

        @explanation_mode(model)
        def contributions(x): ...

    Args:
        model: Any module; modules without detachable parts are unchanged.

    Raises:
        Exception: As raised by a module's ``set_explanation_mode(True)``, such as that of a centered batch norm in
            training mode; modules that were already switched on are then restored.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._exits: list[ExitStack] = []

    def __enter__(self) -> nn.Module:
        switches: list[tuple[Callable[[bool], object], bool]] = [
            (switch, _is_active(module))
            for module in self.model.modules()
            if callable(switch := getattr(module, "set_explanation_mode", None))
        ]
        with ExitStack() as stack:
            # A parent may forward the call to its children, so parents, which come first in `switches`, must be
            # restored first. An ExitStack runs in reverse order.
            for switch, was_active in reversed(switches):
                stack.callback(switch, was_active)
            for switch, _ in switches:
                switch(True)
            self._exits.append(stack.pop_all())
        return self.model

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exits.pop().close()
