"""Configurations: read strictly, written back equal, contradictions refused before anything runs."""

import ast
import dataclasses
import inspect

import pytest

from latentscenes.core import config as configuration
from latentscenes.core.config import Config, PlanesConfig
from latentscenes.core.config_io import dump, load, parse, presets
from latentscenes.core.errors import UserError


@pytest.mark.parametrize("name", presets())
def test_presets_round_trip(name):
    config = load(name)
    assert config.train and parse(dump(config), "again") == config
    assert dump(parse(dump(config), "again")) == dump(config)


def test_the_tiny_configuration_round_trips(tiny, tmp_path):
    (tmp_path / "mine.yaml").write_text(dump(tiny))
    assert load(tmp_path / "mine.yaml") == tiny != Config()


def test_nothing_asked_for_is_the_defaults():
    assert parse("", "empty") == Config() == parse("{}", "empty")


def test_values_are_read_as_what_they_are():
    config = parse(
        "{seed: 3, planes: {initial_std: 1e-3, bias: yes}, render: {half_side: 1}, codec: {kind: identity}}",
        "x",
    )
    assert config.planes.initial_std == 1e-3 and config.planes.bias is True and config.seed == 3
    assert config.render.half_side == 1.0 and type(config.render.half_side) is float
    assert parse("render: {half_side: null}", "x").render.half_side is None


STAGE = "train: [{name: a, epochs: 1, scenes: 1, views: 1, losses: {latent: 1}, rates: {micro: 1}}]"

MISTAKES = {
    # unknown names, told the nearest
    "plane: {}": r"^x: unknown setting 'plane'; the nearest known is 'planes'",
    "planes: {resolutoin: 3}": r"^x: planes: unknown setting 'resolutoin'; the nearest known is 'resolution'",
    STAGE.replace(
        "micro", "mirco"
    ): r"^x: train\[0\]: rates: unknown setting 'mirco'; the nearest known is 'micro'",
    "7: 3": "unknown setting 7",
    # wrong types
    "planes: {resolution: 3.5}": "planes: resolution: expected int, got 3.5",
    "planes: {bias: 1}": "planes: bias: expected bool, got 1",
    "planes: {micro: true}": "planes: micro: expected int, got True",
    "planes: {initial_std: wide}": "planes: initial_std: expected float, got 'wide'",
    "planes: {initial_std: true}": "planes: initial_std: expected float",
    "planes: {fusion: stack}": "planes: fusion: 'stack' is not one of concat, sum",
    "planes:": "planes: expected settings, got None",
    "train: {name: a}": "train: expected a list",
    "[1, 2]": "expected settings, got",
    "just words": "expected settings, got",
    "planes: {": "not valid YAML",
    "train: [{name: a}]": r"train\[0\]: 'epochs' is missing",
    # contradictions
    "planes: {micro: 0, macro: 0}": "micro and macro are both 0",
    "planes: {bases: 0}": "bases: must be at least 1",
    "planes: {fusion: sum, micro: 2, macro: 3}": "sum needs micro = macro, but they are 2 and 3",
    "planes: {micro: -1}": "must not be negative",
    "planes: {resolution: 0}": "must be at least 1",
    "render: {coarse: 1}": "coarse must be at least 2",
    "render: {near: 0.5}": "set near and far together",
    "render: {near: 2, far: 1}": "near < far",
    "render: {half_side: -1}": "half_side must be above 0",
    "codec: {downsampling: 3}": "2, 4 or 8, not 3",
    "codec: {kind: tiny}": "tiny needs the folder",
    "codec: {channels: 0}": "channels and width must be at least 1",
    STAGE.replace("epochs: 1", "epochs: 0"): "stage 'a': epochs, scenes and views must be at least 1",
    STAGE.replace("micro: 1", "micro: 0"): "stage 'a': all rates are 0",
    STAGE.replace("latent: 1", "latent: 0"): "stage 'a': all losses are 0",
    STAGE.replace("micro: 1", "micro: -1"): "stage 'a': micro is -1.0",
    STAGE.replace("latent: 1", "latent: .nan"): "stage 'a': latent is nan",
    STAGE.replace("latent: 1", "edges: 1"): "stage 'a': losses.edges is added to rgb or autoencoder",
    STAGE.replace("latent: 1", "preview: 1"): "stage 'a': losses.preview needs render.preview",
    STAGE.replace("latent: 1}", "rgb: 1}, rays: 5"): "stage 'a': rays",
    STAGE.replace("latent: 1}", "latent: 1}, rays: 5, crop: 4"): "stage 'a': rays",
    STAGE.replace("latent: 1", "color: 1"): "losses.color needs codec.kind",
    STAGE.replace("latent: 1}", "latent: 1, color: 1}, rays: 5")
    + "\ncodec: {kind: identity}": "those of latent and preview do not",
    STAGE.replace("latent: 1}", "latent: 1}, crop: 4, focus: 1"): "focus samples by errors",
    STAGE.replace("latent: 1}", "latent: 1}, rays: 4, random_background: 1"): "random_background needs rays",
    "codec: {kind: guided, channels: 3}": "guided has 3 colors, and features",
    STAGE.replace("views: 1", "views: 1, decay: 2, schedule: cosine"): r"decay must be in \(0, 1\]",
    STAGE[:-1] + ", " + STAGE[8:]: "names must differ",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_refused_by_name(text):
    with pytest.raises(UserError, match=MISTAKES[text]):
        parse(text, "x")


def test_overrides(tiny):
    text = dump(tiny)
    config = parse(
        text,
        "x",
        [
            "planes.resolution=9",
            "train.0.epochs=5",
            "train.joint.rates.micro=1e-4",
            "exploit.latent fit.views=3",
        ],
    )
    assert config.planes.resolution == 9 and config.planes.micro == tiny.planes.micro
    assert (
        config.train[0].epochs == 5 and config.train[2].rates.micro == 1e-4 and config.exploit[0].views == 3
    )
    assert (
        parse("", "x", ["render.fine=3", "render.fine=4", "planes.fusion=sum", "planes.micro=22"]).render.fine
        == 4
    )
    assert parse(text, "x", ["exploit=[]"]).exploit == ()
    assert parse("planes:", "x", ["planes.micro=5"]).planes == PlanesConfig(micro=5)
    assert parse(text, "x", ["codec.path=a=b"]).codec.path == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("planes.resolution", "write it as key=value"),
        ("planes.resolutoin=3", "the nearest known is 'resolution'"),
        ("train.nothing.epochs=3", "no stage 'nothing'; there are codec, scenes, joint"),
        ("train.7.epochs=3", "no stage '7'"),
        ("train.0=3", "a whole stage"),
        ("seed.more=3", "seed holds no further settings"),
        ("planes.micro=[1", "not valid YAML"),
        ("planes.micro=many", "expected int, got 'many'"),
    ],
)
def test_mistaken_overrides_are_refused(tiny, override, message):
    with pytest.raises(UserError, match=message):
        parse(dump(tiny), "x", [override])


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: no such configuration file\. Presets: .*rgb"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="neither a YAML file nor a preset"):
        load("rgbb")


