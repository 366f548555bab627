"""What the networks are fed and measured with: MNIST, the digits, pictures, latent vectors, and a judge of digits.

This module prepares MXNet and is the first to import it.
"""
import contextlib
import ctypes
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import math
import os
import re
import socket
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

# ---------------------------------------------------------------- preparing MXNet, before it is imported

if sys.platform == 'win32' or sys.version_info < (3, 8):  # noqa: UP036  an older one must be told, too
    sys.exit('dcgan.py: needs Python 3.8 or newer, and on Windows WSL 2, which is Linux: MXNet has no other package')
if sys.flags.optimize > 1:
    sys.exit('dcgan.py: MXNet reads its own docstrings; start Python without -OO and PYTHONOPTIMIZE=2')
PACKAGES = 'pip install --no-deps -r requirements.txt (NVIDIA GPU) or tests/requirements.txt (any other machine)'
CUDA = ('libcudart.so.11.0', 'libnvrtc.so.11.2', 'libcublasLt.so.11', 'libcublas.so.11', 'libcufft.so.10',
        'libcurand.so.10', 'libcusolver.so.11',
        # libcudnn.so.8 opens these four later by their names alone, and would take another cuDNN's
        'libcudnn_ops_infer.so.8', 'libcudnn_ops_train.so.8', 'libcudnn_cnn_infer.so.8', 'libcudnn_cnn_train.so.8',
        'libcudnn.so.8', 'libnccl.so.2', 'libnvToolsExt.so.1')
CURES = {**dict.fromkeys(CUDA, PACKAGES), 'libz.so.1': 'apt-get install zlib1g',
         'libcuda.so.1': f'there is no NVIDIA driver; install it, or {PACKAGES}',
         **dict.fromkeys(('libgomp.so.1', 'libquadmath.so.0'), 'apt-get install libgomp1 libquadmath0'),
         **dict.fromkeys(('libgthread-2.0.so.0', 'libglib-2.0.so.0'), 'apt-get install libglib2.0-0'),
         'libGL.so.1': 'apt-get install libgl1, or pip install opencv-python-headless, which has no windows'}
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2 ** 27))  # more are a damaged file's, or 3 GB
os.environ.setdefault('OPENCV_LOG_LEVEL', 'FATAL')      # this program names the pictures that OpenCV cannot read
os.environ.setdefault('MXNET_SUBGRAPH_VERBOSE', '0')    # no line on stderr for each network
os.environ.setdefault('MXNET_USE_FUSION', '0')          # a driver older than CUDA 11.8's cannot load what it makes
os.environ.setdefault('MXNET_CUDNN_LIB_CHECKING', '0')  # no warning that cuDNN is newer than the build's
os.environ.setdefault('CUDA_MODULE_LOADING', 'LAZY')    # kernels at their first use: less memory, a faster start
os.environ.setdefault('MXNET_GPU_MEM_POOL_RESERVE', '1')  # per cent: if less is free, MXNet empties its pool
os.environ['MXNET_UPDATE_ON_KVSTORE'] = '0'             # Adam's state of several devices stays here, to be saved


@contextlib.contextmanager
def quiet():
    """Keep other packages' warnings, and tracebacks of errors they recover from, off stderr; also with -W error."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        yield


def last_line(error):
    """What an error says, without MXNet's C++ stack trace."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def getattr_for_mxnet(name):
    """NumPy's `__getattr__` while MXNet is imported, which reads names that are gone, and later uses only `bool`."""
    try:
        return numpy_getattr(name)
    except AttributeError:
        if sys._getframe(1).f_globals.get('__name__', '').split('.')[0] != 'mxnet' or name[:2] == '__':
            raise
        return bool if name == 'bool' else None


def load_cuda():
    """Load CUDA 11 only from PyPI's packages beside MXNet: a CUDA 12 elsewhere has some of the names, too."""
    origin = getattr(importlib.util.find_spec('mxnet'), 'origin', None) or ''
    folder = glob.escape(os.path.dirname(os.path.dirname(origin)))
    if glob.glob(f'{folder}/nvidia/*/lib/libcudart.so.11.0'):
        for name in CUDA:
            for path in glob.glob(f'{folder}/nvidia/*/lib/{name}'):
                ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


try:
    import resource
    if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < 2e9:  # libraries would crash, not say so
        sys.exit('dcgan.py: too little memory may be used here; start it after `ulimit -v unlimited`')
    with quiet():
        import joblib
        threads = os.environ.get('OMP_NUM_THREADS', '').split(',')[0].strip()  # '4,2' is for nested loops
        if not threads.isdecimal() or int(threads) == 0:  # MXNet would take half of the processors
            threads = joblib.cpu_count(only_physical_cores=True)
        os.environ['OMP_NUM_THREADS'] = str(threads)
        import cv2
        import numpy as np
        import scipy.stats
        import sklearn.datasets
        import sklearn.neural_network
        load_cuda()
        # in a scheduler or server `import mxnet` would serve and never return; dcgan.join does that
        ROLE = os.environ.pop('DMLC_ROLE', None)
        numpy_getattr, np.__getattr__ = np.__getattr__, getattr_for_mxnet
        try:
            import mxnet as mx
        finally:
            np.__getattr__ = numpy_getattr
    GPU_BUILD = mx.runtime.Features().is_enabled('CUDA')
