"""Every code block of README and method cards runs; every command in them exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line.options import parse

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "lightning_filterdiv").rglob("README.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *CARDS,
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(language, text, id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in BLOCK.finditer(page.read_text())
    for language, text in [match.groups()]
]


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_code_block(language: str, text: str, tmp_path: Path) -> None:
    if language == "python":
        exec(compile(text, "block", "exec"), {"__name__": "__main__"})
    elif language == "yaml":
        config = yaml.safe_load(text)
        config.setdefault("model", {"class_path": "lightning_filterdiv.demo.SmallConvNet"})
        config.setdefault("data", "lightning_filterdiv.demo.Digits")
        config["trainer"] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1} | config["trainer"]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.fast_dev_run", "true"]) == 0
    elif language == "shell":
        for line in text.replace("\\\n", " ").strip().splitlines():
            assert _known(line), line
    else:
        assert language == "text", f"no test knows how to run {language!r} blocks"


def _known(line: str) -> bool:
    """Whether a shell line names things that exist; the two set-up commands are run by the CI script itself."""
    words = shlex.split(line.split("&&")[-1], comments=True)
    if len(words) == 1 and re.fullmatch(r"\w+=\S+", words[0]):  # a variable, used in the lines below it
        return (ROOT / words[0].partition("=")[2]).exists()
    for module in (words[at + 1] for at, word in enumerate(words[:-1]) if word == "-m" and words[0] == "torchrun"):
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists(), module
    for config in (word.removeprefix("$C/") for word in words if word.startswith("$C/")):
        assert (ROOT / "benchmarks" / "configs" / config).exists(), config
    words = words[2:] if words[:2] == ["uv", "run"] else words
    words = words[2:] if words[0] == "--group" else words
    words = words[1:] if words[0] == "--no-dev" else words
    if words[0] == "filterdiv" and words[1] in {"compare", "demo", "inspect"}:
        parse(words[1:])
        return True
    if words[:2] == ["python", "-m"]:
        return (ROOT / Path(*words[2].split("."))).with_suffix(".py").exists()
    if words[0] == "python":
        return (ROOT / words[1]).exists()
    if words[0] == "sbatch":
        return any((ROOT / word).exists() for word in words if word.endswith(".sbatch"))
    outside = {
        "export",
        "filterdiv",
        "lint-imports",
        "mkdocs",
        "mypy",
        "pip",
        "pytest",
        "srun",
        "tensorboard",
        "torchrun",
    }
    return words[0] in outside or (ROOT / words[0]).exists()


def test_pages_name_no_machine() -> None:
    """Documentation and code speak of the project, not of the machine it was written on."""
    for path in [
        *PAGES,
        *ROOT.glob("*.*"),
        *ROOT.glob("lightning_filterdiv/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
        *ROOT.glob("docs/*.py"),
        *ROOT.glob("notebooks/*.*"),
    ]:
        if path.is_file() and path.name not in {"uv.lock", ".git"}:  # of a worktree, .git is a file
            assert not re.search(r"/(work|root|home)/", path.read_text()), path


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


CARD = ["Trainer", "YAML", "Arguments", "Pitfalls and costs", "Results", "Plain PyTorch", "Mathematics", "Attribution"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_cards_have_one_order(card: Path) -> None:
    """A reader who knows one finds the same thing in the same place of every other."""
    wanted = CARD
    if card.parent.name == "channel_graph":  # no callback
        wanted = ["Plain PyTorch", *(h for h in CARD[3:] if h != "Plain PyTorch")]
    text = card.read_text()
    assert [heading for heading in re.findall(r"^## (.+)$", text, re.MULTILINE) if heading in CARD] == wanted
    assert len(text.splitlines()) <= 150
    before = text.partition("\n## ")[0]
    assert re.match(r"# .+\n\n[*`]*\w", before), "the verdict stands below the title"
    assert "```text" in before or "![" in before


def test_tables_are_those_of_the_result_files() -> None:
    from benchmarks.tables import cards

    assert list(cards.stale()) == [], "run python -m benchmarks.tables.cards"
