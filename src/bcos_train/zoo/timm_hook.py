"""Registers the models in timm, whichever of the two packages is imported first.

Importing timm takes seconds, and users of this package alone should not wait for it. So where timm is not loaded yet,
a finder goes to the front of ``sys.meta_path``. It answers for the name ``timm`` alone (``import timm.data`` asks for
that name first), has the other finders find it, and lets :mod:`bcos_train.zoo.timm_models` follow as soon as timm has
been imported. Then it goes. A timm that is missing or fails to import behaves as it would without all this.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_in_timm"]


def register_in_timm() -> None:
    """Register all models in timm: now if it is loaded, else once it is."""
    if sys.modules.get("timm") is not None:  # None: whoever put it there wants no timm
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def _register() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TimmFinder)]
    try:
        from bcos_train.zoo import timm_models  # noqa: F401 - registers its models
    except Exception as error:  # timm itself has come up, and an import of timm must not fail on our account
        warnings.warn(f"the B-cos models are not registered in timm: {error!r}", stacklevel=2)


class _TimmFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        found = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if found is not None and found.loader is not None:
            found.loader = _ThenRegister(found.loader)
        return found


class _ThenRegister(Loader):
    """Loads as ``loader`` does, and then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on everything, readers of timm's data files included, sees timm's own loader.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
