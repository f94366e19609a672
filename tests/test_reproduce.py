"""tools/reproduce.py: commands that the scripts take, executed once and in order; tables and plots."""
import dataclasses
import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import shapes
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
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert args.out == f"{{out}}/{name}" and args.device == "cpu" and args.preset == "demo"
        assert ("--tokenizer" in flags) == (script == "pretrain.py" and args.target == "tokens")


def write_run(folder, command, top1, model):
    """Write what a finished run leaves in its folder, with invented numbers."""
    result = {"top1": top1, "mean_iou": top1 / 2, "val_loss": 3.21,
              "top1_by_layer": {"patches": [0.1, 0.2, 0.3, top1], "[S]": [0] * 4}}
    lines = [{"step": step, "loss": 1} | ({"val_top1": step / 100} if step % 2 else {}) for step in range(12)]
    folder.mkdir(parents=True)
    (folder / "command.txt").write_text(command)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "seconds.txt").write_text("30\n30\n")
    torch.save(model, folder / "model.pt")


@pytest.mark.long
def test_each_claim_has_a_table_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = vit.ViTConfig(image_size=64, patch_size=16, dim=8, depth=4, heads=2)
    model = {"model": vit.MaskedImageModel(config, 4).state_dict(), "kind": "MaskedImageModel",
             "config": {"vit": dataclasses.asdict(config), "vocab_size": 4}}
    args, text = SimpleNamespace(out=tmp_path / "runs", scale="full", seeds=2), {}
    labs = {claim: reproduce.Lab(claim, args) for claim in reproduce.CLAIMS}
    for name, command in {name: lab.runs[name] for lab in labs.values() for name in lab.runs}.items():
        write_run(args.out / name, command, 0.8 if "-1-" in name else 0.7, model)    # seed 1; the others
    for claim, lab in labs.items():
        reproduce.report(claim, args)
        text[claim] = (tmp_path / f"figures/reproduce-{claim}.md").read_text()
        runs = {"ablations": 4, "probe": 1, "attention": 1, "attention-distance": 1, "tune": 1}.get(claim, 2)
        assert (f"deviation of {runs} runs" in text[claim]) == (runs > 1)
        assert f"{len(lab.runs)} runs, {len(lab.runs)} minutes of one core" in text[claim]
        assert (tmp_path / f"figures/reproduce-{claim}.png").stat().st_size > 5000
    assert "| − blockwise masking | 75.0 ± 5.8 | 82.77 | 37.5 ± 2.9 | 42.93 |" in text["ablations"]
    assert "| pre-trained | 1.00 ± 0.00 | 3.00 ± 0.00 | 5.00 ± 0.00 | 7.00" in text["convergence"]
    assert "| 96,000 | 3.21 | 75.0 ± 7.1 | 82.86 (300 epochs) |" in text["longer"]
    assert "| linear probe, random weights | 10.0 | 20.0 | 30.0 | 70.0 |" in text["probe"]
    assert "| from scratch | 70.0 | 70.0 | 70.0 | 70.0 | 0.001 |" in text["tune"]
    for row in ("all patches, 12,800 images seen", "without neighbours, random weights"):
        assert re.search(rf"\| {row}( \| [01]\.\d\d){{4}} \|", text["attention"])    # near 1: random
    assert re.search(r"\| 51,200 images seen( \| [12]\.\d\d){4} \|", text["attention-distance"])
    figure = reproduce.plot(reproduce.Lab("tune", args).table)
    assert len(figure.legends[0].get_texts()) == 14                    # each row
    figure = reproduce.plot(reproduce.Lab("attention", args).table)
    assert [axis.get_title() for axis in figure.axes] == ["all patches", "without neighbours"]
    assert [len(axis.containers) for axis in figure.axes] == [5, 5]
    assert figure.legends[0].get_texts()[1].get_text() == "3,200 images seen"
    monkeypatch.setattr(reproduce, "object_attention",
                        lambda maps, coverage, exclude_radius=0: torch.full((4,), 1.0 + exclude_radius))
    rows = reproduce.Lab("attention", args).table.rows
    assert rows["all patches, random weights"] == [[1]] * 4
    assert rows["without neighbours, random weights"] == [[3]] * 4


