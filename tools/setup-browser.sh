#!/usr/bin/env bash
# Installs Chromium and its driver from the distribution (Debian), for the tests that use the pages of `human-eval` and
# `report` as a person would. Needs root; elsewhere, and where the packages cannot be had, it says so and those tests are
# skipped. Starts nothing.
set -uo pipefail
. "$(dirname "$0")/debian.sh"

begin "Chromium and chromedriver are" "the tests in a browser" chromium chromedriver
install 400 chromium chromium-driver fonts-dejavu-core
