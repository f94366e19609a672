"""Fine-tuning, small: a backbone of two blocks, 32-pixel images of `shapes`."""
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import finetune
import training
import vit
import weights
from conftest import ROOT
from training import UserError

CPU = torch.device("cpu")
FAST = ["--batch-size", "12", "--precision", "fp32", "--steps", "6", "--save-every", "3", "--log-every", "1", "--lr", "1e-3"]
FP32 = training.Precision("fp32", CPU)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """model.pt of a masked image model with random weights, as pretrain.py leaves it."""
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=2, heads=2, position="shared_relative", layer_scale=0.1)
    model = vit.MaskedImageModel(config, 64)
    nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    torch.save({"model": model.state_dict(), "config": {"vit": vars(config).copy(), "vocab_size": 64}, "kind": "MaskedImageModel"}, path)
    return path


@pytest.fixture(autouse=True)
def few_held_out_images(monkeypatch):
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 300 if self.split == "train" else 50)


def configured(out, *flags):
    return training.parse(finetune.Config, finetune.PRESETS, ["--out", str(out), *FAST, *map(str, flags)], finetune.complete)


def run(out, *flags):
    finetune.train(configured(out, *flags), CPU)
    return json.loads((out / "result.json").read_text())


def log(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


# classification ------------------------------------------------------------------------------------------------------

def test_classification_from_pretrained_weights(pretrained, tmp_path, capsys):
    result = run(tmp_path / "a", "--init", pretrained, "--mixup", "0.8", "--cutmix", "1", "--erasing", "0.5", "--randaugment", "9",
                 "--ema", "0.9", "--eval-every", "3")
    said = capsys.readouterr().out
    assert re.search(r"taken from .*ours, masked image modeling, ?.*\): 38 tensors|taken from .*: \d+ tensors", said)
    assert "the shared position table, into one for each block; norm, into fc_norm" in said
    assert re.search(r"new: head; left behind: lm_head", said) or re.search(r"new: head; left behind: .*lm_head", said)
    assert 0 <= result["top1"] <= result["top5"] <= 1 and result["unreadable_images"] == 0
    assert [line["step"] for line in log(tmp_path / "a")] == [1, 2, 3, 4, 5, 6] and "val_top1" in log(tmp_path / "a")[2]
    assert (tmp_path / "a" / "predict.png").stat().st_size > 1000


def test_a_head_of_random_weights_is_not_evaluated(pretrained, tmp_path):
    with pytest.raises(UserError, match="--eval: .*model.pt has no head for --task classification with these 10 classes"):
        finetune.train(configured(tmp_path / "a", "--eval", "--init", pretrained), CPU)


@pytest.mark.parametrize("flags, message", [
    (["--task", "probe", "--preset", "base"], "--preset: --task probe has its own, not base"),
    (["--task", "segmentation", "--preset", "base-384"], "--preset: one of .*base, .*with --task segmentation, not base-384")])
def test_presets_of_another_task_are_refused(pretrained, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        configured(tmp_path, "--init", pretrained, *flags)


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_each_size_has_a_recipe_for_segmentation(pretrained, tmp_path, name):
    config = configured(tmp_path, "--init", "none", "--task", "segmentation", "--preset", name)
    assert config.preset == f"segmentation-{name}" and config.image_size == 512 and config.dim == vit.PRESETS[name].dim


@pytest.mark.parametrize("task", ["probe", "knn"])
def test_features_of_unreadable_images_stop_the_run(pretrained, tmp_path, task):
    for path in (tmp_path / "images" / split / label / f"{i}.png" for split in ("train", "val") for label in "ab" for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"nothing") if path.stem in "01" else Image.new("RGB", (32, 32), path.parent.name == "a" and "red" or "blue").save(path)
    with pytest.raises(UserError, match="--data: more than 1 % of the images of an epoch cannot be read"):
        finetune.train(configured(tmp_path / "a", "--init", pretrained, "--task", task, "--data", tmp_path / "images"), CPU)
    assert not (tmp_path / "a" / "result.json").exists()


def test_learns_labels(pretrained, tmp_path):
    config = configured(tmp_path, "--init", pretrained, "--steps", "1")
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    torch.manual_seed(0)
    model = finetune.build_model(config, list("abcd"))
    optimizer = training.adamw(training.parameter_groups(model, 0.0))
    training.set_lr(optimizer, 1e-2)
    for _ in range(60):
        loss = finetune.loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05 and (model(images).argmax(-1) == labels).all()


def test_continues_bit_for_bit(pretrained, tmp_path, monkeypatch):
    flags = ["--init", pretrained, "--drop-path", "0.2", "--mixup", "0.8", "--ema", "0.5"]
    run(tmp_path / "whole", *flags)
    end = training.Run.end_of_step

    def dies(self, step, **parts):
        end(self, step, **parts)
        if step == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(training.Run, "end_of_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *flags)
    monkeypatch.setattr(training.Run, "end_of_step", end)
    run(tmp_path / "cut", *flags)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    whole, cut = (weights.load(tmp_path / name / "model.pt")[0] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_accumulated_parts_are_one_batch(pretrained, tmp_path):
    run(tmp_path / "one", "--init", pretrained)
    run(tmp_path / "three", "--init", pretrained, "--accumulate", "3", "--checkpoint-blocks")
    for one, three in zip(log(tmp_path / "one"), log(tmp_path / "three")):
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-4)


def test_the_kept_model_is_what_was_evaluated(pretrained, tmp_path, capsys):
    result = run(tmp_path / "a", "--init", pretrained)
    capsys.readouterr()
    finetune.train(configured(tmp_path / "a", "--eval"), CPU)
    said = capsys.readouterr().out
    assert f"top1 {result['top1']:.4g}" in said and f"loss {result['loss']:.4g}" in said and "its head among them" in said


def test_from_scratch(tmp_path):
    assert "top1" in run(tmp_path / "a", "--init", "none", "--image-size", "32", "--dim", "16", "--heads", "2", "--depth", "2")


def test_a_classifier_initialises_other_tasks(pretrained, tmp_path, capsys):
    run(tmp_path / "a", "--init", pretrained)
    first = tmp_path / "a" / "model.pt"
    capsys.readouterr()
    finetune.build_model(configured(tmp_path / "b", "--init", first), list("abcdefghij"))       # as many classes, other ones
    assert "new: head; left behind: head" in capsys.readouterr().out
    finetune.build_model(configured(tmp_path / "b", "--init", first), list(data.SHAPES))
    assert "its head among them" in capsys.readouterr().out
    model = finetune.build_model(configured(tmp_path / "c", "--init", first, "--task", "segmentation"), list("abc"))
    said = capsys.readouterr().out
    assert "fc_norm, into norm" in said and "head; left behind: head" in said
    state = weights.load(first)[0]
    torch.testing.assert_close(model.norm.weight, state["fc_norm.weight"])


def test_evaluation_counts_each_image_once(pretrained, tmp_path, monkeypatch):
    """One process and three, and batches that do not divide the images."""
    run(tmp_path / "a", "--init", pretrained, "--steps", "2")
    script = ("import sys, torch, data, finetune, training, json\n"
              "data.Shapes.__len__ = lambda self: 47\n"
              "counted = []\n"
              "config = training.parse(finetune.Config, finetune.PRESETS, sys.argv[1:], finetune.complete)\n"
              "with training.processes(config) as device:\n"
              "    views = finetune.open_views(config)[1]\n"
              "    model = finetune.build_model(config, views.source.classes)\n"
              "    report = finetune.evaluate(model, views, config, training.Precision('fp32', device), device, data.CorruptImages(47, print))\n"
              "    training.say('REPORT', json.dumps(report))\n")
    (tmp_path / "script.py").write_text(script)
    flags = ["--eval", "--out", str(tmp_path / "a"), "--batch-size", "12"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(tmp_path / "script.py"), *flags],
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 47)
    config = training.parse(finetune.Config, finetune.PRESETS, flags, finetune.complete)
    views = finetune.open_views(config)[1]
    alone = finetune.evaluate(finetune.build_model(config, views.source.classes), views, config, FP32, CPU, data.CorruptImages(47, print))
    reports = [alone, json.loads(done.stdout.split("REPORT ")[1])]
    assert reports[0]["top1"] == reports[1]["top1"] and reports[0]["top5"] == reports[1]["top5"]
    assert (reports[0]["top1"] * 47) == pytest.approx(round(reports[0]["top1"] * 47))
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-6)


def test_mixup_and_cutmix():
    def mixed(**alphas):
        config = training.build(finetune.Config, {**dict(mixup=0.0, cutmix=0.0), **alphas})
        torch.manual_seed(0)
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
        return images, *finetune.mixing(config, 5)(images, torch.arange(4))
    images, same, labels = mixed()
    assert same is images and labels.tolist() == [0, 1, 2, 3]
    images, blended, shares = mixed(mixup=0.8)
    partner = (torch.arange(4) - 1) % 4
    lam = shares[1, 1].item()
    assert 0 < lam < 1
    torch.testing.assert_close(shares, lam * F.one_hot(torch.arange(4), 5) + (1 - lam) * F.one_hot(partner, 5))
    torch.testing.assert_close(blended[:, 0, 0, 0], lam * torch.arange(4.0) + (1 - lam) * partner)
    images, pasted, shares = mixed(cutmix=1.0)
    own = (pasted == images).float().mean((1, 2, 3))                   # each pixel is one image's or the other's
    torch.testing.assert_close(shares[torch.arange(4), torch.arange(4)], own)
    assert set(pasted[2].unique().tolist()) <= {1.0, 2.0} and shares.sum(1).tolist() == pytest.approx([1] * 4)


def test_smoothed_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    log_p = logits.log_softmax(-1)[0]
    expected = -(0.9 * log_p[0] + 0.1 * log_p.mean())
    torch.testing.assert_close(finetune.loss_of(logits, torch.tensor([0]), 0.1), expected)
    torch.testing.assert_close(finetune.loss_of(logits, torch.tensor([[1.0, 0.0, 0.0]]), 0.1), expected)


# segmentation --------------------------------------------------------------------------------------------------------

def test_segmentation_writes_its_picture_and_scores(pretrained, tmp_path):
    result = run(tmp_path / "a", "--task", "segmentation", "--init", pretrained)
    assert set(result["iou"]) == {"background", *data.SHAPES} and 0 <= result["mean_iou"] <= 1
    assert (tmp_path / "a" / "segments.png").stat().st_size > 1000


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255], [2, 255, 0]], dtype=torch.uint8)
    guess = torch.tensor([[0, 1, 1], [1, 2, 0], [0, 2, 0]])
    confusion = finetune.confusion_matrix(guess, truth, 4)             # class 3 occurs nowhere
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    scores = finetune.segmentation_scores(confusion)
    assert scores["iou"][:3] == pytest.approx([2 / 4, 2 / 3, 1 / 2]) and math.isnan(scores["iou"][3])
    assert scores["mean_iou"] == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3) and scores["pixel_accuracy"] == pytest.approx(5 / 7)


