"""Explanation mode: the network frozen into the linear map that it applied to its input."""

from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from bcos_train.nn import BcosConv2d, BcosLinear

__all__ = ["evaluating", "explanation_mode", "is_explainable"]


def is_explainable(model: nn.Module) -> bool:
    """True if the model has B-cos layers, so that in explanation mode the gradient of a logit is W(x)."""
    return any(isinstance(module, (BcosConv2d, BcosLinear)) for module in model.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_active(module: Any) -> bool:
    """The state of one module; modules that keep none (a centered batch norm has nothing to detach) count as off."""
    return bool(getattr(module, "is_in_explanation_mode", getattr(module, "detach", False)))


class explanation_mode(ContextDecorator):
    """Within the block, gradients treat the dynamic weights of ``model`` as constants, so d logit / d x is W(x).

    Every module with a ``set_explanation_mode`` method takes part; they are looked up anew at each entry, so modules
    that were swapped in later are seen, and a model wrapped in DDP or compiled in place works as it is. On exit each
    module gets back the state it had on entry, also after an exception: blocks nest, and one instance can be entered
    again while it is active. Serves as a decorator too::

        with explanation_mode(model):
            ...

        @explanation_mode(model)
        def contributions(x): ...

    Args:
        model: any module; one without detachable parts is left as it is.

    Raises:
        whatever a module raises in ``set_explanation_mode(True)`` (a centered batch norm in training mode does); the
        modules that had been switched on before it are then restored.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._exits: list[ExitStack] = []

    def __enter__(self) -> nn.Module:
        found: list[tuple[Any, bool]] = [
            (module, _is_active(module))
            for module in self.model.modules()
            if callable(getattr(module, "set_explanation_mode", None))
        ]
        with ExitStack() as stack:
            # An ExitStack runs backwards; parents come first in `found` and are to be restored first, because a
            # parent may pass the call on to its children.
            for module, active in reversed(found):
                stack.callback(module.set_explanation_mode, active)
            for module, _ in found:
                module.set_explanation_mode(True)
            self._exits.append(stack.pop_all())
        return self.model

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exits.pop().close()
