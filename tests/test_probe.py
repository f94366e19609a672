"""Linear probes and nearest neighbours: small runs on 32-pixel images of `shapes`, and parts by hand."""
import math
from unittest import mock

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import equal, finished, log, result, small_args, start, train_small
from torch import nn

import data
import launch
import probe
import run
import vit
import weights
from launch import UserError
from pretrained import open_checkpoint

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", ["probe", "knn"])
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def probed(few_images, pretrained, tmp_path_factory):
    """Finished runs that several tests look at: "probe" or "knn" -> (folder, flags, printed text)."""
    runs = {}
    for kind, flags in (("probe", ["--eval-every", 2]), ("knn", ["--knn", "--neighbours", 5])):
        out, flags = tmp_path_factory.mktemp(kind), ["--init", pretrained, *flags]
        runs[kind] = out, flags, train_small(probe, out, *flags)
    return runs


@pytest.fixture
def model(probed):
    """The LinearProbe of the finished run, but with random classifiers."""
    saved = torch.load(probed["probe"][0] / "model.pt", weights_only=True)
    model = probe.LinearProbe(vit.ViTConfig(**saved["config"]["vit"]), 10)
    model.load_state_dict(saved["model"])
    nn.init.normal_(model.head[1].weight, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def views(probed):
    """(training, held-out) views of the k-NN run, and its args."""
    out, flags, _ = probed["knn"]
    args = small_args(probe, out, *flags, "--image-size", 32)
    return *probe.open_datasets(args)[:2], args


# ---- Runs ----

@KINDS
def test_a_run_writes_its_files_and_is_finished(probed, kind):
    out, flags, printed = probed[kind]
    assert (out / "layers.png").stat().st_size > 1000 and launch.format_metrics(result(out)) in printed
    assert "is finished" in train_small(probe, out, *flags)
    report = result(out)
    patches, cls = report["top1_by_layer"]["patches"], report["top1_by_layer"]["[S]"]
    assert len(patches) == len(cls) == 2
    for accuracy in patches + cls:                                     # of 24 images, in double precision
        assert accuracy == pytest.approx(round(24 * accuracy) / 24, rel=1e-12)
    assert report["top1"] == max(patches) == patches[report["layer"] - 1]


def test_the_report_names_the_best_layer_of_the_patches():
    accuracy = torch.tensor([[0.25, 1.0], [0.75, 0.5], [0.5, 0.0]])    # (L, 2)
    assert probe.by_layer(accuracy) == {"top1": 0.75, "layer": 2, "top1_by_layer": {
        "patches": [0.25, 0.75, 0.5], "[S]": [1.0, 0.5, 0.0]}}


def test_the_log_and_the_schedule(probed):
    lines = log(probed["probe"][0])
    rates = [run.warmup_cosine(step, 6, 1e-3, 0.0, 0.0) for step in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert [line["step"] for line in lines if "val_top1" in line] == [2, 4, 6]
    assert lines[0]["loss"] == pytest.approx(math.log(10))             # the classifiers start at zero


def test_the_backbone_stays_as_it_was(probed, pretrained):
    """The table that all blocks share is not copied into each block."""
    saved = torch.load(probed["probe"][0] / "model.pt", weights_only=True)
    backbone = {name: tensor for name, tensor in saved["model"].items() if not name.startswith("head.")}
    state = weights.load(pretrained)[0]
    assert equal(backbone, {name: state[name] for name in backbone})
    assert len(backbone) == len(state) - 3                             # without [M] and lm_head
    assert saved["model"]["head.1.weight"].any() and saved["kind"] == "LinearProbe"


def test_the_backbone_of_a_probe_is_opened(probed, model):
    """As visualize.py does."""
    backbone, _ = weights.build(probed["probe"][0] / "model.pt")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), model.eval().features(images))


def test_a_run_continues_bit_for_bit(pretrained, tmp_path):
    """It is interrupted after its last step, before it is evaluated and model.pt is written."""
    flags = ["--init", pretrained]
    train_small(probe, tmp_path / "whole", *flags)
    conftest.interrupt_small(probe, 6, tmp_path / "cut", *flags)
    train_small(probe, tmp_path / "cut", *flags)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert log(cut) == log(whole) and result(cut) == result(whole)
    assert equal(*(torch.load(out / "model.pt", weights_only=True)["model"] for out in (whole, cut)))


