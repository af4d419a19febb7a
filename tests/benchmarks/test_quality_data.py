"""What the compared methods are trained and judged on: parts that share no text, batches, the rate's schedule."""

import numpy as np
import pytest
import torch
from quality_helpers import CLASSES, examples

from benchmarks.quality import texts, training
from benchmarks.quality.tasks import encode
from examples.data import DataError


def test_no_text_is_in_two_parts():
    rows = [{"text": f"text {i % 70}{' ' * (i % 3)}", "label": 0} for i in range(200)]
    split = texts.three_parts(2, rows, 10, 20)
    keys = [texts.key(e) for name in ("train", "validation", "test") for e in getattr(split, name)]
    assert len(keys) == len(set(keys)) == 70
    assert (len(split.validation), len(split.test)) == (10, 20)
    assert texts.three_parts(2, rows, 10, 20) == split
    with pytest.raises(DataError, match="too few"):
        texts.three_parts(2, rows, 40, 30)


def test_wordnet_lines_become_word_and_definition():
    line = (
        '02084071 05 n 03 domestic_dog 0 dog 0 001 @ 02083346 n 0000 | a member of Canis; "the dog barked all night"  '
    )
    assert texts._synsets("noun", f"  1 licence\n{line}") == ["noun\t5\tdomestic dog\ta member of Canis"]


def test_a_language_model_learns_the_completion_alone():
    class Words:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, rows, **options):
            return type("Encoded", (), {"input_ids": [[len(word) for word in row.split()] for row in rows]})

    rows = [{"prompt": "aa aaa", "completion": "b bbbb"}, {"prompt": "a a a a a", "completion": "b"}]
    found = encode(texts.Split(0, rows, rows[:1], rows[:1]), Words(), max_tokens=5)
    assert len(found.train) == 1  # of the other one no completion is left
    batch = training.collate(found.train, np.array([0]), 0, 0, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[2, 3, 1, 4, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 1, 4, 1]]


def test_batches_are_of_similar_length_and_use_an_epoch_before_the_next():
    lengths = np.random.default_rng(0).integers(3, 60, 400)
    batches = training.batch_numbers(lengths, 8, 60, seed=3)
    assert len(batches) == 60 and all(len(numbers) == 8 for numbers in batches)
    assert sorted(np.concatenate(batches[:50])) == list(range(400))
    padded = sum(8 * lengths[numbers].max() for numbers in batches[:50])
    assert padded < 1.3 * lengths.sum()
    assert all((a == b).all() for a, b in zip(batches, training.batch_numbers(lengths, 8, 60, seed=3), strict=True))
    assert any((a != b).any() for a, b in zip(batches, training.batch_numbers(lengths, 8, 60, seed=4), strict=True))


def test_what_is_read_is_read_once_whatever_the_length(monkeypatch):
    monkeypatch.setattr(training, "EVALUATED_TOKENS", 20)
    found = examples(CLASSES)
    read = list(training.reading(found.test, found, torch.device("cpu")))
    assert sorted(np.concatenate([numbers for numbers, _ in read])) == list(range(30))
    assert all(batch["input_ids"].numel() <= 20 for _, batch in read)


def test_the_rate_warms_up_and_falls_to_0():
    shares = [training.share_of_rate(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 6) and max(shares) == shares[6] == 1 and shares[100] == 0
    assert shares[53] == pytest.approx(0.5)
