"""How a script starts: flags and presets, processes, errors of one line, means over batches and processes."""
import dataclasses
import inspect
import multiprocessing
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import data
import finetune
import launch
import pretrain
import pretrained
import probe
import run
import run_folder
import segment
import train_dvae
import vit
from launch import UserError
from masking import number_to_mask

SCRIPTS = {module.__name__: module for module in (pretrain, train_dvae, finetune, segment, probe)}


def parse(module, *flags):
    return module.parse_args([str(flag) for flag in flags])


# ---- Flags and presets ----

def test_where_defaults_come_from():
    demo = parse(pretrain)
    assert demo.preset == "demo" and demo.image_size == 64 and demo.out == "runs/pretrain-shapes"
    full = parse(pretrain, "--data", "/datasets/imagenet/")
    assert (full.preset, full.dim, full.batch_size, full.lr, full.epochs) == ("base", 768, 2048, 1.5e-3, 800)
    assert full.out == "runs/pretrain-imagenet" and number_to_mask(full.mask_ratio, (14, 14)) == 78
    assert parse(pretrain, "--preset", "large").clip_grad == 1.0
    assert parse(train_dvae).vocab_size == 1024 and parse(train_dvae, "--data", "x").vocab_size == 8192
    assert parse(segment, "--data", "x", "--preset", "intermediate").preset == "intermediate"


def test_given_flags_replace_values_of_the_preset():
    """A flag that repeats a value of the preset counts as given. The order of flags does not matter."""
    args = parse(pretrain, "--dim", 96, "--preset", "base", "--no-exact-masks", "--position", "absolute")
    assert (args.dim, args.heads, args.exact_masks, args.position) == (96, 12, False, "absolute")
    assert set(args.given) == {"dim", "preset", "exact_masks", "position"} and parse(pretrain).given == []
    assert parse(pretrain, "--steps", 7).epochs is None
    assert parse(segment, "--preset", "base", "--epochs", 2).steps is None
    means = parse(pretrain, "--pixel-mean", ".5", ".5", ".5")
    assert launch.config_from_flags(vit.ViTConfig, means).pixel_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("script, flags, lr, min_lr", [
    ("pretrain", "--data x --batch-size 512", 1.5e-3 / 4, 1e-5 / 4),
    ("pretrain", "--data x --batch-size 512 --lr 1e-3", 1e-3, 1e-5 / 4),
    ("pretrain", "--data x --batch-size 512 --min-lr 0", 1.5e-3 / 4, 0),
    ("train_dvae", "--preset small --batch-size 256", 2e-3, 2e-5),
    ("finetune", "--data x --batch-size 512", 2e-3, 5e-7),
    ("segment", "--preset large --batch-size 32", 2e-3, 0),
    ("probe", "--preset base --batch-size 256", 1e-3, 0)])
def test_learning_rates_follow_the_batch(script, flags, lr, min_lr):
    args = parse(SCRIPTS[script], *flags.split())
    assert (args.lr, args.min_lr) == pytest.approx((lr, min_lr), rel=1e-12)


@pytest.mark.parametrize("processes, batch_size, lr, min_lr", [
    (1, 8, 6.25e-5, 6.25e-7), (3, 9, 1e-3 * 9 / 128, 1e-5 * 9 / 128)])
def test_flags_of_the_tokenizer_that_pretraining_trains(processes, batch_size, lr, min_lr, monkeypatch):
    """Its learning rates follow its batch size, which the number of processes must divide."""
    args = parse(pretrain, "--preset", "small", "--batch-size", 8, "--seed", 3, "--out", "runs/x")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    flags = train_dvae.flags_for_pretraining(args, grid=(14, 14), steps=90, num_images=1000)
    tokenizer = parse(train_dvae, *flags)
    assert (tokenizer.batch_size, tokenizer.lr, tokenizer.min_lr) == pytest.approx((batch_size, lr, min_lr))
    assert (tokenizer.preset, tokenizer.image_size, tokenizer.steps, tokenizer.seed) == ("small", 112, 90, 3)
    assert tokenizer.out == "runs/x/tokenizer"


