"""What data.py does before it imports MXNet: libraries, environment, NumPy's old names; and which devices fit."""
import os
import re
import shutil
import subprocess
import sys
import types
from unittest import mock

import data

import pytest
from conftest import ROOT, cases, refused

import dcgan

mx = data.mx


def run(code, **env):
    """Run code in a process of its own. Keywords are environment variables, None unsets one.

    Returns the exit status, stdout and stderr.
    """
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    done = subprocess.run([sys.executable, '-c', f'import os, sys\n{code}'], capture_output=True, text=True, cwd=ROOT,
                          timeout=300, env=env)
    return [done.returncode, done.stdout, done.stderr]


def failing(module, error):
    """Code after which the import of a module raises that."""
    return f'''
class Finder:
    def find_spec(name, *args):
        if name == {module!r}:
            raise {error}
sys.meta_path.insert(0, Finder)
sys.modules.pop({module!r}, None)'''


def library(name, module='mxnet', kind='OSError'):
    return failing(module, f"{kind}('{name}: cannot open shared object file: No such file or directory')")


@cases('fake, words', {
    **{name: (failing(module, f'ModuleNotFoundError("No module named {name!r}", name={name!r})'),
              [name, 'pip install', 'tests/requirements.txt'])
       for name, module in (('mxnet', 'mxnet'), ('joblib', 'joblib'), ('numpy', 'numpy'), ('cv2', 'cv2'),
                            ('sklearn', 'sklearn'), ('scipy', 'scipy.stats'), ('requests', 'mxnet'))},
    'Python 3.7': ('sys.version_info = (3, 7, 17)', ['Python 3.8']),
    'Windows': ("import asyncio, shutil; sys.platform = 'win32'", ['WSL 2']),
    **{name: (library(name), [name, 'apt-get install libgomp1 libquadmath0'])
       for name in ('libgomp.so.1', 'libquadmath.so.0')},
    'libGL': (library('libGL.so.1', 'cv2', 'ImportError'), ['apt-get install libgl1', 'opencv-python-headless']),
    **{name: (library(name, 'cv2', 'ImportError'), ['apt-get install libglib2.0-0'])
       for name in ('libgthread-2.0.so.0', 'libglib-2.0.so.0')},
    'libz': (library('libz.so.1'), ['apt-get install zlib1g']),
    'no driver': (library('libcuda.so.1'), ['libcuda.so.1', 'driver', 'tests/requirements.txt']),
    **{name: (library(name), [name, 'pip install', '-r requirements.txt'])
       for name in ('libcudart.so.11.0', 'libcudnn.so.8')},
    **{f'not foreseen: {words}': (fake, ['Traceback', words]) for fake, words in (
        (library('libgmp.so.10'), 'libgmp.so.10'),
        (library('libgomp_plugin.so.1'), 'libgomp_plugin.so.1'),
        (failing('mxnet', "OSError('/x/libmxnet.so: undefined symbol: cudnnCreate')"), 'undefined symbol'),
        (failing('mxnet', '''ImportError("cannot import name 'bool' from 'numpy'")'''), 'cannot import name'),
        (failing('mxnet', '''ModuleNotFoundError("No module named 'numpy.core'", name='numpy.core')'''), 'numpy.core'),
        (failing('mxnet', '''ModuleNotFoundError("without a name")'''), 'without a name'),
        (failing('joblib', "PermissionError(13, 'Permission denied')"), 'Permission denied'),
        (failing('visual', "ImportError('a mistake in visual.py')"), 'a mistake in visual.py'))}})
def test_a_machine_that_cannot_run_it_is_told_so_in_one_line(fake, words):
    """But an error that nobody has foreseen keeps its traceback."""
    status, _, err = run(f'{fake}\nimport dcgan')
    assert status == 1 and all(word in err for word in words), err
    if 'Traceback' in words:
        assert words[1] in err.splitlines()[-1], err  # and no other error while that one was handled
    else:
        assert err.count('\n') == 1 and err.startswith('dcgan.py: '), err
        needs = any('pip' in word or 'requirements' in word for word in words)
        assert needs or 'requirements' not in err  # only what helps


