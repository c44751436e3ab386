"""Every command works where a process may open fewer files than a checkpoint has."""

from __future__ import annotations

import resource
import subprocess
import sys

from tests.models import model_tree, tree

MOST = 40

CHILD = """
import resource, sys
import formats.outputs
from pathlib import Path
from converter import check, hf_to_mcore, inspect, mcore_to_hf, verify
from converter.adapters.merge import merge

formats.outputs.BYPASS_FROM = 4096  # so that small tensors have a descriptor for direct I/O, too
before = resource.getrlimit(resource.RLIMIT_NOFILE)
base, adapter, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
hf_to_mcore(base, place / "m", tp=8, pp=4, verify=True)
mcore_to_hf(place / "m", place / "back", max_shard_size=20_000, verify=True)
assert check(place / "m").whole and check(place / "back").whole
assert verify(base, place / "m").same and verify(place / "m", place / "back").same
assert inspect(place / "m").files == inspect(place / "m", tensors=True).files
merge(place / "m", adapter, place / "merged", tp=8, pp=4)
merge(place / "merged", adapter, place / "twice", to="hf", max_shard_size=20_000, allow_other_base=True)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
"""


def test_every_command_works_with_fewer_descriptors_than_files(base, peft_folder, tmp_path):
    from converter import hf_to_mcore, mcore_to_hf

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))

    command = [sys.executable, "-c", CHILD, base, peft_folder(), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 0, done.stderr
    hf_to_mcore(base, tmp_path / "free" / "m", tp=8, pp=4)
    mcore_to_hf(tmp_path / "m", tmp_path / "free" / "back")
    assert len(list((tmp_path / "m" / "iter_0000000").glob("*.distcp"))) == 32
    assert tree(tmp_path / "free" / "m") == tree(tmp_path / "m")
    assert model_tree(tmp_path / "free" / "back") == model_tree(base)
