"""Meshes with a texture as files: binary glTF, OBJ with MTL, and USDZ for Apple's AR Quick Look.

Notable:
- All have y up. Colors hold the light of the photographs, so materials are unlit.
- USD has no unlit material; there, the texture is light that the surface emits, and nothing is reflected.
"""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from trimesh import Trimesh
from trimesh.exchange.gltf import export_glb
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from latentscenes.core.errors import UserError
from latentscenes.core.files import new_file, write_files, writing_to
from latentscenes.core.version import __version__
from latentscenes.export.mesh import UNLIT, y_up
from latentscenes.export.sheets import save_file
from latentscenes.export.texture import TexturedMesh

ENDINGS = (".glb", ".obj", ".usdz")
"""Endings of files that hold meshes with a texture."""


def write_textured(
    path: str | Path, mesh: TexturedMesh, name: str = "", tags: Mapping[str, Any] | None = None
) -> int:
    """Writes a mesh in the format of the file's ending. An OBJ file gets an MTL file and a PNG of the same
    name beside it.

    Args:
        name: name of the mesh; not in USDZ, whose names have fewer letters.
        tags: become `extras` of the node (glTF only).

    Returns:
        The size of all files, in bytes.

    Raises:
        UserError: the ending is another one, the extra `usd` is absent, or a file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending == ".glb":
        return save_file(path, _glb(mesh, name, tags))
    if ending == ".obj":
        return _write_obj(path, mesh)
    if ending == ".usdz":
        return _write_usdz(path, mesh)
    raise UserError(f"{path}: meshes with a texture are written as {', '.join(ENDINGS)}.")


def _png(texture: UInt8[np.ndarray, "t t 3"]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(texture).save(stream, "PNG")
    return stream.getvalue()


def _glb(mesh: TexturedMesh, name: str, tags: Mapping[str, Any] | None) -> bytes:
    def finish(tree: dict[str, Any]) -> None:
        (material,) = tree["materials"]
        material["pbrMetallicRoughness"] |= UNLIT["pbrMetallicRoughness"]
        material["extensions"] = UNLIT["extensions"]
        tree["extensionsUsed"] = list(UNLIT["extensions"])
        tree["meshes"][0]["name"] = name
        tree["asset"]["generator"] = f"latentscenes {__version__}"
        node = {"mesh": 0, "name": name} | ({"extras": dict(tags)} if tags else {})
        tree |= {"nodes": [node], "scenes": [{"nodes": [0]}], "scene": 0}

    image = Image.open(io.BytesIO(_png(mesh.texture)))
    looks = TextureVisuals(mesh.uv * [1, -1] + [0, 1], material=PBRMaterial(baseColorTexture=image))
    shape = Trimesh(
        y_up(mesh.vertices), mesh.faces, vertex_normals=y_up(mesh.normals), visual=looks, process=False
    )
    return export_glb(shape.scene(), include_normals=True, tree_postprocessor=finish)


def _write_obj(path: Path, mesh: TexturedMesh) -> int:
    """OBJ's texture coordinates begin at the lower left corner. Illumination model 0 is unlit."""
    material, picture = path.with_suffix(".mtl"), path.with_suffix(".png")
    lines = [f"# latentscenes {__version__}", f"mtllib {material.name}", "usemtl surface"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in y_up(mesh.vertices).tolist()]
    lines += [f"vt {u:.6f} {1 - v:.6f}" for u, v in mesh.uv.tolist()]
    lines += [f"vn {x:.4f} {y:.4f} {z:.4f}" for x, y, z in y_up(mesh.normals).tolist()]
    lines += [f"f {a}/{a}/{a} {b}/{b}/{b} {c}/{c}/{c}" for a, b, c in (mesh.faces + 1).tolist()]
    looks = ["newmtl surface", "Kd 1 1 1", "Ka 1 1 1", "illum 0", f"map_Kd {picture.name}"]
    texts = {material: "\n".join([*looks, ""]).encode(), path: "\n".join([*lines, ""]).encode()}
    return write_files({picture: _png(mesh.texture)} | texts)


