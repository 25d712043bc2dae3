"""Evaluate a network: ``python evaluate.py run=<run folder>`` or ``model=… dataset=… weights=official|<path>``."""

from typing import Any

from bcos_train.config.door import door, given_keys
from bcos_train.run import EvaluateConfig, evaluate


@door(config_name="evaluate", root=EvaluateConfig)
def main(config: dict[str, Any]) -> int:
    return evaluate(config, given_keys())


if __name__ == "__main__":
    main()
