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


@pytest.mark.parametrize("std", [0.02, 0.04])
def test_initialisation(std):
    torch.manual_seed(0)
    model = MaskedImageModel(small(dim=192, depth=8, position="relative", **({} if std == 0.02 else dict(init_std=std))), 512)
    inner = std * 0.5396                                               # std of a normal cut at +-1 std
    for layer, block in enumerate(model.blocks, start=1):
        for weight, scale in ((block.attn.qkv.weight, 1), (block.mlp.fc1.weight, 1), (block.attn.proj.weight, math.sqrt(2 * layer)),
                              (block.mlp.fc2.weight, math.sqrt(2 * layer))):
            assert weight.std().item() == pytest.approx(inner / scale, rel=0.03) and weight.abs().max() <= std / scale + 1e-6
        assert not any(p.any() for p in (block.attn.q_bias, block.attn.relative_position_bias_table, block.mlp.fc2.bias))
    assert model.lm_head.weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.03)
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


# the other models ----------------------------------------------------------------------------------------------------

def test_the_classifier_averages_patches():
    model = randomised(vit.ImageClassifier(small(), 7))
    images = torch.rand(2, 3, 32, 32)
    pooled = model.hidden_states(images)[-1][:, 1:].mean(1)
    torch.testing.assert_close(model(images), model.head(model.fc_norm(pooled)))
    torch.manual_seed(0)
    fresh = vit.ImageClassifier(small(dim=192), 100)
    assert fresh.head.weight.abs().max() <= 0.02 * 0.001 and not fresh.head.bias.any()
    assert not {name for name, _ in fresh.named_parameters()} & {"norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_the_classifier_equals_timm(position, layer_scale):
    beit = pytest.importorskip("timm.models.beit")
    ours = randomised(vit.ImageClassifier(small(position, layer_scale=layer_scale), 11))
    theirs = beit.Beit(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=11, global_pool="avg",
                       qkv_bias=True, init_values=layer_scale or None, use_abs_pos_emb=position == "absolute",
                       use_rel_pos_bias=position == "relative", use_shared_rel_pos_bias=position == "shared_relative").eval()
    missing, unexpected = theirs.load_state_dict({n: v for n, v in ours.state_dict().items() if n != "mask_token"}, strict=False)
    assert not unexpected and all("relative_position_index" in name or "k_bias" in name for name in missing)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    torch.testing.assert_close(ours(images), theirs((images - mean) / std), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size, image_size", [(8, (32, 48)), (16, (64, 64)), (12, (24, 36)), (7, (14, 14))])
def test_the_segmenter_answers_for_each_pixel(patch_size, image_size):
    model = vit.SemanticSegmenter(small(patch_size=patch_size, image_size=image_size), 5, decoder_dim=64)
    logits = model(torch.rand(2, 3, *image_size))
    assert logits.shape == (2, 5, *image_size)
    logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "mask_token")


def test_the_segmenter_keeps_places():
    """What changes in one corner of the image changes the logits most in that corner."""
    torch.manual_seed(0)
    model = vit.SemanticSegmenter(small(patch_size=8, image_size=64), 5).eval()
    images = torch.rand(1, 3, 64, 64)
    other = images.clone()
    other[..., :8, 48:56] = 0
    change = (model(other) - model(images)).abs().sum(1)[0].detach()
    assert change[:8, 48:56].mean() > 5 * change[32:].mean()


def test_recomputed_blocks_give_the_same_gradients():
    images, gradients = torch.rand(2, 3, 32, 32), []
    for recompute in (False, True):
        model = randomised(vit.ImageClassifier(small("relative"), 4)).train()
        model.checkpoint_blocks = recompute
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


# other image sizes ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("old, new, patch_size", [(32, 48, 4), (224, 384, 16), (48, 32, 4), ((32, 48), (48, 32), 8)])
def test_positions_carry_over_to_other_sizes(position, old, new, patch_size):
    old, new = (ViTConfig(image_size=size, patch_size=patch_size, dim=16, depth=2, heads=2, position=position) for size in (old, new))
    source, model = randomised(VisionTransformer(old)), VisionTransformer(new)
    state = vit.resize_positions(source.state_dict(), new, old.grid)
    model.load_state_dict(state)
    assert model(torch.rand(1, 3, *new.image_hw)).isfinite().all()
    for name, tensor in vit.resize_positions(source.state_dict(), old).items():
        assert torch.equal(tensor, source.state_dict()[name])
    constant = {name: torch.full_like(tensor, 3.0) for name, tensor in source.state_dict().items()}
    for name, tensor in vit.resize_positions(constant, new, old.grid).items():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 3.0))
    for name in state:
        if name == "pos_embed":
            assert torch.equal(state[name][:, 0], source.state_dict()[name][:, 0])
        elif name.endswith("table"):
            assert torch.equal(state[name][-3:], source.state_dict()[name][-3:])


