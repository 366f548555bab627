"""What data.py does before it imports MXNet: libraries, environment, NumPy's old names; and which devices fit."""
import os
import shutil
import subprocess
import sys
import types
from unittest import mock

import data

import pytest
from conftest import ROOT, cases, refused

mx = data.mx


def run(code, *options, **env):
    """Run code in a process of its own: its exit status, stdout, stderr. Keywords are variables; None unsets one."""
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    done = subprocess.run([sys.executable, *options, '-c', f'import os, sys\n{code}'], capture_output=True, text=True,
                          cwd=ROOT, env=env)
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


def library(name, module='mxnet', problem='cannot open shared object file: No such file or directory'):
    return failing(module, f"{'OSError' if module == 'mxnet' else 'ImportError'}('{name}: {problem}')")


def absent(name, module=None):
    return failing(module or name, f'ModuleNotFoundError("No module named {name!r}", name={name!r})')


@cases('fake, words', {
    'no mxnet': (absent('mxnet'), ['mxnet', 'pip install', 'tests/requirements.txt']),
    'no joblib': (absent('joblib'), ['joblib', 'pip install', 'tests/requirements.txt']),
    'no requests': (absent('requests', 'mxnet'), ['requests', 'pip install', 'tests/requirements.txt']),
    'Python 3.7': ('sys.version_info = (3, 7, 17)', ['Python 3.8']),
    'Windows': ("import asyncio, shutil; sys.platform = 'win32'", ['WSL 2']),
    'libgomp': (library('libgomp.so.1'), ['libgomp.so.1', 'apt-get install libgomp1 libquadmath0']),
    'libGL': (library('libGL.so.1', 'cv2'), ['apt-get install libgl1', 'opencv-python-headless']),
    'no driver': (library('libcuda.so.1'), ['libcuda.so.1', 'driver', 'tests/requirements.txt']),
    'no CUDA': (library('libcudart.so.11.0'), ['libcudart.so.11.0', 'pip install', '-r requirements.txt']),
    'ulimit -v': ('from resource import *\nsetrlimit(RLIMIT_AS, (10 ** 9, 10 ** 9))', ['ulimit -v unlimited']),
    'noexec': (library('libmxnet.so', problem='failed to map segment from shared object'), ['libmxnet.so', 'noexec']),
    'not foreseen': (library('libgomp_plugin.so.1'), ['Traceback', 'libgomp_plugin.so.1']),
    'a part of a package': (absent('numpy.core', 'mxnet'), ['Traceback', 'numpy.core']),
    'without a name': (failing('mxnet', 'ModuleNotFoundError("no name")'), ['Traceback', 'no name']),
    'permission': (failing('joblib', "PermissionError(13, 'Permission denied')"), ['Traceback', 'Permission denied'])})
def test_a_machine_that_cannot_run_it_is_told_so_in_one_line(fake, words):
    """But an error that nobody has foreseen keeps its traceback."""
    status, _, err = run(f'{fake}\nimport data')
    assert status == 1 and all(word in err for word in words), err
    if 'Traceback' in words:
        assert words[1] in err.splitlines()[-1], err  # and no other error while that one was handled
    else:
        assert err.count('\n') == 1 and err.startswith('dcgan.py: '), err
        assert 'requirements' not in err or any('requirements' in word for word in words)  # only what helps


def test_ctrl_c_during_the_imports():
    assert run(f'import signal\n{failing("mxnet", "signal.raise_signal(2)")}\nimport data') == [130, '', '']


def test_options_of_python():
    code = f'sys.path.insert(0, {ROOT!r})\nimport data\nprint(len(data.get_digits()[0]))'
    assert run(code, '-W', 'error', '-I', '-O') == [0, '1500\n', '']
    status, _, err = run(code, '-OO')
    assert status == 1 and err.count('\n') == 1 and 'without -OO' in err


def test_numpy_and_its_users_are_as_they_were_after_the_import():
    status, _, err = run('''
import types
import numpy as np
names = 'PZERO', 'alltrue', 'in1d', 'mirr', 'no_such_name', 'bool'
def ask(name):  # as that module
    module = types.ModuleType(name)
    exec('import numpy; found = [hasattr(numpy, name) for name in ("no_such_name", "__no_such_name__")]', vars(module))
    return module.found
class Finder:  # while MXNet is imported, MXNet alone is answered
    def find_spec(name, *args):
        if name == 'mxnet':
            asked.extend(map(ask, ('mxnet.numpy.fallback', 'scipy.sparse', 'mxnetlike')))
asked = []
before = np.__getattr__, [hasattr(np, name) for name in names]
sys.meta_path.insert(0, Finder)
import data
assert asked[-3:] == [[True, False], [False, False], [False, False]], asked
assert before == (np.__getattr__, [hasattr(np, name) for name in names])
assert np.bool is np.bool_ if np.lib.NumpyVersion(np.__version__) >= '2.0.0' else 'bool' not in vars(np)
import scipy.sparse
assert scipy.sparse.csr_matrix(np.eye(3, dtype=bool)).sum() == 3
assert np.ma.masked_array([1, 2], [True, False]).sum() == 2''')
    assert status == 0, err


