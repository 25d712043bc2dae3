"""The data sets: contents, labels, and what is said when something is missing."""

import hashlib
import logging
import pickle
import tarfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits

from bcos_train.dataset import Cifar10, Digits


def _official_archive(root: Path, images_per_batch: int = 4) -> None:
    """A small archive in the layout of cifar-10-python.tar.gz, unpacked into root."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {
            "data": rng.integers(0, 256, (images_per_batch, 3072), dtype=np.uint8),
            "labels": list(range(images_per_batch)),
        }
        (folder / name).write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


@pytest.fixture
def small_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a small CIFAR-10 whose checksums torchvision accepts."""
    root = tmp_path / "data"
    _official_archive(root)

    def md5(name: str) -> str:
        return hashlib.md5((root / "cifar-10-batches-py" / name).read_bytes()).hexdigest()

    base = torchvision.datasets.CIFAR10
    monkeypatch.setattr(base, "train_list", [[name, md5(name)] for name, _ in base.train_list])
    monkeypatch.setattr(base, "test_list", [[name, md5(name)] for name, _ in base.test_list])
    monkeypatch.setattr(base, "meta", {**base.meta, "md5": md5("batches.meta")})
    return root


def test_digits() -> None:
    digits = Digits()
    digits.prepare()
    train, val = digits.train(), digits.val()
    assert (len(train), len(val)) == (1438, 359)
    image, label = train[0]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", int(load_digits().target[0]))
    assert digits.num_classes == len(digits.class_names) == 10


def test_digits_pixels_at_their_own_size() -> None:
    data = load_digits()
    train, val = Digits(size=8).train(), Digits(size=8).val()
    ours = sorted((np.asarray(image)[..., 0].tobytes(), label) for part in (train, val) for image, label in part)
    theirs = sorted(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(data.images, data.target, strict=True)
    )
    assert ours == theirs


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_digits_split_is_stratified(fraction: float) -> None:
    digits = Digits(val_fraction=fraction)
    all_labels = np.bincount(load_digits().target)
    val = digits.val()
    val_labels = np.bincount([val[i][1] for i in range(len(val))])
    assert (abs(val_labels - fraction * all_labels) <= 0.5).all()
    assert len(digits.train()) + len(digits.val()) == 1797


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must lie between 1 and 4,096 pixels, not 0"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, not 1.0"),
    ],
)
def test_digits_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_cifar10_reads_the_official_files(small_cifar10: Path) -> None:
    for download in (True, False):  # with the files there, nothing is fetched
        cifar = Cifar10(small_cifar10, download=download)
        cifar.prepare()
        train, val = cifar.train(), cifar.val()
        assert (len(train), len(val)) == (20, 4)
        image, label = train[1]
        assert (image.size, image.mode, label) == ((32, 32), "RGB", 1)
        assert isinstance(image, Image.Image)
        assert cifar.class_names == train.classes
        assert cifar.num_classes == 10


@pytest.mark.parametrize("root", [None, ""], ids=["none", "empty"])
def test_cifar10_without_a_root(root: str | None) -> None:
    with pytest.raises(ValueError, match=r"set DATA_ROOT or dataset\.root"):
        Cifar10(root)


def test_cifar10_not_there(tmp_path: Path) -> None:
    for ask in (lambda c: c.prepare(), lambda c: c.train(), lambda c: c.val()):
        with pytest.raises(ValueError, match=r"no complete CIFAR-10 in .*dataset\.download=true"):
            ask(Cifar10(tmp_path, download=False))


@pytest.mark.parametrize(
    "failure",
    [
        OSError("Name or service\nnot known"),
        RuntimeError("File not found or corrupted."),
        tarfile.ReadError("truncated"),
    ],
    ids=["network", "checksum", "archive"],
)
def test_cifar10_failed_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(ValueError, match=r"could not be downloaded to .* set DATA_ROOT or dataset\.root") as caught:
        Cifar10(tmp_path).prepare()
    assert "\n" not in str(caught.value)


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_cifar10_really_downloads(small_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself, from a server on this machine: fetched, checked, unpacked."""
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small_cifar10 / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    server = HTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    base = torchvision.datasets.CIFAR10
    monkeypatch.setattr(base, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(base, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    cifar = Cifar10(tmp_path / "elsewhere")
    try:
        cifar.prepare()
    finally:
        server.shutdown()
        server.server_close()
    assert len(cifar.train()) == 20


def test_loading_says_nothing(small_cifar10: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Cifar10(small_cifar10).prepare()
    assert not caplog.records


def test_cifar10_as_image_files(tmp_path: Path) -> None:
    names = Cifar10(tmp_path).class_names
    for part in ("train", "test"):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / part / name / "0000.jpg")
    data = Cifar10(tmp_path)
    data.prepare()  # no download
    assert len(data.train()) == len(data.val()) == 10
    assert data.train()[9][1] == 9


def test_cifar10_with_other_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("airplane", "zebra"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / part / name / "0000.jpg")
    with pytest.raises(ValueError, match="dataset=imagefolder"):
        Cifar10(tmp_path).prepare()