def test_the_loss_is_the_mean_over_probes(pretrained, tmp_path):
    with mock.patch.object(F, "cross_entropy", side_effect=F.cross_entropy) as cross_entropy:
        train_small(probe, tmp_path, "--init", pretrained)
    logits, labels = cross_entropy.call_args.args                      # (B, C, L, 2), (B, L, 2)
    assert (labels == labels[:, :1, :1]).all()
    losses = [F.cross_entropy(logits_of_probe, labels[:, 0, 0]).item()
              for logits_of_probe in logits.flatten(2).unbind(2)]
    assert log(tmp_path)[-1]["loss"] == pytest.approx(sum(losses) / 4) and len(set(losses)) == 4


@KINDS
def test_two_processes_equal_one(pretrained, tmp_path, kind):
    """Probes see the same batches, standardised over both processes; neighbours come from both."""
    flags = ["--init", pretrained, *(["--knn"] if kind == "knn" else ["--steps", 4])]
    for process in [start(tmp_path / str(n), *flags, script="probe", processes=n) for n in (1, 2)]:
        finished(process)
    assert result(tmp_path / "1") == result(tmp_path / "2")
    if kind == "probe":
        single, shared = ([line["loss"] for line in log(tmp_path / n)] for n in "12")
        assert shared == pytest.approx(single, rel=1e-4)


def test_evaluation_counts_each_image_once(model, views, monkeypatch):
    _, val_views, args = views
    single, shared, gathered = conftest.evaluate_in_processes(
        lambda: probe.evaluate(model, val_views, args, CPU), monkeypatch)
    for kind in probe.KINDS:
        assert shared["top1_by_layer"][kind] == pytest.approx(single["top1_by_layer"][kind])
    assert sum(sums["count"] for sums in gathered[dict]) == 70


@pytest.mark.parametrize("flags, images, held_out, augmented", [
    ("", 120, 24, True), ("--knn", 120, 24, False), ("--validate 30 --labels 20", 20, 30, True)])
def test_only_training_images_of_probes_are_augmented(tmp_path, flags, images, held_out, augmented):
    views, val_views, _ = probe.open_datasets(small_args(probe, tmp_path, "--image-size", 32, *flags.split()))
    assert (len(views), len(val_views)) == (images, held_out)
    assert torch.equal(views[0, 1][0], views[1, 1][0]) != augmented
    assert torch.equal(val_views[0, 1][0], val_views[1, 1][0])


# ---- Linear probes ----

def test_each_probe_sees_only_its_own_layer(model):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = model.train()(images)
    assert logits.shape == (6, 10, 2, 2)
    for layer, h in enumerate(model.hidden_states(images)):
        for kind, feature in enumerate((h[:, 1:].mean(1), h[:, 0])):
            weight = model.head[1].weight.view(2, 2, 10, 16)[layer, kind]
            bias = model.head[1].bias.view(2, 2, 10)[layer, kind]
            feature = (feature - feature.mean(0)) / (feature.var(0, correction=0) + 1e-6).sqrt()
            expected = feature @ weight.t() + bias
            torch.testing.assert_close(logits[:, :, layer, kind], expected, atol=1e-3, rtol=1e-3)
    logits[:, :, 1, 0].square().sum().backward()
    gradient = model.head[1].weight.grad.view(2, 2, 10, 16)
    assert gradient.any(-1).any(-1).tolist() == [[False, False], [True, False]]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["head.1.weight", "head.1.bias"]
    assert torch.equal(model.train().features(images), model.eval().features(images))    # no stochastic depth


