"""Fourier spectra of push and pull kernels and of their combinations: the numbers of the paper's figure 5.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

import numpy as np
from torch import Tensor

__all__ = ['combined_spectrum', 'radial_mean']

SPECTRUM_SIZE = 32


def combined_spectrum(
    push: Tensor, pull: Tensor, alpha: float, window: int, dilation: tuple[int, int] = (1, 1)
) -> np.ndarray:
    r"""Compute the Fourier magnitude of :math:`W - \alpha \operatorname{avg}_a(K)`, averaged over the filters.

    .. math::
        \frac{1}{O} \sum_o \Big| \sum_c \hat W_{oc}(f) - \alpha D_a(f_y) D_a(f_x) \hat K_{oc}(f) \Big|,
        \qquad D_a(f) = \frac{1}{a} \sum_{j=-(a-1)/2}^{(a-1)/2} \cos(2 \pi f j)

    The sum over the channels gives the gain for a grey grating of frequency f. The unit also rectifies P and Q before
    it combines them. Rectification is not linear and has no spectrum, so it is left out here.

    Args:
        push: Push kernels W (O, C, kh, kw).
        pull: Pull kernels K, of the same shape.
        alpha: Inhibition strength.
        window: Side a of the averaging window, an odd number of pixels; 0 for no averaging (D = 1).
        dilation: Spacing between kernel elements, down and across, in pixels.

    Returns:
        Magnitudes (size, size) at the frequencies ``numpy.fft.fftshift(numpy.fft.fftfreq(size))``, in cycles per pixel;
        frequency 0 is at [size // 2, size // 2]. The size is 32, or the extent of a larger kernel.
    """
    extent = [(side - 1) * step + 1 for side, step in zip(push.shape[2:], dilation, strict=True)]
    size = max(SPECTRUM_SIZE, *extent)
    transforms = []
    for kernels in (push, pull):
        spread = np.zeros((len(kernels), *extent))
        spread[:, :: dilation[0], :: dilation[1]] = kernels.double().sum(1).numpy()
        transforms.append(np.fft.fft2(spread, (size, size)))
    offsets = np.arange(window) - (window - 1) / 2
    average = np.cos(2 * np.pi * np.outer(np.fft.fftfreq(size), offsets)).mean(1) if window else np.ones(size)
    combined = transforms[0] - alpha * np.outer(average, average) * transforms[1]
    return np.fft.fftshift(np.abs(combined).mean(0))


def radial_mean(spectrum: np.ndarray) -> np.ndarray:
    """Average a spectrum over rings around the frequency 0.

    Args:
        spectrum: Magnitudes (size, size) of :func:`combined_spectrum`.

    Returns:
        Means for the frequencies 0, 1 / size, 2 / size, ... up to 0.5 cycles per pixel, each over the ring of width
        1 / size. The corners, of higher frequencies, are left out.
    """
    size = len(spectrum)
    places = np.arange(size) - size // 2
    ring = np.rint(np.hypot(places[:, None], places)).astype(int)
    return np.array([spectrum[ring == radius].mean() for radius in range(size // 2 + 1)])
