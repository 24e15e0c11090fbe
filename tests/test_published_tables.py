"""The numbers in the tables of README and hub_configs/README.md are those of the CSV files beside them."""

import functools
import re

import pytest
from conftest import REPOSITORY

from timm_pushpull.robustness.intervals import columns_of
from timm_pushpull.robustness.paired import significance, tenths
from timm_pushpull.robustness.runs import difference_of_means, group_runs, means_over_runs, select_runs
from timm_pushpull.robustness.summary import read_summary

MEASURES = ('E', 'plain_mCE', 'noise', 'blur', 'weather', 'digital')
FROM_SCRATCH = {
    'baseline: `pp_resnet18`, `push_pull=False`': 'baseline',
    'PP3: `pp_resnet18`': 'pp3',
    'PP5: `pp_resnet18`, `avg_pool_size=5`': 'pp5',
    "PP3, negated: `pull_kernel='negated', alpha=1.0`": 'pp3_negated',
    'baseline, contrast norm: `contrast_norm=True`': 'baseline_contrastnorm',
    'PP3, contrast norm': 'pp3_contrastnorm',
    'PP3, negated, contrast norm': 'pp3_negated_contrastnorm',
    "baseline, BlurPool: timm's `aa_layer`": 'baseline_blurpool',
    'PP3, BlurPool': 'pp3_blurpool',
    'baseline, AugMix': 'baseline_augmix',
    'PP3, AugMix': 'pp3_augmix',
    'PP5, AugMix': 'pp5_augmix',
    'baseline, AugMix, contrast norm': 'baseline_augmix_contrastnorm',
    'PP3, negated, AugMix': 'pp3_negated_augmix',
    'baseline, PRIME': 'baseline_prime',
    'PP3, PRIME': 'pp3_prime',
    'PP5, PRIME': 'pp5_prime',
    'PP3, negated, PRIME': 'pp3_negated_prime',
    'baseline, PRIME, contrast norm': 'baseline_prime_contrastnorm',
    'PP3, negated, PRIME, contrast norm': 'pp3_negated_prime_contrastnorm',
    'baseline: `pp_resnet50`, `push_pull=False`': 'baseline_resnet50',
    'PP3: `pp_resnet50`': 'pp3_resnet50',
}
FROM_SCRATCH_PAIRS = {
    'PP3': 'baseline pp3',
    'PP5': 'baseline pp5',
    'PP3, negated': 'baseline pp3_negated',
    'PP3, both with contrast norm': 'baseline_contrastnorm pp3_contrastnorm',
    'PP3, negated, both with contrast norm': 'baseline_contrastnorm pp3_negated_contrastnorm',
    'PP3, both with BlurPool': 'baseline_blurpool pp3_blurpool',
    'PP3, both with AugMix': 'baseline_augmix pp3_augmix',
    'PP5, both with AugMix': 'baseline_augmix pp5_augmix',
    'PP3, negated, both with AugMix': 'baseline_augmix pp3_negated_augmix',
    'PP3, both with PRIME': 'baseline_prime pp3_prime',
    'PP5, both with PRIME': 'baseline_prime pp5_prime',
    'PP3, negated, both with PRIME': 'baseline_prime pp3_negated_prime',
    'PP3, negated, both with PRIME and contrast norm': 'baseline_prime_contrastnorm pp3_negated_prime_contrastnorm',
    'PP3 in ResNet50': 'baseline_resnet50 pp3_resnet50',
    'BlurPool': 'baseline baseline_blurpool',
    'contrast norm': 'baseline baseline_contrastnorm',
    'AugMix': 'baseline baseline_augmix',
    'PRIME': 'baseline baseline_prime',
    'contrast norm, both with AugMix': 'baseline_augmix baseline_augmix_contrastnorm',
    'contrast norm, both with PRIME': 'baseline_prime baseline_prime_contrastnorm',
}
AT_128 = {'baseline': 'baseline', 'PP3': 'pp3', 'difference': 'baseline pp3'}
FINE_TUNED = {
    'plain, before fine-tuning': 'before',
    'plain': 'plain',
    "the paper's unit: inverted, alpha drawn": 'paper',
    'negated, alpha from 1': 'negated',
    'inverted, alpha from 1': 'inverted',
    'inverted, alpha from 1, window 5': 'inverted_w5',
    'negated, window 5': 'negated_w5',
    'plain, layer decay 0.9': 'plain_ld',
    'plain, contrast normalization': 'plain_cn',
    'negated, contrast normalization': 'negated_cn',
    'inverted, alpha from 1, contrast normalization': 'inverted_cn',
    'plain, PRIME': 'plain_prime',
    "the paper's unit, PRIME": 'paper_prime',
    'negated, PRIME': 'negated_prime',
    'inverted, alpha from 1, PRIME': 'inverted_prime',
    'inverted, alpha from 1, window 5, PRIME': 'inverted_w5_prime',
    'negated, window 5, PRIME': 'negated_w5_prime',
    'plain, contrast normalization, PRIME': 'plain_cn_prime',
    'negated, contrast normalization, PRIME': 'negated_cn_prime',
    'inverted, alpha from 1, contrast normalization, PRIME': 'inverted_cn_prime',
    'plain, averaged': 'plain_averaged',
    'negated, averaged': 'negated_averaged',
    'plain, contrast normalization, averaged': 'plain_cn_averaged',
    'plain, PRIME, averaged': 'plain_prime_averaged',
    'negated, PRIME, averaged': 'negated_prime_averaged',
    'plain, contrast normalization, PRIME, averaged': 'plain_cn_prime_averaged',
}
FINE_TUNED_PAIRS = {
    "the paper's unit": 'plain paper',
    'negated, alpha from 1': 'plain negated',
    'inverted, alpha from 1': 'plain inverted',
    'alpha from 1 in place of drawn, both inverted': 'paper inverted',
    'negated in place of inverted, both from 1': 'inverted negated',
    'inverted, alpha from 1, window 5': 'plain inverted_w5',
    'window 5 in place of 3, both inverted': 'inverted inverted_w5',
    'negated, window 5': 'plain negated_w5',
    'window 5 in place of 3, both negated': 'negated negated_w5',
    'layer decay': 'plain plain_ld',
    'contrast normalization': 'plain plain_cn',
    'PRIME': 'plain plain_prime',
    'averaging': 'plain plain_averaged',
    'PRIME and averaging': 'plain plain_prime_averaged',
    'averaging, both with PRIME': 'plain_prime plain_prime_averaged',
    'PRIME, both averaged': 'plain_averaged plain_prime_averaged',
    "the paper's unit, both with PRIME": 'plain_prime paper_prime',
    'negated, both with PRIME': 'plain_prime negated_prime',
    'inverted, alpha from 1, both with PRIME': 'plain_prime inverted_prime',
    'inverted, alpha from 1, window 5, both with PRIME': 'plain_prime inverted_w5_prime',
    'window 5 in place of 3, both inverted with PRIME': 'inverted_prime inverted_w5_prime',
    'negated, window 5, both with PRIME': 'plain_prime negated_w5_prime',
    'window 5 in place of 3, both negated with PRIME': 'negated_prime negated_w5_prime',
    'negated, both averaged': 'plain_averaged negated_averaged',
    'negated, both with PRIME and averaged': 'plain_prime_averaged negated_prime_averaged',
    'negated, both with contrast normalization': 'plain_cn negated_cn',
    'inverted, alpha from 1, both with contrast normalization': 'plain_cn inverted_cn',
    'negated, both with PRIME and contrast normalization': 'plain_cn_prime negated_cn_prime',
    'inverted, alpha from 1, both with PRIME and contrast normalization': 'plain_cn_prime inverted_cn_prime',
    'contrast normalization, both with PRIME': 'plain_prime plain_cn_prime',
    'contrast normalization, both averaged': 'plain_averaged plain_cn_averaged',
    'contrast normalization, both with PRIME and averaged': 'plain_prime_averaged plain_cn_prime_averaged',
}
NEW_CLASSES = {
    "head of ImageNet's rows": 'plain_prime',
    "head of ImageNet's rows, averaged": 'plain_prime_averaged',
    'new head': 'new_head_prime',
    'new head, averaged': 'new_head_prime_averaged',
    'new head, trained first': 'head_first_prime',
    'new head, trained first, averaged': 'head_first_prime_averaged',
}
NEW_CLASSES_PAIRS = {
    "a new head in place of ImageNet's rows": 'plain_prime new_head_prime',
    'averaging, new head': 'new_head_prime new_head_prime_averaged',
    'training the new head first': 'new_head_prime head_first_prime',
    'averaging, head trained first': 'head_first_prime head_first_prime_averaged',
    'training the head first and averaging': 'new_head_prime head_first_prime_averaged',
}
SECOND_START = {
    'plain': 'plain',
    "the paper's unit: inverted, alpha drawn": 'paper',
    'negated, alpha from 1': 'negated',
    'plain, PRIME': 'plain_prime',
    'plain, averaged': 'plain_averaged',
}
SECOND_START_PAIRS = {
    "the paper's unit": 'plain paper',
    'negated, alpha from 1': 'plain negated',
    'PRIME': 'plain plain_prime',
    'averaging': 'plain plain_averaged',
}
README_PAIRS = {
    "the paper's unit": ('baseline pp3', 'plain paper'),
    'negated pull kernel, alpha from 1': ('baseline pp3_negated', 'plain negated'),
    'contrast normalization': ('baseline baseline_contrastnorm', 'plain plain_cn'),
    'PRIME': ('baseline baseline_prime', 'plain plain_prime'),
    "the paper's unit, both with PRIME": ('baseline_prime pp3_prime', 'plain_prime paper_prime'),
    'negated, both with PRIME': ('baseline_prime pp3_negated_prime', 'plain_prime negated_prime'),
    'PRIME and averaging': ('', 'plain plain_prime_averaged'),
}
TABLES = [
    ('Differences', 'r64_imagenette', [FROM_SCRATCH_PAIRS]),
    ('Means and ranges', 'r64_imagenette', [FROM_SCRATCH]),
    ('At 128x128', 'r128_imagenette', [AT_128]),
    ('Fine-tuning pretrained weights', 'ft160_lite0', [FINE_TUNED, FINE_TUNED_PAIRS]),
    ('New classes', 'ft160_lite0', [NEW_CLASSES, NEW_CLASSES_PAIRS]),
    ('A second start: ResNet18', 'ft128_resnet18', [SECOND_START, SECOND_START_PAIRS]),
]


