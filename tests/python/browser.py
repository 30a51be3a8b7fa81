"""A headless Chromium for the tests of pages: the system's browser and driver, nothing downloaded, nothing but the pages
opened. Exits with code 3 and a line on standard output where there is none."""

import json
import os
import shutil
import sys

# the driver and the pages are on this machine
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

try:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
except ImportError as error:
    print(f"ABSENT {error}")
    sys.exit(3)


def start(width, height, downloads=None, touch=False):
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        print("ABSENT chromium or chromedriver (tools/setup-browser.sh installs them)")
        sys.exit(3)
    options = Options()
    options.binary_location = browser
    # --no-sandbox: root may not use it; the pages are our own
    for flag in ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars", "no-first-run"]:
        options.add_argument(f"--{flag}")
    # nothing but this machine can be reached
    for flag in ["no-proxy-server", "disable-background-networking", "disable-component-update"]:
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost")
    options.add_argument(f"--window-size={width},{height}")
    if touch:
        metrics = {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    if downloads:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def requested(chrome):
    """Addresses of everything that the page asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "blob:", "chrome"))]


def complaints(chrome):
    """What stands in the console: errors of scripts, files that are missing."""
    return [entry["message"] for entry in chrome.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def contrast(chrome):
    """The lowest ratio of contrast (WCAG 2) between a visible text and the ground behind it, and that text."""
    return chrome.execute_script("""
      const parse = (color) => color.match(/[\\d.]+/g).map(Number);
      const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
          const color = parse(getComputedStyle(at).backgroundColor);
          if (color.length < 4 || color[3] > 0.99) return color;
        }
        return [255, 255, 255];
      };
      let worst = [99, ''];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        const text = walker.currentNode.textContent.trim();
        if (!text || !parent.checkVisibility() || parent.closest('script, style, svg, :disabled')) continue;
        const [a, b] = [luminance(parse(getComputedStyle(parent).color)), luminance(ground(parent))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < worst[0]) worst = [ratio, text];
      }
      return worst;
    """)
