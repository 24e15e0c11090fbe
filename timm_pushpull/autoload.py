"""Registers the models with timm as soon as a program imports timm.

PyTorch loads the entry points ``torch.backends`` at the end of ``import torch``. An exception there would end that
import for every program. So this module imports the standard library alone, and waits: the models register right after
the import of ``timm.models``, in the thread that imports it, before any program can use it.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ['autoload', 'warn']

_TIMM_MODELS = 'timm.models'


def autoload() -> None:
    """Register the push-pull models with timm: now if ``timm.models`` is imported, else right after its import.

    Any thread may call this any number of times. It never raises: an error becomes one warning.
    """
    try:
        _TimmModelsFinder.install()
        timm_models = sys.modules.get(_TIMM_MODELS)
        if timm_models is not None:
            spec = timm_models.__spec__
            if getattr(spec, '_initializing', False):
                # Another thread is importing timm.models, and looked for it before the finder was installed.
                spec.__class__ = _InitializingSpec  # type: ignore[union-attr]
            if not getattr(spec, '_initializing', False):
                _register()
    except Exception as error:
        _warn(error)


def _register() -> None:
    try:
        # The import system runs each module once, for any number of calls and threads.
        importlib.import_module('timm_pushpull.models.pushpull_resnet')
        importlib.import_module('timm_pushpull.models.pushpull_any')
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warn(
        f'timm-pushpull could not register its models with timm ({type(error).__name__}: {error}). '
        'Set TORCH_DEVICE_BACKEND_AUTOLOAD=0 or uninstall timm-pushpull to switch it off.'
    )


def warn(message: str) -> None:
    """Warn, or print to stderr under ``python -W error``, where a warning would end the import of timm."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        print(message, file=sys.stderr)


class _TimmModelsFinder(importlib.abc.MetaPathFinder):
    """Finds ``timm.models`` by the other finders, and gives it a loader that registers the models."""

    @classmethod
    def install(cls) -> None:
        if _TIMM_MODELS not in sys.modules and not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TIMM_MODELS:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """Runs the module's own loader, restores it, and registers the models."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        _register()


class _InitializingSpec(importlib.machinery.ModuleSpec):
    """Spec of a module during its import: registers the models when the import ends.

    The import system clears ``_initializing`` when the module is complete, in the importing thread, while other threads
    still wait for the module's lock.
    """

    @property
    def _initializing(self) -> bool:
        return self.__dict__.get('_initializing', False)

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        if not value and _TIMM_MODELS in sys.modules:  # gone from there if its import failed
            _register()
        self.__dict__['_initializing'] = value
