#!/usr/bin/env bash
# Installs Slurm and munge from the distribution (Debian, Ubuntu), for the tests that bring up a cluster of their own on
# this machine. Needs root; elsewhere, and where the packages cannot be had, it says so and those tests are skipped.
# Starts nothing.
set -uo pipefail

command -v slurmctld >/dev/null && command -v munged >/dev/null && exit 0
skip() {
    echo "set-up of tests: $1; the tests on a Slurm cluster are skipped" >&2
    exit 0
}
[ "$(id -u)" = 0 ] || skip "Slurm is not installed and this is not root"
command -v apt-get >/dev/null || skip "Slurm is not installed and there is no apt-get"
echo "set-up of tests: installing slurm-wlm and munge" >&2
export DEBIAN_FRONTEND=noninteractive
# services would come up by themselves; the tests start their own
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
install() { timeout 300 apt-get install --yes --quiet --no-install-recommends slurm-wlm munge >/dev/null 2>&1; }
install || { timeout 120 apt-get update --quiet >/dev/null 2>&1 && install; } || skip "apt-get could not install slurm-wlm and munge"
