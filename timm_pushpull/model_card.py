"""The model card of a published model: what the Hugging Face Hub shows of it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .hub import CHECKSUM, HUB_ORG, RECIPE, WEIGHTS
from .measures import HELD_OUT_CORRUPTIONS, TEST_CORRUPTIONS
from .report import MEANS

__all__ = ['Evaluation', 'model_card']

# Name of a data set, and its id on the Hub, by the last part of a tag.
DATASETS = {
    'in1k': ('ImageNet-1k', 'imagenet-1k'),
    'in100': ('ImageNet-100, the subset of the push-pull paper', 'imagenet-1k'),
    'in200': ('ImageNet-200, the subset of the push-pull paper', 'imagenet-1k'),
    'c10': ('CIFAR-10', 'cifar10'),
    'imagenette': ('Imagenette', 'frgfm/imagenette'),
}
TASK = 'image-classification'
CITATION = """```bibtex
@inproceedings{pushpullnet,
  title={PushPull-Net: Inhibition-driven ResNet robust to image corruptions},
  author={Bennabhaktula, Guru Swaroop and Alegre, Enrique and Strisciuglio, Nicola and Azzopardi, George},
  booktitle={International Conference on Pattern Recognition (ICPR)},
  year={2024},
  note={arXiv:2408.04077}
}
```"""


class Evaluation(NamedTuple):
    """What a results folder holds of the model."""

    protocol: Mapping[str, Any]
    row: Mapping[str, Any]
    """Of :func:`timm_pushpull.results.summarize`."""
    baseline: Mapping[str, Any] | None
    """The same of the baseline, where the folder has one."""
    stored: bool
    """Whether the weights were those that are stored, rounded as they are."""


def model_card(
    name: str,
    model: nn.Module,
    model_args: Mapping[str, Any],
    weights: str,
    recipe: str,
    departures: str = '',
    labelled: bool = False,
    top1_by_rounding: tuple[float, ...] | None = None,
    evaluation: Evaluation | None = None,
) -> ModelCard:
    """Write the card of a model.

    Args:
        name: Architecture and tag.
        model: The network.
        model_args: Arguments of ``timm.create_model`` that it was made with.
        weights: What the weights are, in words.
        recipe: Content of ``args.yaml``.
        departures: Options of ``train.py`` in which the run differs from the recipe.
        labelled: Whether ``config.json`` names the classes.
        top1_by_rounding: Top-1 accuracy in percent, before and after the weights were rounded.
        evaluation: Errors on clean and corrupted pictures.

    Returns:
        The card, with the metadata that the Hub reads.
    """
    dataset, dataset_id = DATASETS.get(name.rpartition('_')[2].rpartition('.')[2], (None, None))
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    metadata = ModelCardData(
        library_name='timm',
        pipeline_tag=TASK,
        tags=[TASK, 'timm', 'push-pull', 'robustness'],
        license='apache-2.0',
        datasets=[dataset_id] if dataset_id else None,
        model_name=name,
        eval_results=_eval_results(evaluation, dataset, dataset_id) or None,
    )
    settings = ', '.join(f'`{key}={value}`' for key, value in model_args.items())
    size = 'x'.join(map(str, cfg['input_size'][1:]))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sections = [
        f'# Model card for {name}',
        _description(recipe, model_args),
        '## Model details\n'
        f'- **Network:** `{cfg["architecture"]}`{f" with {settings}" if settings else ""}\n'
        f'- **Parameters:** {parameters:.2f} M\n'
        f'- **Weights:** {weights}\n'
        f'- **Pictures:** {size}, crop {cfg["crop_pct"]:g}, {cfg["interpolation"]}; mean {_numbers(cfg["mean"])}, '
        f'std {_numbers(cfg["std"])}\n'
        f'- **Trained on:** {dataset or "see the recipe"}, {model.num_classes:,} classes\n'
        '- **Paper:** PushPull-Net, https://arxiv.org/abs/2408.04077',
        *_results(name, evaluation, top1_by_rounding),
        _usage(name, labelled),
        _reproduction(name, departures),
        '## Licence\nApache-2.0, like timm. The licence of the pictures it was trained on may say more.',
        f'## Citation\n{CITATION}',
    ]
    return ModelCard(f'---\n{metadata.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n')


def _numbers(values: Sequence[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _description(recipe: str, model_args: Mapping[str, Any]) -> str:
    first = recipe.splitlines()[0]
    purpose = f'{first.lstrip("# ")}\n\n' if first.startswith('#') else ''
    if model_args.get('push_pull') is False:
        return f'{purpose}The plain baseline of the push-pull networks: the same network without the push-pull unit.'
    return (
        f'{purpose}A ResNet whose first convolution is a push-pull unit: a trainable push kernel and a pull kernel of '
        'inverted contrast derived from it, which inhibits the response to noise '
        '([PushPull-Net](https://arxiv.org/abs/2408.04077)).'
    )


def _eval_results(evaluation: Evaluation | None, dataset: str | None, dataset_id: str | None) -> list[EvalResult]:
    if evaluation is None or not evaluation.stored:
        return []
    name, dataset_type = dataset or 'unnamed', dataset_id or 'unnamed'
    row = evaluation.row
    found = [
        ('accuracy', 'Top-1 accuracy', row['top1'], name),
        ('accuracy', 'Top-5 accuracy', row['top5'], name),
        ('mce', 'Plain mCE', row['plain_mCE'], f'{name}, 15 corruptions'),
    ]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset_type,
            dataset_name=dataset_name,
            dataset_split='validation',
            metric_type=metric,
            metric_name=metric_name,
            metric_value=value,
        )
        for metric, metric_name, value, dataset_name in found
        if value != ''
    ]


def _results(name: str, evaluation: Evaluation | None, top1_by_rounding: tuple[float, ...] | None) -> list[str]:
    rounding = ''
    if top1_by_rounding is not None:
        before, after = top1_by_rounding
        rounding = f'Rounding the weights changed the top-1 accuracy from {before:.3f} to {after:.3f} %.'
    if evaluation is None:
        return [f'## Results\n{rounding}'] if rounding else []
    row, baseline = evaluation.row, evaluation.baseline
    rows = [row] if baseline is None or baseline == row else [row, baseline]
    labels = {mean: f'**{mean.replace("_", " ")}**' for mean in MEANS}
    labels |= {f'CE_{name}': name.replace('_', ' ') for name in (*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS)}
    labels = {measure: words for measure, words in labels.items() if row.get(measure, '') != ''}
    heads = [name, *(f'baseline: {other["model"]}' for other in rows[1:])]
    table = [f'| in %, with 95% intervals | {" | ".join(heads)} |', '| --- ' * (1 + len(rows)) + '|']
    table += [
        f'| {words} | {" | ".join(_with_interval(of, measure) for of in rows)} |' for measure, words in labels.items()
    ]
    words = [f'- {mean.replace("_", " ")}: {MEANS[mean]}' for mean in labels if mean in MEANS]
    return [
        f'## Results\n{_protocol_in_words(evaluation)}',
        '\n'.join(table),
        '\n'.join(words),
        f'```bash\n{_robustness_command(name, evaluation)}\n```',
        *([rounding] if rounding else []),
    ]


def _with_interval(row: Mapping[str, Any], measure: str) -> str:
    low, high = row[f'{measure}_low'], row[f'{measure}_high']
    return f'{row[measure]:.1f} ({low:.1f} to {high:.1f})' if low != '' and high != '' else f'{row[measure]:.1f}'


def _protocol_in_words(evaluation: Evaluation) -> str:
    data, corruptions = evaluation.protocol['data'], evaluation.protocol['corruptions']
    source = (
        f'generated by {corruptions["generated_by"]} with seed {corruptions["seed"]}'
        if 'generated_by' in corruptions
        else f'stored ({corruptions["stored_as"]})'
    )
    severities = f' at severities {evaluation.row["severities"]}' if evaluation.row['severities'] else ''
    rounded = '' if evaluation.stored else ' The weights were those before rounding.'
    return (
        f'Top-1 accuracy {evaluation.row["top1"]:.3f} % on {data["images"]:,} pictures of {data["classes"]:,} classes; '
        f'corruptions {source}{severities}. One training run; the intervals are over the pictures.{rounded}'
    )


def _robustness_command(name: str, evaluation: Evaluation) -> str:
    corruptions, severities = evaluation.protocol['corruptions'], evaluation.row['severities'] or '1 2 3 4 5'
    words = ['timm-pushpull robustness', name, '--data-dir DATA --output results']
    if 'generated_by' not in corruptions:
        words.append('--stored FOLDER')
    elif corruptions['seed']:
        words.append(f'--seed {corruptions["seed"]}')
    if severities != '1 2 3 4 5':
        words.append(f'--severities {severities}')
    return ' '.join(words)


def _usage(name: str, labelled: bool) -> str:
    answer = "model.pretrained_cfg['label_names'][place]" if labelled else 'int(place)'
    return f"""## Use
With `pip install timm-pushpull`:

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.inference_mode():
    logits = model(transform(Image.open('picture.jpg').convert('RGB')).unsqueeze(0))
print([{answer} for place in logits[0].topk(3).indices])
```

`features_only=True`, `num_classes=0` and `in_chans=1` adapt it as any model of timm.
The same from this repository, whatever the release of the package knows:
`timm.create_model('hf-hub:{HUB_ORG}/{name}', pretrained=True)`."""


def _reproduction(name: str, departures: str) -> str:
    options = f' {departures}' if departures else ''
    return f"""## Reproduce
With timm's `train.py` and the `{RECIPE}` beside this card; `timm-pushpull recipes {name}` prints the command for the
copy in the package:

```bash
python train.py --config {RECIPE} --data-dir DATA{options}
```

`{CHECKSUM}` holds the SHA-256 of `{WEIGHTS}`: `sha256sum -c {CHECKSUM}`."""
