"""tools/bench.py: its arithmetic, and that its rows and its report come out."""
import json
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import dvae
import vit
from tools import bench

CPU = torch.device("cpu")


def test_flops_of_attention_and_of_the_papers_step():
    q, k, v = torch.rand(3, 2, 4, 10, 8)                               # B 2, heads 4, T 10, D/heads 8
    attention = bench.count_flops(lambda: F.scaled_dot_product_attention(q, k, v))
    assert attention == 2 * 2 * (2 * 4 * 10 * 10 * 8)                  # q k^T, and its product with v
    with torch.device("meta"):
        tokenizer, model = dvae.DiscreteVAE(), vit.MaskedImageModel(vit.PRESETS["base"])
        images, mask, places = torch.rand(1, 3, 224, 224), torch.zeros(1, 14, 14).bool(), torch.arange(78)
        tokens = bench.count_flops(lambda: tokenizer.encode(torch.rand(1, 3, 112, 112)))
        step = bench.count_flops(lambda: model(images, mask, places).sum().backward())
    assert (tokens / 1e9, step / 1e9) == (pytest.approx(52, abs=1), pytest.approx(108, abs=2))


def test_position_replaces_the_presets(tmp_path):
    args = Namespace(model="demo", batch_size=1, precision="fp32", position="absolute")
    assert bench.Bench(args, CPU, tmp_path).config.position == "absolute"
    args.position = None
    assert bench.Bench(args, CPU, tmp_path).config.position == "shared_relative"


def test_a_step_trains_and_clips_the_gradient(tmp_path, monkeypatch):
    args = Namespace(model="demo", batch_size=2, precision="fp32", position=None)
    bench_of_demo, norms = bench.Bench(args, CPU, tmp_path), []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    before = [parameter.clone() for parameter in bench_of_demo.model.parameters()]
    bench_of_demo.training_step(bench_of_demo.model)()
    after = bench_of_demo.model.parameters()
    assert norms == [3] and not any(old.equal(new) for old, new in zip(before, after) if old.any())


@pytest.mark.long
@pytest.mark.parametrize("only, rows", [
    ((), {"limit: decoding JPEGs, one core", "masks, one core", "two views and a mask, one core", "tokenizer",
          "pre-training step"}),
    (("--compile", "--only", "tokenizer"), {"tokenizer", "tokenizer, compiled"})])
def test_rows(only, rows, tmp_path, monkeypatch):
    compiled, out = [], tmp_path / "bench.json"
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    flags = ["--model", "demo", "--batch-size", "2", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, *only])
    bench.main()
    table = json.loads(out.read_text())["rows"]
    assert table.keys() >= rows | {"limit: copying memory"}
    assert {isinstance(value, torch.nn.Module) for value in compiled} == ({False, True} if only else set())
    assert all(row["rate"] > 0 and row["spread"] >= 0 for row in table.values())
    assert not only or table.keys() == rows | {name for name in table if name.startswith("limit")}
    for name, row in table.items():
        if name.startswith("pre-training"):    # also those of timm and transformers, if they are installed
            assert row["gflop"] == pytest.approx(table["pre-training step"]["gflop"], rel=1e-3)
            assert row["gflop"] > 5 * table["tokenizer"]["gflop"]      # with the backward pass; without it 3
        if name in rows and "tflops" in row:
            assert row["tflops"] == pytest.approx(row["rate"] * row["gflop"] / 1e3)
            assert row["of_limit"] > 0
