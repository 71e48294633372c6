"""Views: a light crop for CLIP, a pair of strong views for self-supervision, a fixed one for evaluation.

Paper: implementation details; the strong pair is SimCLR's (Chen et al. 2020, appendix A).

    host, one image       PIL --crop_box, crop--> uint8 [3, 224, 224];  --draw--> parameters [13]
    device, the batch     uint8 [B, 3, 224, 224] --normalise--> float [B, 3, 224, 224]             (light)
                          uint8 [B, 3, 224, 224], parameters [B, 13] --strong--> float [B, 3, 224, 224]

All is drawn from a generator that the caller seeds by (seed, epoch, index): a view is a function of these.
Left to others: reading images and seeding (data.py), what is made of the views (selfsup.py).
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

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
    part = pixels(image.crop(box))[None]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0].contiguous()


def evaluation_view(image, size, resize=None):
    """Short side to `resize` (default: size, as in zero-shot), then the centre -> uint8 [3, size, size]."""
    box = []  # in the image's own pixels: an image of 1 x 9999 never becomes one of 224 x 2,239,776
    for side in image.size:
        resized = (resize or size) * side // min(image.size)
        start = round((resized - size) / 2)
        box.append((start * side / resized, (start + size) * side / resized))
    (left, right), (top, bottom) = box
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return pixels(view).contiguous()


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]


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
BYOL_1 = Strong(saturation=0.2, blur_p=1.0)  # BYOL (arXiv 2006.07733, appendix B): the two views differ
BYOL_2 = Strong(saturation=0.2, blur_p=0.1, solarise_p=0.2)
MOCOV3_1, MOCOV3_2 = BYOL_1, BYOL_2  # MoCo v3 (arXiv 2104.02057) takes them over
BEIT = Strong(hue=0.0, jitter_p=1.0, grayscale_p=0.0, blur_p=0.0, masked=0.4)  # BEiT (arXiv 2106.08254)

# The parameters of a strong view; first to fourth say which of JITTER is done when, by its index.
COLUMNS = ("flip", "jitter", "brightness", "contrast", "saturation", "hue")
COLUMNS += ("first", "second", "third", "fourth", "gray", "sigma", "solarise")


def draw(rng, recipe):
    """The parameters of one strong view -> float32 [13], in the order of COLUMNS."""
    u = rng.random(14).tolist()
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)  # factors of 1 +- these
    factors = [1 + strength * (2 * v - 1) for strength, v in zip(strengths, u)]
    turn = recipe.hue * (2 * u[3] - 1)
    order = sorted(range(4), key=u[4:8].__getitem__)
    sigma = recipe.sigma[0] + (recipe.sigma[1] - recipe.sigma[0]) * u[8] if u[9] < recipe.blur_p else 0.0
    flip, jitter = u[10] < recipe.flip_p, u[11] < recipe.jitter_p
    gray, solarise = u[12] < recipe.grayscale_p, u[13] < recipe.solarise_p
    return np.array([flip, jitter, *factors, turn, *order, gray, sigma, solarise], dtype=np.float32)


def block_mask(rng, side, share):
    """Which patches are hidden, in blocks (BEiT's algorithm 1) -> bool [side * side], exactly the share True.
    A block has 16 of 14 x 14 patches or more, its aspect is 0.3 to 1 / 0.3; too large a one is drawn again.
    """
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


# On the device: x is float32 [B, 3, H, W] in [0, 1], a factor is [B], one for each image
def per_image(factor):
    return factor[:, None, None, None]  # [B, 1, 1, 1]


def grayscale(x):
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).expand_as(x)


def brightness(x, factor):
    return (x * per_image(factor)).clamp(0, 1)


def contrast(x, factor):
    mean = grayscale(x).mean(dim=(1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
    return torch.lerp(mean, x, per_image(factor)).clamp(0, 1)  # beyond 1 it extrapolates


def saturation(x, factor):
    return torch.lerp(grayscale(x), x, per_image(factor)).clamp(0, 1)


def hue(x, turn):
    """Turn the hue of HSV by `turn` of its circle, -0.5 to 0.5; a pixel's largest and smallest value stay."""
    r, g, b = x.split(1, dim=1)  # [B, 1, H, W]
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # In sixths of the circle red is at 0, green at 2, blue at 4. Gray pixels may have any hue.
    sixths = torch.where(value == g, 2 * chroma + b - r, 4 * chroma + r - g)
    sixths = torch.where(value == r, g - b, sixths) / chroma.clamp(min=1e-8) + 6 * per_image(turn)
    # A channel is largest within one sixth of its place, smallest beyond two, and linear between.
    distance = torch.cat([sixths + 5, sixths + 3, sixths + 1], dim=1) % 6  # [B, 3, H, W]
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def blur(x, sigma):
    """Gaussian blur. sigma counts pixels of a 224-pixel view (13 taps) and is scaled by H / 224: a view of 32
    pixels hardly changes. Sums of shifted images, not F.conv2d, which autocast would do in bf16."""
    radius, sigma = math.ceil(6 * x.shape[2] / 224), sigma[:, None] * x.shape[2] / 224
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1)  # [B, taps]: a Gaussian that sums to 1
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, x = F.pad(x, padding, mode="reflect"), torch.zeros_like(x)
        for tap in range(2 * radius + 1):
            x.addcmul_(padded.narrow(dim, tap, x.shape[dim]), per_image(kernel[:, tap]))
    return x


