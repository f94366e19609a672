"""reproduce.py: plans are commands that the scripts take; runs are done once; tables and plots come out."""
import json
import sys
from pathlib import Path

import pytest

import dvae
import finetune
import pretrain
import reproduce
import training
from training import UserError

SCRIPTS = {"dvae.py": dvae, "pretrain.py": pretrain, "finetune.py": finetune}


def lab(folder, scale="full", seeds=2):
    return reproduce.Lab(reproduce.SCALES[scale], Path(folder), "data", seeds)


def planned(one):
    return reproduce.with_needs([job for claim in reproduce.CLAIMS.values() for job in claim(one)[0]])


def flag(job, name):
    return job.flags[job.flags.index(name) + 1] if name in job.flags else None


def finish(job):
    """Leave what a run leaves, with made-up numbers; fine-tuning is best at a learning rate of 4e-3."""
    layers = {"patches": [0.1, 0.2, 0.3, 0.4], "[S]": [0.1, 0.2, 0.3, 0.4]}
    top1 = 0.9 if "-0.004" in job.out.name else 0.5 + len(job.out.name) / 400
    result = {"top1": top1, "mean_iou": 0.4, "val_loss": 3.0, "top1_by_layer": layers}
    lines = [json.dumps({"step": step, "val_top1": step / 100}) + "\n" for step in range(10, 70, 10)]
    ratios = "  pre-trained  1.50  1.25  1.00  0.75\n  random weights  1.00  1.00  1.00  1.00\n"
    job.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("plan.txt", job.plan), ("result.json", json.dumps(result)), ("log.txt", ratios),
                       ("metrics.jsonl", "".join(lines)), ("attention.png", ""), ("seconds.txt", "30\n30\n")):
        (job.out / name).write_text(text)


@pytest.mark.parametrize("scale", list(reproduce.SCALES))
def test_every_run_has_a_folder_of_its_own_and_flags_that_its_script_takes(tmp_path, scale):
    folders = {}
    for job in [job for claim in reproduce.CLAIMS.values()
                for job in reproduce.with_needs(claim(lab(tmp_path, scale))[0])]:
        assert folders.setdefault(job.out, job) == job, f"two runs in {job.out}"
    for job in folders.values():
        if job.script in SCRIPTS:
            task = flag(job, "--task")
            script, preset = SCRIPTS[job.script], []
            if task in ("probe", "knn"):
                preset = ["--preset", task]    # which finetune.py adds by itself
            config = training.parse(script.Config, script.PRESETS, [*job.flags, *preset])
            assert config.out == str(job.out) and config.device == "cpu"


def test_fine_tuning_has_the_learning_rate_that_the_held_out_split_chose(tmp_path):
    before = {job.out.name: job for job in planned(lab(tmp_path))}
    job = before["finetune-beit-1000-0"]
    tunings = {f"tune-beit-{lr:g}" for lr in reproduce.GRID}
    assert not job.finished and {one.out.name for one in job.needs} >= tunings
    for name, one in before.items():
        if name.startswith("tune-"):
            assert "--validate" in one.flags and flag(one, "--seed") == "100"
            finish(one)
    after = {job.out.name: job for job in planned(lab(tmp_path))}["finetune-beit-1000-0"]
    assert flag(after, "--lr") == "0.004" and "--validate" not in after.flags


@pytest.mark.parametrize("scale", list(reproduce.SCALES))
def test_only_runs_of_the_convergence_figure_are_evaluated_on_the_way(tmp_path, scale):
    one = lab(tmp_path, scale)
    shown = {job.out for job in reproduce.convergence(one)[0]}
    for job in planned(one):
        if job.script == "finetune.py" and "--eval-every" in job.flags:
            steps, every = int(flag(job, "--steps")), int(flag(job, "--eval-every"))
            assert len({*range(every, steps + 1, every), steps}) == (6 if job.out in shown else 1), job.out