@functools.cache
def models_in(csv):
    return group_runs(read_summary(REPOSITORY / 'hub_configs' / f'robustness_{csv}.csv'))


def cells_of(csv, names, measures=MEASURES, intervals=True):
    """Measures of a model, or of the difference between two, as the pages print them, bold where it is significant."""
    runs = [*select_runs(models_in(csv), names.split()).values()]
    row = difference_of_means(*runs) if len(runs) == 2 else means_over_runs({names: runs[0]})[0]
    cells = []
    for measure in measures:
        value, low, high = (tenths(row[column]) for column in columns_of(measure))
        cell = f'{value} ({low} to {high})' if intervals and low != high else value
        bold = len(runs) == 2 and significance(row, measure) in ('lower', 'higher')
        cells.append(f'**{cell}**' if bold else cell)
    return cells


def number_of_runs(csv, names):
    counts = [len(runs) for runs in select_runs(models_in(csv), names.split()).values()]
    return '-' if names == 'before' else ', '.join(map(str, counts))


def tables_below(heading, page):
    """Rows of each table between a heading and the next, without the head: cells by label."""
    text = (REPOSITORY / page).read_text(encoding='utf-8')
    (section,) = re.findall(rf'^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)', text, re.DOTALL | re.MULTILINE)
    tables = [[]]
    for line in section.splitlines():
        if line.startswith('|'):
            label, *cells = (cell.strip() for cell in line.strip('|').split('|'))
            tables[-1].append((label, cells))
        elif tables[-1]:
            tables.append([])
    return [dict(table[2:]) for table in tables if table]


@pytest.mark.parametrize('heading, csv, expected', TABLES, ids=[heading for heading, *_ in TABLES])
def test_results(heading, csv, expected):
    for found, names in zip(tables_below(heading, 'hub_configs/README.md'), expected, strict=True):
        counts = {label: [] if names is AT_128 else [number_of_runs(csv, name)] for label, name in names.items()}
        assert found == {label: counts[label] + cells_of(csv, name) for label, name in names.items()}


def test_readme():
    (found,) = tables_below('What was found', 'README.md')
    expected = {}
    for label, pairs in README_PAIRS.items():
        expected[label] = [
            cell
            for csv, names in zip(('r64_imagenette', 'ft160_lite0'), pairs, strict=True)
            for cell in (cells_of(csv, names, ('E', 'noise', 'plain_mCE'), False) if names else ['', '', ''])
        ]
    assert found == expected


def test_models():
    (found,) = tables_below('Models with weights, and what was measured', 'hub_configs/README.md')
    for label, (*_, mce) in found.items():
        card = (REPOSITORY / 'hub_configs' / re.search(r'\((.*)\)', label)[1]).read_text(encoding='utf-8')
        assert f'| **plain mCE** | {mce} |' in card
