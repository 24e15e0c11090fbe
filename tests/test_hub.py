"""Models with weights: their registration, and `pretrained=True` with huggingface_hub's client and a local Hub."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import REPOSITORY
from hub_server import TOKEN
from safetensors.torch import load_file, save
from timm.models import save_for_hf

from timm_pushpull.models.pretrained import HUB_MODELS
from timm_pushpull.recipes import list_recipes, read_recipe
from timm_pushpull.registry import CHECKSUM, HUB_ORG, hub_configs, model_folders, read_hub_models
from timm_pushpull.weights import WEIGHTS, fetch_weights, file_sha256

NAME = 'pp_resnet18.pp3_r64_imagenette'
REPO_ID = f'{HUB_ORG}/{NAME}'
MIRRORED = f'ours/{NAME}'
FOLDER = REPOSITORY / 'hub_configs' / NAME


@pytest.fixture
def remote(monkeypatch):
    """Weights that are not installed with the package."""
    monkeypatch.setitem(HUB_MODELS, NAME, HUB_MODELS[NAME]._replace(weights=None))


@pytest.fixture
def published(hub, remote):
    hub.host(REPO_ID, FOLDER)
    return hub


@pytest.fixture(scope='module')
def local():
    return timm.create_model(f'local-dir:{FOLDER}', pretrained=True).eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def blobs(cache):
    """List the weights in a cache, complete or not."""
    return [path for path in Path(cache).rglob('blobs/*') if path.stat().st_size > 1e6]


# Registration


def test_each_folder_is_registered():
    assert HUB_MODELS.keys() == {folder.name for folder in FOLDER.parent.iterdir() if folder.is_dir()}
    for name, model in HUB_MODELS.items():
        architecture, tag = name.split('.')
        cfg = timm.get_pretrained_cfg(name)
        fields = {**model.pretrained_cfg, 'architecture': architecture, 'tag': tag}
        assert {key: getattr(cfg, key) for key in fields} == fields
        assert cfg.hf_hub_id == f'{HUB_ORG}/{name}'
        assert model.sha256 == file_sha256(FOLDER.parent / name / WEIGHTS)
        assert model.weights == hub_configs() / name / WEIGHTS


@pytest.mark.parametrize('name', HUB_MODELS)
def test_each_registration_follows_the_recipe(name):
    recipe, model = read_recipe(name), HUB_MODELS[name]
    for key in ('num_classes', 'crop_pct', 'interpolation'):
        assert model.pretrained_cfg[key] == recipe[key]
    assert model.pretrained_cfg['input_size'] == tuple(recipe['input_size'])
    settings = {key: value for key, value in recipe['model_kwargs'].items() if key != 'augment'}
    assert {**model.model_args, **settings} == {'global_pool': 'avg', **settings}


def test_a_tag_sets_the_unit():
    name = 'pp_resnet18.pp3_negated_prime_contrastnorm_r64_imagenette'
    model = timm.create_model(name)
    assert (model.conv1.pull_kernel, model.contrast_norm, model.num_classes) == ('negated', True, 10)
    model = timm.create_model(name, pull_kernel='inverted', avg_pool_size=0, num_classes=2)
    assert (model.conv1.pull_kernel, model.conv1.avg_pool_size, model.num_classes) == ('inverted', 0, 2)


@pytest.mark.skipif(not hasattr(timm.models, 'get_model_args'), reason='timm 1.0.31 and later keep the arguments')
@pytest.mark.parametrize('given', [{}, {'avg_pool_size': 0, 'augment': 'prime'}], ids=str)
def test_a_saved_tag_keeps_its_unit(given, images, tmp_path):
    name = 'pp_resnet18.pp3_negated_prime_contrastnorm_r64_imagenette'
    model = timm.create_model(name, num_classes=3, **given).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert str(again) == str(model) and torch.equal(again(images), model(images))


def test_a_network_without_weights():
    with pytest.raises(RuntimeError, match='There are no pretrained weights of pp_resnet18_cifar. Train') as error:
        timm.create_model('pp_resnet18_cifar', pretrained=True)
    assert 'timm-pushpull recipes' in str(error.value) and NAME in str(error.value)


@pytest.mark.parametrize('pretrained', [False, True])
@pytest.mark.parametrize(
    'name, words',
    [
        ('pp_resnet50.pp3_prime_in1k', 'into pp_resnet50 with avg_pool_size=3, num_classes=1000, input_size='),
        ('pp_resnet18.baseline_contrastnorm_r64_imagenette', 'push_pull=False, contrast_norm=True, num_classes=10, '),
        ('pp_resnet18_cifar.pp3_c10', 'input_size=[3, 32, 32], crop_pct=1.0'),
        (
            'pp_resnet18.pp3_typo',
            'not a model with weights; the tags of pp_resnet18 are a1_in1k, .*pp3_r64_imagenette',
        ),
        ('pp_resnet18_cifar.typo', 'is not a model with weights; the tags of pp_resnet18_cifar are none'),
    ],
)
def test_a_tag_without_weights_is_refused(name, words, pretrained):
    """The error of a recipe's name holds what loads a checkpoint of the recipe."""
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=pretrained)
    message = str(error.value)
    assert re.search(words.replace('[', r'\['), message) and '\n' not in message and len(message) < 300
    assert message.startswith(f'{name} is a recipe without weights') == (name in list_recipes())


