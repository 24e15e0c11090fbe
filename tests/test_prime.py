import functools
import inspect
import itertools
import math

import pytest
import torch
from torch import nn

from timm_pushpull.augment import prime as prime_module
from timm_pushpull.augment.prime import (
    PRIME,
    PrimeDraw,
    apply_prime,
    color_jitter,
    deform,
    displacement_fields,
    mode_deviations,
    spectral_filter,
    temperature_range,
)
from timm_pushpull.bench.prime import _plain_prime, bench_prime
from timm_pushpull.bench.timing import peak_bytes

PRESETS = [PRIME.imagenet, PRIME.cifar]
SMALL = dict(sigma=4.0, cut_max=2, color_temperature=0.05, color_terms=2, color_first_max=500)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0, dtype=torch.float32):
    """Values of 8 bits, black and white among them."""
    levels = torch.randint(0, 256, shape, generator=seeded(seed))
    levels.view(-1)[:2] = torch.tensor([0, 255])
    return (levels / 255).to(dtype)


def spectral_by_loops(image, kernel):
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2, width + 2, dtype=torch.float64)
    padded[:, 1:-1, 1:-1] = image
    output = torch.zeros_like(image)
    for i, j in itertools.product(range(3), range(3)):
        output += kernel[i, j] * padded[:, i : i + height, j : j + width]
    return output.clamp(0, 1)


def fields_by_loops(modes, cut, temperature, size):
    """The sum over the modes, one mode at a time."""
    place = torch.arange(size, dtype=torch.float64) / (size - 1)
    field = torch.zeros(2, size, size, dtype=torch.float64)
    for i, j in itertools.product(range(1, cut + 1), range(1, cut + 1)):
        if i * i + j * j < (cut + 0.5) ** 2:
            wave = torch.sin(math.pi * i * place) * torch.sin(math.pi * j * place)[:, None]
            field += modes[:, j - 1, i - 1, None, None] / math.sqrt(i * i + j * j) * wave
    return math.sqrt(temperature) * size * field


def deform_by_loops(image, displacement):
    size = image.shape[-1]
    output = torch.zeros_like(image)
    for y, x in itertools.product(range(size), range(size)):
        at_x = min(max(x - displacement[0, y, x].item(), 0), size - 1)
        at_y = min(max(y - displacement[1, y, x].item(), 0), size - 1)
        left, top = math.floor(at_x), math.floor(at_y)
        for to_y, to_x in itertools.product((top, top + 1), (left, left + 1)):
            share = (1 - abs(at_x - to_x)) * (1 - abs(at_y - to_y))
            if share:
                output[:, y, x] += share * image[:, to_y, to_x]
    return output


def color_by_loops(image, first, coefficients):
    output = image.clone()
    for channel, k in itertools.product(range(len(image)), range(coefficients.shape[-1])):
        output[channel] += coefficients[channel, k] * torch.sin(math.pi * (first + k) * image[channel])
    return output.clamp(0, 1)


def mixture_by_loops(images, draw):
    """The whole definition in float64: one image, one chain and one step at a time."""
    images = images.double()
    used = [0, 0, 0]
    chains = torch.zeros(3, *images.shape, dtype=torch.float64)
    for chain in range(3):
        chains[chain] = images
        for step, index in itertools.product(range(3), range(len(images))):
            family, image = draw.families[chain, step, index], chains[chain, index]
            if family == -1:
                continue
            row = used[family]
            used[family] += 1
            if family == 0:
                image = spectral_by_loops(image, draw.kernels[row].double())
            elif family == 1:
                image = deform_by_loops(image, draw.displacements[row].double())
            else:
                image = color_by_loops(image, draw.first[row].item(), draw.coefficients[row].double())
            chains[chain, index] = image
    assert used == [len(draw.kernels), len(draw.displacements), len(draw.first)]
    mixed = torch.zeros_like(images)
    for index, chain in itertools.product(range(len(images)), range(3)):
        mixed[index] += draw.weights[index, chain].double() * chains[chain, index]
    blend = draw.blend.double().view(-1, 1, 1, 1)
    return (1 - blend) * images + blend * mixed


