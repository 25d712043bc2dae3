"""Train a network: ``python train.py model=resnet50 dataset=imagenet``; ``--help`` lists the groups and keys."""

import os
import signal

if __name__ == "__main__":  # until the command handles Ctrl-C itself: imports take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from bcos_train.commands import train

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train()
