"""The model against the paper's parameter counts, chunks against the whole batch, files against the models that
wrote them, timm's tower against ours, and files that are none against their sentence: pytest tests/test_slip.py
"""

import argparse
import os

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import checkpoints
import slip
from text import Tokenizer
from vit import SIZES, count_parameters

CAPTIONS = ["a red house", "a blue boat", "a red boat"]
TINY = dict(vocab_size=600, text_depth=1, ssl_hidden=32, ssl_out=16)


def tiny(method="slip", **changes):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(CAPTIONS * 3, 600)
    model = slip.build(
        slip.configure(method, "vit_tiny", **TINY | {"vocab_size": tokenizer.vocab_size} | changes)
    )
    model.tokenizer = tokenizer if model.text is not None else None
    return model.eval()


COUNTS = {"SLIP_VITS16": 104_713_857, "SLIP_VITB16": 170_616_321, "SLIP_VITL16": 389_298_945}
COUNTS |= {"CLIP_VITB16": 149_619_969, "simclr_vitb16": 106_795_008}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name):
    with torch.device("meta"):
        assert count_parameters(slip.build(name)) == COUNTS[name]


def test_unknown_names_are_one_sentence():
    for name in ("SLIP_VITX16", "vit_b16", "MOCO_VITB16"):
        with pytest.raises(ValueError, match="unknown model"):
            slip.build(name)


# Chunks


def rows(model, count=7):
    rng = np.random.default_rng(0)
    views = ("images", "images2", "view1", "view2")
    batch = {
        name: torch.from_numpy(rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)) for name in views
    }
    for name in ("view1", "view2"):
        batch[f"{name}_params"] = torch.from_numpy(
            np.stack([augment.draw(rng, augment.SIMCLR) for _ in range(count)])
        )
    batch["view1_mask"] = torch.from_numpy(np.stack([augment.block_mask(rng, 4, 0.4) for _ in range(count)]))
    return batch | (
        {"tokens": model.tokenizer(CAPTIONS * 2 + CAPTIONS[:1])} if model.text is not None else {}
    )


@pytest.mark.parametrize("method", slip.METHODS)
def test_chunks_computed_again_give_the_features_and_gradients_of_the_batch(method, monkeypatch):
    strong, normalise = augment.strong, augment.normalise
    monkeypatch.setattr(augment, "strong", lambda *inputs: strong(*inputs).double())
    monkeypatch.setattr(augment, "normalise", lambda images: normalise(images).double())
    found = []
    for micro_batch, recompute in ((None, False), (3, True)):
        model = tiny(method).double().train()
        if model.branch is not None:
            model.branch.prepare(
                lambda: torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            )
        features = model(rows(model), micro_batch, recompute)
        assert ("text" in features) == (model.text is not None) == ("image2" in features)
        loss = sum(value.square().mean() for value in features.values())
        if model.branch is not None:
            loss = loss + model.branch(features)[0]
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(
            gradients | dict(model.named_buffers()) | {f"features {n}": v for n, v in features.items()}
        )
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-10)  # float64


@pytest.mark.parametrize("method, calls", [("slip", 6), ("slip-beit", 3)])
def test_views_are_made_once_a_chunk_and_never_again_in_the_backward_pass(method, calls, monkeypatch):
    """Three chunks of two augmented views, or of one and its visual tokens."""
    made, model = [], tiny(method).train()
    strong, targets, batch = augment.strong, model.branch.targets, rows(model)
    if method == "slip-beit":
        batch = {name: value for name, value in batch.items() if not name.startswith("view2")}
    monkeypatch.setattr(augment, "strong", lambda *a: made.append("view") or strong(*a))
    model.branch.targets = lambda views: made.append("targets") or targets(views)
    sum(value.sum() for value in model(batch, 3, recompute=True).values()).backward()
    assert made.count("view") == calls and made.count("targets") == 3


