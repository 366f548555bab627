"""The networks, the step against the textbook, the metrics, the averages, the lines, whole runs, and the settings."""
import functools
import io
import os
import re
import shutil
import subprocess
import sys

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
import textbook
from conftest import ROOT, TINY, ended, newest, rows, state, train_and_stop, watch_steps

import dcgan
import visual

# what is printed -> [(epoch, iteration, images/s, time left)], as text
lines = re.compile(r"^epoch: (\d+) iter: (\d+) metric: \('facc', \d\.\d+\) \('fentropy', \d+\.\d+\) "
                   r"\('fentropy', \d+\.\d+\) (\d+)/s, ((?:\d+ days?, )?\d+:\d\d:\d\d) left$", re.M).findall
METRICS = ('facc', 'fentropy_G', 'fentropy_D')
ALL = data.get_digits(labels=True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but for a step: each lasts `clock.step` seconds."""
    class Clock:
        now, step = 1000., 1.

    def slow_step(*args, step=dcgan.train_step):
        Clock.now += Clock.step
        return step(*args)

    monkeypatch.setattr(dcgan, 'train_step', slow_step)
    monkeypatch.setattr(dcgan.time, 'monotonic', lambda: Clock.now)
    return Clock


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize('classes', [0, 10])
@pytest.mark.parametrize('nc', [1, 3])
def test_shapes_at_the_defaults(nc, classes):
    inputs = {'rand': (64, 100 + classes, 1, 1), 'data': (64, nc, 64, 64), 'label': (64,)}
    found = {}
    for symbol in dcgan.make_dcgan_sym(64, 64, nc, d1_bias=True, classes=classes):
        given = {name: shape for name, shape in inputs.items() if name in symbol.list_arguments()}
        internals = symbol.get_internals()
        found.update(zip(internals.list_outputs(), internals.infer_shape(**given)[1]))
    G = [100 + classes, 512, 256, 128, 64, max(nc, 2)]  # what comes in, and the layers' filters
    D = [nc, 64, 128, 256, 512, max(classes, 1)]
    sizes = [1, 4, 8, 16, 32, 64]
    for i in range(1, 6):
        assert found[f'g{i}_output'] == (64, G[i], sizes[i], sizes[i])
        assert found[f'd{i}_output'] == (64, D[i], sizes[5 - i], sizes[5 - i])
        assert found[f'g{i}_weight'] == (G[i - 1], G[i], 4, 4) and found[f'd{i}_weight'] == (D[i], D[i - 1], 4, 4)
    for name in [f'{kind}{i}_output' for kind in ('gbn', 'gact', 'dbn', 'dact') for i in range(1, 5)]:
        assert name == 'dbn1_output' or found[name] == found[re.sub('bn|act', '', name)]
    assert found['gact5_output'] == (64, nc, 64, 64) and found['dloss_output'] == (64, 1)
    assert [name for name in found if name.endswith('_bias')] == ['d1_bias'] and ('digit' in found) == bool(classes)
    biases = [name for symbol in dcgan.make_dcgan_sym(64, 64, nc) for name in symbol.list_arguments() if 'bias' in name]
    assert biases == []  # the published script's call


def test_symbol_options_reach_the_layers():
    gout, dloss = dcgan.make_dcgan_sym(4, 4, 1, no_bias=False, fix_gamma=False, eps=0.5)
    for symbol, layer in ((gout, 'gbn1'), (dloss, 'dbn2')):
        assert symbol.attr_dict()[layer]['eps'] == '0.5' and symbol.attr_dict()[layer]['fix_gamma'] == 'False'
    assert {'g5_bias', 'd1_bias', 'd5_bias'} <= {*gout.list_arguments(), *dloss.list_arguments()}


def test_the_printed_networks_have_true_totals(capsys):
    s = dcgan.Settings(ctx=(mx.cpu(),), batch_size=2)
    for title, mod in zip('GD', dcgan.make_modules(s, [('data', (2, 3, 64, 64))], [('rand', (2, 100, 1, 1))])):
        dcgan.print_network(s, title, mod, None)
    assert capsys.readouterr().out == 'G: 3,576,704 parameters\nD: 2,765,632 parameters\n'


def test_only_with_the_bias_does_d_see_contrast(few):
    moved = {}
    for d1_bias in (True, False):
        s = few(d1_bias=d1_bias, lr=0.002, ndf=16, nc=3, ctx=(mx.cpu(),))
        real, latents = data.PixelIter(ALL[0], ALL[2], 10, 3), data.RandIter(10, s.Z)
        modules = dcgan.make_modules(s, real.provide_data, latents.provide_data)
        labels = [mx.nd.full(10, label) for label in (0, 1, 0.9)]
        for _ in range(40):
            batch = real.next()
            dcgan.train_step(*modules, latents.next(), batch, *labels)
        whole, half = (dcgan.forward_backward(modules[1], [images], labels[1]).asnumpy()
                       for images in (batch.data[0], batch.data[0] / 2))
        moved[d1_bias] = np.abs(whole - half).mean()
    assert moved[True] > 10 * moved[False], moved


# ---------------------------------------------------------------- the textbook is the judge

@pytest.mark.parametrize('conditional', [False, True], ids=['', 'conditional'])
@pytest.mark.parametrize('settings', [  # a head start may end in the second epoch, which has latents of its own
    dict(seed=1234, d1_bias=False, pos_label=1.0, head_start=0, lr_steady=0),
    dict(seed=1234, d1_bias=True, head_start=5, lr_steady=8),
    dict(seed=7, d1_bias=False, pos_label=1.0, head_start=0, lr_steady=0),
    dict(seed=7, d1_bias=True, head_start=17, lr_steady=16, epochs=2)],
    ids=['published', 'default', 'published, other seed', 'default, other seed'])
@pytest.mark.parametrize('nc', [1, 3])
def test_training_equals_the_textbook_to_the_last_bit(few, nc, settings, conditional):
    settings = {'pos_label': 0.9, **settings}
    s = few(nc=nc, ngf=8, conditional=conditional, **settings)
    dcgan.train(s)
    classes = ALL[2][:115] if conditional else None  # the digits are all there, and so their own positions
    X = np.tile(ALL[0][:115].astype(np.float32) / (255.0 / 2) - 1.0, (1, nc, 1, 1))
    expected, metrics = textbook.train(X, 12, 8, 4, nc, 8, 10, y=classes, **settings)
    found = state(s.out)
    assert [name for name, array in expected.items() if found[name] != array.tobytes()] == []
    # a line's metrics, gathered late, are the means of its own steps, each of which is in one line
    for row, steps in zip(rows(s.out), (metrics[:10], metrics[10:12], metrics[12:22], metrics[22:])):
        assert np.allclose([float(row[name]) for name in METRICS], np.mean(steps, axis=0), rtol=1e-6)


def test_a_head_start_is_not_slower_than_the_rest(few, monkeypatch):
    seen = watch_steps(monkeypatch, lambda mods, *_: [mod._optimizer.learning_rate for mod in mods[:2]])
    dcgan.train(few(lr=0.01, head_start=3))
    assert seen == [[0.01, 0.01]] * 12


def test_the_lr_of_pictures_does_not_fall(few):
    assert dcgan.learning_rates(few(dataset='imagenet', lr_steady=9), 100) == (0.0002, 0.0002)


# ---------------------------------------------------------------- nothing waits

def test_the_gradients_sum_and_the_updates_wait_together(few, monkeypatch):
    """Steps 5 and 8 run inside `mx.engine.bulk`: on a GPU each operator outside would wait for its stream."""
    sizes = []

    def watched(*args, original):
        sizes.append(mx.engine.set_bulk_size(0))  # what it was
        mx.engine.set_bulk_size(sizes[-1])
        return original(*args)

    for owner, name in (mx.nd.NDArray, '__iadd__'), (mx.mod.Module, 'update'):
        monkeypatch.setattr(owner, name, functools.partialmethod(watched, original=getattr(owner, name)))
    dcgan.train(few(batch_size=115))
    assert len(sizes) == 12 + 2 and min(sizes) >= 24  # the gradients of D, the two networks; the arrays of an update


@pytest.mark.parametrize('conditional', [False, True])
def test_nothing_waits_between_two_lines(few, monkeypatch, conditional):
    """Of the loop's asnumpy and waits none is between two lines; a line's metrics are one copy."""
    events = []
    for owner, name in ((mx.nd.NDArray, 'asnumpy'), (mx.nd.NDArray, 'wait_to_read'), (mx.nd, 'waitall'),
                        (dcgan, 'train_step'), (dcgan.Run, 'print_line')):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, f=original: events.append(name) or f(*args))
    dcgan.train(few(batch_size=5, conditional=conditional))
    for steps in (10, 10, 3):
        first, line = events.index('train_step'), events.index('print_line')
        assert events[first:line] == ['train_step'] * steps
        # then the mean of G waits, or it could miss BatchNorm's moving averages
        assert events[line:line + 3] == ['print_line', 'asnumpy', 'waitall']
        del events[:line + 1]
    assert 'train_step' not in events


# ---------------------------------------------------------------- metrics and averages

def test_metrics_by_hand():
    label, pred = np.array([1., 1., 0., 0.]), np.array([[0.9], [0.4], [0.2], [0.5]])
    assert dcgan.facc(label, pred) == 0.75
    assert np.isclose(dcgan.fentropy(label, pred), -np.log([0.9, 0.4, 0.8, 0.5]).mean())
    assert np.isclose(dcgan.fentropy(np.zeros(1), np.ones((1, 1))), -np.log(1e-12))
    assert np.isfinite(dcgan.fentropy(np.zeros(1, np.float32), np.ones((1, 1), np.float32)))


@pytest.mark.parametrize('average', [0.99, 0.2, 0.0])
def test_the_mean_of_g(few, monkeypatch, average):
    """It is recomputed from the weights that G has at first and at each line."""
    def weights(modules, *_):
        mx.nd.waitall()
        return {name: array.asnumpy() for arrays in modules[0].get_params() for name, array in arrays.items()}

    s = few(average=average, epochs=2, batch_size=5, ctx=(mx.cpu(),))
    seen = watch_steps(monkeypatch, weights)
    dcgan.train(s)
    mean = weights(dcgan.make_modules(s, [('data', (5, 1, 64, 64))], [('rand', (5, 8, 1, 1))]))
    for n, step in enumerate([9, 19, 22, 32, 42, 45]):
        decay = min(average, (1 + n) / (10 + n))
        mean = {name: decay * mean[name] + (1 - decay) * seen[step][name] for name in mean}
    about, arrays = dcgan.find_state(newest(s.out))
    assert about['average_count'] == 6
    exact = {name: arrays[f'{name}_average'].tobytes() == seen[-1][name].tobytes() for name in mean}
    assert all(np.allclose(arrays[f'{name}_average'], mean[name], rtol=1e-5, atol=1e-7) for name in mean)
    files = [name for name in os.listdir(newest(s.out)) if '_Gmean_' in name]  # as in the state: test_checkpoints.py
    assert (len(files), all(exact.values()), exact['g1_weight']) == ((3, False, False) if average else (0, True, True))


def test_nothing_that_is_shown_disturbs_the_run(few, capsys):
    found = []
    for changes in ({}, {}, dict(average=0.0, coverage=True, monitor=5, display=True, plot=True), dict(seed=4)):
        s = few(out=f'{few().out}{len(found)}', epochs=2, **changes)
        dcgan.train(s)
        found.append({name: array for name, array in state(s.out).items() if not name.endswith('_average')})
        if s.plot:
            assert all(os.path.exists(f'{newest(s.out)}/net_{net}.png') == bool(shutil.which('dot')) for net in 'GD')
    assert found[0] == found[1] == found[2] != found[3]


# ---------------------------------------------------------------- lines and pictures

def test_the_lines_of_a_run(few, clock, capsys):
    s = few(epochs=1000)
    train_and_stop(s, 22)
    out = capsys.readouterr().out
    assert 'data: digits, 12 iterations an epoch; run: ' in out and 'WARNING' not in out
    assert lines(out) == [('0', '10', '10', '3:19:50'), ('0', '12', '10', '3:19:48'), ('1', '10', '10', '3:19:38')]
    columns = ('epoch', 'iteration', 'seconds', 'images_per_second')
    found = [{name: float(row[name]) for name in (*columns, *METRICS)} for row in rows(s.out)]
    assert [[row[name] for name in columns] for row in found] == [[0, 10, 10, 10], [0, 12, 12, 10], [1, 10, 22, 10]]
    for row in found:
        assert "metric: ('facc', {:.2f}) ('fentropy', {:.2f}) ('fentropy', {:.2f}) 10/s".format(
            *(row[name] for name in METRICS)) in out
    assert out.splitlines()[-1] == (f'stopped in epoch 1 after iteration 10: everything is in {newest(s.out)}/; to go '
                                    "on: resume = 'latest'; images: resume = 'latest', sample = 64")


def test_pictures_at_most_once_a_second(few, clock, monkeypatch):
    """And the first at once, and at the end of each epoch, where they are of the last step."""
    shown = []
    monkeypatch.setattr(visual, 'show_picture', lambda title, *args: shown.append((title, round(clock.now, 2))))
    clock.now, clock.step = 0., 0.03
    dcgan.train(few(batch_size=2, epochs=2))  # 58 iterations an epoch, a line every 0.3 s
    times = [when for title, when in shown if title == 'gout']
    assert times == [0.3, 1.5, 1.74, 2.94, 3.48]
    assert all([when for other, when in shown if other == title] == times for title in ('diff', 'data', 'loss'))


def test_the_pictures_are_of_the_last_step(few, monkeypatch, capsys):
    """Also where the film has a frame of that iteration, for which other latents are drawn; and nothing is saved."""
    seen = watch_steps(monkeypatch, lambda _, fakes, diff, __: (fakes.asnumpy(), diff.asnumpy()))
    s = few(images=100, batch_size=2, check_point=False)  # 50 iterations: no further line at the end
    dcgan.train(s)
    out = capsys.readouterr().out
    assert [line[1] for line in lines(out)] == ['10', '20', '30', '40', '50'] and out.endswith('; nothing was saved\n')
    assert not [name for name in os.listdir(newest(s.out)) if name.endswith(('.npz', '.params', '.json'))]
    fakes, diff = seen[-1]
    assert np.array_equal(cv2.imread(f'{newest(s.out)}/gout.png'), visual.tile(fakes))
    assert np.array_equal(cv2.imread(f'{newest(s.out)}/diff.png'), visual.tile((diff - diff.mean()) / diff.std()))


def test_the_monitor_prints_the_layers_and_diff(few, capsys, monkeypatch):
    sizes = watch_steps(monkeypatch, lambda _, fakes, diff, __: float(np.sqrt((diff.asnumpy() ** 2).mean())))
    dcgan.train(few(batch_size=100, monitor=1))
    found = re.findall(r'^Batch: +(\d) +(\S+) +(\S+)', capsys.readouterr().out, re.M)
    names = {name for _, name, _ in found}
    assert {'g1_output', 'gbn4_output', 'gact5_output', 'd1_output', 'dbn4_output', 'dloss_output'} <= names
    assert {name for name in names if 'backward' in name} == {'d1_backward_output0'}
    for batch, size in zip('12', sizes):
        values = [float(value) for where, name, value in found if (where, name) == (batch, 'd1_backward_output0')]
        assert len(values) == 3  # D sees three batches; MXNet adds up in float32
        assert min(abs(value / size - 1) for value in values) < 0.01


def test_a_notebook_gets_what_is_printed(few, monkeypatch):
    """Its stdout has the number of a file, which is not the cell."""
    cell = io.StringIO()
    cell.fileno = lambda: 1
    monkeypatch.setattr(sys, 'stdout', cell)
    dcgan.train(few())
    assert 'epoch: 0 iter: 12 ' in cell.getvalue() and '\ndone: ' in cell.getvalue() and sys.stdout is cell


# ---------------------------------------------------------------- a whole run, and how a process ends

def test_a_run_as_a_child(tmp_path):
    """No display, no network, a home that cannot be written: MNIST falls back to the digits, and all is printed.

    A GPU build: MXNet's own end, which may crash there, does not come; all that is printed comes through the pipe.
    """
    code = f"""import atexit, functools, sys, data, dcgan
data.GPU_BUILD, sys.argv = True, ['dcgan.py']
dcgan.Settings = functools.partial(dcgan.Settings, **{dict(TINY, dataset='mnist', display=True, epochs=2)!r})
atexit.register(print, 'its own end')
print('in the buffer')
dcgan.main()"""
    env = {**os.environ, 'HOME': '/dev/null', 'SCIKIT_LEARN_DATA': '/dev/null/data', 'DISPLAY': '', 'PYTHONPATH': ROOT,
           'https_proxy': 'http://127.0.0.1:9', 'TMPDIR': str(tmp_path), 'WAYLAND_DISPLAY': '', 'PYTHONUNBUFFERED': ''}
    child = subprocess.run([sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True,
                           timeout=300)
    out = child.stdout
    assert (child.returncode, child.stderr) == (0, '') and 'its own end' not in out and 'in the buffer' in out
    assert re.search(r'^WARNING: MNIST cannot be had from OpenML .*digits', out, re.M)
    assert [line[:2] for line in lines(out)] == [('0', '10'), ('0', '15'), ('1', '10'), ('1', '15')]
    assert "batch_size=100 " in out and 'device: cpu(0); ' in out and out.count('no window') == 1
    assert out.splitlines()[-2].startswith('done: ')  # before what was in Python's buffer
    run, = os.listdir(tmp_path / 'out')
    assert re.fullmatch(r'digits_\d{4}(_\d\d){2}-\d\d_\d\d', run)
    assert {'film.webp', 'gout-0001.png', 'state-0002-000000.npz'} <= set(os.listdir(tmp_path / 'out' / run))


@pytest.mark.parametrize('gpu_build', [False, True])
@pytest.mark.parametrize('changes, status, err', [
    ({}, 0, ''), (dict(ngf=0), 1, 'dcgan.py: ngf = 0: must be'), (dict(digits='7'), 2, "dcgan.py: digits = '7'")])
def test_the_status_of_main(few, monkeypatch, capsys, gpu_build, changes, status, err):
    def at_once(status):
        raise SystemExit('at once', status)

    monkeypatch.setattr(os, '_exit', at_once)
    monkeypatch.setattr(data, 'GPU_BUILD', gpu_build)
    monkeypatch.setattr(dcgan, 'Settings', functools.partial(dcgan.Settings, **vars(few(**changes))))
    monkeypatch.setattr(sys, 'argv', ['dcgan.py'])
    with pytest.raises(SystemExit) as caught:
        dcgan.main()
    assert caught.value.args == (('at once', status) if gpu_build else (status,))
    found = capsys.readouterr().err
    assert found.startswith(err) and found.count('\n') == bool(err)


def test_arguments_on_the_command_line(tmp_path):
    child = subprocess.run([sys.executable, f'{ROOT}/dcgan.py', '--help'], cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (
        2, '', 'dcgan.py: --help: it takes no arguments; edit Settings in dcgan.py\n')


# ---------------------------------------------------------------- the settings

@pytest.mark.parametrize('changes, words', [
    (dict(dataset='cifar'), ['cifar', 'mnist']), (dict(ngf=0), ['ngf', '1 or more']), (dict(ndf=-8), ['ndf']),
    (dict(Z=2.5), ['Z', 'whole']), (dict(batch_size='64'), ['batch_size']), (dict(epochs=0), ['epochs']),
    (dict(batch_size=True), ['batch_size']), (dict(seed=-1), ['seed']), (dict(lr=-1), ['lr']), (dict(lr=0), ['lr']),
    (dict(beta1=1), ['beta1']), (dict(lr=float('nan')), ['lr']), (dict(nc=2), ['nc', '3 or 1']),
    (dict(average=1.0), ['average']), (dict(average=-0.1), ['average']), (dict(pos_label=0.0), ['pos_label']),
    (dict(pos_label=1.1), ['pos_label']), (dict(head_start=-1), ['head_start']), (dict(head_start=0.5), ['head_start']),
    (dict(lr_steady=-1), ['lr_steady']),
    (dict(d1_bias=1), ['d1_bias', 'True or False']), (dict(augment='no'), ['augment']),
    (dict(batch_size=116), ['batch_size', 'larger than the data']), (dict(sample=10 ** 6), ['sample']),
    (dict(dataset='mnist', mnist_path='nowhere'), ['nowhere', 'train-images-idx3-ubyte']),
    (dict(fallback='x'), ['fallback']), (dict(kvstore='dist_async'), ['dist_async', 'dist_sync']),
    (dict(sample=3), ['resume']),
    (dict(ctx='gpu'), ['ctx', 'mx.cpu()']), (dict(ctx=()), ['ctx']), (dict(ctx=mx.gpu(0)), ['gpu(0)', 'mx.cpu()']),
    (dict(ctx=(mx.cpu(0), mx.cpu(1), mx.cpu(2))), ['batch_size', '3 devices']),
    (dict(out='/dev/null/out'), ['/dev/null']), (dict(out=''), ['out', 'folder']),
    (dict(resume='nothing'), ['nothing', 'latest']), (dict(resume='latest'), ['no run in']),
    (dict(resume='x_G_y-0003.params'), ['resume', 'x_G_y']),
    (dict(digits=5551234, conditional=True), ['digits', 'quotes']), (dict(resume=True), ['resume', 'quotes']),
    (dict(out=None), ['out', 'quotes']), (dict(mnist_path=5), ['mnist_path']),
    (dict(conditional='no'), ['conditional', 'True or False']),
], ids=str)
def test_errors_are_one_line(few, capsys, changes, words):
    message = ended(few(**changes))
    assert message.startswith('dcgan.py: ')
    assert all(word in message for word in words), message
    assert 'epoch:' not in capsys.readouterr().out


@pytest.mark.parametrize('changes, named', [
    (dict(mnist_path='x'), 'mnist_path'), (dict(fallback=''), 'fallback'), (dict(imgnet_path='x'), 'imgnet_path'),
    (dict(augment=False), 'augment'), (dict(lr=0.001, head_start=9), 'head_start'), (dict(kvstore='local'), 'kvstore'),
    (dict(digits='7', conditional=True), 'digits'), (dict(plot=True), 'plot'),
    (dict(lr_steady=9, dataset='imagenet'), 'lr_steady'), (dict(head_start=9), None),
    (dict(kvstore='local', ctx=(mx.cpu(0), mx.cpu(1))), None)], ids=str)
def test_a_setting_without_effect_is_said(few, monkeypatch, capsys, changes, named):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setattr(dcgan, 'run_training', lambda *args: None)
    dcgan.train(few(**changes))
    warned = re.findall(r'^WARNING: (\w+) = .* has an effect only with ', capsys.readouterr().out, re.M)
    assert warned == [name for name in [named] if name]


@pytest.mark.parametrize('ctx', [mx.cpu(1), (mx.cpu(1),), [mx.cpu(1)], (mx.cpu(0), mx.cpu(1)), [mx.cpu(0), mx.cpu(1)]])
def test_devices_and_homes(few, tmp_path, monkeypatch, capsys, ctx):
    """One device or several, in round brackets or square ones; ~ is the home folder; a path may be a PathLike."""
    monkeypatch.setenv('HOME', str(tmp_path))
    out = '~/runs' if isinstance(ctx, mx.Context) else tmp_path / 'runs'
    dcgan.train(few(ctx=ctx, out=out))
    devices = 'cpu(0), cpu(1)' if isinstance(ctx, (tuple, list)) and len(ctx) == 2 else 'cpu(1)'
    assert f'device: {devices}; ' in capsys.readouterr().out
    about, _ = dcgan.find_state(newest(tmp_path / 'runs'))
    assert about['settings']['out'] == str(tmp_path / 'runs')
