"""The Model Zoo table as text."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bcos_train import create_model
from bcos_train.report.zoo_table import (
    BEGIN,
    END,
    N_VAL,
    Row,
    model_cost,
    published_row,
    readme_cells,
    select_rows,
    to_csv,
    to_json,
    to_markdown,
    train_command,
    update_readme,
)
from bcos_train.weights import RECORDS

README = Path(__file__).parents[2] / "README.md"
#: Quick to count the operations of.
SMALL = ["resnet18", "vgg11_bnu", "convnext_tiny", "simple_vit_ti_patch16_224", "standard_vitc_ti_patch1_14"]

MEASURED = replace(
    published_row("resnet18", 11_693_120, 1.9566),
    status="measured",
    weights="official",
    top1=68.5,
    top5=87.75,
    images=N_VAL,
    images_per_second=812.34,
    comparable=True,
    explanation={"explanation/grid_pointing_game": 0.8912},
)
ROWS = [
    MEASURED,
    replace(published_row("resnet34", 21_797_568, 3.8064), status="no weights", reason="weights: no file resnet34.pth"),
    replace(published_row("resnet50", 25_538_880, 4.3055), status="no data"),
]


def cells(text: str) -> dict[str, list[str]]:
    """The cells of each line of a Markdown table, by the first one."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip("`"): line for line in lines}


# ---- rows


def test_all_rows_without_a_pattern() -> None:
    assert select_rows([]) == list(RECORDS)
    assert len(select_rows([])) == 34


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["resnet50"], ["resnet50"]),
        (["resnet50*", "*121*"], ["resnet50", "densenet121", "densenet121_long", "resnet50_long"]),
        (["vitc_?_*", "vitc_ti_patch1_14"], [f"vitc_{s}_patch1_14" for s in ("ti", "s", "b", "l")]),
    ],
)
def test_patterns(patterns: list[str], names: list[str]) -> None:
    assert select_rows(patterns) == names


@pytest.mark.parametrize(("pattern", "nearest"), [("resnet5", "resnet50"), ("densnet121*", "densenet121")])
def test_pattern_that_matches_nothing(pattern: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="no row of the zoo matches") as caught:
        select_rows(["resnet18", pattern])
    assert str(caught.value) == f"--models {pattern}: no row of the zoo matches; did you mean {nearest}?"


def test_operations_of_a_network_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution has one multiplication and addition for each weight at each position."""

    class Net(nn.Sequential):
        in_chans = 6

    def tiny(name: str) -> nn.Module:
        return Net(nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    monkeypatch.setattr("bcos_train.report.zoo_table.create_model", tiny)
    params, gmacs = model_cost("any")
    assert params == 6 * 4 * 9 + 4 + 4 * 5 + 5
    assert gmacs == (6 * 4 * 9 * 112 * 112 + 4 * 5) / 1e9


def test_size_of_a_real_row() -> None:
    params, gmacs = model_cost("resnet18")
    model = create_model("resnet18")
    assert params == sum(parameter.numel() for parameter in model.parameters()) == RECORDS["resnet18"].params
    # torchvision lists 1.814 for its ResNet-18; here the stem sees six channels and the classifier 7 x 7 positions.
    expected = 1.814 + (3 * 64 * 49 * 112**2 + 48 * 512 * 1000) / 1e9
    assert gmacs == pytest.approx(expected, abs=2e-3)


def test_misprints_are_found_by_comparing() -> None:
    misprints = {name for name, row in RECORDS.items() if published_row(name, row.params, 0).is_count_misprinted}
    assert misprints == {"resnet50", "resnet50_long", "simple_vit_s_patch16_224", "vitc_b_patch1_14"}


@pytest.mark.parametrize(
    ("row", "difference"),
    [
        (MEASURED, -0.236),
        (replace(MEASURED, comparable=False), None),
        (published_row("resnet18", 1, 1.0), None),
    ],
    ids=["comparable", "not comparable", "not measured"],
)
def test_difference(row: Row, difference: float | None) -> None:
    assert row.difference("top1") == difference


# ---- texts


def test_markdown() -> None:
    text = to_markdown(ROWS)
    table = cells(text)
    assert table["resnet18"][1:7] == ["68.500", "68.736", "-0.236", "87.750", "87.430", "+0.320"]
    assert table["resnet18"][7:] == ["11,693,120", "1.96", "812.3", "0.8912"]
    assert table["model"][-1] == "explanation/grid_pointing_game"
    assert table["resnet34"][1:7] == ["no weights", "72.284", "–", "no weights", "90.052", "–"]
    assert table["resnet34"][7:] == ["21,797,568", "3.81", "–", "–"]
    assert table["resnet50"][1] == table["resnet50"][4] == "no data"
    assert table["resnet50"][7] == "25,538,880 (published: 25.52 M)"
    assert len({len(line) for line in table.values()}) == 1
    assert "* `resnet34`: no weights: weights: no file resnet34.pth" in text
    assert "* Measured on 50,000 images with weights: official (resnet18)." in text
    assert "of `resnet50` are misprints" in text
    assert "comparable" not in text


def test_what_is_not_comparable_is_marked() -> None:
    row = replace(MEASURED, comparable=False, images=200, weights="random (seed 0)")
    text = to_markdown([row])
    assert cells(text)["resnet18"][1:7] == [
        "68.500 (not comparable)",
        "68.736",
        "not comparable",
        "87.750 (not comparable)",
        "87.430",
        "not comparable",
    ]
    assert "* Measured on 200 images with weights: random (seed 0)." in text
    note = "* Not comparable: published accuracies are those of trained weights on all 50,000 validation images."
    assert note in text


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
    assert [row["name"] for row in rows] == ["resnet18", "resnet34", "resnet50"]
    assert float(rows[0]["top1_difference"]) == -0.236
    assert float(rows[0]["explanation/grid_pointing_game"]) == 0.8912
    assert rows[1]["top1"] == rows[1]["top1_difference"] == rows[1]["explanation/grid_pointing_game"] == ""
    assert [row["params_published_is_misprint"] for row in rows] == ["False", "False", "True"]
    assert rows[2]["command"] == "python train.py model=resnet50 dataset=imagenet"
    assert to_csv([]) == "\n"


def test_json() -> None:
    content = json.loads(to_json(ROWS, {"weights": "official"}))
    assert content["settings"] == {"weights": "official"}
    assert content["versions"]["torch"] == torch.__version__
    first = content["rows"][0]
    assert (first["top1"], first["images"], first["comparable"]) == (68.5, N_VAL, True)
    assert first["explanation"] == {"explanation/grid_pointing_game": 0.8912}
    assert content["rows"][1]["top1"] is None


# ---- README


def test_readme_keeps_what_is_around_the_table() -> None:
    text = f"before\n{BEGIN}\nan old table\n{END}\nafter\n"
    new = update_readme(text, ROWS)
    assert new.startswith(f"before\n{BEGIN}\n\n| model |")
    assert new.endswith(f"\n\n{END}\nafter\n")
    assert "an old table" not in new
    assert update_readme(new, ROWS) == new


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"], ids=range(4))
def test_readme_without_a_place(text: str) -> None:
    with pytest.raises(ValueError, match="has no place for the table"):
        update_readme(text, ROWS)


def test_readme_has_all_rows() -> None:
    """With everything that needs no count of operations; those are checked for a few rows below."""
    text = README.read_text(encoding="utf-8")
    table = cells(text[text.index(BEGIN) : text.index(END)])
    assert list(table)[2:] == list(RECORDS)
    for name, line in list(table.items())[2:]:
        expected = readme_cells(published_row(name, RECORDS[name].params, float(line[2])))
        assert line == expected, "run: python scripts/model_zoo.py --readme"


@pytest.mark.parametrize("name", SMALL)
def test_readme_is_current(name: str) -> None:
    line = f"| {' | '.join(readme_cells(published_row(name, *model_cost(name))))} |"
    assert line in README.read_text(encoding="utf-8")


@pytest.mark.slow
def test_whole_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert update_readme(text, [published_row(name, *model_cost(name)) for name in RECORDS]) == text


def test_command() -> None:
    assert train_command("resnet50_long") == ["train.py", "model=resnet50_long", "dataset=imagenet"]
