"""The order of packages: which may import which; and `import grasp` stays cheap."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a room may use itself and those before it.
ROOMS = [
    *(
        "errors",
        "options",
        "criteria",
        "journal",
        "machine",
        "distributed",
        "model",
        "data",
        "budget",
        "config",
    ),
    *("planning", "gates", "compress", "sparsity", "select", "checkpoint", "report", "evaluate"),
    *("run", "cli"),
]
SOURCES = sorted((ROOT / "grasp").rglob("*.py"))
KERNELS = sorted((ROOT / "grasp_kernels").rglob("*.py"))


def imported(source: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(name: str) -> str | None:
    """`grasp.model.load` is in the room `model`; None for what is outside of grasp's rooms."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "grasp" and rest else None


def name_of(source: Path) -> str:
    return str(source.relative_to(ROOT))


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_no_room_imports_a_later_one(source):
    own = source.relative_to(ROOT / "grasp").parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):  # the door: names of every room
        return
    below = ROOMS[: ROOMS.index(own) + 1]
    doors = {"__version__"}
    upward = sorted(n for n in imported(source) if (r := room(n)) and r not in {*below, *doors})
    assert not upward, f"grasp.{own} imports from a later room"


def statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of its body, without the signature (a table of options, often) and the docstring."""
    first, *rest = function.body
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = rest[0].lineno if docstring and rest else first.lineno
    return (function.end_lineno or start) - start + 1


@pytest.mark.parametrize("source", SOURCES + KERNELS, ids=name_of)
def test_functions_are_short(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {n.name: statements(n) for n in ast.walk(tree) if isinstance(n, functions)}
    assert not {name: lines for name, lines in lengths.items() if lines > 60}


def test_kernels_stand_alone():
    for source in KERNELS:
        assert not any(n == "grasp" or n.startswith("grasp.") for n in imported(source)), source


LOADS = """
import {first}
import {then}
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.for_model("grasp_llama").model_type == "grasp_llama"
assert any(c.__name__ == "GraspLlamaConfig" for c in AutoModelForCausalLM._model_mapping)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import grasp, sys; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}",
        LOADS.format(first="grasp", then="transformers"),
        LOADS.format(first="transformers.models.auto.modeling_auto", then="grasp"),
        LOADS.format(first="grasp", then="transformers.quantizers.auto"),
        LOADS.format(first="grasp", then="transformers.modeling_utils"),
    ],
    ids=["without torch", "grasp first", "transformers first", "from within", "base class first"],
)
def test_importing_grasp_is_cheap_and_registers_the_classes(code):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_hint_sends_anybody_to_another_package():
    """On the package index, the name `grasp` belongs to somebody else."""
    stranger = re.compile(r"pip install (-\S+ )*['\"]?grasp(?!prune|_kernels)")
    texts = [path for kind in ("*.py", "*.md", "*.toml", "*.yml") for path in ROOT.rglob(kind)]
    own = [p for p in texts if not {".venv", ".venv-vllm", "build"} & {*p.relative_to(ROOT).parts}]
    assert [p for p in own if p != Path(__file__) and stranger.search(p.read_text("utf-8"))] == []


def test_type_checkers_see_every_public_name():
    import grasp

    source = (ROOT / "grasp" / "__init__.py").read_text(encoding="utf-8")
    lines = re.findall(r"^    from (\S+) import (\w+) as \2$", source, re.MULTILINE)
    assert {name: home for home, name in lines} == grasp._HOMES
