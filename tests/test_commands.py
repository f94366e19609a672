"""Wrong command lines end with argparse's own error, or one line that names the flag or file and what would
be accepted; exit status 2, no traceback, nothing written."""
import dataclasses
import importlib
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import dvae
import vit

SMALL = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=2, heads=2, position="shared_relative")

# script -> lines of "flags | how the last line of stderr goes on after <script>.py: error:"; ... is any text.
# F/ is the folder of the fixture `files`. Where flags share a mechanism, such as ranges, a few stand for all.
WRONG = {
    "pretrain": """
        --step 3 | unrecognized arguments: --step 3
        --steps 1e3 | argument --steps: invalid int value: '1e3'
        --pixel-mean 1 2 | argument --pixel-mean: expected 3 arguments
        --position sine | argument --position: invalid choice: 'sine' ...shared_relative
        --device cuda | --device: 1 GPUs are needed and 0 are here; cpu works without
        --steps 2 --epochs 2 | --steps and --epochs: give one of them
        --out '' | --out: not an empty text
        --steps 0 | --steps: a number from 1 to inf, not 0
        --lr nan | --lr: a number from 1e-12 to inf, not nan
        --weight-decay inf | --weight-decay: a number from 0 to inf, not inf
        --pixel-mean inf 0 0 | --pixel-mean: finite numbers
        --pixel-std 0 1 1 | --pixel-std: above 0
        --drop-path 1 | --drop-path: from 0 to below 1, not 1.0
        --accumulate 3 | --batch-size: 32 does not divide into 1 processes x 3 parts; 33 would
        --batch-size 20000 | --batch-size: 20000 is more than the 10000 training images
        --patch-size 7 | --patch-size: a divisor of image_size 64, not 7
        --heads 5 | --heads: a divisor of dim 128, not 5
        --mask-ratio 0 | --mask-ratio: between 0 and 1, so that some of the 64 patches are masked
        --mask-ratio 1 | --mask-ratio: between 0 and 1
        --mask-ratio 0.99 --no-exact-masks | --mask-ratio: between 0 and 1
        --masking none | --masking: none ...--predict all
        --masking none --predict all --target pixels | --masking: none ...--target tokens
        --masking random --log-aspect | --log-aspect: only with --masking blockwise
        --masking random --no-exact-masks | --no-exact-masks: only with --masking blockwise
        --target pixels --tokenizer a.pt | --tokenizer: not used with --target pixels
        --target pixels --tokenizer-steps 3 | --tokenizer-steps: not used with ...--target pixels
        --tokenizer a.pt --tokenizer-steps 3 | --tokenizer-steps: not used with --tokenizer
        --data gone | --data: gone is not a folder, nor shapes, fashion-mnist
        --data F/folder | --data: no images under F/folder
        --data F/images --preset demo | --batch-size: 32 is more than the 2 training images
        --data fashion-mnist --data-root gone | --data-root: gone has no FashionMNIST/raw
        --data fashion-mnist --data-root F/hollow | --data-root: F/hollow ...damaged files
        --tokenizer gone.pt | --tokenizer: gone.pt does not exist; a model.pt of dvae.py or DALL-E's
        --tokenizer F/pretrained.pt | --tokenizer: F/pretrained.pt holds a MaskedImageModel
        --tokenizer F/misfit.pt | --tokenizer: F/misfit.pt holds a tokenizer whose weights and sizes do not
        --out F/text | --out: ...F/text
        --out /proc/run | --out: .../proc/run""",
    "dvae": """
        --patch-size 8 | unrecognized arguments: --patch-size 8
        --image-size 30 | --image-size: a multiple of 4 for 3 groups, not 30
        --data F/images --preset demo | --batch-size: 16 is more than the 2 training images
        --out F/text | --out: ...F/text
        --device cuda | --device: ...cpu works without""",
    "finetune": """
        | --init: runs/pretrain-shapes/model.pt is not there; `python pretrain.py` with the same
        --eval | --init: runs/finetune-shapes/model.pt ...`python finetune.py --task classification`
        --init '' | --init: ...is a folder
        --init gone.pt | --init: gone.pt does not exist
        --init F/cut.pt | --init: F/cut.pt is cut off
        --init F/tokenizer.pt | --init: F/tokenizer.pt is a tokenizer ...not a backbone
        --init F/pretrained.pt --patch-size 4 | --init: ...does not fit ...patch_embed.proj.weight
        --init F/pretrained.pt --position absolute | --init: ...--position shared_relative fits
        --init F/pretrained.pt --heads 3 | --heads: a divisor of dim 16, not 3
        --init F/pretrained.pt --eval --task knn | --eval: only with --task classification or segmentation
        --init F/pretrained.pt --out F/text | --out: ...F/text
        --init none --task probe | --init: none leaves nothing to evaluate
        --init none --eval | --init: none leaves nothing to evaluate
        --init none --mask-ratio 0.4 | unrecognized arguments: --mask-ratio 0.4
        --init none --scale 2 1 | --scale: the smaller number first, not (2.0, 1.0)
        --init none --scale 1 inf | --scale: a number from 1e-06 to inf, not inf
        --init none --labels 3 | --labels: from 10, one a class, to 10000
        --init none --validate 10000 | --validate: from 1 to 9999
        --init none --batch-size 20000 | --batch-size: 20000 is more than the 10000 training images
        --init none --task segmentation --labels 50 | --labels: not with --task segmentation
        --init none --task segmentation --data cifar10 | --data: cifar10 has no maps
        --init none --task segmentation --data F/images | --data: F/images ...images/training
        --init none --data F/images | --data: F/images needs train/ and val/
        --init none --data F/one-class | --data: F/one-class/train ...at least two
        --init none --data F/unknown-class | --data: ...F/unknown-class/val has class...c""",
    "visualize": """
        | the following arguments are required: WHAT
        painting | argument WHAT: invalid choice: 'painting' ...masks
        masks --grid 0 4 | argument --grid: a whole number from 1 to ...not 0
        masks --ratio 0 | --ratio: between 0 and 1 so that some of the 196 patches are masked
        masks --ratio nan | --ratio: between 0 and 1 ...not nan
        masks --seed 99999999999999999999 | argument --seed: a whole number from 0 to 2147483647
        masks --out a.gif | --out: a file that ends in .png
        masks --out F/folder.png | --out: a file that ends in .png...not F/folder.png
        masks --out F/text/a.png | --out: F/text/a.png cannot be written (
        masks --data gone | --data: gone is not a folder
        masks --images gone.jpg | --images: gone.jpg cannot be read
        positions | --init: runs/pretrain-shapes/model.pt does not exist; `python pretrain.py` leaves
        positions --init F/tokenizer.pt | --init: F/tokenizer.pt is a tokenizer
        predict --init F/classifier.pt | --init: ...holds a ImageClassifier, not a MaskedImageModel
        predict --init F/pretrained.pt | --tokenizer: F/tokenizer/model.pt is not there; `python pretrain.py`
        predict --init F/pretrained.pt --tokenizer F/other.pt | --tokenizer: F/other.pt has 40 codes
        predict --init F/pretrained.pt --tokenizer F/tokenizer.pt --ratio 0.01 | --ratio: ...of the 16 patches
        tokens --tokenizer F/pretrained.pt | --tokenizer: F/pretrained.pt holds a MaskedImageModel
        tokens --tokenizer F/tokenizer.pt --size 30 | --size: a multiple of 4
        attention --init F/pretrained.pt --size 30 | --size: a multiple of the patch size 8
        attention --init F/pretrained.pt --layer 3 | --layer: 1 to 2
        attention --init F/pretrained.pt --patch 9,9 | --patch: S, or ROW,COL from 0,0 to 3,3
        attention --init F/pretrained.pt --patch left | --patch: S, or ROW,COL
        attention-objects --init F/pretrained.pt --compare gone.pt | --compare: gone.pt does not exist
        curves | --runs: runs/pretrain-shapes/metrics.jsonl is not the log ...No such file
        curves --runs F/broken-log | --runs: F/broken-log/metrics.jsonl is not the log""",
    "bench": """
        --precison fp32 | unrecognized arguments: --precison fp32
        --batch-size 0 | --batch-size: a number from 1 to inf, not 0
        --out F/folder | --out: F/folder is not a file in a folder that exists
        --out gone/bench.json | --out: gone/bench.json is not a file in a folder that exists
        --out '' | --out: ...is not a file
        --model demo --only banana | --only: no row is called banana...pre-training step""",
    "weights": """
        | the following arguments are required: file
        gone.pt | gone.pt does not exist
        F/folder | F/folder is a folder, not a file
        F/web.pt | F/web.pt is cut off, damaged or no file of weights
        F/tokenizer.pt | F/tokenizer.pt is a tokenizer
        F/segmenter.pt --to timm x | timm has no place for a segmenter
        F/pretrained.pt --to onnx x | --to: huggingface, timm or beit, not onnx
        F/pretrained.pt --to timm | argument --to: expected 2 arguments
        F/pretrained.pt --to huggingface F/text | --to: F/text is a file; huggingface takes a folder
        F/pretrained.pt --to timm F/folder | --to: F/folder is not a file in a folder that exists
        F/pretrained.pt --to beit gone/x.pt | --to: gone/x.pt is not a file in a folder that exists
        F/pretrained.pt --to beit '' | --to: nothing is not a file""",
}
MODULES = {"bench": "tools.bench", "reproduce": "tools.reproduce"}
CASES = [(script, *map(str.strip, line.split("|")))
         for script, lines in WRONG.items() for line in lines.splitlines()[1:]]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), 99, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models of every kind, and files and folders that are not what is asked for."""
    folder = tmp_path_factory.mktemp("files")

    def save(name, model, config):
        state = {"model": model.state_dict(), "config": config, "kind": type(model).__name__}
        torch.save(state, folder / name)

    for name, vocab_size in (("tokenizer.pt", 50), ("other.pt", 40)):
        tokenizer = dvae.DiscreteVAE(vocab_size=vocab_size, hidden=8, groups=3, blocks_per_group=1)
        save(name, tokenizer, tokenizer.config)
    save("misfit.pt", tokenizer, {**tokenizer.config, "hidden": 16})
    config = {"vit": dataclasses.asdict(SMALL)}
    save("pretrained.pt", vit.MaskedImageModel(SMALL, 50), {**config, "vocab_size": 50})
    save("classifier.pt", vit.ImageClassifier(SMALL, 2), {**config, "classes": ["a", "b"]})
    save("segmenter.pt", vit.SemanticSegmenter(SMALL, 2), {**config, "classes": ["a", "b"]})
    (folder / "cut.pt").write_bytes((folder / "pretrained.pt").read_bytes()[:3000])
    (folder / "web.pt").write_text("<html>not found</html>")
    (folder / "text").write_text("hello")
    for name in ("folder", "folder.png", "broken-log", "hollow/FashionMNIST/raw"):
        (folder / name).mkdir(parents=True)
    (folder / "broken-log/metrics.jsonl").write_text("loss 3\n")
    for split in ("train", "t10k"):
        for part in ("images-idx3", "labels-idx1"):
            (folder / f"hollow/FashionMNIST/raw/{split}-{part}-ubyte").write_bytes(b"")
    for name in ("images/0", "images/1", "images/2", "one-class/train/a/0", "one-class/val/a/0",
                 "unknown-class/train/a/0", "unknown-class/train/b/0", "unknown-class/val/c/0"):
        picture(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def one_minute():
    """A command line that is not refused would train for an hour."""
    def over(*_):
        raise AssertionError("not refused")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def assert_refused(script, line, status, out, err, files):
    err = err.replace(f"{files}/", "F/")
    last = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in out + err, err
    assert err == last + "\n" or err.startswith("usage: "), err
    expected = re.escape(line).replace(r"\.\.\.", ".*")
    assert re.match(rf"{script}\.py( [a-z-]+)?: error: {expected}", last), last


@pytest.mark.parametrize("script, flags, line", CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_wrong_command_lines_are_refused(script, flags, line, files, tmp_path, monkeypatch, capfd):
    module, before = importlib.import_module(MODULES.get(script, script)), contents(files)
    capfd.readouterr()                                                 # what libraries say when imported
    monkeypatch.chdir(tmp_path)
    flags = [word.replace("F/", f"{files}/") for word in shlex.split(flags)]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert_refused(script, line, end.value.code, *capfd.readouterr(), files)
    assert not list(tmp_path.iterdir()) and contents(files) == before


def test_the_script_itself_ends_so(files, tmp_path):
    command = [sys.executable, ROOT / "pretrain.py", "--batch-size", "0"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    line = "--batch-size: a number from 1 to inf, not 0"
    assert_refused("pretrain", line, done.returncode, done.stdout, done.stderr, files)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["pretrain", "dvae", "finetune"])
def test_processes_that_cannot_share_a_batch(script, monkeypatch, capsys, tmp_path, files):
    """As under torchrun with 3 processes; the last rank has nothing to say, so that the line comes once."""
    monkeypatch.chdir(tmp_path)
    flags = ["--init", str(files / "pretrained.pt")] if script == "finetune" else []
    line = "--batch-size: 32 does not divide into 3 processes x 1 parts; 33 would"
    for rank, said in ((0, f"{script}.py: error: {line}\n"), (2, "")):
        for name, value in (("WORLD_SIZE", 3), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags, "--batch-size", "32"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(script).main()
        assert end.value.code == 2 and capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [*WRONG, "reproduce"])
def test_help_is_printed(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(MODULES.get(script, script)).main()
    assert end.value.code == 0 and f"usage: {script}.py" in capsys.readouterr().out
