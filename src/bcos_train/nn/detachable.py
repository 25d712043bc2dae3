"""The explanation switch: which modules hold their input-dependent factors constant, for the calling context."""

from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor, nn

__all__ = ["DETACHED", "HOLD", "Detachable"]

#: The modules that the calling thread or task has in explanation mode; set by `explanation_mode`.
DETACHED: ContextVar[frozenset["Detachable"]] = ContextVar("DETACHED", default=frozenset())


#: What explanation mode does with an input-dependent factor; `explanation_graph` sets another function.
HOLD: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("HOLD", default=Tensor.detach)


class Detachable(nn.Module):
    """A module whose input-dependent factors can be held constant.

    In explanation mode the factors that depend on the input (the B-cos scale, the standard deviation of a norm, the
    gate of an activation) are constants to autograd. The gradient of an output is then the dynamic linear map W(x)
    itself, with ``output = W(x) x`` plus the biases of the norms (Böhle et al., 2022, arXiv 2205.10268, eq. 13).
    Outputs are the same in either mode. Each such factor passes through `hold`.

    `bcos_train.explanation.explanation_mode` switches a whole model for the calling thread or task alone;
    `set_explanation_mode` switches one module for all of them.
    """

    # Class attributes, so that this class can precede any torch module in a list of bases.
    #: True if `set_explanation_mode` has switched the module on, which holds for all threads and tasks.
    _detached_everywhere = False
    #: True while at least one thread or task has the module in `DETACHED`. While it is False, compiled code, which is
    #: guarded by this flag, does not read the context: reading it breaks the graph in older compilers.
    _detached_somewhere = False

    @property
    def detach(self) -> bool:
        """True if the module is in explanation mode, as seen from the calling thread or task."""
        return self._detached_everywhere or (self._detached_somewhere and self in DETACHED.get())

    is_in_explanation_mode = detach

    def hold(self, factor: Tensor) -> Tensor:
        """Return an input-dependent factor: unchanged, or in explanation mode as a constant to autograd."""
        return HOLD.get()(factor) if self.detach else factor

    def set_explanation_mode(self, activate: bool = True) -> None:
        """Switch explanation mode of this module on or off (not of its children)."""
        if activate:
            self.check_explanation_mode()
        self._detached_everywhere = activate

    def check_explanation_mode(self) -> None:
        """Raise a RuntimeError if the output would not be linear in the input in explanation mode."""

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica._detached_everywhere = self.detach  # replicas run in threads of their own
        return replica
