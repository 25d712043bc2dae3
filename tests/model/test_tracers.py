"""What tracers and exporters make of a model computes what the model does.

Without logit bias, which hides any difference, and with statistics of the batch, so that activations don't fade.
"""

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from official_models import calibrate_, images, perturb_, relative_error
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from bcos_train import create_model
from bcos_train.nn import BcosConv2d

# Tracing warns of each check of a shape.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")

Exporter = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
NO_DROPOUT = {"stochastic_depth_prob": 0.0, "drop_rate": 0.0}
#: Every family with and without MaxOut, with both forms of the scale.
OPTIONS = [{"b": 1.25, "max_out": 2}, {"b": 2, "max_out": 1}]
every_family = pytest.mark.parametrize(("name", "size", "more"), FAMILIES, ids=[name for name, *_ in FAMILIES])


def build(name: str, size: int, **options: Any) -> Any:
    torch.manual_seed(0)
    options |= {key: value for key, value in NO_DROPOUT.items() if key in options}
    model: Any = create_model(name, num_classes=5, **{**options, "logit_bias": 0.0})
    perturb_(model)
    calibrate_(model, images(size, n=8))
    return model.eval()


def assert_exported(export: Exporter, model: nn.Module, size: int) -> None:
    """Compare on a batch of another size than that of the export, with the model in float64.

    The rounding errors of deep networks with MaxOut exceed 1e-5 in the model itself.
    """
    x = images(size, n=3, seed=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert exact.abs().max() > 1e-6, "negligible outputs"
        own = relative_error(model(x).double(), exact)
        assert relative_error(export(model, images(size))(x).double(), exact) <= max(1e-5, 4 * own)
        assert own <= 1e-4


def traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, x, check_trace=False)


def frozen(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.freeze(traced(model, x))


def symbolic_fx(model: nn.Module, x: Tensor) -> Any:
    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()


def run_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def old_onnx(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    return run_onnx(file.getvalue())


def new_onnx(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with contextlib.redirect_stdout(io.StringIO()):
        program: Any = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},))
    return run_onnx(program.model_proto.SerializeToString())


@every_family
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trace(name: str, size: int, more: dict[str, Any], options: dict[str, Any]) -> None:
    assert_exported(traced, build(name, size, **{**more, **options}), size)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("b", [1.25, 2])
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("export", [frozen, symbolic_fx, exported, old_onnx, new_onnx])
def test_every_exporter(name: str, size: int, more: dict[str, Any], b: float, max_out: int, export: Exporter) -> None:
    assert_exported(export, build(name, size, **{**more, "b": b, "max_out": max_out}), size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("export", [frozen, symbolic_fx, exported, old_onnx])
def test_exporter(export: Exporter, options: dict[str, Any]) -> None:
    assert_exported(export, build("resnet20", 8, layers=(1, 1, 1), **options), 8)


@pytest.mark.parametrize("export", [old_onnx, new_onnx])
def test_window_of_a_convolution_in_onnx(export: Exporter) -> None:
    """ONNX's average pooling has no other divisor than the window's size, so the patch norm was too small."""
    assert_exported(export, BcosConv2d(6, 4, 3, stride=2, padding=1, groups=2, max_out=2), 9)


def test_trace_with_gradients() -> None:
    """Traced while autograd records, as TensorBoard's ``add_graph`` does, and run on another size; W(x) is kept."""
    model = build("resnet20", 8, layers=(1, 1, 1))
    x = images(12, n=3, seed=1)
    network = traced(model, images(8))
    assert relative_error(network(x).detach(), model(x).detach()) <= 1e-5
    with model.explanation_mode():
        maps = []
        for f in (traced(model, images(8)), model):
            leaf = x.clone().requires_grad_()
            maps += torch.autograd.grad(f(leaf)[:, 1].sum(), leaf)
    assert relative_error(maps[0], maps[1]) <= 1e-5


def test_tensorboard_graph(tmp_path: Any) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(build("resnet20", 8, layers=(1, 1, 1)), images(8))
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["resnet20", "simple_vit_ti_patch16_224"])
def test_operations_are_counted(name: str) -> None:
    """By dispatch modes, which count convolutions and matrix products, as by counters that trace (fvcore)."""
    size, options = (8, {"layers": (1, 1, 1)}) if name == "resnet20" else (32, {"depth": 2})
    counts = []
    for backend in ("fused", "reference"):
        model = build(name, size, backend=backend, **options)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(size))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    kinds = {node.kind() for node in traced(build(name, size, **options), images(size)).inlined_graph.nodes()}
    assert {"aten::_convolution", "aten::linear"} & kinds
    assert not {kind for kind in kinds if "mkldnn" in kind or kind == "prim::PythonOp"}
