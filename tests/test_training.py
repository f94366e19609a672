import dataclasses
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import checkpoints
import data
import dvae
import pretrain
import training
import vit
from conftest import ROOT
from training import UserError


# schedules and groups ------------------------------------------------------------------------------------------------

def test_learning_rate_schedule():
    rate = [training.warmup_cosine(step, 110, 1.0, 0.1, 10) for step in range(111)]
    assert rate[0] == pytest.approx(0.1) and rate[4] == pytest.approx(0.5) and rate[9] == pytest.approx(1)
    assert rate[10] == pytest.approx(1) and rate[60] == pytest.approx(0.55) and rate[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert max(training.warmup_cosine(step, 4, 1.0, 2.0, 0.4) for step in range(4)) == 1    # no overshoot, no rise


def test_cosine_stays_at_its_end():
    assert training.cosine(0, 10, 3.0, 1.0) == 3 and training.cosine(10, 10, 3.0, 1.0) == 1 == training.cosine(99, 10, 3.0, 1.0)
    assert training.cosine(5, 0, 3.0, 1.0) == 1


def test_what_is_decayed():
    for position in ("absolute", "relative", "shared_relative"):
        model = vit.MaskedImageModel(vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=2, heads=2, position=position, layer_scale=0.1), 5)
        decayed, plain = training.parameter_groups(model, 0.05)
        names = {id(p): name for name, p in model.named_parameters()}
        assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
        assert {names[id(p)] for p in plain["params"]} == {
            name for name in names.values() if re.search(r"bias$|norm|gamma|cls_token|pos_embed", name)}
        assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_layer_decay():
    """Each layer's rate by hand: 0.5 ** (depth + 1 - l), of embeddings l = 0, of block l, of the head depth + 1."""
    model = vit.ImageClassifier(vit.ViTConfig(image_size=16, patch_size=8, dim=8, depth=2, heads=2, position="shared_relative"), 3)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in training.parameter_groups(model, 0.05, 0.5) for p in group["params"]}
    assert scales.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, scale in scales.items():
        expected = {"blocks.0": 0.25, "blocks.1": 0.5, "fc_norm.": 1, "head.wei": 1, "head.bia": 1}.get(name[:8], 0.125)
        assert scale == expected, name
    optimizer = training.adamw(training.parameter_groups(model, 0.05, 0.5))
    training.set_lr(optimizer, 0.1)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.0125, 0.025, 0.05, 0.1])


def test_linear_schedule():
    lr = [training.warmup_linear(step, 10, 1.0, 0.0, 2) for step in range(11)]
    assert lr[:3] == [0.5, 1.0, 1.0] and lr[10] == 0 and lr[6] == pytest.approx(0.5)


def test_clipping():
    for clip, expected in ((1.0, 1.0), (0.0, 5.0)):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        seen = []
        optimizer = torch.optim.SGD([weight], lr=1.0)
        norm = training.Precision("fp32", torch.device("cpu")).update(optimizer, clip)
        seen.append(weight.norm().item())
        assert norm.item() == pytest.approx(5) and seen == [pytest.approx(expected)] and weight.grad is None


