"""Which run a folder holds: a run goes on only with the flags and images that it had, and replaces only files
that it wrote itself."""
import io
import json
import os
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, log
from PIL import Image

import finetune
import launch
import pretrain
import probe
import run_folder
import segment
import train_dvae
from launch import UserError

CPU = torch.device("cpu")
TINY = "--image-size 16 --patch-size 8 --dim 16 --depth 2 --heads 2".split()
FLAGS = {    # script -> flags of a small run
    pretrain: ["--target", "pixels", *TINY], finetune: ["--init", "none", "--mixup", 0, "--cutmix", 0, *TINY],
    segment: ["--init", "none", *TINY], probe: ["--init", "pretrained.pt"],
    train_dvae: "--image-size 16 --vocab-size 8 --hidden 8 --groups 3 --preset small".split()}
EVERY = pytest.mark.parametrize("script", FLAGS, ids=[script.__name__ for script in FLAGS])


def save(path, seed, kind="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values if kind == "RGB" else values[..., 0] % 4).save(path)


@pytest.fixture
def images(tmp_path, monkeypatch, pretrained):
    """The current folder, with folders of classes and class maps, and the checkpoint pretrained.pt."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(pretrained, "pretrained.pt")
    for seed in range(12):
        save(Path("classes", "train" if seed % 3 else "val", "ab"[seed % 2], f"{seed}.png"), seed)
        split = "training" if seed % 3 else "validation"
        save(Path("maps/images", split, f"{seed}.png"), seed)
        save(Path("maps/annotations", split, f"{seed}.png"), seed, "L")
    return tmp_path


def train(script, *flags, data=None, steps=2, out="run"):
    """Train for some steps in the current folder. Returns what is printed."""
    data = data or ("maps" if script is segment else "classes")
    words = ["--data", data, "--out", out, "--batch-size", 4, "--steps", steps, "--precision", "fp32",
             "--log-every", 1, *FLAGS[script], *flags]
    with redirect_stdout(io.StringIO()) as printed:
        script.train(script.parse_args(list(map(str, words))), CPU)
    return printed.getvalue()


# ---- The same run ----

@EVERY
def test_one_folder_of_images_has_many_names(script, images):
    train(script)
    name = "maps" if script is segment else "classes"
    os.symlink(name, "link")
    for data in (f"./{name}", f"{name}/", images / name, "link"):
        assert "is finished" in train(script, data=data)
    assert json.loads(Path("run/config.json").read_text())["data"] == str((images / name).resolve())


def add_image(where):
    def change():
        folder = next(Path(where).glob("*")) if Path(where, "a").is_dir() else Path(where)
        save(folder / "new.png", 99)
        if where.startswith("maps"):
            save(Path(where.replace("images", "annotations"), "new.png"), 99, "L")
    return change


def rename_class():
    for split in ("train", "val"):
        os.rename(f"classes/{split}/b", f"classes/{split}/0")


def add_class():
    save(Path("classes/train/c/1.png"), 1)


def replace_checkpoint():
    saved = torch.load("pretrained.pt", weights_only=True)
    saved["model"]["norm.bias"] += 1
    torch.save(saved, "pretrained.pt")


@pytest.mark.parametrize("script, change, what", [
    (pretrain, add_image("classes/train"), "training_images"), (pretrain, add_image("classes/val"), "held_o"),
    (train_dvae, add_image("classes/train"), "training_images"), (finetune, rename_class, "classes"),
    (finetune, add_class, "classes"), (finetune, add_image("classes/val"), "held_out_images"),
    (segment, add_image("maps/images/training"), "training_images"),
    (segment, lambda: Path("maps/objectInfo150.txt").write_text("Idx\tName\n1\ta\n2\tb\n3\tc\n"), "classes"),
    (probe, rename_class, "classes"), (probe, replace_checkpoint, "init_file")])
def test_other_images_are_another_run(script, change, what, images):
    is_finished = what in ("classes", "held_out_images")               # half of them
    train(script)
    if not is_finished:
        os.remove("run/result.json")
    before = Path("run/last.pt").read_bytes()
    change()
    with pytest.raises(UserError, match=f"--out: run holds a run with other .*{what}.* was .* now .*--fresh"):
        train(script)
    assert Path("run/last.pt").read_bytes() == before


def test_a_step_beyond_the_last_is_no_finished_run(images):
    """As of a folder whose config.json does not name the images yet."""
    train(pretrain, steps=4)
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps({**config, "inputs": {}, "steps": 2}))
    os.remove("run/result.json")
    with pytest.raises(UserError, match="--out: run holds step 4 of a longer run, and this one has 2 steps"):
        train(pretrain, steps=2)
    assert not Path("run/result.json").exists()


def test_a_finished_tokenizer_serves_any_number_of_processes(images, monkeypatch):
    """The batch of the tokenizer is a multiple of the processes, which nobody chose."""
    flags = ["--target", "tokens", "--tokenizer-preset", "small", "--tokenizer-steps", 2]
    monkeypatch.setitem(train_dvae.PRESETS, "small", {
        **train_dvae.PRESETS["small"], "hidden": 8, "vocab_size": 8, "batch_size": 4})
    train(pretrain, *flags)
    tokenizer, lines = Path("run/tokenizer/model.pt").read_bytes(), log(Path("run"))
    for name in ("last.pt", "result.json"):
        os.remove(f"run/{name}")
    real = train_dvae.flags_for_pretraining
    monkeypatch.setattr(train_dvae, "flags_for_pretraining", lambda *args: [*real(*args), "--lr", "9"])
    train(pretrain, *flags)
    assert Path("run/tokenizer/model.pt").read_bytes() == tokenizer and log(Path("run")) == lines
    saved = torch.load("run/tokenizer/model.pt", weights_only=True)
    assert saved["image_size"] == 16                                   # 2 patches x 8 pixels
    saved["model"]["encoder.blocks.output.conv.b"] += torch.arange(8)
    torch.save(saved, "run/tokenizer/model.pt")
    os.remove("run/result.json")
    with pytest.raises(UserError, match="tokenizer_file was"):
        train(pretrain, *flags)


# ---- Defaults ----

@pytest.mark.parametrize("script", [finetune, segment, probe], ids=["finetune", "segment", "probe"])
@pytest.mark.parametrize("trained_on", ["other/pictures", None])
def test_a_default_checkpoint_is_of_the_same_images(script, trained_on, images):
    """Not of another folder that has the same last name."""
    os.makedirs("runs/pretrain-pictures")
    shutil.copy("pretrained.pt", "runs/pretrain-pictures/model.pt")
    shutil.copytree("maps" if script is segment else "classes", "mine/pictures")
    config = Path("runs/pretrain-pictures/config.json")
    if trained_on:
        config.write_text(json.dumps({"data": trained_on}))
    flags = ["--data", "mine/pictures", "--batch-size", "4", "--preset", "demo"]
    found = f"{images}/other/pictures" if trained_on else "unknown images"
    message = f"--init: runs/pretrain-pictures/model.pt was trained on {found}, and --data is mine/pictures"
    with pytest.raises(UserError, match=message):
        script.train(script.parse_args(flags), CPU)
    config.write_text(json.dumps({"data": "mine/pictures"}))           # a relative path, as of earlier runs
    with redirect_stdout(io.StringIO()):
        script.train(script.parse_args([*flags, "--steps", "1"]), CPU)


@pytest.mark.parametrize("script", [finetune, segment], ids=["finetune", "segment"])
def test_a_run_is_evaluated_on_its_own_images(script, images):
    name = "maps" if script is segment else "classes"
    train(script)
    shutil.copytree(name, f"other/{name}")
    with pytest.raises(UserError, match="--init: run/model.pt was trained on .*, and --data is other/"):
        script.train(script.parse_args(["--eval", "--data", f"other/{name}", "--out", "run"]), CPU)


# ---- What is not replaced ----

@pytest.mark.parametrize("script, flags, message", [
    (finetune, "--init mine/model.pt --out mine", "--out: mine holds --init model.pt, which the run would"),
    (finetune, "--init mine/model.pt --out ./mine/", "--out: ./mine/ holds --init model.pt"),
    (segment, "--init mine/model.pt --out mine", "--out: mine holds --init"),
    (probe, "--init mine/model.pt --out mine", "--out: mine holds --init"),
    (pretrain, "--out mine", "--out: mine holds model.pt, which no run here has written; name another"),
    (train_dvae, "--out mine", "--out: mine holds model.pt, which no run here has written; name another"),
    (pretrain, "--data flat --out flat", "--out: flat lies in --data flat, and its pictures would be taken"),
    (pretrain, "--data flat --out flat/runs/1", "--out: flat/runs/1 lies in --data flat"),
    (train_dvae, "--data flat --out flat/runs/1", "--out: flat/runs/1 lies in --data flat"),
    (pretrain, "--out dangling", "--out: dangling is a link to gone, which does not exist; make that"),
    (pretrain, "--out pretrained.pt", "--out: pretrained.pt is a file; name a folder"),
    (pretrain, "--out pretrained.pt/x", "--out: .*pretrained.pt/x cannot be used .Not a directory"),
    (pretrain, "--fresh --out .", "--fresh: . holds the current folder and cannot be renamed"),
    (finetune, "--fresh --init mine/a/model.pt --out mine", "--fresh: mine holds --init .*mine/a/model.pt"),
    (pretrain, "--fresh --data mine/flat --out mine", "--fresh: mine holds --data .*mine/flat"),
    (pretrain, "--out foreign", "--out: .*foreign/config.json was not written by a run; name another")])
def test_a_run_never_replaces_what_it_reads_or_did_not_write(script, flags, message, images):
    for path in ("mine/model.pt", "mine/a/model.pt"):
        Path(path).parent.mkdir(exist_ok=True)
        shutil.copy("pretrained.pt", path)
    for folder in ("flat", "mine/flat"):
        for seed in range(8):
            save(Path(folder, f"{seed}.png"), seed)
    os.symlink("gone", "dangling")
    os.mkdir("foreign")
    Path("foreign/config.json").write_text('{"model_type": "beit"}')
    before = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    words = flags.split()
    with pytest.raises(UserError, match=message):
        train(script, *words, *(["--init", "mine/model.pt"] if script is probe else []))
    after = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.name != "lock"} == before


def test_fresh_through_a_link_keeps_the_link(images):
    os.mkdir("disk")
    os.symlink("disk/run", "run")
    os.mkdir("disk/run")
    train(pretrain)
    train(pretrain, "--fresh", "--seed", 1)
    assert Path("run").is_symlink() and Path("disk/run/result.json").exists()
    old = torch.load("disk/run.old-1/model.pt", weights_only=True)["model"]
    assert not equal(old, torch.load("run/model.pt", weights_only=True)["model"])


# ---- Network file systems ----

def test_a_file_may_appear_late(tmp_path, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            (tmp_path / "late").touch()

    monkeypatch.setattr(run_folder.time, "sleep", sleep)
    assert run_folder.wait_until_visible(tmp_path / "late") and len(slept) == 3
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: 10.0 * len(slept))
    assert not run_folder.wait_until_visible(tmp_path / "never")


def test_a_file_system_without_locks(images, monkeypatch):
    def lockf(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    printed = train(pretrain)
    assert "run cannot be locked (No locks available); start only one run in it" in printed
    assert Path("run/result.json").exists()


def test_the_digest_depends_on_names_and_their_order():
    texts = [["a", "b"], ["b", "a"], ["ab"], ["a"], ["a", "c"]]
    assert len({run_folder.describe(names) for names in texts}) == len(texts)
    assert launch.world_size() == 1 and run_folder.describe(["a", "b"]).startswith("2 (")
