"""A run that cannot be lost: resuming, killing, full disks, wrong files."""
import csv
import glob
import json
import os
import resource
import shutil
import signal
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies

import dcgan
from conftest import final_params, same_bits, stop_after, wait_for_line

mx = dcgan.mx


def names(out, pattern):
    return sorted(os.path.basename(path) for path in glob.glob(os.path.join(out, pattern)))


def rows(out):
    path, = glob.glob(os.path.join(out, '*.csv'))
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of three epochs of five iterations that nobody stopped."""
    out = str(tmp_path_factory.mktemp('finished'))
    s = dcgan.Settings(dataset='digits', ngf=4, ndf=4, Z=8, batch_size=300, epochs=3, seed=3, display=False,
                       coverage=False, out=out)
    dcgan.train(s)
    return s


@pytest.fixture
def copy(finished, tmp_path):
    """Settings of that run in a folder of its own."""
    out = str(tmp_path / 'copy')
    shutil.copytree(finished.out, out)
    return dcgan.dataclasses.replace(finished, out=out, resume='latest')


# ---------------------------------------------------------------- resuming

@pytest.mark.parametrize('conditional', [False, True])
def test_stopped_after_every_iteration_in_turn(tiny, conditional):
    s = tiny(batch_size=300, epochs=3, conditional=conditional)
    dcgan.train(s)
    other = dcgan.dataclasses.replace(s, out=s.out + '2')
    for _ in range(15):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 1)
            with pytest.raises(SystemExit) as caught:
                dcgan.train(other)
        assert caught.value.code == 143
        other = dcgan.dataclasses.replace(other, resume='latest')
    dcgan.train(other)
    assert same_bits(final_params(s.out), final_params(other.out))
    assert names(other.out, '*iter*.params') == []  # superseded
    states = [dcgan.load_arrays(sorted(glob.glob(f'{folder}/*.states'))[-1]) for folder in (s.out, other.out)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].tobytes() == states[1][name].tobytes() for name in states[0])
    assert states[0]['G.count'] == [15] and states[0]['D.count'] == [15]


@pytest.mark.parametrize('steps', [7, 10])
def test_the_csv_goes_on(tiny, finished, steps):
    """Also between two lines: the metrics of the first line after it are of all its iterations."""
    other = tiny(batch_size=300, epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(SystemExit):
            dcgan.train(other)
    with open(glob.glob(f'{other.out}/*.csv')[0], 'a') as file:
        file.write('1,5,')  # what a full disk has left of a row
    dcgan.train(dcgan.dataclasses.replace(other, resume='latest'))
    found, expected = ([[row[name] for name in ('epoch', 'iteration', 'facc', 'fentropy_G', 'fentropy_D')]
                        for row in rows(out)] for out in (other.out, finished.out))
    assert found == expected and len(found) == 3
    seconds = [float(row['seconds']) for row in rows(other.out)]
    assert seconds == sorted(seconds)


def test_more_epochs_after_the_end(copy, tiny):
    dcgan.train(dcgan.dataclasses.replace(copy, epochs=4))
    straight = tiny(batch_size=300, epochs=4)
    dcgan.train(straight)
    assert same_bits(final_params(straight.out), final_params(copy.out))


def test_an_older_checkpoint_begins_a_run_of_its_own(copy):
    before = {name: open(os.path.join(copy.out, name), 'rb').read() for name in names(copy.out, 'digits*')}
    old = os.path.join(copy.out, names(copy.out, '*-0000.json')[0])
    newest = final_params(copy.out)
    with pytest.raises(SystemExit, match='is missing'):  # the state of the third newest is not kept
        dcgan.train(dcgan.dataclasses.replace(copy, resume=old))
    dcgan.train(dcgan.dataclasses.replace(copy, resume=old.replace('-0000.json', '-0001.json')))
    for name, content in before.items():
        assert open(os.path.join(copy.out, name), 'rb').read() == content
    assert len(names(copy.out, '*.csv')) == 2 and same_bits(final_params(copy.out), newest)


def test_mxnet_loads_the_files(finished):
    prefix = os.path.join(finished.out, names(finished.out, 'digits_G*-symbol.json')[0][:-len('-symbol.json')])
    latent = mx.nd.array(dcgan.fixed_latents(finished, 300)[0].reshape(300, 8, 1, 1))
    mod = mx.mod.Module.load(prefix, 2, data_names=('rand',), label_names=None)
    mod.bind([('rand', latent.shape)], for_training=False)
    mod.forward(mx.io.DataBatch([latent]), is_train=False)
    block = mx.gluon.SymbolBlock.imports(f'{prefix}-symbol.json', ['rand'], f'{prefix}-0002.params')
    assert np.array_equal(mod.get_outputs()[0].asnumpy(), block(latent).asnumpy())
    mx.mod.Module.load(prefix.replace('_G_', '_D_'), 2, label_names=('label',))


def test_disk_use_is_bounded(finished):
    assert len(names(finished.out, '*_G_*.params')) == len(names(finished.out, '*_D_*.params')) == 3
    assert [name[-11:] for name in names(finished.out, '*.states')] == ['0001.states', '0002.states']
    assert names(finished.out, '*.tmp') == []


def test_the_moving_averages_are_those_of_the_last_step(finished):
    """Read too early they are what they were at the start: 0 and 1."""
    arrays = final_params(finished.out)['G']
    assert all(np.any(arrays[name] != ('var' in name)) for name in arrays if 'moving' in name)


# ---------------------------------------------------------------- killing

SAVE_POINTS = {'os.replace': 6, 'flush': 7, 'sha256': 6, 'load_arrays': 3, 'json.dump': 1, 'mx.nd.save': 3}
DEADLY = '''
import random, threading
rng, saving, calls = random.Random({seed}), [], []
count, save, function, kill = rng.randint(1, {most}), dcgan.save, dcgan.{point}, lambda: dcgan.os.kill(dcgan.os.getpid(), 9)

def counted_save(*args, **kwargs):
    saving.append(True)
    save(*args, **kwargs)
    saving.clear()

def deadly(*args, **kwargs):
    if saving or {anywhere}:
        calls.append(0)
    if len(calls) == count:
        threading.Timer(rng.uniform(0, 0.1), kill).start() if {anywhere} else kill()
    return function(*args, **kwargs)

dcgan.save, dcgan.{point} = counted_save, deadly
'''


def test_killed_at_thirty_moments(child, tmp_path):
    """Ten of them inside a save. Every checkpoint that counts is, bit for bit, that of the run nobody killed."""
    out, whole = tmp_path / 'out', tmp_path / 'whole'
    changes = dict(batch_size=500, epochs=60, env={'OMP_NUM_THREADS': '1'})
    process = child(out=str(whole), **changes)
    assert process.communicate(timeout=900) and process.returncode == 0
    for kill in range(30):
        point, calls = list(SAVE_POINTS.items())[kill // 3 % 6]
        point, most = (point, 2 * calls) if kill % 3 == 2 else ('train_step', 6)  # an epoch has three steps
        process = child(before=DEADLY.format(seed=kill, point=point, most=most, anywhere=kill % 3 != 2),
                        resume='latest' if dcgan.checkpoints(str(out)) else '', **changes)
        outputs = process.communicate(timeout=900)
        assert process.returncode == -signal.SIGKILL, outputs
    process = child(resume='latest', **changes)
    assert process.communicate(timeout=900) and process.returncode == 0
    assert same_bits(final_params(out), final_params(whole))
    for path in glob.glob(f'{out}/digits_?_*.params'):
        twin, = glob.glob(f'{whole}/digits_{os.path.basename(path)[7]}_*{path[-12:]}')
        assert open(path, 'rb').read() == open(twin, 'rb').read(), path


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(child, tmp_path, signum, status):
    process = child(epochs=1000)
    wait_for_line(process, 'epoch:')
    process.send_signal(signum)
    time.sleep(0.01)
    process.send_signal(signum)  # as `timeout` does: this is no second wish
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err == ''
    last = out.strip().splitlines()[-1]
    assert last.startswith('stopped in epoch') and "resume = 'latest'" in last
    manifest = dcgan.find_checkpoint('latest', str(tmp_path / 'out'))
    assert f'epoch {manifest["epoch"]} after iteration {manifest["iteration"]}' in last and manifest['path'] in last


def test_a_second_signal_stops_at_once(child):
    """Also while the main thread is in a call that does not return, as MXNet's may: no Python handler runs then."""
    process = child(before="""
mutex, lock = dcgan.ctypes.create_string_buffer(64), dcgan.ctypes.CDLL(None).pthread_mutex_lock
dcgan.train_step = lambda *args: lock(mutex) or print('locked') or lock(mutex)""")
    wait_for_line(process, 'locked')
    process.send_signal(signal.SIGINT)
    wait_for_line(process, 'stopping')
    time.sleep(0.7)  # what comes within half a second is the same wish
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_nothing_saved_without_check_point(child, tmp_path):
    process = child(epochs=1000, check_point=False)
    wait_for_line(process, 'epoch:')
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and not glob.glob(str(tmp_path / 'out' / '*.params'))
    assert 'nothing was saved' in out.strip().splitlines()[-1]


