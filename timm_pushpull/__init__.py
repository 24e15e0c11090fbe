"""Push-pull networks for timm. Importing this package, or torch, makes timm know them."""

import importlib
from typing import TYPE_CHECKING, Any

from .autoload import autoload

if TYPE_CHECKING:
    from .augment.prime import PRIME as PRIME
    from .layers.push_pull import PushPullConv2d as PushPullConv2d
    from .models.convert import convert_to_push_pull as convert_to_push_pull
    from .models.original import convert_original_checkpoint as convert_original_checkpoint
    from .models.original import read_original_checkpoint as read_original_checkpoint
    from .models.pushpull_resnet import PushPullResNet as PushPullResNet
    from .models.pushpull_resnet import pp_resnet18 as pp_resnet18
    from .models.pushpull_resnet import pp_resnet18_cifar as pp_resnet18_cifar
    from .models.pushpull_resnet import pp_resnet34 as pp_resnet34
    from .models.pushpull_resnet import pp_resnet50 as pp_resnet50
    from .models.pushpull_resnet import pp_resnet50_cifar as pp_resnet50_cifar
    from .models.pushpull_resnet import pp_resnet101 as pp_resnet101
    from .models.pushpull_resnet import pp_resnet152 as pp_resnet152
    from .models.pushpull_resnet import pp_resnext50_32x4d as pp_resnext50_32x4d
    from .models.stem_bn import update_stem_bn as update_stem_bn
    from .ops.push_pull import push_pull_conv2d as push_pull_conv2d
    from .robustness.corruptions import corrupt as corrupt
    from .robustness.data import open_stored as open_stored
    from .robustness.evaluate import evaluate_robustness as evaluate_robustness
    from .robustness.inputs import load_model as load_model
    from .robustness.inputs import open_dataset as open_dataset
    from .robustness.metrics import ALEXNET_CORRUPTION_ERRORS as ALEXNET_CORRUPTION_ERRORS
    from .robustness.metrics import HELD_OUT_CORRUPTIONS as HELD_OUT_CORRUPTIONS
    from .robustness.metrics import SEVERITIES as SEVERITIES
    from .robustness.metrics import TEST_CORRUPTIONS as TEST_CORRUPTIONS
    from .robustness.metrics import corruption_error as corruption_error
    from .robustness.metrics import net_error_reduction as net_error_reduction
    from .robustness.metrics import normalized_mce as normalized_mce
    from .robustness.metrics import plain_mce as plain_mce
    from .robustness.metrics import relative_mce as relative_mce
    from .robustness.report import write_report as write_report
    from .viz.figures import draw_figures as draw_figures

__version__ = '0.1.0'

# Loaded on demand: `import torch` imports this package at its end, where it must cost nothing.
_NAMES = {
    'augment.prime': 'PRIME',
    'layers.push_pull': 'PushPullConv2d',
    'models.convert': 'convert_to_push_pull',
    'models.original': 'convert_original_checkpoint read_original_checkpoint',
    'models.pushpull_resnet': 'PushPullResNet pp_resnet18 pp_resnet34 pp_resnet50 pp_resnet101 pp_resnet152 '
    'pp_resnext50_32x4d pp_resnet18_cifar pp_resnet50_cifar',
    'models.stem_bn': 'update_stem_bn',
    'ops.push_pull': 'push_pull_conv2d',
    'robustness.corruptions': 'corrupt',
    'robustness.data': 'open_stored',
    'robustness.evaluate': 'evaluate_robustness',
    'robustness.inputs': 'load_model open_dataset',
    'robustness.metrics': 'ALEXNET_CORRUPTION_ERRORS HELD_OUT_CORRUPTIONS SEVERITIES TEST_CORRUPTIONS corruption_error '
    'net_error_reduction normalized_mce plain_mce relative_mce',
    'robustness.report': 'write_report',
    'viz.figures': 'draw_figures',
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_MODULE_OF[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


autoload()
