"""Fine-tuning, small: a backbone of two blocks, 32-pixel images of `shapes`."""
import contextlib
import functools
import io
import json
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal, log, start
from conftest import finished as finish
from PIL import Image
from torch import nn

import data
import finetune
import training
import vit
import weights
from training import UserError

CPU = torch.device("cpu")
FP32 = training.Precision("fp32", CPU)
FAST = "--batch-size 12 --precision fp32 --steps 6 --save-every 3 --log-every 1 --lr 1e-3".split()
TASKS = {    # the flags of a run, and the picture that it leaves
    "classification": ("--mixup 0.8 --cutmix 1 --erasing 0.5 --randaugment 9 --ema 0.9 --eval-every 4 "
                       "--save-every 1", "predictions.png"),
    "segmentation": ("--decoder-dim 32", "segments.png"),
    "probe": ("--eval-every 2", "layers.png"),
    "knn": ("--neighbours 5", "layers.png"),
}
MODELS = pytest.mark.parametrize("task", ["classification", "segmentation"])


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", lambda self: 300 if self.split == "train" else 50)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """model.pt of a masked image model with random weights, as pretrain.py leaves it."""
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, dim=16, depth=2, heads=2, layer_scale=0.1)
    model = vit.MaskedImageModel(vit.ViTConfig(**sizes, position="shared_relative"), 64)
    nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    config = {"vit": vars(model.config).copy(), "vocab_size": 64}
    torch.save({"model": model.state_dict(), "config": config, "kind": "MaskedImageModel"}, path)
    return path


def configured(out, *flags):
    argv = ["--out", str(out), *FAST, *map(str, flags)]
    return training.parse(finetune.Config, finetune.PRESETS, argv, finetune.complete)


def run(out, *flags):
    """What finetune.py says with these flags."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        finetune.train(configured(out, *flags), CPU)
    return said.getvalue()


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    """task -> (folder, flags, what was said) of a run that several tests look at."""
    @functools.cache
    def of_task(task):
        out = tmp_path_factory.mktemp(task)
        flags = ["--task", task, "--init", pretrained, *TASKS[task][0].split()]
        return out, flags, run(out, *flags)
    return of_task


@pytest.fixture
def kept(finished):
    """task -> (model, held-out views, classes, config) of its finished run."""
    def of_task(task):
        config = configured(finished(task)[0], "--eval", "--task", task)
        _, views, classes = finetune.open_views(config)
        return finetune.build_model(config, classes).eval(), views, classes, config
    return of_task


# ---- Runs ----

@pytest.mark.parametrize("task, schedule", [
    ("classification", training.warmup_cosine), ("segmentation", finetune.warmup_linear)])
def test_the_learning_rate_follows_the_papers_schedule(finished, task, schedule):
    out, flags, _ = finished(task)
    rates = [schedule(step, 6, 1e-3, configured(out, *flags).min_lr, 0.6) for step in range(6)]
    assert [line["lr"] for line in log(out)] == pytest.approx(rates)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_its_picture_and_is_finished(finished, task):
    out, flags, said = finished(task)
    assert (out / TASKS[task][1]).stat().st_size > 1000 and training.in_words(result(out)) in said
    assert "is finished" in run(out, *flags)


def test_classification_from_pretrained_weights(finished):
    out, _, said = finished("classification")
    lines, report = log(out), result(out)
    assert all(name in said for name in ("fc_norm", "head", "lm_head", "mask_token"))
    assert [line["step"] for line in lines if "val_top1" in line] == [4, 6]
    assert 0 <= report["top1"] == lines[-1]["val_top1"] <= report["top5"] <= 1
    last, before = (torch.load(out / name, weights_only=True) for name in ("last.pt", "previous.pt"))
    groups = last["optimizer"]["param_groups"]
    scales = {round(group["lr"] / lines[-1]["lr"], 6) for group in groups}
    assert scales == {1.0, 0.75, 0.75 ** 2, round(0.75 ** 3, 6)}    # the head, two blocks, the embeddings
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    kept, head = weights.load(out / "model.pt")[0], last["model"]["head.weight"]
    average = 0.9 * before["ema"]["module.head.weight"] + 0.1 * head
    torch.testing.assert_close(last["ema"]["module.head.weight"], average)
    assert torch.equal(kept["head.weight"], last["ema"]["module.head.weight"])
    assert "mask_token" not in kept and not torch.equal(kept["head.weight"], head)


