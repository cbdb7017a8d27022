"""The page in a real browser: what it shows is what PyTorch says, and bad input gets a sentence.

Driven by playwright; the browser is the distribution's chromium, or the one playwright fetched.
PICTURE=file.jpg in the environment: where the README's picture of it goes.
"""

import functools
import http.server
import json
import os
import shutil
import threading
from io import BytesIO

import numpy as np
import pytest
from built_page import of_pytorch
from PIL import Image

from benchmarks import tiny_world
from tiny import scenes

pytestmark = pytest.mark.slow
LOADED = "document.querySelectorAll('.card').length > 0"
SETTLED = """[...document.querySelectorAll('.card:not([hidden])')].every(card =>
             card.dataset.answer && card.getAttribute('aria-busy') === 'false')"""
CARDS = """Object.fromEntries([...document.querySelectorAll('.card')].map(card =>
           [card.dataset.method, {...card.dataset, text: card.innerText}]))"""
# what world.js makes of the scenes, asked inside of the page
WORLD = """const {World} = await import('./world.js');
           const world = new World(await (await fetch('world.json')).json());"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    from page.export import runtime
    if not shutil.which("npm"):
        pytest.skip("npm is missing, which fetches onnxruntime-web: see page/README.md")
    runtime(site / "runtime")
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api",
                                     reason="playwright is missing: see page/README.md")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser starts ({str(error).splitlines()[0]}): see page/README.md")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser, address):
    """open(...) -> a page that has loaded, in a window of its own. What goes wrong in it is found
    in page.trouble, and no request may leave the origin."""
    windows = []

    def open_page(wait=True, script=None, **how):
        window = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **how})
        windows.append(window)
        page = window.new_page()
        page.set_default_timeout(180_000)
        page.trouble, page.asked = [], []
        page.on("console", lambda said: said.type in ("error", "warning")
                and page.trouble.append(said.text))
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        window.on("request", lambda request: page.asked.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(address)
        if wait:
            page.wait_for_function(LOADED)
            page.wait_for_function(SETTLED)
        return page
    yield open_page
    for window in windows:
        window.close()


@pytest.fixture(scope="module")
def shared(opened):
    return opened()


@pytest.fixture
def page(shared, address):
    """The loaded page at its first scene, which it is at again afterwards."""
    go(shared, 0)
    yield shared
    assert shared.trouble == []
    outside = {url for url in shared.asked if not url.startswith((address, "data:", "blob:"))}
    assert not outside


def go(page, scene: int, question: str | None = None) -> None:
    slide(page, "k", 16)
    slide(page, "mean", 16)
    page.locator("#scenes button").nth(scene).click()
    page.wait_for_function(f"document.getElementById('scene-number').innerText === "
                           f"'{scene + 1} of 40'")
    if question is not None:
        ask(page, question)
    page.wait_for_function(SETTLED)


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.click("button[form=ask]")


def slide(page, name: str, value: int) -> None:
    page.evaluate("""([name, value]) => {
        const slider = document.getElementById(name);
        slider.value = value;
        slider.dispatchEvent(new Event('input'));
        return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    }""", [name, value])


def cards(page) -> dict:
    page.wait_for_function(SETTLED)
    return page.evaluate(CARDS)


def kept(card: dict) -> list[int]:
    return [int(p) for p in card["kept"].split()]


def says(page, place: str = "question") -> str:
    return page.inner_text(f"#{place}-says")


# ------------------------------------------------------------------------------------ as PyTorch


def shipped(site) -> tuple[dict, list[tiny_world.Row]]:
    world = json.loads((site / "world.json").read_text())
    rows = {str(row.id): row for row in tiny_world.load_rows(2000)}
    return world, [rows[scene["name"]] for scene in world["scenes"]]


def test_picks_and_answers_on_ten_scenes_are_those_of_pytorch(page, site, vlm):
    world, rows = shipped(site)
    chosen = [(i, row.questions[i % len(row.questions)]) for i, row in enumerate(rows[:10])]
    questions = [tiny_world.question_of(rows[i], 0, question) for i, question in chosen]
    expected = of_pytorch(vlm, world, questions)
    wrong = []
    for place, (i, question) in enumerate(chosen):
        for k in (16, 48):
            go(page, i, question.question)
            slide(page, "k", k)
            slide(page, "mean", k)
            for name, card in cards(page).items():
                found = kept(card), card["answer"]
                keep, answer = expected[name, k if name != "all" else 0][place]
                if found != (keep, answer):
                    wrong.append((i, name, k, found, (keep, answer)))
                assert f"{len(keep)} of 144" in card["text"]
            assert says(page) == f"Truth: {question.answer}"
    assert not wrong


def test_truth_and_evidence_are_those_of_the_scenes(page, site):
    world, rows = shipped(site)
    found = page.evaluate("async () => {" + WORLD + """
        return world.scenes.map(scene => scene.questions.map(({question}) => {
            const truth = world.truth(scene, question);
            return [truth.family, truth.answer, truth.evidence,
                    [...world.coverage(scene, truth.evidence)]];
        }).concat([[world.captionOf(scene)]]));
    }""")
    for row, of_scene in zip(rows, found):
        assert of_scene.pop() == [scenes.caption(row.scene)]
        for question, (family, answer, evidence, cover) in zip(row.questions, of_scene):
            assert (family, answer, evidence) == (question.family, question.answer,
                                                  question.evidence), question
            assert np.allclose(cover, row.evidence(question, (12, 12)), atol=1e-6)


def test_questions_of_a_changed_scene_have_a_truth(page):
    found = page.evaluate("async () => {" + WORLD + """
        return world.scenes.flatMap(scene => world.ask(scene).map(question =>
            [question, world.truth(scene, question)?.answer ?? null,
             question.split(" ").every(word => word in world.vocabulary)]));
    }""")
    assert len(found) > 200 and all(answer and is_known for _, answer, is_known in found)


def test_pixels_of_a_changed_scene_are_near(page, site):
    """Both pictures have noise of 4, but their own: the difference has 5.7."""
    _, rows = shipped(site)
    drawn = page.evaluate("async () => {" + WORLD + """
        const pixels = async name => {
            const image = new Image();
            image.src = `scenes/${name}.png`;
            await image.decode();
            const context = new OffscreenCanvas(144, 144).getContext('2d');
            context.drawImage(image, 0, 0);
            return context.getImageData(0, 0, 144, 144).data;
        };
        return Promise.all(world.scenes.map(async scene =>
            [...world.render(scene, await pixels(`${scene.name}_empty`))]));
    }""")
    far = []
    for row, pixels in zip(rows, drawn):
        ours = np.array(pixels, np.float32).reshape(144, 144, 4)[..., :3]
        difference = abs(ours - np.asarray(row.image, np.float32))
        far.append((difference.max(-1) > 30).mean())
        assert difference.mean() < 6
    print(f"share of pixels that differ by more than 30: {np.mean(far):.4f}, {max(far):.4f}")
    assert np.mean(far) < .005 and max(far) < .01


# ------------------------------------------------------------------------------------ controls


def test_k_redraws_at_once_and_what_it_keeps_is_a_prefix(page):
    before = cards(page)
    page.evaluate("""() => {
        window.post = Worker.prototype.postMessage;
        Worker.prototype.postMessage = () => {};       // no model runs
    }""")
    for k in (4, 40, 144):
        slide(page, "k", k)
        for name, card in page.evaluate(CARDS).items():
            if name in ("all", "stepprune"):
                assert kept(card) == kept(before[name])
            else:
                less, more = sorted([kept(before[name]), kept(card)], key=len)
                assert len(kept(card)) == k and {*less} <= {*more}
    page.evaluate("() => { Worker.prototype.postMessage = window.post; }")
    slide(page, "k", 48)
    assert all(card["answer"] for card in cards(page).values())


def test_the_mean_moves_one_method_alone(page):
    before, counts = cards(page), []
    for mean in (2, 8, 24, 48):
        slide(page, "mean", mean)
        now = page.evaluate(CARDS)
        changed = [name for name in now if now[name]["kept"] != before[name]["kept"]]
        assert len(changed) <= 1
        counts.append(len(kept(now["stepprune"])))
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_picks_are_played_one_by_one(page):
    count = len(kept(cards(page)["stepprune"]))
    assert page.get_attribute("#player", "data-step") == str(count + 1)
    assert f"points at stop. {count} patches" in says(page, "step")
    page.click("#play")
    page.wait_for_function("Number(document.getElementById('player').dataset.step) >= 2")
    page.click("#play")
    step = int(page.get_attribute("#player", "data-step"))
    assert 2 <= step < count and page.inner_text("#play") == "Play"
    page.click("#next")
    assert page.get_attribute("#player", "data-step") == str(step + 1)
    page.click("#back")
    page.click("#back")
    assert f"Step {step - 1}: it points at patch" in says(page, "step")
    assert page.locator("#chart rect").count() == count + 1
    assert page.inner_text("#stop-value").endswith("%")
    slide(page, "step", 1)
    assert page.inner_text("#stop-value") == "0.0 %"   # stop is shut at the first step


def test_methods_are_chosen(page):
    box = page.locator("#methods input").nth(1)
    box.uncheck()
    assert page.locator(".card:visible").count() == 5
    box.check()
    assert page.locator(".card:visible").count() == 6 and cards(page)


def test_things_are_moved_recoloured_added_removed(page):
    ask(page, "how many shapes are there ?")
    shapes = int(says(page).removeprefix("Truth: "))
    page.click("#add")
    assert says(page) == f"Truth: {shapes + 1}"
    answers = {card["answer"] for card in cards(page).values()}
    assert str(shapes + 1) in answers
    page.locator("#colours [data-name=yellow]").click()
    page.locator("#kinds [data-name=heart]").click()
    ask(page, "is there a yellow heart ?")
    assert says(page) == "Truth: yes" and cards(page)["all"]["answer"] == "yes"

    ask(page, "where is the yellow heart ?")
    page.focus("#scene")
    for key in ["ArrowUp"] * 50 + ["ArrowLeft"] * 50:
        page.keyboard.press(key)
    assert says(page) == "Truth: top left"
    box = page.locator("#scene").bounding_box()
    scale = box["width"] / 144
    page.mouse.move(box["x"] + 13 * scale, box["y"] + 13 * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + 60 * scale, box["y"] + 60 * scale)
    page.mouse.move(box["x"] + 132 * scale, box["y"] + 132 * scale)
    page.mouse.up()
    assert says(page) == "Truth: bottom right" and cards(page)["all"]["answer"] == "bottom right"
    assert "changed" in page.inner_text("#scene-number")

    page.focus("#scene")
    page.keyboard.press("Delete")
    assert says(page).startswith("No truth to compare with: there is no yellow heart")
    page.click("#reset")
    page.wait_for_function("document.getElementById('scene-number').innerText === '1 of 40'")


def test_a_sign_is_written(page):
    page.locator("#kinds [data-name=sign]").click()
    page.locator("#colours [data-name=white]").click()
    page.click("#add")
    page.fill("#letters", "BAD")
    assert "three letters of" in says(page, "scene")
    page.fill("#letters", "fox")
    assert "three letters of" in says(page, "scene")   # O is none of the world's letters
    page.fill("#letters", "fkx")
    ask(page, "what does the white sign say ?")
    assert says(page) == "Truth: f k x" and cards(page)["all"]["answer"] == "f k x"
    page.click("#reset")


def test_a_scene_drawn_anew_gets_the_same_answers(page, site):
    """Moved to and fro: the picture is then the browser's own."""
    _, rows = shipped(site)
    right = []
    for i, row in enumerate(rows[:10]):
        go(page, i, row.questions[0].question)
        before = cards(page)["all"]["answer"]
        page.focus("#scene")
        page.keyboard.press("n")
        thing = row.scene.things[0]
        there, back = ("Right", "Left") if thing.box[0] < 72 else ("Left", "Right")
        page.keyboard.press(f"Arrow{there}")
        page.keyboard.press(f"Arrow{back}")
        right.append(cards(page)["all"]["answer"] == before)
    assert sum(right) >= 9