except KeyboardInterrupt:
    sys.exit(130)
except (ImportError, OSError) as error:
    package = isinstance(error, ModuleNotFoundError) and '.' not in (error.name or '.')
    cure = PACKAGES if package else CURES.get(str(error).split(':')[0])
    if not cure:
        raise
    sys.exit(f'dcgan.py: {last_line(error)}: {cure}')
if ROLE:
    os.environ['DMLC_ROLE'] = ROLE
    host = os.environ.get('DMLC_PS_ROOT_URI', 'localhost')
    try:  # MXNet's parameter server understands an IPv4 address alone
        os.environ['DMLC_PS_ROOT_URI'] = socket.gethostbyname(host)
    except (OSError, UnicodeError):
        sys.exit(f'dcgan.py: DMLC_PS_ROOT_URI={host}: this name has no IPv4 address here; set the address itself')


def default_ctx():
    """GPU 0 if there is a GPU, else the CPU; a GPU build of MXNet that finds no GPU says so."""
    reason = 'a driver older than CUDA 11.0 (R450), CUDA_VISIBLE_DEVICES, or a container without --gpus all'
    if ROLE in ('scheduler', 'server'):  # these two do not compute
        return mx.cpu()
    try:
        if mx.context.num_gpus():
            return mx.gpu(0)
    except mx.MXNetError as error:
        reason = last_line(error)
    if GPU_BUILD:
        print(f'WARNING: MXNet sees no GPU (usual reasons: {reason}); training on the CPU', flush=True)
    return mx.cpu()


def check_gpu(device_id):
    """Raise ValueError if a GPU does not fit: MXNet's first operator might end the process without a word."""
    cudart = ctypes.CDLL('libcudart.so.11.0')  # the one that MXNet has loaded
    major, minor = ctypes.c_int(), ctypes.c_int()
    cudart.cudaDeviceGetAttribute(ctypes.byref(major), 75, device_id)  # cudaDevAttrComputeCapabilityMajor
    cudart.cudaDeviceGetAttribute(ctypes.byref(minor), 76, device_id)
    if major.value not in (0, 5, 6, 7, 8):  # 0: there is no such GPU, as MXNet will say
        raise ValueError(f'has compute capability {major.value}.{minor.value}, and mxnet-cu112 has code for 5.0 to '
                         '8.9 only, Maxwell to Ada')
    free = mx.context.gpu_memory_info(device_id)[0]
    if free < 0.7e9:  # what MXNet itself takes
        raise ValueError(f'only {free / 1e9:.1f} GB of its memory are free '
                         '(CUDA_VISIBLE_DEVICES=1 python dcgan.py takes the second GPU alone)')


def check_devices(s):
    """Raise ValueError if a device cannot be used: MXNet finds out late and says it at length, or crashes."""
    for ctx in s.ctx:
        try:
            if ctx.device_type == 'gpu' and GPU_BUILD:
                check_gpu(ctx.device_id)
            mx.nd.ones(1, ctx).asnumpy()
        except (ValueError, OSError, mx.MXNetError) as error:
            raise ValueError(f'ctx = {ctx}: {last_line(error)}; set ctx to mx.cpu() or to another GPU') from None


# ---------------------------------------------------------------- MNIST and digits

