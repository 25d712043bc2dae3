"""Read the overrides of a command line and report mistakes before Hydra does.

Keys and values are not validated here: overrides of keys that the config does not contain are passed on to
:func:`bcos_train.config.check`, which compares them with the signature. So a parameter can be set whether or not a YAML
file lists it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from bcos_train.config.composition import Composer, Override, OverrideError, OverrideType, parse_override
from bcos_train.config.containers import join
from bcos_train.config.plugins import KEY as PLUGINS
from bcos_train.config.validation import Problem
from bcos_train.utils.suggestions import join_words, nearest, suggest

__all__ = ["check_choices", "check_values", "plugins_in_overrides", "read_overrides"]


#: Names in other programs that resemble none of ours: the first key that a config has is suggested.
_SYNONYMS = {
    **dict.fromkeys(("arch", "architecture", "backbone", "net", "network"), ("model",)),
    **dict.fromkeys(("gpus", "gpu", "num_gpus", "n_gpus", "ngpus", "nproc_per_node"), ("trainer.devices",)),
    **dict.fromkeys(("nodes", "nnodes"), ("trainer.num_nodes",)),
    **dict.fromkeys(("amp", "fp16", "bf16"), ("trainer.precision",)),
    **dict.fromkeys(("grad_clip", "clip_grad"), ("trainer.gradient_clip_val",)),
    **dict.fromkeys(("pretrained",), ("weights", "model.pretrained")),
}
#: Values that switch something off.
_OFF = ("null", "none", "false", "no", "off")


def read_overrides(
    overrides: Iterable[str], composer: Composer, top_level: Iterable[str], config: Callable[[], Mapping[str, object]]
) -> tuple[dict[str, str], list[Problem]]:
    """Return each override in Hydra's form for a key that may be new (``++key=value``), and all problems.

    Args:
        overrides: As typed: ``key=value``, ``group=choice``, ``+…``, ``++…``, ``~…``.
        composer: Lists the config groups.
        top_level: The top-level keys of the config.
        config: Composes the config without overrides, interpolations unresolved; called only to look up where an
            unknown key belongs.
    """
    rewritten: dict[str, str] = {}
    problems: list[Problem] = []
    for text in overrides:
        problem = _check_form(text, composer, top_level)
        if problem is None:
            try:
                override = composer.parse(text)
            except OverrideError as error:
                problem = _unreadable(text, error)
            else:
                problem = _check_key(override.key_or_group, composer, top_level, config)
                rewritten[text] = _as_force_add(text, override, composer)
        if problem is not None:
            problems.append(problem)
    return rewritten, problems


def check_choices(
    overrides: Iterable[str], composer: Composer, config: Callable[[], Mapping[str, object]]
) -> list[Problem]:
    """Return problems: choices that their group does not have, and several choices of a group that takes one.

    Args:
        overrides: In any form that the composer parses.
        composer: Lists the config groups.
        config: Composes the config without overrides; called only if a group has several choices.
    """
    problems = []
    for text in overrides:
        override = composer.parse(text)
        group = override.key_or_group
        if override.is_sweep_override() or group not in composer.groups or override.is_delete():
            continue
        value = override.value()
        choices = [
            "null" if choice is None else str(choice) for choice in (value if isinstance(value, list) else [value])
        ]
        wrong = [
            _no_choice(group, choice, composer)
            for choice in choices
            if choice.removesuffix(".yaml") not in composer.choices(group)
        ]
        if len(choices) > 1 and not wrong and not _is_mergeable(group, config()):
            hint = f"takes one choice; -m {group}={','.join(choices)} starts a run with each"
            problems.append(Problem(group, hint, f"[{','.join(choices)}]"))
        problems += wrong
    return problems


def check_values(
    overrides: Sequence[str],
    composer: Composer,
    config: Callable[[], Mapping[str, object]],
    is_valid: Callable[[list[str], str], bool],
) -> list[Problem]:
    """Return a problem for each key that has several values (``key=a,b``), for jobs outside a sweep.

    Args:
        overrides: All overrides of the job.
        composer: Lists the config groups.
        config: Composes the config without overrides.
        is_valid: Takes overrides without several values, and a key: True if its value is valid.
    """
    swept = [text for text in overrides if composer.parse(text).is_sweep_override()]
    others = [text for text in overrides if text not in swept]
    problems = []
    for text in swept:
        prefix, _, values = text.partition("=")
        key = prefix.lstrip("+")
        hint = "several values; add -m for a run with each"
        quoted = values.replace("'", r"\'")
        if key in composer.groups:
            hint += f", or write {key}=[{values}] for all" if _is_mergeable(key, config()) else ""
        elif is_valid([*others, f"{prefix}=[{values}]"], key):
            hint += f", or write {key}=[{values}] for a list"
        elif is_valid([*others, f"{prefix}='{quoted}'"], key):
            hint += f", or quote a value that contains a comma twice: '{key}=\"{values}\"'"
        problems.append(Problem(key, hint, values))
    return problems


def plugins_in_overrides(overrides: Iterable[str]) -> list[str]:
    """Return the plugins named on a command line, without those of a sweep over plugins, which its jobs load."""
    names: list[str] = []
    for text in overrides:
        if text.lstrip("+").partition("=")[0] != PLUGINS:
            continue
        try:
            override = parse_override(text)
        except OverrideError:
            continue  # read_overrides reports it
        value = None if override.is_sweep_override() else override.value()
        names += [str(name) for name in (value if isinstance(value, list) else [])]
    return names


def _is_mergeable(group: str, config: Mapping[str, object]) -> bool:
    """True if choices can be combined, as in ``logger=[tensorboard,wandb]``; False if each describes one object."""
    node = config.get(group)
    return not (isinstance(node, Mapping) and "_target_" in node)


def _no_choice(group: str, choice: str, composer: Composer) -> Problem:
    choices = composer.choices(group)
    off = next((name for name in choices if name in _OFF and choice.lower() in _OFF), None)
    hint = f"; did you mean {off}?" if off else suggest(choice, choices)
    listed = join_words(choices, "and", limit=12 if hint else 40)
    return Problem(group, f"no such choice{hint} (choices: {listed})", choice)


def _check_form(text: str, composer: Composer, top_level: Iterable[str]) -> Problem | None:
    """Return a problem if ``text`` is a bare word instead of ``key=value`` or ``~key``, or has no key."""
    if re.match(r"[+~]*(=|$)", text):
        return Problem(text, "settings have the form key=value, and this has no key")
    if "=" in text or text.startswith("~"):
        return None
    if text in composer.groups:
        return Problem(text, f"no value given; choices: {text}={join_words(composer.choices(text), limit=40)}")
    if text.partition(".")[0] in top_level:
        return Problem(text, f"no value given; write {text}=…")
    by_choice: dict[str, list[str]] = {}
    for group in composer.groups:
        if not group.startswith("hydra"):
            for choice in composer.choices(group):
                by_choice.setdefault(choice, []).append(f"{group}={choice}")
    near = nearest(text, by_choice, n=1)
    hint = f"; did you mean {join_words(by_choice[near[0]])}?" if near else ""
    return Problem(text, f"settings have the form key=value{hint}")


def _unreadable(text: str, error: Exception) -> Problem:
    """Return the problem of an override that Hydra can't parse, without Hydra's grammar symbols."""
    raised = next((line for line in str(error).splitlines() if "while evaluating" in line), None)
    key, _, value = text.partition("=")
    quoted = f"can't be read; a value with special characters takes quotes within quotes: '{key}=\"{value}\"'"
    return Problem(text, quoted if raised is None else raised.partition("while evaluating ")[2])


def _check_key(
    key: str, composer: Composer, top_level: Iterable[str], config: Callable[[], Mapping[str, object]]
) -> Problem | None:
    """Return a problem if ``key`` begins with neither a config group nor a top-level key."""
    first = key.partition(".")[0]
    if key in composer.groups or first in ("hydra", *top_level):
        return None
    if "/" in key:
        return Problem(key, f"unknown config group{suggest(key, composer.groups)}")
    names = [*top_level, *(group for group in composer.groups if not group.startswith("hydra"))]
    values = _paths(config())
    # The last part is often right and only its prefix missing: lr for optimizer.lr.
    deeper = [path for path in values if path.endswith(f".{key}")]
    synonyms = [path for path in _SYNONYMS.get(key, ()) if path.partition(".")[0] in top_level]
    near = deeper or synonyms[:1] or _nearest_paths(first, names, () if "." in key else values)
    sources = list(dict.fromkeys(_source(path, values) for path in near))[:3]
    hint = f"; did you mean {join_words(sources)}?" if sources else "; --help lists them"
    return Problem(key if deeper else first, f"unknown key or config group{hint}")


def _nearest_paths(name: str, top_level: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the nearest of the top-level names, or the paths whose last part is nearer."""
    by_last = {path: [path] for path in top_level}
    top_level = set(by_last)
    for path in paths:
        if (last := path.rpartition(".")[2]) not in top_level:
            by_last.setdefault(last, []).append(path)
    return [path for last in nearest(name, by_last, n=1) for path in by_last[last]]


def _source(path: str, values: Mapping[str, object]) -> str:
    """Return the key from which a key is derived by default, or the key itself if it isn't derived."""
    interpolation = re.fullmatch(r"\$\{([\w.]+)\}", str(values.get(path)))
    return _source(interpolation[1], values) if interpolation and interpolation[1] in values else path


def _paths(config: Mapping[str, object], path: str = "") -> dict[str, object]:
    """Return the values of all keys at any depth, by key."""
    paths: dict[str, object] = {}
    for key, value in config.items():
        paths[join(path, key)] = value
        if isinstance(value, Mapping):
            paths |= _paths(value, join(path, key))
    return paths


def _as_force_add(text: str, override: Override, composer: Composer) -> str:
    key = override.key_or_group
    is_config_key = key not in composer.groups and "/" not in key and not key.startswith("hydra.")
    if is_config_key and override.type in (OverrideType.CHANGE, OverrideType.ADD):
        return f"++{text.removeprefix('+')}"
    return text
