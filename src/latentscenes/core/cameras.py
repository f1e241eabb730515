"""Posed pinhole cameras, their rays, and the box that holds an object.

- Poses are camera-to-world in OpenCV axes: x right, y down, z forward. World z is up.
- Intrinsics are fractions of the image, so one camera serves images, latents and previews.
- Pixel (row i, column j) of an h x w grid has its center at ((j + 1/2) / w, (i + 1/2) / h).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from latentscenes.core.errors import UserError

OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
"""Right-multiplying a rotation by this turns OpenGL axes (y up, z backward) into OpenCV axes."""


FARTHEST = 1e9
"""The largest length that a file may state, world units; 1 / FARTHEST is the smallest."""
LONGEST_SIDE = 16384
"""Pixels of the longest side of an image."""


@dataclass(frozen=True)
class Cameras:
    """A batch of v pinhole cameras."""

    cam2world: Float[Tensor, "v 3 4"]
    """Rotation R and position t: a point p in camera axes lies at R p + t in the world."""
    intrinsics: Float[Tensor, "v 4"]
    """fx, fy, cx, cy: fx and cx as fractions of the image's width, fy and cy of its height."""

    @classmethod
    def from_matrices(
        cls,
        cam2world: ArrayLike,
        focal: float | tuple[float, float],
        axes: Literal["opencv", "opengl"] = "opencv",
    ) -> "Cameras":
        """Builds cameras whose principal point is the image's center.

        Args:
            cam2world: camera-to-world matrices (v, 3 or 4, 4): numpy, torch or lists.
            focal: focal length as a fraction of the image's width and height, one for both or one each.
            axes: axes of the matrices; `opengl` is y up and z backward, as in Blender and nerfstudio.
        """
        matrices = torch.as_tensor(np.asarray(cam2world), dtype=torch.float32)
        if matrices.ndim != 3 or matrices.shape[1] not in (3, 4) or matrices.shape[2] != 4:
            raise UserError(f"cam2world must be (v, 3, 4) or (v, 4, 4), not {tuple(matrices.shape)}.")
        matrices = matrices[:, :3].clone()
        if axes == "opengl":
            matrices[:, :, :3] = matrices[:, :, :3] @ OPENGL_TO_OPENCV
        fx, fy = focal if isinstance(focal, tuple) else (focal, focal)
        return cls(matrices, torch.tensor([fx, fy, 0.5, 0.5]).repeat(len(matrices), 1))

    def __len__(self) -> int:
        return self.cam2world.shape[0]

    def __getitem__(self, index: slice | list[int] | Int[Tensor, "n"]) -> "Cameras":
        return Cameras(self.cam2world[index], self.intrinsics[index])

    def to(self, device: torch.device | str) -> "Cameras":
        return Cameras(self.cam2world.to(device), self.intrinsics.to(device))

    def placed(
        self,
        turn: Float[Tensor, "3 3"] | None = None,
        scale: float = 1.0,
        shift: tuple[float, ...] = (0.0, 0.0, 0.0),
    ) -> "Cameras":
        """Returns the cameras after every point p of the world has moved to scale · turn p + shift."""
        turned = self.cam2world if turn is None else turn @ self.cam2world
        moved = scale * turned[:, :, 3:] + torch.tensor(shift)[:, None]
        return Cameras(torch.cat([turned[:, :, :3], moved], 2), self.intrinsics)

    @property
    def positions(self) -> Float[Tensor, "v 3"]:
        return self.cam2world[:, :, 3]

    def rays(
        self, height: int, width: int, pixels: Int[Tensor, "v p"] | None = None
    ) -> tuple[Float[Tensor, "v p 3"], Float[Tensor, "v p 3"]]:
        """Returns origins and unit directions of the rays through pixel centers.

        Without `pixels`, these are all pixels of an h x w grid, row by row (p = h·w). `pixels` selects some
        pixels of each view, as row · w + column.
        """
        every = torch.arange(height * width, device=self.cam2world.device)[None]
        chosen = every if pixels is None else pixels
        x, y = (chosen % width + 0.5) / width, (chosen // width + 0.5) / height
        fx, fy, cx, cy = self.intrinsics[:, :, None].unbind(1)
        toward = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x).expand(len(self), -1)], -1)
        directions = torch.einsum("vij,vpj->vpi", self.cam2world[:, :, :3], toward)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        return self.positions[:, None].expand_as(directions), directions

    def project(
        self, points: Float[Tensor, "p 3"] | Float[Tensor, "v p 3"]
    ) -> tuple[Float[Tensor, "v p 2"], Float[Tensor, "v p"]]:
        """Projects world points, the same for all cameras or p for each, to fractions (x, y) of the image and
        depths along the camera's z axis.

        Points at depth <= 0 are behind the camera; ignore their fractions.
        """
        offset = points - self.positions[:, None]
        inside = torch.einsum("vij,vpi->vpj", self.cam2world[:, :, :3], offset)
        depth = inside[..., 2]
        fx, fy, cx, cy = self.intrinsics[:, :, None].unbind(1)
        safe = torch.where(depth.abs() < 1e-9, torch.full_like(depth, 1e-9), depth)
        return torch.stack([fx * inside[..., 0] / safe + cx, fy * inside[..., 1] / safe + cy], -1), depth


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in the world. Tri-planes are defined on [-1, 1]³, stretched to this box."""

    center: tuple[float, float, float]
    half: tuple[float, float, float]
    """Half the side lengths along x, y and z."""

    def check(self, where: object) -> None:
        """Raises a UserError, which begins with `where`, unless all numbers are finite and half sides above
        0."""
        if not all(abs(number) <= FARTHEST for number in self.center):
            raise UserError(f"{where}: the center of the box, {self.center}, must be finite.")
        if not all(1 / FARTHEST <= number <= FARTHEST for number in self.half):
            raise UserError(f"{where}: half sides of the box, {self.half}, must be above 0.")

    def normalize(
        self, origins: Float[Tensor, "*b 3"], directions: Float[Tensor, "*b 3"]
    ) -> tuple[Float[Tensor, "*b 3"], Float[Tensor, "*b 3"]]:
        """Maps rays so that the box becomes [-1, 1]³. The ray parameter t still measures world distance, so
        the returned directions are not of unit length."""
        center = torch.tensor(self.center, dtype=origins.dtype, device=origins.device)
        half = torch.tensor(self.half, dtype=origins.dtype, device=origins.device)
        return (origins - center) / half, directions / half

    @classmethod
    def of(cls, numbers: Float[Tensor, "6"]) -> "Box":
        """Returns the box with this center and these half sides."""
        return cls(tuple(numbers[:3].tolist()), tuple(numbers[3:].tolist()))

    @property
    def numbers(self) -> Float[Tensor, "6"]:
        """Center and half sides."""
        return torch.tensor([*self.center, *self.half])

    def corners(self) -> Float[Tensor, "8 3"]:
        """Returns the corners in world coordinates."""
        return box_corners(self.numbers[None])[0]


def box_corners(boxes: Float[Tensor, "s 6"]) -> Float[Tensor, "s 8 3"]:
    """Returns the corners, in world coordinates, of boxes given by their centers and half sides."""
    signs = torch.cartesian_prod(*3 * [torch.tensor([-1.0, 1.0], device=boxes.device)])
    return boxes[:, None, :3] + signs * boxes[:, None, 3:]


def box_sizes(boxes: Float[Tensor, "s 6"]) -> Float[Tensor, "s"]:
    """Returns the geometric means of boxes' half sides."""
    return boxes[:, 3:].log().mean(-1).exp()


