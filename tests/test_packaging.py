"""Consistent requirements, the Python that make chooses, and the installed package."""

import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import shared
from tests.shared import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def pins(file: Path) -> dict[str, str]:
    """The versions that a requirements file and the files it includes pin, by name."""
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found |= pins(file.parent / text.removeprefix("-r "))
        elif text:
            requirement = Requirement(text)
            [version] = requirement.specifier
            assert version.operator == "==", f"{file.name}: {line}"
            found[canonicalize_name(requirement.name)] = version.version
    return found


def all_pins() -> dict[str, str]:
    """The versions that all requirements files pin; asserts that they agree."""
    found: dict[str, str] = {}
    for file in sorted(ROOT.glob("requirements*.txt")):
        for name, version in pins(file).items():
            assert found.setdefault(name, version) == version, f"{file.name}: {name}"
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_pinned_versions_are_in_the_ranges(group: str) -> None:
    pinned = all_pins()
    for requirement in map(Requirement, GROUPS[group]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_everything_the_predictor_needs_is_pinned_for_the_image_and_nothing_else() -> None:
    needed = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert set(pins(ROOT / "requirements.txt")) == needed


def test_cogs_version_is_pinned_in_cog_yaml() -> None:
    build = yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]
    # Cog warns at every build if the requirements of the image also name a version of cog.
    assert "cog" not in pins(ROOT / build["python_requirements"])
    assert pins(ROOT / "requirements-serve.txt")["cog"] == build["sdk_version"]


def test_the_pinned_versions_satisfy_each_others_requirements() -> None:
    pinned, absent, seen = all_pins(), set(), set()
    listed = [Requirement(text) for group in GROUPS.values() for text in group]
    waiting = [("pyproject.toml", item) for item in listed if item.marker is None or item.marker.evaluate()]
    while waiting:
        owner, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            version = pinned.get(name) or metadata.version(name)
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{owner}: {requirement}, {version}"
            )
            if (name, *sorted(requirement.extras)) not in seen:
                seen.add((name, *sorted(requirement.extras)))
                waiting += ((name, needed) for needed in needs(requirement))
        except metadata.PackageNotFoundError:
            absent.add(name)
    if absent:
        pytest.skip(f"not installed, so not checked: {', '.join(sorted(absent))}")


def needs(requirement: Requirement) -> Iterator[Requirement]:
    """The requirements of an installed package on this machine, from its metadata."""
    for text in metadata.requires(requirement.name) or ():
        needed = Requirement(text)
        extras = requirement.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            yield needed


