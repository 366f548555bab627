"""Several devices, and several machines (here: processes on loopback)."""
import os
import socket
import time

import data

import numpy as np
import pytest
import textbook
from conftest import final_params, same_bits

import dcgan

mx = dcgan.mx
TWO = [mx.cpu(0), mx.cpu(1)]


# ---------------------------------------------------------------- several devices

@pytest.mark.parametrize('kvstore', ['local', 'device'])
def test_two_devices_equal_the_textbook_with_two_half_batches(tiny, kvstore):
    """To the last bit: a sum of two has one order. With more devices the order of the sum is MXNet's."""
    s = tiny(ctx=TWO, kvstore=kvstore, batch_size=300, epochs=2)
    dcgan.train(s)
    X = data.get_digits()[0].astype(np.float32) / (255.0 / 2) - 1.0
    expected, _ = textbook.train(X, 5, 4, 4, 1, 8, 300, 3, epochs=2, parts=2)
    found = {name[4:]: array for arrays in final_params(s.out).values() for name, array in arrays.items()}
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []
    assert expected['g1_weight'].tobytes() != textbook.train(X, 5, 4, 4, 1, 8, 300, 3, epochs=2)[0][
        'g1_weight'].tobytes()  # BatchNorm sees half batches


def test_two_devices_resumed(tiny):
    s = tiny(ctx=TWO, batch_size=300, epochs=2)
    dcgan.train(s)
    other = dcgan.dataclasses.replace(s, out=s.out + '2', epochs=1)
    dcgan.train(other)
    dcgan.train(dcgan.dataclasses.replace(other, epochs=2, resume='latest'))
    assert same_bits(final_params(s.out), final_params(other.out))
    (_, first), (_, second) = (dcgan.find_state(f'{x.out}/latest') for x in (s, other))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert len(first['gbn1_moving_mean']) == 2  # each device's


# ---------------------------------------------------------------- several machines

@pytest.fixture
def cluster(child, tmp_path):
    """Start a scheduler, a server and workers; returns their processes by name."""
    def start(workers=2, before='', roles=('scheduler', 'server', 'worker'), **changes):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        env = {'DMLC_PS_ROOT_URI': '127.0.0.1', 'DMLC_PS_ROOT_PORT': str(port), 'DMLC_INTERFACE': 'lo',
               'DMLC_NUM_SERVER': '1', 'DMLC_NUM_WORKER': str(workers), 'PS_HEARTBEAT_INTERVAL': '1',
               'OMP_NUM_THREADS': '1'}
        before = f'dcgan.DEAD, dcgan.ALONE = 6, 60\n{before}'
        return [child(before=before, env={**env, 'DMLC_ROLE': role}, kvstore='dist_sync',
                      **{'batch_size': 150, **changes})
                for role in roles for _ in range(workers if role == 'worker' else 1)]
    return start


RECORD = '''
import hashlib, os
step = dcgan.train_step
def recorded(modG, modD, modDx, rbatch, batch, *labels):
    found = step(modG, modD, modDx, rbatch, batch, *labels)
    weights = hashlib.sha256(b''.join(copies[0].asnumpy().tobytes() for mod in (modG, modD)
                                      for copies in mod._exec_group.param_arrays)).hexdigest()
    latent = hashlib.sha256(rbatch.data[0].asnumpy().tobytes()).hexdigest()
    images = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in batch.data[0].asnumpy()]
    with open(f'worker{os.getpid()}.txt', 'a') as file:
        print(weights, latent, *images, file=file)
    return found
dcgan.train_step = recorded
'''


def finish(processes, timeout=400):
    ends = time.time() + timeout
    return [process.communicate(timeout=max(1, ends - time.time())) for process in processes]


def wait_for_checkpoint(processes, tmp_path):
    while not list((tmp_path / 'out').glob('latest/state-*.npz')):
        time.sleep(0.1)
        assert all(process.poll() is None for process in processes), finish(processes)


def workers_end_with(message, processes):
    for process, (_, err) in list(zip(processes, finish(processes)))[2:]:
        assert process.returncode == 1 and message in err and err.count('\n') == 1, err


def test_two_workers(cluster, tmp_path):
    processes = cluster(before=RECORD, epochs=2)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0] * 4, outputs
    records = [[line.split() for line in open(tmp_path / name)] for name in os.listdir(tmp_path) if 'worker' in name]
    assert len(records) == 2 and len(records[0]) == len(records[1]) == 10  # 750 images each, two epochs
    assert [line[0] for line in records[0]] == [line[0] for line in records[1]]  # the same weights after every step
    assert all(a[1] != b[1] for a, b in zip(*records))  # latents of their own
    shares = [{image for line in record[:5] for image in line[2:]} for record in records]
    assert len(shares[0]) == len(shares[1]) == 750 and not shares[0] & shares[1]
    assert [('done: ' in out, ' parameters' in out, 'settings' in out) for out, _ in outputs[2:]].count(
        (True, True, True)) == 1
    assert sum(out == '' for out, _ in outputs) == 3  # rank 0 alone has something to say
    assert len(list((tmp_path / 'out').glob('digits_*/log.csv'))) == 1


def test_two_workers_with_unequal_shares(cluster, tmp_path):
    """As the parts of a .rec may be: the epoch ends when all have seen theirs."""
    finish(cluster(before=RECORD + '''
def unequal(s, rank, workers):
    X, _, y, _ = dcgan.data.get_digits(labels=True)
    return 'digits', dcgan.data.PixelIter(X[:600 + 450 * rank], y[:600 + 450 * rank], 150), None
dcgan.data.load_data = unequal
''', epochs=2))
    records = [len(list(open(tmp_path / name))) for name in os.listdir(tmp_path) if 'worker' in name]
    assert records == [14, 14]  # 4 and 7 batches


