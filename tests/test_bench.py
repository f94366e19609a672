"""bench.py: its arithmetic, and that its rows and its report come out."""
import json
import sys

import pytest
import torch

import bench
import dvae
import vit

OBLONG = vit.ViTConfig(image_size=(32, 48), patch_size=8, dim=48, depth=3, heads=4, mlp_ratio=2)
SMALL = dict(vocab_size=100, hidden=16, groups=2, blocks_per_group=1)


@pytest.mark.parametrize("config, sizes, side", [
    (bench.DEMO, bench.TOKENIZERS["demo"], 32), (vit.PRESETS["base"], bench.TOKENIZERS["base"], 112),
    (OBLONG, SMALL, 8)], ids=["demo", "base", "oblong"])
def test_flops_by_formula_are_those_that_are_counted(config, sizes, side):
    with torch.device("meta"):
        tokenizer = dvae.DiscreteVAE(**sizes)
    assert bench.tokenizer_flops(tokenizer, side) == bench.counted("tokenizer", config, sizes, side, 0)
    formula = bench.training_flops(config, 2 * 9 * config.dim * bench.VOCAB)
    assert formula == pytest.approx(bench.counted("backbone", config, sizes, side, 9), rel=0.01)


def test_the_papers_step_is_160_gflop():
    with torch.device("meta"):
        tokenizer = bench.tokenizer_flops(dvae.DiscreteVAE(), 112)
    assert tokenizer / 1e9 == pytest.approx(52, abs=1)
    assert bench.training_flops(vit.PRESETS["base"], 2 * 78 * 768 * 8192) / 1e9 == pytest.approx(108, abs=2)


def test_it_reports(tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    flags = ["--model", "demo", "--batch-size", "2", "--rounds", "1", "--seconds", "0", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, "--device", "cpu", "--out", str(out)])
    bench.main()
    report = json.loads(out.read_text())
    for name in ("limit: matrix products", "limit: decoding JPEGs, one core", "masks, 8x8",
                 "two views and a mask, one core", "the same, 1 worker", "tokenizer", "backbone forward",
                 "backbone forward and backward", "pre-training step", "fine-tuning step"):
        assert report["rows"][name]["rate"] > 0 and report["rows"][name]["spread"] >= 0, name
    step, flops = report["rows"]["pre-training step"], report["gflop_per_image"]
    per_image = flops["tokenizer"]["formula"] + flops["backbone forward and backward"]["formula"]
    assert step["tflops"] == pytest.approx(step["rate"] * per_image / 1e3)
    assert step["peak_memory_bytes"] > 0
