import argparse
import collections
import dataclasses
import functools
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import equal

import training
import vit
import weights

ZIP_OR_OLDER = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
POSITIONS = pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
SCALES = pytest.mark.parametrize("layer_scale", [0.0, 0.1])
SIZES = pytest.mark.parametrize("image_size", [32, 48])
close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=0)


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def backbone(position="shared_relative", image_size=32, depth=2, layer_scale=0.0, heads=1):
    return vit.ViTConfig(image_size=image_size, patch_size=8, dim=64, depth=depth, heads=heads,
                         position=position, layer_scale=layer_scale)


def kept(model, path, classes=None):
    """model.pt as a run leaves it."""
    config = {"vit": dataclasses.asdict(model.config), "classes": classes and list(classes)}
    return save({"model": model.state_dict(), "config": config, "kind": type(model).__name__}, path)


# ---- Tokenizers ----

@pytest.fixture
def public(tmp_path):
    """encoder.pkl and decoder.pkl as DALL-E's own classes pickle, with random weights and biases."""
    dall_e = pytest.importorskip("dall_e")

    def make(zipped=True, hidden=64, blocks=1, codes=512):
        torch.manual_seed(0)
        parts = [Part(n_hid=hidden, n_blk_per_group=blocks, vocab_size=codes)
                 for Part in (dall_e.Encoder, dall_e.Decoder)]
        for parameter in (p for part in parts for p in part.parameters() if p.dim() == 1):
            parameter.data.normal_(std=0.1)
        names = ("encoder.pkl", "decoder.pkl")
        return *parts, *(save(part, tmp_path / name, zipped) for part, name in zip(parts, names))
    return make


@pytest.mark.parametrize("sizes", [(True, 64, 1, 512), (False, 64, 1, 512), (True, 128, 2, 8192)])
def test_dall_e_computes_the_same(public, sizes):
    dall_e = pytest.importorskip("dall_e")
    encoder, decoder, *paths = public(*sizes)
    model = weights.load_dalle(*paths)
    assert not model.training and list(model.config.values()) == [sizes[3], sizes[1], 4, sizes[2], 3]
    images = torch.rand(2, 3, 40, 24)
    logits = encoder(dall_e.map_pixels(images))
    close(model.encode(images), logits)
    assert torch.equal(model.tokenize(images), logits.argmax(1))
    z = torch.nn.functional.one_hot(logits.argmax(1), model.vocab_size).permute(0, 3, 1, 2).float()
    close(model.decode(logits.argmax(1)), dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3])))


def test_parts_of_dall_e(public, tmp_path):
    module, _, encoder, decoder = public()
    del module.blocks.group_2
    broken, state = save(module, tmp_path / "x.pkl"), save(module.state_dict(), tmp_path / "y.pkl")
    for paths, message in (((decoder,), "decoder.pkl holds a Decoder, not DALL-E's pickled Encoder"),
                           ((encoder, encoder), "encoder.pkl holds a Encoder, not DALL-E's pickled Decoder"),
                           ((broken,), "x.pkl does not fit DALL-E's architecture .*group_2"),
                           ((state,), "y.pkl holds a dict, not DALL-E's pickled Encoder")):
        with pytest.raises(ValueError, match=message):
            weights.load_dalle(*paths)
    assert weights.load_tokenizer(encoder).decoder is not None         # found beside it
    decoder.unlink()
    assert weights.load_tokenizer(encoder).decoder is None


# ---- Files that could do harm ----