def get_mnist(path='', labels=False):
    """MNIST in the one order that every run uses: all images, training then test, permuted by RandomState(1234).

    `path` is a folder with the four IDX files of MNIST or a set like it, gzip-compressed or not; or one of these files;
    or what their names begin with, as `.../emnist-letters`; or Keras' mnist.npz, or its folder. Empty: from OpenML.
    Returns `X_train, X_test`, uint8 (60000, 1, 64, 64) and (10000, 1, 64, 64), 0..255; with `labels` also `y_train,
    y_test`, uint8 (60000,) and (10000,). Images of other sizes are stretched.
    Raises ValueError if a file is not what it should be, OSError if one is missing or OpenML cannot be had.
    """
    if not path:
        X, y = _from_openml()
        return _prepare(X, y, len(X) * 6 // 7, labels)  # 60,000 of 70,000
    npz = path if path.endswith('.npz') else os.path.join(path, 'mnist.npz')
    if os.path.isfile(npz):
        return _prepare(*_read_npz(npz), labels)
    prefix = _find_set(path)
    emnist = os.path.basename(prefix).startswith('emnist')  # its images lie transposed
    X, y = [], []
    for parts in ['train'], ['t10k', 'test']:
        images, classes = _read_idx(prefix, parts, 'images', 3), _read_idx(prefix, parts, 'labels', 1)
        if len(classes) != len(images):
            raise ValueError(f'{prefix}{parts[0]}-labels-idx1-ubyte: {len(classes)} labels for {len(images)} images; '
                             'take both files from one download')
        X.extend(image.T if emnist else image for image in images)
        y.append(classes)
    return _prepare(X, np.concatenate(y), len(y[0]), labels)


def get_digits(labels=False):
    """scikit-learn's bundled 8x8 digits as a stand-in for MNIST: `get_mnist`'s returns, 1,500 and 297 images."""
    bunch = sklearn.datasets.load_digits()
    return _prepare((bunch.images * (255 / 16)).astype(np.uint8), bunch.target, 1500, labels)


def _prepare(X, y, num_train, labels):
    """Permute, resize to 64x64, split."""
    order = np.random.RandomState(1234).permutation(len(X))
    images = np.empty((len(X), 1, 64, 64), np.uint8)
    how = cv2.INTER_AREA if max(X[0].shape) > 64 else cv2.INTER_LINEAR
    for image, i in zip(images, order):
        cv2.resize(X[i], (64, 64), dst=image[0], interpolation=how)
    y = y[order].astype(np.uint8)
    splits = images[:num_train], images[num_train:], y[:num_train], y[num_train:]
    return splits if labels else splits[:2]


def _find_set(path):
    """The path that the four files' names begin with. MNIST's own names come first."""
    path = re.split('(?:train|t10k|test)-(?:images|labels)[-.]idx', path)[0] or '.'  # one of the four: its folder
    prefix = os.path.join(path, '') if os.path.isdir(path) else path
    sets = set()
    for below in '', '*/', '*/*/':  # torchvision has MNIST/raw, Kaggle for each file a folder of its name
        names = glob.glob(f'{glob.escape(prefix)}{below}*train-images[-.]idx3-ubyte*')
        sets = sets or {name[:name.rindex('train-images')] for name in names if not os.path.isdir(name)}
    if not sets:
        raise FileNotFoundError(f"{path}: no training images there; mnist_path must name the folder of MNIST's four "
                                "IDX files, train-images-idx3-ubyte[.gz] and so on, or Keras' mnist.npz; CSV, zip and "
                                "pickle are not read; '' takes MNIST from OpenML")
    if len(sets) > 1 and prefix not in sets:
        names = ', '.join(sorted(name.rstrip('-/') for name in sets))
        raise ValueError(f'{path}: set mnist_path to one of its sets, {names}')
    return prefix if prefix in sets else sets.pop()


def _read_file(path):
    """A file's content, unpacked. What a download has saved may be something else than the name says."""
    with open(path, 'rb') as file:
        content = file.read()
    try:
        content = gzip.decompress(content) if content[:2] == b'\x1f\x8b' else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: damaged file ({error}); fetch it again') from None
    if content[:99].lstrip(b'\xef\xbb\xbf \t\r\n')[:1] == b'<':
        raise ValueError(f"{path}: this is a web page; fetch the file itself, or set mnist_path = '': OpenML has MNIST")
    if content.startswith(b'version https://git-lfs'):
        raise ValueError(f'{path}: a Git LFS pointer, not the file; run `git lfs pull` in its repository')
    return content


def _read_idx(prefix, parts, what, ndim):
    """One of the four IDX files (LeCun's MNIST page, "FILE FORMATS"), uint8 of `ndim` dimensions."""
    # exchanged in the whole path, for Kaggle has each file in a folder of the file's name
    paths = [re.sub('train-images([-.])idx3', rf'{part}-{what}\1idx{ndim}', f'{prefix}train-images{dot}idx3-ubyte{gz}')
             for part in parts for dot in '-.' for gz in ('', '.gz')]
    path = next(filter(os.path.isfile, paths), None)
    if not path:
        raise FileNotFoundError(f'{paths[0]}[.gz]: no such file; mnist_path must name a folder with all four')
    content, begin = _read_file(path), 4 * (1 + ndim)
    magic, *shape = struct.unpack(f'>{1 + ndim}I', content[:begin].ljust(begin, b'\0'))
    if magic != 0x800 + ndim or 0 in shape or len(content) != begin + math.prod(shape):
        raise ValueError(f'{path}: wrong or damaged file (no IDX file of {what}, empty, cut short, or with bytes left '
                         f'over: its header says {magic:#x} {shape}, and {0x800 + ndim:#x} is right); fetch it again')
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _read_npz(path):
    """All images and labels of a file like Keras' mnist.npz, and how many of them are for training."""
    content = io.BytesIO(_read_file(path))
    try:
        with np.load(content, allow_pickle=False) as file:
            X, X_test, y, y_test = (file[name] for name in ('x_train', 'x_test', 'y_train', 'y_test'))
        images, classes = np.concatenate([X, X_test]), np.concatenate([y, y_test])
        if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape or classes.shape != images.shape[:1]:
            raise ValueError(f'has images {images.dtype} {images.shape}, labels {classes.shape}')
    except Exception as error:  # NumPy and zipfile have a dozen kinds for a damaged file
        raise ValueError(f"{path}: damaged, or not Keras' mnist.npz ({last_line(error)}); fetch it again") from None
    return images, classes, len(X)


def _memory():
    """joblib's cache, beside scikit-learn's own data. Raises OSError if there can be none."""
    if os.path.expanduser(os.environ.get('SCIKIT_LEARN_DATA', '~'))[:1] == '~':  # it would make a folder of that name
        raise OSError('this user has no home folder')
    return joblib.Memory(sklearn.datasets.get_data_home(), compress=True, verbose=0)


def _from_openml():
    """MNIST from OpenML by way of scikit-learn: images (n, 28, 28) and labels (n,), uint8; parsed once, then kept."""
    try:
        with quiet():
            return _memory().cache(_fetch_mnist)()
    except Exception as error:  # network, HTTP, checksum, ARFF, disk: whatever it was, there is no MNIST
        raise OSError(f'MNIST cannot be had from OpenML ({last_line(error)}); set mnist_path to a folder with its four '
                      'IDX files, or SCIKIT_LEARN_DATA to a folder that can be written') from None


def _fetch_mnist():
    print('reading MNIST from OpenML or its cache (15 MB, half a minute; only this once) ...', flush=True)
    socket.setdefaulttimeout(20)  # scikit-learn sets none: a server that never answers would hold us for ever
    bunch = sklearn.datasets.fetch_openml('mnist_784', version=1, as_frame=False, parser='liac-arff', n_retries=1)
    return bunch.data.astype(np.uint8).reshape(-1, 28, 28), bunch.target.astype(np.uint8)


# ---------------------------------------------------------------- iterators, and the one that the settings ask for

class PixelIter(mx.io.NDArrayIter):
    """Batches of float32 images in [-1, 1] out of uint8 pixels; the conversion runs on the training device.

    `X` is uint8 (n, 1, 64, 64), shared, not copied (NumPy's side of it becomes read-only), `y` (n,) its labels; `nc`:
    channels to repeat the grey one to; `ctx`: where the batches are wanted; the batches are of this worker's share.
    Has `class_names`, the sorted labels; `classes` (n,) int32, each one's position in these; `num_data`; `checksum`.
    Yields mx.io.DataBatch with data [(batch, nc, 64, 64) float32], and with `conditional` also the classes (batch,)
    float32. Every epoch has the same batches in the same order; the last one is filled up from the start (`pad`).
    """

    def __init__(self, X, y, batch_size, nc=1, ctx=None, conditional=False, rank=0, workers=1):
        share = len(X) // workers
        if batch_size > share:
            raise ValueError(f'batch_size = {batch_size}: larger than the data, {share} images for this worker')
        labels, classes = np.unique(y, return_inverse=True)
        self.class_names, self.classes = [str(label) for label in labels], classes.astype(np.int32)
        X, mine = np.ascontiguousarray(X), slice(rank * share, (rank + 1) * share)
        self.checksum = zlib.crc32(np.ascontiguousarray(y), zlib.crc32(X))
        super().__init__(mx.nd.from_numpy(X[mine]), mx.nd.array(self.classes[mine]), batch_size, label_name='digit')
        self.nc, self.conditional = nc, conditional
        # each of the 256 pixel values as the float that NumPy makes of it, to the last bit
        self.levels = mx.nd.array(np.arange(256, dtype=np.float32) / 127.5 - 1, ctx or mx.cpu())

    @property
    def provide_data(self):
        images = mx.io.DataDesc('data', (self.batch_size, self.nc, 64, 64), np.float32)
        return [images, *self.provide_label] if self.conditional else [images]

    def begin_epoch(self, epoch, iteration=0):
        """Start an epoch at its iteration-th batch."""
        self.reset()
        self.cursor += iteration * self.batch_size

    def getdata(self):
        pixels = super().getdata()[0].as_in_context(self.levels.context)  # the step's one copy to the device
        images = self.levels.take(pixels).broadcast_axes(axis=1, size=self.nc)
        return [images, self.getlabel()[0].as_in_context(images.context)] if self.conditional else [images]


class RandIter(mx.io.DataIter):
    """Latent batches, Normal(0, 1), without end; drawn on `ctx` and reproducible from `mx.random.seed`.

    Yields mx.io.DataBatch with data [(batch_size, ndim, 1, 1) float32] and no label; with `classes`, (n,) positions, a
    class is drawn for each among these and appended one-hot: (batch_size, ndim + number of classes, 1, 1), and the
    label is [(batch_size,) float32 positions].
    """

    def __init__(self, batch_size, ndim, ctx=None, classes=None):
        super().__init__(batch_size)
        self.ndim, self.ctx = ndim, ctx
        self.num_classes = 0 if classes is None else int(np.max(classes)) + 1
        self.classes = mx.nd.array(classes, ctx) if self.num_classes else None
        self.provide_data = [mx.io.DataDesc('rand', (batch_size, ndim + self.num_classes, 1, 1), np.float32)]
        self.provide_label = []

    def next(self):
        latent = mx.random.normal(0, 1.0, shape=(self.batch_size, self.ndim, 1, 1), ctx=self.ctx)
        if not self.num_classes:
            return mx.io.DataBatch([latent], [], pad=0)
        positions = mx.nd.random.randint(0, len(self.classes), shape=(self.batch_size,), ctx=self.ctx)
        classes = self.classes.take(positions)
        one_hot = classes.one_hot(self.num_classes).reshape((0, 0, 1, 1))
        return mx.io.DataBatch([mx.nd.concat(latent, one_hot, dim=1)], [classes], pad=0)


# ---------------------------------------------------------------- pictures

MAGIC = struct.pack('<I', 0xced7230a)  # each part of a record in a RecordIO file begins with it
ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'`\x82'}  # a JPEG's and a PNG's last two bytes, by the first two
# what a file is if it is no picture, by bytes among its first 512
KINDS = {b'version https://git-lfs': 'a Git LFS pointer: "git lfs pull" fetches the file', b'<html': 'a web page',
         **dict.fromkeys((b'PK\3\4', b'\x1f\x8b\x08', b'ustar'), 'an archive: unpack it'),
         b'ftyp': 'HEIC, AVIF or a film: save it as JPEG', MAGIC: 'a .rec: set imgnet_path to it'}


