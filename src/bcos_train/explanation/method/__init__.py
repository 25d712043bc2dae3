"""Explanation methods by name: ``make_method("rise", n_masks=1000)(model, x, targets) -> (N, T, H, W)``."""

import inspect
from collections.abc import Callable
from functools import partial

from bcos_train.explanation.method.attention_rollout import AttentionRollout
from bcos_train.explanation.method.averaged import IntegratedGradients, SmoothGrad
from bcos_train.explanation.method.backward_rules import DeepLift, GuidedBackprop
from bcos_train.explanation.method.base import CannotExplain, Method
from bcos_train.explanation.method.grad_cam import GradCam
from bcos_train.explanation.method.lime import Lime
from bcos_train.explanation.method.linear import Bcos, Gradient, InputXGradient
from bcos_train.explanation.method.occlusion import Occlusion
from bcos_train.explanation.method.rise import Rise
from bcos_train.utils.suggestions import join_words, suggest

__all__ = [
    "METHODS",
    "AttentionRollout",
    "Bcos",
    "CannotExplain",
    "DeepLift",
    "GradCam",
    "Gradient",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Lime",
    "Method",
    "Occlusion",
    "Rise",
    "SmoothGrad",
    "list_methods",
    "make_method",
]

#: The defaults of methods that the official evaluation has are its settings.
METHODS: dict[str, Callable[..., Method]] = {
    "bcos": Bcos,
    "bcos_relative": partial(Bcos, relative=True),
    "ixg": InputXGradient,
    "gradient": Gradient,
    "int_grad": IntegratedGradients,
    "guided_backprop": GuidedBackprop,
    "deep_lift": DeepLift,
    "grad_cam": GradCam,
    "smooth_grad": SmoothGrad,
    "lime": Lime,
    "rise": Rise,
    "occlusion5": partial(Occlusion, kernel=5, stride=2),
    "occlusion9": partial(Occlusion, kernel=9, stride=2),
    "occlusion13": partial(Occlusion, kernel=13, stride=4),
    "attention_rollout": AttentionRollout,
}


def list_methods() -> list[str]:
    """List the names of all explanation methods."""
    return list(METHODS)


def make_method(name: str, **options: object) -> Method:
    """Create an explanation method by name, with the options of its class.

    Raises:
        ValueError: Unknown method or option (the message names the nearest one), or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(
            f"unknown explanation method {name!r}{suggest(name, METHODS)}; allowed are "
            f"{join_words(METHODS, 'and', len(METHODS))}"
        )
    factory = METHODS[name]
    allowed = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in allowed:
            listed = f"allowed are {join_words(allowed, 'and')}" if allowed else "it has none"
            raise ValueError(
                f"explanation method {name!r} has no option {option!r}{suggest(option, allowed)}; {listed}"
            )
    return factory(**options)
