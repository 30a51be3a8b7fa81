"""Looks at a report in a headless Chromium, as a person would.

    read_report.py REPORT_HTML FOLDER

Writes to FOLDER/seen.json: the values that the first chart shows under the pointer and with the arrow keys, and what the
page asked for."""

import json
import pathlib
import sys

import browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

report, folder = map(pathlib.Path, sys.argv[1:])
seen = {}
for name, width, height, touch in [("desk", 1280, 800, False), ("phone", 390, 844, True)]:
    chrome = browser.start(width, height, touch=touch)
    chrome.get(report.as_uri())
    for summary in chrome.find_elements(By.CSS_SELECTOR, "summary"):
        chrome.execute_script("arguments[0].parentElement.open = true", summary)
    fits = chrome.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert fits, f"{name}: the page does not fit the width of the screen"
    ratio, text = browser.contrast(chrome)
    assert ratio >= 4.5, f"{name}: {text!r} has a contrast of {ratio:.2f}"
    # pictures are loaded when they are near the screen: all of them, then
    for image in chrome.find_elements(By.TAG_NAME, "img"):
        chrome.execute_script("arguments[0].loading = 'eager'", image)
    broken = chrome.execute_async_script("""
      const done = arguments[0];
      Promise.all([...document.images].map((i) => i.decode().then(() => 0, () => 1))).then((all) =>
        done(all.reduce((a, b) => a + b, 0)))""")
    assert broken == 0, f"{name}: {broken} pictures are broken"
    nameless = chrome.execute_script("return [...document.querySelectorAll('img, svg[role=img]')].filter((e) => "
                                     "!(e.alt || e.getAttribute('aria-label'))).length")
    assert nameless == 0, f"{name}: {nameless} pictures have no words"
    if not touch:
        chart = chrome.find_element(By.CSS_SELECTOR, "#rewards svg[data-chart]")
        chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
        box = chrome.find_element(By.ID, "values")
        # the axis goes from 0 to 3 iterations: this is nearest to 2
        ActionChains(chrome).move_to_element_with_offset(chart, 60, 0).perform()
        seen["pointer"] = box.text
        ActionChains(chrome).move_by_offset(0, -250).perform()
        seen["away"] = box.is_displayed()
        chart.send_keys(Keys.HOME)
        seen["home"] = box.text
        chart.send_keys(Keys.ARROW_RIGHT)
        seen["right"] = box.text
    seen[name] = {
        "requested": browser.requested(chrome),
        "complaints": browser.complaints(chrome),
        "images": len(chrome.find_elements(By.TAG_NAME, "img")),
        "charts": len(chrome.find_elements(By.CSS_SELECTOR, "svg[data-chart]")),
    }
    chrome.quit()
(folder / "seen.json").write_text(json.dumps(seen))