def test_numpy_and_its_users_are_as_they_were_after_the_import():
    status, _, err = run('''
import warnings
import numpy as np
warnings.simplefilter('ignore')
names = 'PZERO', 'alltrue', 'in1d', 'mirr', 'no_such_name', 'bool'
before = np.__getattr__, [hasattr(np, name) for name in names]
import data
assert before == (np.__getattr__, [hasattr(np, name) for name in names])
assert np.bool is np.bool_ if np.lib.NumpyVersion(np.__version__) >= '2.0.0' else 'bool' not in vars(np)
from scipy.stats import entropy
import scipy.sparse
from sklearn.neural_network import MLPClassifier
X = np.random.RandomState(0).rand(40, 5)
y = (X[:, 0] > 0.5).astype(int)
assert MLPClassifier((8,), max_iter=400, random_state=0, solver='lbfgs').fit(X, y).score(X, y) > 0.9
assert abs(entropy([0.5, 0.5]) - np.log(2)) < 1e-12
assert scipy.sparse.csr_matrix(np.eye(3, dtype=bool)).sum() == 3
assert np.ma.masked_array([1, 2], [True, False]).sum() == 2''')
    assert status == 0, err


def test_only_mxnet_is_answered_while_it_is_imported(monkeypatch):
    """The answer depends on the module that asks: MXNet's own, or any other."""
    def ask(name):
        module = types.ModuleType(name)
        exec('import numpy\nfound = [getattr(numpy, name, "none") for name in ("no_such_name", "__no_such_name__")]',
             module.__dict__)
        return module.found

    monkeypatch.setattr(data.np, '__getattr__', data.getattr_for_mxnet)
    assert ask('mxnet.numpy.fallback') == [None, 'none']
    assert ask('scipy.sparse') == ask('mxnetlike') == ['none', 'none']


ENVIRONMENT = {'MXNET_USE_FUSION': '0', 'MXNET_CUDNN_LIB_CHECKING': '0', 'CUDA_MODULE_LOADING': 'LAZY',
               'MXNET_GPU_MEM_POOL_RESERVE': '1'}


def test_the_environment_unless_a_person_has_set_it():
    """One thread for each physical core; the rest is for GPUs."""
    import joblib
    code = f'import data\nprint(*[os.environ.get(name) for name in {["OMP_NUM_THREADS", *ENVIRONMENT]}])'
    nothing = dict.fromkeys(['OMP_NUM_THREADS', *ENVIRONMENT])
    cores = str(joblib.cpu_count(only_physical_cores=True))
    assert run(code, **nothing)[1].split() == [cores, *ENVIRONMENT.values()]
    theirs = dict(zip(nothing, ('7', '1', '1', 'EAGER', '5')))
    assert run(code, **theirs)[1].split() == list(theirs.values())


@pytest.mark.parametrize('role', ['scheduler', 'server'])
def test_a_scheduler_and_a_server_ask_for_no_device(role):
    assert run('''
import data
def touched(*args):
    raise SystemExit('touched')
data.mx.context.num_gpus = data.mx.nd.ones = data.check_capability = touched
data.GPU_BUILD = True
assert data.default_ctx() == data.mx.cpu()
import dcgan
assert dcgan.Settings().ctx == data.mx.cpu()''', DMLC_ROLE=role) == [0, '', '']


def test_a_worker_is_given_the_schedulers_address_as_numbers():
    code = 'import data\nprint(os.environ["DMLC_ROLE"], os.environ["DMLC_PS_ROOT_URI"])'
    assert run(code, DMLC_ROLE='worker', DMLC_PS_ROOT_URI='localhost') == [0, 'worker 127.0.0.1\n', '']
    code = f'import socket\nsocket.gethostbyname = lambda host: "127.0.1.1"\n{code}'
    status, out, err = run(code, DMLC_ROLE='worker', DMLC_PS_ROOT_URI='debian')  # has its own name there
    assert (status, out) == (0, 'worker 127.0.1.1\n') and 'debian is 127.0.1.1 here: set the address' in err
    code = 'import data'
    for host in 'no-such-host.invalid', 'a..b':
        status, out, err = run(code, DMLC_ROLE='worker', DMLC_PS_ROOT_URI=host)
        assert (status, out, err.count('\n')) == (1, '', 1)
        assert err.startswith(f'dcgan.py: DMLC_PS_ROOT_URI={host}: ') and 'address' in err


@pytest.fixture(scope='module')
def stub(tmp_path_factory):
    """Make a shared library of that name, which stands for one of CUDA's; C's code may be given."""
    if not shutil.which('gcc'):
        pytest.skip('there is no gcc')
    source = tmp_path_factory.mktemp('stub') / 'stub.c'

    def make(folder, name, code=''):
        folder.mkdir(parents=True, exist_ok=True)
        source.write_text(code)
        subprocess.run(['gcc', '-shared', '-fPIC', f'-Wl,-soname,{name}', '-o', folder / name, source, '-ldl'],
                       check=True)

    return make


