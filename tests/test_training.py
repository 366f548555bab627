"""The networks, the step against the textbook, the metrics, the average, the lines, whole runs, and the settings."""
import os
import re
import shutil
import threading
from pathlib import Path

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
import textbook
from conftest import ROOT, TINY, cases, contents, ended, newest, python, read_state, rows, state, train_and_stop
from conftest import watch_steps as watch

import dcgan
import visual

# what is printed -> [(epoch, iteration, images/s, time left)], as text
lines = re.compile(r"^epoch: (\d+) iter: (\d+) metric: \('facc', \d\.\d+\) \('fentropy', \d+\.\d+\) "
                   r"\('fentropy', \d+\.\d+\) (\d+)/s, ((?:\d+ days?, )?\d+:\d\d:\d\d) left$", re.M).findall
METRICS = ('facc', 'fentropy_G', 'fentropy_D')
ALL = data.get_digits(labels=True)


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
    assert found['gact5_output'] == (64, nc, 64, 64) and found['dloss_output'] == (64, 1)
    assert [name for name in found if name.endswith('_bias')] == ['d1_bias'] and ('digit' in found) == bool(classes)
    assert {'gbn1_gamma', 'gact4_output', 'dbn2_gamma', 'dact1_output'} <= set(found)


def test_symbol_options_reach_the_layers():
    gout, dloss = dcgan.make_dcgan_sym(4, 4, 1, no_bias=False, fix_gamma=False, eps=0.5)
    for symbol, layer in ((gout, 'gbn1'), (dloss, 'dbn2')):
        assert symbol.attr_dict()[layer]['eps'] == '0.5' and symbol.attr_dict()[layer]['fix_gamma'] == 'False'
    assert {'g5_bias', 'd1_bias', 'd5_bias'} <= {*gout.list_arguments(), *dloss.list_arguments()}
    gout, dloss = dcgan.make_dcgan_sym(4, 4, 1)  # as the published script calls it
    assert 'bias' not in ' '.join(gout.list_arguments() + dloss.list_arguments())


@pytest.mark.parametrize('d1_bias', [False, True])
def test_only_with_the_bias_does_d_see_contrast(d1_bias):
    """Without it every layer up to the first BatchNorm scales along, and BatchNorm takes the scale away."""
    _, dloss = dcgan.make_dcgan_sym(4, 4, 1, eps=0., d1_bias=d1_bias)
    mod = mx.mod.Module(dloss, label_names=('label',))
    mod.bind([('data', (20, 1, 64, 64))], [('label', (20,))])
    rng = np.random.RandomState(0)
    weights = {name: mx.nd.array(rng.normal(0, 0.1, array.shape))
               for name, array in mod._exec_group.execs[0].arg_dict.items() if name.endswith(('weight', 'bias'))}
    mod.init_params(mx.init.One(), weights, allow_missing=True)
    images = mx.nd.array(ALL[0][:20] / 127.5 - 1)
    whole, half = (dcgan.forward_backward(mod, [x], mx.nd.ones(20)).asnumpy() for x in (images, images / 2))
    assert abs(whole - half).max() > 0.01 if d1_bias else abs(whole - half).max() < 1e-4
    assert whole.std() > 0.01  # else they would be alike anyway


# ---------------------------------------------------------------- the textbook is the judge

PUBLISHED = dict(d1_bias=False, pos_label=1.0, head_start=0, lr_steady=0)


@cases('settings, nc, conditional', {  # a head start may end in the second epoch, which has latents of its own
    'published': (PUBLISHED, 3, False), 'published, nc 1': ({**PUBLISHED, 'seed': 7}, 1, False),
    'default': (dict(head_start=17, lr_steady=16, epochs=2), 3, False),
    'default, nc 1': (dict(head_start=5, lr_steady=8), 1, False),
    'conditional': (dict(head_start=5, lr_steady=8, epochs=2), 3, True)})
