"""Image folders as a data set: ``root/<part>/<class>/…``."""

from functools import cached_property
from pathlib import Path

from bcos_train.dataset.base import MAX_SKIPPED, Cache, ClassMap, ImageDataset, check_max_skipped, require_root
from bcos_train.dataset.split import Split
from bcos_train.dataset.storage.folder import FolderImages, list_classes, shorten
from bcos_train.dataset.storage.shards import Storage, choose_shards

__all__ = ["ImageFolder"]

_HINT = "set DATA_ROOT or dataset.root"


class ImageFolder:
    """Images of the user, one folder per class: ``root/train/<class>/…`` and ``root/val/<class>/…``.

    Args:
        root: Folder that contains both parts.
        train: Folder name of the training part; may equal ``val``, for trials on a small sample.
        val: Folder name of the validation part, for instance ``"test"``.
        cache: Where the images are kept during a run, see :data:`~bcos_train.dataset.base.Cache`.
        exif_orientation: Rotate and flip images as their EXIF tag says, see :func:`~bcos_train.dataset.image.to_rgb`.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        max_skipped: Share of images that may be unreadable, see :func:`~bcos_train.dataset.base.check_max_skipped`.
        storage, shards: Image files in ``root``, or shards, see :class:`~bcos_train.dataset.storage.shards.Shards`.
        shots, val_per_class, split_seed: A few images of each class, see :class:`~bcos_train.dataset.split.Split`.

    Raises:
        ValueError: ``root`` is None; on use: folders are missing or empty, or the parts differ in their classes.
    """

    name = "imagefolder"
    #: Environment variable that sets ``root`` in the config.
    root_variable = "DATA_ROOT"

    def __init__(
        self,
        root: str | Path | None,
        train: str = "train",
        val: str = "val",
        cache: Cache | None = None,
        exif_orientation: bool = False,
        class_map: ClassMap | None = None,
        max_skipped: float = MAX_SKIPPED,
        storage: Storage = "folder",
        shards: str | dict[str, str] | None = None,
        shots: int | None = None,
        val_per_class: int | None = None,
        split_seed: int = 42,
    ) -> None:
        self._shards = choose_shards(storage, shards)
        if self._shards is None:
            self.root = require_root(root, "the image folder", _HINT)
        self.cache = cache
        self.class_map = class_map
        self.max_skipped = check_max_skipped(max_skipped)
        self._split = Split(shots, val_per_class, split_seed)
        self.exif_orientation = exif_orientation
        self.train_folder = train
        self.val_folder = val

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the class folders of the validation part, sorted; a class's label is its index in the list."""
        if self._shards is not None:
            return self._shards.class_names("val")
        return list_classes(self.root, self.val_folder, "dataset.val", _HINT)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare(self) -> None:
        """Check that the folders exist, or read the index of the shards."""
        _ = self.class_names
        if self._shards is not None:
            self._shards.prepare(self._split.parts)

    def train(self) -> ImageDataset:
        return self._split.train(self._training_images, self.class_names)

    def val(self) -> ImageDataset:
        if self._split.val_per_class is None:
            return self._part(self.val_folder) if self._shards is None else self._shard_images("val")
        return self._split.val(self._training_images, self.class_names)

    @cached_property
    def _training_images(self) -> ImageDataset:
        if self._shards is not None:
            return self._shard_images("train")
        classes = list_classes(self.root, self.train_folder, "dataset.train", _HINT)
        if classes != self.class_names:
            only_train = sorted(set(classes) - set(self.class_names))
            only_val = sorted(set(self.class_names) - set(classes))
            raise ValueError(
                f"{self.root / self.train_folder} and {self.root / self.val_folder} must have the same class folders; "
                f"only in {self.train_folder}: {shorten(only_train)}, only in {self.val_folder}: {shorten(only_val)}; "
                f"{_HINT}"
            )
        return self._part(self.train_folder)

    def _shard_images(self, part: str) -> ImageDataset:
        assert self._shards is not None
        names = {name: label for label, name in enumerate(self.class_names)}
        return self._shards.images(part, lambda: names, self.num_classes, self.exif_orientation)

    def _part(self, part: str) -> FolderImages:
        labels = {name: label for label, name in enumerate(self.class_names)}
        return FolderImages(self.root / part, labels, _HINT, self.exif_orientation)