def without(draw, family):
    """The same draw with the steps of a family left out."""
    families = draw.families.clone()
    families[families == family] = -1
    numbers = {0: ['kernels'], 1: ['displacements'], 2: ['first', 'coefficients']}[family]
    return draw._replace(families=families, **{name: getattr(draw, name)[:0] for name in numbers})


def only(draw, index):
    """The draw of one image of the batch."""

    def rows(family):
        return draw.families.flatten().eq(family).nonzero()[:, 0].remainder(draw.families.shape[2]) == index

    return PrimeDraw(
        draw.families[..., index : index + 1],
        draw.weights[index : index + 1],
        draw.blend[index : index + 1],
        draw.kernels[rows(0)],
        draw.displacements[rows(1)],
        draw.first[rows(2)],
        draw.coefficients[rows(2)],
    )


def uniform_distance(values):
    """Largest distance between the distribution of the values and the uniform one (Kolmogorov and Smirnov)."""
    values = values.flatten().double().sort().values
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return max((values - steps[:-1]).abs().max(), (values - steps[1:]).abs().max()).item()


@pytest.fixture(scope='module')
def many():
    """The draw of a large batch of tiny images."""
    return PRIME(**SMALL).draw((12000, 3, 4, 4), generator=seeded())


@pytest.mark.parametrize('preset, size, channels', [(PRIME.imagenet, 24, 3), (PRIME.cifar, 32, 3), (PRIME.cifar, 2, 1)])
def test_mixture_by_loops(preset, size, channels):
    images = random_images(7, channels, size, size)
    draw = preset().draw(images.shape, generator=seeded(1))
    assert {0, 1, 2, -1} == set(draw.families.flatten().tolist())
    expected = mixture_by_loops(images, draw)
    torch.testing.assert_close(apply_prime(images.double(), draw), expected, rtol=0, atol=1e-9)
    # A filter or a curve after a curve amplifies float32 rounding up to a thousand times.
    assert (apply_prime(images, draw) - expected).abs().mean() < 1e-3
    gentle = without(draw, 2)
    expected = mixture_by_loops(images, gentle)
    torch.testing.assert_close(apply_prime(images, gentle).double(), expected, rtol=0, atol=5e-4)


def test_families_run_on_the_images_that_drew_them_only(monkeypatch):
    rows = {transform: 0 for transform in (spectral_filter, deform, color_jitter)}

    def counted(transform, images, *numbers):
        rows[transform] += len(images)
        return transform(images, *numbers)

    for transform in rows:
        monkeypatch.setattr(prime_module, transform.__name__, functools.partial(counted, transform))
    images = random_images(16, 3, 8, 8)
    draw = PRIME.imagenet().draw(images.shape, generator=seeded())
    apply_prime(images, draw)
    assert list(rows.values()) == [int((draw.families == family).sum()) for family in range(3)]
    assert sum(rows.values()) < 16 * 3 * 3


@pytest.mark.parametrize('preset', PRESETS)
def test_an_image_does_not_depend_on_its_batch(preset):
    images = random_images(6, 3, 16, 16)
    draw = preset().draw(images.shape, generator=seeded(2))
    output = apply_prime(images, draw)
    for index in range(6):
        alone = apply_prime(images[index : index + 1], only(draw, index))
        torch.testing.assert_close(alone, output[index : index + 1], rtol=0, atol=1e-5)
    others = images.clone()
    others[1:] = 0
    torch.testing.assert_close(apply_prime(others, draw)[0], output[0], rtol=0, atol=0)


def test_spectral_filter():
    images, kernels = random_images(4, 3, 7, 5), 4 * torch.randn(4, 3, 3, generator=seeded())
    expected = torch.stack([spectral_by_loops(*each) for each in zip(images.double(), kernels.double(), strict=True)])
    torch.testing.assert_close(spectral_filter(images, kernels).double(), expected, rtol=0, atol=1e-5)
    delta = torch.zeros(4, 3, 3)
    delta[:, 1, 1] = 1
    assert torch.equal(spectral_filter(images, delta), images)
    # Hand-worked: the sum of the pixel to the left and of twice the one below, not more than 1.
    kernel = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0]]])
    output = spectral_filter(torch.tensor([[[[0.1, 0.2], [0.3, 0.6]]]]), kernel)
    torch.testing.assert_close(output, torch.tensor([[[[0.6, 1.0], [0.0, 0.3]]]]))


