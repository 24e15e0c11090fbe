"""Pictures for phones and print: 5 inches wide, so that 9 points are 9 pixels on a narrow screen."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['COLORS', 'new_figure', 'to_png']

# Okabe and Ito's, which the colour-blind tell apart too.
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#000000', '#e69f00', '#56b4e9')


def new_figure(height: float) -> 'Figure':
    """Make an empty figure that belongs to no window.

    Args:
        height: In inches.

    Returns:
        The figure, 5 inches wide.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = "Pictures need matplotlib: pip install 'timm-pushpull[report]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    return Figure((5, height), layout='constrained')


def to_png(figure: 'Figure') -> bytes:
    """Draw a figure, the same bytes for the same figure.

    Args:
        figure: The figure.

    Returns:
        PNG file of 1,000 pixels across.
    """
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=200, facecolor='white', metadata={'Software': None})
    return content.getvalue()
