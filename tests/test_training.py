"""The networks, the step against the textbook, the metrics, and whole runs."""
import csv
import glob
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import dcgan
import data
import textbook
from conftest import ROOT, final_params

mx = dcgan.mx
LINE = re.compile(r"^epoch: (\d+) iter: (\d+) metric: \('facc', \d\.\d+\) \('fentropy', \d+\.\d+\) "
                  r"\('fentropy', \d+\.\d+\) \d+/s \d+[smhd] \d+[smhd]$", re.M)


def floats(X, nc):
    return np.tile(X.astype(np.float32) / (255.0 / 2) - 1.0, (1, nc, 1, 1))


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


# ---------------------------------------------------------------- the textbook is the judge

@pytest.mark.parametrize('nc', [1, 3])
@pytest.mark.parametrize('seed', [1234, 7])
def test_training_equals_the_textbook_to_the_last_bit(tiny, nc, seed):
    s = tiny(nc=nc, seed=seed, batch_size=250, ngf=8, ndf=8)
    dcgan.train(s)
    expected, metrics = textbook.train(floats(data.get_digits()[0], nc), 6, 8, 8, nc, 8, 250, seed)
    found = {name[4:]: array for arrays in final_params(s.out).values() for name, array in arrays.items()}
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []
    # the line's metrics, gathered late, are those of the steps
    with open(glob.glob(f'{s.out}/*.csv')[0]) as file:
        row = next(csv.DictReader(file))
    assert np.allclose([float(row[name]) for name in ('facc', 'fentropy_G', 'fentropy_D')], np.mean(metrics, axis=0),
                       rtol=1e-6)


def test_every_epoch_has_its_own_latents(tiny):
    s = tiny(batch_size=750, epochs=2)
    dcgan.train(s)
    second = textbook.train(floats(data.get_digits()[0], 1), 2, 4, 4, 1, 8, 750, 3, epochs=2)[0]
    found = {name[4:]: array for arrays in final_params(s.out).values() for name, array in arrays.items()}
    assert all(found[name].tobytes() == second[name].tobytes() for name in second)


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
    assert seen[0] == seen[9] < seen[10] == seen[14]  # only the line after iteration 10 waited


# ---------------------------------------------------------------- metrics

def test_metrics_by_hand():
    label, pred = np.array([1., 1., 0., 0.]), np.array([[0.9], [0.4], [0.2], [0.5]])
    assert dcgan.facc(label, pred) == 0.75
    assert np.isclose(dcgan.fentropy(label, pred), -np.log([0.9, 0.4, 0.8, 0.5]).mean())
    assert np.isclose(dcgan.fentropy(np.zeros(1), np.ones((1, 1))), -np.log(1e-12))
    assert np.isfinite(dcgan.fentropy(np.zeros(1, np.float32), np.ones((1, 1), np.float32)))


def test_span():
    assert [dcgan.span(x) for x in (None, 0, 99, 100, 5999, 6000, 359999, 1e6)] == [
        '?', '0s', '99s', '2m', '100m', '2h', '100h', '12d']


# ---------------------------------------------------------------- whole runs

def test_a_run_as_a_child(child, tmp_path):
    """No display, no network, a home that cannot be written: MNIST falls back to the digits, and all is printed."""
    env = {'HOME': '/dev/null', 'SCIKIT_LEARN_DATA': '/dev/null/data', 'DISPLAY': '', 'WAYLAND_DISPLAY': '',
           'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9', 'TMPDIR': str(tmp_path)}
    process = child(env=env, dataset='mnist', epochs=2, display=True, monitor=10)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(r"^WARNING: MNIST cannot be had from OpenML .*digits", out, re.M)
    assert [match.groups() for match in LINE.finditer(out)] == [('0', '10'), ('1', '10')]
    assert all(len(match.group()) <= 100 for match in LINE.finditer(out))
    assert 'batch_size=100' in out and 'device: cpu(0)' in out and 'Total params' in out
    assert 'd1_backward' in out and 'gact5_output' in out  # the monitor
    assert out.count('no window') == 1
    names = [re.sub(r'\d{4}(_\d\d){2}-\d\d_\d\d', 'STAMP', name) for name in os.listdir(tmp_path / 'out')]
    assert sorted(names) == sorted([
        '.lock', 'data.png', 'diff.png', 'gout.png', 'loss.png', 'gout-0000.png', 'gout-0001.png', 'digits_STAMP.csv',
        'digits_D_STAMP-0000.params', 'digits_D_STAMP-0001.params', 'digits_D_STAMP-symbol.json',
        'digits_G_STAMP-0000.params', 'digits_G_STAMP-0001.params', 'digits_G_STAMP-symbol.json',
        'digits_STAMP-0000.json', 'digits_STAMP-0001.json', 'digits_STAMP-0000.states', 'digits_STAMP-0001.states'])
    assert out.strip().splitlines()[-1].startswith('done: ')


