"""Views: one light crop for CLIP, a pair of strong ones for self-supervision, one fixed view for evaluation.

Paper: section 3 and the implementation details; the recipe of the strong pair is SimCLR's (arXiv 2002.05709, app. A).

    host, one picture     PIL [W x H] --crop_box, crop--> uint8 [3, 224, 224]        and  --draw--> float [13]
    device, whole batch   uint8 [B, 3, 224, 224]          --normalise--> float [B, 3, 224, 224]   light view
                          uint8 [B, 3, 224, 224], [B, 13] --strong-----> float [B, 3, 224, 224]   each its own parameters

Whatever is random is drawn on the host from `np.random.default_rng((seed, epoch, index))`: a view is a pure function of
these three. Left out: opening files and that seeding (data.py), masks of patches (selfsup.py), RandAugment and mixup
(finetune.py).

    python augment.py [IMAGE] --out views.png     # 2 s: the views of a picture, side by side
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
GRAY = (0.2989, 0.587, 0.114)  # weights of luma, ITU-R 601


# Host: which part of the picture, and which parameters --------------------------------------------------------------


def crop_box(rng, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """A random (left, top, right, bottom): area uniform in `scale`, aspect log-uniform in `ratio`, as Inception's."""
    for area, aspect, x, y in rng.random((10, 4)).tolist():
        area = width * height * between(*scale, area)
        aspect = math.exp(between(math.log(ratio[0]), math.log(ratio[1]), aspect))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    # Ten boxes did not fit, so the picture is long: its centre, as near to the whole as `ratio` allows.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def between(low, high, u):
    return low + (high - low) * u


def crop(image, box, size):
    """The part `box` of an RGB picture -> uint8 [3, size, size].

    torchvision's resized_crop without the copy of the part. It differs in two ways: within a source pixel of the
    border the filter sees the picture around the box; and a box over 6 x size (or so) is first averaged in whole
    blocks, which takes 0.4 of the time at 4000 x 3000 and moves a value by at most 4 of 255, 0.6 in the mean (on noise).
    """
    if image.mode != "RGB":
        raise ValueError(f'the picture has mode {image.mode}, expected RGB: pass image.convert("RGB")')
    small = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy())


