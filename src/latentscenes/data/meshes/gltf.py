"""glTF 2.0: every triangle of the default scene at its place, with its material.

Honored: node transforms, skins and morph targets at rest, instancing; normals (flat where there are none),
vertex colors, any texture coordinate set, texture transforms, wrapping, alpha modes, emission, unlit and
specular-glossiness materials, transmission as transparency; WebP and AVIF textures; Draco and meshopt
compression with the extra `meshes`. Left out, with a remark: highlights and relief (metal, roughness, normal
maps), emission textures, lines and points. An unknown required extension is refused. Source: the glTF 2.0
specification and its extension registry.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latentscenes.core.errors import UserError
from latentscenes.core.reading import reason
from latentscenes.data.meshes.gltf_buffers import EXTRA, MESHOPT, TYPES, GltfFile
from latentscenes.data.meshes.surfaces import DAMAGE, MOST_REPEATED, Material, Remarks, Surface, read_texture
from latentscenes.data.raycast import BLEND, BLEND_BOTH, OPAQUE

DRACO = "KHR_draco_mesh_compression"
KNOWN = {
    "KHR_texture_transform", "KHR_mesh_quantization", "KHR_materials_unlit", "KHR_materials_transmission",
    "KHR_materials_pbrSpecularGlossiness", "KHR_materials_emissive_strength", "EXT_texture_webp",
    "EXT_texture_avif", "EXT_mesh_gpu_instancing", "KHR_node_visibility", "KHR_materials_variants",
    "KHR_lights_punctual", "KHR_materials_clearcoat", "KHR_materials_sheen", "KHR_materials_ior",
    "KHR_materials_specular", "KHR_materials_volume", "KHR_materials_iridescence", "KHR_animation_pointer",
    "KHR_materials_anisotropy", "KHR_materials_dispersion", "KHR_xmp_json_ld", DRACO, *MESHOPT,
}  # fmt: skip
"""Extensions that are honored, or that change only highlights."""
WRAPS = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
MOST_INSTANCES = 100_000
"""Copies of a mesh by EXT_mesh_gpu_instancing."""
DEEPEST = 200
"""Levels of nodes; a deeper tree is taken for a circle."""


def read_gltf(path: Path, remarks: Remarks) -> list[Surface]:
    """Reads a .glb or .gltf file; y is up.

    Raises:
        UserError: the file is damaged, or needs something that cannot be read.
    """
    file = GltfFile(path)
    try:
        _refuse_unknown(file)
        found, count = [], 0
        for surface in _Reader(file, remarks).surfaces():
            found.append(surface)
            if (count := count + len(surface.corners)) > MOST_REPEATED + file.bytes:
                raise file.error(f"repeats its meshes to more than {count} triangles")
        return found
    except UserError:
        raise
    except DAMAGE as error:
        raise file.error(f"is damaged: {type(error).__name__} {reason(error)}") from None


def _refuse_unknown(file: GltfFile) -> None:
    needed = set(file.json.get("extensionsRequired", ())) - KNOWN
    if "KHR_texture_basisu" in needed:
        raise file.error(
            "needs textures in KTX2, which cannot be read. Export it with PNG, JPEG or WebP textures"
        )
    if needed:
        names = ", ".join(sorted(map(str, needed)))[:200]
        raise file.error(f"needs {names}, which cannot be read. Export it without")


class _Reader:
    def __init__(self, file: GltfFile, remarks: Remarks):
        self.file, self.remarks = file, remarks
        self._materials: dict[int | None, tuple[Material, dict[str, Any]]] = {}
        self._global: dict[int, Float[np.ndarray, "4 4"]] = {}

    # Nodes

    def surfaces(self) -> Iterator[Surface]:
        scenes = self.file.json.get("scenes") or []
        nodes = self.file.json.get("nodes") or []
        if scenes:
            roots = self.file.item("scenes", self.file.json.get("scene", 0)).get("nodes", [])
        else:
            children = {child for node in nodes for child in node.get("children", [])}
            roots = [place for place in range(len(nodes)) if place not in children]
        order = [found for root in roots for found in self._walk(root, np.eye(4), 0)]
        for place, node in order:
            if "mesh" in node:
                yield from self._placed(node, self._global[place])

    def _walk(
        self, place: int, parent: Float[np.ndarray, "4 4"], depth: int, shown: bool = True
    ) -> Iterator[tuple[int, dict]]:
        """All visible nodes from one on, with their global transforms noted. An invisible node hides those
        below it."""
        if depth > DEEPEST or place in self._global:
            raise self.file.error(f"nodes[{place}] comes twice in the tree of nodes")
        node = self.file.item("nodes", place)
        self._global[place] = parent @ _local(node)
        shown &= node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible", True)
        if shown:
            yield place, node
        for child in node.get("children", []):
            yield from self._walk(child, self._global[place], depth + 1, shown)

    def _placed(self, node: dict[str, Any], matrix: Float[np.ndarray, "4 4"]) -> Iterator[Surface]:
        """The surfaces of a node's mesh in the world, as often as it is instanced."""
        mesh = self.file.item("meshes", node["mesh"])
        weights = node.get("weights") or mesh.get("weights") or []
        joints = self._joints(node["skin"]) if "skin" in node else None
        instances = node.get("extensions", {}).get("EXT_mesh_gpu_instancing", {}).get("attributes")
        matrices = [matrix @ one for one in self._instances(instances)] if instances else [matrix]
        for primitive in mesh.get("primitives", []):
            if primitive.get("mode", 4) not in (4, 5, 6):
                self.remarks.add("points or lines are left out")
                continue
            for place in matrices:
                yield self._surface(primitive, place, weights, joints)

    def _instances(self, attributes: dict[str, int]) -> list[Float[np.ndarray, "4 4"]]:
        found = {name: self.file.accessor(index) for name, index in attributes.items()}
        count = len(next(iter(found.values())))
        if count > MOST_INSTANCES:
            raise self.file.error(f"repeats a mesh {count} times; {MOST_INSTANCES} are the most")
        rows = [
            {name.lower(): values[row].tolist() for name, values in found.items()} for row in range(count)
        ]
        return [_local(row) for row in rows]

    def _joints(self, index: int) -> Float[np.ndarray, "j 4 4"]:
        """The transform of a vertex by each joint of a skin: its place in the world times its inverse bind
        matrix."""
        skin = self.file.item("skins", index)
        places = []
        for joint in skin["joints"]:
            if joint not in self._global:
                raise self.file.error(f"skins[{index}]: its joint nodes[{joint}] is not in the scene")
            places.append(self._global[joint])
        if "inverseBindMatrices" not in skin:
            return np.array(places)
        inverse = self.file.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
        return np.array(places) @ inverse[: len(places)]

    # Geometry

    def _surface(
        self,
        primitive: dict[str, Any],
        matrix: Float[np.ndarray, "4 4"],
        weights: list[float],
        joints: Float[np.ndarray, "j 4 4"] | None,
    ) -> Surface:
        arrays, indices = self._arrays(primitive)
        points = arrays.get("POSITION")
        if points is None or points.shape[1] != 3:
            raise self.file.error("a primitive has no positions of three numbers")
        normals = arrays.get("NORMAL")
        # Morph targets
        for weight, target in zip(weights, primitive.get("targets", []), strict=False):
            points = (
                points + weight * self.file.accessor(target["POSITION"]) if "POSITION" in target else points
            )
            if normals is not None and "NORMAL" in target:
                normals = normals + weight * self.file.accessor(target["NORMAL"])
        # Skin, or the place of the node
        if joints is not None and "JOINTS_0" in arrays:
            matrices = self._blended(arrays, joints)
            points = (matrices[:, :3, :3] @ points[..., None])[..., 0] + matrices[:, :3, 3]
            normals = None if normals is None else (_turn(matrices) @ normals[..., None])[..., 0]
        else:
            points = points @ matrix[:3, :3].T + matrix[:3, 3]
            normals = None if normals is None else normals @ _turn(matrix[None])[0].T
        # Triangles
        faces = _triangles(np.arange(len(points)) if indices is None else indices, primitive.get("mode", 4))
        if len(faces) and (faces.min() < 0 or faces.max() >= len(points)):
            raise self.file.error("indices reach beyond the vertices")
        # Colors
        material, texture = self._material(primitive.get("material"))
        uv = self._uv(arrays, texture)
        colors = arrays.get("COLOR_0")
        if colors is not None:
            alpha = colors[:, 3:] if colors.shape[1] == 4 else np.ones((len(colors), 1))
            colors = np.clip(np.concatenate([colors[:, :3], alpha], 1), 0, 1)
        return Surface(
            points[faces],
            material,
            None if normals is None else normals[faces],
            None if uv is None else uv[faces],
            None if colors is None else colors[faces],
        )

    def _arrays(self, primitive: dict[str, Any]) -> tuple[dict[str, np.ndarray], Int[np.ndarray, "n"] | None]:
        """Attributes by name, all of one length, and indices."""
        packed = primitive.get("extensions", {}).get(DRACO)
        arrays, indices = self._draco(primitive, packed) if packed else ({}, None)
        for name, index in primitive["attributes"].items():
            if name not in arrays:
                arrays[name] = self.file.accessor(index)
        if indices is None and "indices" in primitive:
            indices = self.file.accessor(primitive["indices"])[:, 0]
        if len({len(values) for values in arrays.values()}) > 1:
            raise self.file.error("attributes of one primitive differ in length")
        return arrays, indices

    def _draco(
        self, primitive: dict[str, Any], packed: dict[str, Any]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        try:
            import DracoPy
        except ImportError:
            raise self.file.error(f"is compressed by Draco; to read it, run: {EXTRA}") from None
        try:
            mesh = DracoPy.decode(self.file.view(packed["bufferView"]))
        except Exception as error:  # the decoder raises kinds of its own
            raise self.file.error(f"its Draco data cannot be read ({error})") from None
        by_id = {entry["unique_id"]: entry["data"] for entry in mesh.attributes}
        arrays = {}
        for name, number in packed["attributes"].items():
            entry = self.file.item("accessors", primitive["attributes"][name])
            # the decoder widens some integers, so what 1.0 is follows from the file's own type
            values = np.asarray(by_id[number]).astype(TYPES[entry["componentType"]])
            arrays[name] = GltfFile._numbers(values.reshape(len(values), -1), bool(entry.get("normalized")))
        return arrays, np.asarray(mesh.faces, np.int64).reshape(-1)

    def _blended(self, arrays: dict[str, np.ndarray], joints: Float[np.ndarray, "j 4 4"]) -> np.ndarray:
        """Each vertex' matrix, weighted over its joints."""
        total, share = np.zeros((len(arrays["POSITION"]), 4, 4)), 0.0
        for number in range(4):
            if f"JOINTS_{number}" in arrays:
                index, weights = arrays[f"JOINTS_{number}"], arrays[f"WEIGHTS_{number}"]
                if index.max(initial=0) >= len(joints):
                    raise self.file.error("a vertex names a joint that its skin lacks")
                total += (weights[..., None, None] * joints[index]).sum(1)
                share = share + weights.sum(1)
        return total / np.maximum(share, 1e-12)[:, None, None]

    def _uv(self, arrays: dict[str, np.ndarray], texture: dict[str, Any]) -> Float[np.ndarray, "p 2"] | None:
        """Texture coordinates of the set that the texture names, transformed; v upward."""
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        uv = arrays.get(f"TEXCOORD_{transform.get('texCoord', texture.get('texCoord', 0))}")
        if uv is None:
            return None
        if transform:
            angle, scale = transform.get("rotation", 0.0), np.array(transform.get("scale", (1.0, 1.0)))
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            uv = (uv * scale) @ turn.T + np.array(transform.get("offset", (0.0, 0.0)))
        return np.stack([uv[:, 0], 1 - uv[:, 1]], 1)

    # Materials

    def _material(self, index: int | None) -> tuple[Material, dict[str, Any]]:
        """A material, and what names its texture."""
        if index not in self._materials:
            entry = {} if index is None else self.file.item("materials", index)
            self._materials[index] = self._new_material(entry)
        return self._materials[index]

    def _new_material(self, entry: dict[str, Any]) -> tuple[Material, dict[str, Any]]:
        extensions, rough = entry.get("extensions", {}), entry.get("pbrMetallicRoughness", {})
        glossy = extensions.get("KHR_materials_pbrSpecularGlossiness")
        base, key = (glossy, "diffuse") if glossy else (rough, "baseColor")
        texture = base.get(f"{key}Texture") or {}
        *color, alpha = map(float, base.get(f"{key}Factor", (1.0, 1.0, 1.0, 1.0)))
        passes = extensions.get("KHR_materials_transmission", {}).get("transmissionFactor", 0.0)
        mode, blend = entry.get("alphaMode", "OPAQUE"), BLEND_BOTH if entry.get("doubleSided") else BLEND
        cutoff = {"MASK": float(entry.get("alphaCutoff", 0.5)), "BLEND": blend}.get(mode, OPAQUE)
        if passes:
            alpha, cutoff = (1 if cutoff == OPAQUE else alpha) * (1 - passes), blend
        strength = extensions.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1.0)
        emission = tuple(float(strength * value) for value in entry.get("emissiveFactor", (0.0, 0.0, 0.0)))
        if "emissiveTexture" in entry and any(emission):
            self.remarks.add("an emission texture is left out")
            emission = (0.0, 0.0, 0.0)
        if (
            any(name in entry for name in ("normalTexture", "occlusionTexture"))
            or "metallicRoughnessTexture" in rough
        ):
            self.remarks.add(
                "relief and highlights (normal, occlusion, metal or roughness maps) are left out"
            )
        picture, wrap = self._texture(texture)
        unlit = "KHR_materials_unlit" in extensions
        return Material((*color, alpha), picture, wrap, cutoff, emission, not unlit), texture

    def _texture(self, info: dict[str, Any]) -> tuple[np.ndarray | None, tuple[str, str]]:
        if "index" not in info:
            return None, ("repeat", "repeat")
        texture = self.file.item("textures", info["index"])
        sampler = self.file.item("samplers", texture["sampler"]) if "sampler" in texture else {}
        wrap = WRAPS[sampler.get("wrapS", 10497)], WRAPS[sampler.get("wrapT", 10497)]
        better = [
            texture["extensions"][name]["source"]
            for name in ("EXT_texture_webp", "EXT_texture_avif")
            if name in texture.get("extensions", {})
        ]
        sources = [*better, *([texture["source"]] if "source" in texture else [])]
        if not sources:
            self.remarks.add("a texture in KTX2 cannot be read; its surface is plain")
        for source in sources:
            image = self.file.item("images", source)
            data = (
                self.file.view(image["bufferView"]) if "bufferView" in image else self.file.uri(image["uri"])
            )
            try:
                return read_texture(io.BytesIO(data), f"images[{source}]"), wrap
            except UserError as error:
                self.remarks.add(str(error))
        return None, wrap


