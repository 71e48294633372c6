"""The text tower: a caption is cut into tokens and becomes one feature, that of its end-of-text token.

Paper: implementation details; the text side is CLIP's, unchanged (Radford et al. 2021). Byte pairs: Sennrich et al. 2016.

    "A Cat&#39;s nap"  ->  "a cat's nap"  ->  ["a", "cat", "'s", "nap"]  ->  ids [start, 320, 2368, 568, 12285, end]
    captions -> tokens [B, L] -> embedded [B, L, D] -> blocks [B, L, D] -> features [B, D]    L <= 77, D = 512

The ids are CLIP's, with two exceptions. A typed <|endoftext|> is seven marks and letters here, never a control token. And
where CLIP has the ftfy package guess how a broken text should have read, we leave it: mojibake ("cafÃ©" stays), names of
HTML entities in capitals ("&EACUTE;" stays). Letters and digits are those of this Python's Unicode tables, which may be
older than the regex package's.
Not here: the block (vit.py), the projection to the joint space (slip.py), which caption is taken (data.py).
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

import torch
from torch import nn

from vit import Block, count_parameters

# 1. Cleaning: the same text, plainly written.

PLAIN = {  # one character -> what it stands for
    **{
        code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)
    },  # as browsers do
    **{
        code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)
    },  # full and half width
    **{ord(pair): unicodedata.normalize("NFKC", pair) for pair in "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"},
    **{ord("ﬅ"): "ſt"},
    **dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"),  # curly quotes
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}
ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
INVISIBLE = re.compile(  # a terminal's colour codes; control characters which are not white space
    "\x1b\\[[\\d;]*[a-zA-Z]|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
)


def repair(text, entities):
    """Undo what typesetting and transport did to a text; again until nothing changes, as one repair may call for another."""
    before = None
    while text != before:
        before = text
        if entities:
            text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
        text = text.translate(PLAIN)
        # Two surrogates make one character; half a pair cannot be encoded, and becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return text


def clean(text):
    """Any string -> no HTML entities, straight quotes, single spaces, lower case: "A  Cat&rsquo;s nap" -> "a cat's nap"."""
    if not (
        text.isascii() and text.isprintable() and "&" not in text
    ):  # most captions have nothing to repair
        # In text with a tag, entities are left until the curly quotes are done: CLIP's order, from that line on.
        tag = text.find("<")
        line = len(text) if tag < 0 else text.rfind("\n", 0, tag) + 1
        text = repair(text[:line], entities=True) + repair(text[line:], entities=False)
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


# 2. Splitting: merges never cross from one of these pieces into the next. `\p{L}` and `\p{N}` are not in the standard library,
# but `\w` is exactly these two and the underscore, and `\d` a part of `\p{N}`. The rest of `\p{N}` (½ ² Ⅷ) is put between spaces.

PIECE = re.compile(r"'(?:s|ſ|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")
ALONE = {
    ord(c): f" {c} " for c in map(chr, range(0x20000)) if c.isnumeric() and not (c.isalpha() or c.isdecimal())
}


def split(text):
    """Caption -> words, digits one by one, runs of punctuation: "It's 10 a.m." -> ["it", "'s", "1", "0", "a", ".", "m", "."]."""
    return PIECE.findall(clean(text).translate(ALONE))


# 3. Byte pairs. Ids 0-255 are the bytes, 256-511 the bytes as the last of a word, then one id for each merge, start, end.

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # CLIP's order: these bytes first
BYTES = VISIBLE + [byte for byte in range(256) if byte not in VISIBLE]  # id -> byte
ID = {byte: i for i, byte in enumerate(BYTES)}  # byte -> id
FIRST = 512  # the id of the first merge
LONGEST = 32  # characters: no token of CLIP's has more than 24


def spell(word):
    """A word as ids of its bytes, the last with the end-of-word mark."""
    ids = [ID[byte] for byte in word.encode("utf-8")]
    ids[-1] += 256
    return ids


def merge(ids, pair, new):
    """Replace each occurrence of the pair, from the left: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