@pytest.mark.parametrize('name', ['pp_resnet18.pp3_negated_r64_imagenette', 'pp_resnet50_cifar.pp5_prime_c10'])
def test_a_checkpoint_of_a_recipe(name, tmp_path):
    recipe = read_recipe(name)
    network, kwargs = recipe['model'], dict(num_classes=recipe['num_classes'], **recipe['model_kwargs'])
    model = timm.create_model(network, **kwargs).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    loaded = timm.create_model(network, checkpoint_path=tmp_path / 'last.pth.tar', **kwargs).eval()
    x = torch.randn(2, *recipe['input_size'])
    assert torch.equal(loaded(x), model(x))


# Folders that cannot be read


def spoil(path, **fields):
    config = json.loads(path.read_text())
    for key, value in fields.items():
        config.pop(key) if value is None else config.update({key: value})
    path.write_text(json.dumps(config))


def spoil_field(path, **fields):
    spoil(path, pretrained_cfg={**json.loads(path.read_text())['pretrained_cfg'], **fields})


CONFIG_FAULTS = {
    'cut short': (lambda path: path.write_text(path.read_text()[:99]), 'is not JSON'),
    'not text': (lambda path: path.write_bytes(b'\xff\xfe\x00'), 'must be text in UTF-8'),
    'a list': (lambda path: path.write_text('[]'), 'must hold a mapping, got []'),
    'no pretrained_cfg': (lambda path: spoil(path, pretrained_cfg=None), 'pretrained_cfg must be a mapping'),
    'no model_args': (lambda path: spoil(path, model_args=None), 'model_args must be a mapping'),
    'model_args of another type': (lambda path: spoil(path, model_args=[3]), 'model_args must be a mapping'),
    'unknown field': (lambda path: spoil_field(path, window=3), 'has the field window, which timm does not know'),
    'input_size of another type': (
        lambda path: spoil_field(path, input_size='64'),
        "input_size must be channels, height and width, got '64'",
    ),
    'crop_pct of another type': (
        lambda path: spoil_field(path, crop_pct='1'),
        "crop_pct must be a positive number, got '1'",
    ),
    'num_classes of another type': (
        lambda path: spoil(path, num_classes='10'),
        "num_classes must be a positive integer, got '10'",
    ),
}
CHECKSUM_FAULTS = {
    'no checksum': (lambda path: path.unlink(), 'is missing'),
    'empty checksum': (lambda path: path.write_text(''), 'must begin with a SHA-256'),
    'checksum cut short': (lambda path: path.write_text(path.read_text()[:60]), 'must begin with a SHA-256'),
    'checksum not text': (lambda path: path.write_bytes(b'\xff'), 'must begin with a SHA-256'),
    'checksum a folder': (lambda path: (path.unlink(), path.mkdir()), 'Is a directory'),
}
FAULTS = {name: ('config.json', *fault) for name, fault in CONFIG_FAULTS.items()}
FAULTS |= {name: (CHECKSUM, *fault) for name, fault in CHECKSUM_FAULTS.items()}