class Call:
    """Calls a function when it is unpickled by anything that does not refuse."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("load", [weights.load, weights.load_dalle, weights.load_tokenizer])
def test_a_payload_does_not_run(tmp_path, load):
    ran, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    payload = Call(os.system, f"touch {ran}")
    files = [save({"model": payload}, path, zipped).read_bytes() for zipped in (True, False)]
    for content in files + [pickle.dumps(payload, protocol) for protocol in (0, 2, 4, 5)]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="encoder.pkl asks for (posix|nt).system, .* it was run"):
            load(path)
    assert not ran.exists()
    pickle.loads(content)                                              # and it would have run
    assert ran.exists()


@ZIP_OR_OLDER
@pytest.mark.parametrize("wanted", [eval, getattr, pickle.loads, torch.load, torch.nn.Linear, np.load,
                                    torch.storage._load_from_bytes])
def test_nothing_else_is_found(tmp_path, zipped, wanted):
    with pytest.raises(ValueError, match=f"asks for .*{wanted.__name__}"):
        weights.read(save([torch.zeros(3), wanted], tmp_path / "x.pt", zipped))


@pytest.mark.parametrize("name", ["torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter",
                                  "dall_e.utils\nConv2d", "collections\nOrderedDict"])
def test_what_is_found_cannot_be_changed(tmp_path, monkeypatch, name):
    """BUILD sets attributes of what is on the stack; torch.load writes a file if a class has dump_patches."""
    monkeypatch.chdir(tmp_path)
    flag = b"X\x0c\0\0\0dump_patches\x88s"
    header = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
    for state in (b"}" + flag, b"N}" + flag + b"\x86"):
        body = b"\x80\x02(U\x06modulec" + name.encode() + b"\n" + state + b"bU\x01aU\x01btQ."
        pathlib.Path("x.pkl").write_bytes(b"".join(pickle.dumps(value, 2) for value in header) + body)
        with pytest.raises(ValueError, match="x.pkl "):
            weights.read("x.pkl")
    assert os.listdir() == ["x.pkl"]
    for known in (weights.StandIn, weights.Rebuilt, collections.OrderedDict):
        assert not hasattr(known, "dump_patches")


# ---- Files that are refused ----

def test_damaged_files_and_other_files(tmp_path, monkeypatch):
    state, path = vit.MaskedImageModel(backbone(), 50).state_dict(), tmp_path / "x.pt"
    older, whole = (save(state, path, zipped).read_bytes() for zipped in (False, True))
    cuts = [file[:int(share * len(file))] for file in (older, whole) for share in (0.001, 0.5, 0.999)]
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load runs code"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/constants.pkl", "of TorchScript")
    for content in (b"", b"<html>not found</html>", b"hello", pickle.dumps([1]), path.read_bytes(), *cuts):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.pt is cut off, damaged or no file of weights \(\w+: .*\)$"):
            weights.load(path)
    at = whole.index(state["cls_token"].numpy().tobytes())
    path.write_bytes(whole[:at] + b"\0" + whole[at + 1:])
    with pytest.raises(ValueError, match="x.pt is damaged: .*data/.* fails its checksum"):
        weights.load(path)
    monkeypatch.setattr(weights, "safetensors", None)
    for name, message in (("", "is a folder, not a file: give .*model.safetensors or pytorch_model.bin"),
                          ("model.safetensors.index.json", "holds no weights: give model.safetensors or"),
                          ("y.safetensors", "needs a package: pip install safetensors"),
                          ("gone.pt", "does not exist")):
        if name != "gone.pt":
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"^{tmp_path / name} {message}"):
            weights.build(tmp_path / name)
    for value, message in ((state | {"norm.bias": "a"}, "has norm.bias, which is not a tensor"),
                           (state | {"module.norm.bias": state["norm.bias"]}, "has norm.bias twice"),
                           ([1, 2], "holds a list, not a"), ({"state_dict": {}}, "holds a dict, not a BEiT")):
        with pytest.raises(ValueError, match=f"x.pt {message}"):
            weights.load(save(value, path))


# ---- The released BEiT's and our own ----

BESIDE = {    # what a training may write beside the weights; released: numpy scalars in optimizer groups
    "optimizer": {"param_groups": [{"lr": np.float64(0.1), "weight_decay": np.float32(0.05)}]},
    "args": argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("/a")), "path": pathlib.PosixPath("/a"),
    "windows": pathlib.PureWindowsPath("a"), "size": torch.Size([1]), "set": {1}, "random": np.arange(3),
    "device": torch.device("cpu"), "odd": Call(np.dtype, "O"), "bytes": b"\x80", "dtype": torch.float16,
    "counts": collections.defaultdict(list, a=[1]), "factory": Call(collections.defaultdict, set)}


@POSITIONS
@SCALES
@ZIP_OR_OLDER
def test_released_checkpoints(tmp_path, position, layer_scale, zipped):
    """The config follows from shapes; what lies beside the weights, and index buffers, do not matter."""
    config = backbone(position, layer_scale=layer_scale)
    state = vit.MaskedImageModel(config, 50).state_dict()
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    path = save({"model": {**state, **index}, **BESIDE}, tmp_path / "beit.pth", zipped)
    loaded, info = weights.load(path)
    assert equal(loaded, state) and equal(weights.build(path)[0].state_dict(), state)
    assert info == dict(source="released BEiT", task="masked image modeling", outputs=50, classes=None,
                        dropped=[], config=dataclasses.replace(config, drop_path=info["config"].drop_path))
    found = weights.read(path)
    inert = [found[name] for name in list(BESIDE)[1:10]] + [found["factory"]["missing"]]
    inert += found["optimizer"]["param_groups"][0].values()
    assert all(isinstance(value, weights.StandIn) for value in inert)


@pytest.mark.parametrize("nest", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_prefixes_of_wrappers(tmp_path, prefix, nest):
    state = vit.VisionTransformer(backbone("relative")).half().state_dict()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    wrapped |= {"decode_head.a": torch.zeros(1), f"{prefix}fpn1.0.weight": torch.zeros(1)}
    loaded, info = weights.load(save({nest: wrapped}, tmp_path / "x.pth"))
    assert info["dropped"] == ["decode_head.a", "fpn1.0.weight"] and info["source"] == "released BEiT"
    assert equal(loaded, {name: tensor.float() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


@POSITIONS
def test_models_of_the_first_edition(tmp_path, position):
    """Its classifiers and segmenters had a mask_token, which they did not use."""
    config, path = backbone(position, layer_scale=0.1, heads=4), tmp_path / "model.pt"
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5
    for Model, inputs in ((vit.MaskedImageModel, (images, mask)), (vit.ImageClassifier, (images,)),
                          (vit.SemanticSegmenter, (images,))):
        model, again = randomised(Model(config, 5)), Model(config, 5).eval()
        found = torch.load(kept(model, path, "abcde"), weights_only=True)
        found["model"].setdefault("mask_token", torch.randn(1, 1, 64))
        built, info = weights.build(save(found, path))
        assert type(built) is Model and info["source"] == "ours" and info["config"] == config
        assert weights.initialise(again, path, list("abcde")) == []
        with torch.no_grad():
            assert torch.equal(built(*inputs), model(*inputs)) and torch.equal(again(*inputs), model(*inputs))


# ---- Into a model ----

@SIZES
def test_from_pre_training_to_a_classifier(tmp_path, capsys, image_size):
    source, name = randomised(vit.MaskedImageModel(backbone(), 50)), "relative_position_bias_table"
    path = save({"model": source.state_dict()}, tmp_path / "beit.pth")
    model = vit.ImageClassifier(backbone("relative", image_size), 5)
    new = [f"{name}.{part}" for name in ("fc_norm", "head") for part in ("weight", "bias")]
    assert weights.initialise(model, path) == new
    table = vit.resize_positions({name: source.rel_pos_bias.get_parameter(name)}, model.config, (4, 4))[name]
    assert all(torch.equal(block.attn.relative_position_bias_table, table) for block in model.blocks)
    assert (model.fc_norm.weight == 1).all() and not model.fc_norm.bias.any()    # as released
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    taken, *rest = capsys.readouterr().out.splitlines()
    assert taken.startswith(f"taken from {path} (released BEiT, masked image modeling): ")
    grids = "; positions, from 4x4 to 6x6" if image_size == 48 else ""
    assert rest == [f"converted: the shared position table, into one for each block{grids}",
                    "new: fc_norm, head; left behind: mask_token, norm, lm_head"]


@pytest.mark.parametrize("theirs, taken", [
    ("abc", True), ("cab", True), ("abd", False), ("aab", False), (None, True)])
@pytest.mark.parametrize("Model", [vit.ImageClassifier, vit.SemanticSegmenter])
def test_a_head_follows_the_names_of_the_classes(tmp_path, Model, theirs, taken):
    source, model = randomised(Model(backbone("relative"), 3)), Model(backbone("relative"), 3)
    new = weights.initialise(model, kept(source, tmp_path / "model.pt", theirs), list("abc"))
    assert ("head.weight" not in new) == taken
    rows = [(theirs or "abc").index(name) for name in "abc"] if taken else []
    for ours, others in zip(model.head.parameters(), source.head.parameters()):
        assert torch.equal(ours, others[rows]) if taken else not torch.equal(ours, others)


def test_a_head_for_the_class_token_is_not_applied_to_the_mean(tmp_path):
    """timm's BEiT with global_pool="token": norm before the head, and no fc_norm."""
    model = vit.ImageClassifier(backbone(), 3)
    state = {name.replace("fc_norm", "norm"): tensor for name, tensor in model.state_dict().items()}
    save(state, tmp_path / "token.pth")
    with pytest.raises(ValueError, match=r"token.pth has a head for \[S\]; our models average the patches"):
        weights.build(tmp_path / "token.pth")


