# Sourced by run_train.sh and run_tests.sh: a virtual environment with what the given requirement files ask for.
# Uses the active one, else .venv (made where missing). Installed once: again only when a requirement file changed.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi

install() {
    local stamp="$VIRTUAL_ENV/.installed-$(echo "$*" | tr -c 'a-z\n' '-')"
    local wanted
    wanted=$(cat "$@" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        local file
        for file in "$@"; do python -m pip install --quiet -r "$file"; done
        echo "$wanted" >"$stamp"
    fi
}