@pytest.mark.parametrize('first, terms', [((1, 1, 1), 100), ((500, 1, 263), 20), ((7, 8, 9), 21)])
def test_color_jitter(first, terms):
    images = torch.cat((torch.arange(256) / 255, torch.rand(768, generator=seeded()))).view(1, 1, 32, 32)
    images, first = images.expand(3, 2, 32, 32), torch.tensor(first)
    coefficients = torch.randn(3, 2, terms, generator=seeded(1)) / math.sqrt(10 * terms)
    expected = torch.stack(
        [color_by_loops(x, k.item(), c) for x, k, c in zip(images.double(), first, coefficients.double(), strict=True)]
    )
    assert 0 < (expected == 0).double().mean() < 0.5  # most values are not clamped
    torch.testing.assert_close(color_jitter(images, first, coefficients).double(), expected, rtol=0, atol=5e-5)
    exact = color_jitter(images.double(), first, coefficients.double())
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-11)
    assert torch.equal(color_jitter(images, first, 0 * coefficients), images)


def test_color_jitter_by_hand():
    # 0.5 + 0.2 sin(3 pi / 2) - 0.1 sin(2 pi) = 0.3; 0.25 + 0.2 sin(3 pi / 4) - 0.1 sin(pi) = 0.25 + 0.1 sqrt(2)
    images = torch.tensor([[[[0.5, 0.25]]]])
    output = color_jitter(images, torch.tensor([3]), torch.tensor([[[0.2, -0.1]]]))
    torch.testing.assert_close(output, torch.tensor([[[[0.3, 0.25 + 0.1 * math.sqrt(2)]]]]))


def test_temperature_range():
    lowest, highest = temperature_range(224, torch.tensor([2, 10, 142, 143, 500]))
    cuts = [2, 10, 142, 143, 500]
    t1 = [1 / (math.pi * 224**2 * math.log(c)) for c in cuts]
    t2 = [4 / (math.pi**3 * c**2 * math.log(c)) for c in cuts]
    torch.testing.assert_close(lowest, torch.tensor(t1))
    torch.testing.assert_close(highest, torch.tensor([max(pair) for pair in zip(t1, t2, strict=True)]))
    assert highest[2] > lowest[2] and highest[3] == lowest[3]


def test_displacement_fields():
    cuts, temperatures = torch.tensor([2, 5, 7, 7]), torch.tensor([0.1, 0.2, 0.3, 0.0])
    modes = torch.randn(4, 2, 7, 7, generator=seeded())
    fields = displacement_fields(modes, mode_deviations(cuts, 7, 9), temperatures, 9)
    for index in range(4):
        expected = fields_by_loops(
            modes[index].double(), cuts[index].item(), temperatures.double()[index].item(), size=9
        )
        torch.testing.assert_close(fields[index].double(), expected, rtol=0, atol=1e-4)
    assert not fields[3].any()
    # Hand-worked: in the centre of 3 pixels only mode (1, 1) of a cut of 2 is not zero: 3 * 2 / sqrt(2).
    deviations = mode_deviations(torch.tensor([2]), 2, 3)
    centre = displacement_fields(torch.ones(1, 2, 1, 1), deviations, torch.tensor([4.0]), 3)[0, :, 1, 1]
    torch.testing.assert_close(centre, torch.full((2,), 3 * math.sqrt(2)))
    # With 2 pixels, both on the border, there are no modes.
    nothing = displacement_fields(torch.ones(1, 2, 0, 0), mode_deviations(torch.tensor([5]), 5, 2), torch.ones(1), 2)
    assert nothing.shape == (1, 2, 2, 2) and not nothing.any()


