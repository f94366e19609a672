"""Fine-tuning, small: a backbone of two blocks, 32-pixel images of `shapes`."""
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal, log
from PIL import Image
from torch import nn

import data
import finetune
import training
import vit
import weights
from training import UserError

CPU = torch.device("cpu")
FAST = ["--batch-size", "12", "--precision", "fp32", "--steps", "6", "--save-every", "3", "--log-every", "1",
        "--lr", "1e-3"]
FP32 = training.Precision("fp32", CPU)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """model.pt of a masked image model with random weights, as pretrain.py leaves it."""
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=2, heads=2, position="shared_relative",
                           layer_scale=0.1)
    model = vit.MaskedImageModel(config, 64)
    nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    config = {"vit": vars(config).copy(), "vocab_size": 64}
    torch.save({"model": model.state_dict(), "config": config, "kind": "MaskedImageModel"}, path)
    return path


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 300 if self.split == "train" else 50)


def configured(out, *flags):
    argv = ["--out", str(out), *FAST, *map(str, flags)]
    return training.parse(finetune.Config, finetune.PRESETS, argv, finetune.complete)


def run(out, *flags):
    finetune.train(configured(out, *flags), CPU)
    return json.loads((out / "result.json").read_text())


# ---- Classification ----

def test_classification_from_pretrained_weights(pretrained, tmp_path, capsys):
    result = run(tmp_path / "a", "--init", pretrained, "--mixup", "0.8", "--cutmix", "1", "--erasing", "0.5",
                 "--randaugment", "9", "--ema", "0.9", "--eval-every", "3")
    said = capsys.readouterr().out
    assert re.search(r"taken from .*ours, masked image modeling.*: \d+ tensors\n", said)
    assert "fc_norm" in said and "new: head; left behind: lm_head, mask_token" in said
    assert 0 <= result["top1"] <= result["top5"] <= 1
    lines = log(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and "val_top1" in lines[2]
    assert (tmp_path / "a" / "predictions.png").stat().st_size > 1000
    assert not any("mask_token" in name for name in weights.load(tmp_path / "a" / "model.pt")[0])


def test_a_head_of_random_weights_is_not_evaluated(pretrained, tmp_path):
    with pytest.raises(UserError, match="--eval: .*no head for --task classification with these 10 classes"):
        finetune.train(configured(tmp_path / "a", "--eval", "--init", pretrained), CPU)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_models_of_the_first_edition(pretrained, tmp_path, task, capsys):
    """Their classifiers and segmenters kept a mask_token; it is left behind."""
    run(tmp_path / "a", "--init", pretrained, "--task", task, "--steps", "2")
    path = tmp_path / "a" / "model.pt"
    found = torch.load(path, weights_only=True)
    found["model"]["mask_token"] = torch.zeros(1, 1, 16)
    torch.save(found, path)
    capsys.readouterr()
    finetune.train(configured(tmp_path / "a", "--eval", "--task", task), CPU)
    assert "left behind: mask_token" in capsys.readouterr().out
    run(tmp_path / "b", "--init", path, "--task", task, "--steps", "1")
    model, info = weights.build(path)    # as visualize.py opens it
    assert info["task"] == task and "mask_token" not in model.state_dict()


def test_learns_labels(pretrained, tmp_path):
    config = configured(tmp_path, "--init", pretrained, "--steps", "1")
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    torch.manual_seed(0)
    model = finetune.build_model(config, list("abcd"))
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.0))
    training.set_lr(optimizer, 1e-2)
    for _ in range(60):
        loss = finetune.loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05 and (model(images).argmax(-1) == labels).all()


@pytest.mark.parametrize("more", ["--drop-path 0.2 --mixup 0.8 --ema 0.5", "--task probe"])
def test_continues_bit_for_bit(pretrained, tmp_path, monkeypatch, more):
    flags = ["--init", pretrained, *more.split()]
    run(tmp_path / "whole", *flags)
    end = training.Run.save_or_stop

    def dies(self, step, **parts):
        end(self, step, **parts)
        if step == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(training.Run, "save_or_stop", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *flags)
    monkeypatch.setattr(training.Run, "save_or_stop", end)
    run(tmp_path / "cut", *flags)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    whole, cut = (torch.load(tmp_path / name / "model.pt")["model"] for name in ("whole", "cut"))
    assert equal(whole, cut)


