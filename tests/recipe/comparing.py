"""Compare a composed config with one of the official experiments, value by value."""

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from bcos.modules.losses import BinaryCrossEntropyLoss, UniformOffLabelsBCEWithLogitsLoss
from bcos.optim import LRSchedulerFactory
from torch import nn

from bcos_train.config import instantiate
from bcos_train.loss import BinaryCrossEntropy, CrossEntropy, UniformOffLabelBinaryCrossEntropy

Config = dict[str, Any]

LOSSES: dict[type, tuple[type, Callable[[Any], Any]]] = {
    BinaryCrossEntropyLoss: (BinaryCrossEntropy, lambda loss: (loss.smoothing, loss.target_threshold)),
    UniformOffLabelsBCEWithLogitsLoss: (UniformOffLabelBinaryCrossEntropy, lambda loss: loss.off_label),
    nn.CrossEntropyLoss: (
        CrossEntropy,
        lambda loss: getattr(loss, "label_smoothing", getattr(loss, "smoothing", None)),
    ),
}

#: Optimizer steps of an epoch of ImageNet in batches of 1024.
STEPS_PER_EPOCH = 1_281_167 // 1024


def assert_same_recipe(ours: Config, official: Config, gpus: int) -> None:
    """All but the model and the transforms."""
    assert ours["trainer"]["max_epochs"] == official["trainer"]["max_epochs"]
    accumulate = official["trainer"].get("accumulate_grad_batches", 1)
    assert ours["batch_size"] == official["data"]["batch_size"] * accumulate * gpus
    assert set(official["trainer"]) <= {"max_epochs", "accumulate_grad_batches", "gradient_clip_val"}
    assert ours["seed"] == official.get("seed", 42)
    assert_same_optimizer(ours, official)
    assert_same_rates(ours, official)
    assert_same_losses(ours, official)
    assert_same_clipping(ours, official)
    if "ema" in official:
        assert ours["ema"]["decay"] == official["ema"]["decay"]
        assert ours["ema"]["every_n_steps"] == official["ema"]["steps"]
    else:
        assert ours["ema"] is None
    augmentation, data = ours["augmentation"], official["data"]
    assert augmentation["mixup_alpha"] == data.get("mixup_alpha", 0.0)
    assert augmentation["cutmix_alpha"] == data.get("cutmix_alpha", 0.0)
    # The official key is None for no repetition.
    repetitions = data.get("ra_repetitions")
    assert augmentation["repetitions"] == (1 if repetitions is None else repetitions)
    # What is in the official config and not compared would be missed.
    assert set(data) <= {
        *("train_transform", "test_transform", "batch_size", "num_workers", "num_classes"),
        *("mixup_alpha", "cutmix_alpha", "ra_repetitions"),
    }
    assert set(official) <= {
        *("data", "model", "criterion", "test_criterion", "optimizer", "lr_scheduler", "trainer", "ema", "use_agc"),
        "seed",
    }


def assert_same_losses(ours: Config, official: Config) -> None:
    for key, official_key in (("loss", "criterion"), ("eval_loss", "test_criterion")):
        loss, expected = instantiate(ours[key]), official[official_key]
        kind, options = LOSSES[type(expected)]
        assert type(loss) is kind
        assert options(loss) == options(expected)
        assert expected.reduction == "mean"


def assert_same_clipping(ours: Config, official: Config) -> None:
    clipping = (ours["trainer"]["gradient_clip_val"], ours["trainer"]["gradient_clip_algorithm"])
    expected = official["trainer"].get("gradient_clip_val")
    if official.get("use_agc", False):
        # The default of bcos.training.agc.adaptive_clip_grad_, which is called without options.
        assert clipping == (0.01, "agc")
        assert expected is None
    elif expected is None:
        assert clipping[0] is None
    else:
        # Lightning clips the norm where nothing else is said.
        assert clipping == (expected, "norm")


