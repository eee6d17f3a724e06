"""Every command of the benchmarks that a page, a script or a docstring names can be started as it is written."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest

from benchmarks.common.paths import CONFIGS, ROOT
from benchmarks.training.data import ImageNet, ImagesInMemory

#: Modules that can be started, as Python names them.
SCRIPTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
}
SUFFIXES = {".md", ".py", ".yaml", ".sh", ".sbatch", ".toml", ".yml"}
PLACES = ("benchmarks", "lightning_filterdiv", "docs", "tests", "notebooks")
TEXTS = [
    path
    for path in sorted([*ROOT.glob("*.*"), *(path for place in PLACES for path in (ROOT / place).rglob("*.*"))])
    if path.suffix in SUFFIXES and path.name != "CHANGELOG.md"  # tells what was
]
START = re.compile(r"(?:-m (benchmarks(?:\.\w+)+)|benchmarks/slurm/(train|sweep)\.sbatch)(?=[\s`\"']|$)")
NAMED = {"--data": "data", "--model": "model", "--recipe": "recipe", "--methods": "method", "--trainer": "trainer"}


def print_help(module: str, *subcommand: str) -> None:
    """``python -m module --help``, here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [module, *subcommand, "--help"])
        main = importlib.import_module(module).main
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_starts_nothing(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_help(module)
    assert module in capsys.readouterr().out


def commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of every command of the benchmarks in a file."""
    text = re.sub(r"\\+\n(?:# ?)?", " ", path.read_text())
    if path.suffix == ".md":  # a code span may be broken between lines, a block may not
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        text = "\n".join([*blocks, *(" ".join(span.split()) for span in spans)])
    for line in text.splitlines():
        if start := START.search(line):
            module = start[1] or f"benchmarks.training.{start[2]}"
            rest = re.split(r"[`\"]|\s#|;", line[start.end() :])[0]
            yield module, rest.split()


def test_commands_are_found_where_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "Text `python -m\nbenchmarks.cost.overhead` and `python -m benchmarks.training.sweep --seeds 1\n2`:\n"
        "```shell\nsbatch --nodes 2 benchmarks/slurm/train.sbatch \\\n    --data.root x  # comment --y\n```\n"
    )
    assert list(commands(tmp_path / "page.md")) == [
        ("benchmarks.training.train", ["--data.root", "x"]),
        ("benchmarks.cost.overhead", []),
        ("benchmarks.training.sweep", ["--seeds", "1", "2"]),
    ]


WRITTEN = [(path, module, rest) for path in TEXTS if path.suffix != ".py" for module, rest in commands(path)] + [
    (path, module, rest) for path in SCRIPTS.values() for module, rest in commands(path)
]


@pytest.mark.parametrize("module", sorted({module for _, module, _ in WRITTEN}))
def test_options_that_are_written_exist(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_help(module, *(["fit"] if module == "benchmarks.training.train" else []))
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out)) | {"--help"}
    if module == "benchmarks.training.train":  # of the data module that is chosen, which this help leaves out
        known |= {f"--data.{name}" for kind in (ImageNet, ImagesInMemory) for name in signature(kind).parameters}
    for path, named, rest in WRITTEN:
        if named == module:
            unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
            assert not unknown, f"{path}: {module} {' '.join(rest)}"


def test_configurations_that_are_written_exist() -> None:
    checked = 0
    for path, module, rest in WRITTEN:
        option = ""
        for word in rest:
            if word.startswith("--"):
                option = word
            elif module == "benchmarks.training.sweep" and option in NAMED and re.fullmatch(r"\w+", word):
                assert (CONFIGS / NAMED[option] / f"{word}.yaml").exists(), f"{path}: {option} {word}"
                checked += 1
    assert checked > 20


def missing(text: str) -> list[str]:
    """Modules and files of the benchmarks that a text names and that are not there."""
    found = []
    for name in re.findall(r"(?<![\w./])benchmarks((?:\.[a-z_]\w*)+)", text):
        room, *inside = name.strip(".").split(".")
        package = ROOT / "benchmarks" / room
        exported = package / "__init__.py"
        known = package.is_dir() and (
            not inside
            or (package / f"{inside[0]}.py").exists()
            or (exported.exists() and inside[0] in exported.read_text())
        )
        if room != "md" and not known:
            found.append(f"benchmarks{name}")
    paths = re.findall(r"(?<![\w./])benchmarks/[\w./-]+\w", text)
    return found + [name for name in paths if not (ROOT / name).exists() and not re.search(r"[A-Z]{4}", name)]  # RECIPE


def test_modules_and_files_that_are_named_exist() -> None:
    texts = {path: path.read_text() for path in TEXTS if path != Path(__file__)}
    assert sum("benchmarks." in text for text in texts.values()) > 50
    assert {str(path): names for path, text in texts.items() if (names := missing(text))} == {}
    assert missing("benchmarks.train, benchmarks.cost.trace, benchmarks/train.py, benchmarks.models.CifarResNet") == [
        "benchmarks.train", "benchmarks.cost.trace", "benchmarks/train.py",
    ]  # fmt: skip


def test_the_page_names_every_script() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for module in SCRIPTS:
        assert module in page or f"`{module.removeprefix('benchmarks.')}`" in page, module


def run(*command: str, **environment: str) -> str:
    """Output of a process of its own: what other tests have imported is not there."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_method_is_known_to_a_process_that_has_imported_nothing_else(tmp_path: Path) -> None:
    names = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    listed = run(sys.executable, "-m", "benchmarks.training.sweep", "--out", str(tmp_path), "--seeds", "1", "--list",
                 "--methods", *names)  # fmt: skip
    assert listed.splitlines() == [f"{name} seed 1: missing" for name in names]


def test_the_batch_scripts_start_what_they_say(tmp_path: Path) -> None:
    """With a stand-in for ``srun`` that starts one process."""
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    slurm = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable,
             "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "1", "SLURM_NNODES": "3"}  # fmt: skip
    folder = ROOT / "benchmarks" / "slurm"
    grid = ("--methods", "baseline", "soft", "--seeds", "1", "--data", "digits", "--recipe", "quick")
    listed = run("bash", str(folder / "sweep.sbatch"), *grid, "--out", str(tmp_path / "out"), "--list", **slurm)
    assert listed == "soft seed 1: missing\n"
    config = run("bash", str(folder / "train.sbatch"), "-c", str(CONFIGS / "data" / "digits.yaml"), "--print_config",
                 **slurm)  # fmt: skip
    assert "num_nodes: 3" in config
    for script in folder.glob("*.s*"):
        run("bash", "-n", str(script))
