"""Published models by `pretrained=True`: huggingface_hub's own client against a Hub on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import REPOSITORY
from hub_server import TOKEN
from safetensors.torch import load_file, save

from timm_pushpull.hub.registry import HUB_ORG, WEIGHTS
from timm_pushpull.models.pushpull_resnet import HUB_MODELS
from timm_pushpull.hub.recipes import list_recipes, read_recipe

NAME = 'pp_resnet18.pp3_r64_imagenette'
REPO_ID = f'{HUB_ORG}/{NAME}'
MIRRORED = f'ours/{NAME}'
FOLDER = REPOSITORY / 'hub_configs' / NAME


@pytest.fixture
def published(hub):
    hub.host(REPO_ID, FOLDER)
    return hub


@pytest.fixture(scope='module')
def local():
    return timm.create_model(f'local-dir:{FOLDER}', pretrained=True).eval()


@pytest.fixture(scope='module')
def pictures():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def blobs(cache):
    """What a cache holds of weights, whole or not."""
    return [path for path in Path(cache).rglob('blobs/*') if path.stat().st_size > 1e6]


# Registration


def test_each_folder_is_registered():
    assert HUB_MODELS.keys() == set(list_recipes()) and NAME in HUB_MODELS
    for name, model in HUB_MODELS.items():
        architecture, tag = name.split('.')
        cfg = timm.get_pretrained_cfg(name)
        fields = {**model.pretrained_cfg, 'architecture': architecture, 'tag': tag}
        assert {key: getattr(cfg, key) for key in fields} == fields
        assert cfg.hf_hub_id == (f'{HUB_ORG}/{name}' if model.sha256 else None)
    published = {name for name, model in HUB_MODELS.items() if model.sha256}
    defaults = {name.split('.')[0] for name in published}
    assert set(timm.list_pretrained('pp_*')) == published
    assert all(timm.get_pretrained_cfg(architecture).hf_hub_id for architecture in defaults)
    assert timm.get_pretrained_cfg('pp_resnet18').tag == 'pp3_r64_imagenette'


@pytest.mark.parametrize('name', list_recipes())
def test_each_registration_follows_the_recipe(name):
    recipe, model = read_recipe(name), HUB_MODELS[name]
    for key in ('num_classes', 'crop_pct', 'interpolation'):
        assert model.pretrained_cfg[key] == recipe[key]
    assert model.pretrained_cfg['input_size'] == tuple(recipe['input_size'])
    settings = {key: value for key, value in recipe['model_kwargs'].items() if key != 'augment'}
    assert {**model.model_args, **settings} == {'global_pool': 'avg', **settings}


def test_a_tag_sets_the_unit():
    assert timm.create_model('pp_resnet18.pp5_in1k').conv1.avg_pool_size == 5
    assert timm.create_model('pp_resnet18.pp5_in1k', avg_pool_size=0).conv1.avg_pool_size == 0
    assert type(timm.create_model('pp_resnet18.baseline_in1k').conv1) is torch.nn.Conv2d
    assert timm.create_model('pp_resnet18.pp5_in100').num_classes == 100


def test_without_weights_a_network_is_not_that_of_a_data_set():
    model = timm.create_model('pp_resnet18')
    assert (model.num_classes, model.pretrained_cfg['input_size']) == (1000, (3, 224, 224))
    model = timm.create_model(NAME)
    assert (model.num_classes, model.pretrained_cfg['input_size']) == (10, (3, 64, 64))


@pytest.mark.parametrize('name', ['pp_resnet50', 'pp_resnet50.untrained', 'pp_resnet50.pp3_prime_in1k'])
def test_weights_that_are_not_published(name):
    with pytest.raises(RuntimeError, match='are published yet. Train them') as error:
        timm.create_model(name, pretrained=True)
    recipe = ' pp_resnet50.pp3_prime_in1k' * name.endswith('prime_in1k')
    assert f'"timm-pushpull recipes{recipe}" tells how' in str(error.value) and NAME in str(error.value)


# Downloads


@pytest.mark.parametrize('name', ['pp_resnet18', NAME])
def test_cold_download_and_warm_cache(name, published, local, pictures, tmp_path):
    model = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(model(pictures), local(pictures))
    assert len(published.downloads()) == 1 and blobs(tmp_path / 'cache')
    assert model.pretrained_cfg['tag'] == NAME.split('.')[1]
    assert model.pretrained_cfg['hf_hub_id'] == REPO_ID and 'file' not in model.pretrained_cfg
    assert model.pretrained_cfg['label_names'][0] == 'n01440764'
    published.requests.clear()
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(pictures), local(pictures))
    assert published.requests == []


def test_a_program_that_imports_only_timm(published, local, pictures, tmp_path):
    torch.save(pictures, tmp_path / 'pictures.pt')
    code = """
        import timm, torch
        model = timm.create_model('pp_resnet18', pretrained=True).eval()
        torch.save(model(torch.load('pictures.pt')), 'logits.pt')
    """
    run = [sys.executable, '-c', textwrap.dedent(code)]
    environment = {**os.environ, 'HF_HOME': str(tmp_path / 'home')}
    for offline in ('0', '1'):
        subprocess.run(run, env={**environment, 'HF_HUB_OFFLINE': offline}, cwd=tmp_path, check=True)
        assert torch.equal(torch.load(tmp_path / 'logits.pt'), local(pictures))
        (tmp_path / 'logits.pt').unlink()
    shutil.rmtree(tmp_path / 'home')
    failed = subprocess.run(
        run, env={**environment, 'HF_HUB_OFFLINE': '1'}, cwd=tmp_path, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert f'The weights of {REPO_ID} could not be fetched' in failed.stderr and 'HF_HUB_OFFLINE' in failed.stderr
    assert len(published.downloads()) == 1


def test_names_of_places(published, local, pictures, tmp_path):
    first = published.repositories[REPO_ID].branch
    published.repositories[REPO_ID].tags['v1'] = first
    published.repositories[REPO_ID].commit({'README.md': b'another commit'})
    for name in (f'hf-hub:{REPO_ID}', f'hf-hub:{REPO_ID}@v1', f'hf-hub:{REPO_ID}@{first}'):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path / 'elsewhere').eval()
        assert torch.equal(model(pictures), local(pictures))
    assert not (tmp_path / 'cache').exists() and blobs(tmp_path / 'elsewhere')
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'third').eval()
    assert torch.equal(model(pictures), local(pictures)) and blobs(tmp_path / 'third')


def test_adapted_as_timm_does(published, local, pictures):
    def adapted(**kwargs):
        return timm.create_model('pp_resnet18', pretrained=True, **kwargs).eval()

    five = adapted(num_classes=5)
    assert five(pictures).shape == (2, 5)
    assert torch.equal(five.forward_features(pictures), local.forward_features(pictures))
    pooled = local.forward_head(local.forward_features(pictures), pre_logits=True)
    assert torch.equal(adapted(num_classes=0)(pictures), pooled)
    gray = adapted(in_chans=1).conv1.weight
    torch.testing.assert_close(gray, local.conv1.weight.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)
    features = adapted(features_only=True)
    assert torch.equal(features(pictures)[-1], local.forward_features(pictures))
    assert 'file' not in features.pretrained_cfg


def test_other_sources_are_timms_own(published, local, pictures, tmp_path):
    overlay = dict(file=str(FOLDER / WEIGHTS), num_classes=10)
    model = timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert model.num_classes == 10 and torch.equal(model(pictures), local(pictures))
    overlay = dict(state_dict=load_file(FOLDER / WEIGHTS))
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(pictures), local(pictures))
    cfg = timm.get_pretrained_cfg(NAME).to_dict()
    assert published.requests == []
    model = timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg=cfg).eval()
    assert torch.equal(model(pictures), local(pictures)) and len(published.downloads()) == 1


# Faults


def refused(*words):
    """Create the network, which must fail with an error of one line that holds the words."""
    with pytest.raises((OSError, RuntimeError)) as error:
        timm.create_model('pp_resnet18', pretrained=True)
    message = str(error.value)
    assert all(word in message for word in words) and '\n' not in message, message
    return message


def works(local, pictures):
    model = timm.create_model('pp_resnet18', pretrained=True).eval()
    return torch.equal(model(pictures), local(pictures))


@pytest.fixture
def impatient(monkeypatch):
    """The client tries as often as always, without the pauses between."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)