@MODELS
def test_the_kept_model_is_what_was_evaluated(finished, tmp_path, task):
    """And so is a model.pt of the first edition, which held a mask_token too."""
    out, first_edition = finished(task)[0], tmp_path / "model.pt"
    found = torch.load(out / "model.pt", weights_only=True)
    found["model"]["mask_token"] = torch.zeros(1, 1, 16)
    torch.save(found, first_edition)
    for flags in ([], ["--init", first_edition]):
        said = run(out, "--eval", "--task", task, *flags)
        assert training.in_words(result(out)) in said and ("mask_token" in said) == bool(flags)
    model, info = weights.build(first_edition)    # as visualize.py opens it
    assert info["task"] == task and "mask_token" not in model.state_dict()


@pytest.mark.parametrize("killed_at, flags", [
    (4, "--drop-path 0.2 --mixup 0.8 --eval-every 3"), (6, "--task probe --ema 0.5")])
def test_continues_bit_for_bit(pretrained, tmp_path, killed_at, flags):
    flags = ["--init", pretrained, *flags.split()]
    run(tmp_path / "whole", *flags)
    end = training.Run.save_or_stop

    def dies(self, step, **parts):
        end(self, step, **parts)
        if step == killed_at:
            raise KeyboardInterrupt
    with mock.patch.object(training.Run, "save_or_stop", dies), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *flags)
    run(tmp_path / "cut", *flags)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    whole, cut = (torch.load(tmp_path / name / "model.pt")["model"] for name in ("whole", "cut"))
    assert equal(whole, cut)


def test_accumulated_parts_are_one_batch_from_scratch(tmp_path):
    flags = "--init none --image-size 32 --dim 16 --heads 2 --depth 2 --steps 3".split()
    run(tmp_path / "one", *flags)
    run(tmp_path / "three", *flags, "--accumulate", "3", "--checkpoint-blocks")
    for one, three in zip(log(tmp_path / "one"), log(tmp_path / "three"), strict=True):
        assert one == pytest.approx(three, rel=1e-3)


def test_training_mixes_images_and_smooths_labels(pretrained, tmp_path):
    with mock.patch.object(finetune, "loss_of", side_effect=finetune.loss_of) as loss_of:
        run(tmp_path, "--init", pretrained, *"--steps 1 --mixup 0.8 --label-smoothing 0.2".split())
    _, shares, smoothing = loss_of.call_args.args
    assert shares.shape == (12, 10) and smoothing == 0.2


@pytest.mark.parametrize("task, classes, taken", [
    ("classification", data.SHAPES, True), ("classification", "abcdefghij", False),
    ("segmentation", data.SHAPES, False)])
def test_a_classifier_initialises_other_tasks(finished, tmp_path, task, classes, taken):
    first = finished("classification")[0] / "model.pt"
    config = configured(tmp_path, "--init", first, "--task", task, "--checkpoint-blocks")
    model = finetune.build_model(config, list(classes))
    state = weights.load(first)[0]
    assert torch.equal(model.head.weight.flatten(), state["head.weight"].flatten()) == taken
    if task == "segmentation":
        assert (model.norm.weight == 1).all()
    else:
        assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    assert model.checkpoint_blocks


@MODELS
def test_evaluation_counts_each_image_once(kept, monkeypatch, task):
    """One process and the shares of three, in batches that do not divide the images."""
    (model, views, _, config), shares = kept(task), []
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 47)
    evaluate = finetune.evaluate_maps if task == "segmentation" else finetune.evaluate_labels
    monkeypatch.setattr(training, "all_sum", lambda sums: shares[-1].append(sums.flatten().double()) or sums)
    for rank, world_size in ((0, 1), (0, 3), (1, 3), (2, 3)):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        shares.append([])
        evaluate(model, views, config, FP32, CPU)
    alone, *three = map(torch.cat, shares)    # confusion matrix, loss, pixels; or loss, images, top1, top5
    if task == "segmentation":
        assert alone[:-2].sum() == alone[-1] == 47 * 64 * 64
    else:
        assert alone[1] == 47
    torch.testing.assert_close(alone, sum(three), rtol=1e-5, atol=1e-4)


