"""torchvision's own ResNets, the baselines that B-cos networks are compared with. Their input is standardised RGB."""

from functools import partial

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from bcos_train.dataset.encoding import Standardize
from bcos_train.model.registry import register_model
from bcos_train.model.transform import InferenceTransform


class StandardResNet(ResNet):
    """torchvision's ResNet with the inference transform that belongs to it."""

    transform = InferenceTransform(256, 224, Standardize())


_DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

for _depth, (_block, _layers) in _DEPTHS.items():
    register_model(f"standard_resnet{_depth}", partial(StandardResNet, block=_block, layers=list(_layers)))
