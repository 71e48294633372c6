"""Retrieval: recall against answers known by construction and a naive sort in float64; a toy encoder of
colours, whose right picture and sentence are known, on folders and captions.

    pytest tests/test_retrieval.py
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import loop
import retrieval

CPU = torch.device("cpu")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Toy(nn.Module):
    """A text is near the axes of the colours it names, a picture near the channels it is bright in."""

    config = SimpleNamespace(image_size=8, context=77)

    def tokenizer(self, texts, context):
        codes = [[ord(letter) for letter in text] for text in texts]
        return torch.tensor([row + [0] * (max(map(len, codes)) - len(row)) for row in codes])

    def encode_text(self, tokens):
        """[B, L] -> [B, 3]; lengths differ, so whoever forgets to normalise is found out."""
        texts = ["".join(chr(code) for code in row if code) for row in tokens.tolist()]
        return torch.tensor([[len(text) * (0.01 + (colour in text)) for colour in COLOURS] for text in texts])

    def encode_image(self, images):
        return 7 * images.mean((2, 3))  # [B, 3]


@pytest.fixture
def pictures(tmp_path):
    """A folder of a picture in each colour, one below; one is cut short, one no picture."""
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 7), colour).save(tmp_path / name / "plain.PNG")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red/plain.PNG").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_sentences_keep_their_order_and_have_unit_length():
    texts = [f"{list(COLOURS)[i % 3]} {'x' * (i * 37 % 50)}" for i in range(150)]  # more than two batches
    embeds = retrieval.embed_texts(Toy(), texts, CPU)
    alone = torch.cat([retrieval.embed_texts(Toy(), [text], CPU) for text in texts])
    torch.testing.assert_close(embeds, alone, rtol=0, atol=1e-6)  # float32
    assert embeds.argmax(1).tolist() == [i % 3 for i in range(150)]
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(150))


def test_a_model_without_tokenizer_says_where_to_get_one():
    model = Toy()
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer.*pip install"):
        retrieval.embed_texts(model, ["red"], CPU)


def test_pictures_are_ranked_for_a_sentence_and_the_unreadable_told(pictures, capsys):
    source = retrieval.open_pictures(pictures)
    assert len(source) == 4
    found = retrieval.search(Toy(), source, "green", CPU)
    assert found[0][1] == str(pictures / "green/plain.PNG") and len(found) == 3
    assert [c for c, _ in found] == sorted((c for c, _ in found), reverse=True)
    text = F.normalize(torch.tensor([0.01, 1.01, 0.01]), dim=0)
    for cosine, path in found:
        colour = torch.tensor(COLOURS[path.split("/")[-2]], dtype=torch.uint8)
        view = data.augment.normalise(colour[None, :, None, None])[0, :, 0, 0]
        assert cosine == pytest.approx(float(F.normalize(view, dim=0) @ text), abs=1e-6)  # float32
    warning = f"warning: 1 of 4 pictures cannot be read: {pictures / 'cut.png'} (UnidentifiedImageError: "
    message = capsys.readouterr().err
    assert message.startswith(warning) and message.count("\n") == 1


def test_a_folder_without_a_readable_picture_is_one_sentence(pictures):
    for path in pictures.rglob("*.PNG"):
        path.write_bytes(b"")
    with pytest.raises(loop.Stop, match="no picture of .* can be read"):
        retrieval.search(Toy(), retrieval.open_pictures(pictures), "green", CPU)
    with pytest.raises(FileNotFoundError, match="no folder at nothere"):
        retrieval.open_pictures("nothere")
    (pictures / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures in .*: expected .jpg"):
        retrieval.open_pictures(pictures / "empty")


class Captioned(data.Dataset):
    """A picture of each colour, captioned by `captions`; one more that cannot be read."""

    def __init__(self, *captions):
        self.captions = [*captions, "red"]

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return Image.new("RGB", (9, 7), list(COLOURS.values())[index]), self.captions[index]  # 3: IndexError

    def label(self, index):
        return self.captions[index]


def evaluate(*captions):
    found, *counts = retrieval.evaluate(Toy(), data.Source("toy", Captioned(*captions)), CPU)
    return found["image to text"][1], found["text to image"][1], counts


def test_each_of_several_captions_is_used_and_bad_pictures_are_left_out():
    third = pytest.approx(100 / 3)
    assert evaluate("red", ["so green"], ["blue", "very blue"]) == (100, 100, [3, 4])
    assert evaluate("red", "blue one", "green one") == (third, third, [3, 3])
    assert evaluate("red", ["green", "blue, red"], ["green, red", "blue"]) == (100, 60, [3, 5])


def around(count, turned=0.0):
    """Unit vectors [count, 2] on a circle, turned by some steps: the nearest of each are its neighbours."""
    angle = (torch.arange(count) + turned) * 2 * torch.pi / count
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_captions_that_lie_on_their_pictures_are_all_found():
    found = retrieval.recall(around(30), around(30), torch.arange(30))
    assert found == {way: {1: 100, 5: 100, 10: 100} for way in ("image to text", "text to image")}


def test_captions_turned_by_steps_are_found_as_far_as_they_are_turned():
    """Turned by 1.9 steps, with 3 strangers nearer (at 0.1, 0.9 and 1.1): found among 4, not among 3."""
    found = retrieval.recall(around(40), around(40, 1.9), torch.arange(40), ks=(3, 4))
    assert all(values == {3: 0, 4: 100} for values in found.values())


def test_one_good_caption_of_several_is_enough_for_a_picture_and_each_counts_for_itself():
    texts = torch.cat([torch.eye(20), torch.eye(20).roll(1, 0)])  # the second captions fit another picture
    found = retrieval.recall(torch.eye(20), texts, torch.arange(20).repeat(2), ks=(1, 2))
    assert found["text to image"][1] == 50
    assert found["image to text"] == {1: 0, 2: 100}  # a stranger's second caption is as near, and goes first


def test_equal_embeddings_find_nothing():
    found = retrieval.recall(torch.ones(30, 1), torch.ones(60, 1), torch.arange(60) % 30)
    assert all(value == 0 for values in found.values() for value in values.values())


@pytest.mark.parametrize("block", [1, 1000, 1 << 24])  # of cosines: one row at a time, 5 rows, all
@pytest.mark.parametrize("captions", [50, 170])
def test_recall_equals_a_naive_sort_in_blocks_too(monkeypatch, block, captions):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(50, 8, generator=generator), dim=1)
    owner = torch.cat([torch.arange(50), torch.randint(50, (captions - 50,), generator=generator)])
    texts = F.normalize(images[owner] + 0.7 * torch.randn(captions, 8, generator=generator), dim=1)
    found = retrieval.recall(images, texts, owner)
    cosines = images.double() @ texts.double().T
    by_image = owner[cosines.argsort(1, descending=True)] == torch.arange(50)[:, None]
    by_text = cosines.T.argsort(1, descending=True) == owner[:, None]
    for k in (1, 5, 10):
        for way, hits in (("image to text", by_image), ("text to image", by_text)):
            assert found[way][k] == pytest.approx(100 * hits[:, :k].any(1).double().mean().item())
    assert 5 < found["text to image"][1] < 95
