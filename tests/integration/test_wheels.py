"""What each side installs: the training environment has no database or web library, the service side no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from programs import ROOT, environment

FOLDERS = ("fp8core", "protos", "agent", "collector", "dashboard")
OURS = {"fp8core", "fp8scope-protos", "fp8scope-agent", "fp8scope-collector", "fp8scope-dashboard"}

# Imports every module of a package; of the other installed distributions it sees only those named. (The Triton
# kernels are imported on a GPU only, where torch brings triton; adapters' and callbacks' libraries are the user's.)
IMPORT_ALL = """
import importlib, importlib.abc, importlib.metadata, pkgutil, sys

package, allowed = sys.argv[1], set(sys.argv[2].split(","))
owners = importlib.metadata.packages_distributions()
normal = lambda name: name.lower().replace("_", "-").replace(".", "-")

class Fence(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top in owners and not allowed & {normal(owner) for owner in owners[top]}:
            raise ModuleNotFoundError(f"{name} is not in this environment", name=name)
        return None

sys.meta_path.insert(0, Fence())
root = importlib.import_module(package)
for module in pkgutil.walk_packages(root.__path__, package + "."):
    if not module.name.endswith("__main__") and ".versions." not in module.name and ".triton" not in module.name:
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            extras = ("torchao", "nvdlfw_inspect", "transformers", "lightning", "clickhouse_connect", "pandas")
            if error.name.partition(".")[0] not in extras:
                raise
print(len(sys.modules), "modules")
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The five wheels, built from the folders, by folder."""
    out = tmp_path_factory.mktemp("wheels")
    for folder in FOLDERS:
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT / folder)],
            check=True,
            capture_output=True,
            timeout=120,
        )
    built = {wheel.name.split("-")[0]: wheel for wheel in out.glob("*.whl")}
    return {folder: built[folder if folder == "fp8core" else f"fp8scope_{folder}"] for folder in FOLDERS}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    return [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]


def environment_of(wheels: dict[str, Path], folder: str) -> set[str]:
    """Names of all distributions that installing `folder`'s wheel brings, itself included."""
    by_name = {normal(wheel.name.split("-")[0]): wheel for wheel in wheels.values()}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(normal(wheels[folder].name.split("-")[0]), frozenset[str]())]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name in by_name:
            wanted = requirements(by_name[name])
        else:
            try:
                wanted = [Requirement(text) for text in distribution(name).requires or []]
            except PackageNotFoundError:
                continue  # for another platform
        for requirement in wanted:
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((normal(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in seen}


@pytest.mark.parametrize(
    ("folder", "packages", "absent"),
    [
        ("agent", ["fp8core", "fp8scope_agent"], {"streamlit", "sqlalchemy", "plotly", "prometheus-client", "alembic"}),
        ("collector", ["fp8scope_collector"], {"torch", "triton", "streamlit", "plotly"}),
        ("dashboard", ["fp8scope_dashboard"], {"torch", "triton"}),
    ],
)
def test_an_environment_has_what_its_modules_import_and_not_the_other_sides_libraries(
    folder: str, packages: list[str], absent: set[str], wheels: dict[str, Path]
) -> None:
    installed = environment_of(wheels, folder)

    assert not installed & absent
    for package in packages:
        done = subprocess.run(
            [sys.executable, "-c", IMPORT_ALL, package, ",".join(sorted(installed | {"setuptools"}))],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_wheel_carries_one_package_with_all_its_files(folder: str, wheels: dict[str, Path]) -> None:
    package = "fp8core" if folder == "fp8core" else f"fp8scope_{folder}"
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", package]
    tracked = subprocess.run(list_files, cwd=ROOT / folder, check=True, capture_output=True, text=True)

    with zipfile.ZipFile(wheels[folder]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert packed == set(tracked.stdout.split())
