"""A run that cannot be lost: resuming, killing, signals, pipes, full disks, wrong files."""
import contextlib
import errno
import glob
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import TINY, newest, rows, stop_after, wait_for_line
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

import dcgan
import visual

mx = dcgan.mx
replace = dcgan.dataclasses.replace

# 110 images, in batches of ten: an epoch has eleven iterations, and lines after the tenth and the eleventh. What is
# counted of generated images tells one bit from another, and takes no time.
FEW_DATA = '''
import numpy as np
few = [part[:110] for part in dcgan.data.get_digits(labels=True)]
dcgan.data.get_digits = lambda labels=False: few

class Coverage:
    num_images, floor, real_median = 20, None, 0

    def __init__(self, X, y, class_names):
        self.y, self.class_names = y, class_names

    def count(self, batches):
        found = float(np.concatenate([images for images, asked in batches]).astype(float).std())
        shares = {f'share_{name}': found for name in self.class_names}
        return dict(shares, digits=10, confidence=0.9, kl=found, median=found, fd=None, asked=found, asked_worst=found)

dcgan.data.Coverage = Coverage
'''
FEW = {**TINY, 'batch_size': 10, 'epochs': 3, 'coverage': True}
LINES = [(0, 10), (1, 0), (1, 10), (2, 0), (2, 10), (3, 0)]  # where a run of three epochs can stop


@pytest.fixture(scope='module', autouse=True)
def few_data():
    with pytest.MonkeyPatch.context() as patch:
        for name in ('get_digits', 'Coverage'):
            patch.setattr(dcgan.data, name, getattr(dcgan.data, name))  # so that it comes back
        exec(FEW_DATA, {'dcgan': dcgan})
        yield


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of three epochs; keywords change them."""
    return lambda **changes: dcgan.Settings(**{**FEW, 'out': str(tmp_path / 'out'), **changes})


@pytest.fixture
def child(child):
    """The same in a process of its own."""
    return lambda before='', **changes: child(before=FEW_DATA + before, **{**FEW, **changes})


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of three epochs that nobody stopped."""
    s = dcgan.Settings(**{**FEW, 'out': str(tmp_path_factory.mktemp('finished'))})
    dcgan.train(s)
    return s


@pytest.fixture
def copy(finished, tmp_path):
    """Settings that go on with a copy of that run."""
    shutil.copytree(finished.out, tmp_path / 'copy')
    return replace(finished, out=str(tmp_path / 'copy'), resume='latest')


def names(folder, pattern='*'):
    return sorted(os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(str(folder)), pattern)))


def states(folder):
    """The paths of a run's states, oldest first."""
    return [os.path.join(folder, name) for name in names(folder, 'state-*.npz')]


def contents(folder):
    """{path: bytes} of the files in a folder and below it."""
    found = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(parent, name), 'rb') as file:
                found[os.path.relpath(os.path.join(parent, name), folder)] = file.read()
    return found


def metrics(folder):
    """The log without what differs between two runs that are the same."""
    return [{name: float(cell or 'inf') for name, cell in row.items() if name not in ('seconds', 'images_per_second')}
            for row in rows(folder)]


def assert_same_run(found, expected, without='^$'):
    """To the last bit: the states' arrays, each epoch's networks, the pictures and the log.

    `without`: a pattern of names; files of the expected run that the other one need not have.
    """
    found, expected = newest(found), newest(expected)
    (about, arrays), (expected_about, expected_arrays) = dcgan.find_state(found), dcgan.find_state(expected)
    for name in ('epoch', 'iteration', 'num_update', 'average_count', 'checksum'):
        assert about[name] == expected_about[name], name
    assert arrays.keys() == expected_arrays.keys()
    assert [name for name in arrays if arrays[name].tobytes() != expected_arrays[name].tobytes()] == []
    assert metrics(found) == metrics(expected)
    files, expected_files = (
        {re.sub('digits_(.*?)_.*-', r'\1-', path): content for path, content
         in contents(folder).items() if not re.search(without, path) and not re.match('state-|log.csv|.*json', path)}
        for folder in (found, expected))
    assert files.keys() == expected_files.keys()
    assert [path for path in files if files[path] != expected_files[path]] == []


def before_steps(monkeypatch, actions):
    """Have a run in this process call actions[n] before its n-th step from now, the first being 1."""
    step, count = dcgan.train_step, itertools.count(1)

    def counted(*args):
        actions.get(next(count), lambda: None)()
        return step(*args)

    monkeypatch.setattr(dcgan, 'train_step', counted)


def ended(s):
    """Train, and return what a process would end with: its status, or one line."""
    with pytest.raises(SystemExit) as caught:
        dcgan.train(s)
    assert '\n' not in str(caught.value.code)
    return caught.value.code


def train_and_stop(s, steps):
    """Train, and stop at the next line after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps)
        assert ended(s) == 143


def room(size=resource.RLIM_INFINITY):
    """Let this process write no file larger than that, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def warnings(out):
    return [line for line in out.splitlines() if line.startswith('WARNING')]


# ---------------------------------------------------------------- a run's folder

def test_what_a_run_leaves(finished):
    """Two states, three files of parameters an epoch, and nothing temporary."""
    folder = newest(finished.out)
    stamp = re.fullmatch(r'digits_(\d{4}_\d\d_\d\d-\d\d_\d\d)', os.path.basename(folder))[1]
    assert names(finished.out) == [f'digits_{stamp}']
    assert set(names(folder)) - {'film.webp'} == {  # which needs OpenCV 4.11
        'gout.png', 'diff.png', 'data.png', 'loss.png', 'gout-0000.png', 'gout-0001.png', 'gout-0002.png', 'log.csv',
        'state-0002-000000.npz', 'state-0003-000000.npz',
        *(f'digits_{net}_{stamp}-{rest}' for net in ('G', 'D', 'Gmean')
          for rest in ('symbol.json', '0000.params', '0001.params', '0002.params'))}
    assert [(row['epoch'], row['iteration'], bool(row['kl'])) for row in rows(folder)] == [
        (str(epoch), *rest) for epoch in range(3) for rest in (('10', False), ('11', False), ('11', True))]


