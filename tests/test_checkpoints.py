"""A run that cannot be lost: resuming, killing, signals, pipes, full disks, wrong files."""
import glob
import io
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, before_steps, cases, contents, ended, newest, read_state, rows, train_and_stop
from conftest import watch_steps as watch

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
    num_images, floor, learned = 20, None, True

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


def metrics(out):
    """The log without what differs between two runs that are the same."""
    return [{name: float(cell or 'inf') for name, cell in row.items() if name not in ('seconds', 'images_per_second')}
            for row in rows(out)]


def assert_same_run(found, expected, without='^$', counts=True):
    """To the last bit: the states' arrays, each epoch's networks, the pictures and the log.

    `without`: a pattern of the files that one of the two runs need not have; `counts`: whether it has each count.
    """
    (about, arrays), (expected_about, expected_arrays) = read_state(newest(found)), read_state(newest(expected))
    for name in ('epoch', 'iteration', 'adam_count', 'average_count', 'checksum'):
        assert about[name] == expected_about[name], name
    assert arrays.keys() == expected_arrays.keys()
    assert [name for name in arrays if arrays[name].tobytes() != expected_arrays[name].tobytes()] == []
    assert [[row for row in metrics(out) if counts or row['kl'] == np.inf] for out in (found, expected)][0] == [
        row for row in metrics(expected) if counts or row['kl'] == np.inf]
    files, expected_files = (
        {re.sub('digits_(.*?)_.*-', r'\1-', path): content for path, content in contents(newest(out)).items()
         if not re.search(f'state.npz|log.csv|json|{without}', path)} for out in (found, expected))
    assert files.keys() == expected_files.keys()
    assert [path for path in files if files[path] != expected_files[path]] == []


