"""README and docs: what they name exists."""
import dataclasses
import importlib
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import vit
from shapes import Shapes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = "pretrain|train_dvae|finetune|segment|probe|visualize"
MODULES = "|".join(path.stem for path in ROOT.glob("*.py"))


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
        positive = flag.replace("--no-", "--")                         # of argparse.BooleanOptionalAction
        assert f'"{flag}"' in sources or f'"{positive}"' in sources, flag


def test_figures_are_small_and_shown():
    """Plots of claims stand beside their tables."""
    shown = "".join(page.read_text() for page in PAGES)
    for figure in Path(ROOT / "figures").glob("*.png"):
        assert figure.stat().st_size < 300_000, figure.name
        assert figure.name in shown or figure.with_suffix(".md").exists(), figure.name


def test_tables_of_claims_are_shown_as_they_were_written():
    results = (ROOT / "docs/results.md").read_text()
    for file in Path(ROOT / "figures").glob("reproduce-*.md"):
        command, table = file.read_text().split("\n\n")
        assert command.startswith("`python -m tools.reproduce"), file.name
        assert command in results and table in results or f"../figures/{file.name})" in results, file.name


def commands(text):
    """(script, flags) of each command of a training script or of visualize.py in a page."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in lines:
        found = re.match(rf"(?:python|torchrun|…)(?: [^#]*?)? ?({SCRIPTS})\.py\b([^#]*)", line)
        if found and line != "python visualize.py":                    # the head of a table
            yield found[1], shlex.split(found[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page):
    """By the parsers; what needs no other data runs in CI."""
    for script, flags in commands(page.read_text()):
        module = importlib.import_module(script)
        if script == "visualize":
            module.parse_args(flags)
        else:
            module.parse_args(flags)


def test_commands_are_found():
    found = [command for page in PAGES for command in commands(page.read_text())]
    assert len(found) > 50 and {script for script, _ in found} == set(SCRIPTS.split("|"))


def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    """Those of the README, for a masked image model and five image files."""
    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=3, heads=2)
    model = vit.MaskedImageModel(config, 8)
    (tmp_path / "runs/pretrain-shapes").mkdir(parents=True)
    torch.save({"model": model.state_dict(), "config": {"vit": dataclasses.asdict(config), "vocab_size": 8},
                "kind": "MaskedImageModel"}, tmp_path / "runs/pretrain-shapes/model.pt")
    for index, name in enumerate("abcde"):
        Shapes("val")[index][0].save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    exec(lines, found := {})
    pixels = torch.stack([found["images"][k] for k in range(5)])
    expected = F.normalize(model.eval().norm(model.hidden_states(pixels)[2])[:, 1:].mean(dim=1), dim=1)
    assert torch.allclose(found["features"], expected, atol=1e-6) and "1.0000" in capsys.readouterr().out
