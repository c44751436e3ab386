"""Nothing in a pickle runs; what checkpoints hold is read as inert records; torch reads what we write."""

from __future__ import annotations

import argparse
import code
import collections
import ctypes
import datetime
import decimal
import enum
import functools
import importlib
import io
import marshal
import operator
import os
import pickle
import pty
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from pathlib import Path, PosixPath
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats import pickle_writer, pickles
from formats.errors import UserError
from formats.pickles import Global, Record
from formats.torch_zip import object_archive

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
    "function",
    [
        os.system, eval, exec, getattr, __import__, open, print, bytes, bytearray, range, type, map, subprocess.Popen,
        importlib.import_module, shutil.rmtree, sys.exit, socket.socket, runpy.run_path, pty.spawn, webbrowser.open,
        code.interact, ctypes.CDLL, pickle.loads, functools.partial, threading.Thread, marshal.loads, operator.methodcaller,
    ],
    ids=lambda function: f"{function.__module__}.{function.__qualname__}",
)  # fmt: skip
def test_what_runs_things_is_refused_by_name_and_never_runs(function, protocol):
    hostile = pickle.dumps(Call(function, "1"), protocol)
    with pytest.raises(UserError) as refusal:
        pickles.loads(hostile, source="x")
    assert re.fullmatch(
        r"`x`: the pickle names `[\w.]+`, which no checkpoint needs; it was not executed\n\n"
        r"hint: the file does not come from megatron-core or torch, or someone tampered with it",
        str(refusal.value),
    )


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_nobody_knows_is_read_as_a_record_and_never_runs(protocol):
    record = pickles.loads(pickle.dumps(Call(run_me, "1"), protocol), source="x")
    assert (record.kind, record.args) == (Global(__name__, "run_me"), ("1",))
    assert not _RAN


class Settings(dict):
    """As training frameworks have: a dict whose items are attributes, too."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.__dict__ = self


class Names(list):
    pass


class Flags(set):
    pass


class Schedule:
    class Kind(enum.Enum):
        LINEAR = 1

    def __init__(self):
        self.kind, self.steps = Schedule.Kind.LINEAR, [1, 2]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_classes_of_a_fork_are_records_with_what_they_hold(protocol):
    kept = {
        "schedule": Schedule() if protocol > 2 else Settings(a=1), "names": Names("ab"), "flags": Flags("c"), "act": run_me,
        "at": datetime.timedelta(3), "left": collections.defaultdict(list, a=[1]), "queue": collections.deque([1]),
        "ratio": decimal.Decimal("0.1"), "dtype": torch.bfloat16, "kind": int,
    }  # fmt: skip
    record = pickles.loads(pickle.dumps(argparse.Namespace(**kept), protocol), source="x")
    assert record.fields.keys() == kept.keys()
    assert record["act"] == Global(__name__, "run_me")
    assert record["left"].fields == {"a": [1]}
    if protocol > 2:
        assert record["schedule"]["steps"] == [1, 2]
    assert {other.module for other in pickles.others(record)} == {__name__}


def test_a_dict_of_a_fork_has_its_items():
    record = pickles.loads(pickle.dumps(Settings(tp=2, nested=Settings(a=1)), 2), source="x")
    assert record["tp"] == 2
    assert record["nested"].fields == {"a": 1}


def test_names_in_what_refers_to_itself_are_found():
    around = [argparse.Namespace(inner=Names())]
    around[0].inner = around
    around.append({("key", 1): run_me})
    assert pickles.others(pickles.loads(pickle.dumps(around), source="x")) == {Global(__name__, "run_me")}


HOSTILE = {
    "reduce_os_system": b"cos\nsystem\n(S'true'\ntR.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0bSize.__init__\x93.",
    "through_another_module": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.",
    "python_2": b"ccommands\ngetoutput\n(S'true'\ntR.",
    "sub_module": b"cos.path\njoin\n(S'true'\ntR.",
    "items_of_a_number": b"\x80\x02K\x01K\x02K\x03s.",
    "items_of_a_made_state": b"\x80\x02ca\nb\n)R]bK\x01K\x02s.",
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


def test_a_class_is_not_imported_to_be_read():
    for name in [name for name in sys.modules if name.partition(".")[0] == "wave"]:
        del sys.modules[name]
    assert pickles.loads(b"cwavelet.models\nModel\n)R.", source="x").kind == Global("wavelet.models", "Model")
    with pytest.raises(UserError, match=r"`wave\.open`"):
        pickles.loads(b"cwave\nopen\n)R.", source="x")
    assert "wave" not in sys.modules


def test_a_builtin_is_not_called():
    assert pickles.loads(b"\x80\x02c__builtin__\nlist\nK\x05\x85R.", source="x").args == (5,)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(plain)
def test_pythons_unpickler_reads_what_we_write(value):
    data = pickle_writer.dumps(value)
    assert pickle.loads(data) == value
    assert pickles.loads(data, source="x") == value


@pytest.mark.parametrize("value", [b"", b"a\x00\xff", {1, "a"}, set(), {"states": (b"\x80", [{2.5}])}], ids="abcde")
def test_bytes_and_sets_are_written_as_torchs_safe_loader_reads_them(value, tmp_path):
    assert pickle.loads(pickle_writer.dumps(value)) == value
    (tmp_path / "a.pt").write_bytes(object_archive(value))
    assert torch.load(tmp_path / "a.pt", weights_only=True) == value


def test_what_a_damaged_pickle_may_hold_is_not_written():
    itself, record = [], Record(Global("argparse", "Namespace"), made_by_call=False)
    itself.append(itself)
    record.state = {"a": record}
    for value in (itself, record, {"a": len}):
        for write in (pickle_writer.dumps, object_archive):
            with pytest.raises(UserError, match="what it was read from is damaged"):
                write(value)


def test_records_become_the_classes_they_name():
    namespace = Record(Global("argparse", "Namespace"), state={"a": 1}, made_by_call=False)
    assert pickle.loads(pickle_writer.dumps([namespace, Global("torch", "Size")((1, 2))])) == [
        argparse.Namespace(a=1),
        torch.Size([1, 2]),
    ]
