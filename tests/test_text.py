"""The tokenizer against a trainer that recounts, CLIP's own ids and Unicode's categories; the text tower
against torch's TransformerEncoder, and for what a causal tower must not see.

    pytest tests/test_text.py       (for CLIP's ids with open_clip_torch installed, or with
    SLIP_CLIP_VOCAB=bpe_simple_vocab_16e6.txt.gz pytest tests/test_text.py)
"""

import gzip
import importlib.util
import math
import os
import random
import time
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from text import ALONE, FIRST, PIECE, QuickGELU, TextTransformer, Tokenizer, clean, main, merge, spell, split
from vit import count_parameters

CAPTIONS = ["a photo of a dog", "two dogs sleeping, a cat sleeping", "photos of the cat's nap"]
VOCAB = os.environ.get("SLIP_CLIP_VOCAB") or None

AWKWARD = [
    "",
    " \t\n",
    "\x00",
    "nul\x00byte \x1b[31mred\x1b[0m",
    "\ud83d",
    "\ud83d\udc4d \udc4d\ud83d",
    "e\u0301 \u200b \ufeff \u202eabc",
    "👨‍👩‍👧‍👦 👍🏽 🇫🇷 東京タワー مرحبا नमस्ते",
    "½²Ⅷ①",
    "&amp;lt;b&amp;gt; &#0; &#xD800; &",
    "<|startoftext|><|endoftext|></w>",
    "İSTANBUL ſ'ſ ŉ",
    "\U0010ffff\x85\xa0\u3000x",
]

# Ids from open_clip_torch 3.3.0 with ftfy 6.3.1 and regex 2026.11.19, not from our code.
GOLDEN = [
    ("A photo of a cat.", "320 1125 539 320 2368 269"),
    ("Don't stop, they're John's; we'll go", "847 713 1691 267 889 982 1742 568 282 649 1342 861"),
    ("I'd say I'VE 'twas", "328 1896 1451 328 1200 713 739"),
    ("It’s the “Dog’s Dinner”", "585 568 518 257 1929 568 2571 257"),
    ("rock'n'roll '90s", "2172 262 333 262 3341 262 280 271 338"),
    ("DSC_0123.JPG 3.14 50%", "37240 318 271 272 273 274 269 36950 274 269 272 275 276 271 260"),
    ("Café naïve Über straße", "15304 1097 35689 563 6522 1516 1894 127 253 324"),
    ("İstanbul ΣΊΣΥΦΟΣ", "328 16384 11231 139 225 138 107 139 225 139 227 139 228 138 123 139 480"),
    ("e\u0301 n\u0303 a\u030a", "4166 127 365 127 354"),
    ("ﬁne oﬃce Ｆｕｌｌ　ｗｉｄｔｈ ﾃﾞｰﾀ", "3797 2171 1476 23571 2429 229 13457 3909 379"),
    ("½ ² Ⅷ ① m²", "33613 41175 158 227 371 158 239 510 332 41175"),
    ("👍🏽 🇫🇷🇺🇸 ❤️", "43722 39109 5688 1752"),
    ("👨‍👩‍👧 🏳️‍🌈", "25023 26304 964 356 32610"),
    ("東京タワー 中文", "48338 21078 105 34941 2429 107 30391 19759 255 29032 485"),
    ("한국어 ไทย", "15197 250 31871 255 31625 368 31718 245 33091"),
    ("مرحبا नमस्ते", "12986 10948 25722 16378 22625 3124 101 48254 28505 19389 27263 25130"),
    ("Tom &amp; Jerry &#39;s &amp;quot;hi&amp;quot; &rsquo;s", "2435 261 9164 568 257 1883 257 568"),
    ("<b>It&rsquo;s</b>\ntwo&hellip;", "283 321 285 585 728 503 338 34308 321 285 1237 959"),
    ("http://x.com/a_b?c=1#d", "15066 12441 343 269 2464 270 320 318 321 286 322 284 272 258 323"),
    ("!!! ... :-) ¯\\_(ツ)_/¯ a__b", "995 678 4223 45115 32173 45781 320 3838 321"),
    ("\u200b\ufeffx\xa0y\x00z\x1b[31mred\u2028end", "9844 343 37579 736 806"),
    ("\ud83d\udc4d \ud83d it\x92s", "4201 39802 585 568"),
    ("a\x0bb \t\r\n c", "3937 322"),
    ("'\u017f 'S \u02bcs \u0149", "6 129 379 568 568 262 333"),
    ("<|startoftext|>", "27 347 993 6659 4160 91 285"),
    ("", ""),
]


