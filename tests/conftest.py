import json
import os
import subprocess
import sys
from pathlib import Path

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


# Flags of a small run; with few_scenes it has ten steps an epoch.
SMALL = ("--image-size 32 --patch-size 8 --dim 16 --depth 2 --heads 2 --batch-size 12 --precision fp32 "
         "--save-every 3 --log-every 1").split()
RUN = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
sys.argv[0] = "pretrain.py"
import conftest, pretrain, training
conftest.few_scenes()
all_reduce = training.Run.all_reduce
def hurt(self, step, values):    # in the middle of a step, after its backward pass
    if step == int(os.environ["AT_STEP"]) and training.rank() == 0:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return all_reduce(self, step, values)
training.Run.all_reduce = hurt
pretrain.main()
"""


def few_scenes():
    """Let `shapes` have 120 scenes to train, 24 held out."""
    import data
    data.Shapes.__len__ = lambda self: 120 if self.split == "train" else 24


def start(out, *flags, processes=1, signal=0, at_step=0):
    """Popen of pretrain.py with few_scenes. Its first process gets the signal in the middle of a step."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--no-python",
                sys.executable] if processes > 1 else []
    command = [sys.executable, *torchrun, "-c", RUN, "--out", out, *SMALL, *flags]
    told = {"ROOT": str(ROOT), "PYTHONPATH": str(ROOT / "tests"),
            "SIGNAL": str(int(signal)), "AT_STEP": str(at_step)}
    return subprocess.Popen([str(word) for word in command], env={**os.environ, **told}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process, status=0):
    """What the process printed, (stdout, stderr), when it has ended with this status."""
    said = process.communicate(timeout=400)
    assert process.returncode == status, said
    return said