def test_every_setting_says_what_it_is():
    for kind in vars(configuration).values():
        if not (
            inspect.isclass(kind)
            and dataclasses.is_dataclass(kind)
            and kind.__module__ == configuration.__name__
        ):
            continue
        assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for entry, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(entry, ast.AnnAssign) and not ast.unparse(entry.annotation).endswith(
                ("Config", "LossWeights", "Rates")
            ):
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert said, f"{kind.__name__}.{entry.target.id} has no docstring"


SIZES = """
planes: {resolution: 64}
larger_pictures:
  384: {planes.resolution: 128, train.fit.rays: 300}
  192: {planes.resolution: 96, planes.bases: 8}
train: [{name: fit, epochs: 1, scenes: 2, views: 2, rays: 100, losses: {latent: 1}, rates: {micro: 1}}]
"""


@pytest.mark.parametrize(
    "size, resolution, bases, rays",
    [(0, 64, 50, 100), (191, 64, 50, 100), (192, 96, 8, 100), (512, 128, 8, 300)],
)
def test_settings_follow_the_size_of_pictures(size, resolution, bases, rays):
    config = parse(SIZES + "\n", "x.yaml", ["planes.micro=4"], size)
    found = config.planes.resolution, config.planes.bases, config.train[0].rays
    assert found == (resolution, bases, rays)
    assert parse(dump(config), "y.yaml", (), 4096) == config  # what is written holds for its size alone


def test_given_settings_come_before_those_for_a_size():
    assert parse(SIZES, "x.yaml", ["planes.resolution=32"], 512).planes.resolution == 32


@pytest.mark.parametrize("text", ["[1]", "{big: {seed: 1}}", "{192: 5}"])
def test_mistaken_sizes_are_refused(text):
    with pytest.raises(UserError, match="larger_pictures: give settings by the least side"):
        parse(f"larger_pictures: {text}", "x.yaml")
    with pytest.raises(UserError, match="planes: unknown setting 'resolutoin'"):
        parse("larger_pictures: {100: {planes.resolutoin: 5}}", "x.yaml", (), 128)
