"""The viewer draws what the library renders; browsers may connect and vanish; a real browser turns a car."""

import io
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from browser import PROGRAM, browser, until
from conftest import TINY
from PIL import Image
from results import made_run

import latentscenes
from latentscenes.core import config_io
from latentscenes.core.cameras import Cameras, orbit
from latentscenes.core.errors import UserError
from latentscenes.export.sheets import captions_of
from latentscenes.viewer.painter import (
    FAR_AWAY,
    Blend,
    Frame,
    Painter,
    Renderer,
    ViewRequest,
    along_axis,
    blended,
    picture_size,
)

viser = pytest.importorskip("viser")
from websockets import Headers  # noqa: E402 — needs viser

from latentscenes.viewer import panels  # noqa: E402 — needs viser
from latentscenes.viewer.guard import refusal  # noqa: E402
from latentscenes.viewer.server import ABOUT, Viewer, check_port  # noqa: E402

CAR = """
codec: {kind: identity}
planes: {resolution: 32, micro: 4, macro: 8, bases: 3}
field: {hidden: 32}
render: {coarse: 16, fine: 16}
train:
  - name: scenes
    epochs: 25
    scenes: 3
    views: 4
    rays: 256
    losses: {latent: 1, tv: 1e-3}
    rates: {micro: 0.5, weights: 0.02, bases: 0.3, field: 1e-2}
    schedule: cosine
    decay: 0.1
"""