def test_accumulated_parts_are_one_batch(pretrained, tmp_path):
    run(tmp_path / "one", "--init", pretrained)
    run(tmp_path / "three", "--init", pretrained, "--accumulate", "3", "--checkpoint-blocks")
    for one, three in zip(log(tmp_path / "one"), log(tmp_path / "three"), strict=True):
        assert one["loss"] == pytest.approx(three["loss"], rel=1e-4)


def test_the_kept_model_is_what_was_evaluated(pretrained, tmp_path, capsys):
    result = run(tmp_path / "a", "--init", pretrained)
    capsys.readouterr()
    finetune.train(configured(tmp_path / "a", "--eval"), CPU)
    said = capsys.readouterr().out
    assert f"top1 {result['top1']:.4g}" in said and f"loss {result['loss']:.4g}" in said
    assert "its head among them" in said


def test_from_scratch(tmp_path):
    result = run(tmp_path / "a", "--init", "none", "--image-size", "32", "--dim", "16", "--heads", "2",
                 "--depth", "2")
    assert "top1" in result


def test_a_classifier_initialises_other_tasks(pretrained, tmp_path, capsys):
    run(tmp_path / "a", "--init", pretrained, "--steps", "1")
    first = tmp_path / "a" / "model.pt"
    capsys.readouterr()
    finetune.build_model(configured(tmp_path / "b", "--init", first), list("abcdefghij"))    # other classes
    assert "new: head; left behind: head" in capsys.readouterr().out
    finetune.build_model(configured(tmp_path / "b", "--init", first), list(data.SHAPES))
    assert "its head among them" in capsys.readouterr().out
    model = finetune.build_model(configured(tmp_path / "c", "--init", first, "--task", "segmentation"),
                                 list("abc"))
    said = capsys.readouterr().out
    assert "fc_norm, into norm" in said and "head; left behind: head" in said
    torch.testing.assert_close(model.norm.weight, weights.load(first)[0]["fc_norm.weight"])


def test_evaluation_counts_each_image_once(pretrained, tmp_path, monkeypatch):
    """One process and the shares of three, in batches that do not divide the images."""
    run(tmp_path / "a", "--init", pretrained, "--steps", "2")
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 47)
    config = configured(tmp_path / "a", "--eval")
    _, views, classes = finetune.open_views(config)
    model, shares = finetune.build_model(config, classes), []
    monkeypatch.setattr(training, "all_sum", lambda sums: shares.append(sums) or sums)
    for world_size in (1, 3):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            finetune.evaluate_labels(model, views, config, FP32, CPU)
    alone, *three = shares    # loss, images, top1, top5
    assert alone[1] == 47 and [share[1] for share in three] == [16, 16, 15]
    torch.testing.assert_close(alone, sum(three))


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
    own, other = F.one_hot(torch.arange(4), 5), F.one_hot(partner, 5)
    torch.testing.assert_close(shares, lam * own + (1 - lam) * other)
    torch.testing.assert_close(blended[:, 0, 0, 0], lam * torch.arange(4.0) + (1 - lam) * partner)
    images, pasted, shares = mixed(cutmix=1.0)
    own = (pasted == images).float().mean((1, 2, 3))    # each pixel is one image's or the other's
    torch.testing.assert_close(shares[torch.arange(4), torch.arange(4)], own)
    assert set(pasted[2].unique().tolist()) <= {1.0, 2.0} and shares.sum(1).tolist() == pytest.approx([1] * 4)


def test_smoothed_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    log_p = logits.log_softmax(-1)[0]
    expected = -(0.9 * log_p[0] + 0.1 * log_p.mean())
    torch.testing.assert_close(finetune.loss_of(logits, torch.tensor([0]), 0.1), expected)
    torch.testing.assert_close(finetune.loss_of(logits, torch.tensor([[1.0, 0.0, 0.0]]), 0.1), expected)


