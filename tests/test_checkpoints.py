"""A run that cannot be lost: resuming, killing, pipes, full disks, wrong files."""
import contextlib
import csv
import glob
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from conftest import TINY, final_params, same_bits, stop_after, wait_for_line
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

import dcgan
import visual

mx = dcgan.mx
replace = dcgan.dataclasses.replace


def names(folder, pattern='*'):
    return sorted(os.path.basename(path) for path in glob.glob(os.path.join(folder, pattern)))


def latest(s):
    """The folder of the newest run."""
    return os.path.realpath(os.path.join(s.out, 'latest'))


def contents(folder, pattern='**'):
    """{path: bytes} of the files in a folder and below it."""
    found = {}
    for path in glob.glob(os.path.join(folder, pattern), recursive=True):
        if os.path.isfile(path):
            with open(path, 'rb') as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


def rows(folder):
    with open(os.path.join(folder, 'log.csv'), newline='') as file:
        return list(csv.DictReader(file))


METRICS = ('epoch', 'iteration', 'facc', 'fentropy_G', 'fentropy_D')


def metrics(folder):
    """The columns of the log that are the same for the same run."""
    return [[row[name] for name in METRICS] for row in rows(folder)]


def newest(folder):
    """What the newest state holds, damaged or not."""
    return dcgan.read_state(dcgan.list_states(folder)[0])


def train_and_stop(s, steps):
    """Train, and stop in that step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(SystemExit) as caught:
            dcgan.train(s)
    assert caught.value.code == 143


# the first 150 images: a step takes a tenth of the time
FEW_IMAGES = '''
get_digits = dcgan.data.get_digits
dcgan.data.get_digits = lambda labels: [part[:150] for part in get_digits(labels)]
'''
FEW = {**TINY, 'batch_size': 10}


@pytest.fixture(scope='module', autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan.data, 'get_digits', dcgan.data.get_digits)  # so that it comes back
        exec(FEW_IMAGES, {'dcgan': dcgan})
        yield


@pytest.fixture
def tiny(tmp_path):
    """Settings of a run of 15 iterations an epoch; keywords change them."""
    return lambda **changes: dcgan.Settings(**{**FEW, 'out': str(tmp_path / 'out'), **changes})


@pytest.fixture
def child(child):
    """The same in a process of its own."""
    return lambda before='', **changes: child(before=FEW_IMAGES + before, **{'batch_size': 10, **changes})


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of three epochs of five iterations that nobody stopped."""
    s = dcgan.Settings(**{**FEW, 'batch_size': 30, 'epochs': 3, 'out': str(tmp_path_factory.mktemp('finished'))})
    dcgan.train(s)
    return s


@pytest.fixture
def copy(finished, tmp_path):
    """Settings that go on with a copy of that run."""
    out = str(tmp_path / 'copy')
    shutil.copytree(finished.out, out, symlinks=True)
    return replace(finished, out=out, resume='latest')


# ---------------------------------------------------------------- a run's folder

def test_what_a_run_leaves(finished):
    """Two states, one pair of .params an epoch, and nothing temporary."""
    folder = latest(finished)
    stamp = re.fullmatch(r'digits_(\d{4}_\d\d_\d\d-\d\d_\d\d)', os.path.basename(folder))[1]
    assert names(finished.out) == [f'digits_{stamp}', 'latest']
    assert os.readlink(f'{finished.out}/latest') == f'digits_{stamp}'
    assert set(names(folder)) - {'film.webp'} == {  # which needs OpenCV 4.11
        'gout.png', 'diff.png', 'data.png', 'loss.png', 'gout-0000.png', 'gout-0001.png', 'gout-0002.png', 'log.csv',
        'state-0002-00000.npz', 'state-0003-00000.npz',
        *(f'digits_{net}_{stamp}-{rest}' for net in 'GD'
          for rest in ('symbol.json', '0000.params', '0001.params', '0002.params'))}


def test_two_runs_at_the_same_time_get_two_folders(tiny, monkeypatch):
    """`latest` points to each of them in turn."""
    monkeypatch.setattr(dcgan.time, 'strftime', lambda *args: '2026_11_23-13_20')
    found = []
    for _ in range(3):
        dcgan.train(tiny(batch_size=50))
        found.append(os.path.basename(latest(tiny())))
    assert found == [f'digits_2026_11_23-13_20{suffix}' for suffix in ('', '_2', '_3')]
    assert names(tiny().out) == [*found, 'latest']
    for name in found:
        assert names(f'{tiny().out}/{name}', 'state-*') == ['state-0001-00000.npz']
        assert names(f'{tiny().out}/{name}', '*.params') == [f'digits_{net}_{name[7:]}-0000.params' for net in 'DG']


MEETING = '''
import os, time
mkdir = os.mkdir
def meet(path, *args, **kwargs):
    """Wait until both processes are about to make the folder."""
    if 'digits_' in os.path.basename(path):
        open(f'{{os.environ["MEETING"]}}.{number}', 'w').close()
        while not all(os.path.exists(f'{{os.environ["MEETING"]}}.{{n}}') for n in range(2)):
            time.sleep(0.001)
    mkdir(path, *args, **kwargs)
os.mkdir = meet
time.strftime = lambda *args: '2026_11_23-13_20'
'''


def test_two_processes_at_the_same_time_get_two_folders(child, tmp_path):
    processes = [child(before=MEETING.format(number=number), env={'MEETING': str(tmp_path / 'here')}, batch_size=50)
                 for number in range(2)]
    assert [process.communicate(timeout=600) and process.returncode for process in processes] == [0, 0]
    assert names(tmp_path / 'out') == ['digits_2026_11_23-13_20', 'digits_2026_11_23-13_20_2', 'latest']
    assert os.readlink(tmp_path / 'out' / 'latest') in names(tmp_path / 'out')[:2]
    folders = [str(tmp_path / 'out' / name) for name in names(tmp_path / 'out')[:2]]
    assert metrics(folders[0]) == metrics(folders[1]) and same_bits(*map(final_params, folders))


