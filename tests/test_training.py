"""Schedules, flags, the all-reduce of a step, and the folder of a run: locks, logs, checkpoints, damage."""
import dataclasses
import json
import math
import os
import pickle
import random
import re
import signal
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


def test_cosine_stays_at_its_end():
    assert [training.cosine(step, 10, 3.0, 1.0) for step in (0, 10, 99)] == [3, 1, 1]
    assert training.cosine(5, 0, 3.0, 1.0) == 1


def small(position="absolute"):
    return vit.ViTConfig(16, 8, dim=8, depth=2, heads=2, position=position, layer_scale=0.1)


@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
def test_what_is_decayed(position):
    model = vit.MaskedImageModel(small(position), 5)
    decayed, plain = sorted(training.parameter_groups(model, 0.05), key=lambda group: -group["weight_decay"])
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    expected = {name for name in names.values() if re.search(r"bias$|norm|gamma|cls_token|pos_embed", name)}
    assert {names[id(p)] for p in plain["params"]} == expected
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - expected


def test_layer_decay():
    """0.5 ** (depth + 1 - l): l = 0 for embeddings and what is shared, 1 and 2 for blocks, 3 for the head."""
    model = vit.ImageClassifier(small("shared_relative"), 3)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = training.parameter_groups(model, 0.05, 0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    by_start = {"blocks.0": 0.25, "blocks.1": 0.5, "fc_norm.": 1, "head.wei": 1, "head.bia": 1}
    assert scales == {name: by_start.get(name[:8], 0.125) for name in scales}
    optimizer = torch.optim.AdamW(groups)
    training.set_lr(optimizer, 0.1)
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    assert rates == pytest.approx([0.0125, 0.025, 0.05, 0.1])


@pytest.mark.parametrize("clip, expected", [(1.0, 1.0), (0.0, 5.0)])
def test_clipping(clip, expected):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    norm = training.Precision("fp32", CPU).update(torch.optim.SGD([weight], lr=1.0), clip)
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
    assert parse("--steps", 7).steps == 7 and parse("--epochs", 2).steps is None
    assert parse(module=dvae).vocab_size == 1024 and parse("--data", "x", module=dvae).vocab_size == 8192
    assert parse("--pixel-mean", ".5", ".5", ".5").pixel_mean == (0.5, 0.5, 0.5)


def test_learning_rate_follows_the_batch(capsys):
    config = parse("--data", "x", "--batch-size", 512)
    assert config.lr == pytest.approx(1.5e-3 / 4) and config.min_lr == pytest.approx(1e-5 / 4)
    assert "0.000375 = 0.0015 x batch 512 / 2048" in capsys.readouterr().out
    assert parse("--data", "x", "--batch-size", 512, "--lr", 1e-3).lr == 1e-3
    assert "=" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, wrong", [
    (["--warmup", 1.5], "--warmup: a number from 0 to 1, not 1.5"),
    (["--lr", "nan"], "--lr: a number from 1e-12 to inf, not nan"),
    (["--steps", 0], "--steps: a number from 1 to inf, not 0"),
    (["--out", ""], "--out: not an empty text"),
    (["--accumulate", 3], "--batch-size: 32 does not divide into 1 processes x 3 parts; 33 would"),
    (["--steps", 3, "--epochs", 2], "--steps and --epochs: give one of them")])
def test_refused_values_name_the_flag(flags, wrong):
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert str(error.value) == wrong


@pytest.mark.parametrize("module", [pretrain, dvae])
def test_every_flag_is_explained_and_read(module, capsys):
    with pytest.raises(SystemExit):
        parse("--help", module=module)
    text = capsys.readouterr().out
    files = ("data.py", f"{module.__name__}.py", "training.py", "vit.py")
    sources = "".join((ROOT / name).read_text() for name in files)
    sources = re.sub(r"    def __post_init__.*?(?=\n\n)", "", sources, flags=re.S)
    for field in dataclasses.fields(module.Config):
        if field.name != "in_channels":
            assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", text), field.name
        if field.name not in ("preset", "in_channels"):
            assert re.search(rf"(config|self)\.{field.name}\b", sources), field.name


