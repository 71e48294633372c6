"""What it costs: each part against a plain reference timed in the same run, so that a ratio means something
anywhere.

    python bench.py                    # all four, about 5 minutes on two CPU cores
    python bench.py step input          # some of them

step: a whole training step of SLIP against one view's forward and backward through the image tower.
input: three views of a 500x375 JPEG against torchvision's PIL transforms.
prompts: class embeddings with prompts cut to their length, against all padded to 77.
rate: the share of this machine's matrix-product rate which the step reaches.
"""

import argparse
import io
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

import augment
import data
import loop
import ranks
import recipe
import slip
import train
import zeroshot
from text import Tokenizer

BATCH = 16
WORDS = (
    "a photo of the red blue old small dog cat house tree on in under near big green street two my".split()
)


def seconds(work, repeats=3):
    """Median time of `work()` after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def captions(count, seed=0):
    """Captions of 6 to 18 words: 8 to 20 tokens with start and end."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(6, 19))) for _ in range(count)]


def slip_s16(device):
    torch.manual_seed(0)
    model = slip.build("SLIP_VITS16").to(device).train()
    model.tokenizer = Tokenizer.train(captions(200))
    model.tokenizer.end = model.config.vocab_size - 1  # the published vocabulary's size, our few merges
    return model


def flops(model, tokens):
    """Multiplications and additions of a step: 2 a weight and token forward, twice that backward;
    attention's products.
    """
    visual, text = model.visual, model.text
    n = visual.positions.shape[1]

    def tower(blocks, width, length):
        weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
        return 2 * weights * length + 4 * len(blocks) * length**2 * width

    view = tower(visual.blocks, visual.width, n) + 2 * 768 * visual.width * (n - 1)
    caption = tower(text.blocks, model.config.text_width, tokens)
    head = 2 * sum(p.numel() for p in model.branch.parameters() if p.ndim == 2)
    return BATCH * 3 * (3 * view + caption + 2 * head)


def bench_step(device):
    model = slip_s16(device)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, 0.1), lr=1e-4, fused=True)
    rng = np.random.default_rng(0)
    pictures = torch.randint(0, 256, (3, BATCH, 3, 224, 224), dtype=torch.uint8)
    params = torch.from_numpy(np.stack([augment.draw(rng, augment.SIMCLR) for _ in range(2 * BATCH)]))
    host = dict(images=pictures[0], view1=pictures[1], view2=pictures[2])
    host |= dict(view1_params=params[:BATCH], view2_params=params[BATCH:])
    rows, recompute = loop.chunk_rows(model, BATCH, device)
    args = SimpleNamespace(micro_batch=rows, recompute=recompute, precision=None, ssl_scale=1.0)
    loss_of = train.step_loss(model, args, device)
    texts = captions(BATCH, seed=1)
    images = torch.randn(BATCH, 3, 224, 224, device=device)

    def one_view():
        with ranks.autocast(device):
            features = model.visual(images)
        features.sum().backward()

    def step():
        loss, _ = loss_of(host | {"caption": list(texts)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    reference, ours = seconds(one_view), seconds(step)
    print(f"step: SLIP ViT-S/16, batch {BATCH} in chunks of {rows}: {ours:.2f} s; one view {reference:.2f} s")
    print(f"      ratio {ours / reference:.2f} (the published code: 4.25; three views alone: 3.0)")
    return model, ours, max(map(len, model.tokenizer(texts)))


def bench_rate(device):
    model, step, tokens = bench_step(device)
    size = 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    peak = 2 * size**3 / seconds(lambda: a @ b, 9)
    count = flops(model, tokens)
    print(f"rate: a step is {count / 1e9:.0f} GFLOP at {count / step / 1e9:.0f} GFLOP/s;", end=" ")
    print(f"a product of {size}x{size} matrices runs at {peak / 1e9:.0f}: share {count / step / peak:.0%}")


def bench_input(device):
    """One thread on each side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng, file = np.random.default_rng(0), io.BytesIO()
    noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize(
        (500, 375), Image.BICUBIC
    )
    noise.save(file, "JPEG", quality=90)
    crop = transforms.RandomResizedCrop
    tensor = [transforms.ToTensor(), transforms.Normalize(augment.MEAN, augment.STD)]
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], p=0.5)
    strong = [
        crop(224, (0.08, 1)),
        jitter,
        transforms.RandomGrayscale(0.2),
        blur,
        transforms.RandomHorizontalFlip(),
    ]
    light, strong = transforms.Compose([crop(224, (0.5, 1)), *tensor]), transforms.Compose([*strong, *tensor])

    def plain():
        picture = Image.open(file).convert("RGB")
        return light(picture), strong(picture), strong(picture)

    source = data.Source("jpeg", [(None, "")] * 64)
    source.items = Jpegs(file)
    views = data.Views(
        source,
        None,
        image_size=224,
        seed=0,
        light_crop=0.5,
        strong_crop=0.08,
        language=True,
        pair=data.PAIRS["simclr"],
    )
    batch = data.collate([views[((0, i), (0, i))] for i in range(16)])
    chunk = {name: value for name, value in batch.items() if name not in ("caption", "skipped")}
    reference = seconds(lambda: [plain() for _ in range(16)], 5) / 16
    host = seconds(lambda: [views[((0, i), (0, i))] for i in range(16)], 5) / 16
    both = host + seconds(lambda: data.device_views(chunk), 5) / 16
    print(f"input: PIL transforms {1000 * reference:.1f} ms a picture, our host part {1000 * host:.1f} ms")
    print(f"       ratio {host / reference:.2f}; with the device part on the CPU {both / reference:.2f}")
    torch.set_num_threads(threads)


class Jpegs:
    """One JPEG in memory, as often as asked for."""

    def __init__(self, file):
        self.file = file

    def __getitem__(self, index):
        return data.read_picture(io.BytesIO(self.file.getvalue())), "a caption"


def bench_prompts(device, classes=40):
    model = slip_s16(device).eval()
    names = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 3)) for i in range(classes)]
    templates = data.tasks.PROMPTS["imagenet"]
    cut = seconds(lambda: zeroshot.classifier(model, names, templates, device), 1)
    tokenizer = model.tokenizer

    def padded(texts, context=77):
        rows = tokenizer(texts, context)  # [P, L]
        return torch.nn.functional.pad(rows, (0, context - rows.shape[1]))

    model.tokenizer = padded
    full = seconds(lambda: zeroshot.classifier(model, names, templates, device), 1)
    print(
        f"prompts: {classes} classes x {len(templates)} prompts {cut:.2f} s, padded to 77 {full:.2f} s",
        end=": ",
    )
    print(f"{full / cut:.1f} x faster; 1,000 classes take {cut * 1000 / classes:.0f} s here")


BENCHES = {"rate": bench_rate, "step": bench_step, "input": bench_input, "prompts": bench_prompts}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time the parts against plain references, in one run.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(BENCHES)} (default: all)"
    )
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in BENCHES]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: expected any of {', '.join(BENCHES)}")
    device = ranks.start()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for part in args.parts or ["rate", "input", "prompts"]:  # rate times the step as well
        BENCHES[part](device)


if __name__ == "__main__":
    main()