def test_each_claim_has_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for wanted in ("tune-", ""):    # the others' learning rates are known after these
        for job in planned(lab("runs/full", seeds=3)):
            if job.out.name.startswith(wanted):
                finish(job)
    (tmp_path / "data/FashionMNIST/raw").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "all", "--scale", "full", "--out", "runs"])
    reproduce.main()
    for claim in reproduce.CLAIMS:
        text = (tmp_path / "figures" / f"reproduce-{claim}.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) >= 4 and len({line.count("|") for line in rows}) == 1, claim
        seeds = "One seed" if claim in ("probe", "attention") else "Mean ± standard deviation of 3 seeds"
        assert f". {seeds}; " in text, claim
        assert (tmp_path / "figures" / f"reproduce-{claim}.png").stat().st_size > 5000
    table = (tmp_path / "figures/reproduce-ablations.md").read_text()
    assert "82.86" in table and "80.50" in table and "36.73" in table and " ± " in table


NOTE = """
import pathlib, sys
out = pathlib.Path(sys.argv[1])
{code}
(out / "result.json").write_text("{{}}")
open(out.parent / "order", "a").write(out.name + " ")
"""


def test_runs_are_done_once_in_order_and_a_failed_one_is_named(tmp_path, monkeypatch):
    def job(name, *needs, code="0"):
        return reproduce.Job("pretrain.py", (code,), tmp_path / name, needs, 1.0)

    first, other = job("first", code="import time; time.sleep(0.5)"), job("other")
    plan = [job("last", first, other), job("broken", first, code="1/0")]
    monkeypatch.setattr(reproduce.Job, "command", lambda self: [
        sys.executable, "-c", NOTE.format(code=self.flags[0]), str(self.out)])
    reproduce.run(lambda: plan[:1], 3)
    reproduce.run(lambda: plan[:1], 3)
    order = (tmp_path / "order").read_text().split()
    assert order == ["other", "first", "last"]
    assert plan[0].seconds > 0
    with pytest.raises(ChildProcessError, match="status 1 .ZeroDivisionError.*broken/log.txt"):
        reproduce.run(lambda: plan, 2)


def test_a_run_of_another_plan_is_not_taken_for_this_one(tmp_path):
    def job(name, *needs, code="0", root="data"):
        flags = ("--code", code, "--data-root", root, "--out", str(tmp_path / name))
        return reproduce.Job("pretrain.py", flags, tmp_path / name, needs, 1.0)

    another = "--out: .*{} is a run of another plan, this one has `pretrain.py --code 1 --out first`"
    changed = job("last", job("first", code="1"))
    for one in (job("first"), job("last", job("first"))):
        finish(one)
    job("last", job("first", root="elsewhere")).check()    # the same images at another place
    with pytest.raises(UserError, match=another.format("first")):
        changed.needs[0].check()
    with pytest.raises(UserError, match=another.format("last")):    # what it was started from has changed
        changed.check()
    (tmp_path / "last/plan.txt").unlink()
    with pytest.raises(UserError, match="last is a run of another plan"):
        changed.check()
    with pytest.raises(UserError, match="first is a run of another plan"):
        reproduce.run(lambda: [changed], 1)


def test_the_list_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "all", "--list", "--scale", "full"])
    reproduce.main()
    printed = capsys.readouterr().out
    assert all(f"{claim}: " in printed for claim in reproduce.CLAIMS) and "hours" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("claim", ["attention", "segmentation"])
def test_claims_about_shapes_need_no_files(claim, tmp_path, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", claim])
    monkeypatch.setattr(reproduce, "run", lambda plan, parallel: ran.extend(plan()))
    monkeypatch.setattr(reproduce, "write", lambda lab, name, args, seeds: ran.append(name))
    reproduce.main()
    assert len(ran) > 2 and ran[-1] == claim


@pytest.mark.parametrize("flags, line", [
    (["everything"], "argument claim: invalid choice: 'everything'"),
    (["probe", "--seeds", "0"], "--seeds: at least 1, not 0"),
    (["probe", "--scale", "huge"], "argument --scale: invalid choice: 'huge'"),
    (["probe", "--data-root", "nowhere"], "--data-root: nowhere has no FashionMNIST/raw")])
def test_wrong_flags_are_one_line(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and last.startswith(f"reproduce.py: error: {line}")
    assert not list(tmp_path.iterdir())


def test_help_is_printed(monkeypatch, capsys):
    """The per-cent signs of the claims are not taken for formats."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--help"])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    assert end.value.code == 0 and "75 %" in capsys.readouterr().out
