"""The page in a real browser: chromium without a window, driven by playwright."""

import io
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from app.conftest import PICTURES, SHAPES
from PIL import Image

from perfusion_pytorch import read_picture_facts

pytest.importorskip("gradio", reason="needs gradio: pip install gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 240  # for anything; other tests may run beside

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: {', '.join(NAMES)}"),
]
expect = playwright.expect
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module")
def browser(served):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served):
    """Return a function that opens the page in a window with a session of its own."""
    contexts = []

    def open_it(**options):
        contexts.append(browser.new_context(viewport={"width": 1240, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.hosts = set()
        page.on(
            "request",
            lambda request: page.hosts.add(re.sub(r"^(blob|data):.*|^\w+://([^/]+).*", r"\1\2", request.url)),
        )
        page.goto(served[1])
        page.locator("#picture img").wait_for()
        return page

    yield open_it
    for context in contexts:
        context.close()


def source(page, name="picture"):
    return page.locator(f"#{name} img").get_attribute("src")


def picture(page, name="picture"):
    """Return the pixels of a picture that is shown, and what it says it was made with."""
    data = page.request.get(source(page, name)).body()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), data


def changed(page, before, name="picture"):
    """Wait until another picture is shown."""
    expect(page.locator(f"#{name} img")).not_to_have_attribute("src", before)


def write_prompt(page, text):
    page.locator("#prompt textarea").fill(text)
    page.locator("#go").click()


def move(page, name, share):
    """Drag a slider to a share of its width."""
    box = page.locator(f"#{name} input[type=range]").bounding_box()
    y = box["y"] + box["height"] / 2
    handle = float(page.locator(f"#{name} input[type=number]").input_value()) / 1.5
    page.mouse.move(box["x"] + handle * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], y, steps=4)
    page.mouse.up()


def test_it_opens_on_a_picture_beside_the_base_models_and_asks_no_other_host(open_page, served):
    page = open_page()
    expect(page.locator("#words .word")).to_have_text(
        [r"a0.01", re.compile("<car-1>(0.9|1.0)"), *[re.compile(".")] * 4]
    )
    expect(page.locator("#words .word.open")).to_have_count(1)
    expect(page.locator("#base-caption")).to_contain_text("a car on a green background")
    (with_concept, _), (base, _) = picture(page), picture(page, "base")
    assert with_concept.shape == base.shape == (64, 64, 3) and (with_concept != base).any()
    assert {host for host in page.hosts if host not in ("blob", "data", "")} == {
        served[1].removeprefix("http://")
    }


def test_a_moved_beta_gives_another_picture_which_says_its_gate(open_page, tmp_path):
    page = open_page()
    before, of_base = source(page), source(page, "base")
    move(page, "beta-0", 1.0)
    changed(page, before)
    expect(page.locator("#words .word.open")).to_have_count(0)  # shut
    assert source(page, "base") == of_base
    (tmp_path / "shown.png").write_bytes(picture(page)[1])
    facts = read_picture_facts(tmp_path / "shown.png")
    assert facts["concepts"][0]["beta"] == 1.5 and facts["prompt"] == "a <car-1> on a green background"


def test_a_token_that_is_not_chosen_is_told_and_a_click_on_an_offered_one_helps(open_page):
    page = open_page()
    write_prompt(page, "a <dog-7> & <b>bold</b>")
    message = "<dog-7> must be one of the chosen concepts, <car-1>. Choose its file, or write another word."
    expect(page.locator("#notes .note.wrong")).to_have_text(message)
    expect(page.locator("#picture img")).to_have_count(0)
    page.locator("#prompt textarea").fill("a red")
    page.locator("#token-0").click()
    expect(page.locator("#prompt textarea")).to_have_value("a red <car-1>")
    page.locator("#go").click()
    page.locator("#picture img").wait_for()
    expect(page.locator("#notes .note")).to_have_count(0)


def test_two_concepts_have_a_gate_each(open_page):
    page = open_page()
    page.get_by_label("<house-1>").check()
    expect(page.locator("#token-1")).to_have_text("<house-1>")
    before = source(page)
    write_prompt(page, "a <car-1> left of a <house-1>")
    changed(page, before)
    expect(page.locator("#words .word.open")).to_have_count(2)
    expect(page.locator("#base-caption")).to_contain_text("a car left of a house")


def test_a_grid_over_beta(open_page):
    page = open_page()
    page.get_by_text("Grid over β").click()
    page.locator("#betas textarea, #betas input").fill("0.3 much")
    page.locator("#lay-out").click()
    expect(page.locator("#notes .note.wrong")).to_contain_text("β must be numbers")
    page.locator("#betas textarea, #betas input").fill("0.3 1.2")
    page.locator("#lay-out").click()
    page.locator("#grid img").wait_for()
    assert picture(page, "grid")[0].shape[1] > 3 * 160  # the base model and two values


def test_an_uploaded_concept_is_this_tabs_own_and_a_damaged_one_is_refused(open_page, tmp_path, served):
    page, other = open_page(), open_page()
    good, bad = tmp_path / "mine.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes((SHAPES / "concepts" / "house.safetensors").read_bytes())
    bad.write_bytes(good.read_bytes()[:-3])
    page.get_by_text("Add concept files").click()
    page.locator("#concept-file input[type=file]").set_input_files(bad)
    expect(page.locator("#notes .note.wrong")).to_contain_text(
        "bad.safetensors cannot be used as a concept file"
    )
    assert str(served[2]) not in page.locator("#notes").inner_text()
    page.reload()
    page.locator("#picture img").wait_for()
    page.get_by_text("Add concept files").click()
    page.locator("#concept-file input[type=file]").set_input_files(good)
    expect(page.locator("#concepts")).to_contain_text("<house-1> uploaded mine.safetensors")
    expect(page.locator("#token-1")).to_have_text("<house-1>")
    other.reload()
    other.locator("#picture img").wait_for()
    expect(other.locator("#concepts")).not_to_contain_text("uploaded")


def test_two_tabs_do_not_mix(open_page):
    first, second = open_page(), open_page()
    before = source(first)
    second.get_by_label("<car-1>").uncheck()
    second.get_by_label("<house-1>").check()
    expect(second.locator("#token-0")).to_have_text("<house-1>")
    second.locator("#prompt textarea").fill("a <house-1> on a white background")
    first.locator("#prompt textarea").fill("a <car-1> on a white background")
    second.locator("#go").click()
    first.locator("#go").click()
    changed(first, before)
    expect(first.locator("#words")).to_contain_text("r to <car-1>")
    expect(second.locator("#words")).to_contain_text("r to <house-1>")
    expect(second.locator("#base-caption")).to_contain_text("a house on a white background")
    expect(first.locator("#base-caption")).to_contain_text("a car on a white background")
    expect(first.locator("#token-0")).to_have_text("<car-1>")
    alone = open_page()
    shown = source(alone)
    write_prompt(alone, "a <car-1> on a white background")
    changed(alone, shown)
    expect(alone.locator("#base-caption")).to_contain_text("a car on a white background")
    assert np.array_equal(picture(alone)[0], picture(first)[0])


def fill_in_training(page, token):
    page.get_by_role("tab", name="Train").click()
    page.locator("#pictures input[type=file]").set_input_files(sorted(PICTURES.glob("*.png")))
    page.locator("#sheet img").wait_for()
    without_masks = source(page, "sheet")
    page.locator("#masks input[type=file]").set_input_files(sorted((PICTURES / "masks").glob("*.png")))
    changed(page, without_masks, "sheet")
    page.locator("#token textarea, #token input").fill(token)
    page.locator("#superclass textarea, #superclass input").fill("car")
    page.locator("#watch textarea, #watch input").fill(f"a {token}")
    page.locator("#train-steps input").fill("10")
    page.locator("#train-go").click()


def test_what_cannot_be_trained_is_told_before_a_process_starts(open_page, served):
    page = open_page()
    fill_in_training(page, "<My-Car>")
    expect(page.locator("#train-notes .note.wrong")).to_contain_text("`token` must be one lower-case word")
    page.locator("#token textarea, #token input").fill("car")
    page.locator("#train-go").click()
    expect(page.locator("#train-notes .note.wrong")).to_contain_text(
        "validation prompt must hold the token car"
    )
    page.locator("#watch textarea, #watch input").fill("a car")
    page.locator("#train-go").click()
    expect(page.locator("#train-notes .note.wrong")).to_contain_text("`token` must be new to the tokenizer")
    assert served[0].runs.names() == []


def test_ten_steps_are_trained_stopped_crashed_and_resumed_and_then_used(open_page, served, tmp_path):
    page, runs = open_page(), served[0].runs
    fill_in_training(page, "<mine-1>")
    status = page.locator("#status")
    expect(status).to_contain_text(re.compile(r"mine-1-run1: running, step [1-9] of 10"))
    page.locator("#stop").click()
    expect(status).to_contain_text(re.compile(r"stopped, step \d of 10.*Stopped with a checkpoint", re.S))
    expect(page.locator("#loss svg, #loss canvas").first).to_be_visible()
    assert list((runs.folder / "mine-1-run1").glob("checkpoint-*"))

    page.locator("#resume").click()
    expect(status).to_contain_text("running, step")
    os.kill(runs._processes["mine-1-run1"].pid, signal.SIGKILL)
    expect(status).to_contain_text("The run ended by signal 9 with a checkpoint after step")
    page.get_by_role("tab", name="Generate").click()  # the page is alive
    before = source(page)
    write_prompt(page, "a <car-1> on a teal background")
    changed(page, before)

    page.get_by_role("tab", name="Train").click()
    page.locator("#resume").click()
    expect(status).to_contain_text("finished, step 10 of 10")
    expect(page.locator("#validation img")).to_be_visible()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "mine-1-run1.safetensors"
    concept = runs.folder / "mine-1-run1" / "concept.safetensors"
    download.value.save_as(tmp_path / "got.safetensors")
    assert (tmp_path / "got.safetensors").read_bytes() == concept.read_bytes()
    page.locator("#use").click()
    expect(page.locator("#words")).to_contain_text("r to <mine-1>")
    expect(page.locator("#prompt textarea")).to_have_value("a <mine-1> on a green background")
    expect(page.locator("#concepts")).to_contain_text("<mine-1> trained in mine-1-run1")


def evaluate(page, **filled):
    """Open the tab and evaluate the car with few prompts."""
    page.get_by_role("tab", name="Evaluate").click()
    expect(page.locator("#known-pictures")).to_contain_text("the 5 pictures that <car-1> was trained on")
    expect(page.locator("#judges").get_by_label("the small world's own checker")).to_be_checked()
    page.locator("#evaluated-prompts").get_by_text("your own").click()
    lines = ["a {} on a green background", "a large {} on a pink background", "a {} on a white background"]
    page.locator("#own-prompts textarea").fill("\n".join([*lines, "a rose on a white background"]))
    page.locator("#evaluated-betas textarea, #evaluated-betas input").fill(filled.get("betas", "0.3 1.2"))
    page.locator("#evaluated-images input").fill("2")
    page.get_by_text("Steps, guidance, seed").click()
    page.locator("#evaluated-steps input").fill("6")
    page.locator("#evaluate-go").click()


def test_what_cannot_be_evaluated_is_told_before_a_process_starts(open_page, served):
    page, runs = open_page(), served[0].runs
    before = runs.names()
    evaluate(page, betas="much")
    expect(page.locator("#evaluate-notes .note.wrong")).to_contain_text("β must be numbers")
    page.locator("#evaluated").get_by_label("<car-1>").first.uncheck()
    expect(page.locator("#known-pictures")).to_contain_text("does not know them: add them")
    page.locator("#evaluated-betas textarea, #evaluated-betas input").fill("0.5")
    page.locator("#evaluate-go").click()
    expect(page.locator("#evaluate-notes .note.wrong")).to_contain_text("number of files must be from 1 to 8")
    assert runs.names() == before


def test_a_concept_is_evaluated_stopped_crashed_and_resumed_and_used_at_its_beta(open_page, served, tmp_path):
    page, runs = open_page(), served[0].runs
    evaluate(page)
    status, name = page.locator("#evaluation-status"), "car-1-evaluation1"
    # Of the base model 7 pictures; of each β 6 of the car, 3 plain ones and an unrelated one.
    expect(status).to_contain_text(re.compile(rf"{name}: running, [1-9]\d? of 27 pictures"))
    page.locator("#evaluation-stop").click()
    expect(status).to_contain_text(re.compile(r"stopped, \d+ of 27.*Stopped with \d+ pictures? made", re.S))
    expect(page.locator("#evaluation-table table")).to_have_count(0)

    page.locator("#evaluation-resume").click()
    expect(status).to_contain_text(re.compile("running.*Making the pictures", re.S))
    os.kill(runs._processes[name].pid, signal.SIGKILL)
    expect(status).to_contain_text(re.compile(r"failed.*The run ended by signal 9 with \d+ pictures", re.S))
    page.get_by_role("tab", name="Generate").click()  # the page is alive
    before = source(page)
    write_prompt(page, "a <car-1> on a purple background")
    changed(page, before)

    page.get_by_role("tab", name="Evaluate").click()
    page.locator("#evaluation-resume").click()
    expect(status).to_contain_text("finished, 27 of 27 pictures")
    expect(page.locator("#evaluation-table tbody tr")).to_have_count(4)
    expect(page.locator("#evaluation-table tr.chosen")).to_have_count(1)
    assert picture(page, "evaluation-plot")[0].shape == (750, 1050, 3)
    assert picture(page, "evaluation-grid")[0].shape[1] > 3 * 64
    expect(page.locator("#evaluation-write")).to_be_hidden()  # the file is not of this page's training
    with page.expect_download() as download:
        page.locator("#evaluation-download").click()
    assert download.value.suggested_filename == f"{name}.json"
    download.value.save_as(tmp_path / "got.json")
    beta = json.loads((tmp_path / "got.json").read_text())["recommended"]
    assert beta in (0.3, 1.2)

    other = open_page()  # another tab sees the run, and nothing of what was chosen here
    other.get_by_role("tab", name="Evaluate").click()
    expect(other.locator("#evaluation-table table")).to_have_count(0)
    expect(other.locator("#evaluated-betas textarea, #evaluated-betas input")).to_have_value(
        "0.3 0.5 0.7 0.9"
    )

    before = source(page)
    page.locator("#evaluation-use").click()
    expect(page.locator("#beta-0 input[type=number]")).to_have_value(str(beta))
    changed(page, before)
    expect(page.locator("#prompt textarea")).to_have_value("a <car-1> on a green background")
    (tmp_path / "shown.png").write_bytes(picture(page)[1])
    assert read_picture_facts(tmp_path / "shown.png")["concepts"][0]["beta"] == beta
