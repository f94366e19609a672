"""Classification: small runs, of two blocks on 32-pixel images of `shapes`, and parts by hand."""
import json
import os
from types import SimpleNamespace
from unittest import mock

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal, finished, log, result, small_args, start, train_small
from PIL import Image

import data
import finetune
import probe
import run
import segment
import weights
from launch import UserError, format_metrics
from pretrained import open_checkpoint

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def finetuned(few_images, pretrained, tmp_path_factory):
    """(folder, flags, printed text) of a finished run that several tests look at."""
    out = tmp_path_factory.mktemp("finetuned")
    flags = ["--init", pretrained, *"--mixup 0.8 --cutmix 1 --erasing 0.5 --randaugment 9".split(),
             "--eval-every", 4, "--save-every", 1]
    return out, flags, train_small(finetune, out, *flags)


@pytest.fixture
def evaluated(finetuned):
    """(model, held-out views, classes, args) of that run."""
    args = small_args(finetune, finetuned[0], "--eval")
    open_checkpoint(args, evaluate=True)
    _, views, classes = finetune.open_datasets(args)
    return weights.build(finetuned[0] / "model.pt")[0], views, classes, args


# ---- Runs ----

def test_a_run_writes_its_files_and_is_finished(finetuned):
    out, flags, printed = finetuned
    assert (out / "predictions.png").stat().st_size > 1000 and format_metrics(result(out)) in printed
    assert "is finished" in train_small(finetune, out, *flags)
    used = json.loads((out / "config.json").read_text())               # the sizes of the checkpoint
    assert (used["image_size"], used["dim"], used["position"], used["mixup"]) == (32, 16, "relative", 0.8)


