"""What the networks are fed and measured with: MNIST, the digits, photos, latent vectors, and a judge of digits.

This module prepares MXNet and is the first to import it. The training set stays uint8, 64x64 with one channel, until
`PixelIter` turns it into float32, batch by batch, on the device.
"""
import ctypes
import functools
import glob
import gzip
import math
import os
import socket
import struct
import sys
import tempfile
import threading
import unittest.mock
import warnings
import zlib

# ---------------------------------------------------------------- preparing MXNet, before it is imported

if sys.platform == 'win32' or sys.version_info < (3, 8):  # noqa: UP036  an older one must be told, too
    sys.exit('dcgan.py: needs Python 3.8 or newer, and on Windows WSL 2, which is Linux: MXNet has no other package')
PACKAGES = 'pip install --no-deps -r requirements.txt (NVIDIA GPU) or tests/requirements.txt (any other machine)'
CUDA = ('libcudart.so.11.0', 'libnvrtc.so.11.2', 'libcublasLt.so.11', 'libcublas.so.11', 'libcufft.so.10',
        'libcurand.so.10', 'libcusolver.so.11', 'libcudnn.so.8', 'libnccl.so.2', 'libnvToolsExt.so.1')
MODULES = ('cv2', 'distutils', 'graphviz', 'joblib', 'mxnet', 'numpy', 'requests', 'scipy', 'sklearn')
CURES = {**dict.fromkeys(CUDA + MODULES, PACKAGES), 'libz.so.1': 'apt-get install zlib1g',
         'libcuda.so.1': f'there is no NVIDIA driver; install it, or {PACKAGES}',
         'libgomp.so.1': 'apt-get install libgomp1', 'libquadmath.so.0': 'apt-get install libquadmath0',
         'libgthread-2.0.so.0': 'apt-get install libglib2.0-0', 'libglib-2.0.so.0': 'apt-get install libglib2.0-0',
         'libGL.so.1': 'apt-get install libgl1, or pip install opencv-python-headless, which has no windows'}
try:
    import cv2
    import joblib
    import numpy as np
    import sklearn  # noqa: F401  MXNet loads it if it is there; it should be missed here, not at the end of an epoch
    true_getattr = np.__getattr__

    def getattr_for_mxnet(name):
        """Answer MXNet alone for names that it reads at import and NumPy has taken away; it uses only `bool` later."""
        if sys._getframe(1).f_globals.get('__name__', '').split('.')[0] != 'mxnet' or name[:2] == '__':
            return true_getattr(name)
        try:
            return bool if name == 'bool' else true_getattr(name)
        except AttributeError:
            return None

    # what a person has set stays; of the physical cores MXNet by itself would take half
    os.environ.setdefault('OMP_NUM_THREADS', str(joblib.cpu_count(only_physical_cores=True)))
    os.environ.setdefault('MXNET_SUBGRAPH_VERBOSE', '0')    # no line on stderr for each network
    os.environ.setdefault('PS_HEARTBEAT_INTERVAL', '2')     # seconds; else a cluster does not notice a dead process
    os.environ.setdefault('MXNET_USE_FUSION', '0')          # a driver older than CUDA 11.8's cannot load what it makes
    os.environ.setdefault('MXNET_CUDNN_LIB_CHECKING', '0')  # no warning that cuDNN is newer than the build's
    os.environ.setdefault('CUDA_MODULE_LOADING', 'LAZY')    # kernels at their first use: less memory, a faster start
    os.environ['MXNET_UPDATE_ON_KVSTORE'] = '0'             # Adam's state of several devices stays here, to be saved
    for name in CUDA:  # PyPI's packages put it where the loader does not look
        for folder in sys.path:
            for path in glob.glob(f'{glob.escape(folder)}/nvidia/*/lib/{name}'):
                ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    # in a scheduler or server `import mxnet` would serve and never return; dcgan.Cluster does that, and watches
    ROLE = os.environ.pop('DMLC_ROLE', None)
    with unittest.mock.patch.object(np, '__getattr__', getattr_for_mxnet):
        import mxnet as mx
    if ROLE:
        os.environ['DMLC_ROLE'] = ROLE
    GPU_BUILD = mx.runtime.Features().is_enabled('CUDA')