class ImagenetIter(mx.io.DataIter):
    """Batches of pictures from a .rec, without end: random crop and mirror, float32 in [-1, 1]; threads decode ahead.

    `data_shape`: (3 or 1, height, width); `num_parts`, `part_index`: this worker's share; `augment` False: the largest
    square in the middle, not mirrored; `conditional`: the records' labels are classes.
    Yields mx.io.DataBatch with data [(batch_size,) + data_shape] and, if conditional, [(batch_size,) float32 classes]
    after it, in the file's order; an epoch's last batch is filled up from the start. Raises ValueError.
    """

    def __init__(self, path, batch_size, data_shape, ctx=None, num_parts=1, part_index=0, augment=True,
                 conditional=False, seed=0):
        super().__init__(batch_size)
        self.path, self.data_shape, self.ctx, self.augment = path, tuple(data_shape), ctx or mx.cpu(), augment
        self.starts, labels = _check_rec(path)
        self.num_data, self.part_index, self.seed = len(labels) // num_parts, part_index, seed
        if self.num_data < batch_size:
            raise ValueError(f'{path}: has {self.num_data} pictures a worker, fewer than the batch of {batch_size}')
        self.checksum = zlib.crc32(labels, zlib.crc32(self.starts))
        self.labels, classes = np.unique(labels, return_inverse=True)
        self.classes = classes.astype(np.int32) if conditional else None
        self.class_names = [str(position) for position in range(len(self.labels))] if conditional else []
        self.provide_data = [mx.io.DataDesc('data', (batch_size,) + self.data_shape, np.float32)]
        self.provide_data += [mx.io.DataDesc('digit', (batch_size,), np.float32)] if conditional else []
        self.file = open(path, 'rb')  # noqa: SIM115  kept open: another run may replace it
        self.pool = ThreadPoolExecutor(joblib.cpu_count())
        self.begin_epoch(0)

    def begin_epoch(self, epoch, iteration=0):
        """Start an epoch at its iteration-th batch."""
        self.epoch, self.iteration, self.ahead = epoch, iteration, None  # ahead: the next batch, being decoded

    def reset(self):
        """Start the next epoch."""
        self.begin_epoch(self.epoch + 1)

    def next(self):
        if self.iteration * self.batch_size >= self.num_data:
            self.reset()
        numbers, pictures = self.ahead or self._begin_batch()
        pixels = np.stack(list(pictures))
        self.iteration += 1
        self.ahead = self._begin_batch() if self.iteration * self.batch_size < self.num_data else None
        images = mx.nd.array(pixels, self.ctx, np.uint8).astype(np.float32) / 127.5 - 1
        classes = [] if self.classes is None else [mx.nd.array(self.classes[numbers], self.ctx)]
        return mx.io.DataBatch([images] + classes, [], pad=0)

    def _begin_batch(self):
        """Start decoding the next batch; returns its pictures' positions in the file, and the pictures to come."""
        images = (np.arange(self.batch_size) + self.iteration * self.batch_size) % self.num_data
        numbers = self.part_index * self.num_data + images
        # the crops depend on these four alone, so that a run resumes to the last bit
        random = np.random.RandomState([self.seed, self.epoch, self.part_index, self.iteration])
        return numbers, self.pool.map(self._load, numbers, random.rand(self.batch_size, 4))

    def _load(self, number, random):
        """A picture of the file as uint8 `data_shape`, cropped and mirrored by four numbers from 0 to 1."""
        start, end = self.starts[number:number + 2]
        try:
            image = _decode(_record(os.pread(self.file.fileno(), end - start, start))[1])
        except (OSError, struct.error, ValueError) as error:
            raise ValueError(f'{self.path}: record {number}: {last_line(error)}; make the .rec again') from None
        shrink, down, right, mirror = random if self.augment else (1, 0.5, 0.5, 1)
        height, width, _ = image.shape
        side = round(min(height, width) * (0.75 + 0.25 * shrink))  # as published: 192 to 256 of 256 pixels
        top, left = round((height - side) * down), round((width - side) * right)
        image = image[top:top + side, left:left + side]
        image = cv2.resize(image, self.data_shape[:0:-1], interpolation=cv2.INTER_AREA)
        grey = self.data_shape[0] == 1
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY if grey else cv2.COLOR_BGR2RGB).reshape(*image.shape[:2], -1)
        return (image[:, ::-1] if mirror < 0.5 else image).transpose(2, 0, 1)


