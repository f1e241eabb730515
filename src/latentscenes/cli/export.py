"""The command `render` and the `export` commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from latentscenes.cli.common import FLAT, MACHINE, MachineOptions, require_folder, say, set_up
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, tagged

if TYPE_CHECKING:
    import torch

    from latentscenes.storage.scene_set import StoredScenes


@dataclass(frozen=True)
class Choice:
    """Which scenes."""

    scenes: tuple[str, ...] = ()
    """Names of scenes."""
    match: str | None = None
    """Pattern of names; * and ? stand for any letters."""
    where: tuple[str, ...] = ()
    """Conditions on tags, such as category=chair*."""


CHOICE = Choice()
ChoiceOptions = Annotated[Choice, FLAT]


def render(
    run: Path,
    scene: str,
    out: Path,
    frames: int = 60,
    size: int | None = None,
    mode: Literal["rgb", "colors", "depth", "opacity", "latent", "dashboard"] = "rgb",
    elevation: float = 25.0,
    path: Path | None = None,
    fps: float | None = None,
    background: Literal["white", "black", "transparent"] = "white",
    machine: MachineOptions = MACHINE,
) -> None:
    """Render an orbit around a learned scene, or a film along a nerfstudio camera path.

    Args:
        run: Library, or run folder of train.
        scene: Name of the scene.
        out: .mp4 (needs the export extra), .gif, .png (all frames in one picture, in rows), or no ending for
            a folder of PNG files.
        frames: Number of cameras around the object.
        size: Pixels along the wider side; unset: as in the data, or as in the camera path.
        mode: The quantity to show; `dashboard` puts image, latent channels, depth and opacity side by side.
            `colors`, for models with our codec: the colors among the latents, rendered at every pixel and not
            decoded.
        elevation: Elevation of the cameras in degrees.
        path: Nerfstudio camera path (JSON), used instead of an orbit.
        fps: Frames per second; unset: as in the camera path, 20 for an orbit.
        background: What lies behind the object, in mode `rgb`; over black and transparent, haze is removed.
    """
    require_folder(run)
    from latentscenes.core.console import tracked
    from latentscenes.export.video import camera_frames, check_elevation, check_film, save_frames, scaled

    check_film(out, background)
    if background != "white" and mode not in ("rgb", "colors"):
        raise UserError(f"--background {background}: only with --mode rgb or colors.")
    check_elevation("--elevation", elevation)
    if frames < 1:
        raise UserError(f"--frames {frames}: at least 1.")
    if fps is not None and fps <= 0:
        raise UserError(f"--fps {fps:g}: above 0.")
    learned = _opened(run, scene, set_up(machine))
    step = learned.model.codec.downsampling
    if mode == "colors":
        _check_colors(learned)
    if path is None:
        wanted = scaled(learned.view.size, size, step)
        cameras, speed = learned.view_of(scene).orbit(frames, elevation), fps or 20.0
    else:
        from latentscenes.export.video import read_camera_path

        film = read_camera_path(path)
        wanted = scaled(film.size, size or max(step, round(max(film.size) / step) * step), step)
        cameras, speed = film.at(wanted), fps or film.fps
    pictures = camera_frames(learned, scene, cameras, wanted, mode, background)
    save_frames(out, tracked(pictures, "rendering", len(cameras)), speed)
    rate = f", {speed:g} per second" if out.suffix.lower() in (".mp4", ".gif") else ""
    say(f"{out}: {counted(len(cameras), 'frame')} of {wanted[1]}x{wanted[0]}{rate}.")


def export_mesh(
    run: Path,
    scene: str,
    out: Path,
    texture: int | None = None,
    faces: int | None = None,
    cells: int | None = None,
    lowest: float = 0.0,
    machine: MachineOptions = MACHINE,
) -> None:
    """Write the surface of a scene as a closed mesh: with vertex colors (GLB), or with a texture (GLB, OBJ,
    USDZ).

    Args:
        run: Library, or run folder of train.
        scene: Name of the scene.
        out: .glb, .obj or .usdz file; OBJ is written with an MTL and a PNG beside it.
        texture: Texels along each side of the texture. Unset: vertex colors for GLB, 1024 for OBJ and USDZ.
        faces: Merge triangles until at most this many are left. Unset: 20000 with a texture, else all.
        cells: Number of cells along the longest side of the scene box; more cells are finer and slower.
            Unset: 192 with a texture, else 128.
        lowest: Elevation in degrees of the lowest camera that colors come from; -90 for objects photographed
            from below too.
    """
    require_folder(run)
    from latentscenes.export.mesh import check_ending, scene_mesh, write_glb
    from latentscenes.export.mesh_files import ENDINGS, require_usd, write_textured
    from latentscenes.export.texture import CELLS, FACES, TEXELS, textured_mesh

    check_ending(out, *ENDINGS)
    if out.suffix.lower() == ".usdz":
        require_usd()
    learned = _opened(run, scene, set_up(machine))
    view = learned.view_of(scene)
    if texture is None and out.suffix.lower() == ".glb":
        mesh = scene_mesh(learned, scene, view, 128 if cells is None else cells, lowest, faces)
        size = write_glb(out, mesh, scene, learned.tags(scene))
    else:
        side = TEXELS if texture is None else texture
        finer, most = CELLS if cells is None else cells, FACES if faces is None else faces
        mesh = textured_mesh(learned, scene, view, side, most, finer, lowest)
        size = write_textured(out, mesh, scene, learned.tags(scene))
    say(f"{out}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles, {_bytes(size)}.")


def export_points(
    run: Path,
    scene: str,
    out: Path,
    count: int = 100_000,
    cells: int = 128,
    lowest: float = 0.0,
    machine: MachineOptions = MACHINE,
) -> None:
    """Write the surface of a scene as points with normals and colors (PLY).

    Args:
        run: Library, or run folder of train.
        scene: Name of the scene.
        out: .ply file.
        count: Number of points, uniform over the visible part of the surface.
        cells: Number of cells along the longest side of the scene box; more cells are finer and slower.
        lowest: Elevation in degrees of the lowest camera that colors come from; -90 for objects photographed
            from below too.
    """
    require_folder(run)
    from latentscenes.export.mesh import check_ending, scene_points, write_ply

    check_ending(out, ".ply")
    learned = _opened(run, scene, set_up(machine))
    points = scene_points(learned, scene, learned.view_of(scene), count, cells, lowest)
    size = write_ply(out, points)
    say(f"{out}: {len(points.positions)} points, {_bytes(size)}.")


def export_splats(
    run: Path,
    scene: str,
    out: Path,
    count: int = 20_000,
    cells: int = 192,
    lowest: float = 0.0,
    rounds: int = 2,
    size: int | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Write the visible surface of a scene as 3D Gaussian splats: PLY in the layout of 3D Gaussian splatting,
    glTF with KHR_gaussian_splatting, or the small files SPZ and SOG.

    Args:
        run: Library, or run folder of train.
        scene: Name of the scene.
        out: .ply, .glb, .spz or .sog file.
        count: Largest number of splats.
        cells: Number of cells along the longest side of the scene box; more cells are finer and slower.
        lowest: Elevation in degrees of the lowest camera that colors come from; -90 for objects photographed
            from below too.
        rounds: How often the splats are fitted to each of 48 pictures; 0: not at all.
        size: Pixels along the wider side of these pictures, if the splats will be shown at one size; unset:
            two and three times the dataset's.
    """
    require_folder(run)
    from latentscenes.export.mesh import VIEWS, check_ending
    from latentscenes.export.splat_fit import check_fit, fitted
    from latentscenes.export.splats import ENDINGS, require_small, scene_splats, write_splats

    check_ending(out, *ENDINGS)
    require_small(out.suffix)
    learned = _opened(run, scene, set_up(machine))
    view = learned.view_of(scene)
    sizes = check_fit(view, count, rounds, size, learned.model.codec.downsampling)
    splats = scene_splats(learned, scene, view, count, cells, lowest)
    splats = fitted(splats, learned, scene, view.dome(VIEWS, lowest), sizes, rounds)
    written = write_splats(out, splats, scene, learned.tags(scene))
    say(f"{out}: {len(splats.positions)} splats, {_bytes(written)}.")