def test_the_environment_unless_the_user_has_set_it():
    """One thread for each physical core; the rest is for GPUs."""
    names = ['OMP_NUM_THREADS', 'MXNET_USE_FUSION', 'MXNET_CUDNN_LIB_CHECKING', 'CUDA_MODULE_LOADING',
             'MXNET_GPU_MEM_POOL_RESERVE']
    code = f'import data\nprint(*[os.environ.get(name) for name in {names}])'
    cores = str(data.joblib.cpu_count(only_physical_cores=True))
    assert run(code, **dict.fromkeys(names))[1].split() == [cores, '0', '0', 'LAZY', '1']
    assert run(code, **dict(zip(names, ('7', '1', '1', 'EAGER', '5'))))[1].split() == ['7', '1', '1', 'EAGER', '5']
    code = 'import data\ndata.mx.nd.ones(9).asnumpy()\nprint(os.environ["OMP_NUM_THREADS"])'
    for given, taken in {'3,2': '3', '': cores, '0': cores, 'auto': cores}.items():
        assert run(code, OMP_NUM_THREADS=given) == [0, f'{taken}\n', '']
    status, out, err = run(code, OMP_NUM_THREADS=None, PATH='')  # without lscpu
    assert (status, err) == (0, '') and int(out) > 0


def test_a_scheduler_asks_for_no_device():
    assert run('''
import data
def touched(*args):
    raise SystemExit('touched')
data.mx.context.num_gpus = data.mx.nd.ones = touched
data.GPU_BUILD = True
assert data.default_ctx() == data.mx.cpu()''', DMLC_ROLE='scheduler') == [0, '', '']


def test_a_worker_is_given_the_schedulers_address_as_numbers():
    code = 'import data\nprint(os.environ["DMLC_ROLE"], os.environ["DMLC_PS_ROOT_URI"])'
    assert run(code, DMLC_ROLE='worker', DMLC_PS_ROOT_URI='localhost') == [0, 'worker 127.0.0.1\n', '']
    code = f'import socket\nsocket.gethostbyname = lambda host: "127.0.1.1"\n{code}'
    status, out, err = run(code, DMLC_ROLE='worker', DMLC_PS_ROOT_URI='debian')  # has its own name there
    assert (status, out) == (0, 'worker 127.0.1.1\n') and 'debian is 127.0.1.1 here: set the address' in err
    status, out, err = run('import data', DMLC_ROLE='worker', DMLC_PS_ROOT_URI='a..b')
    assert (status, out, err.count('\n')) == (1, '', 1) and 'DMLC_PS_ROOT_URI=a..b: this name has no' in err


PARTS = [f'libcudnn_{part}.so.8' for part in ('ops_infer', 'ops_train', 'cnn_infer', 'cnn_train')]
SHIM = '#include <dlfcn.h>\nint open_part(const char *name) { return dlopen(name, RTLD_NOW) != 0; }'  # cuDNN's own way
CUDART = 'int cudaDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 9 : 0; return 0; }'


def stub(folder, name, code=''):
    """Make a shared library of that name, which stands for one of CUDA's."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(['gcc', '-x', 'c', '-', '-shared', '-fPIC', f'-Wl,-soname,{name}', '-o', folder / name, '-ldl'],
                   check=True, input=code.encode())


def opened(code, **env):
    """Import `data` as on a GPU box, run code, and return the CUDA libraries in the process's memory."""
    status, out, err = run(f'''import data
{code}
for path in {{line.split(maxsplit=5)[-1] for line in open('/proc/self/maps') if 'nvidia' in line}}:
    print(path, end='')''', **env)
    assert status == 0, err
    return sorted(out.splitlines())


