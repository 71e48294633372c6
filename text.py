"""The text tower: a caption is cut into tokens and becomes one feature, that of its end-of-text token.

Paper: implementation details; the text side is CLIP's (Radford et al. 2021), byte pairs Sennrich et al. 2016.

    "A Cat&#39;s nap" -> clean "a cat's nap" -> split [a, cat, 's, nap] -> [start, 320, 2368, 568, 11012, end]
    captions -> tokens [B, L] -> embedded [B, L, D] -> blocks [B, L, D] -> features [B, D];  L <= 77, D = 512

The ids are CLIP's, but for two things. A typed <|endoftext|> is letters and marks here, no control token. And
where CLIP's ftfy guesses what a broken text was, we leave it: mojibake ("cafÃ©"), the names of HTML entities
in capitals ("&EACUTE;"). What counts as a letter is decided by this Python's Unicode tables.
Not here: the block (vit.py), the projection to the joint space (slip.py), the choice of a caption (data.py).
"""

import argparse
import gzip
import html
import importlib.util
import math
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from torch import nn

from vit import Block, count_parameters

# 1. Clean: the same text, plainly written.

LIGATURES = "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"
WIDE = map(chr, range(0xFF01, 0xFFF0))  # full and half width
PLAIN = {ord(c): unicodedata.normalize("NFKC", c) for c in [*LIGATURES, *WIDE]} | {ord("ﬅ"): "ſt"}
PLAIN |= {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
PLAIN |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
INVISIBLE = re.compile(  # a terminal's colour codes, and control characters that are not white space
    "\x1b\\[[\\d;]*[a-zA-Z]|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
)


def repair(text, entities):
    """Undo what typesetting and transport did, until nothing changes: one repair may uncover another."""
    before = None
    while text != before:
        before = text
        if entities:
            text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        text = text.translate(PLAIN)
        # Two surrogates are one character; half a pair has no UTF-8 and becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return text


def clean(text):
    """Without entities, curly quotes, control characters, capitals: "A  Cat&rsquo;s" -> "a cat's"."""
    if not text.isascii() or not text.isprintable() or "&" in text:  # most captions need no repair
        # CLIP takes a line with "<" for HTML: there and below, entities are left until the quotes are done.
        tag = text.find("<")
        line = len(text) if tag < 0 else text.rfind("\n", 0, tag) + 1
        text = repair(text[:line], entities=True) + repair(text[line:], entities=False)
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


# 2. Split: merges never cross from one piece into the next. CLIP's pattern is made of \p{L}, \p{N}: letters
# and numerals; `re` has only \w, both and the underscore. But a numeral is always a piece by itself, so
# with spaces around each, \w is left to the letters. Tried on every character of Unicode 14, the pieces are
# CLIP's, but for a U+0345 standing alone, which its pattern loses.

PIECE = re.compile(r"'(?:s|ſ|t|re|ve|m|ll|d)|[^\W_]+|(?:[^\w\s]|_)+")
ALONE = {ord(c): f" {c} " for c in map(chr, range(0x20000)) if c.isnumeric() and not c.isalpha()}  # 7 ½ ² Ⅷ


def split(text):
    """Caption -> words, single digits, runs of punctuation: "It's 10!!" -> ["it", "'s", "1", "0", "!!"]."""
    return PIECE.findall(clean(text).translate(ALONE))


# 3. Merge byte pairs. Ids: 256 bytes, the same 256 as the last of a word, one for each merge, start, end.

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = VISIBLE + [byte for byte in range(256) if byte not in VISIBLE]  # id -> byte, in CLIP's order
ID = {byte: i for i, byte in enumerate(BYTES)}  # byte -> id
FIRST = 512  # the id of the first merge


def spell(word):
    """A word as the ids of its bytes, the last one marked as the end of the word."""
    ids = [ID[byte] for byte in word.encode()]
    return ids[:-1] + [ids[-1] + 256]


def merge(ids, pair, new):
    """Replace the pair wherever it stands, from the left: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    merged, i = [], 0
    while i < len(ids):
        found = ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]
        merged.append(new if found else ids[i])
        i += 2 if found else 1
    return merged


class Tokenizer:
    """Captions <-> ids, by a list of merges: pairs of ids, the earlier the more frequent in training."""

    def __init__(self, merges):
        self.merges = {(a, b): FIRST + i for i, (a, b) in enumerate(merges)}
        single = [bytes([byte]) for byte in BYTES]
        self.pieces = single + [byte + b" " for byte in single]  # id -> bytes; a space ends a word
        for a, b in self.merges:
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.start = len(self.pieces)
        self.end = self.start + 1  # the largest id: the transformer finds it by argmax
        self.vocab_size = self.end + 1
        self.cache = {}

    @classmethod
    def train(cls, captions, vocab_size=49408):
        """Merge the most frequent pair, of equals the one of smaller ids, until the vocabulary is full.

        Stops early when no pair occurs twice. The order of the captions does not matter.
        """
        if isinstance(captions, str) or vocab_size < FIRST + 2:
            raise ValueError(
                f"found captions of type {type(captions).__name__} and vocab_size {vocab_size}: "
                f"expected a list of strings and at least {FIRST + 2} ids, for the bytes, start and end"
            )
        words = Counter(word for caption in captions for word in split(caption))
        spelled, times = [spell(word) for word in words], list(words.values())
        count, where = Counter(), defaultdict(list)  # pair -> its occurrences; pair -> words it is in, or was
        for i, ids in enumerate(spelled):
            for pair in pairwise(ids):
                count[pair] += times[i]
                where[pair].append(i)
        # Nothing is counted again: a merge changes only the words that hold its pair, and only pairs with the
        # new id gain. So each pair has one entry in the heap, never too low; one that is too high is put
        # right when it comes to the top.
        heap = [(-n, pair) for pair, n in count.items()]
        heapify(heap)
        merges = []
        while heap and len(merges) < vocab_size - FIRST - 2:
            n, best = heappop(heap)
            if -n > count[best]:
                heappush(heap, (-count[best], best))
                continue
            if -n < 2:
                break
            new, fresh = FIRST + len(merges), set()
            merges.append(best)
            for i in where.pop(best):
                old, spelled[i] = spelled[i], merge(spelled[i], best, new)
                if len(spelled[i]) == len(old):  # the word is listed twice, or another took the pair
                    continue
                for pair in pairwise(old):
                    count[pair] -= times[i]
                for pair in pairwise(spelled[i]):
                    count[pair] += times[i]
                    if new in pair:
                        fresh.add(pair)
                        where[pair].append(i)
            for pair in fresh:
                heappush(heap, (-count[pair], pair))
        return cls(merges)

    @classmethod
    def clip(cls, path=None):
        """CLIP's 49,408 ids, from bpe_simple_vocab_16e6.txt.gz; no path: open_clip's, if installed."""
        get = "`pip install --no-deps open_clip_torch` brings it"
        if path is None:
            package = importlib.util.find_spec("open_clip")  # found, not imported
            folder = package.submodule_search_locations[0] if package else "open_clip"
            path = os.path.join(folder, "bpe_simple_vocab_16e6.txt.gz")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"found no {path}: CLIP's file of merges is missing, {get}")
        # The file writes a byte as one character: a visible one as itself, the others as U+0100 and up.
        letters = [chr(byte) for byte in VISIBLE] + [chr(256 + i) for i in range(256 - len(VISIBLE))]
        ids = {name: i for i, name in enumerate(letters + [letter + "</w>" for letter in letters])}
        merges = []
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                if "bpe_simple_vocab_16e6" not in file.readline():
                    raise ValueError("the first line is another file's")
                while len(merges) < 48894:  # the file goes on, CLIP does not
                    a, b = file.readline().split()
                    ids[a + b] = FIRST + len(merges)
                    merges.append((ids[a], ids[b]))
        except (OSError, EOFError, zlib.error, ValueError, KeyError):
            raise ValueError(
                f"{path} is not CLIP's file of merges, or torn after {len(merges)} of 48894: "
                f"expected bpe_simple_vocab_16e6.txt.gz; {get}"
            ) from None
        return cls(merges)

    def state(self):
        """Plain data for a checkpoint, from which `from_state` makes the same tokenizer."""
        return {"merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        return cls(state["merges"])

    def encode_word(self, word):
        """A piece of `split` -> ids: of the merges that fit, the earliest, until none does."""
        if word not in self.cache:
            ids = spell(word)
            while len(ids) > 1:
                pair = min(pairwise(ids), key=lambda pair: self.merges.get(pair, math.inf))
                if pair not in self.merges:
                    break
                ids = merge(ids, pair, self.merges[pair])
            if len(self.cache) >= 2**17:  # there is no end of new words in millions of captions
                self.cache.clear()
            self.cache[word] = ids
        return self.cache[word]

    def encode(self, text, at_most=None):
        """Caption -> ids, without start and end; `at_most` spares the work beyond so many ids."""
        ids = []
        for word in split(text):
            if at_most is not None:
                if len(ids) >= at_most:
                    break
                word = word[: 32 * at_most]  # no token of CLIP's has more than 24 characters
            ids += self.encode_word(word)
        return ids[:at_most]

    def decode(self, ids):
        """Ids -> text, up to the end token if there is one."""
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return b"".join(self.pieces[i] for i in ids if i != self.start).decode("utf-8", "replace").strip()

    def __call__(self, texts, context=77):
        """Captions -> tokens [B, L]: start, ids, end, then zeros; L is the longest row's, at most `context`.

        A long caption loses its last words, never its end token. What follows the end token cannot change its
        feature, so columns of zeros alone are not made: most captions are far shorter than 77.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self.encode(text, context - 2), self.end] for text in texts]
        length = max(map(len, rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])  # [B, L]