def test_under_autocast_the_kept_views_are_in_its_precision_and_visual_tokens_are_not():
    model = tiny("slip-beit")
    model.branch.prepare(lambda: torch.randn(40, 3, 32, 32))
    plain = model.make_views(rows(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = model.make_views(rows(model))
    assert views["images"].dtype == views["view1"].dtype == torch.bfloat16 != plain["view1"].dtype
    assert torch.equal(views["view1_tokens"], plain["view1_tokens"]) and views["tokens"].dtype == torch.int64


# As a library


def test_images_and_captions_are_taken_as_they_come(checkpoint):
    model = slip.load(checkpoint)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8))
    expected = model.encode_image(augment.normalise(augment.evaluation_view(image.convert("RGB"), 32)[None]))
    assert torch.equal(model.encode_image(image), expected) and model.preprocess(image).shape == (
        1,
        3,
        32,
        32,
    )
    torch.testing.assert_close(model.encode_image([image, image]), expected.repeat(2, 1))
    one, two = model.encode_text("a red boat"), model.encode_text(["a red boat", "a blue house"])
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-5)  # rows of another length
    assert torch.equal(one, model.encode_text(model.tokenizer("a red boat")))
    assert one.shape == expected.shape and one.numpy().any()  # no gradient stands in the way
    assert not one.norm() == pytest.approx(1) and not model.training


def test_mistakes_with_the_library_are_one_sentence(checkpoint):
    model = slip.load(checkpoint)
    for function in (model.encode_image, model.encode_text):
        with pytest.raises(ValueError, match=r"found \[\], expected one or more"):
            function([])
    with pytest.raises(ValueError, match="expected one or more values of type Image"):
        model.encode_image("boat.png")
    with pytest.raises(ValueError, match=r"type load\(path\).to\(device\)"):
        slip.load(checkpoint, "cpu")
    with pytest.raises(FileNotFoundError, match="no checkpoint at cpu"):
        slip.load("cpu")
    with pytest.raises(ValueError, match="trained without captions: it has no encode_image"):
        tiny("simclr").encode_image(torch.randn(1, 3, 32, 32))
    model.tokenizer = None
    with pytest.raises(ValueError, match="found no tokenizer"):
        model.encode_text("a boat")


# Files


def outputs(model):
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    end = model.config.vocab_size - 1
    return torch.cat([model.encode_image(images), model.encode_text(torch.tensor([[1, 2, 3, end]] * 2))])


@pytest.mark.parametrize(
    "dtype, prefix", [("float32", ""), ("float16", "_orig_mod.module."), ("bfloat16", "module._orig_mod.")]
)
def test_a_file_loads_to_its_outputs_in_any_precision_and_wrapper(tmp_path, dtype, prefix):
    model = tiny().to(getattr(torch, dtype))
    slip.save(tmp_path / "checkpoint.pt", model, {"step": 3})
    state = slip.read_checkpoint(tmp_path)  # a run folder
    state["weights"] = {prefix + name: value for name, value in model.state_dict().items()}
    slip.atomic_save(state, tmp_path / "checkpoint.pt")
    again = slip.load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32} and os.listdir(tmp_path) == [
        "checkpoint.pt"
    ]
    assert (
        torch.equal(outputs(again), outputs(model.float()))
        and again.tokenizer.merges == model.tokenizer.merges
    )


@pytest.fixture
def published(monkeypatch):
    """Our model, and the dict of a published file with its weights: two blocks a tower."""
    monkeypatch.setitem(SIZES, "vit_s16", dict(width=48, depth=2, heads=12, patch=16))
    monkeypatch.setitem(slip.TEXT, "vit_s16", dict(text_width=32, text_depth=2, text_heads=4, ssl_hidden=16))
    torch.manual_seed(0)
    model = slip.build("SLIP_VITS16").eval()
    state = {
        "module." + checkpoints.published_name(name): value for name, value in model.state_dict().items()
    }
    state["module.visual.patch_embed.proj.weight"] = model.visual.patch_embed.projection.weight.reshape(
        48, 3, 16, 16
    )
    return model, {"epoch": 25, "state_dict": state, "args": argparse.Namespace(model="SLIP_VITS16", lr=3e-3)}