def test_the_picture_shows_what_the_model_predicts(kept):
    model, views, classes, config = kept("classification")
    with mock.patch.object(finetune.visualize, "figure_classes") as figure:
        finetune.draw(model, views, classes, {}, config, FP32, CPU)
    images, labels, probabilities, _ = figure.call_args.args
    expected = model(torch.stack(images)).softmax(-1).detach()
    torch.testing.assert_close(probabilities, expected)
    assert [*labels] == [views.source[i][1] for i in range(12)]


def test_the_maps_that_are_drawn_are_the_models(kept):
    model, views, classes, config = kept("segmentation")
    with mock.patch.object(finetune.visualize, "figure_segments") as figure:
        finetune.draw(model, views, classes, {}, config, FP32, CPU)
    images, maps, predicted, _ = figure.call_args.args
    expected = finetune.segment(model, torch.stack(images), config.window, FP32).argmax(1)
    assert (torch.stack(predicted) == expected).float().mean() > 0.999    # one by one, not in a batch
    assert torch.equal(torch.stack(maps), torch.stack([views[0, i][1] for i in range(12)]))


# ---- By hand ----

def test_mixup_and_cutmix():
    classifier = vit.ImageClassifier(vit.ViTConfig(image_size=16, dim=8, depth=1, heads=2), 5)

    def mixed(seed=0, **alphas):
        config = training.build(finetune.Config, {**dict(mixup=0.0, cutmix=0.0), **alphas})
        torch.manual_seed(seed)
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
        return images, *finetune.mixing(config, classifier)(images, torch.arange(4))

    for off in (dict(), dict(mixup=0.8, task="segmentation")):
        images, same, labels = mixed(**off)
        assert same is images and labels.tolist() == [0, 1, 2, 3]
    images, blended, shares = mixed(mixup=0.8)
    lam, own, other = shares[1, 1].item(), torch.arange(4), torch.arange(4).roll(1)
    torch.testing.assert_close(shares, lam * F.one_hot(own, 5) + (1 - lam) * F.one_hot(other, 5))
    torch.testing.assert_close(blended[:, 0, 0, 0], lam * own + (1 - lam) * other)
    images, pasted, shares = mixed(cutmix=1.0)
    area = (pasted == images).float().mean((1, 2, 3))    # each pixel is one image's or the other's
    torch.testing.assert_close(shares[own, own], area)
    torch.testing.assert_close(shares[own, other], 1 - area)
    assert set(pasted[2].unique().tolist()) <= {1.0, 2.0}
    ways = {len(mixed(seed, mixup=0.8, cutmix=1.0)[1][2].unique()) for seed in range(12)}
    assert ways == {1, 2}    # blended to one value, or two values side by side


def test_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    log_p = logits.log_softmax(-1)[0]
    smoothed = -(0.9 * log_p[0] + 0.1 * log_p.mean())
    torch.testing.assert_close(finetune.loss_of(logits, torch.tensor([0]), 0.1), smoothed)
    torch.testing.assert_close(finetune.loss_of(logits, torch.tensor([[1.0, 0.0, 0.0]]), 0.1), smoothed)
    logits, labels = torch.randn(4, 5, 3, 2), torch.arange(4)    # of probes: the mean of theirs
    losses = [finetune.loss_of(logits[:, :, layer, kind], labels) for layer, kind in np.ndindex(3, 2)]
    torch.testing.assert_close(finetune.loss_of(logits, labels), torch.stack(losses).mean())
    maps = torch.tensor([[[0, 255], [255, 2]]] * 4, dtype=torch.uint8)
    log_p = logits[:, :, :2].log_softmax(1)    # (4, 5, 2, 2), of pixels: 255 is not counted
    counted = -(log_p[:, 0, 0, 0] + log_p[:, 2, 1, 1]).mean() / 2
    torch.testing.assert_close(finetune.loss_of(logits[:, :, :2], maps), counted)
    assert finetune.loss_of(logits[:, :, :2], torch.full_like(maps, 255)) == 0


def test_linear_schedule_by_hand():
    rates = [finetune.warmup_linear(step, 8, 1.0, 0.2, 4) for step in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255], [2, 255, 0]], dtype=torch.uint8)
    guess = torch.tensor([[0, 1, 1], [1, 2, 0], [0, 2, 0]])
    confusion = finetune.confusion_matrix(guess, truth, 4)    # class 3 occurs nowhere
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    scores = finetune.segmentation_scores(confusion)
    assert scores["iou"][:3] == pytest.approx([2 / 4, 2 / 3, 1 / 2]) and math.isnan(scores["iou"][3])
    assert scores["mean_iou"] == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(5 / 7)