def room(size=resource.RLIM_INFINITY):
    """Let this process write no file larger than that, as with a quota or on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


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


def test_other_programs_read_the_files(finished):
    """The .params are MXNet's, and those of the last step: BatchNorm's averages, read too early, are 0 and 1."""
    _, arrays = read_state(newest(finished.out))
    assert {array.dtype.kind for array in arrays.values()} == {'f'}
    for net, end in (('G', ''), ('D', ''), ('Gmean', '_average')):
        for name, array in mx.nd.load(params(newest(finished.out), net, 2)).items():
            saved = arrays[name.split(':')[1] + end]
            assert saved.tobytes() == array.asnumpy().tobytes()
            assert 'moving' not in name or np.any(saved != ('var' in name))
    prefix = params(newest(finished.out), 'G', 2)[:-len('-0002.params')]
    latent = mx.nd.array(dcgan.fixed_latents(finished.seed, 10, 8).reshape(10, 8, 1, 1))
    mod = mx.mod.Module.load(prefix, 2, data_names=('rand',), label_names=None)
    mod.bind([('rand', latent.shape)], for_training=False)
    mod.forward(mx.io.DataBatch([latent]), is_train=False)
    block = mx.gluon.SymbolBlock.imports(f'{prefix}-symbol.json', ['rand'], f'{prefix}-0002.params')
    assert np.array_equal(mod.get_outputs()[0].asnumpy(), block(latent).asnumpy())


def test_runs_of_the_same_minute(tiny, monkeypatch):
    monkeypatch.setattr(dcgan.time, 'strftime', lambda *args: '2026_11_23-13_20')
    for _ in range(3):
        dcgan.train(tiny(epochs=1))
    assert names(tiny().out) == [f'digits_2026_11_23-13_20{suffix}' for suffix in ('', '_2', '_3')]


# ---------------------------------------------------------------- resuming

@cases('changes', {'plain': dict(ctx=mx.cpu(1)), 'conditional': dict(conditional=True),
                   'two devices': dict(ctx=(mx.cpu(0), mx.cpu(1)))})
def test_stopped_at_every_line_in_turn(tiny, finished, changes):
    s, other = tiny(**changes), tiny(**changes, out=tiny().out + '2')
    if other.ctx == mx.cpu(1):
        s = finished  # on another device, of which MXNet would write the number into its .params
    else:
        dcgan.train(s)
    for line in [(0, 10), (0, 11), (1, 10), (1, 11), (2, 10), (2, 11)]:
        train_and_stop(other, 1)
        other = replace(other, resume='latest')
        assert stands(other.out) == line
        assert names(newest(other.out), f'*-{line[0]:04d}.params')  # for samples
    dcgan.train(other)
    assert names(other.out) == [newest(other.out).name]
    assert_same_run(other.out, s.out)


def test_the_latest_run_is_that_of_the_newest_state(copy, tmp_path, finished, capsys):
    """By the time in the state: copying the folders, here in the wrong order, changes that of the files."""
    train_and_stop(replace(copy, resume='', epochs=5), 1)
    older, newer = sorted(Path(copy.out).glob('digits_*'), key=lambda folder: read_state(folder)[0]['saved_at'])
    out = tmp_path / 'a [b] *'
    for seconds, folder, name in ((1000, newer, 'digits_a'), (2000, older, 'digits_z')):
        shutil.copytree(folder, out / name)
        os.utime(out / name / 'state.npz', (seconds, seconds))
    before = contents(out / 'digits_z')
    capsys.readouterr()
    dcgan.train(replace(copy, out=str(out)))
    assert f'resuming {out}/digits_a: epoch 0, iteration 10\n' in capsys.readouterr().out
    assert contents(out / 'digits_z') == before and read_state(out / 'digits_a')[0]['epoch'] == 3
    dcgan.train(replace(copy, out=str(out), resume=f'{out}/digits_z', epochs=4))
    assert read_state(out / 'digits_z')[0]['adam_count'] == 44


@pytest.mark.parametrize('net', ['G', 'D', 'Gmean'])
def test_params_begin_a_run_of_their_own(tiny, capsys, monkeypatch, net):
    """Epoch and learning rates continue; Adam and the average begin anew."""
    rates = watch(monkeypatch, lambda modules, *_: [mod._optimizer.learning_rate for mod in modules[:2]])
    s = tiny(head_start=25, lr_steady=16)
    dcgan.train(s)
    folder = newest(s.out)
    before, path = contents(folder), params(folder, net, 1)
    dcgan.train(replace(s, resume=path))
    assert 'Adam and the average of G begin anew' in capsys.readouterr().out and contents(folder) == before
    falling = [[0.0002 * 0.5 ** (quarters / 4), 0.0002] for quarters in range(9, 17)]  # G's and D's, from 25 to 32
    assert rates == [[0.001] * 2] * 25 + falling + [[0.001] * 2] * 3 + falling
    new, = set(Path(s.out).glob('*')) - {folder}
    about, _ = read_state(new)
    assert (about['epoch'], about['adam_count'], about['average_count']) == (3, 11, 2)
    # what it begins with, for a run that does not learn anything from there
    dcgan.train(replace(s, resume=path, lr=1e-30, head_start=0, out=s.out + '2'))
    _, arrays = read_state(newest(s.out + '2'))
    for other in 'G', 'D':
        for name, array in mx.nd.load(params(folder, other, 1)).items():
            name = name.split(':')[1]
            assert 'moving' in name or arrays[name].tobytes() == array.asnumpy().tobytes()
            assert name[0] == 'd' or 'moving' in name or np.allclose(arrays[f'{name}_average'], arrays[name])


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2)])
def test_another_number_of_devices(tiny, before, after):
    train_and_stop(tiny(ctx=[mx.cpu(k) for k in range(before)]), 12)
    dcgan.train(tiny(resume='latest', ctx=[mx.cpu(k) for k in range(after)]))
    assert stands(tiny().out) == (3, 0) and read_state(newest(tiny().out))[0]['adam_count'] == 33
    assert len(rows(tiny().out)) == 9


def test_the_log_is_written_and_never_read(copy, finished):
    path = newest(copy.out) / 'log.csv'
    for damage in path.unlink, lambda: path.write_bytes(b'"\0' * 999):
        damage()
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

@cases('function, n, loses', {
    'in a step': ('dcgan.train_step', 17, 0), 'in a state': ('np.lib.format.write_array', 300, 1),
    'after a state': ('os.replace', 1, 0), 'in the .params': ('dcgan.mx.nd.save', 2, 0),
    'in a mosaic': ('dcgan.visual.tile', 7, 0), 'in a count': ('Coverage.count', 2, 0)})
def test_killed(child, finished, tmp_path, function, n, loses):
    """By SIGKILL, once or twice: the state is whole, at most an epoch is lost, and the run ends with the same bits."""
    kill = f"""