def test_two_at_once_in_one_folder(child, tmp_path):
    """The second is refused, and the first does not notice."""
    assert child(batch_size=50).wait(timeout=600) == 0
    out = str(tmp_path / 'out')
    before = contents(out)
    changes = dict(batch_size=50, epochs=2)
    first = child(resume='latest', before='dcgan.train_step = lambda *args: dcgan.time.sleep(1000)', **changes)
    wait_for_line(first, 'metric:')
    for resume in ('latest', os.path.realpath(f'{out}/latest')):
        second = child(resume=resume, **changes)
        _, err = second.communicate(timeout=600)
        assert second.returncode == 1 and err.count('\n') == 1 and 'another process' in err
    assert contents(out) == before
    assert child(**changes).wait(timeout=600) == 0  # a new run has a folder of its own
    first.kill()
    first.wait()
    assert child(resume=resume, **changes).wait(timeout=600) == 0  # the lock went with the first


def test_mxnet_loads_the_files(finished):
    folder = latest(finished)
    prefix = os.path.join(folder, names(folder, 'digits_G*-symbol.json')[0][:-len('-symbol.json')])
    latent = mx.nd.array(dcgan.fixed_latents(finished, 30)[0].reshape(30, 8, 1, 1))
    mod = mx.mod.Module.load(prefix, 2, data_names=('rand',), label_names=None)
    mod.bind([('rand', latent.shape)], for_training=False)
    mod.forward(mx.io.DataBatch([latent]), is_train=False)
    block = mx.gluon.SymbolBlock.imports(f'{prefix}-symbol.json', ['rand'], f'{prefix}-0002.params')
    assert np.array_equal(mod.get_outputs()[0].asnumpy(), block(latent).asnumpy())
    mx.mod.Module.load(prefix.replace('_G_', '_D_'), 2, label_names=('label',))


def test_params_do_not_remember_the_device(tiny):
    """MXNet writes an array's device into the file: the files of two devices are the same."""
    found = []
    for device in range(2):
        s = tiny(batch_size=30, ctx=mx.cpu(device), out=f'{tiny().out}{device}')
        dcgan.train(s)
        found.append({name[:9]: content for name, content in contents(latest(s), '*.params').items()})
        for path in glob.glob(f'{latest(s)}/*.params'):
            assert {array.context for array in mx.nd.load(path).values()} == {mx.cpu(0)}
    assert len(found[0]) == 2 and found[0] == found[1]


def test_the_params_are_those_of_the_state(finished):
    _, arrays = newest(latest(finished))
    for found in final_params(finished.out).values():
        for name, array in found.items():
            assert arrays[name.split(':')[1]][0].tobytes() == array.tobytes()


def test_the_moving_averages_are_those_of_the_last_step(finished):
    """Read too early they are what they were at the start: 0 and 1."""
    _, arrays = newest(latest(finished))
    arrays.update(final_params(finished.out)['G'])
    moving = [name for name in arrays if 'moving' in name]
    assert len(moving) == 14 + 8 and all(np.any(arrays[name] != ('var' in name)) for name in moving)


def test_a_state_holds_no_pickle(finished):
    for path in dcgan.list_states(latest(finished)):
        with np.load(path, allow_pickle=False) as file:
            kinds = {name: file[name].dtype.kind for name in file.files}
        assert kinds.pop('about') == 'U' and set(kinds.values()) == {'f'}


def test_states_are_in_order_however_long_the_run(tmp_path):
    expected = ['state-10000-00000.npz', 'state-9999-00000.npz', 'state-0002-100000.npz', 'state-0002-99999.npz']
    for name in sorted(expected):
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in dcgan.list_states(str(tmp_path))] == expected


# ---------------------------------------------------------------- resuming

@pytest.mark.parametrize('changes', [{}, dict(conditional=True), dict(ctx=[mx.cpu(0), mx.cpu(1)])], ids=str)
def test_stopped_after_every_iteration_in_turn(tiny, changes):
    s = tiny(batch_size=30, epochs=3, **changes)
    dcgan.train(s)
    other = replace(s, out=s.out + '2')
    for step in range(15):
        train_and_stop(other, 1)
        other = replace(other, resume='latest')
        assert len(dcgan.list_states(latest(other))) == min(step + 1, 2)
    dcgan.train(other)
    assert same_bits(final_params(s.out), final_params(other.out))
    (_, expected), (about, found) = newest(latest(s)), newest(latest(other))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []
    assert about['num_update'] == 15
    assert len(found['gbn1_moving_mean']) == len(other.ctx if isinstance(other.ctx, list) else [other.ctx])
    assert metrics(latest(other)) == metrics(latest(s))
    assert names(other.out) == [os.path.basename(latest(other)), 'latest']
    assert names(latest(other), 'state-*') == ['state-0002-00005.npz', 'state-0003-00000.npz']
    assert names(latest(other), '*.tmp*') == []


