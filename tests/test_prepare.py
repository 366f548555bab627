"""What data.py does before it imports MXNet: libraries, environment, NumPy's old names; and which devices fit."""
import os
import runpy
import shutil
import subprocess
import sys
import types
from unittest import mock

import data

import numpy as np
import pytest
import scipy.sparse
from conftest import ROOT, cases, python, refused

mx = data.mx


def prepare():
    """Run data.py once more. Its SystemExit is what a process would end with."""
    runpy.run_path(data.__file__)


def fail_at(monkeypatch, module, error):
    """Let the import of a module raise an error."""
    def find_spec(name, *args):
        if name == module:
            raise error

    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, 'meta_path', [types.SimpleNamespace(find_spec=find_spec), *sys.meta_path])


def library(name):
    return OSError(f'{name}: cannot open shared object file: No such file or directory')


def package(name):
    return ModuleNotFoundError(f'No module named {name!r}', name=name)


@cases('module, error, words', {
    'no MXNet': ('mxnet', package('mxnet'), ['No module', 'pip install', 'tests/requirements.txt']),
    'no requests': ('mxnet', package('requests'), ['requests', 'pip install', 'tests/requirements.txt']),
    'libgomp': ('mxnet', library('libgomp.so.1'), ['libgomp.so.1', 'apt-get install libgomp1 libquadmath0']),
    'libGL': ('cv2', ImportError(library('libGL.so.1')), ['apt-get install libgl1', 'opencv-python-headless']),
    'no driver': ('mxnet', library('libcuda.so.1'), ['libcuda.so.1', 'driver', 'tests/requirements.txt']),
    'no CUDA': ('mxnet', library('libcudart.so.11.0'), ['libcudart.so.11.0', '-r requirements.txt'])})
def test_what_is_missing_is_told_in_one_line(monkeypatch, module, error, words):
    fail_at(monkeypatch, module, error)
    with pytest.raises(SystemExit) as end:
        prepare()
    line = end.value.code
    assert line.startswith('dcgan.py: ') and '\n' not in line
    assert all(word in line for word in words), line


@cases('error', {'a library': library('libother.so.1'), 'a part of a package': package('numpy.core')})
def test_an_error_that_was_not_foreseen_keeps_its_traceback(monkeypatch, error):
    fail_at(monkeypatch, 'mxnet', error)
    with pytest.raises(type(error)) as caught:
        prepare()
    assert caught.value is error


def test_ctrl_c_during_the_imports(monkeypatch):
    fail_at(monkeypatch, 'mxnet', KeyboardInterrupt())
    with pytest.raises(SystemExit) as end:
        prepare()
    assert end.value.code == 130


def test_too_little_memory():
    code = 'from resource import *\nsetrlimit(RLIMIT_AS, (10 ** 9, 10 ** 9))\nimport data'
    status, out, err = python('-c', code, cwd=ROOT)
    assert (status, out, err.count('\n')) == (1, '', 1)
    assert err.startswith('dcgan.py: ') and 'ulimit -v unlimited' in err


def test_threads_that_are_no_number_and_no_lscpu():
    """MXNet would abort; joblib would print why it cannot count the physical cores."""
    code = 'import data\ndata.mx.nd.ones(9).asnumpy()\nprint(int(data.os.environ["OMP_NUM_THREADS"]) > 0)'
    assert python('-c', code, cwd=ROOT, OMP_NUM_THREADS='auto', PATH='') == (0, 'True\n', '')


@pytest.mark.parametrize('given, taken', [('7', 7), ('3,2', 3), ('', None), ('0', None), ('auto', None)])
def test_the_number_of_threads(monkeypatch, given, taken):
    """The first number of a list; if there is none, one thread for each physical core."""
    monkeypatch.setenv('OMP_NUM_THREADS', given)
    prepare()
    assert os.environ['OMP_NUM_THREADS'] == str(taken or data.joblib.cpu_count(only_physical_cores=True))


def test_numpy_is_as_it_was_after_the_import():
    """While MXNet is imported, NumPy answers to names that it has taken away."""
    assert np.__getattr__.__module__ == 'numpy' and not hasattr(np, 'no_such_name')
    assert scipy.sparse.csr_matrix(np.eye(3, dtype=bool)).sum() == 3
    assert np.ma.masked_array([1, 2], [True, False]).sum() == 2


