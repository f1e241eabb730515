"""The bytes of glTF files: containers, buffers, and accessors as numpy arrays.

Honors section 3.6 of the glTF 2.0 specification: strides, normalized integers, sparse accessors, accessors
without data. Compressed buffers (EXT_meshopt_compression) need the extra `meshes`. All sizes are checked
against the file before anything is allocated.
"""

import base64
import json
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from latentscenes.core.errors import UserError
from latentscenes.core.names import short
from latentscenes.core.reading import MOST_MESH, read_bytes, reason
from latentscenes.data.meshes.surfaces import MOST_REPEATED

TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
SHAPES = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
MOST_VALUES = 1 << 28
"""Numbers in one accessor; a larger count is refused before it is allocated."""
ONLY_2 = "only version 2 is read. Convert it, such as by gltf-pipeline"
EXTRA = 'pip install "latentscenes[meshes]"'


class GltfFile:
    """An opened GLB or glTF file: its JSON, and its accessors as arrays."""

    def __init__(self, path: Path):
        self.path = path
        content = read_bytes(path, MOST_MESH)
        self.bytes = len(content)
        """Of the file and those it names, as far as they were read."""
        if content[:4] == b"glTF":
            text, self._binary = self._split(content)
        else:
            text, self._binary = content, None
        try:
            self.json: dict[str, Any] = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise self.error(f"holds no valid JSON ({reason(error)})") from None
        if not isinstance(self.json, dict) or not isinstance(self.json.get("asset"), dict):
            raise self.error("is no glTF: `asset` is absent")
        if str(self.json["asset"].get("version", "2")).split(".")[0] != "2":
            raise self.error(f"is glTF {short(self.json['asset']['version'])}; {ONLY_2}")
        self._buffers: dict[int, bytes] = {}
        self._views: dict[int, bytes] = {}

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.path}: {reason}.")

    def _split(self, content: bytes) -> tuple[bytes, bytes | None]:
        """The JSON and the binary chunk of a GLB file."""
        if len(content) < 20:
            raise self.error("is cut short")
        version, length = struct.unpack_from("<II", content, 4)
        if version != 2:
            raise self.error(f"is binary glTF of version {version}; {ONLY_2}")
        if length > len(content):
            raise self.error(f"is cut short: {len(content)} of {length} bytes are there")
        chunks, place = {}, 12
        while place + 8 <= length:
            size, kind = struct.unpack_from("<I4s", content, place)
            if place + 8 + size > length:
                raise self.error("is damaged: a chunk reaches beyond its end")
            chunks.setdefault(kind, content[place + 8 : place + 8 + size])
            place += 8 + size
        if b"JSON" not in chunks:
            raise self.error("is damaged: it holds no JSON chunk")
        return chunks[b"JSON"], chunks.get(b"BIN\0")

    def item(self, kind: str, index: Any) -> dict[str, Any]:
        """The entry `index` of one of the JSON's lists."""
        entries = self.json.get(kind, [])
        if not isinstance(index, int) or not isinstance(entries, list) or not 0 <= index < len(entries):
            raise self.error(f"names {kind}[{index}], which is not there")
        return entries[index]

    def uri(self, uri: str) -> bytes:
        """The bytes that a URI names: inside the file (data:) or in a file beside it."""
        if uri.startswith("data:"):
            head, _, data = uri.partition(",")
            return base64.b64decode(data) if head.endswith(";base64") else unquote_to_bytes(data)
        name = unquote(uri).replace("\\", "/")
        if ":" in name or name.startswith("/"):
            raise self.error(f"names {uri!r}, which is no file beside it")
        try:
            content = read_bytes(self.path.parent / name, MOST_MESH)
        except (OSError, ValueError) as error:
            raise self.error(f"needs {short(name)}, which cannot be read ({reason(error)})") from None
        self.bytes += len(content)
        return content

    def buffer(self, index: int) -> bytes:
        if index not in self._buffers:
            entry = self.item("buffers", index)
            if "uri" in entry:
                found = self.uri(entry["uri"])
            elif index == 0 and self._binary is not None:
                found = self._binary
            else:
                raise self.error(f"buffers[{index}] has no data")
            if len(found) < entry.get("byteLength", 0):
                raise self.error(
                    f"is cut short: buffers[{index}] has {len(found)} of {entry['byteLength']} bytes"
                )
            self._buffers[index] = found
        return self._buffers[index]

    def view(self, index: int) -> bytes:
        """The bytes of a buffer view, decompressed."""
        if index not in self._views:
            entry = self.item("bufferViews", index)
            packed = next(
                (entry["extensions"][name] for name in MESHOPT if name in entry.get("extensions", {})), None
            )
            self._views[index] = self._slice(packed or entry, index)
            if packed:
                self._views[index] = self._unpack(packed, self._views[index])
        return self._views[index]

    def _slice(self, entry: dict[str, Any], index: int) -> bytes:
        start, size = entry.get("byteOffset", 0), entry.get("byteLength", 0)
        found = self.buffer(entry.get("buffer"))[start : start + size]
        if len(found) < size:
            raise self.error(f"bufferViews[{index}] reaches beyond its buffer")
        return found

    def _unpack(self, packed: dict[str, Any], data: bytes) -> bytes:
        """Decompresses EXT_meshopt_compression."""
        try:
            import meshoptimizer as codec
        except ImportError:
            raise self.error(f"is compressed by meshopt; to read it, run: {EXTRA}") from None
        count, stride, mode = packed["count"], packed["byteStride"], packed["mode"]
        if count * stride > 4 * MOST_VALUES:
            raise self.error("holds more numbers than can be read")
        try:
            if mode == "ATTRIBUTES":
                return self._attributes(codec, packed, data)
            decode = codec.decode_index_buffer if mode == "TRIANGLES" else codec.decode_index_sequence
            found = decode(count, 4, data)  # the package's array has 4 bytes a number, whatever is asked for
            return np.asarray(found).astype({2: "<u2", 4: "<u4"}[stride]).tobytes()
        except (RuntimeError, ValueError) as error:
            raise self.error(f"its meshopt data cannot be read ({error})") from None

    @staticmethod
    def _attributes(codec: Any, packed: dict[str, Any], data: bytes) -> bytes:
        """Decompresses vertex attributes, and undoes their filter."""
        count, stride = packed["count"], packed["byteStride"]
        found = codec.decode_vertex_buffer(count, stride, data, np.dtype(f"V{stride}"))
        filters = {
            "OCTAHEDRAL": codec.decode_filter_oct,
            "QUATERNION": codec.decode_filter_quat,
            "EXPONENTIAL": codec.decode_filter_exp,
        }
        if (name := packed.get("filter", "NONE")) in filters:
            found = filters[name](np.ascontiguousarray(found), count, stride)
        return np.ascontiguousarray(found).tobytes()

    def accessor(self, index: Any) -> np.ndarray:
        """An accessor's values (count, components): float64 where they are floats or normalized, else
        int64."""
        entry = self.item("accessors", index)
        count, kind = entry.get("count", 0), entry.get("type")
        dtype = TYPES.get(entry.get("componentType"))
        if dtype is None or kind not in SHAPES or not isinstance(count, int) or count < 0:
            raise self.error(f"accessors[{index}] is of no known type")
        if count * SHAPES[kind] > min(MOST_VALUES, 4 * MOST_REPEATED + self.bytes):
            raise self.error(f"accessors[{index}] holds more numbers than can be read")
        values = np.zeros((count, SHAPES[kind]), dtype)
        if "bufferView" in entry:
            stride = self.item("bufferViews", entry["bufferView"]).get("byteStride")
            values = self._values(entry, count, kind, dtype, stride, f"accessors[{index}]")
        if sparse := entry.get("sparse"):
            values = values.copy()
            number = sparse["count"]
            rows = self._values(
                sparse["indices"],
                number,
                "SCALAR",
                TYPES[sparse["indices"]["componentType"]],
                None,
                "sparse indices",
            )[:, 0]
            if number and rows.max() >= count:
                raise self.error(f"accessors[{index}]: its sparse indices reach beyond it")
            values[rows] = self._values(sparse["values"], number, kind, dtype, None, "sparse values")
        return self._numbers(values, bool(entry.get("normalized")))

    def _values(
        self, entry: dict[str, Any], count: int, kind: str, dtype: str, stride: int | None, where: str
    ) -> np.ndarray:
        """`count` rows of a buffer view."""
        data, start = self.view(entry["bufferView"]), entry.get("byteOffset", 0)
        size = np.dtype(dtype).itemsize
        rows = (
            size if kind in ("MAT2", "MAT3") and size < 4 else 0
        )  # columns of small matrices are padded to 4 bytes
        width = {"MAT2": 8, "MAT3": 12 if size == 1 else 24}[kind] if rows else SHAPES[kind] * size
        step = stride or width
        if type(step) is not int or step < width:
            raise self.error(f"{where}: a stride of {short(step)} bytes is less than its {width}")
        if count and start + (count - 1) * step + width > len(data):
            raise self.error(f"{where}: reaches beyond its buffer view")
        if not count:
            return np.zeros((0, SHAPES[kind]), dtype)
        raw = np.frombuffer(data, np.uint8, (count - 1) * step + width, start)
        table = np.lib.stride_tricks.as_strided(raw, (count, width), (step, 1))
        values = np.ascontiguousarray(table).view(dtype)
        if rows:
            side = 2 if kind == "MAT2" else 3
            values = values.reshape(count, side, -1)[:, :, :side].reshape(count, -1)
        return values

    @staticmethod
    def _numbers(values: np.ndarray, normalized: bool) -> np.ndarray:
        if values.dtype.kind == "f":
            return values.astype(np.float64)
        if not normalized:
            return values.astype(np.int64)
        return np.maximum(values / np.iinfo(values.dtype).max, -1.0)
