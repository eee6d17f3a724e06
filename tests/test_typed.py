"""Types of the public API, checked in an environment that holds only the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_filterdiv"
SCRIPT = """\
from lightning_filterdiv import BasisOrthonormality, CentripetalSGD, RePr
from lightning_filterdiv.monitor.report import report_layers
from lightning_filterdiv.repr_.schedule import plan_events

RePr(full_epochs="twenty")
RePr(full_epoch=20)
RePr(20)
BasisOrthonormality(form="sort")
CentripetalSGD(keep_fraction={"net.*": 0.5}, strength="auto")
reveal_type(RePr().plan())
reveal_type(CentripetalSGD().forecast)
reveal_type(plan_events(20, 10, 3)[0].epoch)
reveal_type(report_layers({}, 0.9)[0].mergeable)
"""
EXPECTED = {
    5: 'Argument "full_epochs" to "RePr" has incompatible type "str"; expected "int | float"',
    6: 'Unexpected keyword argument "full_epoch" for "RePr"',
    7: 'Too many positional arguments for "RePr"',
    8: 'Argument "form" to "BasisOrthonormality" has incompatible type "Literal[\'sort\']"',
    10: 'Revealed type is "list[dict[str, Any]]"',
    11: 'Revealed type is "dict[str, float]"',
    12: 'Revealed type is "int"',
    13: 'Revealed type is "int"',
}


def _mypy(environment: Path, folder: Path) -> str:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--python-executable", str(environment / "bin" / "python")]
    command += ["--cache-dir", str(folder / "cache"), "--config-file", "", "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_mypy_sees_the_types_of_the_installed_package(tmp_path: Path) -> None:
    venv.create(tmp_path / "env")
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = [line for line in _mypy(tmp_path / "env", tmp_path).splitlines() if line.startswith("script.py")]
    found = {
        int(line.split(":")[1]): line.replace("builtins.", "")
        for line in lines
        if " error: " in line or "Revealed" in line
    }
    assert found.keys() == EXPECTED.keys(), "\n".join(lines)
    for number, message in EXPECTED.items():
        assert message.replace("typing.", "") in found[number].replace("typing.", "")
    (site / PACKAGE.name / "py.typed").unlink()
    assert "py.typed marker" in _mypy(tmp_path / "env", tmp_path)
