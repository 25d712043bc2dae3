"""Any optimizer of timm by name."""

from collections.abc import Iterable
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor
from torch.optim import Optimizer

from bcos_train.utils.suggestions import suggest


def timm_optimizer(
    params: Iterable[Tensor],
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    options: dict[str, float | int | bool | str | list[float] | None] | None = None,
) -> Optimizer:
    """Build one of timm's optimizers (``timm.optim.list_optimizers()``).

    Args:
        params: Parameters to optimize.
        name: timm's name, such as ``"lamb"``, ``"lion"`` or ``"muon"``.
        lr: Learning rate.
        weight_decay: Weight decay of all parameters alike, as with torch's optimizers here.
        momentum: For the optimizers that have one.
        options: Further keywords of that optimizer, such as ``{betas: [0.9, 0.99]}``.

    Raises:
        ValueError: Unknown name or option.
    """
    known = [str(known_name) for known_name in list_optimizers()]
    if name not in known:
        raise ValueError(f"optimizer.name={name}: timm has no such optimizer{suggest(name, known)}")
    keywords: dict[str, Any] = dict(options or {})
    try:
        return create_optimizer_v2(
            list(params), opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum, **keywords
        )
    except TypeError as error:
        raise ValueError(f"optimizer.options={keywords}: not taken by timm's {name} ({error})") from error
