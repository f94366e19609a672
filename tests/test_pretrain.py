"""Pre-training from end to end, small: two blocks, 32-pixel views of `shapes`, a tokenizer of 64 codes."""
import json
import math
import signal

import pytest
import torch
from conftest import SMALL, equal, few_scenes, finished, log, start
from PIL import Image

import data
import dvae
import pretrain
import training
import visualize
import vit
import weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", data.Shapes.__len__)    # put back afterwards
        few_scenes()
        yield


def train(tokenizer, out, *flags):
    """Run in this process; returns the log."""
    flags = ["--out", out, *SMALL, *flags] + (["--tokenizer", tokenizer] if tokenizer else [])
    config = training.parse(pretrain.Config, pretrain.PRESETS, [str(flag) for flag in flags])
    pretrain.train(config, training.join_processes(config))
    return log(out)


def weights_of(out):
    return torch.load(out / "model.pt")["model"]


# ---- The loss ----

def test_loss_by_hand():
    outputs = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])    # p = 1/4, 3/4; 4/5, 1/5
    loss, accuracy = pretrain.loss_and_accuracy(outputs, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 5)) / 2) and accuracy.item() == 0.5
    loss, accuracy = pretrain.loss_and_accuracy(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    assert loss.item() == 2.5 and math.isnan(accuracy)


def small_model(outputs):
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, heads=2, drop_path=0.0)
    return vit.MaskedImageModel(config, outputs)


def test_baselines_by_hand(tokenizer, monkeypatch):
    """A model that answers with the token frequencies has their entropy as loss, the majority's accuracy."""
    monkeypatch.setattr(dvae.DiscreteVAE, "tokenize",
                        lambda self, images: torch.tensor([[3, 3], [7, 9]]).repeat(len(images), 2, 2))
    model = small_model(64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1e9)
        model.lm_head.bias[[3, 7, 9]] = torch.tensor([0.5, 0.25, 0.25]).log()
    views = [torch.zeros(2, 3, side, side, dtype=torch.uint8) for side in (32, 16)]
    batch = (*views, torch.ones(2, 4, 4, dtype=torch.bool), torch.arange(32))
    fp32 = training.Precision("fp32", CPU)
    report = pretrain.evaluate(model, [batch, batch], weights.load_tokenizer(tokenizer), fp32, CPU)
    entropy = pytest.approx(1.5 * math.log(2))
    assert report == {"val_loss": entropy, "val_accuracy": 0.5, "chance_loss": math.log(64),
                      "unigram_entropy": entropy, "majority_accuracy": 0.5}


def test_one_batch_is_overfitted():
    model = small_model(64)
    images, mask = torch.rand(6, 3, 32, 32), torch.rand(6, 4, 4) < 0.4
    targets = torch.randint(64, mask.shape)[mask]
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.0), lr=3e-3)
    for step in range(150):
        loss, accuracy = pretrain.loss_and_accuracy(model(images, mask), targets)
        loss.backward()
        training.Precision("fp32", CPU).update(optimizer, 3.0)
    assert loss < 0.1 and accuracy == 1


# ---- Runs ----

@pytest.mark.parametrize("flags", [
    "", "--masking random", "--target pixels", "--target pixels --masking random", "--predict all",
    "--masking none --predict all",                                    # up to here the rows of Table 4
    "--target pixels --predict all", "--no-exact-masks --log-aspect", "--precision bf16", "--clip-grad 0",
    "--position shared_relative --layer-scale 0.1 --drop-path 0.2 --checkpoint-blocks"])
def test_every_objective_runs(tokenizer, tmp_path, flags):
    lines = train(None if "pixels" in flags else tokenizer, tmp_path, "--steps", "2", *flags.split())
    expected = {"loss", "lr", "grad_norm", "val_loss"}
    if "pixels" in flags:
        expected |= {"mean_loss"}
    else:
        expected |= {"accuracy", "val_accuracy", "chance_loss", "unigram_entropy", "majority_accuracy"}
        assert abs(lines[0]["loss"] - math.log(64)) < 0.5
    assert [line["step"] for line in lines] == [1, 2] and expected <= set(lines[-1])
    for name in ("config.json", "last.pt", "model.pt", "result.json", "predictions.png"):
        assert (tmp_path / name).stat().st_size > 0
    kept = torch.load(tmp_path / "model.pt")
    model = vit.MaskedImageModel(vit.ViTConfig(**kept["config"]["vit"]), kept["config"]["vocab_size"])
    model.load_state_dict(kept["model"])


