"""Pack a folder of images (DATA/train/CLASS/*, DATA/val/CLASS/*) small enough to travel, and unpack the parts there.

python .ci/pack_images.py DATA PARTS [--side 160] [--quality 55] [--mib 53]
"""

import argparse
import io
import random
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image


def shrink(path: Path, side: int, quality: int) -> bytes:
    """Return a JPEG of the central square, of ``side`` pixels."""
    with Image.open(path) as image:
        width, height = image.size
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        box = (left, top, left + edge, top + edge)
        small = image.convert('RGB').resize((side, side), Image.Resampling.BICUBIC, box)
    buffer = io.BytesIO()
    small.save(buffer, 'JPEG', quality=quality, optimize=True)
    return buffer.getvalue()


def pack(data: Path, folder: Path, side: int = 160, quality: int = 55, part_mib: float = 53) -> list[Path]:
    """Write part-0.zip, part-1.zip, ...; each has images of all classes, the first all of the test images."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in data.glob('train/*/*') if path.is_file())
    random.Random(0).shuffle(paths)
    paths = sorted(path for path in data.glob('val/*/*') if path.is_file()) + paths
    parts: list[Path] = []
    archive, size = None, 0
    with ProcessPoolExecutor() as pool:
        count = len(paths)
        for path, jpeg in zip(
            paths, pool.map(shrink, paths, [side] * count, [quality] * count, chunksize=64), strict=True
        ):
            name = str(path.relative_to(data))
            needed = len(jpeg) + 2 * len(name) + 100  # with the entry's two headers
            if archive is None or size + needed > part_mib * 2**20:
                if archive:
                    archive.close()
                parts.append(folder / f'part-{len(parts)}.zip')
                archive, size = zipfile.ZipFile(parts[-1], 'w'), 0
            archive.writestr(name, jpeg)
            size += needed
    if archive:
        archive.close()
    return parts


def unpack(folder: Path, data: Path) -> int:
    """Extract the parts that are here; return the number of training images."""
    for part in sorted(folder.glob('**/part-*.zip')):
        with zipfile.ZipFile(part) as archive:
            archive.extractall(data)
    return sum(1 for _ in data.glob('train/*/*'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('data', type=Path)
    parser.add_argument('parts', type=Path)
    parser.add_argument('--side', type=int, default=160)
    parser.add_argument('--quality', type=int, default=55)
    parser.add_argument('--mib', type=float, default=53)
    args = parser.parse_args()
    for part in pack(args.data, args.parts, args.side, args.quality, args.mib):
        with zipfile.ZipFile(part) as archive:
            print(f'{part}: {part.stat().st_size / 2**20:.1f} MiB, {len(archive.namelist())} images')
