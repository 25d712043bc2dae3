"""``hubconf.py`` as torch.hub uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weights.release import Release, as_file, publish, state_of

from bcos_train import list_models
from bcos_train.weights import RECORDS

ROOT = Path(__file__).parents[2]

#: What a user of torch.hub need not have.
OTHERS = """
bcos captum huggingface_hub hydra lightning matplotlib omegaconf pandas pydantic pytorch_lightning rich safetensors
scipy sklearn submitit timm torchmetrics tqdm wandb webdataset
"""

SCRIPT = f"""
import inspect, json, sys
sys.modules.update(dict.fromkeys({OTHERS.split()!r}))
import torch

def local(function, *args):
    if "source" in inspect.signature(function).parameters:
        return function(".", *args, source="local")
    # torch.hub.list and torch.hub.help take repositories alone; what they do with their files is this.
    torch.hub._get_cache_or_reload = lambda *args, **kwargs: "."
    return function("x/y", *args)

model = torch.hub.load(".", "resnet18", source="local", pretrained=False, progress=True, num_classes=7)
x = torch.rand(1, 6, 64, 64)
print(json.dumps({{
    "package": sys.modules["bcos_train"].__file__,
    "names": local(torch.hub.list),
    "help": local(torch.hub.help, "vitc_ti_patch1_14"),
    "classes": model(x).shape[1],
    "keys": list(model.eval().explain(x)),
}}))
"""


@pytest.fixture(scope="module")
def outcome() -> dict[str, object]:
    """Of the script above, run in the project's folder by a Python that knows neither the package nor the others."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    content: dict[str, object] = json.loads(result.stdout)
    return content


def test_lists_exactly_the_official_names(outcome: dict[str, object]) -> None:
    assert outcome["names"] == sorted(RECORDS) == sorted(list_models(pretrained=True))


def test_imports_the_package_beside_hubconf(outcome: dict[str, object]) -> None:
    assert outcome["package"] == str(ROOT / "src" / "bcos_train" / "__init__.py")


def test_help(outcome: dict[str, object]) -> None:
    text = str(outcome["help"])
    assert text.startswith("A B-cos network: vitc_ti_patch1_14.")
    assert "67.26 %" in text
    assert "5,318,712 parameters" in text
    assert "BCOS_WEIGHTS" in text


def test_model_works_without_the_other_packages(outcome: dict[str, object]) -> None:
    assert outcome["classes"] == 7
    assert "contribution_map" in outcome["keys"]  # type: ignore[operator]


def test_pretrained(release: Release, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    state = state_of("resnet18")
    row = publish(monkeypatch, "resnet18", as_file(state))
    release.files[row.file] = as_file(state)
    model = torch.hub.load(str(ROOT), "resnet18", source="local", pretrained=True, progress=False)
    assert capfd.readouterr().err == ""
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"num_clases": 3}, "resnet18 has no option 'num_clases'; did you mean num_classes?"),
        ("resnet18", {"weights": "w.pth"}, "weights=w.pth: no such file"),
    ],
)
def test_mistakes(name: str, options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=r"resnet18|weights") as caught:
        torch.hub.load(str(ROOT), name, source="local", **options)
    assert message in str(caught.value)
