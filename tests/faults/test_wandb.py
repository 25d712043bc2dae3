"""W&B's process may die during a training."""

import signal

from .campaign import Campaign, Machine, assert_equal_weights
from .trials import STEP, Fault


def test_a_killed_wandb_process_ends_no_training(machine: Machine, campaign: Campaign) -> None:
    whole, result = machine.finished
    steps = [moment for moment in result.moments if moment.startswith(STEP)]
    for n in (2, len(steps) - 1):
        with campaign.trial(f"before step {n}"):
            run = machine.new("logger=wandb", "logger.wandb.mode=offline")
            # Moments differ from those of a run without W&B, which writes files, too: steps alone are counted.
            fault = Fault(n, signum=signal.SIGKILL, victim="wandb-core", only=STEP)
            result = run.train(fault, environment={"WANDB_SILENT": "true"})
            assert result.code == 0, result.output
            assert "Traceback" not in result.output, result.output
            assert result.output.count("failed, the training continues") == 1, result.output
            assert_equal_weights(run, whole)
            machine.discard(run)