def test_new_folders_names(tiny, monkeypatch):
    """Runs that begin in the same minute, and even at the same time, get a folder each."""
    monkeypatch.setattr(dcgan.time, 'strftime', lambda *args: '2026_11_23-13_20')
    makedirs, names_found = os.makedirs, ['digits_2026_11_23-13_20' + suffix for suffix in ('', '_2', '_3')]

    def another_process_is_faster(path, *args, **kwargs):
        if path.endswith('_2'):
            makedirs(path)
        makedirs(path, *args, **kwargs)

    dcgan.train(tiny(epochs=1))
    monkeypatch.setattr(dcgan.os, 'makedirs', another_process_is_faster)
    dcgan.train(tiny(epochs=1))
    assert names(tiny().out) == names_found
    assert names(f'{tiny().out}/{names_found[1]}') == []
    for name in (names_found[0], names_found[2]):
        assert names(f'{tiny().out}/{name}', 'state-*') == ['state-0001-000000.npz']
        assert names(f'{tiny().out}/{name}', '*_G_*.params') == [f'digits_G_{name[7:]}-0000.params']


def test_two_at_once_in_one_folder(tiny, finished, monkeypatch):
    """The second is refused and changes nothing, and the first does not notice."""
    s, found = tiny(), []

    def second():
        before = contents(s.out)
        found.extend(ended(tiny(resume=resume)) for resume in ('latest', newest(s.out)))
        assert contents(s.out) == before

    before_steps(monkeypatch, {15: second})
    dcgan.train(s)
    assert len(found) == 2 and all('another process' in line for line in found)
    assert_same_run(s.out, finished.out)


def test_mxnet_loads_the_files(finished):
    prefix = glob.glob(f'{newest(finished.out)}/digits_G_*-symbol.json')[0][:-len('-symbol.json')]
    latent = mx.nd.array(dcgan.fixed_latents(finished.seed, 10, 8).reshape(10, 8, 1, 1))
    mod = mx.mod.Module.load(prefix, 2, data_names=('rand',), label_names=None)
    mod.bind([('rand', latent.shape)], for_training=False)
    mod.forward(mx.io.DataBatch([latent]), is_train=False)
    block = mx.gluon.SymbolBlock.imports(f'{prefix}-symbol.json', ['rand'], f'{prefix}-0002.params')
    assert np.array_equal(mod.get_outputs()[0].asnumpy(), block(latent).asnumpy())
    mx.mod.Module.load(prefix.replace('_G_', '_D_'), 2, label_names=('label',))


def test_the_params_are_those_of_the_state(finished):
    """And those of the last step: BatchNorm's averages, read too early, are what they were at the start, 0 and 1."""
    _, arrays = dcgan.find_state(newest(finished.out))
    for net, end in (('G', ''), ('D', ''), ('Gmean', '_average')):
        path, = glob.glob(f'{newest(finished.out)}/*_{net}_*-0002.params')
        for name, array in mx.nd.load(path).items():
            name = name.split(':')[1] + end
            assert arrays[name].tobytes() == array.asnumpy().tobytes()
            assert 'moving' not in name or np.any(arrays[name] != ('var' in name))


def test_params_do_not_remember_the_device(tiny, finished):
    """MXNet writes an array's device into the file: the files of two devices are the same."""
    s = tiny(ctx=mx.cpu(1))
    dcgan.train(s)
    assert_same_run(s.out, finished.out)  # the bytes of the .params, too


def test_a_state_holds_no_pickle(finished):
    for path in states(newest(finished.out)):
        with np.load(path, allow_pickle=False) as file:
            kinds = {name: file[name].dtype.kind for name in file.files}
        assert kinds.pop('about') == 'U' and set(kinds.values()) == {'f'}


# ---------------------------------------------------------------- going on

@pytest.mark.parametrize('changes', [{}, dict(conditional=True), dict(ctx=(mx.cpu(0), mx.cpu(1)))],
                         ids=['plain', 'conditional', 'two devices'])
def test_stopped_at_every_line_in_turn(tiny, finished, changes):
    s = finished
    if changes:
        s = tiny(**changes)
        dcgan.train(s)
    other = tiny(**changes, out=tiny().out + '2')
    for stops, line in enumerate(LINES, 1):
        train_and_stop(other, 1)
        other = replace(other, resume='latest')
        about, _ = dcgan.find_state(newest(other.out))
        assert (about['epoch'], about['iteration']) == line and len(states(newest(other.out))) == min(2, stops)
    dcgan.train(other)
    assert names(other.out) == [os.path.basename(newest(other.out))]
    assert names(newest(other.out), 'state-*') == ['state-0002-000010.npz', 'state-0003-000000.npz']
    assert_same_run(other.out, s.out)


def test_more_epochs_after_the_end(copy, tiny):
    dcgan.train(replace(copy, epochs=4))
    dcgan.train(tiny(epochs=4))
    assert_same_run(copy.out, tiny().out)


