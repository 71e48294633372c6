"""Facts of the labelled sets: each template takes one name; published JSON files, right and wrong.

pytest tests/test_tasks.py
"""

import json

import pytest

import sets
import tasks

ALL = [*tasks.PROMPTS.values(), *tasks.CAPTIONS.values(), tasks.GENERIC, tasks.GENERIC_CAPTIONS]


@pytest.mark.parametrize("templates", ALL)
def test_every_template_takes_one_name_and_none_stands_twice(templates):
    assert all(template.count("{}") == 1 and "cat" in template.format("cat") for template in templates)
    assert len(set(templates)) == len(templates)


def test_imagenet_has_seven_prompts():
    assert len(tasks.prompts("imagenet")) == 7  # as many as the published ones


def test_a_set_of_its_own_gets_prompts_and_captions_too():
    assert tasks.prompts("my-pets") == tasks.GENERIC and tasks.captions("my-pets") == tasks.GENERIC_CAPTIONS


def test_every_entry_is_a_set_that_can_be_opened():
    known = {*sets.SCENES, *sets.TORCHVISION, "imagenet"}
    assert {*tasks.PROMPTS, *tasks.CAPTIONS} <= known


def test_a_published_file_is_read_by_the_name_of_the_set(tmp_path):
    table = {"pets": ["Abyssinian", "café cat"], "cars": [["a", "b"], ["c"]]}
    (tmp_path / "labels.json").write_text(json.dumps(table), encoding="utf-8")
    assert tasks.read_published(tmp_path / "labels.json", "pets") == table["pets"]
    assert tasks.read_published(tmp_path / "labels.json", "cars") == table["cars"]


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b'{"pets": ["cat"', "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"cars": ["a"], "food": ["b"]}', "no list under 'pets': found cars, food"),
        (b'{"pets": "cat"}', "no list under 'pets'"),
        (b'["cat", "dog"]', "no list under 'pets': found list"),
        (b"7", "no list under 'pets': found int"),
    ],
)
def test_a_wrong_published_file_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "labels.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        tasks.read_published(path, "pets")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_published_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at .*nothere.json: expected a JSON"):
        tasks.read_published(tmp_path / "nothere.json", "pets")
