"""Loader workers, processes, accumulated parts and restarts change no sample, no crop and no mask, and the
losses by no more than rounding."""
import hashlib
from functools import partial
from signal import SIGTERM
from types import SimpleNamespace

import pytest
import torch
from conftest import equal, finished, log, start
from torch.utils.data import Subset

import data
from masking import blockwise_mask, random_mask
from shapes import Shapes

STEPS, BATCH = 5, 24    # of 50 images: two steps an epoch, so that five steps reach the third


# ---- The data path ----

def global_batches(first=0, stop=STEPS, *, workers=0, world=1, parts=1, seed=7, draw_mask=blockwise_mask):
    """A checksum of the two views and the mask that all processes and parts together see, for each step."""
    args = SimpleNamespace(batch_size=BATCH, accumulate=parts, seed=seed, workers=workers)
    scenes = Subset(Shapes("train"), range(50))
    views = data.Views(scenes, 32, 16, partial(draw_mask, (4, 4), 6), seed=seed)
    loaders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        for rank in range(world):
            patch.setenv("RANK", str(rank))
            loaders.append(iter(data.train_loader(views, args, torch.device("cpu"), first, stop)))
    sums = []
    for _ in range(first, stop):
        pieces = [next(loader) for _ in range(parts) for loader in loaders]
        columns = [torch.cat([piece[name] for piece in pieces]) for name in ("image", "token_image", "mask")]
        assert [len(column) for column in columns] == [BATCH] * 3
        sums.append([hashlib.sha256(column.numpy().tobytes()).hexdigest() for column in columns])
    assert all(next(loader, None) is None for loader in loaders)
    return sums


@pytest.fixture(scope="module")
def undivided():
    """One process without workers, parts and breaks; its steps all differ."""
    sums = global_batches()
    assert len({column for step in sums for column in step}) == 3 * STEPS
    return sums


@pytest.mark.parametrize("draw_mask", [blockwise_mask, random_mask])
def test_the_seed_decides(draw_mask):
    a, b, c = (global_batches(stop=2, seed=seed, draw_mask=draw_mask) for seed in (7, 7, 8))
    assert a == b
    assert not {column for step in a for column in step} & {column for step in c for column in step}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, world, parts", [
    (0, 1, 4), (0, 2, 1), (1, 1, 1), (1, 2, 4), (2, 3, 4)])
def test_every_division_sees_the_same_global_batches(workers, world, parts, undivided):
    assert global_batches(workers=workers, world=world, parts=parts) == undivided


def test_a_run_in_pieces_sees_the_same_global_batches(undivided):
    assert [batch for step in range(STEPS) for batch in global_batches(step, step + 1)] == undivided


# ---- Runs ----

FLAGS = ["--jitter", 0.4, "--seed", 7, "--steps", 12]


@pytest.mark.long
def test_workers_and_pieces_change_no_bit(tokenizer, tmp_path, record_fault):
    """With stochastic depth: no workers, two, and a run in three pieces with 1, 2 and none."""
    flags = [*FLAGS, "--tokenizer", tokenizer, "--drop-path", 0.2]
    others = [start(tmp_path / f"{workers}", *flags, "--workers", workers) for workers in (0, 2)]
    for workers, step in ((1, 2), (2, 9)):
        stopped = start(tmp_path / "pieces", *flags, "--workers", workers, signal=SIGTERM, at_step=step)
        said, _ = finished(stopped, -SIGTERM)
        assert f"SIGTERM: stopped after step {step}; " in said
    for process in [*others, start(tmp_path / "pieces", *flags)]:
        finished(process)
    whole, *others = (tmp_path / name for name in ("0", "2", "pieces"))
    assert len(log(whole)) == 12
    for other in others:
        assert log(other) == log(whole)
        assert equal(*(torch.load(folder / "model.pt")["model"] for folder in (other, whole)))
    record_fault("SIGTERM in the middle of a step, run in three pieces", 2)


@pytest.mark.parametrize("script, flags, divisions", [
    pytest.param("finetune", [], [(2, 1)], marks=pytest.mark.long),
    ("segment", ["--scale", 0.3, 2], [(1, 3), (2, 2)]),    # crops with padding: not all pixels are counted
    ("pretrain", ["--no-exact-masks", "--target", "pixels"], [(1, 4), (2, 3)])])
def test_processes_and_parts_equal_one(script, flags, divisions, pretrained, tmp_path):
    """The mean over a batch does not depend on how it is cut, not even if its parts weigh differently."""
    flags = [*flags, "--steps", 6, *(["--init", pretrained] if script != "pretrain" else ["--jitter", 0])]
    runs = [start(tmp_path / f"{processes}x{parts}", *flags, "--accumulate", parts, script=script,
                  processes=processes) for processes, parts in [(1, 1), *divisions]]
    for run in runs:
        finished(run)
    for processes, parts in divisions:
        for one, other in zip(log(tmp_path / "1x1"), log(tmp_path / f"{processes}x{parts}"), strict=True):
            close = 1e-5 if one["step"] == 1 else 1e-4                 # rounding grows with the steps
            assert other == {name: pytest.approx(value, rel=close) for name, value in one.items()}


@pytest.mark.long
def test_processes_and_parts_change_no_more_than_rounding(tokenizer, tmp_path):
    """3 processes with 4 accumulated parts each: the same sums in another order, 1e-4 of each figure."""
    flags = [*FLAGS, "--tokenizer", tokenizer]
    finished(start(tmp_path / "1", *flags))
    finished(start(tmp_path / "3x4", *flags, "--accumulate", 4, "--workers", 1, processes=3))
    for whole, divided in zip(log(tmp_path / "1"), log(tmp_path / "3x4"), strict=True):
        for name in whole.keys() & {"loss", "grad_norm", "val_loss"}:
            assert divided[name] == pytest.approx(whole[name], rel=1e-4), (whole["step"], name)