JITTER = (brightness, contrast, saturation, hue)


def standardise(x):
    for channel, mean, std in zip(x.unbind(1), MEAN, STD):  # numbers, so that no copy waits for the device
        channel.sub_(mean).div_(std)
    return x


def normalise(images):
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W] of ImageNet's mean and deviation: all a light view needs."""
    return standardise(images.float().div_(255))


def denormalise(x):
    """Normalised images [B, 3, H, W] -> [0, 1]."""
    mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def strong(images, params):
    """uint8 [B, 3, H, W] on any device, params [B, 13] on the host -> normalised float32 [B, 3, H, W].

    The host decides which images an operation touches, so nobody waits for the device. An image's view does
    not depend on the others in the batch."""
    p = dict(zip(COLUMNS, np.asarray(params, dtype=np.float32).T, strict=True))
    x = images.float().div_(255)
    x = apply_to(x, p["flip"] > 0, lambda x: x.flip(3))
    for place in ("first", "second", "third", "fourth"):
        for index, operation in enumerate(JITTER):
            x = apply_to(x, (p["jitter"] > 0) & (p[place] == index), operation, p[operation.__name__])
    x = apply_to(x, p["gray"] > 0, grayscale)
    x = apply_to(x, p["sigma"] > 0, blur, p["sigma"])
    x = apply_to(x, p["solarise"] > 0, lambda x: torch.minimum(x, 1 - x))  # inverts what is above one half
    return standardise(x)


def apply_to(x, chosen, operation, *factors):
    """x, with `operation` done on the chosen images alone, in place. chosen, factors: numpy [B]."""
    if chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device, non_blocking=True)
        factors = [torch.from_numpy(factor[chosen]).to(x.device, non_blocking=True) for factor in factors]
        x.index_copy_(0, rows, operation(x[rows], *factors))
    return x


def drawn_image():
    y, x = np.mgrid[:375, :500] / 375
    rgb = np.stack([(0.5 + 0.4 * np.cos(5 * (x - at))) * (1.1 - 0.7 * y) for at in (0, 0.4, 0.8)], axis=2)
    rgb[np.hypot(x - 0.4, y - 0.4) < 0.2] = (0.95, 0.85, 0.2)
    return Image.fromarray((rgb * 255).astype(np.uint8))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Save a sheet of views of an image: what the tower sees.")
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image file (default: a drawn image)")
    parser.add_argument("--out", default="views.png", help="the sheet (default: %(default)s)")
    args = parser.parse_args(argv)
    labels = ("evaluation view", "CLIP: light crop", "SimCLR: strong view 1", "SimCLR: strong view 2")
    sheet = Image.new("RGB", (4 * 228, 20 + 4 * 228), "white")
    for column, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((228 * column + 4, 5), label, fill="black")
    try:
        from data import read_image  # here alone, since data.py imports this file

        image = read_image(args.image) if args.image else drawn_image()
        for row in range(4):
            rng = np.random.default_rng((0, 0, row))  # (seed, epoch, index)
            scales = ((0.5, 1.0), (0.08, 1.0), (0.08, 1.0))
            light, *pair = [crop(image, crop_box(rng, *image.size, scale), 224) for scale in scales]
            light = normalise(torch.stack([evaluation_view(image, 224), light]))
            pair = strong(torch.stack(pair), np.stack([draw(rng, SIMCLR) for _ in pair]))
            for column, view in enumerate(denormalise(torch.cat([light, pair]))):
                view = Image.fromarray((view * 255).byte().permute(1, 2, 0).numpy())
                sheet.paste(view, (228 * column + 2, 228 * row + 22))
        sheet.save(args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"augment.py: error: {error}\n")
    print(f"four draws of {args.image or 'a drawn image'}, a row each: {args.out}")


if __name__ == "__main__":
    main()