@pytest.fixture
def toy():
    return Tokenizer.train(CAPTIONS, 560)


def small_tower():
    torch.manual_seed(0)
    return TextTransformer(vocab_size=600, context=16, width=24, depth=3, heads=4).eval()


def naive_train(captions, vocab_size):
    """Counts all pairs of all words anew for each merge."""
    words = [spell(word) for caption in captions for word in split(caption)]
    merges = []
    while len(merges) < vocab_size - FIRST - 2:
        count = Counter(pair for word in words for pair in pairwise(word))
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        words = [merge(word, best, FIRST + len(merges)) for word in words]
        merges.append(best)
    return merges


# Training.


def test_merges_of_a_tiny_corpus_worked_by_hand():
    """Bytes: a = 97 - 33 = 64, b = 65, c = 66; as the last of a word b' = 65 + 256 = 321, c' = 322.

    "aaab ab", "ab aac":   aaab = a a a b'     ab = a b' (twice)     aac = a a c'
    pairs                  (a, a) 2 + 1 = 3    (a, b') 1 + 2 = 3     (a, c') 1
    A tie of 3; (64, 64) comes before (64, 321): merge a a = 512, in aaab from the left.
                           aaab = 512 a b'     ab = a b'             aac = 512 c'
    pairs                  (512, a) 1          (a, b') 1 + 2 = 3     (512, c') 1
    merge a b' = 513       aaab = 512 513      ab = 513              aac = 512 c'
    Now no pair occurs twice: the end, with 512 + 2 merges + start and end = 516 ids.
    """
    tokenizer = Tokenizer.train(["aaab ab", "ab aac"])
    assert list(tokenizer.merges) == [(64, 64), (64, 321)]
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (516, 514, 515)
    assert tokenizer.encode("aaab ab aac aaaa") == [512, 513, 513, 512, 322, 512, 64, 320]


@pytest.mark.parametrize("seed", range(8))
def test_incremental_training_equals_a_naive_recount(seed):
    generator = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdé"  # two letters give many ties and overlaps
    captions = [
        " ".join("".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(6))
        for _ in range(25)
    ]
    tokenizer = Tokenizer.train(captions, 620)
    assert list(tokenizer.merges) == naive_train(captions, 620)
    generator.shuffle(captions)
    assert Tokenizer.train(captions, 620).merges == tokenizer.merges


def test_training_words_are_encoded_as_training_left_them():
    captions = CAPTIONS * 2
    tokenizer = Tokenizer.train(captions)
    assert all(len(tokenizer.encode(word)) == 1 for caption in captions for word in split(caption))


def test_training_refuses_one_string_and_a_vocabulary_without_bytes():
    with pytest.raises(ValueError, match="type str"):
        Tokenizer.train("a photo of a dog")
    with pytest.raises(ValueError, match="at least 514"):
        Tokenizer.train(CAPTIONS, 100)


def test_state_is_plain_data_and_makes_the_same_tokenizer(toy, tmp_path):
    torch.save(toy.state(), tmp_path / "state.pt")
    again = Tokenizer.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.vocab_size == toy.vocab_size == 512 + len(toy.merges) + 2
    assert torch.equal(again(CAPTIONS), toy(CAPTIONS))


# Cleaning and splitting.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  A\t Cat\r\nNAP ", "a cat nap"),
        ("Tom &amp;amp;amp; Jerry&#39;s", "tom & jerry's"),
        ("It&rsquo;s “so” ‘nice’", "it's \"so\" 'nice'"),
        ("<i>it&rsquo;s</i>", "<i>it’s</i>"),  # CLIP's order: with a tag, quotes come before entities
        ("it&rsquo;s\n<i>it&rsquo;s</i>", "it's <i>it’s</i>"),
        ("e\u0301 ﬁne oﬃce Ｗｉｄｅ　ﾃﾞ", "é fine office wide デ"),
        ("a\x00b\x7fc\ufeffd\x1b[1;31me", "abcde"),
        ("it\x92s 5\x80", "it's 5€"),
        ("\ud83d\udc4d \ud83d", "👍 \ufffd"),
        ("½ m²", "½ m²"),
    ],
)
def test_cleaning_writes_the_same_text_plainly(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("don't they're I'LL", "don 't they 're i 'll"),
        ("rock'n'roll 'quoted'", "rock ' n ' roll ' quoted '"),
        ("it'ſ 'S9", "it 'ſ 's 9"),
        ("2,000 1990s", "2 , 0 0 0 1 9 9 0 s"),
        ("x½y² Ⅷ①", "x ½ y ² ⅷ ①"),
        ("snake_case :-) #tag!!", "snake _ case :-) # tag !!"),
        ("東京タワー123", "東京タワー 1 2 3"),
        ("<|endoftext|>", "<| endoftext |>"),
    ],
)
def test_captions_are_split_by_clips_rule(text, pieces):
    assert split(text) == pieces.split()


