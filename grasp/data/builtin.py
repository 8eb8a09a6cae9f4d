"""The built-in English text: Python's own language reference and docstrings."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from grasp.errors import GraspError


def builtin_rows() -> list[str]:
    """`pydoc_data.topics`, and the docstrings of the standard library's top-level modules.

    1.4 MB under the PSF licence. The text depends on the version of Python; a recipe records its
    sha256. Raises GraspError if this Python has no `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise GraspError("this Python has no pydoc_data: give `calibration`") from None

    docstrings = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        docstrings += [ast.get_docstring(n) for n in nodes if isinstance(n, documented)]
    return [*topics.values(), *filter(None, docstrings)]