@pytest.mark.parametrize('cut, size', [(20, 6), (13, 7), (3, 9)])
def test_aliased_modes_keep_their_distribution(cut, size):
    """A field is a sum of modes times independent normal numbers, so its covariance determines its distribution."""
    deviations = mode_deviations(torch.tensor([cut, cut + 2]), cut + 2, size)[:1]
    count = deviations.shape[-1]
    assert count == min(cut + 2, size - 2)

    def covariance(fields):
        return torch.einsum('ma,mb->ab', fields.flatten(1), fields.flatten(1))

    each = torch.eye(count**2).view(-1, 1, count, count).expand(-1, 2, -1, -1)
    ours = displacement_fields(each, deviations.expand(len(each), -1, -1), torch.full((len(each),), 0.5), size)
    every = torch.eye(cut**2, dtype=torch.float64).view(-1, 1, cut, cut).expand(-1, 2, -1, -1)
    expected = torch.stack([fields_by_loops(modes, cut, 0.5, size) for modes in every])
    torch.testing.assert_close(covariance(ours[:, 0].double()), covariance(expected[:, 0]), rtol=1e-4, atol=1e-5)


def test_displacement_field_of_the_highest_modes_at_full_size():
    modes = torch.randn(1, 2, 222, 222, generator=seeded())
    deviations = mode_deviations(torch.tensor([500]), 500, 224)
    field = displacement_fields(modes, deviations, torch.tensor([1.0]), 224)[0]
    number = torch.arange(1, 501, dtype=torch.float64)
    square = number**2 + number[:, None] ** 2
    variances = torch.where(square < 500.5**2, 1 / square, 0)
    blocks = nn.functional.pad(variances, (1, 391, 1, 391)).view(2, 446, 2, 446).sum((0, 2))  # modes i and i + 446
    blocks = blocks[:, 1:223] + blocks[:, 224:].flip(1)  # modes i and 446 - i
    deviation = (blocks[1:223] + blocks[224:].flip(0)).sqrt()
    torch.testing.assert_close(deviations[0].double(), deviation, rtol=1e-5, atol=0)
    sines = torch.sin(math.pi * torch.linspace(0, 1, 224, dtype=torch.float64) * number[:222, None])
    expected = 224 * torch.einsum('cji,jy,ix->cyx', modes[0].double() * deviation, sines, sines)
    assert (field - expected).abs().max() < 1e-5 * expected.abs().max()


def test_deform():
    images = random_images(3, 2, 11, 11)
    displacements = 3 * torch.randn(3, 2, 11, 11, generator=seeded())
    displacements[2] = 0
    expected = torch.stack(
        [deform_by_loops(*each) for each in zip(images.double(), displacements.double(), strict=True)]
    )
    output = deform(images, displacements)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output[2], images[2], rtol=0, atol=1e-5)


def test_settings():
    names = ('sigma', 'cut_max', 'color_temperature', 'color_terms', 'color_first_max')
    assert [getattr(PRIME.imagenet(), name) for name in names] == [4.0, 500, 0.05, 20, 500]
    assert [getattr(PRIME.cifar(), name) for name in names] == [4.0, 100, 0.01, 100, 1]
    assert 'sigma=4.0, cut_max=500' in repr(PRIME.imagenet())
    for preset in PRESETS:
        assert isinstance(preset(), nn.Module) and not preset().state_dict() and not list(preset().parameters())


def test_chains_are_drawn_as_defined(many):
    drawn = many.families >= 0
    depths = drawn.sum(1)
    assert torch.equal(drawn, torch.arange(3)[:, None] < depths[:, None])
    share = [(depths == depth).double().mean(1) for depth in (1, 2, 3)]
    torch.testing.assert_close(torch.stack(share), torch.full((3, 3), 1 / 3).double(), rtol=0, atol=0.02)
    assert torch.corrcoef(depths.double()).fill_diagonal_(0).abs().max() < 0.04
    for chain, step in itertools.product(range(3), range(3)):
        families = many.families[chain, step][drawn[chain, step]]
        shares = families.bincount(minlength=3) / len(families)
        torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    steps = many.families[:, :2].flatten(0, 1)[:, (depths >= 2).all(0)]
    assert torch.corrcoef(steps.double()).fill_diagonal_(0).abs().max() < 0.08