def test_linear_schedule_by_hand():
    rates = [finetune.warmup_linear(step, 8, 1.0, 0.2, 4) for step in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


# ---- Segmentation ----

def test_segmentation_writes_its_picture_and_scores(pretrained, tmp_path):
    result = run(tmp_path / "a", "--task", "segmentation", "--init", pretrained)
    assert set(result["iou"]) == {"background", *data.SHAPES} and 0 <= result["mean_iou"] <= 1
    assert (tmp_path / "a" / "segments.png").stat().st_size > 1000


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255], [2, 255, 0]], dtype=torch.uint8)
    guess = torch.tensor([[0, 1, 1], [1, 2, 0], [0, 2, 0]])
    confusion = finetune.confusion_matrix(guess, truth, 4)    # class 3 occurs nowhere
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    scores = finetune.segmentation_scores(confusion)
    assert scores["iou"][:3] == pytest.approx([2 / 4, 2 / 3, 1 / 2]) and math.isnan(scores["iou"][3])
    assert scores["mean_iou"] == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(5 / 7)


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
    model, square = PerPixel(16), torch.rand(2, 3, 16, 16)
    for window in ("sliding", "whole"):
        torch.testing.assert_close(finetune.segment(model, square, window, FP32), model(square))
        assert finetune.segment(model, torch.rand(1, 3, 50, 23), window, FP32).shape == (1, 4, 50, 23)
    for images in (torch.rand(1, 3, 16, 45), torch.rand(1, 3, 45, 16)):    # covered, not resized
        expected = torch.cat([images, images.sum(1, keepdim=True)], 1)
        torch.testing.assert_close(finetune.segment(model, images, "sliding", FP32), expected)
    assert finetune.window_starts(16, 16) == [0] and finetune.window_starts(17, 16) == [0, 1]
    starts = finetune.window_starts(45, 16)
    assert starts[0] == 0 and starts[-1] == 29 and max(b - a for a, b in zip(starts, starts[1:])) <= 11


def test_ade20k_layout(pretrained, tmp_path):
    """Images of sizes of their own, classes 1 to 3 and 0 for none."""
    ade, rng = tmp_path / "ade", np.random.default_rng(0)
    for split, count in (("training", 5), ("validation", 1)):
        for part in ("images", "annotations"):
            (ade / part / split).mkdir(parents=True)
        for i, (w, h) in enumerate(((40, 30), (33, 64), (50, 50)) * count):
            picture = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
            classes = rng.integers(0, 4, (h, w), dtype=np.uint8)
            Image.fromarray(picture).save(ade / "images" / split / f"{i}.jpg")
            Image.fromarray(classes).save(ade / "annotations" / split / f"{i}.png")
    names = "Idx\tRatio\tName\n1\t.1\twall\n2\t.1\tbuilding, edifice\n3\t.1\tsky\n"
    (ade / "objectInfo150.txt").write_text(names)
    source, held_out = data.open_labelled(str(ade), "", maps=True)
    raw = np.array(Image.open(source.maps[0]))
    np.testing.assert_array_equal(source[0][1], np.where(raw == 0, data.IGNORE, raw.astype(int) - 1))
    assert (len(source), len(held_out)) == (15, 3)
    result = run(tmp_path / "a", "--task", "segmentation", "--preset", "segmentation-demo", "--data", ade,
                 "--init", pretrained)
    assert set(result["iou"]) == {"wall", "building", "sky"}
    (ade / "annotations" / "training" / "3.png").unlink()
    with pytest.raises(UserError, match="1 images have no map"):
        data.open_labelled(str(ade), "", maps=True)


