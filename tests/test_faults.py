"""Runs of a tiny model, alone and under torchrun, that are killed, short of disk, given damaged files or NaN.

The same command again must give the log and the weights of an undisturbed run, bit for bit.
`python -m pytest -m long tests/test_faults.py` ends with a table of the faults.
"""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch
from conftest import alive, at, equal, finished, kill_all, log, said, start

import training

pytestmark = pytest.mark.long
STEPS = 100


# ---- Runs, their processes and their files ----

@pytest.fixture(scope="module")
def flags(tokenizer):
    return ["--tokenizer", tokenizer, "--drop-path", 0.2, "--steps", STEPS, "--save-every", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Folders of the undisturbed runs, by the number of their processes: {1: folder, 2: folder}."""
    folders = {processes: tmp_path_factory.mktemp(f"whole{processes}") for processes in (1, 2)}
    runs = [start(folder, *flags, processes=processes) for processes, folder in folders.items()]
    for run in runs:
        finished(run)
    return folders


def wait_until(process, true):
    deadline = time.monotonic() + 240
    while process.is_alive() and not true():
        assert time.monotonic() < deadline, said(process)
        time.sleep(0.001)
    assert true(), said(process)


def lines(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process, out, steps, lives=1):
    """Until a run has logged so many steps more. lives: how often it has begun or continued by then."""
    wait_until(process, lambda: said(process)[0].count(" steps of ") >= lives)
    wanted = lines(out) + steps
    wait_until(process, lambda: lines(out) >= wanted)


def pid_of_rank(process, rank):
    """Of a process of torchrun's."""
    return sorted(pid for pid, parent in alive(process).items() if parent == process.pid)[rank]


def errors(output):
    """The lines in which a script itself reports an error."""
    return re.findall(r"^\w+\.py: error: .*$", "\n".join(output), flags=re.M)


def assert_one_error(output, pattern):
    """One line of error, which matches, and no traceback."""
    error, = errors(output)
    assert re.search(pattern, error) and "Traceback" not in "\n".join(output), output


def assert_same_end(out, whole):
    """The run ended as the undisturbed one, bit for bit, and left no half-written file."""
    ours, theirs = (torch.load(folder / "model.pt")["model"] for folder in (out, whole))
    assert log(out) == log(whole) and equal(ours, theirs) and not list(out.glob("*.part"))


def almost_finished(whole, out):
    """Make the folder of a run that was killed after its last step."""
    shutil.copytree(whole, out)
    for name in ("result.json", "model.pt", "predictions.png"):
        (out / name).unlink()


# ---- kill -9 ----

@pytest.mark.parametrize("processes, kills", [(1, 20), (2, 2)])
def test_kill_9_at_random_moments(processes, kills, flags, whole, tmp_path, record_fault):
    """In one run's life. A checkpoint every second step takes as long as a step: many kills come in one."""
    out, rng = tmp_path / "run", random.Random(0)
    for n in range(kills):
        process = start(out, *flags, processes=processes)
        wait_for_steps(process, out, rng.choice([0, 0, 1, 2, 3]))
        time.sleep(rng.random() * 0.03)
        os.kill(process.pid if processes == 1 else pid_of_rank(process, 1 - n % 2), SIGKILL)
        finished(process, -SIGKILL if processes == 1 else 1)
    finished(start(out, *flags, processes=processes))
    assert_same_end(out, whole[processes])
    record_fault(f"kill -9 of one of {processes} processes at random moments of a run", kills)


KILL_AT_THIRD = """
def kill_at_third(name, ending, before=lambda path: None):    # call of os.fsync or os.replace for such a file
    function, calls = getattr(os, name), []
    def hurt(*args):
        path = str(args[1]) if name == "replace" else os.readlink(f"/proc/self/fd/{args[0]}")
        if path.endswith(ending):
            calls.append(path)
        if len(calls) == 3:
            before(path)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    setattr(os, name, hurt)
"""
MOMENTS = {
    "half of the file is written": "'fsync', '.pt.part', lambda path: os.truncate(path, 20_000)",
    "before previous.pt is renamed": "'replace', 'previous.pt'",
    "before last.pt is renamed": "'replace', 'last.pt'"}


def test_kill_9_at_each_moment_of_a_checkpoint_write(flags, whole, tmp_path, record_fault):
    out = tmp_path / "run"
    for moment, arguments in MOMENTS.items():
        finished(start(out, *flags, hurt=f"{KILL_AT_THIRD}\nkill_at_third({arguments})"), -SIGKILL)
        assert list(out.glob("*.part")), moment
        assert not any(training.damage(path) for path in out.glob("*.pt")), moment
    finished(start(out, *flags))
    assert_same_end(out, whole[1])
    record_fault("kill -9 while last.pt is written: half a file, before each rename", len(MOMENTS))


def test_kill_9_of_a_run_with_loader_processes(flags, whole, tmp_path, record_fault):
    """They outlive it by seconds, and must not hold its folder."""
    out, stopped = tmp_path / "run", []
    process = start(out, *flags, "--workers", 2)
    wait_for_steps(process, out, 3)
    workers = [pid for pid, parent in alive(process).items() if parent == process.pid]
    process.kill()
    process.join()
    try:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):    # one may have ended
                os.kill(pid, signal.SIGSTOP)                 # the others live on
                stopped.append(pid)
        finished(start(out, *flags, "--workers", 2))
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    finished(process, -SIGKILL)
    assert stopped
    assert_same_end(out, whole[1])
    record_fault("kill -9 with loader processes that live on", 1)


