"""The recipe against the paper's numbers, the schedule against its corners, the groups against the model."""

import pytest
import torch
from torch import nn

import recipe
import slip


@pytest.mark.parametrize(
    "method, lr, wd", [("slip", 3e-3, 0.1), ("clip", 5e-4, 0.5), ("simclr", 3.2e-3, 0.1)]
)
def test_pre_training_is_the_papers(method, lr, wd):
    for name, epochs in [("yfcc15m", 25), ("imagenet", 25), ("cc3m", 40), ("cc12m", 35)]:
        values = recipe.recipe(method, name, 3_000_000)
        assert (values["lr"], values["wd"], values["epochs"], values["batch_size"]) == (lr, wd, epochs, 4096)
        assert (values["model"], values["vocab"], values["warmup_epochs"]) == ("vit_b16", "clip", 1)
        assert (values["ssl_scale"], values["light_crop"], values["strong_crop"]) == (1, 0.5, 0.08)
    assert (recipe.BETAS, recipe.EPS) == ((0.9, 0.98), 1e-8)
    assert (recipe.START_LR, recipe.END_LR, recipe.FINETUNE_END_LR) == (1e-6, 1e-5, 1e-6)
    assert slip.configure(method, "vit_b16").ssl_temp == 0.1


def test_small_sets_get_the_small_recipe_unless_the_papers_is_asked_for():
    assert recipe.recipe("slip", "clipart", 1_274)["recipe"] == "small"
    assert recipe.recipe("slip", "clipart", 1_274)["model"] == "vit_tiny"
    assert recipe.recipe("slip", "clipart", 1_274, "paper")["model"] == "vit_b16"
    assert recipe.recipe("slip", "clipart", 20_000)["recipe"] == "paper"
    small, paper = (recipe.recipe("slip", name, 57_000) for name in ("fashionmnist", "imagenet"))
    assert small["recipe"] == "small" and small["mask_same_class"] and not paper["mask_same_class"]


@pytest.mark.parametrize("steps, warmup", [(100, 10), (10_000, 400), (50, 0)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(steps, warmup):
    rates = [recipe.learning_rate(step, steps, warmup, 3e-3) for step in range(steps)]
    assert rates[0] == (1e-6 if warmup else 3e-3)
    assert rates[warmup] == pytest.approx(3e-3, rel=1e-12)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-9)  # the cosine of pi is exact
    assert all(a < b for a, b in zip(rates[:warmup], rates[1 : warmup + 1]))
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))


def test_a_peak_below_the_end_rate_never_rises():
    rates = [recipe.learning_rate(step, 50, 5, 1e-6) for step in range(50)]
    assert max(rates) <= 1e-6 and recipe.learning_rate(0, 1, 0, 1e-3) > 0


def test_decay_shrinks_matrices_alone():
    model = slip.build(slip.configure("slip", "vit_tiny", vocab_size=520, text_depth=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():  # without gradient AdamW multiplies by 1 - lr x decay
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim >= 2 else 1.0))
    spared = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert "logit_scale" in spared and "visual.class_token" not in spared


SIZES = [("vit_s16", 0.0, 0.65, 100, 20), ("vit_b16", 0.1, 0.65, 100, 20), ("vit_l16", 0.1, 0.75, 50, 5)]


@pytest.mark.parametrize("size, drop, decay, epochs, warmup", SIZES)
def test_fine_tuning_on_imagenet_is_the_papers(size, drop, decay, epochs, warmup):
    values = recipe.finetune(size, "imagenet")
    assert (values["drop_path"], values["layer_decay"]) == (drop, decay)
    assert (values["epochs"], values["warmup_epochs"]) == (epochs, warmup)
    assert (values["lr"], values["batch_size"], values["wd"]) == (4e-3, 1024, 0.05)
    assert (values["mixup"], values["cutmix"], values["smoothing"]) == (0.8, 1, 0.1)
    assert (values["randaugment"], values["erasing"], values["crop"]) == (9, 0.25, 0.08)


def test_linear_classification_is_moco_v3s():
    values = recipe.LINEAR
    assert (values["epochs"], values["batch_size"], values["momentum"]) == (90, 1024, 0.9)
    assert values["lr"] * 1024 / values["lr_batch"] == pytest.approx(0.4)
    assert round(224 * values["test_resize"]) == 256


def test_a_layers_rate_is_a_power_of_the_decay_and_each_parameter_is_in_one_group():
    model = nn.Module()
    model.visual = slip.build(slip.configure("simclr", "vit_tiny")).visual
    model.head = nn.Linear(128, 2)
    groups = recipe.layer_groups(model, 4, 0.05, 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    group_of = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    expected = {f"visual.blocks.{i}.mlp.0.bias": 2.0 ** (i - 4) for i in range(4)}  # 3: below the head
    expected |= {"visual.class_token": 2**-5, "visual.patch_embed.projection.weight": 2**-5}
    expected |= {"visual.norm.weight": 1.0, "head.weight": 1.0}
    assert {name: group_of[name]["lr_scale"] for name in expected} == expected
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or name in ("visual.class_token", "visual.positions")
        assert group_of[name]["weight_decay"] == (0.0 if spared else 0.05)