PUBLISHED_NAMES = """
visual.cls_token visual.pos_embed visual.patch_embed.proj.weight visual.norm.weight visual.blocks.1.norm1.weight
visual.blocks.1.attn.qkv.bias visual.blocks.1.attn.proj.weight visual.blocks.1.mlp.fc1.weight
visual.blocks.1.mlp.fc2.bias token_embedding.weight positional_embedding transformer.resblocks.1.ln_1.weight
transformer.resblocks.1.attn.in_proj_weight transformer.resblocks.1.attn.out_proj.weight ln_final.weight
transformer.resblocks.1.mlp.c_fc.weight transformer.resblocks.1.mlp.c_proj.bias image_projection text_projection
logit_scale image_mlp.layer1.weight image_mlp.bn1.running_mean image_mlp.layer2.bias image_mlp.bn2.weight
image_mlp.layer3.weight
""".split()


def test_a_published_file_loads_to_its_outputs(published, tmp_path):
    model, state = published
    assert {f"module.{name}" for name in PUBLISHED_NAMES} <= state["state_dict"].keys()
    torch.save(state, tmp_path / "slip.pt")
    assert torch.equal(outputs(slip.load(tmp_path / "slip.pt")), outputs(model))
    tokenizer = slip.tokenizer_of(tmp_path / "slip.pt")
    assert tokenizer is None or tokenizer.vocab_size == 49408


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil-was-here",))