import itertools, os
count, function = itertools.count(1), {function}
def deadly(*args, **kwargs):
    found = function(*args, **kwargs)
    if next(count) == {n}:
        os.kill(os.getpid(), 9)
    return found
{function} = deadly
"""
    process = child(kill)
    assert process.wait(timeout=600) == -signal.SIGKILL, process.stderr.read()
    if function != 'os.replace':  # before the first state is there nothing remains
        assert stands(tmp_path / 'out')[0] >= 1
        dcgan.train(replace(finished, out=str(tmp_path / 'out'), resume='latest'))
        assert_same_run(tmp_path / 'out', finished.out, without=r'-000\d\.(png|params)|film|tmp', counts=False)


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_resume(tiny, finished, capfd, monkeypatch, signum):
    """Two signals within half a second are one, for `timeout` sends two. The process may go on, as a notebook does."""
    before_steps(monkeypatch, {12: lambda: (signal.raise_signal(signum), signal.raise_signal(signum))})
    assert ended(tiny()) == 128 + signum
    out, err = capfd.readouterr()
    assert err.count('stopping at the next line') == 1
    last = out.splitlines()[-1]
    assert last.startswith('stopped in epoch 1 after iteration 10; ') and f'{newest(tiny().out)}/' in last
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
    process = child(before='dcgan.train_step = lambda *args: print("hanging", flush=True) or dcgan.time.sleep(1000)')
    assert any('hanging' in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert 'stopping' in process.stderr.readline()
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and names(newest(tmp_path / 'out'), 'state*') == []


@pytest.mark.parametrize('owner, name, changes', [
    (dcgan.data, 'load_data', {}), (dcgan, 'make_modules', {}), (visual, 'save', dict(resume='latest', sample=1))])
def test_ctrl_c_before_the_loop_or_while_samples_are_made(copy, capsys, monkeypatch, owner, name, changes):
    before = os.listdir(copy.out)
    monkeypatch.setattr(owner, name, lambda *args: signal.raise_signal(signal.SIGINT))
    assert ended(replace(copy, **{'resume': '', **changes})) == 130
    assert capsys.readouterr().err == '' and os.listdir(copy.out) == before


def test_q_stops_one_run_and_not_the_next(tiny, finished, monkeypatch):
    pressed = [True]
    monkeypatch.setattr(visual, 'quit_pressed', lambda: pressed and pressed.pop())
    assert ended(tiny()) == 130 and stands(tiny().out) == (0, 10)
    dcgan.train(tiny(resume='latest'))
    assert_same_run(tiny().out, finished.out)


# ---------------------------------------------------------------- who reads what is printed

@pytest.mark.parametrize('read', [0, 1, 5, 7])
def test_a_reader_that_has_gone(child, finished, tmp_path, read):
    """As `| head -5`: the run saves at the next line, with the status of SIGPIPE."""
    process = child(epochs=999, display=True)
    for _ in range(read):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert process.wait(timeout=600) == 141, process.stderr.read()
    dcgan.train(replace(finished, out=str(tmp_path / 'out'), resume='latest', epochs=stands(tmp_path / 'out')[0] + 1))


def test_ctrl_c_that_ends_tee_as_well(child, tmp_path):
    process = child(epochs=999)
    assert any(line.startswith('epoch:') for line in process.stdout)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    process.stdout = None
    assert process.wait(timeout=600) in (130, 141) and stands(tmp_path / 'out')


def test_a_full_disk_under_the_output(child, tmp_path):
    with open('/dev/full', 'w') as full:
        process = child(stdout=full)
    assert process.wait(timeout=600) == 0 and stands(tmp_path / 'out') == (3, 0)


# ---------------------------------------------------------------- what goes wrong while saving

@pytest.mark.parametrize('size', [20_000, 50_000, 100_000])
def test_a_disk_that_is_full_for_a_while(tiny, finished, capsys, monkeypatch, size):
    """All through the end of epoch 1. What was saved before stays whole, and what comes after is as always."""
    found = []
    before_steps(monkeypatch, {22: lambda: room(size), 23: lambda: (room(), found.append(stands(tiny().out)),
                                                                    found.append(names(newest(tiny().out), '*tmp')))})
    dcgan.train(tiny())
    said = re.findall('^WARNING: .*', capsys.readouterr().out, re.M)
    assert sum('state.npz' in line and 'not saved' in line for line in said) == 2 and found == [(1, 0), []]
    assert_same_run(tiny().out, finished.out, without='-0001|film', counts=False)


@cases('size, what', {'state': (50_000, 'state.npz'), '.params': (-100, '_G_')})
def test_an_end_that_cannot_be_saved(tiny, finished, monkeypatch, size, what):
    """It is said, the status is not 0, and nothing half-written is left; MXNet misses a hundred bytes by itself."""
    if size < 0:
        size += os.path.getsize(params(newest(finished.out), 'G', 2))
        monkeypatch.setattr(dcgan.np, 'savez', lambda file, **arrays: None)  # the state has room enough
    before_steps(monkeypatch, {33: lambda: room(size)})
    try:
        line = ended(tiny())
    finally:
        room()
    assert line.startswith('dcgan.py: done; ') and 'NOT SAVED' in line and what in line
    assert names(newest(tiny().out), '*.tmp') == [] == names(newest(tiny().out), '*_G_*-0002.params')


def test_divergence_stops_the_run_and_overwrites_nothing(copy, tiny, finished):
    assert re.search('the loss is not finite at epoch 3.*lr', ended(replace(copy, lr=1e30, epochs=5)))
    assert_same_run(copy.out, finished.out)
    assert re.search('the loss is not finite at epoch 0.*lr', ended(tiny(lr=1e30)))
    assert names(newest(tiny().out), '*.params') == [] == names(newest(tiny().out), 'state*')


def test_what_is_not_finite_is_not_saved(tiny, monkeypatch):
    """The last step of an epoch may ruin the networks after its loss was seen."""
    step, count = dcgan.train_step, []

    def ruined(*args):
        found = step(*args)
        count.append(0)
        if len(count) == 22:
            args[0]._exec_group.execs[0].arg_dict['g1_weight'][:1] = np.inf
        return found

    monkeypatch.setattr(dcgan, 'train_step', ruined)
    assert 'g1_weight is not finite after epoch 1' in ended(tiny())
    assert stands(tiny().out) == (1, 0) and names(newest(tiny().out), '*-0001.params') == []


# ---------------------------------------------------------------- states of something else, and damaged ones

@pytest.mark.parametrize('changes, words', [
    (dict(ngf=8), 'ngf = 4, now it is 8'), (dict(ndf=8), 'ndf = 4'), (dict(nc=3), 'nc = 1'), (dict(Z=9), 'Z = 8'),
    (dict(conditional=True), 'conditional = False'), (dict(d1_bias=False), 'd1_bias = True'),
    (dict(resume='/no'), '/no'), (dict(resume='/no.params'), '/no.params')], ids=str)
@pytest.mark.parametrize('what', ['state', 'params'])
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
    assert 'trained with other images' in line and contents(copy.out) == before
    path = re.search("resume = '(.*)'", line)[1]
    assert path == params(newest(copy.out), 'G', 2)
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
    'cut': lambda content: content[:len(content) // 2], 'empty': lambda content: b'',
    'pickle': lambda content: pickle.dumps({}), 'no archive': lambda content: b'state' * 1000, 'missing': None,
    'other bytes': lambda content: content.replace(content[content.index(b'g1_weight'):][1000:1100], b'other' * 20, 1),
    'an array less': lambda content: edited(content, lambda arrays: arrays.pop('dbn2_moving_mean')),
    'another shape': lambda content: edited(content, lambda arrays: arrays.update(d1_weight=arrays['g1_weight'])),
    'nothing told': lambda content: edited(content, lambda arrays: arrays.update(run='{}')),
    'told otherwise': lambda content: edited(content, lambda arrays: arrays.update(run='[' * 100_000)),
    'an object': lambda content: edited(content, lambda arrays: arrays.update(g1_weight=np.array([{}])))})
def test_a_state_that_cannot_be_read(copy, harm):
    """One line, which names the newest epoch's .params; samples come from these anyway."""
    folder = newest(copy.out)
    path = folder / 'state.npz'
    content = path.read_bytes()
    path.unlink()
    if harm:
        path.write_bytes(harm(content))
    else:
        (folder / 'state-0003-000000.npz').write_bytes(content)  # as an older version has it
    before = contents(copy.out)
    line = ended(replace(copy, resume=str(folder), epochs=4))
    assert str(folder) in line and params(folder, 'G', 2) in line and contents(copy.out) == before
    dcgan.train(replace(copy, resume=str(folder), sample=1))


def test_flipped_bits(copy):
    """All over the file, and most of all in the archive's directory: it is refused, or was read as it was."""
    path = newest(copy.out) / 'state.npz'
    content, expected = path.read_bytes(), read_state(newest(copy.out))[1]
    size, read = len(content), 0
    for place in {*range(0, 100, 3), *np.linspace(0, size - 1, 50).astype(int), *range(size - 8000, size, 61)}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1:])
        try:
            saved, arrays = dcgan.read_state(path.parent)
        except ValueError as error:
            assert str(path) in str(error) and '\n' not in str(error)
        else:
            read += 1
            assert all(arrays[name].tobytes() == expected[name].tobytes() for name in arrays)
    assert read < 100
    assert not glob.glob(f'{copy.out}/*/*.tmp')
