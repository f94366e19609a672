"""Segmentation: small runs, of two blocks on 32-pixel images of `shapes`, and parts by hand."""
import contextlib
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import evaluate_in_processes, log, result, small_args, train_small
from PIL import Image
from torch import nn

import data
import run
import segment
import vit
import weights
from launch import UserError, format_metrics
from pretrained import open_checkpoint

CPU = torch.device("cpu")
FP32 = SimpleNamespace(precision="fp32")    # the flags that an evaluation reads
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def segmented(few_images, pretrained, tmp_path_factory):
    """(folder, flags, printed text) of a finished run that several tests look at."""
    out = tmp_path_factory.mktemp("segmented")
    flags = ["--init", pretrained, "--decoder-dim", 32]
    return out, flags, train_small(segment, out, *flags)


@pytest.fixture
def evaluated(segmented):
    """(model, held-out views, classes, args) of that run."""
    args = small_args(segment, segmented[0], "--eval")
    open_checkpoint(args, evaluate=True)
    _, views, classes = segment.open_datasets(args)
    return weights.build(segmented[0] / "model.pt")[0], views, classes, args


# ---- Runs ----

def test_the_learning_rate_falls_linearly(segmented):
    rates = [segment.warmup_linear(step, 8, 1.0, 0.2, 4) for step in range(9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    out, flags, _ = segmented
    min_lr = small_args(segment, out, *flags).min_lr
    rates = [segment.warmup_linear(step, 6, 1e-3, min_lr, 0.6) for step in range(6)]
    assert [line["lr"] for line in log(out)] == pytest.approx(rates)


def test_a_run_writes_its_files_and_is_finished(segmented):
    out, flags, printed = segmented
    assert (out / "segments.png").stat().st_size > 1000 and format_metrics(result(out)) in printed
    assert "is finished" in train_small(segment, out, *flags)


def test_iou_is_reported_by_class(segmented):
    out, _, printed = segmented
    iou, (*_, last_line) = result(out)["iou"], printed.splitlines()
    assert list(iou) == ["background", "disc", "square", "triangle", "hexagon", "star", "cross", "ring",
                         "crescent", "ellipse", "bar"]
    assert last_line == "IoU by class: " + "  ".join(f"{name} {value:.4g}" for name, value in iou.items())
    assert np.mean(list(iou.values())) == pytest.approx(result(out)["mean_iou"]) and iou["background"] > 0
    assert "iou" not in log(out)[-1] and log(out)[-1]["val_mean_iou"] == result(out)["mean_iou"]


def test_the_saved_model_is_what_was_evaluated(segmented, tmp_path):
    """The same holds for a model.pt of the first edition, which had a mask_token too."""
    out, first_edition = segmented[0], tmp_path / "model.pt"
    saved = torch.load(out / "model.pt", weights_only=True)
    saved["model"]["mask_token"] = torch.zeros(1, 1, 16)
    torch.save(saved, first_edition)
    for flags in ([], ["--init", first_edition]):
        printed = train_small(segment, out, "--eval", *flags)
        assert format_metrics(result(out)) in printed and ("mask_token" in printed) == bool(flags)
    model, info = weights.build(first_edition)                         # as visualize.py opens it
    assert info["task"] == "segmentation" and "mask_token" not in model.state_dict()


def test_a_classifier_initialises_the_backbone(tmp_path):
    """Its fc_norm and head are for the average of the patches, so that norm and head are new."""
    torch.manual_seed(0)
    config = vit.ViTConfig(image_size=32, patch_size=8, dim=16, depth=2, heads=2)
    classifier = vit.ImageClassifier(config, 10)
    nn.init.normal_(classifier.fc_norm.weight)
    torch.save({"model": classifier.state_dict(), "kind": "ImageClassifier",
                "config": {"vit": vars(config), "classes": list(map(str, range(10)))}}, tmp_path / "model.pt")
    with mock.patch.object(run.Run, "prepare", side_effect=InterruptedError) as prepare:
        with pytest.raises(InterruptedError):
            train_small(segment, tmp_path / "a", "--init", tmp_path / "model.pt", "--checkpoint-blocks")
    model = prepare.call_args.args[0]
    assert torch.equal(model.pos_embed, classifier.pos_embed) and (model.norm.weight == 1).all()
    assert model.head.weight.shape == (11, 32, 1, 1) and model.checkpoint_blocks


def test_evaluation_counts_each_pixel_once(evaluated, monkeypatch):
    model, views, classes, args = evaluated
    single, shared, gathered = evaluate_in_processes(
        lambda: segment.evaluate(model, views, classes, args, CPU), monkeypatch)
    assert shared.pop("iou") == pytest.approx(single.pop("iou"), rel=1e-5, nan_ok=True)
    assert shared == pytest.approx(single, rel=1e-5)
    assert sum(sums["count"] for sums in gathered[dict]) == 70 * 64 * 64
    assert sum(gathered[torch.Tensor]).sum() == 70 * 64 * 64           # of the confusion matrix


def test_the_figure_shows_what_the_model_predicts(evaluated):
    model, views, classes, args = evaluated
    with mock.patch.object(segment.plots, "figure_segments") as figure:
        segment.draw(model, views, classes, args, CPU)
    images, maps, predicted, _ = figure.call_args.args
    expected = segment.predict(model, torch.stack(images), args, CPU).argmax(1)
    assert (torch.stack(predicted) == expected).float().mean() > 0.999    # one by one, not in a batch
    assert torch.equal(torch.stack(maps), torch.stack([views[0, i][1] for i in range(0, 24, 2)]))


# ---- The loss and the scores, by hand ----

def test_pixel_loss_by_hand():
    logits = torch.randn(4, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    maps = torch.tensor([[[0, 255], [255, 2]]] * 4, dtype=torch.uint8)    # 255 is not counted
    log_p = logits.log_softmax(1)                                      # (4, 5, 2, 2)
    torch.testing.assert_close(segment.pixel_loss(logits, maps),
                               -(log_p[:, 0, 0, 0] + log_p[:, 2, 1, 1]).mean() / 2)
    assert segment.pixel_loss(logits, torch.full_like(maps, 255)) == 0


def test_iou_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255], [2, 255, 0]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1], [1, 2, 0], [0, 2, 0]])
    confusion = segment.confusion_matrix(predicted, truth, 4)          # class 3 occurs nowhere
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    iou = segment.intersection_over_union(confusion).tolist()
    assert iou[:3] == pytest.approx([2 / 4, 2 / 3, 1 / 2]) and math.isnan(iou[3])


