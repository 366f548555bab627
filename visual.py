"""From arrays to pictures: mosaics, curves and a film, on disk and, if there is a screen, in windows.

The windows belong to a child process, for OpenCV aborts a process that has no screen, without an exception.
"""
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np

TITLES = ('gout', 'diff', 'data', 'loss')  # the windows, in the order of their places
QUIT = ord('q')       # the viewer's exit status after that key
FILM_BYTES = 3_000_000
_viewers = {}    # folder: the child process that shows its pictures
_warned = set()  # the kinds of warning that have been printed


# ---------------------------------------------------------------- mosaics and files

def tile(X, columns=None):
    """A mosaic of images, row by row.

    `X` is float (n, 1 or 3, height, width), RGB, in [-1, 1]; values beyond are clipped, NaN is black. By default the
    mosaic is about square; black fills its last row. Returns uint8 (rows * height, columns * width, 3), BGR.
    """
    n, c, h, w = X.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    images = np.zeros((n + -n % columns, c, h, w), np.uint8)
    images[:n] = np.rint((np.minimum(np.fmax(X, -1), 1) + 1) * 127.5)  # fmax takes -1 for NaN
    mosaic = images.reshape(-1, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
    return cv2.cvtColor(mosaic, cv2.COLOR_RGB2BGR if c == 3 else cv2.COLOR_GRAY2BGR)


def columns_for(num_classes):
    """Columns of a mosaic whose images' classes are 0, 1, 2, ..., 0, 1, 2, ...: each column then has one class.

    Few classes have several columns each. More than sixteen classes share sixteen columns. None without classes.
    """
    return min(num_classes * max(1, 8 // num_classes), 16) if num_classes else None


def visual(title, X, out='out', display=True, classes=None, columns=None):
    """Show the first 256 images as `tile`'s mosaic, sorted by `classes` (n,); out=None: do nothing."""
    if out is not None:
        order = slice(256) if classes is None else np.argsort(classes[:256], kind='stable')
        show_picture(title, tile(X[order], columns), out, display)


@contextlib.contextmanager
def replacing(path):
    """Yield a name to write to. Its file then replaces `path`, or after an error is removed: `path` is always whole."""
    beside = f'{path}.tmp'
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise


def save(path, picture):
    """Write a picture as PNG, whole or not at all. Raises OSError."""
    with replacing(path) as beside, open(beside, 'wb') as file:
        file.write(cv2.imencode('.png', picture)[1])


def show_picture(title, picture, out='out', display=True):
    """Write a BGR picture to `<out>/<title>.png` and show it; what fails is said once. out=None: do nothing."""
    if out is None:
        return
    try:
        os.makedirs(out, exist_ok=True)
        save(os.path.join(out, f'{title}.png'), picture)
        if display:
            _start_viewer(out)
    except OSError as error:
        warn_once('write', f'WARNING: no picture can be written or shown ({error}); the run goes on')


def film(out):
    """Join the mosaics `gout-*.png` of a folder, in the order of their names, to `film.webp` of at most 3 MB.

    Up to 25 frames, evenly spaced, of the newest one's size. What fails is said once. out=None: do nothing.
    """
    paths = sorted(pathlib.Path(out).glob('gout-*.png')) if out is not None else []
    if not paths:
        return
    try:
        for most_frames in (25, 13, 7, 3):  # a second of work for 25 of 512x512
            chosen = np.unique(np.linspace(0, len(paths) - 1, most_frames).astype(int))
            frames = [frame for frame in (cv2.imread(str(paths[i])) for i in chosen) if frame is not None]
            animation = cv2.Animation()
            animation.frames = [frame for frame in frames if frame.shape == frames[-1].shape]
            animation.durations = [400] * (len(animation.frames) - 1) + [2500]  # milliseconds
            ok, encoded = cv2.imencodeanimation('.webp', animation, [cv2.IMWRITE_WEBP_QUALITY, 60])
            if ok and len(encoded) <= FILM_BYTES:  # not ok: a side of more than 16,383 pixels
                with replacing(os.path.join(out, 'film.webp')) as beside, open(beside, 'wb') as file:
                    file.write(encoded)
                return
        raise OSError('its pictures are too large')
    except (OSError, AttributeError, cv2.error) as error:  # a full disk, an OpenCV without animations
        warn_once('film', f'WARNING: {out}/film.webp cannot be written ({str(error).strip()}); the run goes on')


# ---------------------------------------------------------------- curves

LEFT, RIGHT, TOP, BOTTOM = 50, 610, 35, 435  # the axes in a picture of 640x480 pixels
COLOURS = np.array([(0, 94, 213), (178, 114, 0), (115, 158, 0)])  # BGR; colour-blind eyes can tell them apart


def plot(iterations, curves):
    """A line chart of losses, 640x480, BGR: the values in a pale colour, the mean of each fiftieth in a strong one.

    `iterations` (n,), n >= 1, ascend. `curves`: {name: (n,) values}, at most three; only what is finite is drawn.
    """
    picture = np.full((480, 640, 3), 255, np.uint8)
    curves = {name: np.array([iterations, values])[:, np.isfinite(values)] for name, values in curves.items()}
    peaks = [np.percentile(values, 99) for _, values in curves.values() if values.size]
    y_limit = 1.1 * max([0.5, *peaks])  # a rare peak is cut off: it would flatten all the rest
    x_scale, y_scale = (RIGHT - LEFT) / iterations[-1], (BOTTOM - TOP) / y_limit
    for value in _ticks(y_limit):
        y = int(BOTTOM - value * y_scale)
        cv2.line(picture, (LEFT, y), (RIGHT, y), (225, 225, 225))
        _text(picture, f'{value:,.10g}', LEFT / 2, y + 5)
    for value in _ticks(iterations[-1]):
        _text(picture, f'{value:,.10g}', LEFT + value * x_scale, BOTTOM + 18)
    _text(picture, 'iterations', (LEFT + RIGHT) / 2, 472)
    points = [np.array([LEFT + x * x_scale, np.clip(BOTTOM - y * y_scale, TOP, BOTTOM)]).T for x, y in curves.values()]
    for line, colour in zip(points, COLOURS):
        _line(picture, line, (255 - (255 - colour) / 3).tolist(), 1)
    for i, name in enumerate(curves):  # the strong lines come above all the pale ones
        colour, parts = COLOURS[i].tolist(), np.array_split(points[i], 50)  # of few values some parts are empty
        _text(picture, name, LEFT + 60 + 130 * i, TOP - 12, colour)
        _line(picture, [part.mean(axis=0) for part in parts if len(part)], colour, 2)
    cv2.rectangle(picture, (LEFT, TOP), (RIGHT, BOTTOM), (0, 0, 0))
    return picture


def _line(picture, points, colour, thickness):
    """Draw a line through points, (n, 2)."""
    points = np.rint(np.concatenate([points, points[-1:]]))  # the last one twice, so that a single one shows
    cv2.polylines(picture, [points.reshape(-1, 1, 2).astype(np.int32)], False, colour, thickness, cv2.LINE_AA)


def _ticks(limit):
    """At most seven round numbers from 0 to the limit."""
    step = 10 ** np.floor(np.log10(limit))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if limit / (step * factor) <= 6)
    return np.arange(0, limit + step / 1000, step)


def _text(picture, string, x, y, colour=(0, 0, 0)):
    """Write a string whose middle is at x, as far as it stays within the picture."""
    font = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    width = cv2.getTextSize(string, *font, 1)[0][0]
    cv2.putText(picture, string, (int(min(x - width / 2, 640 - width)), int(y)), *font, colour, 1, cv2.LINE_AA)


# ---------------------------------------------------------------- windows

def quit_pressed():
    """Whether q was pressed in a window."""
    return any(viewer.poll() == QUIT for viewer in _viewers.values())


def close():
    """Close the windows and forget which warnings were printed. The next picture opens new windows."""
    for viewer in _viewers.values():
        viewer.kill()
        viewer.wait()
    _viewers.clear()
    _warned.clear()


def warn_once(kind, message):
    """Print a message, unless one of its kind has been printed since the last `close`."""
    if kind not in _warned:
        _warned.add(kind)
        with contextlib.suppress(OSError):  # the training notices at its next line that nobody reads
            print(message, flush=True)


def _start_viewer(out):
    """Start the process with a folder's windows, once, without waiting for it. Say once if it has failed."""
    # OpenCV's windows need X or XWayland, so WAYLAND_DISPLAY alone is not enough
    has_screen = os.environ.get('DISPLAY') or not sys.platform.startswith('linux')
    if has_screen and out not in _viewers:
        _viewers[out] = subprocess.Popen(
            [sys.executable, __file__, out, str(os.getpid())], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)  # Ctrl-C in the terminal is for the training alone
    if not has_screen or _viewers[out].poll() not in (None, 0, QUIT):
        command = f'{sys.executable} {__file__} {out}'
        warn_once('window', f'no window can be shown here ({command} says why); the pictures are in {out}')


def _view(out, training=None):
    """Show the pictures as they are on disk, each second, until q is pressed or the training, a process id, ends."""
    training = int(training or os.getppid())
    os.environ['QT_QPA_PLATFORM'] = 'xcb'  # OpenCV brings no other; desktops ask for Wayland's
    signal.alarm(20)  # a screen that does not answer by then counts as none
    try:
        cv2.namedWindow('starting')  # on a busy CPU the first window may stay blank: this one is not needed
    except cv2.error:
        sys.exit('this OpenCV has no windows; how to exchange it is in the last line of README.md')
    cv2.waitKey(100)
    cv2.destroyWindow('starting')
    signal.alarm(0)
    opened = set()
    while os.getppid() == training:
        for title in TITLES:
            picture = cv2.imread(os.path.join(out, f'{title}.png'))
            if picture is None:  # not yet written
                continue
            if title not in opened:
                opened.add(title)
                _open(title, picture)
            if cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) == 1:  # the user has not closed it
                cv2.imshow(title, picture)
        if cv2.waitKey(1000) & 0xff == QUIT:
            sys.exit(QUIT)
        time.sleep(0.05)  # without a window waitKey does not wait


def _open(title, picture):
    """Open a window at its place: on 1920x1080 pixels the mosaics are side by side, the curves below."""
    for last_try in (False, False, True):
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        cv2.imshow(title, picture)
        cv2.waitKey(500)
        left, top, width, height = cv2.getWindowImageRect(title)
        # on a busy CPU Qt may miss that it opened: it is blank, and the picture still in the middle of Qt's 400x300
        if last_try or (2 * left + width, 2 * top + height) != (400, 300):
            break
        cv2.destroyWindow(title)
    height, width = picture.shape[:2]
    scale = min(1, 620 / width, 512 / height) if title != 'loss' else 1
    cv2.resizeWindow(title, int(width * scale), int(height * scale))
    row, column = divmod(TITLES.index(title), 3)
    cv2.moveWindow(title, 5 + column * 630, 22 + row * 556)  # 22 pixels are a title bar


if __name__ == '__main__':
    with contextlib.suppress(cv2.error):  # the user has closed the last window, and Qt has ended
        _view(*sys.argv[1:])
