"""The discrete VAE: its terms by hand, and against the dall_e package."""
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import dvae
import train_dvae
import weights
from dvae import DiscreteVAE


def small(**more):
    torch.manual_seed(0)
    return DiscreteVAE(**{"vocab_size": 32, "hidden": 8, "groups": 3, "blocks_per_group": 1, **more})


def smooth_images(count):
    """Random images without noise, (count, 3, 16, 16)."""
    return torch.rand(count, 3, 16, 16).cumsum(2).cumsum(3) / 256


# ---- The ELBO ----

@pytest.mark.parametrize("mu, log_b", [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.5)])
def test_logit_laplace_is_a_density(mu, log_b):
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    total = torch.exp(-dvae.logit_laplace_nll(x, torch.tensor(mu), torch.tensor(log_b))).mean()
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_elbo_is_reduced_as_stated():
    model, images = small().eval(), torch.rand(2, 3, 16, 24)
    model.encoder.blocks.output.conv.w.data *= 9                       # far from uniform
    model.decoder.blocks.output.conv.b.data[0] = 4                     # sigmoid(mu) of red is above 0.9
    nll, kl, output = model(images, temperature=0.7)
    logits = model.encode(images)                                      # (B, V, h, w)
    assert logits.shape == (2, 32, 4, 6) and output.shape == images.shape
    q, uniform = Categorical(logits=logits.permute(0, 2, 3, 1)), Categorical(torch.ones(32))
    assert kl.item() == pytest.approx(kl_divergence(q, uniform).mean().item(), rel=1e-5)
    mu, log_b = model.decoder.blocks((logits / 0.7).softmax(1)).chunk(2, dim=1)
    x = 0.8 * images + 0.1
    per_channel = math.log(2) + log_b + (x * (1 - x)).log() + (torch.logit(x) - mu).abs() / log_b.exp()
    assert nll.item() == pytest.approx(per_channel.mean().item(), rel=1e-5)
    expected = ((torch.sigmoid(mu) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


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


# ---- Tokens ----

def test_tokens_are_the_likeliest_codes_without_noise():
    model, images = small(), torch.rand(2, 3, 16, 24)                  # in training mode
    torch.nn.init.normal_(model.decoder.blocks.input.b)
    tokens = model.tokenize(images)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 4, 6)
    assert torch.equal(tokens, model.encode(images).argmax(1))
    places = torch.tensor([47, 0, 25])
    assert torch.equal(model.tokenize(images, places), tokens.flatten()[places])
    cold = model.eval()(images, 1e-6).images                           # no noise in evaluation either
    torch.testing.assert_close(cold, model.decode(tokens), atol=1e-4, rtol=1e-4)


def test_tokens_under_autocast():
    """Convolutions in bf16, the last one and argmax in fp32: bf16 is too coarse for logits of near codes."""
    model, images, tf32 = small(vocab_size=512), smooth_images(64), []
    train_dvae.initialise_codes(model, images)
    output = model.encoder.blocks.output.conv
    fine = model.tokenize(images)
    with torch.autocast("cpu", torch.bfloat16):
        features, rounded = model.forward_features(images), model.encode(images).argmax(1)
        output.register_forward_pre_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
        tokens = model.tokenize(images)
    assert features.dtype == torch.bfloat16 and tf32 == [False] and torch.backends.cudnn.allow_tf32
    assert torch.equal(tokens, output(features.float()).argmax(1))
    assert (tokens == fine).float().mean() > (rounded == fine).float().mean() + 0.1


def error_of_codes(model, images):
    """The squared error of patches of 4x4 pixels from the mean patch with the same token."""
    tokens = model.tokenize(images).flatten()
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)
    sums = torch.zeros(model.vocab_size, 48).index_add_(0, tokens, patches)
    means = sums / tokens.bincount(minlength=model.vocab_size).clamp(min=1)[:, None]
    return (patches - means[tokens]).square().mean().item()


def test_initial_codes_are_all_over_the_images():
    model, images = small(vocab_size=256), smooth_images(64)
    before = error_of_codes(model, images)
    black = torch.zeros(96, 3, 16, 16)                                 # equal patches share a code
    train_dvae.initialise_codes(model, torch.cat([images, black]))
    after = error_of_codes(model, images)
    assert model.tokenize(images).unique().numel() > 100 and after < 0.25 * before
    confidence = model.encode(images).softmax(1).amax(1).mean()
    assert 0.03 < confidence < 0.15                                    # neither noise nor a hard choice
    assert model.decoder.blocks.input.w.std().item() == pytest.approx(1, abs=0.01)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 4"):
        small().encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="vocab_size must be at least 2"):
        small(vocab_size=1)


# ---- DALL-E's architecture ----

def test_full_size_and_initialisation():
    with torch.device("meta"):
        full = DiscreteVAE()
    assert sum(p.numel() for p in full.encoder.parameters()) == pytest.approx(53.8e6, rel=2e-3)
    assert full.encoder.blocks.group_2.block_1.post_gain == 1 / 64 and full.downsample == 8
    model = small(hidden=64, vocab_size=512)
    for conv in (model.encoder.blocks.input, model.encoder.blocks.group_3.block_1.res_path.conv_2,
                 model.decoder.blocks.output.conv):
        assert conv.w.std().item() == pytest.approx(conv.w[0].numel() ** -0.5, rel=0.1) and not conv.b.any()


def test_a_model_of_the_first_edition_equals_the_dall_e_package(tmp_path):
    """Such a model.pt holds DALL-E's parameters below "encoder." and "decoder.", and the sizes."""
    dall_e = pytest.importorskip("dall_e")
    torch.manual_seed(0)
    common = dict(n_hid=64, n_blk_per_group=2, vocab_size=512)
    theirs = torch.nn.ModuleDict({"encoder": dall_e.Encoder(**common), "decoder": dall_e.Decoder(**common)})
    config = dict(vocab_size=512, hidden=64, groups=4, blocks_per_group=2, in_channels=3)
    kept = {"model": theirs.state_dict(), "config": config, "kind": "DiscreteVAE"}
    torch.save(kept, tmp_path / "model.pt")
    ours = weights.load_tokenizer(tmp_path / "model.pt")
    assert not ours.training and ours.state_dict().keys() == kept["model"].keys()
    images = torch.rand(2, 3, 40, 16)
    logits = theirs["encoder"](dall_e.map_pixels(images))
    torch.testing.assert_close(ours.encode(images), logits, atol=1e-5, rtol=1e-5)
    tokens = logits.argmax(1)
    assert torch.equal(ours.tokenize(images), tokens)
    z = torch.nn.functional.one_hot(tokens, 512).permute(0, 3, 1, 2).float()
    decoded = dall_e.unmap_pixels(torch.sigmoid(theirs["decoder"](z)[:, :3]))
    torch.testing.assert_close(ours.decode(tokens), decoded, atol=1e-5, rtol=1e-5)


def test_features_for_tokenizing_compile_to_one_graph():
    torch.compiler.reset()
    model, images = small().eval(), torch.rand(2, 3, 16, 16)
    expected = model.tokenize(images)
    model.forward_features = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    assert torch.equal(model.tokenize(images), expected)