# ------------------------------------------------------------------------------------ bad input


def test_unknown_words_are_named(page):
    ask(page, "is there a pink Zebra ?")
    assert "cannot read “pink”, “zebra”" in says(page)
    assert all(card["answer"] == "" for card in page.evaluate(CARDS).values())
    page.wait_for_function("""[...document.querySelectorAll('.card')].every(card =>
                              card.getAttribute('aria-busy') === 'false')""")
    ask(page, "<image> wo ist der Kreis?")
    assert "“<”" in says(page) and "“ist”" in says(page)
    ask(page, "   ")
    assert "Ask something" in says(page)
    ask(page, "what " * 61)
    assert "at most 60" in says(page)
    ask(page, "what colour is the scene")
    assert says(page).startswith("No truth to compare with")
    assert cards(page)["all"]["answer"]


def test_an_empty_scene_and_forty_things_get_a_sentence(page):
    page.focus("#scene")
    for _ in range(3):
        page.keyboard.press("n")
        page.keyboard.press("Delete")
    assert "This scene is empty" in says(page, "scene")
    ask(page, "is there a red circle ?")
    assert says(page) == "Truth: no" and all(card["answer"] for card in cards(page).values())
    page.locator("#kinds [data-name=star]").click()
    for _ in range(42):
        page.click("#add")
    assert says(page, "scene").startswith("40 things, and no more fit")
    ask(page, "how many shapes are there ?")
    assert says(page) == "Truth: 40" and cards(page)["all"]["answer"]
    page.click("#reset")