def opened(code, **env):
    """Import `data` as on a GPU box, run code, and return the CUDA libraries in the process's memory."""
    status, out, err = run(f'''import data
{code}
for path in {{line.split(maxsplit=5)[-1] for line in open('/proc/self/maps') if 'nvidia' in line}}:
    print(path, end='')''', **env)
    assert status == 0, err
    return sorted(out.splitlines())


PARTS = [f'libcudnn_{part}.so.8' for part in ('ops_infer', 'ops_train', 'cnn_infer', 'cnn_train')]
SHIM = '#include <dlfcn.h>\nint open_part(const char *name) { return dlopen(name, RTLD_NOW) != 0; }'  # cuDNN's own way
CUDART = '''
int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 5;
    return 0;
}'''


def test_libraries_come_from_beside_mxnet_alone(stub, tmp_path):
    """Another nvidia folder on sys.path and another cuDNN in LD_LIBRARY_PATH are left alone; the GPU is asked."""
    site, other = tmp_path / 'a [site]', tmp_path / 'other'
    for i, name in enumerate(data.CUDA):
        for folder in site, other:
            stub(folder / f'nvidia/{i}/lib', name, {'libcudart.so.11.0': CUDART, 'libcudnn.so.8': SHIM}.get(name, ''))
    for name in PARTS:
        stub(tmp_path / 'ld/nvidia', name)
    (site / 'mxnet').symlink_to(os.path.dirname(mx.__file__))
    found = opened(f'''
for name in {PARTS}:
    assert data.ctypes.CDLL('libcudnn.so.8').open_part(name.encode()) == 1, name
data.GPU_BUILD, touched = True, []
data.mx.nd.ones = data.mx.context.gpu_memory_info = lambda *args: touched.append(args)
import types
try:
    data.check_devices(types.SimpleNamespace(ctx=(data.mx.gpu(0),)))
    raise SystemExit('passed')
except ValueError as error:
    assert str(error).startswith('ctx = gpu(0): has compute capability 9.0, '), error
assert touched == []''', PYTHONPATH=f'{other}:{site}', LD_LIBRARY_PATH=str(tmp_path / 'ld/nvidia'))
    assert found == sorted(str(site / f'nvidia/{i}/lib' / name) for i, name in enumerate(data.CUDA))


def test_libraries_of_cuda_12_beside_mxnet_are_left_alone(stub, tmp_path):
    for name in ('libcusolver.so.11', 'libcudart.so.12', *PARTS, 'libcudnn.so.8'):
        stub(tmp_path / 'nvidia/12/lib', name)
    (tmp_path / 'mxnet').symlink_to(os.path.dirname(mx.__file__))
    assert opened('', PYTHONPATH=str(tmp_path)) == []


@pytest.mark.parametrize('gpu_build, found, ctx, words', [
    (True, 0, mx.cpu(), ['WARNING', 'driver', 'R450', 'CUDA_VISIBLE_DEVICES', '--gpus all', 'CPU']),
    (True, mx.MXNetError('[bt] (0) libmxnet.so\nCUDA: invalid device'), mx.cpu(), ['WARNING', 'invalid device']),
    (False, mx.MXNetError('no CUDA'), mx.cpu(), []), (False, 2, mx.gpu(0), [])], ids=str)
def test_the_default_device(capsys, monkeypatch, gpu_build, found, ctx, words):
    monkeypatch.setattr(data, 'ROLE', None)
    monkeypatch.setattr(data, 'GPU_BUILD', gpu_build)
    monkeypatch.setattr(mx.context, 'num_gpus', mock.Mock(side_effect=[found]))
    assert data.default_ctx() == ctx
    said = capsys.readouterr().out
    assert said.count('\n') == bool(words) and all(word in said for word in words)


@pytest.fixture
def touched(monkeypatch):
    """Stand-ins for two GPUs, of which the first is nearly full; the list of what has been done with them."""
    found, ones, free = [], mx.nd.ones, {0: 10 ** 8, 1: 8 * 10 ** 9}
    monkeypatch.setattr(mx.context, 'gpu_memory_info', lambda number: found.append('memory') or (free[number], 8e9))
    monkeypatch.setattr(mx.nd, 'ones', lambda shape, ctx: found.append(ctx) or ones(shape))
    return found


