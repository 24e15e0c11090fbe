"""Push-pull networks for timm: importing this package, or torch, is enough for timm to know them."""

import importlib
from typing import TYPE_CHECKING, Any

from .autoload import autoload

if TYPE_CHECKING:
    from .convert import convert_to_push_pull as convert_to_push_pull
    from .figures import draw_figures as draw_figures
    from .pictures import open_stored as open_stored
    from .prime import PRIME as PRIME
    from .published import convert_published_checkpoint as convert_published_checkpoint
    from .published import read_published_checkpoint as read_published_checkpoint
    from .pushpull_conv import PushPullConv2d as PushPullConv2d
    from .pushpull_conv import push_pull_conv2d as push_pull_conv2d
    from .pushpull_resnet import PushPullResNet as PushPullResNet
    from .report import write_report as write_report
    from .robustness import evaluate_robustness as evaluate_robustness

__version__ = '0.1.0'

# Loaded on demand: this package is imported at the end of `import torch`, where it must cost nothing.
_MODULE_OF = {
    'PRIME': 'prime',
    'PushPullConv2d': 'pushpull_conv',
    'PushPullResNet': 'pushpull_resnet',
    'convert_published_checkpoint': 'published',
    'convert_to_push_pull': 'convert',
    'draw_figures': 'figures',
    'evaluate_robustness': 'robustness',
    'open_stored': 'pictures',
    'push_pull_conv2d': 'pushpull_conv',
    'read_published_checkpoint': 'published',
    'write_report': 'report',
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


autoload()