def test_scores_of_known_predictions(monkeypatch, tmp_path):
    """mean_iou leaves out classes that occur nowhere; they are null in result.json."""
    views = [(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.tensor([[0, 1], [1, 255]], dtype=torch.uint8))]
    logits = 50 * torch.eye(3)[torch.tensor([[0, 0], [1, 2]])].permute(2, 0, 1)[None]    # sure of 0 0 / 1 2
    monkeypatch.setattr(segment, "eval_batch_size", lambda views: 1)
    monkeypatch.setattr(segment.data, "val_loader", lambda views, *args, **kwargs: [
        (image[None], target[None]) for image, target in views])
    monkeypatch.setattr(segment, "predict", lambda *args: logits)
    report = segment.evaluate(nn.Identity(), views, ["a", "b", "c"], FP32, CPU)
    assert report["iou"] == pytest.approx({"a": 1 / 2, "b": 1 / 2, "c": math.nan}, nan_ok=True)
    assert report["mean_iou"] == 0.5 and report["pixel_accuracy"] == pytest.approx(2 / 3)
    assert report["loss"] == pytest.approx(50 / 3)                     # one of three counted pixels is wrong
    run.write_json(tmp_path / "result.json", report)
    assert result(tmp_path)["iou"]["c"] is None


# ---- Images of any size ----

class PerPixel(nn.Module):
    """A segmenter of 16x16 pixels whose logits at a pixel depend on that pixel alone."""
    config = vit.ViTConfig(image_size=16, patch_size=4)

    def forward(self, images):
        assert images.shape[-2:] == (16, 16)
        return images * 2


def test_sliding_windows_cover_the_image():
    for h, w in ((50, 23), (9, 12)):                                   # resized, and back
        assert segment.predict(PerPixel(), torch.rand(1, 3, h, w), FP32, CPU).shape == (1, 3, h, w)
    for h, w in ((16, 16), (16, 45), (45, 16)):                        # not resized
        images = torch.rand(2, 3, h, w)
        torch.testing.assert_close(segment.predict(PerPixel(), images, FP32, CPU), images * 2)


@pytest.mark.parametrize("length, starts", [    # a crop of 512 has the stride 341
    (512, [0]), (513, [0, 1]), (853, [0, 341]), (1024, [0, 341, 512]), (1200, [0, 341, 682, 688])])
def test_where_windows_start(length, starts):
    assert segment.window_starts(length, 512) == starts


def save_ade20k(folder, training, validation):
    """Save images and class maps in ADE20K's layout: arrays uint8 (H, W) of class numbers for each split.

    The images are 60 times as bright as the class number.
    """
    for split, maps in (("training", training), ("validation", validation)):
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for i, numbers in enumerate(maps):
            Image.fromarray(numbers).save(folder / "annotations" / split / f"{i}.png")
            image = Image.fromarray(60 * np.minimum(numbers, 4)).convert("RGB")
            image.save(folder / "images" / split / f"{i}.jpg", quality=100)
    return folder