@pytest.mark.parametrize('capability, fit', [
    ((3, 7), False), ((5, 0), True), ((8, 9), True), ((9, 0), False), ((12, 1), False),
    ((0, 0), True)])  # CUDA knows no such GPU, as MXNet will say
def test_a_gpu_that_the_wheel_has_no_code_for(monkeypatch, touched, capability, fit):
    """Asked before the first operator, and before the GPU's memory, which would be the first to touch it."""
    def get_attribute(number, attribute, device_id):
        number._obj.value = capability[attribute - 75]

    cudart = types.SimpleNamespace(cudaDeviceGetAttribute=get_attribute)
    monkeypatch.setattr(data, 'GPU_BUILD', True)
    monkeypatch.setattr(data.ctypes, 'CDLL', lambda name: cudart)
    if fit:
        data.check_devices(dcgan.Settings(ctx=(mx.gpu(1),)))
    else:
        refused(lambda: data.check_devices(dcgan.Settings(ctx=(mx.gpu(1),))),
                'ctx = gpu(1): has compute capability {}.{}, and mxnet-cu112 has code for 5.0 to 8.9 only, '
                'Maxwell to Ada; set ctx to mx.cpu() or to another GPU'.format(*capability))
    assert touched == (['memory', mx.gpu(1)] if fit else [])


def test_a_gpu_that_is_full(touched):
    """MXNet would end the process; so its memory is looked at first. The defaults need more than 0.1 GB."""
    for devices in ((mx.gpu(0),), (mx.gpu(1), mx.gpu(0))):
        with pytest.raises(ValueError) as caught:
            data.check_devices(dcgan.Settings(ctx=devices))
        needed = re.fullmatch(r'ctx = gpu\(0\): 0\.1 GB .* free, about (\d\.\d) GB are needed \(CUDA_VISIBLE_DEVICES=1 '
                              r'.*\); set ctx to mx\.cpu\(\) or to another GPU', str(caught.value))
        assert 0.8 <= float(needed[1]) <= 1.1
    data.check_devices(dcgan.Settings(ctx=(mx.gpu(1), mx.cpu())))
    assert touched == ['memory', 'memory', mx.gpu(1), 'memory', 'memory', mx.gpu(1), mx.cpu()]


def planned(ngf, ndf, nc, batch_size):
    """Bytes that MXNet plans for the layers: of G and D in training, and of G in inference."""
    gout, dloss = dcgan.make_dcgan_sym(ngf, ndf, nc)
    modG, mean, modD = (mx.mod.Module(symbol, data_names=(name,), label_names=labels) for symbol, name, labels in (
        (gout, 'rand', None), (gout, 'rand', None), (dloss, 'data', ['label'])))
    modG.bind([('rand', (batch_size, 100, 1, 1))])
    modD.bind([('data', (batch_size, nc, 64, 64))], [('label', (batch_size,))])
    mean.bind([('rand', (batch_size, 100, 1, 1))], for_training=False)
    # in MiB, in spite of their name
    return 2 ** 20 * (modG._total_exec_bytes + modD._total_exec_bytes), 2 ** 20 * mean._total_exec_bytes


@pytest.mark.parametrize('ngf, ndf, nc, batch_size', [
    (64, 64, 3, 64), (64, 64, 1, 128), (128, 32, 3, 32), (16, 16, 1, 256), (16, 64, 3, 100)])
def test_the_memory_estimate_against_mxnets_plan(ngf, ndf, nc, batch_size):
    def layers(ctx=(mx.gpu(0),)):
        s = dcgan.Settings(ngf=ngf, ndf=ndf, nc=nc, batch_size=batch_size, ctx=ctx)
        return data.memory_needed(s) - data.memory_needed(dcgan.dataclasses.replace(s, batch_size=0))

    training, drawing = planned(ngf, ndf, nc, batch_size)
    # images are also wanted outside that plan, which matters where the networks are narrow
    assert 1 < layers() / (training + drawing) < 1.2 + 4 * batch_size * 8 * 64 * 64 * nc / training
    # of two devices each has half a batch, but the first draws
    one, two = layers(), layers(ctx=(mx.gpu(0), mx.gpu(1)))
    assert 0.9 * drawing < 2 * two - one < 1.1 * drawing + 2 ** 20
