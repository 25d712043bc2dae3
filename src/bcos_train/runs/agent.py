"""torchrun for the processes of a run: ``python -m bcos_train.runs.agent <arguments of torchrun>``.

It ends when the command that started it does, and reports a process that failed in one line.
"""

import logging
import signal
import sys

from bcos_train.runs.launch import shell_code
from bcos_train.runs.orphans import end_with_parent

#: Signals that torchrun doesn't handle: sent to all processes of a job, they would end it before the run has saved.
_IGNORED = ("SIGUSR1", "SIGUSR2")


def main() -> int:
    """Run torchrun and return the exit code of the first process that failed, or 0."""
    for name in _IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()
    logging.disable(logging.CRITICAL)  # torchrun's own messages: one line below says the same
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        cause = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            cause = f"killed by {signal.Signals(-failure.exitcode).name}"
        print(f"process {rank} of the run ended early ({cause}); the others were stopped", file=sys.stderr)
        return shell_code(failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