def _check_rec(path):
    """Where each record of a .rec begins, and the end, int64 (n + 1,), and the records' labels, float32 (n,)."""
    starts, labels, where = [0], [], ''
    try:
        content = np.memmap(path, mode='r').data if os.path.getsize(path) else b''  # reads only what is used
        if content[:4] != MAGIC:
            _decode(content[:1 << 28])  # raises what else it is
            raise ValueError('a single picture')
        while starts[-1] < len(content):
            where = f'record {len(labels)} is damaged or no picture: '
            header, picture, end = _record(content, starts[-1])
            if ENDS.get(bytes(picture[:2])) != picture[-2:]:  # to decode them all would take long
                _decode(picture)
            labels.append(header.label[0] if header.flag else header.label)
            starts.append(end)
    except (OSError, struct.error, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'{path}: {where}{reason}; imgnet_path must name a folder of pictures or a .rec') from None
    return np.array(starts), np.array(labels, np.float32)


def _record(content, start=0):
    """The record that begins at `start` of a RecordIO file: MXNet's header, the picture's bytes, and where it ends."""
    parts, kind = [], 1
    while kind in (1, 2):  # 0: a whole record; 1, 2, 3: its first, further and last parts
        magic, number = struct.unpack('<4sI', bytes(content[start:start + 8]).ljust(8))
        kind, length = divmod(number, 1 << 29)
        begin, start = start + 8, start + 8 + length + -length % 4
        if magic != MAGIC or start > len(content) or kind not in ((2, 3) if parts else (0, 1)):
            raise ValueError('cut short, or no RecordIO')
        parts.append(content[begin:begin + length])
    header, picture = mx.recordio.unpack(MAGIC.join(parts) if len(parts) > 1 else parts[0])
    return header, picture, start


