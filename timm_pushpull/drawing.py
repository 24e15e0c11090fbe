"""Figures for phones and print: 5 inches wide, so that text of 9 points stays readable on a narrow screen."""

import io
from typing import TYPE_CHECKING

from .errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['COLORS', 'new_figure', 'to_png']

# The palette of Okabe and Ito, whose colours colour-blind readers can tell apart.
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#000000', '#e69f00', '#56b4e9')


def new_figure(height: float) -> 'Figure':
    """Create an empty figure, without a window.

    Args:
        height: Height in inches.

    Returns:
        The figure, 5 inches wide.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = 'Figures need matplotlib: pip install matplotlib'
        raise MissingExtraError(message, name=error.name) from error
    return Figure((5, height), layout='constrained')


def to_png(figure: 'Figure') -> bytes:
    """Draw a figure as a PNG, 1,000 pixels wide. The same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=200, facecolor='white', metadata={'Software': None})
    return content.getvalue()