@pytest.fixture
def configs(tmp_path):
    """A copy of hub_configs, all but the weights."""
    shutil.copytree(FOLDER.parent, tmp_path / 'hub_configs', ignore=shutil.ignore_patterns(WEIGHTS))
    return tmp_path / 'hub_configs'


@pytest.mark.parametrize('fault', FAULTS)
def test_a_folder_that_cannot_be_read_costs_one_tag(fault, configs, recwarn):
    file, damage, words = FAULTS[fault]
    damage(configs / NAME / file)
    assert read_hub_models(configs).keys() == HUB_MODELS.keys() - {NAME}
    (warning,) = recwarn
    message = str(warning.message)
    assert message.startswith(f'timm-pushpull does not register {NAME}: ') and '\n' not in message
    assert str(configs / NAME / file) in message and words in message


def test_the_other_models_are_registered(configs):
    """Even with warnings as errors, every network is there with its other tags."""
    shutil.copytree(configs / NAME, configs / 'pp_resnet34.mine')
    spoil(configs / NAME / 'config.json', model_args=None)
    code = f"""
        import torch, warnings
        from pathlib import Path
        import timm_pushpull.registry as registry
        registry.hub_configs = lambda: Path({str(configs)!r})
        warnings.simplefilter('error')  # not by -W: torch may warn too
        import timm
        assert set(timm.list_models('pp_*')) == {set(timm.list_models('pp_*'))}
        named = {{name for name in timm.list_pretrained('pp_*') if name.startswith(('pp_resnet18.', 'pp_resnet34.'))}}
        others = {{name[3:] for name in named if name[3:] in timm.list_pretrained()}}
        ours = {{name for name in named if name[3:] not in others}}
        assert ours == {{*{set(HUB_MODELS) - {NAME}}, 'pp_resnet34.mine'}}
        assert timm.get_pretrained_cfg('pp_resnet34').tag == 'a1_in1k'
    """
    run = [sys.executable, '-c', textwrap.dedent(code)]
    environment = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '1'}
    result = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('timm-pushpull') == 1 and str(configs / NAME / 'config.json') in result.stderr


def test_what_is_no_folder_of_a_model_is_skipped(configs, recwarn):
    (configs / 'README.md').touch()
    (configs / 'pp_resnet18.empty').mkdir()
    for name in ('notes', '.pp_resnet18.pp5_in1k-x7'):  # the second as an export leaves it when it is killed
        shutil.copytree(configs / NAME, configs / name)
    assert read_hub_models(configs).keys() == HUB_MODELS.keys() and not recwarn
    assert read_hub_models(configs / 'nowhere') == {}


def test_models_are_in_the_order_of_their_names(tmp_path):
    names = [f'pp_{letter}.tag' for letter in 'kdzqambx']
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').touch()
    assert [folder.name for folder in model_folders(tmp_path)] == sorted(names)


# Downloads


def test_installed_weights_need_no_network(hub, local, images):
    model = timm.create_model(NAME, pretrained=True).eval()
    assert torch.equal(model(images), local(images)) and hub.requests == []
    assert model.pretrained_cfg['hf_hub_id'] == REPO_ID and 'file' not in model.pretrained_cfg


OFFSETS = [0, -1]  # in the length of the header, and in the last tensor


@pytest.mark.parametrize('offset', OFFSETS)
def test_installed_weights_that_are_damaged(offset, tmp_path, monkeypatch):
    weights, content = tmp_path / WEIGHTS, bytearray((FOLDER / WEIGHTS).read_bytes())
    content[offset] ^= 1
    weights.write_bytes(content)
    monkeypatch.setitem(HUB_MODELS, NAME, HUB_MODELS[NAME]._replace(weights=weights))
    with pytest.raises(RuntimeError) as error:
        timm.create_model(NAME, pretrained=True)
    assert str(error.value).startswith(f'{weights} is damaged: ') and 'Install timm-pushpull again' in str(error.value)


