"""Cameras against pixels worked out by hand, and against each other."""

import math

import pytest
import torch

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Box, Cameras, look_at, orbit, upper_hemisphere


def test_rays_of_a_camera_worked_out_by_hand():
    # at (0, 0, 5), looking down -z of the world with image top toward +y: right = +x, down = -y, forward = -z
    matrix = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 5]])
    camera = Cameras(
        matrix[None], torch.tensor([[0.5, 1.0, 0.5, 0.5]])
    )  # 90 degrees wide, 53.13 degrees high
    origins, directions = camera.rays(2, 4)
    assert origins.shape == directions.shape == (1, 8, 3)
    assert torch.equal(origins[0], torch.tensor([0.0, 0, 5]).expand(8, 3))
    # row 0, column 3: x = (3.5/4 - 0.5) / 0.5 = 0.75 to the right, y = (0.5/2 - 0.5) / 1 = -0.25, so upward
    expected = torch.tensor([0.75, 0.25, -1.0])
    assert torch.allclose(directions[0, 3], expected / math.sqrt(0.75**2 + 0.25**2 + 1))
    # row 1, column 0
    expected = torch.tensor([-0.75, -0.25, -1.0])
    assert torch.allclose(directions[0, 4], expected / math.sqrt(0.75**2 + 0.25**2 + 1))


def test_projection_worked_out_by_hand():
    matrix = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 5]])
    camera = Cameras(matrix[None], torch.tensor([[0.5, 1.0, 0.5, 0.25]]))
    places, depth = camera.project(torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 6.0]]))
    # 4 before the camera, 1 to the right, 2 upward: x = 0.5 * 1/4 + 0.5, y = 1 * -2/4 + 0.25
    assert torch.allclose(places[0, 0], torch.tensor([0.625, -0.25]))
    assert torch.allclose(depth[0], torch.tensor([4.0, -1.0]))  # the second is behind


def test_points_along_rays_project_back_to_their_pixels():
    generator = torch.Generator().manual_seed(3)
    cameras = upper_hemisphere(5, generator)
    cameras = Cameras(cameras.cam2world, torch.tensor([1.1, 0.9, 0.45, 0.6]).expand(5, 4).contiguous())
    height, width = 3, 5
    origins, directions = cameras.rays(height, width)
    for view in range(5):
        distance = 0.5 + torch.rand(height * width, 1, generator=generator)
        places, depth = cameras[view : view + 1].project(origins[view] + distance * directions[view])
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        expected = torch.stack([(column + 0.5) / width, (row + 0.5) / height], -1).reshape(-1, 2)
        assert torch.allclose(places[0], expected, atol=1e-5)
        assert (depth > 0).all()


def test_one_camera_serves_every_resolution():
    cameras = orbit(3)
    _, fine = cameras.rays(6, 6)
    _, coarse = cameras.rays(2, 2)
    # the center of a 3 x 3 block of fine pixels is the center of the coarse one
    assert torch.allclose(fine.reshape(3, 6, 6, 3)[:, 1::3, 1::3].reshape(3, 4, 3), coarse, atol=1e-6)


def test_cameras_around_an_object_see_it_upright():
    for cameras in (orbit(8), upper_hemisphere(8, torch.Generator().manual_seed(0))):
        rotation = cameras.cam2world[:, :, :3]
        assert torch.allclose(rotation.mT @ rotation, torch.eye(3).expand(8, 3, 3), atol=1e-5)
        assert torch.allclose(torch.linalg.det(rotation), torch.ones(8), atol=1e-5)
        places, depth = cameras.project(torch.tensor([[0.0, 0, 0], [0, 0, 0.2]]))
        assert torch.allclose(places[:, 0], torch.full((8, 2), 0.5), atol=1e-5)  # the origin in the middle
        assert torch.allclose(depth[:, 0], torch.full((8,), 1.3), atol=1e-5)
        assert (places[:, 1, 1] < 0.5).all()  # higher in the world is higher in the image: a smaller row
        assert torch.allclose(places[:, 1, 0], torch.full((8,), 0.5), atol=1e-5)


def test_orbit_goes_counter_clockwise_from_the_x_axis():
    eyes = orbit(4, distance=2.0, elevation=0.0, center=(1.0, 0.0, 0.0)).positions
    expected = torch.tensor([[3.0, 0, 0], [1, 2, 0], [-1, 0, 0], [1, -2, 0]])
    assert torch.allclose(eyes, expected, atol=1e-6)


def test_a_camera_straight_above_is_still_a_rotation():
    rotation = look_at(torch.tensor([[0.0, 0, 2]]))[0, :, :3]
    assert torch.allclose(rotation.mT @ rotation, torch.eye(3), atol=1e-6)
    assert torch.allclose(rotation[:, 2], torch.tensor([0.0, 0, -1]))
    assert torch.linalg.det(rotation) == pytest.approx(1)


def test_hemisphere_stays_above_its_lowest_elevation():
    cameras = upper_hemisphere(200, torch.Generator().manual_seed(1), distance=2.0, lowest=math.radians(20))
    assert float(cameras.positions[:, 2].min()) >= 2 * math.sin(math.radians(20)) - 1e-6
    assert torch.allclose(cameras.positions.norm(dim=-1), torch.full((200,), 2.0), atol=1e-5)


def test_opengl_axes_turn_into_opencv_ones():
    # an OpenGL camera with no rotation looks down -z, with +y up in its image
    camera = Cameras(
        torch.cat([torch.eye(3) @ OPENGL_TO_OPENCV, torch.zeros(3, 1)], 1)[None],
        torch.tensor([[1.0, 1, 0.5, 0.5]]),
    )
    places, depth = camera.project(torch.tensor([[0.0, 1.0, -4.0]]))
    assert float(depth) == 4
    assert torch.allclose(places[0, 0], torch.tensor([0.5, 0.25]))


def test_a_box_becomes_the_unit_cube_and_keeps_distances():
    box = Box((1.0, 0.0, -1.0), (2.0, 1.0, 0.5))
    origins, directions = box.normalize(torch.tensor([[3.0, 0.0, -1.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert torch.equal(origins, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(
        origins + 0.5 * directions, torch.tensor([[1.0, 0.0, 1.0]])
    )  # half a unit up: the box's top
