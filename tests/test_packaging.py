"""What an installed es2fast consists of, and the versions that the lock file names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("es2fast", "csrc", "requirements", "tests")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in")
BUILT = ("__pycache__", "*.so", "*.pyc")


def files_below(folder: Path) -> set[str]:
    """What a source folder holds, as paths from its parent; nothing that was built there."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder.parent).as_posix()
        for path in found
        if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The files of an sdist, and of the wheel made from it; without a compiler, so nothing is
    compiled."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    environment = os.environ | {"CC": "false", "CXX": "false", "PIP_NO_INDEX": "1"}
    run(["setup.py", "-q", "sdist", "-d", str(folder)], source, environment)
    (archive,) = folder.glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "-q", "-w", str(folder)]
    run(["-m", "pip", "wheel", *options, str(archive)], folder, environment)
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(archive) as tar, zipfile.ZipFile(wheel) as files:
        sdist = {name.partition("/")[2] for name in tar.getnames()}
        return sdist, set(files.namelist())


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_nothing_of_the_package_is_left_out(built: tuple[set[str], set[str]]) -> None:
    """Recipes, presets, templates, prompts and judges' lists too."""
    sdist, wheel = built
    package = files_below(ROOT / "es2fast")
    assert {"es2fast/py.typed", "es2fast/harden/recipes/default.yaml"} <= package
    assert not package - sdist and not package - wheel
    assert any(name.endswith("/NOTICE") for name in wheel) and "NOTICE" in sdist
    assert not any(name.startswith("tests/") for name in sdist)  # a part of them cannot run


@pytest.mark.slow
def test_kernels_are_built_from_the_sdist_and_stay_out_of_the_wheel(
    built: tuple[set[str], set[str]],
) -> None:
    sdist, wheel = built
    assert not files_below(ROOT / "csrc") - sdist
    tops = {name.split("/")[0] for name in wheel}
    assert len(tops) == 2 and "es2fast" in tops  # and its dist-info


def locked() -> dict[str, str]:
    """Name -> version; every line is `name==version` or a comment."""
    found = {}
    for line in (ROOT / "requirements/lock.txt").read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert match, line
            found[canonicalize_name(match[1])] = match[2]
    return found


def test_the_lock_names_a_fitting_version_of_every_dependency() -> None:
    """But of triton, of which each CUDA build of torch asks for one version."""
    versions = locked()
    assert "triton" not in versions
    extras = PROJECT["optional-dependencies"]
    named = [*PROJECT["dependencies"], *extras["test"], *extras["lm-eval"], *extras["inspect"]]
    for line in named:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == "triton":
            continue
        assert name in versions, line
        assert requirement.specifier.contains(versions[name]), f"{line}: {versions[name]}"
