"""Procedural cars: any number of different ones from a seed, without a download.

Notable:
- A car depends only on the seed and its own number: datasets of 10 and of 1000 cars begin with the same ones.
- Kinds of cars take turns, so small datasets hold all of them.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latentscenes.core.errors import UserError
from latentscenes.data.dataset import ViewsWriter, spread
from latentscenes.data.raycast import DEFAULT_VIEWS, Caster, Soup, ViewOptions, soup_from_mesh
from latentscenes.data.synthetic import parts
from latentscenes.data.synthetic.body import KINDS, draw_car, loft
from latentscenes.data.synthetic.paint import draw_livery, paint_body


def make_cars(out: Path, options: ViewOptions = DEFAULT_VIEWS, *, train: int = 48, new: int = 16) -> None:
    """Make cars and render views of them into a new dataset.

    Args:
        out: folder of the dataset; must not exist or be empty.
        options: views, size, held-out views, seed, camera distance, scene box.
        train: cars to learn in stage 1.
        new: further cars, to learn in stage 2.

    Raises:
        UserError: the counts are negative or both 0, or a car does not fit the chosen box.
    """
    if train < 0 or new < 0 or train + new == 0:
        raise UserError(f"train = {train}, new = {new}: ask for at least one car.")
    console, bounds = Console(stderr=True), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        ViewsWriter(out, (options.size, options.size), alpha=True, origin=f"made cars, seed {options.seed}") as writer,
        Progress(*columns, console=console) as progress,
    ):
        for number in progress.track(range(train + new), description="making cars"):
            soup, name = make_car(number, options.seed), f"car_{number:04d}"
            options.check_fits(name, soup.bounds)
            cameras = options.cameras(name)
            rgb, alpha = Caster(soup).render(cameras, options.size, options.samples)
            split = "train" if number < train else "new"
            writer.add(name, rgb, cameras, split, spread(options.views, options.held_out), alpha)
            bounds.append(soup.bounds)
        writer.finish(options.scene_box(bounds))
    console.print(f"{out}: {train + new} cars", highlight=False, markup=False)


def make_car(number: int, seed: int = 0, kind: str | None = None) -> Soup:
    """One car: nose toward +x, z up, the middle of its bounding box at the origin, the box's diagonal 1."""
    rng = np.random.default_rng([seed, number])
    kind = kind or parts.in_turn(KINDS, number, seed)
    car = draw_car(rng, kind)
    livery = draw_livery(rng, car)
    skin = loft(car)
    stations, across = skin.points.shape[:2]
    v, u = np.meshgrid(np.linspace(0, 1, stations), np.linspace(0, 1, across), indexing="ij")
    body = soup_from_mesh(
        skin.points.reshape(-1, 3), parts.grid_faces(stations, across), normals=skin.normals.reshape(-1, 3),
        uv=np.clip(np.stack([u, v], -1), 0.001, 0.999).reshape(-1, 2), texture=paint_body(car, livery, skin), cutoff=0.5,
    )  # fmt: skip
    soups = [body, parts.floor(car), *parts.wheels(car, parts.wheel_picture(rng)), *parts.extras(rng, car, livery.paint)]
    if kind == "open":
        soups += parts.cockpit(rng, car)
    return parts.shadowed(Soup.joined(soups), rng).normalized()
