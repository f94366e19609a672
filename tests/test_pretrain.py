"""Pre-training from end to end, small: two blocks, 32-pixel views of `shapes`, a tokenizer of 64 codes."""
import json
import math
import re
import shlex
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import SMALL, equal, few_scenes, finished, log, start

import data
import dvae
import folders
import launch
import masking
import pretrain
import run
import train_dvae
import vit
import weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", data.Shapes.__len__)    # put back afterwards
        few_scenes()
        yield


def parse(*flags):
    return pretrain.parse_args([str(flag) for flag in flags])


def train(tokenizer, out, *flags):
    """Run in this process; returns the log."""
    args = parse("--out", out, *SMALL, *flags, *(["--tokenizer", tokenizer] if tokenizer else []))
    pretrain.train(args, launch.join_processes(args.device, args.precision))
    return log(out)


# ---- The loss ----

def test_loss_by_hand():
    outputs = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])    # p = 1/4, 3/4; 4/5, 1/5
    loss, accuracy = pretrain.loss_and_accuracy(outputs, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 5)) / 2) and accuracy.item() == 0.5
    loss, accuracy = pretrain.loss_and_accuracy(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    assert loss.item() == 2.5 and accuracy is None


def small_model(outputs):
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, heads=2, drop_path=0.0)
    return vit.MaskedImageModel(config, outputs)


def test_baselines_by_hand(tokenizer, monkeypatch):
    """A model that answers with the token frequencies has their entropy as loss, the majority's accuracy."""
    tokens = torch.tensor([[3, 3, 3, 3], [7, 9, 7, 9], [5, 5, 5, 5], [5, 5, 5, 5]])
    def tokenize(self, images, places=None):
        of_batch = tokens.repeat(len(images), 1, 1)
        return of_batch if places is None else of_batch.flatten()[places]

    def decode(self, tokens):                                          # grey patches of 4x4 pixels
        return (tokens / 64).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]

    monkeypatch.setattr(dvae.DiscreteVAE, "tokenize", tokenize)
    monkeypatch.setattr(dvae.DiscreteVAE, "decode", decode)
    model = small_model(64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1e9)
        model.lm_head.bias[[3, 7, 9]] = torch.tensor([0.5, 0.25, 0.25]).log()
    upper_half = torch.tensor([[True], [True], [False], [False]]).expand(4, 4)
    image, token_image = (torch.zeros(3, side, side, dtype=torch.uint8) for side in (32, 16))
    sample = {"image": image, "token_image": token_image, "mask": upper_half}
    views = {(0, index): sample for index in range(4)}                 # the key is (epoch, index)
    report = pretrain.evaluate(model, weights.load_tokenizer(tokenizer), views, parse(*SMALL), CPU)
    entropy = pytest.approx(1.5 * math.log(2))
    # The model predicts 3 at all masked patches; the images are black.
    assert report == {"val_loss": entropy, "val_accuracy": 0.5, "chance_loss": math.log(64),
                      "unigram_entropy": entropy, "majority_accuracy": 0.5,
                      "val_pixel_error": pytest.approx((3 / 64) ** 2)}


def test_baseline_of_pixels_by_hand():
    """A model that answers 0 has the loss of the mean colour; batches count by their predicted patches."""
    model, images = small_model(3 * 8 * 8), torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.nn.init.zeros_(model.lm_head.weight)
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[2].view(-1)[3:] = False                                       # the second batch predicts 3 patches
    views = {(0, index): {"image": images[index], "mask": mask[index]} for index in range(3)}
    report = pretrain.evaluate(model, None, views, parse(*SMALL, "--batch-size", 2), CPU)
    pixels = model.patch_pixels(images / 255)[mask]
    expected = pytest.approx(pixels.square().mean().item())
    assert report == {"val_loss": expected, "mean_loss": expected}


