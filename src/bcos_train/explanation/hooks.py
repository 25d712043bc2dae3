"""Forward hooks for the length of a block, in the calling thread alone."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

__all__ = ["forward_hooks"]


@contextmanager
def forward_hooks(
    modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], object]
) -> Iterator[None]:
    """Call ``hook(module, args, kwargs, output)`` after each forward pass of ``modules`` within the block.

    As ``register_forward_hook``, a result other than None replaces the output. Calls from other threads, which may use
    the same model, are not seen.
    """
    thread = threading.get_ident()

    def call_in_this_thread(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> object:
        return hook(module, args, kwargs, output) if threading.get_ident() == thread else None

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(call_in_this_thread, with_kwargs=True).remove)
        yield
