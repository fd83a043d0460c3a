#!/bin/sh
# Proves the musllinux wheel in a container of Python on Alpine, with the project at /project: what
# `python -m tests.wheels prove wheel` does elsewhere. Of all that Synapse needs, zope-interface alone has no wheel for
# musl. Without a compiler it becomes pure Python.
set -eu
python -m venv /tmp/env
/tmp/env/bin/pip install --quiet --disable-pip-version-check --only-binary :all: --no-binary zope-interface \
    /project/dist/*-musllinux_1_2_"$(uname -m)".whl
cp /project/tests/wheels/started.py /tmp
cd /tmp
exec env -i PATH=/tmp/env/bin HOME=/tmp /tmp/env/bin/python -I started.py