def test_one_batch_is_overfitted():
    model = small_model(64)
    images, mask = torch.rand(6, 3, 32, 32), torch.rand(6, 4, 4) < 0.4
    targets = torch.randint(64, mask.shape)[mask]
    optimizer = torch.optim.AdamW(run.parameter_groups(model, 0.0), lr=3e-3)
    for step in range(150):
        loss, accuracy = pretrain.loss_and_accuracy(model(images, mask), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
    assert loss < 0.1 and accuracy == 1


# ---- Runs ----

def spy(owner, name):
    """In this context the function does the same and remembers its arguments."""
    return mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


@pytest.mark.parametrize("flags, masked", [
    ("", 25), ("--masking random", 25), ("--target pixels", 25), ("--target pixels --masking random", 25),
    ("--predict all", 25), ("--masking none --predict all", 0),        # up to here the rows of Table 4
    ("--target pixels --predict all --precision bf16", 25), ("--no-exact-masks --clip-grad 0", None),
    ("--position shared_relative --layer-scale 0.1 --drop-path 0.2 --checkpoint-blocks", 25),
    ("--mask-ratio 0.6", 38)])
def test_each_ablation_does_what_it_says(tokenizer, tmp_path, flags, masked, capsys):
    """masked: the number of masked patches in each image; None: it varies from 26 on."""
    tokenizer = None if "pixels" in flags else tokenizer
    with (spy(vit.MaskedImageModel, "forward") as forward, spy(dvae.DiscreteVAE, "tokenize") as tokenize,
          spy(pretrain, "loss_and_accuracy") as loss, spy(vit, "checkpoint") as checkpoint):
        lines = train(tokenizer, tmp_path, "--image-size", "64", "--steps", "2", *flags.split())
    _, _, mask, places = forward.call_args_list[0].args                # of the first step
    targets = loss.call_args_list[0].args[1]
    counts = mask.sum((1, 2))
    said = re.findall("^(.*) patches are masked$", capsys.readouterr().out, flags=re.M)
    assert said == {0: [], None: ["more than 25 of 64"]}.get(masked, [f"{masked} of 64"])
    if masked is None:                                                 # Algorithm 1 stops above 0.4 N
        assert counts.min() >= 26 and counts.unique().numel() > 3
    else:
        assert mask.shape == (12, 8, 8) and (counts == masked).all()
    if masked == 25:
        neighbours = (mask[:, 1:] & mask[:, :-1]).sum() + (mask[:, :, 1:] & mask[:, :, :-1]).sum()
        assert neighbours < 20 * 12 if "random" in flags else neighbours > 26 * 12
    predicted = torch.ones_like(mask) if "all" in flags else mask
    assert torch.equal(places, predicted.flatten().nonzero()[:, 0])
    expected = {"loss", "lr", "grad_norm", "val_loss"}
    if tokenizer:
        expected |= {"accuracy", "val_accuracy", "chance_loss", "unigram_entropy", "majority_accuracy"}
        assert abs(lines[0]["loss"] - math.log(64)) < 0.5
        _, token_images, tokenized = tokenize.call_args_list[1].args       # the first is load_tokenizer's
        assert torch.equal(tokenized, places)                              # no more than is predicted
        tokens = weights.load_tokenizer(tokenizer).tokenize(token_images)
        assert tokens.shape == (12, 8, 8) and torch.equal(targets, tokens[predicted])
    else:
        expected |= {"mean_loss"}
        assert targets.shape == (len(places), 3 * 8 * 8) and targets.dtype == torch.float32
    assert [line["step"] for line in lines] == [1, 2] and all(expected <= set(line) for line in lines)
    assert checkpoint.called == ("--checkpoint-blocks" in flags)


def test_a_way_to_mask_that_is_added_to_masks_can_be_chosen(tokenizer, tmp_path, monkeypatch):
    upper_rows = np.arange(16).reshape(4, 4) < 8
    monkeypatch.setitem(masking.MASKS, "upper", lambda grid, num_masked, rng: upper_rows)
    with spy(vit.MaskedImageModel, "forward") as forward:
        train(tokenizer, tmp_path, "--masking", "upper", "--steps", 1)
    for call in forward.call_args_list:
        _, _, mask, _ = call.args
        assert torch.equal(mask, torch.tensor(upper_rows).expand_as(mask))


def test_files_of_a_run(tmp_path):
    line, = train(None, tmp_path, "--steps", "1", "--tokenizer-steps", "3")    # it trains its tokenizer first
    tokenizer = json.loads((tmp_path / "tokenizer/config.json").read_text())
    assert (tokenizer["steps"], tokenizer["image_size"]) == (3, 16)    # which gives 4x4 tokens
    for name in ("config.json", "last.pt", "result.json", "predictions.png"):
        assert (tmp_path / name).stat().st_size > 0
    kept = torch.load(tmp_path / "model.pt")
    model = vit.MaskedImageModel(vit.ViTConfig(**kept["config"]["vit"]), kept["config"]["vocab_size"])
    model.load_state_dict(kept["model"])
    moved = model.lm_head.bias.abs().max().item()                      # from 0, by AdamW's first step
    assert moved == pytest.approx(line["lr"], rel=1e-3)


@pytest.mark.parametrize("target, val_loss, warns", [("tokens", 2.1, True), ("tokens", 1.9, False),
                                                     ("pixels", 2.1, True), ("pixels", 1.9, False)])
def test_a_loss_above_the_baseline(tokenizer, tmp_path, monkeypatch, capsys, target, val_loss, warns):
    report = {"val_loss": val_loss, "unigram_entropy" if target == "tokens" else "mean_loss": 2.0}
    monkeypatch.setattr(pretrain, "evaluate", lambda *args: report)
    train(tokenizer if target == "tokens" else None, tmp_path, "--steps", "1", "--target", target)
    assert ("warning: val_loss is above the loss of a pred" in capsys.readouterr().out) == warns


@pytest.mark.long
def test_the_printed_command_trains_the_same_tokenizer(tmp_path, capsys):
    """Bit for bit, with flags that pretrain.py passes on, and a path that must be quoted."""
    out = tmp_path / "a run"
    flags = ["--steps", 2, "--tokenizer-preset", "demo", "--tokenizer-steps", 4, "--seed", 3]
    train(None, out, *flags, "--data", "shapes", "--preset", "demo")
    command, = re.findall("^python train_dvae.py (.*)", capsys.readouterr().out, flags=re.M)
    (out / "tokenizer").rename(out / "first")
    train_dvae.train(train_dvae.parse_args(shlex.split(command)), CPU)
    states = [torch.load(out / name / "model.pt")["model"] for name in ("first", "tokenizer")]
    assert equal(*states) and log(out / "first") == log(out / "tokenizer")
    assert json.loads((out / "first/config.json").read_text())["seed"] == 3


def test_training_images_vary_with_the_epoch_and_held_out_ones_do_not():
    args = parse()
    config = launch.config_from_flags(vit.ViTConfig, args)
    views, val_views = pretrain.open_views(args, config, *data.open_splits("shapes", ""), None)
    assert not torch.equal(views[0, 5]["image"], views[1, 5]["image"])
    assert torch.equal(val_views[0, 5]["image"], val_views[1, 5]["image"])


@pytest.mark.parametrize("preset, clip_grad", [("base", 3.0), ("large", 1.0)])
def test_presets_are_the_papers(preset, clip_grad):
    args = parse("--data", "folder", "--preset", preset)
    expected = dict(epochs=800, batch_size=2048, lr=1.5e-3, min_lr=1e-5, weight_decay=0.05, drop_path=0.1,
                    clip_grad=clip_grad, mask_ratio=0.4, jitter=0.4, masking="blockwise", target="tokens",
                    predict="masked", image_size=224, dim=vit.PRESETS[preset].dim)
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.warmup * args.epochs == 10


def test_log_aspect_changes_the_masks_and_not_their_size():
    masks = []
    for flags in ([], ["--log-aspect"]):
        args = parse("--data", "folder", *flags)
        config = launch.config_from_flags(vit.ViTConfig, args)
        views, _ = pretrain.open_views(args, config, None, None, None)
        masks.append(views.draw_mask(np.random.default_rng(0)))
    assert masks[0].sum() == masks[1].sum() == 78 and (masks[0] != masks[1]).any()


@pytest.mark.parametrize("with_decoder", [True, False])
def test_dall_e_is_a_tokenizer(tmp_path, with_decoder):
    dall_e = pytest.importorskip("dall_e")
    common = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)
    torch.save(dall_e.Encoder(**common), tmp_path / "encoder.pkl")
    if with_decoder:
        torch.save(dall_e.Decoder(**common), tmp_path / "decoder.pkl")
    lines = train(tmp_path / "encoder.pkl", tmp_path / "run", "--steps", "1")
    assert abs(lines[0]["loss"] - math.log(512)) < 0.5 and (tmp_path / "run/predictions.png").exists()


