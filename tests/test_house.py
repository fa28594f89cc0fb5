"""The house rules: who imports whom, and what README, NOTICE and the wheel hold."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the backport
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hdbcli", "registry")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = sorted((ROOT / "benchmarks").rglob("*.py"))  # may import all of both, and does not ship
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DISTRIBUTIONS = {
    "ai_edge_litert": "ai-edge-litert",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
}  # where the names differ

# Each line may import from itself and from the lines below it. Packages on one line may import one
# another only in the order in which none comes back to itself.
LAYERS = (
    ("hdbcli.__main__",),
    ("hdbcli.cli",),
    ("hdbcli.api", "hdbcli.doctor"),
    ("hdbcli.bench", "hdbcli.compare"),
    ("hdbcli.training", "hdbcli.identity", "hdbcli.interop", "hdbcli.measure"),
    ("hdbcli.model",),
    ("hdbcli.method", "hdbcli.faces"),
    ("hdbcli", "hdbcli.config", "hdbcli.limits"),
    ("registry", "registry.plugins", "registry.tiny"),
    ("registry.bases",),
    (
        *("registry.stable_diffusion", "registry.store", "registry.orphans"),
        *("registry.identity_facts", "registry.fetch"),
    ),
    ("registry.checkpoints",),
    (
        *("registry.spec", "registry.metric", "registry.files", "registry.seeds"),
        *("registry.pixels", "registry.errors"),
    ),
)
METHOD = "hdbcli.method"
RECIPE = "registry.tiny.recipe"  # alone in registry it may import hdbcli, and it does not ship

EDGE = "hdbcli/cli/"  # the modules that know the CLI framework


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def readme() -> str:
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    return path.read_text(encoding="utf-8")


def imports(tree: ast.Module, package: tuple[str, ...]) -> set[str]:
    """Return the dotted names that a module of `package` imports, anywhere in it, made absolute."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*above, *([node.module] if node.module else [])])
            found.add(stem)
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    return found


def imports_of(path: Path) -> set[str]:
    return imports(tree_of(path), path.relative_to(ROOT).parent.parts)


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """Return which part of LAYERS a module belongs to: a package, or a module beside packages."""
    return ".".join(module.split(".")[:2])


def edges() -> dict[str, set[str]]:
    """Return which modules of both packages each of them imports, anywhere in it."""
    modules = {module_of(path): path for path in MODULES}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        used = imports_of(path)
        # `from hdbcli import x` names the package too; that is no import of the package's own code.
        parents = {name.rpartition(".")[0] for name in used if name in modules}
        found[module] = (used & modules.keys()) - parents - {module}
    return found


def climbing(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return the imports that go up in LAYERS, the recipe's apart."""
    rank = {name: place for place, layer in enumerate(LAYERS) for name in layer}
    return {
        (module, used)
        for module, all_used in edges.items()
        for used in all_used
        if rank[package_of(used)] < rank[package_of(module)]
        and not (module.startswith(RECIPE) and used.startswith("hdbcli"))
    }


def circles(edges: dict[str, set[str]]) -> set[str]:
    """Return the packages that import one another in a circle."""
    below: dict[str, set[str]] = {}
    for module, all_used in edges.items():
        if not module.startswith(RECIPE):
            own = below.setdefault(package_of(module), set())
            own.update({package_of(used) for used in all_used} - {package_of(module)})
    while ends := {name for name, used in below.items() if not used & below.keys()}:
        below = {name: used for name, used in below.items() if name not in ends}
    return set(below)


def foreign_to_method(names: set[str]) -> set[str]:
    """Return what the method may not import: all but stdlib, torch, errors and itself."""
    plain = {*sys.stdlib_module_names, "torch"}
    return {
        name
        for name in names
        if name.partition(".")[0] not in plain
        and name != "hdbcli"
        and package_of(name) not in {"registry.errors", "hdbcli.method"}
    }


def voices(tree: ast.Module) -> set[str]:
    """Return which of print and exit a module calls."""
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call for call in calls if call in {"print", "exit", "quit", "sys.exit", "os._exit"}}


def requirements() -> list[Requirement]:
    """Return every direct requirement that pyproject.toml states, tools included."""
    about = project()
    groups = [
        about["project"]["dependencies"],
        *about["project"]["optional-dependencies"].values(),
        *about["dependency-groups"].values(),
    ]
    return [Requirement(text) for group in groups for text in group]


def test_the_checks_below_can_fail() -> None:
    bad = ast.parse(
        "import torchvision.ops\nfrom . import photo\nfrom .lidb import fuse\n"
        "from ..registry import x\nprint(a)\nsys.exit(1)\n"
    )
    names = imports(bad, ("hdbcli", "deep"))
    assert {"torchvision", "hdbcli"} <= tops(names)
    assert {"hdbcli.deep.photo", "hdbcli.deep.lidb.fuse", "hdbcli.registry"} <= names
    assert foreign_to_method({"torch.nn", "math", "hdbcli", "hdbcli.method.basis.digest"}) == set()
    assert len(foreign_to_method({"numpy", "hdbcli.faces.photo", "registry.spec"})) == 3
    assert voices(bad) == {"print", "sys.exit"}
    up, down = ("hdbcli.model.base", "hdbcli.training.refine"), ("hdbcli.cli.main", "hdbcli.api")
    assert climbing({up[0]: {up[1]}, down[0]: {down[1]}}) == {up}
    assert climbing({"registry.spec": {"hdbcli.limits"}, f"{RECIPE}.base": {"hdbcli.limits"}}) == {
        ("registry.spec", "hdbcli.limits")
    }
    there, back = "hdbcli.training.refine", "hdbcli.identity.file"
    assert circles({there: {back}, back: set(), "hdbcli.cli.main": {there}}) == set()
    assert circles({there: {back}, back: {there}}) == {"hdbcli.training", "hdbcli.identity"}