SPOILT = {  # what is put in a published file: the sentence
    "logit_scale": (torch.zeros(3), r"size mismatch for logit_scale: .*torch.Size\(\[3\]\)"),
    "ln_final.bias": (None, 'Missing key.*"text.norm.bias"'),
    "visual.head.weight": (torch.zeros(3), 'Unexpected key.*"visual.head.weight"'),
    "extra": (Evil(), "holds Python objects, which could run code"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_published_file_is_one_sentence(published, tmp_path, name):
    value, sentence = SPOILT[name]
    published[1]["state_dict"][f"module.{name}"] = value
    if value is None:
        del published[1]["state_dict"][f"module.{name}"]
    torch.save(published[1], tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=sentence) as error:
        slip.load(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and not os.path.exists("evil-was-here")


OTHER = torch.zeros(1)
FOREIGN = {  # the sentence: what is in the file
    "is an empty file": b"",
    "is a git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "is a web page": b"\n<!DOCTYPE html><html>",
    "is a safetensors file": b'\x50\0\0\0\0\0\0\0{"__metadata__":{}}',
    "is compressed by gzip": b"\x1f\x8b\x08\0",
    "is not a checkpoint, or is truncated": b"not a checkpoint",
    "a state dict of OpenAI's CLIP or open_clip": {
        "state_dict": {"module.visual.conv1.weight": OTHER},
        "epoch": 1,
    },
    "a state dict of timm": {"cls_token": OTHER},
    "a state dict of another project .* layer1.weight": {"model": {"layer1.weight": OTHER}},
    "holds no weights, but list": [1, 2],
    "has format 'slip-9', expected 'slip-1'": {"format": "slip-9"},
    "unknown model 'MAE'": {"args": argparse.Namespace(model="MAE"), "state_dict": {}},
}


@pytest.mark.parametrize("sentence", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, capsys, sentence):
    path, content = tmp_path / "foreign.pt", FOREIGN[sentence]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=sentence):
        slip.load(path)
    with pytest.raises(SystemExit, match="2"):
        slip.main([str(path)])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_torchscript_archive_and_a_truncated_file_are_named(tmp_path, checkpoint):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with open(checkpoint, "rb") as file:
        (tmp_path / "torn.pt").write_bytes(file.read(50_000))
    for name, sentence in (("script.pt", "is a TorchScript archive"), ("torn.pt", "is truncated")):
        with pytest.raises(ValueError, match=sentence):
            slip.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="give a run folder, its checkpoint"):
        slip.load(tmp_path)


# Handing on


def test_a_model_starts_from_the_parts_that_fit(tmp_path):
    path, source = tmp_path / "slip.pt", tiny()
    slip.save(path, source)
    torch.manual_seed(1)
    simclr = slip.build(slip.configure("simclr", "vit_tiny", **TINY))
    assert slip.initialise(simclr, path) == (len(simclr.state_dict()), [])
    assert torch.equal(simclr.branch.head[0].weight, source.branch.head[0].weight)
    byol = slip.build(
        slip.configure("slip-byol", "vit_tiny", **TINY | {"vocab_size": source.config.vocab_size})
    )
    new = slip.initialise(byol, path)[1]
    assert new == ["branch.projector", "branch.predictor", "branch.slow_projector"]
    assert byol.tokenizer.merges == slip.tokenizer_of(path).merges and torch.equal(
        outputs(byol), outputs(source)
    )
    pairs = zip(byol.branch.slow_tower.parameters(), source.visual.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    slip.save(path, simclr)
    clip = slip.build(slip.configure("clip", "vit_tiny", **TINY))
    new = slip.initialise(clip, path)[1]
    assert new == ["image_projection", "text_projection", "logit_scale", "text"] and clip.tokenizer is None
    with pytest.raises(ValueError, match="holds a vit_tiny, expected vit_ti16"):
        slip.initialise(slip.build(slip.configure("simclr", "vit_ti16", image_size=32)), path)


def test_positions_are_interpolated_for_another_image_size(checkpoint):
    small, large = slip.load(checkpoint), slip.load(checkpoint, image_size=48)
    assert large.config.image_size == 48 and large.visual.positions.shape == (1, 37, 128)
    assert torch.equal(large.visual.positions[:, 0], small.visual.positions[:, 0])
    fresh = slip.build(large.config)
    slip.initialise(fresh, checkpoint)
    assert torch.equal(fresh.visual.positions, large.visual.positions)
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        slip.load(checkpoint, image_size=33)


@pytest.mark.parametrize("model, size", [("vit_tiny", 32), ("vit_s16", 32)])
def test_timm_loads_the_exported_tower_strictly_and_agrees(tmp_path, monkeypatch, capsys, model, size):
    pytest.importorskip("timm")
    monkeypatch.setitem(SIZES, "vit_s16", dict(width=48, depth=2, heads=12, patch=16))
    torch.manual_seed(0)
    ours = slip.build(slip.configure("simclr", model, image_size=size, ssl_hidden=16)).eval()
    torch.nn.init.normal_(ours.visual.norm.weight)  # so that a forgotten tensor would show
    slip.save(tmp_path / "m.pt", ours)
    slip.main([str(tmp_path / "m.pt"), "--export", str(tmp_path / "tower.pt")])
    names = {"images": torch.randn(2, 3, size, size)}
    exec(capsys.readouterr().out, names)  # the printed lines are the test
    torch.testing.assert_close(names["features"], ours.visual(names["images"]), rtol=1e-5, atol=1e-5)


def test_the_page_about_a_checkpoint_tells_parts_flags_and_cost(tmp_path, capsys):
    run = {"args": {"ssl_scale": 0.5}, "step": 7, "cost": {"hours": 1.5, "images_per_s": 20}}
    slip.save(tmp_path / "checkpoint.pt", tiny(), run)
    slip.main([str(tmp_path)])
    page = capsys.readouterr().out
    count = f"image tower        {count_parameters(tiny().visual):,} parameters"
    for line in (count, "--ssl-scale        0.5", "step               7", "hours              1.5"):
        assert line in page