def test_classification_from_pretrained_weights(finetuned):
    out, flags, printed = finetuned
    lines, report, last = log(out), result(out), torch.load(out / "last.pt", weights_only=True)
    assert all(name in printed for name in ("fc_norm", "head", "lm_head", "mask_token"))
    min_lr = small_args(finetune, out, *flags).min_lr
    rates = [run.warmup_cosine(step, 6, 1e-3, min_lr, 0.6) for step in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert [line["step"] for line in lines if "val_top1" in line] == [4, 6]
    assert 0 <= report["top1"] == lines[-1]["val_top1"] <= report["top5"] <= 1
    groups = last["optimizer"]["param_groups"]
    scales = {round(group["lr"] / lines[-1]["lr"], 6) for group in groups}
    assert scales == {1.0, 0.75, 0.75 ** 2, round(0.75 ** 3, 6)}       # the head, two blocks, the embeddings
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert equal(last["model"], torch.load(out / "model.pt", weights_only=True)["model"])


def test_the_saved_model_is_what_was_evaluated(finetuned, tmp_path):
    """The same holds for a model.pt of the first edition, which had a mask_token too."""
    out, first_edition = finetuned[0], tmp_path / "model.pt"
    saved = torch.load(out / "model.pt", weights_only=True)
    saved["model"]["mask_token"] = torch.zeros(1, 1, 16)
    torch.save(saved, first_edition)
    for flags in ([], ["--init", first_edition]):
        printed = train_small(finetune, out, "--eval", *flags)
        assert format_metrics(result(out)) in printed and ("mask_token" in printed) == bool(flags)
    model, info = weights.build(first_edition)                         # as visualize.py opens it
    assert info["task"] == "classification" and "mask_token" not in model.state_dict()


@pytest.mark.parametrize("flags, expected", [
    ("--eval", 0.7), ("--eval --eval-crop 0.5", 0.5), ("--eval --preset base-384", 0.7), ("", 0.875)])
def test_evaluation_crops_as_the_run_did(finetuned, tmp_path, flags, expected):
    saved = torch.load(finetuned[0] / "model.pt", weights_only=True)
    assert saved["config"]["eval_crop"] == json.loads((finetuned[0] / "config.json").read_text())["eval_crop"]
    saved["config"]["eval_crop"] = 0.7
    torch.save(saved, tmp_path / "model.pt")
    preset = "" if "preset" in flags else "--preset base"
    args = small_args(finetune, tmp_path, "--init", tmp_path / "model.pt", *flags.split(), *preset.split())
    open_checkpoint(args, evaluate=args.eval)
    assert args.eval_crop == expected


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
def test_a_checkpoint_to_continue_from_is_not_for_init(finetuned, tmp_path, name):
    message = f"^{finetuned[0] / name}: expected final weights, .*; give {finetuned[0] / 'model.pt'}, [^\n]*$"
    with pytest.raises(UserError, match=message):
        train_small(finetune, tmp_path / "next", "--init", finetuned[0] / name)
    assert not (tmp_path / "next").exists()


def test_a_run_continues_bit_for_bit(pretrained, tmp_path):
    """After step 4, from the checkpoint of step 3."""
    flags = ["--init", pretrained, *"--drop-path 0.2 --mixup 0.8 --eval-every 3".split()]
    train_small(finetune, tmp_path / "whole", *flags)
    conftest.interrupt_small(finetune, 4, tmp_path / "cut", *flags)
    assert "after step 3 of 6" in train_small(finetune, tmp_path / "cut", *flags)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert log(cut) == log(whole) and result(cut) == result(whole)
    assert equal(*(torch.load(out / "model.pt", weights_only=True)["model"] for out in (whole, cut)))


def test_accumulated_parts_are_one_batch_from_scratch(tmp_path):
    flags = "--init none --image-size 32 --dim 16 --heads 2 --depth 2 --steps 3".split()
    train_small(finetune, tmp_path / "1", *flags)
    train_small(finetune, tmp_path / "3", *flags, "--accumulate", 3, "--checkpoint-blocks")
    for whole, parts in zip(log(tmp_path / "1"), log(tmp_path / "3"), strict=True):
        assert whole == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("mixup, shape", [(0.0, (12,)), (0.8, (12, 10))])
def test_training_mixes_images_and_smooths_labels(pretrained, tmp_path, mixup, shape):
    """The loss is -sum((1 - s) t log p) - s mean(log p) for smoothing s and the targets t, in nats."""
    with mock.patch.object(F, "cross_entropy", side_effect=F.cross_entropy) as cross_entropy:
        train_small(finetune, tmp_path, "--init", pretrained, "--steps", 1, "--mixup", mixup,
                    "--label-smoothing", 0.2)
    logits, labels = cross_entropy.call_args_list[0].args              # the later ones are the evaluation's
    assert labels.shape == shape
    shares, log_p = labels if mixup else F.one_hot(labels, 10), logits.log_softmax(1)
    smoothed = -0.8 * (shares * log_p).sum(1) - 0.2 * log_p.mean(1)
    assert log(tmp_path)[0]["loss"] == pytest.approx(smoothed.mean().item())


@pytest.mark.parametrize("renamed", [False, True])
def test_a_classifier_initialises_the_next_run(finetuned, tmp_path, renamed):
    """Its head is used for the same classes, as after intermediate fine-tuning, and not for other ones."""
    saved = torch.load(finetuned[0] / "model.pt", weights_only=True)
    if renamed:
        saved["config"]["classes"] = list("abcdefghij")
    torch.save(saved, tmp_path / "model.pt")
    with mock.patch.object(run.Run, "prepare", side_effect=InterruptedError) as prepare:
        with pytest.raises(InterruptedError):
            train_small(finetune, tmp_path / "next", "--init", tmp_path / "model.pt", "--checkpoint-blocks")
    model = prepare.call_args.args[0]
    assert torch.equal(model.head.weight, saved["model"]["head.weight"]) != renamed
    assert torch.equal(model.fc_norm.weight, saved["model"]["fc_norm.weight"])
    assert model.checkpoint_blocks


def test_evaluation_counts_each_image_once(evaluated, monkeypatch):
    model, views, _, args = evaluated
    single, shared, gathered = conftest.evaluate_in_processes(
        lambda: finetune.evaluate(model, views, args, CPU), monkeypatch)
    assert shared == pytest.approx(single, rel=1e-5)
    assert sum(sums["count"] for sums in gathered[dict]) == 70


def test_the_figure_shows_what_the_model_predicts(evaluated):
    model, views, classes, args = evaluated
    with mock.patch.object(finetune.plots, "figure_classes") as figure:
        finetune.draw(model, views, classes, args, CPU)
    images, labels, probabilities, names = figure.call_args.args
    torch.testing.assert_close(probabilities, model(images).softmax(-1).detach())
    assert [*labels] == [views.source[i][1] for i in range(0, 24, 2)] and names == views.source.classes


# ---- Mixup and cutmix, by hand ----

def test_mixup_and_cutmix():
    def mix(mixup=0.0, cutmix=0.0, seed=0):
        torch.manual_seed(seed)
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
        transform = finetune.make_mixup(SimpleNamespace(mixup=mixup, cutmix=cutmix), 5)
        return images, *transform(images, torch.arange(4))

    images, unchanged, labels = mix()
    assert unchanged is images and labels.tolist() == [0, 1, 2, 3]
    images, blended, shares = mix(mixup=0.8)
    lam, own, other = shares[1, 1].item(), torch.arange(4), torch.arange(4).roll(1)
    torch.testing.assert_close(shares, lam * F.one_hot(own, 5) + (1 - lam) * F.one_hot(other, 5))
    torch.testing.assert_close(blended[:, 0, 0, 0], lam * own + (1 - lam) * other)
    images, pasted, shares = mix(cutmix=1.0)
    area = (pasted == images).float().mean((1, 2, 3))                  # each pixel is of one of two images
    torch.testing.assert_close(shares[own, own], area)
    torch.testing.assert_close(shares[own, other], 1 - area)
    assert set(pasted[2].unique().tolist()) <= {1.0, 2.0}
    values = {len(mix(0.8, 1.0, seed)[1][2].unique()) for seed in range(12)}
    assert values == {1, 2}                                            # blended, or two values side by side


# ---- Flags that the data or the checkpoint decide on; more in test_commands.py ----

@pytest.mark.parametrize("flags, message", [
    ("--eval", r"^--eval: .*model.pt has no head for .* classes: disc, .*, bar\. .* classes: without names"),
    ("--dim 32", "^--dim: .*model.pt has 16, not 32"),
    ("--layer-scale 0", "^--layer-scale: .*model.pt has 0.1, not 0"),
])
def test_wrong_use_is_one_line(pretrained, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(finetune, "Run", None)                         # what is not refused must not train
    with pytest.raises(UserError, match=message) as error:
        train_small(finetune, tmp_path / "a", "--init", pretrained, *flags.split())
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


TABLE_13 = dict(batch_size=1024, lr=4e-3, min_lr=1e-6, layer_decay=0.65, weight_decay=0.05, drop_path=0.1,
                clip_grad=0, label_smoothing=0.1, randaugment=9, mixup=0.8, cutmix=1, erasing=0.25, dim=768,
                image_size=224)
RELEASED = dict(epochs=30, batch_size=512, lr=2e-5, warmup=5 / 30, mixup=0, cutmix=0, weight_decay=1e-8)
AT_384 = dict(image_size=384, epochs=10, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8)


@pytest.mark.parametrize("flags, expected", [
    ("", dict(TABLE_13, epochs=100, warmup=20 / 100)),
    ("--preset large", dict(epochs=50, batch_size=1024, warmup=5 / 50, layer_decay=0.75, drop_path=0.2)),
    *[(f"--preset {name}", dict(epochs=100, dim=dim))
      for name, dim in (("tiny", 192), ("small", 384))],
    *[(f"--preset {name}-384", dict(AT_384, dim=dim)) for name, dim in (("base", 768), ("large", 1024))],
    ("--preset intermediate", dict(RELEASED, layer_decay=0.85, drop_path=0.1)),
    ("--preset intermediate-large", dict(RELEASED, layer_decay=0.9, drop_path=0.4)),
    ("--preset cifar100", dict(TABLE_13, epochs=150, batch_size=512, warmup=20 / 150, weight_decay=0.3,
                               erasing=0, repeats=3)),
    ("--preset demo --init MODEL", dict(image_size=32, dim=16, position="relative")),
    ("--preset base-384 --init MODEL", dict(image_size=384, dim=16, position="relative")),
    ("--preset base-384 --init MODEL --eval", dict(image_size=32, dim=16, position="shared_relative")),
])
def test_presets_are_the_papers(pretrained, flags, expected):
    args = finetune.parse_args(
        ["--init", "none", "--data", "x", *flags.replace("MODEL", str(pretrained)).split()])
    open_checkpoint(args, evaluate=args.eval)
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected)


# ---- Which images are trained on ----

@pytest.mark.parametrize("flags, images, held_out", [("", 120, 24), ("--validate 30 --labels 20", 20, 30)])
def test_only_training_images_are_augmented(tmp_path, flags, images, held_out):
    args = small_args(finetune, tmp_path, "--image-size", 32, *flags.split())
    views, val_views, _ = finetune.open_datasets(args)
    assert (len(views), len(val_views)) == (images, held_out)
    assert not torch.equal(views[0, 1][0], views[1, 1][0])
    assert torch.equal(val_views[0, 1][0], val_views[1, 1][0])


@pytest.mark.parametrize("script, flags, train", [
    (finetune, "", True), (segment, "", True), (probe, "", True), (probe, "--knn", False)])
def test_a_measurement_is_of_readable_images_alone(tmp_path, script, flags, train, capfd):
    """In probe.py --knn the training images are measured, too."""
    for split, folder in (("train", "training"), ("val", "validation")):
        for name in "ab":
            (tmp_path / "annotations" / folder / name).mkdir(parents=True)
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32)).save(tmp_path / split / name / f"{i}.png")
                Image.new("L", (32, 32), 1 + i).save(tmp_path / "annotations" / folder / name / f"{i}.png")
        (tmp_path / split / "b" / "0.png").write_bytes(b"")
        (tmp_path / "images" / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / folder).symlink_to(tmp_path / split)
    args = small_args(script, tmp_path / "out", "--data", tmp_path, "--image-size", 32, *flags.split())
    for samples, fallback in zip(script.open_datasets(args), (train, False)):
        batches = list(data.val_loader(samples, args, CPU, batch_size=2))
        assert sum(len(images) for images, _ in batches) == (4 if fallback else 3)
    assert capfd.readouterr().out.count("3 of 4 images are counted") == 2 - train


