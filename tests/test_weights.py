import argparse
import dataclasses
import os
import pickle
from functools import partial

import pytest
import torch
from conftest import equal

import dvae
import training
import vit
import weights

ZIP_OR_OLDER = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
SMALL = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)
WIDE = dict(n_hid=128, n_blk_per_group=2, vocab_size=8192)


class Evil:
    """Runs a command when it is unpickled by anything that does not refuse."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# ---- Tokenizers ----

@pytest.fixture(scope="module")
def dall_e():
    return pytest.importorskip("dall_e")


@pytest.fixture
def public(dall_e, tmp_path):
    """encoder.pkl and decoder.pkl as DALL-E's own classes pickle, with random weights and biases."""
    def make(zipped=True, **sizes):
        torch.manual_seed(0)
        modules = [dall_e.Encoder(**sizes), dall_e.Decoder(**sizes)]
        for parameter in (p for module in modules for p in module.parameters() if p.dim() == 1):
            parameter.data.normal_(std=0.1)
        names = ("encoder.pkl", "decoder.pkl")
        return *modules, *(save(module, tmp_path / name, zipped) for module, name in zip(modules, names))
    return make


@pytest.mark.parametrize("zipped, sizes", [(True, SMALL), (False, SMALL), (True, WIDE)],
                         ids=["zip", "older", "wide"])
def test_dall_e_computes_the_same(dall_e, public, zipped, sizes):
    encoder, decoder, *paths = public(zipped, **sizes)
    model = weights.load_dalle(*paths)
    assert model.vocab_size == sizes["vocab_size"] and model.downsample == 8 and not model.training
    assert model.config == dict(vocab_size=sizes["vocab_size"], hidden=sizes["n_hid"], groups=4,
                                blocks_per_group=sizes["n_blk_per_group"], in_channels=3)
    for height, width in ((16, 16), (40, 24)):
        images = torch.rand(2, 3, height, width)
        logits = encoder(dall_e.map_pixels(images))
        torch.testing.assert_close(model.encode(images), logits, atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(1)
        assert torch.equal(model.tokenize(images), tokens)
        z = torch.nn.functional.one_hot(tokens, model.vocab_size).permute(0, 3, 1, 2).float()
        theirs = dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))
        torch.testing.assert_close(model.decode(tokens), theirs, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_without_decoder(public):
    *_, encoder, decoder = public(**SMALL)
    assert weights.load_tokenizer(encoder).decoder is not None         # found beside it
    decoder.unlink()
    model = weights.load_tokenizer(encoder)
    assert model.decoder is None and model.tokenize(torch.rand(1, 3, 16, 16)).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="has no decoder"):
        model.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


def test_a_tokenizer_of_ours(tmp_path):
    ours = randomised(dvae.DiscreteVAE(32, 8, 3, 1))
    kept = {"model": ours.state_dict(), "config": ours.config, "kind": "DiscreteVAE"}
    path = save(kept, tmp_path / "model.pt")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(weights.load_tokenizer(path).tokenize(images), ours.tokenize(images))
    save({"model": {}, "config": {}, "kind": "MaskedImageModel"}, path)
    with pytest.raises(training.UserError, match="^--tokenizer: .*model.pt holds a MaskedImageModel; "):
        weights.load_tokenizer(path)


# ---- Files that are refused ----

@ZIP_OR_OLDER
def test_a_pickle_that_calls_the_system(tmp_path, zipped):
    ran = tmp_path / "ran"
    path = save(Evil(f"touch {ran}"), tmp_path / "encoder.pkl", zipped)
    with pytest.raises(ValueError, match="encoder.pkl asks for (posix|nt).system, .*; nothing of it was run"):
        weights.load_dalle(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)                               # and it would have run
    assert ran.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_that_calls_the_system(tmp_path, protocol):
    ran, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(Evil(f"touch {ran}"), protocol=protocol))
    with pytest.raises(ValueError, match="encoder.pkl (asks for (posix|nt).system|is not a file of)"):
        weights.load_dalle(path)
    assert not ran.exists()


@ZIP_OR_OLDER
@pytest.mark.parametrize("wanted", [eval, getattr, torch.load, os.system, pickle.loads, torch.nn.Linear])
def test_nothing_else_is_found(tmp_path, zipped, wanted):
    with pytest.raises(ValueError, match="asks for "):
        weights.read(save([torch.zeros(3), wanted], tmp_path / "encoder.pkl", zipped))


