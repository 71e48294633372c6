"""The tokenizer against a trainer that recounts, CLIP's own ids and Unicode's categories; the text tower
against torch's TransformerEncoder, and for what a causal tower must not see.
"""

import gzip
import importlib.util
import pickle
import random
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

import text
from text import FIRST, QuickGELU, TextTransformer, Tokenizer, clean, split
from vit import count_parameters

CAPTIONS = ["a photo of a dog", "two dogs sleeping, a cat sleeping", "photos of the cat's nap"]

# Ids from open_clip_torch 3.3.0 with ftfy 6.3.1 and regex 2026.11.19, not from our code.
GOLDEN = [
    ("Don't stop, they're John's; we'll go", "847 713 1691 267 889 982 1742 568 282 649 1342 861"),
    ("It’s the “Dog’s Dinner”", "585 568 518 257 1929 568 2571 257"),
    ("東京タワー 中文", "48338 21078 105 34941 2429 107 30391 19759 255 29032 485"),
    ("Tom &amp; Jerry &#39;s &amp;quot;hi&amp;quot; &rsquo;s", "2435 261 9164 568 257 1883 257 568"),
    ("<b>It&rsquo;s</b>\ntwo&hellip;", "283 321 285 585 728 503 338 34308 321 285 1237 959"),
    ("", ""),
]


@pytest.fixture
def toy():
    return Tokenizer.train(CAPTIONS)


def small_tower():
    torch.manual_seed(0)
    return TextTransformer(vocab_size=600, context=16, width=24, depth=3, heads=4).double().eval()


def naive_train(captions, vocab_size):
    """Counts all pairs of all words anew for each merge."""
    words, merges = [text.byte_ids(word) for caption in captions for word in split(caption)], []
    while len(merges) < vocab_size - FIRST - 2:
        count = Counter(pair for word in words for pair in pairwise(word))
        best = min(count, key=lambda pair: (-count[pair], pair))
        if count[best] < 2:
            break
        words = [text.merge(word, best, FIRST + len(merges)) for word in words]
        merges.append(best)
    return merges


def test_merges_of_a_tiny_corpus_worked_by_hand():
    """Bytes: a = 64, b = 65; at the end of a word b' = 321, c' = 322. Words: a a a b', twice a b', a a c'.

    (a, a) and (a, b') are both there three times; (64, 64) is the smaller, so a a = 512: 512 a b', 512 c'.
    Then a b' = 513 stands three times, and after it no pair occurs twice: 512 + 2 merges + start and end.
    """
    tokenizer = Tokenizer.train(["aaab ab", "ab aac"])
    assert list(tokenizer.merges) == [(64, 64), (64, 321)]
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (516, 514, 515)
    assert tokenizer.encode("aaab ab aac aaaa") == [512, 513, 513, 512, 322, 512, 64, 320]


@pytest.mark.parametrize("letters", ["ab", "abcdé"])  # two letters give many ties and overlaps
def test_incremental_training_equals_a_naive_recount(letters):
    for seed in range(4):
        generator = random.Random(seed)
        words = ["".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(150)]
        captions = [" ".join(words[i : i + 6]) for i in range(0, 150, 6)]
        assert list(Tokenizer.train(captions, 620).merges) == naive_train(captions, 620)


def test_a_pickled_and_a_saved_tokenizer_are_the_same(toy, tmp_path):
    torch.save(toy.state(), tmp_path / "state.pt")
    saved = Tokenizer(torch.load(tmp_path / "state.pt", weights_only=True)["merges"])
    for again in (saved, pickle.loads(pickle.dumps(toy))):
        assert torch.equal(again(CAPTIONS), toy(CAPTIONS)) and again.vocab_size == 514 + len(toy.merges)


def test_every_character_is_split_by_its_unicode_category():
    """Twice between two letters: a letter gives 1 piece, white space 2, marks a run and 3, numerals 4."""
    for character in map(chr, range(0x20000)):
        expected = {"L": 1, "N": 4}.get(unicodedata.category(character)[0], 2 if character.isspace() else 3)
        pieces = text.PIECE.findall(f"a{character}{character}a".translate(text.ALONE))
        assert len(pieces) == expected, ascii(character)


def test_captions_are_cleaned_and_split_by_clips_rule():
    assert clean("  It&rsquo;s\t“SO” &amp;amp;amp; ‘e\u0301’") == "it's \"so\" & 'é'"
    assert clean("<i>it&rsquo;s</i>") == "<i>it’s</i>"  # CLIP's order: beside a tag, quotes come first
    assert split("don't I'LL 2,01 snake_case :-)") == "don 't i 'll 2 , 0 1 snake _ case :-)".split()