@pytest.fixture(scope="module")
def solid_library(tmp_path_factory, solids):
    """Four solids with random parameters, in a codec's latents."""
    folder = tmp_path_factory.mktemp("solids")
    run = made_run(folder / "run", config_io.parse(TINY, "tiny"), solids, "train")
    return latentscenes.create_library(folder / "library", run.path, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def car_library(tmp_path_factory):
    """Three procedural cars, learned for three seconds."""
    from latentscenes.data.dataset import PosedImages
    from latentscenes.data.raycast import ViewOptions
    from latentscenes.data.synthetic.cars import make_cars
    from latentscenes.training.loop import train

    folder = tmp_path_factory.mktemp("cars")
    make_cars(folder / "data", ViewOptions(views=14, size=48, held_out=2, samples=2), train=3, new=0)
    train(
        config_io.parse(CAR, "car"),
        PosedImages.open(folder / "data"),
        folder / "run",
        device=torch.device("cpu"),
    )
    return latentscenes.create_library(folder / "library", folder / "run", device="cpu")


def request(library, scene: str, canvas=(32, 32), **what) -> ViewRequest:
    return ViewRequest(scene, library.orbit(1, 25.0, 40.0), canvas, **what)


# Images


def test_pictures_are_those_of_the_library(solid_library):
    painter, camera = Painter(solid_library), solid_library.orbit(1, 25.0, 40.0)
    truth = solid_library["blue_egg"].render(camera, size=32)
    coarse = solid_library["blue_egg"].render(camera, size=32, geometry=False)
    drawn = painter.draw(request(solid_library, "blue_egg"), 32)
    assert np.abs(drawn.picture.astype(int) - truth.images[0]).max() <= 1 and drawn.depth is None
    opacity = painter.draw(request(solid_library, "blue_egg", mode="opacity"), 32).picture
    assert np.abs(opacity[..., 0] - 255 * (1 - truth.opacity[0])).max() <= 1
    latent = painter.draw(request(solid_library, "blue_egg", mode="latent", channel=2), 32).picture
    assert (
        latent.shape == (32, 32, 3)
        and np.corrcoef(latent[::4, ::4, 0].ravel(), coarse.latents[0, :, :, 2].ravel())[0, 1] > 0.98
    )
    assert painter.draw(request(solid_library, "blue_egg", mode="depth"), 32).picture.shape == (32, 32, 3)


def test_depth_is_given_where_something_solid_is(car_library):
    scene, camera = car_library[car_library.names[0]], car_library.orbit(1, 25.0, 40.0)
    truth = scene.render(camera, size=32)
    depth = Painter(car_library).draw(request(car_library, scene.name, depth=True), 32).depth
    solid = truth.opacity[0] > 0.5
    assert solid.any() and not solid.all() and np.all(depth[~solid] == np.float32(FAR_AWAY))
    assert np.allclose(
        depth[solid], along_axis(torch.from_numpy(truth.depth[0]), camera).numpy()[solid], atol=1e-5
    )


def test_depth_along_the_axis_is_what_projection_gives(solid_library):
    camera, distances = solid_library.orbit(1, 10.0, 70.0), 0.5 + torch.rand(12, 16)
    origins, directions = camera.rays(12, 16)
    _, depth = camera.project((origins + distances.reshape(1, -1, 1) * directions)[0])
    assert torch.allclose(along_axis(distances, camera).reshape(-1), depth[0], atol=1e-5)


def test_an_image_can_be_canceled(solid_library):
    assert Painter(solid_library).draw(request(solid_library, "red_ball"), 32, is_stale=lambda: True) is None


def test_blends_run_from_one_scene_to_the_other(solid_library):
    first, second = solid_library["red_ball"].rows, solid_library["green_box"].rows
    half = blended(first, second, Blend("green_box", 0.5))
    assert torch.equal(half.micro, first.micro) and torch.allclose(
        half.weights, (first.weights + second.weights) / 2
    )
    for share, like in ((0.0, first), (1.0, second)):
        both = blended(first, second, Blend("green_box", share, micro=True))
        assert all(
            torch.allclose(value, like.tables()[name], atol=1e-6) for name, value in both.tables().items()
        )
    painter = Painter(solid_library)
    blends = [Blend("green_box", share, micro=True) for share in (0.0, 1.0)]
    ends = [painter.draw(request(solid_library, "red_ball", blend=blend), 32).picture for blend in blends]
    alone = [painter.draw(request(solid_library, name), 32).picture for name in ("red_ball", "green_box")]
    assert all(
        np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(ends, alone, strict=True)
    ) and not np.array_equal(*alone)


def test_changes_by_other_processes_are_seen(solid_library, tmp_path):
    from latentscenes.storage.library import LibraryFolder

    solid_library.export(solid_library.names, tmp_path / "copy")
    library = latentscenes.open_library(tmp_path / "copy", device="cpu")
    painter, other = Painter(library), LibraryFolder.open(tmp_path / "copy")
    before = painter.draw(request(library, "red_ball"), 32).picture
    box = painter.draw(request(library, "green_box"), 32).picture
    other.remove(["red_ball"])
    with pytest.raises(UserError, match="'red_ball' was removed or renamed meanwhile"):
        painter.draw(request(library, "red_ball"), 32)
    other.rename("green_box", "red_ball")
    after = painter.draw(request(library, "red_ball"), 32).picture
    assert np.array_equal(after, box) and not np.array_equal(after, before)


@pytest.mark.parametrize(("canvas", "side", "step", "size"), [
    ((800, 1600), 128, 4, (128, 256)), ((1600, 800), 128, 4, (256, 128)), ((100, 90), 384, 4, (100, 88)),
    ((1, 1), 128, 8, (8, 8)), ((0, 500), 128, 2, (2, 4)), ((90, 4000), 64, 1, (64, 192)),
])  # fmt: skip
def test_pictures_are_shaped_like_the_window_and_no_larger(canvas, side, step, size):
    assert picture_size(canvas, side, step) == size


# The drawing thread


class Slow(Painter):
    """A painter that draws when `go` is released and records its images."""

    def __init__(self):
        self.drawn: list[tuple[str, int]] = []
        self.go = threading.Semaphore(0)

    def draw(self, request, side, is_stale=lambda: False):
        self.go.acquire(timeout=120)
        if request.scene == "broken":
            raise ValueError("broken")
        if is_stale():
            return None
        self.drawn.append((request.scene, side))
        return Frame(np.zeros((1, 1, 3), np.uint8), None)


def wanted(name: str):
    return lambda: ViewRequest(name, orbit(1), (64, 64))


def test_newest_requests_are_drawn_in_turn_and_sharper_at_the_end():
    painter, shown, failed = Slow(), [], []
    renderer = Renderer(painter, 10, 30)
    for client in (1, 2, 3):
        renderer.add(client, shown.append, failed.append)
    renderer.request(1, wanted("a0"))
    until(lambda: not renderer._clients[1].pending)
    for number in (1, 2, 3):
        renderer.request(1, wanted(f"a{number}"))
        renderer.request(2, wanted(f"b{number}"))
    renderer.request(3, wanted("broken"))
    renderer.request(4, wanted("nobody's"))
    painter.go.release(4)
    until(lambda: len(painter.drawn) == 3 and failed)
    assert painter.drawn == [("a0", 10), ("b3", 10), ("a3", 10)] and str(failed[0]) == "broken"
    renderer.remove(3)
    painter.go.release(10)
    until(lambda: len(shown) == 5)
    assert sorted(painter.drawn[3:]) == [("a3", 30), ("b3", 30)]
    assert renderer.run(lambda given: given is painter).result(120)
    with pytest.raises(ZeroDivisionError):
        renderer.run(lambda _: 1 / 0).result(120)
    renderer.close()


def test_moving_clients_come_before_resting_ones():
    painter = Slow()
    renderer = Renderer(painter, 10, 30)
    for client in (1, 2):
        renderer.add(client, lambda _: None, lambda _: None)
    renderer.request(1, wanted("still"))
    painter.go.release()
    until(lambda: painter.drawn and renderer._clients[1].sharpen_at == math.inf)
    renderer.request(2, wanted("moving"))
    painter.go.release(10)
    until(lambda: len(painter.drawn) == 4)
    assert painter.drawn[:2] == [("still", 10), ("moving", 10)] and set(painter.drawn[2:]) == {
        ("still", 30),
        ("moving", 30),
    }
    renderer.close()


def test_names_are_matched_by_parts_and_patterns():
    names = {"Car-1": "", "car-12": "Racing car · Sport", "bus-1": "Car for many"}
    assert panels.matching(names, "-1") == panels.matching(names, "") == list(names)
    assert panels.matching(names, " SPORT ") == ["car-12"] and panels.matching(names, "for") == ["bus-1"]
    assert panels.matching(names, "*-1") == ["Car-1", "bus-1"]
    assert panels.matching(names, "c?r-1") == ["Car-1"]


# Many browsers


class FakeBrowser:
    """Speaks the protocol of viser's page: sends its camera and receives images."""

    def __init__(self, viewer: Viewer):
        from websockets.sync.client import connect

        address, protocol = f"ws://127.0.0.1:{viewer.port}", f"viser-v{viser.__version__}"
        self.socket = connect(address, subprotocols=[protocol], max_size=None, compression=None)
        self.pictures: list[np.ndarray] = []
        self.events: list[str] = []
        """What was shown and removed, in order."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        import msgspec
        import zstandard
        from websockets.exceptions import ConnectionClosed

        try:
            for message in self.socket:
                length = int.from_bytes(message[8:16], "little")
                content = msgspec.msgpack.decode(
                    zstandard.ZstdDecompressor().decompress(message[16 : 16 + length])
                )
                for part in content["messages"]:
                    if "Notification" in part["type"]:
                        self.events.append(part.get("props", {}).get("title", "removed"))
                    if part["type"] == "BackgroundImageMessage" and part["rgb_data"]:
                        self.events.append("picture")
                        self.pictures.append(np.array(Image.open(io.BytesIO(part["rgb_data"]))))
        except (ConnectionClosed, OSError):
            pass

    def render_images(self, camera: Cameras, canvas: tuple[int, int], **odd) -> None:
        from viser.transforms import SO3

        matrix, position = camera.cam2world[0].double().numpy(), camera.positions[0].tolist()
        plain = {
            "wxyz": SO3.from_matrix(matrix[:, :3]).wxyz.tolist(),
            "position": position,
            "fov": 2 * math.atan(0.5 / camera.intrinsics[0, 1].item()),
            "near": 0.01,
            "far": 1000.0,
            "image_height": canvas[0],
            "image_width": canvas[1],
            "look_at": [0.0, 0.0, 0.0],
            "up_direction": [0.0, 0.0, 1.0],
        }
        self.send("ViewerCameraMessage", **plain | odd)

    def send(self, kind: str, **values) -> None:
        import msgspec

        self.socket.send(msgspec.msgpack.encode({"type": kind, **values}))

    def vanish(self) -> None:
        """Breaks the connection without closing it, as after a power cut."""
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(os.dup(self.socket.socket.fileno()))
        self.socket.socket.close()


def same_picture(found: np.ndarray, truth: np.ndarray) -> bool:
    """Compares images up to JPEG artifacts."""
    return found.shape == truth.shape and np.abs(found.astype(float) - truth).mean() < 3


def test_a_window_of_any_shape_sees_what_the_library_shows(car_library):
    with Viewer(car_library, port=0, moving=32, still=48) as viewer:
        fake, camera = FakeBrowser(viewer), car_library.orbit(1, 25.0, 200.0)
        fake.render_images(camera, (400, 600))
        until(lambda: fake.pictures and fake.pictures[-1].shape == (48, 72, 3))
        assert fake.pictures[0].shape == (32, 48, 3)
        intrinsics = camera.intrinsics.clone()
        intrinsics[:, 0] = intrinsics[:, 1] * 400 / 600
        truth = (
            car_library[car_library.names[0]]
            .render(Cameras(camera.cam2world, intrinsics), size=(48, 72))
            .images[0]
        )
        assert truth.min() < 100 and same_picture(fake.pictures[-1], truth)


def after_the_note(fakes: list[FakeBrowser], draw: Callable) -> Callable:
    """A painter's `draw` that first waits until the browser shows a note."""

    def patient(*given, **named):
        until(lambda: fakes and fakes[0].events)
        return draw(*given, **named)

    return patient


def test_a_note_stands_until_the_first_picture(car_library, monkeypatch):
    fakes: list[FakeBrowser] = []
    monkeypatch.setattr(Painter, "draw", after_the_note(fakes, Painter.draw))
    with Viewer(car_library, port=0, moving=32, still=32) as viewer:
        fakes.append(fake := FakeBrowser(viewer))
        fake.render_images(car_library.orbit(1, 25.0), (64, 64))
        until(lambda: fake.events.count("picture") >= 2)
        assert fake.events[:3] == ["Drawing the first picture", "removed", "picture"]
        assert set(fake.events[3:]) == {"picture"}


def test_a_first_picture_that_fails_ends_the_note(car_library, monkeypatch):
    fakes: list[FakeBrowser] = []
    monkeypatch.setattr(Painter, "draw", after_the_note(fakes, lambda *given, **named: 1 / 0))
    with Viewer(car_library, port=0, moving=32, still=32) as viewer:
        fakes.append(fake := FakeBrowser(viewer))
        fake.render_images(car_library.orbit(1, 25.0), (64, 64))
        until(lambda: len(fake.events) >= 3)
        assert fake.events[:3] == ["Drawing the first picture", "removed", "That did not work"]


def test_twenty_browsers_of_which_half_vanish(car_library):
    with Viewer(car_library, port=0, moving=32, still=32) as viewer:
        cameras, fakes = car_library.orbit(20, 25.0), [FakeBrowser(viewer) for _ in range(20)]
        for place, fake in enumerate(fakes):
            fake.render_images(cameras[torch.tensor([place])], (64, 64))
        until(lambda: viewer.sessions == 20 and all(fake.pictures for fake in fakes))
        for fake in fakes[:10]:
            fake.render_images(cameras[torch.tensor([0])], (64, 64))
            fake.vanish()
        until(lambda: viewer.sessions == viewer._renderer.clients == 10)
        for place, fake in enumerate(fakes[10:], 10):
            fake.pictures.clear()
            fake.render_images(cameras[torch.tensor([place - 5])], (64, 64))
        until(lambda: all(fake.pictures for fake in fakes[10:]))
        truth = [
            car_library[car_library.names[0]].render(cameras[torch.tensor([place - 5])], size=32).images[0]
            for place in range(10, 20)
        ]
        assert all(
            same_picture(fake.pictures[-1], image) for fake, image in zip(fakes[10:], truth, strict=True)
        )
        for fake in fakes[10:]:
            fake.socket.close()
        until(lambda: viewer.sessions == viewer._renderer.clients == 0)


def test_no_browser_can_open_a_tunnel_to_the_outside(car_library, monkeypatch):
    import viser._viser

    monkeypatch.setattr(viser._viser, "ViserTunnel", None)
    with Viewer(car_library, port=0, moving=32, still=32) as viewer:
        fake = FakeBrowser(viewer)
        fake.render_images(car_library.orbit(1), (32, 32))
        fake.send("ShareUrlRequest")
        until(lambda: fake.pictures)
        assert viewer._server.request_share_url() is None and viewer._server._share_tunnel is None


# Who may connect


@pytest.mark.parametrize(("bound", "host", "origin", "refused"), [
    ("127.0.0.1", "127.0.0.1:8080", None, False), ("127.0.0.1", "localhost:9000", None, False),
    ("127.0.0.1", "[::1]:8080", "http://[::1]:8080", False), ("127.0.0.1", "evil.example:8080", None, True),
    ("127.0.0.1", "127.0.0.1.evil.example", None, True), ("127.0.0.1", None, None, True),
    ("127.0.0.1", "127.0.0.1:8080", "http://evil.example", True),
    ("127.0.0.1", "localhost:8080", "null", True),
    ("127.0.0.1", "localhost:8080", "http://localhost:8081", True), ("127.0.0.1", "[", None, True),
    ("0.0.0.0", "my-machine:8080", "http://my-machine:8080", False),
    ("0.0.0.0", "my-machine:8080", "http://evil.example", True),
])  # fmt: skip
def test_foreign_pages_are_refused(bound, host, origin, refused):
    named = {"Host": host, "Origin": origin}
    headers = Headers({name: value for name, value in named.items() if value is not None})
    assert (refusal(headers, bound) is not None) == refused


def ask(viewer: Viewer, **headers: str) -> tuple[int, str]:
    """Returns the status of a request for the page, and its content security policy."""
    from http.client import HTTPConnection

    connection = HTTPConnection("127.0.0.1", viewer.port, timeout=120)
    connection.request("GET", "/", headers=headers)
    answer = connection.getresponse()
    connection.close()
    return answer.status, answer.getheader("Content-Security-Policy", "")


def test_the_server_guards_itself(car_library, capfd):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with Viewer(car_library, port=0, moving=32, still=32) as viewer:
        status, policy = ask(viewer)
        assert status == 200 and "script-src-attr 'none'" in policy and "default-src 'none'" in policy
        assert ask(viewer, Host="evil.example")[0] == 403
        spoken = [f"viser-v{viser.__version__}"]
        for options in (
            {"origin": "http://evil.example", "subprotocols": spoken},
            {"subprotocols": ["viser-v0"]},
        ):
            with pytest.raises(InvalidStatus):
                connect(f"ws://127.0.0.1:{viewer.port}", **options)
        for _ in range(3):
            odd = FakeBrowser(viewer)
            odd.socket.send(b"\xff\x1b[31m" * 10)
            until(lambda: odd.socket.close_code is not None)  # noqa: B023
        fake = FakeBrowser(viewer)
        fake.render_images(car_library.orbit(1), (32, 32))
        until(lambda: fake.pictures)
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1
    assert "a browser sent a message that cannot be understood" in printed.err
    assert "\x1b" not in printed.err and "Traceback" not in printed.err + printed.out


def test_odd_cameras_take_one_line(car_library, capfd):
    """Also as the first message of a browser, which starts its session."""
    with warnings.catch_warnings(), Viewer(car_library, port=0, moving=32, still=32) as viewer:
        for odd in (
            {"image_height": 0, "image_width": 0}, {"image_height": -5}, {"fov": float("inf")}, {"fov": 0.0},
            {"fov": float("nan")}, {"wxyz": [0.0] * 4}, {"wxyz": "abc"}, {"position": [1.0]}, {"fov": "x"},
            {"position": [1e300] * 3},
        ):  # fmt: skip
            fake = FakeBrowser(viewer)
            fake.render_images(car_library.orbit(1), (32, 32), **odd)
            time.sleep(0.1)
        plain = FakeBrowser(viewer)
        plain.render_images(car_library.orbit(1), (32, 32))
        until(lambda: plain.pictures)
    printed = capfd.readouterr()
    assert printed.err.count("\n") <= 1 and "Traceback" not in printed.err, printed.err


def test_text_of_a_library_is_shown_as_text():
    text = "<img src=x onerror=alert(1)>\"'><script>"
    shown = panels.GRID.render(columns=3, tiles=[("id", text, text, text, panels.EMPTY, text)])
    about = ABOUT.render(name=text, about=text, blend=text, facts=text)
    shown += panels.NOTE.render(text=UserError(text)) + about
    assert shown.count("<img") == 1 and "<script" not in shown and shown.count("&lt;img src=x") == 9


def test_long_names_differ_below_thumbnails():
    folder = "BlendSwap-CC-0__Blend_Swap_CC-0"
    names = [f"{folder}_armchair__armchair", f"{folder}_clock__clock", "Blend_Swap_CC-0_bedside_table_2", "x"]
    assert list(captions_of(names, 16).values()) == ["armchair", "clock", "Blend_Sw…table_2", "x"]


def test_thumbnails_that_are_large_are_not_shown():
    def address(side: int) -> str:
        stream = io.BytesIO()
        Image.new("1", (side, 8)).save(stream, "PNG")
        return panels.picture_address(stream.getvalue())

    assert address(96).startswith("data:image/png;base64,") and address(1025) == panels.EMPTY
    assert panels.picture_address(b"<svg onload=alert(1)>") == panels.EMPTY


def test_new_browsers_come_first_and_jobs_take_turns():
    painter, done = Slow(), []
    renderer = Renderer(painter, 10, 30)
    for client in range(3):
        renderer.add(client, lambda _: None, lambda _: None)
    renderer.request(0, wanted("first"))
    until(lambda: not renderer._clients[0].pending)
    for client in range(3):
        renderer.request(client, wanted(f"old {client}"))
    renderer.add(9, lambda _: None, lambda _: None)
    renderer.request(9, wanted("new"))
    jobs = [renderer.run(lambda _: done.append(len(painter.drawn))) for _ in range(2)]
    painter.go.release(20)
    for job in jobs:
        job.result(10)
    until(lambda: len(painter.drawn) >= 5)
    assert [name for name, _ in painter.drawn[:3]] == ["first", "new", "old 2"] and done == [1, 2]
    renderer.close()


def test_thirty_browsers_that_drag_without_pause_share_the_frames_and_a_new_one_waits_for_one():
    painter, failed = Slow(), []
    renderer = Renderer(painter, 10, 30)

    def dragging(client: int):
        return lambda _: renderer.request(client, wanted(str(client)))

    for client in range(30):
        renderer.add(client, dragging(client), failed.append)
    for client in range(30):
        renderer.request(client, wanted(str(client)))
    painter.go.release(150)
    until(lambda: len(painter.drawn) == 150)
    renderer.add(99, dragging(99), failed.append)
    renderer.request(99, wanted("new"))
    painter.go.release(150)
    until(lambda: len(painter.drawn) == 300)
    names = [name for name, _ in painter.drawn]
    counts = [names[:150].count(str(client)) for client in range(30)]
    assert max(counts) - min(counts) <= 1 and names.index("new") <= 151 and not failed
    counts = [names[150:].count(str(client)) for client in range(30)]
    assert max(counts) - min(counts) <= 1
    assert all(side == 10 for _, side in painter.drawn)  # no sharp picture while somebody drags
    renderer.close()


# Errors


def test_mistakes_are_explained(car_library, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            UserError, match=r"127\.0\.0\.1:\d+: cannot serve there \(Address already in use\).*--port"
        ):
            Viewer(car_library, port=taken.getsockname()[1])
    with pytest.raises(UserError, match="another --host"):
        check_port("192.0.2.1", 0)
    for port in (-1, 65536):
        with pytest.raises(UserError, match="must be a number up to 65535"):
            check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="--moving 8 --still 384"):
        Viewer(car_library, port=0, moving=8)
    with pytest.raises(UserError, match="no dataset here"):
        Viewer(car_library, port=0, data=tmp_path)
    car_library.export(car_library.names[:1], tmp_path / "one")
    emptied = latentscenes.open_library(tmp_path / "one", device="cpu")
    emptied.remove(*emptied.names)
    with pytest.raises(UserError, match="this library is empty"):
        Viewer(emptied, port=0)