def assert_same_optimizer(ours: Config, official: Config) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    made = instantiate(ours["optimizer"])(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        expected = official["optimizer"].create(model)
    assert type(made) is type(expected)
    # One group: weights of norms decay like all others.
    assert len(made.param_groups) == len(expected.param_groups) == 1
    assert made.param_groups[0] == expected.param_groups[0]


def assert_same_rates(ours: Config, official: Config) -> None:
    """The rate of every epoch or step, and which of the two it is."""
    schedule, factory = instantiate(ours["schedule"]), official["lr_scheduler"]
    assert schedule.interval == factory.interval
    assert schedule.epochs == official["trainer"]["max_epochs"]
    lr = ours["optimizer"]["lr"]
    if schedule.interval == "epoch":
        rates = [schedule.lr(7 * epoch, 7, lr) for epoch in range(schedule.epochs)]
    else:
        rates = [schedule.lr(step, STEPS_PER_EPOCH, lr) for step in range(schedule.epochs * STEPS_PER_EPOCH)]
    expected = official_rates(tuple(sorted(vars(factory).items())), lr, schedule.epochs)
    torch.testing.assert_close(
        torch.tensor(rates, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


@cache
def official_rates(options: tuple[tuple[str, Any], ...], lr: float, epochs: int) -> list[float]:
    """The rates that a scheduler of the official factory with these options gives, one after another."""
    factory = LRSchedulerFactory(**dict(options))
    n_rates = epochs if factory.interval == "epoch" else epochs * STEPS_PER_EPOCH
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    optimizer.step()
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        made = factory.create(optimizer, total_steps=epochs * STEPS_PER_EPOCH)
        scheduler = made["scheduler"] if isinstance(made, dict) else made
        for _ in range(n_rates):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return rates


def assert_same_imagenet_transforms(ours: Config, official: Config) -> None:
    for key, official_key in (("train", "train_transform"), ("eval", "test_transform")):
        options = dict(official["data"][official_key].args)
        is_bcos = options.pop("is_bcos")
        assert is_bcos == official["model"]["is_bcos"]
        assert ours["encoding"] == {"_target_": f"bcos_train.dataset.{'BcosEncoding' if is_bcos else 'Standardize'}"}
        options["interpolation"] = options["interpolation"].value
        if "auto_augment_policy" in options:
            options["policy"] = options.pop("auto_augment_policy")
        assert ours["augmentation"][key] == {"_target_": f"bcos_train.augmentation.imagenet_{key}", **options}


# Models, by what they are made of.

#: Attributes that tell two modules of one class apart.
TELLING = ("eps", "momentum", "num_groups", "b", "max_out", "logit_bias", "logit_temperature", "p", "mode")
#: Official names of classes that have another here.
RENAMED = {"CNBlock": "ConvNeXtBlock"}
#: Containers, which may be cut otherwise, and modules that compute nothing or have no options.
STRUCTURE = {
    *("Sequential", "BcosSequential", "Identity", "AdaptiveAvgPool2d", "AvgPool2d", "Softmax", "Rearrange", "Patches"),
    *("PosEmbSinCos2d", "PositionalEmbedding", "SimpleViT", "Transformer", "Encoder", "Attention", "FeedForward"),
}


def parts(model: nn.Module) -> Counter[str]:
    """Class, options and shapes of the parameters of each layer, norm, activation and dropout, and how many there are.

    Stochastic depth and dropout with probability 0 don't count.
    """
    found: Counter[str] = Counter()
    for module in model.modules():
        kind = RENAMED.get(type(module).__name__, type(module).__name__)
        if kind in STRUCTURE or getattr(module, "p", None) == 0:
            continue
        shapes = {key: None if value is None else tuple(value.shape) for key, value in module._parameters.items()}
        options = {key: round_off(getattr(module, key)) for key in TELLING if hasattr(module, key)}
        if shapes or options:
            found[f"{kind} {options} {shapes}"] += 1
    return found


def round_off(value: Any) -> Any:
    """To nine digits, so that numbers computed in another order are equal."""
    return float(f"{value:.9g}") if isinstance(value, int | float) else value


def assert_same_imagenet_model(ours: Config, official: Config, get_official: Callable[[Config], nn.Module]) -> None:
    """Every layer of the model that is trained, and the logit bias of the paper."""
    # A copy: the official function writes into it.
    settings = {**official["model"], "args": dict(official["model"]["args"])}
    num_classes = settings["args"]["num_classes"]
    assert num_classes == official["data"]["num_classes"] == 1000
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        expected = parts(get_official(settings))
        model = instantiate(ours["model"])(num_classes=num_classes)
    assert parts(model) == expected
    biases = [module.logit_bias for module in model.modules() if hasattr(module, "logit_bias")]
    assert biases == ([pytest.approx(-math.log(999), rel=1e-12)] if settings["is_bcos"] else [])
