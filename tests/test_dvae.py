"""The discrete VAE: its terms by hand, against the dall_e package, and short training runs."""
import json
import math

import pytest
import torch
from conftest import equal, log

import data
import dvae
import training
import weights
from dvae import DiscreteVAE, logit_laplace_nll, map_pixels, perplexity, unmap_pixels
from training import UserError

CPU = torch.device("cpu")


def small(**more):
    torch.manual_seed(0)
    return DiscreteVAE(**{"vocab_size": 32, "hidden": 8, "groups": 3, "blocks_per_group": 1, **more})


def smooth_images(count):
    """Random images without noise, (count, 3, 16, 16)."""
    return torch.rand(count, 3, 16, 16).cumsum(2).cumsum(3) / 256


# ---- The ELBO ----

def test_logit_laplace_by_hand():
    # x = 1/2: logit 0, x (1 - x) = 1/4. b = 1, mu = 2: f = exp(-2) / (2 * 1/4), so -ln f = ln(1/2) + 2
    value = logit_laplace_nll(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.0))
    assert value.item() == pytest.approx(math.log(0.5) + 2)
    # b = e: ln b = 1 and |logit - mu| / b = 2 / e
    value = logit_laplace_nll(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(1.0))
    assert value.item() == pytest.approx(math.log(0.5) + 1 + 2 / math.e)


@pytest.mark.parametrize("mu, log_b", [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.5)])
def test_logit_laplace_is_a_density(mu, log_b):
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    total = torch.exp(-logit_laplace_nll(x, torch.tensor(mu), torch.tensor(log_b))).mean()
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_pixels_are_mapped_and_back():
    x = torch.rand(5)
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)


def test_elbo_is_reduced_as_stated():
    model = small().eval()
    images = torch.rand(2, 3, 16, 24)
    reconstruction, kl, output = model(images, temperature=0.7)
    logits = model.encode(images)                                      # (B, V, h, w)
    assert logits.shape == (2, 32, 4, 6) and output.shape == images.shape
    log_q = logits.log_softmax(1)
    per_token = math.log(32) + (log_q.exp() * log_q).sum(1)
    assert kl.item() == pytest.approx(per_token.mean().item(), rel=1e-5)
    mu, log_b = model.decoder.blocks((logits / 0.7).softmax(1)).chunk(2, dim=1)
    x = 0.8 * images + 0.1
    nll = math.log(2) + log_b + (x * (1 - x)).log() + (torch.logit(x) - mu).abs() / log_b.exp()
    assert reconstruction.item() == pytest.approx(nll.mean().item(), rel=1e-5)
    expected = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_kl_to_uniform_by_hand():
    model, images = small(vocab_size=4), torch.rand(1, 3, 4, 4)
    for q, expected in (([0.25] * 4, 0), ([1 - 3e-9, 1e-9, 1e-9, 1e-9], math.log(4)),
                        ([0.5, 0.5 - 2e-9, 1e-9, 1e-9], math.log(2))):
        model.encode = lambda images: torch.tensor(q).log().view(1, 4, 1, 1)
        assert model(images, 1.0).kl.item() == pytest.approx(expected, abs=1e-6)


def test_noise_is_gumbel():
    """At a low temperature, softmax((logits + noise) / temperature) is a draw from softmax(logits)."""
    model, logits, codes = small(vocab_size=3), torch.tensor([0.0, 1.0, 2.0]), []
    model.encode = lambda images: logits.view(1, 3, 1, 1).expand(1, 3, 300, 300)
    table = model.decoder.blocks.input
    with torch.no_grad():
        table.w.copy_(torch.eye(128)[:, :3, None, None])               # the code is its own one-hot vector
    model.decode_codes = lambda given: codes.append(given) or (0, torch.zeros(1), torch.zeros(1))
    model(torch.rand(1, 3, 4, 4), 1e-6)
    torch.testing.assert_close(codes[0][..., :3].mean((0, 1, 2)), logits.softmax(0), atol=5e-3, rtol=0)