def test_seconds_count_everything(tiny, monkeypatch):
    """Also saving, and what an earlier process took, but not what lies between two; on a clock of our own."""
    clock, passed = time.monotonic, [0]
    monkeypatch.setattr(dcgan.time, 'monotonic', lambda: clock() + passed[0])
    savez = np.savez

    def slow_savez(*args, **kwargs):
        passed[0] += 10_000
        savez(*args, **kwargs)

    monkeypatch.setattr(dcgan.np, 'savez', slow_savez)
    train_and_stop(tiny(), 12)
    passed[0] += 10_000_000
    dcgan.train(tiny(resume='latest'))
    # a state does not know yet how long it takes to write
    assert [int(float(row['seconds'])) // 10_000 for row in rows(tiny().out)] == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_the_latest_run_is_that_of_the_newest_state(copy, tmp_path, finished):
    """By the time of the state; neither folders' names count, nor a clock that was set back within a run."""
    out = str(tmp_path / 'a [b] *')
    for name, epochs, seconds in (('digits_z', 3, 1000), ('digits_a', 2, 2000), ('other', 3, 1500)):
        shutil.copytree(newest(copy.out), f'{out}/{name}')
        for path in states(f'{out}/{name}')[epochs - 1:]:
            os.remove(path)
        for i, path in enumerate(states(f'{out}/{name}')):
            os.utime(path, (seconds - i, seconds - i))  # the newer state has the older time
    before = {name: contents(f'{out}/{name}') for name in ('digits_z', 'other')}
    dcgan.train(replace(copy, out=out))
    assert before == {name: contents(f'{out}/{name}') for name in before}
    assert dcgan.find_state(f'{out}/digits_a')[0]['epoch'] == 3
    assert_same_run(f'{out}/digits_a', finished.out)
    assert dcgan.find_state(f'{out}/digits_z')[0]['epoch'] == 3
    dcgan.train(replace(copy, out=out, resume=f'{out}/digits_z', epochs=4))
    assert dcgan.find_state(f'{out}/digits_z')[0]['num_update'] == 44


def test_a_state_file_begins_a_run_of_its_own(copy, finished, tmp_path):
    """It has the log so far and overwrites nothing, in another `out`, too."""
    folder = newest(copy.out)
    before = contents(folder)
    for out in (copy.out, str(tmp_path / 'other')):
        dcgan.train(replace(copy, resume=f'{folder}/state-0002-000000.npz', out=out))
        new, = set(glob.glob(f'{out}/*')) - {folder}
        assert contents(folder) == before
        # what was missing of epoch 1 has been made anew; of epoch 0 there is the log
        assert names(new, 'state-*') == ['state-0002-000000.npz', 'state-0003-000000.npz']
        os.remove(f'{new}/film.webp')
        shutil.copytree(new, f'{out}-as-it-is/{os.path.basename(new)}')
        assert_same_run(f'{out}-as-it-is', finished.out, without='0000|film')


@pytest.mark.parametrize('net', ['G', 'D'])
def test_params_begin_a_run_of_their_own(tiny, capsys, monkeypatch, net):
    """Epoch, head start and log go on; Adam begins anew, with its moments and its step count."""
    rates, seen, step = [], [], dcgan.train_step

    def watched(modG, modD, *args):
        rates.append(modG._optimizer.learning_rate)
        assert modD._optimizer.learning_rate == rates[-1]
        for mod in (modG, modD) if len(rates) == 34 else ():
            weights = [copies[0].asnumpy() for copies in mod._exec_group.param_arrays]
            moments = [moment.asnumpy() for pair in mod._updater.states.values() for moment in pair]
            seen.append((dict(zip(mod._param_names, weights)), moments))
        return step(modG, modD, *args)

    monkeypatch.setattr(dcgan, 'train_step', watched)
    s = tiny(head_start=25)
    dcgan.train(s)
    folder = newest(s.out)
    before = contents(folder)
    path, = glob.glob(f'{folder}/*_{net}_*-0001.params')
    capsys.readouterr()
    dcgan.train(replace(s, resume=path))
    assert "Adam's moments and step count begin at zero" in capsys.readouterr().out
    assert rates == [0.001] * 25 + [0.0002] * 8 + [0.001] * 3 + [0.0002] * 8
    for name, (weights, moments) in zip('GD', seen):
        expected = mx.nd.load(path.replace(f'_{net}_', f'_{name}_'))
        assert all(expected[f'arg:{key}'].asnumpy().tobytes() == weights[key].tobytes() for key in weights)
        assert moments and not any(map(np.any, moments))
    new, = set(glob.glob(f'{s.out}/*')) - {folder}
    about, _ = dcgan.find_state(new)
    assert (about['epoch'], about['num_update'], about['average_count']) == (3, 11, 2)
    assert metrics(new)[:6] == metrics(folder)[:6] and len(metrics(new)) == 9 and contents(folder) == before
    # and that new run goes on like any other
    dcgan.train(replace(s, resume=new, epochs=4))
    assert dcgan.find_state(new)[0]['num_update'] == 22


def test_params_that_begin_no_run(copy):
    """The mean of G is for samples; a G without its D, and files that were cut, are refused as well."""
    path, = glob.glob(f'{newest(copy.out)}/*_Gmean_*-0002.params')
    assert 'sample only' in ended(replace(copy, resume=path))
    path = path.replace('_Gmean_', '_D_')
    os.truncate(path, 1000)
    assert 'no state to go on from' in ended(replace(copy, resume=path))
    os.remove(path)
    assert 'sample only' in ended(replace(copy, resume=path.replace('_D_', '_G_')))
    assert names(newest(copy.out), '*.damaged') == []


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_another_number_of_devices(tiny, before, after):
    s = tiny(ctx=tuple(mx.cpu(k) for k in range(before)))
    train_and_stop(s, 12)
    _, saved = dcgan.find_state(newest(s.out))
    train_loop, found = dcgan.train_loop, []

    def look_and_train(s, modules, *args):
        group = modules[0]._exec_group
        found.extend([copy.asnumpy() for copy in copies] for copies in group.param_arrays[:1] + group.aux_arrays[:1])
        train_loop(s, modules, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'train_loop', look_and_train)
        dcgan.train(replace(s, resume='latest', ctx=[mx.cpu(k) for k in range(after)]))
    for name, copies in zip(('g1_weight', 'gbn1_moving_mean'), found):
        assert len(copies) == after and all(copy.tobytes() == saved[name].tobytes() for copy in copies)
    about, _ = dcgan.find_state(newest(s.out))
    assert (about['epoch'], about['iteration'], about['num_update']) == (3, 0, 33) and len(rows(s.out)) == 9


# ---------------------------------------------------------------- the log

@pytest.mark.parametrize('damage, least', [
    (lambda log: log[:-1], 9), (lambda log: log[:len(log) - 40], 8), (lambda log: log[:log.index(b'1,10') + 30], 3),
    (lambda log: b'', 0), (lambda log: log + b'3,1,7', 9), (lambda log: log.replace(b'0.', b'x', 3), 6),
    (lambda log: bytes(range(256)) + log, 0), (lambda log: log.replace(b',', b'\0', 40), 0),
    (lambda log: log.replace(b'kl', b'lk'), 0), (lambda log: log + b'"' * 200_001, 9), (None, 0)])
def test_a_damaged_log(copy, finished, damage, least):
    """What cannot be read is left out, and the run goes on; what has been read is in the log that is written anew."""
    path = f'{newest(copy.out)}/log.csv'
    with open(path, 'rb') as file:
        log = file.read()
    os.remove(path)
    if damage:
        with open(path, 'wb') as file:
            file.write(damage(log))
    dcgan.train(replace(copy, epochs=4))
    found = metrics(copy.out)
    assert [(row['epoch'], row['iteration']) for row in found[-3:]] == [(3, 10), (3, 11), (3, 11)]
    assert len(found) >= least + 3
    assert all(row in metrics(finished.out) for row in found[:-3])


def test_the_log_is_live_and_cut_where_the_run_goes_on(tiny, finished, monkeypatch):
    """Rows that come after the state, and half a row, are dropped."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        before_steps(patch, {11: lambda: found.append(len(rows(tiny().out))), 18: None})
        with pytest.raises(TypeError):  # None is not called: an error ends the run
            dcgan.train(tiny())
    assert found == [1] and len(rows(tiny().out)) == 3
    with open(f'{newest(tiny().out)}/log.csv', 'a') as file:
        file.write('1,10,2.5,0.1,0.2,0.3,100\n1,11')
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


def test_a_log_that_cannot_be_written_for_a_while(tiny, finished, capsys, monkeypatch):
    """It is written anew when it can be; the run goes on, and says so once. A row that was cut is made whole, too."""
    log, s = [], tiny(coverage=False)
    before_steps(monkeypatch, {
        5: lambda: log.append(f'{newest(s.out)}/log.csv'), 11: lambda: room(os.path.getsize(log[0]) + 30),
        12: room, 22: lambda: (os.remove(log[0]), os.mkdir(log[0])),
        33: lambda: os.rmdir(log[0])})
    dcgan.train(s)
    assert capsys.readouterr().out.count('log.csv cannot be written') == 1
    assert metrics(s.out) == [row for row in metrics(finished.out) if row['kl'] == np.inf]


def test_a_count_of_more_images_than_the_log_has(copy, monkeypatch):
    """A new run on more data has Fréchet distances, where the log that it goes on with has none."""
    count = dcgan.data.Coverage.count
    monkeypatch.setattr(dcgan.data.Coverage, 'count', lambda *args: dict(count(*args), fd=1.))
    path, = glob.glob(f'{newest(copy.out)}/*_G_*-0001.params')
    dcgan.train(replace(copy, resume=path))


# ---------------------------------------------------------------- killing

class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in it catches this."""


@contextlib.contextmanager
def killed_at(n, after_steps):
    """Have a run end at its n-th call that touches the disk or counts, after so many steps. Yields the calls' names."""
    calls, steps, step = [], [], dcgan.train_step

    def deadly(name, function):
        def call(*args, **kwargs):
            if len(steps) >= after_steps:
                calls.append(name)
            if len(calls) == n:
                raise Killed(name)
            return function(*args, **kwargs)
        return call

    def counted(*args):
        steps.append(0)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'train_step', counted)
        for owner, name in ((os, 'replace'), (os, 'fsync'), (os, 'remove'), (np, 'savez'), (mx.nd, 'save'),
                            (mx.nd, 'load'), (visual, 'save'), (visual, 'film'), (dcgan.data.Coverage, 'count')):
            called = f'{owner.__name__}.{name}'
            patch.setattr(owner, name, deadly(called, getattr(owner, name)))
        yield calls


