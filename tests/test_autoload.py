"""Registration with timm. Tests run their own programs, because it happens while torch and timm are imported."""

import os
import subprocess
import sys
import textwrap

import pytest

import timm_pushpull

EXPECT_MODELS = """
import timm
assert len(timm.list_models('pp_*')) == 40, timm.list_models('pp_*')
assert timm.create_model('pp_resnet18', num_classes=2).conv1.alpha.shape == (64,)
"""


def run_python(program, *options, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *options, '-c', textwrap.dedent(program)],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_runs(program, *options, **environment):
    result = run_python(program, *options, **environment)
    assert result.returncode == 0, result.stderr
    return result


UNCHANGED = """
assert type(timm.models.__loader__).__module__ == '_frozen_importlib_external'
assert timm.models.__spec__.loader is timm.models.__loader__
import inspect
assert 'build_model_with_cfg' in inspect.getsource(timm.models)
"""


@pytest.mark.parametrize('first, autoload', [('import timm', '1'), ('import timm_pushpull', '0')])
def test_models_are_registered_silently(first, autoload):
    """And the import system is left as it was."""
    program = f'{first}\n{EXPECT_MODELS}{UNCHANGED}'
    result = assert_runs(program, '-W', 'error::UserWarning', TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    assert result.stderr == ''


@pytest.mark.slow
def test_any_module_may_be_imported_first():
    """The import of timm, under way in one of our modules, imports our networks: no module may be half imported."""
    assert_runs(
        """
        import os, pkgutil, sys, torch, timm_pushpull, warnings
        import torchvision, huggingface_hub  # once, here: their import is most of that of timm
        warnings.simplefilter('error', UserWarning)
        names = []
        for package in ('augment', 'hub', 'layers', 'models', 'ops', 'robustness'):
            folder = os.path.join(timm_pushpull.__path__[0], package)
            names += [f'timm_pushpull.{package}.{each.name}' for each in pkgutil.iter_modules([folder])]
        for name in names:
            if os.fork() == 0:
                try:
                    __import__(name)
                    if 'timm' in sys.modules:  # else nothing of ours is under way when timm is imported
                        import timm
                        assert len(timm.list_models('pp_*')) == 40
                    os._exit(0)
                except BaseException as error:
                    print(name, error, flush=True)
                    os._exit(1)
            assert os.wait()[1] == 0, name
        """
    )


def test_switched_off_it_needs_its_own_import():
    """Which leaves what torch.load takes as it is."""
    program = f"""
        import timm, torch
        assert timm.list_models('pp_*') == []
        timm.create_model('resnet18')
        safe = set(torch.serialization.get_safe_globals())
        import timm_pushpull
        {textwrap.indent(EXPECT_MODELS, ' ' * 8).strip()}
        assert set(torch.serialization.get_safe_globals()) == safe
    """
    assert_runs(program, TORCH_DEVICE_BACKEND_AUTOLOAD='0')


def test_these_tests_can_fail():
    result = run_python(EXPECT_MODELS, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert result.returncode == 1 and 'AssertionError: []' in result.stderr


def test_registering_again_is_silent():
    assert_runs(
        f"""
        import importlib, sys, torch, timm_pushpull
        importlib.reload(sys.modules['timm_pushpull.autoload'])
        importlib.reload(timm_pushpull)
        import timm
        for _ in range(3):
            timm_pushpull.autoload()
        {textwrap.indent(EXPECT_MODELS, ' ' * 8).strip()}
        """,
        '-W',
        'error::UserWarning',
    )


@pytest.mark.parametrize('statements', [('import timm', 'import timm.models.resnet'), ('import torch', 'import timm')])
def test_threads_that_import_at_once(statements):
    assert_runs(
        f"""
        import threading
        barrier = threading.Barrier(6)
        counts, errors = [], []
        def work(statement):
            try:
                barrier.wait()
                exec(statement)
                import timm
                counts.append(len(timm.list_models('pp_*')))
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=({statements!r}[i % 2],)) for i in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not errors, errors
        assert counts == [40] * 6, counts
        """
    )


# A thread imports timm.models, which it found before the plugin was installed.
IMPORT_UNDER_WAY = """
import sys, threading
sys.path.insert(0, {path!r})
import torch
import slow_timm
importer = threading.Thread(target=slow_timm.import_timm_models)
importer.start()
slow_timm.started.wait()
import timm_pushpull
assert 'timm_pushpull.models.pushpull_resnet' not in sys.modules
slow_timm.go_on.set()
importer.join()
assert slow_timm.registered_at_once, 'the importing thread did not find the models'
"""


def test_import_that_began_before_the_plugin(tmp_path):
    """A race of two threads, made certain: the import of timm.models waits until the plugin is there."""
    (tmp_path / 'slow_timm.py').write_text(
        textwrap.dedent("""
            import importlib.abc, importlib.machinery, sys, threading
            started, go_on = threading.Event(), threading.Event()
            registered_at_once = False

            class HoldResNet(importlib.abc.MetaPathFinder):
                def find_spec(self, name, path, target=None):
                    if name != 'timm.models.resnet':
                        return None
                    sys.meta_path.remove(self)
                    spec = importlib.machinery.PathFinder.find_spec(name, path)
                    exec_module = spec.loader.exec_module

                    def held(module):
                        started.set()
                        assert go_on.wait(60)
                        exec_module(module)

                    spec.loader.exec_module = held
                    return spec

            def import_timm_models():
                global registered_at_once
                sys.meta_path.insert(0, HoldResNet())
                from timm.models import list_models
                registered_at_once = len(list_models('pp_*')) == 40
        """)
    )
    program = IMPORT_UNDER_WAY.format(path=str(tmp_path))
    assert_runs(program, TORCH_DEVICE_BACKEND_AUTOLOAD='0')


WORKERS = """
from torch.utils.data import DataLoader, Dataset

class Models(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        import timm
        return len(timm.list_models('pp_*'))

if __name__ == '__main__':
    batches = list(DataLoader(Models(), batch_size=1, num_workers=2, multiprocessing_context='spawn'))
    assert [int(batch) for batch in batches] == [40, 40]
"""


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    script = tmp_path / 'workers.py'
    script.write_text(WORKERS)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_torchrun(tmp_path):
    script = tmp_path / 'rank.py'
    script.write_text(EXPECT_MODELS)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


# An error anywhere in the plugin: here its network module raises when it is imported.
BREAK_PLUGIN = """
import importlib.abc, sys

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == 'timm_pushpull.models.pushpull_resnet':
            raise RuntimeError('plugin out of order')

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize('first, action', [('import timm', 'default'), ('import timm, timm_pushpull', 'error')])
def test_an_error_in_the_plugin_is_one_warning(first, action, tmp_path):
    (tmp_path / 'broken.py').write_text(BREAK_PLUGIN)
    # After the import of torch, which may warn too.
    program = f"""
    import sys, warnings
    sys.path.insert(0, {str(tmp_path)!r})
    import broken
    import torch
    warnings.simplefilter({action!r})
    {first}
    assert timm.list_models('pp_*') == []
    timm.create_model('resnet18')
    """
    result = assert_runs(program, **({} if 'timm_pushpull' not in first else {'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}))
    assert result.stderr.count('timm-pushpull could not register its models') == 1, result.stderr
    assert 'RuntimeError: plugin out of order' in result.stderr
    assert 'TORCH_DEVICE_BACKEND_AUTOLOAD=0' in result.stderr


def test_an_import_of_timm_that_fails_can_be_tried_again():
    assert_runs(f"""
        import importlib.abc, sys

        class FailOnce(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == 'timm.models.vgg':
                    sys.meta_path.remove(self)
                    raise OSError('disk unplugged')

        sys.meta_path.insert(0, FailOnce())
        try:
            import timm
        except OSError:
            for name in [name for name in sys.modules if name.split('.')[0] == 'timm']:
                del sys.modules[name]
        else:
            raise AssertionError('timm was imported')
        {textwrap.indent(EXPECT_MODELS, ' ' * 8).strip()}
    """)


def test_torch_alone_pays_little():
    """`import torch` imports nothing more than without the plugin: a time would depend on the machine."""
    program = """
    import os, sys
    os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
    import torch
    before = set(sys.modules)
    import timm_pushpull
    assert set(sys.modules) - before == {'timm_pushpull', 'timm_pushpull.autoload'}, set(sys.modules) - before
    """
    assert_runs(program)


def test_public_names():
    assert set(timm_pushpull.__all__) < set(dir(timm_pushpull))
    for name in timm_pushpull.__all__:
        assert getattr(timm_pushpull, name) is not None
    assert len(timm_pushpull.TEST_CORRUPTIONS) == 15
    assert isinstance(timm_pushpull.pp_resnet18(num_classes=2), timm_pushpull.PushPullResNet)
    with pytest.raises(AttributeError, match='no_such_name'):
        _ = timm_pushpull.no_such_name
