"""Train a network: ``python train.py model=resnet50 dataset=imagenet``; ``--help`` lists the groups and keys."""

from typing import Any

from bcos_train.config.door import door
from bcos_train.run import TrainConfig, train


@door(config_name="train", root=TrainConfig)
def main(config: dict[str, Any]) -> int:
    return train(config)


if __name__ == "__main__":
    main()
