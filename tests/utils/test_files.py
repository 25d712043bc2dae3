"""Result files: complete or missing, and valid JSON for all numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bcos_train.utils.files import write_json


def strictly(text: str) -> Any:
    """Read as any other program would: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_round_trip(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, "three", None, True], "b": {"c": 1e-300, "d": []}}
    write_json(tmp_path / "a.json", content)
    assert strictly((tmp_path / "a.json").read_text()) == content
    write_json(tmp_path / "a.json", [content])
    assert strictly((tmp_path / "a.json").read_text()) == [content]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"nan": math.nan, "deep": [{"inf": (math.inf, 1.0)}], "text": "nan"})
    expected = {"nan": None, "deep": [{"inf": [None, 1.0]}], "text": "nan"}
    assert strictly((tmp_path / "a.json").read_text()) == expected


def test_a_failure_leaves_the_file_unchanged(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"n": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