except (ImportError, OSError) as error:
    missing = error.name if isinstance(error, ModuleNotFoundError) else str(error).split(':')[0]
    if missing not in CURES:
        raise
    sys.exit(f'dcgan.py: {error}: {CURES[missing]}')


def last_line(error):
    """What an error says, without MXNet's C++ stack trace."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def default_ctx():
    """GPU 0 where there is a GPU, else the CPU; a GPU build of MXNet that finds no GPU says so."""
    reason = 'a driver older than CUDA 11.2, CUDA_VISIBLE_DEVICES, or a container without --gpus all'
    try:
        if ROLE not in ('scheduler', 'server') and mx.context.num_gpus():  # these two do not compute
            return mx.gpu(0)
    except mx.MXNetError as error:
        reason = last_line(error)
    if GPU_BUILD and ROLE not in ('scheduler', 'server'):
        print(f'WARNING: MXNet sees no GPU (usual reasons: {reason}); training on the CPU', flush=True)
    return mx.cpu()


def check_devices(s):
    """Raise ValueError where a device cannot be used: MXNet finds out late and says it at length, or dies of it."""
    # bytes, about: MXNet itself; the layers' outputs and their gradients; weights, gradients, Adam's moments, a copy
    needed = (0.7e9 + 8 * s.batch_size / len(s.ctx) * (5760 * s.ngf + 4736 * s.ndf)
              + 20 * 16 * (8 * s.Z * s.ngf + 42 * s.ngf ** 2 + 42 * s.ndf ** 2))
    for ctx in s.ctx:
        try:
            free = mx.context.gpu_memory_info(ctx.device_id)[0] if ctx.device_type == 'gpu' else math.inf
            if free < needed:
                raise ValueError(f'{free / 1e9:.1f} GB of its memory are free, about {needed / 1e9:.1f} GB are needed')
            mx.nd.ones(1, ctx).asnumpy()
        except (ValueError, mx.MXNetError) as error:
            problem = last_line(error)
            if 'no kernel image' in problem:
                problem += '; mxnet-cu112 has code for compute capability 5.0 to 8.9 only, Maxwell to Ada'
            raise ValueError(f'ctx = {ctx}: {problem}; set ctx to mx.cpu() or to another GPU') from None


# ---------------------------------------------------------------- MNIST and digits

def get_mnist(path='', labels=False):
    """A set in MNIST's format in the one order that every run uses: training then test images, permuted by
    RandomState(1234), so that either part has images of both. Images are stretched to 64x64, EMNIST's are transposed.

    `path` is a folder with the set's four IDX files, gzip-compressed or not, or, as `.../emnist-letters`, a folder and
    what the names begin with; empty: MNIST from OpenML, fetched once and then kept.
    Returns `X_train, X_test`, uint8 (n, 1, 64, 64), 0..255; with `labels` also `y_train, y_test`, uint8 (n,); MNIST has
    60,000 and 10,000.
    Raises ValueError where a file is not what it should be, OSError where one is missing or OpenML cannot be had.
    """
    if not path:
        X, y = _from_openml()
        return _prepare(X, y, len(X) * 6 // 7, labels)  # 60,000 of 70,000
    prefix = _find_set(path)
    (X_train, y_train), (X_test, y_test) = _read_part(prefix, 'train'), _read_part(prefix, 't10k', 'test')
    X = [*X_train, *X_test]
    if os.path.basename(prefix).startswith('emnist'):
        X = [image.T for image in X]
    return _prepare(X, np.concatenate([y_train, y_test]), len(X_train), labels)


def get_digits(labels=False):
    """scikit-learn's bundled 8x8 digits as a stand-in for MNIST: `get_mnist`'s returns, 1,500 and 297 images."""
    from sklearn.datasets import load_digits
    bunch = load_digits()
    return _prepare((bunch.images * (255 / 16)).astype(np.uint8), bunch.target, 1500, labels)


def _prepare(X, y, num_train, labels):
    """Permute, resize to 64x64, split."""
    order = np.random.RandomState(1234).permutation(len(X))
    images = np.empty((len(X), 1, 64, 64), np.uint8)
    for image, i in zip(images, order):
        averaging = cv2.INTER_AREA if max(X[i].shape) > 64 else cv2.INTER_LINEAR
        cv2.resize(X[i], (64, 64), dst=image[0], interpolation=averaging)
    y = y[order].astype(np.uint8)
    splits = images[:num_train], images[num_train:], y[:num_train], y[num_train:]
    return splits if labels else splits[:2]


def _find_set(path):
    """The folder and what the names of a set's four files begin with, nothing for MNIST's own names."""
    prefix = os.path.join(path, '') if os.path.isdir(path) else path
    names = glob.glob(glob.escape(prefix) + '*train-images[-.]idx3-ubyte*')
    sets = sorted({name[:name.rindex('train-images')] for name in names})
    if prefix in sets:
        return prefix
    if len(sets) > 1:
        raise ValueError(f'{path}: has {len(sets)} sets; set mnist_path to one of them: '
                         + ', '.join(name.rstrip('-') for name in sets))
    return sets[0] if sets else os.path.join(path, '')


def _read_part(prefix, *parts):
    """Images (n, height, width) and labels (n,) of a set's training or test part, uint8; `parts`: what it is called."""
    arrays = []
    for what, ndim in ('images', 3), ('labels', 1):
        paths = [f'{prefix}{part}-{what}{dot}idx{ndim}-ubyte{gz}' for part in parts for dot in '-.' for gz in ('', '.gz')]
        path = next(filter(os.path.isfile, paths), None)
        if not path:
            raise FileNotFoundError(f"{paths[0]}[.gz]: no such file; mnist_path must name the folder with the set's "
                                    'four IDX files, or the folder and what their names begin with')
        arrays.append(_read_idx(path, what, ndim))
    images, labels = arrays
    if len(labels) != len(images):
        raise ValueError(f'{path}: {len(labels)} labels for {len(images)} images; take both files from one download')
    return images, labels