@pytest.mark.parametrize('steps', [7, 10])
def test_the_log_goes_on(tiny, finished, steps):
    """Also between two lines: the metrics of the first line after it are of all its iterations."""
    other = tiny(batch_size=30, epochs=3)
    train_and_stop(other, steps)
    folder = latest(other)
    about, _ = newest(folder)
    assert (about['epoch'], about['iteration']) == ((steps - 1) // 5, (steps - 1) % 5 + 1)
    with open(f'{folder}/log.csv', 'a') as file:
        file.write('1,5,')  # what a full disk has left of a row after the state
    dcgan.train(replace(other, resume=folder))
    assert metrics(folder) == metrics(latest(finished)) and len(metrics(folder)) == 3
    seconds = [float(row['seconds']) for row in rows(folder)]
    assert seconds == sorted(seconds) and seconds[1] >= round(about['seconds'], 3)
    with open(f'{folder}/log.csv', newline='') as file:
        assert next(csv.reader(file)) == dcgan.Run.FIELDS


def test_seconds_count_everything(tiny, monkeypatch):
    """Counting the digits, the film and saving take time, too. Here they take hours, on a clock of our own."""
    clock, passed = dcgan.time.monotonic, [0]

    def slow(function, seconds):
        def slowed(*args):
            passed[0] += seconds
            return function(*args)
        return slowed

    monkeypatch.setattr(dcgan.time, 'monotonic', lambda: clock() + passed[0])
    monkeypatch.setattr(dcgan, 'finish_epoch', slow(dcgan.finish_epoch, 10_000))
    monkeypatch.setattr(dcgan.Run, 'save_state', slow(dcgan.Run.save_state, 100_000))
    s = tiny(batch_size=30, epochs=2)
    dcgan.train(s)
    passed[0] += 10_000_000  # between two processes nothing counts
    dcgan.train(replace(s, epochs=3, resume='latest'))
    seconds = [float(row['seconds']) for row in rows(latest(s))]
    assert [second // 10_000 for second in seconds] == [0, 11, 22]


def test_the_log_after_a_row_that_a_full_disk_has_cut(tiny):
    """The row was cut before the state was saved: it may be lost, the rows after it are whole."""
    s, write_row = tiny(batch_size=30, epochs=2), dcgan.Run.write_row
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_disk(run, **row):
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(run.log) + 5, limits[1]))
        try:
            write_row(run, **row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan.Run, 'write_row', full_disk)
        train_and_stop(s, 7)
    dcgan.train(replace(s, resume='latest'))
    assert metrics(latest(s))[-1][:2] == ['1', '5']
    assert all(None not in row and None not in row.values() for row in rows(latest(s)))


def test_more_epochs_after_the_end(copy, tiny):
    dcgan.train(replace(copy, epochs=4))
    straight = tiny(batch_size=30, epochs=4)
    dcgan.train(straight)
    assert same_bits(final_params(straight.out), final_params(copy.out))
    assert names(copy.out) == names(copy.out, 'digits_*') + ['latest'] and len(names(copy.out)) == 2
    assert metrics(latest(copy)) == metrics(latest(straight))


def test_a_state_file_begins_a_run_of_its_own(copy, tmp_path):
    """It has the log so far and overwrites nothing; without `latest`, too, and in another `out`."""
    folder = latest(copy)
    before, expected, log = contents(folder), final_params(folder), metrics(folder)
    state = os.path.join(folder, 'state-0002-00000.npz')
    for out in (copy.out, str(tmp_path / 'other')):
        s = replace(copy, resume=state, out=out)
        dcgan.train(s)
        assert latest(s) != folder and contents(folder) == before
        assert same_bits(final_params(latest(s)), expected) and metrics(latest(s)) == log
        stamp = os.path.basename(latest(s)).split('_', 1)[1]
        assert names(latest(s), '*.params') == [f'digits_{net}_{stamp}-0002.params' for net in 'DG']
        assert names(latest(s), 'state-*') == ['state-0003-00000.npz']
    assert len(names(copy.out)) == 3


def test_a_new_run_is_not_told_to_go_on_from_params(copy):
    path = glob.glob(f'{latest(copy)}/*_G_*-0002.params')[0]
    with pytest.raises(SystemExit, match=r'\.params are for sample only'):
        dcgan.train(replace(copy, resume=path))


def moving_averages(modules):
    return {name: [copy.asnumpy() for copy in copies] for mod in modules[:2]
            for name, copies in zip(mod._aux_names, mod._exec_group.aux_arrays)}