@pytest.mark.parametrize("mean, std", [(100.0, 0.02), (-3.0, 5.0)])
def test_features_are_standardised(model, mean, std):
    """In training by the batch, in evaluation by all batches so far: far from zero too, and after few steps.

    At a mean of 100, E[x^2] - E[x]^2 in fp32 would be only rounding error.
    """
    norm, generator = model.head[0], torch.Generator().manual_seed(0)
    norm.reset_running_stats()
    batches = mean + std * torch.randn(6, 64, 64, 1, dtype=torch.float64, generator=generator)
    for batch in batches:
        expected = (batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(norm.train()(batch.float()).double(), expected, atol=5e-3, rtol=0)
    images = batches.flatten(0, 1)
    expected = (images - images.mean(0)) / images.std(0)
    torch.testing.assert_close(norm.eval()(images.float()).double(), expected, atol=0.1, rtol=0)


# ---- Nearest neighbours ----

def test_neighbours_vote_by_the_features_of_each_layer(probed, model, views):
    train_views, val_views, args = views
    features, labels = probe.extract(model, train_views, args, CPU)
    val_features, val_labels = probe.extract(model, val_views, args, CPU)
    assert val_labels.tolist() == [val_views.source[i][1] for i in range(24)]
    states = model.hidden_states(data.to_float(val_views[0, 7][0])[None])
    for layer, h in enumerate(states):
        for kind, feature in enumerate((h[0, 1:].mean(0), h[0, 0])):
            expected = feature.detach() / feature.detach().norm()
            torch.testing.assert_close(val_features[7, layer, kind].float(), expected, atol=1e-3, rtol=1e-3)
    for kind, accuracy in enumerate(result(probed["knn"][0])["top1_by_layer"].values()):
        assert accuracy == [probe.knn_accuracy(features[:, layer, kind], labels, val_features[:, layer, kind],
                                               val_labels, 10, 5) for layer in (0, 1)]


def test_large_features_do_not_overflow_in_half_precision(model, views, monkeypatch):
    """They are normalised before they are halved."""
    _, val_views, args = views
    features, _ = probe.extract(model, val_views, args, CPU)
    pool = probe.pool

    def pool_large(states):
        pooled = pool(states)
        return pooled * 1e5 / pooled.abs().mean()                      # the largest half is 65,504

    monkeypatch.setattr(probe, "pool", pool_large)
    large, _ = probe.extract(model, val_views, args, CPU)
    assert large.dtype == torch.float16 and features.std(0).amin() > 1e-4
    torch.testing.assert_close(large, features)


def on_circle(*degrees):
    """Features (n, 2) of norm 1 in these directions."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_knn_by_hand():
    """The nearest three of 20 degrees are 10 and 30, then 0; of 62 degrees: 90 and 30, then 100."""
    features, labels = on_circle(0.0, 10, 90, 100, 30), torch.tensor([0, 0, 1, 1, 1])
    queries = on_circle(20.0, 62)
    assert probe.knn_accuracy(features, labels, queries, torch.tensor([0, 1]), 3, 3) == 1
    assert probe.knn_accuracy(features, labels, queries, torch.tensor([1, 0]), 3, 3) == 0
    # All five vote, three of them for 1: still 0, by weight and not by count.
    assert probe.knn_accuracy(features, labels, queries[:1], torch.tensor([0]), 2, 5) == 1


def test_processes_share_the_neighbours(monkeypatch):
    """Each process has a part of the training images: the nearest of all parts vote."""
    generator = torch.Generator().manual_seed(0)
    features, queries = (F.normalize(torch.randn(n, 3, generator=generator), dim=1) for n in (40, 30))
    labels, truth = torch.arange(40) % 4, torch.arange(30) % 4
    whole, sent = probe.knn_accuracy(features, labels, queries, truth, 4, 5), []
    monkeypatch.setattr(launch, "all_gather", lambda tensor: sent.append(tensor) or [tensor])
    probe.knn_accuracy(features[37:], labels[37:], queries, truth, 4, 5)    # a process with three images
    monkeypatch.setattr(launch, "all_gather", lambda tensor: [tensor, sent.pop(0)])
    assert probe.knn_accuracy(features[:37], labels[:37], queries, truth, 4, 5) == whole and not sent


# ---- Flags; more in test_commands.py ----

def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(pretrained, tmp_path):
    saved = torch.load(pretrained, weights_only=True)
    del saved["model"]["blocks.1.norm1.bias"]
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt: expected weights that fit .*blocks.1.norm1.bias"):
        train_small(probe, tmp_path / "a", "--init", tmp_path / "model.pt")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags, expected", [    # appendix D
    ("--data x", dict(epochs=50, batch_size=1024, lr=4e-3, min_lr=0, warmup=0, weight_decay=1e-4,
                      out="runs/probe-x", dim=16, image_size=32, position="shared_relative")),
    ("--data x --knn", dict(out="runs/probe-x-knn", neighbours=20)),
    ("--knn --out y", dict(out="y")),
])
def test_presets_are_the_papers(pretrained, flags, expected):
    args = probe.parse_args(["--init", str(pretrained), *flags.split()])
    open_checkpoint(args, copy_shared_table=False)
    assert {name: getattr(args, name) for name in expected} == expected
