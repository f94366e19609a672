"""Runs from end to end, small: a tokenizer of 64 codes, a backbone of two blocks, 32-pixel views of `shapes`."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure

import checkpoints
import data
import dvae
import pretrain
import training
import vit
import weights
from conftest import ROOT
from training import UserError

CPU = torch.device("cpu")
SMALL = ["--image-size", "32", "--patch-size", "8", "--dim", "16", "--depth", "2", "--heads", "2", "--batch-size", "12",
         "--precision", "fp32", "--save-every", "3", "--log-every", "1"]


@pytest.fixture(scope="module", autouse=True)
def few_held_out_images():
    """96 of them, where the tests run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", lambda self: 10_000 if self.split == "train" else 96)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, few_held_out_images):
    """model.pt of a tokenizer of a few steps."""
    config = training.build(dvae.Config, {**dvae.PRESETS["demo"], "preset": "demo", "steps": 6, "batch_size": 8, "image_size": 16,
                                          "vocab_size": 64, "hidden": 8, "out": str(tmp_path_factory.mktemp("tokenizer"))})
    return dvae.train(config, CPU)


def configured(tokenizer, out, *flags):
    given = ["--out", str(out), *SMALL, *map(str, flags)]
    return training.parse(pretrain.Config, pretrain.PRESETS, given + (["--tokenizer", str(tokenizer)] if tokenizer else []))


def train(tokenizer, out, *flags):
    pretrain.train(configured(tokenizer, out, *flags), CPU)
    return log(out)


def log(out):
    """metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def start(*flags, processes=1, **popen):
    command = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(ROOT / "pretrain.py"), *map(str, flags)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def wait_for_step(process, out, step):
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no progress in a minute")


# the tokenizer -------------------------------------------------------------------------------------------------------

def test_the_tokenizer_that_was_trained_is_the_one_that_loads(tokenizer):
    folder = tokenizer.parent
    result = json.loads((folder / "result.json").read_text())
    assert result["codes"] >= 2 and 1 <= result["perplexity"] <= 64 and result["hard_mse"] > 0 < result["soft_mse"]
    assert {"loss", "nll", "kl", "mse", "temperature", "kl_weight"} <= set(log(folder)[0]) and (folder / "tokenizer.png").stat().st_size > 1000
    assert result["soft_mse_at"].keys() == {"1", "0.5", "0.25", "0.125", "0.0625"} and result["soft_mse_at"]["0.0625"] == result["soft_mse"]
    model = weights.load_tokenizer(tokenizer)
    assert model.vocab_size == 64 and model.downsample == 4
    with pytest.raises(UserError, match="^--tokenizer: .* holds a MaskedImageModel"):
        torch.save({"model": {}, "kind": "MaskedImageModel"}, folder / "other.pt")
        weights.load_tokenizer(folder / "other.pt")


def test_the_tokenizer_continues_bit_for_bit(tokenizer, tmp_path, monkeypatch):
    config = dataclasses.replace(training.build(dvae.Config, json.loads((tokenizer.parent / "config.json").read_text())),
                                 out=str(tmp_path), save_every=2)
    with monkeypatch.context() as patch:
        break_at(patch, 5)
        with pytest.raises(RuntimeError):
            dvae.train(config, CPU)
    dvae.train(config, CPU)
    assert log(tmp_path) == log(tokenizer.parent)
    assert equal(torch.load(tmp_path / "model.pt")["model"], torch.load(tokenizer)["model"])


def test_a_slow_encoder_stays_where_it_is(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(dvae, "draw_tokenizer", lambda *_: Figure(figsize=(1, 1)))
    def moved(part, share):
        config = dataclasses.replace(training.build(dvae.Config, json.loads((tokenizer.parent / "config.json").read_text())), steps=1,
                                     encoder_lr=share, ema=0.0, weight_decay=0.0, out=str(tmp_path / f"{share}"))
        if not (tmp_path / f"{share}").exists():
            dvae.train(config, CPU)
        state = torch.load(tmp_path / f"{share}" / "model.pt")["model"]
        return state[f"{part}.blocks.group_1.block_1.res_path.conv_1.w"]
    still, slow, fast = (moved("encoder", share) for share in (0.0, 0.1, 1.0))
    torch.testing.assert_close((slow - still).norm() / (fast - still).norm(), torch.tensor(0.1), atol=0.01, rtol=0)
    torch.testing.assert_close(moved("decoder", 0.0), moved("decoder", 1.0))


def test_collapse_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dvae.DiscreteVAE, "initialise_codes", lambda self, images: self.encoder.blocks.output.conv.b.data[0].add_(50))
    config = training.build(dvae.Config, {**dvae.PRESETS["demo"], "steps": 1, "batch_size": 4, "image_size": 16, "vocab_size": 512,
                                          "hidden": 4, "out": str(tmp_path)})
    dvae.train(config, CPU)
    assert "warning: the codebook is collapsing, 1 of 512" in capsys.readouterr().out


# compiled ------------------------------------------------------------------------------------------------------------

@pytest.mark.long
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_compiled_runs_log_the_losses_of_eager_ones_and_compile_once(tokenizer, tmp_path, precision, tolerance):
    """The compiler itself, model and tokenizer; after the first step nothing is compiled again."""
    torch.compiler.reset()
    compilations = torch._dynamo.utils.counters
    compilations.clear()
    flags = ["--steps", 12, "--eval-every", 100, "--precision", precision]
    eager = train(tokenizer, tmp_path / "eager", *flags)
    compiled = train(tokenizer, tmp_path / "compiled", *flags, "--compile")
    assert compilations["stats"]["unique_graphs"] <= 3            # the model, the tokenizer, its last and smaller batch of held-out images
    for one, other in zip(eager, compiled):
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance), one["step"]


# the loss ------------------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    outputs = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])   # p = 1/4, 3/4; 4/5, 1/5
    loss, accuracy = pretrain.loss_and_accuracy(outputs, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 5)) / 2) and accuracy.item() == 0.5
    loss, accuracy = pretrain.loss_and_accuracy(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    assert loss.item() == 2.5 and math.isnan(accuracy)


def test_patch_pixels():
    config = vit.ViTConfig(image_size=(4, 6), patch_size=2, dim=4, depth=1, heads=1, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    images = torch.rand(2, 3, 4, 6)
    patches = pretrain.patch_pixels(images, config)
    assert patches.shape == (2, 2, 3, 12)
    torch.testing.assert_close(patches[1, 0, 2], (images[1, :, 0:2, 4:6] * 2 - 1).flatten())
    torch.testing.assert_close(pretrain.unpatch_pixels(patches, config), images)


def test_baselines_by_hand(tokenizer, tmp_path, monkeypatch):
    """A model that answers with the log frequencies has the unigram entropy as loss and the majority's accuracy."""
    config = configured(tokenizer, tmp_path)
    monkeypatch.setattr(dvae.DiscreteVAE, "tokenize", lambda self, images: torch.tensor([[3, 3], [7, 9]]).repeat(len(images), 2, 2))
    model = vit.MaskedImageModel(config.backbone, 64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1e9)
        model.lm_head.bias[[3, 7, 9]] = torch.tensor([0.5, 0.25, 0.25]).log()
    batch = (*(torch.zeros(2, 3, side, side, dtype=torch.uint8) for side in (32, 16)), data.NO_JITTER.expand(2, 3), torch.ones(2, 4, 4, dtype=torch.bool), [])
    report, baselines = pretrain.evaluate(model, [batch, batch], config, weights.load_tokenizer(tokenizer), training.Precision("fp32", CPU), CPU, data.CorruptImages(1, print))
    entropy = 1.5 * math.log(2)
    assert report["val_loss"] == pytest.approx(entropy) and report["val_accuracy"] == 0.5
    assert baselines == {"chance_loss": math.log(64), "unigram_entropy": pytest.approx(entropy), "majority_accuracy": 0.5}


