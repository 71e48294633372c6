"""The model against the paper's counts, chunks against the whole batch, files against the models that wrote
them, timm's tower against ours, files that are none against a sentence: pytest tests/test_slip.py
"""

import argparse
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import slip
from checkpoints import atomic_save, published_name
from text import Tokenizer
from vit import SIZES, count_parameters

TOKENIZER = Tokenizer.train(["a red house", "a blue boat", "a red boat"] * 3, 600)
SMALL = dict(text_width=32, text_depth=1, text_heads=2, vocab_size=TOKENIZER.vocab_size)
SMALL |= dict(image_size=16, embed=16, ssl_hidden=32, ssl_out=16)


def tiny(method="slip", model="vit_tiny", seed=0, **changes):
    torch.manual_seed(seed)
    model = slip.build(slip.configure(method, model, **SMALL | changes))
    model.tokenizer = TOKENIZER if model.text is not None else None
    return model.eval()


def test_parameter_counts_are_the_papers():
    counts = {"SLIP_VITS16": 104_713_857, "SLIP_VITB16": 170_616_321, "SLIP_VITL16": 389_298_945}
    counts |= {"CLIP_VITB16": 149_619_969, "simclr_vitb16": 106_795_008}
    with torch.device("meta"):
        assert {name: count_parameters(slip.build(name)) for name in counts} == counts


def rows(model):
    """Seven rows of everything that any method takes."""
    rng, batch = np.random.default_rng(0), {}
    for name in ("images", "images2", "view1", "view2"):
        batch[name] = torch.from_numpy(rng.integers(0, 256, (7, 3, 16, 16), dtype=np.uint8))
    for name in ("view1_params", "view2_params"):
        batch[name] = torch.from_numpy(np.stack([augment.draw(rng, augment.SIMCLR) for _ in range(7)]))
    batch["view1_mask"] = torch.tensor([[True, False, True, False]] * 7)
    return batch | ({"tokens": TOKENIZER(["a red boat"] * 7)} if model.text is not None else {})


@pytest.mark.parametrize("method", ["slip", "slip-beit"])
def test_views_are_made_once_a_chunk_and_never_again_in_the_backward_pass(method, monkeypatch):
    made, model = [], tiny(method).train()
    strong, targets = augment.strong, model.branch.targets
    monkeypatch.setattr(augment, "strong", lambda *inputs: made.append("view") or strong(*inputs))
    model.branch.targets = lambda views: made.append("targets") or targets(views)
    sum(value.sum() for value in model(rows(model), 3, recompute=True).values()).backward()
    assert made.count("view") == 3 * 2 and made.count("targets") == 3  # three chunks of two views


def test_under_autocast_the_kept_views_are_in_its_precision_and_visual_tokens_are_not():
    model = tiny("slip-beit")
    model.branch.prepare(lambda: torch.randn(40, 3, 16, 16))
    plain = model.make_views(rows(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = model.make_views(rows(model))
    assert views["images"].dtype == views["view1"].dtype == torch.bfloat16 != plain["view1"].dtype
    assert torch.equal(views["view1_tokens"], plain["view1_tokens"]) and views["tokens"].dtype == torch.int64


def test_images_and_captions_are_taken_as_they_come(checkpoint):
    model = slip.load(checkpoint)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8))
    expected = model.encode_image(augment.normalise(augment.evaluation_view(image.convert("RGB"), 32)[None]))
    assert torch.equal(model.encode_image(image), expected)
    torch.testing.assert_close(model.encode_image([image, image]), expected.repeat(2, 1))
    one = model.encode_text("a red boat")
    assert torch.equal(one, model.encode_text(model.tokenizer(["a red boat"])))
    assert one.shape == expected.shape and one.numpy().any()  # no gradient stands in the way