def test_resized_positions_keep_their_orientation():
    """A ramp along the columns of a wide grid stays one along the columns, in E_pos and in the table of offsets."""
    old, new = (ViTConfig(image_size=size, patch_size=8, dim=8, depth=1, heads=2) for size in ((16, 40), (32, 80)))
    ramp = torch.arange(5.0).expand(2, 5).reshape(1, 10, 1)
    state = {"pos_embed": torch.cat([torch.zeros(1, 1, 8), ramp.expand(1, 10, 8)], 1)}
    grid = vit.resize_positions(state, new, old.grid)["pos_embed"][0, 1:, 0].view(4, 10)
    assert (grid.diff(dim=1) > -1e-3).all() and grid.diff(dim=0).abs().max() < 1e-5
    offsets = torch.arange(-4.0, 5).expand(3, 9).reshape(27, 1)
    table = torch.cat([offsets, torch.zeros(3, 1)]).expand(30, 2)
    resized = vit.resize_positions({"rel_pos_bias.relative_position_bias_table": table}, new, old.grid)
    rows = resized["rel_pos_bias.relative_position_bias_table"][:-3, 0].view(7, 19)
    assert rows[:, 9].abs().max() < 1e-5 and (rows.diff(dim=1) > -1e-3).all()    # no offset stays no offset


def test_positions_that_fit_no_grid():
    with pytest.raises(ValueError, match="pos_embed has 15 places: neither a square nor 4x4"):
        vit.resize_positions({"pos_embed": torch.zeros(1, 16, 24)}, small())


@pytest.mark.parametrize("wrong", [dict(patch_size=7), dict(heads=5), dict(depth=0), dict(drop_path=1.0), dict(position="sine"),
                                   dict(layer_scale=-1.0), dict(patch_size=64), dict(pixel_std=(0.0, 1.0, 1.0)),
                                   dict(init_std=0.0)])
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


# compiled -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("position", POSITIONS)
def test_training_compiles_to_one_graph_and_stays_compiled(position):
    """fullgraph=True refuses any break; a second batch with other masks of as many patches compiles nothing anew."""
    torch.compiler.reset()
    model = MaskedImageModel(small(position, layer_scale=0.1, drop_path=0.2), vocab_size=30).train()
    network, graphs = None, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    network = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(3):
        images, order = torch.rand(2, 3, 32, 32), torch.rand(2, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
        mask = (order < 6).view(2, 4, 4)
        torch.manual_seed(seed)
        compiled = network(images, mask, mask.flatten().nonzero()[:, 0])
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled, model(images, mask))
        compiled.sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("head", [lambda config: vit.ImageClassifier(config, 5), lambda config: vit.SemanticSegmenter(config, 5, 32)])
def test_fine_tuned_models_compile_to_one_graph(head):
    torch.compiler.reset()
    model, images = head(small("relative", layer_scale=0.1)).train(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))