# runs ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    [], ["--masking", "random"], ["--target", "pixels"], ["--target", "pixels", "--masking", "random"],
    ["--predict", "all"], ["--masking", "none", "--predict", "all"],                      # the six rows of Table 4
    ["--target", "pixels", "--predict", "all"], ["--no-exact-masks", "--log-aspect"], ["--accumulate", "3"],
    ["--position", "shared_relative", "--layer-scale", "0.1", "--drop-path", "0.2"], ["--precision", "bf16"], ["--clip-grad", "0"],
], ids=" ".join)
def test_every_objective_runs(tokenizer, tmp_path, flags):
    lines = train(None if "pixels" in flags else tokenizer, tmp_path, "--steps", "2", *flags)
    assert [line["step"] for line in lines] == [1, 2]
    expected = {"loss", "lr", "grad_norm", "val_loss"} | ({"mean_loss"} if "pixels" in flags else {
        "accuracy", "val_accuracy", "chance_loss", "unigram_entropy", "majority_accuracy"})
    assert expected <= set(lines[-1])
    if "pixels" not in flags:
        assert abs(lines[0]["loss"] - math.log(64)) < 0.5
    for name in ("config.json", "last.pt", "model.pt", "result.json", "predictions.png"):
        assert (tmp_path / name).stat().st_size > 0
    checkpoint = checkpoints.read_checkpoint(tmp_path / "model.pt", "--init")
    vit.MaskedImageModel(vit.ViTConfig(**checkpoint["config"]["vit"]), checkpoint["config"]["vocab_size"]).load_state_dict(checkpoint["model"])