def test_which_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training.join_processes(parse()) == torch.device("cuda", 0)
    assert training.join_processes(parse("--device", "cpu")) == CPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training.join_processes(parse("--device", "cuda")) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--device: 4 GPUs are needed and 2 are here"):
        training.join_processes(parse())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert training.join_processes(parse()) == CPU


@pytest.mark.parametrize("error, status", [
    (UserError("--out: no"), 2), (OSError("--out: no"), 1),
    (FloatingPointError("Traceback ...\n--out: no\n"), 1)])
def test_errors_are_one_line_and_a_status(error, status, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/pretrain.py"])
    with pytest.raises(SystemExit) as end, training.one_line_errors():
        raise error
    assert end.value.code == status and capsys.readouterr().err == "pretrain.py: error: --out: no\n"
    monkeypatch.setenv("LOCAL_RANK", "1")    # all find the same fault in the input, only one its disk full
    with pytest.raises(SystemExit), training.one_line_errors():
        raise error
    assert capsys.readouterr().err == ("" if status == 2 else "pretrain.py: error: --out: no\n")


# ---- The folder of a run ----

def open_run(folder, **more):
    flags = [text for name, value in more.items() for text in (f"--{name.replace('_', '-')}", value)]
    return training.Run(parse("--out", folder, *flags), CPU, 10)


def test_out_continues_refuses_and_sets_aside(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run = open_run(folder)
    assert not run.finished and json.loads((folder / "config.json").read_text())["preset"] == "demo"
    assert not open_run(folder, workers=3).finished    # the number of workers is no part of the run
    with pytest.raises(UserError) as error:
        open_run(folder, lr=0.5, seed=4)
    differ = rf"--out: .*lr \({parse().lr:g}, now 0.5\).*seed \(0, now 4\).*another --out.*--fresh"
    assert re.search(differ, str(error.value))
    run.finish(nn.Linear(1, 1), {}, loss=1.0)
    assert open_run(folder).finished
    fresh = parse("--out", folder, "--seed", 4, "--fresh")
    assert not training.Run(fresh, CPU, 10).finished
    assert (tmp_path / "run.old-1/result.json").exists() and not (folder / "result.json").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")    # by torchrun --max-restarts
    training.Run(fresh, CPU, 10)
    assert not (tmp_path / "run.old-2").exists()


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"^--out: .*{out}"):
            open_run(out)


@pytest.mark.parametrize("rank", [0, 1])
def test_out_that_other_machines_do_not_see(tmp_path, monkeypatch, rank):
    """Rank 0 makes the folder, rank 1 looks for it on another disk: both must stop."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []

    def all_sum(tensor):
        seen.append(tensor.item())
        return torch.tensor(1.0)    # of two
    monkeypatch.setattr(training, "all_sum", all_sum)
    with pytest.raises(UserError, match="--out: not all machines see .*run; name a folder that they share"):
        open_run(tmp_path / "run")
    assert seen == [1 - rank]


def refused_in_a_child(folder, close_files=False):
    """Whether a forked child is refused the folder. close_files: let it close all that it inherited."""
    child = os.fork()
    if child == 0:
        if close_files:
            os.closerange(3, 1000)
            os._exit(0)
        try:
            open_run(folder)
        except UserError as error:
            os._exit("is in use by another process" in str(error))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_second_process_is_refused(tmp_path):
    run = open_run(tmp_path)
    assert refused_in_a_child(tmp_path)
    refused_in_a_child(tmp_path, close_files=True)    # a loader process that ends
    assert refused_in_a_child(tmp_path)
    run._lock_file.close()
    assert not refused_in_a_child(tmp_path)


def test_a_process_that_was_killed_leaves_no_lock(tmp_path):
    """Not even while a process that it forked, such as a loader's, is still there."""
    (reader, writer), child = os.pipe(), os.fork()
    if child == 0:
        run = open_run(tmp_path)
        worker = os.fork()
        if worker:
            os.write(writer, str(worker).encode())
        signal.pause()
        run.finish()
    worker = int(os.read(reader, 10))
    with pytest.raises(UserError, match="--out: .* is in use by another process"):
        open_run(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    open_run(tmp_path)
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
    other[0] = math.nan
    with pytest.raises(FloatingPointError, match="^step 3: the loss is nan"):
        run.all_reduce(3, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    run = open_run(tmp_path)
    with pytest.raises(FloatingPointError, match=f"^step 5: the loss is {value}; .*--lr.*--precision"):
        run.all_reduce(5, torch.tensor([value, 1.0]))


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    run, model = saved_twice(tmp_path), nn.Linear(2, 2)
    before = (tmp_path / "last.pt").read_bytes()
    model.weight.data[1, 0] = math.inf
    with pytest.raises(FloatingPointError, match="^step 3: weight is not finite"):
        run.save(3, model=model)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, monkeypatch, number):
    run, model, ended = open_run(tmp_path), nn.Linear(2, 2), []
    before = signal.getsignal(number)
    monkeypatch.setattr(os, "kill", lambda process, signal: ended.append((process, signal)))
    for step in run.progress("train"):
        if step == 2:
            signal.raise_signal(number)
        run.all_reduce(step + 1, torch.ones(1))
        run.save_or_stop(step + 1, model=model)
        if ended:
            break
    assert ended == [(os.getpid(), number)] and signal.getsignal(number) == signal.SIG_DFL
    assert step == 2 and torch.load(tmp_path / "last.pt")["step"] == 3
    signal.signal(number, before)


def test_a_signal_after_the_last_all_reduce_is_not_lost(tmp_path, monkeypatch):
    run, ended = open_run(tmp_path), []
    monkeypatch.setattr(os, "kill", lambda process, signal: ended.append(signal))
    for step in run.progress("train"):
        run.all_reduce(step + 1, torch.ones(1))
        if step == run.steps - 1:
            signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGTERM]


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for step in open_run(tmp_path).progress("train"):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_asked_twice_is_an_interrupt(tmp_path):
    run = open_run(tmp_path)
    run._remember(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        run._remember(signal.SIGINT, None)


def test_images_per_second_leaves_out_the_evaluation(tmp_path, monkeypatch):
    run, clock = open_run(tmp_path, batch_size=8, log_every=1), [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    for step in run.progress("train"):
        clock[0] += 2
        run.all_reduce(step + 1, torch.ones(1))
        clock[0] += 100 * (step % 2)
        run.log(step + 1, loss=1.0, **{"val_loss": 1.0} if step % 2 else {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines] == [4.0] * 10


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    run, log, model, other = open_run(tmp_path), tmp_path / "metrics.jsonl", nn.Linear(2, 2), nn.Linear(2, 2)
    log.write_text('{"step": 1}\n{"step": 2}\n')
    run.save(2, model=model)
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    run.restore(model=other)
    assert run.start == 2 and torch.equal(model.weight, other.weight)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_checkpoint_the_log_begins_anew(tmp_path):
    run = open_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run.restore()
    assert run.start == 0 and not (tmp_path / "metrics.jsonl").read_text()


# ---- Writing, and what was damaged ----

def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, kept = tmp_path / "last.pt", tmp_path / "previous.pt"
    for text in (b"1", b"2", b"3"):
        training.write_atomically(path, lambda file: file.write(text), keep=kept)
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


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def flip(content, at, bit):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


HURT = {"truncated": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "zeroed": lambda b: bytes(len(b)),
        "a bit flipped": lambda b: flip(b, len(b) // 2, 2), "code": lambda b: pickle.dumps(Payload()),
        "missing": None}


def test_only_as_many_checkpoints_are_read_as_needed(tmp_path, monkeypatch):
    saved_twice(tmp_path)
    read, damage = [], training.damage
    monkeypatch.setattr(training, "damage", lambda path: read.append(path.name) or damage(path))
    open_run(tmp_path).restore(model=nn.Linear(16, 16))
    assert read == ["last.pt"]


def test_a_run_goes_on_in_fp16_where_it_began_without(tmp_path):
    """As where it moves from a CPU to a GPU: the gradient scaler was off, and saved nothing."""
    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    model = nn.Linear(2, 2)
    open_run(tmp_path).save(3, model=model, scaler=off)
    run = open_run(tmp_path)
    run.restore(model=model, scaler=on)
    assert run.start == 3 and on.get_scale() == torch.amp.GradScaler("cpu").get_scale()


@pytest.mark.parametrize("how", HURT)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how, capsys):
    saved_twice(tmp_path)
    last, model = tmp_path / "last.pt", nn.Linear(16, 16)
    content = last.read_bytes()
    last.unlink()
    if HURT[how]:
        last.write_bytes(HURT[how](content))
    run = open_run(tmp_path)
    run.restore(model=model)
    said = capsys.readouterr().out
    assert run.start == 1 and (model.weight == 1).all() and "executed" not in said
    if HURT[how]:
        assert "last.pt is damaged" in said
        assert (tmp_path / "last.pt.damaged").read_bytes() == HURT[how](content)
    run.save(3, model=model)    # the damaged one does not become previous.pt
    assert torch.load(tmp_path / "previous.pt")["step"] == 1 and torch.load(last)["step"] == 3


def test_two_damaged_checkpoints_are_an_error_and_stay(tmp_path):
    saved_twice(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="last.pt is damaged .* and .*previous.pt is damaged .*--fresh"):
        open_run(tmp_path).restore(model=nn.Linear(16, 16))
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "previous.pt").read_bytes() == b"nothing"


def tables_of(path):
    """Places of the bytes of a zip archive that are no file's content: headers and tables."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        places = set(range(path.stat().st_size))
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            start = entry.header_offset + 30 + name + extra
            places -= set(range(start, start + entry.compress_size))
    return sorted(places)


def noticed_flips(path, places, count, rng):
    """How many of count flipped bits training.damage notices; the others must change nothing loaded."""
    whole, expected, noticed = path.read_bytes(), torch.load(path), 0
    for _ in range(count):
        at, bit = rng.choice(places), rng.randrange(8)
        path.write_bytes(flip(whole, at, bit))
        if training.damage(path):
            noticed += 1
        else:
            state = torch.load(path, weights_only=True)
            assert state["step"] == expected["step"] and equal(state["model"], expected["model"]), (at, bit)
    path.write_bytes(whole)
    return noticed


def test_a_flip_of_any_bit_is_noticed_or_harmless(tmp_path):
    """Anywhere in the file, and in the zip archive's tables, which no checksum covers."""
    saved_twice(tmp_path)
    path, rng = tmp_path / "last.pt", random.Random(0)
    assert training.damage(path) is None
    assert noticed_flips(path, range(path.stat().st_size), 300, rng) > 150
    assert noticed_flips(path, tables_of(path), 300, rng) > 50


def test_a_wrong_table_of_contents_is_noticed(tmp_path):
    """torch.load reads nothing of an entry marked as a folder, and does not find one of another name."""
    path = tmp_path / "last.pt"
    torch.save({"step": 1, "model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        at, entries = archive.start_dir, archive.infolist()
    for entry in entries:
        end = at + 46 + len(entry.filename)
        for place, bit in ((at + 38, 4), (end - 1, 0), (end - 1, 1)):    # the mark; the last digit
            path.write_bytes(flip(whole, place, bit))
            assert training.damage(path), (entry.filename, place, bit)
        at = end + len(entry.extra)
