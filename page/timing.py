"""How long the built page takes, in a headless browser on this machine: `python -m page.timing`.

first    seconds from opening the page to the first answer of any method
all      seconds to the answers of all methods
script   milliseconds in which a change of K is worked out and drawn
frame    milliseconds from a change of K to the end of the next frame
"""

import functools
import http.server
import os
import shutil
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import runs

ANSWERED = "[...document.querySelectorAll('.card')].{some}(card => card.dataset.answer)"
# for each of 60 values of K: milliseconds of the script, and to the end of the frame behind it
DRAGS = """async () => {
    const slider = document.querySelector('input[type=range]'), times = [];
    for (let turn = 0; turn < 60; turn++) {
        const begun = performance.now();
        slider.value = 4 + 37 * turn % 140;
        slider.dispatchEvent(new Event('input', {bubbles: true}));
        const script = performance.now() - begun;
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        times.push([script, performance.now() - begun]);
        await new Promise(done => setTimeout(done, 30));
    }
    return times;
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def measure(browser, address: str) -> str:
    """One line: of a window that has nothing in its cache."""
    window = browser.new_context(viewport={"width": 1440, "height": 900})
    page, begun = window.new_page(), time.perf_counter()
    page.goto(address)
    seconds = []
    for some in ("some", "every"):
        page.wait_for_function("document.querySelector('.card') && " + ANSWERED.replace(
            "{some}", some), polling=20)
        seconds.append(time.perf_counter() - begun)
    script, frame = np.array(page.evaluate(DRAGS)).T
    window.close()
    return (f"first {seconds[0]:.2f} s, all {seconds[1]:.2f} s; "
            + "; ".join(f"{name} median {np.median(x):.1f}, 90 % {np.quantile(x, .9):.1f}, most "
                        f"{x.max():.1f} ms" for name, x in (("script", script), ("frame", frame))))


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--site", type=Path, default=Path("runs/page"), help="the built page")
    parser.add_argument("--repeats", type=int, default=4, help="windows that open it")
    options = parser.parse_args(args)
    runs.check_options(options, repeats=1)
    if not (options.site / "world.json").exists():
        raise FileNotFoundError(f"site={str(options.site)!r} has no world.json: expected a built "
                                "page, make page makes it")
    if not find_spec("playwright"):
        raise ImportError("playwright is missing, which drives the browser: pip install -r "
                          "page/requirements.txt")
    from playwright.sync_api import sync_playwright
    handler = functools.partial(Quiet, directory=str(options.site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        print(f"Chromium {browser.version}, {os.cpu_count()} cores")
        for _ in range(options.repeats):
            print(measure(browser, f"http://127.0.0.1:{server.server_port}/"), flush=True)
    server.shutdown()


if __name__ == "__main__":
    runs.command(main)