# ---------------------------------------------------------------- what goes wrong while saving

def test_a_full_disk(tiny, capsys):
    """The second save fails; the first stays whole, and the third succeeds."""
    s, save, saves = tiny(epochs=3, batch_size=300), dcgan.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_disk(*args, **kwargs):
        saves.append(0)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'save', full_disk)
        dcgan.train(s)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('WARNING')]
    assert len(warnings) == 1 and 'epoch 1 not saved' in warnings[0]
    assert [manifest['epoch'] for manifest in dcgan.checkpoints(s.out)] == [2, 0] and names(s.out, '*.tmp') == []
    for manifest in dcgan.checkpoints(s.out):
        dcgan.whole(manifest, ['_G_', '_D_', '.states'])


def test_a_folder_that_is_gone_for_a_while(tiny, capsys):
    s, save, saves = tiny(epochs=3, batch_size=300), dcgan.save, []

    def gone(*args, **kwargs):
        saves.append(0)
        if len(saves) == 2:
            os.rename(s.out, s.out + '.away')
        save(*args, **kwargs)
        if len(saves) == 2:
            os.rename(s.out + '.away', s.out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'save', gone)
        dcgan.train(s)
    assert 'epoch 1 not saved' in capsys.readouterr().out
    assert [manifest['epoch'] for manifest in dcgan.checkpoints(s.out)] == [2, 0]


