"""What README and hub_configs/README.md show works, and what they point to is there."""

import re
import shlex
import subprocess
import sys

import pytest
import timm
from conftest import REPOSITORY
from timm.models import save_for_hf

from timm_pushpull.cli import build_parser
from timm_pushpull.hub.recipes import list_recipes

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
        if path.startswith('timm_pushpull') and not (REPOSITORY / 'timm_pushpull').exists():
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
    model = timm.create_model(name.partition('.')[0])
    save_for_hf(model, str(tmp_path / 'plain'), safe_serialization=True)
    hub.host(f'timm/{name}', tmp_path / 'plain')
    run = [sys.executable, '-c', program.replace('torch.rand(8, 3, 224, 224)', 'torch.rand(8, 3, 64, 64)')]
    environment = {'HF_HOME': str(tmp_path / 'home'), 'PATH': '', 'HF_ENDPOINT': hub.url, 'HF_HUB_DISABLE_XET': '1'}
    printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.startswith('tensor([[0.') and len(hub.downloads()) == 1