def test_without_wasm_a_sentence_says_so(opened):
    page = opened(wait=False, script="delete window.WebAssembly")
    assert "no WebAssembly" in page.inner_text("#broken")
    assert page.trouble == []


def test_a_model_that_is_not_there_is_named(opened, site):
    model = site / "models/speak.onnx"
    model.rename(model.with_suffix(".away"))
    try:
        page = opened(wait=False)
        page.wait_for_selector("#broken:not([hidden])")
        assert "models/speak.onnx: 404" in page.inner_text("#broken")
    finally:
        model.with_suffix(".away").rename(model)


def test_a_scene_that_does_not_come_is_said(opened):
    page = opened()
    page.route("**/scenes/*.png", lambda route: route.abort())
    page.locator("#scenes button").nth(30).click()
    page.wait_for_function("document.getElementById('scene-says').innerText.includes('not work')")
    assert page.inner_text("#scene-number") == "1 of 40" and cards(page)


# ------------------------------------------------------------------------------------ how it looks


def test_nothing_jumps_while_answers_come(opened):
    page = opened(wait=False)
    places = """[...document.querySelectorAll('.panel, .card')].map(each => {
        const {x, y, width, height} = each.getBoundingClientRect();
        return [x, y + scrollY, width, height];
    })"""
    page.wait_for_function(LOADED)
    page.wait_for_function("document.querySelectorAll('#suggestions button').length > 0")
    before = page.evaluate(places)
    page.wait_for_function(SETTLED)
    assert page.evaluate(places) == before
    for i in (1, 2, 3):
        go(page, i)
        assert page.evaluate(places) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(opened, scheme):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    shade = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(shade)
    page.click("#theme")
    assert page.evaluate(shade) != before
    assert page.trouble == []


def test_links_lead_to_the_lines(page, address):
    links = page.evaluate("[...document.querySelectorAll('.note a')].map(a => [a.href, a.title])")
    assert len(links) == 11
    for href, title in links:
        text = page.request.get(href).text()
        line = text.split(f'id="{href.split("#")[1]}"')[1].split("\n")[0]
        assert title.split(", ")[1].split(".")[-1] in line


def test_the_keyboard_reaches_every_control(page):
    page.focus("#theme")
    seen = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"scene", "question", "add", "k", "mean", "play", "step"} <= seen


def test_the_picture_of_the_readme(page, tmp_path):
    page.locator("#suggestions button", has_text="what does").first.click()
    cards(page)
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    page.set_viewport_size({"width": 1440, "height": 900})
    assert picture.size == (1440, 1000)
    place = os.environ.get("PICTURE", tmp_path / "page.jpg")
    picture.save(place, quality=78, optimize=True)
    assert os.path.getsize(place) <= 200_000
