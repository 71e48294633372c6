"""The model: the paper's parameter counts, our checkpoints, the published weight files, and what is refused.

pytest tests/test_slip.py
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import slip
from text import Tokenizer
from vit import count_parameters


def tiny(method="slip"):
    torch.manual_seed(0)
    model = slip.build(slip.configure(method, "vit_tiny", vocab_size=600, text_depth=1))
    if model.text is not None:
        model.tokenizer = Tokenizer.train(["a red house", "a blue boat", "a red boat"] * 3, 600)
    return model.eval()


@pytest.mark.parametrize(
    "name, count",
    [
        ("SLIP_VITS16", 104_713_857),
        ("SLIP_VITB16", 170_616_321),
        ("SLIP_VITL16", 389_298_945),
        ("CLIP_VITB16", 149_619_969),
        ("simclr_vitb16", 106_795_008),
    ],
)
def test_parameter_counts_are_the_papers(name, count):
    with torch.device("meta"):
        assert count_parameters(slip.build(name)) == count


def test_embeds_share_a_space_and_are_not_normalised():
    model = tiny()
    image = model.encode_image(torch.randn(2, 3, 32, 32))
    text = model.encode_text(model.tokenizer(["a red house", "a boat"]))
    assert image.shape == text.shape == (2, 128)
    assert not torch.allclose(image.norm(dim=-1), torch.ones(2))


def test_a_saved_model_loads_to_identical_outputs(tmp_path):
    model, path = tiny(), tmp_path / "m.pt"
    slip.save(path, model, {"step": 3})
    again = slip.load(path)
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenizer(["a red boat", "boat"])
    assert torch.equal(again.tokenizer(["a red boat", "boat"]), tokens)
    assert torch.equal(model.encode_image(images), again.encode_image(images))
    assert torch.equal(model.encode_text(tokens), again.encode_text(tokens))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("micro_batch, recompute", [(None, False), (3, False), (3, True), (1, True)])
def test_features_in_chunks_are_those_of_the_whole_batch(micro_batch, recompute):
    model = tiny().train()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(7, 3, 32, 32, generator=generator) for name in ("images", "view1", "view2")}
    batch["tokens"] = model.tokenizer(["a red boat"] * 7)
    whole = model(batch, dict)
    chunked = model(batch, dict, micro_batch, recompute)
    assert list(whole) == ["image_features", "text_features", "features1", "features2"]
    for name in whole:
        torch.testing.assert_close(
            whole[name], chunked[name], rtol=1e-5, atol=1e-5
        )  # matrix products of another size


@pytest.mark.parametrize("method, missing", [("clip", "branch"), ("simclr", "text")])
def test_a_method_has_only_the_parts_it_trains(method, missing):
    assert getattr(tiny(method), missing) is None


def test_simclr_has_no_joint_space():
    with pytest.raises(ValueError, match="trained without captions"):
        tiny("simclr").encode_image(torch.randn(1, 3, 32, 32))


# The published format, with random weights and two blocks a tower


@pytest.fixture
def published(monkeypatch):
    """(our model, the dict of a published file with its weights)."""
    monkeypatch.setitem(slip.SIZES, "vit_s16", dict(width=48, depth=2, heads=12, patch=16))
    monkeypatch.setitem(slip.TEXT, "vit_s16", dict(text_width=32, text_depth=2, text_heads=4, ssl_hidden=16))
    torch.manual_seed(0)
    model = slip.build("SLIP_VITS16").eval()
    weights = {}
    for name, value in model.state_dict().items():
        if name == "visual.patch_embed.projection.weight":
            value = value.reshape(48, 3, 16, 16)
        weights["module." + slip.published_name(name)] = value
    return model, {
        "epoch": 25,
        "state_dict": weights,
        "args": argparse.Namespace(model="SLIP_VITS16", lr=3e-3),
    }


PUBLISHED_NAMES = """
visual.cls_token visual.pos_embed visual.patch_embed.proj.weight visual.patch_embed.proj.bias
visual.norm.weight visual.blocks.1.norm1.weight visual.blocks.1.attn.qkv.bias
visual.blocks.1.attn.proj.weight visual.blocks.1.norm2.bias visual.blocks.1.mlp.fc1.weight
visual.blocks.1.mlp.fc2.bias token_embedding.weight positional_embedding transformer.resblocks.1.ln_1.weight
transformer.resblocks.1.attn.in_proj_weight transformer.resblocks.1.attn.in_proj_bias
transformer.resblocks.1.attn.out_proj.weight transformer.resblocks.1.ln_2.bias
transformer.resblocks.1.mlp.c_fc.weight transformer.resblocks.1.mlp.c_proj.bias ln_final.weight
image_projection text_projection logit_scale image_mlp.layer1.weight image_mlp.bn1.running_mean
image_mlp.layer2.bias image_mlp.bn2.num_batches_tracked image_mlp.layer3.weight
""".split()


def test_published_names_are_those_of_the_weight_files(published):
    assert set(PUBLISHED_NAMES) <= {name.removeprefix("module.") for name in published[1]["state_dict"]}


def test_a_published_file_loads_to_identical_outputs(published, tmp_path):
    model, state = published
    torch.save(state, tmp_path / "slip.pt")
    again = slip.load(tmp_path / "slip.pt")
    images, tokens = torch.randn(1, 3, 224, 224), torch.tensor([[49406, 7, 49407]])
    assert torch.equal(model.encode_image(images), again.encode_image(images))
    assert torch.equal(model.encode_text(tokens), again.encode_text(tokens))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil-was-here",))


def spoil(state, how):
    weights = state["state_dict"]
    if how == "wrong shape":
        weights["module.logit_scale"] = torch.zeros(3)
    elif how == "missing key":
        del weights["module.ln_final.bias"]
    elif how == "unknown key":
        weights["module.visual.head.weight"] = torch.zeros(3)
    elif how == "unknown name":
        state["args"].model = "SLIP_RESNET50"
    elif how == "runs code":
        state["extra"] = Evil()
    else:
        del state["state_dict"]


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("wrong shape", r"logit_scale has shape \[3\], expected \[\]"),
        ("missing key", "lacks text.norm.bias"),
        ("unknown key", "unknown visual.head.weight"),
        ("unknown name", "'SLIP_RESNET50', expected a name such as SLIP_VITB16"),
        ("runs code", "not a checkpoint, or holds objects"),
        ("no weights", "not a checkpoint of this project"),
    ],
)
def test_a_spoilt_published_file_is_one_sentence(published, tmp_path, how, sentence):
    spoil(published[1], how)
    path = tmp_path / "bad.pt"
    torch.save(published[1], path)
    with pytest.raises(ValueError, match=sentence) as error:
        slip.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not os.path.exists("evil-was-here")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04torn"])
def test_a_foreign_or_torn_file_exits_with_2_and_a_sentence(tmp_path, content):
    (tmp_path / "torn.pt").write_bytes(content)
    run = subprocess.run([sys.executable, "slip.py", tmp_path / "torn.pt"], capture_output=True, text=True)
    assert run.returncode == 2 and "torn.pt" in run.stderr and "Traceback" not in run.stderr


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    model = tiny("clip")
    model.config = replace(model.config, text_depth=2)
    slip.save(tmp_path / "m.pt", model)
    with pytest.raises(ValueError, match="lacks text.blocks.1"):
        slip.load(tmp_path / "m.pt")


def test_the_page_about_a_checkpoint_tells_loss_weight_and_sizes(tmp_path, capsys):
    slip.save(tmp_path / "m.pt", tiny(), {"args": {"ssl_scale": 0.5, "lr": 1e-3}, "step": 7})
    slip.main([str(tmp_path / "m.pt")])
    page = capsys.readouterr().out
    assert "--ssl-scale        0.5" in page and "step               7" in page and "image tower" in page


@pytest.mark.parametrize("name", ["SLIP_VITX16", "vit_b16", "MOCO_VITB16"])
def test_unknown_names_are_one_sentence(name):
    with pytest.raises(ValueError, match="unknown model"):
        slip.build(name)