def test_mistakes_with_the_library_are_one_sentence(checkpoint):
    bare = slip.load(checkpoint)
    bare.tokenizer = None
    for function, value, sentence in (
        (bare.encode_text, "a boat", "found no tokenizer"),
        (bare.encode_text, [], "encode_text found an empty list"),
        (bare.encode_image, [], "encode_image found an empty list"),
        (tiny("simclr").encode_image, [], "trained without captions: it has no encode_image"),
        (lambda size: slip.load(checkpoint, size), "cpu", r"type load\(path\).to\(device\)"),
        (slip.load, "cpu", "no checkpoint at cpu: give a run folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            function(value)


def outputs(model):
    images = torch.linspace(-1, 1, 3 * model.config.image_size**2).view(1, 3, model.config.image_size, -1)
    tokens = torch.tensor([[1, 2, 3, model.config.vocab_size - 1]])
    return torch.cat([model.encode_image(images), model.encode_text(tokens)])


@pytest.mark.parametrize("dtype, prefix", [("float32", ""), ("bfloat16", "module._orig_mod.")])
def test_a_file_loads_to_its_outputs_in_any_precision_and_wrapper(tmp_path, dtype, prefix):
    model, path = tiny().to(getattr(torch, dtype)), tmp_path / "checkpoint.pt"
    slip.save(path, model, {"step": 3})
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    atomic_save(slip.read_checkpoint(path) | {"weights": weights}, path)
    again = slip.load(tmp_path)  # a run folder
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(outputs(again), outputs(model.float())) and os.listdir(tmp_path) == [path.name]


@pytest.fixture
def published(monkeypatch):
    """Our model, and the dict of a published file with its weights: two blocks a tower."""
    monkeypatch.setitem(SIZES, "vit_s16", dict(width=48, depth=2, heads=12, patch=16))
    monkeypatch.setitem(slip.HEADS, "vit_s16", dict(text_width=32, text_depth=2, text_heads=4, ssl_hidden=16))
    model = slip.build("SLIP_VITS16").eval()
    weights = {"module." + published_name(name): value for name, value in model.state_dict().items()}
    kernel = "module.visual.patch_embed.proj.weight"
    weights[kernel] = weights[kernel].reshape(48, 3, 16, 16)
    return model, {"epoch": 25, "state_dict": weights, "args": argparse.Namespace(model="SLIP_VITS16")}


PUBLISHED_NAMES = """
visual.cls_token visual.pos_embed visual.patch_embed.proj.weight visual.norm.weight visual.blocks.1.norm1.bias
visual.blocks.1.attn.qkv.bias visual.blocks.1.attn.proj.weight visual.blocks.1.mlp.fc1.weight ln_final.weight
visual.blocks.1.mlp.fc2.bias token_embedding.weight positional_embedding transformer.resblocks.1.ln_1.weight
transformer.resblocks.1.attn.in_proj_weight transformer.resblocks.1.attn.out_proj.weight logit_scale
transformer.resblocks.1.mlp.c_fc.weight transformer.resblocks.1.mlp.c_proj.bias image_mlp.layer1.weight
image_mlp.bn1.running_mean image_mlp.layer2.bias image_mlp.bn2.bias image_mlp.layer3.bias
"""


def test_a_published_file_loads_to_its_outputs(published, tmp_path):
    model, state = published
    assert {f"module.{name}" for name in PUBLISHED_NAMES.split()} <= state["state_dict"].keys()
    torch.save(state, tmp_path / "slip.pt")
    assert torch.equal(outputs(slip.load(tmp_path / "slip.pt")), outputs(model))


SPOILT = {  # what is put in a published file: the sentence
    "logit_scale": (torch.zeros(3), r"size mismatch for logit_scale: .*torch.Size\(\[3\]\)"),
    "extra": (os.system, "holds more than weights and plain data"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_published_file_is_one_sentence(published, tmp_path, name):
    published[1]["state_dict"][f"module.{name}"], sentence = SPOILT[name]
    torch.save(published[1], tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=sentence) as error:
        slip.load(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)


FOREIGN = {  # the sentence: what is in the file
    "is a git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "is a web page": b"\n<!DOCTYPE html><html>",
    "is a safetensors file": b'\x50\0\0\0\0\0\0\0{"__metadata__":{}}',
    "is not a checkpoint": b"",
    "is truncated": b"PK\x03\x04torn",
    "another project.*visual.conv1.weight": {"state_dict": {"module.visual.conv1.weight": torch.zeros(1)}},
    "another project.*cls_token": {"cls_token": torch.zeros(1)},
    "another project.*list": [1, 2],
    "another project or version.*format": {"format": "slip-9", "weights": {}},
    "foreign.pt is a state dict of another": {"args": argparse.Namespace(model="MAE"), "state_dict": {}},
}


@pytest.mark.parametrize("sentence", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, refused, sentence):
    path, content = tmp_path / "foreign.pt", FOREIGN[sentence]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    words = refused(slip.main, [str(path)])
    assert re.search(sentence, words) and str(path) in words and words.count("\n") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="is a TorchScript archive"):
        slip.load(tmp_path / "script.pt")


def test_a_model_starts_from_the_parts_that_fit():
    source, simclr = tiny(), tiny("simclr", seed=1)
    assert slip.initialise(simclr, source) == (len(simclr.state_dict()), [])
    byol = tiny("slip-byol", seed=1)
    new = slip.initialise(byol, source)[1]
    assert new == ["branch.projector", "branch.predictor", "branch.slow_projector"]
    assert torch.equal(outputs(byol), outputs(source)) and byol.tokenizer.merges == TOKENIZER.merges
    assert torch.equal(byol.branch.slow_tower.positions, source.visual.positions)
    other = tiny("clip", seed=1)
    other.tokenizer = Tokenizer.train(["the same number of tokens"] * 3, 600)
    other.tokenizer.vocab_size = TOKENIZER.vocab_size
    assert "text.token_embedding" in slip.initialise(other, source)[1]
    new = slip.initialise(tiny("clip", seed=1), simclr)[1]
    assert new[:4] == ["image_projection", "text_projection", "logit_scale", "text.positions"]
    with pytest.raises(ValueError, match="holds a vit_tiny, expected vit_ti16"):
        slip.initialise(tiny("simclr", "vit_ti16"), simclr)


def test_timm_loads_the_exported_tower_strictly_and_agrees(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.setitem(SIZES, "vit_s16", dict(width=48, depth=2, heads=12, patch=16))
    ours = tiny("simclr", "vit_s16", image_size=32)
    torch.nn.init.normal_(ours.visual.norm.weight)  # so that a tensor that is left out shows
    slip.save(tmp_path / "m.pt", ours)
    slip.main([str(tmp_path / "m.pt"), "--export", str(tmp_path / "tower.pt")])
    names = {"images": torch.randn(2, 3, 32, 32)}
    exec(capsys.readouterr().out, names)  # the printed lines are the test
    torch.testing.assert_close(names["features"], ours.visual(names["images"]), rtol=1e-5, atol=1e-5)


def test_the_page_about_a_checkpoint_tells_parts_flags_and_cost(tmp_path, capsys):
    run = {"args": {"ssl_scale": 0.5}, "step": 7, "cost": {"hours": 1.5, "images_per_s": 20}}
    slip.save(tmp_path / "checkpoint.pt", tiny(), run)
    slip.main([str(tmp_path)])
    page = capsys.readouterr().out
    count = f"visual             {count_parameters(tiny().visual):,} parameters"
    for line in (count, "ssl_scale          0.5", "step               7", "'hours': 1.5"):
        assert line in page
