"""Facts of the labelled sets: each template takes one name; published JSON files, right and wrong.

pytest tests/test_tasks.py
"""

import json

import pytest

import measure
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
    known = {*sets.SCENES, *sets.TORCHVISION, *sets.FOLDERS, "imagenet"}
    assert {*tasks.PROMPTS, *tasks.CAPTIONS, *tasks.NAMES, *tasks.JUDGED_BY} <= known


def test_the_paper_has_26_sets_and_judges_six_by_a_metric_of_their_own():
    assert len(set(tasks.PAPER)) == 26 and set(tasks.JUDGED_BY) <= set(tasks.PAPER)
    by_class = {name for name in tasks.PAPER if tasks.metric(name) == "per_class"}
    assert by_class == {"aircraft", "pets", "caltech101", "flowers"}
    assert (tasks.metric("kinetics700_frames"), tasks.metric("hateful_memes")) == ("top1_top5", "auc")
    assert {tasks.metric(name) for name in tasks.PAPER} <= set(measure.METRICS)
    assert tasks.metric("mine") == "top1"


def test_every_set_of_the_paper_has_prompts_of_its_kind():
    """Caltech's objects and nothing else are of no kind."""
    assert [name for name in tasks.PAPER if tasks.prompts(name) is tasks.GENERIC] == ["caltech101"]


@pytest.mark.parametrize("name", tasks.NAMES)
def test_names_are_words_and_each_is_of_one_class(name):
    table = tasks.NAMES[name]
    entries = list(table.values()) if isinstance(table, dict) else table
    words = [word for entry in entries for word in ([entry] if isinstance(entry, str) else entry)]
    assert len({word.lower() for word in words}) == len(words)
    assert all(word == word.strip() and not {"_", "/", ";"} & set(word) for word in words)


@pytest.mark.parametrize(
    "name, count", [("mnist", 10), ("gtsrb", 43), ("fer2013", 7), ("clevr_counts", 8), ("eurosat", 10)]
)
def test_there_are_as_many_names_as_classes(name, count):
    assert len(tasks.NAMES[name]) == count


def test_countries_are_found_by_their_codes():
    countries = tasks.NAMES["country211"]
    assert len(countries) == 250 and all(len(code) == 2 and code.isupper() for code in countries)
    assert (countries["CH"], countries["US"]) == ("Switzerland", "the United States")


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


def test_a_set_that_a_published_file_lacks_gets_what_is_given_for_it(tmp_path):
    (tmp_path / "labels.json").write_text('{"pets": ["cat"], "cars": 7}', encoding="utf-8")
    assert tasks.read_published(tmp_path / "labels.json", "dtd", ["ours"]) == ["ours"]
    assert tasks.read_published(tmp_path / "labels.json", "pets", ["ours"]) == ["cat"]
    with pytest.raises(ValueError, match="no list under 'cars'"):
        tasks.read_published(tmp_path / "labels.json", "cars", ["ours"])


def test_a_missing_published_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at .*nothere.json: expected a JSON"):
        tasks.read_published(tmp_path / "nothere.json", "pets")
