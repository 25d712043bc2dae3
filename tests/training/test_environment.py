"""Processes of a launcher against ``trainer.devices`` and ``trainer.num_nodes``."""

import os

import pytest
from pytorch_lightning.utilities import rank_zero_only

from bcos_train.config import UserError
from bcos_train.runs.launcher import Launched
from bcos_train.training.build import build_trainer
from bcos_train.training.environment import LaunchedEnvironment, check_launcher
from bcos_train.training.options import TrainerOptions


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def options(devices: int, num_nodes: int = 1) -> TrainerOptions:
    return TrainerOptions(max_epochs=1, accelerator="cpu", devices=devices, num_nodes=num_nodes)


def srun(monkeypatch: pytest.MonkeyPatch, tasks: int, nodes: int) -> None:
    variables = {"STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": nodes, "PROCID": 0, "LOCALID": 0}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_no_launcher() -> None:
    assert check_launcher(options(2)) is None
    with pytest.raises(UserError, match=r"trainer\.num_nodes=2 needs a launcher: srun, torchrun or submitit"):
        check_launcher(options(2, 2))


@pytest.mark.parametrize(("devices", "num_nodes"), [(2, 1), (1, 2), (4, 2)])
def test_a_launcher_that_agrees(devices: int, num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    srun(monkeypatch, devices * num_nodes, num_nodes)
    place = check_launcher(options(devices, num_nodes))
    assert place is not None
    assert place.world_size == devices * num_nodes


@pytest.mark.parametrize(
    ("tasks", "nodes", "devices", "num_nodes", "message"),
    [
        (
            2,
            1,
            3,
            1,
            "srun started 2 processes on 1 node, but .*devices=3 x .*num_nodes=1 is 3: use trainer.devices=2,",
        ),
        (2, 2, 2, 1, "on 2 nodes, but .*devices=2 x .*num_nodes=1 is 2: use trainer.devices=1 trainer.num_nodes=2"),
        (3, 2, 2, 2, "is 4: use the same number on each node, or start 4"),
    ],
)
def test_a_launcher_that_disagrees(
    tasks: int, nodes: int, devices: int, num_nodes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun(monkeypatch, tasks, nodes)
    with pytest.raises(UserError, match=message):
        check_launcher(options(devices, num_nodes))


def test_variables_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"torchrun started 1 process, .*; if torchrun has started nothing, unset RA"):
        check_launcher(options(2))
    assert check_launcher(options(1)) is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="are set, but not MASTER_ADDR"):
        check_launcher(options(2))


def test_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"MPI started 2 processes \(OMPI_COMM_WORLD_SIZE=2\), .* use torchrun or srun"):
        check_launcher(options(2))
    assert check_launcher(options(1)) is None  # processes that have nothing to do with each other


def test_ranks() -> None:
    place = Launched("torchrun", 5, 8, None, None, "a", 1234, ())
    environment = LaunchedEnvironment(place, 4)
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (5, 1, 1)
    assert (environment.main_address, environment.main_port, environment.world_size()) == ("a", 1234, 8)
    alone = LaunchedEnvironment(None, 1)
    assert (alone.global_rank(), alone.local_rank(), alone.node_rank(), alone.world_size()) == (0, 0, 0, 1)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID"])
def test_a_single_process_logs_whatever_is_left_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning sets it when it is imported
    trainer = build_trainer(options(1))
    assert trainer.is_global_zero
    assert rank_zero_only.rank == 0
