"""Schedules, flags, the all-reduce of a step, and the folder of a run: locks, logs, checkpoints, damage."""
import dataclasses
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, equal
from torch import nn

import dvae
import pretrain
import training
import vit
from training import UserError

CPU = torch.device("cpu")


# ---- Schedules, groups, steps ----

def test_learning_rate_schedule():
    rate = [training.warmup_cosine(step, 110, 1.0, 0.1, 10) for step in range(111)]
    assert [rate[step] for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.55, 0.1])
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert max(training.warmup_cosine(step, 4, 1.0, 2.0, 0.4) for step in range(4)) == 1
    assert [training.cosine(step, 10, 3.0, 1.0) for step in (0, 10, 99)] == [3, 1, 1]
    assert training.cosine(5, 0, 3.0, 1.0) == 1


@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
def test_parameter_groups(position):
    """0.5 ** (depth + 1 - l): l = 0 for embeddings and what is shared, 1 and 2 for blocks, 3 for the head."""
    config = vit.ViTConfig(16, 8, dim=8, depth=2, heads=2, position=position, layer_scale=0.1)
    for model in (vit.MaskedImageModel(config, 5), vit.ImageClassifier(config, 3)):
        expected = {}
        for name, parameter in model.named_parameters():
            start = re.match(r"blocks\.[01]|norm|fc_norm|head|lm_head|", name)[0]
            scale = {"blocks.0": 0.25, "blocks.1": 0.5, "": 0.125}.get(start, 1)
            decay = 0 if re.search(r"bias$|norm|gamma|cls_token|pos_embed", name) else 0.05
            expected[parameter] = scale, decay
        groups = training.parameter_groups(model, 0.05, 0.5)
        found = [(p, (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
        assert len(found) == len(expected) and dict(found) == expected
    optimizer = torch.optim.AdamW(groups)
    assert training.set_lr(optimizer, 0.1) == 0.1
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.0125, 0.025, 0.05, 0.1])


@pytest.mark.parametrize("name, clip, expected", [("fp32", 1.0, 1.0), ("fp32", 0.0, 5.0), ("fp16", 1.0, 1.0)])
def test_clipping(name, clip, expected):
    weight, precision = nn.Parameter(torch.zeros(2)), training.Precision(name, CPU)
    assert precision.scaler.is_enabled() == (name == "fp16")
    precision.backward(weight @ torch.tensor([3.0, 4.0]))
    norm = precision.update(torch.optim.SGD([weight], lr=1.0), clip)
    assert norm.item() == pytest.approx(5) and weight.norm().item() == pytest.approx(expected)
    assert weight.grad is None


def test_each_step_and_process_draws_its_own(monkeypatch):
    def draw(seed, step, rank):
        monkeypatch.setenv("RANK", str(rank))
        training.seed_step(seed, step)
        return torch.rand(1).item()
    draws = [draw(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len(set(draws)) == 4 and draw(0, 0, 0) == draws[0]


# ---- Flags ----

def parse(*flags, module=pretrain):
    return training.parse(module.Config, module.PRESETS, [str(flag) for flag in flags])


def test_where_defaults_come_from():
    demo = parse()
    assert demo.preset == "demo" and demo.image_size == 64 and demo.out == "runs/pretrain-shapes"
    full = parse("--data", "/some/imagenet/")
    assert (full.preset, full.dim, full.batch_size, full.lr, full.epochs) == ("base", 768, 2048, 1.5e-3, 800)
    assert full.out == "runs/pretrain-imagenet" and full.num_masked == 78
    assert parse("--dim", 96).dim == 96 and parse("--preset", "large").clip_grad == 1.0
    assert parse("--steps", 7).epochs is None and parse("--epochs", 2, module=dvae).steps is None
    assert parse(module=dvae).vocab_size == 1024 and parse("--data", "x", module=dvae).vocab_size == 8192
    assert parse("--pixel-mean", ".5", ".5", ".5").pixel_mean == (0.5, 0.5, 0.5)


def test_learning_rate_follows_the_batch(capsys):
    config = parse("--data", "x", "--batch-size", 512)
    assert config.lr == pytest.approx(1.5e-3 / 4) and config.min_lr == pytest.approx(1e-5 / 4)
    assert "0.000375 = 0.0015 x batch 512 / 2048" in capsys.readouterr().out
    assert parse("--data", "x", "--batch-size", 512, "--lr", 1e-3).lr == 1e-3
    assert "=" not in capsys.readouterr().out


@pytest.mark.parametrize("module", [pretrain, dvae])
def test_every_flag_is_explained_and_read(module):
    text = training.make_parser(module.Config, module.PRESETS).format_help()
    files = ("data.py", f"{module.__name__}.py", "training.py", "vit.py")
    sources = "".join((ROOT / name).read_text() for name in files)
    sources = re.sub(r"    def __post_init__.*?(?=\n\n)", "", sources, flags=re.S)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    for name in fields - {"in_channels", "layer_norm_eps"}:            # those of a checkpoint, not flags
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text), name
        assert name == "preset" or re.search(rf"(config|self)\.{name}\b", sources), name


@pytest.mark.parametrize("flag, gpus, device", [("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cpu", 2, "cpu")])
def test_which_device(monkeypatch, flag, gpus, device):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(training.join_processes(parse("--device", flag))) == device


@pytest.mark.parametrize("error, status, line", [
    (UserError("--out: no"), 2, "--out: no"), (FloatingPointError("step 3: no"), 1, "step 3: no"),
    (OSError("Caught OSError in a loader process\nTraceback ...\nOSError: --data: no\n"), 1, "--data: no"),
    (OSError(), 1, "OSError"), (KeyboardInterrupt(), 130, None)])
def test_errors_are_one_line_and_a_status(error, status, line, capsys, monkeypatch):
    """All processes find the same fault in the input, and the first says so; only one has its disk full."""
    monkeypatch.setattr("sys.argv", ["/somewhere/pretrain.py"])
    for rank, silent in (("0", (130,)), ("1", (2, 130))):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end, training.one_line_errors():
            raise error
        said = "" if status in silent else f"pretrain.py: error: {line}\n"
        assert end.value.code == status and capsys.readouterr().err == said


# ---- The folder of a run ----

@pytest.mark.parametrize("given, line", [
    ("RANK=1", "RANK=1, no WORLD_SIZE, no LOCAL_RANK"),
    ("WORLD_SIZE=", "no RANK, WORLD_SIZE=, no LOCAL_RANK"),
    ("LOCAL_RANK=3", "no RANK, no WORLD_SIZE, LOCAL_RANK=3"),
    ("RANK=0 LOCAL_RANK=2", "RANK=0, no WORLD_SIZE, LOCAL_RANK=2"),
    ("RANK=0 WORLD_SIZE=two LOCAL_RANK=0", "RANK=0, WORLD_SIZE=two, LOCAL_RANK=0")])
def test_half_of_torchruns_variables(given, line, capsys, monkeypatch):
    """It is said by each process; one a machine, without LOCAL_RANK, is no mistake."""
    for name, _, value in (setting.partition("=") for setting in given.split()):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end, training.one_line_errors():
        raise AssertionError("not refused")
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"error: the environment has {line}; torchrun sets all" in err
    assert err.count("\n") == 1
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert training.wrong_environment() is None


def test_torchruns_variables_without_an_address(monkeypatch):
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR expected, but not set; start with torchrun"):
        training.join_processes(training.RunConfig(batch_size=8, device="cpu"))


def test_a_system_without_fcntl():
    program = "import sys; sys.modules['fcntl'] = None; sys.argv = ['pretrain.py']; import pretrain"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr == (
        "this system has no fcntl, which locks the folder of a run; Linux, macOS and WSL have it\n")


def test_the_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        training.join_processes(training.RunConfig(batch_size=8, device="cpu"))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_json_has_no_nan(tmp_path):
    training.write_json(tmp_path / "a.json", {"a": [math.nan, 1.5], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=None) == {
        "a": [None, 1.5], "b": {"c": None}}


def open_run(folder, *flags):
    return training.Run(parse("--out", folder, *flags), CPU, 10)


def test_out_continues_refuses_and_sets_aside(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = open_run(folder)
    assert not run.finished and json.loads((folder / "config.json").read_text())["preset"] == "demo"
    assert not open_run(folder, "--workers", 3).finished    # the number of workers is no part of the run
    with pytest.raises(UserError) as error:
        open_run(folder, "--lr", 0.5, "--seed", 4)
    differ = rf"--out: .*lr \({parse().lr:g}, now 0.5\).*seed \(0, now 4\).*another --out.*--fresh"
    assert re.search(differ, str(error.value))
    run.finish(nn.Linear(1, 1), {}, loss=1.0)
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
    """Rank 0 makes the folder, rank 1 looks for it on another disk: both must stop."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(training, "all_sum", lambda mine: mine + rank)    # rank 0 sees it, rank 1 does not
    with pytest.raises(UserError, match="--out: not all machines see .*run; name a folder that they share"):
        open_run(tmp_path / "run")


HOLD_THE_LOCK = """
import os, sys, time
import pretrain, training
config = training.parse(pretrain.Config, pretrain.PRESETS, ["--out", sys.argv[1]])
run = training.Run(config, "cpu", 10)
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time(tmp_path):
    """A killed one holds no lock, not even while a process that it forked, such as a loader's, lives on."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, tmp_path / "run"], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE)
    worker = int(holder.stdout.readline())
    for flags in ((), ("--fresh",)):
        with pytest.raises(UserError, match="--out: .* is in use by another process"):
            open_run(tmp_path / "run", *flags)
    holder.kill()
    holder.wait()
    open_run(tmp_path / "run")
    os.kill(worker, signal.SIGKILL)


# ---- Steps and the log ----

def test_one_all_reduce_per_step(tmp_path, monkeypatch):
    """Means over two processes, and the word that the other one was told to stop, in one all-reduce."""
    run, calls, other = open_run(tmp_path), [], torch.tensor([3.0, 8.0, 0.0])
    monkeypatch.setenv("WORLD_SIZE", "2")

    def all_sum(tensor):
        calls.append(tensor)
        return tensor + other / 2
    monkeypatch.setattr(training, "all_sum", all_sum)
    assert run.all_reduce(1, torch.tensor([1.0, 2.0])) == [2.0, 5.0]
    assert len(calls) == 1 and not run.stop_signal
    other[2] = signal.SIGINT
    run.all_reduce(2, torch.tensor([1.0, 2.0]))
    assert run.stop_signal == signal.SIGTERM and len(calls) == 2
    for value in (math.nan, math.inf):    # from one process, it stops both
        other[0] = value
        with pytest.raises(FloatingPointError, match=f"^step 3: the loss is {value}; .*--lr.*--precision"):
            run.all_reduce(3, torch.tensor([1.0, 2.0]))


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    run, model = saved_twice(tmp_path), nn.Linear(2, 2)
    before = (tmp_path / "last.pt").read_bytes()
    model.weight.data[1, 0] = math.inf
    with pytest.raises(FloatingPointError, match="^step 3: weight is not finite"):
        run.save(3, model=model)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, monkeypatch, number):
    run, model, ended = open_run(tmp_path, "--save-every", 2), nn.Linear(2, 2), []
    before = signal.getsignal(number)
    monkeypatch.setattr(os, "kill", lambda process, signal: ended.append((process, signal)))
    for step in run.progress("train"):
        if step == 2:
            signal.raise_signal(number)
        run.all_reduce(step + 1, torch.ones(1))
        run.save_or_stop(step + 1, model=model)
        if ended:
            break
    assert ended == [(os.getpid(), number)] and signal.getsignal(number) == signal.SIG_DFL and step == 2
    assert [torch.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 2]
    signal.signal(number, before)


def test_a_signal_after_the_last_all_reduce_is_not_lost(tmp_path, monkeypatch):
    run, before, ended = open_run(tmp_path), signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(os, "kill", lambda process, signal: ended.append(signal))
    for step in run.progress("train"):
        run.all_reduce(step + 1, torch.ones(1))
        if step == run.steps - 1:
            signal.raise_signal(signal.SIGINT)
        run.save_or_stop(step + 1, model=nn.Linear(2, 2))
    assert ended == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == before
    assert torch.load(tmp_path / "last.pt")["step"] == 10


def test_asked_twice_is_an_interrupt(tmp_path):
    run = open_run(tmp_path)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        run._remember(number, None)
    with pytest.raises(KeyboardInterrupt):
        run._remember(signal.SIGINT, None)


def test_lines_of_the_log(tmp_path, monkeypatch):
    """Their rate leaves out the evaluation, after steps 4 and 6; a number that is not finite is null."""
    run, clock = open_run(tmp_path, "--batch-size", 8, "--log-every", 4), [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    for step in run.progress("train"):
        clock[0] += 2
        run.all_reduce(step + 1, torch.ones(1))
        if step + 1 in (4, 6):
            clock[0] += 100
            run.log(step + 1, val_loss=1.0)
        else:
            run.log(step + 1, loss=torch.tensor(1.0), accuracy=math.nan)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4, 6, 8, 10]
    assert all(line["images_per_second"] == 4 for line in lines)
    assert lines[-1] == {"step": 10, "loss": 1, "accuracy": None, "images_per_second": 4}


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    """Without a checkpoint it begins anew."""
    run, log, model, other = open_run(tmp_path), tmp_path / "metrics.jsonl", nn.Linear(2, 2), nn.Linear(2, 2)
    log.write_text('{"step": 1}\n')
    run.restore()
    assert run.start == 0 and not log.read_text()
    log.write_text('{"step": 1}\n{"step": 2}\n')
    run.save(2, model=model)
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    run.restore(model=other)
    assert run.start == 2 and torch.equal(model.weight, other.weight)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    os.truncate(log, 3)    # a disk that was full
    run.restore(model=other)
    assert log.read_text() == '{"s'


# ---- Writing, and what was damaged ----

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, kept, synced = tmp_path / "last.pt", tmp_path / "previous.pt", []
    monkeypatch.setattr(os, "fsync", synced.append)
    for text in (b"1", b"2", b"3"):
        training.write_atomically(path, lambda file: file.write(text), keep=kept)
    assert len(synced) == 3
    for error in (OSError("disk full"), RuntimeError("disk full")):    # torch.save raises RuntimeError
        def break_off(file):
            file.write(b"4")
            raise error
        with pytest.raises(OSError, match=r"last.pt could not be written \(disk full\); [\d.,]+ MB are free"):
            training.write_atomically(path, break_off, keep=kept)
    assert path.read_bytes() == b"3" and kept.read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 2


def saved_twice(folder):
    """A run's folder with checkpoints of steps 1 (weights 1) and 2 (weights 2)."""
    run, model = open_run(folder), nn.Linear(16, 16)
    for step in (1, 2):
        nn.init.constant_(model.weight, step)
        run.save(step, model=model)
    return run


def test_a_run_goes_on_in_fp16_where_it_began_without(tmp_path):
    """As where it moves from a CPU to a GPU: the gradient scaler was off, and saved nothing."""
    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    model = nn.Linear(2, 2)
    open_run(tmp_path).save(3, model=model, scaler=off)
    run = open_run(tmp_path)
    run.restore(model=model, scaler=on)
    assert run.start == 3 and on.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def flip(content, at, bit):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


HURT = {"not at all": lambda path: None,
        "missing": lambda path: path.unlink(),
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "a bit flipped": lambda path: path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 2, 2)),
        "code": lambda path: torch.save({"step": print}, path)}


@pytest.mark.parametrize("how", HURT)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how, capsys, monkeypatch):
    """previous.pt is read only then."""
    saved_twice(tmp_path)
    last, aside, damage, read = tmp_path / "last.pt", tmp_path / "last.pt.damaged", training.damage, []
    HURT[how](last)
    content = last.read_bytes() if last.exists() else b""
    monkeypatch.setattr(training, "damage", lambda path: read.append(path.name) or damage(path))
    run, model = open_run(tmp_path), nn.Linear(16, 16)
    run.restore(model=model)
    said = capsys.readouterr().out
    intact = 2 if how == "not at all" else 1
    assert run.start == intact and (model.weight == intact).all()
    one = {"not at all": ["last.pt"], "missing": ["previous.pt"]}
    assert read == one.get(how, ["last.pt", "previous.pt"])
    assert aside.exists() == ("last.pt is damaged" in said) == (how not in one)
    assert not aside.exists() or aside.read_bytes() == content
    run.save(3, model=model)    # the damaged one does not become previous.pt
    assert torch.load(tmp_path / "previous.pt")["step"] == intact and torch.load(last)["step"] == 3


def test_two_damaged_checkpoints_are_an_error_and_stay(tmp_path):
    saved_twice(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="last.pt is damaged .* and .*previous.pt is damaged .*--fresh"):
        open_run(tmp_path).restore(model=nn.Linear(16, 16))
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "previous.pt").read_bytes() == b"nothing"


def test_a_flip_of_any_bit_is_noticed_or_harmless(tmp_path):
    """Most of so small a file are the zip archive's tables, which no checksum covers."""
    path, model, rng, noticed = tmp_path / "last.pt", nn.Linear(2, 2), random.Random(0), 0
    open_run(tmp_path).save(1, model=model)
    whole = path.read_bytes()
    assert training.damage(path) is None
    flips = [(rng.randrange(len(whole)), rng.randrange(8)) for _ in range(600)]
    with zipfile.ZipFile(path) as archive:
        at, entries = archive.start_dir, archive.infolist()
    for entry in entries:    # torch.load reads nothing of a folder, and finds no file of another name
        end = at + 46 + len(entry.filename)
        flips += [(at + 38, 4), (end - 1, 0), (end - 1, 1)]    # the mark of a folder; the last digit
        at = end + len(entry.extra)
    for at, bit in flips:
        path.write_bytes(flip(whole, at, bit))
        if training.damage(path):
            noticed += 1
        else:
            state = torch.load(path, weights_only=True)
            assert state["step"] == 1 and equal(state["model"], model.state_dict()), (at, bit)
    assert noticed > 200
