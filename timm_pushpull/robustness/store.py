"""A results folder on disk: one prediction for each model, corruption, severity and image.

Files that :func:`~timm_pushpull.evaluate_robustness` writes:

- ``protocol.json``: how the predictions were made. A later run must agree with it, or is refused. Fields:

  - ``corruptions``: the package that generated the corruptions, with the seed; or the layout of stored corruptions; or
    the name of a natural ``shift``, which has none;
  - ``data``: number of images and classes, a hash of the image names, whether there are clean images, whether the
    classes are the 1,000 of ImageNet; a hash of the ImageNet-ReaL labels if they count as right, and of the images of a
    stream;
  - ``versions`` of this package, timm, torch, numpy and pillow;
  - ``models``: for each model its architecture, arguments, image size, crop, mean and std, the hashes of its weights
    and modules, its precision and its device; where a model has more classes than the images and its predictions are
    restricted to those of the images, how many they are, with a hash of their indices; where its BatchNorm adapts to
    the images, the settings of :mod:`timm_pushpull.robustness.adaptation`; the ``augmentation`` of the training, where
    its options are known;

- ``images.csv``: one row for each image: ``image`` (its name) and ``class`` (its class index);
- ``classes.csv``: one row for each class: ``class`` (its index), ``name``, and its number of ``images``;
- ``predictions/MODEL/CORRUPTION-SEVERITY.npy``: one element for each row of ``images.csv``, of type ``PREDICTION``.
  Clean images have the name ``clean-0``; stored corruptions keep the names of their folders. Fields:

  - ``prediction``: index of the class with the highest logit, among the classes of the images;
  - ``rank``: rank of the right class among the five highest logits, 0 to 4; 5 if the right class is not among them;
    255 if the image could not be read;
  - ``confidence``: probability of the prediction, the softmax over the classes of the images;
  - ``nll`` and ``brier``: negative log-likelihood and Brier score of the image, see
    :mod:`timm_pushpull.robustness.calibration`. These three are NaN if the image could not be read, and ``nll`` and
    ``brier`` with ImageNet-ReaL labels, of which several may be right;

- ``examples/CORRUPTION-SEVERITY-ROW.png``: a few images as the first model saw them; ROW is the row in ``images.csv``,
  from 0;
- ``shifted/NAME/``: for each natural shift, such as ImageNet-A, a results folder like this one, without corruptions;
- ``stream/``: the images of a stream, from where later runs read them; see :mod:`timm_pushpull.robustness.stream`;
- ``shifted.csv``, computed from the predictions of these folders: see :mod:`timm_pushpull.robustness.shifts`;
- ``errors.csv`` and ``summary.csv``, computed from the predictions: see :mod:`timm_pushpull.robustness.summary`;
- ``results-*.csv``, the same in timm's own columns: see :mod:`timm_pushpull.robustness.timm_tables`.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from filelock import FileLock

from ..errors import InputError
from ..fields import COUNT, FLAG, INTEGER, MAPPING, NUMBER, POSITIVE, SIZE, TEXT, check_fields, optional, read_mapping
from ..files import atomic_write, write_table
from .metrics import CLEAN, HELD_OUT_CORRUPTIONS, SEVERITIES, TEST_CORRUPTIONS

__all__ = [
    'PREDICTION',
    'PROBABILITIES',
    'TOP',
    'UNREADABLE',
    'Example',
    'Predictions',
    'differences',
    'example_path',
    'find_examples',
    'find_shifted',
    'lock',
    'merge_protocol',
    'predictions_path',
    'read_classes',
    'read_csv',
    'read_images',
    'read_predictions',
    'read_protocol',
    'readable_ranks',
    'shifted_folder',
    'write_csv',
    'write_images',
    'write_predictions',
    'write_protocol',
]

PROBABILITIES = ('confidence', 'nll', 'brier')
PREDICTION = np.dtype([('prediction', '<u2'), ('rank', 'u1'), *((field, '<f4') for field in PROBABILITIES)])
TOP = 5
UNREADABLE = 255
Predictions = Mapping[str, Mapping[tuple[str, int], np.ndarray]]
"""Arrays of type ``PREDICTION`` by model, then by corruption and severity; ``('clean', 0)`` for clean images."""


def lock(folder: str | os.PathLike[str]) -> FileLock:
    """Lock a results folder, so that runs which join it at the same time do not lose each other's results.

    Args:
        folder: Results folder, made if it does not exist.

    Returns:
        Context manager that waits for the lock.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(folder) / '.lock')