def read_help(module, flags, monkeypatch, capsys):
    """What --help prints: flag -> (explanation, default or None)."""
    monkeypatch.setenv("COLUMNS", "1000")                              # no line is wrapped
    with pytest.raises(SystemExit):
        parse(module, "--help", *flags)
    values = r"(?: [A-Z_]+(?= |$)| \{.*?\})*"                          # such as STEPS or {cpu,cuda}
    entry = rf"--([\w-]+)(?:, --no-[\w-]+)?{values} ?(.*?)(?: \(default: (.*)\))?"
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    matches = [re.fullmatch(entry, " ".join(text.partition("\n\n")[0].split())) for text in entries]
    return {match[1].replace("-", "_"): (match[2], match[3]) for match in matches}


@pytest.mark.parametrize("script, preset", [
    (script, preset) for script, module in SCRIPTS.items() for preset in module.PRESETS])
def test_help_shows_the_values_of_a_preset(script, preset, monkeypatch, capsys):
    """Each name in a preset is a flag. The learning rate that is shown is that of the batch size."""
    shown = read_help(SCRIPTS[script], ["--preset", preset], monkeypatch, capsys)
    values = {**SCRIPTS[script].PRESETS[preset], "preset": preset}
    assert values.pop("base_batch") == values["batch_size"]
    values["lr"] = values.pop("base_lr")
    assert {name: shown[name][1] for name in values} == {name: str(value) for name, value in values.items()}


def code_behind(module):
    """The source of a script, of what all scripts share, and of the functions that they call with flags."""
    code = "".join(map(inspect.getsource, (module, launch, run, run_folder)))
    if module is pretrain:
        code += inspect.getsource(train_dvae.flags_for_pretraining)
    others = [function for other in (data, pretrained)
              for _, function in inspect.getmembers(other, inspect.isfunction)]
    while called := [function for function in others if re.search(rf"\b{function.__name__}\(", code)]:
        others = [function for function in others if function not in called]
        code += "".join(map(inspect.getsource, called))
    return code


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_and_read(script, monkeypatch, capsys):
    """A flag is read by code behind the script, or by the models as a field of ViTConfig that they use."""
    module = SCRIPTS[script]
    code, models = code_behind(module), inspect.getsource(vit)
    models = re.sub(r"    def __post_init__.*?(?=\n    @property)", "", models, flags=re.DOTALL)
    builds_a_model = "config_from_flags(vit.ViTConfig, args)" in inspect.getsource(module)
    fields = [field.name for field in dataclasses.fields(vit.ViTConfig) if builds_a_model]
    flags = read_help(module, [], monkeypatch, capsys)
    assert len(flags) > 25
    for name, (explanation, _) in flags.items():
        is_read = re.search(rf"\b(args|config)\.{name}\b(?! \*?= )", code)    # and not assigned to
        is_used = name in fields and re.search(rf"\b(config|self)\.{name}\b", models)
        assert explanation and (is_read or is_used), name


# ---- Processes ----

@pytest.mark.parametrize("flag, gpus, device", [
    ("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda:1"), ("auto", 1, None)])
def test_which_device(monkeypatch, flag, gpus, device):
    """For the second of two processes on this machine."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if device:
        assert str(launch.join_processes(flag, "auto")) == device
    else:
        with pytest.raises(UserError, match="^--device: found 1 GPUs for 2 processes; use --device cpu"):
            launch.join_processes(flag, "auto")


def test_scripts_without_docstrings_have_a_help(monkeypatch, capsys):
    """As of python -OO."""
    with pytest.raises(SystemExit):
        launch.make_parser("pretrain.py", None).parse_args(["--help"])
    assert "usage: pretrain.py" in capsys.readouterr().out


@pytest.mark.parametrize("rank, processes", [("0", "0"), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", "")])
def test_an_environment_that_torchrun_does_not_make(rank, processes, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit):
        launch.start(None, None)
    assert f"error: RANK={rank} and WORLD_SIZE={processes} in the env" in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    "{python} {script} >&- 2>&-",
    pytest.param("{python} {script} >/dev/full 2>/dev/full", marks=pytest.mark.long),
    "({python} {script}; echo $? >status) | true; exit `cat status`"])
def test_output_that_fails_does_not_end_a_run(command, tmp_path):
    """Closed, on a full disk, or a pipe that nobody reads: the run goes on, to its own end."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import launch\nfrom tqdm import tqdm\ntime.sleep(0.2)\n"
                      "with launch.one_line_errors():\n"
                      "    for i in tqdm(range(3), disable=False):\n"
                      "        launch.say('x' * 9000); print('warning', file=sys.stderr)\n"
                      "    open('done', 'w').close()\n    raise launch.UserError('no')\n")
    done = subprocess.run(["bash", "-c", command.format(python=sys.executable, script=script)], cwd=tmp_path,
                          text=True, capture_output=True)
    assert (tmp_path / "done").exists() and done.returncode == 2, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("message, line", [
    ("DataLoader worker (pid(s) 3) exited unexpectedly", "--workers: a loader process was killed"),
    ("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found", "--compile: this"),
    ("Cannot find a working triton installation.", "--compile: PyTorch's Triton is not installed"),
    ("mat1 and mat2 shapes cannot be multiplied", None)])