class Steps(torch.utils.data.Dataset):
    """An image that is bright where its map is 1."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        classes = (np.add.outer(np.arange(60), np.arange(80) // 16 * 16) // 30).clip(0, 1).astype(np.uint8)
        return Image.fromarray(np.where(classes == 1, 200, 50).astype(np.uint8)).convert("RGB"), classes


def test_image_and_map_are_transformed_together():
    transform = data.segmentation_transform(32, train=True, scale=(0.5, 2.0), jitter=0.0)
    views, seen = data.Labelled(Steps(), transform), set()
    for epoch in range(40):
        image, target = views[epoch, 0]
        assert image.shape == (3, 32, 32) and target.shape == (32, 32)
        assert image.dtype == target.dtype == torch.uint8
        seen |= set(target.unique().tolist())
        agree = (image[0].float() > 125) == (target == 1)
        assert agree[target != data.IGNORE].float().mean() > 0.85    # all but pixels on an edge
    assert seen == {0, 1, data.IGNORE}
    first, again, other = views[3, 0][0], views[3, 0][0], views[4, 0][0]
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- Frozen features ----

@pytest.mark.parametrize("task", ["probe", "knn"])
def test_probes(pretrained, tmp_path, task):
    result = run(tmp_path / "a", "--task", task, "--init", pretrained, "--eval-every", "2")
    by_layer = result["top1_by_layer"]
    assert list(by_layer) == ["patches", "[S]"] and len(by_layer["patches"]) == len(by_layer["[S]"]) == 2
    assert result["top1"] == max(by_layer["patches"]) == by_layer["patches"][result["layer"] - 1]
    assert (tmp_path / "a" / "layers.png").exists()


def test_each_probe_sees_its_layer_and_the_backbone_stays(pretrained):
    model = finetune.LinearProbe(weights.load(pretrained)[1]["config"], 5)
    nn.init.normal_(model.head.weight)
    images = torch.rand(3, 3, 32, 32)
    model.train()(images)
    logits = model.eval()(images)
    assert logits.shape == (3, 5, 2, 2)
    for layer, h in enumerate(model.hidden_states(images)):
        for kind, feature in enumerate((h[:, 1:].mean(1), h[:, 0])):
            weight = model.head.weight.view(2, 2, 5, 16)[layer, kind]
            feature = (feature - feature.mean(0)) / feature.var(0, correction=0).clamp(min=1e-6).sqrt()
            expected = feature @ weight.t()
            torch.testing.assert_close(logits[:, :, layer, kind], expected, atol=1e-4, rtol=1e-4)
    logits[:, :, 1, 0].square().sum().backward()
    touched = model.head.weight.grad.view(2, 2, 5, 16).any(-1).any(-1)
    assert touched.tolist() == [[False, False], [True, False]]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_the_loss_of_probes_is_the_mean_of_theirs():
    logits, labels = torch.randn(4, 5, 3, 2), torch.arange(4)
    losses = [F.cross_entropy(logits[:, :, layer, kind], labels, label_smoothing=0.1)
              for layer in range(3) for kind in range(2)]
    torch.testing.assert_close(finetune.loss_of(logits, labels, 0.1), torch.stack(losses).mean())


def test_features_are_those_of_each_layer(pretrained, tmp_path):
    config = configured(tmp_path, "--task", "knn", "--init", pretrained)
    _, views, _ = finetune.open_views(config)
    model = vit.VisionTransformer(config.backbone)
    weights.initialise(model, config.init)
    with torch.no_grad():
        features, labels = finetune.extract(model.eval(), views, config, FP32, CPU)
        states = model.hidden_states(data.to_float(views[0, 7][0])[None])
    assert features.shape == (50, 2, 2, 16) and labels.tolist() == [views.source[i][1] for i in range(50)]
    torch.testing.assert_close(features[7, 1, 0].float(), states[1][0, 1:].mean(0), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(features[7, 0, 1].float(), states[0][0, 0], atol=2e-3, rtol=2e-3)


def at(*degrees):
    """(n, 2), on the unit circle."""
    angle = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_knn_by_hand():
    known = at(0.0, 10.0, 90.0, 100.0, 30.0) * torch.tensor([[1.0], [5.0], [2.0], [1.0], [3.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    test = at(20.0, 62.0)    # the nearest two of 20 degrees: 10 (0), 30 (1), tied; of 62: 90 (1), 30 (1)
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
    (["--labels", "299"], "--labels: 299 are "),
    (["--validate", "300"], "--validate: from 1 to 299, not 300"),
    (["--dim", "32"], "cls_token"),
    (["--layer-scale", "0"], "gamma_1"),
    (["--task", "segmentation", "--preset", "base-384"], "with --task segmentation, not base-384"),
])
def test_wrong_use_is_one_line(pretrained, tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        run(tmp_path / "a", "--init", pretrained, *flags)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_without_pretrained_weights_the_command_that_makes_them_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/pretrain-shapes/model.pt is not there; `python pretrain.py` "):
        training.parse(finetune.Config, finetune.PRESETS, [], finetune.complete)
    flags = ["--eval", "--task", "segmentation"]
    with pytest.raises(UserError, match="`python finetune.py --task segmentation`"):
        training.parse(finetune.Config, finetune.PRESETS, flags, finetune.complete)


def test_the_papers_presets(pretrained):
    def preset(*flags):
        flags = ["--data", "x", *flags] if "--init" in flags else ["--init", "none", "--data", "x", *flags]
        return training.parse(finetune.Config, finetune.PRESETS, flags, finetune.complete)

    base, large, ade = preset(), preset("--preset", "large"), preset("--task", "segmentation")
    assert (base.epochs, base.batch_size, base.layer_decay) == (100, 1024, 0.65)
    assert base.warmup * base.epochs == 20
    assert (base.mixup, base.cutmix, base.erasing, base.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert 2e-3 <= base.lr <= 5e-3
    assert (large.epochs, large.layer_decay, large.warmup * large.epochs) == (50, 0.75, 5)
    assert (ade.steps, ade.batch_size, ade.image_size, ade.lr, ade.min_lr) == (160_000, 16, 512, 1e-3, 0)
    assert ade.warmup * ade.steps == 1500 and preset("--preset", "base-384").image_size == 384
    probe = preset("--task", "probe", "--init", str(pretrained), "--preset", "large")
    assert (probe.epochs, probe.batch_size, probe.lr, probe.weight_decay) == (50, 1024, 4e-3, 1e-4)
    assert probe.dim == 16 and probe.position == "shared_relative"     # from the file
    for name in ("tiny", "small", "base", "large"):
        config = preset("--task", "segmentation", "--preset", name)
        assert config.image_size == 512 and config.dim == vit.PRESETS[name].dim


# ---- Which samples ----

class Numbers(torch.utils.data.Dataset):
    """39 samples of class index % 4, so that the last class has one less."""
    classes, targets = ["a", "b", "c", "d"], [index % 4 for index in range(39)]

    def __len__(self):
        return 39

    def __getitem__(self, index):
        return None, index % 4


def test_split_off_samples_are_kept_from_training():
    rest, kept = finetune.split_off(Numbers(), 9)
    assert sorted(rest.indices + kept.indices) == list(range(39)) and len(kept) == 9
    assert kept.indices == finetune.split_off(Numbers(), 9)[1].indices and kept[3][1] == kept.indices[3] % 4
    few = finetune.few_labels(rest, 8, Numbers.classes, 0)                 # a subset of a subset
    assert np.bincount(finetune.labels_of(few)).tolist() == [2, 2, 2, 2]
    assert not set(kept.indices) & {rest.indices[i] for i in few.indices}
    with pytest.raises(UserError, match="--validate: from 1 to 38, not 39"):
        finetune.split_off(Numbers(), 39)


def test_few_labels_are_balanced_and_seeded():
    def few(count, seed=0):
        return finetune.few_labels(Numbers(), count, Numbers.classes, seed)
    labels = finetune.labels_of(few(12))
    assert np.bincount(labels).tolist() == [3, 3, 3, 3] and len(set(few(12).indices)) == 12
    assert [few(12)[i][1] for i in range(12)] == labels.tolist()
    assert few(12).indices == few(12).indices != few(12, seed=1).indices
    assert sorted(np.bincount(finetune.labels_of(few(14))).tolist()) == [3, 3, 4, 4]
    with pytest.raises(UserError, match="--labels: from 4, one a class, to 39, not 3"):
        few(3)
    with pytest.raises(UserError, match="--labels: .* of d, which has 9"):
        for seed in range(20):
            few(39, seed)
