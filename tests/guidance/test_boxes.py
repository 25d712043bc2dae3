"""Masks of boxes and the draw of a class."""

import pytest
import torch

from bcos_train.guidance import class_masks, positive_classes


def test_masks_by_hand() -> None:
    boxes = torch.tensor([
        [[2, 1, 0, 3, 1], [0, 0, 0, 4, 2], [2, 3, 1, 4, 2]],
        [[-1, 0, 0, 4, 2], [1, 0, 0, 1, 1], [-1, -1, -1, -1, -1]],
    ])  # fmt: skip
    assert not class_masks(boxes, torch.tensor([-1, -1]), height=2, width=4).any()
    masks = class_masks(boxes, torch.tensor([2, 0]), height=2, width=4)
    assert masks.int().tolist() == [[[0, 1, 1, 0], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize("dilation", [0.0, 0.1, 0.29, 0.5, 3.0])
def test_masks_of_random_boxes_are_slices(dilation: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n, m, height, width = 4, 5, 40, 50
    x = torch.randint(0, width + 1, (n, m, 2), generator=generator).sort().values
    y = torch.randint(0, height + 1, (n, m, 2), generator=generator).sort().values
    kinds = torch.randint(-1, 2, (n, m, 1), generator=generator)
    boxes = torch.cat([kinds, x[..., :1], y[..., :1], x[..., 1:], y[..., 1:]], dim=2)
    expected = torch.zeros(n, height, width, dtype=torch.bool)
    for mask, rows in zip(expected, boxes.tolist(), strict=True):
        for kind, x0, y0, x1, y1 in rows:
            dx, dy = int(dilation * (x1 - x0)), int(dilation * (y1 - y0))
            if kind == 1:
                mask[max(y0 - dy, 0) : y1 + dy, max(x0 - dx, 0) : x1 + dx] = True
    assert torch.equal(class_masks(boxes, torch.ones(n, dtype=torch.long), height, width, dilation), expected)


def test_dilation_by_hand() -> None:
    """A quarter of seven columns is one, of three rows none."""
    boxes = torch.tensor([[[0, 0, 1, 7, 4], [0, 9, 0, 9, 4]]])
    mask = class_masks(boxes, torch.tensor([0]), height=5, width=10, dilation=0.25)[0]
    assert mask.sum(0).tolist() == [3] * 8 + [0, 0]


def test_the_class_is_a_positive_one() -> None:
    words = torch.arange(1500) // 3
    assert positive_classes(torch.tensor([3, 1]), words[:2]).tolist() == [3, 1]
    labels = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.0] * 5]).repeat(500, 1)
    classes = positive_classes(labels, words)
    assert classes[:12:3].tolist() == [1, 3, 4, 1]
    assert classes[::3].bincount(minlength=5).tolist() == [0, 167, 0, 167, 166]
    assert (classes[1::3] == 2).all()
    assert (classes[2::3] == -1).all()
    assert positive_classes(labels[:1], torch.tensor([2**63 - 1])).tolist() == [3]  # 2^63 - 1 is 1 modulo 3
