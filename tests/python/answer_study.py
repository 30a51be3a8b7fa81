"""Answers a whole human evaluation in a headless Chromium, as a rater would.

    answer_study.py INDEX_URL STUDY_JSON RATER keys|pointer DOWNLOADS [NUMBER]

NUMBER is the rater's where queries are shared out; the page then proposes it as his name.

By a rule that the test knows: alignment and diversity go to the second model, whatever side it is on; of fidelity it is not
sure, the first query's pictures are said not to have loaded there; preference always goes to the left. It reloads the page in the middle of a query, exports, and writes what it
saw to DOWNLOADS/seen.json."""

import json
import pathlib
import sys
import time

import browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

url, study_path, rater, mode, downloads, *number = sys.argv[1:]
downloads = pathlib.Path(downloads)
study = json.loads(pathlib.Path(study_path).read_text())
queries = {query["id"]: query for query in study["queries"]}
# of this rater only, mirrored ones turned around
own = study["assignments"][int(number[0]) - 1]["queries"] if number else None
if own:
    sides = lambda q, mirrored: {**q, "left": q["right"], "right": q["left"]} if mirrored else q
    queries = {asked["query"]: sides(queries[asked["query"]], asked.get("mirrored")) for asked in own}
touch = mode == "pointer"
chrome = browser.start(*((390, 844) if touch else (1280, 800)), downloads, touch)
find = lambda selector: chrome.find_element(By.CSS_SELECTOR, selector)


def wait_for(what, condition):
    for _ in range(200):
        if value := condition():
            return value
        time.sleep(0.05)
    raise SystemExit(f"waited in vain for {what}")


def check(what, holds):
    if not holds:
        chrome.save_screenshot(str(downloads / "failed.png"))
        raise SystemExit(f"{what}: no")


def wanted(query, question):
    side = "left" if query["left"] == 1 else "right"
    return {"alignment": side, "diversity": side, "fidelity": "did_not_load" if query["id"] == "pair-0001" else "not_sure", "preference": "left"}[question]


def questions():
    return [box.get_attribute("id").removeprefix("question-") for box in chrome.find_elements(By.CSS_SELECTOR, "fieldset")]


def answer(query, question):
    number = ["left", "right", "not_sure", "did_not_load"].index(wanted(query, question))
    if mode == "keys":
        chrome.switch_to.active_element.send_keys(str(number + 1))
    else:
        label = find(f"#question-{question} label:nth-child({number + 1})")
        chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", label)
        label.click()


def chosen():
    boxes = chrome.find_elements(By.CSS_SELECTOR, "fieldset input:checked")
    return {box.get_attribute("name"): box.get_attribute("value") for box in boxes}


def now():
    return queries[find("#query").get_attribute("data-query")]


def go_on():
    if mode == "keys":
        chrome.switch_to.active_element.send_keys(Keys.ENTER)
    else:
        button = find("#next")
        chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()


def look():
    """What must hold on every view."""
    fits = chrome.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    check("the page fits the width of the screen", fits)
    ratio, text = browser.contrast(chrome)
    check(f"{text!r} is readable (contrast {ratio:.2f}, 4.5 asked)", ratio >= 4.5)
    nameless = chrome.execute_script("""
      return [...document.querySelectorAll('input, textarea, button, img')].filter((e) => e.checkVisibility()).filter((e) =>
        !(e.alt || e.labels?.length || e.ariaLabel || e.textContent.trim() || e.querySelector('img[alt]'))).length""")
    check("everything has a name for a screen reader", nameless == 0)
    check("nothing warns", not find("#warning").is_displayed())


chrome.get(url)
look()
check("the guidelines are there", "word by word" in find("#start-guidelines").text)
drawn = """return [...document.querySelectorAll('#start-guidelines img')].map((i) => i.complete && i.naturalWidth > 0)"""
wait_for("the pictures of the guidelines", lambda: all(chrome.execute_script(drawn)))
check("there are pictures in the guidelines", len(chrome.execute_script(drawn)) >= 10)
if number:
    check("the number is proposed", find("#rater").get_attribute("value") == number[0])
    find("#rater").clear()
if mode == "keys":
    find("#rater").send_keys(rater, Keys.ENTER)
else:
    find("#rater").send_keys(rater)
    find("#start-form button").click()

order = []
reloaded = False
while find("#query").is_displayed():
    query = now()
    order.append(query["id"])
    look()
    loaded = "return [...document.images].filter((i) => i.checkVisibility()).every((i) => i.complete && i.naturalWidth > 0)"
    wait_for("the pictures", lambda: chrome.execute_script(loaded))
    asked = questions()
    check("it cannot be left unanswered", not find("#next").is_enabled())
    for place, question in enumerate(asked):
        answer(query, question)
        if len(order) == 2 and place == 0 and not reloaded:
            reloaded = True
            chrome.refresh()
            check("after a reload it is the same query", now()["id"] == query["id"])
            check("with the same answer", chosen() == {question: wanted(query, question)})
    check("all is answered", chosen() == {question: wanted(query, question) for question in asked})
    if len(order) == 2:
        # back and forth loses nothing
        if mode == "keys":
            chrome.switch_to.active_element.send_keys(Keys.BACKSPACE)
        else:
            find("#back").click()
        check("back is the query before", now()["id"] == order[0] and len(chosen()) == len(questions()))
        chrome.execute_script("document.activeElement.blur()")
        go_on()
        check("and forth this one", now()["id"] == query["id"])
        chrome.execute_script("document.activeElement.blur()")
    if len(order) == 1:
        find(".picture").click()
        check("a picture can be enlarged", find("#zoom").is_displayed())
        find("#zoom").find_element(By.CSS_SELECTOR, "button").click()
        chrome.execute_script("document.activeElement.blur()")
    go_on()

check("every query came once", sorted(order) == sorted(queries))
check("a rater's own queries come in their order", not own or order == [asked["query"] for asked in own])
look()
check("the end is said", "All queries are answered" in find("#finish-heading").text)
check("progress is full", find("#progress-text").text == f"{len(order)} of {len(order)} answered")
find("#export").click()
votes = wait_for("the exported file", lambda: [p for p in downloads.glob("votes-*.json") if p.stat().st_size > 0])
text = chrome.execute_script("return document.getElementById('export-text').value")
same = lambda text: {k: v for k, v in json.loads(text).items() if k != "exported"}
check("the text to copy is the file", same(text) == same(votes[0].read_text()))
chrome.refresh()
check("after a reload it is still the end", find("#finish").is_displayed())
seen = {"order": order, "requested": browser.requested(chrome), "complaints": browser.complaints(chrome)}

# another person starts anew
find("#restart").click()
find("#confirm-yes").click()
wait_for("the start", lambda: find("#start").is_displayed())
# where the browser keeps nothing, the page says so and works
refused = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('refused'); } })"
chrome.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refused})
chrome.refresh()
find("#rater").send_keys(rater)
find("#start-form button").click()
check("the loss is announced", "does not keep your answers" in find("#warning").text)
find("body").send_keys("1")
find("#pause").click()
text = json.loads(chrome.execute_script("return document.getElementById('export-text').value"))
check("there is an answer to export", len(text["answers"]) == 1 and text["answers"][0]["answer"] == "left")
(downloads / "seen.json").write_text(json.dumps(seen))
chrome.quit()