def test_a_server_that_is_down(published, local, pictures, impatient, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        nowhere = f'http://127.0.0.1:{free.getsockname()[1]}'
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template.replace(published.url, nowhere))
    refused(REPO_ID, 'Please check your connection')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    assert works(local, pictures)


@pytest.mark.parametrize('status', [404, 401, 500])
def test_a_server_that_refuses(status, published, local, pictures, impatient):
    published.status = status
    refused(REPO_ID, f"error '{status} ")
    published.status = None
    assert works(local, pictures)


def test_a_repository_that_is_private_or_not_there(hub, local, pictures, monkeypatch):
    refused('Repository Not Found', REPO_ID, 'authenticated')
    hub.host(REPO_ID, FOLDER, private=True)
    refused('Repository Not Found', REPO_ID, 'authenticated')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert works(local, pictures)


def test_a_repository_without_weights(hub, local, pictures, tmp_path):
    shutil.copy(FOLDER / 'config.json', tmp_path)
    hub.host(REPO_ID, tmp_path)
    refused('Entry Not Found', WEIGHTS)
    hub.host(REPO_ID, FOLDER)
    assert works(local, pictures)


def test_a_slow_server(published, local, pictures, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.2)
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 2)
    published.delay = 0.6
    assert works(local, pictures)