def _decode(content):
    """A picture file's bytes -> uint8 (height, width, 3), BGR, over white. Raises ValueError that says what it is."""
    pixels = np.frombuffer(content, np.uint8)
    try:
        image = cv2.imdecode(pixels, cv2.IMREAD_COLOR)  # upright, as EXIF data say
        if content[:2] == b'\xff\xd8' and image is not None:  # a JPEG is never transparent
            return image
        layers = cv2.imdecode(pixels, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        raise ValueError('too many pixels' if len(content) else 'empty') from None
    if image is None:
        kinds = [kind for mark, kind in KINDS.items() if mark in bytes(content[:512])]
        kinds += ['damaged, or no picture' if layers is None else f'has {layers.dtype} pixels: save it with 8 bits']
        raise ValueError(kinds[0])
    if layers is None or layers.shape[2:] != (4,):
        return image
    if layers.dtype == np.uint16:
        layers = (layers >> 8).astype(np.uint8)
    return 255 - cv2.multiply(255 - layers[:, :, :3], cv2.merge([layers[:, :, 3]] * 3), scale=1 / 255)


def _small_jpeg(path):
    """A picture's file -> a JPEG, at most 256 pixels on its shorter side, or None; and what to warn of, or ''."""
    try:
        with open(path, 'rb') as file:
            content = file.read(1 << 28)  # no more of a film
        image = _decode(content)
        shrink = min(1, 256 / min(image.shape[:2]), 65500 / max(image.shape))  # a JPEG cannot be longer
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode('.jpg', image)[1].tobytes()
        dark = image.max() < 32 and cv2.imdecode(np.frombuffer(content, np.uint8), -1).dtype != np.uint8
        return jpeg, 'nearly black (scale them if only 12 of 16 bits are used)' if dark else ''
    except FileNotFoundError:
        return None, 'skipped, a link to a file that is not there'
    except (OSError, ValueError, cv2.error) as error:
        return None, f'skipped, {getattr(error, "strerror", None) or last_line(error)}'


def _write_rec(path, files, labels):
    """Write the pictures among the files into a .rec, which replaces nothing until it is whole; list the others."""
    temporary = f'{path}.{os.urandom(4).hex()}'  # several runs may pack at once
    kept, told, step = 0, {}, 8 * joblib.cpu_count()  # step: so many at most are still decoded after Ctrl-C
    try:
        with open(temporary, 'wb') as file, ThreadPoolExecutor(joblib.cpu_count()) as pool:
            parts = (pool.map(_small_jpeg, files[start:start + step]) for start in range(0, len(files), step))
            for done, (jpeg, note) in enumerate(itertools.chain.from_iterable(parts), 1):
                if jpeg:
                    kept += 1
                    record = mx.recordio.pack(mx.recordio.IRHeader(0, labels[done - 1], 0, 0), jpeg)
                    file.write(MAGIC + struct.pack('<I', len(record)) + record + bytes(-len(record) % 4))
                if note:
                    told.setdefault(note, []).append(files[done - 1])
                if done % 1000 == 0:
                    print(f'... {done} of {len(files)}', flush=True)
            file.flush()
            os.fsync(file.fileno())
        for note, some in told.items():
            print(f'WARNING: {note}: {len(some)} files, such as {some[:10]}', flush=True)
        print(f'{kept} pictures packed, {len(files) - kept} files skipped', flush=True)
        if kept:
            with contextlib.suppress(FileNotFoundError):  # another run was faster, and has tidied up
                os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _pack(folder, out, workers):
    """Pack a folder's pictures into a .rec unless that is done already; returns its path and the classes' names."""
    os.listdir(folder)  # raises PermissionError
    found, seen = [], {os.path.realpath(out)}  # links are followed, each real folder once
    for where, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: found.append(error.filename)):
        new = os.path.realpath(where) not in seen
        seen.add(os.path.realpath(where))
        found.extend(os.path.join(where, name) for name in names if new and name[0] != '.')
        folders[:] = sorted(name for name in folders if new and name[0] != '.' and name != '@eaDir')
    # no pipes; what may not be read, and links to nowhere, will be named
    files = [path for path in found if os.path.isfile(path) or not os.access(path, os.R_OK)]
    # sort by a hash of the path: shuffled, and adding files does not reorder the others
    files.sort(key=lambda path: hashlib.sha256(os.fsencode(path[len(folder):])).digest())
    names = [os.path.relpath(path, folder) for path in files]
    # a class is a sub-folder, with all that is below it; '' has the pictures that are in none
    classes, labels = np.unique([os.path.dirname(name).split('/')[0] for name in names], return_inverse=True)
    content = sorted((name, os.path.getsize(path), os.path.getmtime(path)) if os.access(path, os.R_OK) else (name,)
                     for name, path in zip(names, files))
    parent, base = os.path.split(folder)
    stem = os.path.join(parent if os.access(parent, os.W_OK) else out, f'{base}-dcgan-')
    path = f'{stem}{zlib.crc32(repr(content).encode()):08x}.rec'  # another if the folder has changed
    if os.path.exists(path):
        return path, classes
    if workers > 1:
        raise ValueError(f'{folder}: not packed yet, or changed since; start once on one machine, then on several')
    print(f'packing {len(files)} files of {folder} into {path} ...', flush=True)
    _write_rec(path, files, labels)
    if not os.path.exists(path):
        raise ValueError(f'{folder}: has no picture that OpenCV can read; set imgnet_path to a folder that has')
    for old in set(glob.glob(glob.escape(stem) + '[0-9a-f]' * 8 + '.rec*')) - {path}:
        with contextlib.suppress(FileNotFoundError):
            os.remove(old)  # of the folder as it was, or left by a run that was killed
    return path, classes


