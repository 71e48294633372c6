"""Colour operations and crops against torchvision's; boxes and draws against what the papers say.

python -m pytest tests/test_augment.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

import augment
from augment import BYOL_1, BYOL_2, COLUMNS, SIMCLR, block_mask, crop_box, draw, normalise, strong

JITTER = ("brightness", "contrast", "saturation", "hue")


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def photo(width, height):
    coarse = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def close(ours, theirs, tolerance=2e-5):  # float32, the same formula in another order
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", JITTER)
def test_colour_jitter_agrees_with_torchvision_on_every_kind_of_colour(name):
    steps = torch.linspace(0, 1, 9)  # 729 colours: gray, black, white, pure, two channels equal, all hues
    colours = torch.cartesian_prod(steps, steps, steps).T.reshape(3, 27, 27)
    factors = torch.tensor([-0.5, -0.31, -0.1, 0, 1 / 3, 0.5] if name == "hue" else [0, 0.3, 1, 1.4, 5.0])
    ours = getattr(augment, name)(colours.expand(len(factors), -1, -1, -1), factors.view(-1, 1, 1, 1))
    for view, factor in zip(ours, factors.tolist()):
        close(view, getattr(reference, f"adjust_{name}")(colours, factor))


@pytest.mark.parametrize("size, taps", [(224, 13), (64, 5), (32, 3)])
def test_blur_agrees_with_torchvision_at_the_scaled_sigma(size, taps):
    sigmas, x = torch.tensor([0.1, 0.7, 2.0]), noise(3, 3, size, size)
    for i, view in enumerate(augment.blur(x, sigmas.view(3, 1, 1, 1))):
        close(view, reference.gaussian_blur(x[i], [taps, taps], [sigmas[i].item() * size / 224] * 2))
    wide = reference.gaussian_blur(x[2], [41, 41], [size / 112] * 2) if size == 224 else view
    close(view, wide, 2e-3)  # 13 taps leave out a thousandth of the strongest blur


def test_normalise_agrees_with_torchvision_and_denormalise_undoes_it():
    images = (noise(2, 3, 8, 8) * 255).byte()
    close(normalise(images), reference.normalize(images / 255, list(augment.MEAN), list(augment.STD)))
    close(augment.denormalise(normalise(images)), images / 255)


def test_strong_equals_the_operations_one_after_another():
    rng, images = np.random.default_rng(2), (noise(40, 3, 48, 48) * 255).byte()
    before, params = images.clone(), np.stack([draw(rng, (SIMCLR, BYOL_2)[i % 2]) for i in range(40)])
    together = strong(images, torch.from_numpy(params))  # numpy will do as well
    assert torch.equal(images, before), "the caller's images were written to"
    for i, (image, row, result) in enumerate(zip(images, params, augment.denormalise(together))):
        p, x = dict(zip(COLUMNS, row.tolist())), image / 255
        x = reference.horizontal_flip(x) if p["flip"] else x
        for place in ("first", "second", "third", "fourth") if p["jitter"] else ():
            name = JITTER[int(p[place])]
            x = getattr(reference, f"adjust_{name}")(x, p[name])
        x = reference.rgb_to_grayscale(x, num_output_channels=3) if p["gray"] else x
        x = reference.gaussian_blur(x, [5, 5], [p["sigma"] * 48 / 224] * 2) if p["sigma"] else x
        close(result, reference.solarize(x, 0.5) if p["solarise"] else x)
        close(strong(images[i : i + 1], params[i : i + 1])[0], together[i], 1e-4)  # alone, sums differ


def test_boxes_follow_the_distribution_of_torchvision():
    """1,500 boxes from each; the means of the four numbers within 4 standard errors, as are their squares."""
    for width, height, scale in ((500, 375, (0.08, 1.0)), (90, 300, (0.5, 1.0))):
        rng, image = np.random.default_rng(3), Image.new("RGB", (width, height))
        torch.manual_seed(4)
        ours = np.array([crop_box(rng, width, height, scale) for _ in range(1500)], dtype=float)
        rows = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(1500)]
        theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in rows], dtype=float)
        assert (ours[:, :2] >= 0).all() and (ours[:, 2:] <= (width, height)).all()
        for a, b in ((ours, theirs), (ours**2, theirs**2)):
            error = np.sqrt((a.var(0) + b.var(0)) / 1500)
            assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error + 1e-9).all()


def test_a_long_image_gives_its_centre_and_one_pixel_itself():
    assert crop_box(np.random.default_rng(0), 1000, 10, (0.5, 1.0)) == (493, 0, 506, 10)
    assert crop_box(np.random.default_rng(0), 10, 1000, (0.5, 1.0)) == (0, 493, 10, 506)
    assert crop_box(np.random.default_rng(0), 1, 1, (0.08, 1.0)) == (0, 0, 1, 1)


@pytest.mark.parametrize("box, size", [((40, 30, 440, 330), 224), ((9, 9, 39, 69), 96), ((7, 7, 8, 8), 16)])
def test_crop_equals_torchvisions_on_the_image(box, size):
    image, (left, top, right, bottom) = photo(500, 375), box
    ours = augment.crop(image, box, size)
    theirs = reference.resized_crop(image, top, left, bottom - top, right - left, [size, size])
    assert ours.dtype == torch.uint8 and ours.is_contiguous()
    assert (ours.int() - reference.pil_to_tensor(theirs).int()).abs().max() <= 1


def test_evaluation_view_is_the_centre_of_the_image_with_its_short_side_resized():
    view = augment.evaluation_view(photo(500, 375), 224, 256).int()
    small = photo(500, 375).resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    assert (view - reference.pil_to_tensor(small).int()).abs().max() <= 1
    view = augment.evaluation_view(Image.new("RGB", (1, 9999), (10, 20, 30)), 32)
    assert view.shape == (3, 32, 32) and view[:, 5, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize("side, share", [(14, 0.4), (4, 0.4), (3, 0.0)])
def test_hidden_patches_are_exactly_the_share_and_lie_in_blocks(side, share):
    masks = np.stack([block_mask(np.random.default_rng(i), side, share) for i in range(200)])
    assert masks.dtype == bool and set(masks.sum(1)) == {round(share * side * side)}
    assert masks.any(0).all() == (share > 0) and not masks.all(0).any()
    grids = masks.reshape(-1, side, side)
    assert side < 14 or (grids[:, 1:] & grids[:, :-1]).mean() > 0.28  # drawn alone: 0.4 * 0.4 = 0.16


def test_the_two_views_of_byol_and_moco_v3_differ_as_published():
    """BYOL, appendix B, table 6: blur 1.0 and 0.1, solarisation 0 and 0.2; the rest is the same."""
    for first, second in ((BYOL_1, BYOL_2), (augment.MOCOV3_1, augment.MOCOV3_2)):
        assert (first.blur_p, first.solarise_p, second.blur_p, second.solarise_p) == (1.0, 0.0, 0.1, 0.2)
        assert (first.brightness, first.contrast, first.saturation, first.hue) == (0.4, 0.4, 0.2, 0.1)
        assert replace(second, blur_p=1.0, solarise_p=0.0) == first


@pytest.mark.parametrize("recipe", [SIMCLR, BYOL_2, augment.BEIT])
def test_draws_have_the_probabilities_of_the_recipe(recipe):
    rng, count = np.random.default_rng(5), 10_000
    p = dict(zip(COLUMNS, np.stack([draw(rng, recipe) for _ in range(count)]).T))
    chances = dict(flip=recipe.flip_p, jitter=recipe.jitter_p, gray=recipe.grayscale_p)
    for name, chance in dict(chances, sigma=recipe.blur_p, solarise=recipe.solarise_p).items():
        assert abs((p[name] > 0).mean() - chance) <= 4 * math.sqrt(chance * (1 - chance) / count), name
    for name, centre in zip(JITTER, (1, 1, 1, 0)):
        strength = getattr(recipe, name)
        assert np.abs(p[name] - centre).max() <= strength + 1e-6
        assert abs(p[name].mean() - centre) <= 4 * strength / math.sqrt(3 * count), name  # uniform
    _, counts = np.unique(np.stack([p[n] for n in COLUMNS[6:10]], 1), axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts - count / 24).max() <= 4 * math.sqrt(count / 24)


def test_main_saves_a_labelled_sheet(tmp_path):
    augment.main(["--out", str(tmp_path / "views.png")])
    sheet = np.array(Image.open(tmp_path / "views.png"))
    assert sheet.shape == (4 * 240 + 16, 4 * 240 + 16, 3)
    assert all((sheet[:16, 240 * i : 240 * (i + 1)] < 128).any() for i in range(4))  # a label on each column