def test_killed_at_each_step_of_an_epochs_end(tiny, monkeypatch):
    """Some thirty kills, more than twenty of them inside a save. Every file that counts is, bit for bit, that of the
    run nobody killed."""
    monkeypatch.setattr(visual, 'film', lambda out: None)  # of many epochs it takes long
    s, epochs, killed = tiny(epochs=1, resume=''), 1, []
    for n in itertools.count(1):
        with killed_at(n, 11) as calls, contextlib.suppress(Killed):
            dcgan.train(replace(s, epochs=epochs))
        if len(calls) < n:  # the epoch has ended before
            break
        killed.append(calls[-1])
        if glob.glob(f'{s.out}/*/state-*.npz'):
            s = replace(s, resume='latest')
            about, _ = dcgan.find_state(newest(s.out))
            assert about['iteration'] == 0 and about['epoch'] >= epochs - 1 and len(states(newest(s.out))) <= 3
            epochs = about['epoch'] + 1
    assert len(killed) >= 30 and set(killed) == {
        'os.replace', 'os.fsync', 'os.remove', 'numpy.savez', 'mxnet.ndarray.save', 'mxnet.ndarray.load',
        'visual.save', 'visual.film', 'Coverage.count'}
    for path in glob.glob(f'{s.out}/*'):  # kills before the first state have left runs without one
        if not states(path):
            shutil.rmtree(path)
    dcgan.train(replace(s, epochs=epochs + 1))
    whole = tiny(epochs=epochs + 1, out=s.out + '2')
    dcgan.train(whole)
    assert_same_run(s.out, whole.out)
    assert names(newest(s.out), '*tmp*') == []


def test_killed_at_each_step_of_going_on(copy, finished):
    """Of the last epoch there is the state alone, and every kill comes while the rest is made."""
    folder = newest(copy.out)
    for path in [*glob.glob(f'{folder}/*-0002.p*'), f'{folder}/film.webp']:
        os.remove(path)
    with open(f'{folder}/log.csv') as file:
        log = file.readlines()
    with open(f'{folder}/log.csv', 'w') as file:
        file.writelines(log[:-1])
    for n in itertools.count(1):
        with killed_at(n, 0) as calls, contextlib.suppress(Killed):
            dcgan.train(copy)
        if len(calls) < n:
            break
    assert n > 25
    assert_same_run(copy.out, finished.out)


KILLS = {
    'the middle of a state': ('dcgan.np.lib.format', 'write_array', 300), 'parameters': ('mx.nd', 'save', 4),
    'a picture': ('dcgan.visual.cv2', 'imencode', 9), 'a step': ('dcgan', 'train_step', 18)}


