"""Schedules, the update of a step, stopping, the log, and the folder of a run: locks, checkpoints, damage."""
import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.data import Dataset

import launch
import pretrain
import run as run_module
import train_dvae
from run import Run, UserError

CPU = torch.device("cpu")
FLAGS = "--steps 10 --batch-size 4 --device cpu --precision fp32 --workers 0 --log-every 1".split()


class Ones(Dataset):
    """Forty samples, each a vector of ones."""

    def __len__(self):
        return 40

    def __getitem__(self, key):
        return torch.ones(2)


def open_run(folder, *flags, script=pretrain):
    """The run of a script in a folder, of ten steps unless the flags say otherwise."""
    return Run(script.parse_args(["--out", str(folder), *FLAGS, *map(str, flags)]), CPU, len(Ones()))


def prepare(run, model, **options):
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.0}]
    run.prepare(model, groups, **{"evaluate": lambda: {"top1": 0.5}, **options})


def train(run, model=None, before_update=lambda: None, **options):
    """Prepare and train a model; before_update is called in each step."""
    model = model or nn.Linear(2, 2)
    prepare(run, model, **options)
    for samples in run.batches(Ones()):
        before_update()
        run.update(model(samples).square().mean())


def read_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    """Raised in place of a signal that would end the tests."""


@pytest.fixture
def catch_kill(monkeypatch):
    """Let os.kill raise Killed(pid, signal). The handlers of signals are restored after the test."""
    def kill(pid, number):
        raise Killed(pid, number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(os, "kill", kill)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- Schedules and groups ----

def test_learning_rate_schedule():
    rate = [run_module.warmup_cosine(step, 110, 1.0, 0.1, 10) for step in range(111)]
    assert [rate[step] for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.55, 0.1])
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert max(run_module.warmup_cosine(step, 4, 1.0, 2.0, 0.4) for step in range(4)) == 1
    assert [run_module.cosine(step, 10, 3.0, 1.0) for step in (0, 10, 99)] == [3, 1, 1]
    assert run_module.cosine(5, 0, 3.0, 1.0) == 1


def test_each_step_has_the_learning_rates_of_its_groups(tmp_path):
    run, rates = open_run(tmp_path, "--lr", 1, "--min-lr", 0.5, "--warmup", 0.2), []
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": list(model[0].parameters()), "lr_scale": 1},
              {"params": list(model[1].parameters()), "lr_scale": 0.25}]
    run.prepare(model, groups, evaluate=dict)
    for samples in run.batches(Ones()):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        run.update(model(samples).square().mean())
    expected = [run_module.warmup_cosine(step, 10, 1, 0.5, 2) for step in range(10)]
    assert rates == [[rate, 0.25 * rate] for rate in expected]
    assert [line["lr"] for line in read_log(tmp_path)] == expected


# ---- The update of a step ----

