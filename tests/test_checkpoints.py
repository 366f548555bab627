"""A run that cannot be lost: resuming, killing, signals, pipes, full disks, wrong files."""
import contextlib
import errno
import glob
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, TINY, before_steps, cases, contents, ended, newest, rows, train_and_stop, watch_steps

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
def child(tmp_path):
    """Start a run in a process of its own, which is killed at the end, or when it hangs."""
    started = []

    def start(before='', stdout=subprocess.PIPE, **changes):
        settings = {**FEW, 'out': str(tmp_path / 'out'), **changes}
        code = f'import dcgan\ndcgan.signal.alarm(600)\n{FEW_DATA}\n{before}\ndcgan.train(dcgan.Settings(**{settings}))'
        started.append(subprocess.Popen([sys.executable, '-c', code], stdout=stdout, stderr=subprocess.PIPE, text=True,
                                        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': ROOT}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


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
    return sorted(path.name for path in pathlib.Path(folder).glob(pattern))


def states(folder):
    """The paths of a run's states, oldest first."""
    return [os.path.join(folder, name) for name in names(folder, 'state-*.npz')]


def stands(out):
    """The epoch and the iteration of the newest run's newest state."""
    about, _ = dcgan.find_state(newest(out))
    return about['epoch'], about['iteration']


def metrics(out):
    """The log without what differs between two runs that are the same."""
    return [{name: float(cell or 'inf') for name, cell in row.items() if name not in ('seconds', 'images_per_second')}
            for row in rows(out)]


def assert_same_run(found, expected, without='^$'):
    """To the last bit: the states' arrays, each epoch's networks, the pictures and the log.

    `without`: a pattern of the files that one of the two runs need not have.
    """
    found, expected = newest(found), newest(expected)
    (about, arrays), (expected_about, expected_arrays) = dcgan.find_state(found), dcgan.find_state(expected)
    for name in ('epoch', 'iteration', 'num_update', 'average_count', 'checksum'):
        assert about[name] == expected_about[name], name
    assert arrays.keys() == expected_arrays.keys()
    assert [name for name in arrays if arrays[name].tobytes() != expected_arrays[name].tobytes()] == []
    assert metrics(found) == metrics(expected)
    files, expected_files = (
        {re.sub('digits_(.*?)_.*-', r'\1-', path): content for path, content in contents(folder).items()
         if not re.search(f'^state-.*npz$|log.csv|json|{without}', path)} for folder in (found, expected))
    assert files.keys() == expected_files.keys()
    assert [path for path in files if files[path] != expected_files[path]] == []


def warnings(out):
    return [line for line in out.splitlines() if line.startswith('WARNING')]


_on_disk = []  # what is called before Python opens a file to write, renames or removes one, or makes a folder


def _audit(event, args):
    if _on_disk and (event in ('os.rename', 'os.remove', 'os.mkdir')
                     or event == 'open' and str(args[1])[0] in 'wa'):
        for action in list(_on_disk):
            action(event, str(args[1 if event == 'os.rename' else 0]))


sys.addaudithook(_audit)


@contextlib.contextmanager
def on_disk(action):
    """Call action(event, path) meanwhile; what it raises comes out of the call, which does nothing then."""
    _on_disk.append(action)
    try:
        yield
    finally:
        _on_disk.remove(action)


def room(size=resource.RLIM_INFINITY):
    """Let this process write no file larger than that, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ---------------------------------------------------------------- a run's folder

def test_what_a_run_leaves(finished):
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


def test_other_programs_read_the_files(finished):
    """The .params are MXNet's, and those of the last step: BatchNorm's averages, read too early, are 0 and 1."""
    prefix = glob.glob(f'{newest(finished.out)}/digits_G_*-symbol.json')[0][:-len('-symbol.json')]
    with np.load(states(newest(finished.out))[-1], allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert arrays.pop('about').dtype.kind == 'U' and {array.dtype.kind for array in arrays.values()} == {'f'}
    for net, end in (('G', ''), ('D', ''), ('Gmean', '_average')):
        for name, array in mx.nd.load(f'{prefix.replace("_G_", f"_{net}_")}-0002.params').items():
            saved = arrays[name.split(':')[1] + end]
            assert saved.tobytes() == array.asnumpy().tobytes()
            assert 'moving' not in name or np.any(saved != ('var' in name))
    latent = mx.nd.array(dcgan.fixed_latents(finished.seed, 10, 8).reshape(10, 8, 1, 1))
    mod = mx.mod.Module.load(prefix, 2, data_names=('rand',), label_names=None)
    mod.bind([('rand', latent.shape)], for_training=False)
    mod.forward(mx.io.DataBatch([latent]), is_train=False)
    block = mx.gluon.SymbolBlock.imports(f'{prefix}-symbol.json', ['rand'], f'{prefix}-0002.params')
    assert np.array_equal(mod.get_outputs()[0].asnumpy(), block(latent).asnumpy())


def test_new_folders_names(tiny, monkeypatch):
    """Runs that begin in the same minute, and even at the same time, get a folder each."""
    monkeypatch.setattr(dcgan.time, 'strftime', lambda *args: '2026_11_23-13_20')

    def another_process_is_faster(event, path):
        if event == 'os.mkdir' and path.endswith('_2') and not os.path.exists(path):
            os.mkdir(path + '.')
            os.rename(path + '.', path)

    with on_disk(another_process_is_faster):
        for _ in range(2):
            dcgan.train(tiny(epochs=1))
    assert names(tiny().out) == ['digits_2026_11_23-13_20' + suffix for suffix in ('', '_2', '_3')]
    for suffix, expected in (('', 1), ('_2', 0), ('_3', 1)):
        folder = f'{tiny().out}/digits_2026_11_23-13_20{suffix}'
        assert len(states(folder)) == len(names(folder, f'digits_G_*{suffix}-0000.params')) == expected


def test_two_at_once_in_one_folder(tiny, finished, monkeypatch):
    """The second is refused and changes nothing, and the first does not notice."""
    found = []

    def second():
        before = contents(tiny().out)
        found.extend(ended(tiny(resume=resume)) for resume in ('latest', newest(tiny().out)))
        assert contents(tiny().out) == before

    before_steps(monkeypatch, {15: second})
    dcgan.train(tiny())
    assert len(found) == 2 and all('another process' in line for line in found)
    assert_same_run(tiny().out, finished.out)


# ---------------------------------------------------------------- going on

@cases('changes', {'plain': dict(ctx=mx.cpu(1)), 'conditional': dict(conditional=True),
                   'two devices': dict(ctx=(mx.cpu(0), mx.cpu(1)))})
def test_stopped_at_every_line_in_turn(tiny, finished, changes):
    s, other = tiny(**changes), tiny(**changes, out=tiny().out + '2')
    if other.ctx == mx.cpu(1):
        s = finished  # on another device, of which MXNet would write the number into its .params
    else:
        dcgan.train(s)
    for line in [(0, 10), (1, 0), (1, 10), (2, 0), (2, 10), (3, 0)]:
        train_and_stop(other, 1)
        other = replace(other, resume='latest')
        assert stands(other.out) == line and len(states(newest(other.out))) == (1 if line == (0, 10) else 2)
    dcgan.train(other)
    assert names(newest(other.out), 'state-*') == ['state-0002-000010.npz', 'state-0003-000000.npz']
    assert names(other.out) == [os.path.basename(newest(other.out))]
    assert_same_run(other.out, s.out)


def test_seconds_count_everything(tiny, monkeypatch):
    """Also saving, and what an earlier process took, but not what lies between two; on a clock of our own."""
    clock, passed, savez = time.monotonic, [0], np.savez
    monkeypatch.setattr(dcgan.time, 'monotonic', lambda: clock() + sum(passed))
    monkeypatch.setattr(dcgan.np, 'savez', lambda *args, **arrays: (passed.append(10_000), savez(*args, **arrays)))
    train_and_stop(tiny(), 12)
    passed.append(10_000_000)
    dcgan.train(tiny(resume='latest'))
    # a state does not know yet how long it takes to write
    assert [int(float(row['seconds'])) // 10_000 for row in rows(tiny().out)] == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_the_latest_run_is_that_of_the_newest_state(copy, tmp_path, finished):
    """By the time of the state, not by folders' names; within a run by its name, for a clock may be set back."""
    out = str(tmp_path / 'a [b] *')
    for name, epoch, seconds in (('digits_z', 3, 1000), ('digits_a', 2, 2000)):
        shutil.copytree(newest(copy.out), f'{out}/{name}')
        for path in states(f'{out}/{name}')[epoch - 1:]:
            os.remove(path)
        for i, path in enumerate(states(f'{out}/{name}')):
            os.utime(path, (seconds - i, seconds - i))  # the newer state has the older time
    before = contents(f'{out}/digits_z')
    dcgan.train(replace(copy, out=out))
    assert_same_run(f'{out}/digits_a', finished.out)
    assert contents(f'{out}/digits_z') == before
    dcgan.train(replace(copy, out=out, resume=f'{out}/digits_z', epochs=4))
    assert dcgan.find_state(f'{out}/digits_z')[0]['num_update'] == 44


def test_a_state_file_begins_a_run_of_its_own(copy, finished, tmp_path):
    """It has the log so far, makes what it lacks of the epoch before, and overwrites nothing."""
    folder = newest(copy.out)
    before = contents(folder)
    for out in (copy.out, str(tmp_path / 'other')):
        dcgan.train(replace(copy, resume=f'{folder}/state-0002-000000.npz', out=out))
        new, = set(glob.glob(f'{out}/*')) - {folder}
        assert contents(folder) == before
        assert names(new, 'state-*') == ['state-0002-000000.npz', 'state-0003-000000.npz']
        assert_same_run(new, finished.out, without='-0000|film')


@pytest.mark.parametrize('net', ['G', 'D'])
def test_params_begin_a_run_of_their_own(tiny, capsys, monkeypatch, net):
    """Epoch, head start and log go on; Adam begins anew, with its moments and its step count."""
    rates = watch_steps(monkeypatch, lambda modules, *_: [mod._optimizer.learning_rate for mod in modules[:2]])
    s = tiny(head_start=25, lr_steady=16)
    dcgan.train(s)
    folder = newest(s.out)
    before = contents(folder)
    path, = glob.glob(f'{folder}/*_{net}_*-0001.params')
    capsys.readouterr()
    dcgan.train(replace(s, resume=path))
    assert "Adam's moments and step count begin at zero" in capsys.readouterr().out and contents(folder) == before
    falling = [[0.0002 * 0.5 ** (quarters / 4), 0.0002] for quarters in range(9, 17)]  # G's and D's, from 25 to 32
    assert rates == [[0.001] * 2] * 25 + falling + [[0.001] * 2] * 3 + falling
    new, = set(glob.glob(f'{s.out}/*')) - {folder}
    (about, began), (_, weights) = dcgan.find_state(f'{new}/state-0002-000000.npz'), dcgan.find_state(path)
    for name, array in began.items():
        name = name.replace('_average', '')
        assert array.tobytes() == weights[name].tobytes() if name in weights else not array.any()
    assert about['num_update'] == 0 and dcgan.find_state(new)[0]['num_update'] == 11
    assert metrics(new)[:6] == metrics(folder)[:6] and len(metrics(new)) == 9
    dcgan.train(replace(s, resume=new, epochs=4))  # it goes on like any other
    assert dcgan.find_state(new)[0]['num_update'] == 22


def test_params_that_begin_no_run(copy):
    """The mean of G is for samples; files that were cut, and a G without its D, are refused as well."""
    path, = glob.glob(f'{newest(copy.out)}/*_Gmean_*-0002.params')
    assert 'sample only' in ended(replace(copy, resume=path))
    path = path.replace('_Gmean_', '_D_')
    os.truncate(path, 1000)
    assert 'no state to go on from' in ended(replace(copy, resume=path))
    os.remove(path)
    assert 'sample only' in ended(replace(copy, resume=path.replace('_D_', '_G_')))
    assert names(newest(copy.out), '*.damaged') == []
    folders = os.listdir(copy.out)
    assert 'epochs = 3: 3 are done' in ended(replace(copy, resume=f'{newest(copy.out)}/state-0003-000000.npz'))
    assert os.listdir(copy.out) == folders  # no new one for nothing


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_another_number_of_devices(tiny, before, after):
    train_and_stop(tiny(ctx=[mx.cpu(k) for k in range(before)]), 12)
    dcgan.train(tiny(resume='latest', ctx=[mx.cpu(k) for k in range(after)]))
    assert stands(tiny().out) == (3, 0) and dcgan.find_state(newest(tiny().out))[0]['num_update'] == 33
    assert len(rows(tiny().out)) == 9


# ---------------------------------------------------------------- the log

@pytest.mark.parametrize('damage, least', [
    (lambda log: log[:-1], 9), (lambda log: log[:len(log) - 40], 9), (lambda log: log[:log.index(b'1,10') + 30], 3),
    (lambda log: b'', 0), (lambda log: log + b'3,1,7', 9), (lambda log: log.replace(b'0.', b'x', 3), 6),
    (lambda log: bytes(range(256)) + log, 0), (lambda log: log.replace(b',', b'\0', 40), 0),
    (lambda log: log.replace(b'kl', b'lk'), 0), (lambda log: log + b'"' * 200_001, 9), (None, 0)])
def test_a_damaged_log(copy, finished, damage, least):
    """What cannot be read is left out, and the run goes on; a count that was cut is made anew."""
    path = pathlib.Path(newest(copy.out), 'log.csv')
    log = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(log))
    dcgan.train(replace(copy, epochs=4))
    found = metrics(copy.out)
    assert [(row['epoch'], row['iteration']) for row in found[-3:]] == [(3, 10), (3, 11), (3, 11)]
    assert len(found) >= least + 3 and all(row in metrics(finished.out) for row in found[:-3])


def test_a_log_that_cannot_be_written_for_a_while(tiny, finished, capsys, monkeypatch):
    """It is written anew when it can be; the run goes on, and says so once. A row that was cut is made whole, too."""
    log = []

    def no_log():
        log.extend(metrics(tiny().out))
        os.remove(log[0])
        os.mkdir(log[0])

    before_steps(monkeypatch, {
        5: lambda: log.append(f'{newest(tiny().out)}/log.csv'), 11: lambda: room(os.path.getsize(log[0]) + 30),
        12: room, 22: no_log, 33: lambda: os.rmdir(log[0])})
    dcgan.train(tiny(coverage=False))
    assert capsys.readouterr().out.count('log.csv cannot be written') == 1
    lines = [row for row in metrics(finished.out) if row['kl'] == np.inf]
    assert log[1:] == lines[:3] and metrics(tiny().out) == lines


# ---------------------------------------------------------------- killing

class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in it catches this."""


def killed(s, n, after_steps):
    """Train, and end at the n-th time, after so many steps, that a file is touched or images are counted.

    Returns these times so far; they are fewer than n where the run has ended before.
    """
    calls, steps, step, count = [], [], dcgan.train_step, dcgan.data.Coverage.count

    def deadly(event, path):
        if len(steps) >= after_steps and path.startswith(s.out) and event != 'os.mkdir':
            calls.append(event)
            if len(calls) == n:
                raise Killed

    with pytest.MonkeyPatch.context() as patch, on_disk(deadly), contextlib.suppress(Killed):
        patch.setattr(dcgan, 'train_step', lambda *args: (steps.append(0), step(*args))[1])
        patch.setattr(dcgan.data.Coverage, 'count', lambda *args: (deadly('count', s.out), count(*args))[1])
        dcgan.train(s)
    return calls


def test_killed_at_each_step_of_an_epochs_end(tiny, monkeypatch):
    """Some thirty kills, half of them inside a save. All files are, bit for bit, those of the run nobody killed."""
    monkeypatch.setattr(visual, 'film', lambda out: None)  # of many epochs it takes long
    s, epochs, kills = tiny(epochs=1), 1, []
    for n in itertools.count(1):
        calls = killed(replace(s, epochs=epochs), n, after_steps=11)
        if len(calls) < n:
            break
        kills.append(calls[-1])
        if glob.glob(f'{s.out}/*/state-*.npz'):
            s = replace(s, resume='latest')
            assert stands(s.out)[0] in (epochs - 1, epochs) and len(states(newest(s.out))) <= 3
            epochs = stands(s.out)[0] + 1
    assert len(kills) > 25 and set(kills) == {'open', 'os.rename', 'os.remove', 'count'}
    for path in glob.glob(f'{s.out}/*'):  # a kill before the first state has left a run without one
        if not states(path):
            shutil.rmtree(path)
    dcgan.train(replace(s, epochs=epochs + 1))
    dcgan.train(tiny(epochs=epochs + 1, out=s.out + '2'))
    assert_same_run(s.out, s.out + '2')


def test_killed_at_each_step_of_going_on(copy, finished):
    """Of the last epoch there is the state alone, and each kill comes while the rest is made."""
    folder = newest(copy.out)
    log = pathlib.Path(folder, 'log.csv').read_text().splitlines(keepends=True)
    for n in itertools.count(1):
        for name in (*names(folder, '*-0002.p*'), *names(folder, 'film.webp')):
            os.remove(f'{folder}/{name}')
        pathlib.Path(folder, 'log.csv').write_text(''.join(log[:-1]))
        if len(killed(copy, n, after_steps=0)) < n:
            break
    assert n > 20
    assert_same_run(copy.out, finished.out)


def test_killed_in_earnest(child, finished, tmp_path):
    """By SIGKILL: what lies in buffers is lost, and so is the lock."""
    kills = {'np.lib.format.write_array': 300, 'dcgan.mx.nd.save': 4, 'dcgan.visual.cv2.imencode': 9,
             'dcgan.train_step': 22}
    processes = [child(out=str(tmp_path / function), before=f"""
import itertools, os
count, function = itertools.count(1), {function}
def deadly(*args, **kwargs):
    found = function(*args, **kwargs)
    if next(count) == {n}:
        os.kill(os.getpid(), 9)
    return found
{function} = deadly
""") for function, n in kills.items()]
    for process, function in zip(processes, kills):
        assert process.wait(timeout=600) == -signal.SIGKILL, process.stderr.read()
        if function == 'dcgan.train_step':  # the log is live; what comes after the state is dropped
            assert [stands(tmp_path / function), len(rows(tmp_path / function))] == [(1, 0), 4]
        dcgan.train(replace(finished, out=str(tmp_path / function), resume='latest'))
        assert_same_run(tmp_path / function, finished.out)


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(tiny, finished, capsys, monkeypatch, signum):
    """Two signals within half a second are one, for `timeout` sends two. The process may go on, as a notebook does."""
    before_steps(monkeypatch, {12: lambda: (signal.raise_signal(signum), signal.raise_signal(signum))})
    assert ended(tiny()) == 128 + signum
    out = capsys.readouterr().out
    assert out.count('stopping at the next line') == 1
    last = out.splitlines()[-1]
    assert last.startswith(f'stopped in epoch 1 after iteration 10: everything is in {newest(tiny().out)}')
    assert "resume = 'latest'" in last
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


def test_nohup(tiny, finished, monkeypatch):
    before_steps(monkeypatch, {12: lambda: signal.raise_signal(signal.SIGHUP)})
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    dcgan.train(tiny())
    assert signal.signal(signal.SIGHUP, signal.SIG_DFL) == signal.SIG_IGN
    assert_same_run(tiny().out, finished.out)


def test_a_second_signal_ends_at_once(child, tmp_path):
    process = child(before='dcgan.train_step = lambda *args: print("hanging") or dcgan.time.sleep(1000)')
    assert any('hanging' in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert any('stopping' in line for line in process.stdout)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and states(newest(tmp_path / 'out')) == []


@pytest.mark.parametrize('owner, name, changes', [
    (dcgan.data, 'load_data', {}), (dcgan, 'make_modules', {}), (visual, 'save', dict(resume='latest', sample=1))])
def test_ctrl_c_before_the_loop_or_while_samples_are_made(copy, capsys, monkeypatch, owner, name, changes):
    before = os.listdir(copy.out)
    monkeypatch.setattr(owner, name, lambda *args: signal.raise_signal(signal.SIGINT))
    assert ended(replace(copy, **{'resume': '', **changes})) == 130
    assert capsys.readouterr().err == '' and os.listdir(copy.out) == before


def test_q_stops_one_run_and_not_the_next(tiny, finished, monkeypatch):
    viewers = [mock.Mock(poll=lambda: visual.QUIT), mock.Mock(poll=lambda: None)]
    monkeypatch.setattr(visual, '_start_viewer', lambda out: viewers.pop(0))
    assert ended(tiny(display=True)) == 130 and stands(tiny().out) == (0, 10)
    dcgan.train(tiny(display=True, resume='latest'))
    assert_same_run(tiny().out, finished.out)


# ---------------------------------------------------------------- who reads what is printed

def pipe(word):
    """A stdout that takes nothing any more, from a certain word on."""
    def write(text):
        if word in text or closed:
            closed.append(True)
            raise BrokenPipeError
        return len(text)

    closed = []
    return mock.Mock(write=write)


@pytest.mark.parametrize('word, state', [
    ('settings:', (0, 10)), ('metric:', (0, 10)), ('epoch: 0 iter: 10', (0, 10)), ('epoch: 0 iter: 11', (1, 0)),
    ('epoch: 1 digits', (2, 10)), ('done', (3, 0))])
def test_a_pipe_whose_reader_has_gone(tiny, finished, word, state):
    """Wherever it is noticed, the run stops at the next line, with the status of SIGPIPE."""
    with contextlib.redirect_stdout(pipe(word)):
        assert ended(tiny()) == 141
    assert stands(tiny().out) == state
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


@pytest.mark.parametrize('word', ['epoch: 0 iter: 11', 'no reader has gone, but q was pressed'])
def test_ctrl_c_while_it_stops(tiny, monkeypatch, word):
    """Ctrl-C goes to both ends of a pipe: the status is its own, and nothing ends before the state is saved."""
    exits = []
    monkeypatch.setattr(dcgan.os, '_exit', exits.append)

    def ctrl_c(event, path):
        if event == 'os.rename' and 'state' in path:
            signal.raise_signal(signal.SIGINT)

    q = 'q was pressed' in word
    before_steps(monkeypatch, {11: lambda: monkeypatch.setattr(visual, 'quit_pressed', lambda: q)})
    with contextlib.redirect_stdout(pipe(word)), on_disk(ctrl_c):
        assert ended(tiny()) == 130
    assert exits == [] and stands(tiny().out) == (1, 0)


def test_real_pipes_and_disks(child, tmp_path):
    """No reader from the start, one that goes, one that gets the same Ctrl-C, as tee does, and a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    with open('/dev/full', 'w') as full:
        processes = [child(out=str(tmp_path / out), stdout=stdout, epochs=epochs) for out, stdout, epochs in (
            ('none', writer, 999), ('goes', subprocess.PIPE, 999), ('tee', subprocess.PIPE, 999), ('disk', full, 2))]
    os.close(writer)
    for process in processes[1:3]:
        assert any(line.startswith('epoch:') for line in process.stdout)
        if process is processes[2]:
            process.send_signal(signal.SIGINT)
        process.stdout.close()
    assert [process.wait(timeout=600) for process in processes] == [141, 141, 130, 0]
    assert [process.stderr.read() for process in processes] == [''] * 4
    assert stands(tmp_path / 'none') == (0, 10) and stands(tmp_path / 'disk') == (2, 0)
    assert stands(tmp_path / 'goes') and stands(tmp_path / 'tee')


# ---------------------------------------------------------------- what goes wrong while saving

def go(out):
    os.rename(newest(out), newest(out) + '.away')
    pathlib.Path(newest(out)[:-len('.away')]).touch()


def come_back(out):
    os.remove(newest(out)[:-len('.away')])
    os.rename(newest(out), newest(out)[:-len('.away')])


@cases('fail, mend', {
    **{f'room for {size}': (lambda out, size=size: room(size), lambda out: room()) for size in (0, 50_000, 100_000)},
    'the folder is gone': (go, come_back)})  # as where a network's disk does not answer
def test_a_disk_that_fails_for_a_while(tiny, finished, capsys, monkeypatch, fail, mend):
    """All through the end of epoch 1. What was saved before stays whole, and what comes after is as always."""
    before_steps(monkeypatch, {22: lambda: fail(tiny().out), 23: lambda: mend(tiny().out)})
    dcgan.train(tiny())
    said = warnings(capsys.readouterr().out)
    assert sum('state-0002-000000.npz is not saved' in line for line in said) == 1 and len(said) <= 4
    first, last = states(newest(tiny().out))
    assert dcgan.find_state(first)[0]['epoch'] == 1 and dcgan.find_state(last)[0]['epoch'] == 3
    assert_same_run(tiny().out, finished.out, without='-0001.p|film')


def test_a_disk_too_full_for_the_params(tiny, finished, capsys, monkeypatch):
    """MXNet does not notice that a hundred bytes are missing. The state is saved, and who goes on makes the rest."""
    size = os.path.getsize(glob.glob(f'{newest(finished.out)}/*_G_*-0001.params')[0]) - 100
    before_steps(monkeypatch, {23: lambda: (room(), 1 / 0)})
    with on_disk(lambda event, path: room(size) if path.endswith('state-0002-000000.npz') else None):
        with pytest.raises(ZeroDivisionError):
            dcgan.train(tiny())
    said = warnings(capsys.readouterr().out)
    assert [bool(re.search('_G_.*-0001.params is not saved', line)) for line in said] == [True]
    assert names(newest(tiny().out), '*-0001.params') == []
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


def test_a_folder_that_is_renamed(tiny, finished, capsys, monkeypatch):
    """The run goes on under its own name; the renamed folder, too, can go on from what it has."""
    mine = f'{tiny().out}/mine'
    before_steps(monkeypatch, {15: lambda: os.rename(newest(tiny().out), mine)})
    dcgan.train(tiny())
    assert 'WARNING' not in capsys.readouterr().out
    assert_same_run(*glob.glob(f'{tiny().out}/digits_*'), finished.out, without='-0000|film')
    dcgan.train(tiny(resume=mine))
    assert_same_run(mine, finished.out)


def test_old_files_that_cannot_be_removed(tiny, finished):
    def refuse(event, path):
        if event == 'os.remove':
            raise PermissionError(errno.EACCES, 'Permission denied')

    with on_disk(refuse):
        dcgan.train(tiny())
    assert_same_run(tiny().out, finished.out)
    assert len(states(newest(tiny().out))) == 3


def test_divergence_stops_the_run_and_overwrites_nothing(copy, tiny, finished):
    line = ended(replace(copy, lr=1e30, epochs=5))
    assert re.search(f'the loss is not finite at epoch 3.*{states(newest(copy.out))[-1]}.*lr', line)
    assert_same_run(copy.out, finished.out)
    assert re.search('the loss is not finite at epoch 0.*last good state: none.*lr', ended(tiny(lr=1e30)))
    assert states(newest(tiny().out)) == names(newest(tiny().out), '*.params') == []


@pytest.mark.parametrize('what', ['g1_weight', 'gbn1_moving_var', 'd1_weight_mean', 'g1_weight_average'])
def test_what_is_not_finite_is_not_saved(tiny, monkeypatch, what):
    """The last step of an epoch may ruin the networks after its loss was seen."""
    arrays = dcgan.network_arrays

    def ruined(modules, mean):
        found = arrays(modules, mean)
        found[what].flat[-1] = np.nan if modules[0]._optimizer.num_update == 22 else 1
        return found

    monkeypatch.setattr(dcgan, 'network_arrays', ruined)
    assert f'{what} is not finite at epoch 1, iteration 11' in ended(tiny())
    assert stands(tiny().out) == (1, 0) and names(newest(tiny().out), '*-0001.params') == []


# ---------------------------------------------------------------- states of something else

def edit_state(s, change):
    """Change the newest state: `change` gets {name: array} and what the state remembers. Returns its path."""
    path = states(newest(s.out))[-1]
    about, arrays = dcgan.find_state(path)
    change(arrays, about)
    np.savez(path, about=json.dumps(about, default=str), **arrays)
    return path


@pytest.mark.parametrize('changes, words', [
    (dict(ngf=8), 'ngf = 4, now it is 8'), (dict(ndf=8), 'ndf = 4'), (dict(nc=3), 'nc = 1'), (dict(Z=9), 'Z = 8'),
    (dict(conditional=True), 'conditional = False'), (dict(d1_bias=False), 'd1_bias = True'),
    (dict(resume='/no'), '/no'), ({}, "dataset = 'mnist', now it is 'digits'")], ids=str)
def test_another_networks_state(copy, changes, words):
    if not changes:
        edit_state(copy, lambda arrays, about: about['settings'].update(dataset='mnist'))
    before = contents(copy.out)
    assert words in ended(replace(copy, **changes)) and contents(copy.out) == before


def test_other_datas_state(copy, monkeypatch):
    """A run goes on with the data that it began with; from an epoch's .params a new one begins with others."""
    X, *others = dcgan.data.get_digits(labels=True)
    monkeypatch.setattr(dcgan.data, 'get_digits', lambda labels=False: (255 - X, *others))
    before, count = contents(copy.out), dcgan.data.Coverage.count
    assert 'trained with other data' in ended(copy) and contents(copy.out) == before
    # more images have a Fréchet distance, which the log that the new run begins with lacks
    monkeypatch.setattr(dcgan.data.Coverage, 'count', lambda *args: dict(count(*args), fd=1.))
    dcgan.train(replace(copy, resume=glob.glob(f'{newest(copy.out)}/*_D_*-0001.params')[0]))


def test_other_settings_are_said(copy, capsys):
    """Here the epoch is also shorter than before, and counts as done."""
    edit_state(copy, lambda arrays, about: (about['settings'].update(workers=2), about.update(epoch=2, iteration=10)))
    dcgan.train(replace(copy, epochs=4, lr=0.0003, seed=4, beta1=0.4, batch_size=22, pos_label=1., head_start=7,
                  lr_steady=9))
    said = [line.split(':')[1] for line in warnings(capsys.readouterr().out)]
    assert said == [' batch_size was 10 and is 22', ' lr was 0.0002 and is 0.0003', ' head_start was 0 and is 7',
                    ' lr_steady was 12 and is 9', ' beta1 was 0.5 and is 0.4', ' pos_label was 0.9 and is 1.0',
                    ' seed was 3 and is 4', ' workers was 2 and is 1']
    assert stands(copy.out) == (4, 0) and dcgan.find_state(newest(copy.out))[0]['num_update'] == 33 + 5


def test_a_state_of_before_lr_steady(copy, capsys):
    edit_state(copy, lambda arrays, about: about['settings'].pop('lr_steady'))
    dcgan.train(replace(copy, epochs=4))
    assert [line.split(':')[1] for line in warnings(capsys.readouterr().out)] == [' lr_steady was 0 and is 12']
    assert stands(copy.out) == (4, 0)


# ---------------------------------------------------------------- damaged states

@pytest.mark.parametrize('harm', [
    lambda content: content[:len(content) // 2], lambda content: b'', lambda content: b'state' * 1000,
    lambda content: content.replace(content[content.index(b'g1_weight'):][1000:1100], b'other weights' * 9, 1)],
    ids=['cut', 'empty', 'no archive', 'other bytes'])
def test_the_state_before_a_damaged_one_is_taken(copy, finished, capsys, harm):
    """By a run that trains the damaged one is renamed, so that it does not count among the newest two."""
    before, last = states(newest(copy.out))
    pathlib.Path(last).write_bytes(harm(pathlib.Path(last).read_bytes()))
    dcgan.train(replace(copy, sample=1))
    assert states(newest(copy.out)) == [before, last] and 'damaged' in capsys.readouterr().out
    dcgan.train(copy)
    assert [f'{last}: is damaged' in line for line in warnings(capsys.readouterr().out)] == [True]
    assert states(newest(copy.out)) == [before, last] and os.path.exists(f'{last}.damaged')
    assert_same_run(copy.out, finished.out, without='damaged|sample|walk')


def test_no_state_that_can_be_read(copy):
    folder = newest(copy.out)
    for path in states(folder):
        pathlib.Path(path).write_bytes(b'PK')
    for changes, damaged in ((dict(resume=path), 0), (dict(sample=1), 0), ({}, 2)):  # the last one trains there
        assert 'no state to go on from' in ended(replace(copy, **changes))
        assert len(names(folder, '*.damaged')) == damaged and len(states(folder)) == 2 - damaged


@pytest.mark.parametrize('target', ['/proc/self/mem', 'state-0003-000000.npz'], ids=['reading', 'opening'])
def test_a_state_that_the_disk_does_not_give(copy, target):
    """It may be a good one: the run ends, and nothing is renamed."""
    folder = newest(copy.out)
    os.remove(f'{folder}/state-0003-000000.npz')
    os.symlink(target, f'{folder}/state-0003-000000.npz')
    before = names(folder)
    assert '[Errno' in ended(replace(copy, resume=folder)) and names(folder) == before


@pytest.mark.parametrize('change', [
    *(lambda arrays, about, name=name: arrays.pop(name) for name in ('g1_weight', 'dbn2_moving_mean', 'd5_weight_var')),
    *(lambda arrays, about, name=name: about.pop(name) for name in ('names', 'settings', 'class_names')),
    *(lambda arrays, about, name=name: about['settings'].pop(name) for name in ('nc', 'seed', 'workers')),
    *(lambda arrays, about, new=new: about.update(new)
      for new in (dict(epoch='three'), dict(epoch=float('inf')), dict(settings=3))),
    lambda arrays, about: arrays.update(more=arrays['g1_weight']),
    lambda arrays, about: arrays.update(d1_weight=arrays['g1_weight']),
    lambda arrays, about: arrays.update(g1_weight=arrays['g1_weight'][:0]),
    lambda arrays, about: about['names'].append(arrays.update(more=np.array([{}])) or 'more')])
def test_a_state_with_other_contents(copy, change):
    """Of another version, say, or with a pickle in it. It is one line."""
    path = edit_state(copy, change)
    line = ended(replace(copy, resume=path))
    assert path in line and re.search('no state to go on from|does not fit', line)


def damages(content):
    """What may be left of a state's bytes: a part, all with a flipped bit or some others, or something else."""
    size, random, starts = len(content), np.random.RandomState(1), [at.start() for at in re.finditer(b'PK', content)]
    # all over the file, and most of all in the archive's directory at its end
    for place in {*range(0, 100, 3), *np.linspace(0, size - 1, 100).astype(int), *range(size - 8000, size, 61),
                  *range(size - 100, size)}:
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:]
        if place % 3 == 0:
            yield content[:place]
    shape = content.index(b"'shape': (", content.index(b'g1_weight')) + 9
    yield content[:shape] + b'(10000000000,1),' + content[shape + 16:]  # many gigabytes
    for n in range(100):  # names, shapes and lengths are at the begin of each array
        other = bytearray(content)
        for place in random.choice(starts) + random.randint(0, 250, n % 8):
            other[place % size] = random.randint(256)
        yield bytes(other)
        yield random.bytes(3 * n)
    yield pickle.dumps({})
    for about in ('', '[', '[' * 100_000, '{"epoch": 1e999}', 'null', '[]', '3', '{}'):
        file = io.BytesIO()
        np.savez(file, about=about)
        yield file.getvalue()


def test_a_damaged_state_is_refused_or_read_as_it_was(copy):
    path = pathlib.Path(states(newest(copy.out))[-1])
    expected, expected_arrays = dcgan.find_state(path)
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        try:
            about, arrays = dcgan.find_state(path)
        except ValueError as error:
            assert str(path) in str(error) and '\n' not in str(error)
        else:
            assert about == expected and arrays.keys() == expected_arrays.keys()
            assert all(arrays[name].tobytes() == expected_arrays[name].tobytes() for name in arrays)