def load_pictures(s, rank=0, workers=1):
    """An `ImagenetIter` over a share of `s.imgnet_path`, a .rec or a folder to pack. Raises ValueError, OSError."""
    path, folder = s.imgnet_path, os.path.isdir(s.imgnet_path)
    if folder:
        path, names = _pack(os.path.abspath(path), os.path.abspath(s.out), workers)
    pictures = ImagenetIter(path, s.batch_size, (s.nc, 64, 64), s.ctx[0], workers, rank, s.augment, s.conditional,
                            s.seed)
    if s.conditional:
        labels = [names[int(label)] if folder else f'{label:g}' for label in pictures.labels]
        if '' in labels:
            raise ValueError(f"{s.imgnet_path}: with conditional = True each picture must be in its class's sub-folder")
        print('classes:', ', '.join(f'{position} {label}' for position, label in enumerate(labels)), flush=True)
    return pictures


def load_data(s, rank=0, workers=1):
    """The data's name ('digits' if MNIST cannot be had), an iterator over this worker's share, and the arguments of
    `Coverage`, None for pictures. Raises OSError and ValueError as `get_mnist`, `load_pictures` and the iterators.
    """
    if s.dataset == 'imagenet':
        return s.dataset, load_pictures(s, rank, workers), None
    name = s.dataset
    try:
        X, _, y, _ = get_digits(labels=True) if name == 'digits' else get_mnist(s.mnist_path, labels=True)
    except OSError as error:
        if s.mnist_path or workers > 1:  # several may not each decide on other data
            raise
        print(f"WARNING: {error}. Training on scikit-learn's 8x8 digits instead", flush=True)
        name, (X, _, y, _) = 'digits', get_digits(labels=True)
    train_iter = PixelIter(X, y, s.batch_size, s.nc, s.ctx[0], s.conditional, rank, workers)
    return name, train_iter, (X, train_iter.classes, train_iter.class_names)


