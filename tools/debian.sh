# Packages of the distribution (Debian, Ubuntu) for tests, which are skipped where these cannot be had. Sourced; says what it
# does, and starts nothing.

# begin WHAT SKIPPED COMMAND...: ends the script where the commands are there, or where they cannot be installed.
# WHAT is "Slurm is", SKIPPED "the tests on a Slurm cluster".
begin() {
    local what=$1 command missing=""
    skipped=$2
    shift 2
    for command; do command -v "$command" >/dev/null || missing=1; done
    [ -n "$missing" ] || exit 0
    [ "$(id -u)" = 0 ] || skip "$what not installed and this is not root"
    command -v apt-get >/dev/null || skip "$what not installed and there is no apt-get"
    export DEBIAN_FRONTEND=noninteractive
}

skip() {
    echo "set-up of tests: $1; $skipped are skipped" >&2
    exit 0
}

# install SECONDS PACKAGE...
install() {
    local seconds=$1
    shift
    echo "set-up of tests: installing $*" >&2
    get() { timeout "$seconds" apt-get install --yes --quiet --no-install-recommends "$@" >/dev/null 2>&1; }
    get "$@" || { timeout 120 apt-get update --quiet >/dev/null 2>&1 && get "$@"; } || skip "apt-get could not install $*"
}
