"""The house rules: who imports whom, what stays small, what README, NOTICE and the wheel hold."""

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
TESTS = sorted((ROOT / "tests").glob("*.py"))
MATHS = ("basis", "lidb", "hypernet", "relax")
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow"}  # where the names differ

MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 350, 60, 8
EDGE = "hdbcli/cli"  # the modules that know the CLI framework


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


def foreign_to_maths(names: set[str]) -> set[str]:
    """Return what maths may not import: all but stdlib, torch, einops, errors and its peers."""
    ours = {f"hdbcli.{module}" for module in (*MATHS, "errors")}
    plain = {*sys.stdlib_module_names, "torch", "einops"}
    return {
        name
        for name in names
        if name.partition(".")[0] not in plain
        and name != "hdbcli"
        and ".".join(name.split(".")[:2]) not in ours
    }


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(tree: ast.Module) -> dict[str, int]:
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(tree)}
    return {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION}


def wide_signatures(tree: ast.Module) -> dict[str, int]:
    counts = {}
    for node in functions(tree):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        counts[node.name] = len([name for name in names if name not in {"self", "cls"}])
    return {name: count for name, count in counts.items() if count > MAX_PARAMETERS}


def voices(tree: ast.Module) -> set[str]:
    """Return which of print and exit a module calls."""
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call for call in calls if call in {"print", "exit", "quit", "sys.exit", "os._exit"}}


def first_sentence(docstring: str) -> str:
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)[0].rstrip(".")


def file_table(text: str) -> dict[str, str]:
    """Return a page's rows `path` | sentence for the modules of both packages."""
    rows = re.findall(r"^\|?\s*`([\w./]+\.py)`\s*\|\s*(.+?)\s*\|?\s*$", text, re.MULTILINE)
    ours = [(path, line) for path, line in rows if path.split("/")[0] in PACKAGES]
    assert len(ours) == len(dict(ours)), "the table names a file twice"
    return {path: " ".join(line.replace(r"\|", "|").split()).rstrip(".") for path, line in ours}


def needs_row(path: Path) -> bool:
    return path.name != "__init__.py" or any(functions(tree_of(path)))


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
        "from ..registry import x\n"
        "def wide(self, a, b, c, d, e, f, g, *, h, i):\n    print(a)\n    sys.exit(1)\n"
        "def long():\n" + "    a = 1\n" * MAX_FUNCTION
    )
    names = imports(bad, ("hdbcli", "deep"))
    assert {"torchvision", "hdbcli"} <= tops(names)
    assert {"hdbcli.deep.photo", "hdbcli.deep.lidb.fuse", "hdbcli.registry"} <= names
    assert foreign_to_maths({"torch.nn", "math", "hdbcli", "hdbcli.basis.digest"}) == set()
    assert foreign_to_maths({"numpy", "hdbcli.photo", "registry.spec"}) != set()
    assert long_functions(bad) == {"long": MAX_FUNCTION + 1}
    assert wide_signatures(bad) == {"wide": 9}
    assert voices(bad) == {"print", "sys.exit"}
    assert first_sentence("One\nidea. And more.\n\nPaper.") == "One idea"
    assert file_table("| `hdbcli/a.py` | One idea. |\n`registry/b.py` | Two\n| x | y |\n") == {
        "hdbcli/a.py": "One idea",
        "registry/b.py": "Two",
    }


def test_import_edges() -> None:
    used = {name_of(path): imports_of(path) for path in (*MODULES, *TESTS)}
    cli_users = {path for path, names in used.items() if "typer" in tops(names)}
    assert not [path for path in cli_users if not path.startswith(("tests/", EDGE))]
    assert not [path for path, names in used.items() if tops(names) & {"torchvision", "timm"}]
    registry = {path: names for path, names in used.items() if path.startswith("registry/")}
    assert not [path for path, names in registry.items() if "hdbcli" in tops(names)]
    for module in MATHS:
        assert not foreign_to_maths(used[f"hdbcli/{module}.py"]), module


def test_what_is_imported_is_declared() -> None:
    about = project()["project"]
    declared = {Requirement(text).name for text in about["dependencies"]}
    recipe = {Requirement(text).name for text in about["optional-dependencies"]["recipe"]}
    undeclared = {}
    for path in MODULES:
        third_party = tops(imports_of(path)) - set(sys.stdlib_module_names) - set(PACKAGES)
        allowed = declared | recipe if "registry/tiny/recipe" in name_of(path) else declared
        names = {DISTRIBUTIONS.get(name, name) for name in third_party}
        if names - allowed:
            undeclared[name_of(path)] = names - allowed
    assert not undeclared


def test_sizes() -> None:
    over = {}
    for path in (*MODULES, *TESTS):
        name, tree = name_of(path), tree_of(path)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        over.update({name: lines} if lines > MAX_LINES else {})
        over.update({f"{name}:{function}": n for function, n in long_functions(tree).items()})
        # A command's options are its parameters: the CLI framework reads them from the signature.
        wide = {} if name.startswith(EDGE) else wide_signatures(tree)
        over.update({f"{name}:{function}": n for function, n in wide.items()})
    assert not over


def test_only_the_edge_prints_or_exits() -> None:
    loud = {name_of(path): voices(tree_of(path)) for path in MODULES}
    edges = (EDGE, "hdbcli/__main__.py", "registry/tiny/recipe/")
    loud = {path: calls for path, calls in loud.items() if not path.startswith(edges)}
    loud["hdbcli/render.py"] = loud.get("hdbcli/render.py", set()) - {"print"}
    assert not {path: calls for path, calls in loud.items() if calls}


def test_a_page_names_every_module_by_its_own_first_sentence() -> None:
    silent = [name_of(path) for path in MODULES if not ast.get_docstring(tree_of(path))]
    assert not silent, "modules without a docstring"
    wanted = {
        name_of(path): first_sentence(ast.get_docstring(tree_of(path)) or "")
        for path in MODULES
        if needs_row(path)
    }
    assert file_table((ROOT / "docs" / "files.md").read_text(encoding="utf-8")) == wanted


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

    from hdbcli.cli import app

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
        for folder in ("hdbcli/assets", "registry/configs", "registry/tiny")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.startswith("hdbcli/assets/") for name in data)
    assert any(name.startswith("registry/tiny/weights/") for name in data)
    assert not (data | {name_of(path) for path in MODULES}) - shipped
    assert not {name for name in shipped if name.split("/")[0] not in PACKAGES}


def test_notice_names_every_asset_of_others() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    folders = (ROOT / "hdbcli" / "assets", ROOT / "registry" / "configs")
    assets = [path.name for folder in folders for path in folder.iterdir() if path.is_file()]
    assert "clip_merges.txt.gz" in assets
    assert not [name for name in assets if name not in notice]


def test_ci_runs_the_command_that_readme_gives() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
    assert "make test" in readme()