def test_cold_download_and_warm_cache(published, local, images, tmp_path):
    model = timm.create_model(NAME, pretrained=True).eval()
    assert torch.equal(model(images), local(images))
    assert len(published.downloads()) == 1 and blobs(tmp_path / 'cache')
    assert model.pretrained_cfg['tag'] == NAME.split('.')[1]
    assert model.pretrained_cfg['hf_hub_id'] == REPO_ID and 'file' not in model.pretrained_cfg
    assert model.pretrained_cfg['label_names'][0] == 'n01440764'
    published.requests.clear()
    assert torch.equal(timm.create_model(NAME, pretrained=True).eval()(images), local(images))
    assert published.requests == []


def test_names_of_places(published, local, images, tmp_path):
    first = published.repositories[REPO_ID].branch
    published.repositories[REPO_ID].tags['v1'] = first
    published.repositories[REPO_ID].commit({'README.md': b'another commit'})
    for name in (f'hf-hub:{REPO_ID}', f'hf-hub:{REPO_ID}@v1', f'hf-hub:{REPO_ID}@{first}'):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path / 'elsewhere').eval()
        assert torch.equal(model(images), local(images))
    assert not (tmp_path / 'cache').exists() and blobs(tmp_path / 'elsewhere')
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'third').eval()
    assert torch.equal(model(images), local(images)) and blobs(tmp_path / 'third')


@pytest.fixture
def nowhere(monkeypatch):
    """Return a function that turns the Hub off: the client finds nobody at its address."""
    from huggingface_hub import constants

    def turn_off(hub):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            address = f'http://127.0.0.1:{free.getsockname()[1]}'
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template.replace(hub.url, address))

    return turn_off


@pytest.mark.parametrize('has_checksum', [True, False])
def test_a_revision_in_a_cache_folder_of_its_own(has_checksum, hub, tmp_path, nowhere):
    (tmp_path / 'repository').mkdir()
    file = tmp_path / 'repository' / WEIGHTS
    for content in (b'first', b'second'):
        file.write_bytes(content)
        repository = hub.host('someone/net', tmp_path / 'repository')
        repository.tags[content.decode()] = repository.branch
    sha256 = hashlib.sha256(b'first').hexdigest() if has_checksum else None
    fetch = partial(fetch_weights, 'someone/net@first', None, sha256, tmp_path / 'folder')
    path = Path(fetch())
    assert path.read_bytes() == b'first' and path.is_relative_to(tmp_path / 'folder')
    assert {path for _, path in hub.requests} == {f'/someone/net/resolve/first/{WEIGHTS}'}
    hub.requests.clear()
    assert fetch() == str(path) and len(hub.downloads()) == 0
    assert has_checksum == (hub.requests == [])  # without a checksum the Hub is asked for its own
    nowhere(hub)
    assert fetch() == str(path)


def test_adapted_as_timm_does(published, local, images):
    def adapted(**kwargs):
        return timm.create_model(NAME, pretrained=True, **kwargs).eval()

    five = adapted(num_classes=5)
    assert five(images).shape == (2, 5)
    assert torch.equal(five.forward_features(images), local.forward_features(images))
    pooled = local.forward_head(local.forward_features(images), pre_logits=True)
    assert torch.equal(adapted(num_classes=0)(images), pooled)
    gray = adapted(in_chans=1).conv1.weight
    torch.testing.assert_close(gray, local.conv1.weight.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)
    features = adapted(features_only=True)
    assert torch.equal(features(images)[-1], local.forward_features(images))
    assert 'file' not in features.pretrained_cfg


def test_other_sources_are_timms_own(published, local, images, tmp_path):
    overlay = dict(file=str(FOLDER / WEIGHTS), num_classes=10)
    model = timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert model.num_classes == 10 and torch.equal(model(images), local(images))
    overlay = dict(state_dict=load_file(FOLDER / WEIGHTS))
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(images), local(images))
    cfg = timm.get_pretrained_cfg(NAME).to_dict()
    assert published.requests == []
    model = timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg=cfg).eval()
    assert torch.equal(model(images), local(images)) and len(published.downloads()) == 1


# Faults


def refused(*words):
    """Create the network, which must fail with an error of one line that holds the words."""
    with pytest.raises((OSError, RuntimeError)) as error:
        timm.create_model(NAME, pretrained=True)
    message = str(error.value)
    assert all(word in message for word in words) and '\n' not in message, message
    return message


