"""tools/reproduce.py: commands that the scripts take, done once and in order; tables and plots of results."""
import dataclasses
import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import training
import vit
from tools import reproduce


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_scripts_take_the_commands_of_all_claims(scale, tmp_path):
    commands, args = {}, SimpleNamespace(out=tmp_path, scale=scale, seeds=2)
    for lab in [reproduce.Lab(claim, args) for claim in reproduce.CLAIMS]:
        assert {len(cells) for cells in lab.table.rows.values()} == {len(lab.table.columns)}
        for name, command in lab.runs.items():
            assert set(re.findall(r"\{out\}/(\S+)/model.pt", command)) <= lab.runs.keys()
            assert commands.setdefault(name, command) == command, name
    assert len({re.sub("--out [^ ]+", "", command) for command in commands.values()}) == len(commands)
    for name, command in commands.items():
        script, *flags = command.split()
        module = importlib.import_module(script.removesuffix(".py"))
        config = training.parse(module.Config, module.PRESETS, flags)
        assert config.out == f"{{out}}/{name}" and config.device == "cpu"
        assert ("--tokenizer" in flags) == (script == "pretrain.py" and config.target == "tokens")


def finish(folder, top1, model):
    """Leave what a run leaves, with made-up numbers."""
    result = {"top1": top1, "mean_iou": top1 / 2, "val_loss": 3.21,
              "top1_by_layer": {"patches": [0.1, 0.2, 0.3, top1], "[S]": [0] * 4}}
    lines = [{"step": step, "loss": 1} | ({"val_top1": step / 100} if step % 2 else {}) for step in range(12)]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "seconds.txt").write_text("30\n30\n")
    torch.save(model, folder / "model.pt")


def test_each_claim_has_a_table_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=4, heads=2)
    model = {"model": vit.MaskedImageModel(config, 4).state_dict(), "kind": "MaskedImageModel",
             "config": {"vit": dataclasses.asdict(config), "vocab_size": 4}}
    args, text = SimpleNamespace(out=tmp_path / "runs", scale="full", seeds=2), {}
    labs = {claim: reproduce.Lab(claim, args) for claim in reproduce.CLAIMS}
    for name in {name for lab in labs.values() for name in lab.runs}:
        finish(args.out / name, 0.8 if "-1-" in name else 0.7, model)  # seed 1; the others
    for claim, lab in labs.items():
        reproduce.report(claim, args)
        text[claim] = (tmp_path / f"figures/reproduce-{claim}.md").read_text()
        runs = {"ablations": 4, "probe": 1, "attention": 1, "tune": 1}.get(claim, 2)
        assert (f"deviation of {runs} runs" in text[claim]) == (runs > 1)
        assert f"{len(lab.runs)} runs, {len(lab.runs)} minutes of one core" in text[claim]
        assert (tmp_path / f"figures/reproduce-{claim}.png").stat().st_size > 5000
    assert "| − blockwise masking | 75.0 ± 5.8 | 82.77 | 37.5 ± 2.9 | 42.93 |" in text["ablations"]
    assert "| pre-trained | 1.00 ± 0.00 | 3.00 ± 0.00 | 5.00 ± 0.00 | 7.00" in text["convergence"]
    assert "| 96,000 | 3.21 | 75.0 ± 7.1 | 82.86 (300 epochs) |" in text["longer"]
    assert "| linear probe, random weights | 10.0 | 20.0 | 30.0 | 70.0 |" in text["probe"]
    assert "| from scratch | 70.0 | 70.0 | 70.0 | 70.0 | 0.001 |" in text["tune"]
    assert len(reproduce.plot(reproduce.Lab("tune", args).table).legends[0].get_texts()) == 14    # each row
    assert re.search(r"\| 12,800 images seen \| [01]\.\d\d \|", text["attention"])    # near 1: random


SCRIPT = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[2])
time.sleep(int(sys.argv[4]) // 10)
print(1 / int(sys.argv[4]))
open(out.parent / "order", "a").write(out.name + " ")
(out / "result.json").write_text("{}")
"""


def test_runs_are_done_once_after_what_they_start_from(tmp_path, monkeypatch):
    for script in ("pretrain.py", "finetune.py"):
        (tmp_path / script).write_text(SCRIPT)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    args = SimpleNamespace(out=tmp_path / "runs", data_root="data", jobs=2)
    runs = {"last": "finetune.py --out {out}/last --number 1 --init {out}/first/model.pt",
            "first": "pretrain.py --out {out}/first --number 1"}
    for command in (runs["last"], runs["last"], runs["last"].replace("number 1", "number 2")):
        reproduce.execute({**runs, "last": command}, args)
    assert (args.out / "order").read_text() == "first last last "      # other flags: the script decides
    broken = {"slow": "pretrain.py --out {out}/slow --number 600",    # seconds times 10
              "broken": "pretrain.py --out {out}/broken --number 0",
              "after": "finetune.py --out {out}/after --number 1 --init {out}/broken/model.pt"}
    with pytest.raises(ChildProcessError, match="broken: status 1, ZeroDivisionError.*broken/log.txt"):
        reproduce.execute(broken, args)
    assert not (args.out / "after").exists() and not (args.out / "slow/result.json").exists()


@pytest.mark.parametrize("flags, words", [
    ("all --list --scale full", "mask-ratio: How much is masked.*runs to do, 2 at a time: about"),
    ("--help", "75 %"), ("everything", "argument claim: invalid choice: 'everything'"),
    ("probe --seeds 0", "error: --seeds, --jobs: at least 1, not 0")])
def test_command_lines_that_run_nothing(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags.split(), "--jobs", "2"])
    try:
        reproduce.main()
    except SystemExit as end:
        assert end.code == (0 if flags == "--help" else 2)
    assert re.search(words, "".join(capsys.readouterr()), re.DOTALL) and not list(tmp_path.iterdir())
