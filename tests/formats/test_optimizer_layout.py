"""The map from buckets to parameters is megatron-core's own, whatever the sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from formats.errors import UserError
from formats.optimizer.gathered import GatheredBuffer, bucket_limits
from formats.optimizer.layout import Parameter, assign_slots, bucket_sizes


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=12),
    limit=st.none() | st.integers(1, 900),
    ranks=st.integers(1, 9),
)
def test_places_and_sizes_are_megatrons(sizes, limit, ranks):
    made = {}
    for number, (size, is_shared) in enumerate(sizes):
        made[f"p{number}"] = torch.empty(size, device="meta")
        made[f"p{number}"].shared_embedding = is_shared
    config = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    expected = DistributedOptimizer._compute_per_buffer_param_layout([*made.values()], limit, ranks, config)

    parameters = [Parameter(name, tensor.numel()) for name, tensor in made.items()]
    shared = {name for name, tensor in made.items() if tensor.shared_embedding}
    buckets = bucket_sizes(parameters, limit=limit, shared=shared)
    assert buckets == expected.per_bucket_numel_unpadded
    slots = assign_slots(parameters, buckets)
    begins = [start for start, _ in expected.bucket_indices]
    for name, tensor in made.items():
        start, _, bucket = expected.param_index_map[tensor]
        assert slots[name] == (bucket, start - begins[bucket], start - begins[bucket] + sum(buckets[:bucket]))


@pytest.mark.parametrize(("buckets", "reason"), [
    ([100], "`norm` ends at element 30 of bucket 0, and `embedding` would at 164: the bucket has 100 elements"),
    ([30], "`embedding` has no place in 1 buckets of 30 elements"),
    ([200], "the parameters end at element 164 of bucket 0, the buckets are [200]"),
    ([164, 7], "the parameters end at element 164 of bucket 0, the buckets are [164, 7]"),
])  # fmt: skip
def test_sizes_that_do_not_come_out_are_refused(buckets, reason):
    with pytest.raises(UserError) as refusal:
        assign_slots([Parameter("embedding", 100), Parameter("norm", 30)], buckets)
    assert str(refusal.value.args[0]) == reason


def test_gathered_buckets_are_those_that_a_run_may_have_had():
    """Sizes that are no multiples of 64 tell where buckets ended."""
    parameters = [Parameter(f"p{number}", 1_000_001) for number in range(90)]
    args = {"data_parallel_size": 25, "context_parallel_size": 2}
    limits = bucket_limits(args)
    assert limits == [None, 50_000_000, 40_000_000]
    for limit in limits:
        sizes = bucket_sizes(parameters, limit=limit)
        assert next(GatheredBuffer("", sum(sizes), limits).bucketings(parameters)) == sizes
    assert bucket_limits({"ddp_bucket_size": 7, "data_parallel_size": "2"}) == [None, 7, 40_000_000]
