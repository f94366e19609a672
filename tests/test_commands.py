"""Wrong command lines end with argparse's error, or with one line that names the flag or the file and what
would be accepted. The exit status is 2, there is no traceback, and nothing is written."""
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

# script -> lines of "flags | beginning of the error", without "<script>.py: error: " before it.
# "..." stands for any text, F/ for the folder of the fixture `files`. Each type of flag is tested once.
WRONG = {
    "pretrain": """
        --step 3 | unrecognized arguments: --step 3
        --steps 1e3 | argument --steps: invalid int value: '1e3'
        --pixel-mean 1 2 | argument --pixel-mean: expected 3 arguments
        --position sine | argument --position: invalid choice: 'sine' ...shared_relative
        --preset demo-8192 | argument --preset: invalid choice: 'demo-8192' ...large
        --steps 2 --epochs 2 | argument --epochs: not allowed with argument --steps
        --out '' | argument --out: must not be empty
        --steps 0 | argument --steps: must be at least 1, got 0
        --lr nan | argument --lr: must be at least 1e-12, got nan
        --weight-decay inf | argument --weight-decay: must be at least 0, got inf
        --device cuda | --device: found 0 GPUs for 1 processes; use --device cpu
        --pixel-mean inf 0 0 | --pixel-mean: must be finite numbers, got (inf
        --pixel-std 0 1 1 | --pixel-std: must be above 0, got (0
        --drop-path 1 | --drop-path: must be from 0 to below 1, got 1.0
        --patch-size 7 | --patch-size: must be a divisor of image_size 64, got 7
        --heads 5 | --heads: must be a divisor of dim 128, got 5
        --accumulate 3 | --batch-size: must be a multiple of 1 processes x 3 parts, such as 33, got 32
        --batch-size 20000 | --batch-size: 20000 is more than the 10000 training images
        --mask-ratio 0 | --mask-ratio: must mask from 1 to 63 of 64 patches, got 0
        --mask-ratio 1 | --mask-ratio: must mask from 1 to 63 of 64 patches, got 1
        --mask-ratio 0.99 --no-exact-masks | --mask-ratio: must mask from 1 to 62 of 64 patches, got ...0.99
        --mask-ratio nan | argument --mask-ratio: must be from 0 to 1, got nan
        --masking none | --masking none needs --predict all and --target tokens
        --masking none --predict all --target pixels | --masking none needs --predict all and --target tokens
        --masking random --log-aspect | --log-aspect and ...: only with --masking blockwise
        --masking random --no-exact-masks | ...--no-exact-masks: only with --masking blockwise
        --masking none --predict all --mask-ratio 0.3 | --mask-ratio: not used with --masking none
        --vocab-size 64 | unrecognized arguments: --vocab-size 64 (the tokenizer's own flags
        --download | --download: only for fashion-mnist, cifar10, cifar100, not for shapes
        --target pixels --tokenizer a.pt | --tokenizer, ...: not used with --target pixels
        --target pixels --tokenizer-steps 3 | ...--tokenizer-steps: not used with --target pixels
        --target pixels --tokenizer-preset demo | ...--tokenizer-preset ...: not used with --target pixels
        --tokenizer a.pt --tokenizer-steps 3 | ...--tokenizer-steps: not used with --tokenizer
        --tokenizer a.pt --tokenizer-preset base | --tokenizer-preset ...: not used with --tokenizer
        --data gone | --data: gone is neither a folder nor one of shapes, fashion-mnist
        --data F/folder | --data: no images under F/folder
        --data F/images --preset demo | --batch-size: 32 is more than the 2 training images
        --data fashion-mnist --data-root gone | --data-root: gone has no FashionMNIST/raw
        --data fashion-mnist --data-root F/hollow | --data-root: F/hollow ...damaged files
        --tokenizer gone.pt | gone.pt: no such file
        --tokenizer F/pretrained.pt | F/pretrained.pt: expected a tokenizer ...found MaskedImageModel
        --tokenizer F/misfit.pt | F/misfit.pt: expected a tokenizer whose weights fit its config
        --out F/text | --out: ...F/text
        --out /proc/run | --out: .../proc/run""",
    "train_dvae": """
        --patch-size 8 | unrecognized arguments: --patch-size 8
        --preset tiny | argument --preset: invalid choice: 'tiny' ...demo-8192
        --vocab-size 1 | argument --vocab-size: must be at least 2, got 1
        --temperature 0 | argument --temperature: must be from 1e-06 to 1, got 0
        --image-size 30 | --image-size: must be a multiple of 4 for 3 groups, got 30
        --warmup 0.5 --lr-ramp 0.4 | --warmup: must be less than --lr-ramp, 0.4, got 0.5
        --warmup 0.4 --lr-ramp 0.4 | --warmup: must be less than --lr-ramp, 0.4, got 0.4
        --data F/images --preset demo | --batch-size: 16 is more than the 2 training images
        --out F/text | --out: ...F/text
        --device cuda | --device: found 0 GPUs for 1 processes; use --device cpu""",
    "finetune": """
        | --init: runs/pretrain-shapes/model.pt does not exist; pretrain.py with the same --data writes it
        --eval | --init: runs/finetune-shapes/model.pt does not exist; this script without --eval writes it
        --preset intermediate-giant | argument --preset: invalid choice: 'intermediate-giant' ...cifar100
        --task probe | unrecognized arguments: --task probe
        --init '' | argument --init: must not be empty
        --init F/folder | F/folder: expected a file with weights, such as model.pt
        --init gone.pt | gone.pt: no such file
        --init F/cut.pt | F/cut.pt: cut off, damaged or not a checkpoint
        --init F/tokenizer.pt | F/tokenizer.pt: expected a BEiT ...found DiscreteVAE
        --init F/pretrained.pt --patch-size 4 | --patch-size: F/pretrained.pt has 8, not 4
        --init F/pretrained.pt --position absolute | --position: F/pretrained.pt has ...relative, not absolute
        --init F/pretrained.pt --heads 4 | --heads: F/pretrained.pt has 2, not 4
        --init F/pretrained.pt --eval | --eval: F/pretrained.pt has no head for this task and these classes
        --init F/classifier.pt --eval | --eval: F/classifier.pt has no head ...disc, ...bar. Its ...: a, b.
        --init F/pretrained.pt --out F/text | --out: ...F/text
        --init none --eval | --init: there is nothing to evaluate with none
        --init none --heads 5 | --heads: must be a divisor of dim 128, got 5
        --init none --mask-ratio 0.4 | unrecognized arguments: --mask-ratio 0.4
        --init none --batch-size 8 --accumulate 8 --mixup 0.8 | --mixup, --cutmix: need two images or more
        --init none --batch-size 1 --cutmix 0.8 | --mixup, --cutmix: need two images or more
        --init none --layer-decay 0 | argument --layer-decay: must be from 1e-06 to 1, got 0
        --init none --labels 3 | --labels: must be from 10, one per class, to 10000, got 3
        --init none --validate 10000 | --validate: must be from 1 to 9999, got 10000
        --init none --batch-size 20000 | --batch-size: 20000 is more than the 10000 training images
        --init none --data F/images | --data: F/images needs train/ and val/
        --init none --data F/one-class | --data: F/one-class/train ...at least two
        --init none --data F/unknown-class | --data: ...F/unknown-class/val has class...c""",
    "segment": """
        | --init: runs/pretrain-shapes/model.pt does not exist; pretrain.py with the same --data writes it
        --eval | --init: runs/segment-shapes/model.pt does not exist; this script without --eval writes it
        --labels 50 | unrecognized arguments: --labels 50
        --preset base-384 | argument --preset: invalid choice: 'base-384' ...intermediate
        --init F/classifier.pt --eval | --eval: F/classifier.pt has no head for this task and these classes
        --init none --eval | --init: there is nothing to evaluate with none
        --init none --scale 2 1 | --scale: the smaller number comes first, got 2.0 1.0
        --init none --scale 1 inf | argument --scale: must be at least 1e-12, got inf
        --init none --data cifar10 | --data: cifar10 has no class maps
        --init none --data F/images | --data: F/images ...images/training
        --init none --batch-size 20000 | --batch-size: 20000 is more than the 10000 training images""",
    "probe": """
        | --init: runs/pretrain-shapes/model.pt does not exist; pretrain.py with the same --data writes it
        --knn | --init: runs/pretrain-shapes/model.pt does not exist
        --preset large | argument --preset: invalid choice: 'large' ...base
        --dim 16 | unrecognized arguments: --dim 16
        --init none | --init none: there are no features to evaluate
        --init F/pretrained.pt --accumulate 2 | --accumulate: not supported, because
        --init F/pretrained.pt --eval | unrecognized arguments: --eval
        --init F/pretrained.pt --out F/text | --out: ...F/text
        --init F/pretrained.pt --image-size 30 | --patch-size: must be a divisor of image_size 30, got 8
        --init F/pretrained.pt --labels 3 | --labels: must be from 10, one per class, to 10000, got 3
        --init F/pretrained.pt --knn --lr 1 | --lr: not used with --knn
        --init F/pretrained.pt --knn --epochs 1 | --epochs: not used with --knn
        --init F/pretrained.pt --neighbours 3 | --neighbours: not used without --knn
        --init F/pretrained.pt --knn --neighbours 0 | argument --neighbours: must be at least 1, got 0""",
    "visualize": """
        | the following arguments are required: WHAT
        painting | argument WHAT: invalid choice: 'painting' ...masks
        masks --grid 0 4 | argument --grid: must be at least 1, got 0
        masks --ratio 0 | --ratio: must mask at least 1 and at most 195 of 196 patches; 0 masks 0
        masks --ratio nan | argument --ratio: must be from 0 to 1, got nan
        masks --seed 99999999999999999999 | argument --seed: must be from 0 to 4294967295, got 9999
        masks --out a.gif | --out: must be a file that ends in .png
        masks --out F/folder.png | --out: must be a file that ends in .png...got F/folder.png
        masks --out F/text/a.png | --out: F/text/a.png cannot be written (
        masks --data gone | --data: gone is neither a folder
        masks --images gone.jpg | --images: gone.jpg cannot be read
        positions | --init: runs/pretrain-shapes/model.pt does not exist; `python pretrain.py` writes
        positions --init F/tokenizer.pt | F/tokenizer.pt: expected a BEiT ...found DiscreteVAE
        predict --init F/classifier.pt | --init: F/classifier.pt must be a MaskedImageModel, got
        predict --init F/pretrained.pt | --tokenizer: F/tokenizer/model.pt does not exist; `python
        predict --init F/pretrained.pt --tokenizer F/other.pt | --tokenizer: F/other.pt has 40 codes
        predict --init F/pretrained.pt --tokenizer F/tokenizer.pt --ratio 0.01 | --ratio: must mask ...of 16
        tokens --tokenizer F/pretrained.pt | F/pretrained.pt: expected a tokenizer ...found MaskedImageModel
        tokens --tokenizer F/tokenizer.pt --size 30 | --size: must be a multiple of 4 for F/tok
        attention --init F/pretrained.pt --size 30 | --size: must be a multiple of the patch size 8, got 30
        attention --init F/pretrained.pt --layer 3 | --layer: must be from 1 to 2, or -1 for the last, got 3
        attention --init F/pretrained.pt --patch 9,9 | --patch: must be S, or ROW,COLUMN from 0,0 to 3,3
        attention --init F/pretrained.pt --patch left | --patch: must be S, or ROW,COLUMN
        attention-objects | argument WHAT: invalid choice: 'attention-objects'
        curves | --runs: runs/pretrain-shapes/metrics.jsonl is not the log ...No such file
        curves --runs F/broken-log | --runs: F/broken-log/metrics.jsonl is not the log""",
    "bench": """
        --precison fp32 | unrecognized arguments: --precison fp32
        --batch-size 0 | argument --batch-size: must be at least 1, got 0
        --out F/folder | --out: must be a file in a folder that exists, got F/folder
        --out gone/bench.json | --out: must be a file in a folder that exists, got gone/bench.json
        --out '' | argument --out: must not be empty
        --model demo --only banana | --only: no row is called banana...pre-training step""",
    "weights": """
        | the following arguments are required: file
        gone.pt | gone.pt: no such file
        F/folder | F/folder: expected a file with weights, such as model.pt
        F/web.pt | F/web.pt: cut off, damaged or not a checkpoint
        F/tokenizer.pt | F/tokenizer.pt: expected a BEiT ...found DiscreteVAE
        F/segmenter.pt --to timm x | x: timm has no place for a segmenter's decoder; --to huggingface
        F/pretrained.pt --to onnx x | --to: must be huggingface or timm, got onnx
        F/pretrained.pt --to timm | argument --to: expected 2 arguments
        F/pretrained.pt --to huggingface F/text | --to: huggingface takes a folder, and F/text is a file
        F/pretrained.pt --to timm F/folder | --to: timm takes a file in a folder that exists, got F/folder
        F/pretrained.pt --to timm gone/x.pt | --to: timm takes a file in a folder that exists, got gone/x.pt
        F/pretrained.pt --to timm '' | --to: timm takes a file in a folder that exists, got
        F/pretrained.pt --to beit x | --to: must be huggingface or timm, got beit""",
}
TRAINING = ("pretrain", "train_dvae", "finetune", "segment", "probe")
MODULES = {"bench": "tools.bench", "reproduce": "tools.reproduce"}
CASES = [(script, *map(str.strip, line.split("|")))
         for script, lines in WRONG.items() for line in lines.splitlines()[1:]]


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), 99, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with models of every kind, and with files and folders that no flag accepts."""
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
        write_picture(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def limit_to_one_minute():
    """End a test whose command line is not refused: it would train for an hour."""
    def fail(*_):
        raise AssertionError("not refused")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def list_files(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def run_main(script, flags, monkeypatch):
    """Call the main() of a script with these flags, and return its exit status."""
    module = importlib.import_module(MODULES.get(script, script))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        module.main()
    return end.value.code


def assert_refused(script, expected, status, out, err):
    """Assert that a script ended with one line of error, below argparse's usage or alone."""
    last_line = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in out + err, err
    assert err == last_line + "\n" or err.startswith("usage: "), err
    expected = re.escape(expected).replace(r"\.\.\.", ".*")
    assert re.match(rf"{script}\.py( [a-z-]+)?: error: {expected}", last_line), last_line


