"""What the built distributions must and must not hold: python .ci/check_dist.py FOLDER."""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Raise AssertionError, with the names, if something is missing or too much."""
    folder = Path(sys.argv[1])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert f"-{version}-" in wheel.name, wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"lightning_filterdiv-{version}.dist-info"
    package = ROOT / "lightning_filterdiv"
    sources = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.pyi", "*.json") for path in package.rglob(kind)}
    cards = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_filterdiv").rglob("README.md")}
    wanted = sources | cards | {"lightning_filterdiv/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
    assert wanted <= names, f"the wheel lacks {sorted(wanted - names)}"
    extra = {name for name in names - wanted if not name.startswith(info)}
    assert not extra, f"the wheel also holds {sorted(extra)}"
    root = f"lightning_filterdiv-{version}/"
    with tarfile.open(sdist) as archive:
        packed = {name.removeprefix(root) for name in archive.getnames()}
    wanted = sources | cards | {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"}
    wanted |= {"pyproject.toml", "mkdocs.yml", "docs/hooks.py", "tests/registry.py", "notebooks/execute.py"}
    assert wanted <= packed, f"the sdist lacks {sorted(wanted - packed)}"
    unwanted = {name for name in packed if "__pycache__" in name or name.startswith(("build/", ".venv"))}
    assert not unwanted, f"the sdist also holds {sorted(unwanted)[:5]}"
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(packed)} files, {sdist.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
