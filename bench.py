"""What it costs, beside a plain reference timed in the same run: a ratio means something on any machine.

    python bench.py [step --model vit_b16 --batch 512 --compile]      # without a part: all three

step: SLIP against one view forward and backward (published: 4.25), and a product in the same precision.
input: three views of a JPEG, against torchvision's with its colours. host: order and tokens of 4,096 rows.
"""

import argparse
import tempfile
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torchvision import transforms as T

import augment
import data
import device as devices
import images
import ranks
import slip
import train
import vit
from text import Tokenizer

CAPTIONS = ["a photo of a small red dog under the green tree by my old house"] * 4096


def seconds(work):
    """Median time of `work()`, after a call to warm up; the timer waits for the device."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=8).median


def bench_step(args, device, views):
    rows = data.collate([views[(0, i), (0, i)] for i in range(args.batch)], Tokenizer.train(CAPTIONS))
    batch = {n: v if n.endswith("_params") else v.to(device) for n, v in rows.items() if n != "skipped"}
    model = slip.build(slip.configure("slip", args.model, image_size=224)).to(device)
    for block in model.visual.blocks if args.compile else ():
        block.compile()
    settings = SimpleNamespace(precision=None, partner="simclr", ssl_scale=1, mask_same_class=False)
    settings.micro_batch, settings.recompute, words = devices.plan_chunks(model, args.batch, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def one_view():
        with devices.autocast(device):
            for chunk in augment.normalise(batch["images"]).split(settings.micro_batch):
                model.visual(chunk).sum().backward()

    def step():
        optimizer.zero_grad()
        train.objective(model, batch, settings, device)[0].backward()
        optimizer.step()

    reference, ours, memory = seconds(one_view), seconds(step), devices.peak_memory() / 1e9
    size, bf16 = 1024 if device.type == "cpu" else 8192, devices.precision(device) == "bf16"
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    product = seconds(lambda: matrix @ matrix) / (2 * size**3)  # of a multiplication or addition
    tower, n = model.visual, model.visual.positions.shape[1]  # n tokens; the text is left out, a few per cent
    work = 6 * vit.count_parameters(tower) + 12 * len(tower.blocks) * tower.width * n  # of a token, both ways
    share = 3 * args.batch * n * work * product / ours
    print(f"step: {args.model}, {args.batch} rows {words}: {ours:.2f} s, {args.batch / ours:.0f} images/s,")
    print(f"{ours / reference:.2f} times one view, {share:.0%} of a product's rate, {memory:.1f} GB")


def bench_input(path, views):
    colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2)]
    colour += [T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], 0.5), T.RandomHorizontalFlip()]
    light = T.Compose([T.RandomResizedCrop(224, (0.5, 1)), T.ToTensor()])
    strong = T.Compose([T.RandomResizedCrop(224, (0.08, 1)), *colour, T.ToTensor()])

    def plain():
        image = Image.open(path).convert("RGB")
        return light(image), strong(image), strong(image)

    reference, ours = seconds(plain), seconds(lambda: [views[(0, i), (0, i)] for i in range(16)]) / 16
    print(f"input: torchvision {1000 * reference:.1f} ms an image, ours {ours / reference:.2f} of it")


def bench_host():
    batches, tokenizer = data.Batches(10**7, None, 4096, 0, range(8), ranks.share), Tokenizer.train(CAPTIONS)
    order, tokens = seconds(lambda: list(batches)) / 8, seconds(lambda: tokenizer(CAPTIONS))
    print(f"host: 4,096 rows: order {1000 * order:.1f} ms, in the workers tokens {1000 * tokens:.1f} ms")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time the parts against plain references, in one run.")
    parser.add_argument("part", nargs="?", choices=["step", "input", "host"], help="this one only")
    parser.add_argument("--model", choices=vit.SIZES, default="vit_s16", help="of step")
    parser.add_argument("--batch", type=int, default=16, help="of step, 4,096 at most")
    parser.add_argument("--compile", action="store_true", help="of step: torch.compile the blocks")
    args, device = parser.parse_args(argv), ranks.start()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    path = f"{tempfile.gettempdir()}/slip-bench.jpg"
    Image.effect_noise((63, 47), 80).convert("RGB").resize((500, 375)).save(path, quality=90)
    source = images.Source("jpeg", images.Files([path] * 4096, CAPTIONS))
    settings = dict(image_size=224, seed=0, light_crop=0.5, strong_crop=0.08, language=True)
    views = data.Views(source, None, pair=data.PAIRS["simclr"], **settings)
    if args.part in (None, "step"):
        bench_step(args, device, views)
    if args.part in (None, "input"):
        bench_input(path, views)
    if args.part in (None, "host"):
        bench_host()


if __name__ == "__main__":
    main()
