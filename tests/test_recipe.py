"""The recipe against the paper's numbers, the schedule against its corners, the groups against the model.

pytest tests/test_recipe.py
"""

import math

import pytest
import torch

import finetune
import recipe
import slip
import train
from vit import SIZES


@pytest.mark.parametrize(
    "method, lr, wd", [("slip", 3e-3, 0.1), ("clip", 5e-4, 0.5), ("simclr", 3.2e-3, 0.1)]
)
@pytest.mark.parametrize("name, epochs", [("yfcc15m", 25), ("imagenet", 25), ("cc3m", 40), ("cc12m", 35)])
def test_the_recipe_is_the_papers(method, lr, wd, name, epochs):
    values = recipe.recipe(method, name)
    assert (values["lr"], values["wd"], values["epochs"], values["batch_size"]) == (lr, wd, epochs, 4096)
    assert (values["model"], values["vocab"], values["warmup_epochs"]) == ("vit_b16", "clip", 1)
    assert (values["ssl_scale"], slip.configure(method, "vit_b16").ssl_temp) == (1, 0.1)
    assert (values["light_crop"], values["strong_crop"]) == (0.5, 0.08)


def test_the_optimizer_and_the_ends_of_the_schedule_are_the_papers():
    assert (recipe.BETAS, recipe.EPS) == ((0.9, 0.98), 1e-8)
    assert (recipe.START_LR, recipe.END_LR) == (1e-6, 1e-5)


@pytest.mark.parametrize("name", [*recipe.SETS, "imagenet"])
@pytest.mark.parametrize("method", recipe.METHOD)
def test_every_value_belongs_to_a_flag_that_is_left_out_by_default(method, name):
    values, flags = recipe.recipe(method, name), vars(train.arguments().parse_args([]))
    assert values.keys() <= flags.keys() and all(flags[flag] is None for flag in values)
    assert values["model"] in SIZES


def test_recipe_and_model_know_the_same_methods():
    assert recipe.METHOD.keys() == slip.METHODS.keys()
    with pytest.raises(ValueError, match="unknown method 'moco': expected one of slip, clip, simclr"):
        recipe.recipe("moco", "scenes")


def test_asking_changes_nothing():
    recipe.recipe("slip", "scenes")["lr"] = 7
    assert recipe.recipe("slip", "scenes")["lr"] != 7 and recipe.PAPER["epochs"] == 25


