import argparse
import dataclasses
import os
import pickle

import pytest
import torch

import dvae
import training
import vit
import weights

ZIP_OR_OLDER = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])


class Evil:
    """Runs a command when it is unpickled by anything that does not refuse."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save(value, path, zipped=True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


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
        return *modules, *(save(module, tmp_path / f"{module._get_name().lower()}.pkl", zipped) for module in modules)
    return make


@ZIP_OR_OLDER
@pytest.mark.parametrize("sizes", [dict(n_hid=64, n_blk_per_group=1, vocab_size=512), dict(n_hid=128, n_blk_per_group=2, vocab_size=8192)],
                         ids=["small", "wide"])
def test_dall_e_computes_the_same(dall_e, public, zipped, sizes):
    encoder, decoder, *paths = public(zipped, **sizes)
    model = weights.load_dalle(*paths)
    assert model.vocab_size == sizes["vocab_size"] and model.downsample == 8 and not model.training
    assert model.config == dict(vocab_size=sizes["vocab_size"], hidden=sizes["n_hid"], groups=4, blocks_per_group=sizes["n_blk_per_group"], in_channels=3)
    for height, width in ((16, 16), (40, 24), (112, 112)):
        images = torch.rand(2, 3, height, width)
        logits = encoder(dall_e.map_pixels(images))
        torch.testing.assert_close(model.encode(images), logits, atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(1)
        assert torch.equal(model.tokenize(images), tokens)
        z = torch.nn.functional.one_hot(tokens, model.vocab_size).permute(0, 3, 1, 2).float()
        theirs = dall_e.unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))
        torch.testing.assert_close(model.decode(tokens), theirs, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_without_decoder(public):
    *_, encoder, decoder = public(n_hid=64, n_blk_per_group=1, vocab_size=512)
    assert weights.load_tokenizer(encoder).decoder is not None         # found beside it
    decoder.unlink()
    model = weights.load_tokenizer(encoder)
    assert model.decoder is None and model.tokenize(torch.rand(1, 3, 16, 16)).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="has no decoder"):
        model.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


def test_a_tokenizer_of_ours(tmp_path):
    ours = dvae.DiscreteVAE(32, 8, 3, 1)
    path = save({"model": ours.state_dict(), "config": ours.config, "kind": "DiscreteVAE"}, tmp_path / "model.pt")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(weights.load_tokenizer(path).tokenize(images), ours.tokenize(images))
    save({"model": {}, "config": {}, "kind": "MaskedImageModel"}, path)
    with pytest.raises(training.UserError, match="^--tokenizer: .*model.pt holds a MaskedImageModel; a model.pt of dvae.py or"):
        weights.load_tokenizer(path)


@ZIP_OR_OLDER
def test_a_pickle_that_calls_the_system(tmp_path, zipped):
    ran = tmp_path / "ran"
    path = save(Evil(f"touch {ran}"), tmp_path / "encoder.pkl", zipped)
    with pytest.raises(ValueError, match=r"encoder.pkl asks for (posix|nt).system, which weights do not need; nothing of it was run"):
        weights.load_dalle(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)                               # and it would have run
    assert ran.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_that_calls_the_system(tmp_path, protocol):
    ran, path = tmp_path / "ran", tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(Evil(f"touch {ran}"), protocol=protocol))
    with pytest.raises(ValueError) as error:
        weights.load_dalle(path)
    assert not ran.exists() and "\n" not in str(error.value) and "encoder.pkl" in str(error.value)
    if protocol:
        assert "asks for posix.system" in str(error.value)


@ZIP_OR_OLDER
@pytest.mark.parametrize("wanted", [eval, exec, getattr, torch.load, os.system, pickle.loads, torch.nn.Linear], ids=lambda f: f.__name__)
def test_nothing_else_is_found(tmp_path, zipped, wanted):
    path = save([torch.zeros(3), wanted], tmp_path / "encoder.pkl", zipped)
    with pytest.raises(ValueError, match="asks for "):
        weights.read(path)


def test_what_is_found_cannot_be_changed(tmp_path):
    """BUILD with (None, attributes) sets attributes of whatever is on the stack."""
    for module, name in (("dall_e.utils", "Conv2d"), ("torch._utils", "_rebuild_parameter")):
        tampering = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}X\x0c\x00\x00\x00dump_patches\x88s\x86b."
        (tmp_path / "x.pkl").write_bytes(tampering)
        with pytest.raises(ValueError, match="x.pkl"):
            weights.read(tmp_path / "x.pkl")
        assert not hasattr(weights.ADMITTED[f"{module}.{name}"], "dump_patches")


def test_what_is_not_weights_is_named(tmp_path, public):
    *_, encoder, decoder = public(n_hid=64, n_blk_per_group=1, vocab_size=512)
    whole = encoder.read_bytes()

    def said(content, load=weights.load_dalle):
        path = tmp_path / "given.pkl"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save(content, path)
        with pytest.raises(ValueError) as error:
            load(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is a web page" in said(b"<!DOCTYPE html>\n<html><body>Not found</body></html>")
    assert "is a web page" in said(b"\n  <?xml version='1.0'?><Error/>")
    assert "is empty" in said(b"")
    assert "is not a file of torch.save: it begins with b'hello'" in said(b"hello")
    for share in (0.1, 0.5, 0.999):
        assert "is cut off or damaged" in said(whole[:int(share * len(whole))])
    older = save(torch.load(encoder, weights_only=False), tmp_path / "older.pkl", zipped=False).read_bytes()
    for share in (0.001, 0.1, 0.5, 0.999):
        assert "is cut off or damaged" in said(older[:int(share * len(older))])
    state = torch.load(encoder, weights_only=False).state_dict()
    assert "holds a state_dict of" in said(state) and "blocks.input.w first, not the pickled Encoder" in said(state)
    assert "holds a dict of model, config" in said({"model": state, "config": 1})
    assert "holds a Tensor" in said(torch.zeros(2))
    assert "is a pickle, but not one of torch.save" in said(pickle.dumps([1, 2], protocol=2))
    assert "holds a Decoder, not the pickled Encoder" in said(decoder.read_bytes())
    assert "holds an Encoder, not the pickled Decoder" in said(whole, lambda path: weights.load_dalle(encoder, path))
    broken = torch.load(encoder, weights_only=False)
    del broken.blocks.group_2
    assert "does not fit" in said(broken)
    with pytest.raises(ValueError, match="is a folder"):
        weights.load_dalle(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        weights.load_dalle(tmp_path / "nowhere.pkl")
    with pytest.raises(training.UserError, match="^--tokenizer: .*state_dict of .*; a model.pt of dvae.py or DALL-E's encoder.pkl would do"):
        weights.load_tokenizer(save(state, tmp_path / "state.pt"))


# backbones -----------------------------------------------------------------------------------------------------------

def backbone(position="shared_relative", **more):
    return vit.ViTConfig(**{"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 1, "position": position, **more})


@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_released_checkpoints(tmp_path, position, layer_scale):
    """{"model", "optimizer", "args": Namespace}, index buffers included: nothing is run, and the config follows from shapes."""
    config = backbone(position, layer_scale=layer_scale)
    model = vit.MaskedImageModel(config, 50)
    state = {**model.state_dict(), "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    path = save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 7,
                 "args": argparse.Namespace(lr=1e-3, model="beit_base")}, tmp_path / "beit.pth")
    loaded, info = weights.load(path)
    assert info == dict(source="released BEiT", task="masked image modeling", outputs=50, classes=None,
                        config=dataclasses.replace(config, drop_path=info["config"].drop_path))
    vit.MaskedImageModel(info["config"], 50).load_state_dict(loaded)


def test_a_shared_table_goes_into_each_block(tmp_path):
    source = vit.MaskedImageModel(backbone(), 50)
    torch.nn.init.normal_(source.rel_pos_bias.relative_position_bias_table)
    path = save({"model": source.state_dict()}, tmp_path / "beit.pth")
    model = vit.ImageClassifier(backbone("relative"), 5)
    weights.initialise(model, path)
    for block in model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, source.rel_pos_bias.relative_position_bias_table)
    assert torch.equal(model.fc_norm.weight, source.norm.weight)
    images = torch.rand(2, 3, 32, 32)
    for ours, theirs in zip(model.eval().hidden_states(images), source.eval().hidden_states(images)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("blocks.1.mlp.fc1.bias"), "lacks 1 tensors, blocks.1.mlp.fc1.bias first"),
    (lambda state: state.update(surprise=torch.zeros(1)), "has, and the model has not, 1 tensors, surprise first"),
    (lambda state: state.update({"blocks.0.mlp.fc2.bias": torch.zeros(3)}), "blocks.0.mlp.fc2.bias is 3 there and 64 in the model"),
    (lambda state: state.update({"rel_pos_bias.relative_position_bias_table": torch.zeros(50, 1)}), "positions for 47 places|is no BEiT|has 47 places"),
    (lambda state: state.update({"blocks.0.attn.q_bias": "a word"}), "q_bias is not a tensor")])
def test_anything_unexpected_is_an_error_and_changes_nothing(tmp_path, change, message):
    source = vit.MaskedImageModel(backbone(), 50)
    state = source.state_dict()
    change(state)
    model = vit.ImageClassifier(backbone(), 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(training.UserError, match=message):
        weights.initialise(model, save({"model": state}, tmp_path / "beit.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_no_backbone(tmp_path):
    tokenizer = dvae.DiscreteVAE(8, 8, 2, 1)
    for value, message in (({"model": tokenizer.state_dict(), "config": tokenizer.config, "kind": "DiscreteVAE"}, "is a tokenizer"),
                           ({"state_dict": {}}, "holds a dict of state_dict, not a Vision"), ([1, 2], "holds a list, not a Vision"),
                           ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "a state_dict of 1 tensors, conv1.weight first")):
        with pytest.raises(ValueError, match=message):
            weights.load(save(value, tmp_path / "x.pt"))