@pytest.mark.parametrize("script, more", [
    ("finetune", "--drop-path 0.2 --mixup 0.8 --ema 0.9 --eval-every 10"),
    ("dvae", "--image-size 16 --vocab-size 64 --hidden 8")])
def test_kill_9_of_the_other_scripts(script, more, whole, tmp_path, record_fault):
    flags = ["--steps", 30, *more.split()]
    if script == "finetune":
        flags += ["--init", whole[1] / "model.pt"]
    undisturbed, process = (start(tmp_path / name, *flags, script=script) for name in ("whole", "killed"))
    wait_for_steps(process, tmp_path / "killed", 5)
    process.kill()
    finished(process, -SIGKILL)
    finished(start(tmp_path / "killed", *flags, script=script))
    finished(undisturbed)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    record_fault(f"kill -9 of {script}.py", 1)


# ---- Signals and torchrun ----

SLOW_LOADER = """
import data, time
get = data.Views.__getitem__
def hurt(views, key):
    time.sleep(0.02)
    return get(views, key)
data.Views.__getitem__ = hurt
"""


@pytest.mark.parametrize("number, processes", [(SIGINT, 1), (SIGTERM, 2)], ids=["Ctrl-C", "torchrun"])
def test_a_signal_ends_the_run_after_the_step(number, processes, flags, tmp_path, record_fault):
    """Ctrl-C reaches the whole group, but must not end the loader process, for which the step waits; torchrun
    passes its signal on."""
    out = tmp_path / "run"
    process = start(out, *flags, "--steps", 100_000, "--save-every", 100_000, "--workers", 1,
                    processes=processes, hurt=SLOW_LOADER)
    wait_for_steps(process, out, 4)
    if number == SIGINT:
        os.killpg(process.pid, SIGINT)
    else:
        os.kill(process.pid, number)
    output, _ = finished(process, -number if processes == 1 else 1)
    assert f"{number.name}: stopped after step" in output, output
    assert torch.load(out / "last.pt")["step"] == log(out)[-1]["step"] >= 4
    record_fault(f"{number.name} to {'the group of a process' if processes == 1 else 'torchrun'}", 1)


@pytest.mark.parametrize("number, status", [(SIGINT, 128 + SIGINT), (SIGTERM, -SIGTERM)])
@pytest.mark.parametrize("script, slow", [
    ("pretrain", "data.open_splits"), ("pretrain", "weights.load_tokenizer"), ("finetune", "weights.load")])