def test_without_viser_the_remedy_is_named(car_library):
    script = "import sys; sys.modules['viser'] = None; from latentscenes.cli.main import main; "
    script += f"sys.argv = ['l', 'view', {str(car_library.path)!r}]; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        done.stderr == "latentscenes: view needs viser. Run: pip install latentscenes[viewer]\n"
        and done.returncode == 2
    )


def test_the_command_serves_this_machine_alone_and_ends_with_ctrl_c(car_library):
    command = [
        sys.executable,
        "-c",
        "from latentscenes.cli.main import main; main()",
        "view",
        str(car_library.path),
        "--port",
        "0",
        "--threads",
        "1",
    ]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    )
    try:
        line = process.stdout.readline()
        assert "3 scenes at http://127.0.0.1:" in line, line + process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "Ended.\n", "")
    finally:
        process.kill()


# A real browser

LABEL = "[...document.querySelectorAll('label')].find(label => label.innerText.trim() == {!r})"


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_in_a_browser(car_library, tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "PAGE", 2)
    names = car_library.names
    car_library.export(names, tmp_path / "library")
    library = latentscenes.open_library(tmp_path / "library", device="cpu")
    with (
        Viewer(library, port=0, moving=48, still=96) as viewer,
        browser(tmp_path / "profile", 1000, 600) as new,
    ):
        page = new()
        page.open(viewer.url)
        page.wait("document.querySelectorAll('.scenes label').length >= 2")

        def canvas() -> np.ndarray:
            """Returns the middle of the page, between the panels."""
            return np.array(Image.open(io.BytesIO(page.picture())).convert("RGB"))[150:500, 330:670].astype(
                int
            )

        def settled() -> np.ndarray:
            time.sleep(0.5)
            before = canvas()
            for _ in range(50):
                time.sleep(0.3)
                now = canvas()
                if np.abs(now - before).mean() < 0.05 and (now.min(-1) < 200).mean() > 0.02:
                    return now
                before = now
            raise AssertionError("no image, or it keeps changing")

        def differs(a: np.ndarray, b: np.ndarray) -> bool:
            return np.abs(a - b).mean() > 2

        def press(text: str) -> None:
            buttons = "[...document.querySelectorAll('button')]"
            page.evaluate(f"{buttons}.find(button => button.innerText.trim() == {text!r}).click()")

        # The car is in the middle, white above it
        first = settled()
        assert (first[:20].min(-1) > 200).mean() > 0.9 and (
            first[120:230, 110:230].min(-1) < 230
        ).mean() > 0.5

        # A drag turns it
        page.drag((500, 300), (400, 320))
        turned = settled()
        assert differs(first, turned)

        # A click on a thumbnail
        page.click(".scenes label:nth-child(2)")
        page.wait(f"document.body.innerText.includes({names[1]!r})")
        assert differs(turned, chosen := settled())

        # Pages and search
        press("next")
        page.wait("document.body.innerText.includes('3–3 of 3')")
        page.evaluate(
            "(e => { while (!e.querySelector('input')) e = e.parentElement;"
            " e.querySelector('input').focus() })"
            f"({LABEL.format('Search')})"
        )
        page.type(names[2][-4:])
        page.wait("document.body.innerText.includes('1–1 of 1')")

        # Cameras of photographs
        page.evaluate(f"document.getElementById({LABEL.format('Show cameras')}.htmlFor).click()")
        assert differs(chosen, settled())

        # A second scene, which is then removed and chosen again
        press("Choose a second scene")
        page.wait("document.body.innerText.includes('Now click a thumbnail')")
        press(names[2])
        page.wait(f"document.body.innerText.includes('blended with {names[2]}')")
        press("End blending")
        page.wait("!document.body.innerText.includes('blended with')")
        library.remove(names[2])
        press(names[2])
        page.wait("document.body.innerText.includes('That did not work')")
        settled()
        assert page.problems == []
        assert all(address.startswith(viewer.url) for address in page.requests), page.requests
    assert viewer.sessions == 0 or until(lambda: viewer.sessions == 0)
