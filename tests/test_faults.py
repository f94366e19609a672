"""Runs of a tiny model, alone and under torchrun, that are killed, short of disk, given damaged files or NaN.

The same command again must give the log and the weights of an undisturbed run, bit for bit.
`python -m pytest -m long tests/test_faults.py` ends with a table of the faults.
"""
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, equal, log
from test_data import fill

import training

pytestmark = pytest.mark.long
STEPS = 100
TWO = ["--standalone", "--nproc_per_node=2"]
# All processes, torchrun's too, are forked from one that has imported everything, to save most of their time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_faults", "dvae", "finetune", "pretrain"])
FORKED = ["--start-method=fork", "--run-path"]
# Without it, restarted processes meet in a store that still holds the addresses of the dead ones.
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


# ---- Runs, their processes and their files ----

def run_command(program, flags, torchrun, env, said):
    """`python program flags`, or `torchrun ... program flags`, in this process."""
    multiprocessing.set_start_method("fork", force=True)    # of loader processes
    os.setsid()
    for output in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), output)
    os.environ.update(env)
    sys.argv = list(map(str, [program, *flags]))
    if torchrun:
        torch.distributed.run.main([*FORKED, *torchrun, *sys.argv])
    else:
        runpy.run_path(program, run_name="__main__")


def start(folder, script, *flags, torchrun=(), env={}, hurt=None):
    """Start a script; its output goes to the file .said. hurt: Python code that runs before its main()."""
    said, program = folder / f"said-{time.monotonic_ns()}.txt", ROOT / f"{script}.py"
    said.touch()
    if hurt:
        program = said.with_suffix(".py")
        program.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                           f"import training, {script}\n{hurt}\n"
                           f"sys.argv[0] = '{script}.py'\n{script}.main()\n")
    process = PROCESSES.Process(target=run_command, args=(str(program), flags, torchrun, env, said))
    process.start()
    process.said = said
    started.append(process)
    return process


started = []


@pytest.fixture(autouse=True)
def leave_no_process():
    """After a test that failed, runs may still go on."""
    yield
    for process in started:
        kill_all(process)
    started.clear()


def kill_all(process):
    for pid in alive(process):
        with suppress(ProcessLookupError):    # it ended
            os.kill(pid, signal.SIGKILL)


def alive(process):
    """{pid: pid of its parent} of a run's processes: its own, torchrun's, and those that load images."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = file.read_text().rpartition(")")[2].split()[:4]
        except OSError:    # it ended
            continue
        if int(session) == process.pid and state != "Z":
            found[int(file.parent.name)] = int(parent)
    return found


def pid_of_rank(process, rank):
    """Of a process of torchrun's."""
    return sorted(pid for pid, parent in alive(process).items() if parent == process.pid)[rank]


