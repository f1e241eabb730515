"""Codecs: ranges, shapes, who owns which parameter, gradients, weights from files."""

import importlib.util
import json

import pytest
import torch
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file

from latentscenes.core.errors import UserError
from latentscenes.model.codec import Codec, IdentityCodec


def check_contract(codec: Codec, size: int = 32):
    """What every codec owes its callers."""
    images = torch.rand(2, 3, size, size, requires_grad=True)
    latents = codec.encode(images)
    side = size // codec.downsampling
    assert latents.shape == (2, codec.channels, side, side) and codec.latent_size(size, size) == (side, side)
    decoded = codec.decode(latents)
    assert decoded.shape == images.shape
    decoded.square().sum().backward()
    assert images.grad.abs().sum() > 0

    white = codec.background(size, size)
    assert not white.requires_grad
    torch.testing.assert_close(white, codec.encode(torch.ones(1, 3, size, size))[0])

    encoder, decoder = codec.encoder_parameters(), codec.decoder_parameters()
    owned = [id(parameter) for parameter in encoder + decoder]
    assert sorted(owned) == sorted(id(parameter) for parameter in codec.parameters())
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in encoder + decoder
    )
    codec.zero_grad(set_to_none=True)
    codec.decode(latents.detach().requires_grad_()).square().sum().backward()
    assert all(parameter.grad is None for parameter in encoder)
    codec.zero_grad(set_to_none=True)
    codec.encode(images).square().sum().backward()
    assert all(parameter.grad is None for parameter in decoder)


def test_identity():
    codec = IdentityCodec()
    check_contract(codec)
    images = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(codec.decode(codec.encode(images)), images)
    assert torch.equal(codec.background(2, 3), torch.ones(3, 2, 3))


def taesd_states(inputs: int = 3, width: int = 8, channels: int = 5) -> tuple[dict, dict]:
    """Random weights in the TAESD layout, 4x down, with a wider block and a bottleneck, as files name them."""

    def convolution(name, i, o, side=3, bias=True):
        weights = {f"{name}.weight": torch.randn(o, i, side, side) / (side * i**0.5)}
        return weights | ({f"{name}.bias": torch.randn(o) * 0.1} if bias else {})

    def block(place, i, o, hidden=0):
        state = {}
        for k, source in ((0, i), (2, o), (4, o)):
            state |= convolution(f"{place}.conv.{k}", source, o)
        if i != o:
            state |= convolution(f"{place}.skip", i, o, 1, bias=False)
        if hidden:
            state |= convolution(f"{place}.pool.0", i, hidden, 1, bias=False)
            state |= {
                f"{place}.pool.1.weight": torch.ones(hidden),
                f"{place}.pool.1.bias": torch.zeros(hidden),
            }
            state |= convolution(f"{place}.pool.3", hidden, i, 1, bias=False)
        return state

    encoder = (
        convolution(0, inputs, width) | block(1, width, width) | convolution(2, width, width, bias=False)
    )
    encoder |= block(3, width, 2 * width) | convolution(4, 2 * width, width, bias=False)
    encoder |= block(5, width, width, hidden=16) | convolution(6, width, channels)
    decoder = (
        convolution(1, channels, width)
        | block(3, width, width, hidden=16)
        | convolution(5, width, width, bias=False)
    )
    decoder |= block(6, width, width) | convolution(8, width, width, bias=False) | block(9, width, width)
    return encoder, decoder | convolution(10, width, inputs)


def test_tiny_infers_its_architecture():
    from latentscenes.model.tiny import TinyCodec

    torch.manual_seed(0)
    codec = TinyCodec(*taesd_states())
    assert (codec.channels, codec.downsampling) == (5, 4)
    check_contract(codec)
    assert {name.split(".", 1)[1] for name in codec.encoder.state_dict()} >= {"weight", "conv.0.weight"}
    twin = TinyCodec(*taesd_states())
    twin.load_state_dict(codec.state_dict())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(twin.decode(twin.encode(images)), codec.decode(codec.encode(images)))


def test_tiny_files_and_their_mistakes(tmp_path):
    from latentscenes.model.tiny import TinyCodec

    encoder, decoder = taesd_states()
    save_file(encoder, tmp_path / "encoder.safetensors")
    torch.save(decoder, tmp_path / "decoder.pth")
    codec = TinyCodec.load(tmp_path / "encoder.safetensors", tmp_path / "decoder.pth")
    assert torch.equal(codec.encoder[0].weight, encoder["0.weight"])
    with pytest.raises(UserError, match="divide by 4"):
        codec.encode(torch.rand(1, 3, 18, 16))

    def refused(state, reason):
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=f"bad.safetensors.*{reason}"):
            TinyCodec.load(tmp_path / "encoder.safetensors", tmp_path / "bad.safetensors")

    refused(encoder, "TAESD layout")
    refused({f"decoder.layers.{name}": value for name, value in decoder.items()}, "TAESD layout")
    refused(
        {name: value for name, value in decoder.items() if not name.startswith("9.")},
        "one autoencoder|not those",
    )
    refused({name: value for name, value in decoder.items() if name != "3.conv.2.bias"}, "not those")
    refused(taesd_states(channels=6)[1], "one autoencoder")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="bad.safetensors: cannot be read"):
        TinyCodec.load(tmp_path / "bad.safetensors", tmp_path / "decoder.pth")
    with pytest.raises(UserError, match="absent.pth: no such"):
        TinyCodec.load(tmp_path / "absent.pth", tmp_path / "decoder.pth")


