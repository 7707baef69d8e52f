"""The masked loss."""

import oracle
import pytest
import torch

from perfusion_pytorch import loss_fn_weighted_by_mask


def case(dtype=torch.float64, scales=(1.0, 7.0)):
    prediction = torch.randn(2, 3, 4, 5, dtype=dtype)
    target = torch.randn(2, 3, 4, 5, dtype=dtype)
    mask = torch.rand(2, 4, 5, dtype=dtype) * torch.tensor(scales, dtype=dtype).view(2, 1, 1)
    return prediction, target, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_loss_meets_the_oracle(assert_near, dtype):
    prediction, target, mask = case(dtype)
    loss = loss_fn_weighted_by_mask(prediction, target, mask)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(loss, oracle.masked_loss(prediction, target, mask))


def test_a_mask_with_a_channel_axis_is_the_same(assert_near):
    prediction, target, mask = case()
    assert_near(
        loss_fn_weighted_by_mask(prediction, target, mask.unsqueeze(1)),
        loss_fn_weighted_by_mask(prediction, target, mask),
    )


def test_masks_are_normalised_per_image(assert_near):
    """Per row they would all weigh the same; over the batch, one image's scale would reach the other."""
    prediction, target, mask = case()
    scaled = mask * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    assert_near(
        loss_fn_weighted_by_mask(prediction, target, scaled),
        loss_fn_weighted_by_mask(prediction, target, mask),
    )
    rows = torch.tensor([[[1.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    assert_near(
        loss_fn_weighted_by_mask(torch.ones(1, 1, 2, 2).double(), torch.zeros(1, 1, 2, 2).double(), rows),
        torch.tensor(0.75),
    )


def test_a_mask_of_ones_is_the_mean_squared_error(assert_near):
    prediction, target, _ = case()
    expected = torch.nn.functional.mse_loss(prediction, target)
    assert_near(loss_fn_weighted_by_mask(prediction, target, torch.full((2, 4, 5), 3.0)), expected)


def test_an_image_with_an_empty_mask_adds_nothing(assert_near):
    prediction, target, mask = case()
    mask[0] = 0
    prediction.requires_grad_()
    loss = loss_fn_weighted_by_mask(prediction, target, mask)
    loss.backward()
    assert_near(loss, oracle.masked_loss(prediction, target, mask))
    assert not prediction.grad[0].any() and prediction.grad[1].abs().sum() > 0


def test_gradients():
    prediction, target, mask = case()
    assert torch.autograd.gradcheck(
        lambda p: loss_fn_weighted_by_mask(p, target, mask), [prediction.requires_grad_()]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, t, m: (p, t[:1], m), "must share a shape"),
        (lambda p, t, m: (p[0], t[0], m), "must share a shape"),
        (lambda p, t, m: (p, t, m[:, :2]), "`mask` must have shape"),
        (lambda p, t, m: (p, t, m.unsqueeze(1).expand(-1, 3, -1, -1)), "`mask` must have shape"),
        (lambda p, t, m: (p, t, -m), "non-negative and finite"),
        (lambda p, t, m: (p, t, m * float("nan")), "non-negative and finite"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        loss_fn_weighted_by_mask(*change(*case()))
