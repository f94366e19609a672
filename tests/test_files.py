"""Files that are not what they should be, from images to folders: what is named, replaced, counted or refused."""
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
import finetune
import training
from conftest import ROOT

TINY = ["--image-size", "16", "--patch-size", "8", "--dim", "8", "--depth", "1", "--heads", "1", "--batch-size", "10", "--precision", "fp32",
        "--preset", "demo", "--device", "cpu", "--log-every", "1"]


def picture(seed=0, width=24, height=20):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(folder, count, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:04}{suffix}")


def png_of(side):
    """A PNG whose head claims side x side pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_of(whole, side):
    """A JPEG whose frame claims side x side pixels."""
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", side, side) + whole[at + 4:]


HURT = {"empty": lambda whole: b"", "one byte": lambda whole: b"\xff", "cut": lambda whole: whole[:len(whole) // 2], "text": lambda whole: b"not an image\n" * 20,
        "zeros": lambda whole: bytes(len(whole)), "a bomb, PNG": lambda whole: png_of(60_000), "a bomb, JPEG": lambda whole: jpeg_of(whole, 60_000),
        "the head alone": lambda whole: whole[:20], "web page": lambda whole: b"<!DOCTYPE html><html></html>"}


# Images ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", HURT)
def test_an_image_that_is_none_is_replaced_and_reported(tmp_path, how, capfd):
    fill(tmp_path, 3)
    bad = tmp_path / "0001.jpg"
    bad.write_bytes(HURT[how](bad.read_bytes()))
    source = data.Folder(data.image_paths(tmp_path))
    views = data.Views(source, [16], (2, 2), train=False)
    view, *_, names = views[0, 1]
    assert names == [str(bad)] and torch.equal(view, views[0, 2][0])
    assert not any(capfd.readouterr())                  # libraries under PIL like to write to stderr


def test_a_name_says_nothing_of_the_format(tmp_path):
    picture().save(tmp_path / "a.jpg", "PNG")
    picture().save(tmp_path / "b.png", "JPEG", quality=95)
    source = data.Folder(data.image_paths(tmp_path))
    for index in range(2):
        assert data.Views(source, [16], (2, 2))[0, index][-1] == []
    assert (np.asarray(source.image(0)) == np.asarray(picture())).all()


def test_a_folder_named_like_an_image_is_none(tmp_path):
    fill(tmp_path / "x.jpg", 2)
    fill(tmp_path, 2)
    assert [Path(path).name for path in data.image_paths(tmp_path)] == ["0000.jpg", "0001.jpg", "0000.jpg", "0001.jpg"]


def test_a_file_that_vanishes_is_replaced(tmp_path):
    fill(tmp_path, 3)
    views = data.Views(data.Folder(data.image_paths(tmp_path)), [16], (2, 2), train=False)
    (tmp_path / "0000.jpg").unlink()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert views[0, 0][-1] == [str(tmp_path / "0000.jpg")] and torch.equal(views[0, 0][0], views[0, 1][0])
    assert data.Views(data.Folder([tmp_path / "gone.jpg", tmp_path / "0001.jpg"]), [16], (2, 2))[0, 0][-1] == [str(tmp_path / "gone.jpg")]


def test_a_file_without_permission_is_replaced(tmp_path, monkeypatch):
    fill(tmp_path, 2)
    (tmp_path / "0000.jpg").chmod(0)
    if os.geteuid() == 0:                               # root may read anything: the system's answer is played
        opened = Image.open

        def deny(path, *args):
            if str(path).endswith("0000.jpg"):
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *args)
        monkeypatch.setattr(Image, "open", deny)
    assert data.Views(data.Folder(data.image_paths(tmp_path)), [16], (2, 2))[0, 0][-1] == [str(tmp_path / "0000.jpg")]


def test_if_none_can_take_its_place_all_are_reported_and_the_run_stops(tmp_path):
    fill(tmp_path, 30)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    *_, names = data.Views(data.Folder(data.image_paths(tmp_path)), [16], (2, 2))[0, 5]
    assert len(names) == data.IN_A_ROW == len(set(names))
    with pytest.raises(ValueError, match="1 % "):
        data.CorruptImages(30, lambda line: None).add(0, names)
    with pytest.raises(OSError, match="nor can the 19 images after it.*0005.jpg"):
        data.CorruptImages(30, lambda line: None).warn(names)


# Runs --------------------------------------------------------------------------------------------------------------------

def run(script, out, *flags):
    """(exit status, stdout, stderr) of a script."""
    given = [sys.executable, ROOT / f"{script}.py", "--out", out, *TINY, *flags]
    done = subprocess.run(list(map(str, given)), text=True, capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_pretraining_among_bad_files(tmp_path, workers, record_fault):
    """Two of 300 are replaced and named once; five of 100 end the run in one line."""
    for name, count, bad in (("few", 300, (3, 77)), ("many", 100, (3, 4, 20, 50, 77))):
        fill(tmp_path / name / "train", count)
        fill(tmp_path / name / "val", 12)
        for k, i in enumerate(bad):
            path = tmp_path / name / "train" / f"{i:04}.jpg"
            path.write_bytes(list(HURT.values())[k](path.read_bytes()))
    steps = ["--target", "pixels", "--workers", workers]
    status, out, err = run("pretrain", tmp_path / "a", "--data", tmp_path / "few", "--steps", "60", *steps)
    assert (status, err) == (0, "") and json.loads((tmp_path / "a" / "result.json").read_text())["unreadable_images"] == 2
    for i in (3, 77):
        assert out.count(f"warning: {tmp_path / 'few' / 'train' / f'{i:04}.jpg'} cannot be read; the next image takes its place\n") == 1
    status, out, err = run("pretrain", tmp_path / "b", "--data", tmp_path / "many", "--steps", "20", *steps)
    assert status == 2 and err.startswith("pretrain.py: error: --data: more than 1 % of the images") and err.count("\n") == 1
    record_fault(f"unreadable images among good ones, {workers} workers", 2, 0)


@pytest.mark.long
def test_images_that_vanish_in_a_run(tmp_path, record_fault):
    """All of them, while it runs: one line, and the checkpoint stays."""
    fill(tmp_path / "images" / "train", 100)
    fill(tmp_path / "images" / "val", 12)
    given = [sys.executable, ROOT / "pretrain.py", "--out", tmp_path / "a", *TINY, "--data", tmp_path / "images", "--target", "pixels", "--steps", "100000", "--save-every", "5"]
    process = subprocess.Popen(list(map(str, given)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("backbone"):
            break
    while not (tmp_path / "a" / "last.pt").exists() and process.poll() is None:
        pass
    for path in (tmp_path / "images" / "train").iterdir():
        path.unlink()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("pretrain.py: error: --data: more than 1 %") and err.count("\n") == 1
    assert checkpoints.damage(tmp_path / "a" / "last.pt") is None
    record_fault("all images vanish in a run", 1, 0)


# Labels ------------------------------------------------------------------------------------------------------------------

def labelled(tmp_path, classes=("a", "b"), count=10):
    for split in ("train", "val"):
        for name in classes:
            fill(tmp_path / "set" / split / name, count if split == "train" else 3)
    return tmp_path / "set"


def refused(capsys, monkeypatch, tmp_path, *flags):
    """What finetune.py says on stderr; it has written nothing."""
    monkeypatch.setattr(sys, "argv", list(map(str, ["finetune.py", "--out", tmp_path / "out", *TINY, "--init", "none", "--steps", "2", *flags])))
    with pytest.raises(SystemExit) as end:
        finetune.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("finetune.py: error: --data: ") and err.count("\n") == 1 and not (tmp_path / "out").exists()
    return err


def test_folders_of_labels_that_are_none(tmp_path, capsys, monkeypatch):
    folder = labelled(tmp_path)

    def said():
        return refused(capsys, monkeypatch, tmp_path, "--data", folder)
    (folder / "train" / "c").mkdir()
    assert f"class c of {folder / 'train'} has no images (.bmp" in said()
    (folder / "train" / "c" / "notes.txt").write_text("no image")
    assert "class c" in said()
    (folder / "train" / "c" / "notes.txt").unlink()
    (folder / "train" / "c").rmdir()
    fill(folder / "val" / "z", 1)
    assert f"{folder / 'val'} has class z, {folder / 'train'} has not" in said()
    for part in ("val/z", "train/b", "val/b"):
        (folder / part).rename(tmp_path / part.replace("/", "-"))
    assert f"{folder / 'train'} must hold a folder of images for each of at least two classes" in said()
    (folder / "val").rename(tmp_path / "val")
    assert "needs train/ and val/ (or validation/)" in said()
    (folder / "val").write_text("a file")
    assert "needs train/ and val/ (or validation/)" in said()


# Maps --------------------------------------------------------------------------------------------------------------------

def ade(tmp_path, count=12):
    folder = tmp_path / "ade"
    for split in ("training", "validation"):
        (folder / "annotations" / split).mkdir(parents=True)
        fill(folder / "images" / split, count)
        for path in (folder / "images" / split).iterdir():
            Image.fromarray(np.full((20, 24), 2, np.uint8)).save(folder / "annotations" / split / f"{path.stem}.png")
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n3\ttree\n")
    return folder


WRONG_MAPS = {"is 10x10, its image 24x20": Image.new("L", (10, 10), 1), "holds class 9, there are 3": Image.new("L", (24, 20), 9),
              "is not a map of 8-bit class numbers, but mode RGB": Image.new("RGB", (24, 20)), "is not a map of 8-bit class numbers, but mode I;16": Image.fromarray(np.full((20, 24), 2, np.uint16)),
              "cannot be read": None}


@pytest.mark.parametrize("reason", WRONG_MAPS)
def test_a_wrong_map_is_named_with_its_reason(tmp_path, reason):
    folder, said = ade(tmp_path), []
    file = folder / "annotations" / "training" / "0004.png"
    if WRONG_MAPS[reason]:
        WRONG_MAPS[reason].save(file)
    else:
        file.write_bytes(b"")
    source, _ = data.open_labelled(str(folder), "", maps=True)
    views = data.Labelled(source, data.segmentation_transform(16, train=False))
    image, target, names = views[0, 4]
    assert torch.equal(image, views[0, 5][0]) and target.shape == (20, 24) and target.unique().tolist() == [1]
    report = data.CorruptImages(1000, said.append)
    report.add(0, names), report.warn(names)
    assert said == [f"warning: {file} {reason}; the next image takes its place"]
    with pytest.raises(ValueError, match=f"1 % .*: {file} {reason}$"):
        data.CorruptImages(12, said.append).add(0, names * 2)


def test_folders_of_maps_that_are_none(tmp_path, capsys, monkeypatch):
    folder = ade(tmp_path)

    def said():
        return refused(capsys, monkeypatch, tmp_path, "--task", "segmentation", "--preset", "segmentation-demo", "--data", folder)
    (folder / "annotations" / "training" / "0003.png").rename(tmp_path / "kept.png")
    assert f"1 images have no map, {folder / 'annotations' / 'training' / '0003.png'} first" in said()
    (tmp_path / "kept.png").rename(folder / "annotations" / "training" / "0003.png")
    for table, words in ((b"Idx\tName\n", "names 0 classes"), (b"\xff\xfe\x00", "is not text"), (b"Idx\tName\n" + b"1\tx\n" * 255, "names 255 classes, below its line of titles; from 1 to 254")):
        (folder / "objectInfo150.txt").write_bytes(table)
        assert f"{folder / 'objectInfo150.txt'} " in (line := said()) and words in line
    (folder / "objectInfo150.txt").unlink()
    (folder / "annotations" / "validation").rename(tmp_path / "validation")
    assert "lacks annotations/validation; segmentation takes images/training" in said()


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_segmentation_with_wrong_maps(tmp_path, workers, record_fault):
    """One is named and replaced. If all are wrong, the run ends in one line with the reason; so does an evaluation."""
    folder = ade(tmp_path, 30)
    one = folder / "annotations" / "training" / "0004.png"
    WRONG_MAPS["is 10x10, its image 24x20"].save(one)
    flags = ["--task", "segmentation", "--preset", "segmentation-demo", "--data", folder, "--init", "none", "--steps", "3", "--workers", workers, "--decoder-dim", "8"]
    status, out, err = run("finetune", tmp_path / "a", *flags)
    assert (status, err) == (0, "") and out.count(f"warning: {one} is 10x10, its image 24x20; the next image takes its place") == 1
    for path in (folder / "annotations" / "validation").iterdir():
        path.write_bytes(b"")
    status, out, err = run("finetune", tmp_path / "b", *flags)
    assert status == 2 and "0000.png: cannot be read, nor can the 19 images after it" in err and err.count("\n") == 1
    for path in (folder / "annotations" / "training").iterdir():
        WRONG_MAPS["holds class 9, there are 3"].save(path)
    status, out, err = run("finetune", tmp_path / "c", *flags)
    assert status == 2 and "finetune.py: error: --data: more than 1 %" in err and "holds class 9, there are 3" in err and err.count("\n") == 1
    record_fault(f"segmentation maps that do not fit, {workers} workers", 3, 0)


# The rest of a run's files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b"{"], ids=["list", "bytes", "deep", "null", "cut"])
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    config = training.build(training.RunConfig, {"batch_size": 8, "steps": 4, "out": str(tmp_path)})
    with pytest.raises(training.UserError, match="^--out: .*config.json is not readable; name another --out, or .* --fresh$"):
        training.Run(config, torch.device("cpu"), 4)


@pytest.mark.parametrize("line", [b"[1]", b'{"step": "x"}', b"\xff\xfe", b"[" * 100_000, b"{}"], ids=["list", "word", "bytes", "deep", "none"])
def test_a_log_that_is_none_is_cut_where_it_ends(tmp_path, line):
    config = training.build(training.RunConfig, {"batch_size": 8, "steps": 4, "out": str(tmp_path)})
    run = training.Run(config, torch.device("cpu"), 4)
    run.save(2, model=torch.nn.Linear(1, 1))
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    run.restore(model=torch.nn.Linear(1, 1))
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_model_in_place_of_a_checkpoint(tmp_path):
    config = training.build(training.RunConfig, {"batch_size": 8, "steps": 4, "out": str(tmp_path)})
    run = training.Run(config, torch.device("cpu"), 4)
    torch.save({"model": torch.nn.Linear(1, 1).state_dict()}, tmp_path / "last.pt")
    with pytest.raises(training.UserError, match="^--out: .*last.pt is damaged .it is no checkpoint of a run"):
        run.restore(model=torch.nn.Linear(1, 1))
