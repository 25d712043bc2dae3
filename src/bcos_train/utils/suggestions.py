"""The nearest right name for a wrong one."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = ["join_words", "nearest", "suggest"]

#: Below this a suggestion is more often odd than right.
_CUTOFF = 0.65


def nearest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` of ``allowed`` that resemble ``name``, the nearest first; equally near ones in their given order.

    Case and the signs ``-``, ``_``, space don't count. A name that begins like the given one (``resnet5`` and
    ``resnet50``) goes before one that is only spelled alike.
    """
    scored = [(_likeness(name, candidate), candidate) for candidate in dict.fromkeys(allowed)]
    close = sorted((pair for pair in scored if pair[0] >= _CUTOFF), key=lambda pair: -pair[0])
    return [candidate for _, candidate in close[:n]]


def suggest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean X?"`` with the nearest of ``allowed``, or ``""``: the end of an error message."""
    found = nearest(name, allowed, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def join_words(words: Iterable[str], last: str = "or", limit: int = 12) -> str:
    """``"a, b or c"``; of more than ``limit`` words the first ones and how many follow."""
    words = list(words)
    if len(words) > limit:
        return f"{', '.join(words[:limit])} and {len(words) - limit} more"
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _likeness(name: str, candidate: str) -> float:
    """From 0 (nothing in common) to 1 (spelled alike), plus 1 if one begins with the other."""
    a, b = _plain(name), _plain(candidate)
    ratio = SequenceMatcher(None, a, b, autojunk=False).ratio()
    if a and (sorted(a) == sorted(b) or a == _initials(candidate) or b == _initials(name)):
        # Swapped letters; lr for learning_rate.
        ratio = max(ratio, 0.95)
    short, long = sorted((a, b), key=len)
    begins = len(short) >= 2 and long.startswith(short) and (short == a or ratio >= _CUTOFF)
    return ratio + begins


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _initials(name: str) -> str:
    words = [word for word in re.split(r"[-_ ]", name.lower()) if word]
    return "".join(word[0] for word in words) if len(words) > 1 else ""