def test_every_character_is_split_by_its_unicode_category():
    """Twice between two letters: a letter joins them (1 piece), white space parts them (2), marks make a run
    between them (3), and of numerals each stands alone (4)."""
    for character in map(chr, range(0x20000)):
        category = unicodedata.category(character)[0]
        expected = 2 if character.isspace() else {"L": 1, "N": 4}.get(category, 3)
        assert len(PIECE.findall(f"a{character}{character}a".translate(ALONE))) == expected, ascii(character)


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_any_string_is_encoded_and_decoded_again(text, toy):
    assert "".join(toy.decode(toy.encode(text)).split()) == "".join(clean(text).split())


def test_random_strings_survive_the_round_trip(toy):
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(chr(generator.randrange(generator.choice([128, 0x3000, 0x110000]))) for _ in range(12))
        assert "".join(toy.decode(toy.encode(text)).split()) == "".join(clean(text).split())


# Rows of tokens.


def test_rows_begin_with_start_and_end_with_end(toy):
    tokens = toy(["a dog", "a photo of the dog", ""])
    ids = [toy.encode(text) for text in ("a dog", "a photo of the dog")]
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, len(ids[1]) + 2)  # as wide as the longest caption, not as the context
    assert tokens[1].tolist() == [toy.start, *ids[1], toy.end]
    assert tokens[0].tolist() == [toy.start, *ids[0], toy.end] + [0] * (len(ids[1]) - len(ids[0]))
    assert tokens[2, :2].tolist() == [toy.start, toy.end]
    assert toy.decode(tokens[0].tolist()) == "a dog"
    assert torch.equal(toy("a dog"), toy(["a dog"]))


def test_truncation_keeps_the_end_token(toy):
    text = "a photo of a dog, " * 20
    for context in (2, 3, 77):
        row = toy([text], context)[0].tolist()
        assert row == [toy.start, *toy.encode(text)[: context - 2], toy.end]


def test_a_typed_control_token_is_text(toy):
    ids = toy.encode("<|startoftext|> a dog <|endoftext|>")
    assert toy.start not in ids and toy.end not in ids
    assert toy.decode(ids) == "<| startoftext |> a dog <| endoftext |>"


def test_a_book_as_caption_is_cheap():
    generator = random.Random(0)
    letters = "".join(generator.choices("aeinorst", k=100_000))
    tokenizer = Tokenizer.train([letters[i : i + 8] for i in range(0, 8000, 8)], 1500)
    began = time.perf_counter()
    tokenizer(["sleeping dogs " * 10_000, letters])
    assert time.perf_counter() - began < 3  # 0.1 s; without the cut of long words 6 s


# CLIP's vocabulary.


def test_a_missing_vocabulary_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        Tokenizer.clip(tmp_path / "none.txt.gz")


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"#version: 0.2\n" + b"i n\n" * 50_000), None])
def test_another_file_than_clips_is_refused(content, tmp_path):
    torn = gzip.compress(b"bpe_simple_vocab_16e6.txt#version: 0.2\n" + b"i n\nt h\n" * 9)
    (tmp_path / "vocab.gz").write_bytes(content or torn)
    with pytest.raises(ValueError, match="is not CLIP's file of merges"):
        Tokenizer.clip(tmp_path / "vocab.gz")


@pytest.mark.skipif(
    not (VOCAB or importlib.util.find_spec("open_clip")),
    reason="CLIP's merges are missing: pip install --no-deps open_clip_torch, or set SLIP_CLIP_VOCAB",
)
def test_ids_are_clips():
    tokenizer = Tokenizer.clip(VOCAB)
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    assert max(len(piece.decode("utf-8", "replace").strip()) for piece in tokenizer.pieces) <= 24
    for text, ids in GOLDEN:
        assert tokenizer.encode(text) == [int(i) for i in ids.split()], text


