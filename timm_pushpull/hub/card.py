"""The model card of a published model: what the Hugging Face Hub shows of it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .registry import CHECKSUM, HUB_ORG, RECIPE, WEIGHTS, hub_configs
from ..robustness.metrics import HELD_OUT_CORRUPTIONS, TEST_CORRUPTIONS
from ..robustness.report import MEANS

__all__ = ['Evaluation', 'Rounding', 'model_card']

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


class Rounding(NamedTuple):
    """Top-1 accuracy in percent before and after the weights were rounded, and the number of pictures."""

    before: float
    after: float
    images: int


class Evaluation(NamedTuple):
    """What a results folder holds of the model."""

    protocol: Mapping[str, Any]
    row: Mapping[str, Any]
    """Of :func:`timm_pushpull.robustness.store.summarize`."""
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
    seed: int | None = None,
    label_config: Mapping[str, Any] | None = None,
    org: str = HUB_ORG,
    rounding: Rounding | None = None,
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
        seed: Of the training.
        label_config: Names and descriptions of the classes in ``config.json``.
        org: Organisation or user that publishes the model.
        rounding: What rounding the weights changed.
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
    known = (hub_configs() / name).is_dir()
    reference = name if known else f'hf-hub:{org}/{name}'
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
        *_results(name, reference, evaluation, rounding, seed),
        _usage(name, reference, label_config or {}),
        _reproduction(name, known, departures),
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
    negated = model_args.get('pull_kernel') == 'negated'
    inverted = 'a pull kernel of inverted contrast derived from it'
    pull_kernel = 'its negative as pull kernel, not that of the paper' if negated else inverted
    return (
        f'{purpose}A ResNet whose first convolution is a push-pull unit: a trainable push kernel and {pull_kernel}, '
        'meant to inhibit the response to noise ([PushPull-Net](https://arxiv.org/abs/2408.04077)).'
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


def _results(
    name: str, reference: str, evaluation: Evaluation | None, rounding: Rounding | None, seed: int | None
) -> list[str]:
    change = []
    if rounding is not None:
        change.append(
            f'Rounding the weights changed the top-1 accuracy on {rounding.images:,} pictures from '
            f'{rounding.before:.3f} to {rounding.after:.3f} %.'
        )
    if evaluation is None:
        return [f'## Results\n{change[0]}'] if change else []
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
        f'## Results\n{_protocol_in_words(evaluation, seed)}',
        '\n'.join(table),
        '\n'.join(words),
        f'```bash\n{_robustness_command(reference, evaluation)}\n```',
        *change,
    ]


def _with_interval(row: Mapping[str, Any], measure: str) -> str:
    low, high = row[f'{measure}_low'], row[f'{measure}_high']
    return f'{row[measure]:.1f} ({low:.1f} to {high:.1f})' if low != '' and high != '' else f'{row[measure]:.1f}'


def _protocol_in_words(evaluation: Evaluation, seed: int | None) -> str:
    data, corruptions = evaluation.protocol['data'], evaluation.protocol['corruptions']
    source = (
        f'generated by {corruptions["generated_by"]} with seed {corruptions["seed"]}'
        if 'generated_by' in corruptions
        else f'stored ({corruptions["stored_as"]})'
    )
    severities = f' at severities {evaluation.row["severities"]}' if evaluation.row['severities'] else ''
    of_seed = '' if seed is None else f', seed {seed}'
    rounded = '' if evaluation.stored else ' The weights were those before rounding.'
    return (
        f'Top-1 accuracy {evaluation.row["top1"]:.3f} % on {data["images"]:,} pictures of {data["classes"]:,} classes; '
        f'corruptions {source}{severities}. One training run{of_seed}; the intervals are over the pictures.{rounded}'
    )


def _robustness_command(reference: str, evaluation: Evaluation) -> str:
    data, corruptions, row = evaluation.protocol['data'], evaluation.protocol['corruptions'], evaluation.row
    measured = [name for name in (*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS) if row.get(f'CE_{name}', '') != '']
    words = ['timm-pushpull robustness', reference, '--data-dir DATA --output results', f'--limit {data["images"]}']
    if 'generated_by' not in corruptions:
        words.append('--stored FOLDER')
    elif corruptions['seed']:
        words.append(f'--seed {corruptions["seed"]}')
    if measured and measured != list(TEST_CORRUPTIONS):
        words.append(f'--corruptions {" ".join(measured)}')
    if row['severities'] not in ('', '1 2 3 4 5'):
        words.append(f'--severities {row["severities"]}')
    return ' '.join(words)


def _usage(name: str, reference: str, label_config: Mapping[str, Any]) -> str:
    shown = 'print(best)'
    if 'label_names' in label_config:
        shown = "names = [model.pretrained_cfg['label_names'][place] for place in best]\nprint(names)"
    if 'label_descriptions' in label_config:
        shown = shown.replace('(names)', "([model.pretrained_cfg['label_descriptions'][name] for name in names])")
    return f"""## Use
With `pip install timm-pushpull`:

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{reference}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.inference_mode():
    logits = model(transform(Image.open('picture.jpg').convert('RGB')).unsqueeze(0))
best = logits[0].topk(3).indices.tolist()
{shown}
```

`features_only=True`, `num_classes=0` and `in_chans=1` adapt it as any model of timm. A copy of this folder loads as
`timm.create_model('local-dir:{name}', pretrained=True)`."""


def _reproduction(name: str, known: bool, departures: str) -> str:
    packaged = f' (`timm-pushpull recipes {name}` prints the command for the copy in the package)' if known else ''
    options = f' {departures}' if departures else ''
    return f"""## Reproduce
With timm's `train.py` and the `{RECIPE}` beside this card{packaged}:

```bash
python train.py --config {RECIPE} --data-dir DATA{options}
```

`{CHECKSUM}` holds the SHA-256 of `{WEIGHTS}`: `sha256sum -c {CHECKSUM}`."""