def test_noise_in_training_only():
    model, images = small(), torch.rand(1, 3, 16, 16)
    assert not torch.equal(model(images, 1.0).images, model(images, 1.0).images)
    model.eval()
    assert torch.equal(model(images, 1.0).images, model(images, 1.0).images)


def test_cold_codes_are_hard_codes():
    model, images = small().eval(), torch.rand(2, 3, 16, 16)
    hard = model.decode(model.tokenize(images))
    torch.testing.assert_close(model(images, 1e-6).images, hard, atol=1e-4, rtol=1e-4)


# ---- Tokens ----

def test_tokens():
    model, images = small(), torch.rand(2, 3, 16, 24)
    tokens = model.tokenize(images)                                    # in training mode, still without noise
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 4, 6) and model.downsample == 4
    assert torch.equal(tokens, model.encode(images).argmax(1))


def test_tokens_under_autocast():
    """Convolutions in bf16, the last one and argmax in fp32: bf16 is too coarse for logits of near codes."""
    model, images, tf32 = small(vocab_size=512), smooth_images(64), []
    model.initialise_codes(images)
    output = model.encoder.blocks.output.conv
    fine = model.tokenize(images)
    with torch.autocast("cpu", torch.bfloat16):
        features, rounded = model.features(images), model.encode(images).argmax(1)
        output.register_forward_pre_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
        tokens = model.tokenize(images)
    assert features.dtype == torch.bfloat16 and tf32 == [False] and torch.backends.cudnn.allow_tf32
    assert torch.equal(tokens, output(features.float()).argmax(1))
    assert (tokens == fine).float().mean() > (rounded == fine).float().mean() + 0.1


def test_initial_codes_are_all_over_the_images():
    model, images = small(vocab_size=256), smooth_images(32)
    before = model.tokenize(images).unique().numel()
    model.initialise_codes(images)
    used = model.tokenize(images).unique().numel()
    assert used > 150 > 3 * before
    confidence = model.encode(images).softmax(1).amax(1).mean()
    assert 0.02 < confidence < 0.9                                     # neither noise nor a hard choice


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 4"):
        small().encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        small(vocab_size=1)


def test_evaluation_by_hand():
    model = small()
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    report = dvae.evaluate(model, [(images[:1],), (images[1:],)], 0.5, CPU)    # batches of different sizes
    x = data.to_float(images)
    tokens = model.tokenize(x)
    error = model.decode(tokens) - x
    assert report == pytest.approx({
        "soft_mse": (model(x, 0.5).images - x).square().mean().item(),
        "hard_mse": error.square().mean().item(),
        "hard_mae": error.abs().mean().item(), "codes": tokens.unique().numel(),
        "perplexity": perplexity(tokens.flatten().bincount())}, rel=1e-5)


# ---- DALL-E's architecture ----

def test_full_size_and_initialisation():
    torch.manual_seed(0)
    model = DiscreteVAE()
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(53.8e6, rel=2e-3)
    assert model.encoder.blocks.group_2.block_1.post_gain == 1 / 64 and model.downsample == 8
    for conv in (model.encoder.blocks.input, model.encoder.blocks.group_3.block_1.res_path.conv_2,
                 model.decoder.blocks.output.conv):
        assert conv.w.std().item() == pytest.approx(conv.w[0].numel() ** -0.5, rel=0.05) and not conv.b.any()


def test_a_model_of_the_first_edition_equals_the_dall_e_package(tmp_path):
    """Such a model.pt holds DALL-E's parameters below "encoder." and "decoder.", and the sizes."""
    dall_e = pytest.importorskip("dall_e")
    torch.manual_seed(0)
    common = dict(n_hid=64, n_blk_per_group=2, vocab_size=512)
    encoder, decoder = dall_e.Encoder(**common), dall_e.Decoder(**common)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    config = dict(vocab_size=512, hidden=64, groups=4, blocks_per_group=2, in_channels=3)
    torch.save({"model": state, "config": config, "kind": "DiscreteVAE"}, tmp_path / "model.pt")
    ours = weights.load_tokenizer(tmp_path / "model.pt")
    assert not ours.training and ours.state_dict().keys() == state.keys()
    for size in (16, 40):
        images = torch.rand(2, 3, size, size)
        logits = encoder(dall_e.map_pixels(images))
        torch.testing.assert_close(ours.encode(images), logits, atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(1)
        assert torch.equal(ours.tokenize(images), tokens)
        z = torch.nn.functional.one_hot(tokens, 512).permute(0, 3, 1, 2).float()
        theirs = dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))
        torch.testing.assert_close(ours.decode(tokens), theirs, atol=1e-5, rtol=1e-5)


