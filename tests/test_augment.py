"""The views: our colour operations against torchvision's functions for the same parameters; our crops against
torchvision's on PIL pictures; the law of the boxes and of the draws against what the papers say.

    python -m pytest tests/test_augment.py     # 10 s
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

import augment
from augment import (
    BEIT,
    BYOL_1,
    BYOL_2,
    COLUMNS,
    MEAN,
    MOCOV3_1,
    MOCOV3_2,
    SIMCLR,
    STD,
    block_mask,
    crop,
    crop_box,
    draw,
    evaluation_view,
    main,
    normalise,
    strong,
)

ROUNDING = 1e-5  # float32, the same formula in another order


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take longer than these small images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photo(width, height, seed=0):
    """Smooth colours with grain: what a resize meets in a photograph, and a bit more."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


def identity(count=1, **changes):
    """Parameters [count, 13] that leave an image as it is, but for the changes."""
    neutral = dict(brightness=1, contrast=1, saturation=1, second=1, third=2, fourth=3)
    row = [changes.get(name, neutral.get(name, 0)) for name in COLUMNS]
    return np.tile(np.array(row, dtype=np.float32), (count, 1))


def unnormalised(x):
    return x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def pil_crop(picture, box, size):
    left, top, right, bottom = box
    cut = reference.resized_crop(picture, top, left, bottom - top, right - left, [size, size], antialias=True)
    return reference.pil_to_tensor(cut).int()


# Operations


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends_agree_with_torchvision(name):
    factors = torch.tensor([0.0, 0.3, 0.6, 1.0, 1.4, 2.0, 5.0])
    x = noise(len(factors), 3, 20, 24)
    ours, theirs = getattr(augment, name)(x, factors), getattr(reference, f"adjust_{name}")
    for i, factor in enumerate(factors.tolist()):
        torch.testing.assert_close(ours[i], theirs(x[i], factor), atol=ROUNDING, rtol=0)


def test_hue_agrees_with_torchvision_on_every_kind_of_colour():
    steps = torch.linspace(0, 1, 9)  # 729 colours: gray, black, white, pure, two channels equal, all sectors
    colours = torch.cartesian_prod(steps, steps, steps).T.reshape(3, 27, 27)
    turns = torch.tensor([-0.5, -0.31, -0.1, 0.0, 0.05, 0.1, 1 / 3, 0.5])
    ours = augment.hue(colours.expand(len(turns), -1, -1, -1), turns)
    for i, turn in enumerate(turns.tolist()):
        torch.testing.assert_close(ours[i], reference.adjust_hue(colours, turn), atol=ROUNDING, rtol=0)