@pytest.mark.parametrize('before, after', [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_devices(tiny, before, after):
    """Device k takes the moving averages of device k modulo the number that saved some."""
    s = tiny(batch_size=30, epochs=2, ctx=[mx.cpu(k) for k in range(before)])
    train_and_stop(s, 3)
    about, saved = newest(latest(s))
    assert all(array.shape[0] == (before if 'moving' in name else 1)
               for name, array in saved.items())
    train_loop, found = dcgan.train_loop, {}

    def look_and_train(s, modules, *args):
        found.update(moving_averages(modules))
        found['g1_weight'] = modules[0]._exec_group.param_arrays[0][-1].asnumpy()
        train_loop(s, modules, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'train_loop', look_and_train)
        dcgan.train(replace(s, resume='latest', ctx=[mx.cpu(k) for k in range(after)]))
    moving = [name for name in saved if 'moving' in name]
    assert len(moving) == 14 and [len(found[name]) for name in moving] == [after] * 14
    for name in moving:
        for k, array in enumerate(found[name]):
            assert array.tobytes() == saved[name][k % before].tobytes()
    if before == 2:  # each device sees images of its own
        assert saved['gbn1_moving_mean'][0].tobytes() != saved['gbn1_moving_mean'][1].tobytes()
    assert found['g1_weight'].tobytes() == saved['g1_weight'][0].tobytes()
    about, arrays = newest(latest(s))
    assert (about['epoch'], about['iteration']) == (2, 0) and about['num_update'] == 10
    assert len(arrays['gbn1_moving_mean']) == after
    assert [row[:2] for row in metrics(latest(s))] == [['0', '5'], ['1', '5']]


# ---------------------------------------------------------------- killing

def around_saves(monkeypatch, before, after):
    """Have each of the two parts of a save happen between two calls, which get the run and the part's name."""
    def surrounded(name):
        save = getattr(dcgan.Run, name)

        def surrounded_save(run, *args):
            before(run, name)
            try:
                save(run, *args)
            finally:
                after(run, name)
        return surrounded_save

    for name in ('save_params', 'save_state'):
        monkeypatch.setattr(dcgan.Run, name, surrounded(name))


# what a save calls: a state has some ninety arrays
SAVE_POINTS = ['os.replace', 'os.fsync', 'mx.nd.save', 'mx.nd.load', 'mx.sym.Symbol.save', 'mx.sym.load', 'np.savez',
               'zipfile.ZipFile.open', 'os.remove', 'dcgan.list_states']
DEADLY = '''
import contextlib, os, random, threading, zipfile
import numpy as np
rng, saving, calls = random.Random({seed}), [], []
count, function = rng.randint(1, {most}), {point}

def kill():
    os.kill(os.getpid(), 9)

def deadly(*args, **kwargs):
    if saving or {anywhere}:
        calls.append(0)
    if len(calls) == count:
        threading.Timer(rng.uniform(0, 0.1), kill).start() if {anywhere} else kill()
    return function(*args, **kwargs)

def counted(save):
    def counted_save(*args):
        saving.append(True)
        save(*args)
        saving.pop()
    return counted_save

dcgan.Run.save_params, dcgan.Run.save_state = counted(dcgan.Run.save_params), counted(dcgan.Run.save_state)
{point} = deadly
'''


def calls_of_a_save(s):
    """{save point: how often a save calls it}, of a save that finds two older states."""
    calls = {}

    def counted(point, function):
        def counted_function(*args, **kwargs):
            calls[point] = calls.get(point, 0) + 1
            return function(*args, **kwargs)
        return counted_function

    with pytest.MonkeyPatch.context() as patch:
        for point in SAVE_POINTS:
            owner, name = point.rsplit('.', 1)
            owner = eval(owner, {'dcgan': dcgan, 'mx': mx, 'np': np, 'os': os, 'zipfile': zipfile})
            patch.setattr(owner, name, counted(point, getattr(owner, name)))
        around_saves(patch, lambda run, name: name == 'save_params' and calls.clear(),
                     lambda run, name: name == 'save_state' and found.update(calls))
        found = {}
        dcgan.train(s)
    return found


def test_killed_at_thirty_moments(child, tiny, tmp_path):
    """Ten of them inside a save. Every file that counts is, bit for bit, that of the run nobody killed."""
    out, whole = tmp_path / 'out', tmp_path / 'whole'
    save_points = calls_of_a_save(tiny(batch_size=50, epochs=3, out=str(tmp_path / 'counted')))
    assert save_points.keys() == set(SAVE_POINTS)
    changes = dict(batch_size=50, epochs=60, env={'OMP_NUM_THREADS': '1'})
    process = child(out=str(whole), **changes)
    assert process.communicate(timeout=1800) and process.returncode == 0
    for kill in range(30):
        inside = kill % 3 == 2
        point = SAVE_POINTS[kill // 3]
        point, most = (point, 2 * save_points[point]) if inside else ('dcgan.train_step', 6)  # an epoch has three steps
        process = child(before=DEADLY.format(seed=kill, point=point, most=most, anywhere=not inside),
                        resume='latest' if glob.glob(f'{out}/latest/state-*.npz') else '', **changes)
        outputs = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, (point, outputs)
    process = child(resume='latest', **changes)
    outputs = process.communicate(timeout=1800)
    assert process.returncode == 0, outputs
    assert same_bits(final_params(out), final_params(whole))
    twins = {name: content for name, content in contents(f'{whole}/latest').items() if name.endswith('.params')}
    assert len(twins) == 2 * 60
    found = [(path, name) for folder in names(out, 'digits_*') for name, path in
             ((name, f'{out}/{folder}/{name}') for name in names(f'{out}/{folder}', '*.params'))]
    assert len(found) >= 2 * 60
    for path, name in found:
        twin, = (twin for twin in twins if twin[:9] == name[:9] and twin[-12:] == name[-12:])
        with open(path, 'rb') as file:
            assert file.read() == twins[twin], path
    assert metrics(f'{out}/latest') == metrics(f'{whole}/latest')
    assert names(f'{out}/latest', 'state-*') == names(f'{whole}/latest', 'state-*') == [
        'state-0059-00000.npz', 'state-0060-00000.npz']
    assert names(f'{out}/latest', '*tmp*') == []


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(child, tmp_path, signum, status):
    # where the tests themselves run under nohup, SIGHUP is ignored
    process = child(epochs=1000, before='import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)')
    wait_for_line(process, 'epoch:')
    process.send_signal(signum)
    time.sleep(0.01)
    process.send_signal(signum)  # as `timeout` does: this does not end the run at once
    out, err = process.communicate(timeout=600)
    assert process.returncode == status and err == ''
    last = out.strip().splitlines()[-1]
    assert last.startswith('stopped in epoch') and "resume = 'latest'" in last
    about, _ = newest(tmp_path / 'out' / 'latest')
    assert f'epoch {about["epoch"]} after iteration {about["iteration"]};' in last
    assert os.path.basename(about['path']) in last


def test_nohup(child, tmp_path):
    """A lost terminal does not stop a run that nohup has started."""
    process = child(before='import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)', epochs=1000)
    wait_for_line(process, 'epoch: 0')
    process.send_signal(signal.SIGHUP)
    wait_for_line(process, 'epoch: 1')
    wait_for_line(process, 'epoch: 2')
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=600) and process.returncode == 143
    assert newest(tmp_path / 'out' / 'latest')[0]['epoch'] >= 2


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
    time.sleep(0.7)  # `timeout` sends each signal twice, and not so far apart
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert names(tmp_path / 'out' / 'latest', 'state*') == []


@pytest.mark.parametrize('place', ['dcgan.data.load_data', 'dcgan.make_modules'])
def test_ctrl_c_before_the_loop(child, tmp_path, place):
    process = child(before=f'''
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def wait(*args):
    print('waiting')
    while True:
        dcgan.time.sleep(0.01)
{place} = wait''')
    wait_for_line(process, 'waiting')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, '', '') and not os.path.exists(tmp_path / 'out')


def test_nothing_saved_without_check_point(child, tmp_path):
    process = child(epochs=1000, check_point=False)
    wait_for_line(process, 'epoch: 1')
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert names(tmp_path / 'out' / 'latest', '*.params') == names(tmp_path / 'out' / 'latest', 'state*') == []
    assert 'nothing was saved' in out.strip().splitlines()[-1]


def test_q_stops_one_run_and_not_the_next(tiny, monkeypatch):
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
    monkeypatch.setattr(visual, '_start_viewer', lambda out: viewers.pop(0))
    s = tiny(display=True, epochs=2)
    with pytest.raises(SystemExit) as caught:
        dcgan.train(s)
    assert caught.value.code == 130 and names(latest(s), 'state-*') == ['state-0000-00010.npz']
    dcgan.train(replace(s, resume='latest'))
    assert names(latest(s), 'state-*')[-1] == 'state-0002-00000.npz'


def test_ctrl_c_soon_after_q_does_not_end_at_once(monkeypatch):
    out, ended = io.StringIO(), []
    monkeypatch.setattr(visual, 'quit_pressed', lambda: True)
    monkeypatch.setattr(dcgan.os, '_exit', ended.append)
    stop = dcgan.Stop(out)
    assert stop.asked() and stop.asked()
    stop.handle(signal.SIGINT, None)
    assert ended == [] and out.getvalue().count('stopping') == 1 and stop.signum == signal.SIGINT


# ---------------------------------------------------------------- who reads what is printed

def assert_saved_at_the_last_line(folder):
    """The state is that of the line for which there was no reader, or of the end of the epoch that it ended."""
    about, _ = newest(folder)
    epoch, iteration = map(int, metrics(folder)[-1][:2])
    assert (about['epoch'], about['iteration']) == ((epoch, iteration) if iteration == 10 else (epoch + 1, 0))


def test_a_pipe_whose_reader_has_gone(child, tmp_path):
    process = child(epochs=1000)
    wait_for_line(process, 'epoch:')
    process.stdout.close()
    assert process.wait(timeout=600) == 141 and process.stderr.read() == ''
    assert_saved_at_the_last_line(tmp_path / 'out' / 'latest')


@pytest.mark.parametrize('first', ['reader', 'signal'])
def test_ctrl_c_ends_the_reader_too(child, tmp_path, first):
    process = child(epochs=1000)
    wait_for_line(process, 'epoch:')
    for what in ('reader', 'signal') if first == 'reader' else ('signal', 'reader'):
        if what == 'reader':
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == 130 and process.stderr.read() == ''
    assert len(names(tmp_path / 'out' / 'latest', 'state*')) > 0


def test_ctrl_c_after_the_pipe_was_found_without_a_reader(child, tmp_path):
    """Both signs of one Ctrl-C: the status is that of Ctrl-C, and nothing ends before the state is saved."""
    process = child(epochs=1000, before='''
import os, signal
write, fsync, found = os.write, os.fsync, []

def seen_write(fd, text):
    try:
        return write(fd, text)
    except BrokenPipeError:
        found.append(True)
        raise

def fsync_and_ctrl_c(fd):
    if found:
        found.clear()
        os.write = write
        signal.raise_signal(signal.SIGINT)
    fsync(fd)

os.write, os.fsync = seen_write, fsync_and_ctrl_c''')
    wait_for_line(process, 'epoch:')
    process.stdout.close()
    assert process.wait(timeout=600) == 130 and process.stderr.read() == ''
    assert_saved_at_the_last_line(tmp_path / 'out' / 'latest')


def test_tee_and_ctrl_c_in_a_shell(tmp_path):
    """`python dcgan.py | tee log`, and Ctrl-C, which goes to both."""
    settings = {**FEW, 'epochs': 1000, 'out': str(tmp_path / 'out')}
    code = f'import dcgan\n{FEW_IMAGES}\ndcgan.train(dcgan.Settings(**{settings!r}))'
    shell = subprocess.Popen(['bash', '-c', 'trap : INT; "$0" -c "$1" | tee log; exit ${PIPESTATUS[0]}', sys.executable,
                              code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                             start_new_session=True, env={**os.environ, 'PYTHONPATH': os.path.dirname(dcgan.__file__)})
    try:
        wait_for_line(shell, 'epoch:')
        os.killpg(shell.pid, signal.SIGINT)
        _, err = shell.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()
    assert shell.returncode == 130 and err == ''
    assert len(names(tmp_path / 'out' / 'latest', 'state*')) > 0


def test_no_reader_from_the_start(child, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = child(stdout=writer)
    os.close(writer)
    assert process.wait(timeout=600) == 141 and process.stderr.read() == ''
    assert not os.path.exists(tmp_path / 'out') or metrics(tmp_path / 'out' / 'latest') == []


def test_a_full_disk_behind_stdout(child, tmp_path):
    with open('/dev/full', 'w') as full:
        process = child(stdout=full, batch_size=30, epochs=2)
    assert process.wait(timeout=600) == 0 and process.stderr.read() == ''
    assert names(tmp_path / 'out' / 'latest', 'state*') == ['state-0001-00000.npz', 'state-0002-00000.npz']


# ---------------------------------------------------------------- what goes wrong while saving

def during_epoch_1(monkeypatch, begin, end):
    """Have something begin before each of the two saves of epoch 1, and end after it."""
    def when_epoch_1(function):
        # the state is saved when the next epoch is about to begin
        return lambda run, name: function() if run.epoch == {'save_params': 1, 'save_state': 2}[name] else None

    around_saves(monkeypatch, when_epoch_1(begin), when_epoch_1(end))


def assert_epoch_1_was_not_saved(s, finished, out, nets='GD'):
    """A line for each of these networks and for the state says so; what was saved before and after is as always."""
    warnings = [line for line in out.splitlines() if line.startswith('WARNING')]
    patterns = [*(f'digits_{net}_.*-0001.params is not saved' for net in nets), 'state-0002-00000.npz is not saved']
    assert len(warnings) == len(patterns) and all(map(re.search, patterns, warnings)), warnings
    folder = latest(s)
    assert names(folder, 'state-*') == ['state-0001-00000.npz', 'state-0003-00000.npz'] and not names(folder, '*.tmp*')
    (_, arrays), (_, expected) = newest(folder), newest(latest(finished))
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)
    dcgan.read_state(f'{folder}/state-0001-00000.npz')
    found = [contents(x, '*.params') for x in (folder, latest(finished))]
    found = [{name[:9] + name[-12:]: content for name, content in x.items()} for x in found]
    assert {name[-11:-7] for name in found[0]} >= {'0000', '0002'}
    assert all(found[1][name] == content for name, content in found[0].items())


@pytest.mark.parametrize('kind', ['', 'symbol.json', '0001.params'])
def test_a_full_disk(tiny, finished, capsys, monkeypatch, kind):
    """The second save fails: on a full disk, or one that lacks a hundred bytes of a file, which MXNet does not notice.

    The first stays whole, and the third succeeds.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    space = os.path.getsize(glob.glob(f'{latest(finished)}/*_G_*{kind}')[0]) - 100 if kind else 0
    s, symbols = tiny(epochs=3, batch_size=30), []

    def begin():
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))

    def end():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        symbols.append(contents(latest(s), '*symbol.json'))

    during_epoch_1(monkeypatch, begin, end)
    dcgan.train(s)
    # D's .params are smaller than G's, which the last of the three lacks a hundred bytes for
    assert_epoch_1_was_not_saved(s, finished, capsys.readouterr().out, 'G' if kind == '0001.params' else 'GD')
    assert len(symbols[0]) == 2 and symbols[0] == symbols[1] == contents(latest(s), '*symbol.json')


def test_a_folder_that_is_gone_for_a_while(tiny, finished, capsys, monkeypatch):
    s = tiny(epochs=3, batch_size=30)
    during_epoch_1(monkeypatch, lambda: os.rename(s.out, s.out + '.away'), lambda: os.rename(s.out + '.away', s.out))
    dcgan.train(s)
    assert_epoch_1_was_not_saved(s, finished, capsys.readouterr().out)


def refuse(path):
    raise PermissionError(path)


def test_old_states_that_cannot_be_removed(tiny, capsys, monkeypatch):
    monkeypatch.setattr(dcgan.os, 'remove', refuse)
    s = tiny(epochs=3, batch_size=30)
    dcgan.train(s)
    assert 'WARNING' not in capsys.readouterr().out and len(names(latest(s), 'state-*.npz')) == 3


def test_leftovers_that_cannot_be_removed(copy, monkeypatch):
    monkeypatch.setattr(dcgan.os, 'remove', refuse)
    with open(f'{latest(copy)}/state-0003-00000.npz.tmp', 'w'):  # of a run that was killed
        pass
    dcgan.train(replace(copy, epochs=4))
    assert newest(latest(copy))[0]['epoch'] == 4


def test_leftovers_of_a_killed_run_are_removed(copy):
    folder = latest(copy)
    for name in ('state-0003-00000.npz.tmp', 'gout.png.tmp', 'film.tmp.webp'):
        with open(f'{folder}/{name}', 'w'):
            pass
    dcgan.train(copy)
    assert names(folder, '*tmp*') == []


def test_divergence_stops_the_run_and_overwrites_nothing(copy):
    folder = latest(copy)
    before = {**contents(folder, '*.params'), **contents(folder, '*.npz')}
    with pytest.raises(SystemExit) as caught:
        dcgan.train(replace(copy, lr=1e30, epochs=5))
    assert all(word in caught.value.code for word in (
        'the loss is not finite', 'epoch 3', 'iteration', f'{folder}/state-0003-00000.npz', 'lr'))
    assert '\n' not in caught.value.code
    assert {**contents(folder, '*.params'), **contents(folder, '*.npz')} == before


def test_divergence_before_the_first_save(tiny):
    s = tiny(lr=1e30)
    with pytest.raises(SystemExit) as caught:
        dcgan.train(s)
    assert all(word in caught.value.code for word in ('the loss is not finite', 'epoch 0', 'nothing was saved', 'lr'))
    assert 'None' not in caught.value.code and names(latest(s), '*.params') == names(latest(s), 'state*') == []


@pytest.mark.parametrize('what', ['g1_weight', 'gbn1_moving_var', 'g1_weight_mean'])
def test_what_is_not_finite_is_not_saved(tiny, what):
    """The last step of an epoch may ruin the networks after its loss was seen."""
    s, step, steps = tiny(epochs=2, batch_size=30, coverage=True), dcgan.train_step, []

    def ruin(modG, *args):
        steps.append(0)
        found = step(modG, *args)
        if len(steps) == 10:
            arrays = {'g1_weight': modG._exec_group.param_arrays[0][0], 'g1_weight_mean': modG._updater.states[0][0],
                      'gbn1_moving_var': modG._exec_group.aux_arrays[modG._aux_names.index('gbn1_moving_var')][0]}
            arrays[what][:] = np.nan
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'train_step', ruin)
        with pytest.raises(SystemExit, match=f'{what} is not finite at epoch 1, iteration 5'):
            dcgan.train(s)
    assert names(latest(s), 'state*') == ['state-0001-00000.npz']
    assert [name[-11:] for name in names(latest(s), '*.params')] == ['0000.params'] * 2


def test_a_disk_too_full_for_the_log(tiny, capsys, monkeypatch):
    """The run goes on to its end and saves its state."""
    begin = dcgan.Run.__init__

    def begin_with_a_full_disk(run, *args, **kwargs):
        begin(run, *args, **kwargs)
        os.remove(run.log)
        os.symlink('/dev/full', run.log)

    monkeypatch.setattr(dcgan.Run, '__init__', begin_with_a_full_disk)
    s = tiny()
    dcgan.train(s)
    out = capsys.readouterr().out
    assert 'log.csv cannot be written' in out and out.splitlines()[-1].startswith('done: ')
    assert names(latest(s), 'state*') == ['state-0001-00000.npz']


# ---------------------------------------------------------------- wrong states

@pytest.mark.parametrize('changes, words', [
    (dict(ngf=8), ['ngf = 4', '8']), (dict(ndf=8), ['ndf = 4', '8']), (dict(nc=3), ['nc = 1', '3']),
    (dict(Z=9), ['Z = 8', '9']), (dict(conditional=True), ['conditional']), (dict(resume='/no'), ['/no']),
], ids=str)
def test_another_networks_state(copy, changes, words):
    before = contents(copy.out)
    with pytest.raises(SystemExit) as caught:
        dcgan.train(replace(copy, **changes))
    assert all(word in caught.value.code for word in words) and '\n' not in caught.value.code
    assert contents(copy.out) == before


def edit_state(s, change):
    """Change the newest state: `change` gets {name: array} and what the state remembers. Returns its path."""
    path = dcgan.list_states(latest(s))[0]
    about, arrays = dcgan.read_state(path)
    del about['path']
    change(arrays, about)
    np.savez(path, about=json.dumps(about), **arrays)
    return path


def test_other_settings_are_said(copy, capsys):
    dcgan.train(replace(copy, epochs=4, lr=0.001, seed=4, beta1=0.4, batch_size=25))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('WARNING')]
    assert all(said in '\n'.join(warnings) for said in (
        'lr was 0.0002 and is 0.001', 'seed was 3 and is 4', 'beta1 was 0.5 and is 0.4', 'batch_size was 30 and is 25'))
    assert not [line for line in warnings if ' was ' not in line]


def test_a_state_keeps_its_learning_rate(copy, tiny, capsys):
    """Where the settings leave it to the rule, which may have been another one."""
    dcgan.train(replace(copy, epochs=4, lr=0))
    out = capsys.readouterr().out
    assert 'WARNING' not in out and 'lr=0.0002 ' in out
    straight = tiny(batch_size=30, epochs=4)  # its lr is 0.0002
    dcgan.train(straight)
    assert same_bits(final_params(straight.out), final_params(copy.out))


def test_another_number_of_workers_is_said(copy, capsys):
    edit_state(copy, lambda arrays, about: about['settings'].update(workers=2))
    dcgan.train(replace(copy, epochs=4))
    assert 'WARNING: workers was 2 and is 1' in capsys.readouterr().out


def test_another_datasets_state(copy):
    edit_state(copy, lambda arrays, about: about['settings'].update(dataset='mnist'))
    with pytest.raises(SystemExit, match="trained with dataset = 'mnist', now it is 'digits'"):
        dcgan.train(copy)


@pytest.mark.parametrize('change', [
    lambda arrays: arrays.update(d1_weight=arrays['g1_weight']),  # a G where a D belongs
    lambda arrays: arrays.pop('g1_weight'),
    lambda arrays: arrays.pop('dbn2_moving_mean'),
    lambda arrays: arrays.pop('d5_weight_var'),
    lambda arrays: arrays.update(g1_weight_=arrays.pop('g1_weight')),
    lambda arrays: arrays.update(g1_weight=arrays['g1_weight'][:0]),
    lambda arrays: arrays.update(g1_weight=arrays['g1_weight'][0]),
    lambda arrays: arrays.update(g1_weight=arrays['g1_weight'].astype(np.int64)),
], ids=['a G for a D', 'no weight', 'no moving mean', 'no moment', 'another name', 'no device', 'no axis', 'integers'])
def test_a_state_without_the_arrays_that_were_saved(copy, capsys, change):
    path = edit_state(copy, lambda arrays, about: change(arrays))
    with pytest.raises(SystemExit) as caught:
        dcgan.train(replace(copy, resume=path))
    assert path in caught.value.code and 'is damaged' in caught.value.code and '\n' not in caught.value.code
    capsys.readouterr()
    assert dcgan.find_state(latest(copy))[0]['epoch'] == 2 and path in capsys.readouterr().out


def test_a_state_of_another_version(copy):
    path = edit_state(copy, lambda arrays, about: about.pop('losses'))
    with pytest.raises(SystemExit, match='another version') as caught:
        dcgan.train(replace(copy, resume=path))
    assert path in caught.value.code and '\n' not in caught.value.code


def test_a_state_with_an_iteration_beyond_its_epoch(copy):
    """The data may have become smaller. The epoch counts as done."""
    edit_state(copy, lambda arrays, about: about.update(iteration=1000))
    dcgan.train(replace(copy, epochs=5))
    assert metrics(latest(copy))[-1][:2] == ['4', '5']
    assert names(latest(copy), 'state*')[-1] == 'state-0005-00000.npz'


@pytest.mark.parametrize('harm', ['cut', 'flipped', 'empty', 'missing'])
def test_the_state_before_a_damaged_one_is_taken(copy, finished, capsys, harm):
    path = dcgan.list_states(latest(copy))[0]
    with open(path, 'rb') as file:
        content = file.read()
    os.remove(path)
    if harm != 'missing':
        half = len(content) // 2
        with open(path, 'wb') as file:
            file.write(content[:{'cut': half, 'flipped': half, 'empty': 0}[harm]])
            if harm == 'flipped':
                file.write(bytes([content[half] ^ 1]) + content[half + 1:])
    about, _ = dcgan.find_state(latest(copy))
    said = capsys.readouterr().out
    assert about['epoch'] == 2 and said.count('\n') == (harm != 'missing') and (path in said) == (harm != 'missing')
    dcgan.train(copy)
    assert same_bits(final_params(copy.out), final_params(finished.out))
    assert metrics(latest(copy)) == metrics(latest(finished))
    about, _ = newest(latest(copy))
    assert about['epoch'] == 3 and len(dcgan.list_states(latest(copy))) == 2


def test_no_state_that_can_be_read(copy):
    before = contents(copy.out)
    for path in dcgan.list_states(latest(copy)):
        with open(path, 'wb') as file:
            file.write(b'PK')
    with pytest.raises(SystemExit, match='no state to go on from'):
        dcgan.train(copy)
    with pytest.raises(SystemExit, match='is damaged, or no state'):
        dcgan.train(replace(copy, resume=dcgan.list_states(latest(copy))[0]))
    assert contents(copy.out).keys() == before.keys()


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_a_state_is_refused(copy, tmp_path):
    evil = Evil(str(tmp_path / 'evil'))
    for change in (lambda arrays, about: arrays.update(g1_weight=np.array([evil], dtype=object)),
                   lambda arrays, about: arrays.update(more=np.array([evil], dtype=object))):
        path = edit_state(copy, change)
        with pytest.raises(ValueError, match='is damaged, or no state'):
            dcgan.read_state(path)
        os.remove(path)
        copy_of = dcgan.list_states(latest(copy))[0]
        shutil.copy(copy_of, path)
    with open(path, 'wb') as file:
        pickle.dump(evil, file)
    with pytest.raises(ValueError, match='is damaged, or no state'):
        dcgan.read_state(path)
    assert not (tmp_path / 'evil').exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / 'evil').exists()  # the pickle would have worked


# ---------------------------------------------------------------- hostile files

HOSTILE = hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def read_or_refuse(path, content):
    """What is read of a file with such content; None where it is refused in one line."""
    with open(path, 'wb') as file:
        file.write(content)
    try:
        return dcgan.read_state(str(path))
    except ValueError as error:
        assert str(path) in str(error) and '\n' not in str(error)
        return None


@contextlib.contextmanager
def bounded_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 500e6
    finally:
        tracemalloc.stop()


@pytest.fixture(scope='module')
def original(finished):
    """The bytes of a state, and what is read of it."""
    path = dcgan.list_states(latest(finished))[0]
    with open(path, 'rb') as file:
        return file.read(), dcgan.read_state(path)


def assert_refused_or_the_same(original, path, content):
    """A changed file is refused, or its change changes nothing."""
    found = read_or_refuse(path, content)
    if found:
        (about, arrays), (expected_about, expected) = found, original[1]
        assert {**about, 'path': ''} == {**expected_about, 'path': ''} and arrays.keys() == expected.keys()
        assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_state_with_a_flipped_bit(original, tmp_path):
    """At 300 places all over the file, and at each of the last 300 bytes and of the first 100."""
    size = len(original[0])
    for place in {*range(100), *np.linspace(0, size - 1, 300).astype(int), *range(size - 300, size)}:
        content = bytearray(original[0])
        content[place] ^= 1 << place % 8
        assert_refused_or_the_same(original, tmp_path / 'file', bytes(content))


def test_a_state_that_was_cut(original, tmp_path):
    size = len(original[0])
    for end in {*range(100), *np.linspace(0, size - 1, 100).astype(int), *range(size - 100, size)}:
        assert read_or_refuse(tmp_path / 'file', original[0][:end]) is None


@HOSTILE
@given(content=strategies.binary(max_size=300))
def test_random_bytes(tmp_path, content):
    with bounded_memory():
        assert read_or_refuse(tmp_path / 'file', content) is None


@HOSTILE
@given(data=strategies.data())
def test_a_state_with_changed_bytes(original, tmp_path, data):
    """Names, shapes and lengths are in the first bytes of each array, and at the end."""
    content = bytearray(original[0])
    start = data.draw(strategies.sampled_from([match.start() for match in re.finditer(b'PK', original[0])]))
    for _ in range(data.draw(strategies.integers(1, 8))):
        place = start + data.draw(strategies.integers(0, 250))
        content[place % len(content)] = data.draw(strategies.integers(0, 255))
    end = data.draw(strategies.one_of(strategies.just(len(content)), strategies.integers(0, len(content))))
    with bounded_memory():
        assert_refused_or_the_same(original, tmp_path / 'file', bytes(content[:end]))


def test_an_array_that_claims_to_be_large(original, tmp_path):
    """A damaged header asks for four gigabytes."""
    content = bytearray(original[0])
    header = content.index(b"'shape': (1, ")
    content[header + 9:header + 20] = b'(1000000000'
    with bounded_memory():
        assert read_or_refuse(tmp_path / 'file', bytes(content)) is None


@pytest.mark.parametrize('content', ['', '[', '[' * 100_000, '{"epoch": 1e999}', 'null', '[]', '3', '{}'])
def test_a_state_with_strange_json(tmp_path, content):
    path = tmp_path / 'state-0003-00000.npz'
    np.savez(path, about=content)
    with pytest.raises(ValueError) as caught:
        dcgan.read_state(str(path))
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)
