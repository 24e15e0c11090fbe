"""What README and hub_configs/README.md show works, and what they point to is there."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch
from conftest import REPOSITORY, save_plain
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from timm_pushpull.cli import build_parser
from timm_pushpull.recipes import list_recipes

PAGES = ['README.md', 'hub_configs/README.md']
pages = pytest.mark.parametrize('page', PAGES)


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', (REPOSITORY / page).read_text(encoding='utf-8'), re.DOTALL)


def test_readme_is_short():
    assert len((REPOSITORY / 'README.md').read_text(encoding='utf-8').splitlines()) <= 150


@pages
def test_links_lead_somewhere(page):
    text = (REPOSITORY / page).read_text(encoding='utf-8')
    targets = re.findall(r'\]\(([^)\s]+)\)', text)
    assert len(targets) > 5
    for target in targets:
        path, _, anchor = target.partition('#')
        if path.startswith('http'):
            continue
        file = (REPOSITORY / page).parent / path
        if path.removeprefix('../').startswith('timm_pushpull') and not (REPOSITORY / 'timm_pushpull').exists():
            continue  # the tests run on an installed wheel
        assert file.exists(), target
        if anchor:
            headings = re.findall('^#+ (.*)$', file.read_text(encoding='utf-8'), re.MULTILINE)
            assert anchor in {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pages
def test_commands_are_known(page):
    """Each command has arguments that its parser takes, and names recipes that exist."""
    commands = [
        line.split('timm-pushpull ', 1)[1]
        for block in blocks(page, 'bash')
        for line in block.replace('\\\n', ' ').splitlines()
        if 'timm-pushpull ' in line
    ]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        arguments = build_parser().parse_args(words)
        if words[0] == 'recipes' and arguments.name and '$' not in arguments.name:
            assert arguments.name in list_recipes()


def test_python_runs(hub, tmp_path):
    """The Python of README, with random weights in place of timm's own on a Hub on loopback."""
    (program,) = blocks('README.md', 'python')
    (name,) = re.findall(r"create_model\('(.*?)', pretrained=True", program)
    weights = timm.get_pretrained_cfg(name).hf_hub_id
    save_plain(weights.removeprefix('timm/'), tmp_path / 'plain')
    hub.host(weights, tmp_path / 'plain')
    run = [sys.executable, '-c', program.replace('torch.rand(8, 3, 224, 224)', 'torch.rand(8, 3, 64, 64)')]
    environment = {**os.environ, 'HF_HOME': str(tmp_path / 'home')}
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith('tensor([[') and len(hub.downloads()) == 1
    assert result.stderr.count('Fine-tune the network before use') == 1


@pytest.mark.slow
def test_the_program_of_the_starts_runs(tmp_path):
    """The programs behind the table of timm's weights and the initial weights, on a few images, with random weights."""
    starts, starts_of_resnet18, program = blocks('hub_configs/README.md', 'python')
    names = ImageNetInfo().label_names()[::50]
    for name in names:
        (tmp_path / 'IMAGES' / 'val' / name).mkdir(parents=True)
    torch.save(timm.create_model('tf_efficientnet_lite0').state_dict(), tmp_path / 'LITE0')
    for index, name in enumerate(
        ['ILSVRC2012_val_1.png', 'ILSVRC2012_val_2.png', 'n01440764_1.png', 'n01440764_2.png']
    ):
        path = tmp_path / 'IMAGENETTE' / 'train' / 'n01440764' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 48), (50 * index, 20, 200)).save(path)
    command = [sys.executable, '-c', f'{program}\n{starts}']
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    plain, inverted, negated = (line.split() for line in printed.stdout.splitlines())
    assert [plain[0], inverted[0], negated[0]] == ['plain', 'inverted', 'negated'] and len(inverted) == len(
        negated
    ) == 3
    initial = load_file(tmp_path / 'negated.safetensors')
    full = torch.load(tmp_path / 'LITE0', weights_only=True)
    assert torch.equal(initial['classifier.bias'], full['classifier.bias'][::50])
    assert (initial['conv_stem.alpha'] == 1).all()
    assert torch.equal(initial['conv_stem.weight'], full['conv_stem.weight'])
    new_head = load_file(tmp_path / 'new_head.safetensors')
    differ = {key for key in new_head if not torch.equal(new_head[key], load_file(tmp_path / 'plain.safetensors')[key])}
    assert differ == {'classifier.weight'}  # both biases are 0

    (tmp_path / 'second' / 'runs' / 'tiny').mkdir(parents=True)
    torch.manual_seed(1)
    full = timm.create_model('pp_resnet18', push_pull=False, num_classes=202).state_dict()
    torch.save({'state_dict': full}, tmp_path / 'second' / 'runs' / 'tiny' / 'last.pth.tar')
    subprocess.run([sys.executable, '-c', starts_of_resnet18], cwd=tmp_path / 'second', check=True)
    found = {path.stem: load_file(path) for path in (tmp_path / 'second').glob('*.safetensors')}
    assert found.keys() == {'plain', 'paper', 'negated'} and (found['negated']['conv1.alpha'] == 1).all()
    assert all(torch.equal(state['layer4.1.conv2.weight'], full['layer4.1.conv2.weight']) for state in found.values())
