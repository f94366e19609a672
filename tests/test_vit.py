import math

import pytest
import torch
import torch.nn.functional as F

import vit
from vit import MaskedImageModel, ViTConfig, VisionTransformer, relative_position_index

POSITIONS = ["absolute", "relative", "shared_relative"]


def small(position="absolute", **more):
    return ViTConfig(**{"image_size": 32, "patch_size": 8, "dim": 24, "depth": 3, "heads": 2, "drop_path": 0.0, "position": position, **more})


def randomised(model, seed=0):
    """Every parameter away from its initial value, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_mask(model, images):
    return torch.rand(len(images), *model.config.grid, generator=torch.Generator().manual_seed(1)) < 0.4


def test_relative_position_index_by_hand():
    # rows of the table: (drow + 1) * 3 + (dcol + 1), then 9 = [S] -> patch, 10 = patch -> [S], 11 = [S] -> [S]
    assert relative_position_index((2, 2)).tolist() == [[11, 9, 9, 9, 9],
                                                        [10, 4, 3, 1, 0],
                                                        [10, 5, 4, 2, 1],
                                                        [10, 7, 6, 4, 3],
                                                        [10, 8, 7, 5, 4]]


def test_relative_position_index_of_a_wide_grid():
    index = relative_position_index((2, 3))
    assert index.max() == 3 * 5 + 2 and index[1, 6] == 0 and index[6, 1] == 14     # the farthest pairs
    assert (index[1:, 1:].diagonal() == 7).all()


def test_parameter_names_are_the_released_ones():
    block = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.weight", "attn.q_bias", "attn.v_bias",
             "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    rest = ["cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
            "lm_head.weight", "lm_head.bias"]
    own = {"absolute": ["pos_embed"], "shared_relative": ["rel_pos_bias.relative_position_bias_table"],
           "relative": [f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)]}
    for position in POSITIONS:
        for scaled in (0.0, 0.1):
            names = rest + own[position] + [f"blocks.{i}.{name}" for i in range(3)
                                            for name in block + (["gamma_1", "gamma_2"] if scaled else [])]
            assert set(MaskedImageModel(small(position, layer_scale=scaled), 10).state_dict()) == set(names)


def test_released_index_buffers_are_ignored():
    for position, key in (("shared_relative", "rel_pos_bias.relative_position_index"),
                          ("relative", "blocks.0.attn.relative_position_index")):
        model = MaskedImageModel(small(position), 10)
        state = {**model.state_dict(), key: torch.zeros(17, 17, dtype=torch.int64)}
        model.load_state_dict(state, strict=True)
        assert key in state                                            # the caller's dict is left alone


@pytest.mark.parametrize("preset, millions", [("base", 86), ("large", 304)])
def test_paper_sizes(preset, millions):
    with torch.device("meta"):
        model = VisionTransformer(vit.PRESETS[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) in (millions, millions - 1)


@pytest.mark.parametrize("position", POSITIONS)
def test_masked_pixels_never_reach_the_logits(position):
    model = randomised(MaskedImageModel(small(position, layer_scale=0.5), 10))
    images = torch.rand(3, 3, 32, 32)
    mask = some_mask(model, images)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    noise = torch.rand_like(images)
    logits = model(images, mask)
    assert torch.equal(logits, model(torch.where(pixels, noise, images), mask))
    assert not torch.allclose(logits, model(torch.where(pixels, images, noise), mask))


def test_logits_come_in_the_order_of_the_mask():
    model = randomised(MaskedImageModel(small(), 10))
    images = torch.rand(3, 3, 32, 32)
    mask = some_mask(model, images)
    everywhere = model(images, mask, torch.ones_like(mask)).unflatten(0, mask.shape)           # (B, h, w, V)
    assert model(images, mask).shape == (mask.sum(), 10)
    torch.testing.assert_close(model(images, mask), everywhere[mask])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_maps_are_what_forward_computes(position, layer):
    model = randomised(VisionTransformer(small(position, layer_scale=0.5)))
    images = torch.rand(2, 3, 32, 32)
    seen = {}
    attention = model.blocks[layer].attn
    attention.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], out=output))
    model(images)
    maps = model.attention_maps(images, layer)
    values = attention.queries_keys_values(seen["x"])[2]
    torch.testing.assert_close(attention.proj((maps @ values).transpose(1, 2).flatten(2)), seen["out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 17))


def test_attention_map_of_a_missing_layer():
    with pytest.raises(IndexError):
        VisionTransformer(small()).attention_maps(torch.rand(1, 3, 32, 32), layer=3)


@pytest.mark.parametrize("position", POSITIONS)
def test_hidden_states_lead_to_the_output(position):
    model = randomised(VisionTransformer(small(position)))
    images = torch.rand(2, 3, 32, 32)
    states = model.hidden_states(images)
    assert len(states) == 3
    torch.testing.assert_close(model.norm(states[-1]), model(images))


@pytest.mark.parametrize("position", POSITIONS)
def test_loss_at_initialisation_is_ln_v(position):
    torch.manual_seed(0)
    model = MaskedImageModel(small(position, dim=192), 8192)
    mask = torch.ones(4, 4, 4, dtype=torch.bool)
    loss = F.cross_entropy(model(torch.rand(4, 3, 32, 32), mask), torch.randint(8192, (64,)))
    assert abs(loss.item() - math.log(8192)) < 0.1


def test_initialisation():
    torch.manual_seed(0)
    model = MaskedImageModel(small(dim=192, depth=8, position="relative"), 512)
    inner = 0.02 * 0.5396                                              # std of a normal cut at +-1 std
    for layer, block in enumerate(model.blocks, start=1):
        for weight, scale in ((block.attn.qkv.weight, 1), (block.mlp.fc1.weight, 1), (block.attn.proj.weight, math.sqrt(2 * layer)),
                              (block.mlp.fc2.weight, math.sqrt(2 * layer))):
            assert weight.std().item() == pytest.approx(inner / scale, rel=0.03) and weight.abs().max() <= 0.02 / scale + 1e-6
        assert not any(p.any() for p in (block.attn.q_bias, block.attn.relative_position_bias_table, block.mlp.fc2.bias))
    assert model.lm_head.weight.std().item() == pytest.approx(inner, rel=0.03)
    assert model.cls_token.any() and model.mask_token.any()


def test_drop_path_drops_samples_and_keeps_the_mean():
    x = torch.ones(20_000, 2, 3)
    y = vit.drop_path(x, 0.25, training=True)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y.flatten(1).std(1) == 0).all() and y.mean().item() == pytest.approx(1, abs=0.02)
    assert vit.drop_path(x, 0.25, training=False) is x
    rates = [block.drop_path_rate for block in VisionTransformer(small(depth=5, drop_path=0.1)).blocks]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def test_the_model_normalises_its_images():
    plain, shifted = (randomised(VisionTransformer(small(pixel_mean=(m,) * 3, pixel_std=(s,) * 3))) for m, s in ((0.0, 1.0), (0.5, 0.25)))
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(plain((images - 0.5) / 0.25), shifted(images))


def test_non_square_images():
    model = randomised(MaskedImageModel(small("shared_relative", image_size=(16, 40)), 10))
    mask = torch.zeros(1, 2, 5, dtype=torch.bool)
    mask[0, 1, 3] = True
    assert model(torch.rand(1, 3, 16, 40), mask).shape == (1, 10)


@pytest.mark.parametrize("wrong", [dict(patch_size=7), dict(heads=5), dict(depth=0), dict(drop_path=1.0), dict(position="sine"),
                                   dict(layer_scale=-1.0), dict(patch_size=64), dict(pixel_std=(0.0, 1.0, 1.0))])
def test_wrong_configs_name_the_field(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
        small(**wrong)


def test_wrong_inputs_name_both_shapes():
    model = MaskedImageModel(small(), 10)
    with pytest.raises(ValueError, match="32, 32"):
        model(torch.rand(1, 3, 40, 40), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="torch.bool"):
        model(torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_equals_timm(position, layer_scale):
    beit = pytest.importorskip("timm.models.beit")
    ours = randomised(VisionTransformer(small(position, layer_scale=layer_scale)))
    theirs = beit.Beit(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0, global_pool="",
                       qkv_bias=True, init_values=layer_scale or None, use_abs_pos_emb=position == "absolute",
                       use_rel_pos_bias=position == "relative", use_shared_rel_pos_bias=position == "shared_relative").eval()
    state = {name: value for name, value in ours.state_dict().items() if name != "mask_token"}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("relative_position_index" in name or "k_bias" in name for name in missing)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    torch.testing.assert_close(ours(images), theirs.forward_features((images - mean) / std), atol=1e-5, rtol=1e-5)
