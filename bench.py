"""What it costs, beside a plain reference timed in the same run: a ratio means something on any machine.

    python bench.py [step --model vit_b16 --batch 512]      # without a part: both

step: SLIP against one view. host: what a step of 4,096 rows costs the processes that load.
"""

import argparse
import tempfile
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils.benchmark import Timer

import augment
import data
import device as devices
import images
import ranks
import slip
import train
import vit
from text import Tokenizer

PATH = f"{tempfile.gettempdir()}/slip-bench.jpg"
CAPTIONS = ["a photo of a small red dog under the green tree by my old house"] * 4096


def seconds(work):
    """Median time of `work()`, after a call to warm up; the timer waits for the device."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=8).median


def bench_step(args, device, views):
    rows = data.collate([views[(0, i), (0, i)] for i in range(args.batch)], Tokenizer.train(CAPTIONS))
    batch = {n: v if n.endswith("_params") else v.to(device) for n, v in rows.items() if n != "skipped"}
    model = slip.build(slip.configure("slip", args.model, image_size=224)).to(device)
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

    reference, ours = seconds(one_view), seconds(step)
    print(f"step: {args.batch} rows {words}: {ours:.2f} s, {ours / reference:.2f} times one view")


def bench_host(args, device, views):
    batches, tokenizer = data.Batches(10**7, None, 4096, 0, range(8)), Tokenizer.train(CAPTIONS)
    order, tokens = seconds(lambda: list(batches)) / 8, seconds(lambda: tokenizer(CAPTIONS))
    print(f"host: 4,096 rows: order {1000 * order:.1f} ms, in the workers tokens {1000 * tokens:.1f} ms")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time the parts against plain references, in one run.")
    parts = {"step": bench_step, "host": bench_host}
    parser.add_argument("part", nargs="?", choices=parts, help="this one only")
    parser.add_argument("--model", choices=vit.SIZES, default="vit_s16", help="of step")
    parser.add_argument("--batch", type=int, default=16, help="of step, 4,096 at most")
    args, device = parser.parse_args(argv), ranks.start()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    Image.effect_noise((63, 47), 80).convert("RGB").resize((500, 375)).save(PATH, quality=90)
    source = images.Source("jpeg", images.Files([PATH] * 4096, CAPTIONS))
    settings = dict(image_size=224, seed=0, light_crop=0.5, strong_crop=0.08, language=True)
    views = data.Views(source, None, pair=data.PAIRS["simclr"], **settings)
    for part in [args.part] if args.part else parts:
        parts[part](args, device, views)


if __name__ == "__main__":
    main()