def test_tiny_reconstructs_cars_with_real_weights():
    from latentscenes.model.metrics import psnr
    from latentscenes.model.tiny import TinyCodec

    weights, pictures = SHARED / "weights" / "taef2", SHARED / "data" / "srn_sample"
    if not weights.is_dir() or not pictures.is_dir():
        pytest.skip("pretrained weights or car pictures are absent")
    codec = TinyCodec.load(weights / "taef2_encoder.pth", weights / "taef2_decoder.pth")
    assert (codec.channels, codec.downsampling) == (32, 8)
    files = [min((car / "rgb").glob("*.png")) for car in sorted(pictures.iterdir())]
    images = torch.stack([torch.tensor(list(Image.open(file).convert("RGB").tobytes())) for file in files])
    images = images.view(-1, 128, 128, 3).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        quality = psnr(codec.decode(codec.encode(images)), images)
    assert quality.mean() > 28.5 and quality.min() > 25


def tiny_kl(**options):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **options,
    )


def tiny_taesd():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=4,
    )  # fmt: skip


@pytest.mark.parametrize("make, factor", [(tiny_kl, 2), (tiny_taesd, 4)])
def test_diffusers_folder(make, factor, tmp_path):
    from latentscenes.model.diffusers import DiffusersCodec

    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "pipeline" / "vae")
    codec = DiffusersCodec.load(tmp_path / "pipeline" / "vae")
    assert (codec.channels, codec.downsampling) == (4, factor)
    check_contract(codec)
    images = torch.rand(1, 3, 16, 16)
    same = DiffusersCodec.load(tmp_path / "pipeline")
    rebuilt = DiffusersCodec.from_config(json.loads(json.dumps(codec.config)))
    save_file(codec.state_dict(), tmp_path / "codec.safetensors")
    rebuilt.load_state_dict(load_file(tmp_path / "codec.safetensors"))
    for other in (same, rebuilt):
        torch.testing.assert_close(other.decode(other.encode(images)), codec.decode(codec.encode(images)))


def test_diffusers_kl_mean_sample_and_range():
    from latentscenes.model.diffusers import DiffusersCodec

    autoencoder = tiny_kl()
    codec, images = DiffusersCodec(autoencoder), torch.rand(2, 3, 16, 16)
    posterior = autoencoder.encode(2 * images - 1).latent_dist
    torch.testing.assert_close(codec.encode(images), posterior.mean)
    first, again = (codec.encode(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, posterior.mean)
    assert (first - posterior.mean).abs().max() < 6 * posterior.std.max()
    bare = DiffusersCodec(tiny_kl(use_quant_conv=False, use_post_quant_conv=False))
    check_contract(bare)


def test_diffusers_tiny_equals_tiny_codec():
    """The same weights through diffusers' AutoencoderTiny and through our own loader."""
    from latentscenes.model.diffusers import DiffusersCodec
    from latentscenes.model.tiny import TinyCodec

    autoencoder = tiny_taesd()
    encoder = {
        name.removeprefix("layers."): value for name, value in autoencoder.encoder.state_dict().items()
    }
    decoder = {}
    for name, value in autoencoder.decoder.state_dict().items():
        _, place, rest = name.split(".", 2)
        decoder[f"{int(place) + 1}.{rest}"] = value
    ours, theirs, images = TinyCodec(encoder, decoder), DiffusersCodec(autoencoder), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours.encode(images), theirs.encode(images))
    torch.testing.assert_close(ours.decode(ours.encode(images)), theirs.decode(theirs.encode(images)))


def test_diffusers_mistakes(tmp_path):
    from latentscenes.model.diffusers import DiffusersCodec

    if importlib.util.find_spec("diffusers") is None:
        with pytest.raises(UserError, match=r"pip install latentscenes\[diffusers\]"):
            DiffusersCodec.load(tmp_path)
        return
    with pytest.raises(UserError, match="config.json"):
        DiffusersCodec.load(tmp_path)
    with pytest.raises(UserError, match="allow the download"):
        DiffusersCodec.load("nobody/no-such-autoencoder")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="UNet2DModel"):
        DiffusersCodec.load(tmp_path)
