"""The command line's `render`, and its `export` commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from latentscenes.cli.common import MACHINE, MachineOptions, set_up
from latentscenes.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from latentscenes.storage.scene_set import StoredScenes


def render(
    run: Path,
    scene: str,
    out: Path,
    frames: int = 60,
    size: int | None = None,
    mode: Literal["rgb", "depth", "opacity", "latent", "dashboard"] = "rgb",
    elevation: float = 25.0,
    path: Path | None = None,
    fps: float | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Render an orbit around a learned scene, or the film of a nerfstudio camera path.

    Args:
        run: library, or run folder of train.
        scene: name of the scene.
        out: .mp4 (needs the export extra), .gif, .png for a strip of frames, or a name without an ending for a folder of PNG files.
        frames: cameras around the object.
        size: pixels along the wider side; unset: as in the data, or as the camera path says.
        mode: what to show; `dashboard` puts image, latent channels, depth and opacity side by side.
        elevation: of the cameras, in degrees.
        path: camera path (JSON) of nerfstudio's; its cameras are used instead of the orbit's.
        fps: frames per second; unset: as the camera path says, 20 for an orbit.
    """
    from latentscenes.export.video import camera_frames, check_elevation, check_film, save_frames, scaled

    check_film(out)
    check_elevation("--elevation", elevation)
    if frames < 1:
        raise UserError(f"--frames {frames}: at least 1.")
    if fps is not None and fps <= 0:
        raise UserError(f"--fps {fps:g}: above 0.")
    learned = _opened(run, scene, set_up(machine))
    step = learned.model.codec.downsampling
    if path is None:
        wanted = scaled(learned.view.size, size, step)
        cameras, speed = learned.view.orbit(frames, elevation), fps or 20.0
    else:
        from latentscenes.export.video import read_camera_path

        film = read_camera_path(path)
        wanted = scaled(film.size, size or max(step, round(max(film.size) / step) * step), step)
        cameras, speed = film.at(wanted), fps or film.fps
    pictures = camera_frames(learned, scene, cameras, wanted, mode)
    save_frames(out, _counted(pictures, len(cameras), "rendering"), speed)
    _say(
        f"{out}: {len(cameras)} frames of {wanted[1]}x{wanted[0]}{f', {speed:g} a second' if out.suffix.lower() in ('.mp4', '.gif') else ''}."
    )