def test_each_step_and_process_has_its_own_draws(monkeypatch):
    def draw(seed, step, rank):
        monkeypatch.setenv("RANK", str(rank))
        run_module.seed_step(seed, step)
        return torch.rand(1).item()
    draws = [draw(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len(set(draws)) == 4 and draw(0, 0, 0) == draws[0]


@pytest.mark.parametrize("factors", [[1.0], [0.5, 1.5]], ids=["one part", "two parts"])
@pytest.mark.parametrize("precision, clip, length", [("fp32", 1, 1), ("fp32", 0, 5), ("fp16", 1, 1)])
def test_gradients_are_averaged_over_parts_and_clipped(precision, clip, length, factors, tmp_path):
    run = open_run(tmp_path, "--precision", precision, "--clip-grad", clip, "--accumulate", len(factors))
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    prepare(run, model, schedule=lambda *_: 1.0)
    assert run.scaler.is_enabled() == (precision == "fp16")
    run.optimizer = torch.optim.SGD([{"params": [model.weight], "lr_scale": 1.0}])
    for factor, _ in zip(factors, run.batches(Ones())):
        run.update(factor * (1 + model(torch.tensor([3.0, 4.0]))[0]))
    line, = read_log(tmp_path)
    assert line["loss"] == 1 and line["grad_norm"] == pytest.approx(5) and model.weight.grad is None
    assert model.weight.norm().item() == pytest.approx(length)


@pytest.mark.parametrize("counts", [(1, 3), (0, 5), (0, 0)])
def test_parts_are_weighted_by_their_counts(counts, tmp_path):
    """Of a loss that is the mean over count things; a part may have none."""
    run, model = open_run(tmp_path, "--accumulate", 2, "--steps", 1, "--clip-grad", 0), nn.Linear(2, 1)
    prepare(run, model)
    for part, samples in enumerate(run.batches(Ones())):
        scale = (2.0, 8.0)[part] if counts[part] else 0.0
        run.update(scale * model.bias.sum(), count=torch.tensor(counts[part]), score=torch.tensor(scale))
    mean = sum(n * scale for n, scale in zip(counts, (2.0, 8.0))) / max(1, sum(counts))
    assert read_log(tmp_path)[0]["grad_norm"] == pytest.approx(mean)
    assert read_log(tmp_path)[0]["score"] == pytest.approx(mean)


def test_the_average_of_weights_begins_with_a_small_decay(tmp_path):
    run = open_run(tmp_path, "--ema", 0.3, "--lr", 0.1, script=train_dvae)
    model, decays = nn.Linear(2, 2), []
    average = copy.deepcopy(model)
    prepare(run, model, average=average)
    mean = average.weight.clone()
    for step, samples in enumerate(run.batches(Ones())):
        run.update(model(samples).square().mean())
        decays.append(min(0.3, (1 + step) / (10 + step)))
        mean = decays[-1] * mean + (1 - decays[-1]) * model.weight
    assert torch.allclose(average.weight, mean) and decays[:2] == [0.1, 2 / 11] and decays[-1] == 0.3


def test_one_all_reduce_per_step(tmp_path, monkeypatch, catch_kill):
    """It brings the means of two processes, and tells both if one should stop or has an infinite loss."""
    run, model = open_run(tmp_path, "--accumulate", 2), nn.Linear(2, 2)
    calls, exchanges_gradients = [], []
    other = torch.tensor([1.0, 3.0, 8.0, 0.0])                         # count, loss, accuracy, to stop

    def all_sum(tensor):
        calls.append(tensor)
        return tensor + other

    prepare(run, model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "all_sum", all_sum)
    parts = run.batches(Ones())

    def do_step():
        for accuracy in (1.0, 3.0):
            loss = 0 * model(next(parts)).sum() + 1
            exchanges_gradients.append(run.network.require_backward_grad_sync)    # of DistributedDataParallel
            run.update(loss, accuracy=accuracy, unknown=None)

    do_step()
    line, = read_log(tmp_path)
    assert (line["loss"], line["accuracy"]) == (2, 5) and "unknown" not in line
    assert len(calls) == 1 and exchanges_gradients == [False, True]
    other[3] = 1
    with pytest.raises(Killed, match=str(int(signal.SIGTERM))):
        do_step()
    assert len(calls) == 2 and torch.load(tmp_path / "last.pt")["step"] == 2
    for value in (math.nan, math.inf):
        other[1] = value
        with pytest.raises(FloatingPointError, match=f"^step 3: the loss is {value}; .*--lr.*--precision"):
            do_step()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run, model = open_run(tmp_path, "--save-every", 1), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    prepare(run, model)
    with pytest.raises(FloatingPointError, match="^step 3: 1.weight is not finite"):
        for samples in run.batches(Ones()):
            if run.step == 2:
                before = (tmp_path / "last.pt").read_bytes()
                model[1].weight.data[1, 0] = math.inf
            run.update(model[0](samples).square().mean())
    assert (tmp_path / "last.pt").read_bytes() == before


# ---- Stopping ----

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment, stops_after", [("before the update", 3), ("in the evaluation", 4)])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, catch_kill, capsys, number, moment, stops_after):
    """A signal in the evaluation after the third step comes too late for its all-reduce."""
    run = open_run(tmp_path, "--save-every", 2, "--eval-every", 3)

    def before_update():
        if moment == "before the update" and run.step == 2:
            signal.raise_signal(number)

    def evaluate():
        if moment == "in the evaluation":
            signal.raise_signal(number)
        return {"top1": 0.5}

    with pytest.raises(Killed) as killed:
        train(run, before_update=before_update, evaluate=evaluate)
    assert killed.value.args == (os.getpid(), number) and signal.getsignal(number) == signal.SIG_DFL
    assert f"{number.name}: stopped after step {stops_after}; continue" in capsys.readouterr().out
    steps = [torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")]
    assert steps == [stops_after, 2] and len(read_log(tmp_path)) == stops_after


def test_a_signal_that_the_caller_ignores_is_ignored(tmp_path, monkeypatch):
    """As under nohup, or trap '' INT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(open_run(tmp_path), before_update=lambda: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and len(read_log(tmp_path)) == 10
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_after_the_last_all_reduce_is_not_lost(tmp_path, catch_kill):
    def evaluate():
        signal.raise_signal(signal.SIGINT)
        return {"top1": 0.5}

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Killed) as killed:
        train(open_run(tmp_path), evaluate=evaluate)
    assert killed.value.args == (os.getpid(), signal.SIGINT) and signal.getsignal(signal.SIGINT) == before
    assert torch.load(tmp_path / "last.pt")["step"] == 10


def test_a_second_ctrl_c_does_not_wait(tmp_path, catch_kill):
    waiting, numbers = [], [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]

    def interrupt():
        try:
            for number in [*numbers, signal.SIGINT]:
                signal.raise_signal(number)
                waiting.append(number)
        except KeyboardInterrupt:
            pass

    with pytest.raises(Killed):
        train(open_run(tmp_path), before_update=interrupt)
    assert waiting == numbers


# ---- The log, and what a run prints ----

@pytest.mark.parametrize("options, evaluated, name", [
    ({}, [3, 6, 9, 10], "val_top1"),
    ({"evaluate_first": True, "log_prefix": ""}, [1, 3, 6, 9, 10], "top1")])
def test_lines_of_the_log(tmp_path, monkeypatch, options, evaluated, name):
    """images_per_second leaves out the time of evaluations. A number that is not finite becomes null."""
    run, clock, model = open_run(tmp_path, "--log-every", 4, "--eval-every", 3), [0.0], nn.Linear(2, 2)
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: clock[0])

    def evaluate():
        clock[0] += 100
        return {"top1": 0.5, "by_class": {"cat": 0.5}}

    prepare(run, model, evaluate=evaluate, **options)
    for samples in run.batches(Ones()):
        clock[0] += 2
        run.update(model(samples).square().mean(), accuracy=math.nan)
    lines = {line["step"]: line for line in read_log(tmp_path)}
    assert list(lines) == sorted({1, 4, 8, 10, *evaluated})
    assert all(line["images_per_second"] == 2 and line["accuracy"] is None for line in lines.values())
    assert [step for step in lines if name in lines[step]] == evaluated
    assert lines[4].keys() == {"step", "loss", "accuracy", "lr", "grad_norm", "images_per_second"}


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    """Without a checkpoint it begins anew."""
    run, log, model, other = open_run(tmp_path), tmp_path / "metrics.jsonl", nn.Linear(2, 2), nn.Linear(2, 2)
    log.write_text('{"step": 1}\n')
    prepare(run, model)
    assert run.step == 0 and not log.read_text()
    log.write_text('{"step": 1}\n{"step": 2}\n')
    run.step = 2
    run._save()
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    run = open_run(tmp_path)
    prepare(run, other)
    assert run.step == 2 and torch.equal(model.weight, other.weight)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    os.truncate(log, 3)    # a disk was full
    prepare(run, other)
    assert log.read_text() == '{"s'


def test_a_run_prints_its_preset_its_flags_and_the_arithmetic_of_its_learning_rate(tmp_path, capsys):
    folder = tmp_path / ("a-long-name-" * 10)
    open_run(folder, "--batch-size", 8)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{folder}: preset demo, with steps 10, batch_size 8" in printed
    assert "10 steps of 8 images, 2 epochs; peak lr 0.001 = 0.004 x batch 8 / 32; 1 x cpu" in printed
    open_run(tmp_path / "b", "--lr", 0.01)
    assert "peak lr 0.01;" in capsys.readouterr().out


# ---- The folder ----

def test_json_has_no_nan(tmp_path):
    run_module.write_json(tmp_path / "a.json", {"a": [math.nan, 1.5], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


def test_out_continues_refuses_and_sets_aside(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = open_run(folder)
    config = json.loads((folder / "config.json").read_text())
    assert not run.finished and config["preset"] == "demo" and config["lr"] == run.args.lr
    assert not open_run(folder, "--workers", 3).finished    # the number of workers is no part of the run
    with pytest.raises(UserError) as error:
        open_run(folder, "--lr", 0.5, "--seed", 4)
    differ = rf"^--out: .*lr .*{run.args.lr:g}, now 0.5.*seed .*0, now 4.*another --out.*--fresh"
    assert re.search(differ, str(error.value))
    with pytest.raises(UserError, match="preset .*demo, now tiny"):
        open_run(folder, "--preset", "tiny")
    run.report = {"loss": 1.0}
    run.finish(nn.Linear(1, 1), {})
    assert open_run(folder).finished
    for _ in range(2):
        assert not open_run(folder, "--seed", 4, "--fresh").finished
    assert (tmp_path / "run.old-1/result.json").exists() and not (tmp_path / "run.old-2/result.json").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")    # by torchrun --max-restarts
    open_run(folder, "--seed", 4, "--fresh")
    assert not (tmp_path / "run.old-3").exists()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="--out: .*config.json is not JSON; .*--fresh"):
        open_run(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_out_that_other_machines_do_not_see(tmp_path, monkeypatch, rank):
    """Rank 0 makes the folder, and rank 1 looks for it on another disk: both must stop."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "all_gather", lambda seen: [b"{}", seen])
    monkeypatch.setattr(run_module, "wait_until_visible", Path.exists)    # without waiting
    with pytest.raises(UserError, match="^--out: .*run .*all machines; name a"):
        open_run(tmp_path / "run")


def test_a_system_without_fcntl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(UserError, match="^--out: this system has no fcntl, .*; Linux, macOS and WSL have it"):
        open_run(tmp_path / "run")
    assert not list(tmp_path.iterdir())


HOLD_THE_LOCK = """
import os, sys, time
import pretrain, run, torch
the_run = run.Run(pretrain.parse_args(["--out", sys.argv[1]]), torch.device("cpu"), 100)
worker = os.fork()
if worker:
    print("worker", worker, flush=True)
time.sleep(60)
"""


@pytest.mark.long
def test_one_process_at_a_time(tmp_path):
    """A killed process holds no lock, even while a process that it forked, such as a loader's, lives on."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, tmp_path / "run"], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    worker = next(int(line.split()[1]) for line in holder.stdout if line.startswith("worker"))
    for flags in ((), ("--fresh",)):
        with pytest.raises(UserError, match="--out: .* is in use by another process"):
            Run(pretrain.parse_args(["--out", str(tmp_path / "run"), *flags]), CPU, 100)
    holder.kill()
    holder.wait()
    Run(pretrain.parse_args(["--out", str(tmp_path / "run")]), CPU, 100)
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("killed", [False, True])
def test_the_end_of_a_run(tmp_path, killed):
    """A run that was killed after its last step measures again, as that report is lost."""
    run, model, reports = open_run(tmp_path), nn.Linear(2, 2), []

    def evaluate():
        reports.append({"top1": len(reports), "by_class": {"cat": math.nan}})
        return reports[-1]

    train(run, model, evaluate=evaluate)
    if killed:
        run = open_run(tmp_path)
        train(run, model, evaluate=evaluate)
    assert run.finish(model, {"classes": ["cat"]}) == reports[-1] and len(reports) == 1 + killed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"top1": int(killed), "by_class": {"cat": None}}
    kept = torch.load(tmp_path / "model.pt")
    assert (kept["kind"], kept["config"]) == ("Linear", {"classes": ["cat"]})
    assert kept["model"]["weight"].equal(model.weight)


def test_a_figure_that_fails_is_a_warning(tmp_path, capsys):
    open_run(tmp_path).draw("a.png", lambda number: 1 / number, 0)
    assert "warning: a.png could not be drawn (ZeroDivisionError: " in capsys.readouterr().out
    assert not list(tmp_path.glob("a.png*"))


# ---- Writing and damage ----

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, backup, synced = tmp_path / "last.pt", tmp_path / "previous.pt", []
    monkeypatch.setattr(os, "fsync", synced.append)
    for content in (b"1", b"2", b"3"):
        run_module.write_atomically(path, lambda file: file.write(content), backup=backup)
    assert len(synced) == 3
    for error in (OSError("disk full"), RuntimeError("disk full")):    # torch.save raises RuntimeError
        def fail(file):
            file.write(b"4")
            raise error
        with pytest.raises(OSError, match=r"last.pt could not be written \(disk full\); [\d.,]+ MiB are"):
            run_module.write_atomically(path, fail, backup=backup)
    assert path.read_bytes() == b"3" and backup.read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 2


def save_twice(folder):
    """Make a run's folder with checkpoints of steps 1 (weights 1) and 2 (weights 2)."""
    run, model = open_run(folder), nn.Linear(16, 16)
    prepare(run, model)
    for step in (1, 2):
        run.step = step
        nn.init.constant_(model.weight, step)
        run._save()


def test_a_run_continues_in_fp16_that_began_without(tmp_path, monkeypatch):
    """As with --precision auto on a CPU, then on a GPU: the gradient scaler was off, and saved nothing."""
    save_twice(tmp_path)
    monkeypatch.setattr(launch, "choose_dtype", lambda *_: torch.float16)
    run = open_run(tmp_path)
    prepare(run, nn.Linear(16, 16))
    assert run.step == 2 and run.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def flip(content, position, bit):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1:]


def flip_data(path):
    content = path.read_bytes()
    path.write_bytes(flip(content, len(content) // 2, 2))


def flip_length(path):
    """Damage the length of the first local header: zipfile raises an EOFError without a message."""
    path.write_bytes(flip(path.read_bytes(), 29, 7))


DAMAGE = {"none": lambda path: None,
          "missing": lambda path: path.unlink(),
          "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
          "a bit of the data flipped": flip_data,
          "a bit of a length flipped": flip_length,
          "code": lambda path: torch.save({"step": print}, path),
          "another file": lambda path: torch.save({"model": {}, "kind": "Linear"}, path)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, capsys, monkeypatch):
    """previous.pt is read only then."""
    save_twice(tmp_path)
    last, aside, ZipFile, read = tmp_path / "last.pt", tmp_path / "last.pt.damaged", zipfile.ZipFile, []
    DAMAGE[damage](last)
    content = last.read_bytes() if last.exists() else b""
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: read.append(path.name) or ZipFile(path))
    run, model = open_run(tmp_path), nn.Linear(16, 16)
    prepare(run, model)
    printed = capsys.readouterr().out
    intact = 2 if damage == "none" else 1
    assert run.step == intact and (model.weight == intact).all()
    single = {"none": ["last.pt"], "missing": ["previous.pt"]}
    assert read == single.get(damage, ["last.pt", "previous.pt"])
    assert aside.exists() == ("last.pt is damaged" in printed) == (damage not in single)
    assert not aside.exists() or aside.read_bytes() == content
    run.step = 3
    run._save()    # the damaged file does not become previous.pt
    assert torch.load(tmp_path / "previous.pt")["step"] == intact and torch.load(last)["step"] == 3


def test_two_damaged_checkpoints_are_an_error_and_stay(tmp_path):
    save_twice(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="last.pt is damaged .* and .*previous.pt is damaged .*--fresh"):
        prepare(open_run(tmp_path), nn.Linear(16, 16))
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "previous.pt").read_bytes() == b"nothing"


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path):
    """In a small file most bytes are the zip archive's tables. In its directory a flip may pass unnoticed."""
    run, model, rng, noticed = open_run(tmp_path), nn.Linear(2, 2), random.Random(0), 0
    prepare(run, model)
    run._save()
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = range(archive.start_dir, len(whole))
    for _ in range(600):
        position, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(flip(whole, position, bit))
        try:
            prepare(run, nn.Linear(2, 2))
        except UserError as error:
            assert re.fullmatch(r"--out: .*last.pt is damaged \(.+\); .*--fresh", str(error))
            noticed += 1
        else:
            assert run.model.weight.equal(model.weight) or position in directory, (position, bit)
    assert noticed > 200