def _local(node: dict[str, Any]) -> Float[np.ndarray, "4 4"]:
    """A node's transform: a matrix (by columns), or translation, rotation (quaternion xyzw) and scale."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), np.float64)
    turn = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    matrix = np.eye(4)
    matrix[:3, :3] = turn * np.array(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _turn(matrices: Float[np.ndarray, "n 4 4"]) -> Float[np.ndarray, "n 3 3"]:
    """The effect of transforms on normals: the cofactor matrix, which is the inverse transpose up to a
    positive factor."""
    a, b, c = matrices[:, 0, :3], matrices[:, 1, :3], matrices[:, 2, :3]
    cofactors = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], 1)
    return cofactors * np.sign(np.linalg.det(matrices[:, :3, :3]))[:, None, None]


def _triangles(indices: Int[np.ndarray, "n"], mode: int) -> Int[np.ndarray, "f 3"]:
    """Triangles from a list (mode 4), a strip (5) or a fan (6)."""
    if mode == 4:
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    count = max(len(indices) - 2, 0)
    k = np.arange(count)
    if mode == 6:
        return np.stack([indices[np.zeros(count, int)], indices[k + 1], indices[k + 2]], 1)
    odd = k % 2
    return np.stack([indices[k], indices[k + 1 + odd], indices[k + 2 - odd]], 1)
