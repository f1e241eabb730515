"""Captures with known faults: exposures, cameras, odd views. Learned corrections recover them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import solid_hits

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras, upper_hemisphere
from latentscenes.core.console import capture_lines
from latentscenes.core.errors import UserError
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages, spread
from latentscenes.data.writing import DatasetWriter
from latentscenes.rendering.render import camera_rays
from latentscenes.training import groups as stage_two
from latentscenes.training import loop
from latentscenes.training.corrections import Corrected, ViewCorrections, corrects, moved, refining, summary
from latentscenes.training.exploit import exploit
from latentscenes.training.loop import train

PIXELS, VIEWS, HELD_OUT = 40, 24, 4
BOX = Box((0.0, 0.0, 0.0), (0.38, 0.25, 0.25))
PAINTED = """
seed: 3
codec: {kind: identity}
planes: {resolution: 24, micro: 8, macro: 0}
field: {hidden: 24}
render: {coarse: 12, fine: 8}
train:
  - name: fit
    epochs: 30
    scenes: 1
    views: 4
    rays: 128
    focus: 0.5
    random_background: 0.5
    losses: {latent: 1, tv: 3.0e-3}
    rates: {micro: 0.3, field: 2.0e-2}
    schedule: cosine
    decay: 0.1
    beta2: 0.99
exploit:
  - name: fit
    epochs: 40
    scenes: 1
    views: 4
    rays: 128
    focus: 0.5
    random_background: 0.5
    losses: {latent: 1, tv: 3.0e-3}
    rates: {micro: 0.3}
    schedule: cosine
    decay: 0.1
    beta2: 0.99
"""


def painted(
    cameras: Cameras, semi: tuple[float, float, float], phase: float
) -> tuple[np.ndarray, np.ndarray]:
    """Colors in [0, 1] (v h w 3) and coverage (v h w) of an ellipsoid painted by place, four rays a pixel."""
    origins, directions = (rays.double().numpy() for rays in cameras.rays(2 * PIXELS, 2 * PIXELS))
    t, _ = solid_hits("box", np.array(semi), origins, directions)
    hit = np.isfinite(t)
    place = origins + np.where(hit, t, 0)[..., None] * directions
    waves = place @ np.array([[11.0, 3, -4], [2, 12, 5], [-6, 4, 13]]) + phase + np.arange(3)
    fine = np.where(hit[..., None], 0.45 + 0.3 * np.sin(waves), 0.0)
    color, alpha = (
        value.reshape(len(cameras), PIXELS, 2, PIXELS, 2, -1).mean((2, 4)) for value in (fine, hit * 1.0)
    )
    return color, alpha[..., 0]  # color is multiplied by coverage


def write(path: Path, seen: Cameras, stored: Cameras, gains=1.0, offsets=0.0, change=None) -> PosedImages:
    """A dataset of one scene to train on and one new one. The new one's fitted views show gains · c + offsets
    and were taken from `seen`, but say `stored`."""
    held = spread(VIEWS, HELD_OUT)
    with DatasetWriter(path, (PIXELS, PIXELS), alpha=True, origin="painted") as writer:
        for name, semi, phase, split in (
            ("old", (0.3, 0.18, 0.22), 1.0, "train"),
            ("new", (0.34, 0.2, 0.16), 0.0, "new"),
        ):
            color, alpha = painted(seen if split == "new" else stored, semi, phase)
            if split == "new":
                color = gains * color + offsets * alpha[..., None]
            images = (255 * (color + 1 - alpha[..., None])).clip(0, 255).round().astype(np.uint8)
            masks = (255 * alpha).round().astype(np.uint8)
            if change and split == "new":
                change(images, masks)
            writer.add(name, images, stored, split, held, masks)
        writer.finish(BOX)
    return PosedImages.open(path)


CPU = torch.device("cpu")
CAMERAS = upper_hemisphere(VIEWS, torch.Generator().manual_seed(1))
HELD = spread(VIEWS, HELD_OUT)
FITTED = [view for view in range(VIEWS) if view not in HELD]
EXACT = ExploitOptions(precision="float32", stage_one=False)


def centered(values: torch.Tensor) -> torch.Tensor:
    """Makes values of views 0 in held-out ones, and 0 in the mean over fitted ones."""
    values = values.clone()
    values[list(HELD)] = 0
    values[FITTED] -= values[FITTED].mean(0)
    return values


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A finished stage 1 on one scene without faults."""
    folder = tmp_path_factory.mktemp("painted")
    clean = write(folder / "data", CAMERAS, CAMERAS)
    return train(config_io.parse(PAINTED, "painted"), clean, folder / "run", device=CPU)


