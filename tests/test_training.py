"""The networks, the step against the textbook, the metrics, the lines, and whole runs."""
import contextlib
import csv
import io
import os
import re
import shutil
import sys
import warnings

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
import textbook
from conftest import final_params, same_bits

import dcgan
import visual

LINE = re.compile(r"^epoch: (\d+) iter: (\d+) metric: \('facc', \d\.\d+\) \('fentropy', \d+\.\d+\) "
                  r"\('fentropy', \d+\.\d+\) (\d+|\?)/s (\d+[smhd]|\?) (\d+[smhd]|\?)$", re.M)


def floats(X, nc):
    return np.tile(X.astype(np.float32) / (255.0 / 2) - 1.0, (1, nc, 1, 1))


def flat(params):
    """{name: array} out of `final_params`, for both networks, without arg: and aux:."""
    return {name[4:]: array for arrays in params.values() for name, array in arrays.items()}


def rows(out):
    """The newest run's log.csv."""
    with open(os.path.join(out, 'latest', 'log.csv'), newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but for a step: each lasts `clock.step` seconds, the first in the process more."""
    class Clock:
        now, step, first_step = 1000., 1., 100.

    def slow_step(*args, step=dcgan.train_step):
        Clock.now += Clock.first_step or Clock.step
        Clock.first_step = 0
        return step(*args)

    monkeypatch.setattr(dcgan, 'train_step', slow_step)
    monkeypatch.setattr(dcgan.time, 'monotonic', lambda: Clock.now)
    return Clock


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize('nc', [1, 3])
def test_layer_shapes_at_the_defaults(nc):
    gout, dloss = dcgan.make_dcgan_sym(64, 64, nc)
    expected_g = {'rand': (100, 1, 1), 'g1': (512, 4, 4), 'gbn1': (512, 4, 4), 'gact1': (512, 4, 4),
                  'g2': (256, 8, 8), 'gbn2': (256, 8, 8), 'gact2': (256, 8, 8), 'g3': (128, 16, 16),
                  'gbn3': (128, 16, 16), 'gact3': (128, 16, 16), 'g4': (64, 32, 32), 'gbn4': (64, 32, 32),
                  'gact4': (64, 32, 32), 'g5': (max(nc, 2), 64, 64), 'gact5': (nc, 64, 64)}
    expected_d = {'data': (nc, 64, 64), 'd1': (64, 32, 32), 'dact1': (64, 32, 32), 'd2': (128, 16, 16),
                  'dbn2': (128, 16, 16), 'dact2': (128, 16, 16), 'd3': (256, 8, 8), 'dbn3': (256, 8, 8),
                  'dact3': (256, 8, 8), 'd4': (512, 4, 4), 'dbn4': (512, 4, 4), 'dact4': (512, 4, 4),
                  'd5': (1, 1, 1), 'dloss': (1,)}
    for symbol, expected, inputs in ((gout, expected_g, {'rand': (64, 100, 1, 1)}),
                                     (dloss, expected_d, {'data': (64, nc, 64, 64), 'label': (64,)})):
        internals = symbol.get_internals()
        _, shapes, _ = internals.infer_shape(**inputs)
        found = dict(zip(internals.list_outputs(), shapes))
        for name, shape in expected.items():
            assert found.get(f'{name}_output', found.get(name)) == (64,) + shape, name


@pytest.mark.parametrize('nc, filters', [(1, 2), (3, 3)])
def test_parameter_shapes_at_the_defaults(nc, filters):
    gout, dloss = dcgan.make_dcgan_sym(64, 64, nc)
    shapes = dict(zip(gout.list_arguments(), gout.infer_shape(rand=(1, 100, 1, 1))[0]))
    assert [shapes[f'g{i}_weight'] for i in range(1, 6)] == [
        (100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, filters, 4, 4)]
    shapes = dict(zip(dloss.list_arguments(), dloss.infer_shape(data=(1, nc, 64, 64), label=(1,))[0]))
    assert [shapes[f'd{i}_weight'] for i in range(1, 6)] == [
        (64, nc, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert not any('bias' in name for name in gout.list_arguments() + dloss.list_arguments())


def test_symbol_options_reach_the_layers():
    gout, dloss = dcgan.make_dcgan_sym(4, 4, 1, no_bias=False, fix_gamma=False, eps=0.5)
    for symbol, layer in ((gout, 'gbn1'), (dloss, 'dbn2')):
        assert symbol.attr_dict()[layer]['eps'] == '0.5' and symbol.attr_dict()[layer]['fix_gamma'] == 'False'
    assert 'g5_bias' in gout.list_arguments() and 'd5_bias' in dloss.list_arguments()


def layer_lines(out, title):
    """The header and the layers' lines of a network: [(name, shape, parameters)]."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f'{title}: '))
    layers = [re.fullmatch(r' *(\w+) +\(([\d, ]+)\) +([\d,]+)', line).groups() for line in lines[first + 1:first + 6]]
    return lines[first], [(name, tuple(map(int, shape.split(', '))), int(size.replace(',', '')))
                          for name, shape, size in layers]


@pytest.mark.parametrize('nc', [1, 3])
def test_the_printed_networks_have_true_totals(capsys, nc):
    s = dcgan.Settings(nc=nc, ctx=[mx.cpu()], batch_size=2)
    modules = dcgan.make_modules(s, [('data', (2, nc, 64, 64))], [('rand', (2, 100, 1, 1))])
    expected = {'G': (('g1', 512, 4), ('g2', 256, 8), ('g3', 128, 16), ('g4', 64, 32), ('g5', max(nc, 2), 64)),
                'D': (('d1', 64, 32), ('d2', 128, 16), ('d3', 256, 8), ('d4', 512, 4), ('d5', 1, 1))}
    for title, mod in zip('GD', modules):
        dcgan.print_network(s, title, mod, None)
        out = capsys.readouterr().out
        header, layers = layer_lines(out, title)
        assert out.count('\n') == 6
        assert [layer[:2] for layer in layers] == [(name, (2, c, size, size)) for name, c, size in expected[title]]
        arrays = mod.get_params()[0]
        assert sum(size for _, _, size in layers) == sum(array.size for array in arrays.values())
        assert header == f'{title}: {sum(array.size for array in arrays.values()):,} parameters'
        weights = {name: array.size for name, array in arrays.items() if name.endswith('weight')}
        assert all(weights[f'{name}_weight'] <= size <= weights[f'{name}_weight'] + 2 * shape[1]
                   for name, shape, size in layers)
        if (title, nc) == ('G', 1):
            assert header == 'G: 3,575,680 parameters'


# ---------------------------------------------------------------- the textbook is the judge

@pytest.mark.parametrize('nc', [1, 3])
@pytest.mark.parametrize('seed', [1234, 7])
def test_training_equals_the_textbook_to_the_last_bit(tiny, nc, seed):
    s = tiny(nc=nc, seed=seed, batch_size=250, ngf=8, ndf=8)
    dcgan.train(s)
    expected, metrics = textbook.train(floats(data.get_digits()[0], nc), 6, 8, 8, nc, 8, 250, seed)
    found = flat(final_params(s.out))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []
    # the line's metrics, gathered late, are those of the steps
    row, = rows(s.out)
    assert np.allclose([float(row[name]) for name in ('facc', 'fentropy_G', 'fentropy_D')], np.mean(metrics, axis=0),
                       rtol=1e-6)


def test_every_epoch_has_its_own_latents(tiny):
    s = tiny(batch_size=750, epochs=2)
    dcgan.train(s)
    second = textbook.train(floats(data.get_digits()[0], 1), 2, 4, 4, 1, 8, 750, 3, epochs=2)[0]
    found = flat(final_params(s.out))
    assert all(found[name].tobytes() == second[name].tobytes() for name in second)


def test_the_gradients_sum_and_the_updates_wait_together(tiny, monkeypatch):
    """Steps 5 and 8 run inside `mx.engine.bulk`: on a GPU each operator outside would wait for its stream."""
    bulks, outside, inside = [], [], []

    @contextlib.contextmanager
    def bulk(size, bulk=mx.engine.bulk):
        assert size >= 24  # the arrays of an update
        with bulk(size):
            bulks.append(size)
            yield
            bulks.pop()

    def watched(original):
        return lambda *args: (inside if bulks else outside).append(0) or original(*args)

    monkeypatch.setattr(mx.engine, 'bulk', bulk)
    monkeypatch.setattr(mx.nd.NDArray, '__iadd__', watched(mx.nd.NDArray.__iadd__))
    monkeypatch.setattr(mx.mod.Module, 'update', watched(mx.mod.Module.update))
    dcgan.train(tiny(batch_size=1500))
    assert outside == [] and len(inside) == 11 + 2  # the gradients of D; the two networks


def test_nothing_waits_between_two_lines(tiny, monkeypatch):
    """Between printed lines neither asnumpy nor a wait: counted over steps of the real loop."""
    calls = []
    for name in ('asnumpy', 'wait_to_read'):
        original = getattr(mx.nd.NDArray, name)
        monkeypatch.setattr(mx.nd.NDArray, name, lambda self, f=original: calls.append(0) or f(self))
    monkeypatch.setattr(mx.nd, 'waitall', lambda f=mx.nd.waitall: calls.append(0) or f())
    step, seen = dcgan.train_step, []
    monkeypatch.setattr(dcgan, 'train_step', lambda *args: seen.append(len(calls)) or step(*args))
    dcgan.train(tiny())
    assert len(seen) == 15
    # the first step has been waited for, and the line after iteration 10
    assert seen[0] + 1 == seen[1] == seen[9] < seen[10] == seen[14]


@pytest.mark.parametrize('conditional', [False, True])
def test_the_metrics_of_a_line_cost_one_copy_from_the_device(tiny, monkeypatch, conditional):
    """Counted between two lines; mx.cpu(1) stands for a GPU."""
    copies, seen = [], []
    for name in ('asnumpy', 'as_in_context'):
        def counted(self, *args, original=getattr(mx.nd.NDArray, name), **kwargs):
            if self.context == mx.cpu(1) and args != (mx.cpu(1),):
                copies.append(self.shape)
            return original(self, *args, **kwargs)
        monkeypatch.setattr(mx.nd.NDArray, name, counted)
    print_line = dcgan.Run.print_line
    monkeypatch.setattr(dcgan.Run, 'print_line', lambda run: print_line(run) or seen.append(len(copies)))
    monkeypatch.setattr(dcgan, 'show_pictures', lambda *args: None)
    monkeypatch.setattr(data, 'check_devices', lambda s: None)
    dcgan.train(tiny(batch_size=50, ctx=mx.cpu(1), conditional=conditional))  # 30 iterations
    assert [b - a for a, b in zip([0, *seen], seen)] == [1, 1, 1, 0]  # nothing is left for the end of the epoch


# ---------------------------------------------------------------- metrics

def test_metrics_by_hand():
    label, pred = np.array([1., 1., 0., 0.]), np.array([[0.9], [0.4], [0.2], [0.5]])
    assert dcgan.facc(label, pred) == 0.75
    assert np.isclose(dcgan.fentropy(label, pred), -np.log([0.9, 0.4, 0.8, 0.5]).mean())
    assert np.isclose(dcgan.fentropy(np.zeros(1), np.ones((1, 1))), -np.log(1e-12))
    assert np.isfinite(dcgan.fentropy(np.zeros(1, np.float32), np.ones((1, 1), np.float32)))


def test_span():
    assert [dcgan.span(x) for x in (float('nan'), 0, 99, 100, 5999, 6000, 359999, 1e6)] == [
        '?', '0s', '99s', '2m', '100m', '2h', '100h', '12d']


def answers(to_fakes, to_reals, after_update, batch_size=4):
    """What `train_step` returns third: D's answers, here always the same."""
    return [mx.nd.full((batch_size, 1), value) for value in (to_fakes, to_reals, after_update)]


def add(run, iterations, *answer):
    """Count iterations in which D always says that, with a line every ten."""
    for _ in range(iterations):
        run.add(answers(*answer))
        if run.iteration % 10 == 0:
            run.print_line()


def test_a_line_is_the_mean_of_its_iterations(tiny, capsys):
    s = tiny(batch_size=4)
    run = dcgan.Run(s, None, 1000, dcgan.Cluster(s))
    add(run, 9, 0.25, 0.75, 0.5)
    add(run, 1, 0.75, 0.25, 1)
    facc, entropy_G, entropy_D = re.findall(r"', ([\d.]+)\)", capsys.readouterr().out)
    assert float(facc) == 0.9 and float(entropy_G) == round(0.9 * np.log(2), 2)
    assert float(entropy_D) == round(0.9 * np.log(4 / 3) + 0.1 * np.log(4), 2)
    add(run, 10, 0.75, 0.25, 1)  # the metrics begin anew
    assert "('facc', 0.00) ('fentropy', 0.00) ('fentropy', 1.39)" in capsys.readouterr().out.replace('-0.00', '0.00')


WON, OPEN = (1e-4, 1 - 1e-4, 1e-4), (0.4, 0.6, 0.4)  # D has won: its entropy is 0.0001 and G's 9.2; nobody has


@pytest.mark.parametrize('course, expected', [
    ([(190, WON)], 0), ([(200, WON)], 1), ([(400, WON)], 1), ([(190, WON), (10, OPEN), (190, WON)], 0),
    ([(10, OPEN), (200, WON)], 1), ([(200, WON), (10, OPEN), (250, WON)], 1),
    ([(300, (1e-4, 1 - 1e-4, 0.1))], 0), ([(300, (0.1, 0.9, 1e-4))], 0),
], ids=['short', 'just', 'long', 'interrupted', 'later', 'twice', 'G is well', 'D is not sure'])
def test_a_lost_game_is_said_once(tiny, capsys, course, expected):
    s = tiny(batch_size=4)
    run = dcgan.Run(s, None, 1000, dcgan.Cluster(s))
    for iterations, answer in course:
        add(run, iterations, *answer)
    warned = [line for line in capsys.readouterr().out.splitlines() if 'WARNING' in line]
    assert len(warned) == expected and all('D' in line and 'lr' in line for line in warned)


# ---------------------------------------------------------------- lines, speed, time left

def lines(out):
    """The lines of iterations: [(epoch, iteration, images/s, left of the epoch, of the run)], as text."""
    return [match.groups() for match in LINE.finditer(out)]


def test_the_last_iterations_of_an_epoch_have_a_line_of_their_own(tiny, capsys):
    """14 iterations an epoch: each is in exactly one line, also in the log."""
    s = tiny(epochs=2, batch_size=110)
    expected, metrics = textbook.train(np.concatenate([floats(data.get_digits()[0], 1)] * 2), 14, 4, 4, 1, 8, 110, 3)
    dcgan.train(s)
    where = [('0', '10'), ('0', '14'), ('1', '10'), ('1', '14')]
    assert [line[:2] for line in lines(capsys.readouterr().out)] == where
    log = rows(s.out)
    assert [(row['epoch'], row['iteration']) for row in log] == where
    for row, mean in zip(log, (np.mean(metrics[:10], axis=0), np.mean(metrics[10:], axis=0))):
        assert np.allclose([float(row[name]) for name in ('facc', 'fentropy_G', 'fentropy_D')], mean, rtol=1e-6)


def test_an_epoch_that_ten_divides_has_no_further_line(tiny, capsys):
    dcgan.train(tiny(batch_size=150))
    assert [line[:2] for line in lines(capsys.readouterr().out)] == [('0', '10')]


def test_the_speed_leaves_out_the_first_step(tiny, clock, capsys):
    """The first lasts 100 s, each other one a second; that is said exactly, and the log has the whole time."""
    s = tiny(epochs=2)
    dcgan.train(s)
    assert lines(capsys.readouterr().out) == [
        ('0', '10', '100', '5s', '20s'), ('0', '15', '100', '0s', '15s'),
        ('1', '10', '100', '5s', '5s'), ('1', '15', '100', '0s', '0s')]
    assert [float(row['seconds']) for row in rows(s.out)] == [109, 114, 124, 129]
    assert [float(row['images_per_second']) for row in rows(s.out)] == [100] * 4


def test_a_speed_that_nobody_knows(tiny, clock, capsys):
    """The only step of the first line is the one that is left out."""
    s = tiny(batch_size=1500, epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        dcgan.train(s)
    assert lines(capsys.readouterr().out) == [('0', '1', '?', '?', '?'), ('1', '1', '1500', '0s', '0s')]


class Growing:
    """Batches that nobody has counted, of epochs that become longer, as a .rec's may."""

    def __init__(self, *lengths):
        self.lengths, self.batch = list(lengths), data.PixelIter(*digits(), 50).next()
        self.provide_data = [('data', (50, 1, 64, 64))]

    def reset(self):
        self.left = self.lengths.pop(0)

    def iter_next(self):
        self.left -= 1
        return self.left >= 0

    def __next__(self):
        if not self.iter_next():
            raise StopIteration
        return self.batch


def digits():
    X, _, y, _ = data.get_digits(labels=True)
    return X, y


def test_time_left_is_never_negative_and_may_be_unknown(tiny, clock, capsys, monkeypatch):
    monkeypatch.setattr(data, 'load_data', lambda *args: ('digits', Growing(5, 12, 14), None))
    dcgan.train(tiny(batch_size=50, epochs=3))
    assert [(epoch, iteration, *left) for epoch, iteration, _, *left in lines(capsys.readouterr().out)] == [
        ('0', '5', '?', '?'),
        ('1', '10', '0s', '5s'), ('1', '12', '0s', '5s'),  # expected: five iterations, as in the epoch before
        ('2', '10', '2s', '2s'), ('2', '14', '0s', '0s')]


def test_pictures_at_most_once_a_second(tiny, clock, monkeypatch):
    """And the first at once, and at the end of each epoch."""
    shown = []
    monkeypatch.setattr(visual, 'show_picture', lambda title, *args: shown.append((title, round(clock.now, 2))))
    clock.now, clock.first_step, clock.step = 0., 0, 0.03
    dcgan.train(tiny(batch_size=10, epochs=2))  # 150 iterations an epoch, a line every 0.3 s
    times = [when for title, when in shown if title == 'gout']
    assert times == [0.3, 1.5, 2.7, 3.9, 4.5, 5.7, 6.9, 8.1, 9.0]
    for title in ('diff', 'data', 'loss'):
        assert [when for other, when in shown if other == title] == times


def watch_steps(monkeypatch, look):
    """The list in which, step by step, what `look` makes of what `train_step` returns will be."""
    step, seen = dcgan.train_step, []

    def watched(*args):
        found = step(*args)
        seen.append(look(*found))
        return found

    monkeypatch.setattr(dcgan, 'train_step', watched)
    return seen


def test_gout_at_the_end_of_an_epoch_is_of_its_last_step(tiny, monkeypatch):
    """Also where the film has a frame of that iteration, for which G draws other latents."""
    fakes = watch_steps(monkeypatch, lambda fakes, diff, answers: fakes.asnumpy())
    s = tiny(batch_size=30)  # 50 iterations
    dcgan.train(s)
    assert np.array_equal(cv2.imread(f'{s.out}/latest/gout.png'), visual.tile(fakes[-1]))


def test_the_monitor_prints_the_layers_and_diff(tiny, capsys, monkeypatch):
    sizes = watch_steps(monkeypatch, lambda fakes, diff, answers: float(np.sqrt((diff.asnumpy() ** 2).mean())))
    dcgan.train(tiny(batch_size=750, monitor=1))
    found = re.findall(r'^Batch: +(\d) +(\S+) +(\S+)', capsys.readouterr().out, re.M)
    names = {name for _, name, _ in found}
    assert {'g1_output', 'gbn4_output', 'gact5_output', 'd1_output', 'dbn4_output', 'dloss_output'} <= names
    assert {name for name in names if 'backward' in name} == {'d1_backward_output0'}
    for batch, size in zip('12', sizes):
        values = [float(value) for where, name, value in found if (where, name) == (batch, 'd1_backward_output0')]
        assert len(values) == 3  # D sees three batches; MXNet adds up in float32
        assert min(abs(value / size - 1) for value in values) < 0.01


def test_a_notebook_gets_what_is_printed(tiny, monkeypatch):
    """Its stdout has the number of a file, which is not the cell."""
    class Cell(io.StringIO):
        def fileno(self):
            return 1

    cell = Cell()
    monkeypatch.setattr(sys, 'stdout', cell)
    dcgan.train(tiny(batch_size=750))
    assert 'epoch: 0 iter: 2 ' in cell.getvalue() and 'done: ' in cell.getvalue()


# ---------------------------------------------------------------- whole runs

def test_a_run_as_a_child(child, tmp_path):
    """No display, no network, a home that cannot be written: MNIST falls back to the digits, and all is printed."""
    env = {'HOME': '/dev/null', 'SCIKIT_LEARN_DATA': '/dev/null/data', 'DISPLAY': '', 'WAYLAND_DISPLAY': '',
           'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9', 'TMPDIR': str(tmp_path)}
    process = child(env=env, dataset='mnist', epochs=2, display=True, monitor=10)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ''
    assert re.search(r"^WARNING: MNIST cannot be had from OpenML .*digits", out, re.M)
    assert [line[:2] for line in lines(out)] == [('0', '10'), ('0', '15'), ('1', '10'), ('1', '15')]
    assert all(len(match.group()) <= 100 for match in LINE.finditer(out))
    assert 'batch_size=100' in out and 'device: cpu(0)' in out
    assert [len(layer_lines(out, title)[1]) for title in 'GD'] == [5, 5]
    assert 'd1_backward' in out and 'gact5_output' in out  # the monitor
    assert out.count('no window') == 1
    run = os.path.basename(os.path.realpath(tmp_path / 'out' / 'latest'))
    assert re.fullmatch(r'digits_\d{4}(_\d\d){2}-\d\d_\d\d', run)
    assert sorted(os.listdir(tmp_path / 'out')) == [run, 'latest']
    stamp = run.split('_', 1)[1]
    assert sorted(os.listdir(tmp_path / 'out' / run)) == sorted([
        'data.png', 'diff.png', 'gout.png', 'loss.png', 'gout-0000.png', 'gout-0001.png', 'film.webp', 'log.csv',
        *(f'digits_{net}_{stamp}-{end}' for net in 'GD' for end in ('0000.params', '0001.params', 'symbol.json')),
        'state-0001-00000.npz', 'state-0002-00000.npz'])
    assert out.strip().splitlines()[-1].startswith('done: ')


def test_same_seed_same_run(tiny):
    found = []
    for seed in (3, 3, 4):
        s = tiny(out=f'{tiny().out}{len(found)}', seed=seed)
        dcgan.train(s)
        found.append(final_params(s.out))
    assert same_bits(found[0], found[1]) and not same_bits(found[1], found[2])


def test_coverage_pictures_and_monitor_do_not_disturb_the_run(tiny):
    found = []
    for changes in ({}, dict(coverage=True, monitor=5, display=True, plot=True)):
        s = tiny(out=f'{tiny().out}{len(found)}', epochs=2, **changes)
        dcgan.train(s)
        found.append(final_params(s.out))
    assert same_bits(*found)
    assert all(os.path.exists(f'{s.out}/latest/net_{net}.png') == bool(shutil.which('dot')) for net in 'GD')


def test_a_list_of_devices_can_be_written_into_the_settings():
    @dcgan.dataclasses.dataclass
    @dcgan.allow_lists
    class Settings:
        ctx: object = [mx.cpu(0), mx.cpu(1)]
    assert Settings().ctx == [mx.cpu(0), mx.cpu(1)] and Settings().ctx is not Settings().ctx


# ---------------------------------------------------------------- errors a person can cause

@pytest.mark.parametrize('changes, words', [
    (dict(dataset='cifar'), ['cifar', 'mnist']), (dict(ngf=0), ['ngf', '1 or more']), (dict(ndf=-8), ['ndf']),
    (dict(Z=2.5), ['Z']), (dict(batch_size='64'), ['batch_size']), (dict(epochs=0), ['epochs']),
    (dict(batch_size=True), ['batch_size']), (dict(seed=-1), ['seed']), (dict(lr=-1), ['lr']),
    (dict(beta1=1), ['beta1']), (dict(lr=float('nan')), ['lr']), (dict(nc=2), ['nc', '1 or 3']),
    (dict(dataset='imagenet', nc=1), ['nc = 3']), (dict(batch_size=1501), ['batch_size', 'larger than the data']),
    (dict(dataset='imagenet', nc=3, imgnet_path='no.rec'), ['no.rec', 'no such file']),
    (dict(dataset='mnist', mnist_path='nowhere'), ['nowhere', 'train-images-idx3-ubyte']),
    (dict(fallback='x'), ['fallback']), (dict(kvstore='dist_async'), ['dist_async', 'dist_sync']),
    (dict(kvstore='mine'), ['mine']), (dict(sample=3), ['resume']), (dict(digits='12a'), ['12a']),
    (dict(ctx='gpu'), ['ctx', 'mx.cpu()']), (dict(ctx=[]), ['ctx']), (dict(ctx=mx.gpu(0)), ['gpu(0)', 'mx.cpu()']),
    (dict(ctx=[mx.cpu(0), mx.cpu(1), mx.cpu(2)]), ['batch_size', '3 devices']),
    (dict(out='/dev/null/out'), ['/dev/null']), (dict(out=''), ['out', 'folder']),
    (dict(resume='nothing'), ['nothing', 'latest']), (dict(resume='latest'), ['latest']),
    (dict(resume='x_G_y-0003.params'), ['resume', 'sample only']), (dict(kvstore='dist_sync'), ['DMLC_']),
    (dict(conditional=True, dataset='imagenet', nc=3), ['conditional']), (dict(digits=5551234), ['digits', 'quotes']),
    (dict(resume=True), ['resume', 'quotes']), (dict(out=None), ['out', 'quotes']),
    (dict(mnist_path=5), ['mnist_path']),
    (dict(conditional='no'), ['conditional', 'True or False']),
], ids=str)
def test_errors_are_one_line(tiny, capsys, changes, words):
    with pytest.raises(SystemExit) as caught:
        dcgan.train(tiny(**changes))
    message = caught.value.code
    assert message.startswith('dcgan.py: ') and '\n' not in message
    assert all(word in message for word in words), message
    assert 'epoch:' not in capsys.readouterr().out


def test_out_may_be_a_path(tiny, tmp_path):
    dcgan.train(tiny(out=tmp_path / 'a path'))
    about, _ = dcgan.find_state(str(tmp_path / 'a path' / 'latest'))
    assert about['settings']['out'] == str(tmp_path / 'a path')


def test_nothing_to_go_on_from(tiny, capsys):
    s = tiny(check_point=False)
    dcgan.train(s)
    folder = os.path.realpath(os.path.join(s.out, 'latest'))
    assert capsys.readouterr().out.splitlines()[-1] == f'done: everything is in {folder}/'
    assert not [name for name in os.listdir(folder) if name.endswith(('.npz', '.params', '.json'))]


def test_no_fallback_no_training(child, tmp_path):
    process = child(dataset='mnist', fallback='', env={'https_proxy': 'http://127.0.0.1:9',
                                                       'SCIKIT_LEARN_DATA': str(tmp_path / 'home')})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count('\n') == 1 and 'mnist_path' in err
    assert not (tmp_path / 'out').exists()