@pytest.mark.parametrize("name, value, message", [
    ("blocks.1.mlp.fc1.bias", None, "Missing key.*blocks.1.mlp.fc1.bias"),
    ("surprise", torch.zeros(1), "Unexpected key.*surprise"),
    ("blocks.1.attn.proj.weight", torch.zeros(64, 32), "size mismatch for blocks.1.attn.proj.weight"),
    ("rel_pos_bias.relative_position_bias_table", torch.zeros(2, 1), "isqrt"),
    ("patch_embed.proj.weight", torch.zeros(64, 192), "not enough values")])
def test_anything_unexpected_is_an_error(tmp_path, name, value, message):
    state = {**vit.MaskedImageModel(backbone(), 50).state_dict(), name: value}
    path = save({name: state[name] for name in state if state[name] is not None}, tmp_path / "x.pth")
    with pytest.raises(training.UserError, match=f"^--init: [^\\n]*x.pth [^\\n]*{message}[^\\n]*$"):
        weights.initialise(vit.ImageClassifier(backbone(), 5), path)
    with pytest.raises(ValueError, match=f"x.pth [^\\n]*{message}[^\\n]*$"):
        weights.build(path)


# ---- timm and Hugging Face ----

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def theirs_config(transformers, config, **more):
    fields = dict(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.dim,
        num_hidden_layers=config.depth, num_attention_heads=config.heads, intermediate_size=4 * config.dim,
        layer_norm_eps=1e-6, layer_scale_init_value=config.layer_scale, attn_implementation="eager",
        use_absolute_position_embeddings=config.position == "absolute",
        use_relative_position_bias=config.position == "relative",
        use_shared_relative_position_bias=config.position == "shared_relative")
    return transformers.BeitConfig(**{**fields, **more})


