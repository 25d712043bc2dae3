"""The processes of a run, as Lightning sees them, and whether they are as many as the config says."""

from pytorch_lightning.plugins.environments import ClusterEnvironment

from bcos_train.config import UserError
from bcos_train.runs.launcher import Launched, launched, mpi_processes
from bcos_train.training.options import TrainerOptions

__all__ = ["LaunchedEnvironment", "check_launcher"]


class LaunchedEnvironment(ClusterEnvironment):
    """Ranks and address from :mod:`bcos_train.runs.launcher`.

    Lightning's own detection takes an interactive shell of Slurm for a process of srun, and starts processes itself if
    a variable is missing.
    """

    def __init__(self, place: Launched | None, processes_per_node: int) -> None:
        super().__init__()
        self.place = place
        self._per_node = processes_per_node

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.place.address if self.place else "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self.place.port if self.place else 0

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return self.place.world_size if self.place else 1

    def set_world_size(self, size: int) -> None:
        """Do nothing: the launcher has decided."""

    def global_rank(self) -> int:
        return self.place.rank if self.place else 0

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the launcher has decided."""

    def local_rank(self) -> int:
        if self.place is None:
            return 0
        return self.place.rank % self._per_node if self.place.local_rank is None else self.place.local_rank

    def node_rank(self) -> int:
        return self.global_rank() // self._per_node


def check_launcher(options: TrainerOptions) -> Launched | None:
    """Return this process's place among those of the launcher, if any; ``None``: start the processes ourselves.

    Raises:
        UserError: The launcher has started other processes than ``trainer.devices`` and ``trainer.num_nodes`` say, or
            cannot start several.
    """
    try:
        place = launched()
        mpi = mpi_processes()
    except ValueError as error:
        raise UserError(str(error)) from error
    devices, num_nodes, expected = options.processes_per_node, options.num_nodes, options.world_size
    if place is None and mpi is not None and expected > 1:
        variable, size = mpi
        raise UserError(
            f"MPI started {size} processes ({variable}={size}), of which none knows the others: use torchrun or srun, "
            f"or the command alone with trainer.devices={devices}; in a shell of MPI, unset {variable}"
        )
    if place is None and num_nodes > 1:
        raise UserError(f"trainer.num_nodes={num_nodes} needs a launcher: srun, torchrun or submitit")
    if place is None or (place.world_size == expected and place.nodes in (None, num_nodes)):
        return place
    started = f"{place.launcher} started {place.world_size} process{'es' if place.world_size > 1 else ''}"
    if place.nodes is not None:
        started += f" on {place.nodes} node{'s' if place.nodes > 1 else ''}"
    nodes = place.nodes or num_nodes
    fitting = f"trainer.devices={place.world_size // nodes}"
    if nodes > 1:
        fitting += f" trainer.num_nodes={nodes}"
    if place.world_size % nodes:
        fitting = "the same number on each node"
    raise UserError(
        f"{started}, but trainer.devices={devices} x trainer.num_nodes={num_nodes} is {expected}: use {fitting}, or "
        f"start {expected}; {place.hint}"
    )
