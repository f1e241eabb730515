"""`data photos`: a made object photographed through known lenses into a world of any scale and orientation
comes back where it is, undistorted; and every gap in a capture is named."""

import json
import shutil

import numpy as np
import pytest
import torch
import trimesh
from captures import LENSES, any_world, walk_around, write_capture
from PIL import Image, ImageOps

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.options import SceneChoice
from latentscenes.data.photos.importer import make_photos, read_capture
from latentscenes.data.raycast import RayCaster, TriangleSoup, soup_from_mesh
from latentscenes.data.shading import Lights

pycolmap = pytest.importorskip("pycolmap")
KNOWN = "EQUIRECTANGULAR" in pycolmap.CameraModelId.__members__
FLAT = Lights(ambient=1.0, sky=0.0, directions=(), strengths=())
SIZE, COUNT = 64, 12
BALLS = {
    (255, 0, 0): (0.40, 0.0, -0.10), (0, 255, 0): (-0.38, 0.1, -0.12), (0, 0, 255): (0.0, 0.18, -0.15),
    (255, 255, 0): (0.1, -0.2, 0.05), (255, 0, 255): (-0.1, 0.0, 0.20), (0, 255, 255): (0.15, 0.05, 0.12),
}  # fmt: skip
"""Color and place of what the object is made of, at most half a unit from the origin."""
RADIUS = 0.06


def balls() -> TriangleSoup:
    soups = []
    for color, place in BALLS.items():
        ball = trimesh.creation.icosphere(subdivisions=3, radius=RADIUS)
        soups.append(soup_from_mesh(ball.vertices + place, ball.faces, colors=(*np.array(color) / 255, 1.0)))
    return TriangleSoup.joined(soups)


