"""Codecs: ranges, shapes, parameters of encoder and decoder, gradients, weights from files."""

import importlib.util
import json

import pytest
import torch
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from latentscenes.core.errors import UserError
from latentscenes.model.codec import Codec, IdentityCodec, read_weights
from latentscenes.model.guided import GuidedCodec


def check_contract(codec: Codec, size: int = 32):
    """Checks what all codecs must do."""
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


@pytest.mark.parametrize("downsampling", [2, 4, 8])
def test_guided(downsampling):
    torch.manual_seed(0)
    codec = GuidedCodec(downsampling, 5, 8, bfloat16=False)
    images = torch.rand(2, 3, 32, 48)
    latents = codec.encode(images)
    side = downsampling
    colors = images.reshape(2, 3, 32 // side, side, 48 // side, side).mean((3, 5))
    torch.testing.assert_close(latents, torch.cat([2 * colors - 1, torch.zeros_like(colors[:, :2])], 1))

    # A new decoder enlarges the colors
    enlarged = functional.interpolate(colors, scale_factor=side, mode="bilinear")
    torch.testing.assert_close(codec.decode(latents), enlarged)

    # Learned weights: white stays white
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    check_contract(codec)
    with pytest.raises(UserError, match="sides that divide by"):
        codec.encode(torch.rand(1, 3, 31, 32))
    torch.testing.assert_close(codec.decode(codec.background(32, 48)[None]), torch.ones(1, 3, 32, 48))


def taesd_states(inputs: int = 3, width: int = 8, channels: int = 5) -> tuple[dict, dict]:
    """Returns random weights in the TAESD layout: 4x down, with a bottleneck."""

    def convolution(name, i, o, side=3, bias=True):
        weights = {f"{name}.weight": torch.randn(o, i, side, side) / (side * i**0.5)}
        return weights | ({f"{name}.bias": torch.randn(o) * 0.1} if bias else {})

    def blocks(*places, hidden=0):
        state = {}
        for place in places:
            for k in (0, 2, 4):
                state |= convolution(f"{place}.conv.{k}", width, width)
            if hidden:
                state |= convolution(f"{place}.pool.0", width, hidden, 1, bias=False)
                state |= {
                    f"{place}.pool.1.weight": torch.rand(hidden),
                    f"{place}.pool.1.bias": torch.rand(hidden),
                }
                state |= convolution(f"{place}.pool.3", hidden, width, 1, bias=False)
        return state

    def resizing(place):
        return convolution(place, width, width, bias=False)

    encoder = convolution(0, inputs, width) | blocks(1) | resizing(2) | blocks(3, 4) | resizing(5)
    encoder |= blocks(6, hidden=16) | convolution(7, width, channels)
    decoder = convolution(1, channels, width) | blocks(3, 4, hidden=16) | resizing(6)
    decoder |= blocks(7) | resizing(9) | blocks(10)
    return encoder, decoder | convolution(11, width, inputs)


def run_taesd(images: torch.Tensor, encoder: dict, decoder: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns latents and decoded images, computed layer by layer without diffusers."""

    def layers(x, state, decodes):
        places = sorted({int(name.split(".")[0]) for name in state})
        for place in places:
            part = {name.split(".", 1)[1]: w for name, w in state.items() if name.startswith(f"{place}.")}
            if "weight" in part:
                resizes = "bias" not in part
                if resizes and decodes:
                    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                stride = 2 if resizes and not decodes else 1
                x = functional.conv2d(x, part["weight"], part.get("bias"), stride, 1)
                x = x.relu() if decodes and place == 1 else x
                continue
            if "pool.0.weight" in part:
                h = functional.conv2d(x, part["pool.0.weight"])
                h = functional.group_norm(h, 4, part["pool.1.weight"], part["pool.1.bias"]).relu()
                x = x + functional.conv2d(h, part["pool.3.weight"])
            h = x
            for k in (0, 2, 4):
                h = functional.conv2d(
                    h if k == 0 else h.relu(), part[f"conv.{k}.weight"], part[f"conv.{k}.bias"], padding=1
                )
            x = (h + x).relu()
        return x

    latents = layers(images, encoder, False)
    return latents, layers(3 * torch.tanh(latents / 3), decoder, True)


def saved_pair(folder, encoder, decoder):
    for path in folder.glob("*coder*"):
        path.unlink()
    save_file(encoder, folder / "my_encoder.safetensors")
    torch.save(decoder, folder / "my_decoder.pth")
    return folder


def test_tiny_infers_its_architecture(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from latentscenes.model.diffusers import TinyCodec

    torch.manual_seed(0)
    states = taesd_states()
    codec = TinyCodec.from_folder(saved_pair(tmp_path, *states))
    assert (codec.channels, codec.downsampling) == (5, 4)
    check_contract(codec)
    for part, state in zip((codec.encoder, codec.decoder), states, strict=True):
        assert part.state_dict().keys() == state.keys()
    images = torch.rand(2, 3, 16, 24)
    latents, decoded = run_taesd(images, *states)
    torch.testing.assert_close(codec.encode(images), latents)
    torch.testing.assert_close(codec.decode(latents), decoded)
    with pytest.raises(UserError, match="divide by 4"):
        codec.encode(torch.rand(1, 3, 18, 16))
    twin = TinyCodec(*taesd_states())
    twin.load_state_dict(codec.state_dict())
    assert torch.equal(twin.decode(twin.encode(images)), codec.decode(codec.encode(images)))


def test_tiny_files_and_their_mistakes(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from latentscenes.model.diffusers import TinyCodec

    encoder, decoder = taesd_states()

    def without(*starts):
        return {name: value for name, value in decoder.items() if not name.startswith(starts)}

    for state in (
        encoder,
        {f"decoder.layers.{name}": value for name, value in decoder.items()},
        without("3.conv.2.bias"),
        without("9."),
        without("9.", "10.", "11."),
        taesd_states(channels=6)[1],
        taesd_states(inputs=1)[1],
    ):
        saved_pair(tmp_path, encoder, state)
        with pytest.raises(
            UserError, match="my_decoder.pth: not the two weight files of one RGB autoencoder"
        ):
            TinyCodec.from_folder(tmp_path)
    (tmp_path / "my_decoder.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="my_decoder.pth: cannot be read"):
        TinyCodec.from_folder(tmp_path)
    (tmp_path / "my_decoder.pth").unlink()
    with pytest.raises(UserError, match=r"found 0 files \*decoder\*"):
        TinyCodec.from_folder(tmp_path)


def test_tiny_reconstructs_cars_with_real_weights():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from latentscenes.model.diffusers import TinyCodec
    from latentscenes.model.metrics import psnr

    weights, pictures = SHARED / "weights" / "taef2", SHARED / "data" / "srn_sample"
    if not weights.is_dir() or not pictures.is_dir():
        pytest.skip(f"{weights} or {pictures} is absent")
    codec = TinyCodec.from_folder(weights)
    assert (codec.channels, codec.downsampling) == (32, 8)
    files = [min((car / "rgb").glob("*.png")) for car in sorted(pictures.iterdir())]
    images = torch.stack([torch.tensor(list(Image.open(file).convert("RGB").tobytes())) for file in files])
    images = images.view(-1, 128, 128, 3).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        latents = codec.encode(images)
        decoded = codec.decode(latents)
        states = [read_weights(weights / f"taef2_{half}.pth") for half in ("encoder", "decoder")]
        wanted = run_taesd(images[:2], *states)
    torch.testing.assert_close(latents[:2], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded[:2], wanted[1], atol=1e-4, rtol=1e-4)
    quality = psnr(decoded, images)
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


def test_diffusers_mistakes(tmp_path):
    from latentscenes.model.diffusers import DiffusersCodec, TinyCodec

    if importlib.util.find_spec("diffusers") is None:
        with pytest.raises(UserError, match=r"pip install latentscenes\[diffusers\]"):
            DiffusersCodec.load(tmp_path)
        with pytest.raises(UserError, match=r"pip install latentscenes\[diffusers\]"):
            TinyCodec(*taesd_states())
        return
    with pytest.raises(UserError, match="config.json"):
        DiffusersCodec.load(tmp_path)
    with pytest.raises(UserError, match="allow the download"):
        DiffusersCodec.load("nobody/no-such-autoencoder")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="UNet2DModel"):
        DiffusersCodec.load(tmp_path)