def test_ignored_pixels_do_not_count():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    targets = torch.tensor([[[0, 255], [255, 2]]], dtype=torch.uint8)
    log_p = logits.log_softmax(1)
    loss = finetune.loss_of(logits, targets)
    torch.testing.assert_close(loss, -(log_p[0, 0, 0, 0] + log_p[0, 2, 1, 1]) / 2)
    loss.backward()
    assert not logits.grad[0, :, 0, 1].any() and logits.grad[0, :, 0, 0].any()
    assert finetune.loss_of(logits, torch.full((1, 2, 2), 255, dtype=torch.uint8)) == 0


class PerPixel(nn.Module):
    """A segmenter whose logits at a pixel depend on that pixel alone."""

    def __init__(self, size):
        super().__init__()
        self.config = vit.ViTConfig(image_size=size, patch_size=4)

    def forward(self, images):
        assert images.shape[-2:] == self.config.image_hw
        return torch.cat([images, images.sum(1, keepdim=True)], dim=1)


def test_sliding_window():
    model = PerPixel(16)
    square = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(finetune.segment(model, square, "sliding", FP32), model(square))
    torch.testing.assert_close(finetune.segment(model, square, "whole", FP32), model(square))
    wide = torch.rand(1, 3, 16, 45)                                    # as high as the window: only covered, not resized
    torch.testing.assert_close(finetune.segment(model, wide, "sliding", FP32), torch.cat([wide, wide.sum(1, keepdim=True)], 1))
    for window in ("sliding", "whole"):
        assert finetune.segment(model, torch.rand(1, 3, 50, 23), window, FP32).shape == (1, 4, 50, 23)
    assert finetune.window_starts(16, 16) == [0] and finetune.window_starts(17, 16) == [0, 1]
    starts = finetune.window_starts(45, 16)
    assert starts[0] == 0 and starts[-1] == 29 and max(b - a for a, b in zip(starts, starts[1:])) <= 11