def one_batch(tokenizer, tmp_path, *flags):
    """The training batch of the first step under these flags: mask, and the targets of the predicted places."""
    config = configured(tokenizer, tmp_path, "--image-size", "64", "--batch-size", "64", "--crop-scale", "1", *flags)
    source = data.open_images("shapes", "data", "train")
    model, _, size = pretrain.open_tokenizer(config, len(source), 1)
    views, _ = pretrain.make_views(config, source, source, size)
    batch = next(iter(data.train_loader(views, config, CPU, start=0, stop=1, rank=0, world_size=1)))
    _, mask, places, targets = pretrain.inputs_and_targets(batch, config, model, CPU)
    predicted = mask if config.predict == "masked" else torch.ones_like(mask)
    assert torch.equal(places, predicted.flatten().nonzero()[:, 0]) and len(targets) == len(places) and mask.shape == (64, 8, 8)
    return mask, targets


def neighbours(mask):
    """How many pairs of masked cells touch, an image."""
    return ((mask[:, 1:] & mask[:, :-1]).sum() + (mask[:, :, 1:] & mask[:, :, :-1]).sum()).item() / len(mask)


def test_each_ablation_does_what_it_says(tokenizer, tmp_path):
    blocks, tokens = one_batch(tokenizer, tmp_path)
    assert (blocks.sum((1, 2)) == 25).all() and tokens.shape == (64 * 25,) and tokens.dtype == torch.int64
    dots, _ = one_batch(tokenizer, tmp_path, "--masking", "random")
    assert (dots.sum((1, 2)) == 25).all() and neighbours(dots) < 0.7 * neighbours(blocks)
    mask, everything = one_batch(tokenizer, tmp_path, "--predict", "all")
    assert torch.equal(mask, blocks) and everything.shape == (64 * 64,) and torch.equal(everything.view(64, 8, 8)[mask], tokens)
    nothing, everything_too = one_batch(tokenizer, tmp_path, "--masking", "none", "--predict", "all")
    assert not nothing.any() and torch.equal(everything, everything_too)
    _, pixels = one_batch(None, tmp_path, "--target", "pixels")
    assert pixels.shape == (64 * 25, 3 * 8 * 8) and pixels.dtype == torch.float32
    counts = one_batch(tokenizer, tmp_path, "--no-exact-masks")[0].sum((1, 2))
    assert counts.min() >= 26 and counts.unique().numel() > 3          # Algorithm 1 stops after crossing 0.4 N
    assert not torch.equal(one_batch(tokenizer, tmp_path, "--log-aspect")[0], blocks)
    assert (one_batch(tokenizer, tmp_path, "--mask-ratio", "0.6")[0].sum((1, 2)) == 38).all()


@pytest.mark.parametrize("with_decoder", [True, False])
def test_dall_e_is_a_tokenizer(tmp_path, with_decoder, monkeypatch):
    dall_e = pytest.importorskip("dall_e")
    common = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)
    torch.save(dall_e.Encoder(**common), tmp_path / "encoder.pkl")
    if with_decoder:
        torch.save(dall_e.Decoder(**common), tmp_path / "decoder.pkl")
    shown, draw = [], pretrain.draw_predictions
    monkeypatch.setattr(pretrain, "draw_predictions", lambda columns: shown.append(columns) or draw(columns))
    lines = train(tmp_path / "encoder.pkl", tmp_path / "run", "--steps", "1")
    assert abs(lines[0]["loss"] - math.log(512)) < 0.5
    assert list(shown[0])[2:] == (["tokenizer at best", "prediction"] if with_decoder else ["right tokens"])


def test_one_batch_is_overfitted(tokenizer):
    torch.manual_seed(0)
    model = vit.MaskedImageModel(vit.ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, heads=2, drop_path=0.0), 64)
    images, mask = torch.rand(6, 3, 32, 32), torch.rand(6, 4, 4) < 0.4
    targets = torch.randint(64, mask.shape)[mask]
    optimizer, precision = training.adamw(training.parameter_groups(model, 0.0)), training.Precision("fp32", CPU)
    for step in range(150):
        training.set_lr(optimizer, 3e-3)
        loss, accuracy = pretrain.loss_and_accuracy(model(images, mask), targets)
        precision.backward(loss)
        precision.update(optimizer, 3.0)
    assert loss < 0.1 and accuracy == 1