def test_what_is_found_cannot_be_changed(tmp_path):
    """BUILD with (None, attributes) sets attributes of whatever is on the stack."""
    for module, name in (("dall_e.utils", "Conv2d"), ("torch._utils", "_rebuild_parameter")):
        found = f"c{module}\n{name}\n".encode()
        (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + found + b"N}X\x0c\x00\x00\x00dump_patches\x88s\x86b.")
        with pytest.raises(ValueError, match="x.pkl"):
            weights.read(tmp_path / "x.pkl")
        assert not hasattr(weights.ADMITTED[f"{module}.{name}"], "dump_patches")


def test_what_is_not_weights_is_named(tmp_path, public):
    *_, encoder, decoder = public(**SMALL)
    whole, module = encoder.read_bytes(), torch.load(encoder, weights_only=False)
    older = save(module, tmp_path / "older.pkl", zipped=False).read_bytes()
    state = module.state_dict()
    broken = torch.load(encoder, weights_only=False)
    del broken.blocks.group_2
    given = tmp_path / "given.pkl"

    def said(content, load=weights.load_dalle):
        if isinstance(content, bytes):
            given.write_bytes(content)
        else:
            save(content, given)
        with pytest.raises(ValueError) as error:
            load(given)
        assert "\n" not in str(error.value)
        return str(error.value)
    assert "is a web page" in said(b"<!DOCTYPE html>\n<html><body>Not found</body></html>")
    assert "is a web page" in said(b"\n  <?xml version='1.0'?><Error/>")
    assert "is empty" in said(b"")
    assert "is not a file of torch.save: it begins with b'hello'" in said(b"hello")
    for share in (0.001, 0.1, 0.5, 0.999):
        assert "is cut off or damaged" in said(older[:int(share * len(older))])
        assert "is cut off or damaged" in said(whole[:int(share * len(whole))])
    assert "a state_dict of 42 tensors, blocks.input.w first, not the pickled Encoder" in said(state)
    assert "holds a dict of model, config" in said({"model": state, "config": 1})
    assert "holds a Tensor" in said(torch.zeros(2))
    assert "is a pickle, but not one of torch.save" in said(pickle.dumps([1, 2], protocol=2))
    assert "holds a Decoder, not the pickled Encoder" in said(decoder.read_bytes())
    assert "holds an Encoder, not the pickled Decoder" in said(whole, partial(weights.load_dalle, encoder))
    assert "does not fit" in said(broken)
    with pytest.raises(ValueError, match="is a folder"):
        weights.load_dalle(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        weights.load_dalle(tmp_path / "nowhere.pkl")
    with pytest.raises(training.UserError, match="^--tokenizer: .*state_dict of .*encoder.pkl would do"):
        weights.load_tokenizer(save(state, given))


# ---- Backbones ----

POSITIONS = pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
SCALES = pytest.mark.parametrize("layer_scale", [0.0, 0.1])
SIZES = pytest.mark.parametrize("image_size", [32, 48])


def backbone(position="shared_relative", image_size=32, depth=2, layer_scale=0.0):
    return vit.ViTConfig(image_size=image_size, patch_size=8, dim=64, depth=depth, heads=1, position=position,
                         layer_scale=layer_scale)


@POSITIONS
@SCALES
def test_released_checkpoints(tmp_path, position, layer_scale):
    """{"model", "optimizer", "args": Namespace}, index buffers included: the config follows from shapes."""
    config = backbone(position, layer_scale=layer_scale)
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    path = save({"model": {**vit.MaskedImageModel(config, 50).state_dict(), **index},
                 "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 7,
                 "args": argparse.Namespace(lr=1e-3, model="beit_base")}, tmp_path / "beit.pth")
    loaded, info = weights.load(path)
    assert info == dict(source="released BEiT", task="masked image modeling", outputs=50, classes=None,
                        dropped=[], config=dataclasses.replace(config, drop_path=info["config"].drop_path))
    vit.MaskedImageModel(info["config"], 50).load_state_dict(loaded)


@POSITIONS
def test_models_of_the_first_edition(tmp_path, position):
    """Its classifiers and segmenters had a mask_token, which they did not use."""
    config, classes = backbone(position, layer_scale=0.1), list("abcde")
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5
    for model, more, inputs in ((vit.MaskedImageModel(config, 50), {"vocab_size": 50}, (images, mask)),
                                (vit.ImageClassifier(config, 5), {"classes": classes}, (images,)),
                                (vit.SemanticSegmenter(config, 5), {"classes": classes}, (images,))):
        state = {"mask_token": torch.randn(1, 1, 64), **randomised(model).state_dict()}
        path = save({"model": state, "config": {"vit": dataclasses.asdict(config), **more},
                     "kind": type(model).__name__}, tmp_path / "model.pt")
        built, info = weights.build(path)
        assert type(built) is type(model) and info["source"] == "ours" and info["config"] == config
        again = type(model)(config, 5)
        if len(inputs) == 1:
            assert not weights.initialise(again, path, classes)
        with torch.no_grad():
            expected = model(*inputs)
            assert torch.equal(built(*inputs), expected)
            assert len(inputs) == 2 or torch.equal(again.eval()(*inputs), expected)


def test_a_shared_table_goes_into_each_block(tmp_path):
    source = randomised(vit.MaskedImageModel(backbone(), 50))
    model = vit.ImageClassifier(backbone("relative"), 5)
    weights.initialise(model, save({"model": source.state_dict()}, tmp_path / "beit.pth"))
    for block in model.blocks:
        table = block.attn.relative_position_bias_table
        assert torch.equal(table, source.rel_pos_bias.relative_position_bias_table)
    assert torch.equal(model.fc_norm.weight, source.norm.weight)
    images = torch.rand(2, 3, 32, 32)
    for ours, theirs in zip(model.eval().hidden_states(images), source.hidden_states(images)):
        torch.testing.assert_close(ours, theirs)


TABLE = "rel_pos_bias.relative_position_bias_table"


@pytest.mark.parametrize("name, value, message", [
    ("blocks.1.mlp.fc1.bias", None, "lacks blocks.1.mlp.fc1.bias"),
    ("surprise", torch.zeros(1), "has, and the model has not, 1 tensors, surprise first"),
    ("blocks.0.attn.q_bias", "a word", "q_bias is not a tensor"),
    ("blocks.1.attn.proj.weight", torch.zeros(64, 32), "is 64x32, the other tensors call for 64x64"),
    (TABLE, torch.zeros(50, 1), "bias_table is 50x1, the other tensors call for 28x1"),
    (TABLE, torch.zeros(2, 1), "is no BEiT"),
    ("patch_embed.proj.weight", torch.zeros(64, 192), "is no BEiT")])
def test_anything_unexpected_is_an_error_and_changes_nothing(tmp_path, name, value, message):
    state = vit.MaskedImageModel(backbone(), 50).state_dict()
    state[name] = value
    if value is None:
        del state[name]
    model = vit.ImageClassifier(backbone(), 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(training.UserError, match=message):
        weights.initialise(model, save({"model": state}, tmp_path / "beit.pth"))
    assert equal(model.state_dict(), before)


def test_what_is_no_backbone(tmp_path):
    model = dvae.DiscreteVAE(8, 8, 2, 1)
    tokenizer = {"model": model.state_dict(), "config": model.config, "kind": "DiscreteVAE"}
    for value, message in (
            (tokenizer, "is a tokenizer"),
            ({"state_dict": {}}, "holds a dict of state_dict, not a Vision"),
            ([1, 2], "holds a list, not a Vision"),
            ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "a state_dict of 1 tensors, conv1.weight first")):
        with pytest.raises(ValueError, match=message):
            weights.load(save(value, tmp_path / "x.pt"))


# ---- timm and Hugging Face ----

LIMIT = dict(atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def theirs_config(transformers, config, **more):
    return transformers.BeitConfig(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.dim,
        num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=int(config.mlp_ratio * config.dim), layer_norm_eps=1e-6,
        layer_scale_init_value=config.layer_scale, drop_path_rate=0.0, attn_implementation="eager",
        use_absolute_position_embeddings=config.position == "absolute",
        use_relative_position_bias=config.position == "relative",
        use_shared_relative_position_bias=config.position == "shared_relative", **more)


def normalised(images, config):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    return (images - mean) / std


def written(folder):
    """The file of weights in a folder of Hugging Face's."""
    return next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))