def test_an_unreadable_image_does_not_count_for_accuracy(tmp_path):
    """Of classes a, b, b, where the first b is unreadable, a model that says b has half right."""
    for split in ("train", "val"):
        for path in (tmp_path / split / name for name in ("a/0.png", "b/0.png", "b/1.png")):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(path)
    (tmp_path / "val" / "b" / "0.png").write_bytes(b"")
    args = small_args(finetune, tmp_path / "out", "--data", tmp_path, "--image-size", 32)

    class SaysB(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 1.0]]).expand(len(images), -1)
    assert finetune.evaluate(SaysB(), finetune.open_datasets(args)[1], args, CPU)["top1"] == 0.5


def test_a_single_class_that_remains_is_refused(tmp_path):
    for name, images in (("train/a", 39), ("train/b", 1), ("val/a", 1)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    args = small_args(finetune, tmp_path / "out", "--data", tmp_path, "--validate", 39, "--image-size", 32)
    with pytest.raises(UserError, match="^--data: the training labels have 1 of the classes"):
        finetune.open_datasets(args)


def test_names_of_any_bytes_and_a_figure_that_fails(pretrained, tmp_path):
    """Weights and result are written; names are drawn as they are, and printed under a strict stdout."""
    names = [b"Ba$$in", b"over_$10", b"_caf\xe9", "\u5c71".encode(), b"a\\$b"]
    for split, name in ((split, name) for split in (b"train", b"val") for name in names):
        folder = os.path.join(os.fsencode(tmp_path), b"\xffdata", split, name)
        os.makedirs(folder)
        for i in range(4):
            Image.new("RGB", (40, 40), (50 * i, 9, 9)).save(os.path.join(os.fsdecode(folder), f"{i}.png"))
    flags = ["--init", pretrained, "--data", os.fsdecode(os.fsencode(tmp_path) + b"/\xffdata"),
             *"--steps 1 --eval-every 1 --preset demo".split()]
    strict = "sys.stdout.reconfigure(encoding='utf-8', errors='strict')"
    printed, errors = finished(start(tmp_path / "a", *flags, script="finetune", hurt=strict))
    assert not errors and "warning" not in printed and (tmp_path / "a" / "predictions.png").exists()
    classes = torch.load(tmp_path / "a" / "model.pt")["config"]["classes"]
    assert sorted(classes) == sorted(["Ba$$in", "over_$10", r"_caf\xe9", "\u5c71", r"a\$b"])
    fails = "import plots\nplots.figure_classes = lambda *args: {}['no figure']"
    printed, errors = finished(start(tmp_path / "b", *flags, script="finetune", hurt=f"{strict}\n{fails}"))
    assert not errors and "warning: predictions.png could not be drawn (KeyError: 'no figure')" in printed
    assert result(tmp_path / "a") == result(tmp_path / "b")


# ---- Parts of a labelled source ----

class Numbers(list):
    """39 samples (index, index % 4), so that the last class has one sample less."""
    targets = [index % 4 for index in range(39)]


NUMBERS = Numbers(enumerate(Numbers.targets))


def balanced_subset(count, seed=0, source=NUMBERS):
    return data.balanced_subset(source, count, "abcd", seed)


def test_split_off_samples_are_not_trained_on():
    training, held_out = data.split_off(NUMBERS, 9)
    assert sorted(training.indices + held_out.indices) == list(range(39)) and len(held_out) == 9
    assert held_out.indices == data.split_off(NUMBERS, 9)[1].indices
    labels = data.labels_of(balanced_subset(8, source=training))            # of a Subset of a Subset
    assert np.bincount(labels).tolist() == [2, 2, 2, 2]


def test_balanced_subset_are_balanced_and_seeded():
    few = balanced_subset(12)
    labels = data.labels_of(few)
    assert np.bincount(labels).tolist() == [3, 3, 3, 3] and len(set(few.indices)) == 12
    assert [label for _, label in few] == labels.tolist()
    assert few.indices == balanced_subset(12).indices != balanced_subset(12, seed=1).indices
    assert sorted(np.bincount(data.labels_of(balanced_subset(14)))) == [3, 3, 4, 4]
    with pytest.raises(UserError, match="^--labels: 39 images need 10 of class d, which has 9"):
        for seed in range(20):
            balanced_subset(39, seed)
