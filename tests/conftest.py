import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from signal import SIGKILL
from unittest import mock

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
    import train_dvae
    torch.manual_seed(0)
    model = dvae.DiscreteVAE(vocab_size=64, hidden=8, groups=3, blocks_per_group=1)
    train_dvae.initialise_codes(model, torch.rand(16, 3, 16, 16).cumsum(2).cumsum(3) / 256)
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


# ---- Small runs of finetune, segment and probe, in this process ----

SHORT = "--batch-size 12 --precision fp32 --steps 6 --save-every 3 --log-every 1 --lr 1e-3".split()


@pytest.fixture(scope="module")
def few_images():
    """Within one module of tests, `shapes` has as many scenes as few_scenes says."""
    import data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", data.Shapes.__len__)    # restored after the module
        few_scenes()
        yield


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """model.pt of a masked image model with random weights, as pretrain.py writes it."""
    import torch

    import vit
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=2, heads=2, layer_scale=0.1,
                           position="shared_relative")
    model = vit.MaskedImageModel(config, 64)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    torch.save({"model": model.state_dict(), "config": {"vit": asdict(config), "vocab_size": 64},
                "kind": "MaskedImageModel"}, path)
    return path


def small_args(script, out, *flags):
    """The parsed flags of a small run of a script, given as a module."""
    short = SHORT[:4] if "--knn" in flags else SHORT                   # no flags of training
    return script.parse_args(["--out", str(out), *short, *map(str, flags)])


def train_small(script, out, *flags):
    """Train in this process, with small_args. Returns what is printed."""
    import torch
    with redirect_stdout(io.StringIO()) as printed:
        script.train(small_args(script, out, *flags), torch.device("cpu"))
    return printed.getvalue()


def interrupt_small(script, step, out, *flags):
    """Train as train_small does, but end the run after a step as if it had been killed there."""
    import run
    update = run.Run.update
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def update_or_end(self, loss, **scores):
        update(self, loss, **scores)
        if self.step == step:
            raise KeyboardInterrupt

    with mock.patch.object(run.Run, "update", update_or_end), pytest.raises(KeyboardInterrupt):
        train_small(script, out, *flags)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def evaluate_in_processes(evaluate, monkeypatch):
    """Evaluate 70 images of `shapes` as a single process does, and as three processes that share them do.

    Returns both reports, and the values that the three passed to all_gather: {type: values}.
    """
    import data
    import launch
    reports, gathered = [], defaultdict(list)

    def all_gather(value):    # for the last rank, of all three
        gathered[type(value)].append(value)
        return gathered[type(value)]

    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 70)       # batches have 64, and 6
    monkeypatch.setattr(launch, "all_gather", all_gather)
    for rank, world_size in ((0, 1), (0, 3), (1, 3), (2, 3)):
        if rank == 0:
            gathered.clear()
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        reports.append(evaluate())
    return reports[0], reports[-1], gathered


def result(out):
    """result.json of a run."""
    return json.loads((out / "result.json").read_text())


# ---- Small runs of the scripts, as processes ----

# On the CPU, even beside a GPU, which test_device.py takes; ten steps an epoch.
BRIEF = "--device cpu --precision fp32 --batch-size 12 --save-every 3 --log-every 1".split()
SMALL = [*"--image-size 32 --patch-size 8 --dim 16 --depth 2 --heads 2".split(), *BRIEF]
PROGRAM = """
import os, signal, sys
import conftest, launch, run, {script}
conftest.few_scenes()
{hurt}
sys.argv[0] = "{script}.py"
{script}.main()
"""
AT_STEP = """
function = run.Run.{method}
def hurt(self, *values):
    if self.step == {steps_done} and launch.rank() == {rank}:
        {action}
    return function(self, *values)
run.Run.{method} = hurt
"""
# All processes, torchrun's too, are forked from one that has imported everything, to save most of their time.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
PROCESSES = multiprocessing.get_context("forkserver")
SCRIPTS = ["train_dvae", "pretrain", "finetune", "segment", "probe"]
PROCESSES.set_forkserver_preload(["conftest", "torch.distributed.run", *SCRIPTS])
_started = []


def at(step, method, action, rank=0):
    """Code that lets one process of a run act before it calls _all_reduce, _log or _save in a step."""
    steps_done = step - 1 if method == "_all_reduce" else step
    return AT_STEP.format(steps_done=steps_done, method=method, action=action, rank=rank)


def start(out, *flags, script="pretrain", processes=1, torchrun=(), hurt="", signal=0, at_step=0):
    """Start a script with few_scenes as a process; under torchrun, if it has several processes or flags.

    hurt: Python code to run before its main(). signal: what its first process gets in the middle of a step.
    """
    if signal:    # after the backward pass
        hurt = at(at_step, "_all_reduce", f"os.kill(os.getpid(), {signal:d})")
    if processes > 1:
        torchrun = ["--standalone", f"--nproc_per_node={processes}", *torchrun]
    brief = BRIEF[:6] if "--knn" in flags else BRIEF                   # no flags of training
    flags = ["--out", out, *(brief if script in ("train_dvae", "probe") else SMALL), *flags]
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
