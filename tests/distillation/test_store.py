"""Stores of teacher maps: exact scaling, records at any position, damage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bcos_train.distillation import store as module
from bcos_train.distillation.store import (
    MANIFEST,
    PARTS,
    Manifest,
    PartInfo,
    Store,
    indices_name,
    scale_maps,
    shard_images,
)
from bcos_train.utils.files import file_sha256

COUNTS = {"train": 11, "val": 4}


def make_store(folder: Path, dtype: Any = "float16") -> tuple[Store, dict[str, np.ndarray]]:
    """A complete store with random records, and these."""
    parts = {}
    for part, count in COUNTS.items():
        np.save(folder / indices_name(part), np.arange(count))
        parts[part] = PartInfo(
            count=count,
            view="PILToTensor()",
            inventory={"count": count, "digest": None},
            samples=[],
            indices_sha256=file_sha256(folder / indices_name(part)),
            map_shape=(6, 3, 4),
            shard_images=4,
        )
    manifest = Manifest(
        teacher="a teacher",
        teacher_sha256="",
        teacher_precision=None,
        explanation="weights",
        dataset="random",
        class_names=["a", "b"],
        num_classes=2,
        dtype=dtype,
        parts=parts,
        accuracy=50.0,
    )
    store, generator, values = Store(folder, manifest), np.random.default_rng(0), {}
    for part in PARTS:
        records = np.zeros(COUNTS[part], manifest.record(part))
        for name in ("label", "logits", "map"):
            records[name] = generator.integers(0, 9, records[name].shape)
        values[part] = records
        for number in range(parts[part].num_shards):
            store.write(part, number, records[4 * number : 4 * number + 4])
    return store, values


def test_every_record_is_found(tmp_path: Path) -> None:
    _, values = make_store(tmp_path)
    store = Store.open(tmp_path)
    for part in PARTS:
        for position in reversed(range(COUNTS[part])):
            assert store.read(part, position) == values[part][position]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        MANIFEST,
        *(f"train-0000{n}.npy" for n in range(3)),
        "train-indices.npy",
        "val-00000.npy",
        "val-indices.npy",
    ]
    assert store.manifest.bytes == sum(records.nbytes for records in values.values())


def test_the_manifest_survives_json(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    assert Manifest.load(tmp_path) == store.manifest


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    make_store(tmp_path)
    path = tmp_path / "train-00001.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    store = Store.open(tmp_path)  # of the same size
    assert [name for name, is_damaged in store.damaged() if is_damaged] == [path.name]
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"1 of 4 shards .*train-00001.npy.*run scripts/precompute_teacher.py again"):
        Store.open(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="1 of 4 shards"):
        Store.open(tmp_path)
    path.write_bytes(content)
    (tmp_path / "val-indices.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"val-indices.npy is missing or damaged"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, supported is 1"),
        ({"format": "x"}, "another format"),
        ({"parts": {}}, "is not a manifest of teacher maps"),
        ({"shards": 3}, "is not a manifest of teacher maps"),
        ({"unknown": 3}, "unknown"),
    ],
)
def test_other_formats(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_store(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Store.open(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        Store.open(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"has no {MANIFEST}"):
        Store.open(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        Store.open(tmp_path / "elsewhere")


def test_scaling_is_exact() -> None:
    maps = torch.randn(6, 3, 4, 5) * torch.tensor([1.0, 1e-30, 1e30, 3e-39, 1e38, 0.0]).view(-1, 1, 1, 1)
    scaled = scale_maps(maps)
    for before, after in zip(maps[:5], scaled[:5], strict=True):
        assert 0.5 <= after.abs().max() < 1
        ratio = (before.double() / after.double())[after != 0]
        assert (ratio == ratio[0]).all()
        assert float(torch.frexp(ratio[0])[0]) == 0.5, "a power of two"
    assert torch.equal(scaled[5], maps[5])


def test_shards_are_limited_in_images_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    record = np.dtype([("a", "<f4", (25,))])
    assert shard_images(record) == 4096
    monkeypatch.setattr(module, "SHARD_BYTES", 1050)
    assert shard_images(record) == 10
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    assert shard_images(record) == 1