def test_shares_are_drawn_as_defined(many):
    torch.testing.assert_close(many.weights.sum(1), torch.ones(12000))
    expected = (torch.eye(3) - 1 / 3) / 12
    torch.testing.assert_close(many.weights.T.cov(), expected, rtol=0, atol=2e-3)
    for chain in range(3):  # each weight alone is of the distribution Beta(1, 2)
        assert uniform_distance(1 - (1 - many.weights[:, chain]) ** 2) < 0.02
    assert uniform_distance(many.blend) < 0.02
    assert torch.corrcoef(torch.stack((many.blend, many.weights[:, 0])))[0, 1].abs() < 0.04


def test_kernels_and_curves_are_drawn_as_defined(many):
    delta = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 0])
    kernels = many.kernels.flatten(1)
    torch.testing.assert_close(kernels.mean(0), delta, rtol=0, atol=0.15)
    torch.testing.assert_close(kernels.T.cov(), 16 * torch.eye(9), rtol=0, atol=1.0)
    assert ((kernels[:, 0] / 4).abs() < 0.67449).float().mean() == pytest.approx(0.5, abs=0.02)  # normal
    torch.testing.assert_close(many.coefficients.flatten(1).T.cov(), 0.05 * torch.eye(6), rtol=0, atol=3e-3)
    assert many.coefficients.mean().abs() < 3e-3
    assert (many.coefficients.abs() < 0.67449 * math.sqrt(0.05)).float().mean() == pytest.approx(0.5, abs=0.01)
    assert (many.first.min(), many.first.max()) == (1, 500)
    assert uniform_distance((many.first - 0.5) / 500) < 0.02
    cifar = PRIME.cifar().draw((200, 3, 2, 2), generator=seeded())
    assert (cifar.first == 1).all() and cifar.coefficients.shape[1:] == (3, 100)
    assert cifar.coefficients.var() == pytest.approx(0.01, rel=0.02)
    assert PRIME.imagenet().draw((9, 1, 2, 2), generator=seeded()).coefficients.shape[1:] == (1, 20)


def test_displacements_are_drawn_as_defined():
    size, cut_max = 12, 7
    settings = dict(SMALL, cut_max=cut_max)
    fields = PRIME(**settings).draw((4000, 1, size, size), generator=seeded()).displacements.double()
    # The modes of a field, by the orthogonality of the sines.
    number = torch.arange(1, size - 1)
    sines = torch.sin(math.pi * torch.linspace(0, 1, size, dtype=torch.float64) * number[:, None])
    scale = (number**2 + number[:, None] ** 2).sqrt() / size * (2 / (size - 1)) ** 2
    modes = scale * (sines @ fields @ sines.mT)  # sqrt(T) times normal numbers
    present = modes.abs().amax(1) > 1e-5
    cuts = (present.any(1) * number).amax(1)
    radius = (number**2 + number[:, None] ** 2).sqrt()
    assert torch.equal(present, radius < cuts.view(-1, 1, 1) + 0.5)
    assert torch.bincount(cuts)[:2].eq(0).all() and cuts.max() == cut_max
    assert (torch.bincount(cuts)[2:] / len(cuts)).sub(1 / 6).abs().max() < 0.02
    half = len(cuts) // 2  # the cut does not follow the place in the draw
    assert cuts[:half].double().mean() == pytest.approx(cuts[half:].double().mean().item(), abs=0.15)
    lowest, highest = (bound.double() for bound in temperature_range(size, torch.arange(cut_max + 1)))
    for cut in range(2, cut_max + 1):
        inside = radius < cut + 0.5
        values = modes[cuts == cut][:, :, inside]
        number_of = 2 * int(inside.sum())
        energy = values.pow(2).flatten(1).mean(1)  # T on the average
        t1, t2 = lowest[cut].item(), highest[cut].item()
        assert energy.mean() == pytest.approx((t1 + t2) / 2, rel=0.06)
        second = (t1 * t1 + t1 * t2 + t2 * t2) / 3 * (1 + 2 / number_of)
        assert energy.pow(2).mean() == pytest.approx(second, rel=0.15)
        normal = values / energy.sqrt().view(-1, 1, 1)
        assert normal.mean().abs() < 0.05
        correlation = normal.flatten(1).T.corrcoef()
        assert correlation.fill_diagonal_(0).abs().max() < 0.2