def test_killed_in_earnest(child, finished, tmp_path):
    """By SIGKILL: what lies in buffers is lost, and so is the lock."""
    processes = [child(out=str(tmp_path / where), before=f"""
import itertools, os
count, function = itertools.count(1), {owner}.{name}
def deadly(*args, **kwargs):
    found = function(*args, **kwargs)
    if next(count) == {n}:
        os.kill(os.getpid(), 9)
    return found
{owner}.{name} = deadly
""") for where, (owner, name, n) in KILLS.items()]
    for process, where in zip(processes, KILLS):
        _, err = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, (where, err)
        assert names(newest(tmp_path / where), 'tmp') == [] or 'state' in where or 'param' in where
        dcgan.train(replace(finished, out=str(tmp_path / where), resume='latest'))
        assert_same_run(tmp_path / where, finished.out)


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(tiny, finished, capsys, monkeypatch, signum):
    """Twice within half a second is once, as `timeout` sends it. Afterwards the signals are what they were before."""
    handler = signal.signal(signum, signal.default_int_handler)  # where the tests run under nohup, HUP is ignored
    before_steps(monkeypatch, {12: lambda: (signal.raise_signal(signum), signal.raise_signal(signum))})
    try:
        assert ended(tiny()) == 128 + signum
        assert signal.getsignal(signum) == signal.default_int_handler
    finally:
        signal.signal(signum, handler)
    out = capsys.readouterr().out
    assert out.count('stopping at the next line') == 1
    last = out.splitlines()[-1]
    assert last.startswith('stopped in epoch 1 after iteration 10') and "resume = 'latest'" in last
    assert newest(tiny().out) in last
    dcgan.train(tiny(resume='latest'))  # as in a notebook, where the process goes on
    assert_same_run(tiny().out, finished.out)


def test_nohup(tiny, finished, monkeypatch):
    """A lost terminal does not stop a run that nohup has started."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_steps(monkeypatch, {12: lambda: signal.raise_signal(signal.SIGHUP)})
        dcgan.train(tiny())
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert_same_run(tiny().out, finished.out)


def test_a_second_signal_ends_at_once(child, tmp_path):
    process = child(before='''
def step(*args):
    print('hanging')
    while True:
        dcgan.time.sleep(0.01)
dcgan.train_step = step''')
    wait_for_line(process, 'hanging')
    process.send_signal(signal.SIGINT)
    wait_for_line(process, 'stopping')
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert names(newest(tmp_path / 'out'), 'state*') == []


@pytest.mark.parametrize('owner, name', [(dcgan.data, 'load_data'), (dcgan, 'make_modules')])
def test_ctrl_c_before_the_loop(tiny, capsys, monkeypatch, owner, name):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr(owner, name, lambda *args: signal.raise_signal(signal.SIGINT))
    try:
        assert ended(tiny()) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == '' and not os.path.exists(tiny().out)


def test_nothing_is_saved_without_check_point(tiny, capsys, monkeypatch):
    stop_after(monkeypatch, 13)
    assert ended(tiny(check_point=False)) == 143
    assert not [name for name in names(newest(tiny().out)) if re.search('state|params|symbol|tmp', name)]
    assert 'nothing was saved' in capsys.readouterr().out.splitlines()[-1]


def test_q_stops_one_run_and_not_the_next(tiny, finished, monkeypatch):
    class Viewer:
        """Stands for the process with the windows."""

        def __init__(self, status):
            self.status = status

        def poll(self):
            return self.status

        def kill(self):
            pass

        wait = kill

    viewers = [Viewer(visual.QUIT), Viewer(None)]  # q was pressed in the first one
    monkeypatch.setattr(visual, '_start_viewer', lambda out: visual._viewers.update({out: viewers.pop(0)}))
    assert ended(tiny(display=True)) == 130
    assert names(newest(tiny().out), 'state-*') == ['state-0000-000010.npz']
    dcgan.train(tiny(display=True, resume='latest'))
    assert_same_run(tiny().out, finished.out)


# ---------------------------------------------------------------- who reads what is printed

class Pipe(io.StringIO):
    """A stdout that takes nothing any more, from a certain word on."""

    def __init__(self, word, error):
        super().__init__()
        self.word, self.error = word, error

    def write(self, text):
        if self.word in text:
            self.word = ''  # which is in every text
            raise self.error
        return super().write(text)


@pytest.mark.parametrize('word, state', [
    ('settings:', (0, 10)), ('metric:', (0, 10)), ('epoch: 0 iter: 10', (0, 10)), ('epoch: 0 iter: 11', (1, 0)),
    ('epoch: 1 digits', (2, 10)), ('done', (3, 0))])
def test_a_pipe_whose_reader_has_gone(tiny, finished, word, state):
    """Wherever it is noticed, the run stops at the next line, with the status of SIGPIPE."""
    with contextlib.redirect_stdout(Pipe(word, BrokenPipeError())):
        assert ended(tiny()) == 141
    about, _ = dcgan.find_state(newest(tiny().out))
    assert (about['epoch'], about['iteration']) == state
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


@pytest.mark.parametrize('what', ['the reader has gone', 'q was pressed'])
def test_ctrl_c_while_it_stops(tiny, monkeypatch, what):
    """Ctrl-C goes to both ends of a pipe: the status is its own, and nothing ends before the state is saved."""
    fsync, exits = os.fsync, []

    def fsync_and_ctrl_c(fd):
        monkeypatch.setattr(os, 'fsync', fsync)
        signal.raise_signal(signal.SIGINT)
        fsync(fd)

    def at_the_last_step():
        monkeypatch.setattr(os, 'fsync', fsync_and_ctrl_c)
        monkeypatch.setattr(visual, 'quit_pressed', lambda: what == 'q was pressed')

    monkeypatch.setattr(dcgan.os, '_exit', exits.append)
    before_steps(monkeypatch, {11: at_the_last_step})
    word = 'epoch: 0 iter: 11' if what == 'the reader has gone' else 'no such word'
    with contextlib.redirect_stdout(Pipe(word, BrokenPipeError())):
        assert ended(tiny()) == 130
    assert exits == [] and names(newest(tiny().out), 'state-*') == ['state-0001-000000.npz']


def test_real_pipes_and_disks(child, tmp_path):
    """A reader that goes, none from the start, a full disk behind stdout, and `| tee` with Ctrl-C, which goes to both."""
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import dcgan\n{FEW_DATA}\ndcgan.train(dcgan.Settings(**{dict(FEW, epochs=1000, out='tee')!r}))"
    shell = subprocess.Popen(['bash', '-c', 'trap : INT; "$0" -c "$1" | tee log; exit ${PIPESTATUS[0]}', sys.executable,
                              code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                             start_new_session=True, env={**os.environ, 'PYTHONPATH': os.path.dirname(dcgan.__file__)})
    try:
        with open('/dev/full', 'w') as full:
            goes, none, disk = (child(out=str(tmp_path / out), stdout=stdout, epochs=epochs) for out, stdout, epochs in (
                ('goes', subprocess.PIPE, 1000), ('none', writer, 1000), ('disk', full, 3)))
        os.close(writer)
        wait_for_line(goes, 'epoch:')
        goes.stdout.close()
        wait_for_line(shell, 'epoch:')
        os.killpg(shell.pid, signal.SIGINT)
        _, err = shell.communicate(timeout=600)
        assert (shell.returncode, err) == (130, '')
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    for process, status in ((goes, 141), (none, 141), (disk, 0)):
        assert process.wait(timeout=600) == status and process.stderr.read() == ''
    for out in ('goes', 'none', 'disk', 'tee'):
        about, _ = dcgan.find_state(newest(tmp_path / out))
        assert out != 'none' or (about['epoch'], about['iteration']) == (0, 10)
        assert out != 'disk' or about['epoch'] == 3


def test_a_full_disk_behind_stdout(tiny, finished):
    with contextlib.redirect_stdout(Pipe('epoch: 0', OSError(errno.ENOSPC, 'No space left on device'))):
        dcgan.train(tiny())
    assert_same_run(tiny().out, finished.out)


# ---------------------------------------------------------------- what goes wrong while saving

@pytest.mark.parametrize('size', [0, 50_000, 100_000])
def test_a_full_disk(tiny, finished, capsys, monkeypatch, size):
    """All through the end of epoch 1. What was saved before stays whole, and what comes after is as always."""
    before_steps(monkeypatch, {22: lambda: room(size), 23: room})
    dcgan.train(tiny())
    said = warnings(capsys.readouterr().out)
    assert len([line for line in said if 'state-0002-000000.npz is not saved' in line]) == 1 and len(said) <= 4
    folder = newest(tiny().out)
    assert names(folder, 'state-*') == ['state-0001-000000.npz', 'state-0003-000000.npz']
    dcgan.find_state(states(folder)[0])
    missing = names(newest(finished.out), '*-0001.p*')
    assert_same_run(folder, finished.out, without='-0001.p|film')
    assert len(missing) == 4 and 'tmp' not in names(folder)


def test_a_disk_too_full_for_the_params(tiny, finished, capsys, monkeypatch):
    """MXNet does not notice that a hundred bytes are missing. The state is saved, and what goes on makes the rest."""
    size = os.path.getsize(glob.glob(f'{newest(finished.out)}/*_G_*-0001.params')[0]) - 100
    os_replace = os.replace

    def replace_and_fill(path, to):
        os_replace(path, to)
        if to.endswith('state-0002-000000.npz'):
            room(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan.os, 'replace', replace_and_fill)
        before_steps(patch, {23: lambda: (room(), signal.raise_signal(signal.SIGTERM))})
        assert ended(tiny()) == 143
    said = warnings(capsys.readouterr().out)
    assert [bool(re.search('_G_.*-0001.params is not saved', line)) for line in said] == [True]
    assert len(names(newest(tiny().out), '*-0001.params')) == 0
    os.remove(f'{newest(tiny().out)}/state-0002-000010.npz')
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


def test_a_folder_that_is_gone_for_a_while(tiny, finished, capsys, monkeypatch):
    """As where a network's disk does not answer."""
    folder = []

    def go():
        folder.append(newest(tiny().out))
        os.rename(folder[0], folder[0] + '.away')
        open(folder[0], 'w').close()

    def come_back():
        os.remove(folder[0])
        os.rename(folder[0] + '.away', folder[0])

    before_steps(monkeypatch, {15: go, 23: come_back})
    dcgan.train(tiny())
    assert 'state-0002-000000.npz is not saved' in capsys.readouterr().out
    assert_same_run(tiny().out, finished.out, without='-0001.p|film')


