"""What a browser shows: the report as a file, and the page to play with. Needs the extra "browser" and a Chromium."""

import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.request import urlopen

import pytest

from himap_ref.commands.html_report import draw_report
from himap_ref.commands.options import EMBEDDED
from himap_ref.methods.schedules import parse_method

api = pytest.importorskip("playwright.sync_api")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
NASTY = "</script><script>document.title = 'x'</script><img src=http://127.0.0.1:9/x.png> \"What\" & 'color'?"


@pytest.fixture(scope="module")
def chromium():
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        except api.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """A page that must have reported no error and asked no other host for anything when the test is over."""
    tab, complaints, hosts = chromium.new_page(viewport={"width": 1400, "height": 1200}), [], set()
    tab.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: hosts.add(re.sub(r"(\w+:)(//[\w.]*)?.*", r"\1\2", request.url, flags=re.S)))
    yield tab
    tab.close()
    assert complaints == [] and hosts <= {"file://", "http://127.0.0.1", "data:", "about:"}


def kept(frame):
    """Places of the squares that are not dark."""
    squares = frame.locator("rect").evaluate_all("all => all.map(square => square.classList.contains('dropped'))")
    return [place for place, dropped in enumerate(squares) if not dropped]


@pytest.mark.parametrize("name", ["himap", "none", "vtw", "cls:20", "pool:6"])
def test_report(tab, tmp_path, shapes, scene_picture, name):
    """A slider that shows another layer's patches, a script that fails, markup in a question that becomes live."""
    method = parse_method(name, shapes)
    answer = shapes.generate(scene_picture, NASTY, method.stages, 3, reducer=method.reducer)
    vanilla = shapes.generate(scene_picture, NASTY, (), 3)
    (tmp_path / "report.html").write_text(
        draw_report(shapes, scene_picture, NASTY, answer, vanilla, method.reducer), encoding="utf-8"
    )
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.locator("#question").text_content() == NASTY and tab.title() == "HiMAP: which image tokens are left"
    assert tab.locator("#answer").text_content() == (answer.text or "(an empty answer)")
    stages = [(stage.layer, stage.kept.tolist()) for stage in answer.trace.stages]
    if name == "cls:20":
        stages = [(0, method.reducer.chosen(shapes, shapes.preprocess(scene_picture)).kept.tolist())]
    for layer in (0, 3, 4, 5, 8, 11):
        tab.locator("#layer").fill(str(layer))
        now = [places for start, places in stages if start <= layer]
        assert kept(tab) == (now[-1] if now else list(range(36 if name == "pool:6" else 144)))
        assert tab.locator("tr.current td").first.text_content() == str(layer)
    row = tab.locator("tr.current td").all_text_contents()
    assert row[2] == f"{answer.trace.layers[11].entered} of {vanilla.trace.layers[11].entered}"
    tab.locator("rect").nth(7).hover()
    assert tab.locator("#told").text_content().startswith("row 1, column 8" if name != "pool:6" else "row 2, column 2")
    if name == "himap":
        tab.get_by_label("scores on entry to layer 1:").check()
        assert tab.locator("rect.ranked").count() == 144 and tab.locator("rect.ranked.kept").count() == 72
        score = answer.trace.stages[0].scores[7].item()
        assert f"text_to_image {score:.4g}, number " in tab.locator("#told").text_content()


@pytest.fixture(scope="module")
def demo():
    """The page's address, as a user starts it, with a box for code."""
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "himap_ref.demo", "--allow-code", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    url, patience = f"http://127.0.0.1:{port}", time.monotonic() + 90
    while time.monotonic() < patience and server.poll() is None:
        with suppress(OSError):
            urlopen(url).close()
            break
        time.sleep(0.5)
    yield url
    server.terminate()
    server.wait()


def test_two_users(demo):
    """An answer, or patches, that somebody else asked for at the same moment."""
    client = pytest.importorskip("gradio_client")
    picture, asked = client.handle_file(str(EMBEDDED / "example.png")), [("What color is the star?", 2), ("Why?", 5)]
    jobs = [
        user.submit(
            picture, question, "the stages below", 4, "", k1, 0.5, "text_to_image", 8, 0.5, "no stage", api_name="/ask"
        )  # fmt: skip
        for _ in range(2)
        for user, (question, k1) in zip([client.Client(demo, verbose=False) for _ in asked], asked, strict=True)
    ]
    for job, (question, k1) in zip(jobs, asked * 2, strict=True):
        page = html.unescape(job.result(timeout=60))
        assert json.dumps(question) in page and f'"choices": [{{"layer": {k1},' in page


def test_demo(tab, demo, tmp_path):
    """A page that does not answer, passes a slider over, shows a trace in place of a message, or calls home."""
    tab.goto(demo)
    tab.get_by_role("button", name="Ask").click()
    report = tab.frame_locator("iframe")
    api.expect(report.locator("#answer")).to_have_text("yellow", timeout=30_000)
    stage, before = report.locator("tr.stage").first, kept(report)
    k1 = tab.get_by_label("number input for K1")
    k1.fill("2")
    k1.blur()
    api.expect(report.locator("tr.stage + tr td:first-child").first).to_have_text("2", timeout=30_000)
    report.locator("#layer").fill("2")
    assert kept(report) != before and len(kept(report)) == 72
    k1.fill("11")
    k1.blur()
    api.expect(tab.locator(".toast-body")).to_contain_text("stage layers [11, 11] must ascend", timeout=30_000)
    k1.fill("4")
    k1.blur()
    tab.get_by_label("criterion 1").click()
    tab.get_by_role("option", name="your own").click()
    api.expect(stage).to_contain_text("score", timeout=30_000)
    (tmp_path / "x.png").write_text("no picture")
    tab.get_by_label("Clear").or_(tab.get_by_label("Remove")).first.click()
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "x.png")
    tab.wait_for_timeout(1000)
    tab.get_by_role("button", name="Ask").click()
    api.expect(tab.locator(".toast-body").last).to_contain_text("the picture: cannot be read", timeout=30_000)
