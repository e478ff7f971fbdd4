"""The house: imports run down the floors, and each third-party package is let into few rooms."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sllmdask

ROOT = Path(sllmdask.__file__).parent

FLOOR = {
    "compiling": 1,
    "errors": 1,
    "units": 1,
    "config": 2,
    "client": 2,
    "policy": 3,
    "batching": 3,
    "loader": 4,
    "engine": 4,
    "sim": 4,
    "actors": 5,
    "library": 5,
    "bench": 6,
    "cluster": 6,
    "server": 7,
    "cli": 8,
}
#: The one pair of neighbours that know each other: a size that cannot be read is a ConfigError.
NEIGHBOURS = {("units", "errors")}

#: Package -> rooms, or single files, that may import it. What is not listed here may be imported nowhere.
ALLOWED = {
    "aiohttp": {"client", "server"},
    "click": {"cli", "cluster/scheduler_plugin.py", "cluster/worker_plugin.py"},
    "ctypes": {"loader/libc.py"},
    "dask": {"actors", "cluster"},
    "distributed": {"actors", "cluster"},
    "huggingface_hub": {"loader/hub.py"},
    "llguidance": {"engine/grammar.py"},
    "matplotlib": {"sim/plot.py"},
    "msgpack": {"actors/move_wire.py"},
    "numba": {"compiling", "engine/kernels/cpu_attention.py", "loader"},
    "numpy": {"engine", "library", "loader"},
    "prometheus_client": {"server"},
    "psutil": {"cluster"},
    "pydantic": {"config", "sim/replay.py", "sim/scenario.py"},
    "rich": {"cli"},
    "safetensors": {"bench"},
    "torch": {"bench", "engine", "library", "loader/device.py", "loader/tiers.py"},
    "transformers": {"bench", "engine", "library"},
    "triton": {"engine/kernels/triton_attention.py"},
    "yaml": {"config"},
}
#: Part of Python, but as telling as a package: it is listed above.
WATCHED = {"ctypes"}
HEAVY = ("torch", "transformers", "dask", "distributed", "aiohttp")

FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "sllmdask":
                yield from (f"sllmdask.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} == set(FLOOR)


@each_file
def test_imports_run_down_and_neighbours_do_not_know_each_other(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "sllmdask" and rest[0] != "__version__":
            target = rest[0]
            assert target == room or FLOOR[target] < FLOOR[room] or (room, target) in NEIGHBOURS, f"{room} imports {name}"


@each_file
def test_a_third_party_package_is_imported_only_in_its_rooms(path: Path) -> None:
    here = {room_of(path), path.relative_to(ROOT).as_posix()}
    for name in imports(path):
        top = name.partition(".")[0]
        if top != "sllmdask" and (top not in sys.stdlib_module_names or top in WATCHED):
            assert here & ALLOWED.get(top, set()), f"{path.relative_to(ROOT)} imports {name}"


def loaded_by(module: str) -> list[str]:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", ["sllmdask.sim.run", "sllmdask.policy.controller", "sllmdask.batching.scheduler"])
def test_what_decides_loads_neither_torch_nor_dask_nor_a_web_server(module: str) -> None:
    assert loaded_by(module) == []


def test_the_client_loads_neither_torch_nor_dask() -> None:
    assert loaded_by("sllmdask.client") == ["aiohttp"]


def test_the_command_line_loads_none_of_them_before_it_knows_the_command() -> None:
    assert loaded_by("sllmdask.cli") == []


# --- what the package depends on -------------------------------------------------------------------------------------

REPOSITORY = ROOT.parent
#: Where the name to install differs from the name to import. Triton comes with the builds of torch that can use it.
DISTRIBUTION = {"triton": "torch", "yaml": "pyyaml"}


def required() -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [line for extra in extras if extra not in ("test", "dev") for line in extras[extra].split()]
    return {re.split(r"[^\w-]", line)[0] for line in [*setup["options"]["install_requires"].split(), *lines]}


def test_every_package_that_is_imported_is_required() -> None:
    imported = {name.partition(".")[0] for path in FILES for name in imports(path)}
    third_party = imported - set(sys.stdlib_module_names) - {"sllmdask"}
    assert {DISTRIBUTION.get(name, name) for name in third_party} <= required()


def test_the_page_of_dependencies_tells_of_each_one_and_of_no_other() -> None:
    page = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page.split("## Only for development")[0], re.MULTILINE)) == required()
