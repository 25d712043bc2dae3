"""Config group ``explanation``: choices, command-line keys, and error messages."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from bcos_train.config import UserError, check, instantiate, to_container
from bcos_train.config.composition import Composer
from bcos_train.evaluation import ExplanationOptions
from bcos_train.evaluation.options import BOX_METRICS, METRICS, MethodName
from bcos_train.evaluation.scoring import HIGHER_IS_BETTER, SCORERS
from bcos_train.explanation.method import METHODS
from bcos_train.training.config import EvaluateConfig

from .toys import make_options

CONFIGS = Path(__file__).parents[2] / "configs"


def compose(*overrides: str) -> dict[str, Any]:
    forced = [f"++{text}" if text.startswith("explanation.") else text for text in overrides]
    return to_container(Composer(CONFIGS).compose("evaluate", forced))


def build(*overrides: str) -> ExplanationOptions:
    config = compose(*overrides)
    assert check(config, root=EvaluateConfig) == []
    return instantiate(config["explanation"], path="explanation")


def test_names_are_those_of_the_methods_and_metrics() -> None:
    assert list(get_args(MethodName)) == list(METHODS)
    assert set(METRICS) == {*SCORERS, "grid_pointing", "alignment"} == set(HIGHER_IS_BETTER)


@pytest.mark.parametrize(
    ("dataset", "n", "smooth", "block"), [("digits", 3, 1, 4), ("cifar10", 3, 1, 4), ("imagenet", 2, 15, 16)]
)
def test_data_sets_set_what_depends_on_the_image_size(
    dataset: str, n: int, smooth: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", "x")
    monkeypatch.setenv("IMAGENET_PATH", "x")
    for choice, n_grids in (("default", 50), ("full", 250)):
        options = build(f"dataset={dataset}", f"explanation={choice}")
        grids = options.grid_pointing
        assert (grids.n, grids.n_grids, grids.smooth, options.perturbation.block) == (n, n_grids, smooth, block)


def test_choices() -> None:
    assert build("explanation=default").metrics == ["grid_pointing", "completeness", "alignment"]
    assert set(build("explanation=full").metrics) == set(METRICS) - set(BOX_METRICS)
    none = build("explanation=none")
    assert (none.methods, none.metrics, none.gallery_images) == ([], [], 0)


def test_keys_on_the_command_line() -> None:
    options = build(
        "explanation.methods=[bcos,int_grad]",
        "explanation.metrics=[grid_pointing]",
        "explanation.method_options.int_grad.n_steps=7",
        "explanation.grid_pointing.n=2",
        "explanation.grid_pointing.n_grids=9",
        "explanation.grid_pointing.smooth=15",
        "explanation.grid_pointing.threshold=0",
        "explanation.grid_pointing.rescale=true",
    )
    grids = options.grid_pointing
    assert (grids.n, grids.n_grids, grids.smooth, grids.threshold, grids.rescale) == (2, 9, 15, 0, True)
    methods = options.make_methods()
    assert list(methods) == ["bcos", "int_grad"]
    assert vars(methods["int_grad"])["n_steps"] == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explanation.methods=[bcos,int_gradd]", "explanation.methods.1=int_gradd: .*did you mean int_grad\\?"),
        ("explanation.metrics=[grid_poining]", "explanation.metrics.0=grid_poining: .*did you mean grid_pointing\\?"),
        ("explanation.grid_pointing.smoth=1", "explanation.grid_pointing.smoth=1: .*did you mean smooth\\?"),
        ("explanation.grid_pointing.n=two", "explanation.grid_pointing.n=two: expected a whole number"),
        ("explanation.n_image=3", "explanation.n_image=3: .*did you mean n_images\\?"),
    ],
)
def test_wrong_names_are_reported_before_anything_is_built(override: str, message: str) -> None:
    (problem,) = check(compose(override), root=EvaluateConfig)
    assert re.search(message, str(problem))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explanation.grid_pointing.smooth=2", "smooth=2: an odd number"),
        ("explanation.grid_pointing.n=0", "grid_pointing.n=0: at least 1"),
        ("explanation.grid_pointing.threshold=2", "threshold=2.*between 0 and 1"),
        ("explanation.n_images=0", "n_images=0: at least 1"),
        ("explanation.method_options.int_grad.n_step=3", "method_options.int_grad: .*did you mean n_steps"),
        ("explanation.method_options.intgrad.n_steps=3", "method_options.intgrad: .*did you mean int_grad"),
    ],
)
def test_values_out_of_range(override: str, message: str) -> None:
    config = compose(override)
    with pytest.raises(UserError, match=message):
        instantiate(config["explanation"], path="explanation")


def test_window_and_smaller_cells_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="rescale=true or stride=…, not both"):
        make_options(grid={"rescale": True, "stride": 4})


@pytest.mark.parametrize(("key", "name"), [("methods", "bco"), ("metrics", "sparsty")])
def test_names_in_python(key: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"explanation.{key}: '{name}'; did you mean"):
        make_options(**{key: [name]})


def test_metrics_of_no_method() -> None:
    with pytest.raises(ValueError, match=r"explanation.metrics: grid_pointing of no method; set explanation.methods="):
        make_options(methods=[], metrics=["alignment", "grid_pointing"])
    assert make_options(methods=[], metrics=["alignment"]).make_methods() == {}
