"""The input covariance: estimate, inverse, warnings, files."""

import pickle
import warnings
import weakref
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import save_file

from perfusion_pytorch import InputCovariance, calculate_input_covariance

REAL = Path(__file__).parents[3] / "shared" / "data" / "clip_vit_l14_covariance.safetensors"


def encodings_and_mask(b=6, n=5, d=4):
    mask = torch.arange(n) < torch.randint(1, n + 1, (b, 1))
    return torch.randn(b, n, d), mask


def test_covariance_is_the_mean_over_tokens(assert_near):
    """Not over texts: captions of any length count by their tokens."""
    encodings, mask = encodings_and_mask()
    covariance = InputCovariance.empty(4).update(encodings, mask)
    assert covariance.num_tokens == mask.sum()
    assert_near(covariance.matrix, oracle.covariance_of(encodings, mask))


def test_a_missing_mask_counts_every_token(assert_near):
    encodings, mask = encodings_and_mask()
    assert_near(
        InputCovariance.empty(4).update(encodings).matrix,
        oracle.covariance_of(encodings, torch.ones_like(mask)),
    )


def test_a_mask_of_integers_is_one_of_booleans():
    """As tokenizers give it."""
    encodings, mask = encodings_and_mask()
    of_integers = InputCovariance.empty(4).update(encodings, mask.long())
    assert of_integers.num_tokens == mask.sum()
    assert torch.equal(of_integers.matrix, InputCovariance.empty(4).update(encodings, mask).matrix)


def test_streaming_equals_one_shot_equals_merge(assert_near):
    encodings, mask = encodings_and_mask()
    one_shot = InputCovariance.empty(4).update(encodings, mask)
    streamed = InputCovariance.empty(4)
    for row, counts in zip(encodings, mask, strict=True):
        streamed.update(row, counts)
    first, second = (
        InputCovariance.empty(4).update(encodings[part], mask[part]) for part in (slice(2), slice(2, None))
    )
    first.merge(second)
    for other in (streamed, first):
        assert other.num_tokens == one_shot.num_tokens
        assert_near(other.matrix, one_shot.matrix)
        assert_near(other.inverse(dtype=torch.float64), one_shot.inverse(dtype=torch.float64))


def test_an_estimate_goes_on_from_a_loaded_one(assert_near, tmp_path):
    encodings, mask = encodings_and_mask()
    InputCovariance.empty(4).update(encodings[:3], mask[:3]).save(tmp_path / "c.safetensors")
    covariance = InputCovariance.load(tmp_path / "c.safetensors").update(encodings[3:], mask[3:])
    assert_near(covariance.matrix, oracle.covariance_of(encodings, mask), torch.float32)


def test_an_update_or_merge_after_the_inverse_is_seen_by_the_next_inverse(assert_near):
    encodings, mask = encodings_and_mask()
    covariance = InputCovariance.empty(4).update(encodings[:3], mask[:3])
    before = covariance.inverse(dtype=torch.float64).clone()
    covariance.update(encodings[3:], mask[3:])
    identity = torch.eye(4, dtype=torch.float64)
    assert_near(covariance.inverse(dtype=torch.float64) @ covariance.matrix, identity)
    covariance.merge(InputCovariance(identity, num_tokens=10))
    assert_near(covariance.inverse(dtype=torch.float64) @ covariance.matrix, identity)
    assert not torch.equal(before, covariance.inverse(dtype=torch.float64))


def test_calculate_input_covariance_from_a_generator(assert_near):
    encodings, mask = encodings_and_mask()
    sizes = []

    def encode(texts):
        sizes.append(len(texts))
        rows = [int(text) for text in texts]
        return encodings[rows].requires_grad_(), mask[rows]

    covariance = calculate_input_covariance(
        (str(i) for i in range(6)), encode, batch_size=4, progress=lambda batches: batches
    )
    assert sizes == [4, 2]
    assert_near(covariance.matrix, oracle.covariance_of(encodings, mask))
    assert not covariance.matrix.requires_grad