def export_images(
    run: Path,
    out: Path,
    choice: ChoiceOptions = CHOICE,
    views: int = 40,
    size: int | None = None,
    around: Literal["dome", "orbit"] = "dome",
    lowest: float = 0.0,
    elevation: float = 25.0,
    background: Literal["white", "black", "transparent"] = "transparent",
    machine: MachineOptions = MACHINE,
) -> None:
    """Write posed pictures of scenes, each in a folder with a transforms.json for `data transforms` and
    nerfstudio.

    Args:
        run: Library, or run folder of train.
        out: New folder.
        views: Number of pictures of each scene.
        size: Pixels along the wider side; unset: as in the data.
        around: Place cameras on a dome or on one orbit.
        lowest: Elevation in degrees at which the dome ends; -90 for a whole sphere.
        elevation: Elevation of the orbit in degrees.
        background: What lies behind the object.
    """
    require_folder(run)
    from latentscenes.export.pages import write_views
    from latentscenes.export.video import check_elevation, scaled

    check_elevation("--elevation", elevation)
    if views < 1:
        raise UserError(f"--views {views}: at least 1.")
    if not -90 <= lowest < 90:
        raise UserError(f"--lowest {lowest:g}: an elevation in degrees, from -90 to below 90.")
    learned, names = _chosen(run, choice, set_up(machine))
    cameras = learned.view.dome(views, lowest) if around == "dome" else learned.view.orbit(views, elevation)
    wanted = scaled(learned.view.size, size, learned.model.codec.downsampling)
    write_views(out, learned, names, cameras, wanted, background)
    say(
        f"{out}: {counted(len(names), 'scene')}, {counted(views, 'picture')} of {wanted[1]}x{wanted[0]} each."
    )