def test_a_body_that_is_cut_short_is_resumed(published, local, pictures, tmp_path):
    published.cut = 15_000_000
    assert works(local, pictures)
    start, resumed = published.ranges
    assert start == 0 < resumed <= 15_000_000
    assert [path.name for path in blobs(tmp_path / 'cache')] == [HUB_MODELS[NAME].sha256]


def test_a_body_of_the_wrong_size(published, local, pictures, tmp_path):
    published.announced = 7
    refused('Consistency check failed', f'{FOLDER.joinpath(WEIGHTS).stat().st_size + 7}')
    assert not blobs(tmp_path / 'cache')
    published.announced = 0
    assert works(local, pictures)


# In the length of the header, in its text, in the first and the last tensor.
@pytest.mark.parametrize('offset', [0, 7, 100, 20_000, -1])
def test_damaged_bytes_are_never_used(offset, published, local, pictures, tmp_path):
    published.damage = offset
    message = refused('is damaged', 'Delete it')
    (damaged,) = blobs(tmp_path / 'cache')
    assert str(damaged) in message
    published.damage = None
    assert refused('is damaged') == message  # the client takes what it has for what it should be
    damaged.unlink()
    assert works(local, pictures)


def test_a_cache_that_is_damaged_later(published, local, pictures, tmp_path):
    assert works(local, pictures)
    (blob,) = blobs(tmp_path / 'cache')
    content = bytearray(blob.read_bytes())
    content[3_000_000] ^= 1
    blob.write_bytes(content)
    assert str(blob) in refused('is damaged')
    blob.unlink()
    assert works(local, pictures)


def test_other_weights_in_the_repository(published, local, pictures, tmp_path):
    other = {WEIGHTS: save({'conv1.weight': torch.zeros(300_000)})}
    published.repositories[REPO_ID].commit(other)
    refused(f'{REPO_ID} holds other weights', 'Update timm-pushpull', f'hf-hub:{REPO_ID}')
    published.host(REPO_ID, FOLDER)
    assert works(local, pictures)


def test_a_checkpoint_of_another_architecture(hub, tmp_path):
    shutil.copy(FOLDER / WEIGHTS, tmp_path)
    config = json.loads((FOLDER / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'architecture': 'pp_resnet34'}))
    hub.host('someone/else', tmp_path)
    with pytest.raises(ValueError, match='does not fit the model: it lacks layer1.2.bn1.bias'):
        timm.create_model('hf-hub:someone/else', pretrained=True)


CREATE = """
    import os, resource, signal, sys, timm
    {limit}
    try:
        timm.create_model('pp_resnet18', pretrained=True, cache_dir=sys.argv[1])
    except OSError as error:
        print(error)
"""
LIMITS = {
    'read-only': 'os.chmod(sys.argv[1], 0o555); os.geteuid() or os.seteuid(65534)',
    'full': 'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20,) * 2)',
}


@pytest.mark.parametrize('limit, words', [('read-only', 'Permission denied'), ('full', 'File too large')])
def test_a_cache_that_cannot_be_written(limit, words, published, local, pictures, tmp_path):
    cache = tmp_path / 'limited'
    cache.mkdir()
    tmp_path.chmod(0o755)
    run = [sys.executable, '-c', textwrap.dedent(CREATE).format(limit=LIMITS[limit]), str(cache)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert f'The weights of {REPO_ID} could not be fetched' in printed and words in printed
    cache.chmod(0o755)
    assert not blobs(cache)
    model = timm.create_model('pp_resnet18', pretrained=True, cache_dir=cache).eval()
    assert torch.equal(model(pictures), local(pictures))


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


def test_downloads_from_olah(olah, hub, local, pictures, tmp_path):
    torch.save(pictures, tmp_path / 'pictures.pt')
    code = f"""
        import timm, torch
        pictures = torch.load('pictures.pt')
        for name in ('pp_resnet18', '{NAME}', 'hf-hub:{MIRRORED}', 'hf-hub:{MIRRORED}@v1'):
            model = timm.create_model(name, pretrained=True).eval()
            torch.save(model(pictures), name.replace('/', '-') + '.logits')
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
        assert len(logits) == 4 and all(torch.equal(torch.load(path), local(pictures)) for path in logits)
        for path in logits:
            path.unlink()
    assert hub.requests == []