def test_a_folder_that_is_renamed(tiny, finished, monkeypatch):
    """The run goes on under its own name; the renamed folder, too, can go on from what it has."""
    mine = f'{tiny().out}/mine'
    before_steps(monkeypatch, {15: lambda: os.rename(newest(tiny().out), mine)})
    dcgan.train(tiny())
    folder, = glob.glob(f'{tiny().out}/digits_*')
    assert_same_run(folder, finished.out, without='-0000|film')
    dcgan.train(tiny(resume=mine))
    assert_same_run(mine, finished.out)


def refuse(path):
    raise PermissionError(path)


def test_old_states_that_cannot_be_removed(tiny, finished, monkeypatch):
    """They stay, and the run goes on."""
    monkeypatch.setattr(dcgan.os, 'remove', refuse)
    dcgan.train(tiny())
    assert_same_run(tiny().out, finished.out)
    assert len(states(newest(tiny().out))) == 3


def test_leftovers_of_a_killed_run(copy, finished):
    for name in ('tmp', 'gout.png.tmp', 'gout-0003.png.tmp', 'film.webp.tmp'):
        with open(f'{newest(copy.out)}/{name}', 'w') as file:
            file.write('half')
    dcgan.train(replace(copy, epochs=4))
    assert names(newest(copy.out), '*tmp*') == []


def test_divergence_stops_the_run_and_overwrites_nothing(copy, finished):
    line = ended(replace(copy, lr=1e30, epochs=5))
    folder = newest(copy.out)
    assert all(word in line for word in ('the loss is not finite', 'epoch 3', f'{folder}/state-0003-000000.npz', 'lr'))
    assert_same_run(folder, finished.out)
    assert names(folder, 'state-*') == ['state-0002-000000.npz', 'state-0003-000000.npz']


