"""Several devices, and several machines (here: processes on the loopback interface)."""
import contextlib
import glob
import os
import signal
import socket
import subprocess
import sys
import time

import data

import numpy as np
import pytest
import textbook
from conftest import ROOT, TINY, cases, newest, read_state, state

import dcgan

mx = dcgan.mx


def test_two_devices_equal_the_textbook_with_two_half_batches(tiny):
    """To the last bit: a sum of two has one order. With more devices the order of the sum is MXNet's."""
    X = data.get_digits()[0].astype(np.float32) / (255.0 / 2) - 1.0
    expected, _ = textbook.train(X, 5, 4, 4, 1, 8, 300, 3, parts=2, d1_bias=True, pos_label=0.9)
    for kvstore in 'local', 'device':
        s = tiny(ctx=(mx.cpu(0), mx.cpu(1)), kvstore=kvstore, batch_size=300)
        dcgan.train(s)
        found = state(s.out)
        assert [name for name, array in expected.items() if found[name] != array.tobytes()] == [], kvstore


@contextlib.contextmanager
def cluster(folder, code='', **changes):
    """A scheduler, a server and two workers, `number` 0 to 3, which all run `code` first; 15 iterations an epoch. At
    the end, which may be a failure, they are killed: what a launcher does."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': ROOT, 'DMLC_PS_ROOT_URI': 'localhost', 'DMLC_PS_ROOT_PORT': str(port),
           'DMLC_INTERFACE': 'lo', 'DMLC_NUM_SERVER': '1', 'DMLC_NUM_WORKER': '2', 'PORT': str(port)}
    settings = {**TINY, 'batch_size': 50, 'epochs': 2, 'out': str(folder / 'out'), 'kvstore': 'dist_sync', **changes}
    code = f"""import dcgan, glob, os, sys, time
number, settings = int(sys.argv.pop()), dcgan.Settings(**{settings!r})
{code}
dcgan.Settings = lambda: settings
dcgan.main()"""
    processes = [subprocess.Popen([sys.executable, '-c', code, str(number)], env={**env, 'DMLC_ROLE': role}, cwd=folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for number, role in enumerate(['scheduler', 'server', 'worker', 'worker'])]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(processes):
    """Their exit statuses and what they have printed, [(stdout, stderr)]."""
    outputs = [process.communicate(timeout=100) for process in processes]
    return [process.returncode for process in processes], outputs


RECORD = '''
import hashlib
step, record = dcgan.train_step, open(f'worker{number}.txt', 'w')
def recorded(modG, modD, modDx, rbatch, batch, *labels):
    found = step(modG, modD, modDx, rbatch, batch, *labels)
    weights = [copies[0] for mod in (modG, modD) for copies in mod._exec_group.param_arrays]
    all_weights = b''.join(weight.asnumpy().tobytes() for weight in weights)
    for array in [all_weights, *rbatch.data[0].asnumpy(), *batch.data[0].asnumpy()]:
        print(hashlib.sha256(array).hexdigest(), end=' ', file=record)
    print(file=record, flush=True)
    return found
dcgan.train_step = recorded
'''


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of two epochs of two workers, conditional, and the processes' statuses and outputs."""
    folder = tmp_path_factory.mktemp('whole')
    with cluster(folder, RECORD, conditional=True) as processes:
        return folder, *finish(processes)


def test_two_workers(whole):
    """Both have the same weights after every step, and latents and images of their own. The first one alone speaks."""
    folder, statuses, outputs = whole
    assert statuses == [0] * 4, outputs
    records = [[line.split() for line in open(folder / f'worker{number}.txt')] for number in (2, 3)]
    assert [line[0] for line in records[0]] == [line[0] for line in records[1]] and len(records[0]) == 30
    for part in slice(1, 51), slice(51, 101):  # of 1,500 images
        assert len({x for record in records for line in record[:15] for x in line[part]}) == 1500
    (printed,) = [out for out, _ in outputs if out]
    assert [printed.count(words) for words in ('settings: ', 'epoch: 1 iter: 10 metric', 'done; ')] == [1, 1, 1]
    assert len(glob.glob(f'{folder}/out/*')) == len(glob.glob(f'{folder}/out/digits_*/log.csv')) == 1


