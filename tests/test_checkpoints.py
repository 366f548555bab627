"""A run that cannot be lost: resuming, killing, signals, pipes, full disks, wrong files."""
import io
import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, before_steps, cases, contents, ended, newest, read_state, room, rows, send, state
from conftest import train_and_stop as stop_after
from conftest import watch_steps as watch

import dcgan
import visual

mx = dcgan.mx
replace = dcgan.dataclasses.replace

# 110 images, in batches of ten: an epoch has eleven iterations, and lines after the tenth and the eleventh
FEW_DATA = '''
few = [part[:110] for part in dcgan.data.get_digits(labels=True)]
dcgan.data.get_digits = lambda labels=False: few
'''
FEW = {**TINY, 'batch_size': 10, 'epochs': 3, 'coverage': True}


@pytest.fixture(scope='module', autouse=True)
def few_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan.data, 'get_digits', dcgan.data.get_digits)  # so that it comes back
        exec(FEW_DATA, {'dcgan': dcgan})
        yield


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of three epochs; keywords change them."""
    return lambda **changes: dcgan.Settings(**{**FEW, 'out': str(tmp_path / 'out'), **changes})


@pytest.fixture
def child(tmp_path):
    """Start a run in a process of its own, which is killed at the end, or when it hangs."""
    started = []

    def start(before='', **changes):
        settings = {**FEW, 'out': str(tmp_path / 'out'), **changes}
        code = f'import dcgan\ndcgan.signal.alarm(600)\n{FEW_DATA}\n{before}\ndcgan.train(dcgan.Settings(**{settings}))'
        started.append(subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ROOT}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of three epochs that nobody stopped."""
    s = dcgan.Settings(**{**FEW, 'out': str(tmp_path_factory.mktemp('finished'))})
    dcgan.train(s)
    return s


@pytest.fixture
def copy(finished, tmp_path):
    """Settings that resume a copy of that run."""
    shutil.copytree(finished.out, tmp_path / 'copy')
    return replace(finished, out=str(tmp_path / 'copy'), resume='latest')


def names(folder, pattern='*'):
    return sorted(path.name for path in Path(folder).glob(pattern))


def params(folder, net, epoch):
    path, = Path(folder).glob(f'*_{net}_*-{epoch:04d}.params')
    return str(path)


def stands(out):
    """The epoch and the iteration of the newest run's state."""
    about, _ = read_state(newest(out))
    return about['epoch'], about['iteration']


def metrics(out, counts=True):
    """The log without what differs between two runs that are the same, and perhaps without its counts."""
    return [{name: cell for name, cell in row.items() if name not in ('seconds', 'images_per_second')}
            for row in rows(out) if counts or not row['kl']]


def files(out):
    """The networks of each epoch and the pictures, without the time in their names."""
    return {re.sub('digits_(.*?)_.*-', r'\1-', path): content for path, content in contents(newest(out)).items()
            if path.endswith(('.params', '.png', '.webp'))}


def assert_same_run(found, expected):
    """To the last bit: the states' arrays, each epoch's networks, the pictures and the log."""
    about, expected_about = read_state(newest(found))[0], read_state(newest(expected))[0]
    for name in ('epoch', 'iteration', 'adam_count', 'average_count', 'checksum'):
        assert about[name] == expected_about[name], name
    assert state(found) == state(expected)
    assert metrics(found) == metrics(expected)
    assert files(found) == files(expected)


# ---------------------------------------------------------------- a run's folder

def test_what_a_run_leaves(finished):
    folder = newest(finished.out)
    stamp = re.fullmatch(r'digits_(\d{4}_\d\d_\d\d-\d\d_\d\d)', folder.name)[1]
    assert names(finished.out) == [folder.name]
    assert set(names(folder)) - {'film.webp'} == {  # which needs OpenCV 4.11
        'gout.png', 'diff.png', 'data.png', 'loss.png', 'gout-0000.png', 'gout-0001.png', 'gout-0002.png', 'log.csv',
        'state.npz', *(f'digits_{net}_{stamp}-{rest}' for net in ('G', 'D', 'Gmean')
                       for rest in ('symbol.json', '0000.params', '0001.params', '0002.params'))}
    assert [(row['epoch'], row['iteration'], bool(row['kl'])) for row in rows(finished.out)] == [
        (str(epoch), *rest) for epoch in range(3) for rest in (('10', False), ('11', False), ('11', True))]