def test_a_scheduler_whose_name_has_no_address(monkeypatch):
    monkeypatch.setenv('DMLC_ROLE', 'worker')
    monkeypatch.setenv('DMLC_PS_ROOT_URI', 'a..b')
    with pytest.raises(SystemExit) as end:
        prepare()
    assert 'DMLC_PS_ROOT_URI=a..b: this name has no' in end.value.code and '\n' not in end.value.code


# ---------------------------------------------------------------- GPUs

@pytest.mark.skipif(not shutil.which('gcc'), reason='there is no gcc')
def test_libraries_come_from_beside_mxnet_alone(tmp_path):
    """Another nvidia folder on sys.path and another cuDNN in LD_LIBRARY_PATH are left alone."""
    site, other, cudnn = tmp_path / 'a [site]', tmp_path / 'other', tmp_path / 'nvidia-cudnn'
    for i, name in enumerate(data.CUDA):
        library = site / f'nvidia/{i}/lib' / name
        library.parent.mkdir(parents=True)
        code = ''
        if name == 'libcudnn.so.8':  # opens its parts by their names alone
            code = '#include <dlfcn.h>\nint open_part(const char *name) { return dlopen(name, RTLD_NOW) != 0; }'
        subprocess.run(['gcc', '-x', 'c', '-', '-shared', '-fPIC', f'-Wl,-soname,{name}', '-o', library, '-ldl'],
                       check=True, input=code.encode())
    shutil.copytree(site / 'nvidia', other / 'nvidia')
    parts = [f'libcudnn_{part}.so.8' for part in ('ops_infer', 'ops_train', 'cnn_infer', 'cnn_train')]
    cudnn.mkdir()
    for name in parts:
        shutil.copy(site / f'nvidia/{data.CUDA.index(name)}/lib' / name, cudnn)
    (site / 'mxnet').symlink_to(os.path.dirname(mx.__file__))
    status, out, err = python('-c', f'''
import ctypes
import data
for name in {parts}:
    assert ctypes.CDLL('libcudnn.so.8').open_part(name.encode()) == 1, name
for path in {{line.split(maxsplit=5)[-1] for line in open('/proc/self/maps') if 'nvidia' in line}}:
    print(path, end='')''', cwd=ROOT, PYTHONPATH=f'{other}:{site}', LD_LIBRARY_PATH=str(cudnn))
    assert status == 0, err
    assert sorted(out.splitlines()) == sorted(map(str, site.glob('nvidia/*/lib/*')))


@cases('role, gpu_build, found, ctx, words', {
    'none': (None, True, 0, mx.cpu(), ['WARNING', 'driver', 'R450', 'CUDA_VISIBLE_DEVICES', '--gpus all', 'CPU']),
    'an error': (None, True, mx.MXNetError('[bt] (0) libmxnet.so\nCUDA: bad'), mx.cpu(), ['WARNING', 'CUDA: bad']),
    'a CPU build': (None, False, mx.MXNetError('no CUDA'), mx.cpu(), []),
    'two': (None, True, 2, mx.gpu(0), []),
    'a scheduler asks for none': ('scheduler', True, AssertionError('asked'), mx.cpu(), [])})
def test_the_default_device(capsys, monkeypatch, role, gpu_build, found, ctx, words):
    monkeypatch.setattr(data, 'ROLE', role)
    monkeypatch.setattr(data, 'GPU_BUILD', gpu_build)
    monkeypatch.setattr(mx.context, 'num_gpus', mock.Mock(side_effect=[found]))
    assert data.default_ctx() == ctx
    said = capsys.readouterr().out
    assert said.count('\n') == bool(words) and all(word in said for word in words)


@cases('capability, free, problem', {
    'Kepler': ((3, 7), 8e9, 'has compute capability 3.7, and mxnet-cu112 has code for 5.0 to 8.9 only'),
    'Hopper': ((9, 0), 8e9, 'has compute capability 9.0'),
    'Ada': ((8, 9), 8e9, ''),
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