def test_temperatures_are_uniform(monkeypatch):
    numbers = []

    def kept(modes, deviations, temperatures, size):
        cuts = (deviations.any(1) * torch.arange(1, deviations.shape[-1] + 1)).amax(1)
        numbers.append(torch.stack((cuts, temperatures)).double())
        return displacement_fields(modes, deviations, temperatures, size)

    monkeypatch.setattr(prime_module, 'displacement_fields', kept)
    PRIME(**dict(SMALL, cut_max=9)).draw((4000, 1, 16, 16), generator=seeded())
    cuts, temperatures = torch.cat(numbers, dim=1)
    lowest, highest = (bound.double() for bound in temperature_range(16, cuts))
    assert uniform_distance((temperatures - lowest) / (highest - lowest)) < 0.02


def test_displacements_of_large_images_move_by_pixels():
    fields = PRIME.imagenet().draw((8, 3, 224, 224), generator=seeded()).displacements
    assert 0.1 < fields.std() < 20
    assert fields[..., 0].abs().max() < 1e-3 and fields[:, :, -1].abs().max() < 1e-3


def test_zero_strength_is_the_identity():
    images = random_images(8, 3, 16, 16)
    draw = PRIME(0, 500, 0, 20, 500).draw(images.shape, generator=seeded())
    draw = draw._replace(displacements=torch.zeros_like(draw.displacements))
    torch.testing.assert_close(apply_prime(images, draw), images, rtol=0, atol=1e-5)
    strong = PRIME.imagenet().draw(images.shape, generator=seeded())
    assert torch.equal(apply_prime(images, strong._replace(blend=torch.zeros(8))), images)


@pytest.mark.parametrize('preset', PRESETS)
def test_a_draw_can_be_repeated_and_replayed(preset):
    prime, images = preset(), random_images(5, 3, 16, 16)
    before = torch.get_rng_state()
    draw = prime.draw(images.shape, generator=seeded(3))
    output = prime(images, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):
        assert torch.equal(apply_prime(images, draw), output)
    for name, numbers in prime.draw(images.shape, generator=seeded(3))._asdict().items():
        assert torch.equal(numbers, getattr(draw, name)), name
    assert not torch.equal(prime(images, seeded(4)), output)
    generator = seeded(3)
    assert torch.equal(prime(images, generator), output) and not torch.equal(prime(images, generator), output)
    torch.set_rng_state(before)
    first = prime(images)
    assert not torch.equal(torch.get_rng_state(), before) and not torch.equal(prime(images), first)
    torch.set_rng_state(before)
    assert torch.equal(prime(images), first)


def test_the_input_stays_and_no_gradient_is_kept():
    prime, images = PRIME.imagenet(), random_images(4, 3, 16, 16)
    before = images.clone()
    output = prime(images.requires_grad_(), seeded())
    assert torch.equal(images, before) and not output.requires_grad
    assert output.min() >= 0 and output.max() <= 1 + 1e-6
    assert torch.equal(prime.eval()(images, seeded()), output)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    images = random_images(8, 3, 32, 32, dtype=dtype)
    draw = PRIME.imagenet().draw(images.shape, generator=seeded())
    output = apply_prime(images, draw)
    assert output.dtype == dtype and output.isfinite().all()
    if dtype == torch.float64:
        assert (output - apply_prime(images.float(), draw)).abs().mean() < 1e-3
    else:  # computed in float32, rounded once
        assert torch.equal(output, apply_prime(images.float(), draw).to(dtype))