def test_attention_distances_by_hand():
    neighbour, uniform = torch.eye(3)[[0, 2, 1]].expand(1, 1, 3, 3), torch.full((1, 1, 5, 5), 0.2)
    assert reproduce.attention_distances([neighbour], (1, 2)).tolist() == [[1]]
    distance = (2 + 2 ** 0.5) / 4    # from each of 4 patches, the others are 1, 1 and sqrt 2 away
    assert reproduce.attention_distances([uniform], (2, 2)).item() == pytest.approx(distance)


UNIFORM, ON_OBJECT, FAR = torch.full((5, 5), 0.2), torch.zeros(5, 5), torch.zeros(5, 5)
ON_OBJECT[2:, 1:3] = 0.5
ON_OBJECT[1] = 0.2
FAR[1, 3:] = FAR[4, 1:3] = 0.3
FAR[1, 1] = FAR[4, 4] = 0.4    # the query itself, which exclude_radius=2 ignores


@pytest.mark.parametrize("attention, coverage, exclude_radius, expected", [
    (UNIFORM, [1, 1, 0, 0], 0, 1), (ON_OBJECT, [1, 1, 0, 0], 0, 1.5), (ON_OBJECT, [0.4, 0.6, 0, 0], 0, 2),
    (UNIFORM, [1, 0, 1, 1], 2, 1), (FAR, [1, 0, 0, 1], 2, 1)])    # patch 0 counts 2 and 3, patch 3: 0 and 1
def test_object_attention_by_hand(attention, coverage, exclude_radius, expected):
    coverage = torch.tensor([[coverage]]).float()
    found = reproduce.object_attention([attention[None, None]], coverage, exclude_radius)
    assert found.tolist() == pytest.approx([expected])


def test_attention_to_scenes_and_the_coverage_of_their_objects(tmp_path):
    config = vit.ViTConfig(image_size=64, patch_size=16, dim=8, depth=2, heads=2)
    model = vit.MaskedImageModel(config, 4)
    write_run(tmp_path / "run", "", 0, {"model": model.state_dict(), "kind": "MaskedImageModel",
                                        "config": {"vit": dataclasses.asdict(config), "vocab_size": 4}})
    maps, coverage = reproduce.attend_to_scenes(tmp_path / "run/model.pt", count=3)
    image, label, class_map = shapes.render_scene("val", 2)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected_maps = model.eval().attention_maps(pixels, layer=None)
    for layer, expected in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(layer[2:], expected)
    assert coverage.shape == (3, 4, 4)
    assert coverage[2, 1, 2] == (class_map[16:32, 32:48] == 1 + label).mean()


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
    assert (args.out / "order").read_text() == "first last last "      # with other flags, the script decides
    broken = {"slow": "pretrain.py --out {out}/slow --number 600",     # it sleeps a minute
              "broken": "pretrain.py --out {out}/broken --number 0",
              "after": "finetune.py --out {out}/after --number 1 --init {out}/broken/model.pt"}
    with pytest.raises(ChildProcessError, match="broken: status 1, ZeroDivisionError.*broken/log.txt"):
        reproduce.execute(broken, args)
    assert not (args.out / "after").exists() and not (args.out / "slow/result.json").exists()


@pytest.mark.parametrize("flags, words", [
    ("all --list --scale full", "mask-ratio: How much is masked.*runs to do, 2 at a time: about"),
    ("--help", "75 %"), ("everything", "argument claim: invalid choice: 'everything'"),
    ("probe --seeds 0", "argument --seeds: must be at least 1, got 0"),
    ("probe --jobs 0", "argument --jobs: must be at least 1, got 0")])
def test_command_lines_that_run_nothing(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--jobs", "2", *flags.split()])
    try:
        reproduce.main()
    except SystemExit as end:
        assert end.code == (0 if flags == "--help" else 2)
    assert re.search(words, "".join(capsys.readouterr()), re.DOTALL) and not list(tmp_path.iterdir())
