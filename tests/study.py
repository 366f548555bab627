"""Which learning rate trains the published networks: short runs on the real MNIST over width, channels, lr and seed.

    python tests/study.py ../shared/mnist          # the folder with MNIST's IDX files
    python tests/study.py ../shared/mnist why      # draws out/why.png: a dead pair beside a living one

D has no bias, the reals' label is 1, and lr is the same from the first iteration on, as published: with these
`Settings.head_start` was found. The runs go on where the last call stopped: `out/study.jsonl` has a line for each that
is done. A run a core, each with one thread. Prints a table of all of them at the end.
"""
import itertools
import json
import multiprocessing
import os
import sys

os.environ['OMP_NUM_THREADS'] = '1'  # a process a core
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402

import cv2  # noqa: E402
import joblib  # noqa: E402
import mxnet as mx  # noqa: E402
import numpy as np  # noqa: E402

import dcgan  # noqa: E402
import visual  # noqa: E402

RESULTS = os.path.join('out', 'study.jsonl')
ITERATIONS = 500
COLUMNS = 'digits', 'kl', 'confidence', 'fd'
REAL = []  # images, labels, and who counts digits


def cells():
    """(width, nc, lr, seed): all of widths 16 and 32; of 64 fewer seeds of smaller rates; of 128 one run."""
    for seed, width in itertools.product((1, 2, 3), (16, 32, 64)):
        for lr, nc in itertools.product((0.001, 0.0006, 0.0004, 0.0002, 0.0001), (1, 3)):
            if width < 64 or lr > 0.0004 or (seed == 1 and lr > 0.0001):
                yield width, nc, lr, seed
    yield 128, 1, 0.0003125, 1


def published(width, **settings):
    """The settings that are not in question, as the published script has them."""
    return dcgan.Settings(ngf=width, ndf=width, d1_bias=False, pos_label=1., head_start=0, lr_steady=0, ctx=(mx.cpu(),),
                          **settings)


def prepare(path):
    """Load MNIST once in each process."""
    X, _, y, _ = data.get_mnist(path, labels=True)
    REAL[:] = X, y, data.Coverage(X, y, [str(digit) for digit in range(10)])


def steps(s, iterations):
    """The modules, and an iterator that trains them: for each iteration it yields what `train_step` returns."""
    X, y, _ = REAL
    train_iter, rand_iter = data.PixelIter(X, y, s.batch_size, s.nc), data.RandIter(s.batch_size, s.Z)
    modules = dcgan.make_modules(s, train_iter.provide_data, rand_iter.provide_data)
    labels = [mx.nd.full(s.batch_size, label) for label in (0, 1, s.pos_label)]
    mx.random.seed(s.seed + 1)
    return modules, (dcgan.train_step(*modules, rand_iter.next(), batch, *labels)
                     for batch in itertools.islice(train_iter, iterations))


def run(cell):
    """Train one cell; its metrics, means of ten iterations, and which digits there are at the end."""
    width, nc, lr, seed = cell
    s, trace = published(width, nc=nc, lr=lr, seed=seed), []
    modules, results = steps(s, ITERATIONS)
    for _, _, answers in results:
        fake, real, again = (answer.asnumpy().astype(float) for answer in answers)
        ones = np.ones(s.batch_size)
        trace.append(((dcgan.facc(1 - ones, fake) + dcgan.facc(ones, real)) / 2, dcgan.fentropy(ones, again),
                      (dcgan.fentropy(1 - ones, fake) + dcgan.fentropy(ones, real)) / 2))
    latents = dcgan.fixed_latents(s.seed, REAL[2].num_images, s.Z)
    row = REAL[2].count(dcgan.generate(modules[0], latents))
    lines = np.array(trace).reshape(-1, 10, 3).mean(axis=1).round(4).tolist()
    return dict(cell=cell, lines=lines, **{name: round(float(row[name]), 4) for name in COLUMNS})


def first_alive(row):
    """The first iteration from which D's entropy stays above 0.05 and G's below 6, each the mean of the hundred
    iterations before; '' where it does not."""
    lines = np.array(row['lines'])
    means = [lines[i - 10:i].mean(axis=0) for i in range(10, len(lines) + 1)]
    dead = [i for i, (_, G, D) in enumerate(means) if not (D > 0.05 and G < 6)]
    first = dead[-1] + 1 if dead else 0
    return 10 * first + 100 if first < len(means) else ''


def study(path):
    os.makedirs('out', exist_ok=True)
    with open(RESULTS, 'a+') as file:
        file.seek(0)
        rows = [json.loads(line) for line in file]
        todo = [cell for cell in cells() if list(cell) not in [row['cell'] for row in rows]]
        cores = joblib.cpu_count(only_physical_cores=True)
        with multiprocessing.get_context('spawn').Pool(cores, prepare, [path]) as pool:
            for row in pool.imap_unordered(run, todo):
                rows.append(row)
                file.write(json.dumps(row) + '\n')
                file.flush()
    print('| width | nc | lr | seed | alive from | digits | KL | confidence | FD |\n' + '| ---: ' * 9 + '|')
    for row in sorted(rows, key=lambda row: row['cell']):
        values = *row['cell'], first_alive(row), *(row[name] for name in COLUMNS)
        print('| ' + ' | '.join(map(str, values)) + ' |')


def why(path):
    """Draw the size of `diff` and how far D's logits are apart, of a learning rate that fails and of one that trains;
    print these, G's updates beside its weights, and how much its images differ."""
    prepare(path)
    curves = []
    for lr in (0.0002, 0.001):
        rows, before = [], None
        modules, results = steps(published(32, nc=1, lr=lr, seed=1), 200)
        for fakes, diff, answers in results:
            weights = [copies[0].asnumpy() for copies in modules[0]._exec_group.param_arrays]
            moved = [np.linalg.norm(w - b) / np.linalg.norm(w) for w, b in zip(weights, before or weights)]
            before = weights
            p = [np.clip(answer.asnumpy().astype(float), 1e-12, 1 - 1e-12) for answer in answers]
            to_fakes, to_reals, _ = (np.log(x / (1 - x)).mean() for x in p)
            rows.append((1000 * np.sqrt(np.square(diff.asnumpy()).mean()), to_reals - to_fakes,
                         100 * np.mean(moved), 127.5 * fakes.asnumpy().std(axis=0).mean()))
        curves.append(np.array(rows).T)
        print(f'lr {lr}, means of 20 iterations: diff * 1000; logits apart; updates, % of the weights; '
              'standard deviation of a pixel over a batch, of 255')
        print(curves[-1].reshape(4, 10, 20).mean(axis=2).round(2))
    iterations = np.arange(1, 201)
    pictures = [visual.plot(iterations, {f'{name}, lr 0.0002': dead, f'{name}, lr 0.001': living})
                for name, dead, living in zip(('1000 diff', 'logits'), *curves)]
    visual.save(os.path.join('out', 'why.png'), cv2.hconcat(pictures))


if __name__ == '__main__':
    why(sys.argv[1]) if sys.argv[2:] == ['why'] else study(sys.argv[1])