def _read_idx(path, what, ndim):
    """One IDX file (format: LeCun's MNIST page, "FILE FORMATS"), gzipped or not, as uint8 of `ndim` dimensions."""
    header = struct.Struct(f'>{1 + ndim}I')
    with open(path, 'rb') as file:
        content = file.read()
    kind = 'gzip file' if content[:2] == b'\x1f\x8b' else 'file'
    try:
        if kind == 'gzip file':
            content = gzip.decompress(content)
        if len(content) < header.size:
            raise ValueError('empty, or cut short in its header')
        magic, *shape = header.unpack_from(content)
        if magic != 0x800 + ndim:
            raise ValueError(f'no IDX file of {what}: its magic number is {magic:#x}, not {0x800 + ndim:#x}')
        if not all(1 <= side <= 1024 for side in shape[1:]):
            raise ValueError(f'its images have {shape[1]}x{shape[2]} pixels, more than 1024x1024 or none')
        if shape[0] == 0 or len(content) != header.size + math.prod(shape):
            raise ValueError(f'cut short, or has bytes left over: its header promises {shape[0]} {what}')
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: wrong or damaged {kind} ({error}); fetch it again') from None
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def _from_openml():
    """MNIST from scikit-learn's cache or from OpenML: parsed once (18 s, 0.8 GB), then kept as an .npz beside it."""
    from sklearn.datasets import fetch_openml, get_data_home
    try:
        home = get_data_home()
        if not os.path.exists(os.path.join(home, 'mnist_784.npz')):
            tempfile.TemporaryFile(dir=home).close()
    except OSError:  # a home that cannot be written
        home = get_data_home(os.path.join(tempfile.gettempdir(), 'scikit_learn_data'))
    cache = os.path.join(home, 'mnist_784.npz')
    if os.path.exists(cache):
        try:
            with np.load(cache, allow_pickle=False) as arrays:
                X, y = arrays['X'], arrays['y']
            if X.dtype == y.dtype == np.uint8 and X.shape == (y.size, 28, 28) and y.shape == (len(X),) and len(X):
                return X, y
            raise ValueError('not MNIST')
        except Exception as error:  # zipfile and NumPy have a dozen kinds for a flipped bit
            print(f'{cache} is damaged ({error}); fetching MNIST again', flush=True)
    print("reading MNIST from scikit-learn's cache or OpenML (15 MB, half a minute to parse; only this once) ...",
          flush=True)
    done = threading.Event()
    threading.Thread(target=_tick, args=(done,), daemon=True).start()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # scikit-learn sets none: a server that never answers would hold us for ever
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=home) as scratch:
            warnings.simplefilter('ignore')
            warnings.filterwarnings('error', '.*(Retrying|redownloading)')  # what it warns of would take another 30 s
            fetch = functools.partial(fetch_openml, 'mnist_784', version=1, as_frame=False, parser='liac-arff')
            try:  # a person may have fetched it with scikit-learn; what is missing or damaged there stays so
                with unittest.mock.patch('sklearn.datasets._openml.urlopen', side_effect=OSError):
                    bunch = fetch(data_home=None)
            except Exception:
                bunch = fetch(data_home=scratch)
        X, y = bunch.data.astype(np.uint8).reshape(-1, 28, 28), bunch.target.astype(np.uint8)
    except Exception as error:  # network, HTTP, checksum, ARFF: whatever it was, there is no MNIST
        while isinstance(error, Warning):
            error = error.__context__  # what it wanted to try again after
        raise OSError(f'MNIST cannot be had from OpenML ({last_line(error)}); set mnist_path to a folder with its IDX '
                      'files') from None
    finally:
        done.set()
        socket.setdefaulttimeout(timeout)
    try:
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            np.savez_compressed(os.path.join(scratch, 'mnist.npz'), X=X, y=y)
            os.replace(os.path.join(scratch, 'mnist.npz'), cache)  # whole or not at all
    except OSError as error:
        print(f'MNIST could not be kept for the next start ({error})', flush=True)
    return X, y


