"""What makes a comparison unfair by the rules of the test: corruptions in the training, and images cropped differently.

Networks for ImageNet-C must not be trained on its corruptions. A training says which operations it had where its
checkpoint has the options of timm's ``train.py``, or an ``args.yaml`` lies beside it: the field ``augmentation`` of a
model in ``protocol.json``. For other weights there is no warning, because their training is unknown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import create_transform

from .classes import list_some
from .metrics import HELD_OUT_CORRUPTIONS, TEST_CORRUPTIONS, display_name
from .summary import corruptions_of

__all__ = ['training_operations', 'unfair_comparisons']

BLURS = ('defocus_blur', 'glass_blur', 'gaussian_blur')  # the second starts with a Gaussian blur too
# The authors of AugMix leave out color, contrast, brightness and sharpness, which overlap with ImageNet-C
# (augmentations.py of https://github.com/google-research/augmix), and keep equalize, autocontrast, posterize and
# solarize. Posterize is a corruption of ImageNet-3DCC, cutout one of ImageNet-C-bar.
OVERLAPS = {
    'Brightness': ('brightness',),
    'Color': ('saturate',),
    'Contrast': ('contrast',),
    'Sharpness': BLURS,  # a factor below 1 blurs
    'Posterize': ('color_quant',),
    'Desaturate': ('saturate',),
    'GaussianBlur': BLURS,
    'ColorJitter': ('brightness', 'contrast', 'saturate'),
    'RandomGrayscale': ('saturate',),
    'RandomErasing': ('checkerboard_cutout',),
    # By its authors PRIME is distinct from the corruptions, and its filters and colour curves are. But its deformation
    # and the elastic transform are one operation: both move pixels along a smooth random field.
    'PRIME deformation': ('elastic_transform',),
}
IMAGENET_C_CROP = 0.875  # a centre of 224 pixels after a resize to 256


def training_operations(augmentation: Mapping[str, Any]) -> list[str]:
    """Name the operations of a training that can overlap corruptions.

    Args:
        augmentation: What :func:`~timm_pushpull.checkpoint.augmentation_of` returns.

    Returns:
        Names among those of timm (``'Contrast'``) and torchvision (``'ColorJitter'``), and ``'PRIME deformation'``;
        one more, the whole option ``aa``, if this timm does not know the policy.
    """
    names = {'PRIME deformation'} if augmentation.get('augment') == 'prime' else set()
    options = {'aa': None, 'color_jitter': None, **augmentation}
    options.pop('augment', None)
    policy, erasing = options.pop('aa'), options.pop('reprob', 0)
    try:
        transform = create_transform(224, is_training=True, auto_augment=policy, re_prob=erasing, **options)
    except (AssertionError, TypeError, ValueError):
        return [*names, f'the unknown policy {policy}']
    for step in transform.transforms:
        inner = getattr(step, 'transforms', [])  # of a step that is not always taken
        of_policy = [*getattr(step, 'ops', []), *(op for ops in getattr(step, 'policy', []) for op in ops)]
        names |= {type(each).__name__ for each in (step, *inner)} | {op.name for op in of_policy}
    variants = ('Increasing', 'Original', 'Rand')
    return [known for known in OVERLAPS if names & {known, *(f'{known}{variant}' for variant in variants)}]


def unfair_comparisons(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what is unfair about comparing the models with others, or clean with corrupted images.

    Args:
        protocol: Content of ``protocol.json``.
        rows: Rows of the summary of these results.

    Returns:
        A sentence or two for each recipe whose operations overlap the measured corruptions, and for each crop of clean
        images that is not that of stored corruptions. With all 15 corruptions of ImageNet-C its 4 held out ones count
        too. Stored corruptions in folders count as cropped as ImageNet-C was, those in arrays as whole images.
    """
    measured = {*corruptions_of(rows)}
    test = measured | {*HELD_OUT_CORRUPTIONS} if measured >= {*TEST_CORRUPTIONS} else measured
    recipes: dict[str, list[str]] = {}
    crops: dict[float, list[str]] = {}
    for name in (row['model'] for row in rows):
        details = protocol['models'][name]
        if overlaps := _overlaps(details.get('augmentation') or {}, test):
            recipes.setdefault(overlaps, []).append(name)
        crops.setdefault(details['crop_pct'], []).append(name)
    sentences = [
        f'{list_some(names)}: the training had operations that overlap corruptions of the test, {overlaps}. This '
        'favours them over models trained without these operations.'
        for overlaps, names in recipes.items()
    ]
    stored = protocol['corruptions'].get('stored_as')
    if not stored or not protocol['data'].get('clean'):
        return sentences
    kept = 1.0 if stored.endswith('.npy') else IMAGENET_C_CROP
    words = 'are whole' if kept == 1 else f'were cropped to {kept} when they were made, as ImageNet-C was'
    return sentences + [
        f'{list_some(names)}: clean images are cropped to {crop} of their short side, the stored corruptions {words}. '
        f'--crop-pct {kept:g} crops the clean images the same way.'
        for crop, names in crops.items()
        if crop != kept
    ]


def _overlaps(augmentation: Mapping[str, Any], test: set[str]) -> str:
    words = []
    for operation in training_operations(augmentation) if augmentation else []:
        found = [display_name(name) for name in OVERLAPS.get(operation, ()) if name in test]
        if found:
            words.append(f'{operation} ({", ".join(found)})')
        elif operation not in OVERLAPS:
            words.append(operation)
    policy = f' (aa {augmentation["aa"]})' if words and augmentation.get('aa') else ''
    return ', '.join(words) + policy