def test_a_signal_before_the_first_step_ends_at_once(number, status, script, slow, tmp_path, record_fault):
    """While images are listed, or weights are read."""
    hurt = f"import data, time, weights\n{slow} = lambda *args: print('slow', flush=True) or time.sleep(60)"
    flags = ["--tokenizer", "x"] if script == "pretrain" else ["--init", "x"]
    process = start(tmp_path, *flags, script=script, hurt=hurt)
    wait_until(process, lambda: "slow" in said(process)[0])
    os.kill(process.pid, number)
    _, err = finished(process, status, seconds=10)
    assert "Traceback" not in err
    record_fault(f"{number.name} before the first step of {script}.py", 1)


def test_a_signal_to_one_rank_stops_all(flags, tmp_path, record_fault):
    """It comes between the all-reduce of step 5 and the end of that step: all stop after step 6."""
    hurt = at(5, "log", "os.kill(os.getpid(), signal.SIGTERM)", rank=1)
    output, _ = finished(start(tmp_path, *flags, processes=2, hurt=hurt), 1)
    assert "SIGTERM: stopped after step 6" in output and torch.load(tmp_path / "last.pt")["step"] == 6
    record_fault("SIGTERM to one of two ranks", 1)


def test_torchrun_restarts_by_itself(flags, whole, tmp_path, record_fault):
    """--fresh sets the older folder aside once, not at each restart."""
    out = tmp_path / "run"
    almost_finished(whole[1], out)
    process = start(out, *flags, "--fresh", processes=2, torchrun=["--max-restarts=2"])
    for lives, rank in enumerate((1, 0), start=1):
        wait_for_steps(process, out, 4, lives)
        os.kill(pid_of_rank(process, rank), SIGKILL)
    output, _ = finished(process)
    assert output.count(f"continuing {out} after step") == 2 and len(list(tmp_path.glob("run.old-*"))) == 1
    assert_same_end(out, whole[2])
    record_fault("kill -9 of a rank under torchrun --max-restarts", 2)


def test_two_torchruns_and_one_is_lost(flags, whole, tmp_path, record_fault):
    """The one that does not hold the rendezvous: the other one waits until it is started again."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    torchrun = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d",
                "--rdzv_id=fault", f"--rdzv_endpoint=127.0.0.1:{port}"]
    first = start(tmp_path, *flags, torchrun=torchrun)
    time.sleep(1)    # it holds the rendezvous
    second = start(tmp_path, *flags, torchrun=torchrun)
    wait_until(first, lambda: lines(tmp_path) >= 4)
    kill_all(second)
    finished(second, -SIGKILL)
    second = start(tmp_path, *flags, torchrun=torchrun)
    finished(first)
    finished(second)
    assert_same_end(tmp_path, whole[2])
    record_fault("one of two torchruns killed with its process, and started again", 1)


# ---- Disks ----

@pytest.fixture
def small_disk(tmp_path):
    """mount(bytes) -> a folder on a file system of that size, or of another size from now on."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        how = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        return folder
    yield mount
    subprocess.run(["umount", folder], capture_output=True)


FILL_AFTER = """
import contextlib
save_or_stop = training.Run.save_or_stop
def hurt(run, step, **parts):
    save_or_stop(run, step, **parts)
    if step == {}:
        with contextlib.suppress(OSError), open(run.folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
training.Run.save_or_stop = hurt
"""


@pytest.mark.parametrize("name, checkpoints, filled_after, saved", [
    ("last.pt", 2.5, None, 4), ("metrics.jsonl", 20, 30, 30), ("model.pt", 20, STEPS, STEPS)])
def test_a_full_disk(name, checkpoints, filled_after, saved, flags, whole, small_disk, record_fault):
    """There is room for so many checkpoints, and for nothing more after a step."""
    size = (whole[1] / "last.pt").stat().st_size
    out = small_disk(int(checkpoints * size)) / "run"
    flags = [*flags, "--save-every", 30 if filled_after else 2]
    output = finished(start(out, *flags, hurt=FILL_AFTER.format(filled_after)), 1)
    free = "" if name == "metrics.jsonl" else r".*; 0\.\d MB are free"
    assert_one_error(output, rf"{out / name} could not be written .*No space left{free}")
    assert training.damage(out / "last.pt") is None and torch.load(out / "last.pt")["step"] == saved
    assert not list(out.glob("*.part")) and not (out / "model.pt").exists()
    small_disk(20 * size)
    (out / "filler").unlink(missing_ok=True)
    finished(start(out, *flags))
    assert_same_end(out, whole[1])
    record_fault(f"a full disk at {name}", 1)