def test_rows_open_with_start_and_close_with_end(toy):
    tokens = toy(["a dog", "a photo of the dog"])
    ids = [toy.encode("a dog"), toy.encode("a photo of the dog")]
    assert tokens.dtype == torch.int64 and tokens.shape == (2, len(ids[1]) + 2)  # as wide as the longest row
    assert tokens[0].tolist() == [toy.start, *ids[0], toy.end] + [0] * (len(ids[1]) - len(ids[0]))
    assert toy.decode(tokens[0].tolist()) == "a dog" and torch.equal(toy("a dog"), toy(["a dog"]))
    typed = toy.encode("<|startoftext|> a dog <|endoftext|>")
    assert toy.start not in typed and toy.end not in typed and toy.encode("\ud83d") == toy.encode("?")
    odd = "e\u0301 \u200b👨‍👩‍👧 東京 नमस्ते ½\x85\U0010ffff"
    assert "".join(toy.decode(toy.encode(odd)).split()) == "".join(clean(odd).split())


def test_truncation_keeps_the_end_token(toy):
    for caption in ("a photo of a dog, " * 20, "sleeping" * 20_000):
        for context in (2, 77):
            expected = [toy.start, *toy.encode(caption)[: context - 2], toy.end]
            assert toy([caption], context)[0].tolist() == expected


def test_a_missing_vocabulary_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        Tokenizer.clip(tmp_path / "none.txt.gz")
    damaged = bytearray(gzip.compress(bytes(range(256)) * 20))
    damaged[10:18] = b"\xff" * 8  # zlib.error
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    with pytest.raises(ValueError, match="is not bpe_simple_vocab"):
        Tokenizer.clip(tmp_path / "damaged.txt.gz")


@pytest.mark.skipif(not importlib.util.find_spec("open_clip"), reason="pip install --no-deps open_clip_torch")
def test_ids_are_clips():
    tokenizer = Tokenizer.clip()
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    for caption, ids in GOLDEN:
        assert tokenizer.encode(caption) == [int(i) for i in ids.split()], caption


def test_parameter_count_and_initial_deviations_are_the_papers():
    with torch.device("meta"):
        assert count_parameters(TextTransformer()) == 63_165_952
    tower = TextTransformer(vocab_size=600, width=256, depth=2, heads=4)
    block, narrow = tower.blocks[1], 256**-0.5 * 4**-0.5
    found = [tower.token_embedding.weight, tower.positions, block.attention.qkv.weight]
    found += [block.attention.out.weight, block.mlp[0].weight, block.mlp[2].weight]
    for weight, deviation in zip(found, [0.02, 0.01, 256**-0.5, narrow, 512**-0.5, narrow]):
        assert weight.std().item() == pytest.approx(deviation, rel=0.03)  # of 19,712 numbers or more


def test_tower_equals_torchs_transformer_encoder():
    tower = small_tower()
    layer = nn.TransformerEncoderLayer(24, 4, 96, 0.0, QuickGELU(), 1e-5, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(24, eps=1e-5), enable_nested_tensor=False)
    names = {"attention.qkv.": "self_attn.in_proj_", "attention.out": "self_attn.out_proj"}
    names |= {"mlp.0": "linear1", "mlp.2": "linear2", "blocks.": "layers."}
    weights = tower.state_dict()
    for ours, their in names.items():
        weights = {name.replace(ours, their): weight for name, weight in weights.items()}
    embedding, positions = weights.pop("token_embedding.weight"), weights.pop("positions")
    theirs.double().eval().load_state_dict(weights)
    tokens = torch.randint(1, 590, (3, 11))
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    expected = theirs(embedding[tokens] + positions[:11], mask=mask, is_causal=True)
    torch.testing.assert_close(tower.encode(tokens), expected, rtol=1e-10, atol=1e-10)  # float64, depth 3


def test_feature_is_the_end_tokens_and_later_tokens_do_not_change_it():
    tower = small_tower()
    tokens = torch.tensor([[598, 5, 6, 7, 599]])
    padded = torch.cat([tokens, torch.zeros(1, 11, dtype=torch.int64)], dim=1)  # to the whole context
    junk = torch.cat([tokens, torch.full((1, 11), 3)], dim=1)
    torch.testing.assert_close(tower(tokens), tower.encode(padded)[:, 4], rtol=1e-12, atol=1e-12)
    assert torch.equal(tower(junk), tower(padded))
    change = (tower.encode(junk) - tower.encode(junk.clone().index_fill_(1, torch.tensor(9), 4))).abs()
    assert (change[:, :9] == 0).all() and (change[:, 9:].amax(-1) > 0).all()
