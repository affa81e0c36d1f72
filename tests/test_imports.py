"""Imports only point left: worldmodel <- envs <- agents <- examples."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("worldmodel", "envs", "agents", "examples")
RIGHT_OF_ALL = ("tests", "benchmarks")
COMMAND_LINE = {
    "worldmodel/__main__.py": ("envs", "agents"),
    "worldmodel/cli_bench.py": ("benchmarks",),
    "worldmodel/cli_evaluate.py": ("agents",),
    "worldmodel/cli_imagine.py": ("envs",),
    "worldmodel/cli_serving.py": ("envs",),
    "worldmodel/cli_watch.py": ("envs",),
}
BANNED = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torchvision"}


def imported_modules(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module, line, inside a function) of every absolute import and `import_module("...")`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno, in_function
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value), node.lineno, in_function
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imported_modules(node, inside)


def wrong_way(source: str, path: str) -> list[str]:
    """The imports of a file (path relative to the root) that point right, as `path:line imports module`."""
    own = LAYERS.index(path.split("/")[0])
    forbidden = {*LAYERS[own + 1 :], *RIGHT_OF_ALL}
    found = []
    for module, line, in_function in imported_modules(ast.parse(source)):
        top = module.split(".")[0]
        excepted = in_function and top in COMMAND_LINE.get(path, ())
        if top in forbidden and not excepted:
            found.append(f"{path}:{line} imports {module}")
    return found


def banned(source: str, path: str) -> list[str]:
    """The imports of a file that can run code from data, or that have no CPU build."""
    modules = imported_modules(ast.parse(source))
    return [f"{path}:{line} imports {m}" for m, line, _ in modules if m.split(".")[0] in BANNED]


def sources(*folders: str) -> list[tuple[str, str]]:
    """(source, path relative to the root) of every Python file in the folders."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [(file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()) for file in files]


def test_imports_point_left() -> None:
    files = sources(*LAYERS)
    assert files
    assert [line for source, path in files for line in wrong_way(source, path)] == []


def test_nothing_banned_is_imported() -> None:
    assert [line for source, path in sources(*LAYERS) for line in banned(source, path)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worldmodel/flow/block.py", "import envs"),
        ("worldmodel/flow/block.py", "def f():\n    from envs.vector import VectorEnv"),
        ("worldmodel/flow/block.py", "class A:\n    async def f(self):\n        import agents.cem as cem"),
        ("worldmodel/flow/block.py", "if TYPE_CHECKING:\n    from agents import MPCAgent"),
        ("worldmodel/world.py", "import importlib\nimportlib.import_module('envs.env')"),
        ("worldmodel/world.py", "from tests.golden_check import compare"),
        ("worldmodel/cli_evaluate.py", "import agents"),
        ("worldmodel/cli_imagine.py", "try:\n    import envs\nexcept ImportError:\n    pass"),
        ("worldmodel/cli_imagine.py", "def main():\n    import examples.demo"),
        ("worldmodel/cli_imagine.py", "def main():\n    import agents"),
        ("worldmodel/codec/cli.py", "def main():\n    import envs"),
        ("envs/env.py", "import worldmodel, agents"),
        ("envs/env.py", "import examples"),
        ("agents/cem.py", "from benchmarks import step"),
    ],
)
def test_the_checker_finds(path: str, source: str) -> None:
    assert len(wrong_way(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("worldmodel/cli_imagine.py", "def play():\n    import envs"),
        ("worldmodel/cli_evaluate.py", "def run():\n    from agents import MPCAgent"),
        ("worldmodel/__main__.py", "def main():\n    import envs"),
        ("worldmodel/world.py", "from .flow import block\nfrom . import envs\nimport environs"),
        ("envs/env.py", "import worldmodel.world"),
        ("examples/demo.py", "import agents, envs, worldmodel"),
    ],
)
def test_the_checker_allows(path: str, source: str) -> None:
    assert wrong_way(source, path) == []


@pytest.mark.parametrize("source", ["import pickle", "def f():\n    from torchvision.io import read_video"])
def test_the_checker_finds_banned(source: str) -> None:
    assert len(banned(source, "envs/env.py")) == 1


def test_worldmodel_loads_no_environment_and_no_socket() -> None:
    """Gymnasium's spaces and registry may load with the core; its environments, ours, and ZeroMQ may not."""
    script = "import sys, worldmodel.world; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    allowed = {"gymnasium.envs", "gymnasium.envs.registration"}
    assert "worldmodel" in loaded
    assert [name for name in loaded if name.startswith("gymnasium.envs") and name not in allowed] == []
    assert {name.split(".")[0] for name in loaded} & {"envs", "agents", "zmq", "pygame"} == set()
