"""Nothing in a pickle runs; what checkpoints hold is read as inert records; torch reads what we write."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import pickle
import signal
from pathlib import Path, PosixPath
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats import pickles
from formats.errors import UserError
from formats.pickles import Global, Record

_RAN = []


def run_me(*args):
    _RAN.append(args)


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "function", [run_me, os.system, eval, exec, getattr, __import__, open, print, bytes, bytearray, range, type, map]
)
def test_a_function_off_the_list_is_refused_and_never_runs(function, protocol):
    hostile = pickle.dumps(Call(function, "1"), protocol)
    with pytest.raises(UserError, match="which no checkpoint needs; it was not executed"):
        pickles.loads(hostile, source="x")
    assert not _RAN


HOSTILE = {
    "reduce_os_system": b"cos\nsystem\n(S'true'\ntR.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0bSize.__init__\x93.",
    "extension": b"\x80\x02\x82\x01.",
    "call_a_string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "call_a_record": b"\x80\x02ctorch\nSize\n)R)R.",
    "persistent_text": b"Pabc\n.",
    "persistent_thing": b"\x80\x02K\x01Q.",
    "huge_memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge_bytes": b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x0fabc.",
    "huge_bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00abc.",
    "huge_string": b"\x80\x02X\xff\xff\xff\xffabc.",
    "nested_keys": b"\x80\x02})" + b"q\x00h\x00\x86" * 34 + b"K\x01s.",
    "nested_keys_of_an_old_dict": b"\x80\x02()" + b"q\x00h\x00\x86" * 34 + b"K\x01d.",
    "duplicates": b"\x80\x02)" + b"2\x86" * 34 + b".",
    "set_of_nested": b"\x80\x04]" + b"))\x86\x86" + b"a\x8c\x08builtins\x8c\x03set\x93h\x00\x85R.",
    "sets_of_one_list": b"\x80\x04](" + b"K\x01" * 2000 + b"e\x94cbuiltins\nset\n\x94" + b"h\x01h\x00\x85R0" * 2000 + b"N.",
    "made_of_no_tuple": b"\x80\x02ctorch\nSize\nN\x81.",
    "truncated": b"\x80\x02}q\x00(X\x05\x00\x00\x00ab",
    "nothing": b"",
    "no_pickle": b"PK\x03\x04",
    "list_of_int": b"\x80\x02c__builtin__\nlist\nK\x05\x85R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(name):
    if name == "huge_memo":
        assert pickles.loads(HOSTILE[name], source="x") is None
        return
    with pytest.raises(UserError, match="`x`"):
        pickles.loads(HOSTILE[name], source="x")


def test_what_checkpoints_hold_opens_as_records():
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.rerun_state_machine import RerunMode
    from megatron.core.transformer.enums import AttnBackend
    from torch.distributed.checkpoint.planner import SavePlan

    for value in (
        argparse.Namespace(a=1), SimpleNamespace(a=1), PosixPath("/a"), AttnBackend.auto, ModelType.encoder_or_decoder,
        OptimizerConfig(), RerunMode.DISABLED, signal.SIGTERM, SavePlan([]), torch.Size([1, 2]), torch.bfloat16,
        {"a": {1, 2}, "b": (1.5, None)}, io.BytesIO(b"x"),
    ):  # fmt: skip
        for protocol in (2, 4, 5):
            pickles.loads(pickle.dumps({"args": value}, protocol), source="x")


def test_a_namespace_keeps_its_fields():
    args = pickles.loads(pickle.dumps(argparse.Namespace(tp=2, path=Path("a"))), source="x")
    assert args["tp"] == 2
    assert args["path"].kind.name in ("PosixPath", "PurePosixPath", "Path")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_sets_of_both_kinds_are_read(protocol):
    data = pickle.dumps({"a": frozenset(["x", 2]), "b": {3}, "c": (frozenset(),)}, protocol)
    assert pickles.loads(data, source="x") == {"a": {"x", 2}, "b": {3}, "c": (set(),)}


def test_no_class_outside_the_list_is_imported():
    with pytest.raises(UserError, match=r"`datetime.date`"):
        pickles.loads(pickle.dumps(datetime.date(2000, 1, 1)), source="x")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(plain)
def test_pythons_unpickler_reads_what_we_write(value):
    data = pickles.dumps(value)
    assert pickle.loads(data) == value
    assert pickles.loads(data, source="x") == value


def test_records_become_the_classes_they_name():
    namespace = Record(Global("argparse", "Namespace"), state={"a": 1}, made_by_call=False)
    assert pickle.loads(pickles.dumps([namespace, Global("torch", "Size")((1, 2))])) == [
        argparse.Namespace(a=1),
        torch.Size([1, 2]),
    ]
