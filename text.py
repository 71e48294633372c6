"""The text tower: a caption is split into tokens and becomes one feature, that of its end-of-text token.

Paper: implementation details; the text side is CLIP's (Radford et al. 2021), byte pairs Sennrich et al. 2016.

    "A Cat&#39;s nap" -> clean "a cat's nap" -> split [a, cat, 's, nap] -> [start, 320, 2368, 568, 11012, end]
    captions -> tokens [B, L] -> embedded [B, L, D] -> blocks [B, L, D] -> features [B, D];  L <= 77, D = 512
"""

import functools
import gzip
import html
import importlib.util
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from vit import Block

CURLY = dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')  # quotes


def clean(text):
    """Without HTML's entities, curly quotes, capitals, spare spaces: "A  Cat&rsquo;s" -> "a cat's".
    The ids are CLIP's on usual text. CLIP repairs text with ftfy; we repair entities and curly quotes."""
    text = text if "<" in text else html.unescape(text)  # with tags entities stay, as in ftfy
    text = unicodedata.normalize("NFC", text.translate(CURLY))
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


# Merges stay within a piece. CLIP splits off every numeral; \w has numerals too, so they get spaces.
PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W_]+|(?:[^\w\s]|_)+")
ALONE = {ord(c): f" {c} " for c in map(chr, range(0x20000)) if c.isnumeric() and not c.isalpha()}  # 7 ½ ² Ⅷ


def split(text):
    """Caption -> words, single digits, runs of punctuation: "It's 10!!" -> ["it", "'s", "1", "0", "!!"]."""
    return PIECE.findall(clean(text).translate(ALONE))


# Ids: 256 bytes, the same 256 as the last of a word, one for each merge, start, end.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = VISIBLE + [byte for byte in range(256) if byte not in VISIBLE]  # id -> byte, in CLIP's order
ID = {byte: i for i, byte in enumerate(BYTES)}  # byte -> id
FIRST = 512  # the id of the first merge


def byte_ids(word):
    """A word as the ids of its bytes, the last one marked as the end of the word."""
    ids = [ID[byte] for byte in word.encode(errors="replace")]  # half a surrogate pair has no UTF-8
    return ids[:-1] + [ids[-1] + 256]


def merge(ids, pair, new):
    """Replace the pair wherever it stands, from the left: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


class Tokenizer:
    """Captions <-> ids, by a list of merges: pairs of ids, the earlier the more frequent in training."""

    def __init__(self, merges):
        self.merges = {(a, b): FIRST + i for i, (a, b) in enumerate(merges)}
        self.pieces = [bytes([b]) for b in BYTES] + [bytes([b, 32]) for b in BYTES]  # a space ends a word
        for a, b in self.merges:
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.start, self.end = len(self.pieces), len(self.pieces) + 1
        self.vocab_size = self.end + 1  # the end is the largest id: the transformer finds it by argmax

    @classmethod
    def train(cls, captions, vocab_size=49408):
        """Merge the most frequent pair (ties: smaller ids) until the ids are full or no pair repeats."""
        frequency = Counter(word for caption in captions for word in split(caption))
        words, times = [byte_ids(word) for word in frequency], list(frequency.values())
        count, where = Counter(), defaultdict(set)  # pair -> how often; pair -> words that hold it, or did
        for i, ids in enumerate(words):
            for pair in pairwise(ids):
                count[pair] += times[i]
                where[pair].add(i)
        heap, merges = sorted((-n, pair) for pair, n in count.items()), []
        while heap and len(merges) < vocab_size - FIRST - 2:
            n, best = heappop(heap)
            if -n != count[best] or -n < 2:  # stale (the heap has the new count too), or rare
                continue
            new, changed = FIRST + len(merges), set()
            merges.append(best)
            for i in where.pop(best):
                old, words[i] = words[i], merge(words[i], best, new)
                for ids, sign in ((old, -1), (words[i], 1)):
                    for pair in pairwise(ids):
                        count[pair] += sign * times[i]
                        where[pair].add(i)
                        changed.add(pair)
            for pair in changed:
                heappush(heap, (-count[pair], pair))
        return cls(merges)

    @classmethod
    def clip(cls, path=None):
        """CLIP's 49,408 ids, by default from open_clip's file. Raises FileNotFoundError, ValueError."""
        package = importlib.util.find_spec("open_clip")  # found, not imported
        installed = package.origin if package else "open_clip"
        path = Path(path or Path(installed).with_name("bpe_simple_vocab_16e6.txt.gz"))
        if not path.is_file():
            raise FileNotFoundError(f"found no {path}: `pip install --no-deps open_clip_torch` brings it")
        # The file writes a byte as one character: a visible one as itself, the others as U+0100 and up.
        letters = [chr(byte) for byte in VISIBLE] + [chr(256 + i) for i in range(256 - len(VISIBLE))]
        ids = {name: i for i, name in enumerate(letters + [letter + "</w>" for letter in letters])}
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                pairs = [line.split() for line in file][1:48895]  # CLIP takes no more
            ids |= {a + b: FIRST + i for i, (a, b) in enumerate(pairs)}
            return cls([(ids[a], ids[b]) for a, b in pairs])
        except (EOFError, KeyError, ValueError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not bpe_simple_vocab_16e6.txt.gz: {error!r:.60}") from None

    def state(self):  # plain data for a checkpoint
        return {"merges": [list(pair) for pair in self.merges]}

    @functools.lru_cache(2**17)  # noqa: B019 (tokenizers live as long as the program)
    def encode_word(self, word):
        """A piece of `split` -> ids: of the merges that apply, the earliest, until none does."""
        ids = byte_ids(word[:2500])  # the time is quadratic; a context of 77 has room for no more
        while known := [pair for pair in pairwise(ids) if pair in self.merges]:
            pair = min(known, key=self.merges.get)
            ids = merge(ids, pair, self.merges[pair])
        return ids

    def encode(self, text):  # caption -> ids, without start and end
        return [i for word in split(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """Ids -> text, up to the end token if there is one."""
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return b"".join(self.pieces[i] for i in ids if i != self.start).decode("utf-8", "replace").strip()

    def __call__(self, texts, context=77):
        """Captions (a list, or one) -> tokens, int64 [B, L]: start, ids, end, then zeros. L is the longest
        row's: padding after the end cannot change the feature. A truncated caption keeps its end."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self.encode(text)[: context - 2], self.end] for text in texts]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


class QuickGELU(nn.Module):  # CLIP's approximation of GELU; weights trained with one do not suit the other
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TextTransformer(nn.Module):
    """The tower. A token sees itself and those before it, so only the end token sees the whole caption."""

    def __init__(self, vocab_size=49408, context=77, width=512, depth=12, heads=8):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        block = dict(causal=True, activation=QuickGELU, eps=1e-5)
        self.blocks = nn.Sequential(*(Block(width, heads, **block) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        residual = width**-0.5 * (2 * depth) ** -0.5  # a sum of 2 * depth outputs: each starts smaller
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=residual)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=residual)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.zeros_(block.attention.out.bias)

    def encode(self, tokens, index=...):
        """Tokens [B, L] -> [B, L, D], for any L up to the context; row i depends on tokens 0 to i only. Or
        the one token at `index`, [B, D]."""
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]  # [B, L, D]
        return self.norm(self.blocks[-1](self.blocks[:-1](x), index))

    def forward(self, tokens):
        """Tokens [B, L] -> features [B, D], each the end token's, which has the largest id of its row."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.encode(tokens, (rows, tokens.argmax(dim=1)))