def export_mesh(
    run: Path, scene: str, out: Path, cells: int = 128, lowest: float = 0.0, machine: MachineOptions = MACHINE
) -> None:
    """Write the surface of a scene as a closed mesh with vertex colors (GLB).

    Args:
        run: library, or run folder of train.
        scene: name of the scene.
        out: .glb file.
        cells: along the longest side of the scene box; more are finer and slower.
        lowest: elevation in degrees of the lowest camera that colors come from; -90 for objects photographed from below too.
    """
    from latentscenes.export.mesh import check_ending, scene_mesh, write_glb

    check_ending(out, ".glb")
    learned = _opened(run, scene, set_up(machine))
    mesh = scene_mesh(learned, scene, learned.view, cells, lowest)
    size = write_glb(out, mesh, scene)
    _say(f"{out}: {len(mesh.vertices)} vertices, {len(mesh.faces)} triangles, {_bytes(size)}.")


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
        run: library, or run folder of train.
        scene: name of the scene.
        out: .ply file.
        count: points, evenly over what pictures show of the surface.
        cells: along the longest side of the scene box, of the surface that points lie on.
        lowest: elevation in degrees of the lowest camera that looks; -90 for objects photographed from below too.
    """
    from latentscenes.export.mesh import check_ending, scene_points, write_ply

    check_ending(out, ".ply")
    learned = _opened(run, scene, set_up(machine))
    points = scene_points(learned, scene, learned.view, count, cells, lowest)
    size = write_ply(out, points)
    _say(f"{out}: {len(points.positions)} points, {_bytes(size)}.")


def export_images(
    run: Path,
    out: Path,
    scenes: tuple[str, ...] = (),
    match: str | None = None,
    views: int = 40,
    size: int | None = None,
    around: Literal["dome", "orbit"] = "dome",
    lowest: float = 0.0,
    elevation: float = 25.0,
    machine: MachineOptions = MACHINE,
) -> None:
    """Write posed pictures of scenes, a folder with transforms.json for each, as `data transforms` and nerfstudio read them.

    Args:
        run: library, or run folder of train.
        out: new folder.
        scenes: their names …
        match: … or all whose names are like this; * and ? stand for any letters.
        views: pictures of each scene.
        size: pixels along the wider side; unset: as in the data.
        around: cameras spread over a dome, or on one orbit.
        lowest: elevation in degrees at which the dome ends; -90 for a whole sphere.
        elevation: of the orbit, in degrees.
    """
    from latentscenes.export.pages import write_views
    from latentscenes.export.video import check_elevation, scaled

    check_elevation("--elevation", elevation)
    if views < 1:
        raise UserError(f"--views {views}: at least 1.")
    if not -90 <= lowest < 90:
        raise UserError(f"--lowest {lowest:g}: an elevation in degrees, from -90 to below 90.")
    learned, names = _chosen(run, scenes, match, set_up(machine))
    cameras = learned.view.dome(views, lowest) if around == "dome" else learned.view.orbit(views, elevation)
    wanted = scaled(learned.view.size, size, learned.model.codec.downsampling)
    write_views(out, learned, _counted(names, len(names), "exporting"), cameras, wanted)
    _say(f"{out}: {len(names)} scenes, {views} pictures of {wanted[1]}x{wanted[0]} each.")


def export_page(
    run: Path,
    out: Path,
    scenes: tuple[str, ...] = (),
    match: str | None = None,
    title: str | None = None,
    frames: int = 36,
    size: int | None = None,
    elevations: tuple[float, ...] = (20.0,),
    machine: MachineOptions = MACHINE,
) -> None:
    """Write one HTML file that turns scenes in any browser, offline.

    Args:
        run: library, or run folder of train.
        out: .html file.
        scenes: their names …
        match: … or all whose names are like this; * and ? stand for any letters.
        title: of the page; unset: the folder's name.
        frames: pictures of one turn.
        size: pixels along the wider side of a picture; unset: as in the data.
        elevations: in degrees; with more than one, dragging up and down looks from higher or lower.
    """
    from latentscenes.export.mesh import check_ending
    from latentscenes.export.pages import write_page

    check_ending(out, ".html")
    learned, names = _chosen(run, scenes, match, set_up(machine))
    listed = _counted(names, len(names), "rendering")
    written = write_page(
        out,
        learned,
        learned.view,
        listed,
        title=title or run.resolve().name,
        frames=frames,
        size=size,
        elevations=elevations,
    )
    _say(f"{out}: {len(names)} scenes, {_bytes(written)}.")


EXPORT_COMMANDS = {"mesh": export_mesh, "points": export_points, "images": export_images, "page": export_page}


def _opened(run: Path, scene: str, device: "torch.device") -> "StoredScenes":
    from latentscenes.storage.scene_set import SceneSet

    learned = SceneSet.open_all(run, device)
    learned.check(scene)
    return learned


def _chosen(
    run: Path, scenes: tuple[str, ...], match: str | None, device: "torch.device"
) -> "tuple[StoredScenes, list[str]]":
    """Scenes by name or by pattern, each once, in the order given."""
    from fnmatch import fnmatchcase

    from latentscenes.storage.scene_set import SceneSet

    learned = SceneSet.open_all(run, device)
    for scene in scenes:
        learned.check(scene)
    names = list(
        dict.fromkeys(
            [*scenes, *(name for name in learned.names if match is not None and fnmatchcase(name, match))]
        )
    )
    if not names:
        raise UserError(
            f"{run}: no scenes chosen. Name some with --scenes, or give --match, for instance --match '*'."
        )
    return learned, names


def _counted(items, count: int, label: str):
    """The same items, with a progress bar where the output is a terminal."""
    from rich.progress import track

    from latentscenes.core.console import console

    return track(items, label, total=count, console=console, transient=True, disable=not console.is_terminal)


def _say(text: str) -> None:
    from latentscenes.core.console import console

    console.print(text, highlight=False, soft_wrap=True)


def _bytes(count: int) -> str:
    from latentscenes.core.console import bytes_text

    return bytes_text(count)
