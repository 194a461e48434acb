"""The report in a browser: charts, filters, sorting, CSV, one row's history; wide and narrow, light and dark."""

import io
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from torch_molere.__main__ import main
from torch_molere.report.page import MOST_ROWS, Run, write
from torch_molere.report.pictures import Pictures, texts_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("REQUIRE_CHROMIUM"), reason="no Chromium: apt install chromium"
)


def recorded(folder, rows=300, files=3, seed=0, shift=0.0):
    """A made run in the recorder's own format."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    wrong = np.arange(rows) < rows // 5
    with (folder / "metrics.jsonl").open("w") as lines:
        for number in range(files):
            target = np.arange(rows) % 3
            margin = np.where(wrong, random.beta(2, 6, rows), random.beta(8, 2, rows)) * 2 - 1
            table = {
                "row": np.arange(rows),
                "seen": np.full(rows, number + 1),
                "loss": 1 - margin,
                "running_loss": 1 - margin,
                "margin": margin,
                "running_margin": np.clip(margin + shift, -1, 1),
                "correct": (margin > 0).astype(float),
                "weight": np.where(wrong, 0.1, 1.2) + random.uniform(0, 0.1, rows),
                "held_out": np.zeros(rows),
                "sent": random.uniform(size=rows),
                "meta_gradient": np.where(wrong, 1.0, -0.1) + random.uniform(0, 0.1, rows),
                "meta_seen": np.full(rows, 20),
                "target": target,
                "prediction": np.where(margin > 0, target, (target + 1) % 3),
            }
            pq.write_table(pa.table(table), folder / f"rows-{10 * number + 10:010d}.parquet")
            numbers = {
                "step": 10 * number + 10,
                "validation/loss": 1.0 + number,
                "weights/effective": 0.9,
                "accuracy": 0.5,
            }
            lines.write(json.dumps(numbers) + "\n")
    return Run(folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    images = np.random.default_rng(0).integers(0, 255, (300, 8, 8, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    recorded(folder / "run")
    recorded(folder / "before", seed=1, shift=-0.2)
    out = folder / "report.html"
    arguments = ["report", str(folder / "run"), "-o", str(out), "--images", str(folder / "images.npy")]
    assert main([*arguments, "--classes", "cat,dog,</script>", "--baseline", str(folder / "before")]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "REQUIRE_CHROMIUM is set, but there is no Chromium: apt install chromium"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser, path, width=1280, scheme="light"):
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
    tab.context.set_offline(True)
    tab.problems = []
    tab.on(
        "console", lambda message: tab.problems.append(message.text) if message.type in ("error", "warning") else None
    )
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-drawn=yes]", state="attached", timeout=20_000)
    return tab


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_and_fits(browser, page, width, scheme):
    tab = opened(browser, page, width, scheme)
    assert tab.problems == []
    charts = tab.locator(".charts svg")
    assert charts.count() == tab.locator(".charts figure").count() == 6
    assert all(charts.nth(number).locator("path").count() > 3 for number in range(6))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != background
    assert tab.locator(".card img").evaluate_all("all => all.every(image => image.naturalWidth > 0)")
    tab.close()


@needs_browser
def test_the_table_filters_sorts_and_is_downloaded(browser, page):
    tab = opened(browser, page)
    table = Run(page.parent / "run").rows()
    tab.select_option("#class", "1")
    tab.select_option("#only", "down")
    expected = table[(table["target"] == 1) & (table["weight"] < 0.5)]
    assert tab.inner_text("#count") == f"{len(expected)} of 300 rows"
    tab.click("#rows th:has-text('margin') >> nth=0")
    first = tab.inner_text("#rows tbody tr:first-child td:first-child")
    assert int(first) == expected["running_margin"].idxmin()
    tab.click("#rows th:has-text('margin') >> nth=0")
    assert int(tab.inner_text("#rows tbody tr:first-child td:first-child")) == expected["running_margin"].idxmax()
    with tab.expect_download() as download:
        tab.click("#csv")
    saved = pd.read_csv(download.value.path())
    assert sorted(saved["row"]) == sorted(expected.index) and set(saved["label"]) == {"dog"}
    np.testing.assert_allclose(saved.set_index("row")["weight"], expected.loc[saved["row"], "weight"], rtol=1e-6)
    tab.select_option("#only", "")
    tab.select_option("#class", "")
    assert tab.inner_text("#place") == "page 1 of 12"
    tab.click("#next")
    assert tab.inner_text("#place") == "page 2 of 12" and tab.locator("#rows tbody tr").count() == 25
    tab.close()


@needs_browser
def test_a_row_has_a_history(browser, page):
    tab = opened(browser, page)
    tab.click(".card >> nth=0")
    row = tab.get_attribute(".card >> nth=0", "data-row")
    tab.wait_for_selector("#history svg")
    assert tab.inner_text("#history h3").startswith(f"Row {row}:")
    assert tab.locator("#history .mark-symbol path").count() >= 6  # three files, margin and weight
    assert tab.problems == []
    tab.close()


def test_what_the_page_says_is_what_was_recorded(page):
    text = page.read_text()
    table = Run(page.parent / "run").rows()
    assert f"{100 * (table['weight'] < 0.5).mean():.1f} %" in text
    for label, name in enumerate(("cat", "dog", "&lt;/script&gt;")):
        own = table[table["target"] == label]
        share = own["sent"].sum() / table["sent"].sum()
        assert (
            f"<td>{name}</td><td>{len(own)}</td><td>{100 * (own['target'] == own['prediction']).mean():.1f} %</td>"
            in text
        )
        assert f"<td>{own['weight'].mean():.2f}</td><td>{100 * share:.1f} %</td>" in text
    # Nothing is loaded from elsewhere.
    assert not re.search(r"""(?:src|href)=["']?https?:""", text)


