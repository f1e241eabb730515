"""Codecs: ranges, shapes, who owns which parameter, gradients, weights from files."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentscenes.codecs import Codec
from latentscenes.codecs.identity import IdentityCodec
from latentscenes.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in encoder + decoder)
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
