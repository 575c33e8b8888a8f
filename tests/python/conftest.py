"""conftest - where the binding is, and the models that the tests share.

The tests use the checkout's binding and library (build/release, or QVL_LIBRARY), Python 3.9 or newer, numpy and pytest.
"""
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bindings" / "python"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import qvl  # noqa: E402
import support  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: too long for every CI run under emulation")


@pytest.fixture(scope="session")
def load():
    """load(name, **options): a model of support.CHECKPOINTS, loaded once a session for each set of options."""
    models = {}

    def get(name, **options):
        if options.get("device") != "cpu":
            options = {**support.DEVICE, **options}
        key = (name, tuple(sorted(options.items())))
        if key not in models:
            models[key] = qvl.Model(support.CHECKPOINTS[name], **options)
        return models[key]

    yield get
    models.clear()


@pytest.fixture(scope="session")
def tiny(load):
    """The bundled model with exact arithmetic."""
    return load("qvl-tiny", dtype="f32")


@pytest.fixture
def say(request):
    """say(line): prints a measured figure even when pytest captures output."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line):
        with capture.global_and_fixture_disabled():
            print(f"\n    {line}", end="", flush=True)

    return write
