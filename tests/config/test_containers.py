from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from bcos_train.config import UserError, load, save, to_container

VALUES: dict[str, Any] = {
    "small": 1e-05,
    "third": 1 / 3,
    "huge": 1e300,
    "infinite": float("inf"),
    "looks like a number": "1e-3",
    "looks like true": "yes",
    "null as text": "null",
    "none": None,
    "empty": {"list": [], "dict": {}, "text": ""},
    "nested": [[1, [2.0, True]], {"a": "b: c # d"}],
    "sign": "±½ “B-cos”",
    "lines": "a\nb\n",
}


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    save(VALUES, tmp_path / "config.yaml")
    loaded = load(tmp_path / "config.yaml")
    assert loaded == VALUES
    assert [type(value) for value in loaded.values()] == [type(value) for value in VALUES.values()]
    assert list(loaded) == list(VALUES)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_save_resolves(tmp_path: Path) -> None:
    save(OmegaConf.create({"a": 1, "b": "${a}", "hydra": {"x": 1}}), tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == {"a": 1, "b": 1}


def test_numbers_written_by_hand(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1e-3\nb: 3\nc: on\n")
    assert load(tmp_path / "c.yaml") == {"a": 0.001, "b": 3, "c": True}


def test_load_runs_and_resolves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: ${oc.env:HOME}\n")
    assert load(tmp_path / "c.yaml") == {"a": "${oc.env:HOME}"}


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "python object": ("a: !!python/object/apply:os.system ['touch mark']", "not a config (could not determine"),
        "list": ("- 1", "not a config (a mapping is expected)"),
        "no yaml": ("a: [1", "not a config (while parsing"),
    }.values(),
)
def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load("c.yaml")
    assert str(caught.value).startswith(f"c.yaml: {message}")
    assert not Path("mark").exists()


def test_no_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file or directory"):
        load("nowhere.yaml")


def test_to_container_copies_plain_mappings() -> None:
    config = {"a": "${b}", "hydra": 1}
    assert to_container(config) == config