class Stop(Exception):
    pass


def first_step(tokenizer, out, *flags):
    """mask (B, h, w) and targets at the predicted places, first step under these flags, on an 8x8 grid."""
    seen, forward = {}, vit.MaskedImageModel.forward

    def see_inputs(model, images, mask, places):
        seen.update(mask=mask, places=places)
        return forward(model, images, mask, places)

    def see_targets(outputs, targets):
        seen["targets"] = targets
        raise Stop
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(vit.MaskedImageModel, "forward", see_inputs)
        patch.setattr(pretrain, "loss_and_accuracy", see_targets)
        train(tokenizer, out, "--image-size", "64", "--batch-size", "64", "--crop-scale", "1", "--fresh",
              *flags)
    mask = seen["mask"]
    predicted = torch.ones_like(mask) if "all" in flags else mask
    assert mask.shape == (64, 8, 8) and torch.equal(seen["places"], predicted.flatten().nonzero()[:, 0])
    return mask, seen["targets"]


def neighbours(mask):
    """How many pairs of masked patches touch."""
    return ((mask[:, 1:] & mask[:, :-1]).sum() + (mask[:, :, 1:] & mask[:, :, :-1]).sum()).item()


def test_each_ablation_does_what_it_says(tokenizer, tmp_path):
    blocks, tokens = first_step(tokenizer, tmp_path)
    assert (blocks.sum((1, 2)) == 25).all() and tokens.shape == (64 * 25,) and tokens.dtype == torch.int64
    dots, _ = first_step(tokenizer, tmp_path, "--masking", "random")
    assert (dots.sum((1, 2)) == 25).all() and neighbours(dots) < 0.7 * neighbours(blocks)
    mask, everything = first_step(tokenizer, tmp_path, "--predict", "all")
    assert torch.equal(mask, blocks) and torch.equal(everything.view(64, 8, 8)[mask], tokens)
    nothing, everything_too = first_step(tokenizer, tmp_path, "--masking", "none", "--predict", "all")
    assert not nothing.any() and torch.equal(everything, everything_too)
    _, pixels = first_step(None, tmp_path, "--target", "pixels")
    assert pixels.shape == (64 * 25, 3 * 8 * 8) and pixels.dtype == torch.float32
    counts = first_step(tokenizer, tmp_path, "--no-exact-masks")[0].sum((1, 2))
    assert counts.min() >= 26 and counts.unique().numel() > 3         # Algorithm 1 stops after crossing 0.4 N
    assert not torch.equal(first_step(tokenizer, tmp_path, "--log-aspect")[0], blocks)
    assert (first_step(tokenizer, tmp_path, "--mask-ratio", "0.6")[0].sum((1, 2)) == 38).all()


@pytest.mark.parametrize("with_decoder", [True, False])
def test_dall_e_is_a_tokenizer(tmp_path, with_decoder, monkeypatch):
    dall_e = pytest.importorskip("dall_e")
    common = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)
    torch.save(dall_e.Encoder(**common), tmp_path / "encoder.pkl")
    if with_decoder:
        torch.save(dall_e.Decoder(**common), tmp_path / "decoder.pkl")
    shown, draw = [], visualize.figure_predictions

    def see(columns, *more):
        shown.extend(columns)
        return draw(columns, *more)
    monkeypatch.setattr(visualize, "figure_predictions", see)
    lines = train(tmp_path / "encoder.pkl", tmp_path / "run", "--steps", "1")
    assert abs(lines[0]["loss"] - math.log(512)) < 0.5
    assert shown[2:] == (["tokenizer at best", "prediction"] if with_decoder else ["right tokens"])


