"""Real runs of a tiny model, alone and under torchrun, that are hurt: killed at any moment, short of disk, fed nonsense, their files
damaged. What counts is the end: the same command again gives the log and the weights of a run that nobody disturbed, bit for bit.

`python -m pytest -m long tests/test_faults.py`: minutes on two cores, and a table of the faults at the end.
"""
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import checkpoints
import data
from conftest import ROOT
from test_data import fill
from test_pretrain import equal, log

pytestmark = pytest.mark.long
STEPS = 150
TWO = ["--standalone", "--nproc_per_node=2"]


# runs, their processes and their files -------------------------------------------------------------------------------

def start(folder, script, *flags, torchrun=(), hurt=None, env=os.environ, **popen):
    """A run of the script, all of its processes marked; .said is where its output goes. hurt: Python code that runs before main()."""
    start.count += 1
    mark = f"fault-{os.getpid()}-{start.count}"
    said = folder / f"{mark}.txt"
    program = ROOT / f"{script}.py"
    if hurt:
        program = folder / f"{mark}.py"
        program.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport training, {script}\n"
                           f"sys.argv[0] = '{script}.py'\n{hurt}\n{script}.main()\n")
    command = [sys.executable, *(["-m", "torch.distributed.run", *torchrun] if torchrun else []), program, *flags]
    with open(said, "w") as file:
        process = subprocess.Popen(list(map(str, command)), env={**env, "OMP_NUM_THREADS": "1", "FAULT": mark}, start_new_session=True,
                                   stdout=file, stderr=subprocess.STDOUT, **popen)
    process.mark, process.said = mark, said
    return process


start.count = 0


def alive(process):
    """pid -> environment of all processes of a run, its own, torchrun's and the loaders', whoever their parent is by now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(line.split("=", 1) for line in (folder / "environ").read_text(errors="replace").split("\0") if "=" in line)
        except OSError:                                 # ended meanwhile
            continue
        if variables.get("FAULT") == process.mark:      # a zombie has no environment
            found[int(folder.name)] = variables
    return found


def pid_of_rank(process, rank):
    """The process of a rank of a torchrun group; the first, for a loader's workers come later."""
    return min(pid for pid, variables in alive(process).items() if variables.get("RANK") == str(rank))


def end(process, seconds=240):
    """(exit status, what the run printed), when none of its processes is left; fails, and ends them, if they do not end by themselves."""
    deadline = time.monotonic() + seconds
    while process.poll() is None or alive(process):
        if time.monotonic() > deadline:
            left = alive(process)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes are left after {seconds} s: {process.said.read_text()}")
        time.sleep(0.02)
    return process.returncode, process.said.read_text()


def finish(folder, script, *flags, **how):
    """Run to the end, without a fault."""
    status, said = end(start(folder, script, *flags, **how))
    assert status == 0, said
    return said


def errors(said, script="pretrain"):
    """The lines in which the script itself reports an error."""
    return re.findall(rf"^{script}\.py: error: .*$", said, flags=re.M)


def one_error(said, pattern):
    """Whether the program printed one line of error, which matches, and no traceback."""
    assert "Traceback" not in said and len(errors(said)) == 1 and re.search(pattern, errors(said)[0]), said
    return True


def identity(path):
    return path.stat().st_ino if path.exists() else None