def test_a_file_that_may_not_grow(flags, whole, tmp_path, record_fault):
    """RLIMIT_FSIZE of two processes: the second one has nothing to write, and must leave all the same."""
    limit = (whole[1] / "last.pt").stat().st_size // 2
    hurt = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    error, = errors(finished(start(tmp_path, *flags, processes=2, hurt=hurt), 1))
    assert re.search("last.pt could not be written .*File too large", error) and len(log(tmp_path)) == 2
    assert not list(tmp_path.glob("*.pt*"))
    record_fault("a checkpoint over the limit of a file's size, two processes", 1)


# ---- Damaged files ----

def flip_bit(whole):
    half = len(whole) // 2    # in the numbers of a tensor, where only checksums tell
    return whole[:half] + bytes([whole[half] ^ 64]) + whole[half + 1:]


DAMAGE = {"truncated": lambda whole: whole[:len(whole) // 3],
          "zeroed": lambda whole: bytes(len(whole)),
          "bit-flipped": flip_bit}


def damage(path, how):
    path.write_bytes(DAMAGE[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, flags, whole, tmp_path, record_fault):
    out = tmp_path / "run"
    almost_finished(whole[1], out)
    damage(out / "last.pt", how)
    output, _ = finished(start(out, *flags))
    assert "last.pt is damaged" in output and f"after step {STEPS - 2} of {STEPS}" in output, output
    assert_same_end(out, whole[1])
    record_fault(f"last.pt {how}: previous.pt is used", 1)


def test_two_damaged_checkpoints_are_one_line_and_stay(flags, whole, tmp_path, record_fault):
    out = tmp_path / "run"
    almost_finished(whole[1], out)
    damage(out / "last.pt", "truncated")
    damage(out / "previous.pt", "bit-flipped")
    before = {path: path.read_bytes() for path in out.iterdir()}
    output = finished(start(out, *flags), 2)
    assert_one_error(output, "--out: .*last.pt is damaged .* and .*previous.pt is damaged")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    record_fault("both damaged: one line, nothing overwritten", 1)


# ---- Numbers that are not finite ----

def test_nan_in_the_loss_of_one_rank_stops_all(flags, tmp_path, record_fault):
    """At step 8, after the checkpoint of step 6."""
    hurt = at(8, "all_reduce", "values[0][0] = float('nan')", rank=1)
    output = finished(start(tmp_path, *flags, processes=2, hurt=hurt), 1)
    error, = set(errors(output))    # torchrun may end a process before it has said the same
    assert "error: step 8: the loss is nan; " in error and 'pretrain.py", line' not in output[1], output
    checkpoint = torch.load(tmp_path / "last.pt")
    assert checkpoint["step"] == 6 and all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert len(log(tmp_path)) == 7
    record_fault("nan in the loss of one of two ranks", 1)


# ---- One folder, two runs ----

def test_two_runs_want_one_folder(flags, tmp_path, record_fault):
    """Started at once, with other configurations: one of them gets the folder; kill -9 frees it."""
    commands = [[tmp_path / "run", *flags, "--steps", 100_000, "--seed", seed] for seed in (0, 1)]
    both = [start(*command) for command in commands]
    wait_until(both[0], lambda: not all(process.is_alive() for process in both))
    won = 0 if both[0].is_alive() else 1
    in_use = "--out: .* is in use by another process"
    assert_one_error(finished(both[1 - won], 2), in_use)
    wait_for_steps(both[won], tmp_path / "run", 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == won
    assert_one_error(finished(start(*commands[won]), 2), in_use)
    both[won].kill()
    finished(both[won], -SIGKILL)
    third = start(*commands[won])
    wait_for_steps(third, tmp_path / "run", 2)
    record_fault("two runs in one folder: started at once, a second one later, one after kill -9", 3)