def look_at(
    eyes: Float[Tensor, "v 3"],
    target: Float[Tensor, "3"] | None = None,
    up: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> Float[Tensor, "v 3 4"]:
    """Returns camera-to-world matrices at `eyes`, looking at `target` (default: the origin), image top up."""
    target = torch.zeros(3) if target is None else target
    forward = torch.nn.functional.normalize(target - eyes, dim=-1)
    upward = torch.tensor(up).expand_as(forward)
    right = torch.linalg.cross(forward, upward)
    straight = right.norm(dim=-1, keepdim=True) < 1e-6  # looking along `up`: any right vector works
    right = torch.where(straight, torch.tensor([1.0, 0.0, 0.0]).expand_as(right), right)
    right = torch.nn.functional.normalize(right, dim=-1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward, eyes], dim=-1)


def _around(
    azimuth: Tensor,
    elevation: Tensor,
    distance: float,
    focal: float | tuple[float, float],
    center: tuple[float, float, float],
) -> Cameras:
    across = elevation.cos()
    outward = torch.stack([across * azimuth.cos(), across * azimuth.sin(), elevation.sin()], -1)
    middle = torch.tensor(center)
    fx, fy = focal if isinstance(focal, tuple) else (focal, focal)
    intrinsics = torch.tensor([fx, fy, 0.5, 0.5]).expand(len(azimuth), 4).contiguous()
    return Cameras(look_at(middle + distance * outward, middle), intrinsics)