def stub(folder: Path, name: str, version: tuple[int, int], *, works: bool = True) -> None:
    """A command that behaves like the given version of Python and creates empty environments."""
    path = folder / name
    path.write_text(
        f"#!/bin/sh\n{'' if works else 'exit 127'}\n"
        f'case "$1" in\n'
        f'-c) code=$(printf "%s" "$2" | sed "s/sys.version_info\\[:2\\]/{version}/"); '
        f'exec "{sys.executable}" -c "$code";;\n'
        f'--version) echo "{name} it was";;\n'
        '*) for last; do :; done; mkdir -p "$last";;\n'
        "esac\n"
    )
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"python3": (3, 13)}, "python3"),
        ({"python3": (3, 14), "python3.12": (3, 12)}, "python3.12"),
        ({"python3.11": None, "python3.13": (3, 13), "python3": (3, 12)}, "python3.13"),
        ({"python3.11": (3, 11), "python3.12": (3, 12)}, "python3.11"),
        ({"python3": (3, 10)}, None),
        ({"python3": (3, 14)}, None),
        ({}, None),
    ],
)
def test_make_uses_the_first_suitable_python(
    tmp_path: Path, found: dict[str, tuple[int, int] | None], chosen: str | None
) -> None:
    commands, environment = tmp_path / "bin", tmp_path / "environment"
    commands.mkdir()
    for tool in ("make", "sh", "mkdir", "touch", "sed"):
        [real] = [path for folder in os.get_exec_path() if (path := Path(folder, tool)).exists()][:1]
        (commands / tool).symlink_to(real)
    for name, version in found.items():
        stub(commands, name, version or (3, 11), works=version is not None)
    run = subprocess.run(
        ["make", "--no-print-directory", f"VENV={environment}", "PYTHON3=", f"{environment}/.made"],
        cwd=ROOT, env={"PATH": str(commands)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (run.returncode == 0) == (environment / ".made").exists() == (chosen is not None), run.stderr
    if chosen is None:
        assert "Python 3.11, 3.12 or 3.13 with venv is needed" in run.stderr
    else:
        assert f"{chosen} it was" in run.stdout


class Installed:
    """The package installed in its own environment, run from a folder outside the checkout."""

    def __init__(self, folder: Path) -> None:
        self.environment, self.elsewhere, self.cache = folder / "venv", folder / "elsewhere", folder / "cache"
        self.elsewhere.mkdir()

    def run(self, command: str, *arguments: str) -> str:
        """Runs a command of the environment and returns its output."""
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CODEFORMER_", "PYTHON", "XDG_"))
        }
        run = subprocess.run(
            [str(self.environment / "bin" / command), *arguments],
            cwd=self.elsewhere, env=variables | {"XDG_CACHE_HOME": str(self.cache)},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed in addition to the packages that the tests run with."""
    folder = tmp_path_factory.mktemp("installed")
    package = Installed(folder)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)]
    venv.create(package.environment, symlinks=True)
    for command in (
        [*pip, *build],
        [*pip, "--python", str(package.environment / "bin" / "python"), "install", "--no-deps", "--no-index"],
    ):
        wheels = [str(wheel) for wheel in folder.glob("codeformer-*.whl")]
        run = subprocess.run(
            [*command, *wheels], cwd=folder, capture_output=True, text=True, timeout=200, check=False
        )
        assert run.returncode == 0, run.stderr
    [site] = package.environment.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages_of_the_tests.pth").write_text("\n".join(packages))
    return package


def test_an_installed_package_has_its_command_and_its_weights(installed: Installed) -> None:
    assert installed.run("codeformer", "--help").startswith("usage: codeformer ")
    listed = installed.run("codeformer", "weights", "list", "lite").splitlines()
    assert [line.split()[4] for line in listed[1:]] == ["verified"] * 3
    everything = installed.run("codeformer", "weights", "list")
    assert "official (in use)" in everything
    assert "lite: " in everything
    assert everything.count(" missing ") == 3


def test_an_installed_package_downloads_into_the_users_cache(installed: Installed) -> None:
    code = (
        "from codeformer.weights.manifest import load_weight_set as load\n"
        "for name in ('official', 'lite'):\n"
        "    for _, file in load(name).files(): print(file.path)\n"
        "print(load('official').restorer.remedy)"
    )
    *paths, remedy = installed.run("python", "-c", code).splitlines()
    official = installed.cache / "codeformer" / "weights" / "official"
    assert [Path(path).parent for path in paths[:3]] == [official] * 3
    for path in map(Path, paths[3:]):
        assert path.is_relative_to(installed.environment)
        assert path.is_file()
    assert "weights fetch official`" in remedy


@pytest.mark.slow
def test_an_installed_package_restores_its_sample_portrait(installed: Installed) -> None:
    code = "from codeformer.serving import request as r; print(r.SAMPLES / '1.jpg', r.__file__)"
    sample, module = map(Path, installed.run("python", "-c", code).split())
    assert sample.is_relative_to(installed.environment)
    assert module.is_relative_to(installed.environment)
    page = installed.run("codeformer", "compare", str(sample), "--weights", "lite", "--fidelities", "1")
    assert page == "comparison.html: 1 recipe on 1 photo\n"
    code = "from codeformer.demo import views; print((views.STATIC / 'page.js').is_file())"
    assert installed.run("python", "-c", code) == "True\n"
    said = installed.run("codeformer", "restore", str(sample), "-o", "results", "--weights", "lite")
    assert "(1 face)" in said
    assert "\nVERIFIED: " in installed.run("codeformer", "verify-official", "--weights", "lite")
    before = shared.read_picture(ROOT / "data" / "1.jpg").astype(float)
    after = shared.read_picture(installed.elsewhere / "results" / "1.jpg").astype(float)
    assert before.shape == after.shape == (832, 640, 3)
    # The face was restored, and the border of the picture was not changed.
    assert abs(after - before).max() > 30
    assert abs(after - before)[:, :20].mean() < 3