def test_old_files_that_cannot_be_removed(tiny, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(dcgan.os, 'remove', refuse)
    s = tiny(epochs=3, batch_size=300)
    dcgan.train(s)
    assert 'WARNING' not in capsys.readouterr().out and len(names(s.out, '*.states')) == 3


def test_divergence_stops_the_run_and_overwrites_nothing(copy, capsys):
    before = {name: open(os.path.join(copy.out, name), 'rb').read() for name in names(copy.out, '*.params')}
    with pytest.raises(SystemExit) as caught:
        dcgan.train(dcgan.dataclasses.replace(copy, lr=1e30, epochs=5))
    newest = os.path.join(copy.out, names(copy.out, '*-0002.json')[0])
    assert all(word in caught.value.code for word in ('not finite', 'epoch 3', 'iteration', newest, 'lr'))
    assert {name: open(os.path.join(copy.out, name), 'rb').read() for name in names(copy.out, '*.params')} == before


def test_parameters_that_are_not_finite_are_not_saved(tiny):
    """The last step of an epoch may ruin the weights after its loss was seen."""
    s, step, steps = tiny(epochs=2, batch_size=300, coverage=True), dcgan.train_step, []

    def ruin(modG, *args):
        steps.append(0)
        found = step(modG, *args)
        if len(steps) == 10:
            modG._exec_group.param_arrays[0][0][:] = np.nan
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcgan, 'train_step', ruin)
        with pytest.raises(SystemExit, match='g1_weight is not finite after epoch 1, iteration 5'):
            dcgan.train(s)
    assert [manifest['epoch'] for manifest in dcgan.checkpoints(s.out)] == [0]


