"""The tested window is stated once, kept, and a version outside it is warned about."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning
import pytest
import torch

from lightning_filterdiv.training import versions
from lightning_filterdiv.training.versions import TESTED, check_versions, warn_once_about_versions

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _release(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    assert found is not None
    return int(found[1]), int(found[2])


def test_what_runs_here_is_in_the_window() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once_about_versions.__wrapped__()
        check_versions({"torch": torch.__version__, "lightning": lightning.__version__})


@pytest.mark.parametrize("package", TESTED)
def test_the_window_is_that_of_the_project_and_of_the_readme(package: str) -> None:
    low, high = TESTED[package]
    (bound,) = [entry for entry in PROJECT["project"]["dependencies"] if re.match(rf"{package}>=", entry)]
    (pinned,) = [c for c in PROJECT["tool"]["uv"]["constraint-dependencies"] if c.startswith(f"{package}==")]
    assert _release(bound) == low
    assert _release(pinned) == high
    assert f"{package} {low[0]}.{low[1]} to {high[0]}.{high[1]}" in (ROOT / "docs" / "support.md").read_text()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"torch": "2.5.1+cu121"}, "tested with torch 2.6 to 2.15, this is 2.5.1+cu121: install torch>=2.6"),
        (
            {"torch": "3.0.0a0"},
            "tested with torch 2.6 to 2.15, this is 3.0.0a0: if a callback misbehaves, try one of these",
        ),
        ({"lightning": "2.7.0.dev1"}, "tested with lightning 2.5 to 2.6, this is 2.7.0.dev1"),
    ],
)
def test_outside_it_there_is_a_warning(found: dict[str, str], message: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(message)):
        check_versions(found)


@pytest.mark.parametrize("version", ["2.6.0", "2.15.9+cpu", "2.10", "local"])
def test_inside_it_there_is_none(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions({"torch": version})


@pytest.fixture
def first_call() -> Iterator[None]:
    """As in a process where nobody has called it."""
    warn_once_about_versions.cache_clear()
    yield
    warn_once_about_versions.cache_clear()


@pytest.mark.usefixtures("first_call")
def test_what_is_installed_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", {"torch": "2.5.1", "lightning": "2.7.0"}.__getitem__)
    with pytest.warns(UserWarning, match="tested with") as caught:
        warn_once_about_versions()
    assert [re.search(r"this is (\S+):", str(entry.message))[1] for entry in caught] == ["2.5.1", "2.7.0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once_about_versions()


@pytest.mark.usefixtures("first_call")
def test_a_package_that_no_installer_recorded_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "torch":
            raise versions.PackageNotFoundError(package)
        return "2.7.0"

    monkeypatch.setattr(versions, "version", version)
    with pytest.warns(UserWarning, match=r"tested with lightning .* this is 2\.7\.0") as caught:
        warn_once_about_versions()
    assert len(caught) == 1


def test_the_check_imports_neither_torch_nor_lightning() -> None:
    script = (
        "import sys; from lightning_filterdiv.training.versions import warn_once_about_versions as warn; warn(); "
        "sys.exit(bool({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
