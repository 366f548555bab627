"""Which learning rate trains which network: short runs on the real MNIST over width, channels, lr and seed.

    python tests/study.py ../shared/mnist

The runs go on where the last call stopped: `out/study.jsonl` has a line for each that is done. A run a core, each with
one thread. Prints the table of the README at the end.
"""
import itertools
import json
import multiprocessing
import os
import sys

os.environ['OMP_NUM_THREADS'] = '1'  # a process a core
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402

import joblib  # noqa: E402
import mxnet as mx  # noqa: E402
import numpy as np  # noqa: E402

import dcgan  # noqa: E402

RESULTS = os.path.join('out', 'study.jsonl')
EPOCH = 938
REAL = []  # images, digits, and who counts digits


def cells():
    """(width, nc, lr, seed, conditional, iterations): all of widths 16 and 32, of 64 one seed of the middle rates."""
    for seed, width in itertools.product((1, 2, 3), (16, 32, 64)):
        for lr, nc in itertools.product((0.001, 0.0006, 0.0004, 0.0002, 0.0001), (1, 3)):
            if width < 64 or (seed == 1 and lr > 0.0001):
                yield width, nc, lr, seed, False, 500


def prepare(path):
    """Load MNIST once in each process."""
    X, _, y, _ = data.get_mnist(path, labels=True)
    REAL[:] = X, y, data.Coverage(X, y)


def run(cell):
    width, nc, lr, seed, conditional, iterations = cell
    X, y, coverage = REAL
    s = dcgan.Settings(ngf=width, ndf=width, nc=nc, lr=lr, seed=seed, conditional=conditional, ctx=[mx.cpu()])
    train_iter = data.PixelIter(X, y, s.batch_size, nc, conditional=conditional)
    rand_iter = data.RandIter(s.batch_size, s.Z, conditional=conditional)
    modules = dcgan.make_modules(s, train_iter.provide_data, rand_iter.provide_data)
    zeros, ones = mx.nd.zeros(s.batch_size), mx.nd.ones(s.batch_size)
    trace, measured, t = [], [], 0
    for epoch in range(-(-iterations // EPOCH)):
        mx.random.seed(seed + 1 + epoch)
        train_iter.reset()
        for batch in train_iter:
            if t == iterations:
                break
            _, _, answers = dcgan.train_step(*modules, rand_iter.next(), batch, zeros, ones)
            fake, real, again = (answer.asnumpy().ravel().astype(float) for answer in answers)
            trace.append((((fake <= 0.5).mean() + (real > 0.5).mean()) / 2,
                          -np.log(again + 1e-12).mean(),
                          -(np.log(1 - fake + 1e-12).mean() + np.log(real + 1e-12).mean()) / 2))
            t += 1
        latent, digits = dcgan.fixed_latents(s, 1000)
        row = coverage.count(dcgan.generate(modules[0], latent, digits), digits)
        measured.append(dict(iteration=t, **{k: round(float(v), 4) for k, v in row.items()}))
    lines = np.array(trace)[:len(trace) // 10 * 10].reshape(-1, 10, 3).mean(axis=1).round(4).tolist()
    return dict(cell=list(cell), measured=measured, lines=lines)


def alive(row):
    """Whether neither network has won over the last hundred iterations."""
    _, entropy_G, entropy_D = np.mean(row['lines'][-10:], axis=0)
    return entropy_D > 0.05 and entropy_G < 6


def first_alive(row):
    """The first iteration from which it stays so, over hundred iterations each; '' where it does not."""
    lines = np.array(row['lines'])
    means = [lines[i - 10:i].mean(axis=0) for i in range(10, len(lines) + 1)]
    dead = [i for i, (_, G, D) in enumerate(means) if not (D > 0.05 and G < 6)]
    return '' if not alive(row) else 10 * (dead[-1] + 1 if dead else 0) + 100


def main(path):
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
    print('| width | nc | lr | seed | alive from | digits | KL | confidence |\n|---|---|---|---|---|---|---|---|')
    for row in sorted(rows, key=lambda row: row['cell']):
        width, nc, lr, seed, *_ = row['cell']
        last = row['measured'][-1]
        print(f'| {width} | {nc} | {lr} | {seed} | {first_alive(row)} | {last["digits"]:.0f} | {last["kl"]} | '
              f'{last["confidence"]} |')


if __name__ == '__main__':
    main(sys.argv[1])
