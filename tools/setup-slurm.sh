#!/usr/bin/env bash
# Installs Slurm and munge from the distribution (Debian, Ubuntu), for the tests that bring up a cluster of their own on
# this machine. Needs root; elsewhere, and where the packages cannot be had, it says so and those tests are skipped.
# Starts nothing.
set -uo pipefail
. "$(dirname "$0")/debian.sh"

begin "Slurm is" "the tests on a Slurm cluster" slurmctld munged
# services would come up by themselves; the tests start their own
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
install 300 slurm-wlm munge