def test_same_seed_same_run(tiny):
    found = []
    for seed in (3, 3, 4):
        s = tiny(out=f'{tiny().out}{len(found)}', seed=seed)
        dcgan.train(s)
        found.append({name: array.tobytes() for arrays in final_params(s.out).values()
                      for name, array in arrays.items()})
    assert found[0] == found[1] != found[2]


def test_coverage_pictures_and_monitor_do_not_disturb_the_run(tiny):
    found = []
    for changes in ({}, dict(coverage=True, monitor=5, display=True, plot=True)):
        s = tiny(out=f'{tiny().out}{len(found)}', epochs=2, **changes)
        dcgan.train(s)
        found.append({name: array.tobytes() for arrays in final_params(s.out).values()
                      for name, array in arrays.items()})
    assert found[0] == found[1]
    assert all(os.path.exists(f'{s.out}/net_{net}.png') == bool(shutil.which('dot')) for net in 'GD')


def test_a_list_of_devices_can_be_written_into_the_settings():
    @dcgan.editable
    class Settings:
        ctx: object = [mx.cpu(0), mx.cpu(1)]
    assert Settings().ctx == [mx.cpu(0), mx.cpu(1)] and Settings().ctx is not Settings().ctx


# ---------------------------------------------------------------- errors a person can cause

@pytest.mark.parametrize('changes, words', [
    (dict(dataset='cifar'), ['cifar', 'mnist']), (dict(ngf=0), ['ngf', '1 or more']), (dict(ndf=-8), ['ndf']),
    (dict(Z=2.5), ['Z']), (dict(batch_size='64'), ['batch_size']), (dict(epochs=0), ['epochs']),
    (dict(batch_size=True), ['batch_size']), (dict(seed=-1), ['seed']), (dict(lr=-1), ['lr']),
    (dict(beta1=1), ['beta1']), (dict(lr=float('nan')), ['lr']), (dict(nc=2), ['nc', '1, 3']),
    (dict(dataset='imagenet', nc=1), ['nc = 3']), (dict(batch_size=1501), ['batch_size', 'larger than the data']),
    (dict(dataset='imagenet', nc=3, imgnet_path='no.rec'), ['no.rec', 'no such file']),
    (dict(dataset='mnist', mnist_path='nowhere'), ['nowhere', 'train-images-idx3-ubyte']),
    (dict(fallback='x'), ['fallback']), (dict(kvstore='dist_async'), ['dist_async', 'dist_sync']),
    (dict(kvstore='mine'), ['mine']), (dict(sample=3), ['resume']), (dict(digits='12a'), ['12a']),
    (dict(ctx='gpu'), ['ctx', 'mx.cpu()']), (dict(ctx=[]), ['ctx']), (dict(ctx=mx.gpu(0)), ['gpu(0)', 'mx.cpu()']),
    (dict(ctx=[mx.cpu(0), mx.cpu(1), mx.cpu(2)]), ['batch_size', '3 devices']),
    (dict(out='/dev/null/out'), ['/dev/null']), (dict(resume='nothing.json'), ['nothing.json']),
    (dict(resume='latest'), ['no whole checkpoint']), (dict(kvstore='dist_sync'), ['DMLC_']),
    (dict(conditional=True, dataset='imagenet', nc=3), ['conditional']), (dict(digits=5551234), ['digits', 'quotes']),
    (dict(resume=True), ['resume', 'quotes']), (dict(out=None), ['out', 'quotes']), (dict(mnist_path=5), ['mnist_path']),
    (dict(conditional='no'), ['conditional', 'True or False']),
], ids=str)
def test_errors_are_one_line(tiny, capsys, changes, words):
    with pytest.raises(SystemExit) as caught:
        dcgan.train(tiny(**changes))
    message = caught.value.code
    assert message.startswith('dcgan.py: ') and '\n' not in message
    assert all(word in message for word in words), message
    assert 'epoch:' not in capsys.readouterr().out