def read_protocol(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``protocol.json``.

    Args:
        folder: Results folder.

    Returns:
        Content of the file.

    Raises:
        ValueError: If the folder has no such file, or if a field of it is missing or wrong.
    """
    path = Path(folder) / 'protocol.json'
    try:
        protocol = read_mapping(path)
    except FileNotFoundError:
        raise InputError(f'{folder} holds no results: there is no protocol.json.') from None
    check_fields(path, protocol, dict.fromkeys(('corruptions', 'data', 'models'), MAPPING))
    sources = ({'stored_as': TEXT}, {'shift': TEXT}, {'generated_by': TEXT, 'seed': INTEGER})
    source = next((fields for fields in sources if protocol['corruptions'].keys() & fields.keys()), sources[-1])
    check_fields(path, protocol['corruptions'], source, 'corruptions')
    check_fields(path, protocol['data'], {'images': COUNT, 'classes': COUNT, 'imagenet_1k': FLAG}, 'data')
    if not protocol['models']:
        raise InputError(f'{path} must name at least one model.')
    check_fields(path, protocol['models'], dict.fromkeys(protocol['models'], MAPPING), 'models')
    view = {'input_size': SIZE, 'crop_pct': POSITIVE, 'interpolation': TEXT, 'param_count': NUMBER}
    view['augmentation'] = optional(MAPPING)
    for name, details in protocol['models'].items():
        check_fields(path, details, view, f'models.{name}')
    return protocol


def write_protocol(folder: str | os.PathLike[str], protocol: Mapping[str, Any]) -> None:
    """Write ``protocol.json`` into a results folder, made if it does not exist."""
    atomic_write(Path(folder) / 'protocol.json', (json.dumps(protocol, indent=2) + '\n').encode())


def merge_protocol(folder: str | os.PathLike[str], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Add the models of a run to the protocol of a results folder, without writing it.

    Args:
        folder: Results folder; it may be new.
        protocol: Protocol of the run.

    Returns:
        Protocol with the models of the folder and of the run.

    Raises:
        ValueError: If the folder holds results of another protocol; the message names the field that differs.
    """
    merged = json.loads(json.dumps(protocol))  # lists for tuples, as in the file
    if (Path(folder) / 'protocol.json').exists():
        found = read_protocol(folder)
        known, models = found['models'], merged['models']
        for name in known.keys() & models.keys():
            if 'augmentation' in known[name]:
                models[name].setdefault('augmentation', known[name]['augmentation'])
        merged['models'] = known | models
        # Of the models that the folder holds, and no new ones: all but the augmentation of the training, because equal
        # weights are equal, wherever their options are kept.
        compared = {
            name: {**merged['models'][name], 'augmentation': details.get('augmentation')}
            for name, details in known.items()
        }
        for field, there, here in differences(found, {**merged, 'models': compared}):
            way = 'Give the model another label' if field.startswith('models.') else 'Name another folder'
            raise InputError(
                f'{folder} holds results of another protocol: {field} is {there} there and {here} here. {way}.'
            )
    return merged


def differences(there: Any, here: Any, field: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Compare two protocols.

    Args:
        there: First protocol, or a part of it.
        here: Second protocol, or the same part of it.
        field: Name of the part.

    Yields:
        Name of a field that differs, its value in the first protocol, its value in the second.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from differences(there.get(key), here.get(key), f'{field}.{key}' if field else key)
    elif there != here:
        yield field, there, here


def write_images(
    folder: str | os.PathLike[str], names: Iterable[str], targets: Iterable[int], classes: Iterable[str]
) -> None:
    """Write ``images.csv`` and ``classes.csv``.

    Args:
        folder: Results folder.
        names: Name of each image.
        targets: Class index of each image.
        classes: Name of each class.
    """
    images = [{'image': name, 'class': target} for name, target in zip(names, targets, strict=True)]
    write_csv(Path(folder) / 'images.csv', images)
    count = Counter(image['class'] for image in images)
    rows = [{'class': index, 'name': name, 'images': count[index]} for index, name in enumerate(classes)]
    write_csv(Path(folder) / 'classes.csv', rows)


def read_images(folder: str | os.PathLike[str]) -> list[tuple[str, int]]:
    """Read ``images.csv``.

    Args:
        folder: Results folder.

    Returns:
        Name and class index of each image.

    Raises:
        ValueError: If the folder holds no results, or if the table is wrong or lacks a row.
    """
    path, data = Path(folder) / 'images.csv', read_protocol(folder)['data']
    rows = read_csv(path, 'image', 'class')
    if len(rows) != data['images']:
        raise InputError(f'{path} must have {data["images"]} rows, one for each image, got {len(rows)}.')
    indices = {str(index): index for index in range(data['classes'])}
    for number, row in enumerate(rows, 1):
        if not row['image'] or row['class'] not in indices:
            raise InputError(f'{path}, row {number}: must be an image and the index of its class, got {row}.')
    return [(row['image'], indices[row['class']]) for row in rows]


def read_classes(folder: str | os.PathLike[str]) -> list[str]:
    """Read ``classes.csv``.

    Args:
        folder: Results folder.

    Returns:
        Name of each class, '' where the dataset has none.

    Raises:
        ValueError: If the folder holds no results, or if the table is wrong or lacks a row.
    """
    path, classes = Path(folder) / 'classes.csv', read_protocol(folder)['data']['classes']
    rows = read_csv(path, 'class', 'name')
    if [row['class'] for row in rows] != [str(index) for index in range(classes)]:
        raise InputError(f'{path} must have {classes} rows, one for each class, from 0 on.')
    return [row['name'] for row in rows]


def predictions_path(folder: str | os.PathLike[str], model: str, corruption: str, severity: int) -> Path:
    """Name the file with the predictions of one model for one corruption at one severity.

    Args:
        folder: Results folder.
        model: Name of the model.
        corruption: Name of the corruption, or ``'clean'``.
        severity: 1 to 5, or 0 for clean images.

    Returns:
        Path of the file, which may not exist yet. Its folder is the name of the model, quoted as in a URL, so that no
        two models share a folder.
    """
    return Path(folder) / 'predictions' / _quoted(model) / f'{corruption}-{severity}.npy'


def _quoted(name: str) -> str:
    return quote(name, safe='@', errors='surrogateescape').replace('.', '%2E', name.startswith('.'))


def shifted_folder(folder: str | os.PathLike[str], name: str) -> Path:
    """Name the results folder of a natural shift.

    Args:
        folder: Results folder.
        name: Name of the shift.

    Returns:
        Folder inside the results folder, which may not exist yet. Its name is quoted as in a URL.

    Raises:
        ValueError: If the name is empty, or that of another of timm's tables.
    """
    if not name:
        raise InputError('shifted must name each set of images, got an empty name.')
    if name in ('clean', 'imagenet-c'):
        raise InputError(f'shifted must not name a set {name}: that is the name of another table, results-{name}.csv.')
    return Path(folder) / 'shifted' / _quoted(name)


def find_shifted(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the natural shifts of a results folder.

    Args:
        folder: Results folder.

    Returns:
        Results folders by name, in the order of the names.

    Raises:
        ValueError: If one of them holds no results, or those of another shift.
    """
    found = {}
    for path in sorted(Path(folder).glob('shifted/*/')):
        name = read_protocol(path)['corruptions'].get('shift', '')
        if not name or shifted_folder(folder, name) != path:
            raise InputError(f'{path} does not hold results of the shift by which it is named: move it out.')
        found[name] = path
    return found


def write_predictions(path: Path, predictions: np.ndarray) -> None:
    """Write the predictions of one model for one corruption at one severity.

    Args:
        path: Path that :func:`predictions_path` returns.
        predictions: Array of type ``PREDICTION``, one element for each image.
    """
    buffer = io.BytesIO()
    np.save(buffer, predictions)
    atomic_write(path, buffer.getvalue())


def read_predictions(folder: str | os.PathLike[str]) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Read all predictions of a results folder.

    Args:
        folder: Results folder.

    Returns:
        Predictions by model, then by corruption and severity, see ``Predictions``. A model without predictions has an
        empty dictionary.

    Raises:
        ValueError: If the folder holds no results, or if a file is damaged or does not belong to these results.
    """
    # Before the protocol: a run that joins writes the protocol first.
    found = set((Path(folder) / 'predictions').glob('*/'))
    protocol = read_protocol(folder)
    folders = {name: predictions_path(folder, name, CLEAN, 0).parent for name in protocol['models']}
    if unknown := sorted(found - set(folders.values())):
        raise InputError(f'{Path(folder) / "protocol.json"} names no model with the predictions {unknown[0]}.')
    return {
        name: {
            _pass_of(path, path.stem, protocol): _read_array(path, **protocol['data'])
            for path in sorted(folders[name].glob('*.npy'))
        }
        for name in protocol['models']
    }


def _pass_of(path: Path, words: str, protocol: Mapping[str, Any]) -> tuple[str, int]:
    """Read the corruption and the severity in the name of a file; stored corruptions may have any name."""
    corruption, _, severity = words.rpartition('-')
    severities = '0' if corruption == CLEAN else ' '.join(map(str, SEVERITIES))
    known = corruption in (CLEAN, *TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS)
    if not (known or (corruption and 'stored_as' in protocol['corruptions'])) or severity not in severities.split():
        raise InputError(f'{path} is not named by a corruption and a severity: move it out of the results.')
    return corruption, int(severity)


def _read_array(path: Path, images: int, classes: int, **_: Any) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        fits = array.dtype == PREDICTION and array.shape == (images,)
    except (EOFError, OSError, ValueError):  # damaged
        fits = False
    if (
        not fits
        or (array['prediction'] >= classes).any()
        or not np.isin(array['rank'], (*range(TOP + 1), UNREADABLE)).all()
        or any((array[field] < 0).any() for field in PROBABILITIES)
        or (array['confidence'] > 1).any()
        or (array['brier'] > 2).any()
    ):
        raise InputError(
            f'{path} does not hold predictions of {images} images and {classes} classes: delete it, and repeat the '
            'command that made it.'
        )
    return array


def readable_ranks(predictions: np.ndarray) -> np.ndarray:
    """Return the rank of the right class, 0 to 5, for each image that could be read."""
    return predictions['rank'][predictions['rank'] != UNREADABLE]


class Example(NamedTuple):
    """A file in ``examples/``."""

    row: int
    """Row of the image in ``images.csv``, from 0."""
    corruption: str
    severity: int
    path: Path


def example_path(folder: str | os.PathLike[str], corruption: str, severity: int, row: int) -> Path:
    """Name the file of an example, which may not exist yet, by the row of its image in ``images.csv``, from 0."""
    return Path(folder) / 'examples' / f'{corruption}-{severity}-{row}.png'


def find_examples(folder: str | os.PathLike[str]) -> list[Example]:
    """Find the examples of a results folder.

    Args:
        folder: Results folder.

    Returns:
        Examples in no particular order.

    Raises:
        ValueError: If a file does not belong to these results.
    """
    found, protocol = [], read_protocol(folder)
    for path in Path(folder).glob('examples/*.png'):
        words, _, row = path.stem.rpartition('-')
        if not row.isdecimal() or int(row) >= protocol['data']['images']:
            raise InputError(f'{path} is not named by the row of an image: move it out of the results.')
        found.append(Example(int(row), *_pass_of(path, words, protocol), path))
    return found


def read_csv(path: str | os.PathLike[str], *columns: str) -> list[dict[str, str]]:
    """Read a table.

    Args:
        path: CSV file with a header.
        *columns: Columns that it must have.

    Returns:
        Its rows.

    Raises:
        ValueError: If the file is not a table, lacks a column, or has a row with too few or too many cells.
        OSError: If the file cannot be read.
    """
    with open(path, newline='', encoding='utf-8-sig', errors='surrogateescape') as file:
        reader = csv.DictReader(file)
        try:
            header, rows = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise InputError(f'{path} is not a table: {error}.') from error
    if missing := [column for column in columns if column not in header]:
        raise InputError(f'{path} must be a table with the column {missing[0]}, its columns are {", ".join(header)}.')
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise InputError(f'{path}, row {number}: must have {len(header)} cells.')
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table.

    Args:
        path: CSV file; an existing file is replaced.
        rows: Its rows. A row may lack columns of other rows.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_table(path, columns, ([row.get(column, '') for column in columns] for row in rows))