@pytest.fixture
def ade20k(tmp_path):
    """Three images of sizes of their own, classes 1 to 3 and 0 for none."""
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            (tmp_path / "ade" / part / split).mkdir(parents=True)
        for i, (w, h) in enumerate(((40, 30), (33, 64), (50, 50)) * (5 if split == "training" else 1)):
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / "ade" / "images" / split / f"{i}.jpg")
            Image.fromarray(rng.integers(0, 4, (h, w), dtype=np.uint8)).save(tmp_path / "ade" / "annotations" / split / f"{i}.png")
    return tmp_path / "ade"


def test_ade20k_layout(pretrained, tmp_path, ade20k):
    (ade20k / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbuilding, edifice\n3\t0.1\tsky\n")
    source, held_out = data.open_labelled(str(ade20k), "", maps=True)
    assert source.classes == held_out.classes == ["wall", "building", "sky"] and len(source) == 15
    raw = np.array(Image.open(ade20k / "annotations" / "training" / "0.png"))
    np.testing.assert_array_equal(source.target(0), np.where(raw == 0, 255, raw.astype(int) - 1))
    result = run(tmp_path / "a", "--task", "segmentation", "--preset", "segmentation-demo", "--data", ade20k, "--init", pretrained)
    assert set(result["iou"]) == {"wall", "building", "sky"}
    (ade20k / "annotations" / "training" / "3.png").unlink()
    with pytest.raises(ValueError, match="1 images have no map"):
        data.open_labelled(str(ade20k), "", maps=True)


def test_image_and_map_are_transformed_together():
    class Steps:
        classes = ["a", "b"]
        def __len__(self): return 1
        def image(self, index): return Image.fromarray(np.where(self.target(0)[..., None] == 1, 200, 50).repeat(3, 2).astype(np.uint8))
        def target(self, index): return np.add.outer(np.arange(60), np.arange(80) // 16 * 16).__floordiv__(30).clip(0, 1).astype(np.uint8)
        def name(self, index): return "steps"
    views = data.Labelled(Steps(), data.segmentation_transform(32, train=True, scale=(0.5, 2.0), jitter=0.0))
    seen = set()
    for epoch in range(40):
        image, target, _ = views[epoch, 0]
        assert image.shape == (3, 32, 32) and target.shape == (32, 32) and image.dtype == target.dtype == torch.uint8
        seen |= set(target.unique().tolist())
        agree = (image[0].float() > 125) == (target == 1)
        assert agree[target != 255].float().mean() > 0.85              # all but pixels on an edge
    assert seen == {0, 1, 255}
    first, again, other = views[3, 0][0], views[3, 0][0], views[4, 0][0]
    assert torch.equal(first, again) and not torch.equal(first, other)


# probes --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["probe", "knn"])
def test_probes(pretrained, tmp_path, task, monkeypatch):
    result = run(tmp_path / "a", "--task", task, "--init", pretrained)
    assert set(result["top1_by_layer"]) == {"patches", "[S]"} and len(result["top1_by_layer"]["patches"]) == 2
    assert (tmp_path / "a" / "layers.png").exists()
    (tmp_path / "a" / "result.json").unlink()
    monkeypatch.setattr(finetune, "extract", None)                     # the features are there already
    assert run(tmp_path / "a", "--task", task, "--init", pretrained) == result


def test_features_are_those_of_each_layer(pretrained, tmp_path):
    config = configured(tmp_path, "--task", "probe", "--init", pretrained)
    views, val_views = finetune.open_views(config)
    model = vit.VisionTransformer(config.backbone)
    weights.initialise(model, config.init)
    features, labels = finetune.extract(model.eval(), val_views, config, FP32, CPU)
    assert features.shape == (50, 2, 2, 16) and labels.tolist() == [val_views.source.target(i) for i in range(50)]
    states = model.hidden_states(data.to_float(val_views[0, 7][0])[None])
    torch.testing.assert_close(features[7, 1, 0].float(), states[1][0, 1:].mean(0), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(features[7, 0, 1].float(), states[0][0, 0], atol=2e-3, rtol=2e-3)


def test_linear_probe_separates_what_is_separable(tmp_path, pretrained):
    torch.manual_seed(0)
    labels = torch.arange(200) % 3
    features = torch.randn(200, 2, 2, 8)
    features[:, 1, 0, :3] += 6 * F.one_hot(labels, 3)                  # only the second layer's patches know the class
    config = configured(tmp_path, "--task", "probe", "--init", pretrained, "--steps", "200", "--lr", "1e-2", "--batch-size", "100")
    accuracy = finetune.linear_accuracy(features[:150], labels[:150], features[150:], labels[150:], 3, config)
    assert accuracy[1, 0] > 0.95 and accuracy[0].max() < 0.6 and accuracy[1, 1] < 0.6


def test_knn_by_hand():
    angle = torch.tensor([0.0, 10.0, 90.0, 100.0, 30.0]) * math.pi / 180
    known = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None, :] * torch.tensor([1.0, 5.0, 2.0, 1.0, 3.0]).view(5, 1, 1, 1)
    labels = torch.tensor([0, 0, 1, 1, 1])
    asked = torch.tensor([20.0, 62.0]) * math.pi / 180
    test = torch.stack([asked.cos(), asked.sin()], -1)[:, None, None, :]
    # 20 degrees: neighbours 10 (0), 30 (1), 0 (0); equal similarity of the first two, the third decides: 0.
    # 62 degrees: neighbours 90 (1), 30 (1), 100 (1) -> 1
    assert finetune.knn_accuracy(known, labels, test, torch.tensor([0, 1]), 2, 3).item() == 1
    assert finetune.knn_accuracy(known, labels, test, torch.tensor([1, 0]), 2, 3).item() == 0
    # all five vote at 20 degrees, 7.4 % of the weight more for each hundredth of similarity: still 0, by weight and not by count
    assert finetune.knn_accuracy(known, labels, test[:1], torch.tensor([0]), 2, 5).item() == 1


# the command line ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--init", "gone.pt"], "--init: gone.pt does not exist"),
    (["--labels", "3"], "--labels: from 10, one a class, to 300, not 3"),
    (["--labels", "299"], "--labels: 299 are "),
    (["--validate", "300"], "--validate: from 1 to 299, not 300"),
    (["--task", "segmentation", "--labels", "50"], "--labels: maps have no one class"),
    (["--task", "segmentation", "--data", "cifar10"], "--data: cifar10 has no maps"),
    (["--init", "none", "--task", "probe"], "--init: none leaves nothing to look at"),
    (["--init", "none", "--eval"], "--init: none leaves nothing to evaluate"),
    (["--patch-size", "4"], "patch_embed.proj.weight is 16x3x8x8 there and 16x3x4x4 in the model"),
    (["--position", "absolute"], "--position shared_relative fits"),
    (["--dim", "32"], "is 1x1x16 there and 1x1x32 in the model"),
    (["--layer-scale", "0"], "and the model has not"),
    (["--scale", "2", "1"], "--scale: two numbers above 0"),
    (["--layer-decay", "1.5"], "--layer-decay: above 0, up to 1"),
    (["--data", "."], "needs train/ and val/"),
])
def test_wrong_use_is_one_line(pretrained, tmp_path, flags, message):
    init = [] if "--init" in flags else ["--init", pretrained]
    with pytest.raises(UserError) as error:
        run(tmp_path / "a", *init, *flags)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_without_pretrained_weights_the_command_that_makes_them_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/pretrain-shapes/model.pt is not there; `python pretrain.py` makes it"):
        training.parse(finetune.Config, finetune.PRESETS, [], finetune.complete)
    with pytest.raises(UserError, match="python finetune.py --task segmentation"):
        training.parse(finetune.Config, finetune.PRESETS, ["--eval", "--task", "segmentation"], finetune.complete)


def test_the_papers_presets(pretrained):
    def preset(*flags):
        config = training.parse(finetune.Config, finetune.PRESETS, ["--init", "none", "--data", "x", *flags], finetune.complete)
        return config
    base, large, ade = preset(), preset("--preset", "large"), preset("--task", "segmentation")
    assert (base.epochs, base.batch_size, base.layer_decay, base.warmup * base.epochs) == (100, 1024, 0.65, 20)
    assert 2e-3 <= base.lr <= 5e-3 and (base.mixup, base.cutmix, base.erasing, base.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert (large.epochs, large.layer_decay, large.dim, large.depth, large.warmup * large.epochs) == (50, 0.75, 1024, 24, 5)
    assert (ade.steps, ade.batch_size, ade.image_size, ade.lr, ade.min_lr, ade.warmup * ade.steps) == (160_000, 16, 512, 1e-3, 0, 1500)
    assert preset("--preset", "base-384").image_size == 384
