"""Archives as Python's zipfile sees them: the oracle of what is read of them."""

from __future__ import annotations

import io
import struct
import zipfile


def zipped(data: bytes) -> list[bytes] | None:
    """The data records of an archive, where Python's zipfile finds them; None where it cannot say."""
    records: list[bytes] = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if len(set(archive.namelist())) != len(archive.namelist()) or archive.start_dir + 46 * len(archive.namelist()) > len(
                data
            ):
                return None
            end = struct.unpack_from("<I", data, data.rindex(b"PK\5\6") + 16)[0]
            if archive.start_dir != end:
                return None  # zipfile forgives what stands before an archive
            for info in archive.infolist():
                if data[info.header_offset : info.header_offset + 4] != b"PK\3\4":
                    return None
                name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
                start = info.header_offset + 30 + name + extra
                records.append(data[start : start + info.file_size])
    except Exception:
        return None
    return records