def test_autocast_changes_nothing():
    prime, images = PRIME.imagenet(), random_images(6, 3, 32, 32)
    expected = prime(images, seeded())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(prime(images, seeded()), expected)


def test_memory_format_is_kept():
    prime, images = PRIME.imagenet(), random_images(4, 3, 16, 16)
    expected = prime(images, seeded())
    assert expected.is_contiguous()
    for view in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        output = prime(view, seeded())
        assert torch.equal(output, expected) and output.stride() == view.stride()


@pytest.mark.parametrize('count', [0, 1])
def test_small_batches(count):
    images = random_images(2, 3, 8, 8)[:count]
    for seed in range(6):  # families without a step among them
        assert PRIME.cifar()(images, seeded(seed)).shape == images.shape


@pytest.mark.parametrize('shape', [(2, 3, 8, 9), (3, 8, 8), (2, 3, 1, 1)])
def test_shapes_without_a_definition_are_refused(shape):
    message = 'images must be square, of shape .N, C, n, n. with n at least 2, got .*crop them first'
    with pytest.raises(ValueError, match=message):
        PRIME.imagenet()(torch.rand(shape))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='images must be floating-point numbers in .0, 1., got torch.uint8: divide'):
        PRIME.cifar()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    draw = PRIME.cifar().draw((2, 3, 8, 8))
    for shape in [(3, 3, 8, 8), (2, 1, 8, 8), (2, 3, 9, 9)]:
        with pytest.raises(ValueError, match=r'draw must be for images of shape \(.*\), got one for \(2, 3, 8, 8\)'):
            apply_prime(torch.rand(shape), draw)
    names = list(inspect.signature(PRIME).parameters)
    for name, value in zip(names, (-1, 1, math.nan, 0, 0), strict=True):
        with pytest.raises(ValueError, match=f'{name} must be a finite number, at least .*, got {value}'):
            PRIME(**{**SMALL, name: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda():
    prime, images = PRIME.imagenet(), random_images(8, 3, 32, 32)
    draw = prime.draw(images.shape, generator=seeded())
    gentle = without(draw, 2)
    torch.testing.assert_close(apply_prime(images.cuda(), gentle).cpu(), apply_prime(images, gentle), rtol=0, atol=1e-3)
    assert (apply_prime(images.cuda(), draw).cpu() - apply_prime(images, draw)).abs().mean() < 1e-3
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    for device in ('cpu', 'cuda'):
        outputs = [prime(images.cuda(), torch.Generator(device).manual_seed(5)) for _ in range(2)]
        assert outputs[0].is_cuda and torch.equal(*outputs)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])


def test_bench():
    row = bench_prime(batch_size=2, img_size=32, rounds=2)
    assert row.plain_seconds > 0 and 0 < row.time_ratio_low <= row.time_ratio <= row.time_ratio_high
    # Copy after copy, the floor holds one batch at a time.
    assert row.use == 'augment' and row.memory_ratio > 1 and row.reference_memory_ratio > 1
    with pytest.raises(ValueError, match="preset must be one of imagenet, cifar, got 'mnist'"):
        bench_prime(preset='mnist')


def test_bench_counts_the_peak():
    def work():
        kept = torch.ones(1000, 1000)
        (torch.ones(2000, 1000) + 1).sum()
        return kept.sum()

    assert peak_bytes(work, torch.device('cpu')) == pytest.approx(20e6, rel=0.01)


def test_bench_compares_with_the_same_augmentation():
    # Means of the outputs and of the changes, over images and draws, by both ways.
    prime, images = PRIME(4.0, 20, 0.05, 4, 20), random_images(512, 1, 16, 16)
    torch.manual_seed(0)
    ours = torch.stack([prime(images) for _ in range(8)])
    plain = torch.stack([_plain_prime(prime, images) for _ in range(8)])
    for measure in (torch.mean, torch.std, lambda x: (x - images).abs().mean(), lambda x: x.diff(dim=-1).abs().mean()):
        assert measure(ours).item() == pytest.approx(measure(plain).item(), rel=0.05)