def test_training_equals_the_textbook_to_the_last_bit(few, settings, nc, conditional):
    settings = {'seed': 1234, 'd1_bias': True, 'pos_label': 0.9, **settings}
    s = few(nc=nc, ngf=8, conditional=conditional, **settings)
    dcgan.train(s)
    classes = ALL[2][:115] if conditional else None  # the digits are all there, and so their own positions
    X = np.tile(ALL[0][:115].astype(np.float32) / (255.0 / 2) - 1.0, (1, nc, 1, 1))
    record = []
    expected, metrics = textbook.train(X, 12, 8, 4, nc, 8, 10, y=classes, record=record, **settings)
    found = state(s.out)
    assert [name for name, array in expected.items() if found[name] != array.tobytes()] == []
    # a line's metrics, gathered late, are the means of its own steps, each of which is in one line
    answers = [[answer.mean() for answer in step[2:]] for step in record]  # to fakes, to reals, to fakes after
    for i, row in enumerate(rows(s.out)):
        steps = slice(12 * (i // 2) + 10 * (i % 2), 12 * (i // 2) + (12 if i % 2 else 10))
        assert np.allclose([float(row[name]) for name in METRICS], np.mean(metrics[steps], axis=0), rtol=1e-6)
        assert np.allclose([float(row[name]) for name in ('d_fake', 'd_real', 'd_fake_after')],
                           np.mean(answers[steps], axis=0), rtol=1e-5)


def test_the_lr_of_pictures_is_steady(few):
    assert dcgan.learning_rates(few(dataset='imagenet', lr_steady=9), 100) == (0.0002, 0.0002)


def test_metrics_by_hand():
    label, pred = np.array([1., 1., 0., 0.]), np.array([[0.9], [0.4], [0.2], [0.5]])
    assert dcgan.facc(label, pred) == 0.75
    assert np.isclose(dcgan.fentropy(label, pred), -np.log([0.9, 0.4, 0.8, 0.5]).mean())
    assert np.isclose(dcgan.fentropy(np.zeros(1), np.ones((1, 1))), -np.log(1e-12))
    assert np.isfinite(dcgan.fentropy(np.zeros(1, np.float32), np.ones((1, 1), np.float32)))


# ---------------------------------------------------------------- nothing waits, nothing disturbs

def test_nothing_waits_between_two_lines(few, monkeypatch):
    """Of the loop's asnumpy and waits none is between two lines; a line's answers are one copy."""
    events = []
    for owner, name in ((mx.nd.NDArray, 'asnumpy'), (mx.nd.NDArray, 'wait_to_read'), (mx.nd, 'waitall'),
                        (dcgan, 'train_step')):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, f=original: events.append(name) or f(*args))
    dcgan.train(few(batch_size=5, conditional=True))
    for steps in (10, 10, 3):
        del events[:events.index('train_step')]
        # then the average waits, or it could miss BatchNorm's moving averages
        assert events[:steps + 2] == ['train_step'] * steps + ['asnumpy', 'waitall']
        del events[:steps]
    assert 'train_step' not in events


@pytest.mark.parametrize('average', [0.99, 0.0])
def test_the_average_of_g(few, monkeypatch, average):
    """It is recomputed from the weights that G has at first and at each line."""
    def weights(modules, *_):
        mx.nd.waitall()
        return {name: array.asnumpy() for arrays in modules[0].get_params() for name, array in arrays.items()}

    s = few(average=average, epochs=2, batch_size=5, ctx=(mx.cpu(),))
    seen = watch(monkeypatch, weights)
    dcgan.train(s)
    mean = weights(dcgan.make_modules(s, [('data', (5, 1, 64, 64))], [('rand', (5, 8, 1, 1))]))
    for n, step in enumerate([9, 19, 22, 32, 42, 45]):
        decay = min(average, (1 + n) / (10 + n))
        mean = {name: decay * mean[name] + (1 - decay) * seen[step][name] for name in mean}
    _, arrays = read_state(newest(s.out))
    exact = {name: arrays[f'{name}_average'].tobytes() == seen[-1][name].tobytes() for name in mean}
    assert all(np.allclose(arrays[f'{name}_average'], mean[name], rtol=1e-5, atol=1e-7) for name in mean)
    files = [name for name in os.listdir(newest(s.out)) if '_Gmean_' in name]
    assert (len(files), all(exact.values()), exact['g1_weight']) == ((3, False, False) if average else (0, True, True))


def test_nothing_that_is_shown_disturbs_the_run(few):
    found = []
    for changes in {}, dict(average=0.0, coverage=True, monitor=5, display=True, plot=True), dict(seed=4):
        s = few(out=f'{few().out}{len(found)}', **changes)
        dcgan.train(s)
        found.append({name: array for name, array in state(s.out).items() if not name.endswith('_average')})
        assert (newest(s.out) / 'net_G.png').exists() == (s.plot and bool(shutil.which('dot')))
    assert found[0] == found[1] != found[2]


# ---------------------------------------------------------------- lines and pictures

def test_the_lines_of_a_run(few, capsys, monkeypatch):
    """On a clock of its own: a step lasts a second, all else no time."""
    now, step = [1000.], dcgan.train_step
    monkeypatch.setattr(dcgan.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(dcgan, 'train_step', lambda *args: now.__setitem__(0, now[0] + 1) or step(*args))
    s = few(epochs=1000)
    train_and_stop(s, 22)
    out = capsys.readouterr().out
    assert 'data: digits, 12 iterations an epoch; run: ' in out and 'WARNING' not in out
    assert 'G: 15,096 parameters\nD: 11,444 parameters\n' in out
    assert lines(out) == [('0', '10', '10', '3:19:50'), ('0', '12', '10', '3:19:48'), ('1', '10', '10', '3:19:38')]
    columns = ('epoch', 'iteration', 'seconds', 'images_per_second')
    found = [{name: float(row[name]) for name in (*columns, *METRICS)} for row in rows(s.out)]
    assert [[row[name] for name in columns] for row in found] == [[0, 10, 10, 10], [0, 12, 12, 10], [1, 10, 22, 10]]
    for row in found:
        assert "metric: ('facc', {:.2f}) ('fentropy', {:.2f}) ('fentropy', {:.2f}) 10/s".format(
            *(row[name] for name in METRICS)) in out
    assert out.splitlines()[-1] == (f"stopped in epoch 1 after iteration 10; pictures and log: {newest(s.out)}/; "
                                    "to resume: resume = 'latest'; samples: resume = 'latest', sample = 64")


def test_the_pictures_are_of_the_last_step(few, monkeypatch, capsys):
    """Also if the film has a frame of that iteration, for which other latents are drawn; and nothing is saved."""
    seen = watch(monkeypatch, lambda _, fakes, diff, __: (fakes.asnumpy(), diff.asnumpy()))
    s = few(images=100, batch_size=2, check_point=False)  # 50 iterations: no further line at the end
    dcgan.train(s)
    out = capsys.readouterr().out
    assert [line[1] for line in lines(out)] == ['10', '20', '30', '40', '50'] and out.endswith('; nothing was saved\n')
    assert not [name for name in os.listdir(newest(s.out)) if name.endswith(('.npz', '.params', '.json'))]
    fakes, diff = seen[-1]
    assert np.array_equal(cv2.imread(f'{newest(s.out)}/gout.png'), visual.tile(fakes))
    assert np.array_equal(cv2.imread(f'{newest(s.out)}/diff.png'), visual.tile((diff - diff.mean()) / diff.std()))


def test_the_monitor_prints_the_layers_and_diff(few, capsys, monkeypatch):
    sizes = watch(monkeypatch, lambda _, fakes, diff, __: float(np.sqrt((diff.asnumpy() ** 2).mean())))
    dcgan.train(few(batch_size=100, monitor=1))
    found = re.findall(r'^Batch: +1 +(\S+) +(\S+)', capsys.readouterr().out, re.M)
    assert {'g1_output', 'gbn4_output', 'gact5_output', 'd1_output', 'dbn4_output', 'dloss_output'} <= set(dict(found))
    values = [float(value) for name, value in found if name == 'd1_backward_output0']
    assert len(values) == 3 and min(abs(value / sizes[0] - 1) for value in values) < 0.01  # D sees three batches


# ---------------------------------------------------------------- a whole run, and how a process ends

def test_a_run_as_a_child(tmp_path):
    """No display, and a home that cannot be written. MXNet's own end, which may crash, does not come."""
    code = f"""import atexit, dcgan, sys
sys.argv = ['dcgan.py']
settings = dcgan.Settings(**{dict(TINY, display=True, epochs=2)!r})
dcgan.Settings = lambda: settings
atexit.register(print, 'its own end')
print('in the buffer')
dcgan.main()"""
    status, out, err = python('-c', code, cwd=tmp_path, HOME='/dev/null', DISPLAY='', WAYLAND_DISPLAY='',
                              PYTHONPATH=ROOT, PYTHONUNBUFFERED='')
    assert (status, err) == (0, '') and 'its own end' not in out and 'in the buffer' in out
    assert [line[:2] for line in lines(out)] == [('0', '10'), ('0', '15'), ('1', '10'), ('1', '15')]
    assert "batch_size=100 " in out and 'device: cpu(0); ' in out and out.count('no window') == 1
    assert out.splitlines()[-1].startswith('done; ')
    assert list(tmp_path.glob('out/digits_*/state.npz'))


@pytest.mark.parametrize('words, options', [
    ('nowhere/state.npz', ['-I', '-W', 'error', 'there/dcgan.py']),
    ('takes no arguments', ['-m', 'there.dcgan', '--help']),
    ('-OO', ['-OO', 'there/dcgan.py']), ('there/data/__init__.py: rename', ['there/dcgan.py'])])
def test_ways_to_start(tmp_path, words, options):
    """It works, or it is one line; if it works, it ends here with a setting that names a run that is not there."""
    (tmp_path / 'there').mkdir()
    for name in 'dcgan.py', 'data.py', 'visual.py':
        script = (Path(ROOT) / name).read_text().replace("resume: str = ''", "resume: str = 'nowhere'")
        (tmp_path / 'there' / name).write_text(script)
    if 'rename' in words:  # the user's own package of that name
        (tmp_path / 'there' / 'data').mkdir()
        (tmp_path / 'there' / 'data' / '__init__.py').touch()
    status, out, err = python(*options, cwd=tmp_path)
    assert status == 1 and err.count('\n') == 1 and err.startswith('dcgan.py: ') and words in err


def test_little_memory(tmp_path):
    """MXNet's own message and a crash at its end do not come."""
    code = f'import resource, dcgan\nresource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)\n' \
           f'dcgan.Settings = lambda s=dcgan.Settings(**{dict(TINY, batch_size=1000, ngf=512)!r}): s\ndcgan.main()'
    status, out, err = python('-c', code, cwd=tmp_path, PYTHONPATH=ROOT)
    assert status == 1 and err.count('\n') == 1 and err.startswith('dcgan.py: ') and 'memory' in err.lower()


def test_a_thread_of_a_web_app(few):
    """It trains, and what goes wrong there is seen."""
    found = []

    def work():
        dcgan.train(few())
        with pytest.raises(RuntimeError) as error:
            dcgan.train(few(ngf=0))
        found.append(str(error.value))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ['dcgan.py: ngf = 0: must be 1 or more, and less than 10000']
    assert read_state(newest(few().out))[0]['epoch'] == 1


# ---------------------------------------------------------------- the settings

@pytest.mark.parametrize('changes, words', [
    (dict(ndf=0), 'ndf = 0: must be 1 or more'), (dict(nc=2), '1 or 3'), (dict(nc=True), 'a whole number'),
    (dict(lr='0.1'), 'a number'), (dict(lr=float('nan')), 'more than 0'), (dict(out=3), 'text in quotes'),
    (dict(dataset='cifar'), "'mnist'"), (dict(ctx=(mx.cpu(0), mx.cpu(1), mx.cpu(2))), 'a multiple of the 3 devices'),
    (dict(ctx=mx.gpu(7)), 'ctx = gpu(7): '), (dict(sample=5), "resume 'latest'"), (dict(digits='7'), 'conditional'),
    (dict(resume='nowhere'), 'nowhere/state.npz'), (dict(out='/dev/null/out'), '/dev/null'),
    (dict(batch_size=9999), 'larger than the data')], ids=str)
def test_a_setting_that_cannot_work(few, monkeypatch, changes, words):
    """It is told before the data are loaded, and leaves nothing behind."""
    if 'batch_size' not in changes:
        monkeypatch.setattr(data, 'load_data', None)
    s = few(**changes)
    assert words in ended(s)
    assert contents(few().out) == {}


def test_settings_of_other_types(few, tmp_path, monkeypatch, capsys):
    """NumPy's numbers, paths, and the home folder; without a home it is one line."""
    monkeypatch.setenv('HOME', str(tmp_path))
    for changes in (dict(batch_size=np.int64(23), lr=np.float64(0.001), check_point=np.bool_(True), out='~/runs'),
                    dict(out=tmp_path / 'runs', ctx=[mx.cpu(0), mx.cpu(1)])):
        dcgan.train(few(**changes))
    assert 'device: cpu(0), cpu(1); ' in capsys.readouterr().out and len(os.listdir(tmp_path / 'runs')) == 2
    monkeypatch.delenv('HOME')
    monkeypatch.setattr('pwd.getpwuid', {}.__getitem__)  # no entry either
    assert "out = '~/runs'" in ended(few(out='~/runs'))