# The transformer.


def test_parameter_count_is_the_papers():
    with torch.device("meta"):
        tower = TextTransformer()
    assert count_parameters(tower) == 63_165_952
    assert count_parameters(tower.blocks) == 37_828_608


def test_initial_deviations_are_the_papers():
    tower = TextTransformer(vocab_size=600, width=256, depth=2, heads=4)
    block = tower.blocks[1]
    for weight, deviation in [
        (tower.token_embedding.weight, 0.02),
        (tower.positions, 0.01),
        (block.attention.qkv.weight, 256**-0.5),
        (block.attention.out.weight, 256**-0.5 * 4**-0.5),
        (block.mlp[0].weight, 512**-0.5),
        (block.mlp[2].weight, 256**-0.5 * 4**-0.5),
    ]:
        # 19,712 numbers or more give the deviation to half a percent.
        assert weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert not block.attention.qkv.bias.any() and not block.attention.out.bias.any()


def test_quick_gelu_is_x_times_a_sigmoid():
    assert QuickGELU()(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + math.exp(-1.702 * 2)), rel=1e-6)


def test_tower_equals_torchs_transformer_encoder():
    tower = small_tower().double()
    layer = nn.TransformerEncoderLayer(24, 4, 96, 0.0, QuickGELU(), 1e-5, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(24, eps=1e-5), enable_nested_tensor=False)
    theirs.double().eval()
    names = {"attention.qkv.": "self_attn.in_proj_", "attention.out": "self_attn.out_proj"}
    names |= {"mlp.0": "linear1", "mlp.2": "linear2", "blocks.": "layers."}
    weights = {}
    for name, weight in tower.state_dict().items():
        for our_part, their_part in names.items():
            name = name.replace(our_part, their_part)
        weights[name] = weight
    embedding, positions = weights.pop("token_embedding.weight"), weights.pop("positions")
    theirs.load_state_dict(weights)
    tokens = torch.randint(1, 590, (3, 11))
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    expected = theirs(embedding[tokens] + positions[:11], mask=mask, is_causal=True)
    torch.testing.assert_close(tower.encode(tokens), expected, rtol=1e-10, atol=1e-10)  # float64, depth 3


def test_feature_is_read_at_the_end_token():
    tower = small_tower()
    tokens = torch.tensor([[598, 5, 6, 599, 0, 0], [598, 5, 6, 7, 8, 599]])
    x = tower.encode(tokens)
    assert torch.equal(tower(tokens), torch.stack([x[0, 3], x[1, 5]]))


def test_future_tokens_do_not_change_the_past():
    tower = small_tower()
    tokens = torch.randint(1, 590, (2, 16))
    changed = tokens.clone()
    changed[:, 9] += 1
    change = (tower.encode(tokens) - tower.encode(changed)).abs().amax(dim=(0, 2))  # [L]
    assert (change[:9] == 0).all() and (change[9:] > 0).all()


def test_padding_does_not_change_the_feature():
    tower = small_tower().double()
    tokens = torch.tensor([[598, 5, 6, 7, 599]])
    padded = torch.cat([tokens, torch.zeros(1, 11, dtype=torch.int64)], dim=1)  # to the whole context
    torch.testing.assert_close(tower(tokens), tower(padded), rtol=1e-12, atol=1e-12)  # sums in another order
    junk = torch.cat([tokens, torch.full((1, 11), 3)], dim=1)
    assert torch.equal(tower(junk), tower(padded))


def test_two_long_captions_get_two_features(toy):
    tower = TextTransformer(toy.vocab_size, context=16, width=24, depth=2, heads=4)
    features = tower(toy(["a dog sleeping " * 20, "the cat's nap " * 20], 16))
    assert (features[0] - features[1]).abs().max() > 0.1


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="found 17 tokens in a row, expected at most 16"):
        small_tower()(torch.ones(1, 17, dtype=torch.int64))


def test_command_shows_a_caption_on_its_way(capsys):
    main(["Two cats&#39; nap"])
    shown = capsys.readouterr().out
    assert '"two cats\' nap"' in shown and "-> [1, 512]" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["--vocab", "no such file"])
    assert stopped.value.code == 2
