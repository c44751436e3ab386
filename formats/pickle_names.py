"""Classify names in a checkpoint's pickles: known classes, and names that could run code.

Nothing that a pickle names is ever imported or called, so safety does not depend on these lists. They distinguish a checkpoint of
a fork of Megatron-LM from one that was tampered with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

_CHECKPOINT = "torch.distributed.checkpoint"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OF_TORCH_AND_MEGATRON: Mapping[str, frozenset[str]] = {
    f"{_CHECKPOINT}.metadata": _words(
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex"
        " StorageMeta _MEM_FORMAT_ENCODING"
    ),
    f"{_CHECKPOINT}.filesystem": frozenset(["_StorageInfo", "_StoragePrefix", "_StorageWriterTransforms"]),
    f"{_CHECKPOINT}.planner": _words(
        "SavePlan LoadPlan WriteItem ReadItem WriteItemType LoadItemType TensorWriteData BytesIOWriteData"
    ),
    f"{_CHECKPOINT}._extension": frozenset(["ZStandard"]),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset(["MCoreMetadata", "MCoreSavePlan", "MCoreSavePlanner"]),
    "torch": _words(
        "Size Tensor device bfloat16 float16 float32 float64 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 uint8 bool"
        " uint16 uint32 uint64 complex64 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
        " BFloat16Storage HalfStorage FloatStorage DoubleStorage CharStorage ShortStorage IntStorage LongStorage"
        " ByteStorage BoolStorage Float8_e4m3fnStorage Float8_e5m2Storage"
    ),
    "torch._C": frozenset(["Generator"]),
    "torch.serialization": frozenset(["_get_layout"]),
    "torch.storage": frozenset(["UntypedStorage", "_load_from_bytes"]),
    "torch._utils": frozenset(["_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"]),
    "torch._tensor": frozenset(["_rebuild_from_type_v2"]),
    "numpy": frozenset(["ndarray", "dtype"]),
    "numpy.dtypes": frozenset(["UInt32DType"]),
    "numpy.core.multiarray": frozenset(["_reconstruct", "scalar"]),
    "numpy._core.multiarray": frozenset(["_reconstruct", "scalar"]),
    "megatron.core.enums": frozenset(["ModelType"]),
    "megatron.core.optimizer.optimizer_config": frozenset(["OptimizerConfig"]),
    "megatron.core.optimizer": frozenset(["OptimizerConfig"]),
    "megatron.core.rerun_state_machine": frozenset(["RerunDiagnostic", "RerunMode", "RerunState"]),
    "megatron.core.transformer.enums": frozenset(["AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope"]),
    "transformer_engine.common.recipe": _words(
        "DelayedScaling Float8CurrentScaling Float8BlockScaling MXFP8BlockScaling NVFP4BlockScaling Format"
        " _FormatHelper MMParams QParams"
    ),
    "megatron.core.extensions.transformer_engine": frozenset(["TEDelayedScaling"]),
}
"""The classes that `.metadata` holds (planner classes too) and that `megatron.core.safe_globals` lists."""

_DATA_OF_PYTHON: Mapping[str, frozenset[str]] = {
    "argparse": frozenset(["Namespace"]),
    "types": frozenset(["SimpleNamespace"]),
    "pathlib": frozenset(["Path", "PosixPath", "PurePosixPath"]),
    "pathlib._local": frozenset(["Path", "PosixPath", "PurePosixPath"]),
    "signal": frozenset(["Signals"]),
    "_io": frozenset(["BytesIO"]),
    "io": frozenset(["BytesIO"]),
    "_codecs": frozenset(["encode"]),
    "collections": frozenset(["Counter", "defaultdict", "deque"]),
    "datetime": frozenset(["date", "datetime", "time", "timedelta", "timezone"]),
    "decimal": frozenset(["Decimal"]),
    "fractions": frozenset(["Fraction"]),
    "uuid": frozenset(["SafeUUID", "UUID"]),
    "builtins": _words("bool complex dict float int list object str tuple"),
    "__builtin__": _words("bool complex dict float list long object tuple unicode"),  # as Python 2, so protocol 2, calls them
}
"""Classes of the standard library that hold data. All its other names are refused."""

_OF_PYTHON = sys.stdlib_module_names | _words(
    "__builtin__ asynchat asyncore cPickle cgi commands copy_reg crypt dl distutils exceptions imp new nis pipes popen2"
    " smtpd telnetlib"
)
"""Modules of the standard library, including earlier versions."""


def may_run(module: str, name: str) -> bool:
    """Return whether a name could run code. True for names of the standard library, directly or as another module's attribute,
    and for special methods."""
    if name in _DATA_OF_PYTHON.get(module, ()):
        return False
    *owners, _ = parts = name.split(".")
    return (
        module.partition(".")[0] in _OF_PYTHON
        or any(owner in _OF_PYTHON for owner in owners)
        or any(part.startswith("__") for part in parts)
    )


def is_known(module: str, name: str) -> bool:
    """Return whether torch and megatron-core save this name, or it is a data class of Python."""
    return any(name in names.get(module, ()) for names in (_OF_TORCH_AND_MEGATRON, _DATA_OF_PYTHON))
