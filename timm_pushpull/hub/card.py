"""Writes the model card: the page of a model on the Hugging Face Hub."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..layers.push_pull import PushPullConv2d
from ..models.pushpull_resnet import PushPullResNet
from ..registry import CHECKSUM, RECIPE, hub_configs
from ..robustness.intervals import columns_of
from ..robustness.metrics import MEASURES, TEST_CORRUPTIONS, display_name
from ..robustness.page import protocol_sentence
from ..robustness.summary import corruptions_of, view_differences
from ..weights import WEIGHTS

__all__ = ['Evaluation', 'Rounding', 'has_unit', 'model_card']

# Name of a data set and its id on the Hub, by the last part of a tag.
DATASETS = {
    'in1k': ('ImageNet-1k', 'imagenet-1k'),
    'in100': ('ImageNet-100, the subset of the push-pull paper', 'imagenet-1k'),
    'in200': ('ImageNet-200, the subset of the push-pull paper', 'imagenet-1k'),
    'c10': ('CIFAR-10', 'cifar10'),
    'imagenette': ('Imagenette', 'frgfm/imagenette'),
}
# Of the licenses of timm's weights those that the Hub knows: it refuses others, and takes them as license_name.
HUB_LICENSES = {
    *('apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0'),
    *('fair-noncommercial-research-license', 'gemma', 'mit', 'unknown'),
}
TASK = 'image-classification'
REPRODUCTION = f"""## Reproduce
With timm's `train.py` and the `{RECIPE}` of this folder:

```bash
python train.py --config {RECIPE} --data-dir DATA
```