def test_accumulated_parts_make_the_same_step(tokenizer, tmp_path):
    whole, parts = (train(tokenizer, tmp_path / n, "--steps", "3", "--accumulate", n) for n in "14")
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_finished_run_says_so(tokenizer, tmp_path, capsys):
    train(tokenizer, tmp_path, "--steps", "1")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "lock"}
    train(tokenizer, tmp_path, "--steps", "1")
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_unreadable_image_is_named_and_the_next_one_taken(tokenizer, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i in range(60):
        Image.effect_noise((40, 40), 50).save(tmp_path / f"images/{i:02}.png")
    bad = tmp_path / "images/07.png"
    bad.write_bytes(b"")
    flags = ["--data", tmp_path / "images", "--preset", "demo", "--steps"]
    assert len(train(tokenizer, tmp_path / "out", *flags, "10")) == 10
    assert capsys.readouterr().err.count(f"warning: {bad} cannot be read") == 1
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"\x89PNG")
    with pytest.raises(OSError, match="^--data: .*png cannot be read"):
        train(tokenizer, tmp_path / "none", *flags, "10")


@pytest.mark.long
def test_compiled_runs_log_the_losses_of_eager_ones_and_compile_once(tokenizer, tmp_path):
    """The compiler itself, model and tokenizer; after the first step nothing is compiled again."""
    torch.compiler.reset()
    compilations = torch._dynamo.utils.counters
    compilations.clear()
    flags = ["--steps", 12, "--eval-every", 100]
    eager = train(tokenizer, tmp_path / "eager", *flags)
    compiled = train(tokenizer, tmp_path / "compiled", *flags, "--compile")
    assert 1 <= compilations["stats"]["unique_graphs"] <= 3    # the model, held-out batches, their last one
    for one, other in zip(eager, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), one["step"]


# ---- Processes and signals ----

def test_kill_and_continue_bit_for_bit(tokenizer, tmp_path):
    """kill -9 in the middle of a step, two steps after a checkpoint, in the middle of the second epoch."""
    flags = ["--steps", "18", "--drop-path", "0.3", "--eval-every", "7", "--tokenizer", tokenizer]
    whole, out = train(None, tmp_path / "whole", *flags), tmp_path / "killed"
    finished(start(out, *flags, signal=signal.SIGKILL, at_step=15), -signal.SIGKILL)
    assert torch.load(out / "last.pt")["step"] == 12 and log(out)[-1]["step"] == 14
    assert train(None, out, *flags) == whole
    assert equal(weights_of(out), weights_of(tmp_path / "whole"))


def test_two_processes_equal_one(tokenizer, tmp_path):
    flags = ["--steps", "8", "--tokenizer", tokenizer]
    finished(start(tmp_path / "two", *flags, processes=2))
    for one, two in zip(train(None, tmp_path / "one", *flags), log(tmp_path / "two"), strict=True):
        assert two == {name: pytest.approx(value, rel=1e-4) for name, value in one.items()}, one["step"]


@pytest.mark.long
def test_if_one_process_is_told_to_stop_both_do_and_continue(tokenizer, tmp_path):
    flags = ["--steps", "8", "--tokenizer", tokenizer, "--workers", "1"]
    said, _ = finished(start(tmp_path / "two", *flags, processes=2, signal=signal.SIGTERM, at_step=5), 1)
    assert "SIGTERM: stopped after step 5" in said and torch.load(tmp_path / "two/last.pt")["step"] == 5
    finished(start(tmp_path / "two", *flags, processes=2))
    for one, two in zip(train(None, tmp_path / "one", *flags), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4), one["step"]


@pytest.mark.long
def test_two_processes_do_the_whole_job(tmp_path):
    """The tokenizer takes the same first step, later noise differs: it is drawn by rank."""
    finished(start(tmp_path / "two", "--steps", "4", processes=2))
    train(None, tmp_path / "one", "--steps", "4")
    one, two = (log(tmp_path / name / "tokenizer") for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    assert two[0]["kl"] == pytest.approx(one[0]["kl"], rel=1e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0].keys() == results[1].keys()
    assert results[1]["val_loss"] == pytest.approx(math.log(1024), abs=1)
    assert (tmp_path / "two/predictions.png").exists() and (tmp_path / "two/model.pt").exists()


@pytest.mark.long
def test_a_diverging_run_stops_everywhere(tokenizer, tmp_path):
    flags = ["--tokenizer", tokenizer, "--steps", "50", "--lr", "1e30", "--warmup", "0", "--clip-grad", "0"]
    _, errors = finished(start(tmp_path, *flags, processes=2), 1)
    assert "pretrain.py: error: step " in errors and ": the loss is " in errors
    assert not (tmp_path / "result.json").exists()
