"""The explanation switch of a single module."""

from torch import nn

__all__ = ["Detachable"]


class Detachable(nn.Module):
    """A module whose input-dependent factors can be held constant.

    In explanation mode the factors that depend on the input (the B-cos scale, the standard deviation of a norm, the
    gate of an activation) are constants to autograd. The gradient of an output is then the dynamic linear map W(x)
    itself, with ``output = W(x) x`` plus the biases of the norms (Böhle et al., 2022, arXiv 2205.10268, eq. 13).
    Outputs are the same in either mode. `bcos_train.explanation.explanation_mode` switches a whole model.
    """

    detach: bool = False  # a class attribute, so that this class can precede any torch module in a list of bases

    def set_explanation_mode(self, activate: bool = True) -> None:
        """Switch explanation mode of this module on or off (not of its children)."""
        self.detach = activate

    @property
    def is_in_explanation_mode(self) -> bool:
        return self.detach