def test_the_params(finished):
    """They are MXNet's, and of the last step: BatchNorm's averages, read too early, are 0 and 1."""
    _, arrays = read_state(newest(finished.out))
    for net, end in (('G', ''), ('D', ''), ('Gmean', '_average')):
        for name, array in mx.nd.load(params(newest(finished.out), net, 2)).items():
            saved = arrays[name.split(':')[1] + end]
            assert saved.tobytes() == array.asnumpy().tobytes()
            assert 'moving' not in name or np.any(saved != ('var' in name))


def test_runs_of_the_same_minute(tiny, monkeypatch):
    monkeypatch.setattr(dcgan.time, 'strftime', lambda *args: '2026_11_23-13_20')
    for _ in range(3):
        dcgan.train(tiny(epochs=1))
    assert names(tiny().out) == [f'digits_2026_11_23-13_20{suffix}' for suffix in ('', '_2', '_3')]


# ---------------------------------------------------------------- resuming

@cases('changes', {'plain': dict(ctx=mx.cpu(1)), 'conditional': dict(conditional=True),
                   'two devices': dict(ctx=(mx.cpu(0), mx.cpu(1)))})
def test_stopped_at_every_line_in_turn(tiny, finished, monkeypatch, changes):
    """By one signal after the other. Each stop leaves .params for samples; the end is the run that nobody stopped."""
    s, stopped = tiny(**changes), tiny(**changes, out=tiny().out + '2')
    if s.ctx == mx.cpu(1):
        s = finished  # on another device, of which MXNet would write the number into its .params
    else:
        dcgan.train(s)
    signals = itertools.cycle([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
    for line, signum in zip([(0, 10), (0, 11), (1, 10), (1, 11), (2, 10), (2, 11)], signals):
        with monkeypatch.context() as patch:
            before_steps(patch, {1: lambda: send(signum)})
            assert ended(stopped) == 128 + signum
        stopped = replace(stopped, resume='latest')
        assert stands(stopped.out) == line
        assert params(newest(stopped.out), 'Gmean', line[0])
    dcgan.train(stopped)
    assert len(names(stopped.out)) == 1
    assert_same_run(stopped.out, s.out)


def test_the_latest_run_is_that_of_the_newest_state(copy, tmp_path, capsys):
    """By the time in the state: copying the folders, here in the wrong order, changes that of the files."""
    older = newest(copy.out)
    stop_after(replace(copy, resume='', epochs=5), 1)
    newer, = set(Path(copy.out).iterdir()) - {older}
    out = tmp_path / 'a [b] *'
    for seconds, folder, name in ((1000, newer, 'digits_a'), (2000, older, 'digits_z')):
        shutil.copytree(folder, out / name)
        os.utime(out / name / 'state.npz', (seconds, seconds))
    before = contents(out / 'digits_z')
    dcgan.train(replace(copy, out=str(out)))
    assert f'resuming {out}/digits_a: epoch 0, iteration 10\n' in capsys.readouterr().out
    assert contents(out / 'digits_z') == before and read_state(out / 'digits_a')[0]['epoch'] == 3
    dcgan.train(replace(copy, out=str(out), resume=f'{out}/digits_z', epochs=4))
    assert read_state(out / 'digits_z')[0]['adam_count'] == 44


def test_params_begin_a_run_of_their_own(tiny, capsys, monkeypatch):
    """Epoch and learning rates continue; Adam and the average begin anew. The new run learns nothing here."""
    dcgan.train(tiny())
    folder = newest(tiny().out)
    before, path = contents(folder), params(folder, 'Gmean', 1)
    rates = watch(monkeypatch, lambda modules, *_: [mod._optimizer.learning_rate for mod in modules[:2]])
    dcgan.train(tiny(resume=path, lr=1e-30, lr_steady=16))
    assert 'Adam and the average of G begin anew' in capsys.readouterr().out and contents(folder) == before
    assert rates == [[1e-30 * 0.5 ** (iteration / 4 - 4), 1e-30] for iteration in range(22, 33)]  # G's and D's
    new, = set(Path(tiny().out).iterdir()) - {folder}
    about, arrays = read_state(new)
    assert (about['epoch'], about['adam_count'], about['average_count']) == (3, 11, 2)
    for net in 'G', 'D':
        for name, array in mx.nd.load(params(folder, net, 1)).items():
            assert name[:3] == 'aux' or np.array_equal(arrays[name[4:]], array.asnumpy())
    assert np.allclose(arrays['g1_weight_average'], arrays['g1_weight'])


def test_the_log_is_written_and_never_read(copy, finished):
    path = newest(copy.out) / 'log.csv'
    path.write_bytes(b'"\0' * 999)
    dcgan.train(copy)
    assert rows(copy.out) == rows(finished.out)


def test_other_settings_are_said(copy, capsys):
    """Here the epoch is also shorter than before, and counts as done."""
    dcgan.train(replace(copy, epochs=4, lr=0.0003, seed=4, beta1=0.4, batch_size=22, pos_label=1., head_start=7,
                        lr_steady=9, augment=False))
    said = re.findall('^WARNING: (.*?):', capsys.readouterr().out, re.M)
    assert said == ['batch_size was 10', 'lr was 0.0002', 'head_start was 0', 'lr_steady was 12', 'beta1 was 0.5',
                    'pos_label was 0.9', 'seed was 3', 'augment was True']
    assert stands(copy.out) == (4, 0)


# ---------------------------------------------------------------- killing and signals

@cases('function, n', {'in a step': ('dcgan.train_step', 17), 'in a state': ('dcgan.np.lib.format.write_array', 300),
                       'in the .params': ('dcgan.mx.nd.save', 2), 'in a count': ('dcgan.data.Coverage.count', 2)})
def test_killed(child, finished, tmp_path, function, n):
    """By SIGKILL: the state is whole, at most an epoch is lost, and the run that resumes ends with the same bits."""
    process = child(f"""
import itertools, os
count, function = itertools.count(1), {function}
def deadly(*args, **kwargs):
    found = function(*args, **kwargs)
    if next(count) == {n}:
        os.kill(os.getpid(), 9)
    return found
{function} = deadly
""")
    assert process.wait(timeout=600) == -signal.SIGKILL, process.stderr.read()
    out = tmp_path / 'out'
    assert stands(out)[0] >= 1
    dcgan.train(replace(finished, out=str(out), resume='latest'))
    assert state(out) == state(finished.out)
    assert metrics(out, counts=False) == metrics(finished.out, counts=False)


def test_two_signals_within_half_a_second_are_one(tiny, capfd, monkeypatch):
    """For `timeout` sends each of them twice."""
    before_steps(monkeypatch, {12: lambda: (send(signal.SIGTERM), send(signal.SIGTERM))})
    assert ended(tiny()) == 143
    assert capfd.readouterr().err.count('stopping at the next line') == 1


def test_nohup(tiny, monkeypatch):
    before_steps(monkeypatch, {12: lambda: os.kill(os.getpid(), signal.SIGHUP)})
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    dcgan.train(tiny())
    assert signal.signal(signal.SIGHUP, signal.SIG_DFL) == signal.SIG_IGN
    assert stands(tiny().out) == (3, 0)


def test_a_second_signal_ends_at_once(child, tmp_path):
    """And the first one is answered at once, also while a library computes and Python runs no handler."""
    process = child('''
import ctypes
def hang(*args):
    mutex = ctypes.create_string_buffer(64)
    print('hanging', flush=True)
    for _ in range(2):  # the second time it waits for ever
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
dcgan.train_step = hang
''')
    assert any('hanging' in line for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGINT)
    line = process.stderr.readline()
    assert 'stopping' in line, (line, process.poll())
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and names(newest(tmp_path / 'out'), 'state*') == []


@cases('owner, name, changes', {'data': (dcgan.data, 'load_data', dict(resume='')),
                                'samples': (visual, 'save', dict(sample=1))})
def test_ctrl_c_while_data_are_read_or_samples_made(copy, capsys, monkeypatch, owner, name, changes):
    before = names(copy.out)
    monkeypatch.setattr(owner, name, lambda *args: signal.raise_signal(signal.SIGINT))
    assert ended(replace(copy, **changes)) == 130
    assert capsys.readouterr().err == '' and names(copy.out) == before


def test_q_stops_one_run_and_not_the_next(tiny, monkeypatch):
    pressed = [True]
    monkeypatch.setattr(visual, 'quit_pressed', lambda: pressed and pressed.pop())
    assert ended(tiny()) == 130 and stands(tiny().out) == (0, 10)
    dcgan.train(tiny(resume='latest'))
    assert stands(tiny().out) == (3, 0)


@pytest.mark.parametrize('read', [0, 5])
def test_a_reader_that_has_gone(child, tmp_path, read):
    """As `| head -5`: the run saves at the next line, with the status of SIGPIPE."""
    process = child(epochs=999, display=True)
    for _ in range(read):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert process.wait(timeout=600) == 141, process.stderr.read()
    assert stands(tmp_path / 'out')


# ---------------------------------------------------------------- what goes wrong while saving

def test_a_disk_that_is_full_for_a_while(tiny, finished, capsys, monkeypatch):
    """All through the end of epoch 1. What was saved before stays whole, and what comes after is as always."""
    found = []

    def look():
        room()
        found.append((stands(tiny().out), names(newest(tiny().out), '*tmp')))

    before_steps(monkeypatch, {22: lambda: room(50_000), 23: look})
    dcgan.train(tiny())
    said = re.findall('^WARNING: .*', capsys.readouterr().out, re.M)
    assert sum('state.npz' in line and 'not saved' in line for line in said) == 2 and found == [((1, 0), [])]
    assert state(tiny().out) == state(finished.out) and metrics(tiny().out) == metrics(finished.out)


def test_an_end_that_cannot_be_saved(tiny, monkeypatch):
    """It is said, the status is not 0, and nothing half-written is left."""
    before_steps(monkeypatch, {33: lambda: room(50_000)})
    try:
        line = ended(tiny())
    finally:
        room()
    assert line.startswith('dcgan.py: done; ') and 'NOT SAVED' in line and 'state.npz' in line
    assert names(newest(tiny().out), '*.tmp') == [] == names(newest(tiny().out), '*-0002.params')


def test_divergence_stops_the_run_and_overwrites_nothing(copy, tiny, finished):
    assert re.search('the loss is not finite at epoch 3.*lr', ended(replace(copy, lr=1e30, epochs=5)))
    assert_same_run(copy.out, finished.out)
    assert re.search('the loss is not finite at epoch 0.*lr', ended(tiny(lr=1e30)))
    assert names(newest(tiny().out), '*.params') == [] == names(newest(tiny().out), 'state*')


# ---------------------------------------------------------------- states of something else, and damaged ones

@pytest.mark.parametrize('what, changes, words', [
    ('state', dict(ngf=8), 'ngf = 4, now it is 8'), ('state', dict(conditional=True), 'conditional = False'),
    ('state', dict(resume='/no'), '/no'), ('params', dict(Z=9), 'Z = 8'), ('params', dict(nc=3), 'nc = 1'),
    ('params', dict(d1_bias=False), 'd1_bias = True'), ('params', dict(resume='/no.params'), '/no.params')], ids=str)
def test_other_networks(copy, monkeypatch, what, changes, words):
    """It is told before the data are loaded, and nothing is touched."""
    monkeypatch.setattr(dcgan.data, 'load_data', None)
    before = contents(copy.out)
    s = replace(copy, epochs=4, resume=params(newest(copy.out), 'D', 2) if what == 'params' else 'latest')
    assert words in ended(replace(s, **changes)) and contents(copy.out) == before


def test_other_data(copy, monkeypatch):
    """A run resumes with the data that it began with; from an epoch's .params a new one begins with others."""
    X, *others = dcgan.data.get_digits(labels=True)
    monkeypatch.setattr(dcgan.data, 'get_digits', lambda labels=False: (255 - X, *others))
    before = contents(copy.out)
    line = ended(copy)
    path = params(newest(copy.out), 'G', 2)
    assert 'trained with other images' in line and f"resume = '{path}'" in line and contents(copy.out) == before
    assert 'epochs = 3' in ended(replace(copy, resume=path))
    dcgan.train(replace(copy, resume=path, epochs=4))


def edited(content, change):
    """A state's bytes after `change` to {name: array}."""
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    change(arrays)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@cases('harm', {
    'cut': lambda content: content[:len(content) // 2], 'pickle': lambda content: pickle.dumps({}),
    'other bytes': lambda content: content.replace(content[content.index(b'g1_weight'):][1000:1100], b'other' * 20, 1),
    'an array less': lambda content: edited(content, lambda arrays: arrays.pop('dbn2_moving_mean')),
    'another shape': lambda content: edited(content, lambda arrays: arrays.update(d1_weight=arrays['g1_weight'])),
    'nothing told': lambda content: edited(content, lambda arrays: arrays.update(run='{}')), 'an older version': None})
def test_a_state_that_cannot_be_read(copy, harm):
    """One line, which names the newest epoch's .params; samples come from these anyway."""
    folder = newest(copy.out)
    path = folder / 'state.npz'
    if harm:
        path.write_bytes(harm(path.read_bytes()))
    else:
        path.rename(folder / 'state-0003-000000.npz')
    before = contents(copy.out)
    line = ended(replace(copy, resume=str(folder), epochs=4))
    assert str(folder) in line and params(folder, 'G', 2) in line and contents(copy.out) == before
    dcgan.train(replace(copy, resume=str(folder), sample=1))