@pytest.mark.parametrize("script, flags, error", CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_wrong_command_lines_are_refused(script, flags, error, files, tmp_path, monkeypatch, capfd):
    importlib.import_module(MODULES.get(script, script))
    before = list_files(files)
    capfd.readouterr()                                                 # forget what libraries print at import
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status = run_main(script, shlex.split(flags.replace("F/", f"{files}/")), monkeypatch)
    out, err = capfd.readouterr()
    assert_refused(script, error, status, out, err.replace(f"{files}/", "F/"))
    assert not list(tmp_path.iterdir()) and list_files(files) == before


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.long),
                                     ["-P"]])                          # sys.path lacks the folder
def test_a_script_that_runs_as_a_process(options, tmp_path):
    if options == ["-P"] and sys.version_info < (3, 11):
        pytest.skip("Python 3.11 has it")
    command = [sys.executable, *options, ROOT / "pretrain.py", "--batch-size", "0"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    error = "argument --batch-size: must be at least 1, got 0"
    assert_refused("pretrain", error, done.returncode, done.stdout, done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, flags, error", [
    *((script, "--batch-size 32", "--batch-size: must be a multiple of 3 processes x 1 parts, such as 33")
      for script in TRAINING),
    ("finetune", "--batch-size 33", "--init: runs/pretrain-shapes/model.pt does not exist; pretrain.py")])
def test_the_first_of_three_processes_prints_the_error(script, flags, error, monkeypatch, capsys, tmp_path):
    """The environment is that of torchrun: argparse's errors and ours are printed once."""
    monkeypatch.chdir(tmp_path)
    for rank in (0, 2):
        for name, value in (("WORLD_SIZE", 3), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("torch.distributed.init_process_group", lambda **options: None)
        status = run_main(script, [*flags.split(), "--device", "cpu"], monkeypatch)
        out, err = capsys.readouterr()
        if rank == 0:
            assert_refused(script, error, status, out, err)
        else:
            assert (status, out, err) == (2, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [*WRONG, "reproduce"])
def test_help_is_printed(script, monkeypatch, capsys):
    assert run_main(script, ["--help"], monkeypatch) == 0
    assert f"usage: {script}.py" in capsys.readouterr().out