def hub_names(state):
    """transformers 5's names in memory -> those of the files on the hub."""
    changed = {}
    for name, tensor in state.items():
        prefix = "beit." if name.startswith("beit.") else ""
        for new, old in ((f"{prefix}layers.", f"{prefix}encoder.layer."),
                         (f"{prefix}shared_position_bias.", f"{prefix}encoder.relative_position_bias."),
                         ("attention.q_proj", "attention.attention.query"),
                         ("attention.k_proj", "attention.attention.key"),
                         ("attention.v_proj", "attention.attention.value"),
                         ("attention.o_proj", "attention.output.dense"),
                         ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")):
            name = name.replace(new, old)
        if "encoder.layer." in name:
            name = name.replace(".relative_position_bias.", ".attention.attention.relative_position_bias.")
        changed[name] = tensor
    return changed


@POSITIONS
@SCALES
@SIZES
def test_hugging_face_to_us(transformers, tmp_path, position, layer_scale, image_size):
    config = backbone(position, image_size, layer_scale=layer_scale)
    theirs = randomised(transformers.BeitForMaskedImageModeling(
        theirs_config(transformers, config, vocab_size=50, use_mask_token=True)))
    images, mask = torch.rand(2, 3, image_size, image_size), torch.rand(2, *config.grid) < 0.5
    with torch.no_grad():
        logits = theirs(normalised(images, config), bool_masked_pos=mask.flatten(1)).logits[mask.flatten(1)]
        expected = theirs.beit(normalised(images, config), output_hidden_states=True, output_attentions=True)
    for spelling in (dict, hub_names):
        ours, info = weights.build(save(spelling(theirs.state_dict()), tmp_path / "pytorch_model.bin"))
        assert (info["source"], info["task"]) == ("Hugging Face", "masked image modeling")
        assert info["outputs"] == 50 and info["config"].position == position
        assert info["config"].image_size == image_size
        assert bool(info["config"].layer_scale) == bool(layer_scale)
        with torch.no_grad():
            torch.testing.assert_close(ours(images, mask), logits, **LIMIT)
            for layer, state in enumerate(ours.hidden_states(images)):
                attention = ours.attention_maps(images, layer)
                torch.testing.assert_close(state, expected.hidden_states[layer + 1], **LIMIT)
                torch.testing.assert_close(attention, expected.attentions[layer], **LIMIT)


@POSITIONS
@SCALES
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_us_to_hugging_face_and_back(transformers, tmp_path, monkeypatch, position, layer_scale, suffix):
    if suffix == ".bin":
        monkeypatch.setattr(weights, "safetensors_torch", lambda: None)
    config = backbone(position, layer_scale=layer_scale)
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5
    for model, theirs_class, output in (
            (vit.MaskedImageModel(config, 50), "BeitForMaskedImageModeling", "logits"),
            (vit.ImageClassifier(config, 5), "BeitForImageClassification", "logits"),
            (vit.VisionTransformer(config), "BeitModel", "last_hidden_state")):
        model, folder = randomised(model), tmp_path / theirs_class
        weights.save_huggingface(model, folder)
        them, loading = getattr(transformers, theirs_class).from_pretrained(folder, output_loading_info=True)
        assert not any(loading[f"{wrong}_keys"] for wrong in ("missing", "unexpected", "mismatched"))
        with torch.no_grad():
            if theirs_class == "BeitForMaskedImageModeling":
                own, masked = model(images, mask), mask.flatten(1)
                theirs = them.eval()(normalised(images, config), bool_masked_pos=masked).logits[masked]
            else:
                own, theirs = model(images), them.eval()(normalised(images, config))[output]
        torch.testing.assert_close(own, theirs, **LIMIT)
        back, _ = weights.build(written(folder))
        assert type(back) is type(model) and equal(back.state_dict(), model.state_dict())
        assert written(folder).suffix == suffix


@pytest.mark.long
def test_base_shape_equals_hugging_face_and_timm(transformers, tmp_path):
    beit = pytest.importorskip("timm.models.beit")
    config = vit.ViTConfig(position="relative", layer_scale=0.1, image_size=224)
    ours = vit.ImageClassifier(config, 1000).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("table", "bias", "head.weight")):
                parameter.normal_(std=0.1)
    weights.save_huggingface(ours, tmp_path)
    theirs = transformers.BeitForImageClassification.from_pretrained(tmp_path).eval()
    timms = beit.Beit(init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True).eval()
    weights.save_timm(ours, tmp_path / "timm.pt")
    timms.load_state_dict(torch.load(tmp_path / "timm.pt"), strict=False)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        logits = ours(images)
        torch.testing.assert_close(logits, theirs(normalised(images, config)).logits, **LIMIT)
        torch.testing.assert_close(logits, timms(normalised(images, config)), **LIMIT)


