"""Copy a state dict into a model, or read the number of classes off it."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bcos_train.utils.suggestions import join_words, suggest

__all__ = ["check_weights", "count_classes", "load_weights", "match_keys"]

#: What torch.compile, FSDP and activation checkpointing put into the names of modules.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTER = "num_batches_tracked"


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], label: str, *, new_classifier: bool = False
) -> list[str]:
    """Copy a state dict into a model.

    Args:
        model: Has the keys and shapes of ``state``.
        state: The weights; see :func:`match_keys` for how their keys may differ.
        label: What the error message calls the weights.
        new_classifier: Allow another number of classes. Tensors of the classifier whose shape depends on it then keep
            their values.

    Returns:
        The keys that were not loaded.

    Raises:
        ValueError: Keys or shapes differ, the message names the first of each kind; or no weight is finite.

    Warns:
        UserWarning: Some of the values are NaN or infinite.
    """
    state = match_keys(model.state_dict(), state, label)
    skipped = check_weights(model, state, label, new_classifier=new_classifier)
    loaded = {key: value for key, value in state.items() if key not in skipped}
    _check_finite(loaded, [name for name, _ in model.named_parameters()], label)
    model.load_state_dict(loaded, strict=not skipped)
    return skipped


def check_weights(
    model: nn.Module, state: Mapping[str, Tensor], label: str, *, new_classifier: bool = False
) -> list[str]:
    """Raise a ``ValueError`` unless keys and shapes are the model's, and return the keys that are not to be loaded."""
    expected = model.state_dict()
    class_keys = _keys_of_other_classes(model, expected, state)
    skipped = class_keys if new_classifier else []
    problems = []
    if missing := [key for key in expected if key not in state]:
        problems.append(f"{_listed(missing, len(expected), 'the model')} missing")
    if unknown := [key for key in state if key not in expected]:
        problems.append(f"{_listed(unknown, len(state), 'the file')} unknown{suggest(unknown[0], expected)}")
    reshaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if reshaped := [key for key in reshaped if key not in skipped]:
        key = reshaped[0]
        others = len(set(reshaped).difference([key], class_keys))
        problems.append(
            f"{key} has the shape {tuple(state[key].shape)}, the model {tuple(expected[key].shape)}"
            + (": another number of classes" if key in class_keys else "")
            + (f"; {others} more of the model's {len(expected)} shapes differ" if others else "")
        )
    if problems:
        raise ValueError(f"{label} doesn't fit the model: {'; '.join(problems)}")
    return skipped


def _listed(keys: Sequence[str], total: int, whose: str) -> str:
    """Return the subject of a sentence and its verb: the key, or how many there are and the first ones."""
    if len(keys) == 1:
        return f"{keys[0]} is"
    return f"{len(keys)} of {whose}'s {total} tensors ({join_words(keys, 'and', 3)}) are"


def _check_finite(state: Mapping[str, Tensor], parameters: Iterable[str], label: str) -> None:
    """Warn of values that are NaN or infinite; a ValueError if no parameter holds anything else."""
    values = {key: value for key, value in state.items() if value.is_floating_point() and not value.is_meta}
    # Types of 8 bits have no isfinite.
    finite = {key: (value.float() if value.itemsize == 1 else value).isfinite() for key, value in values.items()}
    bad = [key for key, is_finite in finite.items() if not is_finite.all()]
    if not bad:
        return
    if not any(finite[key].any() for key in parameters if key in finite):
        raise ValueError(f"{label} holds no finite weight, only NaN and infinity: its training diverged")
    warnings.warn(f"{label}: {_listed(bad, len(values), 'the file')} not finite (NaN or infinity)", stacklevel=3)


def match_keys(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """Rename the keys of a state dict that was saved inside a wrapper, such as ``module.`` or ``net.``.

    The prefix is the one under which most of the model's keys are found. What stands elsewhere, such as a loss or a
    counter of updates, is left out. A missing ``num_batches_tracked`` is 0, as in PyTorch.

    Args:
        expected: The model's state dict.
        state: The weights.
        label: What the error message calls the weights.

    Raises:
        ValueError: No key is the model's, or several prefixes have all of them.
    """
    if expected.keys() == state.keys():
        return dict(state)
    state = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    required = [key for key in expected if not key.endswith(_COUNTER)]
    prefixes = _prefixes(state, frozenset(required))
    if not prefixes:
        shown = [join_words(keys, "and", limit=3) for keys in (state, expected)]
        raise ValueError(
            f"{label} doesn't fit the model: none of its keys, {shown[0]}, is one of the model's, {shown[1]}; it must "
            "hold the state_dict() of this model, with any prefix"
        )
    prefix, n = prefixes.most_common(1)[0]
    if n == len(required) and len(full := [name for name in prefixes if prefixes[name] == n]) > 1:
        names = join_words((f"{name}*" for name in full), "and")
        raise ValueError(f"{label} holds this model more than once, as {names}: save the state_dict() of one alone")
    matched = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    counters = {key: value for key, value in expected.items() if key.endswith(_COUNTER) and key not in matched}
    return matched | {key: torch.zeros_like(value, device="cpu") for key, value in counters.items()}


def _prefixes(keys: Iterable[str], expected: frozenset[str]) -> Counter[str]:
    """Count for each prefix, "" or with a dot at the end, the expected keys that are found under it."""
    counts: Counter[str] = Counter()
    for key in keys:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts if key[start:] in expected)
    return counts


def count_classes(model: nn.Module, state: Mapping[str, Tensor], label: str) -> int:
    """Read the number of classes off a state dict's classifier, which has several rows per class under MaxOut.

    Args:
        model: Built as for these weights, with any number of classes.
        state: The weights.
        label: What the error message calls the weights.

    Raises:
        ValueError: As for :func:`match_keys`.
    """
    expected, num_classes = model.state_dict(), int(model.num_classes)  # type: ignore[arg-type]
    state = match_keys(expected, state, label)
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
