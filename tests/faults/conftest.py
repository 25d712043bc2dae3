"""Fixtures of the campaigns: the process that runs trials, and the count of trials."""

from collections.abc import Callable, Iterator

import pytest

from .campaign import Campaign, Machine, Run
from .trials import Trial, trial_server


def _no_trials(trial: Trial) -> object:
    raise NotImplementedError


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("faults")
    warm_up = Run(folder / "warm-up", _no_trials)  # type: ignore[arg-type]
    with trial_server(Trial(("train", str(warm_up.config)), folder)) as start:
        yield Machine(folder, start)


@pytest.fixture
def campaign(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Campaign]:
    """Counts trials; the test fails at its end if one of them didn't hold."""
    campaign = Campaign()
    yield campaign
    record_property("tried", campaign.tried)
    record_property("held", campaign.tried - len(campaign.failures))
    if (
        getattr(request.node, "callspec", None) is None or request.node.callspec.params.get("tenth", 0) == 0
    ):  # of less than ten trials, some tenths are empty
        assert campaign.tried
    assert not campaign.failures, campaign.summary()