def wait_until(true, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.said.read_text()
        time.sleep(0.001)


def wait_for_steps(process, out, steps, before=None):
    """Until the run has logged so many steps more; before: identity of its log when it was started, for a continued log is a new file."""
    path = out / "metrics.jsonl"
    wait_until(lambda: identity(path) not in (None, before), process)
    lines = len(path.read_bytes().splitlines())
    wait_until(lambda: len(path.read_bytes().splitlines()) >= lines + steps, process)


def same_end(out, whole):
    """Whether a run ended as the undisturbed one: each step logged once, all numbers and tensors bit for bit; nothing half written is left."""
    assert [line["step"] for line in log(out)] == list(range(1, len(log(whole)) + 1)) and log(out) == log(whole)
    ours, theirs = (torch.load(folder / "model.pt") for folder in (out, whole))
    return equal(ours["model"], theirs["model"]) and not list(out.glob("*.part"))


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix in (".pt", ".jsonl")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a tokenizer, and the undisturbed runs of one process (whole1) and of two (whole2)."""
    folder = tmp_path_factory.mktemp("faults")
    fill(folder / "images", 150)
    finish(folder, "dvae", "--data", folder / "images", "--preset", "demo", "--steps", 6, "--batch-size", 8, "--image-size", 16, "--vocab-size", 64,
           "--hidden", 8, "--out", folder / "tokenizer")
    for processes, torchrun in ((1, ()), (2, TWO)):
        finish(folder, "pretrain", *flags(folder), "--out", folder / f"whole{processes}", torchrun=torchrun)
    return folder


def flags(place):
    return ["--data", place / "images", "--tokenizer", place / "tokenizer" / "model.pt", "--preset", "demo", "--image-size", 32, "--patch-size", 8,
            "--dim", 16, "--depth", 2, "--heads", 2, "--batch-size", 12, "--precision", "fp32", "--drop-path", 0.2, "--steps", STEPS, "--save-every", 2]


def half_done(place, out):
    """A folder of a run of one process that lacks its last steps, as if it had been killed: last.pt at the end, previous.pt before."""
    shutil.copytree(place / "whole1", out)
    for name in ("result.json", "model.pt", "predictions.png"):
        (out / name).unlink()


# kill -9 -------------------------------------------------------------------------------------------------------------

def live_through(kills, place, out, victims, torchrun, seed):
    """Kill one run so often, in turn each of the victims, some steps and milliseconds after it has begun or continued; then let it end."""
    rng = random.Random(seed)
    for n in range(kills):
        before = identity(out / "metrics.jsonl")
        process = start(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun)
        wait_for_steps(process, out, rng.choice([0, 0, 1, 2, 3]), before)
        time.sleep(rng.random() * 0.03)
        victim = victims[n % len(victims)]
        os.kill(process.pid if victim == "agent" else pid_of_rank(process, victim), signal.SIGKILL)
        status, said = end(process, 120)
        assert status != 0, said
    finish(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun)


def test_kill_9_at_random_moments(place, record_fault):
    """Saving every second step, which takes as long as a step: many of the kills come while a checkpoint is written."""
    with ThreadPoolExecutor() as pool:
        lives = [pool.submit(live_through, 30, place, place / "killed1", ["agent"], (), 0),
                 pool.submit(live_through, 9, place, place / "killed2", [1, "agent", 0], TWO, 1)]
        for life in lives:
            life.result()
    assert same_end(place / "killed1", place / "whole1") and same_end(place / "killed2", place / "whole2")
    record_fault("kill -9 of a single process, all in one run's life", 30)
    record_fault("kill -9 of rank 1, torchrun's agent, rank 0 in turn, all in one run's life", 9)


MOMENTS = {    # code that stops a run for good at the third write of last.pt, at one moment of it
    "half the file is written": """
save, writes = training.torch.save, []
def half(state, file):
    if "optimizer" not in state or writes.append(1) or len(writes) < 3:
        return save(state, file)
    import io
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    stop()
training.torch.save = half""",
    "before fsync": """
fsync, writes = os.fsync, []
def slow(number):
    if os.readlink(f"/proc/self/fd/{number}").endswith("last.pt.part") and not writes.append(1) and len(writes) == 3:
        stop()
    fsync(number)
os.fsync = slow""",
    "before previous.pt is renamed": """
replace, writes = os.replace, []
def slow(source, target):
    if str(target).endswith("previous.pt") and not writes.append(1) and len(writes) == 2:
        stop()
    replace(source, target)
os.replace = slow""",
    "before last.pt is renamed": """
replace, writes = os.replace, []
def slow(source, target):
    if str(target).endswith("last.pt") and not writes.append(1) and len(writes) == 3:
        stop()
    replace(source, target)
os.replace = slow""",
}


def test_kill_9_at_each_moment_of_a_checkpoint_write(place, record_fault):
    out, reached = place / "moments", place / "reached"
    for moment, code in MOMENTS.items():
        process = start(place, "pretrain", *flags(place), "--out", out,
                        hurt=f"def stop():\n    open({str(reached)!r}, 'w')\n    time.sleep(600)\n{code}")
        wait_until(reached.exists, process)
        assert len(log(out)) >= 6 and list(out.glob("*.part")), moment
        process.kill()
        end(process)
        assert checkpoints.damage(out / "last.pt") is None and checkpoints.damage(out / "previous.pt") is None, moment
        reached.unlink()
    finish(place, "pretrain", *flags(place), "--out", out)
    assert same_end(out, place / "whole1")
    record_fault("kill -9 while last.pt is written: half a file, no fsync, no rename", len(MOMENTS))


def test_kill_9_of_a_run_whose_loaders_have_workers(place, record_fault):
    """The workers outlive it by seconds: they must not hold its folder."""
    out = place / "workers"
    process = start(place, "pretrain", *flags(place), "--out", out, "--workers", 2)
    wait_for_steps(process, out, 3)
    process.kill()
    process.wait()
    workers = alive(process)
    try:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)                # let them live on
        finish(place, "pretrain", *flags(place), "--out", out, "--workers", 2)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    end(process, 60)
    assert workers and same_end(out, place / "whole1")
    record_fault("kill -9 with workers that live on", 1)


@pytest.fixture(scope="module")
def labelled(place):
    for split, count in (("train", 40), ("val", 4)):
        for name in "ab":
            fill(place / "labelled" / split / name, count)
    return place / "labelled"


def test_kill_9_of_the_other_scripts(place, labelled, record_fault):
    scripts = {
        "finetune": ["--data", labelled, "--init", place / "whole1" / "model.pt", "--preset", "demo", "--steps", 40, "--drop-path", 0.2, "--mixup", 0.8,
                     "--ema", 0.9, "--batch-size", 12, "--eval-every", 10],
        "dvae": ["--data", place / "images", "--preset", "demo", "--steps", 40, "--batch-size", 8, "--image-size", 16, "--vocab-size", 64, "--hidden", 8]}

    def live(script):
        more = [*scripts[script], "--precision", "fp32", "--save-every", 3, "--log-every", 1]
        finish(place, script, *more, "--out", place / f"{script}-whole")
        out = place / f"{script}-killed"
        for kill in range(2):
            before = identity(out / "metrics.jsonl")
            process = start(place, script, *more, "--out", out)
            wait_for_steps(process, out, 5, before)
            process.kill()
            end(process)
        finish(place, script, *more, "--out", out)
        return same_end(out, place / f"{script}-whole")
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(live, scripts))
    record_fault("kill -9 of finetune.py and dvae.py", 4)


# signals, dead ranks, torchrun ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_at_the_step_and_nothing_is_left(place, number, record_fault):
    """Of a process with loaders' workers, and of a torchrun group, whose agent passes it on."""
    outs = [place / f"{number.name}{processes}" for processes in (1, 2)]
    started = [start(place, "pretrain", *flags(place), "--steps", 100_000, "--save-every", 100_000, "--workers", 1, "--out", out, torchrun=torchrun)
               for out, torchrun in zip(outs, ((), TWO))]
    for process, out in zip(started, outs):
        wait_for_steps(process, out, 4)
        process.send_signal(number)
    for process, out in zip(started, outs):
        status, said = end(process, 120)
        assert (status == -number if out == outs[0] else status != 0) and re.search("SIG.*: stopped after step", said), said
        assert torch.load(out / "last.pt")["step"] == log(out)[-1]["step"] >= 4
    record_fault(f"{number.name}, to one process and to torchrun", 2)


def test_when_a_rank_is_dead_all_leave_and_say_why(place, record_fault):
    out = place / "dead"
    process = start(place, "pretrain", *flags(place), "--steps", 100_000, "--out", out, torchrun=TWO)
    wait_for_steps(process, out, 4)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    status, said = end(process, 60)
    assert status != 0 and "Signal 9 (SIGKILL)" in said and "rank 0 lost another process" in said and "pretrain.py\", line" not in said, said
    record_fault("rank 1 dead while rank 0 waits for it", 1)


def test_torchrun_restarts_by_itself(place, record_fault):
    """--fresh sets an older folder aside once, not at each restart."""
    out = place / "restarts"
    half_done(place, out)
    before = identity(out / "metrics.jsonl")
    process = start(place, "pretrain", *flags(place), "--out", out, "--fresh", torchrun=[*TWO, "--max-restarts=3"])
    for rank in (1, 0):
        wait_for_steps(process, out, 4, before)
        before = identity(out / "metrics.jsonl")
        os.kill(pid_of_rank(process, rank), signal.SIGKILL)
    status, said = end(process)
    assert status == 0 and said.count(f"continuing {out} after step") == 2 and said.count("set aside") == 1, said
    assert same_end(out, place / "whole2")
    record_fault("kill -9 of a rank under torchrun --max-restarts 3", 2)


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def kill_all(process):
    for pid in alive(process):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def agent(place, out, port):
    """One of two torchruns. Without the variable, PyTorch lets restarted processes meet where addresses of the dead are still written."""
    return start(place, "pretrain", *flags(place), "--out", out, env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, torchrun=[
        "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=fault", f"--rdzv_endpoint=127.0.0.1:{port}"])


def two_agents(place, out):
    port = free_port()
    first = agent(place, out, port)
    time.sleep(3)                                       # the first one holds the rendezvous
    return first, agent(place, out, port), port


def test_two_agents_train_together_and_one_is_lost(place, record_fault):
    """The agent that does not hold the rendezvous: the other one waits for it, and both go on."""
    out = place / "agents"
    first, second, port = two_agents(place, out)
    wait_for_steps(first, out, 4)
    kill_all(second)
    second = agent(place, out, port)
    for process in (first, second):
        status, said = end(process, 100)
        assert status == 0, said + second.said.read_text()
    assert same_end(out, place / "whole2")
    record_fault("one of two torchrun agents killed with its process, and started again", 1)


def test_two_agents_and_the_one_that_holds_the_rendezvous_is_lost(place, record_fault):
    """The other one cannot go on, and ends; the same two commands again continue the run."""
    out = place / "holder"
    first, second, _ = two_agents(place, out)
    wait_for_steps(first, out, 4)
    kill_all(first)
    status, said = end(second, 120)
    assert status != 0, said
    for process in two_agents(place, out)[:2]:
        status, said = end(process)
        assert status == 0, said
    assert same_end(out, place / "whole2")
    record_fault("the torchrun agent that holds the rendezvous killed with its process; both started again", 1)


# disks ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """mount(bytes) -> a folder on a file system of that size, or of another size from now on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    def mount(size):
        how = "remount," if os.path.ismount(folder) else ""
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        return folder
    yield mount
    subprocess.run(["umount", folder], capture_output=True)


FULL = """
def full(when, then):
    def wrapped(run, *args, **kwargs):
        if when(*args):
            with open(run.folder / "filler", "wb", 0) as file:
                try:
                    while file.write(bytes(512)):
                        pass
                except OSError:
                    pass
        return then(run, *args, **kwargs)
    return wrapped
"""


def test_a_disk_that_fills_up_at_a_checkpoint(place, small_disk, record_fault):
    """Room for last.pt, previous.pt and half of the next."""
    size = (place / "whole1" / "last.pt").stat().st_size
    out = small_disk(int(2.5 * size)) / "run"
    status, said = end(start(place, "pretrain", *flags(place), "--out", out))
    assert status == 1 and one_error(said, r"checkpoint of step 6 could not be written .*No space left.* needs 0\.\d MB, 0\.\d MB are free; .*last.pt, "
                                           r"of an earlier step, is as it was")
    assert checkpoints.damage(out / "last.pt") is None and torch.load(out / "last.pt")["step"] == 4 and not list(out.glob("*.part"))
    small_disk(20 * size)
    finish(place, "pretrain", *flags(place), "--out", out)
    assert same_end(out, place / "whole1")
    record_fault("a full disk at a checkpoint", 1)


@pytest.mark.parametrize("what, hurt, message", [
    ("metrics.jsonl", "training.Run.log = full(lambda step: step == 50, training.Run.log)", "metrics.jsonl could not be written .*No space left"),
    ("model.pt", "training.Run.finish = full(lambda *_: True, training.Run.finish)", r"model.pt or result.json could not be written .*needs 0\.\d MB, 0.0 MB are free")])
def test_a_disk_that_fills_up_at_other_files(place, small_disk, what, hurt, message, record_fault):
    out = small_disk(20 * (place / "whole1" / "last.pt").stat().st_size) / "run"
    status, said = end(start(place, "pretrain", *flags(place), "--save-every", 20, "--out", out, hurt=FULL + hurt))
    assert status == 1 and one_error(said, message) and checkpoints.damage(out / "last.pt") is None and not (out / "model.pt").exists()
    (out / "filler").unlink()
    finish(place, "pretrain", *flags(place), "--save-every", 20, "--out", out)
    assert same_end(out, place / "whole1")
    record_fault(f"a full disk at {what}", 1)


def test_a_file_that_may_not_grow(place, record_fault):
    """RLIMIT_FSIZE, one and two processes: the second one has nothing to write, and must leave all the same."""
    limit = (place / "whole1" / "last.pt").stat().st_size // 2
    def live(processes, torchrun):
        out = place / f"limit{processes}"
        process = start(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun)
        wait_for_steps(process, out, 4)
        process.send_signal(signal.SIGTERM)
        end(process)
        before = hashes(out)
        status, said = end(start(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun,
                                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        assert status == 1 and re.search("checkpoint of step .* could not be written .*File too large.*is as it was", errors(said)[0]), said
        assert "pretrain.py\", line" not in said and len(errors(said)) == processes, said
        assert {name: value for name, value in hashes(out).items() if name != "metrics.jsonl"} == \
               {name: value for name, value in before.items() if name != "metrics.jsonl"}
        finish(place, "pretrain", *flags(place), "--out", out, torchrun=torchrun)
        return same_end(out, place / f"whole{processes}")
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(live, (1, 2), ((), TWO)))
    record_fault("a checkpoint over the limit of a file's size, one and two processes", 2)


# damaged files -------------------------------------------------------------------------------------------------------

def test_any_bit_of_a_checkpoint_may_flip(place, tmp_path, record_fault):
    """Fifty anywhere, and more in zip's own tables, which its checksums leave out. The last is in the seal's own words."""
    whole = (place / "whole1" / "last.pt").read_bytes()
    expected, path, rng = checkpoints.read_checkpoint(place / "whole1" / "last.pt", "--out"), tmp_path / "last.pt", random.Random(0)
    path.write_bytes(whole)
    outside = [at for at in range(len(whole)) if whole[at:at + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7")]
    outside = sorted({at + i for at in outside for i in range(100) if at + i < len(whole)})
    places = [rng.randrange(len(whole)) for _ in range(50)] + rng.sample(outside, 300) + [whole.rindex(checkpoints.SEAL)]
    harmless = 0
    for at in places:
        hurt = whole[at] ^ 1 << rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([hurt]) + whole[at + 1:])
        if not checkpoints.damage(path):
            state = checkpoints.read_checkpoint(path, "--out")
            assert same(state, expected), at
            harmless += 1
    record_fault(f"a bit of last.pt flipped ({harmless} of them change no tensor and are not noticed)", len(places))


def same(a, b):
    """Whether two nested containers hold the same values and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


HURT = {"truncated": lambda b: b[:len(b) // 3], "zeroed": lambda b: bytes(len(b)), "bit-flipped": lambda b: b[:5000] + bytes([b[5000] ^ 64]) + b[5001:]}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(place, record_fault):
    def live(how):
        out = place / how
        half_done(place, out)
        (out / "last.pt").write_bytes(HURT[how]((out / "last.pt").read_bytes()))
        said = finish(place, "pretrain", *flags(place), "--out", out)
        assert "last.pt is damaged" in said and "previous.pt is used" in said and f"after step {STEPS - 2} of {STEPS}" in said, said
        return same_end(out, place / "whole1")
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(live, HURT))
    record_fault("last.pt truncated, zeroed, bit-flipped: previous.pt is used", len(HURT))


def test_two_damaged_checkpoints_are_one_line_and_stay(place, record_fault):
    out = place / "both"
    half_done(place, out)
    for name, how in (("last.pt", "truncated"), ("previous.pt", "bit-flipped")):
        (out / name).write_bytes(HURT[how]((out / name).read_bytes()))
    before = hashes(out)
    status, said = end(start(place, "pretrain", *flags(place), "--out", out))
    assert status == 2 and one_error(said, "--out: .*last.pt is damaged .* and .*previous.pt is damaged") and hashes(out) == before
    record_fault("both damaged: one line, nothing overwritten", 1)


# numbers that are none -----------------------------------------------------------------------------------------------

NONSENSE = """
def hurt(step, value, folder):
    seed, pick, exchange, now = training.seed_step, pretrain.inputs_and_targets, training.Run.exchange, []
    def seed_step(a, at):
        now[:] = [at + 1]
        seed(a, at)
    def inputs_and_targets(*args):
        images, *more = pick(*args)
        if now == [step] and training.rank() == 1:
            images[0] = float(value)
        return images, *more
    def last_exchange(run, at, *more):
        open(f"{folder}/rank{training.rank()}", "w").write(str(at))
        return exchange(run, at, *more)
    training.seed_step, pretrain.inputs_and_targets, training.Run.exchange = seed_step, inputs_and_targets, last_exchange
"""


def test_nonsense_in_a_batch_of_one_rank_stops_all(place, tmp_path, record_fault):
    step = 8                                            # after the checkpoint of step 6
    def live(value):
        out, notes = place / value, tmp_path / value
        notes.mkdir()
        status, said = end(start(place, "pretrain", *flags(place), "--out", out, torchrun=TWO, hurt=NONSENSE + f"hurt({step}, {value!r}, {str(notes)!r})"))
        samples = data.GlobalBatches(len(data.open_images(str(place / "images"), "", "train")), 12, seed=0, start=0, stop=STEPS, rank=1, world_size=2).of_step(step - 1)
        named = ", ".join(str(index) for _, index in samples[0])
        assert status == 1 and len(errors(said)) == 1 and "pretrain.py\", line" not in said, said
        assert re.search(rf"error: step {step}: the loss is (nan|inf), on rank 1 \(samples {named}\); .*last.pt is the checkpoint before it", said), said
        assert [(notes / f"rank{rank}").read_text() for rank in (0, 1)] == [str(step)] * 2
        checkpoint = torch.load(out / "last.pt")
        assert checkpoint["step"] == 6 and all(tensor.isfinite().all() for tensor in checkpoint["model"].values()) and len(log(out)) == step - 1
        finish(place, "pretrain", *flags(place), "--out", out, torchrun=TWO)
        return same_end(out, place / "whole2")
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(live, ("nan", "inf")))
    record_fault("nan and inf in a batch of one of two ranks", 2)


def test_weights_that_are_not_finite_are_not_kept(place, record_fault):
    """A gradient can overflow where the loss does not: the step after would find out, too late for a checkpoint between them."""
    out = place / "weights"
    hurt = ("update = training.Precision.update\ndone = []\ndef broken(self, optimizer, clip):\n    norm = update(self, optimizer, clip)\n"
            "    if not done.append(1) and len(done) == 6:\n        optimizer.param_groups[0]['params'][0].data.view(-1)[0] = float('nan')\n    return norm\n"
            "training.Precision.update = broken")
    status, said = end(start(place, "pretrain", *flags(place), "--out", out, hurt=hurt))
    assert status == 1 and one_error(said, "step 6: .* is not finite, and no checkpoint is written; .*last.pt") and torch.load(out / "last.pt")["step"] == 4
    finish(place, "pretrain", *flags(place), "--out", out)
    assert same_end(out, place / "whole1")
    record_fault("a weight that becomes nan just before a checkpoint", 1)


# one folder, two runs ------------------------------------------------------------------------------------------------

def test_two_runs_want_one_folder(place, record_fault):
    """Started at once, in a new folder and with other configurations: one of them gets it, whole; kill -9 frees it."""
    out = place / "wanted"
    both = [start(place, "pretrain", *flags(place), "--steps", 100_000, "--seed", seed, "--out", out) for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    seed = next(seed for seed in (0, 1) if both[seed].poll() is None)
    status, said = end(both[1 - seed])
    assert status == 2 and one_error(said, "--out: .* is in use by another process|holds a run with another seed")
    wait_for_steps(both[seed], out, 2)
    assert json.loads((out / "config.json").read_text())["seed"] == seed
    more = [*flags(place), "--steps", 100_000, "--seed", seed, "--out", out]
    status, said = end(start(place, "pretrain", *more))
    assert status == 2 and one_error(said, "--out: .* is in use by another process; wait for it, or name another --out") and both[seed].poll() is None
    both[seed].kill()
    end(both[seed])
    before = identity(out / "metrics.jsonl")
    third = start(place, "pretrain", *more)
    wait_for_steps(third, out, 2, before)
    third.kill()
    end(third)
    record_fault("two runs in one folder: started at once, a second one later, one after kill -9", 3)
