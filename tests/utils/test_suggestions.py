import pytest

from bcos_train.utils.suggestions import join_words, nearest, suggest

MODELS = ["resnet18", "resnet50", "resnet152", "densenet121", "vitc_l_patch1_14"]


@pytest.mark.parametrize(
    ("given", "allowed", "right"),
    [
        ("resnet5", MODELS, "resnet50"),
        ("resnet500", MODELS, "resnet50"),
        ("ResNet-18", MODELS, "resnet18"),
        ("resnet15", MODELS, "resnet152"),
        ("vitc_l", MODELS, "vitc_l_patch1_14"),
        ("densnet121", MODELS, "densenet121"),
        ("dept", ["width", "depth"], "depth"),
        ("modle", ["mode", "model", "module"], "model"),
        ("batchsize", ["batch", "batch_size"], "batch_size"),
        ("BATCH_SIZE", ["size", "batch_size"], "batch_size"),
        ("learning_rate", ["rate", "lr"], "lr"),
        ("wd", ["width", "weight_decay"], "weight_decay"),
        ("adam", ["AdamW", "Adam"], "Adam"),
        ("epochs", ["warmup_epochs", "max_epochs"], "max_epochs"),
        ("16-mixed", ["32", "16", "bf16"], "16"),
        ("bf16-mixed", ["32", "16", "bf16"], "bf16"),
        ("fp16", ["32", "bf16", "16"], "16"),
        ("adam_w", ["Adam", "AdamW"], "AdamW"),
    ],
)
def test_nearest(given: str, allowed: list[str], right: str) -> None:
    assert nearest(given, allowed, n=1) == [right]
    assert suggest(given, allowed) == f"; did you mean {right}?"


@pytest.mark.parametrize("given", ["", "q", "xyzzy", "r", "152"])
def test_nothing_near(given: str) -> None:
    assert nearest(given, MODELS) == []
    assert suggest(given, MODELS) == ""


def test_order_and_number() -> None:
    assert nearest("resnet5", ["resnet56", "resnet50", "resnet50", "resnet20"]) == ["resnet56", "resnet50", "resnet20"]
    assert len(nearest("resnet", MODELS, n=2)) == 2
    assert nearest("depth", iter(["depth"])) == ["depth"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a or b"),
        (["a", "b", "c"], "a, b or c"),
        (iter("abcd"), "a, b, c and 1 more"),
    ],
)
def test_join_words(words: list[str], text: str) -> None:
    assert join_words(words, limit=3) == text