def works(local, images):
    model = timm.create_model(NAME, pretrained=True).eval()
    return torch.equal(model(images), local(images))


@pytest.fixture
def impatient(monkeypatch):
    """The client tries as often as always, without the pauses between."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)


def test_a_server_that_is_down(published, local, images, impatient, nowhere, monkeypatch):
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    nowhere(published)
    refused(REPO_ID, f'{published.url} cannot be reached, and the cache does not have them')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    assert works(local, images)


@pytest.mark.parametrize('status', [404, 401, 500])
def test_a_server_that_refuses(status, published, local, images, impatient):
    published.status = status
    refused(REPO_ID, f"error '{status} ")
    published.status = None
    assert works(local, images)


def test_a_repository_that_is_private_or_not_there(hub, remote, local, images, monkeypatch):
    refused(f'there is no public repository {REPO_ID} on the Hub; a private one needs a token')
    hub.host(REPO_ID, FOLDER, private=True)
    refused(f'there is no public repository {REPO_ID} on the Hub; a private one needs a token')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert works(local, images)


def test_a_repository_without_weights(hub, remote, local, images, tmp_path):
    shutil.copy(FOLDER / 'config.json', tmp_path)
    hub.host(REPO_ID, tmp_path)
    refused(f'{REPO_ID} holds no {WEIGHTS} and no pytorch_model.bin')
    hub.host(REPO_ID, FOLDER)
    assert works(local, images)


def test_a_slow_server(published, local, images, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.2)
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 2)
    published.delay = 0.6
    assert works(local, images)


def test_a_body_that_is_cut_short_is_resumed(published, local, images, tmp_path):
    published.cut = 15_000_000
    assert works(local, images)
    start, resumed = published.ranges
    assert start == 0 < resumed <= 15_000_000
    assert [path.name for path in blobs(tmp_path / 'cache')] == [HUB_MODELS[NAME].sha256]


def test_a_body_of_the_wrong_size(published, local, images, tmp_path):
    published.announced = 7
    refused('Consistency check failed', f'{FOLDER.joinpath(WEIGHTS).stat().st_size + 7}')
    assert not blobs(tmp_path / 'cache')
    published.announced = 0
    assert works(local, images)


@pytest.mark.parametrize('offset', OFFSETS)
def test_damaged_bytes_are_never_used(offset, published, local, images, tmp_path):
    published.damage = offset
    message = refused('is damaged', 'Delete the file')
    (damaged,) = blobs(tmp_path / 'cache')
    assert str(damaged) in message
    published.damage = None
    assert refused('is damaged') == message  # the client does not check the content of its cache
    damaged.unlink()
    assert works(local, images)


def test_a_cache_that_is_damaged_later(published, local, images, tmp_path):
    assert works(local, images)
    (blob,) = blobs(tmp_path / 'cache')
    content = bytearray(blob.read_bytes())
    content[3_000_000] ^= 1
    blob.write_bytes(content)
    assert str(blob) in refused('is damaged')
    blob.unlink()
    assert works(local, images)


def test_other_weights_in_the_repository(published, local, images, tmp_path):
    other = {WEIGHTS: save({'conv1.weight': torch.zeros(300_000)})}
    published.repositories[REPO_ID].commit(other)
    refused(f'{REPO_ID} holds other weights', 'Update timm-pushpull', f'hf-hub:{REPO_ID}')
    published.host(REPO_ID, FOLDER)
    assert works(local, images)


def test_a_checkpoint_of_another_architecture(hub, tmp_path):
    shutil.copy(FOLDER / WEIGHTS, tmp_path)
    config = json.loads((FOLDER / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'architecture': 'pp_resnet34'}))
    hub.host('someone/else', tmp_path)
    with pytest.raises(ValueError, match='does not fit the model: it lacks layer1.2.bn1.bias'):
        timm.create_model('hf-hub:someone/else', pretrained=True)


CREATE = """
    import os, resource, signal, sys, timm
    from timm_pushpull.models.pretrained import HUB_MODELS
    HUB_MODELS[{name!r}] = HUB_MODELS[{name!r}]._replace(weights=None)

    def create(cache):
        try:
            timm.create_model({name!r}, pretrained=True, cache_dir=cache)
        except OSError as error:
            print(error)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20,) * 2)
    create(sys.argv[1])
    os.geteuid() or os.seteuid(65534)
    create(sys.argv[2])