def capture(folder, lens="OPENCV", **more):
    """The balls' capture; gives the true cameras."""
    cameras = walk_around(COUNT)
    write_capture(folder, balls(), cameras, any_world(), lens, lights=FLAT, **more)
    return cameras


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one capture, and its true cameras."""
    folder = tmp_path_factory.mktemp("captures")
    return folder, capture(folder / "balls")


@pytest.fixture
def spoilt(made, tmp_path):
    """A copy of the capture, to be damaged."""
    shutil.copytree(made[0] / "balls", tmp_path / "all" / "balls")
    return tmp_path / "all" / "balls"


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Scale, rotation and shift that take points to points, by least squares (Umeyama 1991)."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u * sign @ vt
    scale = (d * sign).sum() / (a**2).sum()
    return scale, rotation, target.mean(0) - scale * rotation @ source.mean(0)


def check(found, truth: Cameras) -> tuple[float, np.ndarray, np.ndarray]:
    """Compares imported cameras, points and pictures with the truth. Returns the similarity to it."""
    scale, rotation, shift = similarity(
        truth.positions.double().numpy(), found.cameras.positions.double().numpy()
    )
    moved = scale * truth.positions.double().numpy() @ rotation.T + shift
    assert np.abs(moved - found.cameras.positions.numpy()).max() < 1e-4
    # known points lie where the color of their balls is, unless another ball is near
    points = torch.tensor(scale * np.array(list(BALLS.values())) @ rotation.T + shift).float()
    places, depth = found.cameras.project(points)
    places, radii = (
        places.numpy() * SIZE,
        (scale * RADIUS * found.cameras.intrinsics[:, :1] / depth).numpy() * SIZE,
    )
    pixels, errors = (np.mgrid[:SIZE, :SIZE][::-1] + 0.5), []
    for view, image in enumerate(found.images.astype(float)):
        for ball, color in enumerate(BALLS):
            gap = np.linalg.norm(places[view] - places[view, ball], axis=1) - radii[view] - radii[view, ball]
            if np.delete(gap, ball).min() < 2:
                continue
            off = np.linalg.norm(pixels.transpose(1, 2, 0) - places[view, ball], axis=-1)
            weight = (255 - image).sum(-1) * (off < radii[view, ball] + 1.5)
            assert np.abs(image[tuple(places[view, ball].astype(int)[::-1])] - color).max() < 40
            errors.append((pixels * weight).sum((1, 2)) / weight.sum() - places[view, ball])
    assert len(errors) > 30
    assert np.linalg.norm(errors, axis=1).max() < 0.12 and np.abs(np.mean(errors, 0)).max() < 0.02  # pixels
    # and the pictures are what our own pinhole cameras see there
    back = rotation.T @ (found.cameras.cam2world.double().numpy() - np.pad(shift[:, None], ((0, 0), (3, 0))))
    back[:, :, 3] /= scale
    rgb, alpha = RayCaster(balls(), FLAT).render(
        Cameras(torch.tensor(back).float(), found.cameras.intrinsics), SIZE, 4
    )
    inside = alpha == 255
    inside[:, 1:] &= inside[:, :-1] & (alpha[:, :-1] == 255)
    assert (
        np.abs(rgb.astype(float) - found.images).mean() < 1.5
        and np.abs(alpha.astype(float) - found.alpha).mean() < 1.5
    )
    assert (np.abs(rgb.astype(float) - found.images).max(-1)[inside] < 60).mean() > 0.98
    return scale, rotation, shift


def test_a_capture_comes_back_where_it_is(made, tmp_path):
    folder, truth = made
    (tmp_path / "table.csv").write_text("file,category\nballs,Toys\n")
    made_set = make_photos(
        folder, tmp_path / "set", size=SIZE, held_out=2, choice=SceneChoice(catalog=tmp_path / "table.csv")
    )
    views = PosedImages.open(tmp_path / "set")
    assert views.scenes[0].tags == {"category": "Toys"}
    assert (made_set.scenes, made_set.views, views.size) == (1, COUNT, (SIZE, SIZE))
    assert len(views.scenes[0].held_out) == 2
    found = read_capture(folder / "balls", SIZE)
    assert np.array_equal(found.images, views.rgb) and np.array_equal(found.alpha, views.alpha)
    scale, rotation, shift = check(found, truth)
    # up is up, the first photograph is on the side of +x, the box's diagonal is 1 and its middle the origin
    assert np.degrees(np.arccos(rotation[2, 2])) < 2
    x, y, _ = found.cameras.positions[0]
    assert x > 0 and abs(y / x) < 0.02
    points = np.array(list(BALLS.values())) @ rotation.T * scale + shift
    low, high = points.min(0) - scale * RADIUS, points.max(0) + scale * RADIUS
    assert abs(np.linalg.norm(high - low) - 1) < 0.06 and np.abs(low + high).max() < 0.06
    edges = np.array(
        [np.subtract(views.box.center, views.box.half), np.add(views.box.center, views.box.half)]
    )
    assert (edges[0] < low).all() and (edges[1] > high).all() and np.abs(edges - [low, high]).max() < 0.07


@pytest.mark.parametrize("lens", [lens for lens in LENSES if lens != "OPENCV"])
def test_lenses_are_undone(tmp_path, lens):
    truth = capture(tmp_path / "balls", lens, cut_out=True, text=True)  # text models and transparency, too
    check(read_capture(tmp_path / "balls", SIZE), truth)


def test_photographs_held_sideways_stand_upright(tmp_path):
    """Files as a phone writes them held upright: lying on their side, with a note that says so."""
    cameras = walk_around(COUNT)
    turn = torch.tensor(
        [[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]
    )  # the file's columns run down in the upright view
    lying = Cameras(
        torch.cat([cameras.cam2world[:, :, :3] @ turn, cameras.cam2world[:, :, 3:]], -1), cameras.intrinsics
    )
    write_capture(tmp_path / "balls", balls(), lying, any_world(), "SIMPLE_RADIAL", lights=FLAT)
    with pytest.raises(UserError, match="which way is up.*pose.json"):
        read_capture(tmp_path / "balls", SIZE)
    for file in (tmp_path / "balls" / "images").iterdir():
        with Image.open(file) as image:
            exif = image.getexif()
            exif[274] = 6
            image.save(file, exif=exif)
    with Image.open(tmp_path / "balls" / "images" / "IMG_0.png") as image:
        shown = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    rows = [
        np.nonzero((np.abs(shown - color).sum(-1) < 60).any(1))[0].mean()
        for color in ((255, 0, 255), (255, 0, 0))
    ]
    assert rows[0] < rows[1]  # the uppermost ball is above: this is how a person sees the file
    _, rotation, _ = check(read_capture(tmp_path / "balls", SIZE), cameras)
    assert np.degrees(np.arccos(rotation[2, 2])) < 2


def test_front_and_up_can_be_given(made, spoilt):
    (spoilt / "pose.json").write_text(
        json.dumps({"front": "IMG_3.png", "up": (any_world().rotation @ [0, 0, 3.0]).tolist()})
    )
    found = read_capture(spoilt, SIZE)
    _, rotation, _ = check(found, made[1])
    assert np.degrees(np.arccos(rotation[2, 2])) < 0.1
    x, y, _ = found.cameras.positions[3]
    assert x > 0 and abs(y / x) < 0.02


def test_reduced_copies_and_what_is_left_out(made, spoilt):
    """Half-size photographs work; black masks and cut-off objects leave photographs out, with a note."""
    for part in ("images", "masks"):
        for file in (spoilt / part).iterdir():
            with Image.open(file) as image:
                image.reduce(2).save(file)
    blank = Image.new("L", (80, 60))
    blank.save(spoilt / "masks" / "IMG_1.png")
    blank.paste(255, (0, 20, 40, 40))
    blank.save(spoilt / "masks" / "IMG_2.png")
    shutil.copy(spoilt / "images" / "IMG_0.png", spoilt / "images" / "unknown.png")
    found = read_capture(spoilt, 32)
    assert len(found.images) == COUNT - 2
    whole = read_capture(made[0] / "balls", 32)
    kept = [view for view in range(COUNT) if view not in (1, 2)]
    assert np.abs((found.cameras.positions - whole.cameras.positions[kept]).numpy()).max() < 0.1
    assert np.abs(found.images.astype(float) - whole.images[kept]).mean() < 5
    told = "\n".join(found.notes)
    for what in (
        "1 photographs COLMAP did not place",
        "1 photographs show only part",
        "1 photographs have a black mask",
    ):
        assert what in told


def spoil(folder, what: str) -> str:
    """Do one kind of damage to a capture; gives what the message must say."""
    model, image, mask = (
        folder / "sparse" / "0",
        folder / "images" / "IMG_4.png",
        folder / "masks" / "IMG_4.png",
    )
    match what:
        case "no photographs":
            shutil.rmtree(folder / "images")
            return "images: no such folder"
        case "no reconstruction":
            shutil.rmtree(folder / "sparse")
            return "sparse: no COLMAP model here.*automatic_reconstructor"
        case "several models":
            shutil.copytree(model, folder / "sparse" / "1")
            return f"holds 2 models .0 with {COUNT} photographs, 1 with {COUNT}"
        case "damaged model":
            (model / "images.bin").write_bytes((model / "images.bin").read_bytes()[:50])
            return "sparse/0: no readable COLMAP model"
        case "few placed":
            for number in range(COUNT + 1):
                shutil.copy(image, folder / "images" / f"more_{number}.jpg")
            return f"has {COUNT} of the {2 * COUNT + 1} photographs"
        case "absent photograph":
            image.unlink()
            return "IMG_4.png: no such photograph, but .*sparse/0 lists it"
        case "cropped photograph":
            Image.new("RGB", (160, 110)).save(image)
            return "IMG_4.png: is 160x110 .*COLMAP saw 160x120"
        case "unknown lens" | "panorama":
            pycolmap.Reconstruction(str(model)).write_text(str(model))
            for file in model.glob("*.bin"):
                file.unlink()
            new = (
                "1 SPECTACLES 160 120 1 2 3"
                if what == "unknown lens"
                else "1 EQUIRECTANGULAR 160 120 160 120"
            )
            (model / "cameras.txt").write_text(f"{new}\n")
            return (
                "EQUIRECTANGULAR"
                if what == "panorama" and KNOWN
                else "no readable COLMAP model.*amera model does not exist"
            )
        case "no masks":
            shutil.rmtree(folder / "masks")
            return "IMG_0.png: object and background are not separated.*masks/IMG_0.png"
        case "missing mask":
            mask.unlink()
            return f"masks/IMG_4.png: no such mask; 1 of {COUNT} photographs have none"
        case "mask of other size":
            Image.new("L", (120, 160)).save(mask)
            return "masks/IMG_4.png: is 120x160 .*its photograph 160x120"
        case "mask of ones":
            Image.fromarray((np.asarray(Image.open(mask)) > 128).astype(np.uint8)).save(mask)
            return "masks/IMG_4.png: holds only 0 and 1"
        case "inverted masks":
            for file in (folder / "masks").iterdir():
                Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
            return f"only 0 of {COUNT} photographs show the whole object.*are they inverted"
        case "masks of another object":
            for number, file in enumerate((folder / "masks").iterdir()):
                patch = Image.new("L", (160, 120))
                patch.paste(255, (20 + 110 * (number % 2), 20, 30 + 110 * (number % 2), 30))
                patch.save(file)
            return "no object stands out of its masks"
        case "unknown front":
            (folder / "pose.json").write_text('{"front": "IMG_99.png"}')
            return "pose.json: .*'IMG_99.png', is not in the reconstruction"
        case "unknown key":
            (folder / "pose.json").write_text('{"yaw": 3}')
            return r'pose.json: must look like \{"front": "IMG_0.png"\}'
        case "no direction":
            (folder / "pose.json").write_text('{"up": [0, 0, 0]}')
            return "pose.json: up must be three numbers"
        case "too large":
            return "fewer than the wanted 512"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    "no photographs|no reconstruction|several models|damaged model|few placed|absent photograph|cropped "
    "photograph|unknown lens|panorama|no masks|missing mask|mask of other size|mask of ones|inverted "
    "masks|masks of another object|unknown front|"
    "unknown key|no direction|too large".split("|"),
)  # fmt: skip
def test_gaps_are_named_and_nothing_is_left_behind(spoilt, what):
    message = spoil(spoilt, what)
    with pytest.raises(UserError, match=f"(?s)balls.*{message}"):
        make_photos(spoilt.parent, spoilt.parent.parent / "set", size=512 if what == "too large" else 32)
    assert [entry.name for entry in spoilt.parent.parent.iterdir()] == ["all"]


def test_an_absent_extra_is_named(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycolmap", None)
    with pytest.raises(UserError, match=r"pip install 'latentscenes\[photos\]'"):
        read_capture(made[0] / "balls", 32)
