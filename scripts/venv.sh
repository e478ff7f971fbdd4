# make_venv DIRECTORY REQUIREMENT: a virtual environment with the project installed in place, at the versions of constraints.txt.
make_venv() {
    local venv=$1 requirement=$2 python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "sllmdask needs Python >= 3.11, and '$python' is not. Set PYTHON to one, for example PYTHON=python3.11 $0" >&2
        exit 2
    fi
    local stamp="$venv/.installed" wanted
    wanted=$(cat setup.cfg constraints.txt scripts/venv.sh | cksum)-$requirement
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "== installing into $venv (the first time takes a few minutes)"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
    # torch first and alone: by its exact version, an index that has a CPU build of it supplies that one.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$requirement"
    echo "$wanted" > "$stamp"
}
