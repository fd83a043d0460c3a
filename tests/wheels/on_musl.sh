#!/bin/sh
# Proves the musllinux wheel in a container of Python on Alpine, with the project at /project: what
# `python -m tests.wheels prove wheel` does elsewhere.
set -eu
python -m venv /tmp/env
/tmp/env/bin/pip install --quiet --disable-pip-version-check --only-binary :all: \
    /project/dist/*-musllinux_1_2_"$(uname -m)".whl
cp /project/tests/wheels/started.py /tmp
cd /tmp
exec env -i PATH=/tmp/env/bin HOME=/tmp /tmp/env/bin/python -I started.py
