"""Explanation mode: gradients are those of the dynamic linear map W(x)."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bcos_train.nn import Detachable, live_weights
from bcos_train.nn.detachable import DETACHED, HOLD

__all__ = ["evaluating", "explanation_graph", "explanation_mode", "is_explainable", "mode_to_resume"]


def is_explainable(model: nn.Module) -> bool:
    """True if the model has B-cos layers, so that in explanation mode the gradient of a logit is W(x).

    These are the layers of this package, of the official one, and any other module with an exponent ``b`` and a
    ``set_explanation_mode`` method.
    """
    return any(hasattr(m, "b") and callable(getattr(m, "set_explanation_mode", None)) for m in model.modules())


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


class explanation_mode(ContextDecorator):
    """Within the block, gradients treat the dynamic weights of ``model`` as constants, so d logit / d x is W(x).

    The mode belongs to the calling thread or asyncio task: what others compute with the same model is not affected.
    Blocks nest, one instance can be entered again while it is active, and it also works as a decorator::

        with explanation_mode(model):
            ...

        @explanation_mode(model)
        def contributions(x): ...

    Modules are collected at each entry, so modules that were swapped in later take part, and a model wrapped in DDP or
    compiled in place works too. Third-party modules with a ``set_explanation_mode`` method, such as those of the
    official code, are switched through it; they store the mode themselves, so it is on for all threads until the last
    block ends, and then what it was before.

    Args:
        model: Any module; one without detachable parts is left unchanged.

    Raises:
        RuntimeError: A centered batch norm would use batch statistics (:class:`bcos_train.nn.BatchNorm2d`).
        Exception: Whatever a third-party module raises in ``set_explanation_mode(True)``; the mode is then off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        modules = [m for m in self.model.modules() if callable(getattr(m, "set_explanation_mode", None))]
        ours = [module for module in modules if _is_context_local(module)]
        third_party = [cast(_Switchable, module) for module in modules if not _is_context_local(module)]
        for module in ours:
            module.check_explanation_mode()
        with ExitStack() as stack:
            if third_party:
                stack.enter_context(_switched_on(third_party, ours))
            stack.enter_context(_detached(DETACHED.get().union(ours), Tensor.detach))
            _BLOCKS.set((*_BLOCKS.get(), (self, stack.pop_all())))
        return self.model

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        blocks = _BLOCKS.get()
        index = max((i for i, (mode, _) in enumerate(blocks) if mode is self), default=None)
        if index is None:
            raise RuntimeError("explanation_mode was left in another thread or task than it was entered in")
        _BLOCKS.set(blocks[:index] + blocks[index + 1 :])
        blocks[index][1].__exit__(exc_type, exc, traceback)


@contextmanager
def explanation_graph(model: nn.Module) -> Iterator["ExplanationGradient"]:
    """Within the block, the graph of an ordinary forward pass also serves W(x), and a loss on it.

    In explanation mode the dynamic scales are detached when they are computed, so that the gradient of a loss on W(x)
    would lack their part: W(x) is made of them. Here they keep their history, and their gradient is only withheld while
    W(x) is computed::

        with explanation_graph(model) as gradient:
            logits = model(x)
        weights = gradient(logits[:, k].sum(), x)  # W(x), (N, C, H, W)
        (loss(logits) + loss_on_explanations(weights)).backward()

    Other gradients of the logits are the ordinary ones. The forward pass is an ordinary one, too: running statistics
    are updated in training mode, and it counts as the one of DDP. All layers compute their definitions, and modules
    compiled in place run uncompiled, since compiled code has no second derivatives.

    Yields:
        A function for W(x), which also works after the block.

    Raises:
        ValueError: A module of another package has an explanation mode of its own, which detaches scales; or the model
            is an `nn.DataParallel`.
    """
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, nn.DataParallel):
            raise ValueError("explanations can't be trained through DataParallel; use one process per GPU")
        if callable(getattr(module, "set_explanation_mode", None)) and not _is_context_local(module):
            raise ValueError(
                f"{type(module).__module__}.{type(module).__name__} has its own explanation mode, which may detach its "
                "scales; the gradient of a loss on its explanations would be wrong. Use the layers of bcos_train.nn"
            )
    gradient = ExplanationGradient()
    ours = DETACHED.get().union(filter(_is_context_local, modules))
    with _detached(ours, gradient.hold), _twice_differentiable(modules):
        yield gradient


