"""Compression methods, one file each.

A method is a module of this package with

- `Settings`, a `MethodSettings` whose `kind` is a Literal of the method's name: what a preset may say;
- `compress(task: CompressionTask) -> Replacements`: what becomes of the linear layers that it names, and of norms,
  attention modules and blocks if it changes those too (`model.replacements`); what is not named stays as it is.

Modules import torch inside functions only, since the config check reads their settings on every start.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def method_modules() -> dict[str, ModuleType]:
    """Kind -> module of every method, in alphabetical order."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {kind_of(module): module for module in modules if hasattr(module, "Settings")}


def kind_of(module: ModuleType) -> str:
    """The `kind` that presets of this method's module write."""
    (kind,) = module.Settings.model_fields["kind"].annotation.__args__
    return str(kind)


def settings_classes() -> list[type]:
    """The settings classes of all methods."""
    return [module.Settings for module in method_modules().values()]
