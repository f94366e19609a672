import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")    # the models are tiny
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_faults = []    # (fault, times tried, times that something was lost)


@pytest.fixture
def record_fault():
    """record_fault(fault, tried, lost): a row of the table that `python -m pytest -m long` ends with."""
    return lambda fault, tried, lost=0: _faults.append((fault, tried, lost))


def pytest_terminal_summary(terminalreporter):
    if _faults:
        terminalreporter.write_line("\n| fault | tried | lost |\n|---|---|---|")
        for row in _faults:
            terminalreporter.write_line("| " + " | ".join(map(str, row)) + " |")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """model.pt of a tokenizer of 64 codes with random weights, whose tokens vary; it reduces 4x."""
    import torch

    import dvae
    torch.manual_seed(0)
    model = dvae.DiscreteVAE(vocab_size=64, hidden=8, groups=3, blocks_per_group=1)
    model.initialise_codes(torch.rand(16, 3, 16, 16).cumsum(2).cumsum(3) / 256)
    path = tmp_path_factory.mktemp("tokenizer") / "model.pt"
    torch.save({"model": model.state_dict(), "config": model.config, "kind": "DiscreteVAE"}, path)
    return path


def log(out):
    """metrics.jsonl of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def equal(a, b):
    """Whether two state_dicts have the same names and, bit for bit, the same tensors."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def few_scenes():
    """Let `shapes` have 120 scenes to train, 24 held out."""
    import data
    data.Shapes.__len__ = lambda self: 120 if self.split == "train" else 24


# ---- Small runs of the scripts, as processes ----

# On the CPU, even beside a GPU, which test_device.py takes; ten steps an epoch.
BRIEF = "--device cpu --precision fp32 --batch-size 12 --save-every 3 --log-every 1".split()
SMALL = [*"--image-size 32 --patch-size 8 --dim 16 --depth 2 --heads 2".split(), *BRIEF]
PROGRAM = """
import os, signal, sys
import conftest, training, {script}
conftest.few_scenes()
{hurt}
sys.argv[0] = "{script}.py"
{script}.main()
"""
AT_STEP = """
function = training.Run.{method}
def hurt(run, step, *values, **more):
    if step == {step} and training.rank() == {rank}:
        {action}
    return function(run, step, *values, **more)
training.Run.{method} = hurt
"""
# All processes, torchrun's too, are forked from one that has imported everything, to save most of their time.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["conftest", "torch.distributed.run", "dvae", "finetune", "pretrain"])
_started = []


def at(step, method, action, rank=0):
    """Code that lets one process of a run act before it calls all_reduce, log or save_or_stop in a step."""
    return AT_STEP.format(step=step, method=method, action=action, rank=rank)


def start(out, *flags, script="pretrain", processes=1, torchrun=(), hurt="", signal=0, at_step=0):
    """Start a script with few_scenes as a process; under torchrun, if it has several processes or flags.

    hurt: Python code to run before its main(). signal: what its first process gets in the middle of a step.
    """
    if signal:    # after the backward pass
        hurt = at(at_step, "all_reduce", f"os.kill(os.getpid(), {signal:d})")
    if processes > 1:
        torchrun = ["--standalone", f"--nproc_per_node={processes}", *torchrun]
    flags = ["--out", out, *(BRIEF if script == "dvae" else SMALL), *flags]
    folder = Path(tempfile.mkdtemp(prefix="beit-"))
    (folder / "program.py").write_text(PROGRAM.format(script=script, hurt=hurt))
    process = PROCESSES.Process(target=_run, args=(folder, list(map(str, flags)), torchrun))
    process.folder = folder
    _started.append(process)
    process.start()
    return process


def _run(folder, flags, torchrun):
    """`python program.py flags`, or `torchrun ... program.py flags`, in this process."""
    import torch.distributed.run
    multiprocessing.set_start_method("fork", force=True)    # of loader processes
    os.setsid()
    for output, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), output)
    # Without it, restarted processes meet in a store that still holds the addresses of the dead ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    sys.argv = [str(folder / "program.py"), *flags]
    if torchrun:
        torch.distributed.run.main(["--start-method=fork", "--run-path", *torchrun, *sys.argv])
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def said(process):
    """What a run has printed so far: (stdout, stderr)."""
    paths = [process.folder / name for name in ("stdout", "stderr")]
    return tuple(path.read_text() if path.exists() else "" for path in paths)


def alive(process):
    """{pid: pid of its parent} of a run's processes: its own, torchrun's, and those that load images."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):    # it ended
            state, parent, _, session = file.read_text().rpartition(")")[2].split()[:4]
            if int(session) == process.pid and state != "Z":
                found[int(file.parent.name)] = int(parent)
    return found


def finished(process, status=0, seconds=180):
    """What a run printed, when none of its processes is left. It must end in time, and with this status."""
    deadline = time.monotonic() + seconds
    while process.is_alive() or alive(process):
        assert time.monotonic() < deadline, (alive(process), said(process))
        time.sleep(0.02)
    assert process.exitcode == status, said(process)
    return said(process)


def kill_all(process):
    for pid in alive(process):
        with suppress(ProcessLookupError):    # it ended
            os.kill(pid, SIGKILL)


@pytest.fixture(autouse=True)
def leave_no_process():
    """After a test that failed, runs may still go on."""
    yield
    for process in _started:
        kill_all(process)
        shutil.rmtree(process.folder, ignore_errors=True)
    _started.clear()