@POSITIONS
@SCALES
@SIZES
def test_timm_both_ways(tmp_path, position, layer_scale, image_size):
    beit = pytest.importorskip("timm.models.beit")
    config = backbone(position, image_size, layer_scale=layer_scale)

    def timms():
        return beit.Beit(img_size=image_size, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5,
                         global_pool="avg", qkv_bias=True, init_values=layer_scale or None,
                         use_abs_pos_emb=position == "absolute", use_rel_pos_bias=position == "relative",
                         use_shared_rel_pos_bias=position == "shared_relative").eval()
    theirs, images = randomised(timms()), torch.rand(2, 3, image_size, image_size)
    ours, info = weights.build(save(theirs.state_dict(), tmp_path / "timm.bin"))
    assert (info["source"], info["task"], info["outputs"]) == ("timm", "classification", 5)
    assert info["config"].position == position
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(normalised(images, config)), **LIMIT)
    back = timms()
    weights.save_timm(ours, tmp_path / "back.pt")
    missing, unexpected = back.load_state_dict(torch.load(tmp_path / "back.pt"), strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "k_bias")) for name in missing)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), back(normalised(images, config)), **LIMIT)


def test_the_backbone_of_hugging_faces_segmenter(transformers, tmp_path):
    config = backbone("relative", depth=4, layer_scale=0.1)
    theirs = randomised(transformers.BeitForSemanticSegmentation(
        theirs_config(transformers, config, out_indices=[1, 2, 3, 4], num_labels=7)))
    ours, info = weights.build(save(theirs.state_dict(), tmp_path / "pytorch_model.bin"))
    assert type(ours) is vit.VisionTransformer and info["dropped"] and info["outputs"] is None
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.beit(normalised(images, config), output_hidden_states=True).hidden_states
        for layer, state in enumerate(ours.hidden_states(images)):
            torch.testing.assert_close(state, expected[layer + 1], **LIMIT)