def normalised(images, config):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    return (images - mean) / std


def written(folder):
    """The file of weights in a folder of Hugging Face's."""
    return next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))


@torch.no_grad()
def assert_same(ours, theirs):
    """Our model and Hugging Face's compute the same outputs, hidden states and attention."""
    images, masks = torch.rand(2, 3, *ours.config.image_hw), []
    if isinstance(ours, vit.MaskedImageModel):
        masks = [torch.ones(2, *ours.config.grid, dtype=torch.bool)]
    them = theirs.eval()(normalised(images, ours.config), *(mask.flatten(1) for mask in masks),
                         output_hidden_states=True, output_attentions=True)
    expected = them.logits.flatten(0, -2) if "logits" in them else them.last_hidden_state
    close(ours(images, *masks), expected)
    if not masks:
        for layer, state in enumerate(ours.hidden_states(images)):
            close(state, them.hidden_states[layer + 1])
            close(ours.attention_maps(images, layer), them.attentions[layer])


@POSITIONS
@SCALES
@SIZES
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("Model", ["BeitForMaskedImageModeling", "BeitForImageClassification", "BeitModel"])
def test_hugging_face_both_ways(transformers, tmp_path, monkeypatch, Model, suffix, image_size, layer_scale,
                                position):
    if suffix == ".bin":
        monkeypatch.setattr(weights, "safetensors", None)
    config, Theirs = backbone(position, image_size, layer_scale=layer_scale), getattr(transformers, Model)
    asked = theirs_config(transformers, config, vocab_size=50, num_labels=5, use_mask_token="Mask" in Model)
    theirs = randomised(Theirs(asked))
    ours, info = weights.build(save(theirs.state_dict(), tmp_path / "x.bin"))    # memory's names, no config
    assert info["source"] == "Hugging Face" and info["config"].position == position
    assert_same(ours, theirs)
    weights.save_huggingface(ours, tmp_path / "back")
    back, loading = Theirs.from_pretrained(tmp_path / "back", output_loading_info=True,
                                           attn_implementation="eager")
    assert not any(loading[f"{wrong}_keys"] for wrong in ("missing", "unexpected", "mismatched"))
    assert equal(back.state_dict(), theirs.state_dict())
    assert_same(ours, back)
    again, info = weights.build(written(tmp_path / "back"))            # in the hub's names, with config.json
    assert written(tmp_path / "back").suffix == suffix and equal(again.state_dict(), ours.state_dict())
    assert info["config"].image_size == image_size and bool(info["config"].layer_scale) == bool(layer_scale)