def test_divergence_before_the_first_save(tiny):
    line = ended(tiny(lr=1e30))
    assert all(word in line for word in ('the loss is not finite', 'epoch 0', 'last good state: none', 'lr'))
    assert names(newest(tiny().out), '*.params') == names(newest(tiny().out), 'state*') == []


@pytest.mark.parametrize('what', ['g1_weight', 'gbn1_moving_var', 'd1_weight_mean', 'g1_weight_average'])
def test_what_is_not_finite_is_not_saved(tiny, monkeypatch, what):
    """The last step of an epoch may ruin the networks after its loss was seen."""
    arrays = dcgan.network_arrays

    def ruined(modules, mean):
        found = arrays(modules, mean)
        if modules[0]._optimizer.num_update == 22:
            found[what].flat[-1] = np.nan
        return found

    monkeypatch.setattr(dcgan, 'network_arrays', ruined)
    assert f'{what} is not finite at epoch 1, iteration 11' in ended(tiny())
    assert names(newest(tiny().out), 'state*') == ['state-0001-000000.npz']
    assert {name[-11:] for name in names(newest(tiny().out), '*.params')} == {'0000.params'}


# ---------------------------------------------------------------- states of something else

def edit_state(s, change):
    """Change the newest state: `change` gets {name: array} and what the state remembers. Returns its path."""
    path = states(newest(s.out))[-1]
    about, arrays = dcgan.find_state(path)
    del about['path']
    change(arrays, about)
    np.savez(path, about=json.dumps(about), **arrays)
    return path


@pytest.mark.parametrize('changes, words', [
    (dict(ngf=8), ['ngf = 4', '8']), (dict(ndf=8), ['ndf = 4', '8']), (dict(nc=3), ['nc = 1', '3']),
    (dict(Z=9), ['Z = 8', '9']), (dict(conditional=True), ['conditional = False', 'True']),
    (dict(d1_bias=False), ['d1_bias = True', 'False']), (dict(resume='/no'), ['/no']),
    ({}, ["dataset = 'mnist'", 'digits'])], ids=str)
def test_another_networks_state(copy, changes, words):
    if not changes:
        edit_state(copy, lambda arrays, about: about['settings'].update(dataset='mnist'))
    before = contents(copy.out)
    line = ended(replace(copy, **changes))
    assert all(word in line for word in words) and contents(copy.out) == before


def test_other_datas_state(copy, monkeypatch):
    """A run goes on with the data that it began with; from an epoch's .params a new one begins with others."""
    X, X_test, y, y_test = dcgan.data.get_digits(labels=True)
    monkeypatch.setattr(dcgan.data, 'get_digits', lambda labels=False: (255 - X, X_test, y, y_test))
    before = contents(copy.out)
    assert 'trained with other data' in ended(copy) and contents(copy.out) == before
    path, = glob.glob(f'{newest(copy.out)}/*_D_*-0001.params')
    dcgan.train(replace(copy, resume=path))


def test_other_settings_are_said(copy, capsys):
    edit_state(copy, lambda arrays, about: about['settings'].update(workers=2))
    dcgan.train(replace(copy, epochs=4, lr=0.0003, seed=4, beta1=0.4, batch_size=22, pos_label=1., head_start=7))
    said = warnings(capsys.readouterr().out)
    assert len(said) == 7 and all(any(words in line for line in said) for words in (
        'lr was 0.0002 and is 0.0003', 'seed was 3 and is 4', 'beta1 was 0.5 and is 0.4', 'workers was 2 and is 1',
        'batch_size was 10 and is 22', 'pos_label was 0.9 and is 1.0', 'head_start was 0 and is 7'))


def test_a_state_beyond_the_end_of_its_epoch(tiny):
    """As with larger batches. The epoch counts as done."""
    train_and_stop(tiny(), 12)
    dcgan.train(tiny(resume='latest', batch_size=22))
    about, _ = dcgan.find_state(newest(tiny().out))
    assert (about['epoch'], about['iteration'], about['num_update']) == (3, 0, 21 + 5)


# ---------------------------------------------------------------- damaged states

def harmed(content, harm):
    half = len(content) // 2
    return {'cut': content[:half], 'empty': b'', 'flipped': content[:half] + bytes([content[half] ^ 1])
            + content[half + 1:], 'no archive': b'state' * 1000}[harm]


@pytest.mark.parametrize('harm', ['cut', 'flipped', 'empty', 'no archive', 'missing'])
def test_the_state_before_a_damaged_one_is_taken(copy, finished, capsys, harm):
    """By a run that trains the damaged one is renamed, so that it does not count among the newest two."""
    folder = newest(copy.out)
    before, last = states(folder)
    with open(last, 'rb') as file:
        content = file.read()
    os.remove(last)
    if harm != 'missing':
        with open(last, 'wb') as file:
            file.write(harmed(content, harm))
    dcgan.train(replace(copy, sample=1))
    assert states(folder) == [before] + [last] * (harm != 'missing')
    capsys.readouterr()
    dcgan.train(copy)
    said = warnings(capsys.readouterr().out)
    assert [f'{last}: is damaged' in line for line in said] == [True] * (harm != 'missing')
    assert states(folder) == [before, last]
    assert names(folder, '*.damaged') == [os.path.basename(last) + '.damaged'] * (harm != 'missing')
    assert_same_run(folder, finished.out, without='damaged|sample|walk')


def test_no_state_that_can_be_read(copy):
    before = contents(copy.out)
    for path in states(newest(copy.out)):
        with open(path, 'wb') as file:
            file.write(b'PK')
    assert 'no state to go on from' in ended(replace(copy, resume=path))
    assert 'no state to go on from' in ended(replace(copy, sample=1))
    assert contents(copy.out).keys() == before.keys()
    assert 'no state to go on from' in ended(copy)  # this one trains
    assert len(names(newest(copy.out), '*.damaged')) == 2 and states(newest(copy.out)) == []