def test_grayscale_and_solarise_agree_with_torchvision():
    x = noise(3, 3, 20, 24)
    gray = reference.rgb_to_grayscale(x, num_output_channels=3)
    torch.testing.assert_close(augment.grayscale(x), gray, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(augment.solarise(x), reference.solarize(x, 0.5), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("size, taps", [(224, 13), (64, 5), (32, 3)])
def test_blur_agrees_with_torchvision_at_the_scaled_sigma(size, taps):
    sigmas = torch.tensor([0.1, 0.7, 2.0])
    x = noise(len(sigmas), 3, size, size)
    ours = augment.blur(x, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        theirs = reference.gaussian_blur(x[i], [taps, taps], [sigma * size / 224] * 2)
        torch.testing.assert_close(ours[i], theirs, atol=ROUNDING, rtol=0)


def test_thirteen_taps_leave_out_a_thousandth_of_the_strongest_blur():
    x = noise(1, 3, 224, 224)
    wide = reference.gaussian_blur(x, [41, 41], [2.0, 2.0])
    assert (augment.blur(x, torch.tensor([2.0])) - wide).abs().max() < 2e-3
    assert 1 - math.erf(6.5 / 2.0 / math.sqrt(2)) < 1.3e-3


def test_blur_hardly_changes_a_picture_of_32_pixels():
    x = reference.pil_to_tensor(photo(32, 32))[None] / 255
    assert (augment.blur(x, torch.tensor([2.0])) - x).abs().mean() < 0.003


# Batches


def test_normalise_agrees_with_torchvision():
    images = (noise(2, 3, 8, 8) * 255).byte()
    theirs = reference.normalize(images.float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalise(images), theirs, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("size", [32, 160])  # 160: images go one by one, 32: all together
def test_parameters_that_change_nothing_give_the_light_view(size):
    images = (noise(4, 3, size, size) * 255).byte()
    torch.testing.assert_close(strong(images, identity(4)), normalise(images), atol=0, rtol=0)
    jittered = strong(images, identity(4, jitter=1))
    torch.testing.assert_close(
        jittered, normalise(images), atol=1e-4, rtol=0
    )  # rounding, over a deviation of 0.22


@pytest.mark.parametrize("size", [32, 160])
def test_an_image_does_not_depend_on_its_batch(size):
    rng = np.random.default_rng(1)
    images = (noise(10, 3, size, size) * 255).byte()
    before, params = images.clone(), np.stack([draw(rng, BYOL_2) for _ in images])
    together = strong(images, params)
    alone = torch.cat([strong(images[i : i + 1], params[i : i + 1]) for i in range(len(images))])
    # Not to the bit: at 32 pixels a mean over the image may be summed in another order.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.equal(images, before), "the caller's images were written to"


def test_strong_equals_the_operations_one_after_another():
    rng = np.random.default_rng(2)
    images = (noise(40, 3, 48, 48) * 255).byte()
    params = np.stack([draw(rng, BYOL_2 if i % 2 else SIMCLR) for i in range(len(images))])
    ours = unnormalised(strong(images, torch.from_numpy(params)))  # a tensor will do as well
    adjust = [
        getattr(reference, f"adjust_{name}") for name in ("brightness", "contrast", "saturation", "hue")
    ]
    for image, row, result in zip(images, params, ours, strict=True):
        p = dict(zip(COLUMNS, row.tolist(), strict=True))
        x = image / 255
        x = reference.horizontal_flip(x) if p["flip"] else x
        for place in ("first", "second", "third", "fourth") if p["jitter"] else ():
            index = int(p[place])
            x = adjust[index](x, p[("brightness", "contrast", "saturation", "hue")[index]])
        x = reference.rgb_to_grayscale(x, num_output_channels=3) if p["gray"] else x
        x = reference.gaussian_blur(x, [5, 5], [p["sigma"] * 48 / 224] * 2) if p["sigma"] else x
        x = reference.solarize(x, 0.5) if p["solarise"] else x
        torch.testing.assert_close(result, x, atol=ROUNDING, rtol=0)


def test_the_order_of_the_jitter_is_honoured_for_each_image():
    images = (noise(2, 3, 16, 16) * 255).byte()
    params = identity(2, jitter=1, brightness=1.4, contrast=0.6)
    params[1, COLUMNS.index("first") : COLUMNS.index("first") + 4] = (
        1,
        0,
        2,
        3,
    )  # contrast before brightness
    ours, x, f, g = (
        unnormalised(strong(images, params)),
        images / 255,
        torch.tensor([1.4]),
        torch.tensor([0.6]),
    )
    first = augment.contrast(augment.brightness(x[:1], f), g)
    second = augment.brightness(augment.contrast(x[1:], g), f)
    torch.testing.assert_close(ours, torch.cat([first, second]), atol=ROUNDING, rtol=0)


# Host


def test_boxes_follow_the_law_of_torchvision():
    """4,000 boxes from each; the means of the four numbers within 4 standard errors, as are their squares."""
    for width, height, scale in ((500, 375, (0.08, 1.0)), (375, 500, (0.5, 1.0)), (90, 300, (0.08, 1.0))):
        rng, picture = np.random.default_rng(3), Image.new("RGB", (width, height))
        torch.manual_seed(4)
        ours = np.array([crop_box(rng, width, height, scale) for _ in range(4000)], dtype=float)
        rows = [RandomResizedCrop.get_params(picture, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
        theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in rows], dtype=float)
        assert (ours[:, :2] >= 0).all() and (ours[:, 2:] <= (width, height)).all()
        assert (ours[:, 2:] > ours[:, :2]).all()
        for a, b in ((ours, theirs), (ours**2, theirs**2)):
            error = np.sqrt((a.var(0) + b.var(0)) / 4000)
            assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error + 1e-9).all()


def test_boxes_reach_every_place():
    boxes = {crop_box(np.random.default_rng(i), 4, 4, (0.5, 0.6)) for i in range(300)}
    assert {box[:2] for box in boxes if box[2] - box[0] == box[3] - box[1] == 3} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }


@pytest.mark.parametrize("width, height, box", [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506))])
def test_a_long_picture_gives_its_centre(width, height, box):
    assert crop_box(np.random.default_rng(0), width, height, (0.5, 1.0)) == box
    assert crop_box(np.random.default_rng(0), 1, 1, (0.08, 1.0)) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    "picture, box, size",
    [
        (photo(500, 375), (40, 30, 440, 330), 224),  # smaller
        (photo(500, 375), (100, 90, 230, 250), 224),  # larger
        (photo(40, 40), (2, 5, 31, 38), 32),
        (photo(20, 20), (7, 7, 8, 8), 16),  # a single pixel
    ],
)
def test_crop_equals_torchvision_on_the_picture(picture, box, size):
    ours = crop(picture, box, size)
    assert ours.dtype == torch.uint8 and ours.shape == (3, size, size) and ours.is_contiguous()
    assert (ours.int() - pil_crop(picture, box, size)).abs().max() <= 1


