"""Views: a light crop for CLIP, a pair of strong views for self-supervision, a fixed one for evaluation.

Paper: section 3 and implementation details; the strong pair is SimCLR's (Chen et al. 2020, appendix A).

    host, one picture     PIL --crop_box, crop--> uint8 [3, 224, 224];  --draw--> parameters [13]
    device, the batch     uint8 [B, 3, 224, 224] --normalise--> float [B, 3, 224, 224]             (light)
                          uint8 [B, 3, 224, 224], parameters [B, 13] --strong--> float [B, 3, 224, 224]

All is drawn from a generator that the caller seeds by (seed, epoch, index): a view is a function of these.
Not here: opening pictures and seeding (data.py), what is made of the views (selfsup.py), mixup (finetune.py).

    python augment.py [IMAGE] --out views.png    # the views of a picture, side by side; 4 s
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid, save_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
BILINEAR = Image.Resampling.BILINEAR


# On the host, a picture at a time


def crop_box(rng, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """A random (left, top, right, bottom): area uniform in `scale`, aspect in `ratio` (uniform logarithm)."""
    for area, aspect, x, y in rng.random((10, 4)).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    # Ten boxes did not fit: the picture is long. Take its centre, as much of it as `ratio` allows.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop(image, box, size):
    """The part `box` (whole numbers) of an RGB picture -> uint8 [3, size, size]: torchvision's resized_crop.

    torch's resize of bytes takes 0.4 of the time of PIL's, within 1 of 255. If a box is more than 6 x size,
    PIL averages blocks first: 0.2 of the time at 4000 x 3000, within 4 of 255 (mean 0.7, both on noise).
    """
    if min(box[2] - box[0], box[3] - box[1]) > 6 * size:
        return pixels(image.resize((size, size), BILINEAR, box=box, reducing_gap=3)).contiguous()
    part = pixels(image.crop(box))[None]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0].contiguous()


def evaluation_view(image, size, resize=None):
    """Short side to `resize` (default: size, as in zero-shot), then the centre -> uint8 [3, size, size]."""
    resize = resize or size
    if resize < size:
        raise ValueError(f"found resize={resize}, expected at least size={size}: pass resize={size} or more")
    box = []  # in the picture's own pixels: a picture of 1 x 9999 never becomes one of 224 x 2,239,776
    for side in image.size:
        resized = resize * side // min(image.size)
        start = round((resized - size) / 2)
        box.append((start * side / resized, (start + size) * side / resized))
    (left, right), (top, bottom) = box
    return pixels(image.resize((size, size), BILINEAR, box=(left, top, right, bottom))).contiguous()


def pixels(image):
    if image.mode != "RGB":
        raise ValueError(f'found a picture of mode {image.mode}, expected RGB: pass image.convert("RGB")')
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
# BEiT (arXiv 2106.08254): little colour, hidden patches
BEIT = Strong(hue=0.0, jitter_p=1.0, grayscale_p=0.0, blur_p=0.0, masked=0.4)

# The parameters of a strong view; first to fourth say which of JITTER is done when, by its index.
COLUMNS = ("flip", "jitter", "brightness", "contrast", "saturation", "hue")
COLUMNS += ("first", "second", "third", "fourth", "gray", "sigma", "solarise")


def draw(rng, recipe):
    """The parameters of one strong view -> float32 [13], in the order of COLUMNS."""
    u = rng.random(14).tolist()
    factors = []
    for strength, v in zip((recipe.brightness, recipe.contrast, recipe.saturation), u[:3], strict=True):
        low = max(0.0, 1 - strength)
        factors.append(low + (1 + strength - low) * v)
    turn = recipe.hue * (2 * u[3] - 1)
    order = sorted(range(4), key=u[4:8].__getitem__)
    sigma = recipe.sigma[0] + (recipe.sigma[1] - recipe.sigma[0]) * u[8] if u[9] < recipe.blur_p else 0.0
    flip, jitter = u[10] < recipe.flip_p, u[11] < recipe.jitter_p
    gray, solarise = u[12] < recipe.grayscale_p, u[13] < recipe.solarise_p
    return np.array([flip, jitter, *factors, turn, *order, gray, sigma, solarise], dtype=np.float32)


def block_mask(rng, side, share):
    """Which patches are hidden, in blocks (BEiT, algorithm 1) -> bool [side * side], exactly the share True.

    A block has 16 patches or more of 14 x 14 (as many in proportion of another grid), its aspect is 0.3 to
    1 / 0.3; one that would hide too many is drawn again.
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