def test_failures_of_the_machine_are_one_line(message, line, capsys):
    with pytest.raises(SystemExit if line else RuntimeError), launch.one_line_errors():
        raise RuntimeError(f"{message}\nmore")
    printed = capsys.readouterr().err
    assert printed.count("\n") == bool(line) and (line or "") in printed


@pytest.mark.parametrize("error, status, line", [
    (UserError("--out: no"), 2, "--out: no"), (FloatingPointError("step 3: no"), 1, "step 3: no"),
    (OSError("Caught OSError in a loader process\nTraceback ...\nOSError: --data: no\n"), 1, "--data: no"),
    (OSError(), 1, "OSError"), (KeyboardInterrupt(), 130, None)])
def test_errors_are_one_line_and_a_status(error, status, line, capsys, monkeypatch):
    """All processes find the same wrong flag, and the first prints it. Only one may find its disk full."""
    monkeypatch.setattr("sys.argv", ["/scripts/pretrain.py"])
    for rank, silent in (("0", (130,)), ("1", (2, 130))):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end, launch.one_line_errors():
            raise error
        printed = "" if status in silent else f"pretrain.py: error: {line}\n"
        assert end.value.code == status and capsys.readouterr().err == printed


def test_means_are_weighted_by_counts_and_computed_in_float64():
    means = launch.Means()
    means.add(3, loss=torch.tensor(1.0), top1=torch.tensor([0.0, 1.0]))
    means.add(torch.tensor(1), loss=torch.tensor(1.4), top1=torch.tensor([1.0, 0.0]))
    assert means.compute() == {"loss": (3 + torch.tensor(1.4).item()) / 4, "top1": [0.25, 0.75]}


def share_values():
    """What one of two processes learns from the other. Some means are of batches in the second one only."""
    def fail():
        raise UserError(f"--data: wrong in process {launch.rank()}")

    of_all, of_second = launch.Means(), launch.Means()
    of_all.add(1 + 2 * launch.rank(), loss=torch.tensor(2.0 + 4 * launch.rank()))
    if launch.rank() == 1:
        of_second.add(7, loss=torch.tensor(3.0))
    with pytest.raises(UserError) as error:
        launch.on_first_process(fail)
    return {"sum": launch.all_sum(torch.tensor([1.0, 2.0]) + launch.rank()).tolist(),
            "gathered": launch.all_gather({"rank": launch.rank()}),
            "first": launch.on_first_process(lambda: f"process {launch.rank()}"), "error": str(error.value),
            "means": [means.compute()["loss"] for means in (of_all, of_second)]}


def run_process(rank, function, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(), folder / f"{rank}.pt")


def test_two_processes_share_values(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_process, args=(rank, share_values, tmp_path), daemon=True)
                 for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    expected = {"sum": [3, 5], "gathered": [{"rank": 0}, {"rank": 1}], "first": "process 0",
                "error": "--data: wrong in process 0", "means": [5, 3]}
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [expected, expected]


def test_one_process_shares_with_none():
    assert launch.all_gather("a") == ["a"] and launch.all_sum(torch.tensor(2.0)) == 2
    assert launch.on_first_process(lambda: 3) == 3


# ---- Imports ----

IMPORT = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None    # as on Windows
ours = {path.stem for path in Path().glob("*.py")}
for name in sys.argv[1:]:
    for loaded in ours & sys.modules.keys():
        del sys.modules[loaded]
    __import__(name)
    print(*sorted(ours & sys.modules.keys()))
"""


def test_models_import_none_of_our_files_and_no_import_needs_fcntl():
    files = ["masking", "vit", "dvae"]
    files += sorted({path.stem for path in ROOT.glob("*.py")} - set(files))
    done = subprocess.run([sys.executable, "-c", IMPORT, *files], cwd=ROOT, text=True, capture_output=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(files), done.stderr
    assert lines[:3] == ["masking", "vit", "dvae"]