def _tick(done):
    """Show that something happens."""
    seconds = 0
    while not done.wait(5):
        seconds += 5
        print(f'... {seconds} s', flush=True)


# ---------------------------------------------------------------- iterators, and the one that the settings ask for

class PixelIter(mx.io.NDArrayIter):
    """Batches of float32 images in [-1, 1] out of uint8 pixels; the conversion runs on the training device.

    `X` is uint8 (n, 1, 64, 64), shared, not copied (NumPy's side of it becomes read-only), `y` (n,) its labels; `nc`:
    channels to repeat the grey one to; `ctx`: where the batches are wanted; `conditional`: give D the classes, too;
    `rank`, `workers`: the batches are of this worker's share.
    `class_names`: the sorted labels as text; `classes`: int32 (n,), each image's position among them; `num_data`: images
    in the share; `checksum`: of all pixels and labels.
    Yields mx.io.DataBatch with data [(batch, nc, 64, 64) float32], with `conditional` also (batch,) float32 classes, and
    with these as its label. Every epoch has the same batches in the same order; the last one is filled up from the start
    (`pad`). Raises ValueError where the share is smaller than a batch.
    """

    def __init__(self, X, y, batch_size, nc=1, ctx=None, conditional=False, rank=0, workers=1):
        share = len(X) // workers
        if batch_size > share:
            raise ValueError(f'batch_size = {batch_size}: larger than the data, {share} images a worker')
        labels, classes = np.unique(y, return_inverse=True)
        self.class_names, self.classes = [str(label) for label in labels], classes.astype(np.int32)
        X, mine = np.ascontiguousarray(X), slice(rank * share, (rank + 1) * share)
        self.checksum = zlib.crc32(np.ascontiguousarray(y), zlib.crc32(X))
        super().__init__(mx.nd.from_numpy(X[mine]), mx.nd.array(self.classes[mine]), batch_size, label_name='digit')
        self.nc, self.conditional = nc, conditional
        # each of the 256 pixel values as the float that NumPy makes of it, to the last bit
        self.levels = mx.nd.array(np.arange(256, dtype=np.float32) / (255.0 / 2) - 1.0, ctx or mx.cpu())

    @property
    def provide_data(self):
        images = mx.io.DataDesc('data', (self.batch_size, self.nc, 64, 64), np.float32)
        return [images, *self.provide_label] if self.conditional else [images]

    def skip(self, num_batches):
        """Go on as if so many batches had been made."""
        self.cursor += num_batches * self.batch_size

    def getdata(self):
        pixels = super().getdata()[0].as_in_context(self.levels.context)  # the step's one copy to the device
        images = self.levels.take(pixels).broadcast_axes(axis=1, size=self.nc)
        return [images, self.getlabel()[0].as_in_context(images.context)] if self.conditional else [images]