def first_to_end(processes):
    """The first worker to end, which need not be the first that was started; then the launcher ends the others."""
    while all(process.poll() is None for process in processes[2:]):
        time.sleep(0.05)
    time.sleep(0.5)
    (first, *_) = [process for process in processes[2:] if process.poll() is not None]
    for process in processes:
        process.kill()
    return first


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGUSR1])
def test_two_workers_stopped_and_resumed(whole, tmp_path, signum):
    """All processes get the signal, as launchers send it; the first worker saves and ends, the others go on."""
    with cluster(tmp_path, epochs=1000, conditional=True) as processes:
        while not glob.glob(f'{tmp_path}/out/*/state.npz'):
            assert all(process.poll() is None for process in processes), finish(processes)
            time.sleep(0.05)
        for process in processes:
            process.send_signal(signum)
        first = first_to_end(processes)
        out, err = first.communicate()
    assert first.returncode == 128 + signum and 'stopped in epoch' in out, err
    epoch = read_state(newest(tmp_path / 'out'))[0]['epoch']
    with cluster(tmp_path, resume='latest', conditional=True, epochs=epoch + 1) as processes:
        statuses, outputs = finish(processes)
    assert statuses == [0] * 4, outputs
    if epoch == 1:
        assert state(tmp_path / 'out') == state(whole[0] / 'out')


def test_a_reader_that_has_gone(tmp_path):
    with cluster(tmp_path, epochs=1000) as processes:
        for process in processes[2:]:
            process.stdout.close()
            process.stdout = None
        assert first_to_end(processes).returncode == 128 + signal.SIGPIPE
    assert read_state(newest(tmp_path / 'out'))


@cases('resume, code, words', {
    'no state': ('latest', 'settings.out = "nowhere"', 'resume'),
    'not finite': ('', 'settings.lr = 1e30', 'is not finite')})
def test_workers_that_cannot_go_on(whole, tmp_path, resume, code, words):
    """The first one says why in one line, and ends at once; the launcher ends the others."""
    with cluster(tmp_path, code, resume=resume, epochs=3, conditional=True) as processes:
        first = first_to_end(processes)
        _, error = first.communicate()
    assert first.returncode == 1 and words in error and error.count('\n') == 1, error


def test_a_mistake_in_a_worker_ends_it_at_once(tmp_path):
    """Python's own end would wait for the others; the launcher ends these."""
    with cluster(tmp_path, 'if number == 3: dcgan.train_step = None') as processes:
        statuses, ((_, err),) = finish(processes[3:])
        assert [process.poll() for process in processes[:3]] == [None] * 3
    assert statuses == [1] and "TypeError: 'NoneType' object is not callable" in err


@pytest.mark.parametrize('variables, changes, message', [
    *[({name: value}, {}, f'DMLC_{name}={value!r}; README[^\n]*$') for name, value in [
        ('ROLE', ''), ('PS_ROOT_URI', ''), ('PS_ROOT_PORT', 'x'), ('NUM_WORKER', ''), ('NUM_SERVER', '-1')]],
    ({}, dict(ctx=mx.gpu(0)), '^dist_sync$'), ({}, dict(ctx=[mx.gpu(0), mx.gpu(1)]), '^dist_device_sync$')], ids=str)
def test_variables(tiny, monkeypatch, variables, changes, message):
    """What is wrong is said before MXNet's store is made, which waits for the others; here it says its kind."""
    monkeypatch.setattr(mx.kv, 'create', lambda kind: sys.exit(kind))
    monkeypatch.setattr(data, 'ROLE', 'worker')
    right = dict(ROLE='worker', PS_ROOT_URI='127.0.0.1', PS_ROOT_PORT='9', NUM_SERVER='1', NUM_WORKER='1')
    for name, value in {**right, **variables}.items():
        monkeypatch.setenv(f'DMLC_{name}', value)
    with pytest.raises(SystemExit, match=message):
        dcgan.train(tiny(**{'kvstore': 'dist_sync', **changes}))