def test_crop_of_a_huge_picture_stays_within_four_of_255():
    picture, box = reference.to_pil_image(noise(3, 1500, 2000)), (101, 57, 1800, 1403)
    difference = (crop(picture, box, 112).int() - pil_crop(picture, box, 112)).abs()
    inside = difference[:, 1:-1, 1:-1]  # at its border the filter of PIL sees the picture around the box
    assert inside.max() <= 4 and difference.float().mean() < 0.8


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (224, 224), (301, 77), (33, 32)])
@pytest.mark.parametrize("size, resize", [(224, None), (224, 256), (32, 40)])
def test_evaluation_view_equals_resize_and_centre_crop(width, height, size, resize):
    picture = photo(width, height)
    resized = reference.resize(picture, [resize or size], interpolation=InterpolationMode.BILINEAR)
    theirs = reference.pil_to_tensor(reference.center_crop(resized, [size, size]))
    assert (evaluation_view(picture, size, resize).int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("width, height", [(1, 1), (1, 9999), (9999, 1), (2, 3), (225, 1)])
def test_evaluation_view_takes_pictures_of_any_shape(width, height):
    view = evaluation_view(Image.new("RGB", (width, height), (10, 20, 30)), 224, 256)
    assert view.shape == (3, 224, 224) and view[:, 5, 7].tolist() == [10, 20, 30]


def test_a_view_is_a_function_of_seed_epoch_and_index():
    def view(*key):
        rng = np.random.default_rng(key)
        box = crop_box(rng, 80, 60, (0.08, 1.0))
        return strong(crop(picture, box, 32)[None], draw(rng, SIMCLR)[None])

    picture = photo(80, 60)
    assert torch.equal(view(0, 1, 2), view(0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(view(0, 1, 2), view(*other))


@pytest.mark.parametrize("side, share", [(14, 0.4), (4, 0.4), (7, 0.75), (3, 0.0)])
def test_hidden_blocks_are_exactly_the_share_and_reach_every_patch(side, share):
    rng = np.random.default_rng(6)
    masks = np.stack([block_mask(rng, side, share) for _ in range(400)])
    assert masks.dtype == bool and set(masks.sum(1)) == {round(share * side * side)}
    assert masks.any(0).all() == (share > 0) and not masks.all(0).any()


def test_hidden_patches_lie_in_blocks():
    """More neighbours are hidden together than if each patch were drawn alone."""
    masks = np.stack([block_mask(np.random.default_rng(i), 14, 0.4) for i in range(200)]).reshape(-1, 14, 14)
    together = (masks[:, 1:] & masks[:, :-1]).mean()
    assert together > 0.28  # alone it would be 0.4 * 0.4 = 0.16


def test_the_two_views_of_byol_and_moco_v3_differ_as_published():
    """BYOL, appendix B, table 6: blur 1.0 and 0.1, solarisation 0 and 0.2; the rest is the same."""
    for first, second in ((BYOL_1, BYOL_2), (MOCOV3_1, MOCOV3_2)):
        assert (first.blur_p, first.solarise_p, second.blur_p, second.solarise_p) == (1.0, 0.0, 0.1, 0.2)
        assert (first.brightness, first.contrast, first.saturation, first.hue) == (0.4, 0.4, 0.2, 0.1)
        assert replace(second, blur_p=1.0, solarise_p=0.0) == first


@pytest.mark.parametrize("recipe", [SIMCLR, BYOL_1, BYOL_2, BEIT])
def test_draws_have_the_probabilities_of_the_recipe(recipe):
    rng, count = np.random.default_rng(5), 20_000
    p = dict(zip(COLUMNS, np.stack([draw(rng, recipe) for _ in range(count)]).T, strict=True))
    chances = dict(
        flip=recipe.flip_p, jitter=recipe.jitter_p, gray=recipe.grayscale_p, solarise=recipe.solarise_p
    )
    chances["sigma"] = recipe.blur_p
    for name, chance in chances.items():
        assert abs((p[name] > 0).mean() - chance) <= 4 * math.sqrt(chance * (1 - chance) / count), name
    for name, centre in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)):
        strength = getattr(recipe, name)
        assert np.abs(p[name] - centre).max() <= strength + 1e-6
        assert abs(p[name].mean() - centre) <= 4 * strength / math.sqrt(3 * count), name  # of a uniform law
    blurred = p["sigma"][p["sigma"] > 0]
    if len(blurred):
        assert blurred.min() >= 0.1 and blurred.max() <= 2.0
        assert abs(blurred.mean() - 1.05) <= 4 * 1.9 / math.sqrt(12 * len(blurred))
    orders, counts = np.unique(np.stack([p[n] for n in COLUMNS[6:10]], axis=1), axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == range(4)).all()
    assert np.abs(counts - count / 24).max() <= 4 * math.sqrt(count / 24)
    # And what is drawn is independent: no column goes along with another.
    table = np.stack([p[n] for n in COLUMNS[:7]])
    correlation = np.corrcoef(table[table.std(axis=1) > 0])
    assert np.abs(correlation - np.eye(len(correlation))).max() < 4.5 / math.sqrt(count)


# What is refused, and the sheet


def test_what_is_wrong_is_said_with_what_to_type():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="mode L, expected RGB"):
        crop(Image.new("L", (8, 8)), (0, 0, 8, 8), 4)
    with pytest.raises(ValueError, match="resize=256 or more"):
        evaluation_view(Image.new("RGB", (8, 8)), 256, 224)
    with pytest.raises(ValueError, match="expected torch.uint8"):
        normalise(images.float())
    with pytest.raises(ValueError, match="stack what draw returns"):
        strong(images, identity(3))


def test_main_saves_a_sheet_and_refuses_in_a_sentence(tmp_path, capsys):
    photo(60, 40).save(tmp_path / "photo.jpg")
    for arguments in ([], [str(tmp_path / "photo.jpg")]):
        main([*arguments, "--out", str(tmp_path / "views.jpg")])
        assert Image.open(tmp_path / "views.jpg").size == (4 * 226 + 2, 4 * 226 + 2)
    assert "views.jpg" in capsys.readouterr().out
    for arguments in (["missing.jpg"], ["--out", "views.txt"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_denormalising_gives_the_picture_back():
    pictures = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8))
    torch.testing.assert_close(augment.denormalise(normalise(pictures)), pictures / 255, rtol=0, atol=1e-6)
