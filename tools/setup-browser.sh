#!/usr/bin/env bash
# Installs Chromium and its driver from the distribution (Debian), for the tests that use the pages of `human-eval` and
# `report` as a person would. Needs root; elsewhere, and where the packages cannot be had, it says so and those tests are
# skipped. Starts nothing.
set -uo pipefail

command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
skip() {
    echo "set-up of tests: $1; the tests in a browser are skipped" >&2
    exit 0
}
[ "$(id -u)" = 0 ] || skip "Chromium and chromedriver are not installed and this is not root"
command -v apt-get >/dev/null || skip "Chromium and chromedriver are not installed and there is no apt-get"
echo "set-up of tests: installing chromium and chromium-driver" >&2
export DEBIAN_FRONTEND=noninteractive
packages=(chromium chromium-driver fonts-dejavu-core)
install() { timeout 400 apt-get install --yes --quiet --no-install-recommends "${packages[@]}" >/dev/null 2>&1; }
install || { timeout 120 apt-get update --quiet >/dev/null 2>&1 && install; } || skip "apt-get could not install ${packages[*]}"
