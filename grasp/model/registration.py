"""`import grasp` lets transformers' Auto classes load pruned checkpoints, and costs no time.

The classes are registered at once where transformers has its Auto classes loaded, and otherwise at
the moment they load: an import hook waits for that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"
CLASSES = "grasp.model.modeling_grasp"


def register() -> None:
    if AUTO in sys.modules:
        importlib.import_module(CLASSES)
    else:
        sys.meta_path.insert(0, _WhenAutoLoads())


class _WhenAutoLoads(MetaPathFinder):
    """Finds nothing by itself; the Auto classes' own loader gets one more thing to do."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = spec and spec.loader
        if loader is None:
            return None
        load = loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module(CLASSES)

        loader.exec_module = load_and_register
        return spec
