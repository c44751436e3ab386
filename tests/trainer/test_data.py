"""Datasets: what a sample number stands for, against megatron-core and against itself in other circumstances."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from formats.errors import UserError
from tests.trainer import prepared
from tests.trainer.prepared import LENGTH, built, contents, write
from trainer import data, segments, tokenizers
from trainer.config import DatasetConfig, is_packed
from trainer.data import cache
from trainer.data.epochs import Vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")  # megatron-core's, of a lone process


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "a")


@pytest.fixture(params=["in memory", "in files"])
def index_storage(request, monkeypatch):
    """Small indices are made in memory, large ones kept in files: both ways."""
    if request.param == "in files":
        monkeypatch.setattr(cache, "MIN_CACHED_ENTRIES", 1)
    return request.param


def test_a_sample_is_tokens_and_the_next_ones(prefix):
    sample = built((5, 0, 0), blend=[prefix])[0][3]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sample.items()} == {
        "tokens": (torch.int64, (LENGTH,)),
        "labels": (torch.int64, (LENGTH,)),
        "loss_mask": (torch.float32, (LENGTH,)),
        "position_ids": (torch.int64, (LENGTH,)),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])


def test_the_first_epoch_has_megatron_cores_order(prefix, tmp_path):
    vocabulary = Vocabulary(eod=-2, vocab_size=100_000, unique_identifiers={})
    masks = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"), False)
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="80,20,0",
        tokenizer=vocabulary,
        path_to_cache=str(tmp_path / "theirs"),
        **masks,
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    ours = built((len(theirs[0]), len(theirs[1]), 0), blend=[prefix], split="80,20,0", random_seed=7)
    assert contents(ours[0]) == contents(theirs[0])
    assert contents(ours[1]) == contents(theirs[1])
    assert ours[2] is theirs[2] is None


def test_a_sample_does_not_depend_on_how_many_are_asked_for(prefix, index_storage):
    first = built((1, 0, 0), blend=[prefix])[0]
    short, long = (built((count, 0, 0), blend=[prefix])[0] for count in (first.per_epoch * 2 + 5, first.per_epoch * 5))
    assert contents(short) == contents(long)[: len(short)]
    with pytest.raises(IndexError):
        short[len(short)]


def test_each_epoch_has_every_sample_once_in_another_order(prefix, index_storage):
    epoch = built((1, 0, 0), blend=[prefix], split="1,0,0")[0].per_epoch
    source = IndexedDataset(prefix)  # held: its arrays do not outlive it
    assert epoch == (int(source.sequence_lengths.sum()) - 1) // LENGTH
    rows = contents(built((3 * epoch, 0, 0), blend=[prefix], split="1,0,0")[0])
    orders = set()
    for number in range(3):
        inputs = [token for row in rows[number * epoch : (number + 1) * epoch] for token in row[:-1]]
        assert len(set(inputs)) == len(inputs) == epoch * LENGTH  # each token of this corpus is another one
        orders.add(tuple(inputs))
    assert len(orders) == 3


def test_the_seed_changes_the_order(prefix):
    first, second = (contents(built((20, 0, 0), blend=[prefix], random_seed=seed)[0]) for seed in (1, 2))
    assert first != second


def test_thousands_of_epochs_of_little_data_leave_no_files(prefix, tmp_path):
    many = built((1_000_000, 0, 0), blend=[prefix])[0]
    assert many[999_999]["tokens"].shape == (LENGTH,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_splits_share_no_document(prefix):
    source = IndexedDataset(prefix)
    document_of = {int(token): number for number in range(len(source)) for token in source[number]}
    splits = built((40, 40, 40), blend=[prefix], split="60,20,20")
    documents = [{document_of[token] for row in contents(dataset) for token in row} for dataset in splits]
    assert sum(len(part) for part in documents) == len(documents[0] | documents[1] | documents[2])
    assert max(documents[0]) < 36 <= min(documents[1]) <= max(documents[1]) < 48 <= min(documents[2])


def test_a_split_without_a_share_or_without_samples_is_none(prefix):
    train, valid, test = built((4, 4, 4), blend=[prefix], split="80,20")
    assert (len(train), len(valid), test) == (4, 4, None)
    assert built((4, 0, 0), blend=[prefix])[1:] == (None, None)


def test_a_blend_keeps_its_proportions_and_does_not_depend_on_its_length(tmp_path, index_storage):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", seed=10)
    short, long = (built((count, 0, 0), blend=["0.3", first, 0.7, second])[0] for count in (300, 1000))
    rows = contents(long)
    assert contents(short) == rows[:300]
    for count in (10, 100, 1000):
        assert Counter(row[0] >= 10_000 for row in rows[:count])[True] == round(0.7 * count)
    alone = contents(built((300, 0, 0), blend=[first])[0])
    assert [row for row in rows if row[0] < 10_000] == alone


def test_without_weights_prefixes_count_by_their_samples(tmp_path):
    prefixes = [
        write(tmp_path / name, seed=seed, documents=count) for name, seed, count in (("a", 0, 60), ("b", 10, 20), ("c", 30, 20))
    ]
    sizes = [built((1, 0, 0), blend=[prefix], split="1,0,0")[0].per_epoch for prefix in prefixes]
    rows = contents(built((sum(sizes), 0, 0), blend=prefixes, split="1,0,0")[0])
    assert len({row[0] for row in rows}) == sum(sizes)  # one epoch of each


def test_each_split_from_its_own_files(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", seed=10)
    train, valid, test = built((20, 10, 10), blend_per_split=[[first], [1, second, 1, first], None])
    assert max(max(row) for row in contents(train)) < 10_000
    assert Counter(row[0] >= 10_000 for row in contents(valid)) == {True: 5, False: 5}
    assert test is None


def test_each_prefix_of_the_held_out_blends_may_be_a_set_of_its_own(tmp_path):
    first, second = (write(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b")))
    config = {"blend": [0.3, first, 0.7, second], "split": "60,20,20"}
    train, valid, test = built((20, 10, 5), multiple_validation_sets=True, **config)
    assert contents(train) == contents(built((20, 0, 0), **config)[0])
    for name in (first, second):
        alone = built((0, 10, 5), blend=[name], split="60,20,20")
        assert contents(valid[name]) == contents(alone[1])
        assert contents(test[name]) == contents(alone[2])
    assert list(valid) == list(test) == [first, second]


def test_masks_and_positions_are_megatron_cores(tmp_path):
    """Against what its documentation says: no loss where the input is an end of document, positions from 0 after it."""
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.uint16)
    for _ in range(20):
        builder.add_item(torch.tensor([1, 2, 3, 4, 256]))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    config = DatasetConfig(
        sequence_length=LENGTH, blend=[str(tmp_path / "a")], split="1,0,0", eod_mask_loss=True, reset_position_ids=True
    )
    train, _, _ = data.build(config, tokenizer=tokenizers.load("byte"), vocab_size=257, samples=(5, 0, 0))
    for sample in train:
        assert torch.equal(sample["loss_mask"], (sample["tokens"] != 256).float())
        after = (sample["tokens"] == 256).nonzero().flatten() + 1
        assert sample["position_ids"][after[after < LENGTH]].tolist() == [0] * int((after < LENGTH).sum())
        plain = torch.roll(sample["position_ids"], -1) == sample["position_ids"] + 1
        assert plain[:-1].logical_or(sample["tokens"][:-1] == 256).all()


def test_documents_are_kept_apart_as_megatron_core_does(tmp_path):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.uint16)
    for number in range(30):
        builder.add_item(torch.tensor([*range(1, 2 + number % 7), 256]))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    config = DatasetConfig(sequence_length=LENGTH, blend=[str(tmp_path / "a")], split="1,0,0", reset_attention_mask=True)
    assert is_packed(config)
    train, _, _ = data.build(config, tokenizer=tokenizers.load("byte"), vocab_size=257, samples=(5, 0, 0))
    for sample in train:
        theirs, _, _ = _get_ltor_masks_and_position_ids(sample["tokens"], 256, False, True, False, True)
        assert torch.equal(segments.attention_mask(sample["segment_ids"][None])[0], theirs)
        assert sample["segment_ids"].max() > 1


def test_data_prepared_anew_gets_new_indices(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MIN_CACHED_ENTRIES", 1)
    built((20, 0, 0), blend=[prefix], split="1,0,0")
    write(prefix, documents=5)
    again = built((20, 0, 0), blend=[prefix], split="1,0,0")[0]
    monkeypatch.setattr(cache, "MIN_CACHED_ENTRIES", 2**20)
    assert contents(again) == contents(built((20, 0, 0), blend=[prefix], split="1,0,0")[0])


def test_datasets_can_be_sent_to_other_processes(tmp_path, index_storage):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", seed=10)
    blend = built((100, 0, 0), blend=[1, first, 1, second])[0]
    rows = contents(blend)
    sent = pickle.dumps(blend)
    assert len(sent) < 10_000
    assert contents(pickle.loads(sent)) == rows


def test_ranks_that_build_at_once_see_the_same_whether_they_share_a_folder_or_not(ranks, tmp_path):
    prefixes = [write(tmp_path / "a"), write(tmp_path / "b", seed=10)]
    folders = [tmp_path / "shared", tmp_path / "own0", tmp_path / "own1"]
    results = ranks.run(prepared.rank, 2, prefixes, tmp_path)
    alone = built((150, 20, 0), blend=[1.0, prefixes[0], 1.0, prefixes[1]], split="80,20,0")
    expected = [contents(alone[0]), contents(alone[1])]
    assert results == [[expected, expected]] * 2
    kept = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) > 4


def test_mock_data_depends_on_number_seed_and_split_alone():
    train, valid, test = built((50, 5, 0))
    assert test is None
    assert contents(train, 20) == contents(built((20, 0, 0))[0])
    assert contents(train, 5) != contents(valid)
    assert contents(train, 5) != contents(built((5, 0, 0), random_seed=1)[0])
    small = data.build(DatasetConfig(sequence_length=LENGTH), tokenizer=None, vocab_size=11, samples=(50, 0, 0))[0]
    rows = contents(small)
    assert {token for row in rows for token in row} == set(range(11))
    assert train[0]["tokens"].dtype == train[0]["position_ids"].dtype == torch.int64
    assert train[0]["loss_mask"].dtype == torch.float32


def test_an_object_of_ones_own_is_asked():
    class Own:
        sequence_length = 4

        def build(self, tokenizer, vocab_size, samples):
            return tokenizer, vocab_size, samples

    assert data.build(Own(), tokenizer=None, vocab_size=3, samples=(1, 2, 3)) == (None, 3, (1, 2, 3))


def message(samples=(4, 0, 0), **config):
    with pytest.raises(UserError) as error:
        built(samples, **config)
    return str(error.value).split("\n")[0]


def test_what_cannot_be_built_is_named(prefix, tmp_path):
    assert message(blend=[str(tmp_path / "no")]) == f"`{tmp_path}/no.idx` does not exist"
    assert message(blend=[]) == "`dataset.blend` is `[]`"
    assert message(blend=[prefix], blend_per_split=[[prefix]] * 3) == "`dataset.blend` and `dataset.blend_per_split` are both set"
    assert message(blend_per_split=[[prefix]]) == "`dataset.blend_per_split` has 1 entries"
    assert message(blend_per_split=[None, [prefix], None]) == "`dataset.blend_per_split` leaves nothing to train on"
    assert message(blend=[prefix], split="0,1,0") == "`dataset.split` leaves nothing to train on"
    assert message(blend=[prefix], split="a,b") == "`a,b` is not a split"
    assert message(blend=[0, prefix]) == f"`[0, '{prefix}']` is not a blend"
    assert message(blend=[0.5, prefix, prefix, 0.5]) == f"`[0.5, '{prefix}', '{prefix}', 0.5]` is not a blend"
    few = f"the test split of `{prefix}` has 0 tokens in 0 of 60 documents, but a sample takes 17"
    assert message((4, 4, 4), blend=[prefix], split="90,9.9,0.1") == few
    lacks = (
        "`dataset.eod_mask_loss`, `dataset.reset_position_ids` and `dataset.reset_attention_mask` need to know which token ends "
        "a document"
    )
    for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        assert message(blend=[prefix], **{name: True}) == lacks
    assert message(blend=[prefix], random_seed=-1) == "`dataset.random_seed` is -1"


def test_little_data_has_no_test_where_nobody_chose_the_shares(prefix, capsys):
    train, validation, test = built((4, 4, 4), blend=[prefix])
    assert (len(train), len(validation), test) == (4, 4, None)
    few = f"the test split of `{prefix}` has 0 tokens in 0 of 60 documents, but a sample takes 17"
    assert capsys.readouterr().err == f"note: there is no final test: {few}\n"


def test_damaged_files_are_named(prefix):
    data_file, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = data_file.read_bytes()
    data_file.write_bytes(whole[:-4])
    assert message(blend=[prefix]) == f"`{data_file}` has {len(whole) - 4} bytes, but its index says {len(whole)}"
    data_file.write_bytes(b"")
    assert message(blend=[prefix]) == f"`{data_file}` is empty"
    index.write_bytes(index.read_bytes()[:-1])
    assert message(blend=[prefix]) == f"`{index}` is not a complete index of Megatron-LM"


def test_a_token_beyond_the_vocabulary_is_named(prefix):
    config = DatasetConfig(sequence_length=LENGTH, blend=[prefix])
    train, _, _ = data.build(config, tokenizer=None, vocab_size=3, samples=(1, 0, 0))
    with pytest.raises(UserError, match=r"a` has the token id \d+, but the vocabulary has 3"):
        train[0]
