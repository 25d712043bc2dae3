"""Types of values that JSON and YAML files hold."""

from collections.abc import Mapping, Sequence

__all__ = ["JSONValue"]

#: Anything that ``json.dumps`` accepts without a custom encoder. The containers are covariant, so that a ``dict[str,
#: int]`` is one too; narrow with isinstance before use.
JSONValue = str | int | float | bool | None | Mapping[str, "JSONValue"] | Sequence["JSONValue"]
