"""Train a network: ``python train.py model=resnet50 dataset=imagenet``; ``--help`` lists the groups and keys."""

from bcos_train.commands import train

if __name__ == "__main__":
    train()
