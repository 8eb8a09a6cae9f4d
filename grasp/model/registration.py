"""Register pruned models with transformers' Auto classes on `import grasp`, at no cost in time.

If transformers has loaded its Auto classes, ours are registered at once. Otherwise an import hook
registers them at the end of the outermost import that loads the Auto classes, because our classes
import much of transformers themselves. The hook then removes itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
CLASSES = "grasp.model.modeling_grasp"


def register() -> None:
    """Register our classes now, or as soon as the Auto classes are loaded."""
    if AUTO in sys.modules:
        importlib.import_module(CLASSES)
    else:
        sys.meta_path.insert(0, _UntilAutoIsLoaded())


class _UntilAutoIsLoaded(MetaPathFinder):
    """Finds modules of transformers as usual, and notes when they are loaded."""

    loading = 0  # nested imports in progress

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = spec and spec.loader
        if loader is None:
            return None
        load = loader.exec_module

        def noted(module: ModuleType) -> None:
            self.loading += 1
            try:
                load(module)
            finally:
                self.loading -= 1
            if not self.loading and AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(CLASSES)

        loader.exec_module = noted
        return spec
