"""Views: a light crop for CLIP, a pair of strong views for self-supervision, a fixed one for evaluation.

Paper: implementation details; the strong pair is SimCLR's (Chen et al. 2020, appendix A).

    host, one image       PIL --crop_box, crop--> uint8 [3, 224, 224];  --draw--> parameters [13]
    device, the batch     uint8 [B, 3, 224, 224] --normalise, or strong with parameters--> float, same shape

All is drawn from a generator that the caller seeds by (seed, epoch, index): a view is a function of these.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from images import read_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def crop_box(rng, width, height, scale):
    """A random (left, top, right, bottom): area uniform in `scale`, aspect 3/4 to 4/3, its log uniform."""
    for area, aspect, x, y in rng.random((10, 4)).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = 3 / 4 * (16 / 9) ** aspect
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    # Ten boxes were too large: the image is long. Take its centre, as much of it as the aspect allows.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop(image, box, size):
    """The part `box` (whole numbers) of an RGB image -> uint8 [3, size, size]: torchvision's resized_crop."""
    part = TF.pil_to_tensor(image.crop(box))[None]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0].contiguous()


def evaluation_view(image, size, resize=None):
    """Short side to `resize` (default: size, as in zero-shot), then the centre -> uint8 [3, size, size]."""
    sides = np.array(image.size)
    resized = (resize or size) * sides // sides.min()
    start = np.round((resized - size) / 2)
    box = np.stack([start, start + size]) * sides / resized  # in the image's own pixels: 1 x 9999 stays small
    view = image.resize((size, size), Image.Resampling.BILINEAR, tuple(box.flat))
    return TF.pil_to_tensor(view).contiguous()


@dataclass(frozen=True)
class Strong:
    """The recipe of a strong view: the strengths of the colour jitter, the probability (_p) of each part."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    solarise_p: float = 0.0
    flip_p: float = 0.5
    sigma: tuple = (0.1, 2.0)  # of the blur, in pixels of a 224-pixel view
    masked: float = 0.0  # share of the patches that the tower does not see (block_mask)


SIMCLR = Strong()  # SLIP's: SimCLR with the strengths of MoCo v2 (arXiv 2003.04297), half of SimCLR's own
BYOL_1 = MOCOV3_1 = Strong(saturation=0.2, blur_p=1.0)  # BYOL (arXiv 2006.07733, appendix B): two recipes
BYOL_2 = MOCOV3_2 = Strong(saturation=0.2, blur_p=0.1, solarise_p=0.2)  # MoCo v3's (2104.02057) too
BEIT = Strong(hue=0.0, jitter_p=1.0, grayscale_p=0.0, blur_p=0.0, masked=0.4)  # BEiT (arXiv 2106.08254)

ORDER = ("first", "second", "third", "fourth")  # which of the four colour operations is done when
COLUMNS = (*"flip jitter brightness contrast saturation hue".split(), *ORDER, "gray", "sigma", "solarise")


def draw(rng, recipe):
    """The parameters of one strong view -> float32 [13], in the order of COLUMNS."""
    u = rng.random(14).tolist()
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    factors = [centre + strength * (2 * v - 1) for centre, strength, v in zip((1, 1, 1, 0), strengths, u)]
    order = sorted(range(4), key=u[4:8].__getitem__)
    sigma = recipe.sigma[0] + (recipe.sigma[1] - recipe.sigma[0]) * u[8] if u[9] < recipe.blur_p else 0.0
    flip, jitter = u[10] < recipe.flip_p, u[11] < recipe.jitter_p
    gray, solarise = u[12] < recipe.grayscale_p, u[13] < recipe.solarise_p
    return np.array([flip, jitter, *factors, *order, gray, sigma, solarise], dtype=np.float32)


def block_mask(rng, side, share):
    """Which patches are hidden, in blocks (BEiT's algorithm 1) -> bool [side * side], exactly the share True.
    A block has at least 16 of 14 x 14 patches, its aspect is 0.3 to 1 / 0.3; one too large is not used."""
    mask, wanted = np.zeros((side, side), bool), round(share * side * side)
    while left := wanted - int(mask.sum()):
        area = rng.uniform(min(left, side * side * 16 / 196), left)
        aspect = 0.3 ** rng.uniform(-1, 1)
        height, width = (min(side, max(1, round(math.sqrt(area * a)))) for a in (aspect, 1 / aspect))
        top, start = rng.integers(side - height + 1), rng.integers(side - width + 1)
        block = mask[top : top + height, start : start + width]
        if block.size - block.sum() <= left:
            block[:] = True
    return mask.flatten()


# On the device: x is float32 [B, 3, H, W] in [0, 1]; a factor is [B, 1, 1, 1], one for each image.
def brightness(x, factor):
    return (x * factor).clamp(0, 1)


def contrast(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x).mean(dim=(2, 3), keepdim=True), x, factor).clamp(0, 1)


def saturation(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x), x, factor).clamp(0, 1)


def hue(x, turn):
    """Turn the hue of HSV by `turn` of its circle, -0.5 to 0.5; a pixel's largest and smallest value stay."""
    r, g, b = x.split(1, dim=1)  # [B, 1, H, W]
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # In sixths of the circle red is at 0, green at 2, blue at 4. Gray pixels may have any hue.
    sixths = torch.where(value == g, 2 * chroma + b - r, 4 * chroma + r - g)
    sixths = torch.where(value == r, g - b, sixths) / chroma.clamp(min=1e-8) + 6 * turn
    # A channel is largest within one sixth of its place, smallest beyond two, and linear between.
    distance = torch.cat([sixths + 5, sixths + 3, sixths + 1], dim=1) % 6  # [B, 3, H, W]
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def blur(x, sigma):
    """Gaussian blur. sigma counts pixels of a 224-pixel view (13 taps) and is scaled by H / 224: a view of 32
    pixels hardly changes. Sums of shifted images, not F.conv2d, which autocast would do in bf16."""
    radius, sigma = math.ceil(6 * x.shape[2] / 224), sigma * x.shape[2] / 224
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=3)  # [B, 1, 1, taps]: a Gaussian, sums to 1
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, x = F.pad(x, padding, mode="reflect"), torch.zeros_like(x)
        for tap in range(2 * radius + 1):
            x.addcmul_(padded.narrow(dim, tap, x.shape[dim]), kernel[..., tap, None])
    return x