# 4. The transformer.


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU; weights trained with one do not suit the other."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TextTransformer(nn.Module):
    """The tower. A token sees itself and those before it, so only the last has read the whole caption."""

    def __init__(self, vocab_size=49408, context=77, width=512, depth=12, heads=8):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        block = dict(causal=True, activation=QuickGELU, eps=1e-5)
        self.blocks = nn.ModuleList(Block(width, heads, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        branch = width**-0.5 * (2 * depth) ** -0.5  # 2 * depth branches are summed: each starts smaller
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=branch)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=branch)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.zeros_(block.attention.out.bias)

    def encode(self, tokens):
        """Tokens [B, L] -> [B, L, D], for any L up to the context; row i depends on tokens 0 to i only."""
        length, context = tokens.shape[1], len(self.positions)
        if length > context:
            raise ValueError(
                f"found {length} tokens in a row, expected at most {context}: tokenizer(texts, {context})"
            )
        x = self.token_embedding(tokens) + self.positions[:length]  # [B, L, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens):
        """Tokens [B, L] -> features [B, D], each the end token's, which has the largest id of its row."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.encode(tokens)[rows, tokens.argmax(dim=1)]  # [B, D]


TOY = ["a photo of a dog", "two dogs sleeping", "photos of the cat's nap", "two cats, sleeping"]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Follow a caption through the tokenizer and the text tower.")
    parser.add_argument(
        "caption", nargs="?", default="A photo of two sleeping cats.", help="default: %(default)s"
    )
    parser.add_argument("--vocab", metavar="FILE", help="CLIP's merges (default: learn some from 4 captions)")
    args = parser.parse_args(argv)
    try:
        tokenizer = Tokenizer.clip(args.vocab) if args.vocab else Tokenizer.train(TOY)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    tower = TextTransformer(tokenizer.vocab_size).eval()
    tokens = tokenizer(args.caption)
    pair = tokenizer([args.caption + " a", args.caption + " z"])
    with torch.no_grad():
        x, features = tower.encode(tokens), tower(tokens)
        change = (tower.encode(pair[:1]) - tower.encode(pair[1:])).abs().amax(dim=(0, 2))  # [L]
    merges, parameters = len(tokenizer.merges), count_parameters(tower)
    print(f"{tokenizer.vocab_size:,} ids, {merges:,} of them merges; {parameters:,} parameters")
    print(f"  clean     {clean(args.caption)!r}")
    print(f"  split     {split(args.caption)}")
    print(f"  pieces    {[tokenizer.decode([i]) for i in tokenizer.encode(args.caption)]}")
    print(f"  tokens    {tokens[0].tolist()}   from start to end")
    print(f"  shapes    {list(tokens.shape)} -> {list(x.shape)} -> {list(features.shape)}")
    print(f"  change    {[round(value, 2) for value in change.tolist()]}")
    print("            of each token, if the caption goes on with 'z' and not 'a': nothing before it changes")


if __name__ == "__main__":
    main()
