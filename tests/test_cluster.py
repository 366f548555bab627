"""Several devices, and several machines (here: processes on the loopback interface)."""
import contextlib
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
from conftest import ROOT, TINY, newest, read_state, state

import dcgan

mx = dcgan.mx


@pytest.mark.parametrize('kvstore', ['local', 'device'])
def test_two_devices_equal_the_textbook_with_two_half_batches(few, kvstore):
    """To the last bit: a sum of two has one order. With more devices the order of the sum is MXNet's."""
    X = data.get_digits(labels=True)[0].astype(np.float32) / (255.0 / 2) - 1.0
    expected, _ = textbook.train(X[:115], 12, 4, 4, 1, 8, 10, 3, parts=2, d1_bias=True, pos_label=0.9, lr_steady=12)
    s = few(ctx=(mx.cpu(0), mx.cpu(1)), kvstore=kvstore)
    dcgan.train(s)
    found = state(s.out)
    assert [name for name, array in expected.items() if found[name] != array.tobytes()] == []


@contextlib.contextmanager
def cluster(folder, code='', **changes):
    """A scheduler, a server and two workers, `number` 0 to 3, which all run `code` first; 15 iterations an epoch.

    At the end, which may be a failure, they are killed: what a launcher does.
    """
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = str(sock.getsockname()[1])
    env = {**os.environ, 'PYTHONPATH': ROOT, 'DMLC_PS_ROOT_URI': 'localhost', 'DMLC_PS_ROOT_PORT': port,
           'DMLC_INTERFACE': 'lo', 'DMLC_NUM_SERVER': '1', 'DMLC_NUM_WORKER': '2', 'PORT': port}
    settings = {**TINY, 'batch_size': 50, 'conditional': True, 'out': 'out', 'kvstore': 'dist_sync', **changes}
    code = f"""import dcgan, sys
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


def printed_by(processes):
    """What they print until they end, all of them with status 0."""
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    return [out for out, _ in outputs]


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
    """The folder of two epochs of two workers, and what the four processes have printed."""
    folder = tmp_path_factory.mktemp('whole')
    with cluster(folder, RECORD, epochs=2) as processes:
        return folder, printed_by(processes)


def test_two_workers(whole):
    """Both have the same weights after every step, and latents and images of their own. The first one alone speaks."""
    folder, outputs = whole
    records = [[line.split() for line in open(folder / f'worker{number}.txt')] for number in (2, 3)]
    assert [line[0] for line in records[0]] == [line[0] for line in records[1]] and len(records[0]) == 30
    for part in slice(1, 51), slice(51, 101):  # of 1,500 images
        assert len({x for record in records for line in record[:15] for x in line[part]}) == 1500
    printed, = filter(None, outputs)
    assert [printed.count(words) for words in ('settings: ', 'epoch: 1 iter: 10 metric', 'done; ')] == [1, 1, 1]
    assert len(list(folder.glob('out/*'))) == 1


def test_two_workers_stopped_and_resumed(whole, tmp_path):
    """All processes get the signal, as launchers send it; the first worker saves and ends, the others go on."""
    with cluster(tmp_path, epochs=1000) as processes:
        while not list(tmp_path.glob('out/*/state.npz')):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        for process in processes:
            process.send_signal(signal.SIGINT)
        while all(process.poll() is None for process in processes[2:]):
            time.sleep(0.05)
        first, = [process for process in processes[2:] if process.poll() is not None]  # not always processes[2]
        out, err = first.communicate()
    assert first.returncode == 130 and 'stopped in epoch' in out, err
    epoch = read_state(newest(tmp_path / 'out'))[0]['epoch']
    with cluster(tmp_path, resume='latest', epochs=epoch + 1) as processes:
        printed_by(processes)
    if epoch == 1:
        assert state(tmp_path / 'out') == state(whole[0] / 'out')


def test_a_mistake_in_a_worker_ends_it_at_once(tmp_path):
    """Python's own end would wait for the others; the launcher ends these."""
    with cluster(tmp_path, 'if number == 3: dcgan.train_step = None') as processes:
        _, error = processes[3].communicate(timeout=100)
        assert [process.poll() for process in processes] == [None, None, None, 1]
    assert "TypeError: 'NoneType' object is not callable" in error


@pytest.mark.parametrize('variables, changes, message', [
    ({'ROLE': ''}, {}, "DMLC_ROLE='';"), ({'PS_ROOT_PORT': 'x'}, {}, "DMLC_PS_ROOT_PORT='x';"),
    ({'NUM_SERVER': '-1'}, {}, "DMLC_NUM_SERVER='-1';"), ({}, dict(ctx=mx.gpu(0)), '^dist_sync$'),
    ({}, dict(ctx=[mx.gpu(0), mx.gpu(1)]), '^dist_device_sync$')], ids=str)
def test_variables(tiny, monkeypatch, variables, changes, message):
    """What is wrong is said before MXNet's store is made, which waits for the others; here it says its kind."""
    monkeypatch.setattr(mx.kv, 'create', lambda kind: sys.exit(kind))
    monkeypatch.setattr(data, 'ROLE', 'worker')
    right = dict(ROLE='worker', PS_ROOT_URI='127.0.0.1', PS_ROOT_PORT='9', NUM_SERVER='1', NUM_WORKER='1')
    for name, value in {**right, **variables}.items():
        monkeypatch.setenv(f'DMLC_{name}', value)
    with pytest.raises(SystemExit, match=message):
        dcgan.train(tiny(kvstore='dist_sync', **changes))