def test_a_segmenter_leaves_its_decoder_behind(tmp_path):
    model = randomised(vit.SemanticSegmenter(backbone("relative"), 5))
    weights.save_huggingface(model, tmp_path / "hf")
    state, _ = weights.load(written(tmp_path / "hf"))
    assert not any(name.startswith(("decoder", "head")) for name in state)
    assert torch.equal(state["norm.weight"], model.norm.weight)
    with pytest.raises(ValueError, match="timm has no place"):
        weights.save_timm(model, tmp_path / "x.pt")


def test_safetensors_are_read_where_the_package_is(tmp_path, monkeypatch):
    pytest.importorskip("safetensors.torch")
    model, path = randomised(vit.ImageClassifier(backbone("relative"), 5)), tmp_path / "timm.safetensors"
    weights.save_timm(model, path)
    assert torch.equal(weights.load(path)[0]["head.weight"], model.head.weight)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut off or damaged"):
        weights.load(tmp_path / "cut.safetensors")
    monkeypatch.setattr(weights, "safetensors_torch", lambda: None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        weights.load(path)


@pytest.mark.parametrize("target", ["huggingface", "timm", "beit"])
def test_command_line(tmp_path, capsys, monkeypatch, target):
    model, out = randomised(vit.ImageClassifier(backbone("relative"), 5)), tmp_path / "out"
    path = save({"model": model.state_dict()}, tmp_path / "beit.pth")
    monkeypatch.setattr("sys.argv", ["weights.py", str(path), "--to", target, str(out)])
    weights.main()
    said = capsys.readouterr().out
    for words in ("released BEiT, ImageClassifier", "classification, 5 classes", "32x32 pixels"):
        assert words in said
    state, _ = weights.load(written(out) if target == "huggingface" else out)
    assert torch.equal(state["head.weight"], model.head.weight)