def learn(out, images, parent, *changes, options=EXACT, refine=True):
    """Learns the new scene. Returns its library and the learned corrections."""
    config = refining(parent.config) if refine else parent.config
    config = config_io.parse(config_io.dump(config), "test", changes)
    found = []
    diagnose = stage_two.diagnose

    def watch(model, images, fit):
        found.append(fit.corrections)
        return diagnose(model, images, fit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_two, "diagnose", watch)
        return exploit(out, images, config, parent, options, CPU), found[-1]


def test_wrong_exposures_are_recovered(parent, tmp_path):
    """Exposures change around the object, as with automatic exposure before a window."""
    azimuth = torch.atan2(CAMERAS.positions[:, 1], CAMERAS.positions[:, 0])
    errors = centered(0.35 * torch.sin(azimuth)[:, None].expand(-1, 3))
    gains = 1 + errors.numpy()[:, None, None]
    images = write(tmp_path / "data", CAMERAS, CAMERAS, gains)
    without, _ = learn(tmp_path / "without", images, parent, refine=False)
    library, found = learn(tmp_path / "with", images, parent, "exploit.fit.rates.cameras=0")
    assert not len(found.cameras)
    remaining = found.colors[:, 0] - errors[FITTED]
    assert remaining.square().mean().sqrt() < 0.4 * errors[FITTED].square().mean().sqrt()
    assert found.colors.mean(0).abs().max() < 1e-5  # the scene keeps its own colors
    better, worse = library.index.info("new"), without.index.info("new")
    assert better.psnr > worse.psnr + 1
    low, high = better.tags["view_corrections"]["gains"]
    assert low < 0.8 and high > 1.2
    (line,) = capture_lines(better.tags)
    assert line.startswith("colors corrected by gains 0.")


def test_shifted_cameras_are_recovered(parent, tmp_path):
    motion = centered(0.04 * torch.randn(VIEWS, 6, generator=torch.Generator().manual_seed(2)))
    images = write(tmp_path / "data", moved(CAMERAS, motion, BOX.numbers.expand(VIEWS, 6)), CAMERAS)
    without, _ = learn(tmp_path / "without", images, parent, refine=False)
    library, found = learn(tmp_path / "with", images, parent, "exploit.fit.rates.colors=0")
    assert not len(found.colors)
    wrong, remaining = motion[FITTED], found.cameras - motion[FITTED]
    for part in (slice(0, 3), slice(3, 6)):
        assert remaining[:, part].square().mean() < 0.5 * wrong[:, part].square().mean()
    better, worse = library.index.info("new"), without.index.info("new")
    assert better.psnr > worse.psnr + 1
    assert found.cameras.mean(0).abs().max() < 1e-5  # the scene stays where it is
    turned, way = (better.tags["view_corrections"][name] for name in ("turned_degrees", "moved_percent"))
    assert 1 < turned[0] < turned[1] < 12 and 1 < way[0] < way[1] < 20


def test_corrections_that_bring_nothing_are_left_out(parent, tmp_path):
    """A capture without faults is learned to the last bit as without --refine; one with shifted cameras keeps
    corrections of cameras alone."""
    images = write(tmp_path / "clean", CAMERAS, CAMERAS)
    without, _ = learn(tmp_path / "without", images, parent, refine=False)
    library, found = learn(tmp_path / "with", images, parent)
    assert found is None
    assert library.index.place("new").checksum == without.index.place("new").checksum
    assert library.index.info("new").silhouettes is True  # masks, and random backgrounds
    assert library.index.info("new").cpu_seconds > 1.3 * without.index.info("new").cpu_seconds  # with trials
    assert not any((library.path / "work").glob("*/run.json"))
    tags = library.index.info("new").tags
    assert tags["view_corrections"] == {"left_out": ["colors", "cameras"]}
    assert [line.split(" brought")[0] for line in capture_lines(tags)] == [
        "corrections of colors",
        "corrections of cameras",
    ]
    motion = centered(0.03 * torch.randn(VIEWS, 6, generator=torch.Generator().manual_seed(2)))
    images = write(tmp_path / "shifted", moved(CAMERAS, motion, BOX.numbers.expand(VIEWS, 6)), CAMERAS)
    library, found = learn(tmp_path / "refined", images, parent)
    assert len(found.cameras) and not len(found.colors)
    assert library.index.info("new").tags["view_corrections"]["left_out"] == ["colors"]


