"""Copy a state dict into a model, or read the number of classes off it."""

from collections.abc import Mapping

from torch import Tensor, nn

from bcos_train.utils.suggestions import suggest

__all__ = ["count_classes", "load_weights"]


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], label: str, *, new_classifier: bool = False
) -> list[str]:
    """Copy a state dict into a model.

    Args:
        model: Has the keys and shapes of ``state``.
        state: The weights.
        label: What the error message calls the weights.
        new_classifier: Allow another number of classes. Tensors of the classifier whose shape depends on it then keep
            their values.

    Returns:
        The keys that were not loaded.

    Raises:
        ValueError: Keys or shapes differ; the message names the first of each kind.
    """
    expected = model.state_dict()
    class_keys = _keys_of_other_classes(model, expected, state)
    skipped = class_keys if new_classifier else []
    problems = [f"{key} is missing" for key in expected if key not in state][:1]
    problems += [f"{key} is unknown{suggest(key, expected)}" for key in state if key not in expected][:1]
    problems += [
        f"{key} has the shape {tuple(state[key].shape)}, the model {tuple(expected[key].shape)}"
        + (": another number of classes" if key in class_keys else "")
        for key in expected
        if key in state and key not in skipped and state[key].shape != expected[key].shape
    ][:1]
    if problems:
        raise ValueError(f"{label} doesn't fit the model: {'; '.join(problems)}")
    model.load_state_dict({key: state[key] for key in expected if key not in skipped}, strict=not skipped)
    return skipped


def count_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Read the number of classes off a state dict's classifier, which has several rows per class under MaxOut.

    Args:
        model: Built as for these weights, with any number of classes.
        state: The weights.
    """
    expected, num_classes = model.state_dict(), int(model.num_classes)  # type: ignore[arg-type]
    for key in _keys_of_other_classes(model, expected, state):
        n, rest = divmod(len(state[key]) * num_classes, len(expected[key]))
        if n and not rest:
            return n
    return num_classes


def _keys_of_other_classes(model: nn.Module, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return the classifier keys whose tensors differ from ``state`` only in the length of their first axis."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if get_classifier else None
    prefix = next((f"{name}." for name, module in model.named_modules() if module is classifier), None)
    return [
        key
        for key in expected
        if prefix is not None
        and key.startswith(prefix)
        and key in state
        and expected[key].shape != state[key].shape
        and expected[key].ndim == state[key].ndim
        and expected[key].shape[1:] == state[key].shape[1:]
    ]