class RandIter(mx.io.DataIter):
    """Latent batches, Normal(0, 1), without end; drawn on `ctx` and reproducible from `mx.random.seed`.

    `classes`: (n,) class positions of real images; each latent's class is that of one of these, so that fakes have the
    reals' shares, and is appended one-hot.
    Yields mx.io.DataBatch with data [(batch_size, ndim, 1, 1) float32] and no label, and with `classes` data
    [(batch_size, ndim + number of classes, 1, 1)] and label [(batch_size,) float32 class positions].
    """

    def __init__(self, batch_size, ndim, ctx=None, classes=None):
        super().__init__(batch_size)
        self.ndim, self.ctx = ndim, ctx
        self.num_classes = 0 if classes is None else int(max(classes)) + 1
        self.classes = mx.nd.array(classes, ctx) if self.num_classes else None
        self.provide_data = [mx.io.DataDesc('rand', (batch_size, ndim + self.num_classes, 1, 1), np.float32)]
        self.provide_label = []

    def next(self):
        latent = mx.random.normal(0, 1.0, shape=(self.batch_size, self.ndim, 1, 1), ctx=self.ctx)
        if not self.num_classes:
            return mx.io.DataBatch([latent], [], pad=0)
        images = mx.nd.random.randint(0, len(self.classes), shape=(self.batch_size,), ctx=self.ctx)
        classes = self.classes.take(images)
        one_hot = classes.one_hot(self.num_classes).reshape((0, 0, 1, 1))
        return mx.io.DataBatch([mx.nd.concat(latent, one_hot, dim=1)], [classes], pad=0)


class ImagenetIter(mx.io.DataIter):
    """Batches of photos from a RecordIO file (`im2rec.py` makes one): random crop, random mirror, [-1, 1].

    `path` is the .rec file: a shorter side of any size is first resized to 256 pixels. `data_shape`: (3, height,
    width); `ctx`: where the batches are wanted; `num_parts`, `part_index`: this worker's share of the file.
    Yields mx.io.DataBatch with data [(batch_size,) + data_shape float32]; the last one is filled up from the start, and
    the next epoch begins after these (MXNet's `round_batch`). Raises OSError and ValueError as `_check_rec` says.
    """

    def __init__(self, path, batch_size, data_shape, ctx=None, num_parts=1, part_index=0):
        super().__init__(batch_size)
        _check_rec(path, batch_size * num_parts)
        self.ctx = ctx or mx.cpu()
        try:
            self.internal = mx.io.ImageRecordIter(
                path_imgrec=path, data_shape=data_shape, batch_size=batch_size, resize=256, rand_crop=True,
                min_crop_size=192, max_crop_size=256, rand_mirror=True, mean_r=127.5, mean_g=127.5, mean_b=127.5,
                scale=1 / 127.5, preprocess_threads=int(os.environ.get('OMP_NUM_THREADS') or os.cpu_count()),
                num_parts=num_parts, part_index=part_index, verbose=False)
        except StopIteration:  # MXNet has read the first batch; it cuts the file by bytes, not by images
            raise ValueError(f'{path}: share {part_index} of {num_parts} has no image; use fewer workers') from None
        self.provide_data = [mx.io.DataDesc('data', (batch_size,) + tuple(data_shape), np.float32)]
        self.provide_label = []

    def reset(self):
        self.internal.reset()

    def iter_next(self):  # not `internal.iter_next`: it stays at the batch that MXNet reads ahead to learn its shape
        self.batch = next(self.internal, None)
        return self.batch is not None

    def getdata(self):
        return [self.batch.data[0].as_in_context(self.ctx)]

    def getpad(self):
        return self.batch.pad