def test_a_gpu_that_the_wheel_has_no_code_for(tiny, monkeypatch):
    def ones(*args):
        raise mx.MXNetError('[bt] (0) libmxnet.so\nCUDA: Check failed: e == cudaSuccess: no kernel image is available')

    monkeypatch.setattr(mx.nd, 'ones', ones)
    with pytest.raises(SystemExit, match=r'^dcgan.py: ctx = cpu\(0\): .*no kernel image.* 5.0 to 8.9 .*mx.cpu\(\)'):
        dcgan.train(tiny())


def test_out_may_be_a_path(tiny, tmp_path):
    dcgan.train(tiny(out=tmp_path / 'a path'))
    assert dcgan.find_checkpoint('latest', str(tmp_path / 'a path'))['settings']['out'] == str(tmp_path / 'a path')


def test_nothing_to_go_on_from(tiny, capsys):
    s = tiny(check_point=False)
    dcgan.train(s)
    assert capsys.readouterr().out.splitlines()[-1] == f'done: everything is in {s.out}/'


def test_no_fallback_no_training(child, tmp_path):
    process = child(dataset='mnist', fallback='', env={'https_proxy': 'http://127.0.0.1:9',
                                                       'SCIKIT_LEARN_DATA': str(tmp_path / 'home')})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count('\n') == 1 and 'mnist_path' in err


@pytest.mark.parametrize('fake, words', [
    ("sys.modules['mxnet'] = None", ['mxnet', 'pip install', 'tests/requirements.txt']),
    ("sys.modules['joblib'] = None", ['joblib', 'tests/requirements.txt']),
    ("sys.version_info = (3, 13, 0)", ['Python', '3.12']),
    ("import numpy; numpy.__version__ = '2.1.0'", ['NumPy 2.1.0', 'numpy<2']),
    ("import ctypes, importlib.metadata as m; m.version = lambda name: '1'\n"
     "sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(lambda name, *a: (_ for _ in ()).throw("
     "OSError('libcuda.so.1: cannot open shared object file')) if name == 'mxnet' else None)}))",
     ['libcuda.so.1', 'driver', 'tests/requirements.txt']),
    ("sys.meta_path.insert(0, type('F', (), {'find_spec': staticmethod(lambda name, *a: (_ for _ in ()).throw("
     "ImportError('libGL.so.1: cannot open shared object file')) if name == 'visual' else None)}))",
     ['libGL.so.1', 'opencv-python-headless']),
], ids=['no mxnet', 'nothing', 'python 3.13', 'numpy 2', 'no driver', 'no libGL'])
def test_a_machine_that_cannot_run_it_is_told_so_in_one_line(fake, words):
    done = subprocess.run([sys.executable, '-c', f'import sys\n{fake}\nimport dcgan'], capture_output=True, text=True,
                          cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_threads_are_the_physical_cores_unless_set():
    import joblib
    code = 'import dcgan, os; print(os.environ["OMP_NUM_THREADS"])'
    env = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    for more, expected in (({}, str(joblib.cpu_count(only_physical_cores=True))), ({'OMP_NUM_THREADS': '3'}, '3')):
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                              env={**env, **more}, timeout=60)
        assert done.stdout.split()[-1] == expected