def test_both_kinds_of_corrections_are_kept_where_both_help(parent, tmp_path):
    motion = centered(0.03 * torch.randn(VIEWS, 6, generator=torch.Generator().manual_seed(2)))
    azimuth = torch.atan2(CAMERAS.positions[:, 1], CAMERAS.positions[:, 0])
    gains = 1 + centered(0.35 * torch.sin(azimuth)[:, None].expand(-1, 3)).numpy()[:, None, None]
    seen = moved(CAMERAS, motion, BOX.numbers.expand(VIEWS, 6))
    images = write(tmp_path / "data", seen, CAMERAS, gains)
    library, found = learn(tmp_path / "library", images, parent)
    assert len(found.cameras) and len(found.colors)
    assert "left_out" not in library.index.info("new").tags["view_corrections"]


@pytest.mark.parametrize("which", ["origins", "directions"])
def test_slopes_of_rays_are_those_of_the_corrections(which):
    """Against autograd through `moved`, at corrections of zero, in boxes and units of three scenes."""
    motion, boxes = torch.zeros(3, 6).requires_grad_(), torch.tensor(BOXES)
    cameras, weights = CAMERAS[[0, 5, 9]], torch.randn(3, 25, 3)
    rays = camera_rays(moved(cameras, motion, boxes), boxes, 5, 5, units=torch.tensor([1.0, 0.4, 1.7]))
    (expected,) = torch.autograd.grad((getattr(rays, which) * weights).sum(), motion)
    free = rays._replace(
        origins=rays.origins.detach().requires_grad_(), directions=rays.directions.detach().requires_grad_()
    )
    ((free.origins + free.directions).sum() * 0 + (getattr(free, which) * weights).sum()).backward()
    corrected = Corrected.__new__(Corrected)
    corrected.view, corrected.all, corrected.rows = (
        SimpleNamespace(rays=free), SimpleNamespace(boxes=boxes), torch.arange(3),
    )  # fmt: skip
    found = corrected._slopes().sum(1)
    assert expected.abs().max() > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


BOXES = [
    [0.1, 0.02, -0.05, 0.42, 0.34, 0.3],
    [0.0, -0.2, 0.05, 0.12, 0.2, 0.14],
    [0.3, 0.1, 0.2, 0.8, 0.6, 0.5],
]


def short(tmp_path):
    """Images with wrong exposures, and changes to the configuration that make learning short."""
    images = write(
        tmp_path / "data", CAMERAS, CAMERAS, 1 + 0.2 * np.sin(np.arange(VIEWS))[:, None, None, None]
    )
    return images, ("exploit.fit.epochs=3",)


def test_a_stopped_refinement_ends_like_one_that_is_not_stopped(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_two, "HELPS", 10.0)  # keeps all corrections
    images, changes = short(tmp_path)
    whole, corrections = learn(tmp_path / "whole", images, parent, *changes)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    terms, left = loop.terms, [9]

    def fragile(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return terms(*arguments)

    monkeypatch.setattr(loop, "terms", fragile)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "stopped", images, parent, *changes)
    stopped, again = learn(tmp_path / "stopped", images, parent, *changes)
    assert left[0] < -3  # it went on, rather than beginning again
    assert whole.index.place("new").checksum == stopped.index.place("new").checksum
    for name, table in corrections.state().items():
        assert torch.equal(table, again.state()[name]) and table.abs().max() > 0
    assert whole.index.info("new").tags == stopped.index.info("new").tags


ODD = {"color": FITTED[3], "camera": FITTED[8], "mask": FITTED[14]}