def _check_rec(path, batch_size):
    """Raise OSError where there is no such file, and ValueError where MXNet would end the process in a decoding thread:
    no RecordIO file, cut short, fewer images than a batch, a first record that is no image. (A later one still does.)

    RecordIO (dmlc-core, recordio.h) is 4-byte words: magic number; 3 bits of flag and 29 of length; the padded data. No
    word of the data is the magic number, so the last one in the file starts the last record, or a part of it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file; imgnet_path must name a .rec made by im2rec.py')
    if set('#?;') & set(path):
        raise ValueError(f'{path}: MXNet reads # ? and ; in a name its own way; rename it')
    try:
        reader = mx.recordio.MXRecordIO(path, 'r')
        records = list(filter(None, (reader.read() for _ in range(batch_size))))
        _, image = mx.recordio.unpack_img(records[0], cv2.IMREAD_COLOR)
        words = np.memmap(path, '<u4', 'r')[-2 ** 24:]  # the last 64 MB: more than any photo has
        last = np.flatnonzero(words == 0xced7230a)[-1]
        flag, length = divmod(int(words[last + 1]), 1 << 29)
        whole = flag in (0, 3) and last + 2 + -(-length // 4) == len(words)  # 3: a record's last part
    except (IndexError, ValueError, struct.error, cv2.error, mx.MXNetError):
        image = None
    if image is None or not whole:
        raise ValueError(f'{path}: empty, cut short, or no RecordIO file of images; make it again with im2rec.py')
    if len(records) < batch_size:
        raise ValueError(f'{path}: has {len(records)} images, fewer than the batch of {batch_size}')


def load_data(s, rank=0, workers=1):
    """The data that the settings `s` ask for.

    Returns its name, the iterator over this worker's share, and, but for pictures, all images with their classes for
    `Coverage`: (X, classes, class names), else None. Raises OSError and ValueError as `get_mnist`, `PixelIter` and
    `ImagenetIter` do.
    """
    if s.dataset == 'imagenet':
        return s.dataset, load_pictures(s, rank, workers), None
    name = s.dataset
    try:
        X, _, y, _ = get_digits(labels=True) if name == 'digits' else get_mnist(s.mnist_path, labels=True)
    except OSError as error:
        if s.mnist_path or not s.fallback or workers > 1:  # several may not each decide on other data
            raise
        print(f"WARNING: {error}. Training on scikit-learn's 8x8 digits instead", flush=True)
        name, (X, _, y, _) = 'digits', get_digits(labels=True)
    train_iter = PixelIter(X, y, s.batch_size, s.nc, s.ctx[0], s.conditional, rank, workers)
    return name, train_iter, (X, train_iter.classes, train_iter.class_names)


# ---------------------------------------------------------------- how good the generated images are

class Coverage:
    """Compares generated images with real ones, by a classifier of the real ones that is fitted at its first use.

    `X` (n, 1, 64, 64) uint8, `y` (n,) and `class_names` are the real training images, class positions and names.
    `num_images`: how many images to generate; their Fréchet distance is that from as many real ones.
    """

    def __init__(self, X, y, class_names):
        self.X, self.y, self.class_names = X, y, class_names
        self.num_images = max(1000, min(5000, len(X) // 2))

    @functools.cached_property
    def classifier(self):
        from sklearn.neural_network import MLPClassifier
        passes = min(66, max(3, 720_000 // len(self.X)))  # 12 over MNIST
        classifier = MLPClassifier((256,), batch_size=min(128, len(self.X)), max_iter=passes, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that it could go on learning
            return classifier.fit(_features(_scaled(self.X))[0], self.y)

    def look(self, batches):
        """`count`'s row but for 'fd'; the mean (256,) and covariance (256, 256) in the classifier's hidden layer."""
        from scipy.stats import entropy
        features, asked, median = _features(batches)
        hidden = np.maximum(features @ self.classifier.coefs_[0] + self.classifier.intercepts_[0], 0)
        num_classes = len(self.class_names)
        probability = self.classifier.predict_proba(features)[:, :num_classes]  # it makes two of a single class
        classes = probability.argmax(axis=1)
        shares, real = (np.bincount(labels, minlength=num_classes) / len(labels) for labels in (classes, self.y))
        row = {f'share_{name}': share for name, share in zip(self.class_names, shares)}
        row.update(digits=int((shares >= real / 10).sum()), confidence=probability.max(axis=1).mean(),
                   kl=entropy(shares, real), median=median)
        if asked is not None:
            right = classes == asked
            row.update(asked=right.mean(), asked_worst=min(right[asked == wanted].mean() for wanted in set(asked)))
        return row, (hidden.mean(axis=0), np.cov(hidden, rowvar=False))

    @functools.cached_property
    def real(self):
        return self.look(_scaled(self.X[:2 * self.num_images:2]))

    @property
    def real_median(self):
        """The real images' median pixel, 0..255."""
        return self.real[0]['median']

    @functools.cached_property
    def floor(self):
        """The Fréchet distance of real images from real ones; None where each half has fewer than 1,000."""
        if len(self.X) < 2000:
            return None
        return frechet_distance(self.real[1], self.look(_scaled(self.X[1:2 * self.num_images:2]))[1])

    def count(self, batches):
        """Judge generated images. `batches` yields (images, asked): images (k, nc, 64, 64) float in [-1, 1], and (k,)
        class positions that were asked for, or None.

        Returns {'share_<class name>': for each class, 'digits': how many classes have at least a tenth of their real
        share, 'confidence': the classifier's mean, 'kl': Kullback-Leibler divergence from the real shares in nats,
        'median': the median pixel, 0..255, 'fd': the Fréchet distance from real images, or None as `floor`}, and where
        classes were asked for, 'asked' and 'asked_worst': the share of these that were made, of all and of the worst.
        """
        row, normal = self.look(batches)
        return {**row, 'fd': None if self.floor is None else frechet_distance(self.real[1], normal)}


def _scaled(X):
    """Real images as `count` wants them, never many as floats at once."""
    return ((X[i:i + 100] / np.float32(127.5) - 1, None) for i in range(0, len(X), 100))


def _features(batches):
    """What is kept of `count`'s batches: means of 4x4 pixels (n, 256), the classes asked for, the median pixel. Of
    several channels it is their mean.
    """
    features, asked, levels = [], [], np.zeros(256, int)
    for images, classes in batches:
        grey = images.mean(axis=1)
        features.append(grey.reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(-1, 256))
        asked.append(classes)
        levels += np.bincount(np.rint((grey + 1) * 127.5).astype(np.uint8).ravel(), minlength=256)
    asked = None if asked[0] is None else np.concatenate(asked)
    return np.concatenate(features), asked, int(np.searchsorted(levels.cumsum(), levels.sum() / 2))


def frechet_distance(a, b):
    """The distance of two normal distributions, each (mean, covariance): Heusel et al. 2017."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    # the trace of the product's root, without `sqrtm`, which turns complex where a covariance is singular
    trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace)
