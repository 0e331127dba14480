"""The house as the README draws it: where things are, what imports what, what gets installed."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fastdpo

ROOT = Path(__file__).parents[1]
KERNELS_MAY_IMPORT = {"torch", "triton", "dataclasses", "functools", "math", "pathlib", "typing"}
PUBLIC_KERNELS = {f"fastdpo.kernels.{name}" for name in ("linear_logps", "pair_loss", "reference")}


def python(code, *flags, pythonpath=(), cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, pythonpath))}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def imported(path):
    """What a module imports when it runs: what annotations alone need is left out."""
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [node for node in tree.body if not is_type_checking(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_kernels_is_no_package_of_its_own():
    # with an __init__.py it would hide Hugging Face's package `kernels` from transformers
    assert not (ROOT / "kernels/__init__.py").exists()
    link = ROOT / "fastdpo/kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_transformers_finds_its_own_package_kernels_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("REAL = True\n__version__ = '0.99.0'\n")
    done = python(
        "import kernels; assert kernels.REAL\n"
        "import transformers\n"
        "from transformers import AutoModelForCausalLM\n"
        "import fastdpo.kernels.reference as ours\n"
        "assert ours.linear_logps",
        pythonpath=[tmp_path],
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_stand_alone():
    """They import each other's parts, and neither the engine nor a public kernel."""
    for path in (ROOT / "kernels").glob("*.py"):
        names = set(imported(path))
        ours = {name for name in names if name.split(".")[0] == "fastdpo"}
        assert not [name for name in ours if not name.startswith("fastdpo.kernels")], path
        assert not ours & PUBLIC_KERNELS, path
        modules = {name.split(".")[0] for name in names - ours}
        assert modules <= KERNELS_MAY_IMPORT, path
        if path.name == "reference.py":
            assert modules == {"torch", "math"}


def groups():
    """The modules of each group of fastdpo/README.md, from top to bottom."""
    found = []
    for line in (ROOT / "fastdpo/README.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and "`" in cells[2]:
            found += [[]] if cells[1] else []
            found[-1] += re.findall(r"`(\w+)`", cells[2])
    return found


def test_a_module_imports_of_its_group_and_those_below():
    group_of = {name: g for g, group in enumerate(groups()) for name in group}
    assert group_of.keys() == {path.stem for path in (ROOT / "fastdpo").glob("*.py")} - {"__init__"}
    graph = {}
    for module, group in group_of.items():
        names = [name.split(".") for name in imported(ROOT / f"fastdpo/{module}.py")]
        of_fastdpo = {name[1] for name in names if name[0] == "fastdpo" and len(name) > 1}
        graph[module] = of_fastdpo & group_of.keys()
        for other in graph[module]:
            assert group_of[other] >= group, f"{module} imports {other}"
    TopologicalSorter(graph).prepare()  # CycleError where modules import each other


def test_every_lower_bound_is_a_version_that_the_tests_ran_with():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    lines = (ROOT / "bench/results/versions.md").read_text("utf-8").splitlines()
    names, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines if "|" in line)
    ran = {name: [row[column] for row in rows] for column, name in enumerate(names)}
    wanted = ["Python" + declared["project"]["requires-python"]]
    wanted += declared["project"]["dependencies"] + declared["build-system"]["requires"]
    for requirement in wanted:
        name, _, bound = requirement.split(";")[0].partition(">=")
        assert not bound or any(f"{version}.".startswith(f"{bound}.") for version in ran[name]), (
            f"want {requirement} among the versions of {name} in versions.md, got {ran.get(name)}"
        )


def test_every_pin_is_there_for_the_oldest_python():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    oldest = declared["project"]["requires-python"].removeprefix(">=")
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    for pin in (Requirement(line) for line in lines if not line.startswith("#")):
        if pin.marker and not pin.marker.evaluate({"python_version": oldest}):
            continue
        for found in distributions(name=pin.name):
            if found.version in pin.specifier:
                wanted = SpecifierSet(found.metadata["Requires-Python"] or "")
                assert f"{oldest}.0" in wanted, f"{pin} wants Python {wanted}"


def build(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    command += ["--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is installed: building writes beside what it builds."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "fastdpo", "kernels"):
        subprocess.run(["cp", "-RP", str(ROOT / name), str(folder)], check=True)
    return folder


def test_a_wheel_holds_the_kernels(checkout, tmp_path):
    build("wheel", str(checkout), "--wheel-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"fastdpo-{fastdpo.__version__}-")  # written once, there
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("linear_logps", "vocabulary_walk", "pair_loss", "closed_forms", "reference"):
        assert f"fastdpo/kernels/{name}.py" in names
    assert "fastdpo/py.typed" in names and not any(n.startswith("kernels/") for n in names)


def test_an_editable_install_reaches_the_kernels(checkout, tmp_path):
    build("install", "--editable", str(checkout), "--target", str(tmp_path / "site"))
    done = python(
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('fastdpo.kernels.reference').origin)",
        "-S",  # without the site-packages of this run, where fastdpo may be installed too
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(checkout))