def spoil(images, masks):
    """One view in other colors, one of another side, one whose mask lacks a half."""
    color, camera, mask = ODD.values()
    inside = masks[color][..., None] / 255.0
    images[color] = (255 - (images[color][..., ::-1] * inside)).round()
    images[camera], masks[camera] = 255, np.roll(masks[camera], 25, axis=1)
    solid = masks[mask].copy()
    solid[:, PIXELS // 2 :] = 0
    images[mask][:, PIXELS // 2 :], masks[mask] = 255, solid


def test_odd_views_are_named_and_left_out(parent, tmp_path, capsys):
    images = write(tmp_path / "data", CAMERAS, CAMERAS, change=spoil)
    library, _ = learn(tmp_path / "all", images, parent, refine=False)
    odd = library.index.info("new").tags["odd_views"]
    assert set(odd) <= {"disagreeing", "masks"}
    assert ODD["color"] in odd["disagreeing"] and ODD["mask"] in odd["masks"]
    found = {view for views in odd.values() for view in views}
    assert found == set(ODD.values())
    told = " ".join(capsys.readouterr().err.split())
    assert f"new: views {', '.join(map(str, odd['disagreeing']))} disagree with the others" in told
    options = dataclasses.replace(EXACT, drop_views=True)
    without, _ = learn(tmp_path / "without", images, parent, refine=False, options=options)
    assert without.index.info("new").tags["odd_views"] == odd | {"left_out": True}
    assert without.index.info("new").psnr > library.index.info("new").psnr + 0.3
    assert not list((without.path / "work").glob("*/"))


def test_a_good_capture_has_no_odd_views(parent, tmp_path):
    images = write(tmp_path / "data", CAMERAS, CAMERAS)
    library, _ = learn(tmp_path / "library", images, parent, refine=False)
    assert library.index.info("new").tags == {}


def test_what_is_refined_follows_the_codec(parent):
    config = refining(parent.config)
    assert corrects(config.exploit) and not corrects(parent.config.exploit)
    assert refining(config) is config
    latent = config_io.parse(
        config_io.dump(parent.config),
        "test",
        ["codec.kind=convolutional", "exploit.fit.random_background=0", "train.fit.random_background=0"],
    )
    rates = refining(latent).exploit[0].rates
    assert rates.cameras > 0 and rates.colors == 0
    with pytest.raises(UserError, match="rates.colors needs codec.kind: identity or guided"):
        config_io.parse(config_io.dump(latent), "test", ["exploit.fit.rates.colors=0.1"])
    with pytest.raises(UserError, match="need losses.latent, or losses.color with rays, and no rgb"):
        config_io.parse(config_io.dump(config), "test", ["exploit.fit.rays=0", "exploit.fit.focus=0",
            "exploit.fit.random_background=0", "exploit.fit.losses.rgb=1"])  # fmt: skip
    guided = refining(config_io.load("latent")).exploit
    assert [(stage.rates.colors, stage.rates.cameras) for stage in guided] == [(0.1, 0.5), (0, 0)]
    whole = ["exploit.fit.rays=0", "exploit.fit.focus=0", "exploit.fit.random_background=0",
             "exploit.fit.losses.latent=0", "exploit.fit.losses.rgb=1"]  # fmt: skip
    with pytest.raises(UserError, match="--refine: corrections of views are learned from losses.latent"):
        refining(config_io.parse(config_io.dump(parent.config), "test", whole))
    with pytest.raises(UserError, match="must not exceed 1"):
        config_io.parse(config_io.dump(config), "test", ["exploit.fit.rates.cameras=2"])


def test_a_scene_is_corrected_in_its_own_box(parent, tmp_path):
    """The same motions are larger parts of a smaller box, and the same turns."""
    boxes, motion = torch.tensor(BOXES[:2]).repeat_interleave(2, 0), 0.03 * torch.ones(4, 6)
    ranges, stages = [slice(0, 2), slice(2, 4)], refining(parent.config).exploit
    found = ViewCorrections.none(ranges, torch.tensor(BOXES[:2]), stages)
    assert torch.equal(found.boxes, boxes)
    found.cameras.copy_(motion)
    cameras = CAMERAS[[0, 1, 0, 1]]
    shifted = found.move(cameras, torch.arange(4))
    back = shifted.positions - boxes[:, :3]
    turned = moved(cameras, motion * torch.tensor([1.0, 1, 1, 0, 0, 0]), boxes).positions - boxes[:, :3]
    assert torch.allclose(
        back - turned, 0.03 * boxes[:, 3:].norm(dim=1, keepdim=True).expand(4, 3), atol=1e-6
    )
    one = found.of_scene(1)
    assert torch.equal(one.boxes, boxes[2:]) and torch.equal(one.cameras, motion[2:])
    ways = (shifted.positions - cameras.positions)[2:].norm(dim=1) / (2 * boxes[2, 3:].norm())
    assert summary(one, cameras[[2, 3]])["moved_percent"][1] == pytest.approx(
        100 * ways.max().item(), abs=1e-3
    )


def test_tags_of_the_same_names_that_mean_something_else_say_nothing():
    assert capture_lines({"odd_views": "none", "view_corrections": 3}) == []
    assert capture_lines({"view_corrections": {"gains": ["much", 2]}}) == []
    assert capture_lines({"odd_views": {"masks": [2, 5], "left_out": True}}) == [
        "views 2, 5 have masks that do not match (left out)"
    ]