# On the device: x is float [B, 3, H, W] in [0, 1], a factor is [B], one for each image


def each(factor):
    return factor[:, None, None, None]  # [B, 1, 1, 1]


def luma(x):
    r, g, b = x.split(1, dim=1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)  # [B, 1, H, W]


def brightness(x, factor):
    return (x * each(factor)).clamp_(0, 1)


def contrast(x, factor):
    mean = luma(x).mean(dim=(1, 2, 3))  # [B]
    return (x * each(factor)).add_(each(mean * (1 - factor))).clamp_(0, 1)


def saturation(x, factor):
    return (x * each(factor)).add_(luma(x) * each(1 - factor)).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue of HSV by `turn` of its circle, -0.5 to 0.5; a pixel's largest and smallest value stay.

    With these stretched to 1 and 0, the hue in sixths of the circle is 1 - r + g + b, negative where g < b.
    No case for each sector, so a tenth of the time of torchvision's on one core. A rotation about the gray
    axis takes half of that, but after a tenth of a turn its colours are 0.065 (of 1) away: not taken.
    """
    r, g, b = x.split(1, dim=1)  # [B, 1, H, W]
    low = x.amin(dim=1, keepdim=True)
    chroma = x.amax(dim=1, keepdim=True) - low
    sixths = (g + b - r - low).div_(chroma.clamp(min=1e-8)).add_(1).copysign_(g - b)  # gray pixels: any hue
    angle = sixths.div_(6) + each(turn)
    # Red, green and blue lie at 0, 1/3 and 2/3 (the 2 avoids negatives). A channel is largest within 1/6 of a
    # turn from its place, smallest beyond 1/3.
    angle = torch.cat([angle + 2, angle + 5 / 3, angle + 4 / 3], dim=1).frac_()  # [B, 3, H, W]
    return angle.sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


def grayscale(x):
    return luma(x).repeat(1, 3, 1, 1)


def blur(x, sigma):
    """Gaussian blur. sigma counts pixels of a 224-pixel view, so it is scaled by H / 224: a 32-pixel view
    hardly changes, where a sigma of 2 of its own pixels would wipe it out (SimCLR does not blur CIFAR).

    At 224 there are 13 taps, 3 x the largest sigma of 2 on each side: 0.1% of that Gaussian is left out.
    Shifted sums: 0.7 of the time of a depthwise convolution on one core, and float32 under autocast.
    """
    radius, sigma = math.ceil(6 * x.shape[2] / 224), sigma[:, None] * x.shape[2] / 224
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1)  # [B, taps]: a Gaussian that sums to 1
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, x = F.pad(x, padding, mode="reflect"), torch.zeros_like(x)
        for tap in range(2 * radius + 1):
            x.addcmul_(padded.narrow(dim, tap, x.shape[dim]), each(kernel[:, tap]))
    return x


def solarise(x):
    return torch.minimum(x, 1 - x)  # inverts what is above one half


def unit(images):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"found images of {found}, expected torch.uint8 [B, 3, H, W]: stack crop's results")
    return images.float().div_(255)


def standardise(x):
    for channel, mean, std in zip(x.unbind(1), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return x


def normalise(images):
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W] of ImageNet's mean and deviation: all a light view needs."""
    return standardise(unit(images))


def denormalise(x):
    """Normalised pictures [B, 3, H, W] -> [0, 1]."""
    mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


