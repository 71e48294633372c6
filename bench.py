"""What it costs, beside a plain reference timed in the same run: a ratio means something on any machine.

    python bench.py                   # everything, minutes on two CPU cores
    python bench.py step --model vit_b16 --batch 256 512 --compile

step     a training step of SLIP: against one view's forward and backward; its share of the rate of a matrix
         product in the same precision; images/s; peak memory
input    three views of a 500x375 JPEG against torchvision's PIL transforms
host     the host's work for a step of 4,096 rows
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import augment
import console
import data
import device as devices
import images
import ranks
import recipe
import slip
import train
import vit
from text import Tokenizer

WORDS = "a photo of the red blue old small dog cat house tree on in under near big green street my".split()


def seconds(work, repeats=3):
    """Median time of `work()`, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def captions(count):
    """Captions of 6 to 18 words: 8 to 20 tokens with start and end."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(6, 19))) for _ in range(count)]


def new_model(device, name="vit_s16"):
    """SLIP with the published size of the vocabulary, of which few merges are used."""
    torch.manual_seed(0)
    model = slip.build(slip.configure("slip", name)).to(device).train()
    model.tokenizer = Tokenizer.train(captions(200))
    model.tokenizer.end = model.config.vocab_size - 1
    return model


def random_batch(model, batch, device):
    """What train.objective takes: crops on the device, parameters of the strong views on the host, tokens."""
    rng, side = np.random.default_rng(0), model.config.image_size
    crops = torch.randint(0, 256, (3, batch, 3, side, side), dtype=torch.uint8, device=device)
    rows = dict(zip(("images", "view1", "view2"), crops))
    for name in ("view1_params", "view2_params"):
        rows[name] = torch.tensor(np.stack([augment.draw(rng, augment.SIMCLR) for _ in range(batch)]))
    return rows | {"tokens": model.tokenizer(captions(batch), model.config.context).to(device)}


def flops(model, rows, settings, device):
    """Multiplications and additions of a row's step, counted on two rows without fused attention."""
    rows = {name: value[:2] for name, value in rows.items()}
    settings = SimpleNamespace(**vars(settings) | dict(micro_batch=2, recompute=False))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.objective(model, rows, settings, device)[0].backward()
    return counter.get_total_flops() / 2


def product_rate(device):
    """Multiplications and additions a second of a matrix product, in the precision of a training step."""
    size, bf16 = 1024 if device.type == "cpu" else 8192, devices.precision(device) == "bf16"
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * size**3 / seconds(lambda: a @ a, 9)


def bench_step(device, name, batch, compiled):
    model, settings = new_model(device, name), SimpleNamespace(precision=None, partner="simclr", ssl_scale=1)
    settings.micro_batch, settings.recompute, words = devices.plan_chunks(model, batch, device)
    settings.mask_same_class, rows = False, random_batch(model, batch, device)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def one_view():
        chunks = augment.normalise(rows["images"]).split(settings.micro_batch)
        with devices.autocast(device):
            torch.cat([model.visual(chunk) for chunk in chunks]).sum().backward()

    def step():
        optimizer.zero_grad()
        train.objective(model, rows, settings, device)[0].backward()
        optimizer.step()

    count = batch * flops(model, rows, settings, device)
    for block in model.visual.blocks if compiled else ():
        block.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reference, ours = seconds(one_view), seconds(step)
    memory, rate = devices.peak_memory() / 2**30, count / ours / product_rate(device)
    print(f"step: SLIP {name}, {batch} {words}: {ours:.2f} s, {batch / ours:.0f} images/s")
    print(f"      {ours / reference:.2f} times one view (the published code: 4.25; three views alone: 3.0)")
    print(f"      {rate:.0%} of a product's rate; {memory:.1f} GiB at the peak")


def bench_input(folder, count=16):
    path, noise = os.path.join(folder, "noise.jpg"), np.random.default_rng(0).integers(0, 256, (47, 63, 3))
    Image.fromarray(noise.astype(np.uint8)).resize((500, 375), Image.BICUBIC).save(path, quality=90)
    last = [T.ToTensor(), T.Normalize(augment.MEAN, augment.STD)]
    colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2)]
    colour += [T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], 0.5), T.RandomHorizontalFlip()]
    light = T.Compose([T.RandomResizedCrop(224, (0.5, 1)), *last])
    strong = T.Compose([T.RandomResizedCrop(224, (0.08, 1)), *colour, *last])
    settings = dict(image_size=224, seed=0, language=True, light_crop=0.5, strong_crop=0.08)
    source = images.Source("jpeg", images.Files([path] * count, ["a caption"] * count))
    views = data.Views(source, None, pair=data.PAIRS["simclr"], **settings)
    batch = data.collate([views[(0, i), (0, i)] for i in range(count)])

    def plain():
        loaded = [Image.open(path).convert("RGB") for _ in range(count)]
        return [view(image) for image in loaded for view in (light, strong, strong)]

    def on_the_device():
        augment.normalise(batch["images"])
        return [augment.strong(batch[name], batch[f"{name}_params"]) for name in ("view1", "view2")]

    reference, host = seconds(plain), seconds(lambda: [views[(0, i), (0, i)] for i in range(count)])
    both = (host + seconds(on_the_device)) / reference
    print(
        f"input: PIL transforms {1000 * reference / count:.1f} ms an image; the host's part of ours ", end=""
    )
    print(f"{host / reference:.2f} of it, with the device's part on the CPU {both:.2f}")


def bench_host(rows=4096):
    batches = data.Batches(15_000_000, None, rows, 0, range(8), lambda batch: batch)
    texts, tokenizer = captions(rows), Tokenizer.train(captions(200))
    samples = [dict(images=torch.zeros(3, 32, 32, dtype=torch.uint8), caption=text) for text in texts]
    order, tokens = seconds(lambda: list(batches)) / 8, seconds(lambda: tokenizer(texts, 77))
    collate = seconds(lambda: data.collate([sample | {"skipped": []} for sample in samples]))
    print(f"host: {rows:,} rows, microseconds: order {1e6 * order:,.0f}; in the workers: ", end="")
    print(f"tokens {1e6 * tokens:,.0f}, collate at 32 pixels {1e6 * collate:,.0f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time the parts against plain references, in one run.")
    add, names = parser.add_argument, ["step", "input", "host"]
    add("parts", nargs="*", metavar="PART", help=f"any of {', '.join(names)} (default: all)")
    add("--model", nargs="+", choices=vit.SIZES, default=["vit_s16"], help="of step (default: vit_s16)")
    add("--batch", nargs="+", type=console.positive_int, default=[16], help="of step (default: 16)")
    add("--compile", action="store_true", help="of step: torch.compile the blocks")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    parts, device = args.parts or names, ranks.start(args.device)
    if not set(names) >= set(parts):
        console.fail(parser, f"found {' '.join(parts)}, expected any of {', '.join(names)}")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for name, batch in itertools.product(args.model, args.batch) if "step" in parts else ():
        bench_step(device, name, batch, args.compile)
    if "input" in parts:
        with tempfile.TemporaryDirectory() as folder:
            bench_input(folder)
    if "host" in parts:
        bench_host()


if __name__ == "__main__":
    main()