def test_encodings_are_not_held_in_memory():
    alive = []
    held_at_once = []

    def encode(texts):
        held_at_once.append(sum(reference() is not None for reference in alive))
        encodings = torch.randn(len(texts), 3, 4)
        alive.append(weakref.ref(encodings))
        return encodings, torch.ones(len(texts), 3, dtype=torch.bool)

    calculate_input_covariance(["a"] * 20, encode, batch_size=2)
    assert len(held_at_once) == 10 and max(held_at_once) <= 1


def test_pads_are_what_the_mask_says_and_no_token_id(assert_near):
    """SDXL's second tokenizer pads with the id of "!": only a mask can tell the two apart."""
    ids = torch.tensor([[7, 0, 3, 0, 0]])  # "!" at 1, pads at 3 and 4
    table = torch.randn(8, 4)
    mask = torch.tensor([[True, True, True, False, False]])
    covariance = calculate_input_covariance(["a"], lambda texts: (table[ids], mask))
    assert covariance.num_tokens == 3
    assert_near(covariance.matrix, oracle.covariance_of(table[ids], mask))


def test_masked_encodings_may_be_infinite(assert_near):
    encodings, mask = encodings_and_mask()
    expected = oracle.covariance_of(encodings, mask)
    encodings[~mask] = float("inf")
    assert_near(InputCovariance.empty(4).update(encodings, mask).matrix, expected)


def test_sums_in_float64_survive_many_large_updates():
    covariance = InputCovariance(torch.full((1, 1), 1e9), num_tokens=1)
    for _ in range(100):
        covariance.update(torch.ones(1, 1))
    assert covariance.matrix.item() * 101 == 1e9 + 100


def test_inverse_and_condition_number(assert_near, covariance):
    c = covariance(8)
    estimate = InputCovariance(c)
    assert_near(estimate.inverse(dtype=torch.float64) @ c, torch.eye(8, dtype=torch.float64))
    assert estimate.inverse().dtype == torch.float32
    assert estimate.inverse() is estimate.inverse()
    assert estimate.condition_number == pytest.approx(torch.linalg.cond(c).item())


def test_covariance_is_symmetrised(assert_near):
    c = torch.randn(4, 4, dtype=torch.float64)
    assert_near(InputCovariance(c).matrix, (c + c.T) / 2)


def test_ridge_is_relative_to_the_scale(assert_near, covariance):
    c = covariance(4)
    regular = c + 0.01 * c.trace() / 4 * torch.eye(4, dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64)
    assert_near(InputCovariance(c, ridge=0.01).inverse(dtype=torch.float64) @ regular, identity)
    assert_near(InputCovariance(c * 50, ridge=0.01).inverse(dtype=torch.float64) @ regular * 50, identity)
    assert InputCovariance(c, ridge=0.01).condition_number == pytest.approx(torch.linalg.cond(regular).item())
    assert_near(InputCovariance(c, ridge=0.01).matrix, c)


def test_a_sound_covariance_does_not_warn(covariance):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InputCovariance(covariance(8)).inverse()


def test_an_indefinite_covariance_warns_and_runs(assert_near):
    covariance = InputCovariance(torch.diag(torch.tensor([1.0, -2.0])))
    with pytest.warns(UserWarning, match="not positive definite"):
        inverse = covariance.inverse()
    assert_near(inverse, torch.diag(torch.tensor([1.0, -0.5])))


def test_an_ill_conditioned_covariance_warns_and_names_the_ridge():
    with pytest.warns(UserWarning, match="ill-conditioned.*ridge"):
        InputCovariance(torch.diag(torch.tensor([1.0, 1e-9]))).inverse()