# ---- Runs ----

@pytest.fixture(scope="module", autouse=True)
def few_held_out_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Shapes, "__len__", lambda self: 10_000 if self.split == "train" else 48)
        yield


def configured(out, **more):
    values = {**dvae.PRESETS["demo"], "preset": "demo", "steps": 6, "epochs": None, "batch_size": 8,
              "image_size": 16,
              "vocab_size": 64, "hidden": 8, "save_every": 2, "out": str(out), **more}
    return training.build(dvae.Config, values)


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_held_out_images):
    """Folder of a finished run of six steps."""
    return dvae.train(configured(tmp_path_factory.mktemp("run")), CPU).parent


def test_what_a_run_leaves(run):
    result = json.loads((run / "result.json").read_text())
    assert result["codes"] >= 2 and 1 <= result["perplexity"] <= 64
    assert min(result["hard_mse"], result["soft_mse"], result["hard_mae"]) > 0
    assert {"loss", "nll", "kl", "mse", "temperature", "kl_weight"} <= set(log(run)[0])
    for line in log(run):                                              # 3 x 4 x 4 channels a token
        assert line["loss"] == pytest.approx(line["nll"] + line["kl_weight"] / 48 * line["kl"], rel=1e-5)
    assert (run / "tokenizer.png").stat().st_size > 1000
    model = weights.load_tokenizer(run / "model.pt")
    assert model.vocab_size == 64 and model.downsample == 4
    torch.save({"model": {}, "kind": "MaskedImageModel"}, run / "other.pt")
    with pytest.raises(UserError, match="^--tokenizer: .* holds a MaskedImageModel"):
        weights.load_tokenizer(run / "other.pt")


def test_a_run_that_died_continues_bit_for_bit(run, tmp_path, monkeypatch):
    all_reduce = training.Run.all_reduce

    def dying(self, step, values):
        if step == 5:
            raise RuntimeError("died")
        return all_reduce(self, step, values)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "all_reduce", dying)
        with pytest.raises(RuntimeError, match="died"):
            dvae.train(configured(tmp_path), CPU)
    dvae.train(configured(tmp_path), CPU)
    assert log(tmp_path) == log(run)
    assert equal(torch.load(tmp_path / "model.pt")["model"], torch.load(run / "model.pt")["model"])


def test_a_slow_encoder_moves_less(tmp_path):
    moved = {}
    for share in (0.0, 0.1, 1.0):
        config = configured(tmp_path / f"{share}", steps=1, encoder_lr=share, ema=0.0, weight_decay=0.0)
        state = torch.load(dvae.train(config, CPU))["model"]
        name = "blocks.group_1.block_1.res_path.conv_1.w"
        moved[share] = [state[f"{part}.{name}"] for part in ("encoder", "decoder")]
    still, slow, fast = (moved[share][0] for share in moved)
    ratio = (slow - still).norm() / (fast - still).norm()
    assert ratio.item() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(moved[0.0][1], moved[1.0][1])


def test_collapse_is_said(tmp_path, monkeypatch, capsys):
    def collapse(self, images):
        self.encoder.blocks.output.conv.b.data[0] += 50
    monkeypatch.setattr(DiscreteVAE, "initialise_codes", collapse)
    dvae.train(configured(tmp_path, steps=1, batch_size=4, vocab_size=512), CPU)
    assert "warning: the codebook is collapsing, 1 of 512" in capsys.readouterr().out


def test_features_for_tokenizing_compile_to_one_graph():
    torch.compiler.reset()
    model, images = small().eval(), torch.rand(2, 3, 16, 16)
    expected = model.tokenize(images)
    model.features = torch.compile(model.features, fullgraph=True, backend="eager")
    assert torch.equal(model.tokenize(images), expected)