def require_usd() -> None:
    """Raises a UserError if the package that writes USDZ is absent."""
    try:
        import pxr  # noqa: F401
    except ImportError:
        raise UserError("USDZ files need usd-core. Run: pip install latentscenes[usd]") from None


def _write_usdz(path: Path, mesh: TexturedMesh) -> int:
    require_usd()
    from pxr import UsdUtils

    with tempfile.TemporaryDirectory() as folder, writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / "texture.png").write_bytes(_png(mesh.texture))
        _usd_stage(Path(folder) / "object.usdc", mesh)
        packed = Path(folder) / "object.usdz"
        if not UsdUtils.CreateNewUsdzPackage(str(Path(folder) / "object.usdc"), str(packed)):
            raise UserError(f"{path}: usd-core could not pack the file. Update it, or write GLB.")
        with new_file(path) as partial:
            partial.write_bytes(packed.read_bytes())
    return path.stat().st_size


def _usd_stage(path: Path, mesh: TexturedMesh) -> None:
    """Writes the stage: one mesh, and a preview surface whose texture lies beside it as texture.png."""
    from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, Vt

    stage = Usd.Stage.CreateNew(str(path))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    stage.SetDefaultPrim(UsdGeom.Xform.Define(stage, "/Object").GetPrim())
    # The mesh
    shape = UsdGeom.Mesh.Define(stage, "/Object/Surface")
    vertices = y_up(mesh.vertices).astype(np.float32)
    shape.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(vertices))
    shape.CreateFaceVertexCountsAttr(Vt.IntArray(len(mesh.faces), 3))
    shape.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(mesh.faces.astype(np.int32).ravel()))
    shape.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(y_up(mesh.normals).astype(np.float32)))
    shape.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    shape.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    shape.CreateExtentAttr([Gf.Vec3f(*map(float, end)) for end in (vertices.min(0), vertices.max(0))])
    places = UsdGeom.PrimvarsAPI(shape).CreatePrimvar(
        "st", Sdf.ValueTypeNames.TexCoord2fArray, UsdGeom.Tokens.vertex
    )
    places.Set(Vt.Vec2fArray.FromNumpy(mesh.uv * np.float32([1, -1]) + np.float32([0, 1])))
    # The material: coordinates read the texture, the surface shows it unlit
    material = UsdShade.Material.Define(stage, "/Object/Material")
    coordinates = UsdShade.Shader.Define(stage, "/Object/Material/Coordinates")
    coordinates.CreateIdAttr("UsdPrimvarReader_float2")
    coordinates.CreateInput("varname", Sdf.ValueTypeNames.String).Set("st")
    texture = UsdShade.Shader.Define(stage, "/Object/Material/Texture")
    texture.CreateIdAttr("UsdUVTexture")
    texture.CreateInput("file", Sdf.ValueTypeNames.Asset).Set(Sdf.AssetPath("texture.png"))
    texture.CreateInput("sourceColorSpace", Sdf.ValueTypeNames.Token).Set("sRGB")
    texture.CreateInput("st", Sdf.ValueTypeNames.Float2).ConnectToSource(
        coordinates.CreateOutput("result", Sdf.ValueTypeNames.Float2)
    )
    surface = UsdShade.Shader.Define(stage, "/Object/Material/Surface")
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("diffuseColor", Sdf.ValueTypeNames.Color3f).Set(Gf.Vec3f(0.0))
    surface.CreateInput("roughness", Sdf.ValueTypeNames.Float).Set(1.0)
    surface.CreateInput("emissiveColor", Sdf.ValueTypeNames.Color3f).ConnectToSource(
        texture.CreateOutput("rgb", Sdf.ValueTypeNames.Float3)
    )
    material.CreateSurfaceOutput().ConnectToSource(surface.CreateOutput("surface", Sdf.ValueTypeNames.Token))
    UsdShade.MaterialBindingAPI.Apply(shape.GetPrim()).Bind(material)
    stage.Save()
