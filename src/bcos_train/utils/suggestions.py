"""Suggest the nearest valid name for a wrong one."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["join_words", "nearest", "suggest"]

#: Minimum similarity; below it, suggestions are more often wrong than right.
_CUTOFF = 0.65


def nearest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``allowed`` that resemble ``name``, nearest first; ties in their original order.

    Case, ``-``, ``_`` and spaces are ignored. Names that begin or end with each other (``resnet5`` and ``resnet50``,
    ``epochs`` and ``max_epochs``) come before names that are only spelled alike.
    """
    scored = [(_similarity(name, candidate), candidate) for candidate in dict.fromkeys(allowed)]
    close = sorted((pair for pair in scored if pair[0] >= _CUTOFF), key=lambda pair: -pair[0])
    return [candidate for _, candidate in close[:n]]


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return the end of an error message: ``"; did you mean X?"`` with the nearest of ``allowed``, or ``""``."""
    names = nearest(name, allowed, n=1)
    return f"; did you mean {names[0]}?" if names else ""


def join_words(words: Iterable[str], last: str = "or", limit: int = 12) -> str:
    """Return ``"a, b or c"``; if there are more than ``limit`` words, the first ones and the number of the others."""
    words = list(words)
    if len(words) > limit:
        return f"{', '.join(words[:limit])} and {len(words) - limit} more"
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _similarity(name: str, candidate: str) -> float:
    """Return a value from 0 (nothing in common) to 1 (equal spelling), plus 1 if one begins or ends with the other."""
    a, b = _normalize(name), _normalize(candidate)
    ratio = SequenceMatcher(None, a, b, autojunk=False).ratio()
    is_alike = ratio >= _CUTOFF
    if a and (sorted(a) == sorted(b) or a == _initials(candidate) or b == _initials(name)):
        # Swapped letters, or an abbreviation: lr for learning_rate.
        ratio = max(ratio, 0.95)
    if _starts_with_words(name, candidate):
        ratio = max(ratio, 0.9)  # less than a misprint of a longer name: bnu-liner
    short, long = sorted((a, b), key=len)
    is_prefix = long.startswith(short) and (short == a or is_alike)
    is_suffix = long.endswith(short) and is_alike
    return ratio + (len(short) >= 2 and (is_prefix or is_suffix))


def _starts_with_words(name: str, candidate: str) -> bool:
    """True if ``candidate`` makes up the first words of ``name``: ``16`` those of ``16-mixed``."""
    return re.match(rf"{re.escape(candidate)}[-_ ]", name, re.IGNORECASE) is not None


def _normalize(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _initials(name: str) -> str:
    words = [word for word in re.split(r"[-_ ]", name.lower()) if word]
    return "".join(word[0] for word in words) if len(words) > 1 else ""