def test_accumulated_parts_make_the_same_step(tokenizer, tmp_path):
    whole, parts = (train(tokenizer, tmp_path / n, "--steps", "3", "--accumulate", n) for n in "14")
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def break_at(patch, step):
    """Let a run die in the middle of that step, after its backward pass."""
    exchange = training.Run.exchange

    def dying(self, at, *more):
        if at == step:
            raise RuntimeError("died")
        return exchange(self, at, *more)
    patch.setattr(training.Run, "exchange", dying)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_died_continues_bit_for_bit(tokenizer, tmp_path, monkeypatch):
    flags = ["--steps", "8", "--drop-path", "0.3", "--eval-every", "4"]
    whole = train(tokenizer, tmp_path / "whole", *flags)
    for step in (2, 5, 8):                                             # before the first checkpoint, and after two others
        with monkeypatch.context() as patch:
            break_at(patch, step)
            with pytest.raises(RuntimeError, match="died"):
                train(tokenizer, tmp_path / "died", *flags)
    assert train(tokenizer, tmp_path / "died", *flags) == whole
    assert equal(torch.load(tmp_path / "died" / "model.pt")["model"], torch.load(tmp_path / "whole" / "model.pt")["model"])


def test_a_finished_run_says_so(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path, "--steps", "1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    train(tokenizer, tmp_path, "--steps", "1")
    assert "is finished" in capsys.readouterr().out and before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_an_unreadable_image_is_named_and_counted(tokenizer, tmp_path, capsys):
    from test_data import fill
    fill(tmp_path / "images", 150)
    bad = tmp_path / "images" / "0007.png"
    bad.write_bytes(b"")
    train(tokenizer, tmp_path / "out", "--data", tmp_path / "images", "--preset", "demo", "--steps", "26")
    said = capsys.readouterr().out
    assert said.count(f"warning: {bad} cannot be read") == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["unreadable_images"] == 1


def test_too_many_unreadable_images_end_the_run(tokenizer, tmp_path):
    from test_data import fill
    fill(tmp_path / "images", 150)
    for i in range(0, 150, 3):
        (tmp_path / "images" / f"{i:04}.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="^--data: more than 1 % of the images of an epoch cannot be read: .*png"):
        train(tokenizer, tmp_path / "out", "--data", tmp_path / "images", "--preset", "demo", "--steps", "26", "--workers", "1")


# processes and signals -----------------------------------------------------------------------------------------------

def one_and_two_processes(out, *flags):
    started = [start("--out", out / str(processes), *SMALL, *flags, processes=processes) for processes in (1, 2)]
    for process in started:
        printed = process.communicate(timeout=240)
        assert process.returncode == 0, printed
    return out / "1", out / "2"


def test_two_processes_equal_one(tokenizer, tmp_path):
    for one, two in zip(*map(log, one_and_two_processes(tmp_path, "--tokenizer", tokenizer, "--steps", "20")), strict=True):
        for name in one:
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)


def test_two_processes_do_the_whole_job(tmp_path):
    """Their tokenizer takes the same first steps, noise included; later, rounding grows while codes are taking shape."""
    one, two = one_and_two_processes(tmp_path, "--steps", "4")
    for a, b in zip(log(one / "tokenizer"), log(two / "tokenizer"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3) and a["kl"] == pytest.approx(b["kl"], rel=1e-3), a["step"]
    assert len(log(two)) == 4 and (two / "predictions.png").exists() and (two / "model.pt").exists()


def test_kill_and_continue(tokenizer, tmp_path):
    flags = [*SMALL, "--tokenizer", tokenizer, "--steps", "60", "--drop-path", "0.2"]
    undisturbed = start("--out", tmp_path / "whole", *flags)
    process = start("--out", tmp_path / "killed", *flags)
    wait_for_step(process, tmp_path / "killed", 10)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for process in (start("--out", tmp_path / "killed", *flags), undisturbed):
        assert process.wait(timeout=120) == 0, process.communicate()
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tokenizer, tmp_path, number):
    flags = [*SMALL, "--tokenizer", tokenizer, "--steps", "100000", "--save-every", "100000"]
    process = start("--out", tmp_path, *flags)
    wait_for_step(process, tmp_path, 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -number and not err and f"{number.name}: stopped after step" in out
    assert torch.load(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"] >= 5


def test_torchrun_is_told_to_stop(tokenizer, tmp_path):
    """torchrun signals the whole process group, the loaders' workers too; the step is finished all the same."""
    process = start("--out", tmp_path, *SMALL, "--tokenizer", tokenizer, "--steps", "100000", "--save-every", "100000",
                    "--workers", "1", processes=2)
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGTERM: stopped after step" in out, (out, err)
    assert torch.load(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"] >= 5


def test_a_diverging_run_stops_everywhere(tokenizer, tmp_path):
    process = start("--out", tmp_path, *SMALL, "--tokenizer", tokenizer, "--steps", "50", "--lr", "1e30", "--warmup", "0",
                    "--clip-grad", "0", processes=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "pretrain.py: error: step " in err and ": the loss is " in err
    assert not (tmp_path / "result.json").exists()