def evaluation_view(image, size, resize=None):
    """Short side to `resize`, then the central square -> uint8 [3, size, size]. Zero-shot 224; linear 256 -> 224."""
    resize = resize or size
    if resize < size:
        raise ValueError(f"resize is {resize}, expected at least the crop of {size}: pass resize={size} or more")
    short = min(image.size)
    resized = [resize * side // short for side in image.size]
    offset = [round((side - size) / 2) for side in resized]
    # The square in the picture's own pixels: a picture of 1 x 9999 never becomes one of 224 x 2,239,776.
    start = [o * side / new for o, side, new in zip(offset, image.size, resized)]
    stop = [(o + size) * side / new for o, side, new in zip(offset, image.size, resized)]
    return crop(image, (*start, *stop), size)


@dataclass(frozen=True)
class Strong:
    """The recipe of a strong view: strengths of the colour jitter, and with what probability (_p) each part happens."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    solarise_p: float = 0.0
    min_scale: float = 0.08
    flip_p: float = 0.5
    sigma: tuple = (0.1, 2.0)  # of the blur, in pixels of a 224-pixel view


SIMCLR = Strong()  # SLIP's, with MoCo v2's strengths (arXiv 2003.04297): half of those in SimCLR's own paper
BYOL_1 = Strong(saturation=0.2, blur_p=1.0)  # BYOL, arXiv 2006.07733, appendix B, table 6: the views differ
BYOL_2 = Strong(saturation=0.2, blur_p=0.1, solarise_p=0.2)
MOCOV3_1, MOCOV3_2 = BYOL_1, BYOL_2  # MoCo v3, arXiv 2104.02057, section 4, takes them over
BEIT = Strong(hue=0.0, jitter_p=1.0, grayscale_p=0.0, blur_p=0.0)  # BEiT, arXiv 2106.08254, appendix: little colour

COLUMNS = ("flip", "jitter", "brightness", "contrast", "saturation", "hue")  # what the 13 parameters of a view are
COLUMNS += ("first", "second", "third", "fourth", "gray", "sigma", "solarise")  # first: 0 to 3, index in JITTER


def draw(rng, recipe):
    """The parameters of one strong view -> float32 [13], in the order of COLUMNS."""
    u = rng.random(14).tolist()
    jitter = [between(max(0.0, 1 - s), 1 + s, v) for s, v in zip((recipe.brightness, recipe.contrast, recipe.saturation), u)]
    jitter.append(between(-recipe.hue, recipe.hue, u[3]))
    order = sorted(range(4), key=u[4:8].__getitem__)
    sigma = between(*recipe.sigma, u[8]) if u[9] < recipe.blur_p else 0.0
    flip, jittered = u[10] < recipe.flip_p, u[11] < recipe.jitter_p
    gray, solarised = u[12] < recipe.grayscale_p, u[13] < recipe.solarise_p
    return np.array([flip, jittered, *jitter, *order, gray, sigma, solarised], dtype=np.float32)


# Device: colours in [0, 1], float [B, 3, H, W], each image with its own factor [B] ------------------------------------


def brightness(x, factor):
    return (x * _each(factor)).clamp_(0, 1)


def contrast(x, factor):
    """Away from (or towards) the mean gray of the image."""
    mean = (x.mean(dim=(2, 3)) * x.new_tensor(GRAY)).sum(dim=1)  # [B]
    return (x * _each(factor)).add_(_each(mean * (1 - factor))).clamp_(0, 1)


def saturation(x, factor):
    """Away from (or towards) each pixel's own gray."""
    return (x * _each(factor)).add_(_luma(x) * _each(1 - factor)).clamp_(0, 1)


def hue(x, turn):
    """Turn the hue of HSV by `turn` of the circle, -0.5 to 0.5, keeping each pixel's largest and smallest channel.

    With the channels stretched so that the smallest is 0 and the largest 1, the hue in sixths of the circle is
    +-(1 - r + g + b), positive where g > b: no case for each sector, so 18 times as fast as torchvision's on one core.
    A rotation about the gray axis is 2.1 times faster still, but at a tenth of a turn its colours are 0.065 off.
    """
    r, g, b = x.unbind(1)  # [B, H, W]
    low = x.amin(dim=1, keepdim=True)  # [B, 1, H, W]
    chroma = x.amax(dim=1, keepdim=True) - low
    stretched = (g + b - r - low[:, 0]).div_(chroma[:, 0].clamp(min=1e-8))  # a gray pixel: any hue will do
    angle = stretched.add_(1).copysign_(g - b).unsqueeze(1) / 6 + _each(turn)  # [B, 1, H, W], in turns
    # A channel is at its largest within 1/6 of a turn of its own hue, at its smallest beyond 1/3. +2: no negatives.
    angle = angle + _each(x.new_tensor([2, 2 - 1 / 3, 2 - 2 / 3]), dim=1)  # [B, 3, H, W]
    return angle.frac_().sub_(0.5).abs_().mul_(6).sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


def grayscale(x):
    return _luma(x).expand_as(x)


def blur(x, sigma):
    """Gaussian blur; `sigma` in pixels of a 224-pixel view, so scaled by H / 224: at 32 pixels it is next to nothing,
    where unscaled it would wipe the picture out (SimCLR leaves it out on CIFAR).

    At 224 there are 13 taps, 3 sigma of the strongest blur (2): 0.1% of the Gaussian is cut off. Shifted sums take half the
    time of a depthwise convolution on one core, and autocast leaves them in float32.
    """
    size = x.shape[2]
    radius = math.ceil(6 * size / 224)
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-(taps**2) / (2 * (sigma[:, None] * size / 224) ** 2), dim=1)  # [B, taps], sums to 1
    for dim, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, n = F.pad(x, padding, mode="reflect"), x.shape[dim]
        x = torch.zeros_like(x)
        for tap in range(2 * radius + 1):
            x.addcmul_(padded.narrow(dim, tap, n), _each(kernel[:, tap]))
    return x


def solarise(x):
    """Invert what is brighter than one half."""
    return torch.minimum(x, 1 - x)


def normalise(images):
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W], ImageNet's mean 0 and deviation 1: all that happens to a light view."""
    _check(images)
    return _standard(images.float().div_(255))


JITTER = (brightness, contrast, saturation, hue)  # the columns first to fourth count in this order


def strong(images, params):
    """uint8 [B, 3, H, W] on any device and what `draw` drew, [B, 13] on the host -> normalised float32 [B, 3, H, W].

    The parameters stay on the host because they decide which images an operation touches: the others cost nothing,
    and the device is never waited for. An image's result does not depend on its neighbours in the batch.
    """
    _check(images)
    params = np.asarray(params)
    if params.shape != (len(images), len(COLUMNS)):
        raise ValueError(
            f"the parameters have shape {params.shape}, expected {(len(images), len(COLUMNS))}: "
            "pass np.stack([draw(rng, SIMCLR) for each image])"
        )
    # On a CPU a few images at a time, so that they stay in cache from one operation to the next.
    step = len(images) if images.is_cuda else max(1, CACHE // images[0].numel())
    parts = range(0, len(images), step)
    return torch.cat([_strong(images[i : i + step], params[i : i + step]) for i in parts])


CACHE = 2**18  # numbers: 1 MB of float32, one image at 224


def _strong(images, params):
    p = dict(zip(COLUMNS, params.T))
    x = images.float().div_(255)
    x = _some(x, p["flip"] > 0, lambda x: x.flip(3))
    for nth in ("first", "second", "third", "fourth"):
        for number, operation in enumerate(JITTER):
            x = _some(x, (p["jitter"] > 0) & (p[nth] == number), operation, p[operation.__name__])
    x = _some(x, p["gray"] > 0, grayscale)
    x = _some(x, p["sigma"] > 0, blur, p["sigma"])
    x = _some(x, p["solarise"] > 0, solarise)
    return _standard(x)
