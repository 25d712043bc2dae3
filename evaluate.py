"""Evaluate a network: ``python evaluate.py run=<run folder>`` or ``model=… dataset=… weights=official|<path>``."""

import os
import signal

if __name__ == "__main__":  # until the command handles Ctrl-C itself: imports take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from bcos_train.commands import evaluate

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    evaluate()
