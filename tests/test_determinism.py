"""How the work is divided (loader workers, processes, accumulated parts, one go or several) changes no sample, no crop and no
mask, and no loss by more than rounding.
"""
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import data
import dvae
import pretrain
import training
from conftest import ROOT

CPU = torch.device("cpu")
BATCH, STEPS = 24, 5                                                   # of 50 images: two steps an epoch, so five steps reach the third
WORKERS, WORLDS, PARTS = (0, 1, 4), (1, 2, 3), (1, 4)
FLAGS = ["--image-size", "32", "--patch-size", "8", "--dim", "16", "--depth", "2", "--heads", "2", "--batch-size", str(BATCH),
         "--precision", "fp32", "--jitter", "0.4", "--log-every", "1", "--seed", "7"]


# the data path ----------------------------------------------------------------------------------------------------------

class FiftyShapes(data.Shapes):
    """Fifty scenes, so that a few steps are several epochs."""

    def __len__(self):
        return 50


def config_of(*flags):
    return training.parse(pretrain.Config, pretrain.PRESETS, [*FLAGS, "--steps", str(STEPS), *map(str, flags)])


def global_batches(config, start=0, stop=STEPS, *, world=1, parts=1):
    """For each step, the global batch that all processes and parts together see: two views, colours, mask, in the order of the
    samples."""
    views, _ = pretrain.make_views(config, FiftyShapes("train"), FiftyShapes("val"), 16)
    loaders = [iter(data.train_loader(views, config, CPU, start=start, stop=stop, rank=rank, world_size=world)) for rank in range(world)]
    batches = []
    for _ in range(start, stop):
        pieces = [next(loader) for _ in range(parts) for loader in loaders]
        batches.append([torch.cat(column) for column in list(zip(*pieces))[:4]])
    assert all(next(loader, None) is None for loader in loaders)
    return batches


def checksums(batches):
    return [[hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for tensor in batch] for batch in batches]


@pytest.fixture(scope="module")
def undivided():
    """The checksums of one process without workers, parts and breaks; whose steps all differ."""
    sums = checksums(global_batches(config_of()))
    assert len({sum for step in sums for sum in step}) == 4 * STEPS
    return sums


@pytest.mark.parametrize("masking", ["blockwise", "random"])
def test_the_seed_is_what_decides(masking):
    a, b, c = (checksums(global_batches(config_of("--masking", masking, "--seed", seed), stop=2)) for seed in (7, 7, 8))
    assert a == b and not {sum for step in a for sum in step} & {sum for step in c for sum in step}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, world, parts", list(itertools.product(WORKERS, WORLDS, PARTS)))
def test_every_division_sees_the_same_global_batches(workers, world, parts, undivided):
    """Sample order, both crops, colours and masks, by checksum of the concatenated batch; also where a run stops and goes on."""
    config = config_of("--workers", workers, "--accumulate", parts)
    assert checksums(global_batches(config, world=world, parts=parts)) == undivided
    if not workers:                                     # five pieces; with workers, the runs below
        continued = [batch for step in range(STEPS) for batch in global_batches(config, start=step, stop=step + 1, world=world, parts=parts)]
        assert checksums(continued) == undivided


# runs -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer with random weights, whose tokens vary."""
    torch.manual_seed(0)
    model = dvae.DiscreteVAE(vocab_size=64, hidden=8, groups=3, blocks_per_group=1)
    model.initialise_codes(torch.rand(16, 3, 16, 16))
    path = tmp_path_factory.mktemp("tokenizer") / "model.pt"
    torch.save({"model": model.state_dict(), "config": model.config, "kind": "DiscreteVAE"}, path)
    return path


RUN = """
import os, sys, signal
import data, pretrain, training
data.Shapes.__len__ = lambda self: 120
stop, end = int(os.environ.get("STOP_AT", 0)), training.Run.exchange
def told(self, step, *more):                    # the signal arrives in the middle of the step; on one process, all are told
    if step == stop and training.rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return end(self, step, *more)
training.Run.exchange = told
pretrain.main()
"""


def start(folder, tokenizer, *flags, processes=1, stop_at=0):
    """pretrain.py on 120 scenes, five steps an epoch, for 12 steps; stop_at: SIGTERM in the middle of that step."""
    if not (folder.parent / "run.py").exists():         # others read it
        (folder.parent / "run.py").write_text(RUN)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launch, str(folder.parent / "run.py"), "--out", str(folder), *FLAGS, "--tokenizer", str(tokenizer), "--steps", "12",
                             *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STOP_AT": str(stop_at)})


def log(folder):
    """metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def weights_of(folder):
    return torch.load(folder / "model.pt")["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finished(started):
    for process in started:
        printed = process.communicate(timeout=400)
        assert process.returncode == 0, printed


@pytest.mark.long
def test_workers_and_pieces_change_no_bit(tokenizer, tmp_path, record_fault):
    """0, 1 and 4 workers, and a run in five pieces with 0, 1 and 4 of them: the arithmetic is the same, so the log and the
    weights are, bit for bit; stochastic depth included."""
    whole = [start(tmp_path / f"{workers}", tokenizer, "--drop-path", "0.2", "--workers", str(workers)) for workers in WORKERS]
    for piece, at in enumerate((2, 5, 6, 10)):
        process = start(tmp_path / "pieces", tokenizer, "--drop-path", "0.2", "--workers", str(WORKERS[piece % 3]), stop_at=at)
        printed = process.communicate(timeout=400)
        assert process.returncode == -signal.SIGTERM and f"stopped after step {at} of 12" in printed[0], printed
    finished([*whole, start(tmp_path / "pieces", tokenizer, "--drop-path", "0.2")])
    expected = log(tmp_path / "0")
    assert [line["step"] for line in expected] == list(range(1, 13))
    same = {name: log(tmp_path / name) == expected and equal(weights_of(tmp_path / name), weights_of(tmp_path / "0")) for name in ("1", "4", "pieces")}
    record_fault("SIGTERM in the middle of a step, run in five pieces", 4, int(not same["pieces"]))
    assert all(same.values()), same


@pytest.mark.long
def test_processes_and_parts_change_no_more_than_rounding(tokenizer, tmp_path):
    """1, 2 and 3 processes, and 4 accumulated parts on 1 and 3: the same sums in another order, 1e-4 of each loss."""
    layouts = {"1": (1,), "2": (2,), "3": (3,), "1x4": (1, "--accumulate", "4"), "3x4": (3, "--accumulate", "4", "--workers", "1")}
    started = {}
    for name, (processes, *flags) in layouts.items():
        started[name] = start(tmp_path / name, tokenizer, *flags, processes=processes)
        if len(started) % 2 == 0:
            finished(started.values())
    finished(started.values())
    for name in list(layouts)[1:]:
        for one, other in zip(log(tmp_path / "1"), log(tmp_path / name), strict=True):
            for figure in ("loss", "grad_norm", *(["val_loss"] if "val_loss" in one else [])):
                assert other[figure] == pytest.approx(one[figure], rel=1e-4), (name, one["step"], figure)
