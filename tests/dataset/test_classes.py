"""Classes of a data set and of a trained model."""

from typing import Any

import pytest
from PIL import Image

from bcos_train.config.composition import parse_override
from bcos_train.dataset.classes import OtherClasses, with_model_classes

MODEL = ("cat", "cow", "dog")


class Toy:
    """A data set with one image per class."""

    name = "toy"
    cache = None

    def __init__(self, *names: str, class_map: Any = None) -> None:
        self.class_names = list(names)
        self.class_map = class_map

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare(self) -> None: ...

    def train(self) -> Any:
        return [(Image.new("RGB", (1, 1)), label) for label in range(self.num_classes)]

    val = train


def test_same_or_unknown_classes_leave_the_data_set_unchanged() -> None:
    for names in (MODEL, None):
        toy = Toy(*MODEL)
        assert with_model_classes(toy, names, "m") is toy
    assert with_model_classes(other := Toy("a", "b"), None, "m") is other


BY_NAME = "dataset.class_map={} maps classes of the same name"
RENAME = "rename the folders, or map each class to one of the model, as in"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "cows", "dog"), f"class 1 is 'cows' in the data set, 'cow' in the model; {RENAME} '…{{cows: cow}}'"),
        (("cow", "cat", "dog"), f"class 0 is 'cow' in the data set, 'cat' in the model; {BY_NAME}"),
        (("cat", "cow"), f"the data set has no class 2, 'dog' in the model (2 classes, the model has 3); {BY_NAME}"),
        (
            (*MODEL, "emu"),
            "class 3 of the data set, 'emu', is unknown to the model (4 classes, the model has 3); "
            f"{RENAME} '…{{emu: cat}}'",
        ),
    ],
)
def test_other_classes_are_an_error(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(OtherClasses) as caught:
        with_model_classes(Toy(*names), MODEL, "runs/x")
    expected = message.replace("…{", "dataset.class_map={")
    assert str(caught.value) == f"dataset: the classes are not those of runs/x: {expected}"


@pytest.mark.parametrize(
    ("names", "class_map", "labels"),
    [
        (("cow", "cat", "dog"), {}, [1, 0, 2]),
        (("dog",), {}, [2]),
        (("cat", "cows", "siamese"), {"cows": "cow", "siamese": 0}, [0, 1, 0]),
        (("0", "1"), {0: "dog", 1: 1}, [2, 1]),  # YAML reads such names as numbers
    ],
)
def test_mapped_labels(names: tuple[str, ...], class_map: Any, labels: list[int]) -> None:
    mapped = with_model_classes(Toy(*names, class_map=class_map), MODEL, "m")
    assert (mapped.class_names, mapped.num_classes, mapped.name) == (list(MODEL), 3, "toy")
    for part in (mapped.train(), mapped.val()):
        assert [part[i][1] for i in range(len(part))] == labels  # type: ignore[arg-type]


def test_a_number_that_is_a_name() -> None:
    mapped = with_model_classes(Toy("ten", "last", class_map={"ten": 10, "last": 3}), ("0", "1", "10", "2"), "m")
    assert [mapped.val()[i][1] for i in range(2)] == [2, 3]


def test_names_that_occur_twice() -> None:
    model = ("crane", "dog", "crane")
    mapped = with_model_classes(Toy(*model, class_map={}), model, "m")
    assert [mapped.val()[i][1] for i in range(3)] == [0, 1, 2]
    assert with_model_classes(Toy("a", class_map={"a": 2}), model, "m").val()[0][1] == 2
    with pytest.raises(ValueError, match="m has 2 classes of this name: give the index"):
        with_model_classes(Toy("a", class_map={"a": "crane"}), model, "m")


def test_wnids() -> None:
    with pytest.raises(OtherClasses, match="for ImageNet's folders, use dataset=imagenet"):
        with_model_classes(Toy("n01440764"), ("tench",), "m")


def test_the_example_in_the_message_is_read_by_hydra() -> None:
    with pytest.raises(OtherClasses) as caught:
        with_model_classes(Toy("a (b), c: d"), ("a [b]",), "m")
    example = str(caught.value).split("'")[-2]
    assert parse_override(example).value() == {"a (b), c: d": "a [b]"}


@pytest.mark.parametrize(
    ("class_map", "model", "message"),
    [
        ({"cows": "cwo"}, MODEL, "dataset.class_map.cows=cwo: m has no such class; did you mean cow?"),
        ({"cows": 3}, MODEL, "dataset.class_map.cows=3: m has no such class from 0 to 2"),
        ({}, MODEL, "dataset.class_map.cows=cows: m has no such class; did you mean cow?"),
        ({"cosw": "cow"}, MODEL, "dataset.class_map.cosw: the data set has no such class; did you mean cows?"),
        ({"cows": "cow"}, None, "dataset.class_map: the class names of m are unknown"),
    ],
)
def test_mistakes_in_the_map(class_map: Any, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"class_map") as caught:
        with_model_classes(Toy("cat", "cows", class_map=class_map), model, "m")
    assert str(caught.value).startswith(message)
