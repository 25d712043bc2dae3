"""Evaluate a network: ``python evaluate.py run=<run folder>`` or ``model=… dataset=… weights=official|<path>``."""

from bcos_train.commands import evaluate

if __name__ == "__main__":
    evaluate()