@pytest.mark.long
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


@pytest.mark.long
def test_compiled_runs_log_the_losses_of_eager_ones_and_compile_once(tokenizer, tmp_path):
    """Model and tokenizer are really compiled, and after the first step nothing is compiled again."""
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
    assert equal(torch.load(out / "model.pt")["model"], torch.load(tmp_path / "whole/model.pt")["model"])
    columns = [torch.load(folder / "last.pt")["gallery"]["columns"] for folder in (tmp_path / "whole", out)]
    assert [title.split("\n")[0] for title, _ in columns[0]] == ["step 1", "step 7", "step 14", "step 18"]
    assert all(a[0] == b[0] and a[1].equal(b[1]) for a, b in zip(*columns, strict=True))


def test_two_processes_equal_one(tokenizer, tmp_path):
    flags = ["--steps", "8", "--tokenizer", tokenizer]
    finished(start(tmp_path / "two", *flags, processes=2))
    for one, two in zip(train(None, tmp_path / "one", *flags), log(tmp_path / "two"), strict=True):
        assert two == {name: pytest.approx(value, rel=1e-4) for name, value in one.items()}, one["step"]


@pytest.mark.long
def test_two_processes_do_the_whole_job(tmp_path):
    """The tokenizer's first step is the same; later its noise, which each rank draws, differs."""
    finished(start(tmp_path / "two", "--steps", "4", processes=2))
    train(None, tmp_path / "one", "--steps", "4")
    one, two = (log(tmp_path / name / "tokenizer") for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    assert two[0]["kl"] == pytest.approx(one[0]["kl"], rel=1e-4)
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["val_loss"] == pytest.approx(math.log(1024), abs=1)


def test_a_tokenizer_with_one_token_is_refused(tokenizer, tmp_path):
    """Before the first step: otherwise the loss becomes 0 and the accuracy 1."""
    model = weights.load_tokenizer(tokenizer)
    model.encoder.blocks.output.conv.b.data[7] += 1000
    path = tmp_path / "collapsed.pt"
    torch.save({"model": model.state_dict(), "config": model.config, "kind": "DiscreteVAE"}, path)
    with pytest.raises(launch.UserError, match="^--tokenizer: .* all patches of 8 images one token"):
        train(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with mock.patch.object(data.Shapes, "__getitem__", side_effect=folders.BadFile("a.png cannot be read")):
        # not the tokenizer's fault
        with pytest.raises(OSError, match="^--data: 16 images in a row .*: a.png cannot be read"):
            train(path, tmp_path / "out")
