"""Runs of a tiny model that are killed, run out of disk space, or find damaged files or NaN.

The same command again must give the log and the weights of an undisturbed run, bit for bit.
`python -m pytest -m long tests/test_faults.py` ends with a table of the faults.
"""
import json
import os
import random
import re
import shutil
import socket
import subprocess
import time
import zipfile
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
import torch
from conftest import alive, at, equal, finished, kill_all, log, said, start

pytestmark = pytest.mark.long
STEPS = 100


# ---- Runs, their processes and their files ----

@pytest.fixture(scope="module")
def flags(tokenizer):
    return ["--tokenizer", tokenizer, "--drop-path", 0.2, "--steps", STEPS, "--save-every", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Number of processes -> folder of an undisturbed run, for 1 and 2."""
    folders = {processes: tmp_path_factory.mktemp(f"whole{processes}") for processes in (1, 2)}
    runs = [start(folder, *flags, processes=processes) for processes, folder in folders.items()]
    for run in runs:
        finished(run)
    return folders


def wait_until(process, condition):
    """Wait until condition() holds. The process must not end before that."""
    deadline = time.monotonic() + 240
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline, said(process)
        time.sleep(0.001)
    assert condition(), said(process)


def lines(out):
    """Number of lines in metrics.jsonl, one per step."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process, out, steps, lives=1):
    """Wait until a run has logged `steps` more steps. lives: number of times it must have been started."""
    wait_until(process, lambda: said(process)[0].count(" steps of ") >= lives)
    wanted = lines(out) + steps
    wait_until(process, lambda: lines(out) >= wanted)


def pid_of_rank(process, rank):
    """The pid of a process that torchrun started."""
    return sorted(pid for pid, parent in alive(process).items() if parent == process.pid)[rank]


def errors(output):
    """The lines of error that the script prints, not Python or torchrun."""
    return re.findall(r"^\w+\.py: error: .*$", "\n".join(output), flags=re.M)


def assert_one_error(output, pattern):
    """Assert that the script printed one line of error, which matches, and no traceback."""
    error, = errors(output)
    assert re.search(pattern, error) and "Traceback" not in "\n".join(output), output


def assert_same_end(out, whole):
    """Assert that the run ended as the undisturbed one, bit for bit, and left no half-written file."""
    state, expected = (torch.load(folder / "model.pt")["model"] for folder in (out, whole))
    assert log(out) == log(whole) and equal(state, expected) and not list(out.glob("*.part"))
    assert (out / "result.json").read_text() == (whole / "result.json").read_text()


def load_checkpoint(path):
    """Load last.pt or previous.pt, and assert that its checksums are right."""
    assert zipfile.ZipFile(path).testzip() is None
    return torch.load(path)


def almost_finished(whole, out):
    """Make the folder of a run that was killed after its last checkpoint."""
    shutil.copytree(whole, out)
    for name in ("result.json", "model.pt", "predictions.png"):
        (out / name).unlink()


# ---- kill -9 ----

@pytest.mark.parametrize("processes, kills", [(1, 20), (2, 2)])
def test_kill_9_at_random_moments(processes, kills, flags, whole, tmp_path, record_fault):
    """During start-up, steps and checkpoints. A checkpoint every second step takes as long as a step."""
    out, rng = tmp_path / "run", random.Random(0)
    for n in range(kills):
        process = start(out, *flags, processes=processes)
        wait_for_steps(process, out, rng.choice([0, 1, 1, 2, 3]))
        time.sleep(rng.random() * 0.03)
        os.kill(process.pid if processes == 1 else pid_of_rank(process, 1 - n % 2), SIGKILL)
        finished(process, -SIGKILL if processes == 1 else 1)
    finished(start(out, *flags, processes=processes))
    assert_same_end(out, whole[processes])
    record_fault(f"kill -9 of one of {processes} processes at random moments of a run", kills)


KILL_AT_THIRD = """
def kill_at_third(name, ending, before=lambda path: None):
    # kill this process at its third call of os.fsync or os.replace for a file whose name ends so
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
        for path in out.glob("*.pt"):
            load_checkpoint(path)
    finished(start(out, *flags))
    assert_same_end(out, whole[1])
    record_fault("kill -9 while last.pt is written: half a file, before each rename", len(MOMENTS))


def test_kill_9_after_the_last_step(flags, whole, tmp_path, record_fault):
    """Then only the last evaluation and the files written after it are missing."""
    out = tmp_path / "run"
    almost_finished(whole[1], out)
    output, _ = finished(start(out, *flags))
    assert f"after step {STEPS} of {STEPS}" in output, output
    assert_same_end(out, whole[1])
    record_fault("kill -9 after the last step", 1)


SLEEP_IN_SECOND_EPOCH = """
import data, time
get = data.Views.__getitem__
def hurt(views, key):
    if key[0] == 1:
        time.sleep(60)
    return get(views, key)
data.Views.__getitem__ = hurt
"""


def test_kill_9_of_a_run_with_loader_processes(flags, whole, tmp_path, record_fault):
    """Its loader processes live on, and must not keep the folder locked."""
    out, flags = tmp_path / "run", [*flags, "--workers", 2]
    process = start(out, *flags, hurt=SLEEP_IN_SECOND_EPOCH)
    wait_for_steps(process, out, 10)    # the first epoch
    process.kill()
    finished(start(out, *flags))
    assert len(alive(process)) == 2
    assert_same_end(out, whole[1])
    record_fault("kill -9 with loader processes that live on", 1)


@pytest.mark.parametrize("script, more", [
    ("train_dvae", "--image-size 16 --vocab-size 64 --hidden 8"),
    ("finetune", "--drop-path 0.2 --mixup 0.8 --cutmix 1 --eval-every 10"),
    ("segment", "--drop-path 0.2 --jitter 0.5"),
    ("probe", "--eval-every 10")])
def test_kill_9_of_the_other_scripts(script, more, whole, tmp_path, record_fault):
    flags = ["--steps", 30, *more.split()]
    if script != "train_dvae":
        flags += ["--init", whole[1] / "model.pt"]
    undisturbed, process = (start(tmp_path / name, *flags, script=script) for name in ("whole", "killed"))
    wait_for_steps(process, tmp_path / "killed", 5)
    process.kill()
    finished(process, -SIGKILL)
    output, _ = finished(start(tmp_path / "killed", *flags, script=script))
    assert f"continuing {tmp_path / 'killed'} after step" in output
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
    """Ctrl-C reaches the group of processes, but must not end the loader process, for which the step waits.
    torchrun passes its signal on."""
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
    assert load_checkpoint(out / "last.pt")["step"] == log(out)[-1]["step"] >= 4
    record_fault(f"{number.name} to {'the group of a process' if processes == 1 else 'torchrun'}", 1)


SLEEP_IN = """
import data, time, weights
def sleep(*args, **kwargs):
    print("asleep", flush=True)
    time.sleep(60)
{} = sleep
"""


@pytest.mark.parametrize("number, status", [(SIGINT, 128 + SIGINT), (SIGTERM, -SIGTERM)])
@pytest.mark.parametrize("script, slow", [
    ("pretrain", "data.open_splits"), ("pretrain", "weights.load_tokenizer"), ("finetune", "weights.load")])
def test_a_signal_before_the_first_step_ends_at_once(number, status, script, slow, tmp_path, record_fault):
    """While images are listed, or a tokenizer or weights are loaded."""
    flags = ["--tokenizer", "x"] if script == "pretrain" else ["--init", "x"]
    process = start(tmp_path, *flags, script=script, hurt=SLEEP_IN.format(slow))
    wait_until(process, lambda: "asleep" in said(process)[0])
    os.kill(process.pid, number)
    _, err = finished(process, status, seconds=10)
    assert "Traceback" not in err
    record_fault(f"{number.name} before the first step of {script}.py", 1)


def test_a_signal_to_one_rank_stops_all(flags, tmp_path, record_fault):
    """It comes between the all-reduce of step 5 and the end of that step: all stop after step 6."""
    hurt = at(5, "_log", "os.kill(os.getpid(), signal.SIGTERM)", rank=1)
    output, _ = finished(start(tmp_path, *flags, "--save-every", 100, processes=2, hurt=hurt), 1)
    assert "SIGTERM: stopped after step 6" in output and load_checkpoint(tmp_path / "last.pt")["step"] == 6
    record_fault("SIGTERM to one of two ranks", 1)


def test_torchrun_restarts_by_itself(flags, whole, tmp_path, record_fault):
    """--fresh renames the older folder once, not at each restart."""
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


def test_one_of_two_torchruns_is_lost(flags, whole, tmp_path, record_fault):
    """The first torchrun holds the rendezvous, and waits until the second one is started again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    """mount(size) -> a folder on a file system of `size` bytes. A second call changes the size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        remount = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        return folder
    yield mount
    subprocess.run(["umount", folder], capture_output=True)


FILL_AFTER = """
import contextlib
save = run.Run._save
run.Run._draw_gallery = lambda self: None    # pictures would take room
def hurt(self):
    save(self)
    if self.step == {}:
        with contextlib.suppress(OSError), open(self.folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
run.Run._save = hurt
"""


@pytest.mark.parametrize("name, checkpoints, filled_after, saved", [
    ("last.pt", 2.5, None, 4), ("metrics.jsonl", 20, 30, 30), ("model.pt", 20, STEPS, STEPS)])
def test_a_full_disk(name, checkpoints, filled_after, saved, flags, whole, small_disk, record_fault):
    """The disk holds `checkpoints` checkpoints, and is full after that of step filled_after."""
    size = (whole[1] / "last.pt").stat().st_size
    out = small_disk(int(checkpoints * size)) / "run"
    flags = [*flags, "--save-every", 30 if filled_after else 2]
    output = finished(start(out, *flags, hurt=FILL_AFTER.format(filled_after)), 1)
    free = "" if name == "metrics.jsonl" else r".*; 0\.\d MiB are free"
    assert_one_error(output, rf"{out / name} could not be written .*No space left{free}")
    assert load_checkpoint(out / "last.pt")["step"] == saved
    assert not list(out.glob("*.part")) and not (out / "model.pt").exists()
    small_disk(20 * size)
    (out / "filler").unlink(missing_ok=True)
    finished(start(out, *flags))
    assert_same_end(out, whole[1])
    record_fault(f"a full disk at {name}", 1)


def test_a_file_that_may_not_grow(flags, whole, tmp_path, record_fault):
    """RLIMIT_FSIZE of two processes: the second one writes nothing, and must end all the same."""
    limit = (whole[1] / "last.pt").stat().st_size // 2
    hurt = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    error, = errors(finished(start(tmp_path, *flags, processes=2, hurt=hurt), 1))
    assert re.search("last.pt could not be written .*(File too large|unexpected pos)", error)    # of PyTorch
    assert len(log(tmp_path)) == 2
    assert not list(tmp_path.glob("*.pt*"))
    record_fault("a checkpoint over the limit of a file's size, two processes", 1)


# ---- Damaged files ----

def flip_bit(content):
    middle = len(content) // 2    # in the numbers of a tensor, where only checksums detect it
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1:]


def enlarge_last_entry(content):
    """Set its sizes in the zip directory so that reading it raises EOFError(), which has no message."""
    sizes = content.rindex(b"PK\1\2") + 20
    return content[:sizes] + 2 * b"\xff\xff\xff\x00" + content[sizes + 8:]


DAMAGE = {"truncated": lambda content: content[:len(content) // 3],
          "zeroed": lambda content: bytes(len(content)),
          "bit-flipped": flip_bit,
          "with a wrong size in its zip directory": enlarge_last_entry}


def damage(path, kind):
    path.write_bytes(DAMAGE[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGE)
def test_previous_pt_replaces_a_damaged_last_pt(kind, flags, whole, tmp_path, record_fault):
    out = tmp_path / "run"
    almost_finished(whole[1], out)
    damage(out / "last.pt", kind)
    output, _ = finished(start(out, *flags))
    assert "last.pt is damaged" in output and f"after step {STEPS - 2} of {STEPS}" in output, output
    assert_same_end(out, whole[1])
    record_fault(f"last.pt {kind}: previous.pt is used", 1)


def test_two_damaged_checkpoints_are_an_error_and_stay_as_they_are(flags, whole, tmp_path, record_fault):
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
    hurt = at(8, "_all_reduce", "values[0][0] = float('nan')", rank=1)
    output = finished(start(tmp_path, *flags, processes=2, hurt=hurt), 1)
    error, = set(errors(output))    # torchrun may end a process before it has printed the same
    assert "error: step 8: the loss is nan; " in error and 'pretrain.py", line' not in output[1], output
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 6 and all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert len(log(tmp_path)) == 7
    record_fault("nan in the loss of one of two ranks", 1)


# ---- One folder, two runs ----

def test_two_runs_in_one_folder(flags, tmp_path, record_fault):
    """Started at once, with different configurations: one of them gets the folder; kill -9 frees it."""
    commands = [[tmp_path / "run", *flags, "--steps", 100_000, "--seed", seed] for seed in (0, 1)]
    runs = [start(*command) for command in commands]
    wait_until(runs[0], lambda: not all(run.is_alive() for run in runs))
    winner = 0 if runs[0].is_alive() else 1
    in_use = "--out: .* is in use by another process"
    assert_one_error(finished(runs[1 - winner], 2), in_use)
    wait_for_steps(runs[winner], tmp_path / "run", 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == winner
    assert_one_error(finished(start(*commands[winner]), 2), in_use)
    runs[winner].kill()
    finished(runs[winner], -SIGKILL)
    third = start(*commands[winner])
    wait_for_steps(third, tmp_path / "run", 2)
    record_fault("two runs in one folder: started at once, a second one later, one after kill -9", 3)