@pytest.mark.parametrize("steps, warmup", [(100, 10), (1000, 1), (25 * 400, 400), (50, 0), (60, 5.5)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(steps, warmup):
    rates = [recipe.learning_rate(step, steps, warmup, 3e-3) for step in range(steps)]
    top = math.ceil(warmup)
    assert rates[0] == (1e-6 if warmup else 3e-3)
    if warmup == top:
        assert rates[top] == pytest.approx(3e-3, rel=1e-12)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-9)  # the cosine of pi is exact
    assert all(a < b for a, b in zip(rates[:top], rates[1 : top + 1], strict=True))
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


def test_half_way_up_and_half_way_down_are_means():
    assert recipe.learning_rate(5, 111, 10, 1.0, start=0.0, end=0.5) == pytest.approx(0.5)
    assert recipe.learning_rate(60, 111, 10, 1.0, start=0.0, end=0.5) == pytest.approx(0.75)


def test_a_run_of_one_step_has_a_rate():
    assert recipe.learning_rate(0, 1, 0, 1e-3) > 0


@pytest.fixture(scope="module")
def model():
    return slip.build(slip.configure("slip", "vit_tiny", vocab_size=520, text_depth=1))


def test_every_trainable_parameter_is_in_one_group(model):
    groups = recipe.parameter_groups(model, 0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_what_has_one_dimension_or_none_does_not_decay(model):
    decays, spared = ({id(p) for p in group["params"]} for group in recipe.parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim >= 2 for p in model.parameters() if id(p) in decays)
    assert {names[i] for i in spared} == {
        name
        for name in names.values()
        if name.endswith("bias") or "norm" in name or name == "logit_scale" or name in BATCHNORM
    }
    assert {"visual.class_token", "visual.positions", "image_projection"} <= {names[i] for i in decays}


BATCHNORM = {"branch.head.1.weight", "branch.head.4.weight"}


def test_what_is_frozen_is_in_no_group(model):
    model.visual.requires_grad_(False)
    found = {id(p) for group in recipe.parameter_groups(model, 0.1) for p in group["params"]}
    model.visual.requires_grad_(True)
    assert not found & {id(p) for p in model.visual.parameters()} and found


def test_decay_shrinks_matrices_alone(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():  # without gradient AdamW multiplies by 1 - lr x decay
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim >= 2 else 1.0))


# Fine-tuning and linear classification


@pytest.mark.parametrize(
    "size, drop_path, layer_decay, epochs, warmup",
    [
        ("vit_s16", 0.0, 0.65, 100, 20),
        ("vit_b16", 0.1, 0.65, 100, 20),
        ("vit_l16", 0.1, 0.75, 50, 5),
    ],
)
def test_fine_tuning_on_imagenet_is_the_papers(size, drop_path, layer_decay, epochs, warmup):
    values = recipe.finetune(size, "imagenet")
    assert (values["drop_path"], values["layer_decay"]) == (drop_path, layer_decay)
    assert (values["epochs"], values["warmup_epochs"]) == (epochs, warmup)
    assert (values["lr"], values["batch_size"], values["wd"]) == (4e-3, 1024, 0.05)
    assert (values["mixup"], values["cutmix"], values["smoothing"]) == (0.8, 1, 0.1)
    assert (values["randaugment"], values["erasing"], values["crop"]) == (9, 0.25, 0.08)
    assert recipe.FINETUNE_END_LR == 1e-6


def test_linear_classification_is_the_papers():
    values = recipe.LINEAR
    assert (values["epochs"], values["batch_size"], values["momentum"], values["crop"]) == (
        90,
        1024,
        0.9,
        0.08,
    )
    assert values["lr"] * 1024 / values["lr_batch"] == pytest.approx(0.4)
    assert round(224 * values["test_resize"]) == 256


@pytest.mark.parametrize("name", [*recipe.FINETUNE_SETS, "imagenet", "a folder"])
def test_every_value_of_fine_tuning_belongs_to_a_flag_that_is_left_out_by_default(name):
    values, flags = (
        recipe.finetune("vit_b16", name),
        vars(finetune.arguments().parse_args(["--checkpoint", "f"])),
    )
    assert values.keys() == {*finetune.FLAGS, "lr"} and all(flags[flag] is None for flag in values)


def layers(decay=0.5, wd=0.05):
    model = finetune.Classifier(slip.configure("clip", "vit_tiny"), ["a", "b"])
    groups = recipe.layer_groups(model, 4, wd, decay)
    names = {id(p): name for name, p in model.named_parameters()}
    return model, groups, {names[id(p)]: group for group in groups for p in group["params"]}


def test_a_layers_rate_is_a_power_of_the_decay():
    _, _, group_of = layers(decay=0.5)
    expected = {"class_token": 2**-5, "positions": 2**-5, "patch_embed.projection.weight": 2**-5}
    expected |= {f"blocks.{i}.mlp.0.bias": 2.0 ** (i - 4) for i in range(4)}  # block 3 is one below the head
    expected |= {"norm.weight": 1.0, "norm.bias": 1.0}
    assert {name: group_of[f"visual.{name}"]["lr_scale"] for name in expected} == expected
    assert group_of["head.weight"]["lr_scale"] == group_of["head.bias"]["lr_scale"] == 1.0


def test_layer_groups_hold_each_parameter_once():
    model, groups, _ = layers()
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups) == 12


def test_fine_tuning_decays_matrices_alone():
    model, _, group_of = layers()
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name in ("visual.class_token", "visual.positions")
        assert group_of[name]["weight_decay"] == (0.0 if spared else 0.05)