# ---- Segmentation ----

class PerPixel(nn.Module):
    """A segmenter of 16x16 pixels whose logits at a pixel depend on that pixel alone."""
    config = vit.ViTConfig(image_size=16, patch_size=4)

    def forward(self, images):
        assert images.shape[-2:] == (16, 16)
        return images * 2


def test_sliding_windows_cover_the_image():
    for window in ("sliding", "whole"):
        assert finetune.segment(PerPixel(), torch.rand(1, 3, 50, 23), window, FP32).shape == (1, 3, 50, 23)
    for h, w, window in ((16, 16, "whole"), (16, 16, "sliding"), (16, 45, "sliding"), (45, 16, "sliding")):
        images = torch.rand(2, 3, h, w)    # not resized
        torch.testing.assert_close(finetune.segment(PerPixel(), images, window, FP32), images * 2)
    starts = finetune.window_starts                                    # a crop of 512 has the stride 341
    assert starts(512, 512) == [0] and starts(513, 512) == [0, 1] and starts(853, 512) == [0, 341]
    assert starts(1024, 512) == [0, 341, 512] and starts(1200, 512) == [0, 341, 682, 688]


def test_ade20k_layout(pretrained, tmp_path):
    """Images of sizes of their own, 60 times as bright as their class: 1 to 3, and 0 for none."""
    ade, rng = tmp_path / "ade", np.random.default_rng(0)
    for split, count in (("training", 15), ("validation", 3)):
        for part in ("images", "annotations"):
            (ade / part / split).mkdir(parents=True)
        for i in range(count):
            classes = rng.integers(0, 4, (3, 4 + i % 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(classes).save(ade / "annotations" / split / f"{i}.png")
            picture = Image.fromarray(60 * classes).convert("RGB")
            picture.save(ade / "images" / split / f"{i}.jpg", quality=100)
    names = "Idx\tRatio\tName\n1\t.1\twall\n2\t.1\tbuilding, edifice\n3\t.1\tsky\n"
    (ade / "objectInfo150.txt").write_text(names)
    flags = ["--init", pretrained, "--data", ade, *"--task segmentation --preset demo --steps 2".split()]
    run(tmp_path / "a", *flags)
    assert list(result(tmp_path / "a")["iou"]) == ["wall", "building", "sky"]
    views, val_views, _ = finetune.open_views(configured(tmp_path / "a", *flags))
    assert (len(views), len(val_views)) == (15, 3)
    seen = set()
    for epoch, index in np.ndindex(4, 15):    # image and map are transformed together
        image, target = views[epoch, index]
        seen |= set(target.unique().tolist())
        assert (image[0] / 60 - 1 - target)[target < 3].abs().mean() < 0.5    # edges are blurred
    assert seen == {0, 1, 2, data.IGNORE}


# ---- Frozen features ----

def test_each_probe_sees_its_layer_and_the_backbone_stays(pretrained):
    model = finetune.LinearProbe(weights.load(pretrained)[1]["config"], 5)
    nn.init.normal_(model.head.weight)
    images = torch.rand(6, 3, 32, 32)
    for batch in images.split(3):
        model.train()(batch)
    logits = model.eval()(images)
    assert logits.shape == (6, 5, 2, 2)
    for layer, h in enumerate(model.hidden_states(images)):
        for kind, feature in enumerate((h[:, 1:].mean(1), h[:, 0])):
            weight = model.head.weight.view(2, 2, 5, 16)[layer, kind]
            feature = (feature - feature.mean(0)) / feature.var(0, correction=0).clamp(min=1e-6).sqrt()
            torch.testing.assert_close(logits[:, :, layer, kind], feature @ weight.t(), atol=1e-3, rtol=1e-3)
    logits[:, :, 1, 0].square().sum().backward()
    touched = model.head.weight.grad.view(2, 2, 5, 16).any(-1).any(-1)
    assert touched.tolist() == [[False, False], [True, False]]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("task", ["probe", "knn"])
def test_frozen_features_are_judged_by_layer(finished, task):
    report = result(finished(task)[0])
    patches, cls = report["top1_by_layer"]["patches"], report["top1_by_layer"]["[S]"]
    assert len(patches) == len(cls) == 2
    assert report["top1"] == max(patches) == patches[report["layer"] - 1]


def test_the_report_names_the_best_layer_of_the_patches():
    accuracy = torch.tensor([[0.25, 1.0], [0.75, 0.5], [0.5, 0.0]])    # (L, 2)
    assert finetune.by_layer(accuracy) == {"top1": 0.75, "layer": 2, "top1_by_layer": {
        "patches": [0.25, 0.75, 0.5], "[S]": [1.0, 0.5, 0.0]}}


def test_probes_of_two_processes_equal_those_of_one(pretrained, tmp_path):
    """Their heads see the same batches, and standardise by the images of both processes."""
    flags = ["--task", "probe", "--init", pretrained, "--steps", 4]
    runs = [start(tmp_path / f"{n}", *flags, script="finetune", processes=n) for n in (1, 2)]
    for run in runs:
        finish(run)
    one, two = (log(tmp_path / f"{n}") for n in (1, 2))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert result(tmp_path / "1") == result(tmp_path / "2")


def test_neighbours_vote_by_the_features_of_each_layer(finished):
    out, flags, _ = finished("knn")
    config = configured(out, *flags)
    views, val_views, _ = finetune.open_views(config)
    model = vit.VisionTransformer(config.backbone).eval()
    weights.initialise(model, config.init)
    known, labels = finetune.extract(model, views, config, FP32, CPU)
    test, truth = finetune.extract(model, val_views, config, FP32, CPU)
    assert truth.tolist() == [val_views.source[i][1] for i in range(50)]
    states = model.hidden_states(data.to_float(val_views[0, 7][0])[None])
    torch.testing.assert_close(test[7, 1, 0].float(), states[1][0, 1:].mean(0), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(test[7, 0, 1].float(), states[0][0, 0], atol=2e-3, rtol=2e-3)
    for kind, accuracy in enumerate(result(out)["top1_by_layer"].values()):
        assert accuracy == [finetune.knn_accuracy(known[:, layer, kind], labels, test[:, layer, kind], truth,
                                                  10, 5) for layer in range(2)]


def test_knn_by_hand():
    lengths, degrees = torch.tensor([1.0, 5, 2, 1, 3]), torch.tensor([0.0, 10, 90, 100, 30])
    known = torch.view_as_real(torch.polar(lengths, degrees.deg2rad()))
    # the nearest three of 20 degrees are 10 and 30, then 0; of 62 degrees: 90 and 30, then 100
    test = torch.view_as_real(torch.polar(torch.tensor([0.05, 3]), torch.tensor([20.0, 62]).deg2rad()))
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert finetune.knn_accuracy(known, labels, test, torch.tensor([0, 1]), 3, 3) == 1
    assert finetune.knn_accuracy(known, labels, test, torch.tensor([1, 0]), 3, 3) == 0
    # all five vote, three of them for 1: still 0, by weight and not by count
    assert finetune.knn_accuracy(known, labels, test[:1], torch.tensor([0]), 2, 5) == 1


def test_processes_share_the_neighbours(monkeypatch):
    """Each process keeps a part of the training images: the nearest of all parts vote."""
    torch.manual_seed(0)
    known, labels = torch.randn(40, 3), torch.arange(40) % 4
    test, truth = torch.randn(30, 3), torch.arange(30) % 4
    alone, other = finetune.knn_accuracy(known, labels, test, truth, 4, 5), []
    monkeypatch.setattr(finetune, "gather", lambda tensor: other.append(tensor) or tensor)
    finetune.knn_accuracy(known[37:], labels[37:], test, truth, 4, 5)    # a process with three images
    monkeypatch.setattr(finetune, "gather", lambda tensor: torch.cat([tensor, other.pop(0)]))
    assert finetune.knn_accuracy(known[:37], labels[:37], test, truth, 4, 5) == alone


# ---- Flags that the data or the checkpoint decide on; more in test_commands.py ----

@pytest.mark.parametrize("flags, message", [
    ("--eval", "--eval: .* no head for --task classification .*: disc, square, .*, bar; but for classes wi"),
    ("--dim 32", "cls_token"),
    ("--layer-scale 0", "gamma_1"),
    ("--task segmentation --preset base-384", "with --task segmentation, not base-384"),
])
def test_wrong_use_is_one_line(pretrained, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(training, "Run", None)    # so that what is not refused does not train
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "a", "--init", pretrained, *flags.split())
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags, expected", [    # tables 13 and 14, appendix D
    ("", dict(epochs=100, batch_size=1024, lr=4e-3, min_lr=1e-6, warmup=20 / 100, layer_decay=0.65, dim=768,
              weight_decay=0.05, drop_path=0.1, clip_grad=0, label_smoothing=0.1, randaugment=9, mixup=0.8,
              cutmix=1, erasing=0.25, image_size=224)),
    ("--preset large", dict(epochs=50, batch_size=1024, warmup=5 / 50, layer_decay=0.75, drop_path=0.2)),
    *[(f"--preset {name}-384", dict(image_size=384, epochs=10, batch_size=512, lr=5e-6, min_lr=5e-6, dim=dim,
                                    weight_decay=1e-8)) for name, dim in (("base", 768), ("large", 1024))],
    *[(f"--preset {name}", dict(epochs=30, batch_size=512, lr=2e-5, warmup=5 / 30, mixup=0, cutmix=0,
                                weight_decay=1e-8, layer_decay=decay, drop_path=drop))
      for name, decay, drop in (("intermediate", 0.85, 0.1), ("intermediate-large", 0.9, 0.4))],
    ("--preset cifar100", dict(epochs=150, batch_size=512, warmup=20 / 150, weight_decay=0.3, erasing=0,
                               layer_decay=0.65, repeats=3, image_size=224, randaugment=9, mixup=0.8)),
    *[(f"--task segmentation --preset {name}", dict(steps=160_000, lr=lr, layer_decay=decay, image_size=512))
      for name, lr, decay in (("intermediate", 3e-5, 0.9), ("intermediate-large", 2e-5, 0.95))],
    ("--task segmentation", dict(steps=160_000, batch_size=16, image_size=512, lr=1e-3, min_lr=0, dim=768,
                                 warmup=1500 / 160_000, layer_decay=0.65, drop_path=0.1, clip_grad=0)),
    *[(f"--task segmentation --preset {name}", dict(steps=160_000, image_size=512, dim=dim))
      for name, dim in (("tiny", 192), ("small", 384), ("large", 1024))],
    ("--task probe --preset large --init MODEL", dict(epochs=50, batch_size=1024, lr=4e-3, weight_decay=1e-4,
                                                      mixup=0, dim=16, position="shared_relative")),
    ("--preset demo --init MODEL", dict(image_size=32, dim=16, position="relative")),
])
def test_presets_are_the_papers(pretrained, flags, expected):
    argv = ["--init", "none", "--data", "x", *flags.replace("MODEL", str(pretrained)).split()]
    config = vars(training.parse(finetune.Config, finetune.PRESETS, argv, finetune.complete))
    assert {name: config[name] for name in expected} == pytest.approx(expected)


# ---- Which samples ----

@pytest.mark.parametrize("flags, count, held_out, augmented", [
    ("", 300, 50, True), ("--validate 30 --labels 20", 20, 30, True), ("--task knn", 300, 50, False),
    ("--task segmentation", 300, 50, True)])
def test_only_training_images_are_augmented(pretrained, tmp_path, flags, count, held_out, augmented):
    config = configured(tmp_path, "--init", pretrained, *flags.split())
    views, val_views, _ = finetune.open_views(config)
    assert (len(views), len(val_views)) == (count, held_out)
    assert torch.equal(views[0, 1][0], views[1, 1][0]) != augmented
    assert torch.equal(val_views[0, 1][0], val_views[1, 1][0])


def ade20k(folder, training, validation):
    """A folder like ADE20K's; the class numbers of its maps, of which each has one."""
    for split, numbers in (("training", training), ("validation", validation)):
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for i, number in enumerate(numbers):
            Image.new("RGB", (40, 40)).save(folder / "images" / split / f"{i}.jpg")
            Image.new("L", (40, 40), number).save(folder / "annotations" / split / f"{i}.png")
    return folder


@pytest.mark.parametrize("training, validation, wrong", [
    ([0, 0, 0], [1], "0 of the classes occur in the training"), ([5, 0, 5], [1], "1 of .* training maps"),
    ([255, 255], [1], "0 of the .* training"), ([1, 2], [0, 255], "0 of the .* in the held-out"),
    ([0, 1, 2], [0, 2], None)])
def test_maps_with_nothing_to_learn_are_refused(pretrained, tmp_path, training, validation, wrong):
    folder = ade20k(tmp_path / "ade", training, validation)
    config = configured(tmp_path, "--init", pretrained, "--data", folder, "--task", "segmentation")
    with pytest.raises(UserError, match=f"^--data: {wrong}") if wrong else contextlib.nullcontext():
        finetune.open_views(config)


def test_one_class_that_is_left_over_is_refused(monkeypatch, tmp_path, pretrained):
    labels = data.Images(["a"] * 40)
    labels.targets, labels.classes = [0] * 39 + [1], ["a", "b"]
    monkeypatch.setattr(data.Images, "__getitem__", lambda source, index: (None, labels.targets[index]))
    monkeypatch.setattr(data, "open_labelled", lambda *args, **options: (labels, labels))
    _, held_out = finetune.split_off(labels, 39)
    assert 39 in held_out.indices
    with pytest.raises(UserError, match="^--data: 1 of the classes occur in the training labels"):
        finetune.open_views(configured(tmp_path, "--init", pretrained, "--data", "cifar10", "--validate", 39))


def test_names_of_any_bytes_and_a_picture_that_fails(pretrained, tmp_path):
    """Weights and result are kept; names are drawn as they are, and printed under a strict stdout."""
    names = [b"Ba$$in", b"over_$10", b"_caf\xe9", "\u5c71".encode(), b"a\\$b"]
    for split, name in ((split, name) for split in (b"train", b"val") for name in names):
        folder = os.path.join(os.fsencode(tmp_path), b"\xffdata", split, name)
        os.makedirs(folder)
        for i in range(4):
            Image.new("RGB", (40, 40), (50 * i, 9, 9)).save(os.path.join(os.fsdecode(folder), f"{i}.png"))
    flags = ["--init", pretrained, "--data", os.fsdecode(os.fsencode(tmp_path) + b"/\xffdata"), "--steps", 1,
             "--eval-every", 1, "--preset", "demo"]
    strict = "sys.stdout.reconfigure(encoding='utf-8', errors='strict')"
    out, err = finish(start(tmp_path / "a", *flags, script="finetune", hurt=strict))
    assert not err and "warning" not in out and (tmp_path / "a" / "predictions.png").exists()
    classes = torch.load(tmp_path / "a" / "model.pt")["config"]["classes"]
    assert sorted(classes) == sorted(["Ba$$in", "over_$10", r"_caf\xe9", "\u5c71", r"a\$b"])
    fails = "import visualize\nvisualize.figure_classes = lambda *args: {}['no picture']"
    out, err = finish(start(tmp_path / "b", *flags, script="finetune", hurt=f"{strict}\n{fails}"))
    assert not err and "warning: the picture could not be drawn (KeyError: 'no picture')" in out
    assert result(tmp_path / "a") == result(tmp_path / "b")


class Numbers(list):
    """39 samples of class index % 4, so that the last class has one less."""
    targets = [index % 4 for index in range(39)]


NUMBERS = Numbers(enumerate(Numbers.targets))


def few(count, seed=0, source=NUMBERS):
    return finetune.few_labels(source, count, "abcd", seed)


def test_split_off_samples_are_kept_from_training():
    rest, held_out = finetune.split_off(NUMBERS, 9)
    assert sorted(rest.indices + held_out.indices) == list(range(39)) and len(held_out) == 9
    assert held_out.indices == finetune.split_off(NUMBERS, 9)[1].indices
    labels = finetune.labels_of(few(8, source=rest))    # of a subset of a subset
    assert np.bincount(labels).tolist() == [2, 2, 2, 2]


def test_few_labels_are_balanced_and_seeded():
    labels = finetune.labels_of(few(12))
    assert np.bincount(labels).tolist() == [3, 3, 3, 3] and len(set(few(12).indices)) == 12
    assert [label for _, label in few(12)] == labels.tolist()
    assert few(12).indices == few(12).indices != few(12, seed=1).indices
    assert sorted(np.bincount(finetune.labels_of(few(14)))) == [3, 3, 4, 4]
    with pytest.raises(UserError, match="--labels: .* of d, which has 9"):
        for seed in range(20):
            few(39, seed)