def test_ade20k_layout(pretrained, tmp_path):
    """Images of different sizes, with classes 1 to 3, and 0 for pixels that are not counted."""
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 4, (3, 4 + i % 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1) for i in range(18)]
    ade = save_ade20k(tmp_path / "ade", maps[:15], maps[15:])
    names = "Idx\tRatio\tName\n1\t.1\twall\n2\t.1\tbuilding, edifice\n3\t.1\tsky\n"
    (ade / "objectInfo150.txt").write_text(names)
    flags = ["--init", pretrained, "--data", ade, *"--preset demo --steps 2".split()]
    train_small(segment, tmp_path / "a", *flags)
    assert list(result(tmp_path / "a")["iou"]) == ["wall", "building", "sky"]
    args = small_args(segment, tmp_path / "a", *flags, "--image-size", 32)
    views, val_views, _ = segment.open_datasets(args)
    assert (len(views), len(val_views)) == (15, 3) and segment.eval_batch_size(val_views) == 1
    seen = set()
    for epoch, index in np.ndindex(4, 15):    # image and map are transformed together
        image, target = views[epoch, index]
        seen |= set(target.unique().tolist())
        assert (image[0] / 60 - 1 - target)[target < 3].abs().mean() < 0.5    # edges are blurred
    assert seen == {0, 1, 2, data.IGNORE}


@pytest.mark.parametrize("training, validation, message", [
    ([0, 0, 0], [1], "the training maps have 0 of"), ([5, 0, 5], [1], "the training maps have 1 of"),
    ([255, 255], [1], "the training maps have 0 of"), ([1, 2], [0, 255], "the held-out maps have 0 of"),
    ([0, 1, 2], [0, 2], None)])
def test_maps_with_nothing_to_learn_are_refused(tmp_path, training, validation, message):
    """Each map has one class number."""
    maps = [[np.full((40, 40), number, np.uint8) for number in numbers] for numbers in (training, validation)]
    args = small_args(segment, tmp_path, "--data", save_ade20k(tmp_path / "ade", *maps), "--image-size", 32)
    with pytest.raises(UserError, match=f"^--data: {message}") if message else contextlib.nullcontext():
        segment.open_datasets(args)


@pytest.mark.parametrize("flags, images, held_out", [("", 120, 24), ("--validate 30", 90, 30)])
def test_only_training_images_are_augmented(tmp_path, flags, images, held_out):
    args = small_args(segment, tmp_path, "--image-size", 32, *flags.split())
    views, val_views, _ = segment.open_datasets(args)
    assert (len(views), len(val_views)) == (images, held_out) and segment.eval_batch_size(val_views) == 64
    assert not torch.equal(views[0, 1][0], views[1, 1][0])
    assert torch.equal(val_views[0, 1][0], val_views[1, 1][0]) and val_views[0, 1][0].shape == (3, 64, 64)


# ---- Flags that the data or the checkpoint decide on; more in test_commands.py ----

def test_a_checkpoint_without_this_head_cannot_be_evaluated(pretrained, tmp_path):
    with pytest.raises(UserError, match=r"^--eval: .* no head for .*: background, disc, .*, bar\."):
        train_small(segment, tmp_path / "a", "--init", pretrained, "--eval")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags, expected", [    # Table 14; after intermediate fine-tuning, as released
    ("", dict(steps=160_000, batch_size=16, image_size=512, lr=1e-3, min_lr=0, dim=768, warmup=1500 / 160_000,
              layer_decay=0.65, weight_decay=0.05, drop_path=0.1, clip_grad=0)),
    *[(f"--preset {name}", dict(steps=160_000, image_size=512, dim=dim))
      for name, dim in (("tiny", 192), ("small", 384), ("large", 1024))],
    *[(f"--preset {name}", dict(steps=160_000, lr=lr, layer_decay=decay, image_size=512))
      for name, lr, decay in (("intermediate", 3e-5, 0.9), ("intermediate-large", 2e-5, 0.95))],
    ("--preset demo --init MODEL", dict(image_size=32, dim=16, position="relative")),
    ("--preset base --init MODEL", dict(image_size=512, dim=16, position="relative")),
])
def test_presets_are_the_papers(pretrained, flags, expected):
    args = segment.parse_args(
        ["--init", "none", "--data", "x", *flags.replace("MODEL", str(pretrained)).split()])
    open_checkpoint(args)
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)