def test_imports_go_down() -> None:
    found = edges()
    assert found["hdbcli.model.base"] >= {"hdbcli.method.lidb", "registry.spec"}  # edges are seen
    assert {package_of(module) for module in found} <= {n for layer in LAYERS for n in layer}
    assert climbing(found) == set()
    assert circles(found) == set()
    foreign = {
        (module_of(path), name)
        for path in MODULES
        for name in foreign_to_method(imports_of(path))
        if package_of(module_of(path)) == METHOD
    }
    assert foreign == set()


def test_import_edges() -> None:
    used = {name_of(path): imports_of(path) for path in (*MODULES, *HEAVY, *TESTS)}
    assert HEAVY and not [path for path in MODULES if "benchmarks" in tops(used[name_of(path)])]
    cli_users = {path for path, names in used.items() if "typer" in tops(names)}
    assert not [path for path in cli_users if not path.startswith(("tests/", EDGE))]
    assert not [path for path, names in used.items() if tops(names) & {"torchvision", "timm"}]


def test_what_is_imported_is_declared() -> None:
    about = project()["project"]
    declared = {Requirement(text).name for text in about["dependencies"]}
    recipe = {Requirement(text).name for text in about["optional-dependencies"]["recipe"]}
    undeclared = {}
    for path in (*MODULES, *HEAVY):
        third_party = tops(imports_of(path)) - {*sys.stdlib_module_names, *PACKAGES, "benchmarks"}
        allowed = declared | recipe if "registry/tiny/recipe" in name_of(path) else declared
        names = {DISTRIBUTIONS.get(name, name) for name in third_party}
        if names - allowed:
            undeclared[name_of(path)] = names - allowed
    assert not undeclared


def test_only_the_edge_prints_or_exits() -> None:
    loud = {name_of(path): voices(tree_of(path)) for path in (*MODULES, *HEAVY)}
    edges = (EDGE, "hdbcli/__main__.py", "registry/tiny/recipe/")
    loud = {path: calls for path, calls in loud.items() if not path.startswith(edges)}
    assert not {path: calls for path, calls in loud.items() if calls}


def test_every_module_says_what_it_is_for() -> None:
    all_modules = (*MODULES, *HEAVY)
    assert not [name_of(path) for path in all_modules if not ast.get_docstring(tree_of(path))]
    lengths = {
        name_of(path): len((ast.get_docstring(tree_of(path)) or "").splitlines())
        for path in all_modules
        if path.name == "__init__.py" and "recipe" not in path.parts and "tiny" not in path.parts
    }
    assert not {name: lines for name, lines in lengths.items() if not 3 <= lines <= 7}


def commands(command: Any, words: tuple[str, ...] = ("hdb",)) -> Iterator[tuple[str, Any]]:
    """Walk a command of the vendored Click down to its leaves; groups are walked, not yielded."""
    if not hasattr(command, "commands"):
        yield " ".join(words), command
        return
    for name, child in command.commands.items():
        if not child.hidden:
            yield from commands(child, (*words, name))


def test_every_command_has_help_and_is_on_its_page() -> None:
    import typer.main

    from hdbcli.cli.main import app

    found = dict(commands(typer.main.get_command(app)))
    assert {"hdb new", "hdb gen", "hdb base list"} <= found.keys()  # the walk sees nested ones too
    assert not [words for words, command in found.items() if not (command.help or "").strip()]
    mute = [
        f"{words} {option.name}"
        for words, command in found.items()
        for option in command.params
        if not getattr(option, "hidden", False) and not getattr(option, "help", None)
    ]
    assert not mute, "options without help"
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert not [words for words in found if not re.search(rf"\b{words}\b", text)]


def test_version_is_one() -> None:
    import hdbcli

    assert project()["project"]["version"] == hdbcli.__version__


def test_constraints_pin_what_pyproject_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    assert all(pin.startswith("==") and "*" not in pin for pin in exact.values())
    for wanted in requirements():
        pin = exact.get(canonicalize_name(wanted.name), "no pin")
        assert pin != "no pin", wanted
        assert wanted.specifier.contains(pin.removeprefix("==")), (str(wanted), pin)


def test_the_wheel_holds_code_and_data() -> None:
    from hatchling.builders.wheel import WheelBuilder

    shipped = {file.relative_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    data = {
        name_of(path)
        for folder in ("hdbcli/faces/assets", "registry/stable_diffusion/configs", "registry/tiny")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipe = {name for name in data if name.startswith("registry/tiny/recipe/")}
    assert recipe and not recipe & shipped
    assert any(name.startswith("hdbcli/faces/assets/") for name in data)
    assert any(name.startswith("registry/tiny/weights/") for name in data)
    assert not (data | {name_of(path) for path in MODULES}) - recipe - shipped
    assert not {name for name in shipped if name.split("/")[0] not in PACKAGES}


def test_notice_names_every_asset_of_others() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    folders = (ROOT / "hdbcli/faces/assets", ROOT / "registry/stable_diffusion/configs")
    assets = [path.name for folder in folders for path in folder.iterdir() if path.is_file()]
    assert "clip_merges.txt.gz" in assets
    assert not [name for name in assets if name not in notice]


def test_ci_runs_the_command_that_readme_gives() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
    assert "make test" in readme()