def wait_until(true, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.is_alive() and time.monotonic() < deadline, process.said.read_text()
        time.sleep(0.001)


def wait_for_steps(process, out, steps, lives=1):
    """Until a run has logged so many steps more. lives: how often it has begun or continued by then."""
    wait_until(lambda: process.said.read_text().count(" steps of ") >= lives, process)
    path = out / "metrics.jsonl"

    def lines():
        return path.read_bytes().count(b"\n") if path.exists() else 0
    wanted = lines() + steps
    wait_until(lambda: lines() >= wanted, process)


def end(process, seconds=240):
    """(exit status, output) of a run, once none of its processes is left. Fails if they do not end."""
    deadline = time.monotonic() + seconds
    while process.is_alive() or alive(process):
        if time.monotonic() > deadline:
            raise AssertionError(f"{len(alive(process))} processes are left: {process.said.read_text()}")
        time.sleep(0.02)
    return process.exitcode, process.said.read_text()


def finish(folder, script, *flags, **how):
    """Run to the end, without a fault. Returns the output."""
    status, said = end(start(folder, script, *flags, **how))
    assert status == 0, said
    return said


def errors(said):
    """The lines in which a script itself reports an error."""
    return re.findall(r"^\w+\.py: error: .*$", said, flags=re.M)


def one_error(said, pattern):
    """Whether the output has one line of error, which matches, and no traceback."""
    assert "Traceback" not in said and len(errors(said)) == 1 and re.search(pattern, errors(said)[0]), said
    return True


def same_end(out, whole):
    """Whether a run ended as the undisturbed one, bit for bit, and no half-written file is left."""
    assert [line["step"] for line in log(out)] == list(range(1, len(log(whole)) + 1))
    assert log(out) == log(whole)
    ours, theirs = (torch.load(folder / "model.pt") for folder in (out, whole))
    return equal(ours["model"], theirs["model"]) and not list(out.glob("*.part"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Images, a tokenizer, and the undisturbed runs of one process (whole1) and of two (whole2)."""
    folder = tmp_path_factory.mktemp("faults")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])    # for PROCESSES
    fill(folder / "images", 150)
    shutil.copy(tokenizer, folder / "tokenizer.pt")
    for processes, torchrun in ((1, ()), (2, TWO)):
        finish(folder, "pretrain", *flags(folder), "--out", folder / f"whole{processes}", torchrun=torchrun)
    return folder


def flags(place):
    return ["--data", place / "images", "--tokenizer", place / "tokenizer.pt", "--preset", "demo",
            "--image-size", 32, "--dim", 16, "--depth", 2, "--heads", 2, "--drop-path", 0.2,
            "--batch-size", 12, "--precision", "fp32", "--steps", STEPS, "--save-every", 2]


def half_done(place, out):
    """The folder of a run that was killed after its last step."""
    shutil.copytree(place / "whole1", out)
    for name in ("result.json", "model.pt", "predictions.png"):
        (out / name).unlink()


# ---- kill -9 ----

def live_through(kills, place, out, torchrun, seed):
    """Kill one run that often, some steps and milliseconds after it has begun or continued; let it end."""
    rng = random.Random(seed)
    for n in range(kills):
        process = start(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun)
        wait_for_steps(process, out, rng.choice([0, 0, 1, 2, 3]))
        time.sleep(rng.random() * 0.03)
        os.kill(pid_of_rank(process, 1 - n % 2) if torchrun else process.pid, signal.SIGKILL)
        status, said = end(process, 60)
        assert status == 1 if torchrun else status == -signal.SIGKILL, said
        assert not torchrun or re.search("SIGKILL|Connection (closed|reset) by peer", said), said
    finish(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun)


def test_kill_9_at_random_moments(place, record_fault):
    """A checkpoint every second step takes as long as a step: many of the kills come while one is written."""
    with ThreadPoolExecutor() as pool:
        lives = [pool.submit(live_through, 20, place, place / "killed1", (), 0),
                 pool.submit(live_through, 2, place, place / "killed2", TWO, 1)]
        for life in lives:
            life.result()
    assert same_end(place / "killed1", place / "whole1") and same_end(place / "killed2", place / "whole2")
    record_fault("kill -9 of a single process, all in one run's life", 20)
    record_fault("kill -9 of rank 1 and of rank 0 of two, in one run's life", 2)


AT_THIRD = """
def at_third(function, counts, before=None):
    calls = []
    def wrapped(*args, **more):
        if counts(*args):
            calls.append(1)
            if len(calls) == 3:
                if before:
                    before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    return wrapped
"""
MOMENTS = {    # code that kills the run at its third write of last.pt
    "a part of the file is written": """
training.torch.save = at_third(training.torch.save, lambda state, file: True,
                               lambda state, file: (file.write(bytes(20_000)), file.flush()))""",
    "before fsync": """
os.fsync = at_third(os.fsync, lambda number: os.readlink(f"/proc/self/fd/{number}").endswith(".pt.part"))""",
    "before previous.pt is renamed": """
os.replace = at_third(os.replace, lambda _, target: str(target).endswith("previous.pt"))""",
    "before last.pt is renamed": """
os.replace = at_third(os.replace, lambda _, target: str(target).endswith("last.pt"))""",
}


def test_kill_9_at_each_moment_of_a_checkpoint_write(place, record_fault):
    out = place / "moments"
    for moment, code in MOMENTS.items():
        status, said = end(start(place, "pretrain", *flags(place), "--out", out, hurt=AT_THIRD + code))
        assert status == -signal.SIGKILL and list(out.glob("*.part")), said
        assert not any(training.damage(path) for path in out.glob("*.pt")), moment
    finish(place, "pretrain", *flags(place), "--out", out)
    assert same_end(out, place / "whole1")
    record_fault("kill -9 while last.pt is written: half a file, no fsync, no rename", len(MOMENTS))


def test_kill_9_of_a_run_with_loader_processes(place, record_fault):
    """They outlive it by seconds, and must not hold its folder."""
    out = place / "workers"
    process = start(place, "pretrain", *flags(place), "--out", out, "--workers", 2)
    wait_for_steps(process, out, 3)
    process.kill()
    process.join()
    workers = alive(process)
    try:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)    # let them live on
        finish(place, "pretrain", *flags(place), "--out", out, "--workers", 2)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    end(process, 60)
    assert len(workers) == 2 and same_end(out, place / "whole1")
    record_fault("kill -9 with loader processes that live on", 1)


def test_kill_9_of_the_other_scripts(place, record_fault):
    for split, count in (("train", 40), ("val", 4)):
        for name in "ab":
            fill(place / "labelled" / split / name, count)
    small = ["--preset", "demo", "--precision", "fp32", "--steps", 30, "--save-every", 3, "--log-every", 1]
    scripts = {
        "finetune": [*small, "--data", place / "labelled", "--init", place / "whole1" / "model.pt",
                     "--batch-size", 12, "--drop-path", 0.2, "--mixup", 0.8, "--ema", 0.9,
                      "--eval-every", 10],
        "dvae": [*small, "--data", place / "images", "--image-size", 16, "--vocab-size", 64, "--hidden", 8,
                 "--batch-size", 8]}

    def live(script):
        whole, out = place / f"{script}-whole", place / f"{script}-killed"
        finish(place, script, *scripts[script], "--out", whole)
        process = start(place, script, *scripts[script], "--out", out)
        wait_for_steps(process, out, 5)
        process.kill()
        end(process)
        finish(place, script, *scripts[script], "--out", out)
        return same_end(out, whole)
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(live, scripts))
    record_fault("kill -9 of finetune.py and dvae.py", 2)


# ---- Signals and torchrun ----

@pytest.mark.parametrize("number, torchrun", [(signal.SIGINT, ()), (signal.SIGTERM, TWO)],
                         ids=["Ctrl-C", "torchrun"])
def test_a_signal_ends_the_run_after_the_step(place, number, torchrun, record_fault):
    """Ctrl-C reaches the whole group, but must not end the loader process; torchrun passes its signal on."""
    out = place / number.name
    process = start(place, "pretrain", *flags(place), "--steps", 100_000, "--save-every", 100_000,
                    "--workers", 0 if torchrun else 1, "--out", out, torchrun=torchrun)
    wait_for_steps(process, out, 4)
    send = os.kill if torchrun else os.killpg
    send(process.pid, number)
    status, said = end(process, 60)
    assert status == (1 if torchrun else -number) and f"{number.name}: stopped after step" in said, said
    assert torch.load(out / "last.pt")["step"] == log(out)[-1]["step"] >= 4
    record_fault(f"{number.name} to {'torchrun' if torchrun else 'the group of a process'}", 1)


def test_a_signal_to_one_rank_stops_all(place, record_fault):
    """It comes between the all-reduce of step 5 and the end of that step: all stop after step 6."""
    out = place / "one"
    hurt = ("update, calls = training.Precision.update, []\n"
            "def hurt(*args):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 5 and training.rank() == 1:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return update(*args)\n"
            "training.Precision.update = hurt")
    status, said = end(start(place, "pretrain", *flags(place), "--out", out, torchrun=TWO, hurt=hurt), 60)
    assert status == 1 and "SIGTERM: stopped after step 6" in said, said
    assert torch.load(out / "last.pt")["step"] == 6
    record_fault("SIGTERM to one of two ranks", 1)


def test_torchrun_restarts_by_itself(place, record_fault):
    """--fresh sets the older folder aside once, not at each restart."""
    out = place / "restarts"
    half_done(place, out)
    process = start(place, "pretrain", *flags(place), "--out", out, "--fresh", env=RESTARTS,
                    torchrun=[*TWO, "--max-restarts=2"])
    for lives, rank in enumerate((1, 0), start=1):
        wait_for_steps(process, out, 4, lives)
        os.kill(pid_of_rank(process, rank), signal.SIGKILL)
    status, said = end(process)
    assert status == 0 and said.count(f"continuing {out} after step") == 2, said
    assert same_end(out, place / "whole2") and len(list(place.glob("restarts.old-*"))) == 1
    record_fault("kill -9 of a rank under torchrun --max-restarts", 2)


def test_two_torchruns_and_one_is_lost(place, record_fault):
    """The one that does not hold the rendezvous: the other one waits until it is started again."""
    out = place / "agents"
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]

    def agent():
        return start(place, "pretrain", *flags(place), "--out", out, env=RESTARTS, torchrun=[
            "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=fault",
            f"--rdzv_endpoint=127.0.0.1:{port}"])
    first = agent()
    time.sleep(1)    # it holds the rendezvous
    second = agent()
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(log(out)) >= 4, first)
    kill_all(second)
    end(second)
    second = agent()
    for process in (first, second):
        status, said = end(process, 100)
        assert status == 0, said
    assert same_end(out, place / "whole2")
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


FULL = """
def full(when, then):
    def wrapped(run, *args, **more):
        if when(*args):
            with open(run.folder / "filler", "wb", 0) as file:
                try:
                    while file.write(bytes(512)):
                        pass
                except OSError:
                    pass
        return then(run, *args, **more)
    return wrapped
"""


@pytest.mark.parametrize("what, hurt", [
    ("last.pt", None),
    ("metrics.jsonl", "training.Run.log = full(lambda step: step == 50, training.Run.log)"),
    ("model.pt", "training.Run.finish = full(lambda *_: True, training.Run.finish)")],
    ids=["last.pt", "metrics.jsonl", "model.pt"])
def test_a_full_disk(place, small_disk, what, hurt, record_fault):
    """Where last.pt does not fit, there is room for two and a half of it."""
    size = (place / "whole1" / "last.pt").stat().st_size
    out = small_disk(20 * size if hurt else int(2.5 * size)) / "run"
    how = [*flags(place), "--save-every", 20 if hurt else 2, "--out", out]
    status, said = end(start(place, "pretrain", *how, hurt=hurt and FULL + hurt))
    free = "" if what == "metrics.jsonl" else r".*; 0\.\d MB are free"
    assert status == 1 and one_error(said, rf"{out / what} could not be written .*No space left{free}"), said
    saved = {"last.pt": 4, "metrics.jsonl": 40, "model.pt": STEPS}[what]
    assert training.damage(out / "last.pt") is None and torch.load(out / "last.pt")["step"] == saved
    assert not list(out.glob("*.part")) and not (out / "model.pt").exists()
    small_disk(20 * size)
    (out / "filler").unlink(missing_ok=True)
    finish(place, "pretrain", *how)
    assert same_end(out, place / "whole1")
    record_fault(f"a full disk at {what}", 1)


def test_a_file_that_may_not_grow(place, record_fault):
    """RLIMIT_FSIZE of two processes: the second one has nothing to write, and must leave all the same."""
    out, limit = place / "limit", (place / "whole1" / "last.pt").stat().st_size // 2
    hurt = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    status, said = end(start(place, "pretrain", *flags(place), "--out", out, torchrun=TWO, hurt=hurt), 60)
    assert status == 1 and len(errors(said)) == 1, said
    assert re.search("last.pt could not be written .*File too large", errors(said)[0]) and len(log(out)) == 2
    assert not list(out.glob("*.pt*"))
    record_fault("a checkpoint over the limit of a file's size, two processes", 1)


# ---- Damaged files ----

HURT = {"truncated": lambda whole: whole[:len(whole) // 3],
        "zeroed": lambda whole: bytes(len(whole)),
        "bit-flipped": lambda whole: whole[:5000] + bytes([whole[5000] ^ 64]) + whole[5001:]}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(place, record_fault):
    for how, hurt in HURT.items():
        out = place / how
        half_done(place, out)
        (out / "last.pt").write_bytes(hurt((out / "last.pt").read_bytes()))
        said = finish(place, "pretrain", *flags(place), "--out", out)
        assert "last.pt is damaged" in said and f"after step {STEPS - 2} of {STEPS}" in said, said
        assert same_end(out, place / "whole1")
    record_fault("last.pt truncated, zeroed, bit-flipped: previous.pt is used", len(HURT))


def test_two_damaged_checkpoints_are_one_line_and_stay(place, record_fault):
    out = place / "both"
    half_done(place, out)
    for name, how in (("last.pt", "truncated"), ("previous.pt", "bit-flipped")):
        (out / name).write_bytes(HURT[how]((out / name).read_bytes()))

    def contents():
        return {path.name: path.read_bytes() for path in out.iterdir()}
    before = contents()
    status, said = end(start(place, "pretrain", *flags(place), "--out", out))
    assert status == 2 and one_error(said, "--out: .*last.pt is damaged .* and .*previous.pt is damaged")
    assert contents() == before
    record_fault("both damaged: one line, nothing overwritten", 1)


# ---- Numbers that are not finite ----

NOT_FINITE = """
unpack, seed_step, steps = pretrain.to_device, training.seed_step, []
def noted(seed, step):
    steps.append(step + 1)
    seed_step(seed, step)
def hurt(*args):
    images, *more = unpack(*args)
    if steps[-1] == 8 and training.rank() == 1:
        images[0] = float("nan")
    return images, *more
pretrain.to_device, training.seed_step = hurt, noted
"""


def test_nan_in_a_batch_of_one_rank_stops_all(place, record_fault):
    """At step 8, after the checkpoint of step 6."""
    out = place / "nan"
    process = start(place, "pretrain", *flags(place), "--out", out, torchrun=TWO, hurt=NOT_FINITE)
    status, said = end(process, 60)
    assert status == 1 and 'pretrain.py", line' not in said, said
    lines = set(errors(said))    # torchrun may end a process before it has said the same
    assert len(lines) == 1 and "error: step 8: the loss is nan; " in lines.pop(), said
    checkpoint = torch.load(out / "last.pt")
    assert checkpoint["step"] == 6 and all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert len(log(out)) == 7
    record_fault("nan in a batch of one of two ranks", 1)


# ---- One folder, two runs ----

def test_two_runs_want_one_folder(place, record_fault):
    """Started at once, with other configurations: one of them gets the folder; kill -9 frees it."""
    out, long = place / "wanted", [*flags(place), "--steps", 100_000]
    both = [start(place, "pretrain", *long, "--seed", seed, "--out", out) for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while all(process.is_alive() for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    seed = 0 if both[0].is_alive() else 1
    winner, same = both[seed], [*long, "--seed", seed, "--out", out]
    status, said = end(both[1 - seed])
    assert status == 2 and one_error(said, "--out: .* is in use by another process")
    wait_for_steps(winner, out, 2)
    assert json.loads((out / "config.json").read_text())["seed"] == seed
    status, said = end(start(place, "pretrain", *same))
    assert status == 2 and one_error(said, "--out: .* is in use by another process") and winner.is_alive()
    winner.kill()
    end(winner)
    third = start(place, "pretrain", *same)
    wait_for_steps(third, out, 2)
    third.kill()
    end(third)
    record_fault("two runs in one folder: started at once, a second one later, one after kill -9", 3)