"""


def test_a_cache_that_cannot_be_written(published, local, images, tmp_path):
    full, read_only = tmp_path / 'full', tmp_path / 'read-only'
    full.mkdir()
    read_only.mkdir(0o555)
    tmp_path.chmod(0o755)
    run = [sys.executable, '-c', textwrap.dedent(CREATE).format(name=NAME), full, read_only]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    read_only.chmod(0o755)
    for cache, line, words in zip((full, read_only), printed, ('File too large', 'Permission denied'), strict=True):
        assert line.startswith(f'The weights of {REPO_ID} could not be fetched') and words in line
        assert not blobs(cache)
        model = timm.create_model(NAME, pretrained=True, cache_dir=cache).eval()
        assert torch.equal(model(images), local(images))


# A second opinion: the same downloads from another implementation of the protocol


@pytest.fixture(scope='module')
def olah(tmp_path_factory):
    """An offline olah with the folder as a Hub keeps it, a git repository with its weights in LFS."""
    program = Path(sys.executable).with_name('olah-cli')
    if not program.exists() or not shutil.which('git'):
        pytest.skip('needs git, and olah: pip install olah')
    root = tmp_path_factory.mktemp('olah')
    repository = root / 'mirrors' / 'models' / MIRRORED
    repository.mkdir(parents=True)
    sha256 = HUB_MODELS[NAME].sha256
    stored = repository / '.git' / 'lfs' / 'objects' / sha256[:2] / sha256[2:4] / sha256
    git = ['git', '-c', 'user.name=test', '-c', 'user.email=test@localhost', '-C', str(repository)]
    subprocess.run([*git, 'init', '--quiet', '--initial-branch=main'], check=True)
    for path in FOLDER.iterdir():
        shutil.copy(path, repository)
    stored.parent.mkdir(parents=True)
    shutil.move(repository / WEIGHTS, stored)
    pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {stored.stat().st_size}\n'
    (repository / WEIGHTS).write_text(pointer)
    for command in (['add', '.'], ['commit', '--quiet', '--message=Upload'], ['tag', 'v1']):
        subprocess.run([*git, *command], check=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    config = f"""
        [basic]
        host = "127.0.0.1"
        port = {port}
        repos-path = "{root}/repos"
        mirrors-path = ["{root}/mirrors"]
        [accessibility]
        offline = true
    """
    (root / 'olah.toml').write_text(textwrap.dedent(config))
    with open(root / 'log', 'wb') as log:
        run = [program, '--config', root / 'olah.toml', '--log-path', root / 'logs']
        server = subprocess.Popen(run, stdout=log, stderr=log, cwd=root)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', port)) == 0:
                break
        time.sleep(0.2)
    yield f'http://127.0.0.1:{port}'
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_downloads_from_olah(olah, hub, local, images, tmp_path):
    torch.save(images, tmp_path / 'images.pt')
    code = f"""
        import timm, torch
        from timm_pushpull.models.pretrained import HUB_MODELS
        HUB_MODELS['{NAME}'] = HUB_MODELS['{NAME}']._replace(weights=None)
        images = torch.load('images.pt')
        for name in ('{NAME}', 'hf-hub:{MIRRORED}', 'hf-hub:{MIRRORED}@v1'):
            model = timm.create_model(name, pretrained=True).eval()
            torch.save(model(images), name.replace('/', '-') + '.logits')
    """
    run = [sys.executable, '-c', textwrap.dedent(code)]
    environment = {
        **os.environ,
        'HF_HOME': str(tmp_path / 'home'),
        'HF_ENDPOINT': olah,
        'TIMM_PUSHPULL_HUB_ORG': 'ours',
    }
    for offline in ('0', '1'):
        subprocess.run(run, env={**environment, 'HF_HUB_OFFLINE': offline}, cwd=tmp_path, check=True)
        logits = list(tmp_path.glob('*.logits'))
        assert len(logits) == 3 and all(torch.equal(torch.load(path), local(images)) for path in logits)
        for path in logits:
            path.unlink()
    assert hub.requests == []