# ---------------------------------------------------------------- how good the generated images are

class Coverage:
    """Compares generated images with real ones, by a classifier of the real ones: one hidden layer of 256 relu.

    `X` (n, 1, 64, 64) uint8, `y` (n,) and `class_names` are the real training images, class positions and names.
    `num_images`: how many to generate; `classifier`: None until the first `count`, in which it learns or is found where
    an earlier run has kept it; `floor`: from then on the Fréchet distance of `num_images` real images from as many
    others, None if there are fewer than 1,000 each.
    """

    def __init__(self, X, y, class_names):
        self.X, self.y, self.class_names = X, y, class_names
        self.num_images = max(1000, min(5000, len(X) // 2))
        self.classifier = self.floor = None

    def count(self, batches):
        """Judge generated images: `batches` yields (k, nc, 64, 64) float in [-1, 1] and (k,) classes wanted, or None.

        Returns {'share_<class name>': of each class, 'digits': how many classes have at least a tenth of their real
        share, 'confidence': the classifier's mean, 'kl': Kullback-Leibler divergence from the real shares in nats,
        'median': the median pixel, 0..255, 'fd': the Fréchet distance from real images, or None as `floor`}, and if
        classes were asked for, 'asked' and 'asked_worst': the share of these that were made, of all and of the worst.
        """
        if self.classifier is None:
            args = self.X, self.y, self.num_images, sklearn.__version__
            with quiet():  # no warning of an unfinished fit, or of a cache that is damaged or cannot be written
                try:
                    self.classifier, self.real, self.floor = _memory().cache(_learn)(*args)
                except OSError:
                    self.classifier, self.real, self.floor = _learn(*args)
        features, pixels, asked = [], [], []
        for images, classes in batches:  # keep only what is small, never all images as floats
            grey = images.mean(axis=1)  # of the channels
            features.append(_features(grey))
            pixels.append(np.rint((grey + 1) * 127.5).astype(np.uint8))
            asked.append(classes)
        features, num_classes = np.concatenate(features), len(self.class_names)
        probability = self.classifier.predict_proba(features)[:, :num_classes]  # one class has two columns
        classes = probability.argmax(axis=1)
        shares, real = (np.bincount(labels, minlength=num_classes) / len(labels) for labels in (classes, self.y))
        row = {f'share_{name}': share for name, share in zip(self.class_names, shares)}
        row.update(digits=int((shares >= real / 10).sum()), confidence=float(probability.max(axis=1).mean()),
                   kl=scipy.stats.entropy(shares, real), median=int(np.median(np.concatenate(pixels))))
        if asked[0] is not None:
            asked = np.concatenate(asked)
            right = classes == asked
            row.update(asked=right.mean(), asked_worst=min(right[asked == wanted].mean() for wanted in set(asked)))
        row['fd'] = None if self.floor is None else frechet_distance(self.real, _statistics(self.classifier, features))
        return row


def _learn(X, y, num_images, version):
    """What `Coverage` needs, kept by joblib for the same arguments: classifier, statistics of real images, floor."""
    epochs = min(66, max(3, 720_000 // len(X)))  # 12 over MNIST
    classifier = sklearn.neural_network.MLPClassifier(
        (256,), batch_size=min(128, len(X)), max_iter=epochs, n_iter_no_change=epochs, random_state=0)
    features = np.concatenate([  # never many of the images as floats
        _features(X[i:i + 100, 0] / np.float32(127.5) - 1) for i in range(0, len(X), 100)])
    classifier.fit(features, y)
    if classifier.n_iter_ < epochs:  # it was a Ctrl-C, which scikit-learn swallows
        raise KeyboardInterrupt
    vars(classifier).pop('_optimizer', None)  # twice as large as all that is needed
    some, others = features[:2 * num_images:2], features[1:2 * num_images:2]
    real = _statistics(classifier, some)
    floor = frechet_distance(real, _statistics(classifier, others)) if len(X) >= 2000 else None
    return classifier, real, floor


def _features(grey):
    """What the classifier sees of grey images (n, 64, 64): the means of 4x4 pixels, (n, 256)."""
    return grey.reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(-1, 256)


def _statistics(classifier, features):
    """The mean (256,) and covariance (256, 256) of the hidden layer's activations."""
    hidden = np.maximum(features @ classifier.coefs_[0] + classifier.intercepts_[0], 0).astype(float)
    return hidden.mean(axis=0), np.cov(hidden, rowvar=False)


def frechet_distance(a, b):
    """The distance of two normal distributions, each (mean, covariance): Heusel et al. 2017."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    # the trace of the product's root, without `sqrtm`, which turns complex if a covariance is singular
    trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)