def test_a_disk_too_full_for_the_csv(tiny, capsys, monkeypatch):
    """The run goes on to its end."""
    class FullLog(dcgan.Log):
        def __init__(self, *args):
            super().__init__(*args)
            self.close()
            self.file = open('/dev/full', 'w')
            self.writer = csv.DictWriter(self.file, self.FIELDS, extrasaction='ignore')

    monkeypatch.setattr(dcgan, 'Log', FullLog)
    dcgan.train(tiny())
    out = capsys.readouterr().out
    assert 'the .csv cannot be written' in out and out.splitlines()[-1].startswith('done: ')


# ---------------------------------------------------------------- wrong checkpoints

@pytest.mark.parametrize('changes, words', [
    (dict(ngf=8), ['ngf = 4', '8']), (dict(ndf=8), ['ndf = 4', '8']), (dict(nc=3), ['nc = 1', '3']),
    (dict(Z=9), ['Z = 8', '9']), (dict(conditional=True), ['conditional']), (dict(resume='/no'), ['/no']),
], ids=str)
def test_another_networks_checkpoint(copy, changes, words):
    with pytest.raises(SystemExit) as caught:
        dcgan.train(dcgan.dataclasses.replace(copy, **changes))
    assert all(word in caught.value.code for word in words) and '\n' not in caught.value.code


def edit_manifest(out, change):
    path = os.path.join(out, names(out, '*-0002.json')[0])
    with open(path) as file:
        manifest = json.load(file)
    change(manifest)
    with open(path, 'w') as file:
        json.dump(manifest, file)
    return path


def test_other_settings_are_said(copy, capsys):
    path = edit_manifest(copy.out, lambda manifest: manifest.update(workers=2))
    dcgan.train(dcgan.dataclasses.replace(copy, resume=path, epochs=4, lr=0.001))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('WARNING')]
    assert len(warnings) == 2 and 'lr was 0.0002 and is 0.001' in warnings[0] and 'workers was 2 and is 1' in warnings[1]


def test_another_datasets_checkpoint(copy):
    path = edit_manifest(copy.out, lambda manifest: manifest.update(dataset='mnist'))
    with pytest.raises(SystemExit, match='trained on mnist, the data is digits'):
        dcgan.train(dcgan.dataclasses.replace(copy, resume=path))


def test_a_g_where_a_d_belongs(copy):
    """Renamed, with the hash made to fit."""
    g, d = (os.path.join(copy.out, names(copy.out, f'*_{net}_*-0002.params')[0]) for net in 'GD')
    shutil.copy(g, d)
    path = edit_manifest(copy.out, lambda manifest: manifest['files'].update(
        {os.path.basename(d): dcgan.sha256(d)}))
    with pytest.raises(SystemExit, match='does not fit'):
        dcgan.train(dcgan.dataclasses.replace(copy, resume=path))


@pytest.mark.parametrize('kind', ['*_G_*-0002.params', '*_D_*-0002.params', '*-0002.states', '*-0002.json'])
@pytest.mark.parametrize('harm', ['cut', 'flipped', 'missing'])
def test_latest_takes_the_one_before_a_damaged_one(copy, capsys, kind, harm):
    path = os.path.join(copy.out, [name for name in names(copy.out, kind) if 'symbol' not in name][0])
    content = open(path, 'rb').read()
    os.remove(path)
    if harm != 'missing':
        with open(path, 'wb') as file:
            half = len(content) // 2
            file.write(content[:half] + (b'' if harm == 'cut' else b'\xff' + content[half + 1:]))
    manifest = dcgan.find_checkpoint('latest', copy.out)
    assert manifest['epoch'] == 1
    assert path in capsys.readouterr().out