def orbit(
    count: int,
    distance: float = 1.3,
    focal: float | tuple[float, float] = 1.025,
    elevation: float = math.radians(25),
    center: tuple[float, float, float] = (0.0, 0.0, 0.0),
    start: float = 0.0,
) -> Cameras:
    """Returns `count` cameras on a circle around the z axis, looking at `center`.

    Args:
        count: number of cameras.
        distance: from each camera to the center, world units.
        focal: focal length as a fraction of the image's width and height, one for both or one each.
        elevation: of all cameras, radians.
        center: the point they look at.
        start: azimuth of the first camera, radians.
    """
    azimuth = start + torch.arange(count) * (2 * math.pi / count)
    return _around(azimuth, torch.full((count,), float(elevation)), distance, focal, center)


def upper_hemisphere(
    count: int, generator: torch.Generator, distance: float = 1.3, focal: float = 1.025, lowest: float = 0.0
) -> Cameras:
    """Samples cameras uniformly on the sphere above elevation `lowest` (radians), looking at the origin.

    Heights are stratified and azimuths random, so even a few views cover the whole region.
    """
    floor = math.sin(lowest)
    height = floor + (1 - floor) * (torch.arange(count) + torch.rand(count, generator=generator)) / count
    azimuth = 2 * math.pi * torch.rand(count, generator=generator)
    return _around(azimuth, height.clamp(-1, 1).asin(), distance, focal, (0.0, 0.0, 0.0))


def spread_directions(count: int, lowest: float = -math.pi / 2) -> Float[Tensor, "n 3"]:
    """Returns unit vectors on a golden spiral over the sphere above elevation `lowest` (radians)."""
    place = torch.arange(count) + 0.5
    floor = math.sin(lowest)
    height = floor + (1 - floor) * place / count
    azimuth = place * math.pi * (3 - math.sqrt(5))
    across = (1 - height**2).clamp_min(0).sqrt()
    return torch.stack([across * azimuth.cos(), across * azimuth.sin(), height], -1)


@dataclass(frozen=True)
class Viewpoint:
    """Typical image size, camera distance and focal lengths of a dataset, for rendering new views."""

    size: tuple[int, int]
    """Height and width of the images."""
    distance: float
    """Median distance of the cameras from the center, world units."""
    focal: tuple[float, float]
    """Median focal lengths, as fractions of the width and of the height."""
    center: tuple[float, float, float]
    """Center of the scene box."""

    def check(self, where: object) -> None:
        """Raises a UserError, which begins with `where`, unless the numbers are those of a camera."""
        if not all(1 <= side <= LONGEST_SIDE for side in self.size):
            raise UserError(f"{where}: pictures of {self.size} pixels; sides are 1 to {LONGEST_SIDE}.")
        numbers = (self.distance, *self.focal)
        if not all(1 / FARTHEST <= number <= FARTHEST for number in numbers):
            raise UserError(f"{where}: distance and focal lengths, {numbers}, must be above 0.")
        if not all(abs(number) <= FARTHEST for number in self.center):
            raise UserError(f"{where}: the center of view, {self.center}, must be finite.")

    @classmethod
    def of(cls, cameras: Cameras, size: tuple[int, int], box: Box) -> "Viewpoint":
        distance = (cameras.positions - torch.tensor(box.center)).norm(dim=1).median().item()
        fx, fy = cameras.intrinsics[:, :2].median(0).values.tolist()
        return cls(size, distance, (fx, fy), box.center)

    def around(self, box: Box | None) -> "Viewpoint":
        """Returns the viewpoint around another box, if one is given: as far from its center, or farther, if
        its corners would not lie in the images."""
        if box is None:
            return self
        radius, half_angle = math.hypot(*box.half), math.atan(0.5 / max(self.focal))
        return replace(self, center=box.center, distance=max(self.distance, radius / math.sin(half_angle)))

    def orbit(self, count: int, elevation: float = 25.0, azimuth: float = 0.0) -> Cameras:
        """Returns cameras on a circle around the center, the first at `azimuth`; angles in degrees."""
        return orbit(
            count, self.distance, self.focal, math.radians(elevation), self.center, math.radians(azimuth)
        )

    def dome(self, count: int, lowest: float = 0.0) -> Cameras:
        """Returns `count` cameras spread evenly around the center, above elevation `lowest` (degrees)."""
        center = torch.tensor(self.center)
        eyes = center + self.distance * spread_directions(count, math.radians(lowest))
        return Cameras(look_at(eyes, center), torch.tensor([*self.focal, 0.5, 0.5]).repeat(count, 1))
