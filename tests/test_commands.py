"""What the scripts say to wrong command lines: exit status 2, one line on stderr that names the flag or the file and what would
be accepted, no traceback, and nothing written. A script that runs for an hour before it says so, or leaves half a run behind,
costs more than one that crashes.
"""
import dataclasses
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dvae
import vit
from conftest import ROOT

SMALL = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=2, heads=2, position="shared_relative")

# script -> [(flags, how the line goes on after "<script>.py: error: ", a regular expression)]; F/ is a folder with the files of
# `files` below
WRONG = {
    "pretrain": [
        # flags that are not there, or have no or another kind of value
        ("--stepz 3", "--stepz: no such flag; --steps\\?$"), ("--step 3", "--step: no such flag; --steps"), ("--batch_size 3", "--batch_size: no such flag; --batch-size"),
        ("extra", "extra: no such flag"), ("--steps=3 --no-steps", "--no-steps: no such flag"), ("-s 3", "-s: no such flag; --help lists them"),
        ("--steps", "--steps: expected one argument"), ("--compile=yes", "--compile.*yes"), ("--steps x", "--steps: a whole number, not x"),
        ("--steps 1e3", "--steps: a whole number, not 1e3"), ("--workers 1.5", "--workers: a whole number, not 1.5"),
        ("--lr fast", "--lr: a number, not fast"), ("--pixel-mean 1 2", "--pixel-mean: expected 3 arguments"),
        ("--steps 2 --epochs 2", "--steps and --epochs: give one of them"),
        ("--out ''", "--out: something, not empty"), ("--data ''", "--data: something, not empty"), ("--tokenizer ''", "--tokenizer: something, not empty"),
        # numbers out of range
        ("--lr nan", "--lr: a finite number, not nan"), ("--lr 1e400", "--lr: a finite number"), ("--lr -1", "--lr: above 0"), ("--lr 0", "--lr: above 0"),
        ("--min-lr -0.1", "--min-lr: 0 or above"), ("--weight-decay -1", "--weight-decay: 0 or above"), ("--weight-decay inf", "--weight-decay: a finite number"),
        ("--mlp-ratio nan", "--mlp-ratio: a finite number"), ("--mlp-ratio 0", "--mlp-ratio: large enough"), ("--pixel-mean inf 0 0", "--pixel-mean: a finite number"),
        ("--pixel-std 0 1 1", "--pixel-std: three numbers above 0"), ("--steps 0", "--steps: at least 1, not 0"), ("--epochs inf", "--epochs: a finite number"),
        ("--epochs 0", "--epochs: above 0"), ("--seed -1", "--seed: 0 or above"), ("--seed 5000000000", "--seed: below 2 \\*\\* 32"), ("--workers -1", "--workers: 0 or above"),
        ("--warmup 2", "--warmup: a share of the steps, from 0 to 1"), ("--clip-grad -1", "--clip-grad: 0 or above"), ("--batch-size 0", "--batch-size: at least 1"),
        ("--accumulate 0", "--accumulate: at least 1"), ("--accumulate 3", "--batch-size: 32 .* 33 would"), ("--save-every 0", "--save-every: at least 1"),
        ("--eval-every 0", "--eval-every: at least 1"), ("--log-every 0", "--log-every: at least 1"), ("--tokenizer-steps 0", "--tokenizer-steps: at least 1"),
        ("--patch-size 7", "--patch-size: 7 does not divide"), ("--patch-size 0", "--patch-size: at least 1"), ("--image-size 0", "--patch-size: 8 does not divide image_size 0"),
        ("--image-size -64", "--patch-size: 8 does not divide image_size -64"), ("--heads 5", "--heads: 5 does not divide dim 128"), ("--heads -4", "--heads: at least 1"),
        ("--depth 0", "--depth: at least 1"), ("--dim 0", "--dim: at least 1"), ("--drop-path 1", "--drop-path: from 0 to below 1"), ("--layer-scale -1", "--layer-scale: 0 .none. or above"),
        ("--jitter 2", "--jitter: from 0 to 1"), ("--crop-scale 0", "--crop-scale: above 0, up to 1"), ("--batch-size 20000", "--batch-size: 20000 is more than the 10000"),
        # words that are not among those that are offered
        ("--preset huge", "--preset: .*'huge'.*demo"), ("--precision fp8", "--precision: .*bf16"), ("--position sine", "--position: .*shared_relative"), ("--masking some", "--masking: .*blockwise"),
        ("--target colours", "--target: .*pixels"), ("--predict none", "--predict: .*masked"), ("--tokenizer-preset big", "--tokenizer-preset: .*demo"),
        ("--device tpu", "--device: auto, cpu, cuda or cuda:N, not tpu"), ("--device cuda:x", "--device: auto, cpu"), ("--device cuda", "--device: 1 GPUs are needed and 0 are here"),
        ("--device cuda:0", "--device: 1 GPUs are needed and 0 are here"),
        # masks that cannot be, and what does not go together
        ("--mask-ratio 0", "--mask-ratio: between 0 and 1"), ("--mask-ratio 1", "--mask-ratio: between 0 and 1"), ("--mask-ratio 0.001", "--mask-ratio: .* 64 patches"),
        ("--image-size 8", "--mask-ratio: .* 1 patches"), ("--mask-ratio 0.99 --no-exact-masks", "--mask-ratio: between 0 and 1"), ("--masking none", "--masking: none .* --predict all"),
        ("--masking none --predict all --target pixels", "--masking: none .*blockwise or random"), ("--masking random --log-aspect", "--log-aspect: only with --masking blockwise"),
        ("--masking random --no-exact-masks", "--no-exact-masks: only with --masking blockwise"), ("--target pixels --tokenizer a.pt", "--tokenizer: not used with --target pixels"),
        ("--target pixels --token-image-size 32", "--token-image-size: not used with --target pixels"), ("--tokenizer a.pt --tokenizer-steps 3", "--tokenizer-steps: not used with --tokenizer"),
        # files
        ("--data gone", "--data: gone is not a folder, nor shapes, fashion-mnist"), ("--data F/text", "--data: F/text is not a folder"), ("--data F/folder", "--data: no images under F/folder"),
        ("--data F/images --preset demo", "--batch-size: 32 is more than the 2 training images of --data F/images"),
        ("--data fashion-mnist --data-root gone", "--data-root: gone has no FashionMNIST/raw"), ("--data cifar10 --data-root F/text", "--data-root: F/text has no cifar-10-batches-py"),
        ("--data fashion-mnist --data-root F/hollow", "--data-root: F/hollow holds damaged files of FashionMNIST/raw"),
        ("--tokenizer gone.pt", "--tokenizer: gone.pt does not exist; a model.pt of dvae.py"), ("--tokenizer F/folder", "--tokenizer: F/folder is a folder"),
        ("--tokenizer F/empty.pt", "--tokenizer: F/empty.pt is empty"), ("--tokenizer F/text", "--tokenizer: F/text is not a file of torch.save"), ("--tokenizer F/cut.pt", "--tokenizer: F/cut.pt is cut off"),
        ("--tokenizer F/pretrained.pt", "--tokenizer: F/pretrained.pt holds a MaskedImageModel"), ("--tokenizer F/other-tokenizer.pt", "--tokenizer: F/other-tokenizer.pt holds a tokenizer whose weights and sizes do not fit"),
        ("--tokenizer F/tokenizer.pt --token-image-size 24", "--token-image-size: 24 makes a 6x6 token grid, the patch grid is 8x8; 32 matches"),
        ("--tokenizer F/tokenizer.pt --token-image-size -4", "--token-image-size: -4 .* 32 matches"), ("--token-image-size 30", "--token-image-size: 30 .* 32 matches"),
        ("--out F/text", "--out: F/text is a file; name a folder"), ("--out F/text/below", "--out: cannot write to F/text/below"), ("--out /proc/run", "--out: cannot write to /proc/run"),
    ],
    "dvae": [
        ("--vocab-size x", "--vocab-size: a whole number"), ("--vocab-size 1", "--vocab-size: at least 2"), ("--image-size 30", "--image-size: a multiple of 4 for 3 groups"), ("--image-size 0", "--image-size: a multiple of 4"),
        ("--groups 0", "--groups: at least 1"), ("--groups 40", "--image-size: a multiple of"), ("--hidden 3", "--hidden: at least 4"), ("--blocks-per-group 0", "--blocks-per-group: at least 1"),
        ("--kl-ramp 2", "--kl-ramp: from 0 to 1"), ("--temperature 0", "--temperature: above 0, up to 1"), ("--ema 1.1", "--ema: from 0 to 1"), ("--kl-weight -1", "--kl-weight: 0 or above"),
        ("--kl-weight nan", "--kl-weight: a finite number"), ("--crop-scale 2", "--crop-scale: above 0, up to 1"), ("--encoder-lr -1", "--encoder-lr: from 0 to 1"), ("--eval-every 0", "--eval-every: at least 1"),
        ("--patch-size 8", "--patch-size: no such flag"), ("--preset demo-8193", "--preset: .*demo-8192"), ("--data F/text", "--data: F/text is not a folder"), ("--data F/images --preset demo", "--batch-size: 16 is more"),
        ("--out F/text", "--out: F/text is a file"), ("--device cuda", "--device: .*cpu works without"), ("--steps 3 --epochs 1", "--steps and --epochs"),
    ],
    "finetune": [
        ("", "--init: runs/pretrain-shapes/model.pt is not there; `python pretrain.py` makes it, or --init FILE"), ("--init gone.pt", "--init: gone.pt does not exist"), ("--init ''", "--init: something, not empty"),
        ("--init F/folder", "--init: F/folder is a folder"), ("--init F/empty.pt", "--init: F/empty.pt is empty"), ("--init F/text", "--init: F/text is not a file of torch.save"), ("--init F/cut.pt", "--init: F/cut.pt is cut off"),
        ("--init F/tokenizer.pt", "--init: F/tokenizer.pt is a tokenizer .*not a backbone"), ("--init F/web.pt", "--init: F/web.pt is a web page"), ("--eval", "--init: .*`python finetune.py` makes it"),
        ("--init F/pretrained.pt --patch-size 4", "--init: .*16x3x8x8 there and 16x3x4x4 in the model"), ("--init F/pretrained.pt --position absolute", "--init: .*--position shared_relative fits"),
        ("--init F/pretrained.pt --heads 3", "--heads: 3 does not divide dim 16"), ("--init F/pretrained.pt --task probe --epochs 3", "--epochs: .*--steps"),
        ("--init F/pretrained.pt --out F/text", "--out: F/text is a file"), ("--init F/pretrained.pt --eval --task knn", "--eval: only with --task classification or segmentation"),
        ("--init none --task probe", "--init: none leaves nothing to look at"), ("--init none --eval", "--init: none leaves nothing to evaluate"), ("--init none --task painting", "--task: .*segmentation"),
        ("--init none --scale 1", "--scale: expected 2 arguments"), ("--init none --scale 2 1", "--scale: two numbers above 0, the smaller first"), ("--init none --scale 1 inf", "--scale: a finite number"),
        ("--init none --layer-decay 1.5", "--layer-decay: above 0, up to 1"), ("--init none --label-smoothing -0.1", "--label-smoothing: from 0 to 1"), ("--init none --mixup -1", "--mixup: 0 or above"),
        ("--init none --ema 1", "--ema: from 0 to below 1"), ("--init none --randaugment 11", "--randaugment: from 0 to 10"), ("--init none --eval-crop 2", "--eval-crop: above 0, up to 1"),
        ("--init none --labels 0", "--labels: at least 1"), ("--init none --labels 3", "--labels: from 10, one a class, to 10000"), ("--init none --batch-size 20000", "--batch-size: 20000 is more than the 10000 training images"),
        ("--init none --validate 10000", "--validate: from 1 to 9999"), ("--init none --task segmentation --labels 50", "--labels: maps have no one class"), ("--init none --neighbours 0", "--neighbours: at least 1"),
        ("--init none --task segmentation --data cifar10", "--data: cifar10 has no maps"), ("--init none --data F/images", "--data: F/images needs train/ and val/"), ("--init none --data F/one-class", "--data: F/one-class/train must hold"),
        ("--init none --data F/unknown-class", "--data: F/unknown-class/val has class c"), ("--init none --task segmentation --data F/images", "--data: F/images lacks images/training"),
        ("--init none --window round", "--window: .*sliding"), ("--init none --decoder-dim 0", "--decoder-dim: at least 1"), ("--init none --mask-ratio 0.4", "--mask-ratio: no such flag"), ("--init none --device cuda", "--device: "),
    ],
    "visualize": [
        ("", ".*WHAT"), ("painting", "WHAT: invalid choice: 'painting'.*masks"), ("masks --cuont 3", "--cuont: no such flag; --count\\?$"), ("masks --init a.pt", "--init: no such flag"), ("masks extra", "extra: no such flag"),
        ("masks --count 0", "--count: at least 1"), ("masks --count x", "--count: a whole number"), ("masks --ratio 0", "--ratio: between 0 and 1 .* 196 patches"), ("masks --ratio 1.5", "--ratio: between 0 and 1 .*not 1.5"), ("masks --ratio nan", "--ratio: .*not nan"),
        ("masks --ratio inf", "--ratio: .*not inf"), ("masks --grid 4", "--grid: expected 2 arguments"), ("masks --grid 0 4", "--grid: at least 1"), ("masks --grid -4 -4", "--grid: at least 1"), ("masks --seed -1", "--seed: from 0 to"),
        ("masks --seed 99999999999999999999", "--seed: from 0 to 4294967295"), ("masks --size 0", "--size: at least 1"), ("masks --first -1", "--first: from 0"), ("masks --dpi 0", "--dpi: from 1 to 1200"), ("masks --dpi 1000000", "--dpi: from 1 to 1200"),
        ("masks --out a.gif", "--out: a file that ends in .png"), ("masks --out F/folder", "--out: a file that ends in .png"), ("masks --out F/folder.png", "--out: F/folder.png is a folder; name a file"), ("masks --out F/text/a.png", "--out: F/text is not a folder"), ("positions --init F/pretrained.pt --out /proc/a/b.png", ".*/proc/a"),
        ("masks --data gone", "--data: gone is not a folder"), ("masks --data cifar10 --data-root gone", "--data-root: gone has no"), ("masks --images gone.jpg", "--images: gone.jpg is not there"), ("masks --images F/text", "--images: F/text cannot be read as an image"),
        ("masks --images F/folder", "--images: F/folder cannot be read as an image"), ("masks --images", "--images: expected at least one argument"),
        ("positions", "--init: runs/pretrain-shapes/model.pt is not there; `python pretrain.py` makes it"), ("positions --init gone.pt", "--init: gone.pt does not exist"), ("positions --init F/tokenizer.pt", "--init: F/tokenizer.pt is a tokenizer"),
        ("predict --init F/classifier.pt", "--init: F/classifier.pt holds a ImageClassifier, not a MaskedImageModel"), ("predict --init F/pretrained.pt", "--tokenizer: F/tokenizer/model.pt is not there; `python pretrain.py` leaves one"),
        ("predict --init F/pretrained.pt --tokenizer F/other-size.pt", "--tokenizer: it has 40 codes, the model predicts 50"), ("predict --init F/pretrained.pt --tokenizer F/tokenizer.pt --ratio 0.01", "--ratio: between 0 and 1 .* 16 patches"),
        ("tokens --tokenizer F/pretrained.pt", "--tokenizer: F/pretrained.pt holds a MaskedImageModel"), ("tokens --tokenizer F/tokenizer.pt --size 30", "--size: a multiple of 4"), ("tokens --tokenizer F/tokenizer.pt --codes 0", "--codes: at least 1"),
        ("attention --init F/pretrained.pt --size 30", "--size: a multiple of the patch size 8"), ("attention --init F/pretrained.pt --layer 3", "--layer: 1 to 2"), ("attention --init F/pretrained.pt --layer 0", "--layer: 1 to 2"),
        ("attention --init F/pretrained.pt --patch 9,9", "--patch: S, or ROW,COL from 0,0 to 3,3"), ("attention --init F/pretrained.pt --patch left", "--patch: S, or ROW,COL"), ("attention-objects --init F/pretrained.pt --compare gone.pt", "--compare: gone.pt does not exist"),
        ("curves", "--runs: runs/pretrain-shapes/metrics.jsonl is not there"), ("curves --runs gone", "--runs: gone/metrics.jsonl is not there"), ("curves --runs F/text", "--runs: F/text/metrics.jsonl is not there"),
        ("curves --runs F/empty-log", "--runs: F/empty-log/metrics.jsonl is empty"), ("curves --runs F/broken-log", "--runs: F/broken-log/metrics.jsonl is not a log"),
    ],
    "bench": [
        ("--batch-size 0", "--batch-size: at least 1"), ("--batch-size many", "--batch-size: a whole number"), ("--model huge", "--model: .*'huge'.*base"), ("--workers 0", "--workers: at least 1 each"), ("--workers 1 x", "--workers: a whole number, not x"),
        ("--rounds 0", "--rounds: at least 1"), ("--seconds inf", "--seconds: 0 or above, .*not inf"), ("--seconds nan", "--seconds: 0 or above, .*not nan"), ("--seconds -1", "--seconds: 0 or above"),
        ("--precison fp32", "--precison: no such flag; --precision"), ("--precision fp8", "--precision: .*bf16"), ("--data gone", "--data: gone is not a folder"), ("--data shapes", "--data: shapes is not a folder"), ("--data F/text", "--data: F/text is not a folder"),
        ("--data F/folder", "--data: no images under F/folder"), ("--out F/folder", "--out: F/folder is a folder"), ("--out gone/bench.json", "--out: gone is not a folder"), ("--out ''", "--out: something, not empty"), ("--device cuda", "--device: .*cpu works without"),
        ("--device gpu", "--device: auto, cpu, cuda"), ("--only", "--only: expected at least one"), ("--model demo --only banana", "--only: no row .*banana.*backbone forward"),
    ],
    "weights": [
        ("", ".*file"), ("gone.pt", "gone.pt does not exist"), ("F/folder", "F/folder is a folder, not a file"), ("F/empty.pt", "F/empty.pt is empty"), ("F/text", "F/text is not a file of torch.save"), ("F/cut.pt", "F/cut.pt is cut off"),
        ("F/web.pt", "F/web.pt is a web page"), ("F/tokenizer.pt", "F/tokenizer.pt is a tokenizer"), ("F/pretrained.pt --to onnx x", "--to: huggingface, timm or beit, not onnx"), ("F/pretrained.pt --to timm", "--to: expected 2 arguments"),
        ("F/pretrained.pt --out x", "--out: no such flag"), ("F/pretrained.pt --ot beit x", "--ot: no such flag; --to"), ("F/pretrained.pt F/pretrained.pt", "F/pretrained.pt: no such flag"), ("F/segmenter.pt --to timm x", ".*timm has no place for a segmenter"),
        ("F/pretrained.pt --to huggingface F/text", "--to: F/text is a file; huggingface takes a folder"), ("F/pretrained.pt --to timm F/folder", "--to: F/folder is a folder; name a file"),
        ("F/pretrained.pt --to beit gone/x.pt", "--to: gone is not a folder"), ("F/pretrained.pt --to beit F/text/x.pt", "--to: F/text is not a folder"), ("F/pretrained.pt --to beit ''", "--to: something, not empty"),
    ],
}
CASES = [(script, flags, line) for script, cases in WRONG.items() for flags, line in cases]
IN_PROCESSES_OF_THEIR_OWN = {"pretrain": "--batch-size 0", "dvae": "--temperature 0", "finetune": "--init gone.pt", "visualize": "masks --ratio nan",
                             "bench": "--seconds inf", "weights": "gone.pt"}


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), 99, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models of every kind, and files and folders that are not what is asked for."""
    folder = tmp_path_factory.mktemp("files")
    for name, vocab_size in (("tokenizer.pt", 50), ("other-size.pt", 40)):
        tokenizer = dvae.DiscreteVAE(vocab_size=vocab_size, hidden=8, groups=3, blocks_per_group=1)
        torch.save({"model": tokenizer.state_dict(), "config": tokenizer.config, "kind": "DiscreteVAE"}, folder / name)
    torch.save({"model": tokenizer.state_dict(), "config": {**tokenizer.config, "hidden": 16}, "kind": "DiscreteVAE"}, folder / "other-tokenizer.pt")
    config = {"vit": dataclasses.asdict(SMALL)}
    for name, model, more in (("pretrained.pt", vit.MaskedImageModel(SMALL, 50), {"vocab_size": 50}), ("classifier.pt", vit.ImageClassifier(SMALL, 2), {"classes": ["a", "b"]}),
                              ("segmenter.pt", vit.SemanticSegmenter(SMALL, 2), {"classes": ["a", "b"]})):
        torch.save({"model": model.state_dict(), "config": {**config, **more}, "kind": type(model).__name__}, folder / name)
    (folder / "cut.pt").write_bytes((folder / "pretrained.pt").read_bytes()[:3000])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "web.pt").write_text("<html>not found</html>")
    (folder / "text").write_text("hello")
    for name in ("folder", "folder.png", "empty-log", "broken-log", "hollow/FashionMNIST/raw"):
        (folder / name).mkdir(parents=True)
    (folder / "empty-log/metrics.jsonl").write_text("")
    (folder / "broken-log/metrics.jsonl").write_text("loss 3\n")
    for split in ("train", "t10k"):
        for part in ("images-idx3", "labels-idx1"):
            (folder / f"hollow/FashionMNIST/raw/{split}-{part}-ubyte").write_bytes(b"")
    for name in ("images/0", "images/1", "images/2", "one-class/train/a/0", "one-class/val/a/0", "unknown-class/train/a/0",
                 "unknown-class/train/b/0", "unknown-class/val/c/0"):
        picture(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def two_minutes():
    """A command line that is not refused would train for an hour."""
    def over(*_):
        raise TimeoutError("not refused")
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def words(flags, files):
    return [word.replace("F/", f"{files}/") for word in shlex.split(flags)]


def assert_refused(script, line, status, out, err, files):
    assert status == 2 and err.count("\n") == 1, (status, out[-2000:], err)
    assert re.match(f"{script}.py: error: {line}", err.replace(f"{files}/", "F/").rstrip("\n")), err
    assert "Traceback" not in out


@pytest.mark.parametrize("script, flags, line", CASES, ids=[f"{script} {flags}" for script, flags, _ in CASES])
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(script, flags, line, files, tmp_path, monkeypatch, capfd):
    module, before = importlib.import_module(script), contents(files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words(flags, files)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert_refused(script, line, end.value.code, *capfd.readouterr(), files)
    assert not list(tmp_path.iterdir()) and contents(files) == before


def test_the_scripts_themselves_end_so(files, tmp_path):
    started = {}
    for script, flags in IN_PROCESSES_OF_THEIR_OWN.items():
        started[script] = subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *words(flags, files)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for script, process in started.items():
        out, err = process.communicate(timeout=240)
        assert_refused(script, dict(WRONG[script])[IN_PROCESSES_OF_THEIR_OWN[script]], process.returncode, out, err, files)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["pretrain", "dvae", "finetune"])
def test_processes_that_cannot_share_a_batch(script, monkeypatch, capsys, tmp_path, files):
    """As under torchrun with 3 processes; the last rank has nothing to say, so that the line comes once."""
    monkeypatch.chdir(tmp_path)
    flags = ["--init", str(files / "pretrained.pt")] if script == "finetune" else []
    for local_rank, lines in ((0, 1), (2, 0)):
        monkeypatch.setenv("WORLD_SIZE", "3"), monkeypatch.setenv("RANK", str(local_rank)), monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags, "--batch-size", "32"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(script).main()
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("--batch-size: 32 does not divide into 3 processes x 1 accumulated parts; 33 would\n") == lines == err.count("\n")
    assert not list(tmp_path.iterdir())