def test_of_many_rows_the_hardest_are_shown(tmp_path):
    run = recorded(tmp_path / "run", rows=MOST_ROWS + 500, files=1)
    path = write(run, tmp_path / "page.html")
    data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S).group(1))
    assert data["rows"] == MOST_ROWS and path.stat().st_size < 8 * 2**20


def test_pictures_of_every_layout(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (20, 10), colour) for colour in colours]
    for name, image in zip(("b/1.png", "a/2.png", "b/0.png"), images, strict=True):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "folder" / name)
    packed = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        packed.append({"bytes": file.getvalue(), "path": None})
    about = {"info": {"features": {"label": {"names": ["x", "y"]}}}}
    table = pa.table({"image": packed, "label": [0, 1, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "data.parquet")
    np.save(tmp_path / "channels.npy", np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / 255.0)

    def seen(source):
        import base64

        pictures = Pictures(tmp_path / source)
        found = []
        for row in range(3):
            content = base64.b64decode(pictures(row).partition(",")[2])
            image = Image.open(io.BytesIO(content)).convert("RGB")
            assert image.size == (72, 36)
            found.append(int(np.argmax(image.getpixel((5, 5)))))
        assert pictures(99) == ""
        return found, pictures.classes

    assert seen("folder") == ([1, 2, 0], ["a", "b"])
    assert seen("data.parquet") == ([0, 1, 2], ["x", "y"])
    assert seen("channels.npy") == ([0, 1, 2], [])


def test_texts(tmp_path):
    pd.DataFrame({"text": ["one", "two"]}).to_csv(tmp_path / "t.csv", index=False)
    text = texts_of(f"{tmp_path / 't.csv'}:text")
    assert (text(1), text(5)) == ("two", "")
    with pytest.raises(ValueError, match="no column 'body'; it has text"):
        texts_of(f"{tmp_path / 't.csv'}:body")
    with pytest.raises(ValueError, match="FILE:COLUMN"):
        texts_of("text")


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