@pytest.mark.parametrize('error', [PermissionError(errno.EACCES, 'Permission denied'), OSError(errno.EIO, 'I/O error')])
@pytest.mark.parametrize('when', ['open', 'read'])
def test_a_state_that_the_disk_does_not_give(copy, monkeypatch, when, error):
    """It may be a good one: the run ends, and nothing is renamed."""
    class BadDisk(io.FileIO):
        def __init__(self, path, mode='r'):
            if when == 'open':
                raise error
            super().__init__(path, mode)

        def read(self, *args):
            raise error

    before, last = contents(copy.out), states(newest(copy.out))[-1]
    monkeypatch.setattr(dcgan, 'open', lambda path, *args, **kwargs: (
        BadDisk if str(path) == last else open)(path, *args, **kwargs), raising=False)
    assert error.strerror in ended(copy)
    monkeypatch.undo()
    assert contents(copy.out) == before


@pytest.mark.parametrize('change', [
    lambda arrays: arrays.update(d1_weight=arrays['g1_weight']),  # a G where a D belongs
    lambda arrays: arrays.pop('g1_weight'),
    lambda arrays: arrays.pop('dbn2_moving_mean'),
    lambda arrays: arrays.pop('d5_weight_var'),
    lambda arrays: arrays.update(g1_weight_=arrays.pop('g1_weight')),
    lambda arrays: arrays.update(g1_weight=arrays['g1_weight'][:0]),
    lambda arrays: arrays.update(d5_weight_var=arrays['d5_weight_var'][0]),
], ids=['a G for a D', 'no weight', 'no moving mean', 'no moment', 'another name', 'another shape', 'no axis'])
def test_a_state_without_the_arrays_that_were_saved(copy, change):
    path = edit_state(copy, lambda arrays, about: change(arrays))
    line = ended(replace(copy, resume=path))
    assert path in line and ('no state to go on from' in line or 'does not fit' in line)


@pytest.mark.parametrize('change', [
    lambda about: about.pop('names'), lambda about: about.pop('settings'), lambda about: about['settings'].pop('nc'),
    lambda about: about['settings'].pop('seed'), lambda about: about['settings'].pop('workers'),
    lambda about: about.pop('class_names'), lambda about: about.pop('num_update'), lambda about: about.pop('checksum'),
    lambda about: about.update(epoch='three'), lambda about: about.update(epoch=float('inf')),
    lambda about: about.update(settings=3), lambda about: about.update(names=None)], ids=str)
def test_a_state_of_another_version(copy, change):
    """For training and for samples it is one line."""
    path = edit_state(copy, lambda arrays, about: change(about))
    for sample in (0, 1):
        with contextlib.suppress(AssertionError):
            dcgan.train(replace(copy, resume=path, sample=sample, epochs=3))
            continue


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(path, content):
    """None where a file of such content is refused, else what is read of it."""
    with open(path, 'wb') as file:
        file.write(content)
    try:
        return dcgan.find_state(str(path))
    except ValueError as error:
        assert str(path) in str(error) and '\n' not in str(error)
        return None


def test_a_pickle_in_a_state_is_refused(copy, tmp_path):
    evil = Evil(str(tmp_path / 'evil'))
    for change in (lambda arrays, about: arrays.update(g1_weight=np.array([evil], dtype=object)),
                   lambda arrays, about: arrays.update(more=np.array([evil], dtype=object))):
        path = edit_state(copy, change)
        with pytest.raises(ValueError, match='no state to go on from'):
            dcgan.find_state(path)
        shutil.copy(states(newest(copy.out))[0], path)
    assert refused(path, pickle.dumps(evil)) is None
    assert not (tmp_path / 'evil').exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / 'evil').exists()  # the pickle would have worked


@pytest.mark.parametrize('content', ['', '[', '[' * 100_000, '{"epoch": 1e999}', 'null', '[]', '3', '{}'])
def test_a_state_with_strange_json(tmp_path, content):
    file = io.BytesIO()
    np.savez(file, about=content)
    assert refused(tmp_path / 'state-0003-000000.npz', file.getvalue()) is None


@pytest.fixture(scope='module')
def original(finished):
    """The bytes of a state, and what is read of it."""
    path = states(newest(finished.out))[-1]
    with open(path, 'rb') as file:
        return file.read(), dcgan.find_state(path)


def assert_refused_or_the_same(original, path, content):
    """A changed file is refused, or its change changes nothing."""
    found = refused(path, content)
    if found:
        (about, arrays), (expected_about, expected) = found, original[1]
        assert {**about, 'path': ''} == {**expected_about, 'path': ''} and arrays.keys() == expected.keys()
        assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_state_with_a_flipped_bit(original, tmp_path):
    """All over the file, and most of all in the archive's directory at its end."""
    size = len(original[0])
    places = {*range(0, 100, 3), *np.linspace(0, size - 1, 100).astype(int), *range(size - 8000, size, 61),
              *range(size - 150, size)}
    for place in places:
        content = bytearray(original[0])
        content[place] ^= 1 << place % 8
        assert_refused_or_the_same(original, tmp_path / 'file', bytes(content))


def test_a_state_that_was_cut(original, tmp_path):
    size = len(original[0])
    for end in {*range(0, 100, 5), *np.linspace(0, size - 1, 50).astype(int), *range(size - 50, size)}:
        assert refused(tmp_path / 'file', original[0][:end]) is None


HOSTILE = hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@HOSTILE
@given(content=strategies.binary(max_size=300))
def test_random_bytes(tmp_path, content):
    for name in ('file', 'digits_G_x-0001.params'):
        assert refused(tmp_path / name, content) is None


@HOSTILE
@given(data=strategies.data())
def test_a_state_with_changed_bytes(original, tmp_path, data):
    """Names, shapes and lengths are in the first bytes of each array, and at the end."""
    content = bytearray(original[0])
    start = data.draw(strategies.sampled_from([match.start() for match in re.finditer(b'PK', original[0])]))
    for _ in range(data.draw(strategies.integers(1, 8))):
        place = start + data.draw(strategies.integers(0, 250))
        content[place % len(content)] = data.draw(strategies.integers(0, 255))
    assert_refused_or_the_same(original, tmp_path / 'file', bytes(content))


def test_an_array_that_claims_to_be_large(original, tmp_path):
    """A damaged header asks for gigabytes."""
    content = bytearray(original[0])
    header = content.index(b"'shape': (", content.index(b'g1_weight'))
    content[header + 9:header + 25] = b'(10000000000,1),'
    assert refused(tmp_path / 'file', bytes(content)) is None