@pytest.mark.parametrize("change, wrong", [
    ({}, None), ({"num_attention_heads": 4}, None), ({"image_size": [32, 48]}, None),
    ({"layer_norm_eps": 1e-12}, None), ({"layer_norm_eps": 1e-3}, None),
    ({"hidden_act": "relu"}, "hidden_act relu"), ({"use_mean_pooling": False}, "use_mean|norm.* twice"),
    ({"id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}}, None)])
@pytest.mark.parametrize("Model", ["BeitForImageClassification", "BeitModel", "BeitForMaskedImageModeling"])
def test_config_json_is_obeyed_or_refused(transformers, tmp_path, change, wrong, Model):
    """With initial weights as small as Hugging Face's, where eps counts."""
    config = backbone("relative" if "image_size" in change else "absolute", heads=2)
    asked = {"id2label": {0: "x", 1: "y", 2: "z"}, "vocab_size": 3, "use_mask_token": "Mask" in Model}
    theirs = getattr(transformers, Model)(theirs_config(transformers, config, **{**asked, **change}))
    theirs.save_pretrained(tmp_path)
    path = written(tmp_path)
    if wrong and (Model, change) != ("BeitModel", {"use_mean_pooling": False}):
        with pytest.raises(ValueError, match=f"safetensors has ({wrong})"):
            weights.build(path)
        return
    ours, info = weights.build(path)
    assert_same(ours, theirs)
    names = list(theirs.config.id2label.values())
    named = Model == "BeitForImageClassification" and names[0] != "LABEL_0"
    assert info["classes"] == (names if named else None)
    weights.save_huggingface(ours, tmp_path / "back", info["classes"])
    back = getattr(transformers, Model).from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert_same(ours, back)
    assert not named or list(back.config.id2label.values()) == names
    weights.initialise(vit.VisionTransformer(info["config"]), path)
    for field, value in (("heads", 8), ("layer_norm_eps", 1e-5)):
        other = dataclasses.replace(info["config"], **{field: value})
        with pytest.raises(training.UserError, match=f"--init: .* the model {value}"):
            weights.initialise(vit.VisionTransformer(other), path)


def test_json_beside_hugging_faces_weights(transformers, tmp_path):
    config = dataclasses.replace(backbone("relative"), pixel_std=(0.5, 0.4, 0.3))
    weights.save_huggingface(vit.ImageClassifier(config, 3), tmp_path)
    assert weights.load(written(tmp_path))[1]["config"].pixel_std == config.pixel_std
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor(torch.ones(3, 40, 40), do_rescale=False, return_tensors="pt")["pixel_values"]
    close(pixels, normalised(torch.ones(1, 3, 32, 32), config))
    for content, message in (('{"id2label": {"0": "a"}}', "has 3 classes and 1 names"), ("{", "is no BEiT")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            weights.load(written(tmp_path))
    content = '{"id2label": {"10": "c", "9": "b", "1": "a"}, "num_attention_heads": 1}'    # as ImageNet-22K's
    (tmp_path / "config.json").write_text(content)
    assert weights.load(written(tmp_path))[1]["classes"] == ["a", "b", "c"]


def test_decoders_of_segmenters_are_left_behind(transformers, tmp_path):
    config = backbone("relative", depth=4, layer_scale=0.1)
    theirs = randomised(transformers.BeitForSemanticSegmentation(
        theirs_config(transformers, config, out_indices=[1, 2, 3, 4], num_labels=7)))
    ours, info = weights.build(save(theirs.state_dict(), tmp_path / "pytorch_model.bin"))
    assert info["dropped"] and info["outputs"] is None
    assert_same(ours, theirs.beit)
    model = vit.SemanticSegmenter(config, 5)
    weights.save_huggingface(model, tmp_path / "hf")
    state = weights.build(written(tmp_path / "hf"))[0].state_dict()
    assert equal(state, {name: model.state_dict()[name] for name in state}) and "norm.weight" in state
    with pytest.raises(ValueError, match="timm has no place"):
        weights.save_timm(model, tmp_path / "x.pt")


@POSITIONS
@SCALES
@SIZES
def test_timm_both_ways(tmp_path, position, layer_scale, image_size):
    beit = pytest.importorskip("timm.models.beit")
    config = backbone(position, image_size, layer_scale=layer_scale)
    theirs, back = (beit.Beit(
        img_size=image_size, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=5,
        init_values=layer_scale or None, use_abs_pos_emb=position == "absolute",
        use_rel_pos_bias=position == "relative", use_shared_rel_pos_bias=position == "shared_relative").eval()
        for _ in range(2))
    ours, info = weights.build(save(randomised(theirs).state_dict(), tmp_path / "timm.bin"))
    assert (info["source"], info["task"], info["outputs"]) == ("timm", "classification", 5)
    weights.save_timm(ours, tmp_path / "back.pt")
    missing, unexpected = back.load_state_dict(torch.load(tmp_path / "back.pt"), strict=False)
    assert not unexpected and all(name.endswith(("relative_position_index", "k_bias")) for name in missing)
    images = torch.rand(2, 3, image_size, image_size)
    with torch.no_grad():
        close(ours(images), theirs(normalised(images, config)))
        close(ours(images), back(normalised(images, config)))
    weights.save_timm(vit.MaskedImageModel(config, 50), tmp_path / "back.pt")
    _, unexpected = back.load_state_dict(torch.load(tmp_path / "back.pt"), strict=False)
    assert unexpected == ["norm.weight", "norm.bias"]                  # without [M] and token head


@pytest.mark.parametrize("target", ["huggingface", "timm", "beit"])
def test_command_line(tmp_path, capsys, monkeypatch, target):
    model, out = vit.ImageClassifier(backbone("relative"), 5), tmp_path / "out"
    path = kept(model, tmp_path / "model.pt", "vwxyz")
    monkeypatch.setattr("sys.argv", ["weights.py", str(path), "--to", target, str(out)])
    weights.main()
    said = capsys.readouterr().out
    for words in ("ours, ImageClassifier, 5 outputs", "image_size=32", f"written to {out}, for {target}"):
        assert words in said
    built, info = weights.build(written(out) if target == "huggingface" else out)
    assert equal(built.state_dict(), model.state_dict())
    assert info["classes"] == (list("vwxyz") if target == "huggingface" else None)