class ExplanationGradient:
    """Gradient with respect to inputs or features, in which the dynamic scales are constants.

    Attributes:
        is_running: True while the gradient is computed; the scales withhold theirs then.
    """

    # The scales ask this object, and no global: backward passes of CUDA tensors run in other threads.
    is_running = False

    def hold(self, factor: Tensor) -> Tensor:
        """Return the factor with its history; it withholds its gradient from it while this gradient is computed."""
        return _Withheld.apply(factor, self)

    def __call__(self, output: Tensor, at: Tensor) -> Tensor:
        """Return d output / d at, in the shape of ``at`` and with a graph for further derivatives.

        Args:
            output: Scalar, computed within the block.
            at: Requires a gradient.
        """
        self.is_running = True
        try:
            (gradient,) = torch.autograd.grad(output, at, create_graph=True)
        finally:
            self.is_running = False
        return gradient


class _Withheld(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, gradient: ExplanationGradient) -> Tensor:
        ctx.gradient = gradient
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.gradient.is_running else grad, None


@contextmanager
def _twice_differentiable(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Choose implementations that have second derivatives: no fused attention, no compiled code, no cached weights."""
    is_compiled = any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in modules)
    with ExitStack() as stack:
        if is_compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(live_weights())
        yield


def mode_to_resume() -> Callable[[], AbstractContextManager[None]]:
    """Return a function for blocks with the mode that the caller is in now, to recompute a part of a forward pass."""
    return partial(_resumed, DETACHED.get(), HOLD.get())


@contextmanager
def _resumed(detached: frozenset[Detachable], hold: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with _detached(detached, hold), nullcontext() if hold is Tensor.detach else _twice_differentiable(()):
        yield


#: The active blocks of the calling thread or task, innermost last.
_BLOCKS: ContextVar[tuple[tuple[explanation_mode, ExitStack], ...]] = ContextVar("_BLOCKS", default=())


_LOCK = threading.Lock()
_USERS: Counter[Detachable] = Counter()  # number of blocks, in all threads, in which a module is detached


@contextmanager
def _detached(modules: frozenset[Detachable], hold: Callable[[Tensor], Tensor]) -> Iterator[None]:
    _count_users(modules, 1)
    tokens = DETACHED.set(modules), HOLD.set(hold)
    try:
        yield
    finally:
        _count_users(modules, -1)
        DETACHED.reset(tokens[0])
        HOLD.reset(tokens[1])


def _count_users(modules: frozenset[Detachable], change: int) -> None:
    with _LOCK:
        for module in modules:
            _USERS[module] += change
            if _USERS[module]:
                module._detached_somewhere = True
            else:
                del _USERS[module], module._detached_somewhere


class _Switchable(Protocol):
    """A third-party module that stores its own explanation mode."""

    def set_explanation_mode(self, activate: bool = True) -> None: ...


def _is_context_local(module: nn.Module) -> TypeGuard[Detachable]:
    """True for modules of this package, and for subclasses that don't replace the switch."""
    return isinstance(module, Detachable) and type(module).set_explanation_mode is Detachable.set_explanation_mode


def _is_active(module: _Switchable) -> bool:
    """State of one module; modules that keep none (a centered batch norm has nothing to detach) count as off."""
    return bool(getattr(module, "is_in_explanation_mode", getattr(module, "detach", False)))


_SWITCHED: dict[_Switchable, tuple[int, bool]] = {}  # number of active blocks in all threads, and the state before them


@contextmanager
def _switched_on(modules: Sequence[_Switchable], own: Iterable[Detachable]) -> Iterator[None]:
    with _LOCK:
        first = [module for module in modules if module not in _SWITCHED]
        before = [(module, _is_active(module)) for module in first]
        try:
            _switch([(module, True) for module in first], own)
        except BaseException:
            _switch(before, own)
            raise
        _SWITCHED.update({module: (0, state) for module, state in before})
        for module in modules:
            count, state = _SWITCHED[module]
            _SWITCHED[module] = count + 1, state
    try:
        yield
    finally:
        with _LOCK:
            last = []
            for module in modules:
                count, state = _SWITCHED.pop(module)
                if count > 1:
                    _SWITCHED[module] = count - 1, state
                else:
                    last.append((module, state))
            _switch(last, own)


def _switch(states: Iterable[tuple[_Switchable, bool]], own: Iterable[Detachable]) -> None:
    """Switch third-party modules, parents first; a parent may pass the call on to its children, also to ours."""
    flags = [(module, module._detached_everywhere) for module in own]
    try:
        for module, state in states:
            module.set_explanation_mode(state)
    finally:
        for child, flag in flags:
            if child._detached_everywhere != flag:
                child._detached_everywhere = flag
