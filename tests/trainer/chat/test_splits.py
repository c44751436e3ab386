"""Which examples are for training, validation and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import UserError
from trainer.config import FinetuningDatasetConfig
from trainer.data.chat.sources import Source
from trainer.data.chat.splits import SPLITS, Subset, find_subsets

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::ResourceWarning")


def several(**settings):
    return find_subsets(FinetuningDatasetConfig(**settings))


def of(**settings):
    """Of one source: for train, validation and test its part, or None."""
    subsets = several(**{"path": "a.jsonl"} | settings)
    assert subsets.weights is None
    return [next(iter(subsets.of(split)), None) for split in SPLITS]


@given(st.integers(0, 300), st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_shares_are_disjoint_complete_and_of_their_sizes(count, seed, shares):
    shares[0] += 1
    parts = of(split=",".join(map(str, shares)), random_seed=seed)
    numbers = [part.numbers(count) if part else np.arange(0) for part in parts]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(count))
    assert all(np.all(np.diff(part) > 0) for part in numbers)
    wanted = [count * share / sum(shares) for share in shares] + [0] * (3 - len(shares))
    assert all(abs(len(part) - want) <= 1 for part, want in zip(numbers, wanted, strict=True))


def test_who_is_chosen_depends_on_the_seed_alone():
    first, again, other = (of(split="50,50", random_seed=seed)[1].numbers(1000).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first != list(range(500))
    assert first != list(range(500, 1000))


def test_more_examples_at_the_end_move_few_between_the_splits():
    part = of(split="90,10", random_seed=1)[1]
    before, after = part.numbers(1000), part.numbers(1010)
    assert len(np.intersect1d(before, after[after < 1000])) >= 90


def test_files_of_their_own_leave_the_shares_to_the_others():
    own = Subset(Source(Path("v.jsonl")))
    assert of(validation_path="v.jsonl") == [Subset(Source(Path("a.jsonl")), (0.0, 1.0), 1234), own, None]
    train, validation, test = of(validation_path="v.jsonl", split="80,10,20")
    assert validation == own
    assert (len(train.numbers(100)), len(test.numbers(100))) == (80, 20)


def test_a_dataset_dict_has_its_own_splits_and_shares_what_it_lacks(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    DatasetDict(train=rows, validation=rows, test=rows).save_to_disk(tmp_path / "three")
    two, three = tmp_path / "two", tmp_path / "three"
    assert [part.source for part in of(path=str(three))] == [Source(three, name) for name in ("train", "validation", "test")]
    train, validation, test = of(path=str(two))
    assert (train.source, validation.source, test) == (Source(two, "train"), Source(two, "train"), Subset(Source(two, "test")))
    assert (len(train.numbers(100)), len(validation.numbers(100))) == (95, 5)
    assert of(validation_path=str(three))[1] == Subset(Source(three, "validation"))


def refusal(**settings):
    with pytest.raises(UserError) as error:
        of(**settings)
    return str(error.value)


def test_what_cannot_be_shared_is_named(tmp_path):
    shares = "hint: it is three shares for train, validation and test, as `95,5,0`"
    for split in ("", "a,b", "1,2,3,4", "-1,2", "0,0", "inf,1", "nan"):
        assert refusal(split=split) == f"`{split}` is not a split\n\n{shares}"
    assert refusal(split="0,1") == (
        "`dataset.split` is `0,1`, which leaves nothing to train on\n\nhint: its first entry is for training"
    )
    assert refusal(path=None) == (
        "`dataset.path` is not set\n\nhint: name the examples to learn from: `dataset.path=examples.jsonl`"
    )
    assert refusal(random_seed=-1).startswith("`dataset.random_seed` is -1\n\n")
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    DatasetDict(train_sft=rows, test_sft=rows).save_to_disk(tmp_path / "odd")
    hint = "hint: name the folder or file of one of them: `dataset.path`, `dataset.validation_path`, `dataset.test_path`"
    has = "it has `train_sft`, `test_sft`"
    assert refusal(path=str(tmp_path / "odd")) == f"`{tmp_path / 'odd'}` has no split `train`: {has}\n\n{hint}"
    assert refusal(test_path=str(tmp_path / "odd")) == f"`{tmp_path / 'odd'}` has no split `test`: {has}\n\n{hint}"
    assert of(path=str(tmp_path / "odd" / "train_sft"))[0].source == Source(tmp_path / "odd" / "train_sft")


def paths(subsets):
    return [[part.source.path.name for part in subsets.of(split)] for split in SPLITS]


def test_each_source_of_a_blend_has_its_shares_and_its_own_splits(tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    subsets = several(blend=["a.jsonl", str(tmp_path / "two")], split="90,10,0")
    assert paths(subsets) == [["a.jsonl", "two"], ["a.jsonl", "two"], ["two"]]
    assert (subsets.weights, subsets.train[1].source.split, subsets.test[0].source.split) == (None, "train", "test")
    weighted = several(blend=[0.3, "a.jsonl", 2, "b.jsonl"], validation_path=["v.jsonl", "w.jsonl"])
    assert paths(weighted) == [["a.jsonl", "b.jsonl"], ["v.jsonl", "w.jsonl"], []]
    assert (weighted.weights, weighted.train[0].share) == ((0.3, 2.0), (0.0, 1.0))


@pytest.mark.parametrize("blend", [["a", 0.3], [0.3, "a", "b"], [0, "a", 1, "b"], [-1, "a", 1, "b"], [True, "a"], [["a"]]])
def test_what_is_no_blend_is_named(blend):
    with pytest.raises(UserError) as error:
        several(blend=blend)
    assert str(error.value) == (
        f"`{blend}` is not a blend\n\n"
        "hint: it is a list of sources, or positive weights and sources alternating: `[0.3, a.jsonl, 0.7, b.jsonl]`"
    )


def test_a_source_is_named_once():
    with pytest.raises(UserError, match=r"`dataset.path` and `dataset.blend` are both set"):
        several(path="a", blend=["b"])
    with pytest.raises(UserError, match=r"`dataset.blend` names `a` twice"):
        several(blend=["a", "b", "a"])