def test_a_singular_covariance_is_an_error_and_not_the_end_of_the_interpreter():
    with pytest.raises(ValueError, match=r"invertible.*ridge"):
        InputCovariance(torch.ones(2, 2)).inverse()
    with pytest.raises(ValueError, match="invertible"):
        InputCovariance(torch.zeros(2, 2)).inverse()
    InputCovariance(torch.ones(2, 2), ridge=1e-3).inverse()


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1, 2, 2)])
def test_a_covariance_must_be_square(bad):
    with pytest.raises(ValueError, match="must be square"):
        InputCovariance(bad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_covariance_must_be_finite(bad):
    with pytest.raises(ValueError, match="must be finite"):
        InputCovariance(torch.diag(torch.tensor([1.0, bad])))


@pytest.mark.parametrize(
    "options, message",
    [({"num_tokens": -1}, "num_tokens"), ({"ridge": -0.1}, "ridge"), ({"ridge": float("nan")}, "ridge")],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"`{message}` must be"):
        InputCovariance(torch.eye(2), **options)


@pytest.mark.parametrize(
    "encodings, mask, message",
    [
        (torch.ones(2, 3, 5), None, r"`encodings` must have shape \(b, n, 4\)"),
        (torch.ones(4), None, "`encodings` must have shape"),
        (torch.ones(2, 3, 4), torch.ones(2, 4), "`mask` must have the encodings' shape"),
        (torch.full((2, 3, 4), float("nan")), None, "`encodings` must be finite"),
    ],
)
def test_a_refused_update_adds_nothing(encodings, mask, message):
    covariance = InputCovariance(torch.eye(4), num_tokens=3)
    with pytest.raises(ValueError, match=message):
        covariance.update(encodings, mask)
    assert covariance.num_tokens == 3 and torch.equal(covariance.matrix, torch.eye(4).double())


def test_widths_that_differ_cannot_be_merged():
    covariance = InputCovariance(torch.eye(4))
    with pytest.raises(ValueError, match="one width"):
        covariance.merge(InputCovariance(torch.eye(3)))
    assert covariance.num_tokens == 1


def test_no_tokens_yet():
    with pytest.raises(RuntimeError, match="no tokens yet"):
        _ = InputCovariance.empty(3).matrix
    for texts, mask in (([], None), (["a"], torch.zeros(1, 2, dtype=torch.bool))):
        with pytest.raises(ValueError, match="at least one caption"):
            calculate_input_covariance(texts, lambda _, mask=mask: (torch.ones(1, 2, 3), mask))


def test_save_and_load(assert_near, covariance, tmp_path):
    saved = InputCovariance(covariance(4), num_tokens=17, ridge=0.25)
    saved.save(tmp_path / "c.safetensors")
    loaded = InputCovariance.load(str(tmp_path / "c.safetensors"))
    assert repr(loaded) == repr(saved) == "InputCovariance(dim=4, num_tokens=17, ridge=0.25)"
    assert_near(loaded.matrix, saved.matrix, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.safetensors"
    InputCovariance(torch.eye(2)).save(path)
    with pytest.raises(RuntimeError, match="no tokens"):
        InputCovariance.empty(2).save(path)
    assert torch.equal(InputCovariance.load(path).matrix, torch.eye(2).double())


def test_a_file_without_a_covariance(tmp_path):
    save_file({"other": torch.eye(2)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"named 'covariance'.*\['other'\]"):
        InputCovariance.load(tmp_path / "c.safetensors")


def test_pickle(covariance):
    estimate = InputCovariance(covariance(4), num_tokens=9)
    copy = pickle.loads(pickle.dumps(estimate))
    assert torch.equal(copy.matrix, estimate.matrix) and copy.num_tokens == 9


@pytest.mark.skipif(not REAL.exists(), reason="the real covariance is not in this checkout")
def test_the_real_covariance(assert_near):
    covariance = InputCovariance.load(REAL)
    assert covariance.dim == 768
    assert covariance.condition_number == pytest.approx(3.9e3, rel=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse = covariance.inverse(dtype=torch.float64)
    assert_near(inverse @ covariance.matrix, torch.eye(768, dtype=torch.float64), torch.float32)


def test_what_captions_and_covariances_cannot_be():
    def encode(texts):
        return torch.ones(len(texts), 2, 3), torch.ones(len(texts), 2)

    with pytest.raises(ValueError, match="`texts` must be several captions, got one text, 'a cat'"):
        calculate_input_covariance("a cat", encode)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        calculate_input_covariance(["a cat"], encode, batch_size=0)
    with pytest.raises(ValueError, match=r"must be square, \(d, d\), got \(0, 0\)"):
        InputCovariance(torch.zeros(0, 0))
    with pytest.raises(ValueError, match=r"must be of real numbers, got torch.complex64"):
        InputCovariance(torch.eye(2).to(torch.complex64))
    with pytest.raises(ValueError, match="`dim` must be at least 1, got -1"):
        InputCovariance.empty(-1)