class Tokenizer:
    """Captions -> ids by a list of merges, the most frequent pairs of the training captions, in order."""

    def __init__(self, merges):
        self.merges = {
            (a, b): FIRST + i for i, (a, b) in enumerate(merges)
        }  # an earlier merge has a smaller id
        self.pieces = [bytes([byte]) for byte in BYTES] + [bytes([byte]) + b" " for byte in BYTES]
        for a, b in merges:
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.start = FIRST + len(self.merges)
        self.end = self.start + 1  # the largest id: the transformer finds it by argmax
        self.vocab_size = self.end + 1
        self.cache = {}

    @classmethod
    def train(cls, captions, vocab_size=49408):
        """Merge the most frequent pair, of equals the one with the smaller ids, until the vocabulary is full.

        Stops early when no pair occurs twice. The order of the captions does not matter.
        """
        if isinstance(captions, str) or vocab_size < FIRST + 2:
            raise ValueError(
                f"found {type(captions).__name__} of captions and vocab_size={vocab_size}: expected a list of strings "
                f"and at least {FIRST + 2} ids (bytes, bytes at the end of a word, start, end)"
            )
        words = Counter(word for caption in captions for word in split(caption))
        spelled, times = [spell(word) for word in words], list(words.values())
        count, where = Counter(), defaultdict(list)  # pair -> how often; pair -> the words it is or was in
        for i, ids in enumerate(spelled):
            for pair in zip(ids, ids[1:]):
                count[pair] += times[i]
                where[pair].append(i)
        # Counting again after each merge would take days. Only the words with the pair change, and a pair's count never grows
        # once its younger symbol has been made, so each pair has one entry in the heap; if it is too high, it is set right when
        # it comes to the top.
        heap = [(-n, pair) for pair, n in count.items()]
        heapify(heap)
        merges = []
        while heap and len(merges) < vocab_size - FIRST - 2:
            n, best = heappop(heap)
            if -n != count[best]:
                heappush(heap, (-count[best], best))
                continue
            if -n < 2:
                break
            new, fresh = FIRST + len(merges), set()
            merges.append(best)
            for i in where.pop(best):
                old, spelled[i] = spelled[i], merge(spelled[i], best, new)
                if len(spelled[i]) == len(old):  # listed twice, or the pair is gone
                    continue
                for pair in zip(old, old[1:]):
                    count[pair] -= times[i]
                for pair in zip(spelled[i], spelled[i][1:]):
                    count[pair] += times[i]
                    if new in pair:
                        fresh.add(pair)
                        where[pair].append(i)
            for pair in fresh:
                heappush(heap, (-count[pair], pair))
        return cls(merges)

    @classmethod
    def clip(cls, path=None):
        """CLIP's 49,408 ids, from its merges file `bpe_simple_vocab_16e6.txt.gz`; no path: the one in open_clip."""
        if path is None:
            package = importlib.util.find_spec("open_clip")  # found, not imported
            folder = package.submodule_search_locations[0] if package else "open_clip"
            path = os.path.join(folder, "bpe_simple_vocab_16e6.txt.gz")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"no file {path}: CLIP's merges come with `pip install --no-deps open_clip_torch`, or give the path of "
                "a bpe_simple_vocab_16e6.txt.gz"
            )
        # The file writes a byte as a character: a visible one as itself, the others as U+0100 and on.
        letters = [chr(byte) for byte in VISIBLE] + [chr(256 + i) for i in range(256 - len(VISIBLE))]
        names = {name: i for i, name in enumerate(letters + [letter + "</w>" for letter in letters])}
        merges = []
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                if "bpe_simple_vocab_16e6" not in file.readline():
                    raise ValueError("its first line is another's")
                while len(merges) < 48894:  # the file goes on, CLIP does not
                    a, b = file.readline().split()
                    merges.append((names[a], names[b]))
                    names[a + b] = FIRST + len(merges) - 1
        except (OSError, EOFError, zlib.error, ValueError, KeyError):
            raise ValueError(
                f"{path} is not CLIP's merges file, read {len(merges)} merges of 48894: expected the gzip file "
                "bpe_simple_vocab_16e6.txt.gz, which `pip install --no-deps open_clip_torch` brings"
            ) from None
        return cls(merges)

    def state(self):
        """Plain data for a checkpoint; `from_state` makes the tokenizer again."""
        return {"merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        return cls(state["merges"])

    def encode_word(self, word):
        """One piece of `split` -> ids: of the pairs in it the earliest merge is done first, until none is left."""
        if word not in self.cache:
            ids = spell(word)
            while len(ids) > 1:
                pair = min(zip(ids, ids[1:]), key=lambda pair: self.merges.get(pair, math.inf))
                if pair not in self.merges:
                    break
                ids = merge(ids, pair, self.merges[pair])
            if len(self.cache) >= 2**17:  # millions of captions hold millions of words
                self.cache.clear()
            self.cache[word] = ids
        return self.cache[word]

    def encode(self, text, at_most=None):
        """Caption -> ids, without start and end; `at_most` saves the work beyond the first so many."""
        ids = []
        for word in split(text):
            if at_most is not None:
                if len(ids) >= at_most:
                    return ids[:at_most]
                word = word[: at_most * LONGEST]
            ids += self.encode_word(word)
        return ids[:at_most]

    def decode(self, ids):
        """Ids -> text, up to the end token if there is one."""
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return b"".join(self.pieces[i] for i in ids if i != self.start).decode("utf-8", "replace").rstrip(" ")

    def __call__(self, texts, context=77):
        """Captions -> tokens [B, L]: start, ids, end, then zeros; L is the longest row's length, at most `context`.

        A caption that is too long loses its last words, never its end token. The columns cut away would not change a feature.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[self.start, *self.encode(text, context - 2), self.end] for text in texts]
        length = max(map(len, rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])  # [B, L]


# 4. The transformer.


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU; weights trained with one do not fit the other."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TextTransformer(nn.Module):
    """The tower: each token sees itself and those before it, so the end token alone has read the whole caption."""

    def __init__(self, vocab_size=49408, context=77, width=512, depth=12, heads=8):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, causal=True, activation=QuickGELU, eps=1e-5) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:  # 2 * depth branches are added up, so each starts smaller
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.zeros_(block.attention.out.bias)

    def encode(self, tokens):
        """Tokens [B, L] -> [B, L, D]; position i depends on tokens 0..i only, L may be anything up to `context`."""
        length, context = tokens.shape[1], len(self.positions)
        if length > context:
            raise ValueError(
                f"found rows of {length} tokens, expected at most {context}: tokenizer(texts, context={context})"
            )
        x = self.token_embedding(tokens) + self.positions[:length]  # [B, L, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens):
        """Tokens [B, L] -> features [B, D], those of the end token, whose id is the largest in its row."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.encode(tokens)[rows, tokens.argmax(dim=1)]


SENTENCES = """a photo of a dog. a photo of two dogs running on the beach. a dog sleeping, a cat sleeping.
the cats are running, the dogs aren't. a cat's nap on the sofa. two photos of the sleeping cat."""


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Follow one caption through the tokenizer and the text tower."
    )
    parser.add_argument(
        "caption", nargs="?", default="A photo of two sleeping cats.", help="default: %(default)r"
    )
    parser.add_argument(
        "--vocab",
        metavar="FILE",
        help="CLIP's bpe_simple_vocab_16e6.txt.gz (default: merges learnt from six sentences)",
    )
    args = parser.parse_args(argv)
    try:
        tokenizer = Tokenizer.clip(args.vocab) if args.vocab else Tokenizer.train(SENTENCES.splitlines())
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    tower = TextTransformer(tokenizer.vocab_size).eval()
    tokens = tokenizer([args.caption])
    pieces = [tokenizer.pieces[i].decode("utf-8", "replace") for i in tokenizer.encode(args.caption)]
    print(
        f"{tokenizer.vocab_size:,} ids, {len(tokenizer.merges):,} of them merges; tower of {count_parameters(tower):,} parameters"
    )
    print(f"  clean       {clean(args.caption)!r}")
    print(f"  split       {split(args.caption)}")
    print(f"  pieces      {pieces}   a space marks the end of a word")
    print(f"  ids         {tokens[0].tolist()}   start, pieces, end")
    ends = tokenizer([f"{args.caption} {word}" for word in ("a dog", "the sofa")])
    same = int((ends[0] == ends[1]).cumprod(0).sum())
    with torch.no_grad():
        print(
            f"  tokens      {list(tokens.shape)} -> {list(tower.encode(tokens).shape)} -> {list(tower(tokens).shape)}   the end token alone"
        )
        first, second = tower.encode(ends)
    change = (first - second).abs().amax(dim=1)
    print(
        f"  two captions which differ after {same} tokens: up to there the tower differs by at most {change[:same].max():.0e},"
    )
    print(
        f"  from there by at least {change[same:].min() if same < len(change) else 0:.2f}: the future does not change the past"
    )


if __name__ == "__main__":
    main()