def test_two_workers_stopped_and_resumed(cluster, tmp_path):
    finish(cluster(epochs=3, out=str(tmp_path / 'whole')))
    processes = cluster(epochs=3, before='''
import signal, time
step, steps = dcgan.train_step, []
def stopped(modG, *args):
    steps.append(0)
    if len(steps) == 8 and modG._kvstore.rank == 1:  # one of them is enough
        dcgan.os.kill(dcgan.os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return step(modG, *args)
dcgan.train_step = stopped
''')
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0, 143, 143], outputs
    assert dcgan.find_state(str(tmp_path / 'out' / 'latest'))[0]['iteration'] == 8 - 5
    processes = cluster(epochs=3, resume='latest')
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert same_bits(final_params(tmp_path / 'out'), final_params(tmp_path / 'whole'))


def test_workers_that_find_different_states(cluster, tiny, tmp_path):
    """As where `out` is another folder for each."""
    dcgan.train(tiny(batch_size=150, epochs=1))
    state, = (tmp_path / 'out').glob('latest/state-*.npz')
    code = f"""
if dcgan.os.environ['DMLC_ROLE'] == 'worker':
    find, dcgan.DEAD = dcgan.find_state, 30
    def found(path):
        try:
            open({str(tmp_path / 'first')!r}, 'x')
        except FileExistsError:
            raise ValueError('there is none')
        return find(path)
    dcgan.find_state = found
"""
    workers_end_with('out must be one folder for all', cluster(before=code, resume='latest', epochs=2))


def test_workers_with_different_settings(cluster):
    """Each would train weights of its own, and nobody would notice."""
    workers_end_with('the workers have different settings', cluster(before="""
train = dcgan.train
dcgan.train = lambda s: train(dcgan.dataclasses.replace(s, seed=dcgan.os.getpid()))
"""))


def test_several_gpus_in_a_worker(monkeypatch):
    monkeypatch.setattr(data, 'ROLE', 'worker')
    for name in ('DMLC_PS_ROOT_PORT', 'DMLC_NUM_WORKER', 'DMLC_NUM_SERVER', 'DMLC_PS_ROOT_URI'):
        monkeypatch.setenv(name, '1')
    monkeypatch.setenv('DMLC_ROLE', 'worker')
    kinds = []

    def create(kind):
        kinds.append(kind)
        raise KeyboardInterrupt

    monkeypatch.setattr(mx.kv, 'create', create)
    monkeypatch.setattr(dcgan.threading.Thread, 'start', lambda self: None)  # it would end this process
    for ctx in ([mx.gpu(0)], [mx.gpu(0), mx.gpu(1)]):
        with pytest.raises(KeyboardInterrupt):
            dcgan.Cluster(dcgan.Settings(kvstore='dist_sync', ctx=ctx))
    assert kinds == ['dist_sync', 'dist_device_sync']


@pytest.mark.parametrize('victim', [3, 1], ids=['worker', 'server'])
def test_a_process_that_dies_ends_the_others(cluster, tmp_path, victim):
    processes = cluster(epochs=1000)
    wait_for_checkpoint(processes, tmp_path)
    processes[victim].kill()
    outputs = finish(processes, 60)
    for process, (_, err) in zip(processes, outputs):
        if process is not processes[victim]:
            assert process.returncode == 1, (process.returncode, err)
            assert 'a process of the cluster has died' in err and err.count('dcgan.py:') == 1
    dcgan.find_state(str(tmp_path / 'out' / 'latest'))


def test_a_mistake_in_a_worker_ends_the_others(cluster):
    """Python's own end would wait for them, with heartbeats all the while."""
    processes = cluster(epochs=1000, before='''
step, steps = dcgan.train_step, []
def mistaken(modG, *args):
    steps.append(0)
    if len(steps) == 3 and modG._kvstore.rank == 1:
        raise RuntimeError('a mistake')
    return step(modG, *args)
dcgan.train_step = mistaken
''')
    outputs = finish(processes, 60)
    assert [process.returncode for process in processes] == [1] * 4, outputs
    assert sum('RuntimeError: a mistake' in err for _, err in outputs) == 1


def test_a_worker_without_a_scheduler_says_so(cluster):
    process, = cluster(workers=1, roles=['worker'], before='dcgan.ALONE = 3')
    (_, err), = finish([process], 60)
    assert process.returncode == 1 and 'the cluster is not complete after 3 s' in err


@pytest.mark.parametrize('env, word', [
    ({'DMLC_PS_ROOT_URI': ''}, 'DMLC_PS_ROOT_URI'), ({'DMLC_PS_ROOT_PORT': 'x'}, 'DMLC_PS_ROOT_PORT'),
    ({'DMLC_NUM_WORKER': ''}, 'DMLC_NUM_WORKER'), ({'DMLC_NUM_SERVER': '-1'}, 'DMLC_NUM_SERVER'),
    ({'DMLC_ROLE': 'boss'}, 'DMLC_ROLE'), ({'kvstore': 'device'}, "kvstore = 'device'")], ids=str)
def test_wrong_variables(child, env, word):
    right = {'DMLC_ROLE': 'worker', 'DMLC_PS_ROOT_URI': '127.0.0.1', 'DMLC_PS_ROOT_PORT': '9', 'DMLC_NUM_SERVER': '1',
             'DMLC_NUM_WORKER': '1'}
    process = child(kvstore=env.pop('kvstore', 'dist_sync'), env={**right, **env})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and word in err and err.count('\n') == 1