def normalise(images):
    """uint8 [B, 3, H, W], or float32 of 0-1, then overwritten -> float32 of ImageNet's mean and deviation."""
    x = images.float().div_(255) if images.dtype == torch.uint8 else images
    for channel, mean, std in zip(x.unbind(1), MEAN, STD):  # numbers, so that no copy waits for the device
        channel.sub_(mean).div_(std)
    return x


def denormalise(x):  # normalised images [B, 3, H, W] -> [0, 1]
    mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def strong(images, params):
    """uint8 [B, 3, H, W] on any device, params [B, 13] on the host -> normalised float32 [B, 3, H, W]."""
    params = torch.as_tensor(np.asarray(params, dtype=np.float32))
    p = dict(zip(COLUMNS, params.T.numpy(), strict=True))
    factors = dict(zip(COLUMNS, params.to(images.device, non_blocking=True).view(-1, 13, 1, 1, 1).unbind(1)))
    x = images.float().div_(255)
    apply_to(x, p["flip"] > 0, lambda x: x.flip(3))
    for place in ORDER:
        for index, operation in enumerate((brightness, contrast, saturation, hue)):
            apply_to(x, (p["jitter"] > 0) & (p[place] == index), operation, factors[operation.__name__])
    apply_to(x, p["gray"] > 0, lambda x: TF.rgb_to_grayscale(x, 3))
    apply_to(x, p["sigma"] > 0, blur, factors["sigma"])
    apply_to(x, p["solarise"] > 0, lambda x: torch.minimum(x, 1 - x))  # inverts what is above one half
    return normalise(x)


def apply_to(x, chosen, operation, *factors):
    """Change the chosen images in place; chosen is numpy bool [B], so nothing waits for the device."""
    if chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device, non_blocking=True)
        x.index_copy_(0, rows, operation(x[rows], *(factor[rows] for factor in factors)))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Save a sheet of views of an image: what the tower sees.")
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image file (default: coloured ramps)")
    parser.add_argument("--out", default="views.png", help="the sheet (default: %(default)s)")
    args = parser.parse_args(argv)
    ramps = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)])
    try:
        image = read_image(args.image) if args.image else ramps
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {args.image}: {error}\n")
    views = []
    for rng in map(np.random.default_rng, range(4)):
        light, *pair = [crop(image, crop_box(rng, *image.size, (low, 1.0)), 224) for low in (0.5, 0.08, 0.08)]
        views.append(normalise(torch.stack([evaluation_view(image, 224), light])))
        views.append(strong(torch.stack(pair), [draw(rng, SIMCLR) for _ in pair]))
    sheet = TF.to_pil_image(make_grid(denormalise(torch.cat(views)), nrow=4, padding=16, pad_value=1))
    for column, label in enumerate(("evaluation view", "light crop", "strong view 1", "strong view 2")):
        ImageDraw.Draw(sheet).text((16 + 240 * column, 2), label, fill="black")
    sheet.save(args.out)
    print(f"four draws, a row each: {args.out}")


if __name__ == "__main__":
    main()