@pytest.mark.skipif(not shutil.which('gcc'), reason='there is no gcc')
def test_libraries_come_from_beside_mxnet_alone(tmp_path):
    """Another nvidia folder on sys.path and another cuDNN in LD_LIBRARY_PATH are left alone; the GPU is asked."""
    site, other = tmp_path / 'a [site]', tmp_path / 'other'
    for i, name in enumerate(data.CUDA):
        for folder in site, other:
            stub(folder / f'nvidia/{i}/lib', name, {'libcudart.so.11.0': CUDART, 'libcudnn.so.8': SHIM}.get(name, ''))
    for name in PARTS:
        stub(tmp_path / 'ld/nvidia', name)
    (site / 'mxnet').symlink_to(os.path.dirname(mx.__file__))
    found = opened(f'''
import ctypes, types
for name in {PARTS}:
    assert ctypes.CDLL('libcudnn.so.8').open_part(name.encode()) == 1, name
data.GPU_BUILD, touched = True, []
data.mx.nd.ones = data.mx.context.gpu_memory_info = lambda *args: touched.append(args)
try:
    data.check_devices(types.SimpleNamespace(ctx=(data.mx.gpu(0),)))
    raise SystemExit('passed')
except ValueError as error:
    assert str(error).startswith('ctx = gpu(0): has compute capability 9.0, '), error
assert touched == []''', PYTHONPATH=f'{other}:{site}', LD_LIBRARY_PATH=str(tmp_path / 'ld/nvidia'))
    assert found == sorted(str(site / f'nvidia/{i}/lib' / name) for i, name in enumerate(data.CUDA))


@pytest.mark.skipif(not shutil.which('gcc'), reason='there is no gcc')
def test_libraries_of_cuda_12_beside_mxnet_are_left_alone(tmp_path):
    for name in ('libcusolver.so.11', 'libcudart.so.12', *PARTS, 'libcudnn.so.8'):
        stub(tmp_path / 'nvidia/12/lib', name)
    (tmp_path / 'mxnet').symlink_to(os.path.dirname(mx.__file__))
    assert opened('', PYTHONPATH=str(tmp_path)) == []


@pytest.mark.parametrize('gpu_build, found, ctx, words', [
    (True, 0, mx.cpu(), ['WARNING', 'driver', 'R450', 'CUDA_VISIBLE_DEVICES', '--gpus all', 'CPU']),
    (True, mx.MXNetError('[bt] (0) libmxnet.so\nCUDA: invalid device'), mx.cpu(), ['WARNING', 'invalid device']),
    (False, mx.MXNetError('no CUDA'), mx.cpu(), []), (False, 2, mx.gpu(0), [])], ids=str)
def test_the_default_device(capsys, monkeypatch, gpu_build, found, ctx, words):
    monkeypatch.setattr(data, 'GPU_BUILD', gpu_build)
    monkeypatch.setattr(mx.context, 'num_gpus', mock.Mock(side_effect=[found]))
    assert data.default_ctx() == ctx
    said = capsys.readouterr().out
    assert said.count('\n') == bool(words) and all(word in said for word in words)


@cases('capability, free, problem', {
    'Kepler': ((3, 7), 8e9, 'has compute capability 3.7, and mxnet-cu112 has code for 5.0 to 8.9 only'),
    'Hopper': ((9, 0), 8e9, 'has compute capability 9.0'), 'Blackwell': ((12, 1), 8e9, 'compute capability 12.1'),
    'Maxwell': ((5, 0), 8e9, ''), 'Ada': ((8, 9), 8e9, ''), 'CUDA knows no such GPU': ((0, 0), 8e9, ''),
    'full': ((8, 0), 1e8, 'only 0.1 GB of its memory are free')})
def test_a_gpu_that_does_not_fit(monkeypatch, capability, free, problem):
    """Found before the first operator, which might end the process; of the second of two devices, too."""
    def get_attribute(number, attribute, device_id):
        number._obj.value = capability[attribute - 75]

    touched, ones = [], mx.nd.ones
    monkeypatch.setattr(data, 'GPU_BUILD', True)
    monkeypatch.setattr(data.ctypes, 'CDLL', lambda name: types.SimpleNamespace(cudaDeviceGetAttribute=get_attribute))
    monkeypatch.setattr(mx.context, 'gpu_memory_info', lambda number: (free, 8e9))
    monkeypatch.setattr(mx.nd, 'ones', lambda shape, ctx: touched.append(ctx) or ones(shape))
    devices = types.SimpleNamespace(ctx=(mx.cpu(), mx.gpu(1)))
    if problem:
        refused(lambda: data.check_devices(devices), 'ctx = gpu(1): ', problem, 'set ctx to mx.cpu() or to another')
    else:
        data.check_devices(devices)
    assert touched == [mx.cpu()] + [mx.gpu(1)] * (not problem)