def test_each_step_and_process_draws_its_own(monkeypatch):
    def draw(seed, step, rank):
        monkeypatch.setenv("RANK", str(rank))
        training.seed_step(seed, step)
        return torch.rand(1).item()
    draws = [draw(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len(set(draws)) == 4 and draw(0, 0, 0) == draws[0]


# command line --------------------------------------------------------------------------------------------------------

def parse(*flags, module=pretrain):
    return training.parse(module.Config, module.PRESETS, [str(flag) for flag in flags])


def test_where_defaults_come_from():
    assert parse().preset == "demo" and parse().image_size == 64 and parse().out == "runs/pretrain-shapes"
    full = parse("--data", "/some/imagenet/")
    assert full.preset == "base" and full.dim == 768 and full.batch_size == 2048 and full.lr == 1.5e-3 and full.epochs == 800
    assert full.out == "runs/pretrain-imagenet" and full.num_masked == 78
    assert parse("--dim", 96).dim == 96 and parse("--preset", "large").clip_grad == 1.0
    assert parse("--steps", 7).steps == 7 and parse("--epochs", 2).steps is None
    assert parse(module=dvae).vocab_size == 1024 and parse("--data", "x", module=dvae).vocab_size == 8192
    assert parse("--pixel-mean", ".5", ".5", ".5").pixel_mean == (0.5, 0.5, 0.5)


def test_learning_rate_follows_the_batch(capsys):
    config = parse("--data", "x", "--batch-size", 512)
    assert config.lr == pytest.approx(1.5e-3 / 4) and config.min_lr == pytest.approx(1e-5 / 4)
    assert "0.000375 = 0.0015 x batch 512 / 2048" in capsys.readouterr().out
    assert parse("--data", "x", "--batch-size", 512, "--lr", 1e-3).lr == 1e-3 and "=" not in capsys.readouterr().out


@pytest.mark.parametrize("module", [pretrain, dvae])
def test_every_flag_is_explained_and_read(module, capsys):
    with pytest.raises(SystemExit):
        parse("--help", module=module)
    text = capsys.readouterr().out
    sources = "".join((ROOT / name).read_text() for name in ("data.py", f"{module.__name__}.py", "training.py", "vit.py"))
    sources = re.sub(r"    def __post_init__.*?(?=\n\n)", "", sources, flags=re.S)    # to refuse a value is not to read it
    for field in dataclasses.fields(module.Config):
        if field.name != "in_channels":
            assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", text), field.name
        if field.name not in ("preset", "in_channels"):
            assert re.search(rf"(config|self)\.{field.name}\b", sources), field.name


def test_too_few_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training.choose_device("auto") == torch.device("cuda", 0) and training.choose_device("cuda:1").index == 1
    with pytest.raises(UserError, match="--device"):
        training.choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "2"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert training.choose_device("cuda").index == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--device: 4 GPUs are needed and 2 are here"):
        training.choose_device("auto")


# files ---------------------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.write_atomically(path, lambda file: file.write(b"old"))

    def break_off(file):
        file.write(b"ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        checkpoints.write_atomically(path, break_off)
    assert path.read_bytes() == b"old"


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_files_that_are_no_checkpoints(tmp_path):
    marker = tmp_path / "executed"
    whole = tmp_path / "whole.pt"
    torch.save({"model": {"a": torch.ones(1000)}}, whole)
    files = {"html.pt": b"<html>not found</html>", "empty.pt": b"", "half.pt": whole.read_bytes()[:900],
             "payload.pt": pickle.dumps(Payload(marker))}
    torch.save({"model": Payload(marker)}, tmp_path / "zip-payload.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "zip-payload.pt", "list.pt", "absent.pt", "."]:
        with pytest.raises(UserError, match="^--tokenizer: ") as error:
            checkpoints.read_checkpoint(tmp_path / name, "--tokenizer")
        assert "\n" not in str(error.value)
    assert not marker.exists()
    assert checkpoints.read_checkpoint(whole, "--tokenizer")["model"]["a"].sum() == 1000


def test_a_checkpoint_is_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    path, keep = tmp_path / "last.pt", tmp_path / "previous.pt"
    for text in (b"1", b"2", b"3"):
        checkpoints.write_atomically(path, lambda file: file.write(text), keep=keep)
    assert path.read_bytes() == b"3" and keep.read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 2


def test_signals_are_obeyed_where_there_is_nothing_to_save():
    with training.processes(parse()):
        assert signal.getsignal(signal.SIGTERM) == training._remember_signal
        training.obey_signals()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_profile_has_the_cpus_time_of_a_label_that_the_gpu_has_too():
    def event(key, cpu, gpu):
        return types.SimpleNamespace(key=key, count=1, cpu_time_total=cpu, self_cpu_time_total=cpu, device_time_total=gpu, self_device_time_total=gpu)
    events = [event("forward", 1e6, 0), event("forward", 0, 5e5), event("aten::mm", 9e5, 4e5)]
    said = training.where_time_goes(types.SimpleNamespace(key_averages=lambda: events), 2.0)
    assert re.search(r"forward +1\.000 +50% +0\.500", said) and "aten::mm" in said


def open_run(folder, **more):
    config = parse("--out", folder, *[text for name, value in more.items() for text in (f"--{name.replace('_', '-')}", value)])
    return training.Run(config, torch.device("cpu"), 10)


def test_out_continues_refuses_and_sets_aside(tmp_path):
    folder = tmp_path / "run"
    run = open_run(folder)
    assert not run.finished and json.loads((folder / "config.json").read_text())["preset"] == "demo"
    assert not open_run(folder, workers=3).finished                    # the number of workers is no part of the run
    with pytest.raises(UserError) as error:
        open_run(folder, lr=0.5, seed=4)
    assert re.search(rf"--out: .*lr \({parse().lr:g}, now 0.5\).*seed \(0, now 4\).*--fresh", str(error.value))
    run.finish(nn.Linear(1, 1), {}, loss=1.0)
    assert open_run(folder).finished
    fresh = parse("--out", folder, "--seed", 4, "--fresh")
    assert not training.Run(fresh, torch.device("cpu"), 10).finished
    assert (tmp_path / "run.old-1" / "result.json").exists() and not (folder / "result.json").exists()


def test_images_per_second_leaves_out_what_evaluating_takes(tmp_path, monkeypatch):
    run, clock = open_run(tmp_path / "run", batch_size=8, log_every=1), [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    for step in run.progress("train"):
        clock[0] += 2
        run.exchange(step + 1, torch.ones(1))
        clock[0] += 100 * (step % 2)
        run.log(step + 1, loss=1.0, lr=0.1, **({"val_loss": 1.0} if step % 2 else {}))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines] == [4.0] * 10


def test_a_run_from_before_init_std_continues(tmp_path):
    file = tmp_path / "run/config.json"
    open_run(tmp_path / "run").finish(nn.Linear(1, 1), {}, loss=1.0)
    config = json.loads(file.read_text())
    del config["init_std"]
    file.write_text(json.dumps(config))
    assert open_run(tmp_path / "run").finished
    with pytest.raises(UserError, match="init_std .0.02, now 0.05."):
        open_run(tmp_path / "run", init_std=0.05)


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="^--out: "):
            open_run(out)


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    run = open_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    model = nn.Linear(2, 2)
    run.save(2, model=model, notes={"a": 1})
    (tmp_path / "metrics.jsonl").open("a").write("")
    other = nn.Linear(2, 2)
    assert run.restore(model=other) == {"a": 1} and run.start == 2 and torch.equal(model.weight, other.weight)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    run = open_run(tmp_path)
    run.save(3, model=nn.Linear(2, 2))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match=f"^step 5: the loss is {value}, on rank 0 .*last.pt") as error:
        run.exchange(5, torch.tensor([value, 1.0]))
    assert error.value.status == 1 and (tmp_path / "last.pt").read_bytes() == before


def test_the_samples_of_a_bad_loss_are_named(tmp_path):
    run = open_run(tmp_path)
    order = data.GlobalBatches(40, 4, seed=0, start=0, stop=20)
    run.batches(torch.utils.data.DataLoader(range(40), batch_sampler=order))
    names = ", ".join(str(index) for _, index in list(order)[12])
    with pytest.raises(UserError, match=f"step 13: the loss is nan, on rank 0 .samples {names}.; "):
        run.exchange(13, torch.tensor([math.nan]))


# damaged and missing checkpoints, a folder that two runs want ---------------------------------------------------------

def saved_twice(tmp_path):
    """A run's folder with checkpoints of steps 1 (weights 1) and 2 (weights 2)."""
    run, model = open_run(tmp_path), nn.Linear(64, 64)
    for step in (1, 2):
        nn.init.constant_(model.weight, step)
        run.save(step, model=model)
    return run


HURT = {"truncated": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "zeroed": lambda b: bytes(len(b)),
        "a bit flipped": lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 4]) + b[len(b) // 2 + 1:]}


@pytest.mark.parametrize("how", HURT)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how, capsys):
    saved_twice(tmp_path)
    last, model = tmp_path / "last.pt", nn.Linear(64, 64)
    last.write_bytes(HURT[how](last.read_bytes()))
    run = open_run(tmp_path)
    run.restore(model=model)
    assert run.start == 1 and (model.weight == 1).all() and "last.pt is damaged" in capsys.readouterr().out
    run.save(3, model=model)                                            # the damaged one does not become previous.pt
    assert torch.load(tmp_path / "previous.pt")["step"] == 1 and torch.load(last)["step"] == 3


def test_a_flip_of_any_bit_is_found_or_harmless(tmp_path):
    saved_twice(tmp_path)
    path, rng = tmp_path / "last.pt", random.Random(0)
    whole, expected = path.read_bytes(), torch.load(path)["model"]["weight"]
    for _ in range(100):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        assert checkpoints.damage(path) or torch.equal(torch.load(path)["model"]["weight"], expected), at


def test_two_damaged_checkpoints_are_an_error_and_stay(tmp_path):
    saved_twice(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="last.pt is damaged .* and .*previous.pt is damaged .*--fresh"):
        open_run(tmp_path).restore(model=nn.Linear(64, 64))
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "previous.pt").read_bytes() == b"nothing"


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run = saved_twice(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"some")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint of step 3 could not be written .*No space.* needs 0.0 MB, [\d,.]+ MB are free; .*last.pt") as error:
        run.save(3, model=nn.Linear(64, 64))
    assert error.value.status == 1 and (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_a_folder_in_use_is_refused_and_a_crash_frees_it(tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from training import Lock; from pathlib import Path; "
            "lock = Lock(Path(sys.argv[2])); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="--out: .* is in use by another process"):
            open_run(tmp_path)
    finally:
        other.kill()
        other.wait()
    first = open_run(tmp_path)
    assert open_run(tmp_path)._lock is first._lock                      # the process itself may open it again


def test_profile_shows_the_parts_of_a_step(tmp_path, capsys):
    config = training.parse(pretrain.Config, pretrain.PRESETS, ["--steps", "6", "--batch-size", "2", "--target", "pixels", "--profile", "--out", str(tmp_path / "run"),
                                                               "--dim", "16", "--depth", "1", "--heads", "2"])
    pretrain.train(config, torch.device("cpu"))
    table = capsys.readouterr().out.split("part of a step")[1].splitlines()
    shares = {line.split()[0]: float(line.split()[2].rstrip("%")) for line in table[1:6]}
    assert set(shares) == {"data", "forward", "backward", "optimizer", "communication"} and 20 < sum(shares.values()) <= 101
    assert json.loads((tmp_path / "run/result.json").read_text())["val_loss"] > 0