`{CHECKSUM}` holds the SHA-256 of `{WEIGHTS}`: `sha256sum -c {CHECKSUM}`."""
CITATION = """```bibtex
@inproceedings{pushpullnet,
  title={PushPull-Net: Inhibition-driven ResNet robust to image corruptions},
  author={Bennabhaktula, Guru Swaroop and Alegre, Enrique and Strisciuglio, Nicola and Azzopardi, George},
  booktitle={International Conference on Pattern Recognition (ICPR)},
  year={2024},
  note={arXiv:2408.04077}
}
```"""


class Rounding(NamedTuple):
    """Top-1 accuracy in percent before and after rounding the weights, and the number of images."""

    before: float
    after: float
    images: int


class Evaluation(NamedTuple):
    """Results of the model in a results folder."""

    protocol: Mapping[str, Any]
    """Protocol of the results folder."""
    row: Mapping[str, Any]
    """Row of the model, see :func:`timm_pushpull.robustness.summary.summarize`."""
    baseline: Mapping[str, Any] | None
    """Row of the baseline; None if the folder has no baseline for this model."""
    after_rounding: bool
    """True for results of the rounded weights, False for results of the weights before rounding."""
    unlike_default: Mapping[str, Any]
    """Size, crop, mean, ... of the images and precision, by the names in the protocol, where they are not the defaults
    of the model."""


def model_card(
    name: str,
    model: nn.Module,
    model_args: Mapping[str, Any],
    weights: str,
    seed: int | None,
    label_config: Mapping[str, Any],
    org: str,
    rounding: Rounding | None,
    evaluation: Evaluation | None,
) -> ModelCard:
    """Write the card of a model.

    Args:
        name: Architecture and tag.
        model: The model.
        model_args: Arguments of ``timm.create_model`` that created the model.
        weights: Type of the weights, in words.
        seed: Seed of the training.
        label_config: ``label_names`` and ``label_descriptions`` of ``config.json``.
        org: Organisation or user on the Hub.
        rounding: Effect of rounding the weights on the accuracy.
        evaluation: Errors on clean and corrupted images.

    Returns:
        The card, with its metadata for the Hub.
    """
    dataset, dataset_id = DATASETS.get(name.rpartition('_')[2].rpartition('.')[2], (None, None))
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    known = cfg['license'] in HUB_LICENSES
    metadata = ModelCardData(
        library_name='timm',
        pipeline_tag=TASK,
        tags=[TASK, 'timm', 'push-pull', 'robustness'],
        license=cfg['license'] if known else 'other',
        license_name=None if known else cfg['license'],
        datasets=[dataset_id] if dataset_id else None,
        model_name=name,
        eval_results=_eval_results(evaluation, dataset, dataset_id) or None,
    )
    settings = ', '.join(f'`{key}={value}`' for key, value in model_args.items())
    size = 'x'.join(map(str, cfg['input_size'][1:]))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    registered = isinstance(model, PushPullResNet) and (hub_configs() / name).is_dir()
    reference = name if registered else f'hf-hub:{org}/{name}'
    sections = [
        f'# Model card for {name}',
        _description(model, model_args),
        '## Model details\n'
        f'- **Network:** `{cfg["architecture"]}`{f" with {settings}" if settings else ""}\n'
        f'- **Parameters:** {parameters:.2f} M\n'
        f'- **Weights:** {weights}\n'
        f'- **Images:** {size}, crop {cfg["crop_pct"]:g}, {cfg["interpolation"]}; mean {_numbers(cfg["mean"])}, '
        f'std {_numbers(cfg["std"])}\n'
        f'- **Trained on:** {f"{dataset}, " if dataset else ""}{model.num_classes:,} classes\n'
        '- **Paper:** PushPull-Net, https://arxiv.org/abs/2408.04077',
        *_results(name, reference, evaluation, rounding, seed, weights),
        _usage(name, reference, label_config, model.num_classes),
        REPRODUCTION,
        f'## Licence\n{cfg["license"]}. The licence of the training images may add conditions.',
        f'## Citation\n{CITATION}',
    ]
    return ModelCard(f'---\n{metadata.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n')


def has_unit(model: nn.Module) -> bool:
    """Tell whether a model has a push-pull unit."""
    return any(isinstance(module, PushPullConv2d) for module in model.modules())


def _numbers(values: Sequence[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _description(model: nn.Module, model_args: Mapping[str, Any]) -> str:
    if not has_unit(model):
        return 'A plain network, without a push-pull unit: the baseline of networks with one.'
    negated = model_args.get('pull_kernel') == 'negated'
    inverted = 'a pull kernel derived from it, of inverted contrast'
    pull_kernel = "its negative as pull kernel (not the paper's)" if negated else inverted
    return (
        f'A network whose first convolution is a push-pull unit: a trainable push kernel, and {pull_kernel}. '
        'The unit is meant to inhibit the response to noise ([PushPull-Net](https://arxiv.org/abs/2408.04077)).'
    )


def _eval_results(evaluation: Evaluation | None, dataset: str | None, dataset_id: str | None) -> list[EvalResult]:
    if evaluation is None or not evaluation.after_rounding:
        return []
    row, images = evaluation.row, evaluation.protocol['data']['images']
    found = [
        ('accuracy', 'Top-1 accuracy', row['top1']),
        ('accuracy', 'Top-5 accuracy', row['top5']),
        ('mce', 'Plain mCE', row['plain_mCE']),
    ]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset_id or 'unnamed',
            dataset_name=', '.join([dataset or 'unnamed', f'{images:,} validation images', *_settings(evaluation)]),
            dataset_split='validation',
            metric_type=metric,
            metric_name=metric_name,
            metric_value=value,
        )
        for metric, metric_name, value in found
        if value != ''
    ]


def _results(
    name: str,
    reference: str,
    evaluation: Evaluation | None,
    rounding: Rounding | None,
    seed: int | None,
    weights: str,
) -> list[str]:
    change = []
    if rounding is not None:
        change.append(
            f'Storing the weights as {weights} changed the top-1 accuracy on {rounding.images:,} images from '
            f'{rounding.before:.3f} to {rounding.after:.3f} %.'
        )
    if evaluation is None:
        return [f'## Results\n{change[0]}'] if change else []
    row, baseline = evaluation.row, evaluation.baseline
    rows = [row] if baseline is None or baseline == row else [row, baseline]
    labels = {measure: f'**{measure.replace("_", " ")}**' for measure in MEASURES}
    labels |= {f'CE_{name}': display_name(name) for name in corruptions_of([row])}
    labels = {measure: words for measure, words in labels.items() if row.get(measure, '') != ''}
    heads = [name, *(f'baseline: {other["model"]}' for other in rows[1:])]
    table = [f'| in %, with 95% intervals | {" | ".join(heads)} |', '| --- ' * (1 + len(rows)) + '|']
    table += [
        f'| {words} | {" | ".join(_with_interval(shown, measure) for shown in rows)} |'
        for measure, words in labels.items()
    ]
    words = [f'- {measure.replace("_", " ")}: {MEASURES[measure]}' for measure in labels if measure in MEASURES]
    return [
        f'## Results\n{_protocol_in_words(evaluation, rows, seed)}',
        '\n'.join(table),
        '\n'.join(words),
        f'```bash\n{_robustness_command(reference, evaluation)}\n```',
        *change,
    ]


def _with_interval(row: Mapping[str, Any], measure: str) -> str:
    value, low, high = (row.get(column, '') for column in columns_of(measure))
    if value == '':
        return ''
    return f'{value:.1f} ({low:.1f} to {high:.1f})' if low != '' and high != '' else f'{value:.1f}'


def _protocol_in_words(evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], seed: int | None) -> str:
    row, protocol = evaluation.row, evaluation.protocol
    shown = {name: protocol['models'][name] for name in (each['model'] for each in rows)}
    sentences = [protocol_sentence({**protocol, 'models': shown})]
    if row['top1'] != '':
        sentences.insert(0, f'Top-1 accuracy {row["top1"]:.3f} %.')
    if row['severities']:
        sentences.append(f'Means over severities {row["severities"]}.')
    if settings := _settings(evaluation):
        sentences.append(f'Not the defaults of the model: {", ".join(f"`{setting}`" for setting in settings)}.')
    if views := view_differences(rows):
        sentences.append(views)
    if row['unreadable']:
        sentences.append(f'Predictions missing, because their images could not be read: {row["unreadable"]}.')
    if not evaluation.after_rounding:
        sentences.append('The weights were measured before rounding.')
    sentences.append('One training run.' if seed is None else f'One training run, seed {seed}.')
    return ' '.join(sentences)


def _settings(evaluation: Evaluation) -> list[str]:
    return [f'{key}={_words(value)}' for key, value in evaluation.unlike_default.items()]


def _words(value: Any) -> str:
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


def _robustness_command(reference: str, evaluation: Evaluation) -> str:
    data, corruptions, row = evaluation.protocol['data'], evaluation.protocol['corruptions'], evaluation.row
    measured = [name for name in corruptions_of([row]) if row[f'CE_{name}'] != '']
    words = ['timm-pushpull robustness', reference]
    if data.get('clean', True):
        words.append('--dataset DATASET' if 'stream_sha256' in data else '--data-dir DATA')
    if 'stored_as' in corruptions:
        words.append('--stored FOLDER')
    words.append(f'--output results --limit {data["images"]}')
    if corruptions.get('seed'):
        words.append(f'--seed {corruptions["seed"]}')
    if measured and measured != list(TEST_CORRUPTIONS):
        words.append(f'--corruptions {" ".join(measured)}')
    if row['severities'] not in ('', '1 2 3 4 5'):
        words.append(f'--severities {row["severities"]}')
    if row['unreadable']:
        words.append('--skip-unreadable')
    for key, value in evaluation.unlike_default.items():
        if key == 'precision':
            words.append(f'--amp --amp-dtype {value}')
        elif key != 'crop_mode':  # the command has no such option
            words.append(f'--{key.replace("_", "-")} {_words(value)}')
    return ' '.join(words)


def _usage(name: str, reference: str, label_config: Mapping[str, Any], num_classes: Any) -> str:
    shown = 'print(best)'
    if 'label_names' in label_config:
        shown = "names = [model.pretrained_cfg['label_names'][index] for index in best]\nprint(names)"
    if 'label_descriptions' in label_config:
        shown = shown.replace('(names)', "([model.pretrained_cfg['label_descriptions'][name] for name in names])")
    return f"""## Use
Install timm-pushpull from its repository:

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{reference}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.inference_mode():
    logits = model(transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0))
best = logits[0].topk({min(3, num_classes)}).indices.tolist()
{shown}
```

`features_only=True`, `num_classes=0` and `in_chans=1` work as for any timm model. A copy of this folder loads as
`timm.create_model('local-dir:{name}', pretrained=True)`."""
