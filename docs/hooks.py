"""Pages that MkDocs makes from files kept elsewhere: README, cards, notebooks, and one reference page per module.

Nothing is imported: public names are read from ``__all__``, so that the site needs neither torch nor a built package.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_filterdiv"
#: Where a file of the repository stands in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/slurm/README.md": "slurm.md",
    **{
        f"lightning_filterdiv/{p.parent.name}/README.md": f"methods/{p.parent.name}.md"
        for p in PACKAGE.glob("*/README.md")
    },
    **{f"notebooks/{p.name}": f"notebooks/{p.stem}.md" for p in (ROOT / "notebooks").glob("*.ipynb")},
}
#: Modules of a room whose names its reference page shows beside those of the room itself.
MORE = {
    "repr_": ("functional", "schedule"),
    "monitor": ("functional", "views", "figures", "history_figures", "comparison", "report", "events"),
}
#: Reference page -> modules whose public names it shows: what users import from. Callbacks have a page of their own.
ROOMS = {
    room: (f"lightning_filterdiv.{room}", *(f"lightning_filterdiv.{room}.{module}" for module in MORE.get(room, ())))
    # Clustering is shown where it stands, not where it is exported once more.
    for room in ["narrowing", "squeezing", *sorted(p.parent.name for p in PACKAGE.glob("*/README.md"))]
}
FRAMEWORK_FREE = (
    "filters",
    "similarity",
    "optimizer_state",
    "tensors.stacking",
    "tensors.randomness",
    "tensors.rank_check",
)
#: Methods of every callback, described once at FilterCallback.
INHERITED = "^(on_|setup$|teardown$|prepare$|release$|reset$|extra_state$|load_extra_state$|choose$|touched_tensors$)"
_NAME_CELL = re.compile(r"(<t[hd][^>]*>)([A-Za-z, ]+)(</t[hd]>)")
_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>(~?)([\w.]+)</code>")
_LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every generated page, its pictures, and the files it links to."""
    extra: dict[str, bytes] = {}
    for source, target in PAGES.items():
        path = ROOT / source
        text = _notebook(path, target, extra) if path.suffix == ".ipynb" else path.read_text()
        extra[target] = _relinked(text, source, target, extra).encode()
    extra |= {f"api/{name}.md": text.encode() for name, text in _reference().items()}
    for uri, content in extra.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links of pages that are kept in ``docs`` lead to pages of the site, as those of generated pages do."""
    uri = page.file.src_uri
    return _relinked(markdown, f"docs/{uri}", uri, {}) if (ROOT / "docs" / uri).exists() else markdown


def on_page_content(html: str, **_: object) -> str:
    """Roles in docstrings become links where their target has a place in the site, else code.

    Names of classes in tables may be broken at their capitals: a table of all callbacks is as wide as a page then.
    """

    def linked(match: re.Match[str]) -> str:
        name = match[2].rpartition(".")[2] if match[1] else match[2]
        return f'<autoref optional identifier="{match[2]}"><code>{name}</code></autoref>'

    def breakable(match: re.Match[str]) -> str:
        return match[1] + re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", match[2]) + match[3]

    return _NAME_CELL.sub(breakable, _ROLE.sub(linked, html))


def _relinked(text: str, source: str, target: str, extra: dict[str, bytes]) -> str:
    """Links between files of the repository become links between pages; other files are copied beside the site."""

    def moved(match: re.Match[str]) -> str:
        label, link, anchor = match[1], match[2], match[3] or ""
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if link.startswith(_PICTURES):
            return match[0]
        if name.startswith("docs/"):
            uri = name.removeprefix("docs/")
        elif name in PAGES:
            uri = PAGES[name]
        else:
            uri = f"files/{name}"
            extra[uri] = (ROOT / name).read_bytes()
        return f"{label}({posixpath.relpath(uri, posixpath.dirname(target))}{anchor})"

    return _LINK.sub(moved, text)


_PICTURES = "pictures-"


def _notebook(path: Path, target: str, extra: dict[str, bytes]) -> str:
    """Markdown of a notebook with its outputs."""
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for index, output in enumerate(cell["outputs"]):
            data: Mapping[str, str | list[str]] = output.get("data", {})
            if "image/png" in data:
                name = f"{_PICTURES}{path.stem}/{number}-{index}.png"
                extra[posixpath.join(posixpath.dirname(target), name)] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _public(module: str) -> list[str]:
    """Public names of a module or a room, without dunder names and constants."""
    path = ROOT.joinpath(*module.split("."))
    stub = path / "__init__.pyi"
    if stub.is_file():
        lines = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
        return sorted((alias.name for node in lines for alias in node.names if not alias.name.isupper()), key=_by_kind)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__") and not name.isupper()]
    raise ValueError(f"{source} has no __all__, so its page of the reference would be empty")


def _by_kind(name: str) -> tuple[bool, str]:
    """Classes before functions, as ``__all__`` sorts them."""
    return not name[0].isupper(), name


def _reference() -> dict[str, str]:
    """Page name -> Markdown; a name is documented once, on the page that comes first."""
    callbacks = _public("lightning_filterdiv")
    pages = {"callbacks": _page("Callbacks", {"lightning_filterdiv": callbacks})}
    seen = set(callbacks)
    for room, modules in ROOMS.items():
        names: dict[str, list[str]] = {}
        for module in modules:
            names[module] = [name for name in _public(module) if name not in seen]
            seen |= set(names[module])
        pages[room] = _page(f"`lightning_filterdiv.{room}`", names)
    names = {f"lightning_filterdiv.{module}": _public(f"lightning_filterdiv.{module}") for module in FRAMEWORK_FREE}
    pages["framework_free"] = _page("Filters, similarity, state", names)
    return pages


def _page(title: str, names: Mapping[str, list[str]]) -> str:
    parts = [f"# {title}"]
    for module, public in names.items():
        if public:
            parts.append(f"Import from `{module}`:")
            parts += [f"::: {module}.{name}{_options(module, name)}" for name in public]
    return "\n\n".join(parts) + "\n"


def _options(module: str, name: str) -> str:
    if module != "lightning_filterdiv" or name == "FilterCallback":
        return ""
    return f"\n    options:\n      filters: ['!^_', '!{INHERITED}']"
