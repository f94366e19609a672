"""README and docs: what they name exists."""
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = "masking|vit|dvae|pretrain|finetune|visualize|data|training|weights"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_links_and_figures_exist(page):
    text = page.read_text()
    for name in re.findall(rf"`((?:{MODULES})\.[A-Za-z]\w*(?:\.\w+)*)", text):
        module, *rest = name.split(".")
        if rest != ["py"]:
            reduce(getattr, rest, importlib.import_module(module))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", text))
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """Each --flag that is named is one of a script here, or of torchrun, pip or a shell."""
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")])
    others = {"--help", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--max-restarts",
              "--index-url"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text())) - others:
        name = flag[2:].removeprefix("no-").replace("-", "_")
        assert re.search(rf'"{flag}"|\n    {name}: Annotated|\n    {name}: |"{name}"', sources), flag


def test_figures_are_small_and_shown():
    """Plots of claims stand beside their tables."""
    shown = "".join(page.read_text() for page in PAGES)
    for figure in Path(ROOT / "figures").glob("*.png"):
        assert figure.stat().st_size < 300_000, figure.name
        assert figure.name in shown or figure.with_suffix(".md").exists(), figure.name
