"""Names of objects are computed from the rows that they are of, and are those of megatron-core."""

import pytest

from formats.object_names import ObjectName, ObjectNames

NAMES = [
    ObjectName("layers.mlp._extra_state", (2,), (3,)),
    ObjectName("layers.experts._extra_state", (1, 4), (3, 5)),
    ObjectName("layers.mlp._extra_state", (0,), (3,)),
    ObjectName("common_state"),
    ObjectName("layers.mlp._extra_state", (1,), (2,)),
]


def test_names_are_computed_in_order():
    names = ObjectNames()
    for name in NAMES:
        names.append(name)
    assert list(names) == [str(name) for name in NAMES]
    assert (names[-1], names[1:3], names[:1]) == (str(NAMES[-1]), [str(name) for name in NAMES[1:3]], [str(NAMES[0])])


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_megatron_core(name):
    mapping = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    sharded = mapping.ShardedObject(name.key, None, name.sizes or (1,), name.rows or (0,))
    assert str(name) == sharded.unique_key