JITTER = (brightness, contrast, saturation, hue)


def strong(images, params):
    """uint8 [B, 3, H, W] on any device, params [B, 13] on the host -> normalised float32 [B, 3, H, W].

    The parameters stay on the host, where they decide which images an operation touches: the others cost
    nothing, and nobody waits for the device. An image's result does not depend on the rest of the batch.
    """
    params, expected = np.asarray(params, dtype=np.float32), (len(images), len(COLUMNS))
    if params.shape != expected:
        advice = "stack what draw returns, a row for each image"
        raise ValueError(f"found parameters of shape {params.shape}, expected {expected}: {advice}")
    # A large image goes through all operations while in a CPU's cache: 0.7 of the time of all images at once.
    step = 1 if images.device.type == "cpu" and images.shape[-1] > 128 else max(1, len(images))
    out = torch.empty(images.shape, device=images.device)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        x, p = unit(images[part]), dict(zip(COLUMNS, params[part].T, strict=True))
        x = some(x, p["flip"] > 0, lambda x: x.flip(3))
        for place in ("first", "second", "third", "fourth"):
            for index, operation in enumerate(JITTER):
                x = some(x, (p["jitter"] > 0) & (p[place] == index), operation, p[operation.__name__])
        x = some(x, p["gray"] > 0, grayscale)
        x = some(x, p["sigma"] > 0, blur, p["sigma"])
        x = some(x, p["solarise"] > 0, solarise)
        out[part] = standardise(x)
    return out


def some(x, chosen, operation, *factors):
    """x after `operation` on the chosen images alone. chosen, factors: numpy [B]; x may be overwritten."""
    if not chosen.any():
        return x
    factors = [torch.from_numpy(factor[chosen]).to(x.device, non_blocking=True) for factor in factors]
    if chosen.all():
        return operation(x, *factors)
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, operation(x[rows], *factors))


def drawn_picture(width=500, height=375):
    y, x = np.mgrid[:height, :width] / height
    rgb = np.stack([(0.5 + 0.4 * np.cos(5 * (x - at))) * (1.1 - 0.7 * y) for at in (0, 0.4, 0.8)], axis=2)
    rgb[np.hypot(x - 0.4, y - 0.4) < 0.2] = (0.95, 0.85, 0.2)
    rgb[(np.abs(x - 0.95) < 0.2) & (np.abs(y - 0.6) < 0.2) & (x * 20 % 2 < 1)] = (0.1, 0.3, 0.7)
    return Image.fromarray((rgb * 255).astype(np.uint8))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Save a sheet of views of a picture: what the tower sees.")
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="what PIL opens (default: a drawn picture)")
    parser.add_argument("--out", default="views.png", help="the sheet, .png or .jpg (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, 0 or more (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        out = Path(args.out)
        if args.seed < 0 or out.suffix not in (".png", ".jpg") or not out.parent.is_dir():
            found = f"found --seed {args.seed} --out {out}"
            raise ValueError(f"{found}, expected 0 or more and a .png or .jpg in a directory that exists")
        picture = Image.open(args.image).convert("RGB") if args.image else drawn_picture()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        parser.error(str(error))

    rows = []
    for index in range(4):
        rng = np.random.default_rng((args.seed, 0, index))  # (seed, epoch, index)
        scales = [(0.5, 1.0), (0.08, 1.0), (0.08, 1.0)]
        light, *pair = [crop(picture, crop_box(rng, *picture.size, scale), 224) for scale in scales]
        rows.append(normalise(torch.stack([evaluation_view(picture, 224), light])))
        rows.append(strong(torch.stack(pair), np.stack([draw(rng, SIMCLR) for _ in pair])))
    save_image(make_grid(denormalise(torch.cat(rows)), nrow=4, pad_value=1.0), out)
    print("columns: the picture as evaluation sees it, CLIP's light crop, a pair of SimCLR's strong views")
    print(f"rows: four draws from seed {args.seed}. Saved as {out}")


if __name__ == "__main__":
    main()