def export_page(
    run: Path,
    out: Path,
    choice: ChoiceOptions = CHOICE,
    title: str | None = None,
    frames: int = 36,
    size: int | None = None,
    elevations: tuple[float, ...] = (20.0,),
    live: bool = False,
    machine: MachineOptions = MACHINE,
) -> None:
    """Write one HTML file that turns scenes in any browser, without a network.

    Args:
        run: Library, or run folder of train.
        out: .html file.
        title: Title of the page; unset: the folder's name.
        frames: Number of pictures in one turn.
        size: Pixels along the wider side of a picture; unset: as in the data.
        elevations: Elevations in degrees; with more than one, dragging up and down changes the elevation.
        live: The page renders the scenes instead of showing pictures; needs WebGL2, and scenes whose latents
            are colors.
    """
    require_folder(run)
    from latentscenes.export.mesh import check_ending

    check_ending(out, ".html")
    pictures = {"frames": frames, "size": size, "elevations": elevations}
    if live and pictures != {"frames": 36, "size": None, "elevations": (20.0,)}:
        raise UserError("--live: shows scenes from all sides; leave --frames, --size and --elevations out.")
    learned, names = _chosen(run, choice, set_up(machine))
    title = title or run.resolve().name
    if live:
        from latentscenes.export.live import write_live_page

        written = write_live_page(out, learned, names, title=title)
    else:
        from latentscenes.export.pages import write_page

        written = write_page(out, learned, learned.view, names, title=title, **pictures)
    say(f"{out}: {counted(len(names), 'scene')}, {_bytes(written)}.")


COMMANDS = {
    "mesh": export_mesh,
    "points": export_points,
    "splats": export_splats,
    "images": export_images,
    "page": export_page,
}


def _opened(run: Path, scene: str, device: "torch.device") -> "StoredScenes":
    from latentscenes.storage.scene_set import SceneSet

    learned = SceneSet.open_all(run, device)
    learned.check(scene)
    return learned


def _check_colors(learned: "StoredScenes") -> None:
    """Refuses --mode colors where latents hold no colors; says where they hold nothing else."""
    if not learned.model.codec.leading_colors:
        raise UserError("--mode colors: the latents of this model's codec hold no colors. Use --mode rgb.")
    if learned.model.config.codec.kind == "identity":
        say("--mode colors: this model's latents are colors, so the pictures are those of --mode rgb.")


def _chosen(run: Path, choice: Choice, device: "torch.device") -> "tuple[StoredScenes, list[str]]":
    """The chosen scenes, each once, in the order given."""
    from fnmatch import fnmatchcase

    from latentscenes.storage.scene_set import SceneSet

    learned = SceneSet.open_all(run, device)
    for scene in choice.scenes:
        learned.check(scene)
    pattern = choice.match or ("*" if choice.where else "")
    matching = [name for name in learned.names if fnmatchcase(name, pattern)]
    if choice.where:
        matching = tagged({name: learned.tags(name) for name in matching}, choice.where)
    names = list(dict.fromkeys([*choice.scenes, *matching]))
    if not names:
        raise UserError(
            f"{run}: no scenes chosen. Name some with --scenes, or give --match or --where, for instance "
            "--match '*'."
        )
    return learned, names


def _bytes(count: int) -> str:
    from latentscenes.core.console import bytes_text

    return bytes_text(count)
