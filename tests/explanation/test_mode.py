"""Explanation mode: nesting, restoring, swapped modules."""

import pytest
import torch
from torch import nn

from bcos_train.explanation import explanation_mode, is_explainable
from bcos_train.nn import BatchNorm2d, BatchNormUncentered2d, BcosConv2d


def small_model() -> nn.Sequential:
    return nn.Sequential(BcosConv2d(6, 4, 3), nn.Sequential(BatchNormUncentered2d(4), BcosConv2d(4, 2)))


def states(model: nn.Module) -> list[bool]:
    return [m.is_in_explanation_mode for m in model.modules() if hasattr(m, "is_in_explanation_mode")]


def test_switches_all_modules_on_and_off():
    model = small_model()
    assert states(model) == [False] * 3
    with explanation_mode(model) as entered:
        assert entered is model
        assert states(model) == [True] * 3
    assert states(model) == [False] * 3


@pytest.mark.parametrize("same_instance", [False, True], ids=["two-instances", "one-instance"])
def test_inner_exit_leaves_the_outer_block_on(same_instance: bool):
    model = small_model()
    outer = explanation_mode(model)
    inner = outer if same_instance else explanation_mode(model)
    with outer:
        with inner:
            assert states(model) == [True] * 3
        assert states(model) == [True] * 3
    assert states(model) == [False] * 3


def test_restores_a_mixed_state_after_an_exception():
    model = small_model()
    model[0].set_explanation_mode(True)
    with pytest.raises(RuntimeError, match="inside"), explanation_mode(model):
        raise RuntimeError("inside")
    assert states(model) == [True, False, False]


def test_decorator_enters_at_every_call_and_keeps_the_function():
    model = small_model()

    @explanation_mode(model)
    def probe(depth: int) -> list[list[bool]]:
        """Doc."""
        return [states(model)] + (probe(depth - 1) if depth else [])

    assert probe(2) == [[True] * 3] * 3
    assert probe.__doc__ == "Doc."
    assert states(model) == [False] * 3


def test_sees_modules_swapped_in_between_entries():
    model = small_model()
    mode = explanation_mode(model)
    with mode:
        pass
    model[0] = BcosConv2d(6, 4, 1)
    with mode:
        assert states(model) == [True] * 3
    assert states(model) == [False] * 3


def test_modules_swapped_out_within_the_block_are_restored_too():
    model = small_model()
    old = model[0]
    with explanation_mode(model):
        model[0] = BcosConv2d(6, 4, 1)
    assert not old.is_in_explanation_mode
    assert states(model) == [False] * 3


def test_failing_entry_restores_what_was_switched():
    model = nn.Sequential(BcosConv2d(6, 4), BatchNorm2d(4), BcosConv2d(4, 2)).train()
    with pytest.raises((ValueError, RuntimeError, AssertionError)), explanation_mode(model):
        pytest.fail("entered")
    assert not model[0].is_in_explanation_mode
    assert not model[2].is_in_explanation_mode
    with explanation_mode(model.eval()):
        assert model[0].is_in_explanation_mode
    assert not model[2].is_in_explanation_mode


def test_parent_that_passes_the_call_on():
    class Parent(nn.Sequential):
        detach = False

        def set_explanation_mode(self, activate: bool = True) -> None:
            self.detach = activate
            for child in self:
                child.set_explanation_mode(activate)

    model = Parent(BcosConv2d(6, 4), BcosConv2d(4, 2))
    model[1].set_explanation_mode(True)
    with explanation_mode(model):
        assert model.detach
        assert states(model) == [True, True]
    assert not model.detach
    assert states(model) == [False, True]


def test_official_modules_take_part():
    from bcos.modules import BcosConv2d as OfficialConv

    model = nn.Sequential(OfficialConv(6, 4), nn.ReLU())
    assert is_explainable(model)
    with explanation_mode(model):
        assert model[0].detach
    assert not model[0].detach


def test_data_parallel_wrapper():
    model = nn.DataParallel(small_model())
    with explanation_mode(model):
        assert states(model) == [True] * 3
    assert states(model) == [False] * 3


def test_model_without_detachable_parts():
    model = nn.Linear(2, 2)
    with explanation_mode(model):
        assert model(torch.zeros(1, 2)).shape == (1, 2)
