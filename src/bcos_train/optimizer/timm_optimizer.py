"""timm's optimizers by name."""

from collections.abc import Callable, Iterable

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
        weight_decay: Weight decay, applied to all parameters, as with torch's optimizers.
        momentum: Momentum, for optimizers that use it.
        options: Further arguments of that optimizer, such as ``{betas: [0.9, 0.99]}``.

    Raises:
        ValueError: Unknown name or option.
    """
    names = [str(entry) for entry in list_optimizers()]
    if name not in names:
        raise ValueError(f"optimizer.name={name}: timm has no such optimizer{suggest(name, names)}")
    # timm annotates its own arguments only, not those of the optimizers.
    create: Callable[..., Optimizer] = create_optimizer_v2
    try:
        return create(list(params), opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum, **(options or {}))
    except TypeError as error:
        raise ValueError(f"optimizer.options={options}: not supported by timm's {name} ({error})") from error