@pytest.mark.parametrize('resume', ['', 'latest'])
def test_two_at_once_in_one_folder(child, tmp_path, resume):
    """The second refuses, and the first does not notice."""
    assert child().wait(timeout=300) == 0
    before = {name: open(tmp_path / 'out' / name, 'rb').read() for name in names(tmp_path / 'out', '*')}
    first = child(resume='latest', epochs=2, before='dcgan.train_step = lambda *args: dcgan.time.sleep(1000)')
    wait_for_line(first, 'metric:')
    second = child(resume=resume, epochs=2)
    _, err = second.communicate(timeout=300)
    assert second.returncode == 1 and err.count('\n') == 1 and 'another process' in err
    assert {name: open(tmp_path / 'out' / name, 'rb').read() for name in names(tmp_path / 'out', '*')} == before
    first.kill()
    assert child(resume=resume, epochs=2).wait(timeout=300) == 0  # the lock went with it


# ---------------------------------------------------------------- hostile files

HOSTILE = hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def read_or_refuse(read, path, content):
    with open(path, 'wb') as file:
        file.write(content)
    tracemalloc.start()
    try:
        read(str(path))
    except ValueError as error:
        assert str(path) in str(error) and '\n' not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 500e6


@HOSTILE
@given(content=strategies.binary(max_size=300))
@pytest.mark.parametrize('read', [dcgan.read_manifest, dcgan.load_arrays])
def test_random_bytes(tmp_path, read, content):
    read_or_refuse(read, tmp_path / 'file', content)


@HOSTILE
@given(data=strategies.data())
def test_a_state_file_with_changed_bytes(finished, tmp_path, data):
    """Most of the lengths are in the first and the last bytes."""
    with open(sorted(glob.glob(f'{finished.out}/*.states'))[0], 'rb') as file:
        content = bytearray(file.read())
    for _ in range(data.draw(strategies.integers(1, 8))):
        place = data.draw(strategies.one_of(strategies.integers(0, 100), strategies.integers(-900, -1)))
        content[place] = data.draw(strategies.integers(0, 255))
    end = data.draw(strategies.one_of(strategies.just(len(content)), strategies.integers(0, len(content))))
    read_or_refuse(dcgan.load_arrays, tmp_path / 'file', bytes(content[:end]))


JSON = strategies.recursive(strategies.none() | strategies.booleans() | strategies.floats() | strategies.integers()
                            | strategies.text(), lambda x: strategies.lists(x) | strategies.dictionaries(
                                strategies.text(), x), max_leaves=8)


@HOSTILE
@given(changes=strategies.dictionaries(strategies.sampled_from(
    ['dataset', 'stamp', 'epoch', 'iteration', 'metrics', 'complete', 'saved', 'settings', 'workers', 'files']), JSON))
def test_a_manifest_with_changed_values(copy, changes):
    path = edit_manifest(copy.out, lambda manifest: manifest.update(changes))
    try:
        dcgan.fits(copy, 'digits', dcgan.find_checkpoint(path, copy.out))
    except ValueError as error:
        assert '\n' not in str(error)
    shutil.copy(glob.glob(os.path.join(copy.out, '*-0001.json'))[0], path)


def test_a_manifest_with_an_iteration_beyond_its_epoch(copy):
    """The epoch counts as done."""
    path = edit_manifest(copy.out, lambda manifest: manifest.update(iteration=10 ** 12, complete=False))
    dcgan.train(dcgan.dataclasses.replace(copy, resume=path, epochs=4))
    assert rows(copy.out)[-1]['epoch'] == '3'


@pytest.mark.parametrize('content', [b'', b'[' * 100_000, b'{"epoch": 1e999}', b'\xff\xfe', b' ' * (2 << 20)])
def test_strange_manifests(tmp_path, content):
    read_or_refuse(dcgan.read_manifest, tmp_path / 'x-0000.json', content)
    assert dcgan.checkpoints(str(tmp_path)) == []
